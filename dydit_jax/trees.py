"""Nested dicts of arrays seen as flat ones, with paths such as "blocks/mlp/up" for keys."""

from collections.abc import Mapping

import jax

from dydit_jax.errors import InputError

MOST_PARTS = 16  # of a path


def path_name(path) -> str:
    """Return a JAX key path as one string, its parts joined by slashes."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def flatten(tree) -> dict:
    """Return the leaves of any pytree by their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(leaves: Mapping) -> dict:
    """Return the nested dict whose leaves have these paths.

    Raises:
      InputError: a path that leads through a leaf, or one of more than `MOST_PARTS` parts: whoever walks through the
        tree goes that deep.
    """
    for path in leaves:
        if path.count("/") >= MOST_PARTS:
            raise InputError(
                f"The array {path!r:.80} has a name of {path.count('/') + 1} parts; at most {MOST_PARTS} are read. "
                "Take another file."
            )
    nodes = {path[:end] for path in leaves for end, letter in enumerate(path) if letter == "/"}
    both = sorted(nodes & leaves.keys())
    if both:
        raise InputError(f"{both[0]!r:.80} is an array and has arrays below it; it must be the one or the other.")
    tree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
