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
from accelerate import Accelerator

from pipeline import InputError, config, runs
from pipeline.checkpoint import save_tensors
from pipeline.classifiers import Classifier, build_head, freeze, probe, renew_statistics
from pipeline.distributed import barrier
from pipeline.draws import training_set
from pipeline.encoders import features
from pipeline.finetuning import finetuner, initial_encoder, label_weights, report
from pipeline.inference import check_size, predict_split
from pipeline.label_files import check_pseudo_labels, label_files, learned_before, marks_of
from pipeline.machine import make_accelerator
from pipeline.manifest import PSEUDO_LABELS, Contest, Manifest, load_contest, write_manifest
from pipeline.plan import check_budget, minutes_of
from pipeline.recipe import Recipe
from pipeline.training_recipe import Finetune


def run(
    recipe: Recipe,
    plain: dict[str, Any],
    force: bool = False,
    folder: Path | None = None,
    exact: bool = True,
) -> Path:
    """Fine-tune on the labels that there are now; the folder of the round, or the one given.

    Labeled splits are classified in float32, as the organizers do, or as fast as can be where it
    need not be `exact`.
    """
    c, contest, entry = recipe.finetune, _contest(recipe), runs.entry_folder(recipe.entry)
    files, round_ = label_files(recipe, contest), runs.label_rounds(contest.folder, entry)
    folder = folder or runs.finetune_folder(recipe.entry, round_)
    inputs, pretrained = _inputs(c, contest, entry, files)
    facts = runs.Run.of(folder, plain, ("encoder", "finetune"), inputs)
    if facts.is_current() and not force:
        runs.say(f"{folder} is up to date (--force runs it anew)")
        return folder
    check_budget(c)
    accelerator = make_accelerator(c.precision, folder)
    train, held = _labels(recipe, contest, files, pretrained)
    resolutions = c.resolutions or [contest.size[0]]
    sizes = [*resolutions, size := c.eval_resolution or resolutions[-1]]
    begun = not force and _goes_on(facts)
    classifier, spec = _classifier(recipe, contest, pretrained, train, sizes, accelerator, begun)
    seen = contest.manifest("val").usable() if c.monitor == "val" else held
    trainer = finetuner(recipe, contest, classifier, accelerator, facts, train, seen, size)
    facts.begin(anew=force)  # everything is in order: what was finished here no longer is
    plan = trainer.plan(c, len(train), resolutions)
    history = trainer.fit(plan, "finetune")
    final = trainer.module.final()  # type: ignore[operator]
    if c.precise_bn is not None:
        order = np.random.default_rng(recipe.seed).permutation(len(train))[: c.precise_bn]
        renew_statistics(final, classifier, contest.pool(train.take(order)), size, contest)
    for split in contest.splits_with(unlabeled=c.unlabeled):
        file, k = folder / "logits" / f"{split}.npy", contest.classes
        predict_split(final, contest, split, file, k, size, exact=exact and split != "unlabeled")
    if accelerator.is_main_process:
        metadata = spec | {"resolution": size, "mean": contest.mean, "std": contest.std}
        metadata |= marks_of(c, train, files)
        save_tensors(folder / "classifier.safetensors", final.state_dict(), metadata)
        write_manifest(folder / "trained_on.csv", train, PSEUDO_LABELS)
        write_manifest(folder / "holdout.csv", held, [*PSEUDO_LABELS, "note"])
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


def _is_rehearsal(recipe: Recipe, contest: Contest) -> bool:
    return contest.rehearsal or recipe.data.rehearsal


def _contest(recipe: Recipe) -> Contest:
    """The recipe's contest; InputError where it would choose by the val of a rehearsal."""
    contest = load_contest(recipe.data.contest)
    if recipe.finetune.monitor == "val" and _is_rehearsal(recipe, contest):
        raise InputError(
            "finetune: monitor is 'val', but in a rehearsal val stands for the secret test; "
            "'holdout' is expected"
        )
    return contest


def _inputs(
    c: Finetune, contest: Contest, entry: Path, files: list[Path]
) -> tuple[list[Path], Path | None]:
    """All files that decide the result, and which of them is the pretrained encoder."""
    inputs, pretrained = [contest.folder / "contest.json", *files], None
    if c.init == "pretrained":
        pretrained = contest.finished(entry / "pretrain", "make pretrain") / "encoder.safetensors"
        inputs.append(pretrained)
    elif c.init == "outside" and c.weights is not None and Path(c.weights).is_file():
        inputs.append(Path(c.weights))
    for file in files:
        check_pseudo_labels(file, contest, pretrained)
    return inputs, pretrained


def _labels(
    recipe: Recipe, contest: Contest, files: list[Path], pretrained: Path | None
) -> tuple[Manifest, Manifest]:
    """What to train on and what is held out; InputError for labels of val in a rehearsal."""
    c, learned = recipe.finetune, learned_before(files, pretrained)
    train, held = training_set(files, c.fraction, c.per_class, c.holdout, recipe.seed, learned)
    runs.say(
        f"{len(train):,} labels from {', '.join(f.name for f in files)}, {len(held):,} held out"
    )
    if _is_rehearsal(recipe, contest) and (train.split == "val").any():
        raise InputError(
            "finetune: labels of val are among the manifests, but in a rehearsal val stands for "
            "the secret test"
        )
    return train, held


def _goes_on(facts: runs.Run) -> bool:
    """Whether an interrupted training of the same facts goes on from its checkpoint."""
    plan, checkpoint = facts.folder / "plan.json", facts.folder / "checkpoint.pt"
    if not plan.is_file() or not checkpoint.is_file():
        return False
    return not runs.differences(runs.read_json(plan, "make finetune")["facts"], facts.facts)


def _classifier(
    recipe: Recipe,
    contest: Contest,
    pretrained: Path | None,
    train: Manifest,
    sizes: list[int],
    accelerator: Accelerator,
    begun: bool,
) -> tuple[Classifier, dict[str, Any]]:
    """The classifier to train, and how it is built.

    Its head begins at a probe of images as large as the last of `sizes`, where the recipe says so
    and training has not `begun`.
    """
    c = recipe.finetune
    encoder, spec = initial_encoder(recipe, pretrained)
    for pixels in {*sizes}:
        check_size(encoder, pixels)
    width = features(encoder)
    classifier = Classifier(encoder, build_head(c.head, width, contest.classes))
    classifier.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if c.probe_first and c.head == "linear" and c.init != "scratch" and not begun:
        weights = label_weights(train, c.balanced, c.weigh_by_confidence)
        probe(classifier, contest.pool(train), train.label, sizes[-1], contest, c.probe_c, weights)
    freeze(encoder, c.train, c.blocks)
    head = {"kind": c.head, "features": width, "classes": contest.classes}
    return classifier, {"encoder": spec, "head": head}


def main() -> None:
    recipe, options, plain = config.parse(__doc__, config.Force)
    run(recipe, plain, options.force)


if __name__ == "__main__":
    runs.stage(main)
