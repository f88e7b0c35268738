"""What a pretraining method is."""

import torch
from torch import Tensor, nn

from pipeline.distributed import gather


class Method(nn.Module):
    """An encoder, what it is trained with, and a loss over the global batch.

    Projection and loss are apart because every batch-coupled loss needs that: for negatives from
    other processes and for batches larger than the memory.  The loop is forward → backward →
    before_update → optimizer.step → after_update.
    """

    encoder: nn.Module

    def project(self, views: list[Tensor]) -> Tensor:
        """Views, each [b, 3, s, s], to projections [v, b, d]."""
        raise NotImplementedError

    def loss(self, projections: Tensor) -> Tensor:
        """The scalar loss of projections [v, B, d], B being the global batch."""
        raise NotImplementedError

    def forward(self, views: list[Tensor]) -> Tensor:
        """The loss of this process's views with the projections of all processes; never in bf16,
        whose softmax is too coarse for a batch of similarities.
        """
        projections = gather(self.project(views), dim=1)
        with torch.autocast(projections.device.type, enabled=False):
            return self.loss(projections.float() if projections.itemsize < 4 else projections)

    def before_update(self, progress: float) -> None:
        """Called between backward and the optimizer's step; progress runs from 0 to 1."""

    def after_update(self, progress: float) -> None:
        """Called after the optimizer's step."""
