"""Compare label-request strategies on a rehearsal: a table and a plot, from the runs' own records.

python -m stages.compare_requests --recipe recipes/labels98.yaml --finetune.minutes 3
With each seed the entry's encoder is fine-tuned on train alone (the floor); then every strategy,
with its defaults, asks for `label_request.budget` images and gets their true labels from the
rehearsal's OUT.oracle.pt, and the encoder is fine-tuned on both, in as many steps as the first run.
Images are classified in bf16 where the machine has it, not in float32 as for a submission.
Reads runs/ENTRY/{pretrain, embeddings}; writes runs/ENTRY/requests/STRATEGY-sSEED,
docs/requests/ENTRY.{json, png} and a table in docs/labels.md. What is finished is not run again,
and records of other seeds and strategies stay in the table while they are of the same settings.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import InputError, comparison, config, runs
from pipeline.answers import write_request
from pipeline.labeling import true_labels
from pipeline.machine import processor
from pipeline.manifest import Manifest, load_contest, read_manifest, write_manifest
from pipeline.recipe import Recipe
from pipeline.request_report import accuracies, overlap
from pipeline.selection import Candidates, Strategy, candidates_of, choose, embedded
from stages import finetune

FLOOR = "none"
DOCS = Path("docs")
WEIGHTS = "encoder.safetensors"
CELL = 3  # minutes of fine-tuning, at most: there are fifty cells


@dataclass(frozen=True)
class Options:
    seeds: int = field(default=5, metadata={"help": "Runs of each strategy."})
    strategies: str = field(
        default="", metadata={"help": "Names with commas between; every strategy if none."}
    )


@dataclass
class Cells:
    """The runs of a recipe that is compared, each in runs/ENTRY/requests/STRATEGY-sSEED."""

    argv: list[str]
    recipe: Recipe
    folder: Path
    truth: Any  # [images] of the unlabeled split
    steps: int | None = None

    def tune(self, name: str, seed: int) -> dict[str, Any]:
        """Fine-tune on train and what was asked for; what the record of the cell says."""
        cell, answer = self.folder / f"{name}-s{seed}", self.folder / f"{name}-s{seed}.csv"
        manifests = "[train]" if name == FLOOR else f"[train, {answer}]"
        words = [*self.argv, "--seed", str(seed), "--finetune.manifests", manifests]
        words += ["--finetune.unlabeled", "true" if name == FLOOR else "false"]
        if self.steps:  # whatever budget the recipe or the command line names
            words += ["--finetune.minutes=null", "--finetune.epochs=null"]
            words += ["--finetune.steps", str(self.steps)]
        runs.say(f"\n{name}, seed {seed}")
        recipe, _, plain = config.parse("", Options, words)
        finetune.run(recipe, plain, folder=cell, exact=False)
        made = runs.read_json(cell / "provenance.json", "make compare-requests")
        plan = runs.read_json(cell / "plan.json", "make compare-requests")
        self.steps = sum(plan["steps"])
        keys = {"strategy": name, "seed": seed, "steps": self.steps, "commit": made["commit"]}
        record: dict[str, Any] = keys | made["results"]
        return record

    def ask(self, kinds: list[type[Strategy]], seed: int) -> None:
        """The requests that were not made yet, with their true labels."""
        candidates: Candidates | None = None
        c, contest = self.recipe.label_request, load_contest(self.recipe.data.contest)
        embeddings = contest.finished(self.folder.with_name("embeddings"), "make embed")
        logits = self.folder / f"{FLOOR}-s{seed}" / "logits" / "unlabeled.npy"
        inputs = [logits, *(embeddings / f"{split}.npy" for split in ("unlabeled", "train"))]
        asked = {"label_request": {"budget": c.budget, "near_duplicate": c.near_duplicate}}
        facts = runs.Run.of(self.folder, asked | {"seed": seed}, ["label_request"], inputs).facts
        for kind in kinds:
            file = self.folder / f"{kind.__name__}-s{seed}.csv"
            record = file.with_suffix(".json")
            made = runs.read_json(record, "make compare-requests") if record.is_file() else None
            if file.is_file() and made == facts:
                continue
            if candidates is None:
                candidates = candidates_of(contest, embeddings, [logits], [], c.near_duplicate)
            index = choose(kind(), candidates, c.budget, seed).indices
            record.unlink(missing_ok=True)
            write_request(self.folder / f"{kind.__name__}-s{seed}.request.csv", index)
            answer = Manifest.of("unlabeled", index, self.truth[index], source=kind.__name__)
            write_manifest(file, answer)
            runs.write_json(record, facts)


def run(argv: list[str], seeds: int, names: str) -> None:
    """Every cell that is not finished, then the table and the pictures."""
    recipe, _, plain = config.parse("", Options, argv)
    kinds, contest, entry = _kinds(names), load_contest(recipe.data.contest), recipe.entry
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}; 1 or more is expected")
    if (recipe.finetune.minutes or 0) > CELL:
        raise InputError(
            f"finetune: minutes is {recipe.finetune.minutes:g}; at most {CELL} for each of "
            f"{len(kinds) + 1} × {seeds} cells are expected: --finetune.minutes {CELL}"
        )
    if "val" not in contest.splits:
        raise InputError(f"contest {contest.name!r} has no val to compare on")
    if not contest.rehearsal:
        raise InputError(f"{contest.name} is no rehearsal; true labels are known only there")
    truth = true_labels(contest)
    if truth is None:
        raise InputError(f"{contest.oracle} is not there; the rehearsal's true labels are expected")
    cells = Cells(argv, recipe, runs.entry_folder(entry) / "requests", truth)
    file, budget = DOCS / "requests" / f"{entry}.json", recipe.label_request.budget
    command = shlex.join(["python", "-m", "stages.compare_requests", *argv])
    done = {"contest": contest.name, "budget": budget, "machine": processor(), "command": command}
    decided = {"budget": budget, "near_duplicate": recipe.label_request.near_duplicate}
    weights = runs.require(cells.folder.with_name("pretrain") / WEIGHTS, "make pretrain")
    embeddings = embedded(contest.finished(cells.folder.with_name("embeddings"), "make embed"))
    inputs = [contest.folder / "contest.json", weights, *embeddings]
    sections, asked = ["encoder", "finetune", "label_request"], plain | {"label_request": decided}
    done["facts"] = runs.Run.of(cells.folder, asked, sections, inputs).facts
    old = runs.read_json(file, "make compare-requests") if file.is_file() else {}
    kept = old["cells"] if old.get("facts") == done["facts"] else []
    of_cell = {(record["strategy"], record["seed"]): record for record in kept}
    for seed in range(seeds):
        of_cell[FLOOR, seed] = cells.tune(FLOOR, seed)
        of_cell = {cell: r for cell, r in of_cell.items() if r["steps"] == cells.steps}
        cells.ask(kinds, seed)
        of_cell |= {(kind.__name__, seed): cells.tune(kind.__name__, seed) for kind in kinds}
        records = [*of_cell.values()]
        runs.write_json(file, done | {"cells": records})
        title = f"{budget:,} labels of {contest.name}"
        accuracies(file.with_suffix(".png"), records, FLOOR, title)
        text = comparison.request_table(records, FLOOR, done)
        comparison.put(DOCS / "labels.md", "compare-requests", text)
    first = {k.__name__: read_manifest(cells.folder / f"{k.__name__}-s0.csv").index for k in kinds}
    overlap(cells.folder, first)
    runs.say(f"wrote {file}, .png and {DOCS / 'labels.md'}; next: commit them")


def _kinds(names: str) -> list[type[Strategy]]:
    """The named strategies, with the random control; all where none is named."""
    known = {kind.__name__: kind for kind in Strategy.__subclasses__()}
    chosen = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise InputError(f"there is no strategy {unknown[0]}; {', '.join(known)} are expected")
    return [known[name] for name in dict.fromkeys(["Random", *chosen])]


def main() -> None:
    _, options, _ = config.parse(__doc__, Options)
    run(sys.argv[1:], options.seeds, options.strategies)


if __name__ == "__main__":
    runs.stage(main)
