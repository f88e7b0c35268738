"""What the organizers do: make a contest, answer a label request, score a submission."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline import InputError
from pipeline.checkpoint import save_torch
from pipeline.checks import check
from pipeline.progress import Advance, progress
from pipeline.sources import Opener, Source

_EVALUATOR = Path(__file__).with_name("evaluator.py")  # never imported: it runs on its own
Integers = npt.NDArray[np.int64]


class Refused(InputError):
    """The organizers refuse a request or a submission; the message is theirs."""


@dataclass(frozen=True)
class Shape:
    """How large a contest is."""

    per_class: int = 32
    val_per_class: int = 50
    max_unlabeled_per_class: int = 10**9
    size: int = 96

    def __post_init__(self) -> None:
        check("make", "1 or more", per_class=self.per_class)
        check("make", "0 or more", val_per_class=self.val_per_class)
        check("make", "0 or more", max_unlabeled_per_class=self.max_unlabeled_per_class)
        check("make", "8 or more", size=self.size)


def make_contest(source: Source, out: Path, shape: Shape, seed: int) -> dict[str, int]:
    """Write a contest to `out` and the labels of its unlabeled images to OUT.oracle.pt, beside it.

    Returns the number of images in each split; one without any is left out.  `out` appears when it
    is complete.  Raises InputError where it exists and is not empty.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder; another name is expected")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty")
    out = out.resolve()
    splits = _draw(source, shape, random.Random(seed))
    if not splits["unlabeled"]:
        raise InputError(
            f"unlabeled would be empty: {shape.per_class} images of each class go to train, and no "
            f"class has more; a smaller --per-class, or more images, are expected"
        )
    splits = {name: rows for name, rows in splits.items() if rows}
    oracle = out.with_name(f"{out.name}.oracle.pt")
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    for left in out.parent.glob(f".{out.name}.*.tmp"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        with progress("make", sum(map(len, splits.values())), "images") as advance:
            for name, rows in splits.items():
                _save_images([opener for opener, _ in rows], aside / name, shape.size, advance)
                labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
                save_torch(aside / f"{name}_label_tensor.pt", labels)
        if out.exists():
            out.rmdir()
        (aside / "unlabeled_label_tensor.pt").replace(oracle)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {name: len(rows) for name, rows in splits.items()}


def _draw(source: Source, shape: Shape, rng: random.Random) -> dict[str, list[tuple[Opener, int]]]:
    """Which images make up each split, shuffled, in the organizers' order of draws."""
    splits: dict[str, list[tuple[Opener, int]]] = {"train": [], "unlabeled": [], "val": []}
    for label, (train, held) in enumerate(zip(source.train, source.held, strict=True)):
        ends = shape.per_class, shape.per_class + shape.max_unlabeled_per_class
        files = list(train)
        rng.shuffle(files)
        splits["train"] += [(f, label) for f in files[: ends[0]]]
        splits["unlabeled"] += [(f, label) for f in files[ends[0] : ends[1]]]
        files = list(held)
        rng.shuffle(files)
        splits["val"] += [(f, label) for f in files[: shape.val_per_class]]
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def _save_images(openers: list[Opener], folder: Path, size: int, advance: Advance) -> None:
    """Write the images as folder/N.png, on threads: Pillow's coders run side by side."""

    def save(n: int) -> None:
        image = openers[n]().convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{n}.png", compress_level=1)

    folder.mkdir(parents=True)
    executor = ThreadPoolExecutor(os.cpu_count())
    try:
        for _ in executor.map(save, range(len(openers))):
            advance(1)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def read_request(text: str) -> list[int]:
    """The images that a request names, in its order; rows are 'N.png,', 'N.png' or 'N'.

    Raises Refused at the first row that is none of them.
    """
    index = []
    for k, row in enumerate((r for r in text.split("\n") if r.strip()), 1):
        match = re.fullmatch(r"(\d{1,18})(\.png)?,?", row.strip())
        if not match:
            raise Refused(f"refused: row {k} is {row!r}")
        index.append(int(match[1]))
    return index


def answer(index: Iterable[int], oracle: Integers, budget: int) -> Integers:
    """The labels [budget] of the images asked for, in their order.

    `oracle` [n] holds the label of unlabeled/N.png at entry N.  Raises Refused where the request is
    not exactly `budget` distinct, existing images.
    """
    wanted = np.array(list(index), np.int64)
    if len(wanted) != budget:
        raise Refused(f"refused: {len(wanted)} images asked for, the budget is {budget}")
    if len(np.unique(wanted)) != budget:
        raise Refused("refused: an image is asked for twice")
    if budget and wanted.max() >= len(oracle):
        raise Refused(f"refused: image {wanted.max()} does not exist")
    return oracle[wanted].copy()


def score(
    submission: Path,
    root: Path,
    split: str = "val",
    labels_file: Path | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """What the organizers' evaluator finds, in a fresh process at float32.

    The keys are split, images, accuracy (percent) and team, the line that names it.  Raises Refused
    with the evaluator's reason, and InputError where the submission fails.
    """
    command = [sys.executable, "-I", str(_EVALUATOR), str(submission), str(root)]
    command += ["--split", split]
    command += ["--labels", str(labels_file)] if labels_file else []
    command += ["--checkpoint", str(checkpoint)] if checkpoint else []
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as errors, ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        )
        advance, seen = None, 0
        for line in process.stdout or ():
            if told := re.fullmatch(r"scored (\d+) of (\d+)\n", line):
                done, images = map(int, told.groups())
                advance = advance or stack.enter_context(progress("score", images, "images"))
                advance(done - seen)
                seen = done
            else:
                lines.append(line.rstrip("\n"))
        if process.wait() != 0:
            refused = [line for line in lines if line.startswith("refused: ")]
            if refused:
                raise Refused(refused[-1])
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise InputError(f"{submission}: the evaluation fails: {last}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"team": lines[-2]}
