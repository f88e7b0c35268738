"""A round of pseudo-labels: what it starts from, how right it is, and all rounds in a table."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import softmax

from pipeline import InputError, runs
from pipeline.checkpoint import load_torch
from pipeline.figures import AMBER, BLUE, GREEN, INK, SOFT, house_axes, save_figure
from pipeline.finetuning import rows_of
from pipeline.manifest import Contest, Integers, Manifest, read_manifest
from pipeline.metrics import chunks, fit_temperature
from pipeline.pseudo_labels import Evidence, Predictor
from pipeline.selection import eligible
from pipeline.tables import write_table

_GUESSED = re.compile(r"finetune-[0-9]+")  # the source of a pseudo-label is who gave it


def labeled_images(latest: Path, newer: Sequence[Path] = ()) -> Manifest:
    """Images whose labels are known and may be learned from: what the fine-tuning in `latest` was
    trained on, but for pseudo-labels, and the label files `newer` than it.
    """
    known, guessed = _trained_on(latest)
    known = known.take(~guessed)
    held = read_manifest(runs.require(latest / "holdout.csv", "make finetune"))
    for part in map(read_manifest, newer):
        new = ~part.among(known) & ~part.among(held) & (part.label >= 0)
        known = Manifest.concatenate([known, part.take(new)])
    return known


def _trained_on(latest: Path) -> tuple[Manifest, npt.NDArray[np.bool_]]:
    """What the fine-tuning in `latest` was trained on, and which of these labels are guesses."""
    known = read_manifest(runs.require(latest / "trained_on.csv", "make finetune"))
    guessed = [bool(_GUESSED.fullmatch(Path(source).name)) for source in known.source]
    return known, np.array(guessed, np.bool_)


def learned_guesses(latest: Path) -> bool:
    """Whether the classifier has learned from pseudo-labels: of images that it learned it is surer
    than of others, so that those apart tell at most how right its next ones are.
    """
    return bool(_trained_on(latest)[1].any())


def unlabeled_images(contest: Contest, known: Manifest) -> Manifest:
    """Usable unlabeled images that are not byte-identical to each other, to train or to a `known`
    one.
    """
    images = contest.manifest("unlabeled").usable()
    asked = np.isin(images.index, known.index[known.split == "unlabeled"])
    digests = np.concatenate([contest.manifest("train").usable().sha256, images.sha256[asked]])
    return images.take(np.isin(images.index, eligible(images.index, images.sha256, digests)))


def images_apart(contest: Contest, latest: Path, predictor: Predictor) -> tuple[Manifest, str]:
    """Labeled images that the classifier was not trained on, and what they are.

    They are those held out; without any those of val that it was not trained on, but for a
    `predictor` that looks at its images beside each other: val would take part in what is chosen.
    """
    held = read_manifest(runs.require(latest / "holdout.csv", "make finetune"))
    if len(held) or predictor.space:
        return held, "the held-out labels"
    val = contest.manifest("val").usable() if "val" in contest.splits else held
    apart = (val.label >= 0) & ~val.among(_trained_on(latest)[0])
    return val.take(apart), "val (reported, not chosen by)"


def evidence_of(
    contest: Contest,
    entry: Path,
    latest: Path,
    images: Manifest,
    apart: Manifest,
    known: Manifest,
    predictor: Predictor,
) -> tuple[Evidence, float | None]:
    """What a predictor may look at for `images` and those `apart`, one after the other, with the
    labels of those `known`; and the temperature by which the logits were divided, fitted on
    held-out labels, None without any.
    """
    both = Manifest.concatenate([images, apart])
    logits = rows_of(latest / "logits", both, contest.classes, "make finetune")
    held, temperature = read_manifest(latest / "holdout.csv").usable(), None  # none in doubt
    if len(held):
        temperature = fit_temperature(
            rows_of(latest / "logits", held, contest.classes, "make finetune"), held.label
        )
        logits /= temperature
    if not predictor.space:
        none = np.empty((0, 0), np.float32)
        return Evidence(logits, none, none, known.label[:0]), temperature
    if predictor.space == "predictions":
        of_known = rows_of(latest / "logits", known, contest.classes, "make finetune")
        of_known /= temperature or 1.0
        return Evidence(logits, _roots(logits), _roots(of_known), known.label), temperature
    folder = contest.finished(entry / "embeddings", "make embed")
    width = np.load(folder / "train.npy", mmap_mode="r").shape[1]
    x, labeled = (rows_of(folder, m, width, "make embed") for m in (both, known))
    return Evidence(logits, x, labeled, known.label), temperature


def _roots(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Square roots [n, classes] of the probabilities, rows of unit length, in bounded memory."""
    out = np.empty_like(logits)
    for rows in chunks(*logits.shape):
        out[rows] = np.sqrt(softmax(logits[rows], axis=1))
    return out


def true_labels(contest: Contest) -> Integers | None:
    """The labels [images] of a rehearsal's unlabeled split, where they are beside it."""
    if not contest.rehearsal or not contest.oracle.is_file():
        return None
    truth = load_torch(contest.oracle)
    if not isinstance(truth, torch.Tensor) or truth.shape != (contest.images("unlabeled"),):
        raise InputError(f"{contest.oracle}: one label for each unlabeled image is expected")
    labels: Integers = truth.numpy()
    return labels


def true_precision(contest: Contest, given: Manifest) -> float | None:
    """Percent of pseudo-labels that are right, where the true ones are known."""
    truth = true_labels(contest)
    return None if truth is None else 100 * float(np.mean(truth[given.index] == given.label))


def changed(before: Manifest, now: Manifest) -> float:
    """Percent of the labels in either manifest that are not the same in both."""
    pairs = [{*zip(m.index.tolist(), m.label.tolist(), strict=True)} for m in (before, now)]
    images = {*before.index.tolist(), *now.index.tolist()}
    same = len(pairs[0] & pairs[1])
    return 100 * (1 - same / max(len(images), 1))


def in_words(found: dict[str, Any], what: str) -> str:
    """A line on a round, of its record; `what` the images apart are."""
    said = f"{found['coverage']:.1f} % of {found['eligible']:,} unlabeled images labeled"
    if found["precision"] is not None:
        said += "; at most " if found["precision_upper"] else "; "
        said += f"{found['precision']:.1f} ± {found['precision_error']:.1f} % right"
        said += f", by {found['precision_images']:,} images of {what}"
    if found["true_precision"] is not None:
        said += f"; in truth {found['true_precision']:.1f} %"
    return said


def write_rounds(entry: Path) -> None:
    """Write pseudo-rounds.csv and .png of the records pseudo-K.json in `entry`."""
    files = [f.with_suffix(".json") for f in runs.numbered(entry, "pseudo")]
    files = [f for f in files if f.is_file()]
    rounds = [runs.read_json(f, "make pseudo-label") for f in files]
    columns = ["round", "classifier", "labeled", "coverage", "precision", "precision_error"]
    columns += ["true_precision", "changed", "temperature"]
    rows = []
    for file, found in zip(files, rounds, strict=True):
        values = [found.get(column) for column in columns]
        words = [f"{v:.4g}" if isinstance(v, float) else v for v in values]
        rows.append([file.with_suffix(".csv").name, *words])
    write_table(entry / "pseudo-rounds.csv", ["file", *columns], rows)
    figure = Figure((8, 4))
    figure.text(0.03, 0.94, "Pseudo-labels, round by round", fontsize=13, color=INK, va="center")
    axes = house_axes(figure, (0.09, 0.15, 0.86, 0.65), "")
    lines = ("coverage", SOFT), ("precision", GREEN), ("true_precision", AMBER), ("changed", BLUE)
    for key, color in lines:
        points = [(k, r[key]) for k, r in enumerate(rounds, 1) if r.get(key) is not None]
        if points:
            x, y = zip(*points, strict=True)
            label = f"{key.replace('_', ' ')}, {y[-1]:.1f}"
            axes.plot(x, y, color=color, marker="o", markersize=5, label=label)
            if key == "precision":
                errors = [r["precision_error"] for r in rounds if r.get(key) is not None]
                axes.errorbar(x, y, errors, color=color, linewidth=0, elinewidth=1.2, capsize=3)
    axes.set(ylim=(0, 105), xlim=(0.5, len(rounds) + 0.5))
    axes.set_ylabel("%", color=SOFT)
    axes.set_xlabel("pseudo-K.csv", color=SOFT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    save_figure(figure, entry / "pseudo-rounds.png")
