"""Make one dataset of array_record files from class folders or tars, without TensorFlow.

    dydit-prepare-images --source=ILSVRC2012_img_train.tar --out=data/imagenet

It keeps every file byte for byte. A command that was killed goes on when it is given again. Read the dataset with
--config.data.name=tfds and the path that the command says at its end.
"""

import dataclasses

from absl import flags

from dydit_jax.cli.flags import define_flags, read_flags
from dydit_jax.runtime.console import run


@dataclasses.dataclass(frozen=True)
class Packing:
    """What a user asks of this command.

    Attributes:
      source: a folder of class folders or of class tars, or one tar of tars.
      out: folder for the dataset: new, empty, or of the same command.
      max_bad: unreadable pictures that are left out before the command stops.
    """

    source: str
    out: str
    max_bad: int = 100


def main():
    """Run the command."""
    values = flags.FlagValues()
    required = define_flags(Packing, values)

    def prepare():
        from dydit_jax.data.packing import prepare_pictures  # here: it brings tensorflow_datasets

        request = read_flags(Packing, values)
        prepare_pictures(request.source, request.out, max_bad=request.max_bad)

    run(prepare, values, about=__doc__, required=required)
