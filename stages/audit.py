"""Show images that look the same and labels that look wrong; nothing is changed.

python -m stages.audit --recipe recipes/mini98.yaml [--cosine 0.98 --write-clean]
Reads runs/ENTRY/embeddings/SPLIT.npy, data/CONTEST/SPLIT.npy and the manifests; writes
runs/ENTRY/audit/{duplicates.csv, duplicates.png, labels.csv, labels.png, provenance.json} and, if
asked to, clean.csv, for `finetune.manifests`: train with a note at doubtful labels, which are not
trained on then (take a note away, and its label is).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline import audit, config, runs
from pipeline.checks import check
from pipeline.draws import learned_labels
from pipeline.figures import AMBER, GREEN, RED, Tile, image_rows
from pipeline.finetuning import rows_of
from pipeline.manifest import DOUBTFUL, Contest, Manifest, load_contest, write_manifest
from pipeline.neighbours import search
from pipeline.recipe import Recipe
from pipeline.tables import Column, read_table, write_table

_SHOWN, _AROUND = 12, 8  # rows and neighbors of a picture
_COLUMNS = ["split", "index", "label", "suggested", "confidence", "agreement"]  # of labels.csv


@dataclass(frozen=True)
class Options(config.Force):
    cosine: float = field(
        default=0.98, metadata={"help": "Embeddings that are as similar belong to copies."}
    )
    write_clean: bool = field(
        default=False,
        metadata={"help": "Write clean.csv: train, doubtful labels noted as not to be trained on."},
    )


def run(
    recipe: Recipe, cosine: float = 0.98, write_clean: bool = False, force: bool = False
) -> None:
    """Audit every split that is embedded, unless that was done before."""
    check("audit", "above 0, up to 1", cosine=cosine)
    contest, entry = load_contest(recipe.data.contest), runs.entry_folder(recipe.entry)
    folder, out = contest.finished(entry / "embeddings", "make embed"), entry / "audit"
    splits = [split for split in contest.splits if (folder / f"{split}.npy").is_file()]
    images = Manifest.concatenate([contest.manifest(split).usable() for split in splits])
    inputs = [contest.folder / "contest.json", *(folder / f"{split}.npy" for split in splits)]
    decided = {"cosine": cosine, "linear_c": recipe.evaluate.linear_c}
    facts = runs.Run.of(out, {"seed": recipe.seed, "audit": decided}, ["audit"], inputs)
    if facts.is_current() and not force:
        runs.say(f"{out} is up to date (--force runs it anew)")
    else:
        facts.begin()
        _set_aside(contest, out)
        found, doubtful = _look(recipe, contest, images, folder, out, cosine)
        facts.finish(pairs=found, doubtful_labels=doubtful)
        runs.say(f"wrote {out}; nothing was changed")
    if write_clean:
        _write_clean(contest, out)


def _look(
    recipe: Recipe, contest: Contest, images: Manifest, folder: Path, out: Path, cosine: float
) -> tuple[dict[str, int], int]:
    """Write what looks the same and what looks wrong; how many pairs, by splits, and labels."""
    width = np.load(folder / "train.npy", mmap_mode="r").shape[1]
    x = rows_of(folder, images, width, "make embed")
    runs.say(f"comparing {len(images):,} images of {', '.join(np.unique(images.split))} …")
    copies = audit.find_copies(x, audit.thumbnails(contest.pool(images)), cosine)
    names, pairs = contest.class_names, (copies.first, copies.second)
    pixels = {split: contest.packed(split) for split in np.unique(images.split).tolist()}
    columns = ["cosine", "same_hash", "split", "index", "label", "split_b", "index_b", "label_b"]
    of = [(images.split[p], images.index[p], _named(images.label[p], names)) for p in pairs]
    _table(
        out / "duplicates.csv", columns, copies.cosine, copies.hashed.astype(int), *of[0], *of[1]
    )
    rows = []
    for k in audit.of_every_kind(images.split, copies)[:_SHOWN]:
        a, b = copies.first[k], copies.second[k]
        where = f"{images.split[a]}/{images.index[a]}.png\n{images.split[b]}/{images.index[b]}.png"
        tiles = [_tile(images, row, pixels, names) for row in (a, b)]
        rows.append((f"{where}\ncosine {copies.cosine[k]:.3f}", tiles))
    found = audit.counts(images.split.tolist(), copies)
    said = ", ".join(f"{n:,} in {where}" for where, n in found.items()) or "none"
    note = "the most similar within and between splits, by embedding and by hash, in turn"
    image_rows(out / "duplicates.png", rows, f"Pairs that look the same: {said}", note)
    runs.say(f"pairs that look the same: {said}")
    return found, _labels(recipe, contest, images, x, out, pixels)


def _labels(
    recipe: Recipe,
    contest: Contest,
    images: Manifest,
    x: Any,
    out: Path,
    pixels: dict[str, Any],
) -> int:
    """The doubtful labels of train, as a table and a picture; how many they are."""
    of_train = (images.split == "train") & (images.label >= 0)
    train, x = images.take(of_train), x[of_train]
    c, names = recipe.evaluate.linear_c, contest.class_names
    doubts = audit.doubtful_labels(x, train.label, contest.classes, c, recipe.seed)
    wrong = train.take(doubts.rows)
    labels = _named(wrong.label, names), _named(doubts.suggested, names)
    scores = doubts.confidence, doubts.agreement
    _table(out / "labels.csv", _COLUMNS, wrong.split, wrong.index, *labels, *scores)
    rows, near = [], search(x[doubts.rows[:_SHOWN]], x, _AROUND + 1)[1]
    for k, (row, around) in enumerate(zip(doubts.rows, near, strict=False)):
        tiles = [_tile(train, row, pixels, names, AMBER)]
        for n in around[around != row][:_AROUND]:
            same = train.label[n] == train.label[row]
            tiles.append(_tile(train, n, pixels, names, GREEN if same else RED))
        rows.append((f"train/{wrong.index[k]}.png\nrather {labels[1][k]}", tiles))
    said = f"{len(wrong):,} of {len(train):,} labels of train look wrong"
    if len(np.unique(train.label)) == len(train):
        said += " (none can be judged: no class has two)"
    if learned := int(train.among(learned_labels(out.parent)).sum()):
        said += f"; pretraining learned {learned:,} of the {len(train):,}, so wrong ones look right"
    note = "the most doubtful first; beside each its nearest labeled images, green of its class"
    image_rows(out / "labels.png", rows, said, note)
    runs.say(said)
    return len(wrong)


def _write_clean(contest: Contest, out: Path) -> None:
    """Write clean.csv, and keep one that was edited."""
    _set_aside(contest, out)
    _write_noted(contest, out, out / "clean.csv")
    runs.say(f"wrote {out / 'clean.csv'}: name it in finetune.manifests to train on it")


def _write_noted(contest: Contest, out: Path, file: Path) -> None:
    """Write train with a note at the images of labels.csv."""
    columns = {"index": Column(np.int64, required=True)}
    columns |= {name: Column(np.object_) for name in _COLUMNS if name != "index"}
    doubtful = read_table(out / "labels.csv", columns)["index"]
    train = contest.manifest("train").usable()
    train = train.take(train.label >= 0)
    train.note[np.isin(train.index, doubtful)] = DOUBTFUL
    write_manifest(file, train, ("split", "index", "label", "note"))


def _set_aside(contest: Contest, out: Path) -> None:
    """Remove the clean.csv of before; one that is not as it was written is kept as clean-K.csv."""
    file = out / "clean.csv"
    if not file.is_file():
        return
    with TemporaryDirectory() as name:
        written = Path(name, file.name)
        if (out / "labels.csv").is_file():
            _write_noted(contest, out, written)
            if written.read_bytes() == file.read_bytes():
                return file.unlink()
    kept = [int(f.stem.split("-")[1]) for f in runs.numbered(out, "clean")]
    edited = file.with_name(f"clean-{max(kept, default=0) + 1}.csv")
    file.replace(edited)
    return runs.say(f"{file} was edited: it is kept as {edited}")


def _named(labels: Any, names: Sequence[str] | None) -> list[str]:
    return ["" if k < 0 else names[k] if names else str(k) for k in labels.tolist()]


def _tile(
    images: Manifest,
    row: int,
    pixels: dict[str, Any],
    names: Sequence[str] | None,
    frame: str | None = None,
) -> Tile:
    split, index = str(images.split[row]), int(images.index[row])
    label = _named(images.label[[row]], names)[0]
    return Tile(pixels[split][index], label or f"{split}/{index}", frame)


def _table(path: Path, names: Sequence[str], *columns: Iterable[Any]) -> None:
    """A CSV file of columns as long as each other."""
    rows = (
        [f"{v:.4f}" if isinstance(v, np.floating) else v for v in row]
        for row in zip(*columns, strict=True)
    )
    write_table(path, names, rows)


def main() -> None:
    recipe, options, _ = config.parse(__doc__, Options)
    run(recipe, options.cosine, options.write_clean, options.force)


if __name__ == "__main__":
    runs.stage(main)
