"""A recipe: one frozen dataclass per section, every stage of a leaderboard entry."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

import pipeline.methods
import pipeline.propagation  # noqa: F401  (registers itself)
from pipeline import InputError
from pipeline.consistency import Consistency
from pipeline.encoders import Stem
from pipeline.methods.base import Method
from pipeline.methods.simclr import SimCLR
from pipeline.optim import Optimizer
from pipeline.pseudo_labels import Predictor, PseudoLabeler, Softmax, TopFraction
from pipeline.selection import Strategy
from pipeline.strategies import KMeans
from pipeline.views import View

BUDGETS = ("epochs", "steps", "minutes")


def _check_schedule(section: str, config: Any) -> None:
    """At most one budget, and resolutions that make sense."""
    given = {b: getattr(config, b) for b in BUDGETS if getattr(config, b) is not None}
    if len(given) > 1:
        raise InputError(
            f"{section}: one of epochs, steps and minutes is expected as a budget; "
            f"{' and '.join(given)} are given; set the others to null"
        )
    if name := next((name for name, value in given.items() if value <= 0), None):
        raise InputError(f"{section}: {name} is {given[name]}; above 0 is expected")
    _check_least(section, config, log_steps=1, batch_size=2)
    sizes = config.resolutions
    if sizes is not None and (not sizes or min(sizes) < 8):
        raise InputError(f"{section}: resolutions are {sizes}; 8 pixels or more are expected")


def _check_least(section: str, config: Any, **least: int) -> None:
    """Every one of these fields that is given has its least value or more."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise InputError(f"{section}: {name} is {value}; {low} or more is expected")


@dataclass(frozen=True)
class Data:
    contest: str = "contest"
    """Name of the contest: data_manifests/CONTEST and data/CONTEST."""
    root: Path | None = None
    """The contest's folder (SPLIT/N.png, SPLIT_label_tensor.pt) or a folder of SPLIT/CLASS/*."""
    size: int | None = None
    """Resize every image to this many pixels square; null expects them all of one size."""
    classes: int | None = None
    """Number of classes of a contest; null takes it from the labels of train."""
    keep_duplicates: bool = False
    """Keep unlabeled images whose bytes are also in val or test."""
    max_pixels: int = 50_000_000
    """An image with more pixels than this is refused (decompression bombs)."""
    workers: int | None = None
    """Processes that decode; null takes every core."""
    rehearsal: bool = False
    """val stands for a secret test here: nothing may be chosen by it."""


@dataclass(frozen=True)
class Encoder:
    name: str = "resnet18"
    """timm's name of the model."""
    stem: Stem = "imagenet"
    """imagenet: as in timm; low_stride: 3×3 stride 1, max-pool; cifar: 3×3 stride 1, no pool."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, as drop_path_rate."""


@dataclass(frozen=True)
class Pretrain:
    method: Callable[[nn.Module], Method] = SimCLR
    """The method, a class of pipeline/methods, with its arguments."""
    splits: list[str] = field(default_factory=lambda: ["unlabeled", "train"])
    """Splits whose images are used, without labels."""
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
        _check_schedule("pretrain", self)
        if sum(view.count for view in self.views) < 2:
            raise InputError("pretrain: 2 views or more are expected of an image")
        _check_least("pretrain", self, knn_evals=0, knn_images=2, micro_batch=2)


@dataclass(frozen=True)
class Evaluate:
    k: list[int] = field(default_factory=lambda: [1, 20, 200])
    """Numbers of neighbors."""
    temperature: float = 0.07
    """Of the weighted vote, exp(similarity / temperature)."""
    linear_c: float = 10.0
    """Inverse regularization of the logistic regression."""
    neighbors: int = 8
    """Neighbors shown for each sample image in the picture."""
    batch_size: int = 512
    """Images in a forward pass."""
    resolution: int | None = None
    """Pixels of the embedded images; null takes the last of pretrain's."""
    unlabeled: bool = True
    """Embed the unlabeled split too, as label requests need it."""


@dataclass(frozen=True)
class LabelRequest:
    strategy: Callable[[], Strategy] = KMeans
    """A class of pipeline/strategies.py, with its arguments."""
    budget: int = 12_800
    """Labels to ask for."""
    near_duplicate: float = 0.99
    """Cosine from which an image is a copy of another pick or of a labeled one; above 1: none."""
    voters: list[str] = field(default_factory=list)
    """Further entries whose latest fine-tuning votes beside this one's."""
    team: str = "00"
    """Team id NN in request_NN.csv."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.team):
            raise InputError(
                f"label_request: team is {self.team!r}; letters, digits, _ and - are expected"
            )


@dataclass(frozen=True)
class PseudoLabel:
    predictor: Callable[[], Predictor] = Softmax
    """Who predicts: Softmax or Propagation (pipeline/propagation.py), with its arguments."""
    strategy: Callable[[], PseudoLabeler] = TopFraction
    """Which predictions are taken: a class of pipeline/pseudo_labels.py, with its arguments."""
    rounds: int = 1
    """Rounds in one call; between two of them the classifier is fine-tuned."""
    stop_below: float = 0.0
    """No further round once fewer percent of the pseudo-labels than this differ from the last."""

    def __post_init__(self) -> None:
        _check_least("pseudo_label", self, rounds=1)


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
    """Augmentation of the training images."""
    consistency: Callable[[], Consistency] | None = None
    """Learn from the unlabeled images, too: a class of pipeline/consistency.py; null does not."""
    strong_view: View = field(default_factory=lambda: View(1, rotation_p=0.5, solarize_p=0.1))
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
        _check_schedule("finetune", self)
        if self.init == "outside" and not self.weights:
            raise InputError("finetune: init is 'outside'; weights (a file, or 'timm') is expected")
        for name in ("fraction", "layer_decay"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise InputError(f"finetune: {name} is {value}; above 0, up to 1 is expected")
        for name in ("holdout", "ema", "label_smoothing"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise InputError(f"finetune: {name} is {value}; from 0 to below 1 is expected")
        least = {"blocks": 1, "evals": 0, "patience": 0, "per_class": 1, "mixup": 0, "cutmix": 0}
        _check_least("finetune", self, **least)
        if self.schedule == "plateau" and not self.evals:
            raise InputError("finetune: schedule 'plateau' looks at evals; 1 or more is expected")


@dataclass(frozen=True)
class Submit:
    team_id: int = 0
    """Team number."""
    team_name: str = "team"
    """Team name."""
    email_address: str = "team@example.org"
    """Where the organizers write to."""
    round: int | None = None
    """K of the finetune-K to submit; null takes the latest."""
    test: str | None = None
    """Unlabeled split to predict for predictions.csv; null takes 'test' where there is one."""


@dataclass(frozen=True)
class Recipe:
    """A leaderboard entry: one section for each stage."""

    entry: str | None = None
    """Name of the entry in runs/ and submissions/; null takes the recipe's file name."""
    seed: int = 0
    """Seed of every random choice."""
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    pretrain: Pretrain = field(default_factory=Pretrain)
    evaluate: Evaluate = field(default_factory=Evaluate)
    label_request: LabelRequest = field(default_factory=LabelRequest)
    pseudo_label: PseudoLabel = field(default_factory=PseudoLabel)
    finetune: Finetune = field(default_factory=Finetune)
    submit: Submit = field(default_factory=Submit)
