"""Pretrain an encoder without labels.

python -m stages.pretrain --recipe recipes/demo.yaml
accelerate launch --num_processes 8 -m stages.pretrain --recipe recipes/spring21.yaml

Reads data_manifests/CONTEST/contest.json and data/CONTEST/SPLIT.npy; writes runs/ENTRY/pretrain/
{encoder.safetensors, checkpoint.pt, plan.json, history.json, curve.png, tensorboard,
provenance.json}.
Stopped or killed and started again, it goes on from the last checkpoint.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline import InputError, config, runs
from pipeline.batch_norm import synchronize_batch_norm
from pipeline.checkpoint import save_tensors
from pipeline.collapse import judge, judge_views
from pipeline.encoders import features
from pipeline.feed import Feed
from pipeline.figures import curve
from pipeline.inference import check_size, encoder_for, predict
from pipeline.machine import make_accelerator, peak_memory
from pipeline.manifest import Contest, choose_labels, load_contest
from pipeline.methods.base import Method
from pipeline.metrics import knn_accuracy
from pipeline.optim import build_optimizer, schedule
from pipeline.packed import Pool
from pipeline.recipe import Recipe
from pipeline.supervision import SupervisedContrast, join
from pipeline.trainer import Trainer


@dataclass(frozen=True)
class Options:
    force: bool = field(
        default=False, metadata={"help": "Start anew even where nothing has changed."}
    )
    plan_only: bool = field(
        default=False, metadata={"help": "Write plan.json, which fixes the steps, and stop."}
    )


def run(
    recipe: Recipe, plain: dict[str, Any], force: bool = False, plan_only: bool = False
) -> None:
    """Pretrain as `recipe` says, unless its finished result is there; `plan_only` makes no step."""
    c, contest = recipe.pretrain, load_contest(recipe.data.contest)
    folder = runs.entry_folder(recipe.entry or "entry") / "pretrain"
    facts = runs.Run.of(folder, plain, ("encoder", "pretrain"), [contest.folder / "contest.json"])
    if facts.is_current() and not force:
        runs.say(f"{folder} is up to date (--force runs it anew)")
        return
    if contest.rehearsal and "val" in c.splits:
        raise InputError(
            "pretrain: val is among the splits, but in a rehearsal it stands for the secret test"
        )
    _stop_or_say(c.on_collapse, judge_views(c.views))
    accelerator = make_accelerator(c.precision, folder)
    pool = Pool([(contest.packed(s), contest.usable(s)) for s in c.splits])
    if len(pool) < c.batch_size:
        raise InputError(
            f"pretrain: {len(pool)} images in {', '.join(c.splits)} and a batch_size of "
            f"{c.batch_size}; a batch no larger than the images is expected"
        )
    torch.manual_seed(recipe.seed)
    encoder = encoder_for(asdict(recipe.encoder))
    for size in {view.pixels(r) for r in c.resolutions for view in c.views}:
        check_size(encoder, size)
    method = c.method(encoder)
    labels, choose = None, None
    if c.supervision is not None:
        method.supervision = c.supervision()
        labels, choose = join(method, contest, c, recipe.seed)
    synchronize_batch_norm(method, accelerator.device)
    method.to(memory_format=torch.channels_last)
    mean, std = contest.mean, contest.std
    lr, rate = c.optimizer.scaled_lr(c.batch_size), c.optimizer
    micro = c.micro_batch if c.micro_batch != c.batch_size else None
    trainer = Trainer(
        module=method,
        optimizer=build_optimizer(c.optimizer, {method: 1.0}, c.batch_size),
        accelerator=accelerator,
        folder=folder,
        facts=facts.facts,
        feed=Feed(
            pool,
            c.views,
            c.batch_size,
            recipe.seed,
            mean,
            std,
            accelerator,
            method=method,
            micro_batch=micro,
            labels=labels,
            choose=choose,
        ),
        lr=lambda along: lr * schedule(along, rate.warmup, rate.final_lr),
        log_steps=c.log_steps,
        checkpoint_minutes=c.checkpoint_minutes,
        evaluate=_knn(recipe, contest, method) if "train" in contest.splits else None,
        evals=c.knn_evals,
        signs=method.signs,
        judge=partial(_judge, c.on_collapse),
    )
    facts.begin(anew=force)  # everything is in order: what was finished here no longer is
    plan = trainer.plan(c, len(pool), c.resolutions)
    shares = ", ".join(
        f"{n:,} at {r} px" for r, n in zip(plan.resolutions, plan.steps, strict=True)
    )
    several = f" on {n} processes" if (n := accelerator.num_processes) > 1 else ""
    runs.say(f"{len(pool):,} images, {plan.total:,} steps of {c.batch_size} ({shares}){several}")
    if plan_only:
        runs.say(f"wrote {folder}/plan.json; next: make pretrain")
        return
    history = trainer.fit(plan, "pretrain")
    if accelerator.is_main_process:
        metadata = {
            "encoder": asdict(recipe.encoder),
            "mean": contest.mean,
            "std": contest.std,
            "resolution": plan.resolutions[-1],
        }
        save_tensors(folder / "encoder.safetensors", encoder.state_dict(), metadata)
        runs.write_json(folder / "history.json", history)
        drawn = ("step", "loss", "knn")  # the other signs are in TensorBoard
        points = [{k: h[k] for k in drawn if k in h} for h in history]
        curve(folder / "curve.png", points, "pretraining")
    images = plan.total * c.batch_size
    facts.finish(
        steps=plan.total,
        images_seen=images,
        minutes=_minutes(history, c.batch_size),
        knn=_last(history, "knn"),
        peak_memory_mib=peak_memory(),
    )
    runs.say(f"wrote {folder}/encoder.safetensors after {images:,} images; next: make embed")


def _judge(on_collapse: str, history: list[dict[str, float]], along: float) -> None:
    """Stop the run, or say it once in a twentieth of it, where its newest signs are those of a
    collapse.
    """
    before = history[-2]["step"] if len(history) > 1 else 0
    total = history[-1]["step"] / along
    if on_collapse == "stop" or int(20 * before / total) < int(20 * along):
        _stop_or_say(on_collapse, judge(history, along))


def _stop_or_say(on_collapse: str, wrong: str | None) -> None:
    if wrong and on_collapse == "stop":
        raise InputError(
            f"pretrain: {wrong}.  The signs and limits are in docs/methods.md; "
            f"--pretrain.on_collapse warn goes on all the same"
        )
    if wrong:
        runs.say(f"warning: {wrong}")


def _minutes(history: list[dict[str, float]], batch_size: int) -> float:
    """Minutes of training, those before an interruption too; measuring kNN is left out."""
    logged = [h for h in history if "images_per_second" in h]
    steps = np.diff([0, *(h["step"] for h in logged)])
    return float(sum(steps * batch_size / [h["images_per_second"] for h in logged]) / 60)


def _last(history: list[dict[str, float]], key: str) -> float | None:
    return next((h[key] for h in reversed(history) if key in h), None)


def _knn(recipe: Recipe, contest: Contest, method: Method) -> Any:
    """kNN accuracy (k = 20, cosine, majority) of half of some labeled training images on the other
    half; with supervision of those whose labels it does not use, on the others.
    """
    c, labels, encoder = recipe.pretrain, contest.labels("train"), method.encoder
    known = contest.usable("train")
    known = known[labels[known] >= 0]
    share = min(1.0, c.knn_images / max(len(known), 1))
    rows = known[choose_labels(labels[known], share, None, recipe.seed)]
    rows = np.random.default_rng(recipe.seed).permutation(rows)
    half = len(rows) // 2
    if isinstance(method.supervision, SupervisedContrast):
        usable = contest.usable("train")
        unused = usable[method.supervision.used(labels[usable], recipe.seed) < 0]
        held = np.isin(rows, unused)
        rows, half = np.concatenate([rows[~held], rows[held]]), int((~held).sum())
    pool = Pool([(contest.packed("train"), rows)])

    def evaluate() -> dict[str, float]:
        x = np.empty((len(rows), features(encoder)), np.float32)
        size = c.resolutions[-1]
        predict(encoder, pool, size, contest.mean, contest.std, x, unit=True, what="kNN")
        y = labels[rows]
        score = knn_accuracy(x[:half], y[:half], x[half:], y[half:], 20)
        return {"knn": score}

    return evaluate


def main() -> None:
    recipe, options, plain = config.parse(__doc__, Options)
    run(recipe, plain, options.force, options.plan_only)


if __name__ == "__main__":
    runs.stage(main)
