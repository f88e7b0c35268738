"""Label unlabeled images by the latest fine-tuned classifier, where it is sure.

python -m stages.pseudo_label --recipe recipes/demo.yaml
Reads runs/ENTRY/finetune-K/{logits/SPLIT.npy, holdout.csv} and, where the predictor looks at them,
runs/ENTRY/embeddings; writes runs/ENTRY/pseudo-K.{csv, png, json}, the JSON last, and of all rounds
pseudo-rounds.{csv, png}.  With several rounds the classifier is fine-tuned between two of them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline import InputError, config, labeling, runs
from pipeline.checkpoint import load_tensors
from pipeline.classifiers import MARKS
from pipeline.distributed import barrier, rank
from pipeline.figures import coverage
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
from pipeline.selection import embedded, unlabeled_logits
from stages import finetune


def run(recipe: Recipe, plain: dict[str, Any], force: bool = False) -> None:
    """Pseudo-label as many rounds as the recipe says, or those of them that are not done yet."""
    contest, rounds = load_contest(recipe.data.contest), recipe.pseudo_label.rounds
    if rounds > 1 and "pseudo" not in recipe.finetune.manifests:
        raise InputError(
            f"pseudo_label: rounds is {rounds}, but no fine-tuning would learn from them; 'pseudo' "
            f"among finetune.manifests is expected"
        )
    contest.images("unlabeled")  # InputError without any
    entry = runs.entry_folder(recipe.entry)
    make_accelerator("auto", entry)  # where there are several processes, they meet here
    newest, facts = _newest(entry, ".json"), _facts(contest, entry, recipe, plain)
    made = runs.read_json(newest, "make pseudo-label") if newest else {}
    same_rule = not force and made.get("recipe") == facts["recipe"]
    current = same_rule and made["inputs"] == facts["inputs"]
    done = made["round"] if same_rule else 0
    settled = current and made["changed"] < recipe.pseudo_label.stop_below
    if newest is not None and current and (done >= rounds or settled):
        file = newest.with_suffix(".csv")
        runs.say(f"{file} is up to date (--force makes it anew); next: make finetune")
        return
    if same_rule and not current and made["classifier"] == str(runs.latest_finetune(entry.name)):
        done -= 1  # the same classifier, but other labels are known now: that round again
    elif done >= rounds:
        done = 0  # that series is complete: a new one
    barrier()  # every process has read what the first one replaces
    while done < rounds:
        if current:
            finetune.run(recipe, plain)
        done, current = done + 1, True
        if rank() == 0:
            _label(recipe, contest, entry, done, _facts(contest, entry, recipe, plain))
        barrier()
        newest = _newest(entry, ".json")
        assert newest is not None
        found = runs.read_json(newest, "make pseudo-label")
        if done < rounds and found["changed"] < recipe.pseudo_label.stop_below:
            runs.say(f"{found['changed']:.1f} % of the labels changed: no further round is made")
            break


def _newest(entry: Path, suffix: str = ".csv", but: Path | None = None) -> Path | None:
    """pseudo-K with the suffix and the highest K, `but` one; a round that was killed before its end
    has no JSON.
    """
    files = [f.with_suffix(suffix) for f in runs.numbered(entry, "pseudo") if f != but]
    return next((f for f in reversed(files) if f.is_file()), None)


def _requested(recipe: Recipe, contest: Contest) -> list[Path]:
    """The answers that the recipe learns from."""
    wanted = "requested" in recipe.finetune.manifests
    return runs.numbered(contest.folder, "requested") if wanted else []


def _facts(contest: Contest, entry: Path, recipe: Recipe, plain: dict[str, Any]) -> dict[str, Any]:
    """What decides the pseudo-labels of now."""
    latest = contest.finished(runs.latest_finetune(entry.name), "make finetune")
    inputs = [contest.folder / "contest.json", *_requested(recipe, contest)]
    inputs += [latest / name for name in ("trained_on.csv", "holdout.csv")]
    inputs = [*(runs.require(file, "make finetune") for file in inputs), unlabeled_logits(latest)]
    if recipe.pseudo_label.predictor().space == "embeddings":
        inputs += embedded(contest.finished(entry / "embeddings", "make embed"))
    return runs.Run.of(entry, plain, ("pseudo_label",), inputs).facts


def _label(
    recipe: Recipe, contest: Contest, entry: Path, round_: int, facts: dict[str, Any]
) -> None:
    """Write pseudo-K.csv, its picture and, last, its record."""
    latest, c = runs.latest_finetune(entry.name), recipe.pseudo_label
    predictor = c.predictor()
    apart, what = labeling.images_apart(contest, latest, predictor)
    known = labeling.labeled_images(latest, _requested(recipe, contest))
    images = labeling.unlabeled_images(contest, known)
    runs.say(f"labeling {len(images):,} images by {latest} …")
    evidence, temperature = labeling.evidence_of(
        contest, entry, latest, images, apart, known, predictor
    )
    rows, labels, sure, predicted, right = apply(predictor, c.strategy(), evidence, apart.label)
    if not len(rows):
        raise InputError(
            f"pseudo_label: none of {len(images):,} images is sure enough; a lower bar is expected"
        )
    manifest = Manifest.of("unlabeled", images.index[rows], labels, sure, source=str(latest))
    out = _next(entry, latest)
    before = _newest(entry, but=out)
    new = labeling.changed(read_manifest(before), manifest) if before and round_ > 1 else 100.0
    found = summary(predicted, labels, right, contest.classes) | {"temperature": temperature}
    found |= {"precision_upper": labeling.learned_guesses(latest)}
    found |= {"changed": new, "true_precision": labeling.true_precision(contest, manifest)}
    said = labeling.in_words(found, what)
    names = contest.names
    per_class = [np.array(found[f"{kind}_per_class"]) for kind in ("predicted", "labeled")]
    of_apart, confidences = predictions(evidence.logits[len(images) :])
    made = {"round": round_, "classifier": str(latest), "precision_on": what}
    _, metadata = load_tensors(latest / "classifier.safetensors")
    made |= {mark: metadata.get(mark, False) for mark in MARKS}
    out.with_suffix(".json").unlink(missing_ok=True)  # of a rule before: the next is not its
    write_manifest(out, manifest, PSEUDO_LABELS)
    hits, picture = of_apart == apart.label, out.with_suffix(".png")
    coverage(picture, per_class[0], per_class[1], confidences, hits, names, said)
    runs.write_json(out.with_suffix(".json"), facts | made | found)
    labeling.write_rounds(entry)
    runs.say(f"{said}\nwrote {out}, .png and .json; next: make finetune")


def _next(entry: Path, latest: Path) -> Path:
    """pseudo-K.csv with the next K; the newest again where that is of the same classifier."""
    newest = _newest(entry)
    number = int(newest.stem.split("-")[1]) if newest else 0
    same = newest and read_manifest(newest).source[:1].tolist() == [str(latest)]
    return entry / f"pseudo-{number if same else number + 1}.csv"


def main() -> None:
    recipe, options, plain = config.parse(__doc__, config.Force)
    run(recipe, plain, options.force)


if __name__ == "__main__":
    runs.stage(main)
