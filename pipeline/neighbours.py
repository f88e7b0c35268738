"""Exact nearest neighbors and k-means by faiss, on a GPU where there is one: numpy in, numpy out.

faiss brings an OpenMP runtime of its own beside torch's; both follow OMP_NUM_THREADS and run in one
process in either import order (a test holds it).
"""

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.progress import progress

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_GPU_K = 2048  # faiss's limit on k on a GPU
_GPU_BYTES = 1 << 30  # of vectors, and of queries with their results, on the GPU at a time


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
        similarities, indices = faiss.knn_gpu(
            faiss.StandardGpuResources(),
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


def kmeans(x: Floats, k: int, iterations: int, seed: int) -> tuple[Floats, Ints]:
    """Spherical k-means of unit vectors `x` [n, d]: unit centers [k, d] and each row's center [n].

    Every row takes part (faiss would draw 256 per center by default).  A center that loses all its
    rows is put beside a large one; where many rows are equal, some may still end without any.  The
    same `seed` gives the same result, on a CPU whatever the number of threads.
    Raises ValueError where k is not in 1 … n.
    """
    if not 0 < k <= len(x):
        raise ValueError(f"k-means of {len(x)} rows into {k} clusters; 1 to {len(x)} are possible")
    x = _plain(x)
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
    with progress(f"k-means, {k:,} clusters", iterations, "iterations") as advance:
        for _ in range(iterations):
            means.train(x, init_centroids=centers)
            centers = np.asarray(means.centroids, np.float32)
            advance()
    assert centers is not None
    return centers, search(x, centers, 1)[1][:, 0]


def nearest_distinct(centers: Floats, x: Floats) -> Ints:
    """For each center [k, d] a row of `x` [n, d] of its own, as near as can be.

    Where centers want the same row, the most similar one has it and the others their next nearest.
    Raises ValueError where there are more centers than rows.
    """
    if len(centers) > len(x):
        raise ValueError(
            f"{len(centers)} centers and {len(x)} rows; a row for each is not possible"
        )
    chosen = np.full(len(centers), -1, np.int64)
    free, waiting, depth = np.arange(len(x)), np.arange(len(centers)), 4
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
