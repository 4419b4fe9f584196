"""Look into models: which timesteps and patches are hard, and what a dynamic model leaves out of them.

    python analyze.py --checkpoints assets/digits_dydit.safetensors --out out/analysis --report
    python analyze.py --checkpoints runs/small,runs/large,runs/dydit --out out/compared --data=latents --data_path=in256

The first model is what the others are compared with. Every picture is a .png and an .svg, with its numbers as .csv.
"""

from absl import flags

from dydit_jax.jobs.analyze import Analysis, analyze
from dydit_jax.runtime.console import run

CHECKPOINTS = flags.DEFINE_list("checkpoints", None, "Models, with commas between them; see sample.py --checkpoint.")
OUT = flags.DEFINE_string("out", None, "Folder for the pictures; must be new or empty.")
DATA = flags.DEFINE_string("data", "", "Examples to measure on; the first model's training data by default.")
DATA_PATH = flags.DEFINE_string("data_path", "", "Folder of these examples, where they lie in files.")
NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 256, "Examples, spread evenly over the data.")
NUM_TIMESTEPS = flags.DEFINE_integer("num_timesteps", 50, "Timesteps, spread evenly over the schedule.")
LABELS = flags.DEFINE_list("labels", ["0", "1", "2", "3"], "Labels of the images to draw with a dynamic model.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of all noise.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Examples at once; does not change the results.")
PRECISION = flags.DEFINE_string("precision", "auto", "auto, bfloat16, float32 or highest.")
REPORT = flags.DEFINE_bool("report", False, "Also collect everything in one page, report.html.")
flags.mark_flags_as_required(["checkpoints", "out"])


def main():
    analyze(
        Analysis(
            checkpoints=tuple(CHECKPOINTS.value),
            out=OUT.value,
            data=DATA.value,
            data_path=DATA_PATH.value,
            num_examples=NUM_EXAMPLES.value,
            num_timesteps=NUM_TIMESTEPS.value,
            labels=tuple(LABELS.value),
            seed=SEED.value,
            batch_size=BATCH_SIZE.value,
            precision=PRECISION.value,
            report=REPORT.value,
        )
    )


if __name__ == "__main__":
    run(main)
