"""Labels for unlabeled images, from the logits of a classifier."""

import numpy as np
import numpy.typing as npt

from pipeline import InputError
from pipeline.metrics import predictions

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class PseudoLabeler:
    """One way to label; a subclass is found by its name."""

    def __call__(self, logits: Floats) -> tuple[Ints, Ints, Floats]:
        """The rows of `logits` [n, classes] that get a label, sorted: rows, labels, confidences.

        A confidence is the softmax probability of the label.
        """
        raise NotImplementedError


class Threshold(PseudoLabeler):
    def __init__(self, confidence: float = 0.95) -> None:
        """Every image that the classifier is sure of.

        Args:
            confidence: the lowest softmax probability that is taken.
        """
        if not 0 <= confidence <= 1:
            raise InputError(f"Threshold: confidence is {confidence}; from 0 to 1 is expected")
        self.confidence = confidence

    def __call__(self, logits: Floats) -> tuple[Ints, Ints, Floats]:
        labels, confidences = predictions(logits)
        rows = np.flatnonzero(confidences >= self.confidence)
        return rows, labels[rows], confidences[rows]


class TopFraction(PseudoLabeler):
    def __init__(self, fraction: float = 0.1) -> None:
        """The surest images of each class, so that no class is crowded out by an easier one.

        Args:
            fraction: of the images predicted to be of a class (rounded up).
        """
        if not 0 < fraction <= 1:
            raise InputError(f"TopFraction: fraction is {fraction}; above 0 to 1 is expected")
        self.fraction = fraction

    def __call__(self, logits: Floats) -> tuple[Ints, Ints, Floats]:
        labels, confidences = predictions(logits)
        order = np.lexsort((-confidences, labels))  # by class, surest first
        _, start, counts = np.unique(labels[order], return_index=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(start, counts)  # within its class
        wanted = np.ceil(np.round(self.fraction * counts, 6))
        rows = np.sort(order[place < np.repeat(wanted, counts)])
        return rows, labels[rows], confidences[rows]
