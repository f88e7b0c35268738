"""Which images make up step t: a pure function of (seed, step), and a thread that fetches them
ahead.
"""

import queue
import threading
from collections.abc import Callable, Generator
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Ints = npt.NDArray[np.int64]


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Ints:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def batch_at(n: int, batch: int, seed: int, step: int) -> Ints:
    """The positions [batch] of the global batch of `step` among n images.

    Steps read one stream of permutations of all n images, so each image comes exactly once in an
    epoch and none is dropped; a batch may straddle two epochs.
    """
    return stream_at(n, batch, step, partial(_permutation, n, seed))


def stream_at(n: int, batch: int, step: int, order_of: Callable[[int], Ints]) -> Ints:
    """The positions [batch] of `step` in a stream of epochs: order_of(0) [n], order_of(1), …"""
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), max(n, 1))
    positions = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        positions[here] = order_of(int(epoch))[places[here]]
    return positions


def slice_of(total: int, rank: int, ranks: int) -> slice:
    """The contiguous part of `total` items that a rank takes."""
    return slice(total * rank // ranks, total * (rank + 1) // ranks)


def prefetch(
    make: Callable[[int], T], start: int, stop: int, ahead: int = 2
) -> Generator[T, None, None]:
    """make(start), …, make(stop - 1), computed by a thread up to `ahead` items in advance.

    An exception of `make` is raised here; closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
    closed = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in range(start, stop):
                if closed.is_set():
                    return
                put((make(step), None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
