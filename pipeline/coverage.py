"""Greedy choices that cover a set of images, without a matrix of all distances."""

import heapq

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, identity

from pipeline.progress import progress

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_POOL = 1024  # farthest rows of which many are picked at a time
_ROWS = 1 << 16  # whose similarities to the picks are in memory at a time


def farthest_first(x: Floats, nearest: Floats, budget: int) -> Ints:
    """`budget` rows of unit vectors `x` [n, d], each the one whose cosine to all before, and to
    what was chosen earlier (`nearest` [n]), is lowest; the first of equal ones.

    They are those of the plain greedy algorithm, one matrix product for many: rows only come
    nearer, so while one of those that were farthest is farther than all others were, it is next.
    """
    nearest, chosen = nearest.copy(), np.empty(0, np.int64)
    with progress("farthest first", budget, "images") as advance:
        while len(chosen) < budget:
            order = np.argsort(nearest, kind="stable")
            pool = np.sort(order[:_POOL])
            others = nearest[order[_POOL]] if len(order) > _POOL else np.inf
            between, own, new = x[pool] @ x[pool].T, nearest[pool], list[int]()
            while len(chosen) + len(new) < budget:
                best = int(own.argmin())
                if new and own[best] >= others:
                    break
                new.append(best)
                np.maximum(own, between[best], out=own)
                own[new] = np.inf
            picks = pool[new]
            for start in range(0, len(x), _ROWS):
                rows = slice(start, start + _ROWS)
                nearest[rows] = np.maximum(nearest[rows], (x[rows] @ x[picks].T).max(1))
            chosen = np.concatenate([chosen, picks])
            nearest[chosen] = np.inf
            advance(len(picks))
    return chosen


def facility_location(
    near: Ints, kernel: Floats, weights: Floats, covered: Floats, free: Ints, budget: int, seed: int
) -> Ints:
    """`budget` of the positions `free`, each the one that adds most to Σ_i w_i max_j k(i, j).

    k is 1 for an image and itself, `kernel` [n, K] for it and those in `near` [n, K] (either way
    round), and 0 for others; i runs over all n images, whose `weights` [n] are 0 or more, and j
    over the picks and what already covers image i to `covered` [n].  Once nothing can be added,
    all are uncovered and covered again.  `seed` decides among equals.

    Gains only fall, so a gain that was computed before is a bound: the one on top of a heap is
    computed anew, and is the largest if it stays on top (Minoux, 1978).
    """
    n, neighbors = near.shape
    rows = np.repeat(np.arange(n), neighbors)
    edges = csr_matrix((kernel.ravel(), (rows, near.ravel())), (n, n))
    edges.eliminate_zeros()
    edges = edges.maximum(edges.T).maximum(identity(n, np.float32, "csr")).tocsr()
    start, other, k = edges.indptr, edges.indices, edges.data
    covered, tie = covered.copy(), np.random.default_rng(seed).permutation(n)
    left, picks, heap = np.zeros(n, np.bool_), list[int](), list[tuple[float, int, int]]()
    left[free] = True

    def gain(j: int) -> float:
        row = slice(start[j], start[j + 1])
        return float(np.maximum(k[row] - covered[other[row]], 0) @ weights[other[row]])

    with progress("covering", budget, "images") as advance:
        while len(picks) < budget:
            if not heap:
                gains = np.add.reduceat(
                    np.maximum(k - covered[other], 0) * weights[other], start[:-1]
                )
                those = np.flatnonzero(left)
                values = zip(
                    (-gains[those]).tolist(), tie[those].tolist(), those.tolist(), strict=True
                )
                heap = list(values)
                heapq.heapify(heap)
                if not gains[those].any() and not covered.any():
                    # nothing has weight: in the order of the draw
                    rest = those[np.argsort(tie[those])][: budget - len(picks)]
                    picks += rest.tolist()
                    advance(len(rest))
                    break
            _, order, j = heapq.heappop(heap)
            new = gain(j)
            if heap and new < -heap[0][0]:
                heapq.heappush(heap, (-new, order, j))
            elif new <= 0 and covered.any():
                covered[:], heap = 0, []
            else:
                picks.append(j)
                left[j] = False
                row = slice(start[j], start[j + 1])
                covered[other[row]] = np.maximum(covered[other[row]], k[row])
                advance()
    return np.array(picks)
