"""Choose the unlabeled images to ask the organizers labels for.

python -m stages.label_request --recipe recipes/demo.yaml
Reads runs/ENTRY/embeddings/{unlabeled,train}.npy and the manifests (for strategies that need it
also the logits of the latest finetune-K); writes runs/ENTRY/label_request/{request_NN.csv,
request.json, contact_sheet.png, provenance.json}.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import InputError, config, runs
from pipeline.answers import read_request, write_request
from pipeline.figures import BLUE, Tile, image_rows
from pipeline.manifest import Contest, load_contest, read_manifest
from pipeline.neighbours import search
from pipeline.recipe import Recipe
from pipeline.selection import Candidates, Request, choose, eligible

_ROWS, _AROUND = 12, 9  # of the contact sheet


@dataclass(frozen=True)
class Options:
    force: bool = field(
        default=False, metadata={"help": "Choose anew even where nothing has changed."}
    )


def run(recipe: Recipe, plain: dict[str, Any], force: bool = False) -> None:
    """Ask for `budget` labels, unless that request was made, or answered, before."""
    c, contest = recipe.label_request, load_contest(recipe.data.contest)
    entry, manifests = runs.entry_folder(recipe.entry or "entry"), contest.folder
    strategy, answered = c.strategy(), runs.numbered(manifests, "requested")
    folder = runs.finished(entry / "embeddings", "make embed")
    files = [folder / f"{split}.npy" for split in ("unlabeled", "train")]
    if strategy.uses_logits:
        files.append(runs.latest_finetune(entry.name) / "logits" / "unlabeled.npy")
    inputs = [manifests / "contest.json", *answered, *files]
    facts = runs.Run.of(entry / "label_request", plain, ("label_request",), inputs)
    file = facts.folder / f"request_{c.team}.csv"
    if not force and facts.is_current():
        runs.say(f"{file} is up to date (--force chooses anew); next: make import-labels")
        return
    if not force and file.is_file() and (by := _answer(file, contest, answered)):
        runs.say(
            f"{file} was answered by {by} (--force asks for other images); next: make finetune"
        )
        return
    if not force and file.is_file():
        raise InputError(
            f"{file} has no answer yet, and would be another request by now; import its answer, "
            f"or replace it with --force"
        )
    candidates = _candidates(contest, files, answered)
    runs.say(f"choosing {c.budget:,} of {len(candidates.eligible):,} images …")
    request = choose(strategy, candidates, c.budget, recipe.seed)
    facts.begin()
    _draw(facts.folder / "contact_sheet.png", contest, candidates, request, recipe)
    digest = hashlib.sha256(request.indices.astype("<i8").tobytes()).hexdigest()
    made = plain["label_request"] | {"seed": recipe.seed, "indices_sha256": digest}
    write_request(file, request.indices)
    runs.write_json(facts.folder / "request.json", made | {"file": file.name})
    facts.finish(eligible=len(candidates.eligible), indices_sha256=digest)
    runs.say(f"wrote {file} and contact_sheet.png; next: send it, then make import-labels")


def _answer(file: Path, contest: Contest, answered: list[Path]) -> Path | None:
    """The label manifest that holds every image of the request in `file`, if there is one."""
    asked = read_request(file, contest.images("unlabeled"))
    return next((m for m in answered if np.isin(asked, read_manifest(m).index).all()), None)


def _candidates(contest: Contest, files: list[Path], answered: list[Path]) -> Candidates:
    """What may be asked for; `files` are embeddings of unlabeled and train, and logits, if any."""
    train, unlabeled = contest.manifest("train").usable(), contest.manifest("unlabeled").usable()
    train = train.take(train.label >= 0)
    known = np.zeros(len(unlabeled), np.bool_)
    for manifest in map(read_manifest, answered):
        known |= np.isin(unlabeled.index, manifest.index[manifest.split == "unlabeled"])
    embeddings, of_train, *logits = (np.load(file, mmap_mode="r") for file in files)
    labeled = np.concatenate([of_train[train.index], embeddings[unlabeled.index[known]]])
    digests = np.concatenate([train.sha256, unlabeled.sha256[known]])
    possible = eligible(unlabeled.index, unlabeled.sha256, digests)
    return Candidates(embeddings, logits[0] if logits else None, possible, labeled)


def _draw(
    path: Path, contest: Contest, candidates: Candidates, request: Request, recipe: Recipe
) -> None:
    """The contact sheet: for a sample of the clusters a chosen image and the images around it."""
    groups, first, size = np.unique(request.groups, return_index=True, return_counts=True)
    sample = np.random.default_rng(recipe.seed).permutation(len(groups))[:_ROWS]
    chosen, x = request.indices[first[sample]], candidates.embeddings
    similarities, near = search(x[chosen], x[candidates.eligible], _AROUND)
    images, asked = contest.packed("unlabeled"), set(request.indices.tolist())
    rows = []
    for g, index, around, values in zip(sample, chosen, near, similarities, strict=True):
        shown = [(index, "asked for")]
        found = zip(candidates.eligible[around], values, strict=True)
        shown += [(n, f"{value:.2f}") for n, value in found if n != index]
        tiles = [Tile(images[n], text, BLUE if n in asked else None) for n, text in shown]
        heading = f"cluster {groups[g]}\n{size[g]} asked for\n{index}.png"
        rows.append((heading, tiles[:_AROUND]))
    name = type(recipe.label_request.strategy()).__name__
    title = f"{len(asked):,} labels asked for by {name}: {len(sample)} of {len(groups):,} clusters"
    note = "framed: asked for; beside it the images nearest to it, with their cosine similarity"
    image_rows(path, rows, title, note)


def main() -> None:
    recipe, options, plain = config.parse(__doc__, Options)
    run(recipe, plain, options.force)


if __name__ == "__main__":
    runs.stage(main)
