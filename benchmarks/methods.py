"""Milliseconds of a pretraining step of every method, beside the sum of its parts measured bare.

python -m benchmarks.methods [--methods MoCo BYOL --encoder resnet18 --size 96 --batch 128]
Ours is a step of the trainer of the stages, from packed data: gathering rows of a memory map, two
views, forward, backward, optimizer, after_update.  The peer's parts are forward and backward of the
encoder, of the head and of the loss, the optimizer's step and, with a slow copy, its forward and
its momentum update, which is one call of torch; each on ready-made tensors, those that the method
itself hands to its modules, in the same precision and memory format.  A round is one step and every
part once.  The figures in the last line are those of the worst method.
"""

import json
import statistics
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import pipeline.methods  # noqa: F401  (its files register themselves as subclasses of Method)
from pipeline.batches import prefetch
from pipeline.encoders import build_encoder
from pipeline.feed import Feed
from pipeline.machine import make_accelerator
from pipeline.memory import follow
from pipeline.methods.base import Method
from pipeline.optim import Optimizer, build_optimizer
from pipeline.packed import Pool
from pipeline.trainer import Trainer
from pipeline.views import View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = 2_000
SIZES: dict[str, dict[str, Any]] = {
    "BarlowTwins": {"output": 2048},
    "MoCo": {"queue": 4096},
    "SelfClassifier": {"classes": [1000, 2000]},
}
"""Arguments in whose place the default would be too large for a batch of this size."""
MOMENTUM_UPDATE = "momentum update"

Call = tuple[nn.Module, Tensor]
"""A module and what it is called with."""


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return 1e3 * (time.perf_counter() - began)


@torch.no_grad()
def recorded(
    method: Method, accelerator: Accelerator, views: list[Tensor], keys: list[Tensor]
) -> tuple[list[Call], Tensor, list[Tensor]]:
    """The calls that a step makes of encoder, head and slow copy; projections [v, b, d]; targets
    [t, b, d], none without a slow copy.
    """
    calls: list[Call] = []
    modules = [*method.children(), *getattr(method, "slow", ())]
    hooks = [m.register_forward_pre_hook(lambda m, x: calls.append((m, x[0]))) for m in modules]
    with accelerator.autocast():
        projections, targets = method.project(views), method.gathered_target(keys)
    for hook in hooks:
        hook.remove()
    return calls, projections.float(), [] if targets is None else [targets.float()]


def bare_parts(
    method: Method, optimizer: torch.optim.Optimizer, accelerator: Accelerator, ready: Any
) -> dict[str, Callable[[], object]]:
    """What a step consists of, by name; in this order the optimizer finds every gradient."""
    calls, projections, targets = recorded(method, accelerator, *ready)
    slow = getattr(method, "slow", None)
    copies = list(slow or ())
    of_encoder = [c for c in calls if c[0] is method.encoder]
    of_head = [c for c in calls if c[0] not in [method.encoder, *copies]]
    of_slow = [c for c in calls if c[0] in copies]

    def forward(calls: list[Call]) -> list[Tensor]:
        with accelerator.autocast():
            return [module(x) for module, x in calls]

    def both(calls: list[Call], grads: list[Tensor]) -> None:
        for _, x in calls:
            x.grad = None
        torch.autograd.backward(forward(calls), grads)

    def loss() -> None:
        projections.grad = None
        method.loss(torch.cat([projections, *targets])).backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def grads(calls: list[Call]) -> list[Tensor]:
        return [torch.randn_like(y) / y.numel() for y in forward(calls)]

    for leaf in [projections, *(x for _, x in of_head)]:  # the encoder's views need no gradient
        leaf.requires_grad_()
    parts: dict[str, Callable[[], object]] = {
        "encoder": partial(both, of_encoder, grads(of_encoder)),
        "head": partial(both, of_head, grads(of_head)),
        "loss": loss,
        "optimizer": update,
    }
    if slow is not None:
        fast = nn.ModuleList([method.encoder, method.projector])
        parts["slow copy"] = torch.no_grad()(partial(forward, of_slow))
        parts[MOMENTUM_UPDATE] = partial(follow, slow, fast, 0.999)
    return parts


def measure(
    kind: type[Method], encoder: str, pool: Pool, folder: Path, size: int, batch: int, rounds: int
) -> tuple[dict[str, float], float]:
    """Median milliseconds of a step (`ours`) and of each part; the median ratio of a round."""
    torch.manual_seed(0)
    accelerator = make_accelerator("auto", folder)
    method = kind(build_encoder(encoder), **SIZES.get(kind.__name__, {}))
    method.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(Optimizer(), {method: 1.0}, batch)
    feed = Feed(pool, [View()], batch, 0, MEAN, STD, accelerator, method=method)
    trainer = Trainer(method, optimizer, accelerator, folder, {}, feed, lambda _: 1e-3)
    parts = bare_parts(method, optimizer, accelerator, feed.inputs(feed.fetch(0), 0, size))

    def ours(step: int) -> None:
        trainer.step(prefetch(feed.fetch, step, step + 1), step, size, 0.5)

    measured = []
    for step in range(rounds + 1):
        works = {"ours": partial(ours, step), **parts}
        measured.append({name: milliseconds(work) for name, work in works.items()})
    del measured[0]  # to warm up
    medians = {name: statistics.median(m[name] for m in measured) for name in measured[0]}
    return medians, statistics.median(m["ours"] / (sum(m.values()) - m["ours"]) for m in measured)


def main() -> None:
    found = {kind.__name__: kind for kind in Method.__subclasses__()}
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=sorted(found), default=sorted(found))
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    o = parser.parse_args()
    rows, shares = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "unlabeled.npy"
        packed = np.lib.format.open_memmap(file, "w+", np.uint8, (IMAGES, 96, 96, 3))
        packed[:] = np.random.default_rng(0).integers(0, 256, packed.shape, np.uint8)
        pool = Pool([(np.load(file, mmap_mode="r"), np.arange(IMAGES))])
        for name in o.methods:
            medians, ratio = measure(
                found[name], o.encoder, pool, Path(folder), o.size, o.batch, o.rounds
            )
            ours = medians.pop("ours")
            rows.append((ratio, ours, sum(medians.values()), name))
            parts = ", ".join(f"{part} {ms:,.1f}" for part, ms in medians.items())
            share = ""
            if MOMENTUM_UPDATE in medians:
                shares.append(100 * medians[MOMENTUM_UPDATE] / ours)
                share = f"; momentum update {shares[-1]:.2f} % of a step"
            print(f"{name}: ours {ours:,.1f} ms; {parts}; ratio {ratio:.3f}{share}", flush=True)
    ratio, ours, peer, _ = max(rows)
    result = {"ours": round(ours, 1), "peer": round(peer, 1), "ratio": round(ratio, 3)}
    result |= {"unit": "ms", "methods": {name: round(r, 3) for r, _, _, name in rows}}
    result["momentum_update"] = round(max(shares), 2) if shares else None
    print(json.dumps({"benchmark": "methods", **result}))


if __name__ == "__main__":
    main()
