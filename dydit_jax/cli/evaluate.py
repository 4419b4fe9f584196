"""Judge sets of images: FID, sFID, Inception score, precision and recall.

    dydit-evaluate --samples out/fid/samples.npz --reference VIRTUAL_imagenet256_labeled.npz --out out/fid.json
    dydit-evaluate --samples out/a,out/b --reference imagenet.npz

A set is an .npz with arr_0 (what `dydit-sample --num_images` writes), a folder of pictures, or a prepared dataset:
tfds:<folder or name>/<split>. The reference may also be statistics that --save_statistics kept. Several sets are
compared in one table.
"""

from absl import flags

from dydit_jax.cli.flags import define_flags, read_flags
from dydit_jax.jobs.evaluate import Evaluation, evaluate
from dydit_jax.runtime.console import run


def main():
    """Run the command."""
    values = flags.FlagValues()
    required = define_flags(Evaluation, values)
    run(lambda: evaluate(read_flags(Evaluation, values)), values, about=__doc__, required=required)
