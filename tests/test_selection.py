"""Label requests: what holds for every strategy, and what each is for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import InputError
from pipeline.selection import Candidates, Strategy, choose, eligible
from pipeline.strategies import (
    EnergyStrata,
    Hybrid,
    KCenterGreedy,
    KMeans,
    Margin,
    MarginClusters,
    Picks,
    ProbCover,
    Random,
    Typicality,
)

from .conftest import unit

STRATEGIES = Strategy.__subclasses__()
NEAR = 0.9999


def candidates(n: int, seed: int = 0, share: float = 0.8, near: float = 1.1) -> Candidates:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 4))
    x[rng.random(n) < 0.3] = x[0]  # several images look the same
    possible = np.sort(rng.choice(n, max(1, round(share * n)), replace=False))
    logits = [rng.standard_normal((n, 5), dtype=np.float32) for _ in range(2)]
    labels = rng.integers(0, 5, min(3, n))
    return Candidates(unit(x), logits, possible, unit(x)[:3], labels, 5, near)


def pool(x: np.ndarray, margin: np.ndarray | None = None, labeled: int = 0) -> Candidates:
    """Candidates of the rows `x`, of which copies of the first are labeled, with margins."""
    logits = []
    if margin is not None:
        p = np.stack([(1 + margin) / 2, (1 - margin) / 2], 1)
        logits = [np.log(np.maximum(p, 1e-9)).astype(np.float32)]
    x = unit(x)
    labels = np.zeros(labeled, np.int64)
    return Candidates(x, logits, np.arange(len(x)), x[:labeled], labels, 2)


@pytest.mark.parametrize("near", [1.1, NEAR])
@pytest.mark.parametrize("kind", STRATEGIES)
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60), share=st.floats(0.1, 1), part=st.floats(0, 1), seed=st.integers(0, 2**31)
)
def test_a_request_keeps_the_rules(
    kind: type[Strategy], near: float, n: int, share: float, part: float, seed: int
) -> None:
    given = candidates(n, seed % 7, share, near)
    budget = round(part * len(given.free))
    if not budget:
        return
    request = choose(kind(), given, budget, seed)
    assert len(request.indices) == len(request.groups) == budget
    assert (np.diff(request.indices) > 0).all()  # sorted, so unique
    assert set(request.indices.tolist()) <= set(given.eligible.tolist())
    if near <= 1:
        x = np.concatenate([given.embeddings[request.indices], given.labeled])
        alike = np.tril(x @ x.T, -1)[:budget].max() if len(x) > 1 else 0
        assert alike < near
        assert (given.embeddings[request.indices] @ given.labeled.T < near).all()
    again = choose(kind(), candidates(n, seed % 7, share, near), budget, seed)
    np.testing.assert_array_equal(request.indices, again.indices)
    np.testing.assert_array_equal(request.groups, again.groups)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_more_copies_than_neighbors_are_kept_apart(
    kind: type[Strategy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two neighbors each, the graph knows few of the 60 copies of each of 12 images."""
    monkeypatch.setattr("pipeline.selection.NEIGHBORS", 2)
    x = np.random.default_rng(0).standard_normal((12, 8)).repeat(60, 0)
    rng = np.random.default_rng(1)
    x += 1e-4 * rng.standard_normal(x.shape)
    given = pool(x, rng.random(len(x)))
    given.near_duplicate = 0.999
    request = choose(kind(), given, 12, 0)
    assert sorted(request.indices // 60) == list(range(12))
    assert request.near_duplicates == 708
    assert len(given.free) == 12  # before any strategy is asked


def test_what_is_left_out_while_choosing_is_counted() -> None:
    x = np.eye(8)[np.arange(24) % 8]
    given = pool(x)
    given.near_duplicate = 0.99
    given.free = np.arange(24)  # as if the graph knew of none
    assert choose(Random(), given, 4, 0).near_duplicates >= 2
    given.free = np.arange(8)
    assert choose(Random(), given, 4, 0).near_duplicates == 16


def test_a_class_alone_has_no_second() -> None:
    given = Candidates(
        unit(np.eye(4)), [np.ones((4, 1), np.float32)], np.arange(4), unit(np.eye(4))[:0],
        np.arange(0), 1
    )  # fmt: skip
    np.testing.assert_array_equal(given.margin, np.ones(4))


@pytest.mark.parametrize("what", ["embeddings", "logits"])
def test_what_is_not_finite_is_told(what: str) -> None:
    given = candidates(20, share=1)
    array = given.embeddings if what == "embeddings" else given.logits[1]
    array[[7, 9], 1] = np.nan
    with pytest.raises(InputError, match=rf"^{what} of 2 unlabeled images, 7.png the first, are n"):
        choose(Margin(), given, 4, 0)


def test_crowds_of_copies_are_kept_apart_in_a_few_rounds() -> None:
    """A strategy that likes a crowd of 2,000 near-copies best is asked a few times, not dozens."""
    rng, asked = np.random.default_rng(0), list[int]()
    x = rng.standard_normal((2500, 8))
    x[:2000] = x[0] + 1e-4 * rng.standard_normal((2000, 8))
    given = pool(x, rng.random(len(x)))
    given.near_duplicate = 0.999
    given.free = np.arange(len(x))  # as if the graph knew of none

    def crowd(candidates: Candidates, budget: int, seed: int) -> Picks:
        asked.append(len(candidates.free))
        return candidates.free[:budget], None

    found = choose(crowd, given, 200, 0).indices  # type: ignore[arg-type]
    assert (found < 2000).sum() == 1
    assert len(asked) <= 4


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_request_does_not_depend_on_those_before(kind: type[Strategy]) -> None:
    """Strategies share what they compute of the candidates."""
    shared = candidates(60, near=NEAR)
    for other in STRATEGIES:
        choose(other(), shared, 20, 0)
    found = choose(kind(), shared, 20, 0).indices
    np.testing.assert_array_equal(found, choose(kind(), candidates(60, near=NEAR), 20, 0).indices)


@pytest.mark.parametrize("kind", [Random, EnergyStrata, KMeans, Typicality, ProbCover])
def test_a_request_depends_on_the_seed(kind: type[Strategy]) -> None:
    found = {tuple(choose(kind(), candidates(200), 20, s).indices.tolist()) for s in range(3)}
    assert len(found) == 3


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("budget", [-1, 0, 9])
def test_a_budget_that_cannot_be_met_is_refused(kind: type[Strategy], budget: int) -> None:
    given = candidates(10)
    assert len(given.eligible) == 8
    expected = (
        rf"^label_request: budget is {budget} and 8 unlabeled images can be asked for \(not "
        rf"labeled, skipped or duplicate, and 0 near-duplicates left out, see "
        rf"label_request.near_duplicate\); a budget of 1 to 8 is expected$"
    )
    with pytest.raises(InputError, match=expected):
        choose(kind(), given, budget, 0)


@pytest.mark.parametrize("wrong", [[0, 0, 1], [0, 1], [0, 1, 7]])
def test_a_strategy_that_breaks_the_rules_is_caught(wrong: list[int]) -> None:
    class Wrong(Random):
        def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
            return np.array(wrong), None

    with pytest.raises(RuntimeError, match="Wrong broke the rules of a request"):
        choose(Wrong(), pool(np.eye(5)), 3, 0)


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        (KMeans, {"iterations": 0}, "KMeans: iterations is 0; 1 or more is expected"),
        (EnergyStrata, {"strata": 0}, "EnergyStrata: strata is 0; 1 or more is expected"),
        (ProbCover, {"purity": 1.5}, "ProbCover: purity is 1.5; above 0, up to 1 is expected"),
        (MarginClusters, {"pool": 0.5}, "MarginClusters: pool is 0.5; 1 or more is expected"),
        (Typicality, {"neighbors": 51}, "Typicality: neighbors is 51; up to 50 are expected"),
        (Hybrid, {"uncertainty": -1}, "Hybrid: uncertainty is -1; 0 or more is expected"),
    ],
)
def test_a_strategys_arguments_are_checked(
    kind: type[Strategy], wrong: dict[str, float], words: str
) -> None:
    with pytest.raises(InputError, match=f"^{words}$"):
        kind(**wrong)


def test_labeled_images_count_where_clusters_are_clear() -> None:
    """All neighbors of an image are of its cluster; one of two clusters is labeled."""
    x = np.eye(2, 8).repeat(80, 0) + 0.05 * np.random.default_rng(0).standard_normal((160, 8))
    request = choose(ProbCover(), pool(x, labeled=80), 3, 0)
    assert (request.indices >= 80).all()


@pytest.mark.parametrize("near", [1.1, NEAR])
@pytest.mark.parametrize("kind", STRATEGIES)
def test_nothing_left_to_ask_for_is_told(kind: type[Strategy], near: float) -> None:
    given = candidates(10, near=near)
    given.eligible = given.eligible[:0]
    with pytest.raises(InputError, match="budget is 3 and 0 unlabeled images can be asked for"):
        choose(kind(), given, 3, 0)


def test_kmeans_asks_for_one_image_of_each_cluster() -> None:
    """Twelve equal directions, from 1 to 40 images in each: random requests miss the small ones."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(12), [1, 1, 1, 2, 2, 3, 5, 8, 13, 21, 34, 40])
    x = np.eye(12, 16, dtype=np.float32)[truth] + 0.01 * rng.standard_normal((len(truth), 16))
    given = pool(x)

    def covered(strategy: Strategy) -> float:
        return np.mean(
            [len(np.unique(truth[choose(strategy, given, 12, s).indices])) for s in range(10)]
        )

    assert covered(KMeans()) > covered(Random()) + 1


def test_kmeans_asks_for_the_image_nearest_a_center() -> None:
    around = np.array([-0.3, 0.0, 0.28, 1.2, 1.5, 1.79])  # angles of two clusters
    x = np.stack([np.cos(around), np.sin(around)], 1).astype(np.float32)
    found = {tuple(choose(KMeans(), pool(x), 2, s).indices.tolist()) for s in range(10)}
    assert (1, 4) in found


def test_random_takes_each_image_equally_often() -> None:
    given = candidates(20, share=1.0)
    counts = np.zeros(20)
    for seed in range(400):
        counts[choose(Random(), given, 5, seed).indices] += 1
    assert counts.min() > 60  # 100 ± 8.7 expected
    assert counts.max() < 140


def test_energy_strata_are_used_alike() -> None:
    """Three images of each tenth by energy, from the least known to the best known."""
    rng = np.random.default_rng(0)
    x, energy = rng.standard_normal((200, 4)), rng.permutation(200)
    given = pool(x)
    given.logits = [np.stack([energy, energy], 1).astype(np.float32)]
    request = choose(EnergyStrata(), given, 30, 0)
    assert np.bincount(energy[request.indices] // 20).tolist() == [3] * 10
    np.testing.assert_array_equal(energy[request.indices] // 20, request.groups)


def test_margins_are_of_the_models_mean_probability() -> None:
    """Two sure models that disagree leave no margin; the energy is the mean of theirs."""
    a, b = np.array([[4.0, 0, 0], [4, 0, 0]]), np.array([[4.0, 0, 0], [0, 4, 0]])
    given = pool(np.eye(2))
    given.logits, given.classes = [a.astype(np.float32), b.astype(np.float32)], 3
    p = np.exp([4.0, 0, 0]) / np.exp([4.0, 0, 0]).sum()
    np.testing.assert_allclose(given.margin, [p[0] - p[1], 0], atol=1e-6)
    np.testing.assert_allclose(given.energy, np.log(np.exp([4.0, 0, 0]).sum()), rtol=1e-6)
    labels, confidences = given.guesses(np.arange(2))
    assert labels[0] == 0
    np.testing.assert_allclose(confidences, [p[0], (p[0] + p[1]) / 2], rtol=1e-6)


def test_without_a_model_the_nearest_labeled_images_vote() -> None:
    x = unit(np.array([[1.0, 0.1], [0.1, 1.0], [1, 0.2]]))
    given = Candidates(x, [], np.arange(3), unit(np.eye(2)), np.array([7, 3]), 9)
    labels, confidences = given.guesses(np.arange(3))
    assert labels.tolist() == [7, 3, 7]
    assert (confidences > 0.9).all()
    none = Candidates(x, [], np.arange(3), x[:0], np.empty(0, np.int64), 9)
    assert none.guesses(np.arange(3))[0].tolist() == [-1, -1, -1]


def test_typicality_takes_the_middle_of_clusters_without_a_label() -> None:
    """Three clusters around axes, of which the first has a label; the middle is the typical one."""
    rng = np.random.default_rng(0)
    x = np.eye(8)[np.repeat([0, 1, 2], [30, 25, 20])] + 0.2 * rng.standard_normal((75, 8))
    x[40], x[60] = x[30:55].mean(0), x[55:].mean(0)
    given = pool(x, labeled=1)
    assert choose(Typicality(neighbors=10), given, 2, 0).indices.tolist() == [40, 60]


def test_typicality_leaves_small_clusters_to_the_last() -> None:
    """Two pairs far from two crowds: what stands alone is not typical (appendix F)."""
    rng = np.random.default_rng(0)
    axes = np.repeat(np.arange(4), [30, 25, 2, 2])
    given = pool(np.eye(4)[axes] + 0.02 * rng.standard_normal((59, 4)))
    picked = [axes[choose(Typicality(), given, 4, seed).indices] for seed in range(3)]
    assert all((axis < 2).all() for axis in picked)


def test_kcenter_goes_where_nothing_is_labeled() -> None:
    given = pool(
        np.array([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2], [-1, 0, 0]]), labeled=1
    )
    assert choose(KCenterGreedy(), given, 2, 0).indices.tolist() == [2, 4]


def test_probcover_takes_what_covers_most() -> None:
    """The images with most others in their ball, one in each cluster, and none where labels are."""
    rng = np.random.default_rng(0)
    x = np.eye(8)[np.repeat([0, 1, 2, 3], [40, 30, 20, 3])] + 0.05 * rng.standard_normal((93, 8))
    given = pool(x, labeled=1)
    given.classes = 4
    chosen = choose(ProbCover(purity=1.0), given, 2, 0).indices
    assert [int(np.searchsorted([40, 70, 90], k, "right")) for k in chosen] == [1, 2]


def test_margin_takes_the_smallest() -> None:
    margin = np.random.default_rng(0).permutation(40) / 40
    given = pool(np.random.default_rng(1).standard_normal((40, 4)), margin)
    np.testing.assert_array_equal(
        choose(Margin(), given, 7, 0).indices, np.sort(margin.argsort()[:7])
    )


def test_margin_clusters_take_as_many_of_each() -> None:
    """Of 3 clusters of unsure images two each, the least sure; a cluster of sure images none."""
    truth = np.repeat([0, 1, 2, 3], 20)
    rng = np.random.default_rng(0)
    x = np.eye(8)[truth] + 0.02 * rng.standard_normal((80, 8))
    margin = np.where(truth == 3, 0.9, np.tile(np.arange(20), 4) / 100 + truth * 1e-3)
    given = pool(x, margin)
    request = choose(MarginClusters(pool=10, clusters=3), given, 6, 0)
    assert request.indices.tolist() == [0, 1, 20, 21, 40, 41]
    assert len(np.unique(request.groups)) == 3
    x = np.eye(8)[np.repeat([0, 1], 10)] + 0.02 * rng.standard_normal((20, 8))
    few = pool(x, np.arange(20) / 100)  # a label for each of two clusters, whatever is asked for
    assert choose(MarginClusters(pool=10, clusters=20), few, 2, 0).indices.tolist() == [0, 10]


def test_hybrid_weighs_density_coverage_and_margin() -> None:
    """Dense, unsure and not yet labeled: each of the three decides where the others are equal."""
    rng = np.random.default_rng(0)

    def first(sizes: list[int], margins: list[float], labeled: int = 0) -> int:
        truth = np.repeat(np.arange(len(sizes)), sizes)
        x = np.eye(8)[truth] + 0.05 * rng.standard_normal((len(truth), 8))
        given = pool(x, np.array(margins)[truth], labeled)
        return int(truth[choose(Hybrid(), given, 1, 0).indices[0]])

    assert first([80, 60, 60], [0.5, 0.5, 0.5]) == 0
    assert first([60, 80, 60], [0.5, 0.5, 0.5]) == 1
    assert first([60, 60, 60], [0.5, 0.5, 0.1]) == 2
    assert first([60, 60, 60], [0.5, 0.5, 0.5], labeled=3) != 0


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
