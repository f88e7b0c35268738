"""Pseudo-labels: what holds for every rule, and what each is for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import InputError
from pipeline.metrics import predictions
from pipeline.pseudo_labels import (
    Evidence,
    PseudoLabeler,
    Softmax,
    Threshold,
    TopFraction,
    apply,
    summary,
)

LABELERS = PseudoLabeler.__subclasses__()


def logits_of(n: int, classes: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((n, classes))).round(1).astype(np.float32)  # some ties


def evidence(logits: np.ndarray) -> Evidence:
    none = np.empty((0, 0), np.float32)
    return Evidence(logits, none, none, np.empty(0, np.int64))


def predicted(*shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return predictions(logits_of(*shape, seed=seed))


@pytest.mark.parametrize("kind", LABELERS)
@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 60), classes=st.integers(2, 8), seed=st.integers(0, 999))
def test_every_rule_gives_sorted_rows(
    kind: type[PseudoLabeler], n: int, classes: int, seed: int
) -> None:
    rows = kind()(*predicted(n, classes, seed=seed))
    assert len(rows) <= n
    assert (np.diff(rows) > 0).all()


RULES = [
    Threshold(),
    Threshold(0.9, flexible=True),
    TopFraction(),
    TopFraction(0.3),
    TopFraction(0.3, balanced=True),
]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_prefers_the_surer_image_of_a_class(rule: PseudoLabeler) -> None:
    labels, confidences = predicted(300)
    rows = rule(labels, confidences)
    assert 0 < len(rows) < 300
    rest = np.setdiff1d(np.arange(300), rows)
    for k in np.unique(labels[rows]):
        worst = confidences[rows][labels[rows] == k].min()
        assert confidences[rest][labels[rest] == k].max(initial=0) <= worst


@pytest.mark.parametrize("bar", [0.0, 0.5, 0.9, 1.0])
def test_threshold_takes_what_reaches_it(bar: float) -> None:
    labels, confidences = predicted(200)
    confidences[7] = 1
    rows = Threshold(bar)(labels, confidences)
    np.testing.assert_array_equal(rows, np.flatnonzero(confidences >= bar))


def test_a_flexible_threshold_is_lower_for_classes_that_rarely_reach_it() -> None:
    """Of class 0 all 10 reach 0.9, of class 1 5 and of class 2 none."""
    labels = np.repeat([0, 1, 2], 10)
    confidences = np.concatenate(
        [np.full(10, 0.95), np.full(5, 0.95), np.linspace(0.2, 0.6, 5), np.full(10, 0.1)]
    )
    rows = Threshold(0.9, flexible=True)(labels, confidences.astype(np.float32))
    for k, share in ((0, 1.0), (1, 0.5), (2, 0.0)):
        bar = 0.9 * max(share / (2 - share), 0.5)
        expected = np.flatnonzero((labels == k) & (confidences >= bar))
        np.testing.assert_array_equal(rows[labels[rows] == k], expected)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.1, [1, 2, 1]), (0.29, [3, 4, 1]), (1, [10, 11, 3])]
)
def test_top_fraction_is_of_each_class_and_rounded_up(fraction: float, expected: list[int]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [10, 11, 3]))
    rows = TopFraction(fraction)(labels, np.linspace(0, 1, 24, dtype=np.float32))
    for k, count in zip([0, 1, 3], expected, strict=True):  # later rows are surer here
        np.testing.assert_array_equal(rows[labels[rows] == k], np.flatnonzero(labels == k)[-count:])


def test_a_balanced_top_fraction_takes_as_many_of_each_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [60, 27, 3]))
    rows = TopFraction(0.5, balanced=True)(labels, np.linspace(0, 1, 90, dtype=np.float32))
    np.testing.assert_array_equal(
        np.bincount(labels[rows]), [15, 15, 0, 3]
    )  # half of 30, as far as


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(1.5), "Threshold: confidence is 1.5; from 0 to 1 is expected"),
        (lambda: TopFraction(0), "TopFraction: fraction is 0; above 0, up to 1 is expected"),
        (lambda: TopFraction(1.1), "TopFraction: fraction is 1.1; above 0, up to 1 is expected"),
    ],
)
def test_an_impossible_rule_is_refused(make, message: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == message


def test_the_rule_is_audited_where_the_truth_is_known() -> None:
    """Of three images apart two are sure enough, and one of them is right."""
    sure, unsure = [9.0, 0.0], [0.2, 0.0]
    logits = np.array([sure, unsure, unsure, sure, unsure, sure], np.float32)
    given = apply(Softmax(), Threshold(0.9), evidence(logits), np.array([0, 0, 1]))
    rows, labels, confidences, every, right = given
    np.testing.assert_array_equal(rows, [0])
    np.testing.assert_array_equal(labels, [0])
    assert confidences[0] > 0.99
    np.testing.assert_array_equal(every, [0, 0, 0])
    np.testing.assert_array_equal(right, [True, False])


class Unsure(Softmax):
    """Says class 0, without being sure at all, of every other image."""

    def __call__(self, evidence: Evidence) -> tuple[Any, Any]:
        labels, confidences = super().__call__(evidence)
        return np.where(np.arange(len(labels)) % 2, 0, labels), np.where(
            np.arange(len(labels)) % 2, 0, confidences
        )


@pytest.mark.parametrize("rule", [TopFraction(1.0), Threshold(0.0)])
def test_what_nobody_can_tell_gets_no_label(rule: PseudoLabeler) -> None:
    logits = logits_of(30)
    given = apply(Unsure(), rule, evidence(logits), np.zeros(10, np.int64))
    np.testing.assert_array_equal(given[0], np.arange(0, 20, 2))
    assert len(given[4]) == 5
    found = summary(given[3], given[1], given[4], 5)
    assert (given[3][1::2] == -1).all()
    assert (sum(found["predicted_per_class"]), found["eligible"]) == (10, 20)


def test_images_apart_do_not_change_the_labels() -> None:
    logits, apart = logits_of(100), logits_of(40, seed=1)
    both = evidence(np.concatenate([logits, apart]))
    rows, labels, *_ = apply(Softmax(), TopFraction(0.2), both, np.zeros(40, np.int64))
    alone = apply(Softmax(), TopFraction(0.2), evidence(logits), np.empty(0, np.int64))
    np.testing.assert_array_equal(rows, alone[0])
    np.testing.assert_array_equal(labels, alone[1])


def test_the_audit_predicts_the_true_precision() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 6000)
    logits = (rng.standard_normal((6000, 5)) + 1.2 * np.eye(5)[truth]).astype(np.float32)
    given = apply(Softmax(), TopFraction(0.3), evidence(logits), truth[4000:])
    rows, labels, _, every, right = given
    true = 100 * (labels == truth[:4000][rows]).mean()
    found = summary(every, labels, right, 5)
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
