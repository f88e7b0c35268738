"""What a step is fed: its images, gathered ahead by a thread, and their views, made on the
device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline import InputError
from pipeline.batches import batch_at, slice_of
from pipeline.packed import Pool
from pipeline.views import View, Views, uniforms


@dataclass
class Feed:
    """Batches of a pool as a pure function of (seed, step); each process sees its slice of them.

    `mean` and `std` normalize values from 0 to 1.  With `targets` [n], one for each image of the
    pool, a batch is (images, targets), else it is (list of views,).
    """

    pool: Pool
    views: Sequence[View]
    batch_size: int
    seed: int
    mean: Sequence[float]
    std: Sequence[float]
    accelerator: Accelerator
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        a = self.accelerator
        if self.batch_size % a.num_processes:
            raise InputError(
                f"batch_size is {self.batch_size} over {a.num_processes} processes; a multiple of "
                f"their number is expected"
            )
        self.mine = slice_of(self.batch_size, a.process_index, a.num_processes)
        self.count = sum(view.count for view in self.views)
        dtype = torch.bfloat16 if a.mixed_precision == "bf16" else torch.float32
        self.make = Views(self.views, self.mean, self.std, dtype)

    def fetch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The images [b, h, w, 3] uint8 of `step` and their targets, on the device."""
        chosen = batch_at(len(self.pool), self.batch_size, self.seed, step)[self.mine]
        images, device = torch.from_numpy(self.pool.gather(chosen)), self.accelerator.device
        if device.type == "cuda":
            images = images.pin_memory()
        targets = None if self.targets is None else self.targets[chosen].to(device)
        return images.to(device, non_blocking=True), targets

    def inputs(
        self, fetched: tuple[Tensor, Tensor | None], step: int, resolution: int
    ) -> tuple[list[Tensor]] | tuple[Tensor, Tensor]:
        """The module's arguments: augmented, normalized, in the layout convolutions like."""
        images, targets = fetched
        u = uniforms(self.seed, step, self.batch_size, self.count)[:, self.mine]
        views = self.make(images, u, resolution)
        views = [v.contiguous(memory_format=torch.channels_last) for v in views]
        return (views,) if targets is None else (views[0], targets)
