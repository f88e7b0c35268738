"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (arXiv
2002.05709).
"""

from typing import Literal

from torch import Tensor, nn

from pipeline.checks import check
from pipeline.contrastive import nt_xent
from pipeline.encoders import features
from pipeline.methods.base import Method, mlp


class SimCLR(Method):
    def __init__(
        self,
        encoder: nn.Module,
        temperature: float = 0.5,
        hidden: int = 0,
        output: int = 128,
        depth: int = 2,
        similarity: Literal["cosine", "dot"] = "cosine",
        decoupled: bool = False,
    ) -> None:
        """Projection head g(h) = W2 relu(W1 h) (section 2.1) and NT-Xent.

        Args:
            encoder: maps [b, 3, s, s] to [b, features(encoder)].
            temperature: of the softmax over similarities.
            hidden: width of the head's hidden layers; 0 takes the encoder's.
            output: width of the projections.
            depth: linear layers of the head; SimCLR v2 (arXiv 2006.10029) has 3.
            similarity: cosine, or dot product of projections as they are.
            decoupled: leave the positives out of the denominator (DCL, arXiv 2110.06848).
        """
        super().__init__()
        check("SimCLR", "above 0", temperature=temperature)
        check("SimCLR", "1 or more", depth=depth, output=output)
        check("SimCLR", "0 or more", hidden=hidden)
        self.encoder, self.temperature = encoder, temperature
        self.cosine, self.decoupled = similarity == "cosine", decoupled
        width = features(encoder)
        # Batch normalization in the head as in the authors' code (tf2/model.py, ProjectionHead).
        widths = [width, *[hidden or width] * (depth - 1), output]
        self.projector = mlp(widths, last_norm=True)

    def project(self, views: list[Tensor]) -> Tensor:
        return self.together(views)

    def loss(self, projections: Tensor) -> Tensor:
        return nt_xent(projections, self.temperature, self.cosine, self.decoupled)
