"""Several processes as one: gather with gradient, reduced batch-norm statistics; identity on one
process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for the other processes."""
    if world_size() > 1:
        dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.size = dim, x.shape[dim]
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = grad.narrow(ctx.dim, rank() * ctx.size, ctx.size)
        return mine * world_size(), None


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all ranks concatenated along `dim`, in rank order, with gradient.

    Every rank is expected to compute the same loss from the result.  The gradient of a rank's part
    is then known locally; it is multiplied by the number of ranks because DistributedDataParallel
    averages parameter gradients over ranks where this loss needs their sum.
    """
    return x if world_size() == 1 else _Gather.apply(x, dim)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class ReducedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with statistics over the batches of all ranks, on any device.

    torch's SyncBatchNorm has no CPU path; this is its equal there (same parameters and buffers).
    Where timm fuses dropout and activation into the layer, they are kept.
    """

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        self._parameters, self._buffers = layer._parameters, layer._buffers
        self.drop, self.act = getattr(layer, "drop", None), getattr(layer, "act", None)

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            x = super().forward(input)
        else:
            x = self._reduced(input)
        x = x if self.drop is None else self.drop(x)
        y: Tensor = x if self.act is None else self.act(x)
        return y

    def _reduced(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.ndim) if d != 1]
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = wide.numel() / wide.shape[1]
        one = wide.new_full((1,), count)
        sums = _Sum.apply(torch.cat([wide.sum(dims), one]))
        n = float(sums[-1].detach())
        mean = sums[:-1] / n
        shape = [1, -1] + [1] * (x.ndim - 2)
        centered = wide - mean.view(shape)
        var = _Sum.apply(centered.square().sum(dims)) / n
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
                momentum = self.momentum
                if momentum is None:
                    momentum = 1 / float(self.num_batches_tracked)  # type: ignore[arg-type]
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((var * n / (n - 1)).to(self.running_var.dtype), momentum)
        y = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)  # type: ignore[no-any-return]


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with batch norm over all ranks: torch's on a GPU, `ReducedBatchNorm` on a CPU."""
    if world_size() == 1:
        return module
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(module)  # type: ignore[no-any-return]
    return _reduce(module)


def _reduce(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return ReducedBatchNorm(module)
    for name, child in module.named_children():
        setattr(module, name, _reduce(child))
    return module
