"""A submission: a stand-alone program and its weights, checked as the organizers check it."""

import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline import InputError, classifiers, encoders, organizers
from pipeline.checkpoint import load_tensors, save_torch
from pipeline.ensembles import Choice, build, shown_size
from pipeline.inference import predict_split
from pipeline.manifest import Contest, Manifest, read_manifest
from pipeline.recipe import Submit
from pipeline.runs import require, sha256, write_json
from pipeline.tables import write_table

TOLERANCE = 0.1  # points, or one image, between the submission's score and the model's own
CARD = "card.json"
WEIGHTS = "classifier.safetensors"
FILES = ("submission.py", "model.pth", "predictions.csv")

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

def get_model() -> nn.Module:
    """The classifier, randomly initialized; maps [b, 3, h, w] to logits [b, {classes}]."""
{model}


def eval_transform(image: Image.Image) -> Tensor:
    """A PIL image of any size and mode as the model wants it, [3, {resolution}, {resolution}]."""
    image = image.convert("RGB")
    if image.size != ({width}, {height}):  # as the images were packed
        image = image.resize(({width}, {height}), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if x.shape[1:] != ({resolution}, {resolution}):
        size = ({resolution}, {resolution})
        x = F.interpolate(x[None], size, mode="bilinear", antialias=True)[0]
    mean = torch.tensor({mean!r})
    std = torch.tensor({std!r})
    return (x - mean[:, None, None]) / std[:, None, None]
'''


_MEMBER = """\
    encoder = build_encoder({name!r}, {stem!r}, **{options!r})
    {target} Classifier(encoder, build_head({kind!r}, {features!r}, {classes!r}))"""


def program(
    loaded: list[dict[str, Any]], choice: Choice, size: tuple[int, int], team: Submit
) -> str:
    """The text of submission.py.

    `loaded` is the metadata of the members (see `classifiers.load_classifier`), `size` [h, w] of
    the packed images.  Encoder, head and the reading of odd images are the project's own source
    text.
    """
    head, sizes = loaded[0]["head"], [int(metadata["resolution"]) for metadata in loaded]
    names = ["return"] if choice.plain else [f"member_{k} =" for k in range(len(loaded))]
    lines = [
        _MEMBER.format(target=target, **metadata["encoder"], **metadata["head"])
        for target, metadata in zip(names, loaded, strict=True)
    ]
    source = inspect.getsource(classifiers.Classifier)
    if not choice.plain:
        source += "\n\n" + inspect.getsource(classifiers.Ensemble)
        members = ", ".join(f"member_{k}" for k in range(len(loaded)))
        rest = f"{choice.weights!r}, {sizes!r}, {choice.mirror!r}"
        lines.append(f"    return Ensemble([{members}], {rest})")
    return _PROGRAM.format(
        team_id=team.team_id,
        team_name=team.team_name,
        email_address=team.email_address,
        encoders=inspect.getsource(encoders),
        build_head=inspect.getsource(classifiers.build_head),
        classifier=source,
        model="\n".join(lines),
        classes=head["classes"],
        resolution=sizes[0] if choice.plain else shown_size(sizes, size),
        height=size[0],
        width=size[1],
        mean=[float(v) for v in loaded[0]["mean"]],
        std=[float(v) for v in loaded[0]["std"]],
    )


def write_program(folder: Path, choice: Choice, size: tuple[int, int], team: Submit) -> None:
    """Write submission.py and model.pth, a plain state dict."""
    loaded = [load_tensors(member / WEIGHTS) for member in choice.members]
    text = program([metadata for _, metadata in loaded], choice, size, team)
    (folder / "submission.py").write_text(text, encoding="utf-8")
    parts = [tensors for tensors, _ in loaded]
    if not choice.plain:
        named = [{f"members.{k}.{n}": t for n, t in part.items()} for k, part in enumerate(parts)]
        parts = [{name: tensor for part in named for name, tensor in part.items()}]
    save_torch(folder / "model.pth", parts[0])


def own_logits(choice: Choice, contest: Contest, split: str, made: Path) -> Path:
    """The file of what the submitted models say of a split, [images, classes] float32: the
    fine-tuning's own, or for several it is written into `made`.
    """
    if choice.plain:
        return require(choice.members[0] / "logits" / f"{split}.npy", "make finetune")
    model, size = build(choice.members, choice.weights, choice.mirror, contest.size)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    file = made / f"{split}.npy"
    predict_split(model, contest, split, file, contest.classes, size, exact=True)
    return file


class Check(NamedTuple):
    """What the organizers would find, beside what the fine-tuned model's own logits give."""

    split: str
    images: int
    score: float  # percent
    own: float  # percent


def check(folder: Path, contest: Contest, choice: Choice) -> Check:
    """Score the submission in `folder` on val as the organizers do, in a fresh process in float32.

    Where the contest has no labeled val, its train images are taken.  Raises InputError where that
    and the score of the models' own logits differ by more than 0.1 point and one image (two
    programs round otherwise), or where the submission does not run.
    """
    split = "val" if "val" in contest.splits else "train"
    rows = contest.manifest(split).usable()
    rows = rows.take(rows.label >= 0)
    if not len(rows):
        raise InputError(f"contest {contest.name}: {split} has no labels to score a submission on")
    with TemporaryDirectory() as made:
        logits = np.load(own_logits(choice, contest, split, Path(made)), mmap_mode="r")
        own = 100 * float(np.mean(logits[rows.index].argmax(1) == rows.label))
        _as_contest(Path(made), contest.root, split, rows)
        score = float(organizers.score(folder, Path(made), split)["accuracy"])
    allowed = max(TOLERANCE, 100.5 / len(rows))
    if not abs(score - own) <= allowed:
        raise InputError(
            f"refused: as the organizers score it the submission reaches {score:.3f} % on {split}, "
            f"the fine-tuned model {own:.3f} %, and at most {allowed:.3f} between them is "
            f"expected; did {contest.root} change since {choice.members[0]} was made?"
        )
    return Check(split, len(rows), score, own)


def _as_contest(root: Path, source: Path, split: str, rows: Manifest) -> None:
    """A split in the contest's layout, 0.png …, whatever layout its images have at `source`."""
    (root / split).mkdir()
    for n, file in enumerate(rows.file):
        if not (source / file).is_file():
            raise InputError(
                f"{source / file} is not there; the contest's images are expected where "
                f"`make data` found them"
            )
        (root / split / f"{n}.png").symlink_to((source / file).resolve())
    save_torch(root / f"{split}_label_tensor.pt", torch.from_numpy(rows.label))


def write_predictions(folder: Path, choice: Choice, contest: Contest, split: str) -> int:
    """Write predictions.csv, `id,label` with a row for each image of `split` in order, in float32.

    An image that cannot be read has a row too, with label 0: no gaps are allowed.  Returns their
    number.
    """
    with TemporaryDirectory() as made:
        file = own_logits(choice, contest, split, Path(made))
        labels = np.load(file, mmap_mode="r").argmax(1)
    write_table(folder / "predictions.csv", ["id", "label"], enumerate(labels.tolist()))
    return len(labels) - len(contest.usable(split))


def label_counts(members: Sequence[Path]) -> dict[str, int]:
    """How many labels of each split and source were trained on, and how many held out, at most by
    one of the `members`.
    """
    counts = Counter[str]()
    for member in members:
        labels = read_manifest(member / "trained_on.csv")
        names = map(" ".join, zip(labels.split, labels.source, strict=True))
        held = len(read_manifest(member / "holdout.csv"))
        counts |= Counter(map(str.strip, names)) | Counter({"held out": held})
    return dict(counts) | {"held out": counts["held out"]}


def notes(contest: Contest, transfer: bool, by_val: bool, labels: Mapping[str, int]) -> list[str]:
    """What has to be known to read the score."""
    said = {
        "transfer learning from outside weights: not allowed in a contest entry, comparison only": (
            transfer
        ),
        "a rehearsal: val stands for the secret test, nothing was chosen by it": contest.rehearsal,
        "labels of val took part in the training: its score flatters": by_val,
        "val was trained on: its score means nothing": any(k.split()[0] == "val" for k in labels),
        "val has no labels: the check was made on train images": "val" not in contest.splits,
        f"{len(contest.skipped)} unreadable images were left out": bool(contest.skipped),
    }
    return [note for note, holds in said.items() if holds]


def is_current(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether the folder holds a complete submission with just these facts, its files unchanged."""
    if not (folder / CARD).is_file():
        return False
    card = json.loads((folder / CARD).read_text())
    files = card.get("files", {})
    return all(card.get(k) == v for k, v in facts.items()) and all(
        (folder / name).is_file() and sha256(folder / name) == digest
        for name, digest in files.items()
    )


def publish(aside: Path, folder: Path, card: dict[str, Any]) -> None:
    """Move the files of a checked submission from `aside` to `folder`, and add the card.

    A folder with a card is complete: the old card goes first, the new one comes when all is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    digests = {name: sha256(aside / name) for name in FILES if (aside / name).exists()}
    for name in FILES:
        if name in digests:
            (aside / name).replace(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    write_json(folder / CARD, card | {"files": digests})
