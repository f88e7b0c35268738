"""Labels joined into pretraining: a supervised contrastive loss on the same projections."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import InputError
from pipeline.batches import batch_at, stream_at
from pipeline.checks import check
from pipeline.draws import hold_out, place_in_group
from pipeline.manifest import Contest, Manifest
from pipeline.methods.base import Method

if TYPE_CHECKING:
    from pipeline.training_recipe import Pretrain

Ints = npt.NDArray[np.int64]


class SupervisedContrast(nn.Module):
    prototypes: nn.Parameter

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 0.1,
        share: float = 0.25,
        holdout: float = 0.1,
    ) -> None:
        """A view of a labeled image is near to the views of its class and to the class's prototype,
        which is learned, and far from all other views and prototypes (SupCon, arXiv 2004.11362,
        equation 2; prototypes as in PaCo, arXiv 2107.12028, help classes that a batch holds few
        of).

        Args:
            weight: of this loss beside the method's.
            temperature: of the softmax over cosines.
            share: part of a batch that is drawn from the labeled images, two of a class at a time.
            holdout: part of the labels of each class that is not used; kNN accuracy on the way is
                that of these images.
        """
        super().__init__()
        check("SupervisedContrast", "above 0", weight=weight, temperature=temperature)
        check("SupervisedContrast", "from 0 to below 1", share=share, holdout=holdout)
        self.weight, self.temperature, self.share, self.held = weight, temperature, share, holdout

    def begin(self, classes: int, width: int) -> None:
        """Called once before training; `width` is that of the projections."""
        self.prototypes = nn.Parameter(F.normalize(torch.randn(classes, width), dim=1))

    def learned(self, contest: Contest) -> Manifest:
        """The images of train whose labels are learned from."""
        train = contest.manifest("train").usable()
        return train.take(~hold_out(train, self.held) & (train.label >= 0))

    def forward(self, projections: Tensor, labels: Tensor) -> Tensor:
        """The loss of projections [v, b, d] of a global batch with labels [b], -1 unknown, as a
        mean over the labeled views.
        """
        v = len(projections)
        rows = F.normalize(projections, dim=2).flatten(0, 1)  # [v * b, d]
        centers = F.normalize(self.prototypes.to(rows.dtype), dim=1)
        k = torch.arange(len(centers), device=rows.device)
        label = labels.repeat(v)
        logits = rows @ torch.cat([rows, centers]).T / self.temperature
        logits.diagonal().fill_(-torch.inf)
        positive = label[:, None] == torch.cat([label, k])
        positive.diagonal().fill_(False)
        known = (label >= 0).to(rows.dtype)
        log_p = logits.log_softmax(1).masked_fill(~positive, 0)
        each = -log_p.sum(1) / positive.sum(1).clamp_min(1)
        return self.weight * (each * known).sum() / known.sum().clamp_min(1)


def join(
    method: Method, contest: Contest, config: "Pretrain", seed: int
) -> tuple[Tensor, Callable[[int], Ints]]:
    """Begin the method's supervision: the labels [n] of the images of `config.splits`, -1 for what
    is not learned from, and the positions of a step's images, of which a share is labeled.

    Raises InputError where train is not among the splits.
    """
    supervision = method.supervision
    assert isinstance(supervision, SupervisedContrast)
    if "train" not in config.splits:
        raise InputError("pretrain: supervision is given, but train is not among the splits")
    count = len(method.queried or range(sum(view.count for view in config.views)))
    size = config.resolutions[-1]
    with torch.no_grad():
        width = method.eval().project([torch.zeros(2, 3, size, size)] * count).shape[2]
    method.train()
    supervision.begin(contest.classes, width)
    parts = []
    for split in config.splits:
        usable = contest.usable(split)
        if split == "train":
            learned = np.isin(usable, supervision.learned(contest).index)
            parts.append(np.where(learned, contest.labels(split)[usable], -1))
        else:
            parts.append(np.full(len(usable), -1))
    labels, batch = np.concatenate(parts), config.batch_size
    joined = min(round(supervision.share * batch), int((labels >= 0).sum()))
    return torch.from_numpy(labels), joined_batches(labels, batch, joined, seed)


def joined_batches(labels: Ints, batch: int, labeled: int, seed: int) -> Callable[[int], Ints]:
    """A function of the step: the positions [batch] of its global batch, of all images, then
    `labeled` ones in pairs of a class.  In an epoch of theirs each labeled image comes once; among
    all images it comes as often as others.
    """
    known = np.flatnonzero(labels >= 0)
    labeled = labeled if len(known) else 0
    order_of = lru_cache(maxsize=2)(partial(_in_pairs, labels[known], seed))

    def at(step: int) -> Ints:
        of_all = batch_at(len(labels), batch - labeled, seed, step)
        of_labeled = stream_at(len(known), labeled, step, order_of)
        return np.concatenate([of_all, known[of_labeled]])

    return at


def _in_pairs(labels: Ints, seed: int, epoch: int) -> Ints:
    """A random order of images in which two of a class follow each other, while there are two."""
    rng = np.random.Generator(np.random.Philox(key=[seed + (1 << 32), epoch]))
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pair = np.cumsum(place_in_group(labels[order]) % 2 == 0) - 1
    return order[np.argsort(rng.permutation(pair[-1] + 1)[pair], kind="stable")]
