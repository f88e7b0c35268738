"""FixMatch and FreeMatch: their equations, written out, and training on unlabeled images."""

import copy
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import InputError
from pipeline.classifiers import Classifier, Supervised
from pipeline.consistency import FixMatch, FreeMatch, SemiSupervised

PRIOR = torch.tensor([0.5, 0.2, 0.2, 0.1])


T = TypeVar("T", FixMatch, FreeMatch)


def begun(consistency: T) -> T:
    consistency.begin(PRIOR)
    return consistency


def logits(n: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(n, 4), torch.randn(n, 4, requires_grad=True)


def test_fixmatch_learns_where_the_weak_view_is_sure() -> None:
    weak, strong = logits()
    sure, label = weak.softmax(1).max(1)
    expected = torch.stack(
        [
            F.cross_entropy(s, k) if p >= 0.8 else s.sum() * 0
            for s, k, p in zip(strong, label, sure, strict=True)
        ]
    )
    method = begun(FixMatch(0.8, aligned=False, weight=2.0))
    loss = method(weak, strong)
    torch.testing.assert_close(loss, 2 * expected.mean())
    torch.testing.assert_close(method.used, (sure >= 0.8).float().mean())
    assert 0 < method.used < 1
    (grad,) = torch.autograd.grad(loss, strong)
    assert ((grad.abs().sum(1) > 0) == (sure >= 0.8)).all()


def test_no_gradient_reaches_the_weak_view() -> None:
    for method in (begun(FixMatch(0.5)), begun(FreeMatch())):
        weak, strong = logits()
        weak.requires_grad_()
        assert torch.autograd.grad(method(weak, strong), weak, allow_unused=True) == (None,)


def test_alignment_favors_what_the_labels_have_more_of() -> None:
    """A classifier that only says class 3, which is rare among the labels, is held back."""
    weak = torch.tensor([[0.0, 0, 0, 1.2]]).expand(40, 4)
    method = begun(FixMatch(0.0, momentum=0.0))
    method(weak, torch.zeros(40, 4))
    p = weak[0].softmax(0)
    torch.testing.assert_close(method.model, p)
    strong = torch.randn(40, 4)
    found = method(weak, strong)  # p · prior / model is the prior: class 0
    torch.testing.assert_close(found, F.cross_entropy(strong, torch.zeros(40, dtype=torch.long)))


def test_freematch_is_aligned_where_it_is_asked_for() -> None:
    weak = torch.tensor([[0.0, 0, 0, 1.2]]).expand(40, 4)
    bare, method = begun(FreeMatch()), begun(FreeMatch(aligned=True, momentum=0.0))
    torch.testing.assert_close(bare.probabilities(weak), weak.softmax(1))
    method(weak, torch.zeros(40, 4))
    torch.testing.assert_close(method.mean, PRIOR)  # of what is taken for the truth
    torch.testing.assert_close(method.histogram, torch.tensor([1.0, 0, 0, 0]))


def test_freematch_equals_the_papers_equations() -> None:
    method = begun(FreeMatch(weight=1.5, fairness=0.1, momentum=0.9))
    level, model, histogram = 0.25, np.full(4, 0.25), np.full(4, 0.25)
    for step in range(4):
        torch.manual_seed(step)
        weak, strong = 3 * torch.randn(12, 4), 2 * torch.randn(12, 4)
        loss = method(weak, strong)
        q, s = weak.softmax(1).double().numpy(), strong.softmax(1).double().numpy()
        level = 0.9 * level + 0.1 * q.max(1).mean()  # equation 5
        model = 0.9 * model + 0.1 * q.mean(0)  # equation 6
        histogram = 0.9 * histogram + 0.1 * np.bincount(q.argmax(1), minlength=4) / 12  # 10
        bars = model / model.max() * level  # equation 7
        taken = q.max(1) >= bars[q.argmax(1)]
        unsupervised = -np.log(s[np.arange(12), q.argmax(1)])[taken].sum() / 12  # equation 8
        mean, own = s[taken].mean(0), np.bincount(s[taken].argmax(1), minlength=4) / taken.sum()
        a = model / histogram
        b = np.divide(mean, own, out=np.zeros(4), where=own > 0)  # equation 9
        fair = (a / a.sum() * np.log(b / b.sum() + 1e-12)).sum()  # equation 11: -H
        assert loss.item() == pytest.approx(1.5 * unsupervised + 0.1 * fair, rel=1e-4)
        assert method.used.item() == pytest.approx(taken.mean())


def test_freematch_with_nothing_sure_is_finite() -> None:
    method = begun(FreeMatch(momentum=1.0))
    method.level.fill_(1.0)
    weak, strong = torch.zeros(5, 4), torch.randn(5, 4, requires_grad=True)
    loss = method(weak, strong)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(strong.grad).all()  # type: ignore[arg-type]


def test_both_losses_are_added() -> None:
    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    torch.manual_seed(0)
    classifier = Classifier(Mean(), nn.Linear(3, 4))
    images, views = torch.rand(3, 3, 2, 2), [torch.rand(6, 3, 2, 2) for _ in range(2)]
    labels, weights = torch.tensor([0, 3, 1]), torch.tensor([1, 0.5, 1])
    alone = Supervised(classifier, 4, label_smoothing=0.1)(images, labels, weights)
    module = SemiSupervised(classifier, 4, begun(FixMatch(0.1)), label_smoothing=0.1)
    weak, strong = (classifier(view) for view in views)
    expected = alone + begun(FixMatch(0.1))(weak, strong)
    torch.testing.assert_close(module(images, labels, weights, views), expected)
    assert module.signs()["used"] == 100


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_averaged_classifier_guesses_where_there_is_one(ema: float) -> None:
    """In evaluation mode, so that weak views leave no trace in batch norms; without a graph."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    module = SemiSupervised(
        Classifier(encoder, nn.Linear(3, 4)), 4, begun(FixMatch(0.0, aligned=False)), ema=ema
    ).train()
    teacher, student = module.final(), module.classifier
    with torch.no_grad():
        teacher.head.bias.copy_(torch.tensor([0.0, 0, 9, 0]))  # it is sure of class 2
    images, views = torch.rand(3, 3, 2, 2), [torch.rand(6, 3, 2, 2) for _ in range(2)]
    labels, before = torch.tensor([0, 3, 1]), copy.deepcopy(student)
    loss = module(images, labels, torch.ones(3), views)
    logits = before(torch.cat([images, views[1]]))
    expected = F.cross_entropy(logits[:3], labels) + F.cross_entropy(
        logits[3:], torch.full((6,), 2)
    )
    torch.testing.assert_close(loss, expected)
    assert student.encoder[2].num_batches_tracked == (1 if ema else 2)  # type: ignore[index]
    assert teacher.encoder[2].num_batches_tracked == (0 if ema else 2)  # type: ignore[index]
    loss.backward()  # type: ignore[no-untyped-call]
    assert (teacher.head.weight.grad is None) == (ema > 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FixMatch(threshold=1.5), "FixMatch: threshold is 1.5; from 0 to 1 is expected"),
        (lambda: FixMatch(ratio=0), "FixMatch: ratio is 0; 1 or more is expected"),
        (lambda: FreeMatch(momentum=2), "FreeMatch: momentum is 2; from 0 to 1 is expected"),
        (lambda: FreeMatch(weight=-1), "FreeMatch: weight is -1; 0 or more is expected"),
    ],
)
def test_impossible_arguments_are_refused(make, words: str) -> None:
    with pytest.raises(InputError, match=f"^{words}$"):
        make()
