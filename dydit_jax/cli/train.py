"""Train a DiT or fine-tune it into a DyDiT.

    dydit-train --config digits_dit --workdir runs/digits_dit

Any key of the config can be set: --config.optimizer.learning_rate=1e-4. A work directory that holds a run of the same
configuration is continued.
"""

import dataclasses
import pathlib

from absl import flags
from ml_collections import config_flags

import dydit_jax.configs
from dydit_jax.cli.flags import define_flags, read_flags, read_meanings
from dydit_jax.errors import InputError
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.runtime.console import read_config, run
from dydit_jax.training.experiment import config_sections

CONFIGS = pathlib.Path(dydit_jax.configs.__file__).parent
SIZE = "A published size, such as XL/2, in the place of depth, width, heads and patch."


@dataclasses.dataclass(frozen=True)
class Training:
    """What a user asks of this command, beside the config.

    Attributes:
      workdir: folder of the run: configuration, metrics, checkpoints.
      from_step: go back to the checkpoint of this step; later ones are set aside, nothing is deleted.
    """

    workdir: str
    from_step: int | None = None


class ConfigParser(flags.ArgumentParser):
    """The parser of a config file's flag, for the names of the configs that come with the package too."""

    def __init__(self, files: flags.ArgumentParser):
        self._files = files

    def parse(self, text):
        """Run the config file that `text` means and return its config."""
        return self._files.parse(find_config(text))


def find_config(text: str) -> str:
    """Return the config file that `text` means, a path or a known name; what follows a colon is get_config's argument.

    Raises:
      InputError: neither; the message lists the known names.
    """
    name, colon, argument = text.partition(":")
    if pathlib.Path(name).is_file():
        return text
    if name not in known_configs():
        raise InputError(f"There is no file {name!r} and no config of that name; known: {', '.join(known_configs())}.")
    return f"{CONFIGS / name}.py{colon}{argument}"


def known_configs() -> list[str]:
    """List the configs that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))


def config_keys() -> dict[str, str]:
    """Return what every key of a config means, by its flag."""
    keys = {"config.model.size": SIZE}
    for section, cls in config_sections().items():
        keys |= {f"config.{section}.{name}": meaning for name, meaning in read_meanings(cls).items()}
    return keys


def main():
    """Run the command."""
    values = flags.FlagValues()
    meaning = f"The experiment: a config file, or one of {', '.join(known_configs())}."
    config = config_flags.DEFINE_config_file("config", None, meaning, lock_config=True, flag_values=values)
    values["config"].parser = ConfigParser(values["config"].parser)
    required = ["config", *define_flags(Training, values)]

    def train():
        request = read_flags(Training, values)
        train_and_evaluate(read_config(config), request.workdir, request.from_step)

    run(train, values, about=__doc__, required=required, keys=config_keys())
