"""Self-Classifier: Self-Supervised Classification Network (arXiv 2103.10994)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from pipeline.assignments import assignment_entropy, uniform_prior_loss
from pipeline.checks import check
from pipeline.encoders import features
from pipeline.methods.base import Method, mlp


class SelfClassifier(Method):
    def __init__(
        self,
        encoder: nn.Module,
        classes: list[int] | None = None,
        row_temperature: float = 0.1,
        column_temperature: float = 0.05,
        hidden: int = 4096,
        output: int = 128,
        depth: int = 2,
        norm: bool = True,
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
            norm: batch norm between these, as in all runs of the authors' scripts.
        """
        super().__init__()
        classes = [1000, 2000, 4000, 8000] if classes is None else classes
        check("SelfClassifier", "above 0", row_temperature=row_temperature)
        check("SelfClassifier", "above 0", column_temperature=column_temperature)
        check("SelfClassifier", "2 or more", classes=min(classes, default=0))
        check("SelfClassifier", "1 or more", hidden=hidden, output=output, depth=depth)
        self.encoder, self.row, self.column = encoder, row_temperature, column_temperature
        widths = [features(encoder), *[hidden] * (depth - 1), output]
        self.projector = mlp(widths, norm=norm, activation=nn.LeakyReLU)
        for layer in self.projector:
            if isinstance(layer, nn.Linear):  # as in the authors' code (src/model.py, MLPHead)
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.heads = nn.ModuleList(
            weight_norm(nn.Linear(output, count, bias=False)) for count in classes
        )
        for head in self.heads:
            nn.init.ones_(head.parametrizations.weight.original0)  # type: ignore[union-attr, arg-type]

    def project(self, views: list[Tensor]) -> Tensor:
        return F.normalize(self.together(views), dim=2)

    def loss(self, projections: Tensor) -> Tensor:
        losses = [
            uniform_prior_loss(projections, head.weight, self.row, self.column)  # type: ignore[arg-type]
            for head in self.heads
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def signs(self) -> dict[str, Tensor]:
        entropies = [assignment_entropy(self.pair[0], h.weight, self.row) for h in self.heads]  # type: ignore[arg-type]
        return super().signs() | {"assignment_entropy": torch.stack(entropies).min()}
