"""How good a classifier or an embedding is: pure functions of arrays; percentages are 0 to 100."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from pipeline.neighbours import search
from pipeline.progress import progress

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_CELLS = 1 << 22  # numbers in a chunk: some tens of MB of temporaries
_STRETCH = 25  # iterations of the linear classifier between two reports


def chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CELLS // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def top_k(logits: Floats, labels: Ints, ks: Sequence[int] = (1, 3, 5)) -> dict[int, float]:
    """Percent of the rows whose label [n] is among the k largest logits [n, classes], for each k.

    Of equal logits the first counts as larger, as in arg-max; -inf and NaN are never a hit.
    """
    if not len(labels):
        return dict.fromkeys(ks, float("nan"))
    ranks = np.empty(len(labels), np.int64)
    for rows in chunks(*logits.shape):
        scores, label = logits[rows], labels[rows, None]
        own = np.take_along_axis(scores, label, axis=1)  # [b, 1]
        before = np.arange(logits.shape[1]) < label  # [b, classes]
        above = ~(scores <= own) | ((scores == own) & before)
        ranks[rows] = np.where(np.isfinite(own[:, 0]), above.sum(1), np.iinfo(ranks.dtype).max)
    return {k: 100 * float(np.mean(ranks < k)) for k in ks}


def predictions(logits: Floats) -> tuple[Ints, Floats]:
    """The most probable class of each row of `logits` [n, classes] and its softmax probability."""
    labels = np.empty(len(logits), np.int64)
    confidences = np.empty(len(logits), np.float32)
    for rows in chunks(*logits.shape):
        x = logits[rows].astype(np.float64)
        labels[rows] = x.argmax(1)
        confidences[rows] = 1 / np.exp(x - x.max(1, keepdims=True)).sum(1)
    return labels, confidences


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """What `logits` [n, classes] have to be divided by so that their softmax says how often they
    are right: the least cross entropy with the `labels` [n], from 0.05 to 20 (Guo et al., arXiv
    1706.04599, section 4.2).

    As in Platt's scaling, one of n + 2 images counts as any class: of few images that are all right
    it does not follow that every image is.
    """
    unknown = 1 / (len(labels) + 2)

    def loss(log_t: float) -> float:
        log_p = log_softmax(logits.astype(np.float64) / np.exp(log_t), axis=1)
        own = log_p[np.arange(len(labels)), labels].mean()
        return -float((1 - unknown) * own + unknown * log_p.mean())

    bounds = np.log(0.05), np.log(20)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def knn_predict(
    similarities: Floats, neighbor_labels: Ints, classes: int, temperature: float | None
) -> Floats:
    """Scores [q, classes] from the votes of each query's neighbors, both arrays [q, k].

    A vote weighs exp(similarity / temperature) (arXiv 1805.01978, section 3.4), relative to the
    nearest neighbor's; with `temperature` None it weighs 1, and of classes with as many votes the
    one with the larger similarities wins.  Classes without a vote score -inf: no top-k counts them.
    """
    scores = np.empty((len(similarities), classes), np.float32)
    for rows in chunks(len(similarities), max(classes, similarities.shape[1])):
        near, votes = similarities[rows].astype(np.float64), neighbor_labels[rows]
        near = near - near.max(1, keepdims=True)  # 0 for the nearest, at least -2 for unit vectors
        if temperature is None:
            weights = 1 + 1e-3 * near / (
                1 - near.sum(1, keepdims=True)
            )  # less than one vote in all
        else:
            weights = np.exp(near / temperature)
        cell = (np.arange(len(votes))[:, None] * classes + votes).ravel()  # [b * k]
        size = len(votes) * classes
        sums = np.bincount(cell, weights.ravel(), size)
        sums[np.bincount(cell, minlength=size) == 0] = -np.inf
        scores[rows] = sums.reshape(len(votes), classes)
    return scores


def knn_accuracy(known: Floats, labels: Ints, queries: Floats, truth: Ints, k: int) -> float:
    """Top-1 in percent of a majority vote of the k nearest `known` embeddings [n, d] of `queries`
    [q, d], by cosine similarity where all have unit length.
    """
    similarities, near = search(queries, known, k)
    classes = int(max(labels.max(), truth.max())) + 1
    return top_k(knn_predict(similarities, labels[near], classes, None), truth, [1])[1]


def knn_scores(
    similarities: Floats,
    votes: Ints,
    truth: Ints,
    classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[str, dict[int, float]]:
    """Top-1, top-3 and top-5 of weighted and majority votes of the k nearest, for each k of `ks`.

    `similarities` and `votes` [q, max(ks)] are of each query's neighbors, nearest first, and
    `truth` [q] the labels.  Keys are knn_K_weighted and knn_K_majority.
    """
    kinds = {"weighted": temperature, "majority": None}
    return {
        f"knn_{k}_{kind}": top_k(knn_predict(similarities[:, :k], votes[:, :k], classes, t), truth)
        for k in ks
        for kind, t in kinds.items()
    }


def fit_linear(
    x: Floats,
    labels: Ints,
    classes: int,
    c: float = 10.0,
    iterations: int = 200,
    weights: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Multinomial logistic regression on `x` [n, d]: weight [classes, d] and bias [classes].

    `c` is scikit-learn's inverse regularization; `weights` [n] are how much each row counts.
    Logits are `x @ weight.T + bias`; classes without an example get zero weights and a bias 20
    below the smallest: they are never predicted.
    """
    from sklearn.exceptions import ConvergenceWarning  # here: a second that few stages need
    from sklearn.linear_model import LogisticRegression

    weight = np.zeros((classes, x.shape[1]), np.float32)
    seen = np.unique(labels)
    if len(seen) == 1:
        bias = np.full(classes, -20, np.float32)
        bias[seen] = 0
        return weight, bias
    # The tolerance is of the mean loss's gradient, which shrinks with the number of classes.
    model = LogisticRegression(C=c, max_iter=_STRETCH, tol=1e-6, warm_start=True)
    x = np.asarray(x, np.float32)
    with (
        warnings.catch_warnings(),
        progress("linear classifier", iterations, "iterations") as advance,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early it is good enough
        for _ in range(0, iterations, _STRETCH):
            model.fit(x, labels, weights)
            advance(int(model.n_iter_[0]))
            if model.n_iter_[0] < _STRETCH:
                break
    w, b = model.coef_, model.intercept_
    if len(seen) == 2:  # scikit-learn keeps the difference only
        w, b = np.concatenate([-w, w]) / 2, np.concatenate([-b, b]) / 2
    bias = np.full(classes, b.min() - 20, np.float32)
    weight[seen], bias[seen] = w, b
    return weight, bias


def confusion_counts(labels: Ints, predicted: Ints, classes: int) -> Ints:
    """Counts [classes, classes]: row = true class, column = predicted class."""
    cells = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes)


def expected_calibration_error(
    confidences: Floats, correct: npt.NDArray[np.bool_], bins: int = 15
) -> float:
    """Mean distance in percent between confidence and accuracy, over equal bins of confidence.

    Each bin counts by its share of the predictions.  Source: arXiv 1706.04599, equation 3.
    """
    which = np.clip(np.ceil(confidences * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(which, correct.astype(np.float64) - confidences, bins)
    return 100 * float(np.abs(gap).sum() / max(len(confidences), 1))
