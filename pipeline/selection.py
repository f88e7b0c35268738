"""Which images to ask labels for: each strategy maps (candidates, budget, seed) to images."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline import InputError
from pipeline.neighbours import kmeans, nearest_distinct

_COARSE = 20  # groups that a strategy without clusters of its own is shown in


@dataclass(frozen=True)
class Candidates:
    """What a strategy may look at.

    `embeddings` [n, d] float32 of unit length and `logits` [n, k] (or None) of the whole unlabeled
    split; `eligible` [m] the sorted indices that may be asked for (not labeled, not duplicates, not
    skipped); `labeled` [l, d] embeddings of the images whose labels are known.
    """

    embeddings: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None
    eligible: npt.NDArray[np.int64]
    labeled: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """The chosen images: `indices` [budget] of the split, and `groups` [budget], the clusters."""

    indices: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]


class Strategy:
    """One way to choose; a subclass is found by its name."""

    uses_logits = False
    """Whether it needs the latest fine-tuning's logits; if not, `Candidates.logits` is None."""

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Request:
        """`budget` different images of `candidates.eligible`, the same for the same seed."""
        raise NotImplementedError


class Random(Strategy):
    """Every eligible image is as likely as any other: the control of every other strategy."""

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Request:
        chosen = np.random.default_rng(seed).choice(candidates.eligible, budget, replace=False)
        _, groups = kmeans(candidates.embeddings[chosen], min(_COARSE, budget), 10, seed)
        return Request(chosen, groups)


class KMeans(Strategy):
    def __init__(self, iterations: int = 20) -> None:
        """Representative images: k-means with k = budget, and the image nearest each center.

        Args:
            iterations: of Lloyd's algorithm.
        """
        self.iterations = iterations

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Request:
        x = candidates.embeddings[candidates.eligible]  # [m, d]
        centers, _ = kmeans(x, budget, self.iterations, seed)
        return Request(candidates.eligible[nearest_distinct(centers, x)], np.arange(budget))


def eligible(
    usable: npt.NDArray[np.int64],
    digests: npt.NDArray[np.bytes_],
    labeled: npt.NDArray[np.bytes_],
) -> npt.NDArray[np.int64]:
    """The images of `usable` [n] that may be asked for, sorted; `digests` [n] are of their bytes.

    Of byte-identical images the one with the lowest index is kept, and none whose digest is one of
    the `labeled` images'.
    """
    order = np.argsort(usable, kind="stable")
    _, first = np.unique(digests[order], return_index=True)
    kept = order[first]
    return np.sort(usable[kept[~np.isin(digests[kept], labeled)]])


def choose(strategy: Strategy, candidates: Candidates, budget: int, seed: int) -> Request:
    """What `strategy` asks for, sorted by index and held to the rules of a request.

    Raises InputError where the budget is not in 1 … m, and RuntimeError where the strategy gives
    anything but `budget` different eligible images.
    """
    possible = len(candidates.eligible)
    if not 0 < budget <= possible:
        raise InputError(
            f"label_request: budget is {budget:,} and {possible:,} unlabeled images can be asked "
            f"for (not labeled, skipped or duplicate); a budget of 1 to {possible:,} is expected"
        )
    request = strategy(candidates, budget, seed)
    order = np.argsort(request.indices, kind="stable")
    indices, groups = request.indices[order], request.groups[order]
    unique = len(np.unique(indices)) == len(indices) == budget
    if not unique or not np.isin(indices, candidates.eligible).all():
        raise RuntimeError(f"{type(strategy).__name__} broke the rules of a request; see Strategy")
    return Request(indices, groups)
