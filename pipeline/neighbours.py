"""Nearest neighbors and k-means by faiss, on a GPU where there is one: numpy in, numpy out.

faiss brings an OpenMP runtime of its own beside torch's; both follow OMP_NUM_THREADS and run in one
process in either import order (a test holds it).
"""

from collections.abc import Callable

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.draws import place_in_group
from pipeline.progress import progress

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_GPU_K = 2048  # faiss's limit on k on a GPU
_GPU_BYTES = 1 << 30  # of vectors, and of queries with their results, on the GPU at a time
_GPU_SCRATCH = 1 << 28  # bytes that faiss reserves; what a search needs beyond, it allocates
_QUERIES = 1 << 14  # between two looks at the progress bar
_CELL = 512  # rows of a cell, on average
_PROBES = 24  # cells in which a row's neighbors are looked for
_PAIRS = 1 << 32  # of rows whose similarities are all computed, at most, for a graph
_DISTANCES = 1 << 30  # of rows and centers, in an iteration of k-means without cells


def _gpus() -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0


def _plain(x: Floats) -> Floats:
    return np.ascontiguousarray(x, dtype=np.float32)


def search(queries: Floats, database: Floats, k: int) -> tuple[Floats, Ints]:
    """The k rows of `database` [n, d] with the largest inner product with each query [q, d].

    Returns similarities and indices, both [q, min(k, n)], best first; cosine similarities where the
    rows have unit length.  Beside the result it takes little memory (faiss goes block by block).
    """
    queries, database, k = _plain(queries), _plain(database), min(k, len(database))
    if not len(queries) or not k:
        return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    if _gpus() and k <= _GPU_K:
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(_GPU_SCRATCH)  # by itself faiss would take 1.5 GB
        similarities, indices = faiss.knn_gpu(
            resources,
            queries,
            database,
            k,
            metric=faiss.METRIC_INNER_PRODUCT,
            vectorsMemoryLimit=_GPU_BYTES,
            queriesMemoryLimit=_GPU_BYTES,
        )
    else:
        similarities, indices = faiss.knn(queries, database, k, faiss.METRIC_INNER_PRODUCT)
    return similarities, indices


def search_along(queries: Floats, database: Floats, k: int, what: str) -> tuple[Floats, Ints]:
    """As `search`, with a progress bar of that name."""
    shape = len(queries), min(k, len(database))
    similarities, indices = np.empty(shape, np.float32), np.empty(shape, np.int64)
    with progress(what, len(queries), "images") as advance:
        for start in range(0, len(queries), _QUERIES):
            rows = slice(start, start + _QUERIES)
            similarities[rows], indices[rows] = search(queries[rows], database, k)
            advance(len(indices[rows]))
    return similarities, indices


def graph(x: Floats, k: int, probes: int = _PROBES) -> tuple[Floats, Ints]:
    """Every row's k nearest other rows among unit vectors `x` [n, d]: similarities and indices,
    both [n, min(k, n - 1)], best first.

    Exact on a GPU and up to 65,536 rows.  Beyond, rows are put into cells of some 500 by k-means,
    and neighbors are looked for in the `probes` cells whose centers are nearest to that of a row's
    own; `make bench NAME=selection` prints the recall.
    """
    n, k = len(x), min(k, max(len(x) - 1, 0))
    if not k:
        return np.empty((n, 0), np.float32), np.empty((n, 0), np.int64)
    if _gpus() or n * n <= _PAIRS:
        return _without_itself(*search_along(x, x, k + 1, "nearest neighbors"), np.arange(n))
    x = _plain(x)
    centers, cell = kmeans(x, n // _CELL, 8, 0)
    order = np.argsort(cell, kind="stable")
    start = np.searchsorted(cell[order], np.arange(len(centers) + 1))
    probes = max(probes, -(-2 * k // _CELL))
    _, near = search(centers, centers, probes)
    similarities, indices = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    with progress("nearest neighbors", n, "images") as advance:
        for c in range(len(centers)):
            own = order[start[c] : start[c + 1]]
            those = np.concatenate([order[start[p] : start[p + 1]] for p in near[c]])
            those = those if len(those) > k else order
            found, places = search(x[own], x[those], k + 1)
            similarities[own], indices[own] = _without_itself(found, those[places], own)
            advance(len(own))
    return similarities, indices


def _without_itself(similarities: Floats, indices: Ints, rows: Ints) -> tuple[Floats, Ints]:
    """The columns [n, k] of [n, k + 1] neighbors of `rows` [n] that are not the row itself, or
    where others are as near as it the k first.
    """
    itself = indices == rows[:, None]
    itself[~itself.any(1), -1] = True
    shape = len(rows), indices.shape[1] - 1
    return similarities[~itself].reshape(shape), indices[~itself].reshape(shape)


def kmeans(x: Floats, k: int, iterations: int, seed: int) -> tuple[Floats, Ints]:
    """Spherical k-means of unit vectors `x` [n, d]: unit centers [k, d] and each row's center [n].

    Every row takes part (faiss would draw 256 per center by default).  A center that loses all its
    rows is put beside a large one; where many rows are equal, some may still end without any.  On a
    CPU, where n · k is above 2^30, rows are clustered into √k cells and these on their own into
    numbers of clusters in proportion to their rows.  The same `seed` gives the same result, on a
    CPU whatever the number of threads.
    Raises ValueError where k is not in 1 … n.
    """
    if not 0 < k <= len(x):
        raise ValueError(f"k-means of {len(x)} rows into {k} clusters; 1 to {len(x)} are possible")
    x = _plain(x)
    if _gpus() or k < 4 or len(x) * k <= _DISTANCES:
        with progress(f"k-means, {k:,} clusters", iterations, "iterations") as advance:
            centers = _lloyd(x, k, iterations, seed, advance)
        return centers, search(x, centers, 1)[1][:, 0]
    _, cell = kmeans(x, round(k**0.5), iterations, seed)
    order, sizes = np.argsort(cell, kind="stable"), np.bincount(cell)
    rows = np.split(order, np.cumsum(sizes)[:-1])
    parts, where, first = [], np.empty(len(x), np.int64), 0
    with progress(f"k-means, {k:,} clusters", len(x), "images") as advance:
        for own, count in zip(rows, shares(sizes, k), strict=True):
            if len(own):
                parts.append(_lloyd(x[own], int(count), iterations, seed))
                where[own] = first + search(x[own], parts[-1], 1)[1][:, 0]
                first += int(count)
            advance(len(own))
    return np.concatenate(parts), where


def _lloyd(
    x: Floats, k: int, iterations: int, seed: int, advance: Callable[[], None] = lambda: None
) -> Floats:
    means = faiss.Kmeans(
        x.shape[1],
        k,
        niter=1,
        seed=seed % (1 << 31),  # a C int
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
        gpu=_gpus(),
    )
    centers: Floats | None = None
    for _ in range(iterations):
        means.train(x, init_centroids=centers)
        centers = np.asarray(means.centroids, np.float32)
        advance()
    assert centers is not None
    return centers


def shares(sizes: Ints, total: int) -> Ints:
    """`total` divided among groups in proportion to their `sizes` [g] (Sainte-Laguë): at least 1
    of each that is not empty, where there are as many, and no more than its size.
    """
    group = np.repeat(np.arange(len(sizes)), sizes)
    place = place_in_group(group)
    claim = np.where(place == 0, np.inf, sizes[group] / (place + 0.5))
    taken: Ints = np.bincount(
        group[np.argsort(-claim, kind="stable")[:total]], minlength=len(sizes)
    )
    return taken


def nearest_distinct(centers: Floats, x: Floats, free: Ints) -> Ints:
    """For each center [k, d] a row of `x` [n, d] of its own among those `free`, nearly as near as
    can be.

    Where centers want the same row, the most similar one has it and the others their next nearest;
    who finds all of its few nearest taken chooses after all others have.
    Raises ValueError where there are more centers than rows.
    """
    if len(centers) > len(free):
        raise ValueError(
            f"{len(centers)} centers and {len(free)} rows; a row for each is not possible"
        )
    chosen = np.full(len(centers), -1, np.int64)
    waiting, depth = np.arange(len(centers)), 4
    while len(waiting):
        rest = x if len(free) == len(x) else x[free]
        similarities, near = search(centers[waiting], rest, depth)
        taken = np.zeros(len(free), bool)
        order = np.argsort(-similarities, axis=None, kind="stable")
        for c, n in zip(order // near.shape[1], near.ravel()[order], strict=True):
            if chosen[waiting[c]] < 0 and not taken[n]:
                chosen[waiting[c]], taken[n] = free[n], True
        free, waiting = free[~taken], waiting[chosen[waiting] < 0]
        depth = min(2 * depth, 256)
    return chosen
