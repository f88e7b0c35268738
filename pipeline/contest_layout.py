"""What a contest's folder holds: its files in order, its labels, and everything wrong with them."""

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline import InputError
from pipeline.checkpoint import load_torch

SPLITS = ("unlabeled", "train", "val", "test")
_NUMBER = re.compile(r"(0|[1-9][0-9]*)\.png")
_SHOWN = 50  # defects that a report prints
Integers = npt.NDArray[np.int64]


class Defect(NamedTuple):
    """Something wrong with a file; an image that is wrong can be skipped, a label file cannot."""

    file: str
    reason: str
    skippable: bool = True


@dataclass
class Split:
    """The images of a split: `files[k]`, within the contest's folder, is image `index[k]`."""

    name: str
    images: int = 0  # rows; the indices run from 0 to one less
    files: list[str] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    labels: Integers = field(default_factory=lambda: np.empty(0, np.int64))  # [images], -1: unknown


@dataclass
class Layout:
    """A contest's folder as found; `fingerprint` differs with any name, size or time in it."""

    root: Path
    kind: str  # "contest" or "folder"
    splits: dict[str, Split] = field(default_factory=dict)
    classes: int = 0
    class_names: list[str] | None = None
    defects: list[Defect] = field(default_factory=list)
    fingerprint: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def scan(self, folder: str) -> list[tuple[str, bool]]:
        """Names in a folder, sorted, hidden ones left out, and whether each is a folder itself."""
        found = []  # name, whether it is a folder, and for a file its size and time
        with os.scandir(self.root / folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if not name.isprintable():
                    reason = "has a name that is not printable"
                    self.defects.append(Defect(ascii(f"{folder}/{name}"), reason))
                elif entry.is_file():
                    stat = entry.stat()
                    found.append((name, False, stat.st_size, stat.st_mtime_ns))
                elif entry.is_dir():
                    found.append((name, True, 0, 0))
                else:
                    reason = "is neither a file nor a folder"
                    self.defects.append(Defect(f"{folder}/{name}", reason))
        found.sort()
        self.fingerprint.update(f"{folder} {found}".encode())
        return [(name, is_folder) for name, is_folder, *_ in found]


def read_layout(root: Path, classes: int | None = None) -> Layout:
    """The contest in `root`, in its own layout or as an image folder.

    The number of `classes` of a contest is taken from the labels of train where it is not given.

    Raises InputError where it is neither; what is wrong with single files is in `defects`.
    """
    if not (root / "train").is_dir():
        raise InputError(
            f"{root} holds no train/; a contest (train/N.png, train_label_tensor.pt) or an image "
            f"folder (train/CLASS/*) is expected"
        )
    if any(root.glob("*_label_tensor.pt")) or not _folders(root / "train"):
        layout = _read_contest(Layout(root, "contest"), classes)
    else:
        layout = _read_folder(Layout(root, "folder"))
    for split in layout.splits.values():
        if not split.files:
            layout.defects.append(Defect(f"{split.name}/", "holds no images", skippable=False))
    return layout


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _read_contest(layout: Layout, classes: int | None) -> Layout:
    for name in SPLITS:
        if (layout.root / name).is_dir():
            split = layout.splits[name] = Split(name)
            _number(layout, split)
            split.labels = np.full(split.images, -1, np.int64)
    labels = {}
    for name in ("train", "val"):
        if name in layout.splits:
            read = _read_labels(layout, layout.splits[name])
            if read is not None:
                labels[name] = read
    layout.classes = _count_classes(list(labels.values())) if classes is None else classes
    for name, values in labels.items():
        wrong = np.flatnonzero((values < 0) | (values >= layout.classes))
        if len(wrong):
            reason = (
                f"entry {wrong[0]} is {values[wrong[0]]}, where 0 to {layout.classes - 1} is "
                f"expected ({len(wrong)} such entries; data.classes states another number)"
            )
            layout.defects.append(Defect(f"{name}_label_tensor.pt", reason, skippable=False))
        layout.splits[name].labels = values
    return layout


def _count_classes(labels: list[Integers]) -> int:
    """One more than the highest label of the first of these arrays, or of all where that is odd.

    A few numbers may be unused; a label is odd where more than half of those below it are.
    """

    def dense(values: Integers) -> int:
        used = np.unique(values[values >= 0])
        fine = used[2 * np.arange(1, len(used) + 1) > used + 1]
        return int(fine[-1]) + 1 if len(fine) else 0

    if not labels:
        return 0
    count = dense(labels[0])
    odd = len(labels[0]) and labels[0].max() >= count
    return max(count, dense(np.concatenate(labels))) if odd else count


def _number(layout: Layout, split: Split) -> None:
    """Put the files N.png of a contest's split in the order of N, and find the gaps."""
    numbered, odd = [], set[int]()
    for name, is_folder in layout.scan(split.name):
        match = _NUMBER.fullmatch(name)
        if is_folder:
            odd.update([int(match[1])] if match else [])
            reason = "is a folder; images N.png are expected"
        elif not match:
            reason = "is misnumbered; the name N.png, without leading zeros, is expected"
        else:
            numbered.append((int(match[1]), f"{split.name}/{name}"))
            continue
        layout.defects.append(Defect(f"{split.name}/{name}", reason))
    numbered.sort()
    limit = 2 * len(numbered) + 1000  # a stray number would make the packed array as long
    for _, file in (pair for pair in numbered if pair[0] >= limit):
        reason = f"is misnumbered; the split has only {len(numbered):,} images"
        layout.defects.append(Defect(file, reason))
    numbered = [pair for pair in numbered if pair[0] < limit]
    split.index, split.files = [n for n, _ in numbered], [f for _, f in numbered]
    _count(layout, split, split.index[-1] + 1 if numbered else 0, "missing", odd)


def _count(
    layout: Layout, split: Split, images: int, reason: str, odd: Collection[int] = ()
) -> None:
    """The split has `images` images, 0.png on: those that are not there are missing; of `odd` ones
    it was said what they are.
    """
    missing = sorted(set(range(split.images, images)) - set(split.index))
    split.images, split.missing = images, split.missing + missing
    layout.defects += [Defect(f"{split.name}/{n}.png", reason) for n in missing if n not in odd]


def _read_labels(layout: Layout, split: Split) -> Integers | None:
    """The labels [images] of a split, or None and a defect."""
    file = f"{split.name}_label_tensor.pt"
    path = layout.root / file
    expected = f"one int64 label for each of {split.images} images is expected"
    if not path.is_file():
        layout.defects.append(Defect(file, f"missing; {expected}", skippable=False))
        return None
    stat = path.stat()
    layout.fingerprint.update(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode())
    try:
        labels = load_torch(path)
    except InputError as error:
        reason = str(error).removeprefix(str(path)).lstrip(": ")
        layout.defects.append(Defect(file, reason, skippable=False))
        return None
    if not isinstance(labels, torch.Tensor):
        reason = f"holds a {type(labels).__name__}; {expected}"
    elif labels.dtype != torch.int64 or labels.ndim != 1 or labels.layout != torch.strided:
        dtype = str(labels.dtype).removeprefix("torch.")
        reason = f"holds {dtype} of shape {list(labels.shape)}; {expected}"
    elif len(labels) != split.images:
        if split.images < len(labels) < 2 * len(split.files):  # the last images are not there
            _count(layout, split, len(labels), f"missing, as {file} has {len(labels)} entries")
            return labels.numpy().copy()
        reason = f"has {len(labels)} entries; {expected}"
    else:
        return labels.numpy().copy()
    layout.defects.append(Defect(file, reason, skippable=False))
    return None


def _read_folder(layout: Layout) -> Layout:
    layout.class_names = _folders(layout.root / "train")
    layout.classes = len(layout.class_names)
    folders = {name: name for name in SPLITS if (layout.root / name).is_dir()}
    if "val" not in folders and "test" in folders and _folders(layout.root / "test"):
        folders["val"] = folders.pop("test")  # the labeled images that were not trained on
    for name in (s for s in SPLITS if s in folders):
        _add_folder(layout, name, folders[name])
    return layout


def _add_folder(layout: Layout, name: str, folder: str) -> None:
    """Add a split: the files of its class folders, or of the folder itself without labels."""
    classes = {c: label for label, c in enumerate(layout.class_names or [])}
    split, labels = Split(name), list[int]()
    for entry, is_folder in layout.scan(folder):
        file = f"{folder}/{entry}"
        if not is_folder:
            if name in ("train", "val"):
                layout.defects.append(Defect(file, "lies in no class folder"))
            else:
                split.files.append(file)
                labels.append(-1)
        elif name == "unlabeled":
            layout.defects.append(Defect(file, "is a folder; image files are expected"))
        elif entry not in classes:
            layout.defects.append(Defect(file, "is no class of train/"))
        else:
            for image, is_deeper in layout.scan(file):
                if is_deeper:
                    reason = "is a folder; image files are expected"
                    layout.defects.append(Defect(f"{file}/{image}", reason))
                else:
                    split.files.append(f"{file}/{image}")
                    labels.append(classes[entry])
    split.images, split.index = len(labels), list(range(len(labels)))
    split.labels = np.array(labels, np.int64)
    layout.splits[name] = split


def _lines(defects: Sequence[Defect]) -> list[str]:
    """A line for each defect; images that are missing one after the other share theirs."""
    lines = []

    def place(pair: tuple[int, Defect]) -> tuple[Any, ...]:
        k, (file, reason, _) = pair
        split, _, name = file.rpartition("/")
        number = _NUMBER.fullmatch(name)
        gap = number and reason.startswith("missing")
        return (split, reason, int(number[1]) - k) if number and gap else (k,)

    for _, group in groupby(enumerate(defects), place):
        own = [defect for _, defect in group]
        last = f" to {own[-1].file.rpartition('/')[2]} ({len(own):,} files)"
        lines.append(f"{own[0].file}{last if len(own) > 1 else ''}: {own[0].reason}")
    return lines


def report(defects: Sequence[Defect], everything: Path) -> InputError:
    """One error that lists what is wrong; the whole list goes to a file where it is long."""
    head = f"{len(defects):,} {'file is' if len(defects) == 1 else 'files are'} unusable"
    lines = _lines(defects)
    if len(lines) > _SHOWN:
        everything.parent.mkdir(parents=True, exist_ok=True)
        everything.write_text("\n".join(lines) + "\n", encoding="utf-8")
        lines = [*lines[:_SHOWN], f"… and {len(lines) - _SHOWN} more; the whole list: {everything}"]
    advice = "mend them, or go on without them: --skip-bad"
    fatal = [d.file for d in defects if not d.skippable]
    if fatal:
        advice = f"mend them; --skip-bad does not go on without {', '.join(fatal)}"
    return InputError("\n  ".join([head, *lines]) + f"\n{advice}")
