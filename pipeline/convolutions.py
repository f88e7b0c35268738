"""Convolutions whose gradient of the weights is a matrix product where maps are small, on a CPU."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_POSITIONS = 16  # of the output's map, at most: of larger ones oneDNN's own is as fast


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.aten.convolution_backward(
                *(grad, x, weight, None, ctx.stride, ctx.padding, [1, 1]),
                *(False, [0, 0], 1, [True, False, False]),
            )[0]
        (h, w), (kh, kw), (sh, sw) = ctx.padding, weight.shape[2:], ctx.stride
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, w, w, h, h))
        patches = padded.unfold(1, kh, sh).unfold(2, kw, sw)  # [b, out_h, out_w, c, kh, kw]
        rows = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, kh * kw * x.shape[1])
        product = grad.permute(0, 2, 3, 1).reshape(-1, len(weight)).t() @ rows
        of_weight = product.view(len(weight), kh, kw, x.shape[1]).permute(0, 3, 1, 2)
        return of_x, of_weight.float(), None, None


class Convolution(nn.Conv2d):
    """`nn.Conv2d` that, in training with bf16 autocast on a CPU, computes the gradient of the
    weights of small maps as one matrix product of bf16 numbers.

    oneDNN takes several times as long for it on processors with AMX, and is not right on maps of
    1×1 at stride 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type != "cpu"
            or not (torch.is_grad_enabled() and self.weight.requires_grad)
            or not torch.is_autocast_enabled("cpu")
            or torch.get_autocast_dtype("cpu") != torch.bfloat16
            or self._positions(x) > _POSITIONS
        ):
            return super().forward(x)
        return _Convolution.apply(x, self.weight, self.stride, self.padding)  # type: ignore[no-any-return]

    def _positions(self, x: Tensor) -> int:
        """Of the output's map."""
        assert not isinstance(self.padding, str)
        of_sides = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, strict=True)
        return math.prod((size + 2 * pad - k) // stride + 1 for size, k, stride, pad in of_sides)


def fast_convolutions(module: nn.Module) -> nn.Module:
    """`module` with every plain convolution a `Convolution`; its parameters stay what they are."""
    for part in module.modules():
        if (
            type(part) is nn.Conv2d
            and part.bias is None
            and (part.groups, part.dilation) == (1, (1, 1))
            and part.padding_mode == "zeros"
            and not isinstance(part.padding, str)
        ):
            part.__class__ = Convolution
    return module
