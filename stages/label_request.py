"""Choose the unlabeled images to ask labels for: the organizers, or people with Label Studio.

python -m stages.label_request --recipe recipes/demo.yaml [--format label-studio]
Reads runs/ENTRY/embeddings/{unlabeled,train}.npy, the manifests and, where there is one, the logits
of the latest finetune-K; writes runs/ENTRY/label_request/{request_NN.csv, request.json, picks.csv,
overlap.csv, contact_sheet.png, map.png, classes.png, overlap.png, provenance.json} and, for Label
Studio, label-studio/{images/N.png, config.xml, tasks.json} there.
"""

import hashlib
import shlex
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import InputError, config, label_studio, runs
from pipeline.answers import check_request, images_digest, read_request, write_request
from pipeline.checkpoint import load_tensors
from pipeline.classifiers import MARKS
from pipeline.manifest import Contest, load_contest, read_manifest
from pipeline.recipe import Recipe
from pipeline.request_report import overlap, report
from pipeline.selection import (
    Candidates,
    Strategy,
    candidates_of,
    check_logits,
    choose,
    embedded,
    unlabeled_logits,
)

Format = Literal["contest", "label-studio"]


@dataclass(frozen=True)
class Options(config.Force):
    alone: bool = field(
        default=False, metadata={"help": "Do not see what other strategies would ask for."}
    )
    format: Format = field(
        default="contest",
        metadata={"help": "Who answers: the contest's organizers, or people with Label Studio."},
    )


def run(
    recipe: Recipe,
    plain: dict[str, Any],
    force: bool = False,
    compare: bool = False,
    format: Format = "contest",
) -> None:
    """Ask for `budget` labels, unless that request was made, or answered, before."""
    c, contest = recipe.label_request, load_contest(recipe.data.contest)
    contest.images("unlabeled")  # InputError without any
    entry, manifests = runs.entry_folder(recipe.entry), contest.folder
    strategy, answered = c.strategy(), runs.numbered(manifests, "requested")
    folder = contest.finished(entry / "embeddings", "make embed")
    needed = strategy.uses_logits or bool(c.voters)
    logits = _logits(contest, [entry.name, *c.voters], needed)
    inputs = [manifests / "contest.json", *answered, *embedded(folder), *(logits if needed else [])]
    facts = runs.Run.of(entry / "label_request", plain, ("label_request",), inputs)
    file, name = facts.folder / f"request_{c.team}.csv", type(strategy).__name__
    before = [f for f in facts.folder.glob("request_*.csv") if f != file]  # of another team
    look = cache(partial(candidates_of, contest, folder, logits, answered, c.near_duplicate))
    if not force and facts.is_current():
        runs.say(f"{file} is up to date (--force chooses anew); next: make import-labels")
    elif not force and (file.is_file() or before):
        if not file.is_file():
            file = before[0]
        if not _is_answered_in_part(file, contest, answered, format):
            return
        compare = False
    else:
        candidates = look()
        runs.say(f"choosing {c.budget:,} of {len(candidates.eligible):,} images …")
        request = choose(strategy, candidates, c.budget, recipe.seed)
        if request.near_duplicates:
            runs.say(
                f"{request.near_duplicates:,} images were no choice, as near-duplicates of labeled "
                f"images or of others (label_request.near_duplicate: {c.near_duplicate})"
            )
        if not (needed or _usable(candidates)):
            candidates.logits = []  # which only the tables and pictures would show
        marks = _marks(logits if strategy.uses_logits else [])
        facts.begin()  # everything is in order: what was asked for here no longer is
        _forget(file, before)
        title = f"{c.budget:,} labels asked for by {name}"
        report(facts.folder, contest, candidates, request, recipe.seed, title)
        digest = hashlib.sha256(request.indices.astype("<i8").tobytes()).hexdigest()
        made = plain["label_request"] | {"seed": recipe.seed, "indices_sha256": digest}
        made |= {"images_sha256": images_digest(contest, request.indices)}
        write_request(file, request.indices)
        runs.write_json(facts.folder / "request.json", made | marks | {"file": file.name})
        facts.finish(
            eligible=len(candidates.eligible),
            near_duplicates=request.near_duplicates,
            indices_sha256=digest,
        )
        then = "; next: send it, then make import-labels" if format == "contest" else ""
        runs.say(f"wrote {file}, picks.csv and pictures{then}")
    if format == "label-studio":
        _write_project(file, contest)
    if compare and not (facts.folder / "overlap.png").is_file():
        asked = read_request(file, contest.images("unlabeled"))
        _compare(facts.folder, name, asked, look(), recipe.seed)


def _logits(contest: Contest, entries: list[str], needed: bool) -> list[Path]:
    """The unlabeled split's logits by the latest fine-tuning of each entry; none where they are not
    there, or of another contest, and not needed.
    """
    try:
        folders = [runs.finished(runs.latest_finetune(e), "make finetune") for e in entries]
        files = [unlabeled_logits(folder) for folder in folders]
        for file in files:
            check_logits(contest, file)
        return files
    except InputError:
        if needed:
            raise
        return []


def _usable(candidates: Candidates) -> bool:
    """Whether all of its logits, where there are any, are numbers."""
    try:
        return not candidates.logits or candidates.margin is not None
    except InputError:
        return False


def _forget(file: Path, others: list[Path]) -> None:
    """Remove the request in `file`, those of other teams, and what is of them alone."""
    label_studio.forget_project(file)
    for request in (file, *others):
        request.unlink(missing_ok=True)
    for made in ("request.json", "overlap.csv", "overlap.png", "classes.png"):
        file.with_name(made).unlink(missing_ok=True)


def _marks(logits: list[Path]) -> dict[str, bool]:
    """Those of `classifiers.MARKS` that a classifier has whose logits choose."""
    files = [file.parents[1] / "classifier.safetensors" for file in logits]
    read = [load_tensors(runs.require(file, "make finetune"))[1] for file in files]
    return {mark: True for mark in MARKS if any(metadata.get(mark) for metadata in read)}


def _is_answered_in_part(
    file: Path, contest: Contest, answered: list[Path], format: Format
) -> bool:
    """Whether the request in `file`, which is not up to date, lacks labels that people go on giving
    with Label Studio; False, having said so, where it lacks none.

    Raises InputError where it is to be replaced or answered first.
    """
    asked = read_request(file, contest.images("unlabeled"))
    known = {m: np.isin(asked, read_manifest(m).index) for m in answered}
    by = [m for m, has in known.items() if has.any()]
    lacks = len(asked) - int(np.any([*known.values()], axis=0).sum()) if by else len(asked)
    if not lacks:
        runs.say(
            f"{file} was answered by {', '.join(map(str, by))} (--force asks for other images); "
            f"next: make finetune"
        )
        return False
    if by and format == "label-studio":
        runs.say(f"{file} still lacks {lacks:,} of its {len(asked):,} labels")
        return True
    if by:
        raise InputError(
            f"{file} still lacks {lacks:,} of its {len(asked):,} labels, and would be another "
            f"request by now; import them, or replace it with --force"
        )
    raise InputError(
        f"{file} has no answer yet, and would be another request by now; import its answer, "
        f"or replace it with --force"
    )


def _write_project(file: Path, contest: Contest) -> None:
    """Write what Label Studio needs for the request in `file`, and say how it is started."""
    indices = read_request(file, contest.images("unlabeled"))
    check_request(file, indices, contest)
    folder = label_studio.write_project(file, contest, indices)
    root = folder.resolve()
    runs.say(f"wrote {folder}: {len(indices):,} tasks in tasks.json, config.xml, images")
    runs.say(
        "next, as README.md says: LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
        f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={shlex.quote(str(root))} label-studio start"
    )


def _compare(
    folder: Path, name: str, indices: np.ndarray[Any, Any], candidates: Candidates, seed: int
) -> None:
    """How much the request has in common with what every other strategy would ask for."""
    chosen = {name: indices}
    for kind in Strategy.__subclasses__():
        if kind.__name__ not in chosen and (candidates.logits or not kind.uses_logits):
            runs.say(f"{kind.__name__} …")
            try:
                chosen[kind.__name__] = choose(kind(), candidates, len(indices), seed).indices
            except InputError as error:  # the request is made; this is what others would be
                runs.say(f"{kind.__name__} is left out: {error}")
    overlap(folder, chosen)


def main() -> None:
    recipe, options, plain = config.parse(__doc__, Options)
    run(recipe, plain, options.force, not options.alone, options.format)


if __name__ == "__main__":
    runs.stage(main)
