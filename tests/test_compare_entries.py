"""The comparison of entries: each goes through what it needs, once, and peers beside them."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import InputError, entrants, runs
from stages import compare_entries

BASE = """
data: {contest: tiny}
encoder: {name: resnet10t}
pretrain: {steps: 3, batch_size: 16, resolutions: [32], knn_evals: 0}
finetune: {steps: 3, batch_size: 16, holdout: 0.2, manifests: [train]}
"""
PSEUDO = """
pseudo_label: {predictor: Propagation}
finetune: {manifests: [train, pseudo], steps: 2}
"""
PEER = (
    f"{sys.executable} -c \"import sys, json; open('peers', 'a').write(sys.argv[2]); "
    "print('noise'); print(json.dumps(dict(peer='theirs', finetuned=0.125)))\""
)
Call = tuple[str, str]


@pytest.fixture(autouse=True)
def recipes(tiny_contest: Path) -> None:
    """The recipes that are compared, in the current folder."""
    for name, text in (
        ("base", BASE),
        ("plain", "finetune: {ema: 0.5}"),
        ("pseudo", PSEUDO),
        ("scratch", f"{BASE}\n".replace("finetune: {", "finetune: {init: scratch, ")),
    ):
        Path(f"{name}.yaml").write_text(text)


def compare(*argv: str) -> None:
    compare_entries.run(compare_entries.parse([*argv]), "the command")


def record(entry: str) -> dict[str, Any]:
    return runs.read_json(Path(f"docs/entries/{entry}.json"), "")  # type: ignore[no-any-return]


def results(folder: str) -> dict[str, Any]:
    return runs.read_json(Path(f"runs/{folder}/provenance.json"), "")["results"]  # type: ignore[no-any-return]


def rows() -> dict[str, list[str]]:
    """The cells of the table's rows, by their first."""
    lines = Path("docs/labels.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
    return {row[0]: row[1:] for row in cells}


def test_each_entry_goes_through_what_it_needs_and_peers_beside(calls: list[Call]) -> None:
    argv = ["base.yaml", "scratch.yaml", "--seeds", "2", "--peer", PEER]
    compare(*argv)
    stages = ("pretrain", "finetune")
    assert calls == [
        call
        for s in (0, 1)
        for call in (*((stage, f"base-s{s}") for stage in stages), ("finetune", f"scratch-s{s}"))
    ]
    assert Path("peers").read_text() == "01"  # the seeds that it was told
    table = rows()
    assert table["theirs"][:2] == ["2", "12.50 ± 0.00"]
    tops = [results(f"base-s{s}/finetune-0")["val_top1"] for s in (0, 1)]
    assert table["base"][:3] == ["2", f"{sum(tops) / 2:.2f} ± {abs(tops[0] - tops[1]) / 2:.2f}",
                                 "control"]  # fmt: skip
    assert float(table["theirs"][2]) == pytest.approx(12.5 / (sum(tops) / 2), abs=0.006)
    found = record("base-s0")
    assert found["minutes_of_pretraining"] == results("base-s0/pretrain")["minutes"] > 0
    assert found["minutes_of_finetuning"] == results("base-s0/finetune-0")["minutes"] > 0
    assert found["holdout_top1"] == results("base-s0/finetune-0")["holdout_top1"] is not None
    assert "minutes_of_pretraining" not in record("scratch-s0")

    # with the records alone nothing is run
    text = Path("docs/labels.md").read_text()
    shutil.rmtree("runs")
    calls.clear()
    compare(*argv)
    assert not calls
    assert Path("peers").read_text() == "01"
    assert Path("docs/labels.md").read_text() == text


def test_a_peer_is_run_again_on_another_contest(calls: list[Call]) -> None:
    argv = ["scratch.yaml", "--seeds", "1", "--peer", PEER]
    compare(*argv)
    file = next(Path("docs/entries").glob("peer-*-s0.json"))
    made = json.loads(file.read_text())
    assert made["contest"] == runs.sha256(Path("data_manifests/tiny/contest.json"))
    file.write_text(json.dumps(made | {"contest": "of other images"}))
    compare(*argv)
    assert Path("peers").read_text() == "00"
    assert json.loads(file.read_text())["contest"] == made["contest"]


def test_recipes_over_a_base_start_from_its_encoder(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["plain.yaml", "pseudo.yaml", "--base", "base.yaml", "--encoder", "base"]
    argv += ["--seeds", "1"]
    with pytest.raises(
        InputError, match=r"`make pretrain RECIPE=base.yaml ARGS='--entry base'` makes it"
    ):
        compare(*argv)
    for stage in ("pretrain", "embed"):
        entrants.call(stage, ["--recipe", "base.yaml", "--entry", "base"])
    weights = Path("runs/base/pretrain/encoder.safetensors")
    before = weights.read_bytes()
    calls.clear()
    whole, stages = entrants.call, ["finetune", "pseudo_label", "finetune"]

    def stopped(stage: str, words: list[str]) -> int:
        done = [s for s, entry in calls if entry == "pseudo-from-base-s0"]
        return 143 if done == stages[:2] else whole(stage, words)

    monkeypatch.setattr(entrants, "call", stopped)
    with pytest.raises(SystemExit):
        compare(*argv)
    assert calls == [
        ("finetune", "plain-from-base-s0"),
        *((stage, "pseudo-from-base-s0") for stage in stages[:2]),
    ]
    monkeypatch.setattr(entrants, "call", whole)
    calls.clear()
    compare(*argv)
    assert calls == [(stage, "pseudo-from-base-s0") for stage in stages]
    assert weights.read_bytes() == before
    tuned = [results(f"pseudo-from-base-s0/finetune-{k}") for k in (0, 1)]
    assert tuned[1]["labels"] > tuned[0]["labels"]  # the pseudo-labels
    found = record("pseudo-from-base-s0")
    assert found["val_top1"] == tuned[1]["val_top1"]
    assert found["minutes_of_finetuning"] == tuned[0]["minutes"] + tuned[1]["minutes"]
    folder = Path("runs/pseudo-from-base-s0")
    assert runs.numbered(folder, "pseudo") == [folder / "pseudo-1.csv"]
    assert set(rows()) == {"plain-from-base", "pseudo-from-base"}

    # an answer to another entry came meanwhile: round 0 is another, and of no other time
    Path("docs/entries/plain-from-base-s0.json").unlink()
    answer = Path("data_manifests/tiny/requested-1.csv")
    answer.write_text("split,index,label\nunlabeled,3,1\n")
    compare(*argv)
    left = runs.finetune_folders(Path("runs/plain-from-base-s0"))
    assert [folder.name for folder in left] == ["finetune-1"]
    minutes = results("plain-from-base-s0/finetune-1")["minutes"]
    assert record("plain-from-base-s0")["minutes_of_finetuning"] == minutes
    answer.unlink()

    # another encoder: what was recorded is of the old one
    weights.write_bytes(before + b" ")
    monkeypatch.setattr(entrants, "call", lambda stage, words: 1)
    with pytest.raises(InputError, match=r"finetune of plain-from-base-s0 failed"):
        compare(*argv)


def test_answers_to_other_entries_take_no_part_and_named_files_count(calls: list[Call]) -> None:
    file, more = Path("asks.yaml"), Path("more.csv")
    file.write_text(BASE.replace("manifests: [train]", "manifests: [train, requested, more.csv]"))

    def read() -> entrants.Entrant:
        return compare_entries.read(file, None, None, None, Path("docs/entries"))

    with pytest.raises(InputError, match=r"^asks.yaml: more.csv is among finetune.manifests"):
        read()
    more.write_text("split,index,label\nunlabeled,3,1\n")
    assert read().recipe.finetune.manifests == ["train", "more.csv"]
    before = read().facts(0)
    more.write_text("split,index,label\nunlabeled,3,2\n")
    assert read().facts(0) != before


def test_minutes_are_those_of_the_base_and_others_keep_their_part() -> None:
    base = Path("long.yaml")
    base.write_text(BASE.replace("finetune: {steps: 3", "finetune: {minutes: 15"))
    files = {"own": {}, "half": {"minutes": 7.5}}
    for name, changed in files.items():
        Path(f"{name}.yaml").write_text(f"finetune: {changed}")

    def minutes(name: str, over: Path) -> float | None:
        read = compare_entries.read(Path(f"{name}.yaml"), over, None, 2.0, Path("docs/entries"))
        return read.recipe.finetune.minutes

    assert [minutes(name, base) for name in files] == [2, 1]
    with pytest.raises(InputError, match=r"^--minutes: finetune.minutes is expected in --base"):
        minutes("own", Path("base.yaml"))


def test_a_peer_that_is_no_command_is_told_before_any_training(calls: list[Call]) -> None:
    with pytest.raises(InputError, match=r"^--peer: .* is no command \(No closing quotation\)$"):
        compare("scratch.yaml", "--peer", "python 'x")
    assert not calls


@pytest.mark.parametrize(
    "command", ["false", "no-such-program", "echo noise", """echo '{"peer": "x"}'""", "echo 3"]
)
def test_a_peer_that_says_nothing_is_told_in_one_line(calls: list[Call], command: str) -> None:
    with pytest.raises(InputError, match=r"^--peer: .* with peer and finetuned is expected$"):
        compare("scratch.yaml", "--seeds", "1", "--peer", command)
    assert not list(Path("docs/entries").glob("peer-*"))
    assert record("scratch-s0")  # what was finished is kept
