"""Pretraining: its trainer, and what looks at the encoder on the way."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator

from pipeline import InputError, runs
from pipeline.batch_norm import synchronize_batch_norm
from pipeline.collapse import judge, judge_views
from pipeline.draws import choose_labels
from pipeline.encoders import features
from pipeline.feed import Feed
from pipeline.inference import check_size, encoder_for, predict
from pipeline.manifest import Contest
from pipeline.methods.base import Method
from pipeline.metrics import knn_accuracy
from pipeline.optim import build_optimizer, schedule
from pipeline.packed import Pool
from pipeline.supervision import SupervisedContrast, join
from pipeline.trainer import Trainer

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


def check_inputs(recipe: "Recipe", contest: Contest) -> Pool:
    """The images to pretrain on; InputError where they, or their views, are not what is needed."""
    c = recipe.pretrain
    if (contest.rehearsal or recipe.data.rehearsal) and "val" in c.splits:
        raise InputError(
            "pretrain: val is among the splits, but in a rehearsal it stands for the secret test"
        )
    _stop_or_say(c.on_collapse, judge_views(c.views))
    pool = Pool([(contest.packed(s), contest.usable(s)) for s in c.splits])
    if len(pool) < c.batch_size:
        raise InputError(
            f"pretrain: {len(pool)} images in {', '.join(c.splits)} and a batch_size of "
            f"{c.batch_size}; a batch no larger than the images is expected"
        )
    return pool


def pretrainer(
    recipe: "Recipe", contest: Contest, pool: Pool, accelerator: Accelerator, facts: runs.Run
) -> Trainer:
    """A trainer of the recipe's method, as `module`, on the images of `pool`."""
    c = recipe.pretrain
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
    feed = Feed(
        pool,
        c.views,
        c.batch_size,
        recipe.seed,
        contest.mean,
        contest.std,
        accelerator,
        method=method,
        micro_batch=c.micro_batch if c.micro_batch != c.batch_size else None,
        labels=labels,
        choose=choose,
    )
    lr, rate = c.optimizer.scaled_lr(c.batch_size), c.optimizer
    evaluate, queries = _knn(recipe, contest, method) if "train" in contest.splits else (None, 0)
    if method.negatives > len(pool):
        runs.say(
            f"warning: {type(method).__name__}'s queue holds keys of {method.negatives:,} images, "
            f"and there are {len(pool):,}: an image is its own negative; a shorter queue is better"
        )
    return Trainer(
        module=method,
        optimizer=build_optimizer(c.optimizer, {method: 1.0}, c.batch_size),
        accelerator=accelerator,
        folder=facts.folder,
        facts=facts.facts,
        feed=feed,
        lr=lambda along: lr * schedule(along, rate.warmup, rate.final_lr),
        log_steps=c.log_steps,
        checkpoint_minutes=c.checkpoint_minutes,
        evaluate=evaluate,
        evals=c.knn_evals,
        signs=method.signs,
        judge=partial(_judge, c.on_collapse, queries),
    )


def _judge(on_collapse: str, queries: int, history: list[dict[str, float]], along: float) -> None:
    """Stop the run, or say it once in a twentieth of it, where its newest signs are those of a
    collapse.
    """
    step = history[-1]["step"]
    before = next((h["step"] for h in reversed(history) if h["step"] < step), 0)
    rarely = int(20 * along * before / step) < int(20 * along) or "knn" in history[-1]
    if on_collapse == "stop" or rarely:
        _stop_or_say(on_collapse, judge(history, along, queries))


def _stop_or_say(on_collapse: str, wrong: str | None) -> None:
    """Raise InputError with what is `wrong`, or print it where `on_collapse` is 'warn'."""
    if wrong and on_collapse == "stop":
        raise InputError(
            f"pretrain: {wrong}.  The signs and limits are in docs/methods.md; "
            f"--pretrain.on_collapse warn goes on all the same"
        )
    if wrong:
        runs.say(f"warning: {wrong}")


def _knn(recipe: "Recipe", contest: Contest, method: Method) -> tuple[Any, int]:
    """kNN accuracy (cosine, majority) of half of some labeled training images on the other half,
    and how many are asked about; with supervision of those whose labels it does not use, on the
    others; None where either is empty.  20 images vote, or as many as there are of a class: if all
    did, they would say the same of every image.
    """
    c, labels, encoder = recipe.pretrain, contest.labels("train"), method.encoder
    known = contest.usable("train")
    known = known[labels[known] >= 0]
    share = min(1.0, c.knn_images / max(len(known), 1))
    rows = known[choose_labels(labels[known], share, None, recipe.seed)]
    rows = np.random.default_rng(recipe.seed).permutation(rows)
    half = len(rows) // 2
    if isinstance(method.supervision, SupervisedContrast):
        learned = np.isin(rows, method.supervision.learned(contest).index)
        rows, half = np.concatenate([rows[learned], rows[~learned]]), int(learned.sum())
    if not 0 < half < len(rows):
        return None, 0
    pool = Pool([(contest.packed("train"), rows)])
    k = min(20, max(1, half // contest.classes))

    def evaluate() -> dict[str, float]:
        x = np.empty((len(rows), features(encoder)), np.float32)
        size = c.resolutions[-1]
        predict(encoder, pool, size, contest.mean, contest.std, x, unit=True, what="kNN")
        y = labels[rows]
        score = knn_accuracy(x[:half], y[:half], x[half:], y[half:], k)
        return {"knn": score}

    return evaluate, len(rows) - half
