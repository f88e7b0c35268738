"""Search and k-means by faiss, against plain numpy."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import neighbours
from pipeline.neighbours import graph, kmeans, nearest_distinct, search, shares


def unit(n: int, d: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 7, 60, 200])
def test_search_is_what_brute_force_finds(k: int) -> None:
    queries, database = unit(23, 16, 1), unit(60, 16, 2)
    similarities, indices = search(queries, database, k)
    everything = queries @ database.T
    order = np.argsort(-everything, axis=1)[:, :k]
    assert indices.shape == (23, min(k, 60))
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(similarities, np.take_along_axis(everything, order, 1), atol=1e-6)


def test_search_takes_any_layout_and_empty_sides(tmp_path) -> None:
    queries, database = unit(5, 8, 1), unit(9, 8, 2)
    np.save(tmp_path / "x.npy", database)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = search(queries, database, 3)[1]
    np.testing.assert_array_equal(search(np.asfortranarray(queries), mapped, 3)[1], expected)
    np.testing.assert_array_equal(search(queries.astype(np.float64), database, 3)[1], expected)
    assert search(queries[:0], database, 3)[1].shape == (0, 3)
    assert search(queries, database[:0], 3)[1].shape == (5, 0)


def test_kmeans_finds_separate_clusters() -> None:
    truth = np.repeat(np.arange(3), 30)
    x = unit(3, 32)[truth] + 0.05 * unit(90, 32, 1)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = [kmeans(x, 3, 20, seed) for seed in range(10)]
    centers, assignment = max(found, key=lambda r: float((x * r[0][r[1]]).sum()))
    pairs = set(zip(truth.tolist(), assignment.tolist(), strict=True))
    assert len(pairs) == 3  # one center for each cluster
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
    means = np.stack([x[assignment == k].mean(0) for k in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(centers, means, atol=1e-4)


def test_kmeans_assigns_each_row_to_its_nearest_center() -> None:
    x = unit(300, 8)
    centers, assignment = kmeans(x, 40, 10, 0)
    np.testing.assert_array_equal(assignment, (x @ centers.T).argmax(1))


def test_kmeans_uses_every_row() -> None:
    """600 rows a center: faiss alone would look at 256 of them."""
    x = np.concatenate([np.tile([[1, 0]], (599, 1)), [[0, 1]]]).astype(np.float32)
    centers, _ = kmeans(x, 1, 5, 0)
    np.testing.assert_allclose(centers[0], np.array([599, 1]) / np.hypot(599, 1), atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(50, 50), (50, 49), (50, 40), (3, 2), (1, 1)])
def test_kmeans_with_almost_as_many_clusters_as_rows(n: int, k: int) -> None:
    x = unit(n, 12)
    centers, _ = kmeans(x, k, 10, 0)
    assert centers.shape == (k, 12)
    assert np.isfinite(centers).all()
    assert len(np.unique(nearest_distinct(centers, x, np.arange(len(x))))) == k


def test_kmeans_of_equal_rows() -> None:
    x = np.repeat(unit(5, 12), 20, axis=0)
    centers, _ = kmeans(x, 40, 10, 0)
    assert np.isfinite(centers).all()
    assert len(np.unique(nearest_distinct(centers, x, np.arange(len(x))))) == 40


@pytest.mark.parametrize("k", [0, 11])
def test_kmeans_refuses_an_impossible_number_of_clusters(k: int) -> None:
    with pytest.raises(ValueError, match=f"k-means of 10 rows into {k} clusters; 1 to 10"):
        kmeans(unit(10, 4), k, 5, 0)


_REPEAT = """
import {first}
import {second}
import hashlib, sys
import numpy as np
import torch
from pipeline.neighbours import kmeans
conv = torch.nn.Conv2d(3, 8, 3)
x = np.random.default_rng(0).standard_normal((4000, 32), dtype=np.float32)
x /= np.linalg.norm(x, axis=1, keepdims=True)
for _ in range(3):  # in turn, each with its own OpenMP threads
    conv(torch.randn(8, 3, 64, 64)).sum().backward()
    centers, assignment = kmeans(x, 300, 5, seed=7)
    print(hashlib.sha256(centers.tobytes() + assignment.tobytes()).hexdigest())
"""


def test_torch_and_faiss_share_a_process_and_threads_change_nothing() -> None:
    found = set()
    for first, second, threads in (("torch", "faiss", "2"), ("faiss", "torch", "1")):
        done = subprocess.run(
            [sys.executable, "-c", _REPEAT.format(first=first, second=second)],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found |= set(done.stdout.split())
    assert len(found) == 1


@pytest.fixture
def in_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done at half a million rows, at a few thousand."""
    monkeypatch.setattr(neighbours, "_gpus", lambda: 0)
    monkeypatch.setattr(neighbours, "_PAIRS", 1)
    monkeypatch.setattr(neighbours, "_DISTANCES", 1000)
    monkeypatch.setattr(neighbours, "_CELL", 64)


def clustered(n: int, clusters: int = 40) -> np.ndarray:
    x = unit(clusters, 16)[np.arange(n) % clusters] + 0.15 * unit(n, 16, 1)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_graph_in_cells_finds_most_of_the_nearest(in_cells: None) -> None:
    x = clustered(4000)
    everything = x @ x.T
    np.fill_diagonal(everything, -1)
    similarities, near = graph(x, 10)
    assert similarities.shape == near.shape == (4000, 10)
    np.testing.assert_allclose(similarities, np.take_along_axis(everything, near, 1), atol=1e-5)
    assert (np.diff(similarities, axis=1) <= 1e-6).all()
    assert (near != np.arange(4000)[:, None]).all()
    exact = np.argsort(-everything, axis=1)[:, :10]
    found = [len(np.intersect1d(*pair)) for pair in zip(near, exact, strict=True)]
    assert np.mean(found) > 9.8
    few = graph(x, 10, probes=1)[1]  # as a check that cells are what is looked into
    missed = [len(np.intersect1d(*pair)) for pair in zip(few, exact, strict=True)]
    assert np.mean(missed) < np.mean(found)


@pytest.mark.parametrize("k", [70, 1500])
def test_kmeans_in_cells_has_as_many_centers(in_cells: None, k: int) -> None:
    x = clustered(2000)
    centers, own = kmeans(x, k, 10, 0)
    assert centers.shape == (k, 16)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
    assert (own >= 0).all()
    assert (own < k).all()
    got = np.einsum("nd,nd->n", x, centers[own]).mean()
    assert got > np.einsum("nd,nd->n", x, unit(40, 16)[np.arange(2000) % 40]).mean() - 0.02


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), part=st.floats(0, 1))
def test_shares_are_in_proportion(sizes: list[int], part: float) -> None:
    total = round(part * sum(sizes))
    taken = shares(np.array(sizes), total)
    assert taken.sum() == total
    assert (taken <= sizes).all()
    if total >= np.count_nonzero(sizes):
        assert (taken[np.array(sizes) > 0] >= 1).all()
        for n, own in zip(sizes, taken, strict=True):  # nobody else's last was worth less
            claim = n / (own + 0.5) if own < n else 0
            assert all(
                k == 1 or m / (k - 0.5) >= claim - 1e-9
                for m, k in zip(sizes, taken, strict=True)
                if m
            )


def test_kmeans_depends_on_the_seed() -> None:
    x = unit(200, 8)
    assert not np.array_equal(kmeans(x, 20, 3, 0)[0], kmeans(x, 20, 3, 1)[0])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), share=st.floats(0, 1), copies=st.integers(1, 4), seed=st.integers(0, 9)
)
def test_nearest_distinct_gives_each_center_a_row_of_its_own(
    n: int, share: float, copies: int, seed: int
) -> None:
    x = np.repeat(unit(n, 3, seed), copies, axis=0)
    centers = unit(max(1, round(share * len(x))), 3, seed + 100)
    within = np.arange(len(x))[min(copies, len(x) - len(centers)) :]  # others are not free
    chosen = nearest_distinct(centers, x, within)
    assert len(np.unique(chosen)) == len(centers)
    assert np.isin(chosen, within).all()
    similarities = np.where(np.isin(np.arange(len(x)), within), centers @ x.T, -2)
    got = similarities[np.arange(len(centers)), chosen]
    best = similarities.max(1)
    first = int(best.argmax())  # nobody can be nearer to its row than this center
    assert got[first] == pytest.approx(best[first], abs=1e-6)
    free = np.setdiff1d(within, chosen)
    if len(free):  # a row left over is no nearer to any center than the row that it has
        assert (similarities[:, free].max(1) <= got + 1e-6).all()


def test_nearest_distinct_refuses_more_centers_than_rows() -> None:
    with pytest.raises(ValueError, match="4 centers and 3 rows"):
        nearest_distinct(unit(4, 2), unit(5, 2), np.arange(3))
