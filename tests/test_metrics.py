"""Metrics against scikit-learn and slow loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from pipeline import metrics
from pipeline.metrics import (
    confusion_counts,
    expected_calibration_error,
    fit_linear,
    fit_temperature,
    knn_accuracy,
    knn_predict,
    knn_scores,
    predictions,
    top_k,
)


@pytest.fixture(params=[1 << 22, 7])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one chunk, and in chunks of a row or two."""
    monkeypatch.setattr(metrics, "_CELLS", request.param)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_is_scikit_learns(rng: np.random.Generator, k: int) -> None:
    logits = rng.standard_normal((200, 9), dtype=np.float32)
    labels = rng.integers(0, 9, 200)
    expected = 100 * top_k_accuracy_score(labels, logits, k=k, labels=np.arange(9))
    assert top_k(logits, labels, [k])[k] == pytest.approx(expected)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_top_k_breaks_ties_as_arg_max_does(rng: np.random.Generator) -> None:
    logits = rng.integers(0, 3, (500, 6)).astype(np.float32)
    labels = rng.integers(0, 6, 500)
    assert top_k(logits, labels, [1])[1] == pytest.approx(100 * (logits.argmax(1) == labels).mean())
    assert top_k(np.zeros((1, 4), np.float32), np.array([2]), [2, 3]) == {2: 0, 3: 100}


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_top_k_never_counts_what_is_not_finite(value: float) -> None:
    logits = np.full((1, 4), value, np.float32)
    assert top_k(logits, np.array([0]), [1, 4, 5]) == {1: 0, 4: 0, 5: 0}


def test_top_k_of_nothing_is_nan() -> None:
    assert math.isnan(top_k(np.empty((0, 3), np.float32), np.empty(0, np.int64), [1])[1])


@pytest.mark.usefixtures("chunked")
def test_predictions_are_the_softmax(rng: np.random.Generator) -> None:
    logits = 20 * rng.standard_normal((50, 6), dtype=np.float32)
    logits[0] = [1000, 999, -1000, 0, 0, 0]  # no overflow
    p = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    labels, confidences = predictions(logits)
    np.testing.assert_array_equal(labels, p.argmax(1))
    np.testing.assert_allclose(confidences, p.max(1), rtol=1e-6)


def slow_votes(
    similarities: np.ndarray, votes: np.ndarray, classes: int, temperature: float | None
) -> np.ndarray:
    out = np.full((len(votes), classes), -np.inf)
    for i, row in enumerate(votes):
        for j, label in enumerate(row):
            weight = 1.0
            if temperature is not None:
                nearest = float(similarities[i, 0])
                weight = math.exp((float(similarities[i, j]) - nearest) / temperature)
            out[i, label] = weight + max(out[i, label], 0)
    return out


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("k", [1, 4, 20])
def test_weighted_votes_are_those_of_a_loop(rng: np.random.Generator, k: int) -> None:
    similarities = -np.sort(-rng.uniform(-1, 1, (30, k)).astype(np.float32), axis=1)
    votes = rng.integers(0, 7, (30, k))
    scores = knn_predict(similarities, votes, 7, 0.07)
    np.testing.assert_allclose(scores, slow_votes(similarities, votes, 7, 0.07), rtol=1e-5)


@pytest.mark.usefixtures("chunked")
def test_majority_votes_count_and_ties_go_to_the_nearer(rng: np.random.Generator) -> None:
    similarities = -np.sort(-rng.uniform(-1, 1, (40, 6)).astype(np.float32), axis=1)
    votes = rng.integers(0, 5, (40, 6))
    counts = slow_votes(similarities, votes, 5, None)
    scores = knn_predict(similarities, votes, 5, None)
    np.testing.assert_array_equal(np.isfinite(scores), np.isfinite(counts))
    voted = np.isfinite(counts)
    assert (np.abs(scores[voted] - counts[voted]) < 0.5).all()
    tie = knn_predict(np.array([[0.9, 0.8, 0.7, 0.1]]), np.array([[3, 1, 1, 3]]), 4, None)
    assert tie.argmax() == 1  # 1.5 against 1.0 in similarity
    assert not np.isfinite(tie[0, [0, 2]]).any()


def test_votes_of_a_tiny_temperature_do_not_overflow() -> None:
    scores = knn_predict(np.array([[1.0, 0.5]]), np.array([[2, 0]]), 3, 1e-4)
    np.testing.assert_array_equal(scores, [[0, -np.inf, 1]])


def test_one_neighbor_is_right_or_wrong_for_every_top_k(rng: np.random.Generator) -> None:
    votes, truth = rng.integers(0, 8, (100, 1)), rng.integers(0, 8, 100)
    scores = knn_scores(np.ones((100, 1), np.float32), votes, truth, 8, [1], 0.07)
    expected = 100 * float((votes[:, 0] == truth).mean())
    assert scores == {
        name: pytest.approx({1: expected, 3: expected, 5: expected})
        for name in ("knn_1_weighted", "knn_1_majority")
    }


def test_knn_accuracy_of_separate_clusters_and_of_noise(rng: np.random.Generator) -> None:
    centers = np.eye(4, 8, dtype=np.float32)
    labels = np.arange(80) % 4
    x = centers[labels] + 0.02 * rng.standard_normal((80, 8), dtype=np.float32)
    assert knn_accuracy(x[:40], labels[:40], x[40:], labels[40:], 5) == 100
    assert knn_accuracy(x[:40], (labels[:40] + 1) % 4, x[40:], labels[40:], 5) == 0


def test_the_linear_classifier_is_scikit_learns(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, 120)
    x = rng.standard_normal((120, 6)) + np.eye(4, 6)[labels]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    weight, bias = fit_linear(x.astype(np.float32), labels, 4, c=3.0)
    model = LogisticRegression(C=3.0, max_iter=5000, tol=1e-8).fit(x, labels)
    p = np.exp(x @ weight.T + bias)
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(p, model.predict_proba(x), atol=0.01)


def test_the_linear_classifier_converges_with_many_classes() -> None:
    """scikit-learn's tolerance is absolute: with 80 classes 1e-3 would stop at the first step."""
    rng = np.random.default_rng(0)
    labels = np.arange(1600) % 80
    x = rng.standard_normal((80, 32))[labels] + 0.7 * rng.standard_normal((1600, 32))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    weight, bias = fit_linear(x[:800], labels[:800], 80)
    model = LogisticRegression(C=10, max_iter=5000, tol=1e-9).fit(x[:800], labels[:800])
    _, confidences = predictions(x[800:] @ weight.T + bias)
    expected = model.predict_proba(x[800:]).max(1)
    assert expected.mean() > 0.5
    np.testing.assert_allclose(confidences, expected, atol=0.01)


@pytest.mark.parametrize("seen", [[3], [1, 4], [0, 2, 4]])
def test_classes_without_an_example_are_never_predicted(
    rng: np.random.Generator, seen: list[int]
) -> None:
    labels = np.array(seen)[rng.integers(0, len(seen), 90)]
    x = (np.eye(5, 5)[labels] + 0.3 * rng.standard_normal((90, 5))).astype(np.float32)
    weight, bias = fit_linear(x, labels, 5)
    assert weight.shape == (5, 5)
    assert weight.dtype == bias.dtype == np.float32
    predicted = (x @ weight.T + bias).argmax(1)
    assert set(predicted.tolist()) <= set(seen)
    assert (predicted == labels).mean() > 0.9
    if len(seen) == 2:
        model = LogisticRegression(C=10.0, tol=1e-6).fit(x, labels)
        _, confidences = predictions(x @ weight.T + bias)
        np.testing.assert_allclose(confidences, model.predict_proba(x).max(1), atol=0.01)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(2, 5), st.integers(0, 99))
def test_confusion_counts_are_scikit_learns(n: int, classes: int, seed: int) -> None:
    labels, predicted = np.random.default_rng(seed).integers(0, classes, (2, n))
    counts = confusion_counts(labels, predicted, classes)
    assert counts.sum() == n
    if n:
        expected = confusion_matrix(labels, predicted, labels=range(classes))
        np.testing.assert_array_equal(counts, expected)


def test_the_calibration_error_by_hand() -> None:
    confidences = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], np.float32)
    correct = np.array([True, True, True, False, True, False])
    expected = (4 * abs(0.75 - 0.95) + 2 * abs(0.5 - 0.55)) / 6
    assert expected_calibration_error(confidences, correct, 10) == pytest.approx(
        100 * expected, 1e-4
    )
    perfect = np.ones(5, np.float32)
    assert expected_calibration_error(perfect, perfect.astype(bool)) == 0


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_calibrates(scale: float) -> None:
    """Labels drawn from the softmax of logits: what they were multiplied by is found again."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((4000, 5)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) < rng.random((4000, 1))).sum(1)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale, rel=0.06)


def test_a_few_right_images_do_not_make_all_sure() -> None:
    logits = 3 * np.eye(4, dtype=np.float32)
    divided = logits / fit_temperature(logits, np.arange(4))
    sure = np.exp(divided[0, 0]) / np.exp(divided[0]).sum()
    assert 0.75 < sure < 0.95


def test_weights_count_rows_as_often() -> None:
    """Whole weights are as repeated rows; 0 leaves a row out."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 6), dtype=np.float32)
    labels, times = rng.integers(0, 3, 60), rng.integers(0, 4, 60)
    found = fit_linear(x, labels, 3, c=1.0, weights=times.astype(np.float32))
    expected = fit_linear(x.repeat(times, 0), labels.repeat(times), 3, c=1.0)
    plain = fit_linear(x, labels, 3, c=1.0)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
    assert np.abs(found[0] - plain[0]).max() > 0.05
