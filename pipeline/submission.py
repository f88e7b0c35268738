"""A submission: a stand-alone program and its weights, checked as the organizers check it."""

import csv
import inspect
import os
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline import InputError, classifiers, encoders, organizers, packed
from pipeline.checkpoint import load_tensors, save_torch
from pipeline.config import Submit
from pipeline.manifest import Contest, Manifest, read_manifest
from pipeline.runs import write_json

TOLERANCE = 0.1  # points between the submission's score and the fine-tuned model's own
CARD = "card.json"
_KEPT = ("submission.py", "model.pth", "predictions.csv")  # in the order of writing; then the card

_PROGRAM = '''\
"""A submission that stands alone: it needs torch, torchvision and timm, and what they need."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

team_id = {team_id!r}
team_name = {team_name!r}
email_address = {email_address!r}

{encoders}

{build_head}

{classifier}

{to_rgb}

def get_model() -> nn.Module:
    """The classifier, randomly initialized: [b, 3, {resolution}, {resolution}] to [b, {classes}]."""
    encoder = build_encoder({name!r}, {stem!r}, **{options!r})
    return Classifier(encoder, build_head({kind!r}, {features!r}, {classes!r}))


def eval_transform(image: Image.Image) -> Tensor:
    """A PIL image of any size and mode as the model wants it, [3, {resolution}, {resolution}]."""
    image = to_rgb(image)
    if image.size != ({width}, {height}):  # as the images were packed
        image = image.resize(({width}, {height}), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if x.shape[1:] != ({resolution}, {resolution}):
        x = F.interpolate(
            x[None], ({resolution}, {resolution}), mode="bilinear", antialias=True
        )[0]
    return (x - torch.tensor({mean!r}).view(3, 1, 1)) / torch.tensor({std!r}).view(3, 1, 1)
'''


def program(metadata: dict[str, Any], size: tuple[int, int], team: Submit) -> str:
    """The text of submission.py.

    `metadata` is a classifier's (see `classifiers.load_classifier`), `size` [h, w] of the packed
    images.  Encoder, head and the reading of odd images are the project's own source text.
    """
    head = metadata["head"]
    return _PROGRAM.format(
        team_id=team.team_id,
        team_name=team.team_name,
        email_address=team.email_address,
        encoders=inspect.getsource(encoders),
        build_head=inspect.getsource(classifiers.build_head),
        classifier=inspect.getsource(classifiers.Classifier),
        to_rgb=inspect.getsource(packed.to_rgb),
        name=metadata["encoder"]["name"],
        stem=metadata["encoder"]["stem"],
        options=metadata["encoder"]["options"],
        kind=head["kind"],
        features=head["features"],
        classes=head["classes"],
        resolution=metadata["resolution"],
        height=size[0],
        width=size[1],
        mean=[float(v) for v in metadata["mean"]],
        std=[float(v) for v in metadata["std"]],
    )


def write_program(folder: Path, classifier: Path, size: tuple[int, int], team: Submit) -> None:
    """Write submission.py and model.pth (a plain state dict) of a saved classifier."""
    tensors, metadata = load_tensors(classifier)
    (folder / "submission.py").write_text(program(metadata, size, team), encoding="utf-8")
    save_torch(folder / "model.pth", tensors)


class Check(NamedTuple):
    """What the organizers would find, beside what the fine-tuned model's own logits give."""

    split: str
    images: int
    score: float  # percent
    own: float  # percent


def check(folder: Path, contest: Contest, logits: Path) -> Check:
    """Score the submission in `folder` on val as the organizers do, in a fresh process in float32.

    `logits` holds the model's own, SPLIT.npy [images, classes].  Where the contest has no labeled
    val, its train images are taken.  Raises InputError where the two scores differ by more than
    0.1 point, or where the submission does not run.
    """
    split = "val" if "val" in contest.splits else "train"
    rows = contest.manifest(split).usable()
    rows = rows.take(rows.label >= 0)
    predicted = np.load(logits / f"{split}.npy", mmap_mode="r")[rows.index].argmax(1)
    own = 100 * float(np.mean(predicted == rows.label))
    with TemporaryDirectory() as made:
        _as_contest(Path(made), contest.root, split, rows)
        score = float(organizers.score(folder, Path(made), split)["accuracy"])
    if not abs(score - own) <= TOLERANCE:
        raise InputError(
            f"refused: as the organizers score it, the submission reaches {score:.3f} % on {split} and "
            f"the fine-tuned model {own:.3f} %; at most {TOLERANCE} point between them is expected: "
            f"was {logits.parent} made of other images than {contest.root} holds now?"
        )
    return Check(split, len(rows), score, own)


def _as_contest(root: Path, source: Path, split: str, rows: Manifest) -> None:
    """The images of a split in the contest's layout, 0.png …, whatever layout they have at `source`."""
    (root / split).mkdir()
    for n, file in enumerate(rows.file):
        (root / split / f"{n}.png").symlink_to((source / file).resolve())
    save_torch(root / f"{split}_label_tensor.pt", torch.from_numpy(rows.label))


def write_predictions(path: Path, labels: npt.NDArray[np.int64]) -> None:
    """Write `id,label`, one row for each test image, in order; `labels` [n]."""
    with path.open("w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("id", "label"))
        writer.writerows(enumerate(labels.tolist()))


def label_counts(finetune: Path) -> dict[str, int]:
    """How many labels of which source the classifier was trained on, and how many were held out."""
    trained = read_manifest(finetune / "trained_on.csv")
    names = (s if s == "train" else f"{s} ({o})" for s, o in zip(trained.split, trained.source))
    held = len(read_manifest(finetune / "holdout.csv"))
    return {**Counter(map(str, names)), "held out": held}


def publish(aside: Path, folder: Path, card: dict[str, Any]) -> None:
    """Move the files of a checked submission from `aside` to `folder`, the card last.

    A folder with a card is complete: the old card goes first, the new one comes when all is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    for name in _KEPT:
        if (aside / name).exists():
            os.replace(aside / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    write_json(folder / CARD, card)
