"""Compare pretraining methods: a table in docs/methods.md, from the runs' own records.

python -m stages.compare_methods [RECIPE …] [--best 2 --seeds 3]
Every recipe (recipes/mini98_*.yaml) is pretrained, embedded, evaluated and fine-tuned on the labels
of train with seed 0, as the entry RECIPE-s0, then the best ones with the other seeds, one run at a
time.  The best have the highest kNN accuracy of one half of train on the other: val chooses
nothing.  Writes docs/methods/RECIPE-sSEED.json for each finished run, and between two comments of
docs/methods.md the table.  What is recorded is not run again; what was interrupted goes on.
"""

import shlex
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from pipeline import InputError, comparison, runs
from pipeline.entrants import Cells, Entrant, run_all

STAGES = ("pretrain", "embed", "evaluate", "finetune")
SECTIONS = ("encoder", "pretrain", "evaluate", "finetune")  # that decide a record


def read(file: Path, records: Path) -> Entrant:
    """The recipe in `file`; InputError where its runs could not be compared."""
    # labels that other entries of the contest asked for are no part of the comparison
    words = ["--recipe", str(file), "--finetune.manifests", "[train]"]
    words += ["--evaluate.unlabeled", "false", "--finetune.unlabeled", "false"]
    words += ["--pretrain.on_collapse", "warn"]  # what it comes to is what is compared
    entrant = Entrant.read(file.stem, words, SECTIONS, records)
    if (k := comparison.K) not in (given := entrant.recipe.evaluate.k):
        raise InputError(f"{file}: evaluate.k is {given}; {k} in it is expected")
    return entrant


def method(entrant: Entrant) -> str:
    """The name of its method's class."""
    return str(entrant.plain["pretrain"]["method"]["class_path"]).rpartition(".")[2]


def plan(cells: Cells) -> None:
    """Turn minutes into steps for the cells without a current record, back to back: what runs
    beside a later training takes no steps from it.
    """
    for entrant, seed in cells:
        if entrant.recipe.pretrain.minutes is not None and entrant.record(seed) is None:
            entrant.call("pretrain", seed, "--plan-only")


def run_one(entrant: Entrant, seed: int) -> None:
    """Every stage in order, and the record of what they wrote."""
    for stage in STAGES:
        entrant.call(stage, seed)
    record = {"recipe": entrant.words[1], "seed": seed, "method": method(entrant)}
    entrant.keep(seed, record | comparison.outcome(entrant.entry(seed), entrant.contest))


def run(a: Namespace, command: str) -> None:
    """Every recipe with seed 0, then the best with the other seeds; the table as it grows."""
    files = sorted(a.recipes or Path("recipes").glob("mini98_*.yaml"))
    if not files:
        raise InputError("there is no recipes/mini98_*.yaml; the recipes to compare are expected")
    entrants = [read(file, a.records) for file in files]
    comparison.of_one_contest([e.contest.name for e in entrants])

    def write() -> None:
        rows = {e.name: (method(e), e.recorded()) for e in entrants}
        comparison.put(a.table, "compare-methods", comparison.table(rows, command))

    def run_cells(cells: Cells) -> None:
        plan(cells)
        run_all(cells, run_one, write)

    write()  # which says what is wrong with that file before hours of training
    run_cells([(e, 0) for e in entrants])
    ranked = sorted(entrants, key=lambda e: -((e.record(0) or {})["knn_on_train"] or 0))
    run_cells([(e, seed) for seed in range(1, a.seeds) for e in ranked[: a.best]])
    found = sum(len(e.recorded()) for e in entrants)
    runs.say(f"wrote {a.table} from {found} records in {a.records}; next: commit both")


def parse(argv: list[str]) -> Namespace:
    form = RawDescriptionHelpFormatter
    parser = ArgumentParser("compare_methods", description=__doc__, formatter_class=form)
    parser.add_argument("recipes", type=Path, nargs="*", help="recipes/mini98_*.yaml if none")
    parser.add_argument("--best", type=int, default=2, help="recipes that are run with every seed")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each of those")
    parser.add_argument("--records", type=Path, default=Path("docs/methods"), help="folder")
    parser.add_argument("--table", type=Path, default=Path("docs/methods.md"), help="Markdown file")
    return parser.parse_args(argv)


def main() -> None:
    words = sys.argv[1:]
    run(parse(words), shlex.join(["python", "-m", "stages.compare_methods", *words]))


if __name__ == "__main__":
    runs.stage(main)
