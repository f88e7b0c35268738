"""Recipes that are compared: each runs its stages as commands would, and what came out is kept as a
record, so that nothing finished is run again.
"""

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import InputError, comparison, config, runs
from pipeline.machine import processor
from pipeline.manifest import Contest, load_contest
from pipeline.recipe import Recipe

STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes of what was told to stop


@dataclass(frozen=True)
class Entrant:
    """A recipe that is compared; with each seed it is the entry NAME-sSEED."""

    name: str
    words: tuple[str, ...]
    """The command line of its stages, without entry and seed."""
    sections: tuple[str, ...]
    """Those of the recipe that decide a record."""
    inputs: tuple[Path, ...]
    """Files that do, too."""
    recipe: Recipe
    plain: dict[str, Any]
    contest: Contest
    records: Path
    """The folder of NAME-sSEED.json."""

    @classmethod
    def read(
        cls,
        name: str,
        words: Sequence[str],
        sections: Sequence[str],
        records: Path,
        inputs: Sequence[Path] = (),
    ) -> "Entrant":
        """The recipe that `words` name; InputError where its contest has no val."""
        recipe, _, plain = config.parse("", argv=[*words])
        contest = load_contest(recipe.data.contest)
        if "val" not in contest.splits:
            raise InputError(f"{name}: contest {contest.name!r} has no val to compare on")
        inputs = contest.folder / "contest.json", *inputs
        return cls(name, (*words,), (*sections,), inputs, recipe, plain, contest, records)

    def entry(self, seed: int) -> str:
        return f"{self.name}-s{seed}"

    def record_file(self, seed: int) -> Path:
        return self.records / f"{self.entry(seed)}.json"

    def facts(self, seed: int) -> dict[str, Any]:
        """What decides a run: sections of the recipe, seed, contest and further inputs."""
        return runs.Run.of(Path(), self.plain | {"seed": seed}, self.sections, self.inputs).facts

    def record(self, seed: int) -> dict[str, Any] | None:
        """What is recorded of a run of just this recipe; None where nothing is."""
        if not self.record_file(seed).is_file():
            return None
        found: dict[str, Any] = runs.read_json(self.record_file(seed), "the comparison")
        now, method = self.facts(seed), self.plain["pretrain"]["method"]["class_path"]
        _, _, plain = config.parse("", argv=["--pretrain.method", method])
        defaults = runs.Run.of(Path(), plain, self.sections, []).facts
        return found if comparison.holds(found.get("facts"), now, defaults) else None

    def recorded(self) -> list[dict[str, Any]]:
        """The records of all its seeds."""
        begin = f"{self.name}-s"
        ends = (f.stem.removeprefix(begin) for f in self.records.glob(f"{begin}*.json"))
        found = [self.record(seed) for seed in sorted(int(s) for s in ends if s.isdecimal())]
        return [record for record in found if record is not None]

    def keep(self, seed: int, found: dict[str, Any]) -> None:
        """Record what was `found` of the run with `seed`."""
        known = {"machine": processor(), "facts": self.facts(seed)}
        runs.write_json(self.record_file(seed), found | known)

    def call(self, stage: str, seed: int, *more: str) -> None:
        """Run a stage as its command would; InputError where it fails, SystemExit where it was told
        to stop.
        """
        words = [*self.words, "--entry", self.entry(seed), "--seed", str(seed), *more]
        runs.say(f"\n$ python -m stages.{stage} {shlex.join(words)}")
        code = call(stage, words)
        if code in STOPPED:
            runs.say("stopped; the same command goes on from there")
            sys.exit(code if code > 0 else 128 - code)
        if code:
            raise InputError(f"stages.{stage} of {self.entry(seed)} failed (exit code {code})")


Cells = list[tuple[Entrant, int]]


def call(stage: str, words: list[str]) -> int:
    """Exit code of a stage in a process of its own; what stops this process stops that first."""
    with (
        subprocess.Popen([sys.executable, "-m", f"stages.{stage}", *words]) as process,
        runs.interrupts(process.terminate) as told,
    ):
        code = process.wait()
    return 128 + told[0] if told else code


def run_all(
    cells: Cells, run: Callable[[Entrant, int], None], write: Callable[[], None] | None = None
) -> None:
    """`run` the cells without a current record, and `write` after each; InputError in the end where
    some failed.
    """
    cells = [(entrant, seed) for entrant, seed in cells if entrant.record(seed) is None]
    for entrant, seed in cells:
        if (file := entrant.record_file(seed)).is_file():
            runs.say(f"{file} is of another recipe or contest: it is made anew")
    failures = []
    for entrant, seed in cells:
        try:
            run(entrant, seed)
        except InputError as error:
            runs.say(f"error: {error}")
            failures.append(str(error))
        if write is not None:
            write()
    if failures:
        raise InputError("; ".join(failures))
