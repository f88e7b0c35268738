"""Peak anonymous memory of pretraining at batch 4,096 in micro-batches of 128, beside batch 128.

python -m benchmarks.large_batch [--method SimCLR --size 96 --batch 4096 --micro 128 --steps 2]
The stage itself runs in a process of its own for each side, on the same contest of black pictures;
peak RssAnon is read from /proc while it trains.  There are two steps, as the first is made before
the optimizer has its buffers; of the small batch there are several times as many, until its peak no
longer grows.  Further arguments (--pretrain.method.queue 4096) go to the stage on both sides.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

from benchmarks.memory import ROOT, make_contest

SMALL_STEPS = 8  # of the small batch for one of the large


def anonymous(process: int) -> float:
    """RssAnon of `process` in MiB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((float(x.split()[1]) / 1024 for x in lines if x.startswith("RssAnon")), 0)


def peak(folder: Path, entry: str, options: list[str]) -> float:
    """Peak RssAnon in MiB of a pretraining in `folder`."""
    options = [
        "--entry",
        entry,
        "--data.contest",
        "c",
        "--pretrain.splits",
        "[unlabeled]",
        *options,
    ]
    command = [sys.executable, "-m", "stages.pretrain", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    highest = 0.0
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        while process.poll() is None:
            highest = max(highest, anonymous(process.pid))
            time.sleep(0.02)
    if process.returncode:
        sys.exit("error: the pretraining failed")
    return highest


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="SimCLR")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    o, further = parser.parse_known_args()
    common = ["--pretrain.method", o.method, "--pretrain.resolutions", f"[{o.size}]", *further]
    common += ["--pretrain.optimizer.lr", "1e-9"]  # black pictures teach nothing
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        make_contest(Path(folder), 2 * o.batch)
        for batch, steps in ((o.batch, o.steps), (o.micro, SMALL_STEPS * o.steps)):
            size = ["--pretrain.batch_size", f"{batch}", "--pretrain.steps", f"{steps}"]
            size += ["--pretrain.micro_batch", f"{o.micro}"]
            began = time.monotonic()
            peaks.append(round(peak(Path(folder), f"batch-{batch}", [*common, *size]), 1))
            seconds = time.monotonic() - began
            print(
                f"batch {batch:,}: {peaks[-1]:,.1f} MiB, {seconds:,.0f} s for {steps} steps",
                flush=True,
            )
    large, small = peaks
    found = {"ours": large, "peer": small, "ratio": round(large / small, 3), "unit": "MiB"}
    print(json.dumps({"benchmark": "large_batch", "method": o.method, **found}))


if __name__ == "__main__":
    main()
