"""Which images to ask labels for: each strategy maps (candidates, budget, seed) to indices."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Candidates:
    """What a strategy may look at.

    `embeddings` [n, d] float32 of unit length and `logits` [n, k] (or None) of the whole unlabeled split;
    `eligible` [m] the sorted indices that may be asked for (not labeled, not duplicates, not skipped);
    `labeled` [l, d] embeddings of the images whose labels are known.
    """

    embeddings: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None
    eligible: npt.NDArray[np.int64]
    labeled: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """The chosen images: `indices` [budget] into the split and `groups` [budget], their clusters."""

    indices: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]


class Strategy:
    """One way to choose; a subclass is found by its name."""

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Request:
        raise NotImplementedError


class KMeans(Strategy):
    def __init__(self, iterations: int = 20) -> None:
        """k-means.

        Args:
            iterations: of Lloyd's algorithm.
        """
        self.iterations = iterations
