"""Classifiers: their loss, which parts learn at which rate, and draws that balance classes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from pipeline.classifiers import (
    Classifier,
    Supervised,
    build_head,
    freeze,
    rates,
    stages_of,
)
from pipeline.draws import balanced
from pipeline.encoders import build_encoder


class Mean(nn.Module):
    """Images to their mean color."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def supervised(**options: float) -> Supervised:
    torch.manual_seed(0)
    return Supervised(Classifier(Mean(), nn.Linear(3, 4)), 4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_cross_entropy_weighted(smoothing: float) -> None:
    module, images, labels = (
        supervised(label_smoothing=smoothing),
        torch.rand(6, 3, 2, 2),
        torch.tensor([0, 3, 1, 1, 2, 0]),
    )
    logits = module.classifier(images)
    each = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(module(images, labels, torch.ones(6)), each.mean())
    weights = torch.tensor([1, 0.5, 0, 0.2, 1, 0.3])
    torch.testing.assert_close(module(images, labels, weights), (weights * each).mean())


@pytest.mark.parametrize(("name", "kind"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_mixed_images_have_mixed_targets(name: str, kind: type[v2.Transform]) -> None:
    module, images = supervised(**{name: 0.7}), torch.rand(6, 3, 8, 8)
    labels, weights = torch.tensor([0, 3, 1, 1, 2, 0]), torch.rand(6)
    targets = F.one_hot(labels, 4) * weights[:, None]
    torch.manual_seed(1)
    torch.multinomial(torch.ones(1), 1)  # as one of one kinds is drawn
    mixed, soft = kind(alpha=0.7)(images, targets)
    torch.manual_seed(1)
    got = module(images, labels, weights)
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(got, -(soft * module.classifier(mixed).log_softmax(1)).sum(1).mean())


def test_rates_fall_from_the_head_to_the_stem() -> None:
    encoder = build_encoder("resnet10t")
    classifier = Classifier(encoder, build_head("linear", 512, 3))
    found = rates(classifier, 0.1, 0.5)
    factor = {id(p): f for module, f in found.items() for p in module.parameters()}
    assert len(factor) == len(list(classifier.parameters()))
    assert sum(len(list(m.parameters())) for m in found) == len(factor)
    of = {name: factor[id(p)] for name, p in classifier.named_parameters()}
    assert of["head.weight"] == 1
    for depth, stage in enumerate(["layer4", "layer3", "layer2", "layer1"]):
        assert of[f"encoder.{stage}.0.conv1.weight"] == pytest.approx(0.1 * 0.5**depth)
    assert of[f"encoder.{stages_of(encoder)[0][0]}"] == pytest.approx(0.1 * 0.5**4)


@pytest.mark.parametrize(
    ("name", "last"),
    [("test_convnext", "stages.3"), ("test_vit", "blocks.5"), ("resnet10t", "layer4")],
)
def test_the_last_stage_is_more_than_a_norm(name: str, last: str) -> None:
    """What is free learns as in training, dropout and all; what is frozen does not move."""
    encoder = build_encoder(name)
    freeze(encoder, "last", 1)
    classifier = Classifier(encoder, build_head("linear", 8, 3)).train()
    free = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert {n for n, _ in encoder.named_parameters() if n.startswith(last)} <= free
    assert all(part.training for part in encoder.get_submodule(last).modules())
    before = copy.deepcopy(encoder.state_dict())
    classifier.encoder(torch.randn(4, 3, 160, 160)).sum().backward()
    moved = {n for n, v in encoder.state_dict().items() if not torch.equal(v, before[n])}
    assert all(n.startswith(last) for n in moved)


def test_the_head_computes_in_float32() -> None:
    """In bf16 logits would be equal where they are not."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    classifier = Classifier(encoder, build_head("linear", 8, 50))
    x = torch.randn(64, 3, 2, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, features = classifier(x), encoder(x)
    assert (found.dtype, features.dtype) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(found, classifier.head(features.float()))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_balanced_draws_see_classes_alike(labels: list[int]) -> None:
    found = balanced(np.array(labels))
    counts = np.bincount(np.array(labels)[found])
    largest = np.bincount(labels).max()
    assert set(counts[counts > 0].tolist()) == {largest}
    assert (np.diff(found) >= 0).all()
    times = np.bincount(found, minlength=len(labels))
    assert times.min() >= 1  # every image
    for k in set(labels):
        of = times[np.array(labels) == k]
        assert of.max() - of.min() <= 1
