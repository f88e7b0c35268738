"""LARS against a transcription of its paper, parameter groups, the schedule."""

import math

import pytest
import torch
from torch import nn

from pipeline import InputError
from pipeline.optim import LARS, Optimizer, build_optimizer, parameter_groups, schedule, set_lr


def test_lars_equals_algorithm_1() -> None:
    """arXiv 1708.03888: v ← m v + lr · λ · (∇ + β w), λ = η |w| / |∇ + β w|; here with decay in
    ∇.
    """
    model = nn.Linear(4, 3).double()
    groups = parameter_groups({model: 1.0}, weight_decay=0.1)
    optimizer = LARS(groups, lr=0.5, momentum=0.9, trust=0.02)
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    for _ in range(4):
        loss = model(torch.randn(5, 4, dtype=torch.float64)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        gw, gb = model.weight.grad.clone(), model.bias.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        g = gw + 0.1 * w
        vw = 0.9 * vw + 0.02 * w.norm() / g.norm() * g
        vb = 0.9 * vb + gb  # biases: no decay, no adaptation
        w, b = w - 0.5 * vw, b - 0.5 * vb
        torch.testing.assert_close(model.weight.detach(), w, rtol=1e-12, atol=0)
        torch.testing.assert_close(model.bias.detach(), b, rtol=1e-12, atol=0)


def test_biases_and_norms_are_without_decay_and_every_parameter_comes_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    groups = parameter_groups({model[:2]: 0.1, model[3]: 1.0}, 0.5)
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.5) for p in group["params"])
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    model[0].weight.requires_grad_(False)
    found = [id(p) for g in parameter_groups({model: 1.0}, 0.5) for p in g["params"]]
    assert id(model[0].weight) not in found


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_every_optimizer_minimizes(name: str) -> None:
    model = nn.Linear(4, 2)
    config = Optimizer(name=name, lr=0.1, lr_rule="constant", trust=0.1)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, {model: 1.0}, 256)
    x, y = torch.randn(64, 4), torch.randn(64, 2)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_rates_follow_the_rule_and_the_group() -> None:
    assert Optimizer(lr=0.3, lr_rule="linear").scaled_lr(512) == pytest.approx(0.6)
    assert Optimizer(lr=0.3, lr_rule="sqrt").scaled_lr(1024) == pytest.approx(0.6)
    assert Optimizer(lr=0.3, lr_rule="constant").scaled_lr(1024) == 0.3
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = build_optimizer(Optimizer(), {a: 0.1, b: 1.0}, 256)
    set_lr(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {0.05, 0.5}


def test_schedule_warms_up_and_falls_as_a_cosine() -> None:
    assert schedule(0.0, 0.1) == 0
    assert schedule(0.05, 0.1) == pytest.approx(0.5)
    assert schedule(0.1, 0.1) == pytest.approx(1.0)
    assert schedule(0.55, 0.1) == pytest.approx(0.5)
    assert schedule(1.0, 0.1) == pytest.approx(0.0)
    assert schedule(1.0, 0.0, final=0.2) == pytest.approx(0.2)
    assert schedule(1 / 3, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))


def test_bad_optimizers_are_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer: lr is 0; above 0 is expected"):
        Optimizer(lr=0)
    with pytest.raises(InputError, match=r"optimizer: warmup is 1; from 0 to below 1 is expected"):
        Optimizer(warmup=1)


def test_biases_and_norms_have_a_rate_of_their_own() -> None:
    """As Barlow Twins' authors have 0.2 for weights and 0.0048 for biases."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    config = Optimizer("lars", lr=0.2, bias_lr=0.024, lr_rule="constant")
    optimizer = build_optimizer(config, {module: 0.5}, 256)
    set_lr(optimizer, 0.2)
    rates = {g["params"][0].ndim: g["lr"] for g in optimizer.param_groups}
    assert rates == {2: pytest.approx(0.1), 1: pytest.approx(0.0024)}
