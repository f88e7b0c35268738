"""From a contest's folder to packed arrays and manifests."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import InputError
from pipeline.contest_layout import Defect, Layout, Split
from pipeline.duplicates import count_duplicates, first_match
from pipeline.manifest import Manifest
from pipeline.packed import Form, Packed, create, decoders, histogram, open_packed, pack, read_size
from pipeline.progress import progress
from pipeline.recipe import Data
from pipeline.runs import contest_folder, made_from_file, packed_file, sha256, write_json

_LOOKED_AT = 100  # images whose most common size is that of the contest


def pack_splits(
    layout: Layout, out: Mapping[str, Path], data: Data
) -> tuple[Form, dict[str, Packed]]:
    """Pack every split into the array out[split], in the size asked for or the images' own.

    Files that cannot be used are added to the layout's defects.
    """
    form = _form(layout, data.size, data.max_pixels)
    create({out[name]: split.images for name, split in layout.splits.items()}, form)
    packed = {}
    total = sum(len(s.files) for s in layout.splits.values())
    with decoders(data.workers) as executor, progress("prepare", total, "images") as advance:
        for name, split in layout.splits.items():
            root, files = str(layout.root), split.files
            packed[name] = pack(executor, root, files, split.index, out[name], form, advance)
            for file, reason in zip(split.files, packed[name].reasons, strict=True):
                if reason:
                    layout.defects.append(Defect(file, reason))
    return form, packed


def _form(layout: Layout, size: int | None, max_pixels: int) -> Form:
    if size is not None:
        return Form(size, size, True, max_pixels)
    files = (layout.root / f for split in layout.splits.values() for f in split.files)
    sizes = (s for s in map(read_size, files) if s and s[0] * s[1] <= max_pixels)
    found = Counter(islice(sizes, _LOOKED_AT)).most_common(1)
    width, height = found[0][0] if found else (1, 1)  # no image can be read; packing says why
    return Form(height, width, False, max_pixels)


def make_manifests(
    layout: Layout, packed: Mapping[str, Packed], keep_duplicates: bool
) -> tuple[dict[str, Manifest], dict[str, Any]]:
    """The manifest of every split, and how many images are byte-identical.

    Unlabeled images that are also in val or test are excluded, unless they are to be kept.
    """
    manifests = {n: _manifest(split, packed[n]) for n, split in layout.splits.items()}
    good = {n: np.where(m.note == "", m.sha256, b"") for n, m in manifests.items()}
    found = count_duplicates(good)
    excluded = 0
    for held in ("val", "test"):
        if "unlabeled" in good and held in good and not keep_duplicates:
            match = first_match(good["unlabeled"], good[held])
            note, files = manifests["unlabeled"].note, manifests[held].file
            for k in np.flatnonzero((match >= 0) & (note == "")):
                note[k] = f"excluded: same bytes as {files[match[k]]}"
                excluded += 1
    return manifests, found | {"excluded": excluded}


def _manifest(split: Split, packed: Packed) -> Manifest:
    """All rows of the packed split, in order."""
    manifest = Manifest.of(split.name, np.arange(split.images), split.labels)
    manifest.file[split.index] = split.files
    manifest.sha256[split.index] = packed.digests
    manifest.note[split.index] = [r and f"skipped: {r}" for r in packed.reasons]
    for n in split.missing:
        manifest.file[n], manifest.note[n] = f"{split.name}/{n}.png", "skipped: missing"
    return manifest


def usable_pixels(packed: Packed, manifest: Manifest, array: Path) -> npt.NDArray[np.int64]:
    """The histogram [3, 256] of the usable images: what packing counted, less what was excluded."""
    excluded = [k for k, note in enumerate(manifest.note) if note.startswith("excluded")]
    return packed.histogram - histogram(open_packed(array), excluded)


def mean_std(counts: npt.NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, 0 to 1, by exact integer sums over a histogram [3, 256];
    a channel that never changes has the deviation 1, as values are divided by it.

    Raises InputError where it counts no pixel.
    """
    mean, std = [], []
    for channel in counts.tolist():
        n = sum(channel)
        if not n:
            raise InputError("no usable image is left; prepare without --skip-bad says why")
        total = sum(v * c for v, c in enumerate(channel))
        squares = sum(v * v * c for v, c in enumerate(channel))
        mean.append(total / (255 * n))
        std.append(math.sqrt(n * squares - total * total) / (255 * n) or 1.0)
    return mean, std


def asked_for(layout: Layout, data: Data) -> dict[str, Any]:
    """What decides the result: the state of the contest's folder, and what is done with it."""
    return {
        "root": str(layout.root),
        "fingerprint": layout.fingerprint.hexdigest(),
        "rehearsal": is_rehearsal(layout, data),
        "size": data.size,
        "classes": data.classes,
        "max_pixels": data.max_pixels,
        "keep_duplicates": data.keep_duplicates,
    }


def is_rehearsal(layout: Layout, data: Data) -> bool:
    """Whether the recipe says so, or the organizers' labels lie beside the contest."""
    root = layout.root.resolve()
    oracle = root.with_name(f"{root.name}.oracle.pt")
    return data.rehearsal or oracle.is_file()


def remember(contest: str, asked: Mapping[str, Any]) -> None:
    """Note beside the arrays what they were made from, as it is on this machine alone."""
    made = {"asked": asked, "contest_sha256": sha256(contest_folder(contest) / "contest.json")}
    write_json(made_from_file(contest), made)


def is_current(contest: str, asked: Mapping[str, Any], skip_bad: bool) -> bool:
    """Whether the contest was prepared from just this, without more skipped than is allowed."""
    folder, note = contest_folder(contest), made_from_file(contest)
    if not (folder / "contest.json").is_file() or not note.is_file():
        return False
    facts, made = json.loads((folder / "contest.json").read_text()), json.loads(note.read_text())
    files = [folder / f"{split}.csv" for split in facts["splits"]]
    files += [packed_file(contest, split) for split in facts["splits"]]
    same = made == {"asked": asked, "contest_sha256": sha256(folder / "contest.json")}
    return same and (skip_bad or not facts["skipped"]) and all(f.is_file() for f in files)


def describe(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What contest.json says of a split, whose manifest was written to `folder`."""
    file = folder / f"{manifest.split[0]}.csv"
    return {
        "images": len(manifest),
        "usable": len(manifest.usable()),
        "manifest": file.name,
        "manifest_sha256": sha256(file),
    }
