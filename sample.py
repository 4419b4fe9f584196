"""Draw images from a checkpoint.

    python sample.py --checkpoint assets/digits_dydit.safetensors --labels 0,1,2 --out out/grid
    python sample.py --checkpoint runs/digits_dydit --num_images 1000 --out out/thousand --sampling.guidance=2.0

A grid needs --labels; a set of images --num_images, with labels drawn uniformly. The checkpoint brings its own sampling
settings; --sampling.* overrides them. Images depend on the seed and their index alone.
"""

from absl import flags

from dydit_jax.jobs.sample import Request, sample
from dydit_jax.runtime.console import run

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A .safetensors file, a folder with one, a training's work directory, or a published name."
)
FROM_STEP = flags.DEFINE_integer("from_step", None, "Step of a work directory's checkpoint; the newest by default.")
WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Of a work directory: its EMA or its raw parameters.")
OUT = flags.DEFINE_string("out", None, "Folder for the images: new, empty, or of the same job, which goes on.")
LABELS = flags.DEFINE_list("labels", None, "Labels of a grid, one column each: 0,1,2.")
ROWS = flags.DEFINE_integer("rows", 1, "Rows of the grid: images of each label.")
NUM_IMAGES = flags.DEFINE_integer("num_images", None, "Number of images with uniform labels, also as samples.npz.")
LABELS_FILE = flags.DEFINE_string("labels_file", None, "File with one label per line: a set with these labels.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of all noise and of uniform labels, 0 to 2^64 - 1.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images at once; does not change them.")
MODE = flags.DEFINE_string(
    "mode",
    "fast",
    "fast: only what is on is computed; gated: computed and multiplied by its gate; complete: all gates open.",
)
SEGMENTS = flags.DEFINE_integer("segments", None, "Programs that fast cuts the schedule into; decides by itself.")
TOKEN_CAPACITY = flags.DEFINE_list(
    "token_capacity", None, "Share of each image's tokens that pass an MLP at most: one number, or one per block."
)
PRECISION = flags.DEFINE_string("precision", "auto", "auto, bfloat16, float32 or highest.")
ROUTING = flags.DEFINE_bool("routing", False, "Also draw what was on over the timesteps: routing.png, plan.png.")
REPORT = flags.DEFINE_bool("report", False, "Also write one page about the job: report.html.")
flags.mark_flags_as_required(["checkpoint", "out"])

# Settings of the checkpoint that can be overridden; unset ones are the checkpoint's own.
SAMPLING = {
    "sampler": flags.DEFINE_string("sampling.sampler", None, "ddpm or ddim."),
    "steps": flags.DEFINE_string("sampling.steps", None, "Kept timesteps: 250, ddim50, or sections 10,20,30."),
    "eta": flags.DEFINE_float("sampling.eta", None, "Share of DDPM's noise in DDIM, 0 to 1."),
    "clip": flags.DEFINE_float("sampling.clip", None, "Bound on the estimated image, for models in pixels."),
    "guidance": flags.DEFINE_float("sampling.guidance", None, "Scale of classifier-free guidance; 1 is none."),
    "guided_channels": flags.DEFINE_string("sampling.guided_channels", None, "first_three or all."),
    "autoencoder": flags.DEFINE_string("sampling.autoencoder", None, "Decoder of latents: a file or a published name."),
}


def main():
    sample(
        Request(
            checkpoint=CHECKPOINT.value,
            from_step=FROM_STEP.value,
            weights=WEIGHTS.value,
            out=OUT.value,
            labels=LABELS.value,
            rows=ROWS.value,
            num_images=NUM_IMAGES.value,
            labels_file=LABELS_FILE.value,
            seed=SEED.value,
            batch_size=BATCH_SIZE.value,
            mode=MODE.value,
            segments=SEGMENTS.value,
            token_capacity=TOKEN_CAPACITY.value,
            precision=PRECISION.value,
            draw_routing=ROUTING.value,
            report=REPORT.value,
            overrides={name: flag.value for name, flag in SAMPLING.items() if flag.value is not None},
        )
    )


if __name__ == "__main__":
    run(main)
