"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (arXiv 2103.03230)."""

from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.encoders import features
from pipeline.methods.base import Method, check_above, mlp


def redundancy(a: Tensor, b: Tensor, off_diagonal: float) -> Tensor:
    """Distance of the cross-correlation [d, d] of two views' projections [b, d] from the identity,
    entries off its diagonal weighted (equations 1 and 2).
    """
    a, b = (F.batch_norm(z, None, None, training=True) for z in (a, b))
    c = a.T @ b / len(a)  # [d, d]
    diagonal = c.diagonal()
    invariance = (diagonal - 1).square().sum()
    return invariance + off_diagonal * (c.square().sum() - diagonal.square().sum())


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
            off_diagonal: λ of equation 1, found in the paper's section 4 and the authors' code.
            hidden: width of the head's hidden layers.
            output: width of the projections.
            depth: linear layers of the head.
        """
        super().__init__()
        check_above(self, off_diagonal=off_diagonal, hidden=hidden, output=output, depth=depth)
        self.encoder, self.off_diagonal = encoder, off_diagonal
        widths = [features(encoder), *[hidden] * (depth - 1), output]
        self.projector = mlp(widths, last_bias=False)

    def project(self, views: list[Tensor]) -> Tensor:
        return torch.stack([self.projector(self.encoder(view)) for view in views])

    def loss(self, projections: Tensor) -> Tensor:
        pairs = combinations(projections, 2)  # one pair with two views
        return torch.stack([redundancy(a, b, self.off_diagonal) for a, b in pairs]).mean()
