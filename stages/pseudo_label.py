"""Label unlabeled images by the latest fine-tuned classifier, where it is sure.

python -m stages.pseudo_label --recipe recipes/demo.yaml
Reads runs/ENTRY/finetune-K/{logits/SPLIT.npy, holdout.csv}; writes runs/ENTRY/pseudo-K.{csv, png,
json}, the JSON last.  With several rounds the classifier is fine-tuned between two of them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import InputError, config, runs
from pipeline.distributed import barrier, rank
from pipeline.figures import coverage
from pipeline.finetuning import logits_of
from pipeline.machine import make_accelerator
from pipeline.manifest import (
    PSEUDO_LABELS,
    Contest,
    Manifest,
    load_contest,
    read_manifest,
    write_manifest,
)
from pipeline.metrics import predictions
from pipeline.pseudo_labels import apply, summary
from pipeline.recipe import Recipe
from pipeline.selection import eligible
from stages import finetune


@dataclass(frozen=True)
class Options:
    force: bool = field(
        default=False, metadata={"help": "Label anew even where nothing has changed."}
    )


def run(recipe: Recipe, plain: dict[str, Any], force: bool = False) -> None:
    """Pseudo-label as many rounds as the recipe says, or those of them that are not done yet."""
    contest, rounds = load_contest(recipe.data.contest), recipe.pseudo_label.rounds
    entry = runs.entry_folder(recipe.entry or "entry")
    make_accelerator("auto", entry)  # where there are several processes, they meet here
    newest, facts = _newest(entry), _facts(contest, entry, plain)
    record = newest.with_suffix(".json") if newest else Path()
    made = runs.read_json(record, "make pseudo-label") if record.is_file() else {}
    same_rule = not force and made.get("recipe") == facts["recipe"]
    current = same_rule and made["inputs"] == facts["inputs"]
    done = made["round"] if same_rule else 0
    if done >= rounds and current:
        runs.say(f"{newest} is up to date (--force makes it anew); next: make finetune")
        return
    if same_rule and not current and made["classifier"] == str(runs.latest_finetune(entry.name)):
        done -= 1  # the same classifier, but other labels are known now: that round again
    elif done >= rounds:
        done = 0  # that series is complete: a new one
    while done < rounds:
        if current:
            finetune.run(recipe, plain)
        done, current = done + 1, True
        if rank() == 0:
            _label(recipe, contest, entry, done, _facts(contest, entry, plain))
        barrier()


def _newest(entry: Path) -> Path | None:
    files = runs.numbered(entry, "pseudo")
    return files[-1] if files else None


def _facts(contest: Contest, entry: Path, plain: dict[str, Any]) -> dict[str, Any]:
    """What decides the pseudo-labels of now."""
    latest = runs.latest_finetune(entry.name)
    inputs = [contest.folder / "contest.json", *runs.numbered(contest.folder, "requested")]
    inputs += [latest / "logits" / "unlabeled.npy", latest / "holdout.csv"]
    inputs = [runs.require(file, "make finetune") for file in inputs]
    return runs.Run.of(entry, plain, ("pseudo_label",), inputs).facts


def _label(
    recipe: Recipe, contest: Contest, entry: Path, round_: int, facts: dict[str, Any]
) -> None:
    """Write pseudo-K.csv, its picture and, last, its record."""
    latest = runs.latest_finetune(entry.name)
    images = contest.manifest("unlabeled").usable()
    digests = contest.manifest("train").usable().sha256
    for file in runs.numbered(contest.folder, "requested"):
        known = np.isin(images.index, read_manifest(file).index)
        digests = np.concatenate([digests, images.sha256[known]])
    images = images.take(np.isin(images.index, eligible(images.index, images.sha256, digests)))
    apart, what = _apart(contest, latest)
    runs.say(f"labeling {len(images):,} images by {latest} …")
    logits, logits_apart = (logits_of(latest, m, contest.classes) for m in (images, apart))
    labeler = recipe.pseudo_label.strategy()
    rows, labels, confidences, right = apply(labeler, logits, logits_apart, apart.label)
    if not len(rows):
        raise InputError(
            f"pseudo_label: none of {len(images):,} images is sure enough; a lower bar is expected"
        )
    manifest = Manifest.of("unlabeled", images.index[rows], labels, confidences, source=str(latest))
    out = _next(entry, latest)
    write_manifest(out, manifest, PSEUDO_LABELS)
    predicted, (of_apart, sure) = predictions(logits)[0], predictions(logits_apart)
    found = summary(predicted, labels, right, contest.classes)
    said = f"{found['coverage']:.1f} % of {found['eligible']:,} unlabeled images labeled"
    if found["precision"] is not None:
        said += f"; {found['precision']:.1f} ± {found['precision_error']:.1f} % right"
        said += f", by {len(right):,} images of {what}"
    names = contest.class_names or [str(k) for k in range(contest.classes)]
    per_class = [np.array(found[f"{kind}_per_class"]) for kind in ("predicted", "labeled")]
    hits = of_apart == apart.label
    coverage(out.with_suffix(".png"), per_class[0], per_class[1], sure, hits, names, said)
    made = {"round": round_, "classifier": str(latest), "precision_on": what}
    runs.write_json(out.with_suffix(".json"), facts | made | found)
    runs.say(f"{said}\nwrote {out}, .png and .json; next: make finetune")


def _next(entry: Path, latest: Path) -> Path:
    """pseudo-K.csv with the next K; the newest again where that is of the same classifier."""
    newest = _newest(entry)
    number = int(newest.stem.split("-")[1]) if newest else 0
    same = newest and read_manifest(newest).source[:1].tolist() == [str(latest)]
    return entry / f"pseudo-{number if same else number + 1}.csv"


def _apart(contest: Contest, latest: Path) -> tuple[Manifest, str]:
    """Labeled images that the classifier was not trained on, and what they are."""
    held = read_manifest(latest / "holdout.csv")
    if len(held):
        return held, "the held-out labels"
    val = contest.manifest("val").usable() if "val" in contest.splits else held
    return val.take(val.label >= 0), "val (reported, not chosen by)"


def main() -> None:
    recipe, options, plain = config.parse(__doc__, Options)
    run(recipe, plain, options.force)


if __name__ == "__main__":
    runs.stage(main)
