"""Which executions there are, which of them a model can use, and which one serves as a rule."""

from dydit_jax.errors import InputError
from dydit_jax.fast.execution.mosaic import Mosaic
from dydit_jax.fast.execution.triton import Triton, TritonDense, TritonFused, TritonMasked
from dydit_jax.fast.execution.xla import Gather, OneHot, Switch
from dydit_jax.models.execution import Dense, Masked, TokenExecution, TopK
from dydit_jax.registry import Registry

BUILT_IN = {execution.name: execution for execution in (Switch, Gather, OneHot, Masked, Triton, TritonFused, Mosaic)}
EXECUTIONS = Registry("execution", TokenExecution, BUILT_IN, base=TokenExecution)
# Where several can run, the first is the rule; `autotune` measures.
DEFAULTS = {"cpu": ("switch",), "gpu": ("triton", "gather"), "tpu": ("one_hot",)}


def register_execution(execution: type[TokenExecution]) -> type[TokenExecution]:
    """Add a class of one's own under its `name`; usable as a decorator.

    Raises:
      InputError: no name, a built-in one's, or a class that does not follow the protocol.
    """
    if not isinstance(getattr(execution, "name", None), str):
        raise InputError(f"{execution.__name__} needs a class attribute `name`: what it is called in a plan.")
    return EXECUTIONS.register(execution.name)(execution)


def find_execution(name: str, platform: str) -> TokenExecution:
    """Return the execution of a name, for a platform.

    Raises:
      InputError: an unknown name, with the known ones.
    """
    EXECUTIONS.require("execution", name)
    return EXECUTIONS[name](platform)


def available_executions(model, images: int) -> tuple[TokenExecution, ...]:
    """Return the executions that a model can run a pass of so many images in, those that guidance adds included."""
    return tuple(cls(model.platform) for cls in EXECUTIONS.values() if cls.available(model, images))


def default_execution(model) -> TokenExecution:
    """Return the execution that serves a model's platform best as a rule."""
    first = next(name for name in DEFAULTS[model.platform] if EXECUTIONS[name].available(model, 1))
    return EXECUTIONS[first](model.platform)


def dense_execution(model) -> TokenExecution:
    """Return the execution of a pass in which all tokens are open."""
    return (TritonDense if TritonDense.available(model, 1) else Dense)(model.platform)


def whole_execution(model) -> TokenExecution:
    """Return the execution of a run of `fast` that leaves nothing out: every token passes each MLP."""
    return (TritonMasked if TritonMasked.available(model, 1) else Masked)(model.platform)


def layer_executions(execution: TokenExecution, config, shares, *, images: int) -> tuple[TokenExecution, ...]:
    """Return the execution of every layer, with the capacity that fits one segment.

    Args:
      execution: of the run.
      config: the model's. A layer with a capacity of its own is top-k whatever the run's execution is.
      shares: `required_shares` of the segment's steps [steps,L]; None where nothing is known.
      images: of one pass on one device, those that guidance adds included.
    """
    if not execution.routed:
        return (execution,) * config.depth
    by_layer = [None] * config.depth if shares is None else shares.T
    return tuple(
        execution.with_capacity(of_layer, images=images, tokens=config.tokens)
        if capacity == config.tokens
        else TopK(execution.platform, (capacity,))
        for capacity, of_layer in zip(config.capacities, by_layer)
    )
