"""Encoders: timm models without a classifier, with a stem that suits small images.

This file is copied whole into every submission.py, so it imports nothing of the project.
"""

from difflib import get_close_matches
from typing import Any, Literal

import timm
from torch import nn

Stem = Literal["imagenet", "low_stride", "cifar"]


def features(encoder: nn.Module) -> int:
    """The width d of the encoder's output [b, d]: in a VGG not that of its last feature map."""
    return int(getattr(encoder, "head_hidden_size", encoder.num_features))  # type: ignore[arg-type]


def build_encoder(name: str, stem: Stem = "imagenet", **options: Any) -> nn.Module:
    """A timm model that maps [b, 3, h, w] to [b, features(model)], randomly initialized.

    The stem is `imagenet` (as timm builds it), `low_stride` (first convolution 3×3 at stride 1, a
    max-pool after it stays) or `cifar` (3×3 at stride 1 and no max-pool).  `options` go to timm.
    Raises ValueError where timm has no such model, or the stem does not fit it, or `options` ask
    for pretrained weights: those come in through finetune.init, where they are marked.
    """
    if options.get("pretrained") or options.get("checkpoint_path"):
        raise ValueError("encoder.options may not ask for pretrained weights; finetune.init may")
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), 5)) or "timm.list_models()"
        raise ValueError(f"encoder {name!r} is not a timm model; near it: {near}")
    model: nn.Module = timm.create_model(name, num_classes=0, **options)
    if stem == "imagenet":
        return model
    path = str(getattr(model, "pretrained_cfg", {}).get("first_conv", ""))
    conv = model.get_submodule(path) if path else None
    if not isinstance(conv, nn.Conv2d) or conv.stride not in ((2, 2), (1, 1)):
        raise ValueError(
            f"stem {stem!r} does not fit {name}: its first layer is no convolution of stride 2"
        )
    if conv.stride == (1, 1):
        raise ValueError(f"stem {stem!r} does not fit {name}: its first layer has stride 1 already")
    parent, _, leaf = path.rpartition(".")
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    setattr(model.get_submodule(parent), leaf, small)
    if stem == "cifar":
        if not isinstance(getattr(model, "maxpool", None), nn.Module):
            raise ValueError(f"stem 'cifar' does not fit {name}: it has no max-pool to leave out")
        model.maxpool = nn.Identity()
    return model
