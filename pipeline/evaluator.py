"""Scores a submission as the organizers do: a stand-alone program that imports nothing of ours.

python -I pipeline/evaluator.py SUBMISSION_DIR CONTEST_ROOT
    [--split val] [--checkpoint FILE] [--labels FILE] [--batch 256]
Prints how far it is, the team and its accuracy, then one line of JSON.  Exit 1, with the reason,
where the submission breaks a rule.  `pipeline.organizers.score` runs it in a fresh process.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

NAMES = ("team_id", "team_name", "email_address", "get_model", "eval_transform")


def refuse(why: str) -> NoReturn:
    print(f"refused: {why}")
    sys.exit(1)


def load_entry(submission: Path) -> Any:
    """The module submission.py, without the entrant's code in reach."""
    sys.path = [folder for folder in sys.path if folder]
    sys.modules["pipeline"] = sys.modules["stages"] = None  # type: ignore[assignment]
    spec = importlib.util.spec_from_file_location("submission", submission / "submission.py")
    assert spec is not None
    assert spec.loader is not None
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    for name in NAMES:
        if not hasattr(entry, name):
            refuse(f"submission.py does not define {name}")
    return entry


def count_correct(
    entry: Any, checkpoint: Path, images: Path, labels: torch.Tensor, batch: int
) -> int:
    """How many of the images N.png the entry's model gives label N of `labels`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = entry.get_model()
    net.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    net.to(device).eval()
    correct = 0
    for start in range(0, len(labels), batch):
        views = []
        for n in range(start, min(start + batch, len(labels))):
            with (images / f"{n}.png").open("rb") as f:
                views.append(entry.eval_transform(Image.open(f).convert("RGB")))
        with torch.no_grad():
            out = net(torch.stack(views).to(device))  # [b, classes]
        if out.ndim != 2 or len(out) != len(views):
            refuse(f"the model maps {len(views)} images to {tuple(out.shape)}")
        correct += int((out.argmax(1).cpu() == labels[start : start + len(views)]).sum())
        print(f"scored {start + len(views)} of {len(labels)}", flush=True)
    return correct


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("submission", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    a = parser.parse_args()
    submission, root = a.submission.resolve(), a.root.resolve()
    labels_file = (a.labels or root / f"{a.split}_label_tensor.pt").resolve()
    checkpoints = [a.checkpoint.resolve()] if a.checkpoint else sorted(submission.glob("*.pth"))
    if len(checkpoints) != 1:
        refuse(f"one *.pth is wanted in {submission}, found {len(checkpoints)}")
    if not (submission / "submission.py").is_file():
        refuse("there is no submission.py")
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)  # nothing of the entrant's working directory is in reach
        entry = load_entry(submission)
        labels = torch.load(labels_file, weights_only=True)
        correct = count_correct(entry, checkpoints[0], root / a.split, labels, a.batch)
    accuracy = 100 * correct / len(labels)
    print(f"Team {entry.team_id}: {entry.team_name} Accuracy: {accuracy:.2f}%")
    found = {"split": a.split, "images": len(labels), "accuracy": round(accuracy, 3)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
