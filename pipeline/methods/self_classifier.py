"""Self-Classifier: Self-Supervised Classification Network (arXiv 2103.10994)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from pipeline.encoders import features
from pipeline.methods.base import Method, check_above, entropy_of, mlp

ROWS = 512  # images of a batch beyond which one head's logits are in memory at a time


def uniform_prior_loss(logits: Tensor, row: float, column: float) -> Tensor:
    """Cross entropy of two views' class posteriors with a uniform prior over the classes (section
    3.2, equation 5), averaged over pairs of views of which one is among the first two.

    `logits` [v, b, k].  A view's target is p(x | y), a softmax over the batch at temperature
    `column`, normalized over the classes; the other view's prediction is p(y | x), a softmax over
    the classes at temperature `row`, normalized over the batch and times b / k.  In logarithms
    throughout, so nothing has to be added to keep them finite.
    """
    v, b, k = logits.shape
    target = (logits / column).log_softmax(1).softmax(2)  # [v, b, k]
    log_p = (logits / row).log_softmax(2)
    log_p = log_p - log_p.logsumexp(1, keepdim=True) + math.log(b / k)
    cross = -torch.einsum("ibk,jbk->ij", target, log_p) / b  # [v, v]
    view = torch.arange(v, device=logits.device)
    pairs = (view[:, None] != view) & ((view[:, None] < 2) | (view < 2))
    return (cross * pairs).sum() / (4 * v - 6)  # 2 pairs of global views, 4 with each local one


class SelfClassifier(Method):
    def __init__(
        self,
        encoder: nn.Module,
        classes: list[int] | None = None,
        row_temperature: float = 0.1,
        column_temperature: float = 0.05,
        hidden: int = 4096,
        output: int = 128,
        depth: int = 3,
    ) -> None:
        """Classifiers that learn classes of their own, on which two views have to agree.

        The first two views are global; further ones (local crops) are paired with these only.

        Args:
            encoder: maps [b, 3, s, s] to [b, features(encoder)].
            classes: class counts of the heads; null takes the paper's 1,000, 2,000, 4,000, 8,000.
            row_temperature: of the softmax over the classes.
            column_temperature: of the softmax over the batch.
            hidden: width of the hidden layers before the heads.
            output: width of the unit-length embeddings that the heads see.
            depth: linear layers before the heads.
        """
        super().__init__()
        classes = [1000, 2000, 4000, 8000] if classes is None else classes
        check_above(self, row_temperature=row_temperature, column_temperature=column_temperature)
        check_above(self, 1, classes=min(classes, default=0))
        check_above(self, hidden=hidden, output=output, depth=depth)
        self.encoder, self.row, self.column = encoder, row_temperature, column_temperature
        widths = [features(encoder), *[hidden] * (depth - 1), output]
        self.projector = mlp(widths, norm=False, activation=nn.LeakyReLU)
        for layer in self.projector:
            if isinstance(layer, nn.Linear):  # as in the authors' code (src/model.py, MLPHead)
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.heads = nn.ModuleList(
            weight_norm(nn.Linear(output, count, bias=False)) for count in classes
        )
        for head in self.heads:
            nn.init.ones_(head.parametrizations.weight.original0)  # type: ignore[union-attr, arg-type]

    def project(self, views: list[Tensor]) -> Tensor:
        return F.normalize(self.together(views), dim=2)

    def loss(self, projections: Tensor) -> Tensor:
        def of(head: nn.Module) -> Tensor:
            return uniform_prior_loss(head(projections), self.row, self.column)  # [v, B, k]

        if projections.shape[1] <= ROWS:
            return torch.stack([of(head) for head in self.heads]).mean()
        losses = [checkpoint(of, head, use_reentrant=False) for head in self.heads]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def signs(self) -> dict[str, Tensor]:
        log_p = [(head(self.pair[0]) / self.row).log_softmax(1) for head in self.heads]
        lowest = torch.stack([entropy_of(x) for x in log_p]).min()
        return super().signs() | {"assignment_entropy": lowest}
