"""Classes by number or by name: what users write -> labels, with a hint where a name is nearly right.

A decimal number always is the label itself, also where a class is called by another number. A name may hold synonyms
with commas between them, as ImageNet's do ("tench, Tinca tinca"); each of them is a name too. A name as it is written
comes before the same in another case, and both before synonyms. Classes that share a name, as ImageNet's two cranes do,
are chosen by number.
"""

import difflib
import unicodedata
from collections.abc import Sequence

import numpy as np

from dydit_jax.errors import InputError, escape_unprintable, some_of

MOST_DIGITS = 12  # of a number
SHOWN_LETTERS = 40  # of what stands in the place of a label
NEAR = 0.6  # the likeness from which on a name is offered for another


def spell_name(name: str) -> str:
    """Return a class's name as it is compared and shown: composed (Unicode's NFC), with single spaces, and printable.

    File systems and keyboards spell the same accented letter in one or two code points, and names may be a stranger's.
    """
    return escape_unprintable(" ".join(unicodedata.normalize("NFC", name).split()))


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
      InputError: no labels, words that are none, with names that are near, or names that several classes share.
    """
    words = [str(word).strip() for word in words]
    index = index_names(names)
    labels = [find_label(word, index, where) for word in words]
    wrong = [word for word, label in zip(words, labels) if label is None or label > classes]
    if wrong or not words:
        allowed = f"numbers from 0 to {classes - 1} ({classes} for no class)" if classes else "0, for no class"
        known = " or names of classes" if names else ""
        found = ", ".join(ascii(word[:SHOWN_LETTERS])[1:-1] for word in wrong[:5]) or "nothing"
        raise InputError(f"{where} must hold {allowed}{known}, not {found}.{name_hint(wrong[:1], names)}")
    return np.asarray(labels, np.int32)


def index_names(names: Sequence[str]) -> list[dict[str, list[int]]]:
    """Return the labels of names: as they are written, in any case, and by their synonyms, to try in this order."""
    synonyms = [(part, label) for label, name in enumerate(names) for part in name.split(",")]
    whole = [(name, label) for label, name in enumerate(names)]
    index = []
    for spell, called in ((spell_name, whole), (_plain, whole), (_plain, synonyms)):
        index.append(labels := {})
        for name, label in called:
            labels.setdefault(spell(name), []).append(label)
    return index


def find_by_name(name: str, index: list[dict[str, list[int]]]) -> list[int]:
    """Return the labels of the classes of a name, in order: none, one, or several that share it.

    Args:
      name: as users or data write it.
      index: from `index_names`.
    """
    places = zip((spell_name, _plain, _plain), index)
    return sorted(set(next((labels[spell(name)] for spell, labels in places if spell(name) in labels), [])))


def find_label(word: str, index: list[dict[str, list[int]]], where: str) -> int | None:
    """Return the label that a number or a name stands for; None for a name that no class has.

    Args:
      word: the number or name.
      index: from `index_names`.
      where: the word comes from, for the message.

    Raises:
      InputError: a name that several classes have.
    """
    if word.isascii() and word.isdecimal():
        return int(word) if len(word) <= MOST_DIGITS else None
    labels = find_by_name(word, index)
    if len(labels) > 1:
        shown = ascii(word[:SHOWN_LETTERS])
        raise InputError(f"{where}: {shown} is the name of the classes {some_of(labels)}; give the number of one.")
    return labels[0] if labels else None


def name_hint(words: Sequence[str], names: Sequence[str]) -> str:
    """Return a sentence with the names that are near to a word, or else with some of all names; "" without names."""
    if not names:
        return ""
    known = {_plain(part): part.strip() for name in names for part in (name, *name.split(","))}
    near = [known[match] for word in words for match in difflib.get_close_matches(_plain(word), known, 3, NEAR)]
    if near:
        return f" Did you mean {' or '.join(repr(name) for name in near)}?"
    return f" Names: {some_of(names, most=10)}."


def _plain(name: str) -> str:
    return spell_name(name).casefold()
