"""Turn PyTorch weights of a DiT, a DyDiT or a Stable Diffusion autoencoder into ours, and back.

    dydit-convert --source dydit_0.7.pth --out checkpoints/dydit-xl2-0.7
    dydit-convert --source DiT-XL-2-256x256.pt --out start.safetensors --add_routers first_on --order
    dydit-convert --source checkpoints/dydit-xl2-0.7 --out back.pt --export original
    dydit-convert --source runs/flowers --out flowers-diffusers --export diffusers
    dydit-convert --source runs/flowers --push hf://me/flowers
    dydit-convert --source runs/digits_lora --out merged.safetensors --merge

What the model is shows in the tensors, in the training's options that a file may hold, and in a config.json beside it;
flags say the rest, and what nobody says is a guess, which the report names. A file that wants to run code is refused.
"""

import dataclasses
import functools

from absl import flags

from dydit_jax.cli.flags import define_flags, read_flags
from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.exporting import EXPORT_LAYOUTS, Export, export
from dydit_jax.convert.publishing import push
from dydit_jax.errors import InputError
from dydit_jax.loading import find_weights, load_checkpoint, merge
from dydit_jax.runtime.console import run

# What a command does, by the flags that ask for it, and which others it reads.
READ = {
    "convert": tuple(field.name for field in dataclasses.fields(Conversion) if field.name != "base"),
    "--merge": ("source", "out", "base", "overwrite"),
    "--export": ("source", "out", "base", "overwrite", "autoencoder"),
    "--push": ("source", "overwrite"),
    "--export with --push": ("source", "out", "base", "overwrite", "autoencoder"),
}


def main():
    """Run the command."""
    values = flags.FlagValues()
    required = [name for name in define_flags(Conversion, values) if name != "out"]  # which --push does without
    layouts = list(EXPORT_LAYOUTS)
    meaning = "The way back: write our weights in the original's layout, or as the folder of diffusers' DiTPipeline."
    flags.DEFINE_enum("export", None, layouts, meaning, flag_values=values)
    meaning = "With --export diffusers: an autoencoder of ours, by file or name, that goes into the folder."
    flags.DEFINE_string("autoencoder", "", meaning, flag_values=values)
    meaning = (
        "Send a finished folder, --source or what --export diffusers writes, to hf://owner/name, with a model card."
    )
    flags.DEFINE_string("push", "", meaning, flag_values=values)
    meaning = "Write an adapter of ours and its base as complete weights of ours."
    flags.DEFINE_bool("merge", False, meaning, flag_values=values)
    run(lambda: _carry_out(_choose_action(values), values), values, about=__doc__, required=required)


def _choose_action(values: flags.FlagValues) -> str:
    """Return what the flags ask for, a key of `READ`; raise where it is more than one command does."""
    merges, layout, pushes = (values[name].value for name in ("merge", "export", "push"))
    if merges and layout:
        raise InputError(
            "--merge and --export are one command each; --export merges an adapter too: leave out --merge."
        )
    if merges and pushes:
        raise InputError(
            "--merge and --push are one command each: first --merge with a folder as --out, then --push with that "
            "folder as --source."
        )
    if pushes and layout not in (None, "diffusers"):
        raise InputError(f"--push sends no files of --export {layout}; give --export diffusers, or leave out one.")
    asked = [name for name, value in (("--merge", merges), ("--export", layout), ("--push", pushes)) if value]
    return " with ".join(asked) or "convert"


def _require_read(action: str, values: flags.FlagValues) -> None:
    """Raise unless an action reads all flags that were given, and has a place to write to."""
    known = {*READ["convert"], "base", "autoencoder"}
    unread = sorted(name for name in known - set(READ[action]) if values[name].value != values[name].default)
    if unread:
        what = "A conversion from PyTorch" if action == "convert" else action
        raise InputError(f"{what} does not read --{unread[0]}; leave it out, or give it to the command that does.")
    if "out" in READ[action] and not values["out"].value:
        raise InputError("--out is required: a .safetensors file, or a folder.")


def _carry_out(action: str, values: flags.FlagValues) -> None:
    _require_read(action, values)
    source, out, base, overwrite = (values[name].value for name in ("source", "out", "base", "overwrite"))
    if action == "convert":
        convert(read_flags(Conversion, values))
    if action == "--merge":
        merge(source, out, base=base, overwrite=overwrite)
    if action.startswith("--export"):
        settings = dict(layout=values["export"].value, autoencoder=values["autoencoder"].value, overwrite=overwrite)
        export(Export(source, out, **settings), functools.partial(load_checkpoint, base=base), find_weights)
    if action.endswith("--push"):
        push(out or source, values["push"].value, overwrite=overwrite)
