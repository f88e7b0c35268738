"""What looks wrong with a contest's images: near-duplicates, and labels that their images deny."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cleanlab.filter import find_label_issues
from scipy.special import softmax
from scipy.stats import mode
from sklearn.model_selection import StratifiedKFold

from pipeline.metrics import chunks, fit_linear
from pipeline.neighbours import graph, search_along
from pipeline.packed import Pool
from pipeline.progress import progress

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_BLOCK = 4096  # images whose hashes are made at a time
_NEAR = 10  # neighbors of an image among which copies are looked for
_VOTES = 20  # nearest labeled images
_LEVELS = 6.0  # of 255, that the thumbnails of two copies differ by at most on average


@dataclass(frozen=True)
class Copies:
    """Pairs of images that look the same: rows `first` < `second` [p], their cosine [p], and
    whether their hashes are equal [p]; the most similar first.
    """

    first: Ints
    second: Ints
    cosine: Floats
    hashed: npt.NDArray[np.bool_]


def thumbnails(pool: Pool) -> npt.NDArray[np.uint8]:
    """Gray images [n, 8, 9], each pixel the mean of its part of the image."""
    out = np.empty((len(pool), 8, 9), np.uint8)
    height, width = pool.shape[:2]
    rows, columns = (np.linspace(0, s, k + 1).astype(int) for s, k in ((height, 8), (width, 9)))
    sizes = np.maximum(np.diff(rows), 1)[:, None] * np.maximum(np.diff(columns), 1)
    with progress("thumbnails", len(pool), "images") as advance:
        for start in range(0, len(pool), _BLOCK):
            stop = min(start + _BLOCK, len(pool))
            gray = pool.gather(np.arange(start, stop)) @ np.array([0.299, 0.587, 0.114], np.float32)
            sums = np.add.reduceat(np.add.reduceat(gray, rows[:-1], 1), columns[:-1], 2)
            out[start:stop] = np.rint(sums / sizes).clip(0, 255)
            advance(stop - start)
    return out


def hashes(thumbs: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Difference hashes [n] of thumbnails [n, 8, 9]: where brightness rises from left to right."""
    rises = thumbs[:, :, 1:] > thumbs[:, :, :-1]
    return np.packbits(rises.reshape(len(thumbs), 64), axis=1).view(np.uint64)[:, 0]


def find_copies(x: Floats, thumbs: npt.NDArray[np.uint8], cosine: float) -> Copies:
    """Pairs of images whose embeddings `x` [n, d] are as similar as `cosine`, or whose hashes are
    equal and whose thumbnails are nearly.

    Of images of one hash each is compared with the darkest and with the next darker one, by
    embeddings with the nearest: of many copies of one image not all pairs are found.
    """
    similarities, near = graph(x, _NEAR)
    row, column = np.nonzero(similarities >= cosine)
    by_embedding = np.stack([row, near[row, column]], 1)
    hashed = hashes(thumbs)
    order = np.lexsort([thumbs.mean((1, 2)), hashed])  # of one hash from dark to bright
    starts = np.r_[True, hashed[order][1:] != hashed[order][:-1]] if len(order) else order > 0
    first, previous = order[starts][np.cumsum(starts) - 1], np.roll(order, 1)
    pairs_of = [np.stack([those[~starts], order[~starts]], 1) for those in (first, previous)]
    by_hash = np.concatenate(pairs_of)
    a, b = (thumbs[by_hash[:, k]].astype(np.float32) for k in (0, 1))
    by_hash = by_hash[np.abs(a - b).mean((1, 2)) <= _LEVELS]
    pairs = np.unique(np.sort(np.concatenate([by_embedding, by_hash]), axis=1), axis=0)
    value = np.empty(len(pairs), np.float32)
    for rows in chunks(len(pairs), x.shape[1]):
        value[rows] = np.einsum("pd,pd->p", x[pairs[rows, 0]], x[pairs[rows, 1]])
    order = np.argsort(-value, kind="stable")
    pairs, value = pairs[order], value[order]
    return Copies(pairs[:, 0], pairs[:, 1], value, hashed[pairs[:, 0]] == hashed[pairs[:, 1]])


@dataclass(frozen=True)
class Doubts:
    """Labels that look wrong, the most doubtful first: rows [w], the labels that fit better [w],
    the probability of the given one by a classifier that did not see the image [w], and the part
    of its nearest labeled images that have it [w].
    """

    rows: Ints
    suggested: Ints
    confidence: Floats
    agreement: Floats


def doubtful_labels(x: Floats, labels: Ints, classes: int, c: float, seed: int) -> Doubts:
    """Labels [n] that unit embeddings `x` [n, d] deny: those that confident learning finds (arXiv
    1911.00068, by cleanlab, pruned by class and by noise rate) with probabilities of five-fold
    cross-validated logistic regressions, and those that none of the 20 nearest labeled images has
    while more than half of these have another; ranked by both.

    There are none where no class has two labels.
    """
    most = int(np.bincount(labels, minlength=1).max())
    if most < 2:
        none = np.arange(0)
        return Doubts(none, none, none.astype(np.float32), none.astype(np.float32))
    probabilities = np.zeros((len(x), classes), np.float32)
    folds = StratifiedKFold(min(5, most), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with few labels
        for learned, asked in folds.split(x, labels):
            weight, bias = fit_linear(x[learned], labels[learned], classes, c)
            probabilities[asked] = softmax(x[asked] @ weight.T + bias, axis=1)
        seen, codes = np.unique(labels, return_inverse=True)
        p = probabilities[:, seen] / probabilities[:, seen].sum(1, keepdims=True)
        wrong = find_label_issues(codes, p, filter_by="both", n_jobs=1)
    near = search_along(x, x, _VOTES + 1, "nearest labels")[1]
    itself = near == np.arange(len(x))[:, None]
    around = np.where(itself, -1, labels[near])
    others = np.maximum((~itself).sum(1), 1)
    agreement = ((around == labels[:, None]).sum(1) / others).astype(np.float32)
    common, times = mode(around, axis=1)
    alone = np.bincount(labels)[labels] == 1  # nothing else can have it
    rows = np.flatnonzero(wrong | ((agreement == 0) & (times > others / 2) & ~alone))
    confidence = p[rows, codes[rows]]
    best = seen[p[rows].argmax(1)]
    suggested = np.where(best == labels[rows], common[rows], best)
    order = np.argsort(confidence + agreement[rows], kind="stable")
    return Doubts(rows[order], suggested[order], confidence[order], agreement[rows][order])


def of_every_kind(splits: Sequence[str] | npt.NDArray[np.str_], copies: Copies) -> Ints:
    """Positions [p] of pairs, those of each two splits and with equal hashes or not in turn, so
    that the first few show all that there is.
    """
    of = np.asarray(splits)
    names = np.sort(np.stack([of[copies.first], of[copies.second]], 1), axis=1)
    kinds = [f"{a} {b} {same}" for (a, b), same in zip(names, copies.hashed, strict=True)]
    turn: dict[str, int] = {}
    rank = np.empty(len(kinds), np.int64)
    for k, kind in enumerate(kinds):
        rank[k] = turn[kind] = turn.get(kind, -1) + 1
    return np.argsort(rank, kind="stable")


def counts(names: Sequence[str], copies: Copies) -> dict[str, int]:
    """Pairs within and between splits, by the images' splits `names` [n]: {"a and b": pairs}."""
    splits = np.asarray(names)
    pairs = np.sort(np.stack([splits[copies.first], splits[copies.second]], 1), axis=1)
    found, number = np.unique(pairs, axis=0, return_counts=True)
    return {
        (a if a == b else f"{a} and {b}"): int(k)
        for (a, b), k in zip(found.tolist(), number, strict=True)
    }
