"""The parameters of step 0: random ones, replaced by those of another model as far as they fit (`train.init_from`).

Three things may differ from that model. Routers that it lacks stay random: the start of a DyDiT. The classes may be
others: each takes the row of a class of that model, their mean, or stays random, and "no class" always keeps its row.
The side of the images may be another: the sine-cosine table is computed for any, a stored one is interpolated.
"""

import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dydit_jax.checkpoints import Weights, describe_base
from dydit_jax.errors import InputError
from dydit_jax.labels import find_by_name, find_label, index_names, name_hint
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import is_low_rank
from dydit_jax.models.trainable import EVERYTHING, POSITION_TABLE, split_params
from dydit_jax.runtime.files import decode_text, locate
from dydit_jax.runtime.seeds import make_key
from dydit_jax.runtime.sharding import shardings
from dydit_jax.training.experiment import Experiment
from dydit_jax.training.update import TrainConfig
from dydit_jax.trees import flatten, unflatten

logger = logging.getLogger(__name__)

INIT_STEP = 2**32 - 1  # the key of the initial values is that of a step which no run reaches
LABEL_TABLE = "label_embed/table"
NO_ROW = -1  # of a class that no row is copied to


def starting_weights(model: Model, experiment: Experiment) -> Weights | None:
    """Load the weights of `train.init_from`; None where training starts from random values.

    Raises:
      InputError: weights of another shape than classes and image side explain, or that lack more than routers and
        low-rank updates.
    """
    if not experiment.train.init_from:
        return None
    source = load_checkpoint(experiment.train.init_from)
    if source.lora is not None:
        raise InputError(
            f"train.init_from {experiment.train.init_from} has updates that depend on the timestep; take its base."
        )
    found = flatten(source.params)
    own = {name: leaf.shape for name, leaf in flatten(model.abstract_params()).items()}
    # Their first axes are classes and tokens, which may differ.
    kept = lambda name, shape: shape[1:] if name in (LABEL_TABLE, POSITION_TABLE) else shape
    fits = lambda name, leaf: name in own and kept(name, leaf.shape) == kept(name, own[name])
    wrong = [f"{name} {leaf.shape}" for name, leaf in found.items() if not fits(name, leaf)]
    fresh = lambda name: "_router/" in name or is_low_rank(name) or name.startswith("guidance_embed/")
    wrong += [f"{name} missing" for name in own if name not in found and not fresh(name)]
    if wrong:
        raise InputError(f"train.init_from {experiment.train.init_from} is another model: {'; '.join(wrong[:6])}.")
    if source.process != experiment.process:
        message = "train.init_from %s is of %s, this training of %s: the network has another prediction to learn."
        logger.warning(message, experiment.train.init_from, source.process, experiment.process)
    return source


def starting_leaves(
    source: Weights | None, model: Model, experiment: Experiment, class_names: Sequence[str] = ()
) -> dict:
    """Return the leaves by path that replace random ones at step 0; {} where all stay random.

    Args:
      source: from `starting_weights`.
      model, experiment: what is trained.
      class_names: of its classes by label, as the data have them; empty where they are not known.

    Raises:
      InputError: a class map that does not fit.
    """
    if source is None:
        return {}
    leaves = flatten(source.params)
    rows = label_rows(source, model.config.classes, experiment.train, class_names)
    leaves[LABEL_TABLE] = _label_table(leaves[LABEL_TABLE], rows, model, experiment.train)
    if POSITION_TABLE in leaves and source.model.side != model.config.side:
        leaves[POSITION_TABLE] = _resized_positions(leaves[POSITION_TABLE], model.config)
        sides = source.model.side, model.config.side
        logger.info("The stored position table of side %d is interpolated to side %d (bicubic).", *sides)
    return leaves


def frozen_base(source: Weights | None, leaves: dict, model: Model, experiment: Experiment) -> dict | None:
    """Return the record of the weights that a training leaves parts of as they are, see `describe_base`; else None.

    Args:
      source, leaves: from `starting_weights` and `starting_leaves`.
      model, experiment: what is trained.

    Raises:
      InputError: parts that would be neither trained nor those of the source.
    """
    train = experiment.train
    if train.trainable == EVERYTHING:
        return None
    theirs = flatten(source.params)
    frozen = flatten(split_params(model.abstract_params(), train.trainable)[1])
    own = [name for name in frozen if name not in theirs or not np.array_equal(leaves[name], theirs[name])]
    if own:
        raise InputError(
            f"train.trainable {train.trainable} would leave {', '.join(own[:6])} untrained, which train.init_from "
            f"{train.init_from} does not have like this; train these too."
        )
    return describe_base(train.init_from, source)


def first_params(model: Model, experiment: Experiment, mesh: Mesh, source: dict) -> dict:
    """Make the parameters of step 0, directly in their shards: random ones, replaced by those of `source`.

    Args:
      model, experiment: what is trained.
      mesh: where.
      source: leaves by path, from `starting_leaves`.
    """
    layout = shardings(mesh, model.abstract_params())
    params = flatten(jax.jit(model.init, out_shardings=layout)(_init_key(experiment.train)))
    placed = {name: jax.device_put(leaf, params[name].sharding) for name, leaf in source.items()}
    return unflatten(params | placed)


def _init_key(train: TrainConfig):
    return jax.random.fold_in(make_key(train.seed), INIT_STEP)


# --- Classes -------------------------------------------------------------------------------------


def label_rows(source: Weights, classes: int, train: TrainConfig, class_names: Sequence[str] = ()) -> np.ndarray:
    """Choose the row of a model's label table that each class of another one starts from.

    By `train.class_map` where it is given; else by the classes' names where both sides know them; else by their numbers
    where the numbers of classes are equal; else by nothing.

    Args:
      source: the model that training starts from.
      classes: number of classes of the model that is trained.
      train: has the map.
      class_names: of these classes.

    Returns:
      Rows of the source's table, or `NO_ROW`, [classes + 1]; the last is that of "no class".

    Raises:
      InputError: a map with a class that there is not, or with one of ours twice.
    """
    theirs, rows = source.model.classes, np.full(classes + 1, NO_ROW)
    rows[classes] = theirs
    how, pairs = _matched_classes(source, classes, train, class_names)
    for own, label in pairs.items():
        rows[own] = label
    if classes != theirs or len(pairs) < classes or how == "train.class_map":
        message = "Of %d classes %d start from classes of %s, matched by %s; %d are new (train.new_classes=%s)."
        new = classes - len(pairs), train.new_classes
        logger.info(message, classes, len(pairs), train.init_from, how, *new)
    return rows


def kept_class_names(source: Weights | None, experiment: Experiment) -> tuple[str, ...]:
    """Return names for the classes of data without any: those of the classes that they start from.

    Args:
      source: from `starting_weights`.
      experiment: what is trained.

    Returns:
      By label; empty unless each class starts from a class of its own with a name.
    """
    if source is None:
        return ()
    classes, theirs = experiment.model.classes, dict(enumerate(source.class_names))
    _, pairs = _matched_classes(source, classes, experiment.train, ())
    kept = [pairs[label] for label in range(classes) if pairs.get(label) in theirs]
    return tuple(theirs[label] for label in kept) if len(set(kept)) == classes else ()


def _matched_classes(source: Weights, classes: int, train: TrainConfig, class_names: Sequence[str]) -> tuple[str, dict]:
    """Return what classes are matched by, in words, and the source's label of each class that has one."""
    theirs = source.model.classes
    if train.class_map:
        how, pairs = "train.class_map", _read_class_map(train.class_map, (classes, class_names), source)
    elif class_names and source.class_names:
        how, pairs = "their names", _match_names(class_names, source.class_names)
    elif classes == theirs:
        how, pairs = "their numbers", {label: label for label in range(classes)}
    else:
        how, pairs = "nothing", {}
    return how, pairs


def _match_names(own: Sequence[str], theirs: Sequence[str]) -> dict[int, int]:
    """Return the other label of each class whose name is that of one class there; of equal lists each its own.

    A name that is a number is a name here: what is called "7" here and there is one class.
    """
    if tuple(own) == tuple(theirs):  # also where several classes share a name
        return {label: label for label in range(len(own))}
    index = index_names(theirs)
    found = {label: find_by_name(name, index) for label, name in enumerate(own)}
    return {label: labels[0] for label, labels in found.items() if len(labels) == 1}


def _read_class_map(text: str, own: tuple[int, Sequence[str]], source: Weights) -> dict[int, int]:
    """Read "0:207,1:360", or a file with such a pair per line: own class, then the source's, by number or name."""
    is_file = locate(text).is_file()
    if not is_file and ":" not in text:
        raise InputError(f"train.class_map {text!r} is neither a file nor a map such as 0:207,1:360.")
    try:
        lines = decode_text(epath.Path(text).read_bytes()).splitlines() if is_file else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"train.class_map {text} can't be read as text ({error}).") from error
    pairs, ours = {}, (*own, index_names(own[1]))
    theirs = source.model.classes, source.class_names, index_names(source.class_names)
    for line in filter(None, map(str.strip, lines)):
        first, colon, second = line.rpartition(":")
        if not colon:
            raise InputError(f"train.class_map has {line[:80]!r}; a pair is <own class>:<class of train.init_from>.")
        label = _class_of(first.strip(), *ours, "this model")
        if label in pairs:
            raise InputError(f"train.class_map names the own class {first.strip()!r} twice; give each class once.")
        pairs[label] = _class_of(second.strip(), *theirs, "train.init_from")
    return pairs


def _class_of(word: str, classes: int, names: Sequence[str], index: list[dict], whose: str) -> int:
    label = find_label(word, index, f"train.class_map, {whose}")
    if label is None or label >= classes:
        raise InputError(
            f"train.class_map names the class {word[:80]!r}, which {whose} does not have; its classes are 0 to "
            f"{classes - 1}.{name_hint([word], names)}"
        )
    return label


def _label_table(table: np.ndarray, rows: np.ndarray, model: Model, train: TrainConfig) -> np.ndarray:
    """Return a table whose rows are those of another, or new where there is none, [classes + 1,D]."""
    table, new = np.asarray(table), rows == NO_ROW
    if not new.any():
        return table[rows]
    if train.new_classes == "mean":
        if len(table) < 2:
            raise InputError("train.new_classes='mean' needs classes to average; train.init_from has none.")
        return np.where(new[:, None], table[:-1].mean(0, dtype=np.float64).astype(table.dtype), table[rows])
    fresh = jax.jit(lambda key: model.init(key)["label_embed"]["table"])(_init_key(train))
    return np.where(new[:, None], np.asarray(fresh), table[rows])


def _resized_positions(table: np.ndarray, config: DiTConfig) -> np.ndarray:
    """Interpolate a table of positions [n,D] to those of a model [N,D]."""
    grid, old = config.side // config.patch, round(len(table) ** 0.5)
    square = np.asarray(table).reshape(old, old, -1)
    resized = jax.image.resize(square, (grid, grid, square.shape[-1]), "bicubic")
    return np.asarray(resized).reshape(grid * grid, -1)
