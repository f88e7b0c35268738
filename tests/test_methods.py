"""Each method's loss against a slow transcription of its paper; the interface for every file
found.
"""

import math
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from torch import Tensor, nn

import pipeline.methods
from pipeline.methods.base import Method
from pipeline.methods.simclr import SimCLR, nt_xent

FILES = [m.name for m in iter_modules(pipeline.methods.__path__) if m.name != "base"]


def nt_xent_by_loops(projections: Tensor, temperature: float) -> float:
    """Equation 1 of arXiv 2002.05709 and the sum of algorithm 1, term by term."""
    z = [projections[v, k].tolist() for k in range(projections.shape[1]) for v in range(2)]

    def similarity(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(z[i], z[j], strict=True))
        return dot / math.sqrt(sum(a * a for a in z[i])) / math.sqrt(sum(b * b for b in z[j]))

    def term(i: int, j: int) -> float:
        others = (k for k in range(len(z)) if k != i)
        below = sum(math.exp(similarity(i, k) / temperature) for k in others)
        return -math.log(math.exp(similarity(i, j) / temperature) / below)

    n = len(z) // 2
    return sum(term(2 * k, 2 * k + 1) + term(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


@pytest.mark.parametrize(
    ("batch", "dimension", "temperature"), [(1, 3, 0.5), (2, 2, 1), (7, 5, 0.1)]
)
def test_nt_xent_equals_the_papers_loops(batch: int, dimension: int, temperature: float) -> None:
    z = torch.randn(2, batch, dimension, dtype=torch.float64)
    got = nt_xent(z, temperature)
    assert got.item() == pytest.approx(nt_xent_by_loops(z, temperature), rel=1e-12, abs=1e-12)


def test_nt_xent_gradient_is_that_of_finite_differences() -> None:
    z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, 0.3), z)


def test_nt_xent_closed_forms() -> None:
    same = torch.ones(2, 8, 4, dtype=torch.float64)  # all alike: every other view is as near
    assert nt_xent(same, 0.5).item() == pytest.approx(math.log(15))
    apart = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)  # positives alike, negatives at 90°
    expected = math.log(1 + 14 * math.exp(-2))
    assert nt_xent(apart, 0.5).item() == pytest.approx(expected)
    assert nt_xent(5 * apart, 0.5).item() == pytest.approx(expected)  # length does not count


def test_nt_xent_of_many_views_is_the_mean_over_positives() -> None:
    z = torch.randn(3, 5, 4, dtype=torch.float64)
    unit = nn.functional.normalize(z.flatten(0, 1), dim=1)
    logits = (unit @ unit.T / 0.2).fill_diagonal_(-torch.inf)
    log_p = logits.log_softmax(1)
    terms = [-log_p[i, j] for i in range(15) for j in range(15) if i != j and i % 5 == j % 5]
    assert nt_xent(z, 0.2).item() == pytest.approx(torch.stack(terms).mean().item())


class Tiny(nn.Module):
    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FILES)
def test_every_method_file_learns_through_the_one_interface(name: str) -> None:
    module = import_module(f"pipeline.methods.{name}")
    found = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Method) and v is not Method
    ]
    assert len(found) == 1, f"pipeline/methods/{name}.py: one subclass of Method is expected"
    method = found[0](Tiny())
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    fixed = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    losses = []
    for step in range(30):
        views = [v + 0.1 * torch.randn_like(v) for v in fixed]
        loss = method(views)
        assert loss.ndim == 0
        optimizer.zero_grad()
        loss.backward()
        method.before_update(step / 30)
        optimizer.step()
        method.after_update(step / 30)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in method.encoder.parameters())


def test_projections_of_views_of_two_sizes_are_those_of_each_alone() -> None:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6))
    pool.num_features = 6  # type: ignore[assignment]
    method = SimCLR(pool).eval()
    views = [torch.randn(4, 3, 8, 8), torch.randn(4, 3, 12, 12)]
    z = method.project(views)
    assert z.shape == (2, 4, 128)
    torch.testing.assert_close(z[1], method.projector(pool(views[1])))


def test_the_loss_is_not_rounded_to_bf16() -> None:
    """Under autocast the projections are, but not the similarities and their softmax."""

    class Projected(Method):
        def project(self, views: list[Tensor]) -> Tensor:
            return torch.stack(views)

        def loss(self, projections: Tensor) -> Tensor:
            return nt_xent(projections, 0.1)

    torch.manual_seed(0)
    x = torch.randn(256, 32)
    views = [(x + 0.3 * torch.randn_like(x)).bfloat16() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = Projected()(views)
    assert loss.dtype == torch.float32
    exact = nt_xent(torch.stack(views).double(), 0.1)
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
