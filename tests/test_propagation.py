"""Label propagation: the linear system, its solution by blocks, and what it is good for."""

import numpy as np
import pytest
from scipy.special import softmax

from pipeline import InputError, propagation
from pipeline.propagation import Propagation, affinity, conjugate_gradient
from pipeline.pseudo_labels import Evidence

from .conftest import unit


def moons(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points of two interlocked half circles, on a sphere."""
    rng = np.random.default_rng(seed)
    truth, t = np.arange(n) % 2, rng.random(n) * np.pi
    x = np.where(truth, 1 - np.cos(t), np.cos(t))
    y = np.where(truth, 0.5 - np.sin(t), np.sin(t))
    plane = np.stack([x, y], 1) + 0.04 * rng.standard_normal((n, 2))
    return unit(np.concatenate([0.5 * plane, np.ones((n, 1))], 1)), truth


def evidence(x: np.ndarray, truth: np.ndarray, known: list[int], classes: int) -> Evidence:
    rest = np.setdiff1d(np.arange(len(x)), known)
    logits = np.zeros((len(rest), classes), np.float32)
    return Evidence(logits, x[rest], x[known], truth[known])


def dense(given: Evidence, k: int, gamma: float, alpha: float, prior: float) -> np.ndarray:
    """Z of equation 10, by a dense inverse."""
    x = np.concatenate([given.x, given.labeled]).astype(np.float64)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -np.inf)
    w = np.zeros_like(cosine)
    for row, near in enumerate(np.argsort(-cosine, axis=1)[:, :k]):
        w[row, near] = np.maximum(cosine[row, near], 0) ** gamma
    w += w.T
    root = 1 / np.sqrt(w.sum(1))
    n, classes = given.logits.shape
    y = np.concatenate([prior * softmax(given.logits, axis=1), np.eye(classes)[given.labels]])
    return np.linalg.solve(np.eye(len(x)) - alpha * root[:, None] * w * root, y)[:n]


@pytest.mark.parametrize("block", [1, 2, 100])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_propagation_solves_the_papers_system(
    block: int, balanced: bool, prior: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    x, truth = unit(rng.standard_normal((60, 4))), rng.integers(0, 5, 60)
    given = evidence(x, truth, [*range(12)], 5)
    given.logits[:] = rng.standard_normal(given.logits.shape)
    monkeypatch.setattr(propagation, "_NUMBERS", 60 * block)
    method = Propagation(6, alpha=0.9, iterations=200, prior=prior, balanced=balanced)
    labels, sure = method(given)
    z = np.maximum(dense(given, 6, 3.0, 0.9, prior), 0)
    if balanced:
        everywhere = Evidence(given.logits, given.x, given.labeled, given.labels)
        x = np.concatenate([everywhere.x, everywhere.labeled])
        y = np.concatenate([prior * softmax(given.logits, axis=1), np.eye(5)[given.labels]])
        s = affinity(x, 6, 3.0).toarray()
        z = z / np.linalg.solve(np.eye(60) - 0.9 * s, y).sum(0)
    np.testing.assert_array_equal(labels, z.argmax(1))
    p = z / z.sum(1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(1)
    np.testing.assert_allclose(sure, 1 - entropy / np.log(5), atol=1e-4)


def test_conjugate_gradient_solves_each_column_alone() -> None:
    x = unit(np.random.default_rng(0).standard_normal((50, 5)))
    s, y = affinity(x, 8, 3.0), np.eye(50, 3, dtype=np.float32)
    y[:, 2] = 0
    z = conjugate_gradient(s, y, 0.95, 100)
    np.testing.assert_allclose(z - 0.95 * (s @ z), y, atol=1e-4)
    assert not z[:, 2].any()
    np.testing.assert_allclose(conjugate_gradient(s, y[:, :1], 0.95, 100), z[:, :1], atol=1e-5)


def test_labels_follow_the_shape_of_the_data() -> None:
    """One label on each of two moons: nearest neighbors get many wrong, propagation few."""
    x, truth = moons()
    given = evidence(x, truth, [0, 1], 2)
    rest = truth[2:]
    nearest = given.labels[(given.x @ given.labeled.T).argmax(1)]
    labels, sure = Propagation(neighbors=8, iterations=100)(given)
    assert (nearest == rest).mean() < 0.9
    assert (labels == rest).mean() > 0.97
    assert ((sure >= 0) & (sure <= 1)).all()


def test_balance_helps_the_class_with_fewer_labels() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], 150)
    x = unit(np.eye(4)[truth] + 0.5 * rng.standard_normal((300, 4)))
    given = evidence(x, truth, [*range(40), 150, 151], 2)
    rest = np.setdiff1d(np.arange(300), [*range(40), 150, 151])
    right = [(Propagation(10, balanced=b)(given)[0] == truth[rest]).mean() for b in (False, True)]
    assert right[1] > right[0]


def test_a_class_without_a_label_is_given_to_no_image() -> None:
    """Balance would make a class of the little that the classifier gives it."""
    x, truth = moons()
    given = evidence(x, 2 * truth, [*range(20)], 4)
    given.logits[:, 1::2] = -9
    given.logits[:5, 1] = -1  # a sixth of an image's mass, and nearly all that class 1 has
    labels, _ = Propagation(10, prior=1.0, certainty="largest")(given)
    assert set(labels.tolist()) == {0, 2}


def test_the_largest_part_is_how_sure_it_is() -> None:
    x, truth = moons()
    given = evidence(x, truth, [0, 1], 2)
    labels, sure = Propagation(8, certainty="largest", balanced=False, iterations=200)(given)
    z = dense(given, 8, 3.0, 0.99, 0.0)
    p = z / z.sum(1, keepdims=True)
    np.testing.assert_allclose(sure, p.max(1), atol=1e-3)
    np.testing.assert_array_equal(labels, p.argmax(1))


def test_what_no_label_reaches_is_not_sure() -> None:
    x = unit(np.array([[1, 0, 0], [1, 0.1, 0], [0, 0, 1], [0, 0.1, 1], [1, 0.05, 0]]))
    given = Evidence(np.zeros((4, 2), np.float32), x[:4], x[4:], np.array([1]))
    labels, sure = Propagation(neighbors=1)(given)
    assert labels[:2].tolist() == [1, 1]
    np.testing.assert_allclose(sure, [1, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"alpha": 1.0}, "Propagation: alpha is 1.0; from 0 to below 1 is expected"),
        ({"neighbors": 0}, "Propagation: neighbors is 0; 1 or more is expected"),
        ({"prior": -1}, "Propagation: prior is -1; 0 or more is expected"),
    ],
)
def test_impossible_arguments_are_refused(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=f"^{words}$"):
        Propagation(**wrong)  # type: ignore[arg-type]
