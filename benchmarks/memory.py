"""Anonymous memory of pretraining on 200,000 packed images, beside that on 20,000.

python -m benchmarks.memory [--large 200000 --small 20000]
The stage itself runs in a process of its
own on a contest of zeros (a sparse file); its peak RssAnon is read from /proc while it trains.
What it maps of the packed file is not anonymous.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np

from pipeline.manifest import PREPARED, Manifest, write_manifest
from pipeline.runs import sha256, write_json

ROOT = Path(__file__).parents[1]


def make_contest(folder: Path, images: int) -> None:
    """A prepared contest of `images` black pictures with digests of the usual length."""
    manifests, data = folder / "data_manifests" / "c", folder / "data" / "c"
    manifests.mkdir(parents=True)
    data.mkdir(parents=True)
    packed = data / "unlabeled.npy"
    np.lib.format.open_memmap(packed, "w+", np.uint8, (images, 96, 96, 3))
    names, digests = (
        [f"unlabeled/{k}.png" for k in range(images)],
        [f"{k:064x}" for k in range(images)],
    )
    manifest = Manifest.of("unlabeled", np.arange(images), file=names, sha256=digests)
    write_manifest(manifests / "unlabeled.csv", manifest, PREPARED)
    split = {
        "images": images,
        "usable": images,
        "manifest": "unlabeled.csv",
        "manifest_sha256": sha256(manifests / "unlabeled.csv"),
    }
    facts = {"contest": "c", "root": "given", "layout": "contest", "rehearsal": False}
    facts |= {"size": [96, 96], "classes": 2, "class_names": None, "skipped": [], "duplicates": {}}
    facts |= {"mean": [0.5] * 3, "std": [0.25] * 3, "splits": {"unlabeled": split}}
    write_json(manifests / "contest.json", facts)


def peak(folder: Path, options: list[str]) -> float:
    """Peak RssAnon in MiB of the pretraining stage in `folder`."""
    own = ["--data.contest", "c", "--pretrain.splits", "[unlabeled]"]
    command = [sys.executable, "-m", "stages.pretrain", *own, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    highest = 0.0
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            anonymous = [w.split()[1] for w in status.splitlines() if w.startswith("RssAnon")]
            highest = max(highest, float(anonymous[0]) / 1024 if anonymous else 0)
            time.sleep(0.02)
    if process.returncode:
        sys.exit("error: the pretraining failed")
    return highest


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--large", type=int, default=200_000)
    parser.add_argument("--small", type=int, default=20_000)
    o = parser.parse_args()
    options = ["--pretrain.steps", "12", "--pretrain.batch_size", "64"]
    options += ["--encoder.name", "resnet10t", "--pretrain.resolutions", "[64]"]
    options += ["--pretrain.optimizer.lr", "1e-9"]
    peaks = []
    for images in (o.small, o.large):
        with tempfile.TemporaryDirectory() as folder:
            make_contest(Path(folder), images)
            peaks.append(round(peak(Path(folder), options), 1))
            print(f"{images:,} images: {peaks[-1]:,.1f} MiB")
    small, large = peaks
    found = {"ours": large, "peer": small, "ratio": round(large / small, 3), "unit": "MiB"}
    print(json.dumps({"benchmark": "memory", **found}))


if __name__ == "__main__":
    main()
