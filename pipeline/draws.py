"""Which labeled images are used and which are held out: draws by class and seed."""

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def choose_labels(
    labels: Integers, fraction: float = 1.0, per_class: int | None = None, seed: int = 0
) -> Integers:
    """Sorted positions of `per_class` images of each class, or of a fraction and at least one.

    They are drawn by seed, all of a class that has fewer.  A smaller draw with the same seed is
    part of a larger one.  Unknown labels (-1) are never drawn.
    """
    rank, count = _ranks(labels, seed)
    if per_class is not None:
        want = np.full(len(labels), per_class)
    else:
        want = np.maximum(1, np.rint(fraction * count)).astype(np.int64)
    return np.flatnonzero((rank < want) & (labels >= 0))


def hold_out(labels: Integers, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which images [n] to hold out: a fraction of each class, drawn by seed.

    A class of two or more gives at least one, where the fraction is above 0, and keeps at least
    one.  Unknown labels (-1) are never held out.
    """
    if fraction <= 0:
        return np.zeros(len(labels), np.bool_)
    rank, count = _ranks(labels, [seed, 1])
    want = np.clip(np.rint(fraction * count), 1, np.maximum(count - 1, 0))
    want[count < 2] = 0
    return np.asarray((rank < want) & (labels >= 0))


def balanced(labels: Integers) -> Integers:
    """Sorted positions in which every class comes as often as the largest, its images in turn."""
    order = np.argsort(labels, kind="stable")
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    turns = np.arange(count.max(initial=0)) % count[:, None]  # [classes, largest]
    return np.sort(order[start[:, None] + turns], axis=None)


def _ranks(labels: Integers, seed: int | list[int]) -> tuple[Integers, Integers]:
    """Each image's place [n] in a random order of its class, and its class's size [n]."""
    keys = np.random.default_rng(seed).random(len(labels))
    order = np.lexsort((keys, labels))
    _, start, inverse, count = np.unique(
        labels[order], return_index=True, return_inverse=True, return_counts=True
    )
    rank, sizes = np.empty((2, len(labels)), np.int64)
    rank[order] = np.arange(len(labels)) - start[inverse]
    sizes[order] = count[inverse]
    return rank, sizes
