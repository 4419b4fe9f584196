"""Make one dataset of array_record files from class folders or tars, without TensorFlow.

    python tools/prepare_imagenet.py --source=ILSVRC2012_img_train.tar --out=data/imagenet

It keeps every file byte for byte. A command that was killed goes on when it is given again. Read the dataset with
--config.data.name=tfds and the path that the command says at its end.
"""

from absl import flags

from dydit_jax.data.packing import prepare_pictures
from dydit_jax.runtime.console import run

SOURCE = flags.DEFINE_string(
    "source", None, "Folder of class folders or of class tars, or one tar of tars.", required=True
)
OUT = flags.DEFINE_string("out", None, "Folder for the dataset: new, empty, or of the same command.", required=True)
MAX_BAD = flags.DEFINE_integer("max_bad", 100, "Unreadable pictures that are left out.")


def main():
    prepare_pictures(SOURCE.value, OUT.value, max_bad=MAX_BAD.value)


if __name__ == "__main__":
    run(main)
