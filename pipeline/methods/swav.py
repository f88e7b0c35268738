"""SwAV: Unsupervised Learning by Contrasting Cluster Assignments (arXiv 2006.09882)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.assignments import assignment_entropy, sinkhorn
from pipeline.checks import check
from pipeline.contrastive import sum_by_parts
from pipeline.encoders import features
from pipeline.memory import Queue
from pipeline.methods.base import Method, mlp


class SwAV(Method):
    def __init__(
        self,
        encoder: nn.Module,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        freeze: float = 0.01,
        queue: int = 0,
        queue_start: float = 0.15,
        hidden: int = 2048,
        output: int = 128,
    ) -> None:
        """Predicts from a view how the others of its image are assigned to prototypes.

        The first two views are assigned, the whole batch together; local views only predict.

        Args:
            encoder: maps [b, 3, s, s] to [b, features(encoder)].
            prototypes: how many there are.
            temperature: of the predictions.
            epsilon: of the Sinkhorn algorithm; larger is more even.
            iterations: of the Sinkhorn algorithm.
            freeze: fraction of the run in which the prototypes stay as they are.
            queue: older embeddings of a view that are assigned beside a small batch, once full.
            queue_start: fraction of the run from which the queue is filled.
            hidden: width of the head's hidden layer.
            output: width of the projections.
        """
        super().__init__()
        check("SwAV", "above 0", temperature=temperature, epsilon=epsilon)
        check("SwAV", "1 or more", iterations=iterations)
        check("SwAV", "2 or more", prototypes=prototypes, hidden=hidden, output=output)
        check("SwAV", "0 or more", queue=queue)
        check("SwAV", "from 0 to 1", freeze=freeze, queue_start=queue_start)
        self.encoder, self.temperature, self.freeze = encoder, temperature, freeze
        self.epsilon, self.iterations, self.queue_start = epsilon, iterations, queue_start
        self.projector = mlp([features(encoder), hidden, output])
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, output), dim=1))
        self.queue = Queue(queue, output, rows=2) if queue else None

    def project(self, views: list[Tensor]) -> Tensor:
        return F.normalize(self.together(views), dim=2)

    def loss(self, projections: Tensor) -> Tensor:
        v, b, _ = projections.shape
        self._newest = projections[:2].detach()

        def summed(z: Tensor, *assigned: Tensor) -> Tensor:
            log_p = (z.transpose(0, 1) @ self.prototypes.T / self.temperature).log_softmax(2)
            others = (log_p.sum(0) - log_p[:2]) / (v - 1)  # mean of the other views, [2, b, k]
            return -torch.stack(
                [(q * p).sum() for q, p in zip(assigned, others, strict=True)]
            ).sum()

        assigned = [self._assigned(view) for view in (0, 1)]
        logits = 4 * v * len(self.prototypes)  # of an image, in several arrays
        return sum_by_parts(summed, logits, projections.transpose(0, 1), *assigned) / (2 * b)

    @torch.no_grad()
    def _assigned(self, view: int) -> Tensor:
        """How the newest images are assigned by one of their views [B, k]."""
        rows, weights = self._newest[view], None
        b = len(rows)
        if self.queue is not None:
            rows = torch.cat([rows, self.queue.entries[view].to(rows.dtype)])
            weights = torch.ones_like(rows[:, 0])
            weights[b:] = (self.queue.born >= 0).all()
        return sinkhorn(rows @ self.prototypes.T, self.epsilon, self.iterations, weights)[:b]

    def before_update(self, progress: float) -> None:
        if progress < self.freeze:
            self.prototypes.grad = None

    @torch.no_grad()
    def after_update(self, progress: float) -> None:
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
        if self.queue is not None and progress >= self.queue_start:
            self.queue.push(self._newest)

    @torch.no_grad()
    def signs(self) -> dict[str, Tensor]:
        entropy = assignment_entropy(self.pair[0], self.prototypes, self.temperature)
        found = super().signs() | {"assignment_entropy": entropy}
        return found if self.queue is None else found | {"queue_age": self.queue.age()}
