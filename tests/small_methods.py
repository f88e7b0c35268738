"""Every pretraining method found, small enough for a test, and its variants."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pipeline.methods  # noqa: F401  (registers them)
from pipeline.feed import Feed
from pipeline.methods.base import Method
from pipeline.packed import Pool
from pipeline.views import View

METHODS: dict[str, type[Method]] = {kind.__name__: kind for kind in Method.__subclasses__()}
"""By class name: a new file is tested without being named."""
SMALL = {"hidden": 8, "output": 5, "queue": 12, "prototypes": 7, "classes": [5, 9], "bn_group": 2}
"""What makes a method small, where its signature has an argument of that name."""
LOCAL = View(2, size=0.75)
VARIANTS: dict[str, tuple[str, dict[str, Any], list[View]]] = {
    name: (name, {}, [View()]) for name in METHODS
} | {
    "SimCLR, decoupled": ("SimCLR", {"decoupled": True}, [View()]),
    "SimCLR, three views": ("SimCLR", {}, [View(3)]),
    "MoCo, symmetric": ("MoCo", {"symmetric": True, "queue": 11, "final_momentum": 1.0}, [View()]),
    "SwAV, local views": ("SwAV", {"queue": 0}, [View(), LOCAL]),
    "SwAV, queue": ("SwAV", {"queue": 12, "queue_start": 0.0, "freeze": 0.4}, [View()]),
    "SelfClassifier, local views": ("SelfClassifier", {}, [View(), LOCAL]),
    "BYOL, local views": ("BYOL", {}, [View(), LOCAL]),
}
"""Method, arguments, views."""


class SmallEncoder(nn.Module):
    num_features = 8

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(6, 8, 3, bias=False),
            nn.BatchNorm2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).relu().mean((2, 3))  # type: ignore[no-any-return]


def small(name: str, encoder: nn.Module | None = None, **arguments: Any) -> Method:
    """The method of a class name, at its default arguments but for size."""
    known = inspect.signature(METHODS[name]).parameters
    sizes = {key: value for key, value in SMALL.items() if key in known}
    return METHODS[name](encoder or SmallEncoder(), **(sizes | arguments))


def built(variant: str, dropout: float = 0.0) -> Method:
    """A variant in float64, the same at each call."""
    name, arguments, _ = VARIANTS[variant]
    torch.manual_seed(3)
    return small(name, SmallEncoder(dropout), **arguments).double()


def feed_of(
    variant: str, method: Method, batch: int, rank: int, ranks: int, micro: int | None = None
) -> Feed:
    """Batches of random images for one of several processes."""
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    pool = Pool([(images, np.arange(len(images)))])
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), num_processes=ranks, process_index=rank, mixed_precision="no"
    )
    views = VARIANTS[variant][2]
    return Feed(pool, views, batch, 5, [0.5] * 3, [0.25] * 3, accelerator, (), method, micro)


def reader(feed: Feed, step: int) -> Callable[[int], tuple[list[Tensor], list[Tensor]]]:
    """The views of each reading of a step, in float64."""

    def inputs(reading: int) -> tuple[list[Tensor], list[Tensor]]:
        tick = step * feed.ticks + reading
        queried, keyed = feed.inputs(feed.fetch(tick), tick, 16)
        return [v.double() for v in queried], [v.double() for v in keyed]  # type: ignore[attr-defined]

    return inputs


def state(method: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Loss, every gradient and every buffer."""
    named = {f"gradient of {n}": p.grad for n, p in method.named_parameters()}
    found = {n: g.clone() for n, g in named.items() if g is not None}
    found |= {f"buffer {n}": b.clone() for n, b in method.named_buffers()}
    return found | {"loss": loss.detach()}
