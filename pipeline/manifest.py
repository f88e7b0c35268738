"""Read, check and write manifests; a training set is a list of manifests."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import InputError
from pipeline.packed import Pool, open_packed
from pipeline.runs import (
    contest_folder,
    finished,
    made_from_file,
    packed_file,
    read_json,
    require,
    sha256,
)
from pipeline.tables import Column, read_table, write_table

Integers = npt.NDArray[np.int64]
PREPARED = ("split", "index", "file", "sha256", "label", "note")
LABELS = ("split", "index", "label", "source")
DOUBTFUL = "doubtful label"  # a note: may be held out as others are, but is not trained on
PSEUDO_LABELS = ("split", "index", "label", "confidence", "source")
_COLUMNS = {
    "split": Column(np.str_, required=True),
    "index": Column(np.int64, required=True),
    "label": Column(np.int64, empty=-1, required=True),
    "confidence": Column(np.float32, most=1, empty=1),
    "note": Column(np.object_),
    "source": Column(np.object_),
    "file": Column(np.object_),
    "sha256": Column("S64"),
}
_BLOCK = 1000  # rows written at a time


@dataclass(frozen=True)
class Manifest:
    """One row for each image, as columns of equal length [n]."""

    split: npt.NDArray[np.str_]
    index: Integers  # row of the packed split; N of N.png
    label: Integers  # -1: unknown
    confidence: npt.NDArray[np.float32]  # 1 where the file has none
    note: npt.NDArray[np.object_]  # "" for a usable image, else why it is not
    source: npt.NDArray[np.object_]  # where the label comes from
    file: npt.NDArray[np.object_]  # within the contest's folder
    sha256: npt.NDArray[np.bytes_]  # hexadecimal, of the file's bytes

    @classmethod
    def of(
        cls,
        split: str | Sequence[str] | npt.NDArray[np.str_],
        index: npt.ArrayLike,
        label: npt.ArrayLike = -1,
        confidence: npt.ArrayLike = 1.0,
        note: str | Sequence[str] = "",
        source: str | Sequence[str] = "",
        file: str | Sequence[str] = "",
        sha256: str | Sequence[str] = "",
    ) -> "Manifest":
        """A manifest of the images `index`; a single value stands for a whole column."""
        index = np.asarray(index, np.int64)

        def column(value: Any, dtype: Any) -> Any:
            return np.broadcast_to(np.asarray(value, dtype), index.shape).copy()

        return cls(
            column(split, np.str_),
            index,
            column(label, np.int64),
            column(confidence, np.float32),
            column(note, np.object_),
            column(source, np.object_),
            column(file, np.object_),
            column(sha256, "S64"),
        )

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: npt.NDArray[Any]) -> "Manifest":
        """The rows that a mask or an array of positions names."""
        return Manifest(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence["Manifest"]) -> "Manifest":
        """The rows of all parts, one after the other."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def among(self, others: "Manifest") -> npt.NDArray[np.bool_]:
        """Which of the images [n] are in another manifest, too."""
        there = {*zip(others.split.tolist(), others.index.tolist(), strict=True)}
        keys = zip(self.split.tolist(), self.index.tolist(), strict=True)
        return np.array([key in there for key in keys], np.bool_)

    def usable(self) -> "Manifest":
        """The images that were neither skipped nor excluded."""
        return self.take(self.note == "")


def write_manifest(path: Path, manifest: Manifest, columns: Sequence[str] = LABELS) -> None:
    """Write the named columns; an unknown label is left empty."""
    blocks = (
        manifest.take(np.arange(start, min(start + _BLOCK, len(manifest))))
        for start in range(0, len(manifest), _BLOCK)
    )
    rows = (zip(*(_as_text(block, c) for c in columns), strict=True) for block in blocks)
    write_table(path, columns, chain.from_iterable(rows))


def _as_text(manifest: Manifest, column: str) -> list[Any]:
    values = getattr(manifest, column).tolist()
    if column == "label":
        return ["" if v < 0 else v for v in values]
    if column == "confidence":
        return [f"{v:.6g}" for v in values]
    return [v.decode() for v in values] if column == "sha256" else values


def read_manifest(path: Path) -> Manifest:
    """The manifest in a CSV file whose header names split, index, label and any other column.

    Raises InputError, naming file and row (the header is row 1), where a value is not what its
    column holds or an image comes twice.
    """
    columns: dict[str, Any] = read_table(path, _COLUMNS)
    manifest = Manifest.of(**columns)
    _check_unique(path, manifest)
    return manifest


def _check_unique(path: Path, manifest: Manifest) -> None:
    names = {name: code for code, name in enumerate(sorted(set(manifest.split.tolist())))}
    codes = np.array([names[s] for s in manifest.split.tolist()], np.int64)
    order = np.lexsort((manifest.index, codes))
    same = (np.diff(manifest.index[order]) == 0) & (np.diff(codes[order]) == 0)
    for a, b in zip(order[:-1][same][:1], order[1:][same], strict=False):
        raise InputError(
            f"{path}: rows {a + 2} and {b + 2} are both {manifest.split[a]} {manifest.index[a]}; "
            f"each image is expected once"
        )


@dataclass(frozen=True)
class Contest:
    """A prepared contest, as contest.json states it; its `root` is this machine's."""

    name: str
    root: Path
    layout: str  # "contest" or "folder"
    rehearsal: bool
    size: tuple[int, int]  # h, w
    classes: int
    class_names: list[str] | None
    mean: list[float]  # r, g, b, 0..1, of the usable unlabeled images
    std: list[float]
    splits: dict[str, dict[str, Any]]
    skipped: list[dict[str, str]]
    duplicates: dict[str, Any]

    @property
    def folder(self) -> Path:
        return contest_folder(self.name)

    @property
    def oracle(self) -> Path:
        """Where a rehearsal keeps the labels of its unlabeled images, if it has them here."""
        root = self.root.resolve()
        return root.with_name(f"{root.name}.oracle.pt")

    @property
    def names(self) -> list[str]:
        """The classes' names, or their numbers where they have none."""
        return self.class_names or [str(k) for k in range(self.classes)]

    def images(self, split: str) -> int:
        """Rows of the packed split, unusable images included."""
        return int(self._split(split)["images"])

    def manifest(self, split: str) -> Manifest:
        """The split's manifest; InputError where it is not the one that contest.json describes."""
        facts = self._split(split)
        path = require(self.folder / facts["manifest"], self._made_by)
        digest = facts.get("manifest_sha256")
        if digest and sha256(path) != digest:
            raise InputError(
                f"{path} was changed since contest.json was written; "
                f"`{self._made_by} ARGS=--force` makes it anew"
            )
        return read_manifest(path)

    def packed(self, split: str) -> npt.NDArray[np.uint8]:
        """The split's pixels [n, h, w, 3], memory-mapped."""
        images = self.images(split)
        path = require(packed_file(self.name, split), self._made_by)
        array = open_packed(path)
        if array.shape != (images, *self.size, 3):
            raise InputError(
                f"{path} holds {list(array.shape)} where contest.json states "
                f"{[images, *self.size, 3]}; `{self._made_by} ARGS=--force` makes it anew"
            )
        return array

    def pool(self, manifest: Manifest) -> Pool:
        """The images that a manifest names, in its order.

        Raises InputError where it names an image or a class that the contest does not have.
        """
        parts, places = [], []
        for split in sorted(set(manifest.split.tolist())) or [next(iter(self.splits))]:
            rows = np.flatnonzero(manifest.split == split)
            part = manifest.take(rows)
            bad = (part.index >= self.images(split)) | (part.label >= self.classes)
            if bad.any():
                k = int(np.flatnonzero(bad)[0])
                raise InputError(
                    f"a manifest gives {split} {part.index[k]} label {part.label[k]}; there are "
                    f"{self.images(split)} images and {self.classes} classes"
                )
            parts.append((self.packed(split), part.index))
            places.append(rows)
        return Pool(parts, np.argsort(np.concatenate(places)))

    def splits_with(self, *, unlabeled: bool) -> list[str]:
        """All splits, or all but unlabeled."""
        return [split for split in self.splits if unlabeled or split != "unlabeled"]

    def usable(self, split: str) -> Integers:
        """Indices of the split's usable images, in increasing order."""
        return np.sort(self.manifest(split).usable().index)

    def labels(self, split: str) -> Integers:
        """The split's labels [images], -1 where unknown."""
        labels = np.full(self.images(split), -1, np.int64)
        manifest = self.manifest(split)
        labels[manifest.index] = manifest.label
        return labels

    def check_same(self, what: Path, record: Path, do: str) -> None:
        """Raise InputError, saying what to `do`, where `what`, whose inputs are in the JSON file
        `record`, was made of another contest, or of other images than these.
        """
        facts = self.folder / "contest.json"
        if json.loads(record.read_text())["inputs"].get(str(facts)) != sha256(facts):
            raise InputError(
                f"{what} is of another contest than {self.name}, or of other images; {do}"
            )

    def finished(self, folder: Path, made_by: str) -> Path:
        """As `runs.finished`, and InputError where `folder` is not of this contest."""
        do = f"`{made_by}` makes it anew"
        self.check_same(finished(folder, made_by), folder / "provenance.json", do)
        return folder

    def check_finetune(self, folder: Path) -> None:
        """Raise InputError where the fine-tuning in `folder` is not of this contest."""
        do = f"a fine-tuning on {self.folder / 'contest.json'} is expected"
        self.check_same(folder, folder / "provenance.json", do)

    @property
    def _made_by(self) -> str:
        return f"make data ROOT={self.root} CONTEST={self.name}"

    def _split(self, split: str) -> dict[str, Any]:
        if split in self.splits:
            return self.splits[split]
        known = ", ".join(self.splits)
        raise InputError(f"contest {self.name!r} has no split {split!r}; it has {known}")


def load_contest(name: str) -> Contest:
    """The contest that prepare made; InputError where it did not."""
    path = contest_folder(name) / "contest.json"
    facts = read_json(path, f"make data ROOT=… CONTEST={name}")
    try:
        stated = [f.name for f in fields(Contest) if f.name not in ("name", "root")]
        values = {name: facts[name] for name in stated}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} lacks {error}; `make data ROOT=… CONTEST={name} ARGS=--force` makes it anew"
        ) from None
    packed_from = made_from_file(name)
    root = json.loads(packed_from.read_text())["asked"]["root"] if packed_from.is_file() else "ROOT"
    return Contest(name=name, root=Path(root), size=tuple(values.pop("size")), **values)
