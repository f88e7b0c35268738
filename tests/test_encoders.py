"""Every encoder with each stem that makes sense; a stem that does not fit is refused by name."""

import pytest
import torch
from torch import nn

from pipeline.encoders import build_encoder, features
from pipeline.methods.simclr import SimCLR

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101"]
FITTING = [(name, stem) for name in RESNETS for stem in ("imagenet", "low_stride", "cifar")]
FITTING += [("rexnet_150", "imagenet"), ("rexnet_150", "low_stride"), ("vgg16", "imagenet")]
VIT = {"img_size": 64, "patch_size": 8, "dynamic_img_size": True}


@pytest.mark.parametrize(("name", "stem"), FITTING)
def test_an_encoder_gives_as_many_features_as_it_says(name: str, stem: str) -> None:
    encoder = build_encoder(name, stem).eval()  # type: ignore[arg-type]
    for size in (32, 64):
        with torch.no_grad():
            assert encoder(torch.zeros(1, 3, size, size)).shape == (1, features(encoder))


@pytest.mark.parametrize("name", ["rexnet_150", "vgg16", "vit_tiny_patch16_224"])
def test_other_kinds_of_encoders_learn(name: str) -> None:
    """A step of SimCLR moves nearly all weights."""
    encoder = build_encoder(name, **(VIT if name.startswith("vit") else {}))
    method = SimCLR(encoder, hidden=16, output=8)
    before = {k: v.clone() for k, v in encoder.named_parameters()}
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    method([torch.randn(2, 3, 32, 32) for _ in range(2)]).backward()
    optimizer.step()
    moved = [not torch.equal(v, before[k]) for k, v in encoder.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)


def test_a_small_vit() -> None:
    encoder = build_encoder("vit_tiny_patch16_224", **VIT).eval()
    for size in (32, 64):
        assert encoder(torch.zeros(1, 3, size, size)).shape == (1, features(encoder))


@pytest.mark.parametrize(
    ("name", "stem", "why"),
    [
        ("rexnet_150", "cifar", "it has no max-pool to leave out"),
        ("vgg16", "low_stride", "its first layer has stride 1 already"),
        ("vit_tiny_patch16_224", "cifar", "its first layer is no convolution of stride 2"),
    ],
)
def test_a_stem_that_does_not_fit_is_refused_by_name(name: str, stem: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"stem '{stem}' does not fit {name}: {why}"):
        build_encoder(name, stem)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stem", "stride", "pooled"), [("low_stride", 2, True), ("cifar", 1, False)]
)
def test_small_stems_keep_pixels(stem: str, stride: int, pooled: bool) -> None:
    encoder = build_encoder("resnet18", stem)  # type: ignore[arg-type]
    assert (encoder.conv1.kernel_size, encoder.conv1.stride) == ((3, 3), (1, 1))  # type: ignore[union-attr]
    assert isinstance(encoder.maxpool, nn.MaxPool2d) == pooled
    stem_output = encoder.maxpool(
        encoder.act1(encoder.bn1(encoder.conv1(torch.zeros(1, 3, 32, 32))))
    )  # type: ignore[operator]
    assert stem_output.shape[-1] == 32 // stride


def test_pretrained_weights_are_no_option() -> None:
    with pytest.raises(ValueError, match="may not ask for pretrained weights"):
        build_encoder("resnet18", pretrained=True)
    with pytest.raises(ValueError, match="may not ask for pretrained weights"):
        build_encoder("resnet18", checkpoint_path="outside.pth")
    with pytest.raises(ValueError, match="'resnet19' is not a timm model; near it: resnet"):
        build_encoder("resnet19")
