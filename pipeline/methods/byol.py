"""BYOL: Bootstrap Your Own Latent (arXiv 2006.07733)."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.checks import check
from pipeline.encoders import features
from pipeline.memory import follow, rising
from pipeline.methods.base import Method, mlp


def regression(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared distances of unit-length predictions [v, b, d] and targets [2, b, d] of the other
    views, summed over both directions (equation 2 and below), averaged over the images.

    With more than two views it is twice the mean over all pairs, which is the same for two.
    """
    p, t = F.normalize(predictions, dim=2), F.normalize(targets, dim=2)
    cosines = torch.einsum("vbd,tbd->vtb", p, t).mean(2)  # [v, t]
    pairs = len(p) * len(t) - len(t)  # all but a view with itself
    return 4 - 4 * (cosines.sum() - cosines.diagonal().sum()) / pairs


class BYOL(Method):
    keyed = (0, 1)

    def __init__(
        self,
        encoder: nn.Module,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        hidden: int = 4096,
        output: int = 256,
        predictor: bool = True,
    ) -> None:
        """A predictor that has to find, from one view, what a slow copy makes of the other.

        Args:
            encoder: maps [b, 3, s, s] to [b, features(encoder)].
            momentum: of the slow copy at the start.
            final_momentum: what it rises to along half a cosine.
            hidden: width of the hidden layer in projector and predictor.
            output: width of projections and predictions.
            predictor: without it the method collapses; an ablation.
        """
        super().__init__()
        check("BYOL", "from 0 to 1", momentum=momentum, final_momentum=final_momentum)
        check("BYOL", "1 or more", hidden=hidden, output=output)
        self.encoder, self.momentum = encoder, (momentum, final_momentum)
        self.projector = mlp([features(encoder), hidden, output])
        self.predictor = mlp([output, hidden, output]) if predictor else nn.Identity()
        slow = nn.ModuleList([self.encoder, self.projector])
        self.slow = copy.deepcopy(slow).requires_grad_(False)

    def project(self, views: list[Tensor]) -> Tensor:
        return torch.stack([self.predictor(self.projector(self.encoder(v))) for v in views])

    def target(self, views: list[Tensor]) -> Tensor:
        encoder, projector = self.slow
        return torch.stack([projector(encoder(view)) for view in views])

    def loss(self, projections: Tensor) -> Tensor:
        return regression(projections[:-2], projections[-2:])

    def after_update(self, progress: float) -> None:
        momentum = rising(*self.momentum, progress)
        follow(self.slow, nn.ModuleList([self.encoder, self.projector]), momentum)
