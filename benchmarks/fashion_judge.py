"""The judge of clothes: a small convolutional network that shares nothing with the models.

    python benchmarks/fashion_judge.py            # what it says of real pictures
    python benchmarks/fashion_judge.py --train    # train it again: about 6 minutes of one CPU core

It learns from Fashion-MNIST's training pictures but the last 1000 of each class. These are the reference of the
distance, precision and recall: the models have learnt from them, the judge has not, so that its features treat them as
they treat the test set and the samples. "As good as real" is what it says of equally many pictures of the test set.

Recipe: four convolutions, of 5x5 with stride 2 and of 3x3 with strides 2, 1 and 2 (32, 64, 96, 64 channels), each with
a batch norm, then a layer of 128; shifts by up to 1 pixel, mirrored half of the time; AdamW with a weight decay of
0.01, batches of 128, 10 epochs, a learning rate that grows to 3e-3 in the first and falls to 0 by a cosine. The weights
are kept beside this file in half precision. Of 5000 real test pictures they recognise 0.927.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from etils import epath
from flax import nnx

from dydit_jax.checkpoints.arrays import read_arrays, write_arrays
from dydit_jax.data.idx import read_idx_split
from dydit_jax.metrics.distances import frechet_distance, moments, precision_recall
from dydit_jax.runtime.console import run
from dydit_jax.runtime.progress import counted
from dydit_jax.trees import flatten, unflatten

TRAIN = flags.DEFINE_bool("train", False, "Train the judge and write its weights.")
NUM_REAL = flags.DEFINE_integer("num_real", 5000, "Test pictures that are judged, in equal numbers of each class.")

FOLDER = "/usr/share/datasets/fashion-mnist"
WEIGHTS = epath.Path(__file__).parent / "fashion_judge.safetensors"
FORMAT = "dydit_jax.fashion_judge.v1"
CLASSES = 10
SHIFT = 1
BATCH, EPOCHS, LEARNING_RATE = 128, 10, 3e-3


class Stage(nnx.Module):
    """A convolution, a batch norm and a ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, outputs, (size, size), stride, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, images):
        """Return [n,side/stride,side/stride,outputs] for [n,side,side,inputs]."""
        return nnx.relu(self.norm(self.conv(images)))


class Network(nnx.Module):
    """Logits of 28x28 pictures; the layer before the last gives the features."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = Stage(1, 32, 5, 2, rngs)
        self.second = Stage(32, 64, 3, 2, rngs)
        self.third = Stage(64, 96, 3, 1, rngs)
        self.last = Stage(96, 64, 3, 2, rngs)
        self.dense = nnx.Linear(4 * 4 * 64, 128, rngs=rngs)
        self.head = nnx.Linear(128, CLASSES, rngs=rngs)

    def features(self, images):
        """Return [n,128] for images float32 [n,28,28,1] in [-1, 1]."""
        hidden = self.last(self.third(self.second(self.first(images))))  # [n,4,4,64]
        return nnx.relu(self.dense(hidden.reshape(len(images), -1)))

    def __call__(self, images):
        """Return [n,10]."""
        return self.head(self.features(images))


class FashionJudge:
    """A classifier of real clothes.

    Args:
      folder: with Fashion-MNIST's four files.
    """

    def __init__(self, folder=FOLDER):
        arrays, _ = read_arrays(WEIGHTS, FORMAT)
        params = unflatten({name: jnp.asarray(leaf, jnp.float32) for name, leaf in arrays.items()})
        self._network = nnx.eval_shape(lambda: Network(nnx.Rngs(0)))
        nnx.update(self._network, nnx.State(params))
        self._network.eval()
        _, (images, _) = split_classes(*real_pictures(folder, "train"))
        self._reference = self.features(images)
        self._moments = moments(self._reference)

    def features(self, images) -> np.ndarray:
        """Return what the network sees in images float32 [n,28,28,1] in [-1, 1], [n,128]."""
        parts = [images[first : first + 500] for first in range(0, len(images), 500)]
        return np.concatenate([np.asarray(_features(self._network, part)) for part in parts])

    def measure(self, images, labels) -> dict:
        """Return accuracy, distance, precision and recall of images float32 [n,28,28,1] in [-1, 1]."""
        features = self.features(images)
        predicted = np.asarray(self._network.head(features)).argmax(-1)
        precision, recall = precision_recall(self._reference, features)
        return dict(
            accuracy=float((predicted == labels).mean()),
            distance=frechet_distance(*moments(features), *self._moments),
            precision=precision,
            recall=recall,
        )


@nnx.jit
def _features(network: Network, images):
    return network.features(images)


def real_pictures(folder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images float32 [n,28,28,1] in [-1, 1] and labels int32 [n] of "train" or "test"."""
    images, labels = read_idx_split(folder, split)
    return images[..., None].astype(np.float32) / 127.5 - 1, labels.astype(np.int32)


def split_classes(images, labels, count: int = 1000):
    """Split a set in two pairs of images and labels: what is before the last `count` of each class, and these."""
    last = np.concatenate([np.flatnonzero(labels == label)[-count:] for label in range(CLASSES)])
    chosen = np.zeros(len(labels), bool)
    chosen[last] = True
    return (images[~chosen], labels[~chosen]), (images[chosen], labels[chosen])


# --- Training ------------------------------------------------------------------------------------


def train(images, labels, epochs: int = EPOCHS) -> Network:
    """Train a network on images float32 [n,28,28,1] in [-1, 1] and labels int32 [n]."""
    network = Network(nnx.Rngs(0))
    steps = len(images) // BATCH
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, epochs * steps // 10, epochs * steps)
    optimizer = nnx.Optimizer(network, optax.adamw(rate, weight_decay=0.01), wrt=nnx.Param)
    order = np.random.default_rng(0)
    for epoch in counted(range(epochs), epochs, "epoch", "training the judge"):
        shuffled = order.permutation(len(images))
        for step in range(steps):
            rows = shuffled[step * BATCH : (step + 1) * BATCH]
            _step(network, optimizer, images[rows], labels[rows], jax.random.key(epoch * steps + step))
    network.eval()
    return network


@nnx.jit
def _step(network: Network, optimizer: nnx.Optimizer, images, labels, key):
    """Learn from a batch, shifted and mirrored."""

    def loss(network):
        return optax.softmax_cross_entropy_with_integer_labels(network(_varied(images, key)), labels).mean()

    optimizer.update(network, nnx.grad(loss)(network))


def _varied(images, key):
    """Shift each image by up to `SHIFT` pixels and mirror half of them."""
    side, shift_key, mirror_key = images.shape[1], *jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), constant_values=-1)
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 2 * SHIFT + 1)
    cut = lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), (side, side, 1))
    shifted = jax.vmap(cut)(padded, corners)
    mirrored = jax.random.bernoulli(mirror_key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, shifted[:, :, ::-1], shifted)


def main():
    if TRAIN.value:
        learnt, _ = split_classes(*real_pictures(FOLDER, "train"))
        params = nnx.to_pure_dict(nnx.state(train(*learnt)))
        write_arrays(WEIGHTS, {name: np.float16(leaf) for name, leaf in flatten(params).items()}, dict(format=FORMAT))
    _, real = split_classes(*real_pictures(FOLDER, "test"), NUM_REAL.value // CLASSES)
    found = FashionJudge().measure(*real)
    sys.stdout.write("  ".join(f"{name} {value:.3f}" for name, value in found.items()) + "\n")


if __name__ == "__main__":
    run(main)
