"""The organizers' files: a label request, and the answer to it, checked against it."""

import hashlib
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline import InputError
from pipeline.checkpoint import load_torch
from pipeline.manifest import Contest
from pipeline.runs import read_json, replacing

Ints = npt.NDArray[np.int64]

_ASKED = re.compile(r"([0-9]{1,18})(?:\.png)?,?")
_ANSWERED = re.compile(r"([0-9]{1,18})(?:\.png)?\s*,\s*(-?[0-9]{1,18})")


def write_request(path: Path, indices: Ints) -> None:
    """Write the images asked for as the contest wants them, `N.png,` a row."""
    with replacing(path) as aside:
        aside.write_text("".join(f"{n}.png,\n" for n in indices))


def read_request(path: Path, images: int) -> Ints:
    """The images [n] that a request asks for, in order; a row is `N.png,`, `N.png` or `N`.

    Raises InputError, naming file and row, where a row is none of these, comes twice or is not
    below `images`.
    """
    asked: dict[int, int] = {}
    for row, text in _rows(path):
        found = _ASKED.fullmatch(text)
        if not found:
            raise InputError(f"{path}: row {row} is {text!r}; 'N.png,' is expected")
        index = int(found[1])
        if index >= images:
            raise InputError(
                f"{path}: row {row} asks for {index}.png; unlabeled images are 0 to {images - 1}"
            )
        if index in asked:
            raise InputError(f"{path}: rows {asked[index]} and {row} both ask for {index}.png")
        asked[index] = row
    if not asked:
        raise InputError(f"{path} asks for nothing; a row 'N.png,' for each image is expected")
    return np.array(list(asked), np.int64)


def images_digest(contest: Contest, indices: Ints) -> str:
    """SHA-256 of what the unlabeled images `indices` are, in this order."""
    manifest = contest.manifest("unlabeled")
    digests = np.zeros(contest.images("unlabeled"), manifest.sha256.dtype)
    digests[manifest.index] = manifest.sha256
    return hashlib.sha256(digests[indices].tobytes()).hexdigest()


def check_request(request: Path, indices: Ints, contest: Contest) -> None:
    """Raise InputError where a request is not the one that label-request wrote there, or is of
    other images than those of the contest now.
    """
    made = request.with_name("request.json")
    if not made.is_file():
        return
    facts = read_json(made, "make label-request")
    digest = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
    if facts["file"] == request.name and facts["indices_sha256"] != digest:
        raise InputError(
            f"{request} was changed since label-request wrote it; the answer's order would be "
            f"another one (`make label-request ARGS=--force` asks anew)"
        )
    of_images = facts.get("images_sha256")
    if facts["file"] == request.name and of_images not in (None, images_digest(contest, indices)):
        raise InputError(
            f"{request} asks for images of another contest than {contest.name}, or images have "
            f"changed since; the contest that it was made for (--data.contest) is expected, or "
            f"`make label-request ARGS=--force` asks anew"
        )


def shown(indices: Ints) -> str:
    """The first few images, as people read them."""
    return ", ".join(f"{n}.png" for n in indices[:3]) + (", …" if len(indices) > 3 else "")


def read_answer(
    path: Path, request: Path, indices: Ints, classes: int, known: npt.NDArray[np.bool_]
) -> Ints:
    """The labels [n] of the images `indices` that the file `request` asks for, in its order.

    `path` is a torch file with one int64 tensor in the order of the request, or a CSV of
    `N.png,label` or `N,label` in any order, with or without a header, which may leave out images
    whose labels are `known` [n] (-1).  Raises InputError, naming file and row, where it does not
    answer just this request with labels of 0 to classes - 1.
    """
    if path.suffix.lower() in (".pt", ".pth"):
        return _read_tensor(path, request, indices, classes)
    if path.suffix.lower() in (".csv", ".txt"):
        return _read_csv(path, request, indices, classes, known)
    raise InputError(
        f"{path}: an answer is a .pt file (an int64 tensor), a .csv (N.png,label) or a .json "
        f"(Label Studio's export)"
    )


def _rows(path: Path) -> list[tuple[int, str]]:
    """The rows of a text file that are not empty, with their numbers."""
    if not path.is_file():
        raise InputError(f"{path} is not there; a text file with a row for each image is expected")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: no text file; a row for each image is expected") from None
    return [(row, line.strip()) for row, line in enumerate(lines, 1) if line.strip()]


def _read_tensor(path: Path, request: Path, indices: Ints, classes: int) -> Ints:
    value = load_torch(path)
    wanted = "one int64 tensor in the order of the request is expected"
    if not isinstance(value, Tensor):
        raise InputError(f"{path} holds a {type(value).__name__}; {wanted}")
    kind = str(value.dtype).removeprefix("torch.")
    if kind != "int64" or value.ndim != 1 or value.layout is not torch.strided:
        raise InputError(f"{path} holds {kind} of shape {list(value.shape)}; {wanted}")
    labels: Ints = value.numpy()
    if len(labels) != len(indices):
        raise InputError(
            f"{path} has {len(labels):,} labels; {request} asks for {len(indices):,}, one each"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        raise InputError(
            f"{path}: row {first + 1} ({indices[first]}.png) has label {labels[first]}; "
            f"0 to {classes - 1} is expected"
        )
    return labels


def _read_csv(
    path: Path, request: Path, indices: Ints, classes: int, known: npt.NDArray[np.bool_]
) -> Ints:
    place = {int(index): n for n, index in enumerate(indices)}
    labels = np.full(len(indices), -1, np.int64)
    seen: dict[int, int] = {}
    rows = _rows(path)
    if rows and re.fullmatch(r"id\s*,\s*label", rows[0][1], re.IGNORECASE):
        rows = rows[1:]
    for row, text in rows:
        found = _ANSWERED.fullmatch(text)
        if not found:
            raise InputError(f"{path}: row {row} is {text!r}; 'N.png,LABEL' is expected")
        index, label = int(found[1]), int(found[2])
        if index not in place:
            raise InputError(f"{path}: row {row} labels {index}.png; {request} does not ask for it")
        if index in seen:
            raise InputError(f"{path}: rows {seen[index]} and {row} both label {index}.png")
        if not 0 <= label < classes:
            raise InputError(
                f"{path}: row {row} ({index}.png) has label {label}; 0 to {classes - 1} is expected"
            )
        labels[place[index]], seen[index] = label, row
    missing = indices[(labels < 0) & ~known]
    if len(missing):
        raise InputError(
            f"{path} lacks {len(missing):,} of the {len(indices):,} labels that {request} asks "
            f"for: {shown(missing)}"
        )
    return labels
