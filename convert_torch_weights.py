"""Turn PyTorch weights of a DiT, a DyDiT or a Stable Diffusion autoencoder into ours, and back.

    python convert_torch_weights.py --source dydit_0.7.pth --out checkpoints/dydit-xl2-0.7
    python convert_torch_weights.py --source DiT-XL-2-256x256.pt --out start.safetensors --add_routers first_on --order
    python convert_torch_weights.py --source checkpoints/dydit-xl2-0.7 --out back.pt --export

Size, patch, classes, image side and layout are read from the tensors. A file that wants to run code is refused.
"""

from absl import flags

from dydit_jax.convert.conversion import Conversion, convert, export
from dydit_jax.runtime.console import run

SOURCE = flags.DEFINE_string("source", None, "PyTorch file (.pt, .pth, .bin, .safetensors); with --export, ours.")
OUT = flags.DEFINE_string("out", None, "A .safetensors file, or a folder for one and its report.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "Which weights of a training file: ema or model.")
HEADS = flags.DEFINE_integer("heads", None, "Number of heads, where the size is not a published one.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Side of the images in pixels, where no position table tells.")
ROUTERS = flags.DEFINE_string("routers", None, "Layout of the routers, where the tensors leave it open.")
ADD_ROUTERS = flags.DEFINE_string("add_routers", "", "Give a static DiT fresh routers: first_on or free.")
ORDER = flags.DEFINE_bool("order", False, "Put heads and MLP channels of a static DiT in order of magnitude.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of fresh routers.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an output that exists.")
VERIFY = flags.DEFINE_bool("verify", False, "Run both networks and print the largest difference; needs PyTorch.")
EXPORT = flags.DEFINE_bool("export", False, "The way back: write our weights in the original's layout.")
flags.mark_flags_as_required(["source", "out"])


def main():
    if EXPORT.value:
        export(SOURCE.value, OUT.value, overwrite=OVERWRITE.value)
        return
    convert(
        Conversion(
            source=SOURCE.value,
            out=OUT.value,
            weights=WEIGHTS.value,
            heads=HEADS.value,
            image_size=IMAGE_SIZE.value,
            routers=ROUTERS.value,
            add_routers=ADD_ROUTERS.value,
            order=ORDER.value,
            seed=SEED.value,
            overwrite=OVERWRITE.value,
            verify=VERIFY.value,
        )
    )


if __name__ == "__main__":
    run(main)
