"""Peak anonymous memory of pretraining at batch 4,096 in micro-batches of 128, beside batch 128.

python -m benchmarks.large_batch [--method SimCLR --size 96 --batch 4096 --micro 128 --steps 2]
The stage itself runs in a process of its own for each side, on the same contest of black pictures;
peak RssAnon is read from /proc while it trains.  There are two steps, as the first is made before
the optimizer has its buffers; of the small batch there are several times as many, until its peak no
longer grows.  Further arguments (--pretrain.method.queue 4096) go to the stage on both sides.
"""

import json
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

from benchmarks.memory import make_contest, peak

SMALL_STEPS = 8  # of the small batch for one of the large


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
            size += ["--pretrain.micro_batch", f"{o.micro}", "--entry", f"batch-{batch}"]
            began = time.monotonic()
            peaks.append(round(peak(Path(folder), [*common, *size]), 1))
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
