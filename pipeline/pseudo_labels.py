"""Labels for unlabeled images: who predicts them, and which predictions are taken."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.checks import check
from pipeline.draws import place_in_group
from pipeline.metrics import predictions

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evidence:
    """What is known of images without a label: `logits` [n, classes] of the classifier, calibrated
    where labels were held out, and, for who asks for them, vectors `x` [n, d] of unit length, with
    those of the `labeled` images [l, d] and their `labels` [l].
    """

    logits: Floats
    x: Floats
    labeled: Floats
    labels: Ints


class Predictor:
    """One way to predict; a subclass is found by its name."""

    space: Literal["", "embeddings", "predictions"] = ""
    """What `Evidence.x` is: nothing, the pretrained encoder's embeddings, or the square roots of
    the classifier's probabilities, whose products are Bhattacharyya coefficients.
    """

    def __call__(self, evidence: Evidence) -> tuple[Ints, Floats]:
        """The likeliest label [n] of every image and how sure it is [n], from 0 to 1."""
        raise NotImplementedError


class Softmax(Predictor):
    """The classifier's arg-max, as sure as its softmax probability."""

    def __call__(self, evidence: Evidence) -> tuple[Ints, Floats]:
        return predictions(evidence.logits)


class PseudoLabeler:
    """One way to decide which predictions are taken; a subclass is found by its name."""

    def __call__(self, labels: Ints, confidences: Floats) -> Ints:
        """The rows of predictions [n] that become pseudo-labels, sorted."""
        raise NotImplementedError


class Threshold(PseudoLabeler):
    def __init__(self, confidence: float = 0.95, flexible: bool = False) -> None:
        """Every image that is surer than a bar.

        Args:
            confidence: the lowest that is taken.
            flexible: the bar of a class is lower the fewer images of it reach the common one,
                counted over those of the class that most do, x / (2 - x) of it (FlexMatch, arXiv
                2110.08263, sections 3.1 and 3.3), but not below half: here it does not rise while
                a classifier learns.
        """
        check("Threshold", "from 0 to 1", confidence=confidence)
        self.confidence, self.flexible = confidence, flexible

    def __call__(self, labels: Ints, confidences: Floats) -> Ints:
        sure = confidences >= self.confidence
        if not self.flexible or not sure.any():
            return np.flatnonzero(sure)
        counts = np.bincount(labels[sure], minlength=labels.max() + 1)
        learned = counts / counts.max()
        bars = self.confidence * np.maximum(learned / (2 - learned), 0.5)
        return np.flatnonzero(confidences >= bars[labels])


class TopFraction(PseudoLabeler):
    def __init__(self, fraction: float = 0.1, balanced: bool = False) -> None:
        """The surest images of each class, so that no class is crowded out by an easier one.

        Args:
            fraction: of the images predicted to be of a class (rounded up).
            balanced: as many of each class, as far as there are: `fraction` of the mean.
        """
        check("TopFraction", "above 0, up to 1", fraction=fraction)
        self.fraction, self.balanced = fraction, balanced

    def __call__(self, labels: Ints, confidences: Floats) -> Ints:
        order = np.lexsort((-confidences, labels))  # by class, surest first
        counts = np.bincount(labels).astype(np.float64)
        if self.balanced and len(labels):
            counts[:] = len(labels) / np.count_nonzero(counts)
        wanted = np.ceil(np.round(self.fraction * counts, 6))
        taken = place_in_group(labels[order]) < wanted[labels[order]]
        return np.sort(order[taken])


def apply(
    predictor: Predictor, labeler: PseudoLabeler, evidence: Evidence, truth: Ints
) -> tuple[Ints, Ints, Floats, Ints, npt.NDArray[np.bool_]]:
    """What images get for labels, and how right the same rule is.

    The last of the images of `evidence` [n + a] are apart: their labels `truth` [a] are known, but
    to nobody here.  Of the first n: rows [r], labels [r] and confidences [r] of those that get one,
    and the predictions [n] of all; then, of the images apart that the rule takes when they are
    among the others, whether it labels them correctly.  A prediction is -1 where nobody can tell.
    """
    labels, confidences = predictor(evidence)
    n, known = len(labels) - len(truth), np.flatnonzero(confidences > 0)  # else nobody can tell
    first = known[known < n]
    rows = first[labeler(labels[first], confidences[first])]
    tried = known[labeler(labels[known], confidences[known])]
    tried = tried[tried >= n]
    right = labels[tried] == truth[tried - n]
    predicted = np.where(confidences > 0, labels, -1)[:n]
    return rows, labels[rows], confidences[rows], predicted, right


def summary(predicted: Ints, labels: Ints, right: npt.NDArray[np.bool_], classes: int) -> Any:
    """Coverage, precision and its standard error in percent, and counts per class.

    `predicted` [n] are the classes predicted for all images (-1: nobody can tell), `labels` [m]
    those that were given, and `right` [r] is from `apply`; a precision without images is None.  The
    error is that of Agresti and Coull (two right and two wrong images added): of 8 right of 8 it is
    not 0.
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
        "predicted_per_class": np.bincount(predicted[predicted >= 0], minlength=classes).tolist(),
        "labeled_per_class": np.bincount(labels, minlength=classes).tolist(),
    }
