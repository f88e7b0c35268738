"""A classifier is an encoder and a head; which of its parts are trained, and its loss."""

import copy
import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from pipeline.checkpoint import load_tensors
from pipeline.distributed import rank, share, world_size
from pipeline.encoders import build_encoder, features
from pipeline.inference import outputs_of, predict
from pipeline.manifest import Contest
from pipeline.metrics import fit_linear
from pipeline.packed import Pool

MARKS = ("transfer", "by_val")
"""What a classifier's metadata marks: outside weights, or labels of val, took part in it, or in one
that pseudo-labeled for it or chose the labels that it requested.
"""


def build_head(kind: str, features: int, classes: int) -> nn.Module:
    """A linear layer, or an MLP with one hidden layer as wide as the features; [b, d] to [b, k]."""
    if kind == "linear":
        return nn.Linear(features, classes)
    hidden = nn.Linear(features, features, bias=False)
    norm = nn.BatchNorm1d(features)
    return nn.Sequential(hidden, norm, nn.ReLU(inplace=True), nn.Linear(features, classes))


class Classifier(nn.Module):
    """Images [b, 3, h, w] to logits [b, classes].

    The head computes in float32: in bf16 one of a hundred images has two likeliest classes.
    Submissions copy this source, so its names are those that `pipeline/submission.py` imports.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(images)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.to(next(self.head.parameters()).dtype))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "Classifier":
        """Batch norms whose weights are frozen keep their statistics."""
        super().train(mode)
        for module in self.encoder.modules():
            own = list(module.parameters(recurse=False))
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if norm and own and not any(p.requires_grad for p in own):
                module.eval()
        return self


class Ensemble(nn.Module):
    """Images [b, 3, h, w] to the logarithm [b, classes] of the weighted mean probability by several
    classifiers, each at its own size, with `mirror` of images and their mirror images.
    """

    def __init__(
        self, members: list[Classifier], weights: list[float], sizes: list[int], mirror: bool
    ) -> None:
        super().__init__()
        self.members, self.weights = nn.ModuleList(members), weights
        self.sizes, self.mirror = sizes, mirror

    def forward(self, images: Tensor) -> Tensor:
        views = [images, images.flip(3)] if self.mirror else [images]
        total = torch.zeros((), device=images.device)
        for member, weight, size in zip(self.members, self.weights, self.sizes, strict=True):
            for view in views:
                if view.shape[2:] != (size, size):
                    view = F.interpolate(view, (size, size), mode="bilinear", antialias=True)
                total = total + weight / len(views) * member(view).float().softmax(1)
        return total.clamp_min(1e-12).log()


def stages_of(encoder: nn.Module) -> list[list[str]]:
    """Names of the encoder's parameters, from the stem on, stage by stage as timm groups them; a
    norm that it groups alone is of the stage before.
    """
    groups = group_parameters(encoder, encoder.group_matcher(coarse=True))  # type: ignore[operator]
    found = list[list[str]]()
    for _, group in sorted(groups.items()):
        names = list(group) if isinstance(group, (list, tuple)) else [group]
        if found and all(encoder.get_parameter(name).ndim < 2 for name in names):
            found[-1] += names
        else:
            found.append(names)
    return found


def freeze(encoder: nn.Module, train: Literal["head", "last", "all"], blocks: int) -> None:
    """Leave nothing, the last `blocks` stages, or all of the encoder to be trained."""
    names = stages_of(encoder)
    kept = min({"head": 0, "last": blocks, "all": len(names)}[train], len(names))
    free = {name for group in names[len(names) - kept :] for name in group}
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(train == "all" or name in free)


def rates(classifier: Classifier, backbone: float, decay: float) -> dict[nn.Module, float]:
    """Factors of the learning rate: 1 for the head, `backbone` for the encoder's last stage, and
    `decay` times that of the next for each stage before (arXiv 2106.08254, appendix).
    """
    found: dict[nn.Module, float] = {classifier.head: 1.0}
    for depth, names in enumerate(reversed(stages_of(classifier.encoder))):
        parameters = [classifier.encoder.get_parameter(name) for name in names]
        found[nn.ParameterList(parameters)] = backbone * decay**depth
    return found


class Supervised(nn.Module):
    """Cross entropy of a classifier, with the averaged weights (EMA) that are kept in the end.

    `mixup` and `cutmix` are the α of the Beta distributions of arXiv 1710.09412 and 1905.04899, 0
    without; where both are given, each step of each process draws one of them.
    """

    def __init__(
        self,
        classifier: Classifier,
        classes: int,
        label_smoothing: float = 0.0,
        ema: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        self.classifier, self.classes = classifier, classes
        self.label_smoothing, self.ema = label_smoothing, ema
        kinds = [v2.MixUp(alpha=mixup)] if mixup else []
        kinds += [v2.CutMix(alpha=cutmix)] if cutmix else []
        self.mix = v2.RandomChoice(kinds) if kinds else None
        self.averaged = copy.deepcopy(classifier).requires_grad_(False) if ema else None

    def forward(self, images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The loss of images [b, 3, h, w] with labels [b] that weigh `weights` [b]."""
        images, targets = self.mixed(images, labels, weights)
        return self.cross_entropy(self.classifier(images).float(), targets)

    def mixed(self, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets [b, classes] to train on."""
        targets = F.one_hot(labels, self.classes) * weights[:, None]
        return (images, targets) if self.mix is None else self.mix(images, targets)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        smooth = self.label_smoothing
        targets = (1 - smooth) * targets + smooth * targets.mean(1, keepdim=True)
        return -(targets * logits.log_softmax(1)).sum(1).mean()

    def final(self) -> Classifier:
        """The classifier to keep."""
        return self.classifier if self.averaged is None else self.averaged

    def train(self, mode: bool = True) -> "Supervised":
        super().train(mode)
        if self.averaged is not None:
            self.averaged.eval()
        return self

    def before_update(self, progress: float) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def after_update(self, progress: float) -> None:
        if self.averaged is None:
            return
        slow, fast = self.averaged.state_dict(), self.classifier.state_dict()
        floats = [k for k, v in slow.items() if v.is_floating_point()]
        torch._foreach_lerp_([slow[k] for k in floats], [fast[k] for k in floats], 1 - self.ema)
        if counts := [k for k, v in slow.items() if not v.is_floating_point()]:  # of batch norm
            torch._foreach_copy_([slow[k] for k in counts], [fast[k] for k in counts])


def probe(
    classifier: Classifier,
    pool: Pool,
    labels: npt.NDArray[np.int64],
    size: int,
    contest: Contest,
    c: float,
    weights: npt.NDArray[np.float32] | None = None,
) -> None:
    """Set the linear head to a logistic regression on the frozen encoder's outputs for the pool's
    images, each of which counts as much as its weight; rank 0 computes it, on every core, as
    launchers leave one thread to each of several.

    Outputs are scaled by their mean length, so that `c` means what it means on unit-length
    embeddings.
    """
    x = np.empty((len(pool), features(classifier.encoder)), np.float32)
    predict(classifier.encoder, pool, size, contest.mean, contest.std, x, what="probe")
    length = float(np.linalg.norm(x, axis=1).mean())
    if rank() == 0:
        with threadpool_limits(os.cpu_count() if world_size() > 1 else None):
            weight, bias = fit_linear(x / length, labels, contest.classes, c, weights=weights)
        with torch.no_grad():
            classifier.head.weight.copy_(torch.from_numpy(weight / length))  # type: ignore[operator]
            classifier.head.bias.copy_(torch.from_numpy(bias))  # type: ignore[operator]
    share(classifier.head)


def renew_statistics(
    kept: Classifier, trained: Classifier, pool: Pool, size: int, contest: Contest
) -> None:
    """Give the batch norms of `kept` the mean and variance of the pool's images, unaugmented and
    `size` pixels wide: precise batch norm (arXiv 2105.07576, section 3).  Those of training are of
    mixed and cropped images, of other sizes, and of weights that moved on.  What is frozen in
    `trained` stays, where torch's `update_bn` would reset it.  Batches are consecutive images, so
    that a pool in random order is expected.
    """
    trained.train()
    pairs = zip(kept.modules(), trained.modules(), strict=True)
    batch_norm = nn.modules.batchnorm._BatchNorm
    norms = [own for own, other in pairs if isinstance(own, batch_norm) and other.training]
    kept.eval()
    if not norms or len(pool) == 1:  # which has no variance
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # a plain mean over the batches, which are of about one size
    batch = math.ceil(len(pool) / math.ceil(len(pool) / 512))
    further = contest.mean, contest.std, slice(0, len(pool)), batch, False, "batch norm"
    for _ in outputs_of(kept, pool, size, *further):
        pass
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    kept.eval()


def load_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """A classifier in evaluation mode, and its metadata (encoder, head, mean, std, resolution)."""
    tensors, metadata = load_tensors(path)
    spec = metadata["encoder"]
    encoder = build_encoder(spec["name"], spec["stem"], **spec["options"])
    head = metadata["head"]
    classifier = Classifier(encoder, build_head(head["kind"], head["features"], head["classes"]))
    classifier.load_state_dict(tensors)
    return classifier.eval(), metadata
