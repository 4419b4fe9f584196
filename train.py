"""Train a DiT or fine-tune it into a DyDiT.

    python train.py --config configs/digits_dit.py --workdir runs/digits_dit

Any key of the config can be set: --config.optimizer.learning_rate=1e-4. A work directory that holds a run of the same
configuration is continued.
"""

from absl import flags
from ml_collections import config_flags

from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.runtime.console import read_config, run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, e.g. configs/digits_dit.py.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: configuration, metrics, checkpoints.")
FROM_STEP = flags.DEFINE_integer(
    "from_step", None, "Go back to the checkpoint of this step; later ones are set aside, nothing is deleted."
)
flags.mark_flags_as_required(["config", "workdir"])


def main():
    train_and_evaluate(read_config(CONFIG), WORKDIR.value, FROM_STEP.value)


if __name__ == "__main__":
    run(main)
