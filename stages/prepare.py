"""Pack a contest's images and write its manifests.

python -m stages.prepare --data.root ROOT --data.contest NAME [--recipe recipes/demo.yaml]
Reads ROOT, a contest (SPLIT/N.png, SPLIT_label_tensor.pt) or an image folder (train/CLASS/*,
val/CLASS/*, unlabeled/*); writes data/NAME/SPLIT.npy, data_manifests/NAME/SPLIT.csv and, last,
data_manifests/NAME/contest.json.
"""

import re
import signal
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline import InputError, config, preparation, runs
from pipeline.contest_layout import Layout, read_layout, report
from pipeline.manifest import PREPARED, Manifest, read_manifest, write_manifest
from pipeline.recipe import Data, Recipe


@dataclass(frozen=True)
class Options(config.Force):
    skip_bad: bool = field(default=False, metadata={"help": "Go on without images that are bad."})


def run(recipe: Recipe, plain: dict[str, Any], force: bool = False, skip_bad: bool = False) -> None:
    """Pack and describe the recipe's contest, unless that was done and nothing has changed."""
    data, folder = recipe.data, runs.contest_folder(recipe.data.contest)
    layout = read_layout(_checked_root(data), data.classes)
    asked = preparation.asked_for(layout, data)
    if not force and preparation.is_current(data.contest, asked, skip_bad):
        runs.say(f"{folder} is up to date (--force runs it anew)")
        return
    arrays = {split: runs.packed_file(data.contest, split) for split in layout.splits}
    for left in arrays["train"].parent.glob(".*.tmp"):  # by a run that was killed
        left.unlink()
    with ExitStack() as stack:
        aside = {split: stack.enter_context(runs.replacing(f)) for split, f in arrays.items()}
        form, packed = preparation.pack_splits(layout, aside, data)
        if any(not (skip_bad and defect.skippable) for defect in layout.defects):
            raise report(layout.defects, arrays["train"].parent / "defects.txt")
        manifests, duplicates = preparation.make_manifests(layout, packed, data.keep_duplicates)
        _check_answers(folder, manifests)
        basis = "unlabeled" if "unlabeled" in manifests else "train"
        mean, std = preparation.mean_std(
            preparation.usable_pixels(packed[basis], manifests[basis], aside[basis])
        )
        (folder / "contest.json").unlink(missing_ok=True)  # unfinished from here on
    for split, manifest in manifests.items():
        write_manifest(folder / f"{split}.csv", manifest, PREPARED)
    runs.write_json(
        folder / "contest.json",
        {
            "contest": data.contest,
            "rehearsal": asked["rehearsal"],
            "layout": layout.kind,
            "size": [form.height, form.width],
            "classes": layout.classes,
            "class_names": layout.class_names,
            "mean": mean,
            "std": std,
            "splits": {s: preparation.describe(folder, m) for s, m in manifests.items()},
            "skipped": [{"file": d.file, "reason": d.reason} for d in layout.defects],
            "duplicates": duplicates,
        },
    )
    preparation.remember(data.contest, asked)
    _tell(data.contest, layout, manifests, duplicates)


def _checked_root(data: Data) -> Path:
    if data.root is None or not data.root.is_dir():
        found = "not given" if data.root is None else f"{data.root}, which is no folder"
        raise InputError(
            f"data.root is {found}; --data.root ROOT is expected, the folder of a contest "
            f"(train/N.png, train_label_tensor.pt) or of images (train/CLASS/*)"
        )
    if not re.fullmatch(r"\w[\w.-]*", data.contest):
        raise InputError(f"data.contest is {data.contest!r}; a name for a folder is expected")
    return data.root


def _check_answers(folder: Path, manifests: dict[str, Manifest]) -> None:
    """Raise InputError where labels that were asked for belong to other unlabeled images."""
    answers = runs.numbered(folder, "requested")
    if answers and not _same_unlabeled(folder, manifests.get("unlabeled")):
        raise InputError(
            f"{answers[0]} labels other images than the unlabeled ones that are there now; "
            f"move {folder}/requested-*.csv away, or give the contest another --data.contest"
        )


def _same_unlabeled(folder: Path, now: Manifest | None) -> bool:
    """Whether the unlabeled images are those of before, if that is known: by their bytes, or where
    a fresh clone lacks that manifest by its digest.
    """
    before, facts = folder / "unlabeled.csv", folder / "contest.json"
    if before.is_file():
        return now is not None and read_manifest(before).sha256.tolist() == now.sha256.tolist()
    if not facts.is_file():
        return True
    known = runs.read_json(facts, "make data")["splits"].get("unlabeled", {}).get("manifest_sha256")
    if now is None or known is None:
        return now is known
    with TemporaryDirectory() as name:
        write_manifest(Path(name, before.name), now, PREPARED)
        return bool(runs.sha256(Path(name, before.name)) == known)


def _tell(
    contest: str, layout: Layout, manifests: dict[str, Manifest], duplicates: dict[str, Any]
) -> None:
    if unused := sorted(set(range(layout.classes)) - set(layout.splits["train"].labels.tolist())):
        runs.say(
            f"train has no label of {len(unused):,} of {layout.classes:,} classes: {unused[:5]}"
        )
    for split, manifest in manifests.items():
        runs.say(f"{split}: {len(manifest):,} images, {len(manifest.usable()):,} usable")
    for name, images in (duplicates["within"] | duplicates["across"]).items():
        runs.say(f"byte-identical in {name}: {images:,} images")
    if duplicates["excluded"]:
        runs.say(f"left out of unlabeled, being also in val or test: {duplicates['excluded']:,}")
    if layout.defects:
        runs.say(f"skipped as unusable: {len(layout.defects):,} (contest.json lists them)")
    runs.say(f"wrote data/{contest} and data_manifests/{contest}; next: make pretrain RECIPE=…")


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, leave nothing behind
    recipe, options, plain = config.parse(__doc__, Options)
    run(recipe, plain, options.force, options.skip_bad)


if __name__ == "__main__":
    runs.stage(main)
