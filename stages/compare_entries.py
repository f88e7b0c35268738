"""Compare entries by all that they take: a table in docs/labels.md, from the runs' own records.

python -m stages.compare_entries RECIPE … [--base RECIPE] [--seeds 3] [--peer "COMMAND"]
python -m stages.compare_entries RECIPE … [--base RECIPE] [--seeds 3] --encoder ENTRY
Every recipe is run with every seed through what it needs, as the entry RECIPE-sSEED (BASE-RECIPE-
sSEED with --base, RECIPE-from-ENTRY-sSEED with --encoder): pretraining (not from scratch),
embeddings where its pseudo-labels look at them, fine-tuning and, where `pseudo` is among its
manifests, pseudo-labels and fine-tuning again.  The first recipe is the control.  With --base the
recipes change that one; with --encoder all start from the encoder of that entry.  A peer is any
command that takes --seed and whose last line is JSON with `peer` (its name) and `finetuned` (top-1
on val, 0 to 1).  Writes docs/entries/NAME-sSEED.json for each finished run (a peer's name is made
of its command), and the table.  What is recorded is not run again; what was interrupted goes on,
rounds of pseudo-labels from the first one.
"""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import InputError, comparison, config, entrants, runs
from pipeline.entrants import Entrant
from pipeline.machine import processor

AFTER = ("finetune", "pseudo_label")  # sections that decide a record, beside the pretraining's


def read(
    file: Path, base: Path | None, encoder: str | None, minutes: float | None, records: Path
) -> Entrant:
    """The recipe in `file`, over that of `base`, from the encoder of an entry, where there are.

    With `minutes` those are the minutes of fine-tuning of `base`; others keep their part of it.
    """
    over = f"{base.stem}-{file.stem}" if base else file.stem
    name = f"{file.stem}-from-{encoder}" if encoder else over
    words = [word for f in (base, file) if f for word in ("--recipe", str(f))]
    recipe, _, _ = config.parse("", argv=words)
    if minutes is not None:
        whole = base and config.parse("", argv=["--recipe", str(base)])[0].finetune.minutes
        if not whole or not recipe.finetune.minutes:
            raise InputError(
                f"--minutes: finetune.minutes is expected in --base, and kept or changed in {file}"
            )
        words += ["--finetune.minutes", f"{minutes * recipe.finetune.minutes / whole:g}"]
    # labels that other entries of the contest asked for are no part of the comparison
    named = [m for m in recipe.finetune.manifests if m != "requested"]
    words += ["--finetune.manifests", f"[{', '.join(named)}]"]
    files = [Path(m) for m in named if m not in ("train", "pseudo")]
    if missing := next((f for f in files if not f.is_file()), None):
        raise InputError(f"{file}: {missing} is among finetune.manifests, but is not there")
    if encoder is None:
        return Entrant.read(name, words, ("encoder", "pretrain", *AFTER), records, files)
    weights = runs.entry_folder(encoder) / "pretrain" / "encoder.safetensors"
    made_by = f"make pretrain RECIPE={base or file} ARGS='--entry {encoder}'"
    files.append(runs.require(weights, made_by))
    return Entrant.read(name, words, ("encoder", *AFTER), records, files)


def pseudo(entrant: Entrant) -> bool:
    """Whether it learns from pseudo-labels."""
    return "pseudo" in entrant.recipe.finetune.manifests


def forget_rounds(contest: Path, folder: Path) -> None:
    """Remove the pseudo-labels of an unfinished run, and every fine-tuning but the one that is next
    without them: a later one would have labeled them anew, others are of another time.
    """
    for file in folder.glob("pseudo-*"):
        file.unlink()
    first = f"finetune-{runs.label_rounds(contest, folder)}"
    for tuned in runs.finetune_folders(folder):
        if tuned.name != first:
            shutil.rmtree(tuned)


def run_one(encoder: str | None, entrant: Entrant, seed: int) -> None:
    """Every stage that the entry needs, in order, and the record of what they wrote."""
    folder = runs.entry_folder(entrant.entry(seed))
    embeds = pseudo(entrant) and entrant.recipe.pseudo_label.predictor().space == "embeddings"
    if encoder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for link in (folder / "pretrain", folder / "embeddings"):
            if link.exists() and not link.is_symlink():
                raise InputError(f"{link} is there already; no entry of that name is expected")
            link.unlink(missing_ok=True)  # may be another entry's
            link.symlink_to(Path("..") / encoder / link.name)
    elif entrant.recipe.finetune.init == "pretrained":
        entrant.call("pretrain", seed)
        if embeds:
            entrant.call("embed", seed)
    forget_rounds(entrant.contest.folder, folder)
    for stage in ["finetune", *(["pseudo_label", "finetune"] if pseudo(entrant) else [])]:
        entrant.call(stage, seed)
    found = comparison.entry_outcome(folder, encoder is None)
    entrant.keep(seed, {"entry": entrant.entry(seed), "seed": seed} | found)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise InputError(f"--peer: {command!r} is no command ({error})") from None


def run_peer(command: str, seed: int, file: Path, contest: str) -> None:
    """Run a peer, and record what its last line says beside the digest of the `contest`; InputError
    where it fails or says nothing.
    """
    words = [*_words(command), "--seed", str(seed)]
    runs.say(f"\n$ {shlex.join(words)}")
    began = time.monotonic()
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        said = json.loads((done.stdout.strip().splitlines() or [""])[-1])
        found = {"name": str(said["peer"]), "val_top1": 100 * float(said["finetuned"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--peer: {shlex.join(words)} failed ({error}); a last line of JSON with peer and "
            f"finetuned is expected"
        ) from None
    took = {"wall_minutes": (time.monotonic() - began) / 60}
    facts = {"machine": processor(), "command": command, "contest": contest}
    runs.write_json(file, {"seed": seed} | found | took | facts | {"said": said})


def run(a: Namespace, command: str) -> None:
    """Every recipe and peer with every seed, and the table as it grows."""
    all_of = [read(file, a.base, a.encoder, a.minutes, a.records) for file in a.recipes]
    comparison.of_one_contest([e.contest.name for e in all_of])
    _words(a.peer)
    target = "compare-finetunings" if a.encoder else "compare-entries"
    contest = runs.sha256(all_of[0].contest.folder / "contest.json")
    digest = hashlib.sha256(a.peer.encode()).hexdigest()[:8]
    peers = [a.records / f"peer-{digest}-s{seed}.json" for seed in range(a.seeds)]

    def of_peer(file: Path) -> dict[str, Any] | None:
        if not a.peer or not file.is_file():
            return None
        found: dict[str, Any] = runs.read_json(file, "the comparison")
        return found if (found["command"], found.get("contest")) == (a.peer, contest) else None

    def write() -> None:
        rows = {e.name: e.recorded() for e in all_of}
        for record in filter(None, map(of_peer, peers)):
            rows.setdefault(record["name"], []).append(record)
        comparison.put(a.table, target, comparison.entry_table(rows, all_of[0].name, command))

    write()  # which says what is wrong with that file before hours of training
    for seed in range(a.seeds):
        entrants.run_all([(e, seed) for e in all_of], partial(run_one, a.encoder), write)
        if a.peer and of_peer(peers[seed]) is None:
            run_peer(a.peer, seed, peers[seed], contest)
            write()
    runs.say(f"wrote {a.table} from the records in {a.records}; next: commit both")


def parse(argv: list[str]) -> Namespace:
    form = RawDescriptionHelpFormatter
    parser = ArgumentParser("compare_entries", description=__doc__, formatter_class=form)
    parser.add_argument("recipes", type=Path, nargs="+", help="the control first")
    parser.add_argument("--base", type=Path, help="recipe that they change")
    parser.add_argument("--encoder", help="entry whose encoder they start from")
    parser.add_argument(
        "--minutes", type=float, help="of the base's fine-tuning; others keep their part of it"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--peer", default="", help="command of a peer")
    parser.add_argument("--records", type=Path, default=Path("docs/entries"), help="folder")
    parser.add_argument("--table", type=Path, default=Path("docs/labels.md"), help="Markdown file")
    return parser.parse_args(argv)


def main() -> None:
    words = sys.argv[1:]
    run(parse(words), shlex.join(["python", "-m", "stages.compare_entries", *words]))


if __name__ == "__main__":
    runs.stage(main)
