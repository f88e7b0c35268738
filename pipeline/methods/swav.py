"""SwAV: Unsupervised Learning by Contrasting Cluster Assignments (arXiv 2006.09882)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.encoders import features
from pipeline.memory import Queue
from pipeline.methods.base import Method, check_above, check_fraction, entropy_of, mlp


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, weights: Tensor | None) -> Tensor:
    """Assignments [b, k] of sum 1 that use all prototypes alike (section 3.1, equations 3 to 5;
    its factors 1/k and 1/b cancel), from scores [b, k]; weights [b] are 1 or 0.
    """
    q = ((scores - scores.max()) / epsilon).exp()
    if weights is not None:
        q = q * weights[:, None]
    for _ in range(iterations):
        q /= q.sum(0)
        q /= q.sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    return q


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
        check_above(self, temperature=temperature, epsilon=epsilon, iterations=iterations)
        check_above(self, 1, prototypes=prototypes, hidden=hidden, output=output)
        check_above(self, -1, queue=queue)
        check_fraction(self, freeze=freeze, queue_start=queue_start)
        self.encoder, self.temperature, self.freeze = encoder, temperature, freeze
        self.epsilon, self.iterations, self.queue_start = epsilon, iterations, queue_start
        self.projector = mlp([features(encoder), hidden, output])
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, output), dim=1))
        self.queue = Queue(queue, output, rows=2) if queue else None

    def project(self, views: list[Tensor]) -> Tensor:
        return F.normalize(self.together(views), dim=2)

    def loss(self, projections: Tensor) -> Tensor:
        scores = projections @ self.prototypes.T  # [v, B, k]
        log_p = (scores / self.temperature).log_softmax(2)
        self._newest = projections[:2].detach()
        q = torch.stack([self._assign(k, scores[k].detach()) for k in (0, 1)])  # [2, B, k]
        others = (log_p.sum(0) - log_p[:2]) / (len(log_p) - 1)  # mean of the other views
        return -(q * others).sum(2).mean()

    def _assign(self, view: int, scores: Tensor) -> Tensor:
        if self.queue is None:
            return sinkhorn(scores, self.epsilon, self.iterations, None)
        older = self.queue.entries[view].to(scores.dtype) @ self.prototypes.detach().T
        full = (self.queue.born >= 0).all().to(scores.dtype).expand(len(older))
        both, ones = torch.cat([scores, older]), torch.ones_like(scores[:, 0])
        return sinkhorn(both, self.epsilon, self.iterations, torch.cat([ones, full]))[: len(scores)]

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
        log_p = (self.pair[0] @ self.prototypes.T / self.temperature).log_softmax(1)
        found = super().signs() | {"assignment_entropy": entropy_of(log_p)}
        return found if self.queue is None else found | {"queue_age": self.queue.age()}
