"""A classifier is an encoder and a head; which of its parts are trained, and its loss."""

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.checkpoint import load_tensors, save_tensors
from pipeline.encoders import build_encoder, features
from pipeline.inference import predict
from pipeline.manifest import Contest
from pipeline.metrics import fit_linear
from pipeline.packed import Pool


def build_head(kind: str, features: int, classes: int) -> nn.Module:
    """A linear layer, or an MLP with one hidden layer as wide as the features; [b, d] to [b, k]."""
    if kind == "linear":
        return nn.Linear(features, classes)
    hidden = nn.Linear(features, features, bias=False)
    norm = nn.BatchNorm1d(features)
    return nn.Sequential(hidden, norm, nn.ReLU(inplace=True), nn.Linear(features, classes))


class Classifier(nn.Module):
    """Images [b, 3, h, w] to logits [b, classes]."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "Classifier":
        """Batch norms whose weights are frozen keep their statistics."""
        super().train(mode)
        for module in self.encoder.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                module.eval()
        return self


def freeze(encoder: nn.Module, train: Literal["head", "last", "all"], blocks: int) -> None:
    """Leave nothing, the last `blocks` stages (as timm groups them), or all of the encoder to be
    trained.
    """
    groups = group_parameters(encoder, encoder.group_matcher(coarse=True))  # type: ignore[operator]
    names = [list(g) if isinstance(g, (list, tuple)) else [g] for _, g in sorted(groups.items())]
    kept = min({"head": 0, "last": blocks, "all": len(names)}[train], len(names))
    free = {name for group in names[len(names) - kept :] for name in group}
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(train == "all" or name in free)


class Supervised(nn.Module):
    """Cross entropy of a classifier, with the averaged weights (EMA) that are kept in the end."""

    def __init__(self, classifier: Classifier, label_smoothing: float, ema: float) -> None:
        super().__init__()
        self.classifier, self.label_smoothing, self.ema = classifier, label_smoothing, ema
        self.averaged = copy.deepcopy(classifier).requires_grad_(False) if ema else None

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        logits = self.classifier(images).float()
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

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
        for key in slow.keys() - set(floats):
            slow[key].copy_(fast[key])


def probe(
    classifier: Classifier,
    pool: Pool,
    labels: npt.NDArray[np.int64],
    size: int,
    contest: Contest,
    c: float,
) -> None:
    """Set the linear head to a logistic regression on the frozen encoder's outputs for the pool's
    images.

    Outputs are scaled by their mean length, so that `c` means what it means on unit-length
    embeddings.
    """
    x = np.empty((len(pool), features(classifier.encoder)), np.float32)
    predict(classifier.encoder, pool, size, contest.mean, contest.std, x, what="probe")
    length = float(np.linalg.norm(x, axis=1).mean())
    weight, bias = fit_linear(x / length, labels, contest.classes, c)
    with torch.no_grad():
        classifier.head.weight.copy_(torch.from_numpy(weight / length))  # type: ignore[operator]
        classifier.head.bias.copy_(torch.from_numpy(bias))  # type: ignore[operator]


def save_classifier(path: Path, classifier: Classifier, metadata: dict[str, Any]) -> None:
    """Write the weights; `metadata` as `load_classifier` reads it (encoder, head, mean, std,
    resolution).
    """
    save_tensors(path, classifier.state_dict(), metadata)


def load_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """A classifier in evaluation mode, and its metadata."""
    tensors, metadata = load_tensors(path)
    spec = metadata["encoder"]
    encoder = build_encoder(spec["name"], spec["stem"], **spec["options"])
    head = metadata["head"]
    classifier = Classifier(encoder, build_head(head["kind"], head["features"], head["classes"]))
    classifier.load_state_dict(tensors)
    return classifier.eval(), metadata
