"""Judge sets of images: FID, sFID, Inception score, precision and recall.

    python evaluate.py --samples out/fid/samples.npz --reference VIRTUAL_imagenet256_labeled.npz --out out/fid.json
    python evaluate.py --samples out/a,out/b --reference imagenet.npz

A set is an .npz with arr_0 (what `sample.py --num_images` writes), a folder of pictures, or a prepared dataset:
tfds:<folder or name>/<split>. The reference may also be statistics that --save_statistics kept. Several sets are
compared in one table.
"""

from absl import flags

from dydit_jax.jobs.evaluate import DEFAULT_INCEPTION, Evaluation, evaluate
from dydit_jax.runtime.console import run

SAMPLES = flags.DEFINE_list("samples", None, "Sets of images to judge, with commas between them.", required=True)
REFERENCE = flags.DEFINE_string("reference", "", "Set to compare with; without one only the Inception score is given.")
OUT = flags.DEFINE_string("out", "", "File for the results, JSON.")
INCEPTION = flags.DEFINE_string(
    "inception", DEFAULT_INCEPTION, "File of the published PyTorch port of the network, or its name to have it fetched."
)
SAVE_STATISTICS = flags.DEFINE_string("save_statistics", "", "File for the statistics of the reference, to be reused.")
SIDE = flags.DEFINE_integer("side", 0, "Crop pictures of folders and datasets to this side, as ADM does; 0 does not.")
REPORT = flags.DEFINE_bool("report", False, "Also write the results into the folder of each set, and its report.html.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at once; does not change the results.")


def main():
    evaluate(
        Evaluation(
            samples=tuple(SAMPLES.value),
            reference=REFERENCE.value,
            out=OUT.value,
            inception=INCEPTION.value,
            save_statistics=SAVE_STATISTICS.value,
            batch_size=BATCH_SIZE.value,
            side=SIDE.value,
            report=REPORT.value,
        )
    )


if __name__ == "__main__":
    run(main)
