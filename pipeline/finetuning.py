"""Fine-tuning: the classifier to start from, its trainer, and the report on the result."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from sklearn.metrics import classification_report
from torch import nn
from torch.nn import functional as F

from pipeline import InputError, runs
from pipeline.batch_norm import synchronize_batch_norm
from pipeline.batches import batch_at
from pipeline.checkpoint import load_tensors
from pipeline.classifiers import Classifier, Supervised, rates
from pipeline.consistency import Consistency, SemiSupervised
from pipeline.draws import balanced
from pipeline.feed import Feed, JoinedFeed
from pipeline.figures import confusion
from pipeline.inference import encoder_for, predict
from pipeline.manifest import Contest, Manifest
from pipeline.metrics import chunks, top_k
from pipeline.optim import build_optimizer, schedule
from pipeline.outside import load_outside
from pipeline.trainer import Trainer

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.training_recipe import Finetune


def initial_encoder(recipe: "Recipe", pretrained: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder with the weights to start from, and how it is built."""
    c, spec = recipe.finetune, asdict(recipe.encoder)
    torch.manual_seed(recipe.seed)
    if pretrained is not None:
        tensors, meta = load_tensors(pretrained)
        if wrong := runs.differences(meta["encoder"], spec, "encoder"):
            raise InputError(
                f"{pretrained} holds another encoder than the recipe names: {', '.join(wrong)}; "
                f"that of the pretraining is expected, or a pretraining of this one"
            )
    encoder = encoder_for(spec)
    if pretrained is not None:
        encoder.load_state_dict(tensors)
    elif c.init == "outside":
        runs.say(
            f"transfer learning from {c.weights}: a comparison, not allowed in a contest entry"
        )
        runs.say(load_outside(str(c.weights), encoder))
    return encoder, spec


def label_weights(
    train: Manifest, is_balanced: bool, by_confidence: bool
) -> npt.NDArray[np.float32]:
    """How much each label [n] counts in the probe: as often as `balanced` shows it, as much as it
    is sure.
    """
    shown = balanced(train.label) if is_balanced else np.arange(len(train))
    counts = np.bincount(shown, minlength=len(train))
    weights = counts * train.confidence if by_confidence else counts
    return weights.astype(np.float32)


def finetuner(
    recipe: "Recipe",
    contest: Contest,
    classifier: Classifier,
    accelerator: Accelerator,
    facts: runs.Run,
    train: Manifest,
    seen: Manifest,
    size: int,
) -> Trainer:
    """A trainer of `classifier` on the labels `train`, which looks at `seen` (may be empty) on
    the way.
    """
    c = recipe.finetune
    consistency = c.consistency() if c.consistency is not None else None
    module = _module(c, classifier, contest.classes, train, consistency)
    synchronize_batch_norm(module.classifier, accelerator.device)
    feed = _feed(recipe, contest, accelerator, train, consistency)
    backbone = 1.0 if c.init == "scratch" else c.backbone_lr
    factors = rates(classifier, backbone, c.layer_decay)
    optimizer = build_optimizer(c.optimizer, factors, c.batch_size)
    lr = c.optimizer.scaled_lr(c.batch_size)
    plateau = None
    if c.schedule == "plateau":
        if not len(seen):
            raise InputError(
                "finetune: schedule 'plateau' has no held-out labels to look at; a larger holdout "
                "or more labels of each class, or schedule 'cosine', is expected"
            )
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=c.patience)
    along = partial(schedule, warmup=c.optimizer.warmup, final=c.optimizer.final_lr)
    return Trainer(
        module=module,
        optimizer=optimizer,
        accelerator=accelerator,
        folder=facts.folder,
        facts=facts.facts,
        feed=feed,
        lr=None if plateau else lambda progress: lr * along(progress),
        log_steps=c.log_steps,
        checkpoint_minutes=c.checkpoint_minutes,
        evaluate=partial(judge, module, contest, seen, size) if len(seen) else None,
        evals=c.evals if len(seen) else 0,
        plateau=plateau,
        watch="heldout_loss",
        signs=module.signs if isinstance(module, SemiSupervised) else None,
    )


def _module(
    c: "Finetune",
    classifier: Classifier,
    classes: int,
    train: Manifest,
    consistency: Consistency | None,
) -> Supervised:
    """What learns: labels alone, or unlabeled images' `consistency`, too."""
    options = {k: getattr(c, k) for k in ("label_smoothing", "ema", "mixup", "cutmix")}
    if consistency is None:
        return Supervised(classifier, classes, **options)
    asked = train.split != "train"  # a strategy's choice, or a classifier's guess
    drawn = train if asked.all() else train.take(~asked)
    counts = torch.from_numpy(drawn.label).bincount(minlength=classes)
    consistency.begin(counts / counts.sum())
    return SemiSupervised(classifier, classes, consistency, **options)


def _feed(
    recipe: "Recipe",
    contest: Contest,
    accelerator: Accelerator,
    train: Manifest,
    consistency: Consistency | None,
) -> Feed | JoinedFeed:
    """The images of each step: labeled ones and, where there is `consistency`, unlabeled ones."""
    c, seed = recipe.finetune, recipe.seed
    weights = train.confidence if c.weigh_by_confidence else np.ones(len(train))
    targets = torch.from_numpy(train.label), torch.from_numpy(weights.astype(np.float32))
    order = balanced(train.label) if c.balanced else np.arange(len(train))

    def chosen(step: int) -> npt.NDArray[np.int64]:
        return order[batch_at(len(order), c.batch_size, seed, step)]

    further = contest.mean, contest.std, accelerator
    pool, size = contest.pool(train), c.batch_size
    own = Feed(pool, [c.view], size, seed, *further, targets, choose=chosen)
    if consistency is None:
        return own
    pool, size = contest.pool(contest.manifest("unlabeled").usable()), consistency.ratio * size
    return JoinedFeed(own, Feed(pool, [c.view, c.strong_view], size, seed + 1, *further))


def judge(module: Supervised, contest: Contest, seen: Manifest, size: int) -> dict[str, float]:
    """Cross entropy and top-1 in percent of the classifier so far on labeled images."""
    logits = np.empty((len(seen), contest.classes), np.float32)
    pool = contest.pool(seen)
    predict(module.final(), pool, size, contest.mean, contest.std, logits, what="held out")
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(seen.label))
    return {"heldout_loss": float(loss), "heldout_top1": top_k(logits, seen.label, [1])[1]}


def rows_of(folder: Path, images: Manifest, width: int, made_by: str) -> npt.NDArray[np.float32]:
    """The rows [n, width] of a manifest's images in `folder`/SPLIT.npy, logits or embeddings."""
    out = np.empty((len(images), width), np.float32)
    for split in np.unique(images.split):
        file = runs.require(folder / f"{split}.npy", made_by)
        of, array = np.flatnonzero(images.split == split), np.load(file, mmap_mode="r")
        for part in chunks(len(of), width):
            out[of[part]] = array[images.index[of[part]]]
    return out


def report(folder: Path, contest: Contest, held: Manifest) -> dict[str, float | None]:
    """Scores on val and on the held-out labels; writes report.txt and confusion.png."""
    scores: dict[str, float | None] = {"val_top1": None, "val_top5": None, "holdout_top1": None}
    if len(held):
        logits = rows_of(folder / "logits", held, contest.classes, "make finetune")
        scores["holdout_top1"] = top_k(logits, held.label, [1])[1]
    if "val" not in contest.splits:
        return scores
    rows, labels = contest.usable("val"), contest.labels("val")
    rows = rows[labels[rows] >= 0]
    logits = np.load(folder / "logits" / "val.npy", mmap_mode="r")[rows]
    scores |= {f"val_top{k}": v for k, v in top_k(logits, labels[rows], [1, 5]).items()}
    numbers = list(range(contest.classes))
    predicted = logits.argmax(1)
    text = classification_report(
        labels[rows], predicted, labels=numbers, target_names=contest.names, zero_division=0
    )
    with runs.replacing(folder / "report.txt") as aside:
        aside.write_text(text, encoding="utf-8")
    confusion(folder / "confusion.png", labels[rows], predicted, contest.names)
    return scores
