"""Which files of a folder are pictures, for training, evaluation and preparation alike.

Pictures are recognised by their suffix. Files and folders that systems and tools leave behind are neither pictures nor
classes. Whatever else is passed over is counted and named in the log, so that nothing disappears silently.
"""

import logging
import unicodedata
from collections.abc import Iterable

import numpy as np

from dydit_jax.data.images import SUFFIXES
from dydit_jax.errors import InputError
from dydit_jax.labels import spell_name

# Beside all names that begin with a dot, such as .ipynb_checkpoints, .DS_Store and the ._x of macOS.
LEFT_BY_SYSTEMS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
LEFT_BY_SYSTEMS += ("thumbs.db", "desktop.ini")
SET_FOLDER, SET_MANIFEST = "images", "manifest.json"  # of what sample.py writes

logger = logging.getLogger(__name__)


def name_order(name: str) -> tuple[str, str]:
    """Return what files and folders are sorted by: their name, however the file system spells its accents."""
    return unicodedata.normalize("NFC", name), name


def is_left_by_system(name: str) -> bool:
    """Return whether a file or folder of this name, or relative path, was left by a system and is no data."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part.lower() in LEFT_BY_SYSTEMS for part in parts)


def is_picture(name: str) -> bool:
    """Return whether a file of this name, or relative path, is taken for a picture."""
    return name.lower().endswith(SUFFIXES) and not is_left_by_system(name)


def list_class_folders(folder) -> tuple[list, np.ndarray]:
    """Return the pictures of a folder of class folders and their labels, both in alphabetical order.

    Raises:
      InputError: no class folders, an empty one, folders inside them, two of one name, or one that can't be listed.
    """
    inside = _list_folder(folder)
    classes = [path for path in inside if _is_data_folder(path)]
    if not classes:
        raise InputError(f"{folder} has no sub-folders; it needs one per class.")
    names = {path.name for path in classes}
    if len({spell_name(name) for name in names}) < len(names):
        raise InputError(
            f"{folder} has class folders whose names differ in unseen letters alone; merge or rename them."
        )
    files, labels, ignored = [], [], [path.name for path in inside if path.name not in names]
    for label, place in enumerate(classes):
        pictures, others = _pictures_and_others(place)
        nested = [path.name for path in others if _is_data_folder(path)]
        if nested:
            raise InputError(
                f"Class folder {place} has folders inside ({', '.join(nested[:3])}); name the level above them."
            )
        if not pictures:
            raise InputError(f"Class folder {place} has no pictures ({', '.join(SUFFIXES)}); fill it or remove it.")
        files += pictures
        labels += [label] * len(pictures)
        ignored += [f"{place.name}/{path.name}" for path in others]
    log_ignored(folder, ignored)
    return files, np.asarray(labels, np.int32)


def list_pictures(folder) -> list:
    """Return the pictures of a folder without classes, in alphabetical order.

    Raises:
      InputError: none, pictures beside folders of pictures, or a folder that can't be listed.
    """
    files, others = _pictures_and_others(folder)
    filled = [place.name for place in others if _is_data_folder(place) and _pictures_and_others(place)[0]]
    if filled:
        folders = f"{len(filled)} folders of pictures ({', '.join(filled[:3])})"
        raise InputError(
            f"{folder} has {folders} and {len(files)} pictures beside them; name a folder that holds the set alone."
        )
    if not files:
        raise InputError(f"{folder} has no pictures ({', '.join(SUFFIXES)}).")
    log_ignored(folder, [path.name for path in others])
    return files


def find_set(folder):
    """Return where a set lies: in a folder, or in `images` inside it, as `sample.py` writes, if that is no class of it.

    Raises:
      InputError: a folder that can't be listed.
    """
    inside = folder / SET_FOLDER
    if not inside.is_dir():
        return folder
    others = [path for path in _list_folder(folder) if path.name != SET_FOLDER and _is_data_folder(path)]
    filled = [path.name for path in others if _pictures_and_others(path)[0]]
    if filled and not (folder / SET_MANIFEST).is_file():
        return folder
    log_ignored(folder, filled)
    return inside


def list_set(folder) -> list:
    """Return the pictures of a folder, or those of all its class folders, in alphabetical order.

    Raises:
      InputError: see `list_pictures` and `list_class_folders`.
    """
    pictures, others = _pictures_and_others(folder)
    has_classes = any(_is_data_folder(place) and _pictures_and_others(place)[0] for place in others)
    return list_class_folders(folder)[0] if has_classes and not pictures else list_pictures(folder)


def log_ignored(where, names: Iterable[str]) -> None:
    """Log what was passed over: a warning for possible data, a note for what systems leave behind."""
    names = list(names)
    left = [name for name in names if is_left_by_system(name)]
    unknown = [name for name in names if not is_left_by_system(name)]
    if left:
        logger.info("%s: %d entries of the system's are ignored (%s).", where, len(left), _some(left))
    if unknown:
        logger.warning(
            "%s: %d entries are ignored, which are no pictures by their place or suffix (%s).",
            where,
            len(unknown),
            _some(unknown),
        )


def _pictures_and_others(folder) -> tuple[list, list]:
    inside = _list_folder(folder)
    return [path for path in inside if is_picture(path.name)], [path for path in inside if not is_picture(path.name)]


def _is_data_folder(path) -> bool:
    return not is_left_by_system(path.name) and path.is_dir()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _list_folder(folder) -> list:
    """Return the content of a folder, in alphabetical order."""
    try:
        return sorted(folder.iterdir(), key=lambda path: name_order(path.name))
    except OSError as error:
        raise InputError(f"{folder} can't be listed: {error.strerror or error}.") from error
