"""Peak anonymous memory of pretraining at batch 4,096 in micro-batches of 128, beside batch 128.

python -m benchmarks.large_batch [--methods SimCLR MoCo --size 32 --batch 4096 --micro 128]
The stage itself runs for every method in a process of its own for each side, on the same contest of
black pictures; peak RssAnon is read from /proc while it trains.  There are two steps, as the first
is made before the optimizer has its buffers; of the small batch there are eight times as many,
until its peak no longer grows.  What the large batch needs more does not depend on the size of the
pictures: smaller ones are the harder test.  Further arguments (--pretrain.method.queue 4096) go to
the stage on both sides.  The figures in the last line are those of the worst method.
"""

import json
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import pipeline.methods  # noqa: F401  (its files register themselves as subclasses of Method)
from benchmarks.memory import make_contest, peak
from pipeline.methods.base import Method

STEPS, SMALL_STEPS = 2, 16


def main() -> None:
    found = sorted(kind.__name__ for kind in Method.__subclasses__())
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=found, default=found)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=128)
    o, further = parser.parse_known_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_contest(Path(folder), 2 * o.batch)
        for method in o.methods:
            options = ["--pretrain.method", method, "--pretrain.resolutions", f"[{o.size}]"]
            options += ["--pretrain.optimizer.lr", "1e-9", *further]  # black pictures teach nothing
            peaks = []
            for batch, steps in ((o.batch, STEPS), (o.micro, SMALL_STEPS)):
                sizes = ["--pretrain.batch_size", f"{batch}", "--pretrain.steps", f"{steps}"]
                sizes += ["--pretrain.micro_batch", f"{o.micro}", "--entry", f"{method}-{batch}"]
                began = time.monotonic()
                peaks.append(peak(Path(folder), [*options, *sizes]))
                took = f"{time.monotonic() - began:,.0f} s"
                print(f"{method}, batch {batch:,}: {peaks[-1]:,.1f} MiB, {took}", flush=True)
            rows.append((peaks[0] / peaks[1], *peaks, method))
            print(f"{method}: ratio {rows[-1][0]:.3f}", flush=True)
    ratio, large, small, _ = max(rows)
    result = {"ours": round(large, 1), "peer": round(small, 1), "ratio": round(ratio, 3)}
    result |= {"unit": "MiB", "methods": {name: round(r, 3) for r, _, _, name in rows}}
    print(json.dumps({"benchmark": "large_batch", **result}))


if __name__ == "__main__":
    main()
