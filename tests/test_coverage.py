"""Greedy covers: the plain greedy algorithm's choices, computed another way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import coverage
from pipeline.coverage import facility_location, farthest_first


def farthest_one_by_one(x: np.ndarray, nearest: np.ndarray, budget: int) -> list[int]:
    nearest, chosen = nearest.copy(), list[int]()
    for _ in range(budget):
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, x @ x[chosen[-1]])
        nearest[chosen] = np.inf
    return chosen


@pytest.mark.parametrize("pool", [1, 3, 1000])
@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 80), part=st.floats(0, 1), known=st.integers(0, 5), seed=st.integers(0, 99))
def test_farthest_first_is_the_plain_algorithm(
    pool: int, n: int, part: float, known: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (n, 3)).astype(np.float32)  # exact products, and many ties
    labeled = rng.integers(-2, 3, (known, 3)).astype(np.float32)
    nearest = (x @ labeled.T).max(1, initial=-9)
    budget = max(1, round(part * n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "_POOL", pool)
        patch.setattr(coverage, "_ROWS", 7)
        found = farthest_first(x, nearest, budget)
    assert found.tolist() == farthest_one_by_one(x, nearest, budget)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 6), part=st.floats(0, 1), seed=st.integers(0, 99))
def test_facility_location_picks_a_largest_gain_each_time(
    n: int, k: int, part: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    near = np.stack([rng.permutation(n)[: min(k, n - 1)] for _ in range(n)]).reshape(n, -1)
    kernel = (rng.integers(0, 5, near.shape) / 4).astype(np.float32)
    weights = (rng.integers(0, 4, n) / 4).astype(np.float32)
    covered = (rng.integers(0, 5, n) / 4).astype(np.float32)
    free = np.sort(rng.permutation(n)[: max(1, n // 2)])
    budget = max(1, round(part * len(free)))
    picks = facility_location(near, kernel, weights, covered, free, budget, seed)
    assert len(set(picks.tolist())) == budget
    assert set(picks.tolist()) <= set(free.tolist())
    whole = np.eye(n)
    for row in range(n):
        for column, value in zip(near[row], kernel[row], strict=True):
            whole[row, column] = max(whole[row, column], value)
            whole[column, row] = max(whole[column, row], value)
    left, state = set(free.tolist()), covered.astype(float)
    for pick in picks.tolist():
        gains = {j: float(np.maximum(whole[j] - state, 0) @ weights) for j in left}
        if max(gains.values()) <= 0 and state.any():  # all is covered: once more from the start
            state[:] = 0
            gains = {j: float(np.maximum(whole[j] - state, 0) @ weights) for j in left}
        assert gains[pick] == pytest.approx(max(gains.values()), abs=1e-6)
        state = np.maximum(state, whole[pick])
        left.remove(pick)


def test_the_seed_decides_among_equals() -> None:
    near, ones = np.zeros((30, 0), np.int64), np.ones(30, np.float32)
    found = {
        tuple(facility_location(near, ones[:0].reshape(30, 0), ones, 0 * ones, np.arange(30), 3, s))
        for s in range(5)
    }
    assert len(found) > 1


@pytest.mark.parametrize("known", [0.0, 1.0])
def test_what_has_no_weight_is_picked_without_computing_all_gains_each_time(
    known: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = list[int]()
    monkeypatch.setattr(coverage.heapq, "heapify", lambda heap: built.append(len(heap)))
    near, kernel = np.zeros((30, 0), np.int64), np.zeros((30, 0), np.float32)
    weights, covered = np.zeros(30, np.float32), np.full(30, known, np.float32)
    found = facility_location(near, kernel, weights, covered, np.arange(5, 30), 20, 0)
    assert len(set(found.tolist())) == 20
    assert found.min() >= 5
    assert len(built) <= 2
