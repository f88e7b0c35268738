"""Which classifiers vote in a submission, chosen by labels that none of them was trained on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline import InputError, runs
from pipeline.classifiers import Ensemble, load_classifier
from pipeline.inference import predict
from pipeline.manifest import Contest, Manifest, read_manifest
from pipeline.metrics import top_k

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_STEPS = 200  # of the weights' fit
_LEAST = 0.05  # a smaller weight is none


@dataclass(frozen=True)
class Choice:
    """What is submitted: folders of fine-tunings, what they weigh, whether mirror images are seen;
    and the top-1 on the held-out labels of everything that was tried, {what: percent}.
    """

    members: list[Path]
    weights: list[float]
    mirror: bool
    tried: dict[str, float]

    @property
    def plain(self) -> bool:
        """Whether one classifier sees an image once."""
        return len(self.members) == 1 and not self.mirror


def member_folder(contest: Contest, name: str) -> Path:
    """The fine-tuning that ENTRY (its latest) or ENTRY/finetune-K names; InputError without it, or
    where it is of another contest.
    """
    entry, _, round_ = name.partition("/")
    folder = runs.entry_folder(entry) / round_ if round_ else runs.latest_finetune(entry)
    contest.check_finetune(runs.finished(folder, "make finetune"))
    return folder


def held_by_all(folders: list[Path]) -> Manifest:
    """The labels that every one of the fine-tunings held out."""
    held = read_manifest(folders[0] / "holdout.csv")
    for folder in folders[1:]:
        held = held.take(held.among(read_manifest(folder / "holdout.csv")))
    return held


def choose(contest: Contest, folders: list[Path], mirror: bool) -> Choice:
    """The best of the single classifiers, their weighted vote and, if asked for, both with mirror
    images, by top-1 on the labels that all held out; of equal ones the first, so that what is more
    work has to be better.  The vote is judged with weights that were fitted, and members that were
    kept, by other labels.

    Raises InputError where there is something to choose and no label that all held out.
    """
    if len(folders) == 1 and not mirror:
        return Choice(folders, [1.0], False, {})
    held = held_by_all(folders)
    if not len(held):
        raise InputError(
            f"submit: {', '.join(map(str, folders))} held out no labels in common to choose by; "
            f"finetune.holdout above 0 in each is expected (with fraction or per_class one seed)"
        )
    tried: dict[str, float] = {}
    found: list[tuple[float, Choice]] = []
    for mirrored in (False, True) if mirror else (False,):
        p = np.stack([_probabilities(contest, held, folder, mirrored) for folder in folders])
        options = [([folder], [1.0], own) for folder, own in zip(folders, p, strict=True)]
        weights = vote_weights(p, held.label)
        if len(kept := np.flatnonzero(weights)) > 1:
            voters = [folders[k] for k in kept]
            options.append((voters, weights[kept].tolist(), cross_fitted(p, held.label)))
        for members, weigh, seen in options:
            score = top_k(seen, held.label, [1])[1]
            what = " + ".join(f"{w:.2f} {m}" for w, m in zip(weigh, members, strict=True))
            tried[what + (", mirrored" if mirrored else "")] = score
            found.append((score, Choice(members, weigh, mirrored, tried)))
    return max(found, key=lambda pair: pair[0])[1]


def _probabilities(contest: Contest, held: Manifest, folder: Path, mirror: bool) -> Floats:
    """Class probabilities [h, classes] of the held-out images by one classifier."""
    model, size = build([folder], [1.0], mirror, contest.size)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    out = np.empty((len(held), contest.classes), np.float32)
    pool, mean, std = contest.pool(held), contest.mean, contest.std
    predict(model, pool, size, mean, std, out, exact=True, what="held out")  # as is submitted
    return np.exp(out)


def mixture_weights(p: Floats, labels: Ints) -> Floats:
    """Weights [m] of sum 1 of probabilities `p` [m, n, classes] under which the labels [n] are the
    likeliest, by expectation maximization.
    """
    own = p[:, np.arange(len(labels)), labels].astype(np.float64) + 1e-12  # [m, n]
    weights = np.full(len(p), 1 / len(p))
    for _ in range(_STEPS if len(labels) else 0):
        parts = weights[:, None] * own
        weights = (parts / parts.sum(0)).mean(1)
    return weights.astype(np.float32)


def vote_weights(p: Floats, labels: Ints) -> Floats:
    """`mixture_weights` [m] in which models that would weigh less than 0.05 have no vote, unless
    all would.
    """
    weights = mixture_weights(p, labels)
    if (kept := weights >= _LEAST).any():
        weights[kept], weights[~kept] = mixture_weights(p[kept], labels), 0
    return weights


def cross_fitted(p: Floats, labels: Ints) -> Floats:
    """The weighted vote [n, classes] of probabilities `p` [m, n, classes], each half of the images
    with `vote_weights` by the labels of the other.
    """
    out = np.empty(p.shape[1:], np.float32)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    for half, other in ((even, odd), (odd, even)):
        out[half] = np.tensordot(vote_weights(p[:, other], labels[other]), p[:, half], 1)
    return out


def build(
    folders: list[Path], weights: list[float], mirror: bool, packed: tuple[int, int]
) -> tuple[Ensemble, int]:
    """The ensemble of saved classifiers, and `shown_size` for images packed as [h, w]."""
    loaded = [load_classifier(folder / "classifier.safetensors") for folder in folders]
    sizes = [int(metadata["resolution"]) for _, metadata in loaded]
    models = [model for model, _ in loaded]
    return Ensemble(models, weights, sizes, mirror), shown_size(sizes, packed)


def shown_size(sizes: list[int], packed: tuple[int, int]) -> int:
    """Pixels of the square images that an ensemble is shown, which it resizes to its members'
    `sizes`: those of the packed images, so that no member sees what was resized to another's, or
    the largest of `sizes` where packed images [h, w] are not square.
    """
    height, width = packed
    return height if height == width else max(sizes)
