"""Which labeled images are used and which are held out: draws by class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import InputError
from pipeline.manifest import DOUBTFUL, Manifest, read_manifest

Integers = npt.NDArray[np.int64]


def choose_labels(
    labels: Integers, fraction: float = 1.0, per_class: int | None = None, seed: int = 0
) -> Integers:
    """Sorted positions of `per_class` images of each class, or of a fraction and at least one.

    They are drawn by seed, all of a class that has fewer.  A smaller draw with the same seed is
    part of a larger one.  Unknown labels (-1) are never drawn.
    """
    rank, count = _ranks(labels, np.random.default_rng(seed).random(len(labels)))
    if per_class is not None:
        want = np.full(len(labels), per_class)
    else:
        want = np.maximum(1, np.rint(fraction * count)).astype(np.int64)
    return np.flatnonzero((rank < want) & (labels >= 0))


def hold_out(images: Manifest, fraction: float) -> npt.NDArray[np.bool_]:
    """Which of the images [n] to hold out: a fraction of each class, in an order that their numbers
    decide once for all.

    So the stages, rounds and entries that learn from the same labels, whatever their seeds, hold
    out the same images, and a smaller fraction is part of a larger one.  A class of two or more
    gives at least one, where the fraction is above 0, and keeps at least one.  Unknown labels (-1)
    are never held out, nor are images that are byte-identical to one that is not.
    """
    labels, index = images.label, images.index
    if fraction <= 0 or not len(labels):
        return np.zeros(len(labels), np.bool_)
    rank, count = _ranks(labels, np.random.default_rng(1).random(index.max() + 1)[index])
    want = np.clip(np.rint(fraction * count), 1, np.maximum(count - 1, 0))
    want[count < 2] = 0
    apart = (rank < want) & (labels >= 0)
    digests = images.sha256[~apart & (labels >= 0)]
    return np.asarray(apart & ~np.isin(images.sha256, digests[digests != b""]))


def balanced(labels: Integers) -> Integers:
    """Sorted positions in which every class comes as often as the largest, its images in turn."""
    order = np.argsort(labels, kind="stable")
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    turns = np.arange(count.max(initial=0)) % count[:, None]  # [classes, largest]
    return np.sort(order[start[:, None] + turns], axis=None)


def learned_labels(entry: Path) -> Manifest:
    """Images whose labels the pretraining of runs/ENTRY learned from; none without supervision."""
    file = entry / "pretrain" / "trained_on.csv"
    return read_manifest(file) if file.is_file() else Manifest.of("", [])


def training_set(
    files: Sequence[Path],
    fraction: float,
    per_class: int | None,
    holdout: float,
    seed: int,
    learned: Manifest | None = None,
) -> tuple[Manifest, Manifest]:
    """What to train on and what is held out of it, from label manifests.

    The draw by `fraction` or `per_class` and the held-out share are of the first file, so that
    every round holds out the same images; none of those whose labels the encoder, or who gave
    pseudo-labels, `learned` is held out.  Labels noted as doubtful are held out as others are, so
    that what is measured there stays comparable, but not trained on: a class may be left without
    any.  Where an image has a label in several files, the first counts.  Raises InputError where no
    labeled image is left.
    """
    parts, seen, held = list[Manifest](), Manifest.of("", []), Manifest.of("", [])
    for number, file in enumerate(files):
        part = read_manifest(file)
        part = part.take(((part.note == "") | (part.note == DOUBTFUL)) & (part.label >= 0))
        part = part.take(~part.among(seen))
        if number:
            parts.append(part.usable())
        else:
            first = part.take(choose_labels(part.label, fraction, per_class, seed))
            apart = hold_out(first, holdout)
            if learned is not None:
                apart &= ~first.among(learned)
            held = first.take(apart)
            parts.append(first.take(~apart).usable())
            part = part.take((part.note == "") | part.among(held))  # others may be mended later
        seen = Manifest.concatenate([seen, part])
    if not len(seen):
        raise InputError(f"no labeled image in {', '.join(map(str, files)) or 'no manifest'}")
    train = Manifest.concatenate(parts)
    train = train.take(np.argsort(train.split, kind="stable"))  # one packed file after the other
    if not len(train):
        raise InputError("no labeled image is left to train on; a larger fraction is expected")
    return train, held


def _ranks(labels: Integers, keys: npt.NDArray[np.float64]) -> tuple[Integers, Integers]:
    """Each image's place [n] in its class by its key, and its class's size [n]."""
    order, rank = np.argsort(keys, kind="stable"), np.empty(len(labels), np.int64)
    rank[order] = place_in_group(labels[order])
    _, inverse, count = np.unique(labels, return_inverse=True, return_counts=True)
    return rank, count[inverse]


def place_in_group(groups: Integers) -> Integers:
    """How many earlier rows of the same group there are, for each row's group [n]."""
    order = np.argsort(groups, kind="stable")
    first = np.flatnonzero(np.r_[True, np.diff(groups[order]) != 0]) if len(order) else order
    place = np.empty(len(groups), np.int64)
    place[order] = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    return place
