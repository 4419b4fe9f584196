"""What ends a training before its last step, and what it says then: always which checkpoint there is to go on from."""

import contextlib

import jax

from dydit_jax.checkpoints.reading import saved_steps
from dydit_jax.checkpoints.runs import Run
from dydit_jax.errors import InputError, StopError
from dydit_jax.runtime.peers import RESTART_CODE
from dydit_jax.training.experiment import Experiment
from dydit_jax.training.update import TrainState


def about_newest(workdir) -> str:
    """Say which checkpoint there is to go on from."""
    steps = saved_steps(workdir)
    if not steps:
        return "There is no whole checkpoint yet."
    return f"The newest whole checkpoint is of step {steps[-1]}; the same command continues from it."


@contextlib.contextmanager
def checkpoint_named(run: Run, workdir):
    """Turn a failure to read or write, of a full disk say, into the end of the run that names its newest checkpoint."""
    try:
        yield
    except (InputError, OSError) as error:
        if jax.process_count() == 1:  # several may wait for one that failed likewise
            with contextlib.suppress(StopError):
                run.wait()
        raise StopError(f"{' '.join(str(error).split())} {about_newest(workdir)}") from error


def stopped_at(step: int) -> StopError:
    """Return what ends a run that is asked to leave, whose checkpoint of this step is written."""
    return StopError(f"Stopped: step {step} is saved, the same command continues from it.", RESTART_CODE)


def require_finite(finite, step: int, state: TrainState, workdir) -> None:
    """Stop before a state with a value that is not a number is trained or saved.

    Updates that make one are refused: it came with the weights that the run started from, or memory has failed.
    """
    if not finite((state.params, state.ema, state.opt_state, state.frozen)):
        raise StopError(
            f"The state of step {step} holds values that are not finite (NaN or infinite); it is neither trained nor "
            f"saved. {about_newest(workdir)}"
        )


def require_progress(step: int, metrics: dict, run: Run, experiment: Experiment) -> None:
    """Stop a run whose batches are all refused: it would go on doing nothing for days."""
    skipped = int(metrics["optimizer/skipped_in_a_row"])
    if skipped >= experiment.train.max_skips:
        raise StopError(
            f"Step {step}: the last {skipped} batches were all skipped (loss {metrics['loss/total']:.4g}, gradient "
            f"norm {metrics['optimizer/gradient_norm']:.4g}). The newest checkpoint is of step {run.latest_step}; look "
            "at the data, the learning rate and optimizer.skip_norm before going on from it."
        )
