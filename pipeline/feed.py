"""What a step is fed: its images, gathered ahead by a thread, and their views, made on the
device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline import InputError
from pipeline.batches import batch_at, slice_of
from pipeline.methods.base import Method
from pipeline.packed import Pool
from pipeline.views import View, Views, uniforms

Fetched = tuple[Tensor, ...]
"""Images [b, h, w, 3] uint8 and what is random in their views, then their targets, or the same two
for the method's slow copy.
"""


@dataclass
class Feed:
    """Batches of a pool as a pure function of (seed, step); each process sees its slice of them.

    `mean` and `std` normalize values from 0 to 1.  With `targets`, tensors [n] with an
    entry for each image of the pool, a batch is (images, *targets), else it is the views that
    `method` is called with, all of them without a method.  With `micro_batch` (images over all
    processes) a step has several parts, each read twice: a tick is one reading of one part.
    """

    pool: Pool
    views: Sequence[View]
    batch_size: int
    seed: int
    mean: Sequence[float]
    std: Sequence[float]
    accelerator: Accelerator
    targets: tuple[Tensor, ...] = ()
    method: Method | None = None
    micro_batch: int | None = None
    labels: Tensor | None = None
    """Of the images of the pool [n], -1 unknown, for a method that learns from them."""
    choose: Callable[[int], npt.NDArray[np.int64]] | None = None
    """The positions of a step's images; None takes `batches.batch_at`."""

    def __post_init__(self) -> None:
        a, part = self.accelerator, self.micro_batch or self.batch_size
        if self.batch_size % part:
            raise InputError(
                f"pretrain: batch_size is {self.batch_size} and micro_batch {part}; a multiple of "
                f"micro_batch is expected"
            )
        if part % a.num_processes:
            name = "micro_batch" if self.micro_batch else "batch_size"
            raise InputError(
                f"{name} is {part} over {a.num_processes} processes; a multiple of their number is "
                f"expected"
            )
        self.parts = self.batch_size // part
        self.ticks = 1 if self.parts == 1 else 2 * self.parts
        group, own = self.method.group if self.method else 1, part // a.num_processes
        if group > 1 and self.batch_size < 2 * group:
            raise InputError(
                f"{type(self.method).__name__}: batch norm is over groups of {group} images and "
                f"batch_size is {self.batch_size}; two groups or more are expected"
            )
        if own < self.batch_size and own % group:
            raise InputError(
                f"{type(self.method).__name__}: batch norm is over groups of {group} images, but a "
                f"process takes {own} at a time; a multiple is expected"
            )
        choose = self.choose or partial(batch_at, len(self.pool), self.batch_size, self.seed)
        self.chosen = lru_cache(maxsize=4)(choose)  # the parts of a step ask for the same
        self.device: torch.device = a.device
        mine = slice_of(part, a.process_index, a.num_processes)
        self.places = [np.arange(start, start + part)[mine] for start in self.starts]
        order = self.method.target_order(self.batch_size) if self.method else None
        self.order = None if order is None else order.numpy()
        self.count = sum(view.count for view in self.views)
        if self.method is not None and self.method.queried is not None:
            used = len({*self.method.queried, *self.method.keyed})
            if self.count != used:
                raise InputError(
                    f"{type(self.method).__name__} takes {used} views of an image; {self.count} "
                    f"are in the recipe"
                )
        dtype = torch.bfloat16 if a.mixed_precision == "bf16" else torch.float32
        self.make = Views(self.views, self.mean, self.std, dtype)

    @property
    def starts(self) -> range:
        """Where the parts of a batch begin."""
        return range(0, self.batch_size, self.batch_size // self.parts)

    def fetch(self, tick: int) -> Fetched:
        """What the step and part of `tick` need, on the device."""
        step, reading = divmod(tick, self.ticks)
        places = self.places[reading % self.parts]
        own = self._images(step, places)
        if self.targets:
            chosen = self.chosen(step)[places]
            return *own, *(self._on_device(of_pool[chosen]) for of_pool in self.targets)
        if self.order is None or reading >= self.parts:  # the slow copy sees them once
            return own
        return *own, *self._images(step, self.order[places])

    def labels_of(self, step: int) -> Tensor | None:
        """The labels [batch_size] of the whole batch of a step, where there are any."""
        if self.labels is None:
            return None
        return self._on_device(self.labels[self.chosen(step)])

    def inputs(self, fetched: Fetched, tick: int, resolution: int) -> tuple[object, ...]:
        """The module's arguments: augmented, normalized, in the layout convolutions like."""
        images, drawn, *others = fetched
        if self.targets:
            return self._views(images, drawn, resolution, [0])[0], *others
        reading = tick % self.ticks
        queried, keyed = None, list[int]()
        if self.method is not None:
            queried, keyed = self.method.queried, list(self.method.keyed)
        queried = list(range(self.count) if queried is None else queried)
        if others:
            views = self._views(images, drawn, resolution, queried)
            return views, self._views(others[0], others[1], resolution, keyed)
        if reading >= self.parts or self.order is not None:
            return self._views(images, drawn, resolution, queried), []
        needed = sorted({*queried, *keyed})
        made = dict(zip(needed, self._views(images, drawn, resolution, needed), strict=True))
        return [made[k] for k in queried], [made[k] for k in keyed]

    def _images(self, step: int, places: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(self.pool.gather(self.chosen(step)[places]))
        u = _uniforms(self.seed, step, self.batch_size, self.count)[:, places]
        return self._on_device(images), self._on_device(self.make.draw(u, *images.shape[1:3]))

    def _on_device(self, tensor: Tensor) -> Tensor:
        """A copy that nothing waits for."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _views(
        self, images: Tensor, drawn: Tensor, resolution: int, only: list[int]
    ) -> list[Tensor]:
        views = self.make(images, drawn, resolution, only)
        return [v.contiguous(memory_format=torch.channels_last) for v in views]


_uniforms = lru_cache(maxsize=2)(uniforms)


@dataclass
class JoinedFeed:
    """Two feeds as one: a batch of labeled images and targets, then one of views of unlabeled
    images.
    """

    labeled: Feed
    unlabeled: Feed
    parts = ticks = 1

    @property
    def batch_size(self) -> int:
        """Labeled images in a step."""
        return self.labeled.batch_size

    @property
    def seed(self) -> int:
        return self.labeled.seed

    def fetch(self, tick: int) -> tuple[Fetched, Fetched]:
        return self.labeled.fetch(tick), self.unlabeled.fetch(tick)

    def inputs(
        self, fetched: tuple[Fetched, Fetched], tick: int, resolution: int
    ) -> tuple[object, ...]:
        """The images, their targets, and the views of the unlabeled images."""
        labeled, unlabeled = fetched
        views, _ = self.unlabeled.inputs(unlabeled, tick, resolution)
        return *self.labeled.inputs(labeled, tick, resolution), views
