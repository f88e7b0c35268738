"""Label requests: what holds for every strategy, and what each is for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import InputError
from pipeline.selection import Candidates, KMeans, Random, Request, Strategy, choose, eligible

STRATEGIES = Strategy.__subclasses__()


def candidates(n: int, seed: int = 0, share: float = 0.8) -> Candidates:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 4), dtype=np.float32)
    x[rng.random(n) < 0.3] = x[0]  # several images look the same
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    possible = np.sort(rng.choice(n, max(1, round(share * n)), replace=False))
    logits = rng.standard_normal((n, 5), dtype=np.float32)
    return Candidates(x, logits, possible, x[:3])


@pytest.mark.parametrize("kind", STRATEGIES)
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60), share=st.floats(0.1, 1), part=st.floats(0, 1), seed=st.integers(0, 2**31)
)
def test_a_request_keeps_the_rules(
    kind: type[Strategy], n: int, share: float, part: float, seed: int
) -> None:
    pool = candidates(n, seed % 7, share)
    budget = max(1, round(part * len(pool.eligible)))
    request = choose(kind(), pool, budget, seed)
    assert len(request.indices) == len(request.groups) == budget
    assert (np.diff(request.indices) > 0).all()  # sorted, so unique
    assert set(request.indices.tolist()) <= set(pool.eligible.tolist())
    again = choose(kind(), pool, budget, seed)
    np.testing.assert_array_equal(request.indices, again.indices)
    np.testing.assert_array_equal(request.groups, again.groups)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_request_depends_on_the_seed(kind: type[Strategy]) -> None:
    pool = candidates(200)
    found = {tuple(choose(kind(), pool, 20, seed).indices.tolist()) for seed in range(3)}
    assert len(found) == 3


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("budget", [-1, 0, 9])
def test_a_budget_that_cannot_be_met_is_refused(kind: type[Strategy], budget: int) -> None:
    pool = candidates(10)
    assert len(pool.eligible) == 8
    expected = (
        rf"^label_request: budget is {budget} and 8 unlabeled images can be asked for \(not "
        rf"labeled, skipped or duplicate\); a budget of 1 to 8 is expected$"
    )
    with pytest.raises(InputError, match=expected):
        choose(kind(), pool, budget, 0)


@pytest.mark.parametrize("wrong", [[0, 0, 1], [0, 1], [0, 1, 7]])
def test_a_strategy_that_breaks_the_rules_is_caught(wrong: list[int]) -> None:
    class Wrong(Random):
        def __call__(self, candidates: Candidates, budget: int, seed: int) -> Request:
            return Request(np.array(wrong), np.zeros(len(wrong), np.int64))

    x = np.ones((8, 1), np.float32)
    with pytest.raises(RuntimeError, match="Wrong broke the rules of a request"):
        choose(Wrong(), Candidates(x, None, np.arange(5), x[:0]), 3, 0)


def test_kmeans_asks_for_one_image_of_each_cluster() -> None:
    """Twelve equal directions, from 1 to 40 images in each: random requests miss the small ones."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(12), [1, 1, 1, 2, 2, 3, 5, 8, 13, 21, 34, 40])
    x = np.eye(12, 16, dtype=np.float32)[truth] + 0.01 * rng.standard_normal((len(truth), 16))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    pool = Candidates(x, None, np.arange(len(x)), x[:0])

    def covered(strategy: Strategy) -> float:
        return np.mean(
            [len(np.unique(truth[choose(strategy, pool, 12, s).indices])) for s in range(10)]
        )

    assert covered(KMeans()) > covered(Random()) + 1


def test_kmeans_asks_for_the_image_nearest_a_center() -> None:
    around = np.array([-0.3, 0.0, 0.28, 1.2, 1.5, 1.79])  # angles of two clusters
    x = np.stack([np.cos(around), np.sin(around)], 1).astype(np.float32)
    found = {
        tuple(choose(KMeans(), Candidates(x, None, np.arange(6), x[:0]), 2, s).indices.tolist())
        for s in range(10)
    }
    assert (1, 4) in found


def test_random_takes_each_image_equally_often() -> None:
    pool = candidates(20, share=1.0)
    counts = np.zeros(20)
    for seed in range(400):
        counts[choose(Random(), pool, 5, seed).indices] += 1
    assert counts.min() > 60  # 100 ± 8.7 expected
    assert counts.max() < 140


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_eligible_images_are_neither_labeled_nor_duplicates(data: st.DataObject) -> None:
    usable = np.array(data.draw(st.lists(st.integers(0, 99), unique=True, max_size=40)), np.int64)
    draw = st.lists(st.integers(0, 9), min_size=len(usable), max_size=len(usable))
    digests = np.array([b"%d" % d for d in data.draw(draw)], "S64")
    labeled = np.array(
        [b"%d" % d for d in data.draw(st.lists(st.integers(0, 9), max_size=4))], "S64"
    )
    found = eligible(usable, digests, labeled).tolist()
    of = dict(zip(usable.tolist(), digests.tolist(), strict=True))
    expected = []
    seen = set(labeled.tolist())
    for index in sorted(of):
        if of[index] not in seen:
            seen.add(of[index])
            expected.append(index)
    assert found == expected
