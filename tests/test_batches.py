"""Batches cover every image, need no state, and come in order from the thread."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import batch_at, prefetch, slice_of


@given(n=st.integers(1, 60), batch=st.integers(1, 90), seed=st.integers(0, 2**32))
def test_every_epoch_has_every_image_once_at_odd_sizes(n: int, batch: int, seed: int) -> None:
    steps = -(-3 * n // batch)
    stream = np.concatenate([batch_at(n, batch, seed, t) for t in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    assert np.array_equal(batch_at(100, 32, 5, 7), batch_at(100, 32, 5, 7))
    assert not np.array_equal(batch_at(100, 32, 5, 7), batch_at(100, 32, 6, 7))
    assert not np.array_equal(batch_at(1000, 1000, 5, 0), batch_at(1000, 1000, 5, 1))


@given(total=st.integers(1, 100), ranks=st.integers(1, 9))
def test_ranks_share_a_batch_in_order(total: int, ranks: int) -> None:
    parts = [list(range(total))[slice_of(total, r, ranks)] for r in range(ranks)]
    assert [x for part in parts for x in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_prefetch_is_in_order_and_ahead_by_a_bounded_number() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    items = prefetch(make, 3, 20, ahead=2)
    assert next(items) == 9
    time.sleep(0.3)
    assert len(made) <= 4  # one taken, two waiting, one in hand
    assert list(items) == [k * k for k in range(4, 20)]


def test_prefetch_raises_what_the_thread_raised_and_ends_it() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("the disk is gone")
        return step

    with pytest.raises(OSError, match="the disk is gone"):
        list(prefetch(make, 0, 5))
    items = prefetch(lambda k: k, 0, 100)
    next(items)
    threads = threading.active_count()
    items.close()
    assert threading.active_count() == threads - 1
