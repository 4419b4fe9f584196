"""Send pictures through the autoencoder once and pack the results for training, on all devices of this machine.

    dydit-prepare-latents --data=images --path=imagenet/train --autoencoder=sd-vae-ft-ema --out=latents/in256
    dydit-prepare-latents --verify --out=latents/in256

Training then reads them: --config.data.name=latents --config.data.path=latents/in256. The command goes on where it was
stopped.
"""

from absl import flags

from dydit_jax.cli.flags import define_flags, read_flags
from dydit_jax.jobs.prepare_latents import LatentsRequest, prepare_latents, verify_latents
from dydit_jax.runtime.console import run


def main():
    """Run the command."""
    values = flags.FlagValues()
    required = define_flags(LatentsRequest, values)
    verify = flags.DEFINE_bool(
        "verify", False, "Make nothing: compare what is there with its checksums.", flag_values=values
    )

    def prepare_or_verify():
        if verify.value:
            verify_latents(values["out"].value)
        else:
            prepare_latents(read_flags(LatentsRequest, values))

    run(prepare_or_verify, values, about=__doc__, required=required)
