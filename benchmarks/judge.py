"""The judge of digits: a classifier of scikit-learn's that shares nothing with the models."""

import numpy as np
from sklearn.neural_network import MLPClassifier

from dydit_jax.data.sources import digits
from dydit_jax.metrics.distances import frechet_distance, moments


class Judge:
    """A classifier of real digits; its last hidden layer gives the features."""

    def __init__(self):
        images, labels = digits("train")
        self._network = MLPClassifier((128, 64), alpha=1e-2, max_iter=300, random_state=0)
        self._network.fit(images.reshape(len(images), -1), labels)
        self._real = moments(self.features(images))

    def features(self, images) -> np.ndarray:
        """Return the activations of the last hidden layer [n,64]."""
        hidden = images.reshape(len(images), -1)
        for weight, bias in list(zip(self._network.coefs_, self._network.intercepts_))[:-1]:
            hidden = np.maximum(hidden @ weight + bias, 0)
        return hidden

    def measure(self, images, labels) -> dict:
        """Return accuracy and distance of images float32 [n,8,8,1] in [-1, 1]."""
        predicted = self._network.predict(images.reshape(len(images), -1))
        return dict(
            accuracy=float((predicted == labels).mean()),
            distance=frechet_distance(*moments(self.features(images)), *self._real),
        )
