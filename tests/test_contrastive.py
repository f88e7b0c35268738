"""NT-Xent and DCL against slow transcriptions, closed forms and lightly; blocks against the whole
matrix.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import DCLLoss, NTXentLoss
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import InputError, contrastive
from pipeline.contrastive import nt_xent

BLOCKS = [0, 3]
"""The whole matrix, and blocks of three rows, the last of them shorter at most sizes."""


def by_loops(
    projections: Tensor, temperature: float, cosine: bool = True, decoupled: bool = False
) -> float:
    """Equation 1 of arXiv 2002.05709, or 6 of 2110.06848, of two views, term by term."""
    z = projections.tolist()
    views = [(v, k) for v in range(2) for k in range(projections.shape[1])]

    def similarity(i: tuple[int, int], j: tuple[int, int]) -> float:
        a, b = z[i[0]][i[1]], z[j[0]][j[1]]
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.hypot(*a) / math.hypot(*b) if cosine else dot

    def term(i: tuple[int, int]) -> float:
        v, k = i
        others = [j for j in views if (j[1] != k if decoupled else j != i)]
        below = sum(math.exp(similarity(i, j) / temperature) for j in others)
        return math.log(below) - similarity(i, (1 - v, k)) / temperature

    return sum(map(term, views)) / len(views)


def value_and_gradient(projections: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Tensor]:
    x = projections.detach().clone().requires_grad_()
    loss = nt_xent(x, *options, **named)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    ("batch", "dimension", "temperature"), [(1, 3, 0.5), (2, 2, 1), (7, 5, 0.1)]
)
def test_nt_xent_equals_the_papers_loops(
    batch: int, dimension: int, temperature: float, cosine: bool, decoupled: bool, block: int
) -> None:
    z = torch.randn(2, batch + decoupled, dimension, dtype=torch.float64)  # DCL needs two images
    got = nt_xent(z, temperature, cosine, decoupled, block)
    expected = by_loops(z, temperature, cosine, decoupled)
    assert got.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_nt_xent_gradient_is_that_of_finite_differences(
    cosine: bool, decoupled: bool, block: int
) -> None:
    z = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: 2 * nt_xent(x, 0.3, cosine, decoupled, block), z)


@pytest.mark.parametrize("block", BLOCKS)
def test_nt_xent_closed_forms(block: int) -> None:
    same = torch.ones(2, 8, 4, dtype=torch.float64)  # all alike: every other view is as near
    assert nt_xent(same, 0.5, block=block).item() == pytest.approx(math.log(15))
    assert nt_xent(same, 0.5, decoupled=True, block=block).item() == pytest.approx(math.log(14))
    apart = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)  # positives alike, negatives at 90°
    expected = math.log(1 + 14 * math.exp(-2))
    assert nt_xent(apart, 0.5, block=block).item() == pytest.approx(expected)
    assert nt_xent(5 * apart, 0.5, block=block).item() == pytest.approx(expected)  # any length
    expected = math.log(14) - 2
    got = nt_xent(apart, 0.5, decoupled=True, block=block)
    assert got.item() == pytest.approx(expected)
    expected = math.log(14) - 50  # the dot product of length 5: 25
    got = nt_xent(5 * apart, 0.5, cosine=False, decoupled=True, block=block)
    assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_nt_xent_of_many_views_is_the_mean_over_positives(block: int) -> None:
    z = torch.randn(3, 5, 4, dtype=torch.float64)
    unit = F.normalize(z.flatten(0, 1), dim=1)
    logits = unit @ unit.T / 0.2
    own = torch.arange(15) % 5 == (torch.arange(15) % 5)[:, None]
    itself = torch.eye(15, dtype=torch.bool)
    for decoupled, left_out in ((False, itself), (True, own)):
        below = logits.masked_fill(left_out, -torch.inf).logsumexp(1, keepdim=True)
        expected = (below - logits)[own & ~itself].mean().item()
        got = nt_xent(z, 0.2, decoupled=decoupled, block=block).item()
        assert got == pytest.approx(expected, rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    v=st.integers(2, 4),
    b=st.integers(1, 13),
    d=st.integers(1, 9),
    block=st.integers(1, 60),
    cosine=st.booleans(),
    decoupled=st.booleans(),
    temperature=st.sampled_from([0.05, 0.5, 2.0]),
    seed=st.integers(0, 99),
)
def test_blocks_equal_the_whole_matrix(
    v: int,
    b: int,
    d: int,
    block: int,
    cosine: bool,
    decoupled: bool,
    temperature: float,
    seed: int,
) -> None:
    z = torch.randn(v, b + decoupled, d, dtype=torch.float64, generator=torch.manual_seed(seed))
    options = (temperature, cosine, decoupled)
    loss, gradient = value_and_gradient(z, *options, block)
    expected, expected_gradient = value_and_gradient(z, *options, 0)
    # Both are differences that may cancel (one image: 0): the rounding is that of their parts.
    length = z.norm(dim=2)
    part = (1.0 if cosine else length.max().item() ** 2) / temperature
    assert (loss - expected).abs() <= 1e-12 * max(part, expected.abs().item())
    slope = (1 / length.min() if cosine else length.max()).item() / temperature / (v * len(z[0]))
    largest = max(slope, expected_gradient.abs().max().item())
    assert (gradient - expected_gradient).abs().max() <= 1e-12 * largest


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_blocks_equal_the_whole_matrix_in_float32(cosine: bool, decoupled: bool) -> None:
    z = torch.randn(2, 400, 64)
    z = z if cosine else F.normalize(z, dim=2) * 2
    loss, gradient = value_and_gradient(z, 0.2, cosine, decoupled, 96)
    expected, expected_gradient = value_and_gradient(z, 0.2, cosine, decoupled, 0)
    assert loss.dtype == gradient.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    largest = expected_gradient.abs().max()
    assert (gradient - expected_gradient).abs().max() <= 1e-6 * largest


@pytest.mark.parametrize("block", BLOCKS)
def test_exponentials_neither_overflow_nor_vanish(block: int) -> None:
    """Logits near 200, and of one image near -200: float32 has an exponential of neither."""
    z = torch.tensor([1.0, 0, 0]) + 0.1 * torch.randn(2, 6, 3)
    z[:, 0] *= -1
    loss, gradient = value_and_gradient(z, 0.005, decoupled=True, block=block)
    exact, exact_gradient = value_and_gradient(z.double(), 0.005, decoupled=True, block=0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    error = (gradient - exact_gradient).abs().max()
    assert error <= 1e-4 * exact_gradient.abs().max()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("peer", "decoupled"), [(NTXentLoss, False), (DCLLoss, True)])
def test_value_and_gradient_are_lightlys(peer: Any, decoupled: bool, block: int) -> None:
    z = torch.randn(2, 33, 16, dtype=torch.float64, requires_grad=True)
    expected = peer(temperature=0.2)(*z)
    (expected_gradient,) = torch.autograd.grad(expected, z)
    loss, gradient = value_and_gradient(z, 0.2, decoupled=decoupled, block=block)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-14)


class Largest(TorchDispatchMode):
    """The most elements that any operation's result has, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        self.products += "mm" in func.__name__
        return result


@pytest.mark.parametrize("decoupled", [False, True])
def test_blocks_never_allocate_the_whole_matrix(decoupled: bool) -> None:
    z = torch.randn(2, 100, 8, requires_grad=True)
    with Largest() as seen:
        nt_xent(z, 0.5, decoupled=decoupled, block=16).backward()
    assert seen.elements == 16 * 200
    with Largest() as seen:
        nt_xent(z, 0.5, decoupled=decoupled, block=0).backward()
    assert seen.elements == 200 * 200  # what is looked for is seen where it is


def test_no_gradient_costs_no_products() -> None:
    z = torch.randn(2, 100, 8)
    counts = []
    for x in (z, z.clone().requires_grad_()):
        with Largest() as seen:
            nt_xent(x, 0.5, block=100)
        counts.append(seen.products)
    assert counts == [2, 6]


def test_many_rows_are_taken_by_blocks_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "PLAIN_ROWS", 20)
    monkeypatch.setattr(contrastive, "BLOCK", 8)
    for batch, expected in ((10, 20 * 20), (11, 8 * 22)):
        z = torch.randn(2, batch, 4, requires_grad=True)
        with Largest() as seen:
            nt_xent(z, 0.5).backward()
        assert seen.elements == expected


def test_what_cannot_be_contrasted_is_refused() -> None:
    with pytest.raises(InputError, match="no negatives"):
        nt_xent(torch.randn(2, 1, 4), 0.5, decoupled=True)
    with pytest.raises(InputError, match="no positive"):
        nt_xent(torch.randn(1, 5, 4), 0.5)
    with pytest.raises(InputError, match="-1 rows"):
        nt_xent(torch.randn(2, 5, 4), 0.5, block=-1)
