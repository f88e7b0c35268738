"""Each method's loss equals lightly's, or a float64 transcription of its paper, values and
gradients.
"""

import math

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from torch import Tensor
from torch.nn import functional as F

from pipeline.assignments import sinkhorn, uniform_prior_loss
from pipeline.contrastive import info_nce
from pipeline.methods.barlow_twins import redundancy
from pipeline.methods.byol import regression

from .small_methods import small


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    """Equal losses and equal gradients with respect to the inputs."""
    torch.testing.assert_close(ours, theirs.squeeze(), rtol=1e-9, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("batch", "queue"), [(7, 16), (1, 3), (5, 2)])
def test_info_nce_is_lightlys_with_a_memory_bank(batch: int, queue: int) -> None:
    q, k = random(batch, 6), torch.randn(batch, 6, dtype=torch.float64)
    negatives = F.normalize(torch.randn(queue, 6, dtype=torch.float64), dim=1)
    theirs = NTXentLoss(0.2, memory_bank_size=(queue, 6))
    theirs.memory_bank.bank = negatives.clone()  # which it updates in place
    ours = info_nce(F.normalize(q, dim=1), F.normalize(k, dim=1), negatives, 0.2)
    assert_same(ours, theirs(q, k), q)


def test_large_batches_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """MoCo's and SwAV's logits by rows, the Self-Classifier's by classes: the same loss and
    gradients.
    """
    q, k = random(7, 6), torch.randn(7, 6, dtype=torch.float64)
    negatives = torch.randn(5, 6, dtype=torch.float64)
    methods, z = [small(name).double() for name in ("SelfClassifier", "SwAV")], random(3, 7, 5)
    whole = info_nce(q, k, negatives, 0.2), *(method.loss(z) for method in methods)
    monkeypatch.setattr("pipeline.contrastive.LOGITS", 3 * 5)
    monkeypatch.setattr("pipeline.assignments.LOGITS", 2 * 3 * 7)
    assert_same(info_nce(q, k, negatives, 0.2), whole[0], q)
    for method, expected in zip(methods, whole[1:], strict=True):
        used = [p for name, p in method.named_parameters() if "heads" in name or "proto" in name]
        assert_same(method.loss(z), expected, z, *used)


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_pairs_a_query_with_the_other_views_key(symmetric: bool) -> None:
    method = small("MoCo", symmetric=symmetric).double()
    rows = F.normalize(torch.randn(4 if symmetric else 2, 6, 5, dtype=torch.float64), dim=2)
    bank, nce = method.queue.entries[0], info_nce  # type: ignore[union-attr, index]
    if symmetric:
        q0, q1, k0, k1 = rows
        expected = (nce(q0, k1, bank, 0.2) + nce(q1, k0, bank, 0.2)) / 2
    else:
        expected = nce(rows[0], rows[1], bank, 0.2)
    torch.testing.assert_close(method.loss(rows), expected)


def test_symmetric_moco_never_uses_its_own_positives_as_negatives() -> None:
    """The keys of a batch join the queue after its step, both of them."""
    method = small("MoCo", symmetric=True, queue=20).double()
    rows = F.normalize(torch.randn(4, 6, 5, dtype=torch.float64), dim=2)
    before = method.queue.entries.clone()  # type: ignore[union-attr]
    method.loss(rows)
    assert torch.equal(method.queue.entries, before)  # type: ignore[union-attr]
    method.after_update(0.5)
    joined = method.queue.entries[0, :12]  # type: ignore[union-attr, index]
    torch.testing.assert_close(joined, rows[2:].flatten(0, 1))


@pytest.mark.parametrize("block", [1, 3, 1024])
@pytest.mark.parametrize(("batch", "width"), [(2, 3), (9, 4), (16, 32)])
def test_redundancy_is_lightlys(
    batch: int, width: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.methods.barlow_twins.BLOCK", block)
    z = random(2, batch, width)
    assert_same(redundancy(z, 0.0051), BarlowTwinsLoss(0.0051)(z[0], z[1]), z)


def test_redundancy_of_three_views_is_the_mean_over_pairs() -> None:
    z = random(3, 7, 5)
    pairs = [BarlowTwinsLoss(0.1)(z[i], z[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert_same(3 * redundancy(z, 0.1), sum(pairs), z)


def test_redundancy_closed_form() -> None:
    """Equal views with uncorrelated dimensions cost nothing; opposite ones 4 a dimension."""
    z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    assert redundancy(torch.stack([z, z]), 0.5).item() == pytest.approx(0, abs=1e-8)
    opposite = redundancy(torch.stack([z, -z]), 0.5).item()
    assert opposite == pytest.approx(8, rel=1e-4)  # batch norm's epsilon


def test_regression_is_lightlys_negative_cosine_symmetrized() -> None:
    p, t = random(2, 7, 5), torch.randn(2, 7, 5, dtype=torch.float64)
    theirs = NegativeCosineSimilarity()
    assert_same(regression(p, t), 4 + 2 * (theirs(p[0], t[1]) + theirs(p[1], t[0])), p)


@pytest.mark.parametrize(("crops", "queue"), [(2, 0), (4, 0), (2, 8), (5, 6)])
def test_swav_is_lightlys(crops: int, queue: int) -> None:
    """Two global views and local ones, with and without a queue."""
    method = small("SwAV", queue=queue, prototypes=7, output=5).double()
    z = random(crops, 6, 5)
    c = method.prototypes
    older = None
    if queue:
        for _ in range(2):  # until it is full
            method._newest = F.normalize(torch.randn(2, 6, 5, dtype=torch.float64), dim=2)
            method.after_update(1.0)
        older = [entries @ c.T.detach() for entries in method.queue.entries]  # type: ignore[union-attr]
    scores = [row @ c.T for row in z]
    theirs = SwaVLoss(0.1, 3, 0.05)(scores[:2], scores[2:], older)
    assert_same(method.loss(z), theirs, z, c)


def test_a_queue_that_is_not_full_does_not_count() -> None:
    torch.manual_seed(0)
    method = small("SwAV", queue=8, queue_start=0.0).double()
    without = small("SwAV", queue=0).double()
    with torch.no_grad():
        without.prototypes.copy_(method.prototypes)  # type: ignore[operator, arg-type]
    z = F.normalize(torch.randn(2, 6, 5, dtype=torch.float64), dim=2)
    torch.testing.assert_close(method.loss(z), without.loss(z))
    method.after_update(0.0)  # 6 of 8
    torch.testing.assert_close(method.loss(z), without.loss(z))
    method.after_update(0.0)
    assert not torch.isclose(method.loss(z), without.loss(z))


def test_sinkhorn_uses_every_prototype_alike() -> None:
    q = sinkhorn(torch.rand(64, 8, dtype=torch.float64), 0.05, 200, None)
    torch.testing.assert_close(q.sum(1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0, dtype=torch.float64))


@pytest.mark.parametrize("queued", [False, True])
def test_sinkhorn_holds_where_prototypes_are_far_from_all(queued: bool) -> None:
    """In float32 and at a small ε, where their scores alone would be 0 in the sum."""
    scores = torch.tensor([[1.0, -1.0, 0.9], [0.9, -0.8, -1.0], [0.0, 0.0, 0.0]])
    weights = torch.tensor([1.0, 1.0, 0.0]) if queued else None
    q = sinkhorn(scores, 0.01, 3, weights)
    assert q.isfinite().all()
    torch.testing.assert_close(q[:2].sum(1), torch.ones(2))
    assert not queued or q[2].eq(0).all()


def test_prototypes_stay_as_they_are_at_first() -> None:
    method = small("SwAV", freeze=0.5)
    views = [torch.randn(6, 3, 16, 16) for _ in range(2)]
    for progress, frozen in ((0.0, True), (0.49, True), (0.5, False)):
        method.zero_grad()
        method(views).backward()
        method.before_update(progress)
        assert (method.prototypes.grad is None) == frozen


def self_classifier_by_loops(logits: Tensor, row: float, column: float) -> float:
    """Section 3.2 of arXiv 2103.10994: for images x and classes y of two views."""
    v, n, k = logits.shape
    x = logits.tolist()

    def p_y(view: int, i: int, y: int) -> float:  # p(y | x_i), over the classes
        return math.exp(x[view][i][y] / row) / sum(math.exp(c / row) for c in x[view][i])

    def p_x(view: int, i: int, y: int) -> float:  # p(x_i | y), over the batch
        return math.exp(x[view][i][y] / column) / sum(
            math.exp(x[view][j][y] / column) for j in range(n)
        )

    terms = []
    for a in range(v):
        for b in range(v):
            if a == b or (a >= 2 and b >= 2):
                continue
            total = 0.0
            for i in range(n):
                weight = sum(p_x(a, i, y) for y in range(k))
                for y in range(k):
                    share = p_y(b, i, y) / sum(p_y(b, j, y) for j in range(n))
                    total -= p_x(a, i, y) / weight * math.log(n / k * share)
            terms.append(total / n)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("shape", [(2, 5, 3), (4, 3, 6), (2, 1, 2)])
def test_self_classifier_equals_the_papers_loops(shape: tuple[int, int, int]) -> None:
    rows, classes = random(*shape[:2], 4), random(shape[2], 4)
    got = uniform_prior_loss(rows, classes, 0.3, 0.2).item()
    logits = (rows @ classes.T).detach()
    assert got == pytest.approx(self_classifier_by_loops(logits, 0.3, 0.2), rel=1e-10, abs=1e-12)


def test_self_classifier_is_the_mean_of_its_heads() -> None:
    method, z = small("SelfClassifier").double(), random(2, 6, 5)
    rows, t = F.normalize(z, dim=2).detach(), (method.row, method.column)
    each = [self_classifier_by_loops(rows @ h.weight.T.detach(), *t) for h in method.heads]  # type: ignore[union-attr, arg-type]
    assert len(each) > 1
    assert method.loss(rows).item() == pytest.approx(sum(each) / len(each), rel=1e-9)


@pytest.mark.parametrize("norm", [True, False])
def test_self_classifiers_head_is_the_published_one(norm: bool) -> None:
    """Linear, batch norm, leaky ReLU, linear; each class vector of unit length."""
    method = small("SelfClassifier", norm=norm)
    names = [type(layer).__name__ for layer in method.projector]  # type: ignore[union-attr, arg-type]
    assert names == ["Linear", *["BatchNorm1d"] * norm, "LeakyReLU", "Linear"]
    for head in method.heads:  # type: ignore[union-attr]
        torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(len(head.weight)))


@pytest.mark.parametrize("block", [1, 2, 5])
def test_self_classifier_gradient_is_that_of_finite_differences(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.assignments.LOGITS", 3 * 4 * block)
    inputs = random(3, 4, 2), random(5, 2)
    assert torch.autograd.gradcheck(lambda *x: uniform_prior_loss(*x, 0.3, 0.2), inputs)


def test_self_classifier_prefers_classes_used_alike() -> None:
    """Images in four classes of their own cost less than all in one, whose loss is log 4."""
    classes = torch.eye(4, dtype=torch.float64)
    apart, together = classes.repeat(2, 1, 1), classes[:1].expand(2, 4, 4)
    assert uniform_prior_loss(apart, classes, 0.1, 0.05).item() < 0.01
    alike = uniform_prior_loss(together, classes, 0.1, 0.05).item()
    assert alike == pytest.approx(math.log(4))
