"""The sections of a recipe that train: pretrain and finetune, and what is checked of both."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

import pipeline.methods  # noqa: F401  (its files register themselves)
from pipeline import InputError
from pipeline.checks import check
from pipeline.consistency import Consistency
from pipeline.methods.base import Method
from pipeline.methods.simclr import SimCLR
from pipeline.optim import Optimizer
from pipeline.supervision import SupervisedContrast
from pipeline.views import View

BUDGETS = ("epochs", "steps", "minutes")


def check_schedule(section: str, config: Any) -> None:
    """At most one budget, and resolutions that make sense."""
    given = {b: getattr(config, b) for b in BUDGETS if getattr(config, b) is not None}
    if len(given) > 1:
        raise InputError(
            f"{section}: one of epochs, steps and minutes is expected as a budget; "
            f"{' and '.join(given)} are given; set the others to null"
        )
    check(section, "above 0", **given)
    check(section, "1 or more", log_steps=config.log_steps)
    check(section, "2 or more", batch_size=config.batch_size)
    sizes = config.resolutions
    if sizes is not None and (not sizes or min(sizes) < 8):
        raise InputError(f"{section}: resolutions are {sizes}; 8 pixels or more are expected")


@dataclass(frozen=True)
class Pretrain:
    method: Callable[[nn.Module], Method] = SimCLR
    """The method, a class of pipeline/methods, with its arguments."""
    splits: list[str] = field(default_factory=lambda: ["unlabeled", "train"])
    """Splits whose images are used, without labels."""
    supervision: Callable[[], SupervisedContrast] | None = None
    """SupervisedContrast joins the labels of train; null learns without labels."""
    views: list[View] = field(default_factory=lambda: [View()])
    """How the views are drawn: one entry with count 2, or an entry for each."""
    resolutions: list[int] = field(default_factory=lambda: [96])
    """Pixels of the views; several share the budget equally, one after the other."""
    batch_size: int = 256
    """Images in a step, over all processes."""
    micro_batch: int | None = None
    """Images at a time, over all processes, for batches larger than the memory; exact, but for
    batch norm, which is over these.  Costs a second forward pass.
    """
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: float | None = None
    """Budget in passes over the images."""
    steps: int | None = None
    """Budget in steps."""
    minutes: float | None = None
    """Budget in minutes, turned into steps by a short calibration before step 0."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """auto: bf16 where the processor supports it."""
    checkpoint_minutes: float = 10.0
    """At most this much is lost when the run is interrupted."""
    log_steps: int = 10
    """Steps between log lines; losses are checked for NaN as often."""
    knn_evals: int = 10
    """How often kNN accuracy on held-out labeled images is measured over the run."""
    knn_images: int = 2000
    """Labeled training images used for that, half as neighbors, half as queries."""
    on_collapse: Literal["stop", "warn"] = "stop"
    """What happens where the encoder has collapsed, by the signs of pipeline/collapse.py."""

    def __post_init__(self) -> None:
        check_schedule("pretrain", self)
        if sum(view.count for view in self.views) < 2:
            raise InputError("pretrain: 2 views or more are expected of an image")
        check("pretrain", "0 or more", knn_evals=self.knn_evals)
        check("pretrain", "2 or more", knn_images=self.knn_images, micro_batch=self.micro_batch)


@dataclass(frozen=True)
class Finetune:
    init: Literal["pretrained", "scratch", "outside"] = "pretrained"
    """The encoder's weights: this entry's pretraining, random, or `weights` (transfer learning)."""
    weights: str | None = None
    """Outside weights: a local file (timm, torchvision, MoCo or SimCLR keys) or 'timm'."""
    manifests: list[str] = field(default_factory=lambda: ["train", "requested", "pseudo"])
    """Label manifests: train, requested (all that came), pseudo (the newest), or CSV files."""
    fraction: float = 1.0
    """Fraction of the labels of each class that is used, drawn by seed."""
    per_class: int | None = None
    """Number of labels of each class that is used, drawn by seed; null takes `fraction`."""
    head: Literal["linear", "mlp"] = "linear"
    """The classifier on the encoder."""
    train: Literal["head", "last", "all"] = "all"
    """What is trained beside the head: nothing, the last `blocks` stages, or the whole encoder."""
    blocks: int = 1
    """Stages of the encoder that are trained with `train: last`."""
    backbone_lr: float = 0.1
    """Factor of the encoder's learning rate."""
    layer_decay: float = 1.0
    """Further factor of it for each stage before the last, nearer to the pixels."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=0.05, lr_rule="constant"))
    schedule: Literal["cosine", "plateau"] = "cosine"
    """plateau: the rate is divided by 10 when the held-out loss stops falling."""
    patience: int = 3
    """Held-out evaluations without progress before a plateau lowers the rate."""
    view: View = field(
        default_factory=lambda: View(1, crop_scale=(0.2, 1.0), jitter_p=0, grayscale_p=0, blur_p=0)
    )
    """Augmentation of the training images; jitter_p, grayscale_p and blur_p are 0 if not given."""
    consistency: Callable[[], Consistency] | None = None
    """Learn from the unlabeled images, too: a class of pipeline/consistency.py; null does not."""
    strong_view: View = field(
        default_factory=lambda: View(1, rotation_p=0.5, solarize_p=0.1, erase_p=0.5)
    )
    """Augmentation of the strong view of an unlabeled image; `view` is that of the weak one."""
    resolutions: list[int] | None = None
    """Pixels of the training images, as in pretrain; null takes the packed size."""
    eval_resolution: int | None = None
    """Pixels of classified images; null takes the last of `resolutions` (cf. arXiv 1906.06423)."""
    batch_size: int = 128
    """Images in a step, over all processes."""
    epochs: float | None = None
    """Budget in passes over the labeled images."""
    steps: int | None = None
    """Budget in steps."""
    minutes: float | None = None
    """Budget in minutes, turned into steps by a short calibration."""
    label_smoothing: float = 0.1
    """Of the cross entropy."""
    mixup: float = 0.0
    """α of mixup (arXiv 1710.09412); 0 turns it off."""
    cutmix: float = 0.0
    """α of CutMix (arXiv 1905.04899); 0 turns it off; with both each step draws one."""
    balanced: bool = False
    """Every class is seen equally often: images of smaller ones come several times."""
    weigh_by_confidence: bool = False
    """A pseudo-label counts as much as it is sure."""
    ema: float = 0.0
    """Decay of the averaged weights that are kept in the end; 0 turns it off."""
    probe_first: bool = True
    """Start the linear head at a logistic regression on the frozen encoder."""
    probe_c: float = 10.0
    """Inverse regularization of that logistic regression."""
    precise_bn: int | None = None
    """Training images, at most, over which batch norm's statistics are taken anew in the end, at
    `eval_resolution` and not augmented (arXiv 2105.07576); null keeps those of training."""
    holdout: float = 0.1
    """Fraction of the labels of each class that is held out of training, to choose by."""
    monitor: Literal["holdout", "val"] = "holdout"
    """What plateaus and choices look at; val is refused in a rehearsal."""
    evals: int = 10
    """How often the held-out images are looked at over the run."""
    unlabeled: bool = True
    """Classify the unlabeled split too in the end, as pseudo-labels need it."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """auto: bf16 where the processor supports it."""
    checkpoint_minutes: float = 10.0
    """At most this much is lost when the run is interrupted."""
    log_steps: int = 10
    """Steps between log lines."""

    def __post_init__(self) -> None:
        check_schedule("finetune", self)
        if self.init == "outside" and not self.weights:
            raise InputError("finetune: init is 'outside'; weights (a file, or 'timm') is expected")
        for name in ("view", "strong_view"):
            if ((view := getattr(self, name)).count, view.size) != (1, 1):
                raise InputError(
                    f"finetune: {name} has count {view.count} and size {view.size:g}; 1 and 1 are "
                    f"expected"
                )
        for expected, names in (
            ("above 0, up to 1", ["fraction", "layer_decay"]),
            ("from 0 to below 1", ["holdout", "ema", "label_smoothing"]),
            ("1 or more", ["blocks", "per_class"]),
            ("2 or more", ["precise_bn"]),
            ("0 or more", ["evals", "patience", "mixup", "cutmix"]),
        ):
            check("finetune", expected, **{name: getattr(self, name) for name in names})
        if self.schedule == "plateau" and not self.evals:
            raise InputError("finetune: schedule 'plateau' looks at evals; 1 or more is expected")
