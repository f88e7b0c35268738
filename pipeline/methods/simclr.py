"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (arXiv
2002.05709).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import InputError
from pipeline.encoders import features
from pipeline.methods.base import Method


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross entropy (section 2.1, equation 1), averaged over all v·b
    views.

    `projections` [v, b, d] need no normalization.  The positives of a view are the other views of
    its image; with two views this is the paper's loss, with more the mean over positives of the
    same term.
    """
    v, b, _ = projections.shape
    z = F.normalize(projections.flatten(0, 1), dim=1)  # [v * b, d]
    logits = z @ z.T / temperature  # [v * b, v * b]
    logits = logits.masked_fill(torch.eye(v * b, dtype=torch.bool, device=z.device), -torch.inf)
    log_denominator = logits.logsumexp(1)  # all but itself
    index = torch.arange(v * b, device=z.device)
    positives = [logits[index, (index + k * b) % (v * b)] for k in range(1, v)]
    return log_denominator.mean() - torch.stack(positives).mean()


class SimCLR(Method):
    def __init__(
        self, encoder: nn.Module, temperature: float = 0.5, hidden: int = 0, output: int = 128
    ) -> None:
        """Projection head g(h) = W2 relu(W1 h) (section 2.1) and NT-Xent.

        Args:
            encoder: maps [b, 3, s, s] to [b, features(encoder)].
            temperature: of the softmax over similarities.
            hidden: width of the head's hidden layer; 0 takes the encoder's.
            output: width of the projections.
        """
        super().__init__()
        if temperature <= 0:
            raise InputError(f"SimCLR: temperature is {temperature}; above 0 is expected")
        self.encoder, self.temperature = encoder, temperature
        width = features(encoder)
        hidden = hidden or width
        # Batch normalization in the head as in the authors' code (tf2/model.py, ProjectionHead).
        self.projector = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, output, bias=False),
            nn.BatchNorm1d(output),
        )

    def project(self, views: list[Tensor]) -> Tensor:
        sizes = {view.shape[-1] for view in views}
        if len(sizes) == 1:  # all views in one batch, as in the authors' code
            z = self.projector(self.encoder(torch.cat(views)))  # [v * b, d]
            return z.unflatten(0, (len(views), -1))  # type: ignore[no-any-return]
        return torch.stack([self.projector(self.encoder(view)) for view in views])

    def loss(self, projections: Tensor) -> Tensor:
        return nt_xent(projections, self.temperature)
