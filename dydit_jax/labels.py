"""Classes by number or by name: what users write -> labels, with a hint where a name is nearly right.

A decimal number always is the label itself, also where a class is called by another number. A name may hold synonyms
with commas between them, as ImageNet's do ("tench, Tinca tinca"); each of them is a name too. Upper and lower case are
the same.
"""

import difflib
from collections.abc import Sequence

import numpy as np

from dydit_jax.errors import InputError, some_of

MOST_DIGITS = 12  # of a number
SHOWN_LETTERS = 40  # of what stands in the place of a label
NEAR = 0.6  # the likeness from which on a name is offered for another


def read_labels(words: Sequence, classes: int, names: Sequence[str], where: str) -> np.ndarray:
    """Read labels, of which `classes` itself stands for "no class".

    Args:
      words: numbers or names of classes.
      classes: number of classes.
      names: of the classes, by label; empty where they are not known.
      where: the labels come from, for messages.

    Returns:
      int32 [n].

    Raises:
      InputError: no labels, or words that are none; with names that are near.
    """
    words = [str(word).strip() for word in words]
    labels = [find_label(word, names) for word in words]
    wrong = [word for word, label in zip(words, labels) if label is None or label > classes]
    if wrong or not words:
        allowed = f"numbers from 0 to {classes - 1} ({classes} for no class)" if classes else "0, for no class"
        known = " or names of classes" if names else ""
        found = ", ".join(ascii(word[:SHOWN_LETTERS])[1:-1] for word in wrong[:5]) or "nothing"
        raise InputError(f"{where} must hold {allowed}{known}, not {found}.{name_hint(wrong[:1], names)}")
    return np.asarray(labels, np.int32)


def find_label(word: str, names: Sequence[str]) -> int | None:
    """Return the label that a number or a name stands for; None for a name that no class has."""
    if word.isascii() and word.isdecimal():
        return int(word) if len(word) <= MOST_DIGITS else None
    return _labels_of(names).get(_plain(word))


def name_hint(words: Sequence[str], names: Sequence[str]) -> str:
    """Return a sentence with the names that are near to a word, or else with some of all names; "" without names."""
    if not names:
        return ""
    known = {_plain(part): part.strip() for name in names for part in (name, *name.split(","))}
    near = [known[match] for word in words for match in difflib.get_close_matches(_plain(word), known, 3, NEAR)]
    if near:
        return f" Did you mean {' or '.join(repr(name) for name in near)}?"
    return f" Names: {some_of(names, most=10)}."


def _labels_of(names: Sequence[str]) -> dict[str, int]:
    """Return the labels of whole names and of synonyms; of two classes with one name, the first; whole names first."""
    synonyms = [(part, label) for label, name in enumerate(names) for part in name.split(",")]
    whole = [(name, label) for label, name in enumerate(names)]
    return {_plain(name): label for name, label in reversed([*whole, *synonyms])}


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
