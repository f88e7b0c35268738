"""The gradient of small maps' convolutions is that of torch, and is used where it is said to be."""

import pytest
import torch
from torch import Tensor, nn

from pipeline import convolutions
from pipeline.convolutions import Convolution, fast_convolutions


def gradients(layer: nn.Module, x: Tensor, grad: Tensor, bf16: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x)
    y.backward(grad.to(y.dtype))
    weight = next(layer.parameters())
    found = [y.detach(), x.grad, weight.grad]
    weight.grad = None
    return [t.double() for t in found if t is not None]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (1, 1, 0)]
)
def test_gradients_are_as_exact_as_torchs(
    size: int, kernel: int, stride: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "_POSITIONS", 49)
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 40, kernel, stride, padding, bias=False)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(16, 24, size, size).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(layer(x)).bfloat16().float()
    true = gradients(layer.double(), x.bfloat16().double(), grad.double(), False)
    with torch.no_grad():
        layer.float()
    torchs = gradients(layer, x, grad, True)
    ours = gradients(fast_convolutions(layer), x, grad, True)
    assert isinstance(layer, Convolution)
    for a, b, c in zip(ours, torchs, true, strict=True):
        error, theirs = (a - c).norm() / c.norm(), (b - c).norm() / c.norm()
        assert not error > 1.1 * theirs + 1e-3  # theirs may be NaN on maps of 1×1 at stride 2
        assert error < 1e-2


def test_it_is_used_in_training_on_small_maps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    apply = convolutions._Convolution.apply

    def counted(x: Tensor, *rest: object) -> object:
        calls.append(tuple(x.shape[2:]))
        return apply(x, *rest)

    monkeypatch.setattr(convolutions._Convolution, "apply", counted)
    layer = fast_convolutions(nn.Conv2d(3, 5, 3, padding=1, bias=False))
    small, large = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 5, 4)
    layer(small)
    with torch.autocast("cpu", torch.bfloat16):
        layer(large)
        with torch.no_grad():
            layer(small)
        assert not calls
        assert layer(small).dtype == torch.bfloat16
        layer.requires_grad_(False)(small)
    assert calls == [(4, 4)]


def test_other_convolutions_stay_what_they_are() -> None:
    others = [
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
    ]
    fast_convolutions(nn.Sequential(*others))
    assert all(type(part) is nn.Conv2d for part in others)
