"""The interface, for every method file found."""

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from torch import Tensor, nn

import pipeline.methods
from pipeline.contrastive import nt_xent
from pipeline.methods.base import Method
from pipeline.methods.simclr import SimCLR

from .small_methods import small

FILES = [m.name for m in iter_modules(pipeline.methods.__path__) if m.name != "base"]


WIDER = {"moco": {"queue": 65_536, "hidden": 0, "output": 128}}
"""While a short queue fills with keys, which are nearer than random vectors, the loss grows."""


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
    method = small(found[0].__name__, Tiny(), **WIDER.get(name, {}))
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
