"""Choose the unlabeled images to ask the organizers labels for.

python -m stages.label_request --recipe recipes/demo.yaml
Reads runs/ENTRY/embeddings/{unlabeled,train}.npy, the manifests and, where there is one, the logits
of the latest finetune-K; writes runs/ENTRY/label_request/{request_NN.csv, request.json, picks.csv,
overlap.csv, contact_sheet.png, map.png, classes.png, overlap.png, provenance.json}.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import InputError, config, runs
from pipeline.answers import read_request, write_request
from pipeline.manifest import Contest, load_contest, read_manifest
from pipeline.recipe import Recipe
from pipeline.request_report import overlap, report
from pipeline.selection import Candidates, Strategy, candidates_of, choose


@dataclass(frozen=True)
class Options:
    force: bool = field(
        default=False, metadata={"help": "Choose anew even where nothing has changed."}
    )
    alone: bool = field(
        default=False, metadata={"help": "Do not see what other strategies would ask for."}
    )


def run(recipe: Recipe, plain: dict[str, Any], force: bool = False, compare: bool = False) -> None:
    """Ask for `budget` labels, unless that request was made, or answered, before."""
    c, contest = recipe.label_request, load_contest(recipe.data.contest)
    entry, manifests = runs.entry_folder(recipe.entry or "entry"), contest.folder
    strategy, answered = c.strategy(), runs.numbered(manifests, "requested")
    folder = runs.finished(entry / "embeddings", "make embed")
    needed = strategy.uses_logits or bool(c.voters)
    logits = _logits([entry.name, *c.voters], needed)
    files = [runs.require(folder / f"{s}.npy", "make embed") for s in ("unlabeled", "train")]
    inputs = [manifests / "contest.json", *answered, *files, *(logits if needed else [])]
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
    candidates = candidates_of(contest, folder, logits, answered, c.near_duplicate)
    runs.say(f"choosing {c.budget:,} of {len(candidates.eligible):,} images …")
    request = choose(strategy, candidates, c.budget, recipe.seed)
    facts.begin()
    name = type(strategy).__name__
    title = f"{c.budget:,} labels asked for by {name}"
    report(facts.folder, contest, candidates, request, recipe.seed, title)
    if compare:
        _compare(facts.folder, name, request.indices, candidates, recipe.seed)
    digest = hashlib.sha256(request.indices.astype("<i8").tobytes()).hexdigest()
    made = plain["label_request"] | {"seed": recipe.seed, "indices_sha256": digest}
    write_request(file, request.indices)
    runs.write_json(facts.folder / "request.json", made | {"file": file.name})
    facts.finish(eligible=len(candidates.eligible), indices_sha256=digest)
    runs.say(f"wrote {file}, picks.csv and pictures; next: send it, then make import-labels")


def _logits(entries: list[str], needed: bool) -> list[Path]:
    """The unlabeled split's logits by the latest fine-tuning of each entry; none where the first
    has no fine-tuning yet and none is needed.
    """
    try:
        folders = [runs.latest_finetune(entry) for entry in entries]
    except InputError:
        if needed:
            raise
        return []
    return [runs.require(f / "logits" / "unlabeled.npy", "make finetune") for f in folders]


def _answer(file: Path, contest: Contest, answered: list[Path]) -> Path | None:
    """The label manifest that holds every image of the request in `file`, if there is one."""
    asked = read_request(file, contest.images("unlabeled"))
    return next((m for m in answered if np.isin(asked, read_manifest(m).index).all()), None)


def _compare(
    folder: Path, name: str, indices: np.ndarray[Any, Any], candidates: Candidates, seed: int
) -> None:
    """How much the request has in common with what every other strategy would ask for."""
    chosen = {name: indices}
    for kind in Strategy.__subclasses__():
        if kind.__name__ not in chosen and (candidates.logits or not kind.uses_logits):
            runs.say(f"{kind.__name__} …")
            chosen[kind.__name__] = choose(kind(), candidates, len(indices), seed).indices
    overlap(folder, chosen)


def main() -> None:
    recipe, options, plain = config.parse(__doc__, Options)
    run(recipe, plain, options.force, compare=not options.alone)


if __name__ == "__main__":
    runs.stage(main)
