"""What the organizers do: make a contest, answer a label request, score a submission."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import InputError

_EVALUATOR = Path(__file__).with_name("evaluator.py")  # never imported: it runs on its own
Integers = npt.NDArray[np.int64]


class Refused(InputError):
    """The organizers refuse a request or a submission; the message is theirs."""


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
    timeout: float | None = None,
) -> dict[str, Any]:
    """What the organizers' evaluator finds, in a fresh process at float32.

    The keys are split, images, accuracy (percent) and team, the line that names it.  Raises Refused
    with the evaluator's reason, and InputError where the submission fails or runs out of time.
    """
    command = [sys.executable, "-I", str(_EVALUATOR), str(submission), str(root)]
    command += ["--split", split]
    command += ["--labels", str(labels_file)] if labels_file else []
    command += ["--checkpoint", str(checkpoint)] if checkpoint else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"{submission}: no score within {timeout:.0f} seconds") from None
    lines = done.stdout.splitlines()
    if done.returncode != 0:
        refused = [line for line in lines if line.startswith("refused: ")]
        if refused:
            raise Refused(refused[-1])
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{submission}: the evaluation fails: {last}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"team": lines[-2]}
