"""Milliseconds of forward and backward of a ResNet with `fast_convolutions`, beside torch's own.

python -m benchmarks.convolutions [--encoder resnet18 --sizes 32 48 64 96 --batch 128 --rounds 5]
Both in the machine's own precision on every core, in turns, on the same images; the sums of the
sizes are what is printed last.  Only a CPU with bf16 has any to gain.
"""

import copy
import json
import statistics
import time
from argparse import ArgumentParser

import torch
from torch import nn

from pipeline.convolutions import fast_convolutions
from pipeline.encoders import build_encoder
from pipeline.views import matmul_dtype

CPU = torch.device("cpu")


def milliseconds(encoder: nn.Module, images: torch.Tensor) -> float:
    began = time.perf_counter()
    dtype = matmul_dtype(CPU)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = encoder(images).float().square().mean()
    loss.backward()
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 48, 64, 96])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    torch.manual_seed(0)
    plain = build_encoder(o.encoder).to(memory_format=torch.channels_last)
    fast = fast_convolutions(copy.deepcopy(plain))
    of_sizes = []
    for size in o.sizes:
        images = torch.randn(o.batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        for encoder in (fast, plain):
            milliseconds(encoder, images)
        pairs = [[milliseconds(e, images) for e in (fast, plain)] for _ in range(o.rounds)]
        ours, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{size} px: ours {ours:.0f} ms, torch {peer:.0f} ms, ratio {ours / peer:.2f}")
        of_sizes.append((ours, peer))
    ours, peer = (sum(column) for column in zip(*of_sizes, strict=True))
    found = {"ours": round(ours, 1), "peer": round(peer, 1), "ratio": round(ours / peer, 3)}
    print(json.dumps({"benchmark": "convolutions", **found, "unit": "ms"}))


if __name__ == "__main__":
    main()
