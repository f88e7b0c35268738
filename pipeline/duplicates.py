"""Byte-identical images, found by their digests."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.bytes_]


def first_match(a: Digests, b: Digests) -> npt.NDArray[np.int64]:
    """For each of `a` [n] the first position in `b` [m] of the same digest, -1 where there is none.

    An empty digest equals none.
    """
    order = np.argsort(b, kind="stable")
    if not len(order):
        return np.full(len(a), -1, np.int64)
    ordered = b[order]
    at = np.minimum(np.searchsorted(ordered, a), len(b) - 1)
    return np.where((ordered[at] == a) & (a != b""), order[at], -1)


def count_duplicates(digests: Mapping[str, Digests], examples: int = 20) -> dict[str, Any]:
    """How many images of each split come earlier in it, and how many also come in another split.

    `within` {split: images}, `across` {"a and b": images of a that are also in b}, and `examples`,
    pairs of "split/index".
    """
    within: dict[str, int] = {}
    across: dict[str, int] = {}
    pairs: list[list[str]] = []
    for a, b in [*((s, s) for s in digests), *combinations(digests, 2)]:
        match = first_match(digests[a], digests[b])
        found = np.flatnonzero((match >= 0) & ((a != b) | (match != np.arange(len(match)))))
        if len(found):
            counts, name = (within, a) if a == b else (across, f"{a} and {b}")
            counts[name] = len(found)
            pairs += [[f"{a}/{k}", f"{b}/{match[k]}"] for k in found[:examples].tolist()]
    return {"within": within, "across": across, "examples": pairs}
