"""Send pictures through the autoencoder once and pack the results for training, on all devices of this machine.

    python tools/prepare_latents.py --data=images --path=imagenet/train --autoencoder=sd-vae-ft-ema --out=latents/in256
    python tools/prepare_latents.py --verify --out=latents/in256

Training then reads them: --config.data.name=latents --config.data.path=latents/in256. The command goes on where it was
stopped.
"""

from absl import flags

from dydit_jax.errors import InputError
from dydit_jax.jobs.prepare_latents import LatentsRequest, prepare_latents, verify_latents
from dydit_jax.runtime.console import run

DATA = flags.DEFINE_string("data", "images", "images: a folder per class; tfds: a prepared dataset.")
PATH = flags.DEFINE_string("path", "", "Of the pictures: the folder, or <folder or name>/<split>.")
AUTOENCODER = flags.DEFINE_string("autoencoder", "sd-vae-ft-ema", "A file or a published name.")
OUT = flags.DEFINE_string("out", None, "Folder for the latents.", required=True)
SIDE = flags.DEFINE_integer("side", 256, "Side of the cropped pictures, in pixels.")
CHUNK = flags.DEFINE_integer("chunk", 1024, "Pictures between two points to go on from.")
THREADS = flags.DEFINE_integer("threads", 4, "Threads that read pictures.")
MAX_BAD = flags.DEFINE_integer("max_bad", 100, "Unreadable pictures that are replaced by their neighbours.")
VERIFY = flags.DEFINE_bool("verify", False, "Make nothing: compare what is there with its checksums.")


def main():
    if VERIFY.value:
        verify_latents(OUT.value)
        return
    if not PATH.value:
        raise InputError("--path is empty; name the pictures.")
    prepare_latents(
        LatentsRequest(
            data=DATA.value,
            path=PATH.value,
            autoencoder=AUTOENCODER.value,
            out=OUT.value,
            side=SIDE.value,
            chunk=CHUNK.value,
            threads=THREADS.value,
            max_bad=MAX_BAD.value,
        )
    )


if __name__ == "__main__":
    run(main)
