"""Milliseconds of NT-Xent forward and backward by blocks of rows, beside plain autograd on the
whole matrix of similarities, and the peak memory of both.

python -m benchmarks.nt_xent [--images 32 64 128 256 1024 4096 --width 128 --block 512]
Two views of each image; the two sides are timed in turns.  Memory is the growth of the resident set
at its peak (VmHWM), each side in a process of its own that has done the same at a small size
before.  The figures in the last line are those of the last size.
"""

import json
import statistics
import time
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from pipeline.contrastive import BLOCK, nt_xent

PLAIN = 0
TEMPERATURE = 0.5
SECONDS = 8
"""How long a size is measured, about; at least five pairs, at most 200."""


def projections(images: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, images, width, generator=generator).requires_grad_()


def seconds(x: torch.Tensor, block: int) -> float:
    x.grad = None
    began = time.perf_counter()
    nt_xent(x, TEMPERATURE, block=block).backward()
    return time.perf_counter() - began


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(w.split()[1]) / 1024 for w in lines if w.startswith(field))


def peak(images: int, width: int, block: int) -> float:
    """MiB that one forward and backward add to the resident set at its peak."""
    x = projections(images, width)
    seconds(projections(16, width), block)  # libraries and their buffers come into memory
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    seconds(x, block)
    return resident("VmHWM") - before


def peak_alone(images: int, width: int, block: int) -> float:
    """`peak` in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak, images, width, block).result()


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[32, 64, 128, 256, 1024, 4096])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block", type=int, default=BLOCK)
    o = parser.parse_args()
    for images in o.images:
        x = projections(images, o.width)
        once = seconds(x, o.block) + seconds(x, PLAIN)
        rounds = max(5, min(200, round(SECONDS / once)))
        pairs = [(1e3 * seconds(x, o.block), 1e3 * seconds(x, PLAIN)) for _ in range(rounds)]
        ours, peer = (statistics.median(p[k] for p in pairs) for k in (0, 1))
        ratio = statistics.median(a / b for a, b in pairs)
        memory = [peak_alone(images, o.width, block) for block in (o.block, PLAIN)]
        print(
            f"{2 * images:,} rows: blocks {ours:,.2f} ms, plain {peer:,.2f} ms, ratio {ratio:.2f};"
            f" blocks {memory[0]:,.1f} MiB, plain {memory[1]:,.1f} MiB",
            flush=True,
        )
    found = {"ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ratio, 3), "unit": "ms"}
    found |= {"memory_ours": round(memory[0], 1), "memory_peer": round(memory[1], 1)}
    print(json.dumps({"benchmark": "nt_xent", **found}))


if __name__ == "__main__":
    main()
