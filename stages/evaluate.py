"""Say how good the embeddings are: kNN and linear evaluation, and a picture of neighbors.

python -m stages.evaluate --recipe recipes/demo.yaml
Reads runs/ENTRY/embeddings/SPLIT.npy and the labels of train and val; writes runs/ENTRY/evaluate/
{scores.json, neighbours.png, provenance.json}.  Without a labeled val, a fifth of train stands in.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import InputError, config, runs
from pipeline.draws import hold_out, learned_labels
from pipeline.figures import BLUE, GREEN, RED, Tile, image_rows
from pipeline.manifest import Contest, Manifest, load_contest
from pipeline.metrics import expected_calibration_error, fit_linear, knn_scores, predictions, top_k
from pipeline.neighbours import search
from pipeline.recipe import Recipe

_ROWS = 10  # of the picture
_BLOCK = 1 << 16  # embeddings that are in memory at a time
Floats = npt.NDArray[np.float32]


def run(recipe: Recipe, plain: dict[str, Any], force: bool = False) -> None:
    """Evaluate the embeddings, unless that was done; the scores are in scores.json."""
    contest, entry = load_contest(recipe.data.contest), runs.entry_folder(recipe.entry)
    folder = contest.finished(entry / "embeddings", "make embed")
    splits = contest.splits_with(unlabeled=recipe.evaluate.unlabeled)
    files = {split: runs.require(folder / f"{split}.npy", "make embed") for split in splits}
    inputs = [contest.folder / "contest.json", *files.values()]
    facts = runs.Run.of(entry / "evaluate", plain, ("evaluate",), inputs)
    if facts.is_current() and not force:
        runs.say(f"{facts.folder} is up to date (--force runs it anew)")
        return
    facts.begin()
    c, embeddings = recipe.evaluate, {s: np.load(f, mmap_mode="r") for s, f in files.items()}
    known, asked, what = _split(contest, entry)
    x, queries = (embeddings[str(m.split[0])][m.index] for m in (known, asked))
    similarities, near = search(queries, x, max(c.k))
    votes, truth = known.label[near], asked.label
    scores = knn_scores(similarities, votes, truth, contest.classes, c.k, c.temperature)
    began = time.monotonic()
    weight, bias = fit_linear(x, known.label, contest.classes, c.linear_c)
    seconds, logits = time.monotonic() - began, queries @ weight.T + bias
    scores["linear"] = top_k(logits, truth)
    labels, confidences = predictions(logits)
    error = expected_calibration_error(confidences, labels == truth)
    notes = [f"only {len(known):,} labels: k = {k} takes them all" for k in c.k if k > len(known)]
    if contest.rehearsal and what == "val":
        notes.append("in a rehearsal val stands for the secret test: choose nothing by it")
    notes.append(f"linear: {seconds:.0f} s, calibration error {error:.1f} %")
    _print(scores, f"{len(asked):,} images of {what} by {len(known):,} labels of train", notes)
    facts_of = {"queries": what, "images": len(asked), "labeled": len(known), "scores": scores}
    facts_of |= {"calibration_error": error, "linear_seconds": seconds, "notes": notes}
    runs.write_json(facts.folder / "scores.json", facts_of)
    _draw(facts.folder / "neighbours.png", contest, embeddings, asked, recipe)
    facts.finish(scores=scores)
    runs.say(f"wrote {facts.folder}/scores.json and neighbours.png; next: make finetune")


def _split(contest: Contest, entry: Path) -> tuple[Manifest, Manifest, str]:
    """Labeled images to vote and learn from, images to ask about, and what those are; InputError
    where pretraining learned every label.
    """
    parts = {s: contest.manifest(s).usable() for s in ("train", "val") if s in contest.splits}
    parts = {s: part.take(part.label >= 0) for s, part in parts.items()}
    if len(parts.get("val", ())):
        return parts["train"], parts["val"], "val"
    train = parts["train"]
    held = hold_out(train, 0.2) & ~train.among(learned_labels(entry))
    if not held.any():
        raise InputError(
            "evaluate: there is no val, and no label of train that pretraining did not learn; "
            "pretrain.supervision with a holdout above 0 is expected"
        )
    return train.take(~held), train.take(held), "the images held out of train"


def _print(scores: dict[str, dict[int, float]], heading: str, notes: list[str]) -> None:
    runs.say(f"{heading}\n{'':<20}{'top-1':>8}{'top-3':>8}{'top-5':>8}")
    for name, values in scores.items():
        runs.say(f"{name.replace('_', ' '):<20}" + "".join(f"{v:8.2f}" for v in values.values()))
    for note in notes:
        runs.say(note)


def _nearest(
    queries: Floats, embeddings: dict[str, Floats], gallery: Manifest, k: int
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Similarities and rows of `gallery` [q, k] of the nearest, with few embeddings in memory."""
    found = []
    for start in range(0, len(gallery), _BLOCK):
        block = gallery.take(np.arange(start, min(start + _BLOCK, len(gallery))))
        for split in np.unique(block.split):
            of = np.flatnonzero(block.split == split)
            values, rows = search(queries, embeddings[str(split)][block.index[of]], k)
            found.append((values, start + of[rows]))
    values, rows = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
    best = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values, best, 1), np.take_along_axis(rows, best, 1)


def _draw(
    path: Path, contest: Contest, embeddings: dict[str, Floats], asked: Manifest, recipe: Recipe
) -> None:
    """A sample of the queries, each with the nearest images of train and unlabeled."""
    sample = np.random.default_rng(recipe.seed).permutation(len(asked))[:_ROWS]
    asked, split, shown = asked.take(sample), str(asked.split[0]), recipe.evaluate.neighbors
    splits = [s for s in ("train", "unlabeled") if s in embeddings]
    parts = [contest.manifest(s).usable() for s in splits]
    gallery = Manifest.concatenate(parts)
    similarities, near = _nearest(embeddings[split][asked.index], embeddings, gallery, shown + 1)
    names = contest.names
    pixels = {s: contest.packed(s) for s in {split, *splits}}
    rows = []
    for n, label, around, values in zip(asked.index, asked.label, near, similarities, strict=True):
        tiles = [Tile(pixels[split][n], names[label], BLUE)]
        for row, value in zip(around, values, strict=True):
            s, index, its = str(gallery.split[row]), gallery.index[row], gallery.label[row]
            if (s, index) == (split, n):
                continue
            text = f"{names[its]} {value:.2f}" if its >= 0 else f"{value:.2f}"
            frame = (GREEN if its == label else RED) if its >= 0 else None
            tiles.append(Tile(pixels[s][index], text, frame))
        rows.append((f"{split}\n{n}.png", tiles[: shown + 1]))
    title = f"The nearest images of {' and '.join(splits)} to {len(rows)} images of {split}"
    note = "by cosine similarity; labeled neighbors: green of the same class, red of another"
    image_rows(path, rows, title, note)


def main() -> None:
    recipe, options, plain = config.parse(__doc__, config.Force)
    run(recipe, plain, options.force)


if __name__ == "__main__":
    runs.stage(main)
