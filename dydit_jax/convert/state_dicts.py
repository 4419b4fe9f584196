"""Which of a checkpoint's tensors are the network's, under which names: files as different training tools write them.

Trainings put a state dict beside optimizers and counters, and averages of weights beside the weights. `DataParallel`,
`torch.compile`, `AveragedModel`, FSDP and others put the network into a module of their own, whose name every tensor
then carries. Here the state dict is found and these names are removed.
"""

from collections.abc import Mapping

import numpy as np

from dydit_jax.errors import InputError

# Where a file keeps the averaged and the plain weights, and one that does not say which.
PARTS = {
    "ema": ("ema", "ema_state_dict", "ema_model", "ema_model_state_dict", "model_ema"),
    "model": ("model",),
    "either": ("state_dict", "model_state_dict", "module"),
}
# Names of modules around a network, by what they hold.
AROUND = {"ema": ("ema_model", "ema"), "model": ("online_model", "model"), "either": ("module",)}
# Modules that wrap any part of a network, and whose names stand between those of others.
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")  # single numbers beside averaged weights
MOST_LETTERS = 1000  # of a name


def pick_state_dict(content, weights: str, path) -> dict[str, np.ndarray]:
    """Find a network's tensors in what a file holds.

    Args:
      content: of the file.
      weights: which are wanted where a file has both: "ema" or "model".
      path: of the file, for messages.

    Returns:
      Tensors by their names in the network itself.

    Raises:
      InputError: no tensors, the weights that are wanted are not there, or names that can't be.
    """
    tensors = _tensors_of(_part(content, weights, path))
    tensors = {name: tensor for name, tensor in tensors.items() if not (name in COUNTERS and tensor.size == 1)}
    if not tensors:
        raise InputError(f"{path} holds no tensors by name.")
    for name in tensors:
        if not name.isprintable() or len(name) > MOST_LETTERS:
            raise InputError(f"{path} is refused: no tensor's name can be {name[:80]!a}.")
    return _without_modules_around(_without_modules_inside(tensors, path), weights, path)


def _part(content, weights: str, path):
    """Return the state dict among the parts of a training file, or the content itself if it is one."""
    if not isinstance(content, Mapping):
        return {}
    parts = {key for key, value in content.items() if isinstance(value, Mapping) and _tensors_of(value)}
    for key in (*PARTS[weights], *PARTS["either"]):
        if key in parts:
            return content[key]
    if parts & {*PARTS["ema"], *PARTS["model"]} or (parts and not _tensors_of(content)):
        raise _lacks(weights, parts, path)
    return content


def _lacks(weights: str, parts, path) -> InputError:
    return InputError(f"{path} holds {sorted(map(str, parts))[:8]}, but no {weights!r}; choose one with --weights.")


def _tensors_of(part: Mapping) -> dict[str, np.ndarray]:
    return {str(name): tensor for name, tensor in part.items() if isinstance(tensor, np.ndarray)}


def _without_modules_inside(tensors: dict, path) -> dict:
    names = {name: ".".join(part for part in name.split(".") if part not in INSIDE) for name in tensors}
    if len(set(names.values())) < len(names):
        raise InputError(f"{path} has two tensors of one name, apart from {' and '.join(INSIDE)}; save one of them.")
    return {names[name]: tensor for name, tensor in tensors.items()}


def _without_modules_around(tensors: dict, weights: str, path) -> dict:
    """Remove the names of modules around the network; where both weights stand side by side, take what is wanted."""
    while True:
        modules = {name.partition(".")[0] for name in tensors}
        wanted = modules.intersection(AROUND[weights])
        if not modules or not modules <= {*AROUND["ema"], *AROUND["model"], *AROUND["either"]}:
            return tensors
        if weights == "model" and modules <= {*AROUND["ema"]}:
            raise _lacks(weights, modules, path)
        if len(modules) > 1 and len(wanted) != 1:
            return tensors
        [module] = wanted if len(modules) > 1 else modules
        start = f"{module}."
        tensors = {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}
