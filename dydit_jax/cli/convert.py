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

import functools

from absl import flags

from dydit_jax.cli.flags import define_flags, read_flags
from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.exporting import EXPORT_LAYOUTS, Export, export
from dydit_jax.convert.publishing import push
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint, merge
from dydit_jax.runtime.console import run


def main():
    """Run the command."""
    values = flags.FlagValues()
    required = [name for name in define_flags(Conversion, values) if name != "out"]  # which --push does without
    layouts = list(EXPORT_LAYOUTS)
    meaning = "The way back: write our weights in the original's layout, or as the folder of diffusers' DiTPipeline."
    layout = flags.DEFINE_enum("export", None, layouts, meaning, flag_values=values)
    meaning = "With --export diffusers: an autoencoder of ours that goes into the folder."
    autoencoder = flags.DEFINE_string("autoencoder", "", meaning, flag_values=values)
    meaning = "Send a finished folder, --source or what --export writes, to hf://owner/name, with a model card."
    address = flags.DEFINE_string("push", "", meaning, flag_values=values)
    join = flags.DEFINE_bool(
        "merge", False, "Write an adapter of ours and its base as complete weights of ours.", flag_values=values
    )

    def convert_or_export():
        if address.value and layout.value is None:
            push(values["source"].value, address.value, overwrite=values["overwrite"].value)
            return
        if values["out"].value is None:
            raise InputError("--out is required: a .safetensors file, or a folder.")
        request = read_flags(Conversion, values)
        if join.value:
            merge(request.source, request.out, base=request.base, overwrite=request.overwrite)
        elif layout.value is None:
            convert(request)
        else:
            settings = dict(layout=layout.value, autoencoder=autoencoder.value, overwrite=request.overwrite)
            load = functools.partial(load_checkpoint, base=request.base)
            export(Export(request.source, request.out, **settings), load)
            if address.value:
                push(request.out, address.value, overwrite=request.overwrite)

    run(convert_or_export, values, about=__doc__, required=required)
