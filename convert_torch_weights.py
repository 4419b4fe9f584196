"""Turn PyTorch weights of a DiT, a DyDiT or a Stable Diffusion autoencoder into ours, and back.

    python convert_torch_weights.py --source dydit_0.7.pth --out checkpoints/dydit-xl2-0.7
    python convert_torch_weights.py --source DiT-XL-2-256x256.pt --out start.safetensors --add_routers first_on --order
    python convert_torch_weights.py --source checkpoints/dydit-xl2-0.7 --out back.pt --export

What the model is shows in the tensors, in the training's options that a file may hold, and in a config.json beside it;
flags say the rest, and what nobody says is a guess, which the report names. A file that wants to run code is refused.
"""

from absl import flags

from dydit_jax.convert.conversion import Conversion, convert, export
from dydit_jax.runtime.console import run

SOURCE = flags.DEFINE_string("source", None, "PyTorch file (.pt, .pth, .bin, .safetensors); with --export, ours.")
OUT = flags.DEFINE_string("out", None, "A .safetensors file, or a folder for one and its report.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "Which weights of a training file: ema or model.")
HEADS = flags.DEFINE_integer("heads", None, "Number of heads, which the tensors of a static DiT do not show.")
CLASSES = flags.DEFINE_integer("classes", None, "Number of classes: all rows of the label table, or all but one.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Side of the images in pixels, also of a model in latents.")
SPACE = flags.DEFINE_string("space", None, "What the model draws: latent or pixels.")
ROUTERS = flags.DEFINE_string("routers", None, "Layout of the routers, where the tensors leave it open.")
LATENT_SCALE = flags.DEFINE_float("latent_scale", None, "Of an autoencoder: the factor of its latents.")
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
            classes=CLASSES.value,
            image_size=IMAGE_SIZE.value,
            space=SPACE.value,
            routers=ROUTERS.value,
            latent_scale=LATENT_SCALE.value,
            add_routers=ADD_ROUTERS.value,
            order=ORDER.value,
            seed=SEED.value,
            overwrite=OVERWRITE.value,
            verify=VERIFY.value,
        )
    )


if __name__ == "__main__":
    run(main)
