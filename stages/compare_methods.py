"""Compare pretraining methods: a table in docs/methods.md, from the runs' own records.

python -m stages.compare_methods [RECIPE …] [--best 2 --seeds 3]
Every recipe (recipes/mini98_*.yaml) is pretrained, embedded, evaluated and fine-tuned on the labels
of train with seed 0, as the entry RECIPE-s0, then the best ones with the other seeds, one run at a
time.  The best have the highest kNN accuracy of one half of train on the other: val chooses
nothing.  Writes docs/methods/RECIPE-sSEED.json for each finished run, and between two comments of
docs/methods.md the table.  What is recorded is not run again; what was interrupted goes on.
"""

import shlex
import signal
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import InputError, comparison, config, runs
from pipeline.machine import processor
from pipeline.manifest import Contest, load_contest
from pipeline.recipe import Recipe

STAGES = ("pretrain", "embed", "evaluate", "finetune")
SECTIONS = ("encoder", "pretrain", "evaluate", "finetune")  # that decide a record
STOPPED = (130, 143, -2, -15)  # exit codes after Ctrl-C and SIGTERM


@dataclass(frozen=True)
class Entrant:
    """A recipe that is compared; with each seed it is the entry RECIPE-sSEED."""

    file: Path
    recipe: Recipe
    plain: dict[str, Any]
    contest: Contest
    records: Path

    @classmethod
    def read(cls, file: Path, records: Path) -> "Entrant":
        """The recipe in `file`; InputError where its runs could not be compared."""
        recipe, _, plain = config.parse("", argv=_words(file))
        contest = load_contest(recipe.data.contest)
        if "val" not in contest.splits:
            raise InputError(f"{file}: contest {contest.name!r} has no val to compare on")
        if (k := comparison.K) not in recipe.evaluate.k:
            raise InputError(f"{file}: evaluate.k is {recipe.evaluate.k}; {k} in it is expected")
        return cls(file, recipe, plain, contest, records)

    @property
    def method(self) -> str:
        return str(self.plain["pretrain"]["method"]["class_path"]).rpartition(".")[2]

    def entry(self, seed: int) -> str:
        return f"{self.file.stem}-s{seed}"

    def record_file(self, seed: int) -> Path:
        return self.records / f"{self.entry(seed)}.json"

    def facts(self, seed: int) -> dict[str, Any]:
        """What decides a run: sections of the recipe, seed and contest."""
        inputs = [self.contest.folder / "contest.json"]
        return runs.Run.of(Path(), self.plain | {"seed": seed}, SECTIONS, inputs).facts

    def record(self, seed: int) -> dict[str, Any] | None:
        """What is recorded of a run of just this recipe; None where nothing is."""
        if not self.record_file(seed).is_file():
            return None
        found: dict[str, Any] = runs.read_json(self.record_file(seed), "make compare-methods")
        now, method = self.facts(seed), self.plain["pretrain"]["method"]["class_path"]
        _, _, plain = config.parse("", argv=["--pretrain.method", method])
        defaults = runs.Run.of(Path(), plain, SECTIONS, []).facts
        return found if comparison.holds(found.get("facts"), now, defaults) else None

    def recorded(self) -> list[dict[str, Any]]:
        """The records of all its seeds."""
        begin = f"{self.file.stem}-s"
        ends = (f.stem.removeprefix(begin) for f in self.records.glob(f"{begin}*.json"))
        found = [self.record(seed) for seed in sorted(int(s) for s in ends if s.isdecimal())]
        return [record for record in found if record is not None]

    def call(self, stage: str, seed: int, *more: str) -> None:
        """Run a stage as its command would; InputError where it fails."""
        words = [*_words(self.file), "--entry", self.entry(seed), "--seed", str(seed), *more]
        runs.say(f"\n$ python -m stages.{stage} {shlex.join(words)}")
        code = call(stage, words)
        if code in STOPPED:
            runs.say("stopped; the same command goes on from there")
            sys.exit(code if code > 0 else 128 - code)
        if code:
            raise InputError(f"stages.{stage} of {self.entry(seed)} failed (exit code {code})")

    def run(self, seed: int) -> None:
        """Every stage in order, and the record of what they wrote."""
        for stage in STAGES:
            self.call(stage, seed)
        record = {"recipe": str(self.file), "seed": seed, "method": self.method}
        record |= comparison.outcome(self.entry(seed), self.contest)
        record |= {"machine": processor(), "facts": self.facts(seed)}
        runs.write_json(self.record_file(seed), record)


def _words(file: Path) -> list[str]:
    # labels that other entries of the contest asked for are no part of the comparison
    words = ["--recipe", str(file), "--finetune.manifests", "[train]"]
    return [*words, "--evaluate.unlabeled", "false", "--finetune.unlabeled", "false"]


def call(stage: str, words: list[str]) -> int:
    """Exit code of a stage in a process of its own; what stops this process stops that first."""
    told: list[int] = []
    with subprocess.Popen([sys.executable, "-m", f"stages.{stage}", *words]) as process:

        def stop(number: int, frame: Any) -> None:
            told.append(128 + number)
            process.terminate()

        old = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = process.wait()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
    return told[0] if told else code


def run_all(cells: list[tuple[Entrant, int]], write: Callable[[], None]) -> None:
    """Run the cells without a current record, and `write` after each; InputError in the end where
    some failed.
    """
    cells = [(entrant, seed) for entrant, seed in cells if entrant.record(seed) is None]
    for entrant, seed in cells:
        if (file := entrant.record_file(seed)).is_file():
            runs.say(f"{file} is of another recipe or contest: it is made anew")
        # back to back: what runs beside a later training takes no steps from it
        if entrant.recipe.pretrain.minutes is not None:
            entrant.call("pretrain", seed, "--plan-only")
    failures = []
    for entrant, seed in cells:
        try:
            entrant.run(seed)
        except InputError as error:
            runs.say(f"error: {error}")
            failures.append(str(error))
        write()
    if failures:
        raise InputError("; ".join(failures))


def run(a: Namespace, command: str) -> None:
    """Every recipe with seed 0, then the best with the other seeds; the table as it grows."""
    files = sorted(a.recipes or Path("recipes").glob("mini98_*.yaml"))
    if not files:
        raise InputError("there is no recipes/mini98_*.yaml; the recipes to compare are expected")
    entrants = [Entrant.read(file, a.records) for file in files]
    comparison.of_one_contest([e.contest.name for e in entrants])

    def write() -> None:
        rows = {e.file.stem: (e.method, e.recorded()) for e in entrants}
        comparison.put(a.table, "compare-methods", comparison.table(rows, command))

    write()  # which says what is wrong with that file before hours of training
    run_all([(e, 0) for e in entrants], write)
    ranked = sorted(entrants, key=lambda e: -(e.record(0) or {})["knn_on_train"])
    run_all([(e, seed) for seed in range(1, a.seeds) for e in ranked[: a.best]], write)
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
