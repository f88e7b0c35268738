"""Images per second that prepare packs, beside what bare Pillow decodes on every core.

python -m benchmarks.packing [--pictures 1000]
Ours is stages.prepare from listing to contest.json: decoding, hashing, statistics and duplicates
included.  The peer is one core decoding the same PNGs to arrays with Pillow alone, times the number
of cores.  Every picture stands eight times in the contest, so that starting up weighs little.  A
round writes 0.2 GB, into memory that the last one gave back: a virtual machine that has to ask its
host for more pays for each page (with --pictures 4000 ours loses a tenth by that on such a machine,
the peer, which writes nothing, none).  The machine has to be at rest: other work takes a core from
ours, and none from the peer.
"""

import contextlib
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import config
from stages import prepare

COPIES = 8
ROUNDS = 9  # taken in turns; the median counts


def make_images(root: Path, pictures: int) -> None:
    """A contest of PNGs that compress as photographs do: smooth shapes under noise."""
    rng = np.random.default_rng(0)
    for split, count, copies in (("unlabeled", pictures, COPIES), ("train", 20, 1)):
        (root / split).mkdir(parents=True)
        for n in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
            smooth = np.asarray(coarse.resize((96, 96), Image.Resampling.BICUBIC), np.int16)
            noisy = smooth + rng.integers(-6, 7, smooth.shape, np.int16)
            file = root / split / f"{n}.png"
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, compress_level=1)
            for copy in range(1, copies):
                (root / split / f"{n + copy * count}.png").hardlink_to(file)
    torch.save(torch.arange(20) % 2, root / "train_label_tensor.pt")


def bare_rate(files: list[Path]) -> float:
    """Images per second that one core decodes with Pillow."""
    began = time.perf_counter()
    for file in files:
        with Image.open(file) as image:
            np.asarray(image.convert("RGB"))
    return len(files) / (time.perf_counter() - began)


def our_rate(root: Path, images: int, workers: int, contest: str) -> float:
    """Images per second that prepare packs with `workers` processes."""
    argv = ["--data.root", str(root), "--data.contest", contest, "--data.workers", str(workers)]
    recipe, _, plain = config.parse(prepare.__doc__, argv=argv)
    shutil.rmtree("data", ignore_errors=True)  # just before it is needed again
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.run(recipe, plain)
    return images / (time.perf_counter() - began)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    pictures = parser.parse_args().pictures
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        root = Path("contest")
        make_images(root, pictures)
        images = pictures * COPIES + 20
        files = sorted((root / "unlabeled").iterdir())[: 4 * pictures]
        bare_rate(files)  # once, for the file cache
        pairs = []
        for k in range(ROUNDS):
            one, ours = bare_rate(files), our_rate(root, images, cores, f"c{k}")
            print(f"prepare: {ours:,.0f} images/s; bare Pillow on one core: {one:,.0f} images/s")
            pairs.append((ours, cores * one))
    a, b = (statistics.median(p[k] for p in pairs) for k in (0, 1))
    ratio = round(statistics.median(x / y for x, y in pairs), 3)
    found = {"ours": round(a, 1), "peer": round(b, 1), "ratio": ratio, "unit": "images/s"}
    print(json.dumps({"benchmark": "packing", **found}))


if __name__ == "__main__":
    main()
