"""Images per second of pretraining from packed data, beside the bare model step on ready-made
tensors.

python -m benchmarks.training [--encoder resnet18 --size 96 --batch 128 --steps 6]
Both sides take the same model, loss, optimizer and precision on every core.  Ours is the trainer of
the stages: gathering rows of a memory map, two SimCLR views, the step.  The peer repeats the step
on one batch of views that is made beforehand.  The two are timed in turns.
"""

import json
import statistics
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch

from pipeline.batches import prefetch
from pipeline.encoders import build_encoder
from pipeline.feed import Feed
from pipeline.machine import make_accelerator
from pipeline.methods.simclr import SimCLR
from pipeline.optim import Optimizer, build_optimizer
from pipeline.packed import Pool
from pipeline.trainer import Trainer
from pipeline.views import View

ROUNDS = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = 20_000


def wait() -> None:
    """For what is queued on a GPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "unlabeled.npy"
        packed = np.lib.format.open_memmap(file, "w+", np.uint8, (IMAGES, 96, 96, 3))
        block = np.random.default_rng(0).integers(0, 256, (1000, 96, 96, 3), np.uint8)
        for start in range(0, IMAGES, len(block)):
            packed[start : start + len(block)] = block
        pool = Pool([(np.load(file, mmap_mode="r"), np.arange(IMAGES))])
        accelerator = make_accelerator("auto", Path(folder))
        method = SimCLR(build_encoder(o.encoder)).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(Optimizer(), {method: 1.0}, o.batch)

        feed = Feed(pool, [View()], o.batch, 0, MEAN, STD, accelerator, method=method)
        trainer = Trainer(method, optimizer, accelerator, Path(folder), {}, feed, lambda _: 1e-3)
        ready = feed.inputs(feed.fetch(0), 0, o.size)

        def ours(turn: int) -> float:
            first = turn * o.steps
            began = time.perf_counter()
            fetched = prefetch(feed.fetch, first, first + o.steps)
            for step in range(first, first + o.steps):
                trainer.step(fetched, step, o.size, 0.5)
            wait()
            return o.steps * o.batch / (time.perf_counter() - began)

        def bare() -> float:
            began = time.perf_counter()
            for _ in range(o.steps):
                with accelerator.autocast():
                    loss = method(*ready)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            wait()
            return o.steps * o.batch / (time.perf_counter() - began)

        bare(), ours(0)
        pairs = [(ours(k), bare()) for k in range(ROUNDS)]
    for a, b in pairs:
        print(f"ours {a:,.1f} images/s, bare step {b:,.1f} images/s, ratio {a / b:.3f}")
    a, b = (statistics.median(p[k] for p in pairs) for k in (0, 1))
    ratio = round(statistics.median(x / y for x, y in pairs), 3)
    found = {"ours": round(a, 1), "peer": round(b, 1), "ratio": ratio, "unit": "images/s"}
    print(json.dumps({"benchmark": "training", **found}))


if __name__ == "__main__":
    main()
