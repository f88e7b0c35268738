"""Several processes as one: gather and sum with gradient; identity on one process."""

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


def leave() -> None:
    """End the group of processes, if there is one: a thread of it that is left at the interpreter's
    end can abort the process.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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


def all_reduce(x: Tensor) -> Tensor:
    """The sum of the tensors of all ranks, with gradient; `x` on one process."""
    return x if world_size() == 1 else _Sum.apply(x)


def share(module: nn.Module) -> None:
    """Make the parameters of all ranks those of rank 0."""
    if world_size() > 1:
        for parameter in module.parameters():
            dist.broadcast(parameter.data, 0)


def average_gradients(module: nn.Module) -> None:
    """Replace every gradient by its mean over the ranks, in one message; as
    DistributedDataParallel does, for gradients that did not come through it.
    """
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if world_size() == 1 or not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
