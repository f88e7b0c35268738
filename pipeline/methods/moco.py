"""MoCo v2: Improved Baselines with Momentum Contrastive Learning (arXiv 2003.04297)."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.batch_norm import SplitBatchNorm, groups, split_batch_norm
from pipeline.checks import check
from pipeline.contrastive import info_nce
from pipeline.encoders import features
from pipeline.memory import Queue, follow, rising
from pipeline.methods.base import Method, mlp


class MoCo(Method):
    def __init__(
        self,
        encoder: nn.Module,
        temperature: float = 0.2,
        queue: int = 65_536,
        momentum: float = 0.999,
        final_momentum: float | None = None,
        symmetric: bool = False,
        bn_group: int = 32,
        hidden: int = 0,
        output: int = 128,
    ) -> None:
        """Queries against keys of a slow copy and a queue of older keys.

        Batch norm would tell a query which key shares its batch.  Queries are therefore normalized
        in groups of consecutive images and keys in groups of images far apart (section 3.3 of
        arXiv 1911.05722, shuffling), the same groups on one process and on many.

        Args:
            encoder: maps [b, 3, s, s] to [b, features(encoder)].
            temperature: of the softmax over similarities.
            queue: keys of earlier steps that serve as negatives.
            momentum: of the key encoder.
            final_momentum: what it rises to along half a cosine; null keeps it.
            symmetric: every view is query and key once; no key of its own batch is a negative.
            bn_group: images that are normalized together; 0 leaves batch norm as it is.
            hidden: width of the head's hidden layer; 0 takes the encoder's.
            output: width of the projections.
        """
        super().__init__()
        check("MoCo", "above 0", temperature=temperature)
        check("MoCo", "1 or more", queue=queue, output=output)
        self.momentum = momentum, momentum if final_momentum is None else final_momentum
        check("MoCo", "from 0 to 1", momentum=momentum, final_momentum=self.momentum[1])
        check("MoCo", "0 or more", bn_group=bn_group, hidden=hidden)
        self.temperature = temperature
        self.queried, self.keyed = ((0, 1), (0, 1)) if symmetric else ((0,), (1,))
        self.encoder = split_batch_norm(encoder, bn_group) if bn_group else encoder
        if any(isinstance(module, SplitBatchNorm) for module in encoder.modules()):
            self.group = bn_group
        width = features(encoder)
        self.projector = mlp([width, hidden or width, output], norm=False)
        slow = nn.ModuleList([self.encoder, self.projector])
        self.slow = copy.deepcopy(slow).requires_grad_(False)
        self.queue = Queue(queue, output)
        self.negatives = queue // len(self.keyed)

    def project(self, views: list[Tensor]) -> Tensor:
        z = torch.stack([self.projector(self.encoder(view)) for view in views])
        return F.normalize(z, dim=2)

    def target(self, views: list[Tensor]) -> Tensor:
        encoder, projector = self.slow
        return F.normalize(torch.stack([projector(encoder(view)) for view in views]), dim=2)

    def target_order(self, batch: int, device: torch.device | None = None) -> Tensor | None:
        if self.group == 1:
            return None
        return (torch.arange(batch, device=device) % groups(batch, self.group)).argsort(stable=True)

    def loss(self, projections: Tensor) -> Tensor:
        queries, keys = projections.tensor_split(2)  # each [1 or 2, B, d]
        self._newest = keys.detach()
        pairs = zip(queries, keys.flip(0), strict=True)  # a view's key is the other view's
        negatives = self.queue.entries[0].to(keys.dtype)
        return torch.stack([info_nce(q, k, negatives, self.temperature) for q, k in pairs]).mean()

    def after_update(self, progress: float) -> None:
        momentum = rising(*self.momentum, progress)
        follow(self.slow, nn.ModuleList([self.encoder, self.projector]), momentum)
        self.queue.push(self._newest.flatten(0, 1)[None])

    def signs(self) -> dict[str, Tensor]:
        return super().signs() | {"queue_age": self.queue.age()}
