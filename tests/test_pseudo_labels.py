"""Pseudo-labels: what holds for every rule, and what each is for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import InputError
from pipeline.pseudo_labels import PseudoLabeler, Threshold, TopFraction, apply, summary

LABELERS = PseudoLabeler.__subclasses__()


def logits_of(n: int, classes: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((n, classes))).round(1).astype(np.float32)  # some ties


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("kind", LABELERS)
@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 60), classes=st.integers(2, 8), seed=st.integers(0, 999))
def test_every_rule_gives_sorted_rows_their_most_probable_class(
    kind: type[PseudoLabeler], n: int, classes: int, seed: int
) -> None:
    logits = logits_of(n, classes, seed)
    rows, labels, confidences = kind()(logits)
    assert len(rows) == len(labels) == len(confidences) <= n
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(labels, logits[rows].argmax(1))
    np.testing.assert_allclose(confidences, softmax(logits[rows]).max(1), rtol=1e-5)


@pytest.mark.parametrize("kind", LABELERS)
def test_every_rule_prefers_the_surer_image_of_a_class(kind: type[PseudoLabeler]) -> None:
    logits = logits_of(300)
    rows, labels, confidences = kind()(logits)
    assert 0 < len(rows) < 300
    rest = np.setdiff1d(np.arange(300), rows)
    p = softmax(logits[rest])
    for k in np.unique(labels):
        of = p.argmax(1) == k
        assert p.max(1)[of].max() <= confidences[labels == k].min() + 1e-6


@pytest.mark.parametrize("bar", [0.0, 0.5, 0.9, 1.0])
def test_threshold_takes_what_reaches_it(bar: float) -> None:
    logits = logits_of(200)
    logits[7] = [100, 0, 0, 0, 0]
    rows, _, _ = Threshold(bar)(logits)
    np.testing.assert_array_equal(rows, np.flatnonzero(softmax(logits).max(1) >= bar - 1e-12))


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.1, [1, 2, 1]), (0.29, [3, 4, 1]), (1, [10, 11, 3])]
)
def test_top_fraction_is_of_each_class_and_rounded_up(fraction: float, expected: list[int]) -> None:
    predicted = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [10, 11, 3]))
    logits = (
        np.eye(4, dtype=np.float32)[predicted] * np.linspace(1, 5, 24, dtype=np.float32)[:, None]
    )
    rows, labels, _ = TopFraction(fraction)(logits)
    np.testing.assert_array_equal(np.bincount(labels, minlength=4), [*expected[:2], 0, expected[2]])
    for k, count in zip([0, 1, 3], expected, strict=True):  # later rows are surer here
        np.testing.assert_array_equal(rows[labels == k], np.flatnonzero(predicted == k)[-count:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(1.5), "Threshold: confidence is 1.5; from 0 to 1 is expected"),
        (lambda: TopFraction(0), "TopFraction: fraction is 0; above 0 to 1 is expected"),
        (lambda: TopFraction(1.1), "TopFraction: fraction is 1.1; above 0 to 1 is expected"),
    ],
)
def test_an_impossible_rule_is_refused(make, message: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == message


def test_the_rule_is_audited_where_the_truth_is_known() -> None:
    """Of three images apart two are sure enough, and one of them is right."""
    sure, unsure = [9.0, 0.0], [0.2, 0.0]
    logits = np.array([sure, unsure, unsure], np.float32)
    apart = np.array([sure, unsure, sure], np.float32)
    rows, labels, confidences, right = apply(Threshold(0.9), logits, apart, np.array([0, 0, 1]))
    np.testing.assert_array_equal(rows, [0])
    np.testing.assert_array_equal(labels, [0])
    assert confidences[0] > 0.99
    np.testing.assert_array_equal(right, [True, False])


def test_images_apart_do_not_change_the_labels() -> None:
    logits, apart = logits_of(100), logits_of(40, seed=1)
    rows, labels, _, _ = apply(TopFraction(0.2), logits, apart, np.zeros(40, np.int64))
    alone = TopFraction(0.2)(logits)
    np.testing.assert_array_equal(rows, alone[0])
    np.testing.assert_array_equal(labels, alone[1])


def test_the_audit_predicts_the_true_precision() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 6000)
    logits = rng.standard_normal((6000, 5)).astype(np.float32) + 1.2 * np.eye(5)[truth]
    rows, labels, _, right = apply(TopFraction(0.3), logits[:4000], logits[4000:], truth[4000:])
    true = 100 * (labels == truth[:4000][rows]).mean()
    found = summary(logits[:4000].argmax(1), labels, right, 5)
    assert abs(found["precision"] - true) < 3 * found["precision_error"]
    assert found["coverage"] == pytest.approx(30, abs=0.1)
    assert sum(found["labeled_per_class"]) == found["labeled"] == len(rows)
    assert sum(found["predicted_per_class"]) == found["eligible"] == 4000


def test_a_few_right_images_are_no_certainty() -> None:
    found = summary(np.zeros(9, np.int64), np.zeros(9, np.int64), np.ones(8, np.bool_), 1)
    assert found["precision"] == 100
    assert found["precision_error"] == pytest.approx(100 * (10 / 12 * 2 / 12 / 12) ** 0.5)


def test_a_precision_without_images_is_unknown() -> None:
    found = summary(np.array([0, 1]), np.array([1]), np.empty(0, np.bool_), 3)
    assert found["precision"] is None
    assert found["labeled_per_class"] == [0, 1, 0]
