"""Files of labels, one for each image of a set: numbers, or names of classes."""

from dydit_jax.errors import InputError
from dydit_jax.jobs.sample_folder import MOST_IMAGES
from dydit_jax.runtime.files import decode_text, locate

LABEL_BYTES = 64  # of a name, on average at most
MOST_BYTES = MOST_IMAGES * LABEL_BYTES


def read_words(path) -> list[str]:
    """Read a file of labels: numbers stand between spaces or line ends, a name is a line.

    Args:
      path: of a text in UTF-8, or in UTF-16 with its mark, as Windows writes it.

    Returns:
      What it holds, in order, as it is written there.

    Raises:
      InputError: no such file, no text, or more labels than images can be drawn.
    """
    path = locate(path)
    if not path.is_file():
        raise InputError(f"There is no file {path} (--labels_file).")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise InputError(
                f"{path} is larger than {MOST_BYTES / 1e6:.0f} MB, too large for the labels of {MOST_IMAGES} images; "
                "numbers take less room than names."
            )
        lines = decode_text(content).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as text; --labels_file wants one label per line ({error}).") from error
    are_numbers = lambda line: "".join(line.split()).isdecimal()
    words = [word for line in lines if line.strip() for word in (line.split() if are_numbers(line) else [line])]
    if len(words) > MOST_IMAGES:
        raise InputError(f"{path} holds {len(words)} labels; at most {MOST_IMAGES} images are drawn at once.")
    return words
