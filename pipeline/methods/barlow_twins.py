"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (arXiv 2103.03230)."""

from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.checks import check
from pipeline.distributed import all_reduce, rank, world_size
from pipeline.encoders import features
from pipeline.methods.base import Method, mlp

BLOCK = 1024  # rows of the cross-correlation that are in memory at a time
EPSILON = 1e-5  # added to the variance, as by batch norm


def redundancy(projections: Tensor, off_diagonal: float) -> Tensor:
    """Distance of the cross-correlation [d, d] of two views' projections [v, b, d] from the
    identity, entries off its diagonal weighted (equations 1 and 2); the mean over pairs of views.
    Every rank gives the same projections, and computes its share of the cross-correlation.
    """
    loss: Tensor = _Redundancy.apply(projections, off_diagonal)
    return loss


class _Redundancy(torch.autograd.Function):
    """The loss and its gradient in one sweep over blocks of the cross-correlation's rows, in turns
    on the ranks, in memory O(v b d): one more number for each projection.
    """

    @staticmethod
    def forward(ctx: Any, projections: Tensor, off_diagonal: float) -> Tensor:
        v, n, d = projections.shape
        mean = projections.mean(1, keepdim=True)  # [v, 1, d]
        scale = (projections.var(1, correction=0, keepdim=True) + EPSILON).rsqrt()
        grad = torch.zeros_like(projections)  # with respect to normalized projections, at first
        loss, pairs = projections.new_zeros(()), list(combinations(range(v), 2))
        block = min(BLOCK, -(-d // world_size()))
        for i, j in pairs:
            for start in range(rank() * block, d, world_size() * block):
                part = slice(start, start + block)
                x = (projections[i, :, part] - mean[i, :, part]) * scale[i, :, part]  # [n, block]
                c = (x.T @ projections[j]).mul_(scale[j] / n)  # x has mean 0: the other's is gone
                diagonal = c.diagonal(start).clone()
                loss += off_diagonal * (c.square().sum() - diagonal.square().sum())
                loss += (diagonal - 1).square().sum()
                c *= 2 * off_diagonal
                c.diagonal(start).copy_(2 * (diagonal - 1))
                grad[j].addmm_(x, c, alpha=1 / n)
                c *= scale[j] / n
                grad[i, :, part] += projections[j] @ c.T - mean[j] @ c.T
        loss, grad = all_reduce(loss), all_reduce(grad)
        for view in range(v):
            for start in range(0, d, BLOCK):  # through the normalization
                part = slice(start, start + BLOCK)
                x = (projections[view, :, part] - mean[view, :, part]) * scale[view, :, part]
                g = grad[view, :, part]
                g -= g.mean(0) + x * (g * x).mean(0)
                g *= scale[view, :, part] / len(pairs)
        ctx.grad = grad
        return loss / len(pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(grad_output), None


class BarlowTwins(Method):
    def __init__(
        self,
        encoder: nn.Module,
        off_diagonal: float = 0.0051,
        hidden: int = 8192,
        output: int = 8192,
        depth: int = 3,
    ) -> None:
        """Projections of two views whose cross-correlation over the global batch is the identity.

        Args:
            encoder: maps [b, 3, s, s] to [b, features(encoder)].
            off_diagonal: λ of equation 1, as in the paper's section 4 and the authors' code.
            hidden: width of the head's hidden layers.
            output: width of the projections.
            depth: linear layers of the head.
        """
        super().__init__()
        check("BarlowTwins", "above 0", off_diagonal=off_diagonal)
        check("BarlowTwins", "1 or more", hidden=hidden, output=output, depth=depth)
        self.encoder, self.off_diagonal = encoder, off_diagonal
        self.projector = mlp([features(encoder), *[hidden] * (depth - 1), output], last_bias=False)

    def project(self, views: list[Tensor]) -> Tensor:
        return torch.stack([self.projector(self.encoder(view)) for view in views])

    def loss(self, projections: Tensor) -> Tensor:
        return redundancy(projections, self.off_diagonal)
