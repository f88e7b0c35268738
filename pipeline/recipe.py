"""A recipe: one frozen dataclass per section, every stage of a leaderboard entry."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipeline.propagation  # noqa: F401  (registers itself)
from pipeline import InputError
from pipeline.checks import check
from pipeline.encoders import Stem
from pipeline.pseudo_labels import Predictor, PseudoLabeler, Softmax, TopFraction
from pipeline.selection import Strategy
from pipeline.strategies import KMeans
from pipeline.training_recipe import Finetune, Pretrain


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

    def __post_init__(self) -> None:
        check("data", "8 or more", size=self.size)
        check("data", "1 or more", classes=self.classes, max_pixels=self.max_pixels)
        check("data", "1 or more", workers=self.workers)


@dataclass(frozen=True)
class Encoder:
    name: str = "resnet18"
    """timm's name of the model."""
    stem: Stem = "imagenet"
    """imagenet: as in timm; low_stride: 3×3 stride 1, max-pool; cifar: 3×3 stride 1, no pool."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, as drop_path_rate."""


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

    def __post_init__(self) -> None:
        check("evaluate", "1 or more", batch_size=self.batch_size, neighbors=self.neighbors)
        check("evaluate", "8 or more", resolution=self.resolution)
        check("evaluate", "above 0", temperature=self.temperature, linear_c=self.linear_c)
        if not self.k or min(self.k) < 1:
            raise InputError(f"evaluate: k is {self.k}; one or more numbers above 0 are expected")


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
        check("pseudo_label", "1 or more", rounds=self.rounds)


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
    members: list[str] = field(default_factory=list)
    """Further fine-tunings, ENTRY or ENTRY/finetune-K, that vote where that is better on labels
    that all held out.
    """
    mirror: bool = False
    """Every model sees an image and its mirror image, where that is better on held-out labels."""


@dataclass(frozen=True)
class Recipe:
    """A leaderboard entry: one section for each stage."""

    entry: str = ""
    """Name of the entry in runs/ and submissions/; empty takes the recipe's file name."""
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

    def __post_init__(self) -> None:
        if "/" in self.entry or self.entry in (".", ".."):
            raise InputError(f"entry is {self.entry!r}; a name without / is expected")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; 0 to {2**32 - 1} is expected")
