"""Labels for unlabeled images, from the logits of a classifier."""

from typing import Any

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


def apply(
    labeler: PseudoLabeler, logits: Floats, apart: Floats, truth: Ints
) -> tuple[Ints, Ints, Floats, npt.NDArray[np.bool_]]:
    """What `labeler` gives the rows of `logits` [n, classes], and how right the same rule is.

    The last of the results [r] tells of the rows of `apart` [a, classes], whose labels are `truth`
    [a], that the rule takes when they are among the others, whether it labels them correctly.
    """
    rows, labels, confidences = labeler(logits)
    n = len(logits)
    both, given, _ = labeler(np.concatenate([logits, apart]))
    tried = both >= n
    return rows, labels, confidences, given[tried] == truth[both[tried] - n]


def summary(predicted: Ints, labels: Ints, right: npt.NDArray[np.bool_], classes: int) -> Any:
    """Coverage, precision and its standard error in percent, and counts per class.

    `predicted` [n] are the classes predicted for all images, `labels` [m] those that were given,
    and `right` [r] is from `apply`; a precision without images is None.  The error is that of
    Agresti and Coull (two right and two wrong images added): of 8 right of 8 it is not 0.
    """
    r, hits = len(right), int(right.sum())
    p = (hits + 2) / (r + 4)
    return {
        "eligible": len(predicted),
        "labeled": len(labels),
        "coverage": 100 * len(labels) / max(len(predicted), 1),
        "precision": 100 * hits / r if r else None,
        "precision_error": 100 * (p * (1 - p) / (r + 4)) ** 0.5 if r else None,
        "precision_images": r,
        "predicted_per_class": np.bincount(predicted, minlength=classes).tolist(),
        "labeled_per_class": np.bincount(labels, minlength=classes).tolist(),
    }
