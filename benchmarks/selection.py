"""Minutes and memory of every label-request strategy at the size of the contest.

python -m benchmarks.selection [--images 512000 --labeled 25600 --budget 12800 --strategies …]
Each strategy runs in a process of its own, on embeddings of a mixture of clusters (as uneven as
those of a trained encoder: sizes from 1 to 20, centers that share parents) and logits of a
classifier that is often right; the time is that of the whole choice, the neighbor graph and the
search for near-duplicates included, and memory is peak RssAnon.  No peer can do this: `peer` is the
20 minutes allowed.  Beside it: the recall of the approximate graph on 500 rows, and the k-means
objective of clusters within cells over that of plain k-means.
"""

import json
import os
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from subprocess import run

import numpy as np

import pipeline.strategies  # noqa: F401  (registers the strategies)
from pipeline import neighbours
from pipeline.neighbours import graph, kmeans, search
from pipeline.selection import NEIGHBORS, Candidates, Strategy, choose

ALLOWED = 20.0
ROOT = Path(__file__).parents[1]


def embeddings(n: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [n, width] float32 around three levels of centers, and their classes [n]."""
    rng = np.random.default_rng(seed)
    parents = rng.standard_normal((40, width), dtype=np.float32)
    means = 0.8 * parents[rng.integers(0, 40, classes)]
    means += rng.standard_normal((classes, width), dtype=np.float32)
    size = rng.integers(1, 21, classes).astype(float)
    truth = rng.choice(classes, n, p=size / size.sum())
    x = np.empty((n, width), np.float32)
    spread = rng.standard_normal((width, 32), dtype=np.float32) / 32**0.5
    for start in range(0, n, 1 << 16):
        rows = slice(start, min(start + (1 << 16), n))
        noise = rng.standard_normal((rows.stop - start, 32), dtype=np.float32) @ spread.T
        x[rows] = means[truth[rows]] + 1.2 * noise
        x[rows] += 0.3 * rng.standard_normal(x[rows].shape, dtype=np.float32)
        x[rows] /= np.linalg.norm(x[rows], axis=1, keepdims=True)
    return x, truth


def peak() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return float(next(w.split()[1] for w in status if w.startswith("RssAnon"))) / 1024


def one(folder: Path, name: str, budget: int, classes: int) -> None:
    """Choose by one strategy, and print its minutes and peak memory as JSON."""
    highest, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            highest[0] = max(highest[0], peak())

    threading.Thread(target=watch, daemon=True).start()
    x, labeled, logits = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("x", "l", "z"))
    given = Candidates(
        x, [logits], np.arange(len(x)), labeled, np.zeros(len(labeled), np.int64), classes, 0.99
    )
    kind = next(k for k in Strategy.__subclasses__() if k.__name__ == name)
    began = time.monotonic()
    request = choose(kind(), given, budget, 0)
    minutes = (time.monotonic() - began) / 60
    ended.set()
    assert len(np.unique(request.indices)) == budget
    print(json.dumps({"minutes": round(minutes, 2), "mib": round(highest[0])}))


def main() -> None:
    kinds = [kind.__name__ for kind in Strategy.__subclasses__()]
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512_000)
    parser.add_argument("--labeled", type=int, default=25_600)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=800)
    parser.add_argument("--budget", type=int, default=12_800)
    parser.add_argument("--strategies", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--one", type=Path, help="folder; the first strategy, in this process")
    o = parser.parse_args()
    if o.one:
        one(o.one, o.strategies[0], o.budget, o.classes)
        return
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder, n = Path(name), o.images + o.labeled
        x, truth = embeddings(n, o.width, o.classes, 0)
        np.save(folder / "x.npy", x[: o.images])
        np.save(folder / "l.npy", x[o.images :])
        logits = np.random.default_rng(1).standard_normal((o.images, o.classes), dtype=np.float32)
        logits[np.arange(o.images), truth[: o.images]] += 2.5
        np.save(folder / "z.npy", logits)
        del logits
        checked = checks(x[: o.images])
        del x
        for kind in o.strategies:
            words = [
                sys.executable,
                "-m",
                "benchmarks.selection",
                "--one",
                name,
                "--strategies",
                kind,
            ]
            words += ["--budget", str(o.budget), "--classes", str(o.classes)]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            done = run(words, env=environment, stdout=-1, text=True, check=True)
            rows[kind] = json.loads(done.stdout.splitlines()[-1])
            print(f"{kind}: {rows[kind]['minutes']:.1f} min, {rows[kind]['mib']:,} MiB", flush=True)
    slowest = max(row["minutes"] for row in rows.values())
    result = {"ours": slowest, "peer": ALLOWED, "ratio": round(slowest / ALLOWED, 3)}
    result |= {"unit": "min", "mib": max(row["mib"] for row in rows.values()), **checked}
    print(json.dumps({"benchmark": "selection", **result, "strategies": rows}))


def checks(x: np.ndarray) -> dict[str, float]:
    """Recall of the graph that is used at this size, and the k-means objective in cells over
    without, on 20,000 of the rows and 1,600 clusters.
    """
    rows = np.random.default_rng(0).permutation(len(x))[:500]
    found = graph(x, NEIGHBORS)[1][rows]
    exact = search(x[rows], x, NEIGHBORS + 1)[1]
    hits = [len(np.intersect1d(a, b[b != r])) for r, a, b in zip(rows, found, exact, strict=True)]
    recall = float(np.mean(hits)) / min(NEIGHBORS, len(x) - 1)
    part = x[:20_000]
    objective = []
    for limit in (1 << 30, 64 * len(part)):
        neighbours._DISTANCES = limit
        centers, where = kmeans(part, min(1600, len(part)), 20, 0)
        objective.append(float((2 - 2 * (part * centers[where]).sum(1)).mean()))
    print(f"recall of the graph {recall:.3f}, k-means objective {objective[1] / objective[0]:.3f}")
    return {"recall": round(recall, 3), "kmeans_objective": round(objective[1] / objective[0], 3)}


if __name__ == "__main__":
    main()
