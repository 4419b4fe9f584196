"""Turn PyTorch weights of a DiT, a DyDiT or a Stable Diffusion autoencoder into ours, and back.

    dydit-convert --source dydit_0.7.pth --out checkpoints/dydit-xl2-0.7
    dydit-convert --source DiT-XL-2-256x256.pt --out start.safetensors --add_routers first_on --order
    dydit-convert --source checkpoints/dydit-xl2-0.7 --out back.pt --export
    dydit-convert --source runs/digits_lora --out merged.safetensors --merge

What the model is shows in the tensors, in the training's options that a file may hold, and in a config.json beside it;
flags say the rest, and what nobody says is a guess, which the report names. A file that wants to run code is refused.
"""

import functools

from absl import flags

from dydit_jax.cli.flags import define_flags, read_flags
from dydit_jax.convert.conversion import Conversion, convert, export
from dydit_jax.loading import load_checkpoint, merge
from dydit_jax.runtime.console import run


def main():
    """Run the command."""
    values = flags.FlagValues()
    required = define_flags(Conversion, values)
    back = flags.DEFINE_bool(
        "export", False, "The way back: write our weights in the original's layout.", flag_values=values
    )
    join = flags.DEFINE_bool(
        "merge", False, "Write an adapter of ours and its base as complete weights of ours.", flag_values=values
    )

    def convert_or_export():
        request = read_flags(Conversion, values)
        if join.value:
            merge(request.source, request.out, base=request.base, overwrite=request.overwrite)
        elif back.value:
            load = functools.partial(load_checkpoint, base=request.base)
            export(request.source, request.out, overwrite=request.overwrite, load=load)
        else:
            convert(request)

    run(convert_or_export, values, about=__doc__, required=required)
