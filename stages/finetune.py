"""Train a classifier on every label there is.

python -m stages.finetune --recipe recipes/demo.yaml
Reads the pretrained encoder, data/CONTEST/SPLIT.npy and the label manifests (train.csv,
requested-*.csv, the newest pseudo-K.csv); writes runs/ENTRY/finetune-K/{classifier.safetensors,
logits/SPLIT.npy, trained_on.csv, holdout.csv, report.txt, confusion.png, plan.json,
history.json, tensorboard/, provenance.json}.  Round K is the number of label files beyond train.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import InputError, config, runs
from pipeline.checkpoint import save_tensors
from pipeline.classifiers import MARKS, Classifier, build_head, freeze, probe, renew_statistics
from pipeline.distributed import barrier
from pipeline.draws import learned_labels, training_set
from pipeline.encoders import features
from pipeline.finetuning import finetuner, initial_encoder, label_weights, report
from pipeline.inference import check_size, predict_split
from pipeline.labeling import labeled_images
from pipeline.machine import make_accelerator
from pipeline.manifest import (
    PSEUDO_LABELS,
    Contest,
    Manifest,
    load_contest,
    write_manifest,
)
from pipeline.plan import check_budget, minutes_of
from pipeline.recipe import Recipe
from pipeline.training_recipe import Finetune


def _manifests(recipe: Recipe, contest: Contest) -> list[Path]:
    """The label files that the recipe names, as they are now."""
    files: list[Path] = []
    for name in recipe.finetune.manifests:
        if name == "requested":
            files += runs.numbered(contest.folder, "requested")
        elif name == "pseudo":
            files += (newest := runs.numbered(runs.entry_folder(recipe.entry), "pseudo")[-1:])
            for file in newest:
                runs.require(file.with_suffix(".json"), "make pseudo-label")
        elif name == "train":
            files.append(runs.require(contest.folder / "train.csv", "make data"))
        else:
            files.append(Path(name))
            if not files[-1].is_file():
                raise InputError(
                    f"finetune: {name} is not there; among manifests train, requested, pseudo and "
                    f"CSV files of split,index,label are expected"
                )
    return files


def _record(labels: Path) -> dict[str, Any]:
    """The record of a file of pseudo-labels or of requested ones; of any other file nothing."""
    record = labels.with_suffix(".json")
    if not labels.name.startswith(("pseudo-", "requested-")) or not record.is_file():
        return {}
    return dict(runs.read_json(record, "make pseudo-label"))


def _check_pseudo_labels(labels: Path, contest: Contest, encoder: Path | None) -> None:
    """Raise InputError where pseudo-labels are of other images, or those of a classifier that began
    at another state of the `encoder`.
    """
    record = labels.with_suffix(".json")
    if "classifier" not in (guessed := _record(labels)):
        return
    anew = f"to begin anew, remove the pseudo-* and finetune-* of {labels.parent}"
    contest.check_same(labels, record, anew)
    if encoder is None:
        return
    latest = Path(guessed["classifier"])
    if not (file := latest / "provenance.json").is_file():
        return  # removed since
    made = runs.read_json(file, "make finetune")["inputs"]
    if made.get(str(encoder), (now := runs.sha256(encoder))) != now:
        raise InputError(
            f"{labels} was labeled by {latest}, which began at another {encoder}; {anew}"
        )


def _learned(files: list[Path], encoder: Path | None) -> Manifest:
    """Images whose labels the encoder, or who gave the pseudo-labels among `files`, learned."""
    learned = [learned_labels(encoder.parents[1])] if encoder else []
    for file in files:
        guesser = _record(file).get("classifier")
        if guesser and Path(guesser, "trained_on.csv").is_file():  # or removed since
            learned.append(labeled_images(Path(guesser)))
    return Manifest.concatenate([Manifest.of("", []), *learned])


def _marks(c: Finetune, train: Manifest, files: list[Path]) -> dict[str, bool]:
    """`classifiers.MARKS` of this fine-tuning, of who gave the pseudo-labels among `files`, or of
    who chose the requested ones.
    """
    own = c.init == "outside", c.monitor == "val" or bool((train.split == "val").any())
    of_files = [_record(file) for file in files]
    return {m: o or any(r.get(m) for r in of_files) for m, o in zip(MARKS, own, strict=True)}


def _goes_on(facts: runs.Run) -> bool:
    """Whether an interrupted training of the same facts goes on from its checkpoint."""
    plan, checkpoint = facts.folder / "plan.json", facts.folder / "checkpoint.pt"
    if not plan.is_file() or not checkpoint.is_file():
        return False
    return not runs.differences(runs.read_json(plan, "make finetune")["facts"], facts.facts)


def run(
    recipe: Recipe,
    plain: dict[str, Any],
    force: bool = False,
    folder: Path | None = None,
    exact: bool = True,
) -> Path:
    """Fine-tune on the labels that are there now; the folder of the round, or the one given.

    Labeled splits are classified in float32, as the organizers do, or as fast as can be where it
    need not be `exact`.
    """
    c, contest, name = recipe.finetune, load_contest(recipe.data.contest), recipe.entry
    rehearsal = contest.rehearsal or recipe.data.rehearsal
    if c.monitor == "val" and rehearsal:
        raise InputError(
            "finetune: monitor is 'val', but in a rehearsal val stands for the secret test; "
            "'holdout' is expected"
        )
    files, entry = _manifests(recipe, contest), runs.entry_folder(name)
    round_ = runs.label_rounds(contest.folder, entry)
    folder = folder or runs.finetune_folder(name, round_)
    inputs, pretrained = [contest.folder / "contest.json", *files], None
    if c.init == "pretrained":
        pretrained = contest.finished(entry / "pretrain", "make pretrain") / "encoder.safetensors"
        inputs.append(pretrained)
    elif c.init == "outside" and c.weights is not None and Path(c.weights).is_file():
        inputs.append(Path(c.weights))
    for file in files:
        _check_pseudo_labels(file, contest, pretrained)
    facts = runs.Run.of(folder, plain, ("encoder", "finetune"), inputs)
    if facts.is_current() and not force:
        runs.say(f"{folder} is up to date (--force runs it anew)")
        return folder
    check_budget(c)
    accelerator = make_accelerator(c.precision, folder)
    learned = _learned(files, pretrained)
    train, held = training_set(files, c.fraction, c.per_class, c.holdout, recipe.seed, learned)
    runs.say(
        f"{len(train):,} labels from {', '.join(f.name for f in files)}, {len(held):,} held out"
    )
    if rehearsal and (train.split == "val").any():
        raise InputError(
            "finetune: labels of val are among the manifests, but in a rehearsal val stands for "
            "the secret test"
        )
    encoder, spec = initial_encoder(recipe, pretrained)
    resolutions, width = c.resolutions or [contest.size[0]], features(encoder)
    size = c.eval_resolution or resolutions[-1]
    for pixels in {*resolutions, size}:
        check_size(encoder, pixels)
    classifier = Classifier(encoder, build_head(c.head, width, contest.classes))
    classifier.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    begun = not force and _goes_on(facts)
    if c.probe_first and c.head == "linear" and c.init != "scratch" and not begun:
        weights = label_weights(train, c.balanced, c.weigh_by_confidence)
        probe(classifier, contest.pool(train), train.label, size, contest, c.probe_c, weights)
    freeze(encoder, c.train, c.blocks)
    seen = contest.manifest("val").usable() if c.monitor == "val" else held
    trainer = finetuner(recipe, contest, classifier, accelerator, facts, train, seen, size)
    facts.begin(anew=force)  # everything is in order: what was finished here no longer is
    plan = trainer.plan(c, len(train), resolutions)
    history = trainer.fit(plan, "finetune")
    final = trainer.module.final()  # type: ignore[operator]
    if c.precise_bn is not None:
        order = np.random.default_rng(recipe.seed).permutation(len(train))[: c.precise_bn]
        pool = contest.pool(train.take(order))
        renew_statistics(final, classifier, pool, size, contest)
    head = {"kind": c.head, "features": width, "classes": contest.classes}
    metadata: dict[str, Any] = {"encoder": spec, "head": head, "resolution": size}
    metadata |= {"mean": contest.mean, "std": contest.std} | _marks(c, train, files)
    for split in contest.splits_with(unlabeled=c.unlabeled):
        file, k = folder / "logits" / f"{split}.npy", contest.classes
        predict_split(final, contest, split, file, k, size, exact=exact and split != "unlabeled")
    if accelerator.is_main_process:
        save_tensors(folder / "classifier.safetensors", final.state_dict(), metadata)
        write_manifest(folder / "trained_on.csv", train, PSEUDO_LABELS)
        write_manifest(folder / "holdout.csv", held, PSEUDO_LABELS)
        runs.write_json(folder / "history.json", history)
        scores = report(folder, contest, held)
        took = {"steps": plan.total, "minutes": minutes_of(history, c.batch_size)}
        facts.finish(round=round_, labels=len(train), **took, **scores)
        for key, value in scores.items():
            if value is not None:
                runs.say(f"{key}: {value:.2f} %")
    barrier()  # what comes next may read all this
    runs.say(f"wrote {folder}; next: make pseudo-label, make label-request or make submit")
    return folder


def main() -> None:
    recipe, options, plain = config.parse(__doc__, config.Force)
    run(recipe, plain, options.force)


if __name__ == "__main__":
    runs.stage(main)
