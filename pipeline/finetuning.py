"""The trainer of a classifier: its rates, its schedule, and what it is judged by on the way."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from pipeline.classifiers import Classifier, Supervised
from pipeline.distributed import synchronize_batch_norm
from pipeline.feed import Feed
from pipeline.inference import predict
from pipeline.manifest import Contest, Manifest
from pipeline.metrics import top_k
from pipeline.optim import build_optimizer, schedule
from pipeline.runs import Run
from pipeline.trainer import Trainer

if TYPE_CHECKING:
    from pipeline.config import Recipe


def finetuner(
    recipe: "Recipe",
    contest: Contest,
    classifier: Classifier,
    accelerator: Accelerator,
    facts: Run,
    train: Manifest,
    seen: Manifest,
    size: int,
) -> Trainer:
    """A trainer of `classifier` on the labels `train`, which looks at `seen` (may be empty) on
    the way.
    """
    c = recipe.finetune
    module = Supervised(classifier, c.label_smoothing, c.ema)
    synchronize_batch_norm(module.classifier, accelerator.device)
    backbone = 1.0 if c.init == "scratch" else c.backbone_lr
    modules = {classifier.encoder: backbone, classifier.head: 1.0}
    optimizer, lr = (
        build_optimizer(c.optimizer, modules, c.batch_size),
        c.optimizer.scaled_lr(c.batch_size),
    )
    pool, targets = contest.pool(train), torch.from_numpy(train.label)
    feed = Feed(
        pool, [c.view], c.batch_size, recipe.seed, contest.mean, contest.std, accelerator, targets
    )
    plateau = None
    if c.schedule == "plateau":
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
    )


def judge(module: Supervised, contest: Contest, seen: Manifest, size: int) -> dict[str, float]:
    """Cross entropy and top-1 in percent of the classifier so far on labeled images."""
    logits = np.empty((len(seen), contest.classes), np.float32)
    pool = contest.pool(seen)
    predict(module.final(), pool, size, contest.mean, contest.std, logits, what="held out")
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(seen.label))
    return {"heldout_loss": float(loss), "heldout_top1": top_k(logits, seen.label, [1])[1]}
