"""The comparison of methods: each cell is run once, and the table is what the runs wrote."""

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import InputError, comparison, entrants, runs
from pipeline.manifest import load_contest, write_manifest
from pipeline.neighbours import search
from stages import compare_methods

from .conftest import ROOT

RECIPE = """
data: {contest: tiny}
encoder: {name: resnet10t}
pretrain:
  method: {class_path: SimCLR, init_args: {temperature: TEMPERATURE}}
  resolutions: [32]
  batch_size: 16
  BUDGET
  knn_evals: 1
  knn_images: 32
  checkpoint_minutes: 0
finetune: {steps: 3, batch_size: 16, holdout: 0.0}
"""
TEXT = "# Methods\n\nProse before.\n\n{}\nan old table\n{}\n\nProse after.\n"
Call = tuple[str, str]


def write_recipe(name: str, temperature: float, budget: str = "steps: 3") -> Path:
    file = Path(f"recipes/{name}.yaml")
    file.parent.mkdir(exist_ok=True)
    file.write_text(RECIPE.replace("TEMPERATURE", str(temperature)).replace("BUDGET", budget))
    return file


def compare(*argv: str) -> None:
    compare_methods.run(compare_methods.parse(list(argv)), "the command")


def rows() -> list[list[str]]:
    """The cells of the table's rows."""
    lines = Path("docs/methods.md").read_text().splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]


def result(stage: str, entry: str) -> Any:
    return runs.read_json(Path(f"runs/{entry}/{stage}/provenance.json"), "")["results"]


def test_each_cell_is_run_once_and_the_table_says_what_the_runs_wrote(
    calls: list[Call], capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe("mini98_a", 0.2)
    # as good as collapsed, by the rules of the stage: it is compared all the same
    write_recipe("mini98_b", 0.5, "steps: 3\n  views: [{crop_p: 0.0}]")
    Path("docs").mkdir()
    Path("docs/methods.md").write_text(TEXT.format(*comparison.marks("compare-methods")))
    options = ["--best", "1", "--seeds", "2"]
    compare(*options)
    a, b = (
        runs.read_json(Path(f"docs/methods/mini98_{x}-s0.json"), "")["knn_on_train"] for x in "ab"
    )
    labels, x = (
        load_contest("tiny").labels("train"),
        np.load("runs/mini98_a-s0/embeddings/train.npy"),
    )
    order = np.random.default_rng(0).permutation(80)
    near = search(x[order[40:]], x[order[:40]], 20)[1]  # of 40 images the 20 nearest vote
    votes = np.stack([np.bincount(row, minlength=4) for row in labels[order[:40]][near]])
    most = votes.max(1) == votes[np.arange(40), labels[order[40:]]]
    assert 0 < a <= 100 * most.mean()  # of classes with as many votes one wins
    best = "mini98_a" if a >= b else "mini98_b"
    entries = ["mini98_a-s0", "mini98_b-s0", f"{best}-s1"]
    assert calls == [(stage, entry) for entry in entries for stage in compare_methods.STAGES]
    files = {f"docs/methods/{entry}.json" for entry in entries}
    assert {str(f) for f in Path("docs/methods").iterdir()} == files
    for entry in entries:
        record = runs.read_json(Path(f"docs/methods/{entry}.json"), "")
        pretrained, scores = result("pretrain", entry), result("evaluate", entry)["scores"]
        assert record["knn"] == scores["knn_20_majority"]["1"]
        assert record["linear"] == scores["linear"]["1"]
        tuned = result("finetune-0", entry)
        assert [record["finetuned"], record["finetuned_top5"]] == [
            tuned["val_top1"],
            tuned["val_top5"],
        ]
        assert record["images_seen"] == pretrained["images_seen"] == 3 * 16
        assert record["peak_memory_mib"] == pretrained["peak_memory_mib"] > 100
        assert 0 < record["minutes"] < 1
        assert record["method"] == "SimCLR"
        assert record["seed"] == int(entry[-1])
    table = {row[0]: row for row in rows()}
    top1 = [result("finetune-0", f"{best}-s{seed}")["val_top1"] for seed in (0, 1)]
    spread = f" ± {statistics.stdev(top1):.1f}" if statistics.stdev(top1) else ""
    assert table[best][2] == "2"
    assert table[best][5] == f"{statistics.fmean(top1):.1f}{spread}"
    text = Path("docs/methods.md").read_text()
    assert "an old table" not in text
    assert text.startswith("# Methods\n\nProse before.\n\n<!--")
    assert text.endswith("-->\n\nProse after.\n")
    assert "`the command`" in text
    assert "40 images of val of tiny" in text

    # with the records alone nothing is run, and the table is the same
    Path("runs").rename("elsewhere")
    calls.clear()
    compare(*options)
    assert not calls
    assert Path("docs/methods.md").read_text() == text
    Path("elsewhere").rename("runs")

    # another recipe's record is none: its cells alone are run, after it is said
    other = "mini98_b" if best == "mini98_a" else "mini98_a"
    write_recipe(other, 0.9)
    capsys.readouterr()
    compare("--seeds", "1")
    assert calls == [(stage, f"{other}-s0") for stage in compare_methods.STAGES]
    said = capsys.readouterr().out
    assert f"docs/methods/{other}-s0.json is of another recipe or contest" in said
    assert len(rows()) == 2


def test_it_goes_on_where_it_was_killed(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe("mini98_a", 0.2)
    whole = entrants.call

    def stopped(stage: str, words: list[str]) -> int:
        return 143 if stage == "evaluate" else whole(stage, words)

    monkeypatch.setattr(entrants, "call", stopped)
    with pytest.raises(SystemExit) as end:
        compare("--seeds", "1")
    assert end.value.code == 143
    assert not list(Path("docs").glob("methods/*"))
    assert [row[:4] for row in rows()] == [["mini98_a", "SimCLR", "0", "not run yet"]]
    pretrained = Path("runs/mini98_a-s0/pretrain/provenance.json").read_bytes()
    monkeypatch.setattr(entrants, "call", whole)
    capsys.readouterr()
    compare("--seeds", "1")
    assert "runs/mini98_a-s0/pretrain is up to date" in capsys.readouterr().out
    assert Path("runs/mini98_a-s0/pretrain/provenance.json").read_bytes() == pretrained
    assert Path("docs/methods/mini98_a-s0.json").is_file()


def test_a_failed_run_lets_the_others_run_and_no_best_be_chosen(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, temperature in (("mini98_a", 0.2), ("mini98_b", 0.5)):
        write_recipe(name, temperature)
    whole = entrants.call

    def failing(stage: str, words: list[str]) -> int:
        return 1 if "mini98_a-s0" in words else whole(stage, words)

    monkeypatch.setattr(entrants, "call", failing)
    message = r"^stages.pretrain of mini98_a-s0 failed \(exit code 1\)$"
    with pytest.raises(InputError, match=message):
        compare()
    assert [file.name for file in Path("docs/methods").iterdir()] == ["mini98_b-s0.json"]
    assert [row[0] for row in rows()] == ["mini98_b", "mini98_a"]


def test_minutes_become_steps_before_any_training(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe("mini98_a", 0.2, "minutes: 20")
    write_recipe("mini98_b", 0.5)
    write_recipe("mini98_c", 0.9, "minutes: 20")
    made = []

    def call(stage: str, words: list[str]) -> int:
        made.append((stage, words[words.index("--entry") + 1], "--plan-only" in words))
        return 0 if made[-1][-1] else 143

    monkeypatch.setattr(entrants, "call", call)
    with pytest.raises(SystemExit):
        compare()
    planned = [("pretrain", f"mini98_{x}-s0", True) for x in "ac"]
    assert made == [*planned, ("pretrain", "mini98_a-s0", False)]


@pytest.mark.dist
def test_told_to_stop_it_stops_the_stage_which_writes_a_checkpoint(
    tiny_contest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_recipe("mini98_a", 0.2, "minutes: 20")
    command = [sys.executable, "-m", "stages.compare_methods"]
    checkpoint = Path("runs/mini98_a-s0/pretrain/checkpoint.pt")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not checkpoint.is_file():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.index("wrote runs/mini98_a-s0/pretrain/plan.json") < said.index("stopped after")
    assert said.endswith("\nstopped; the same command goes on from there\n")


def test_where_all_labels_were_learned_none_are_left_to_choose_by(tiny_contest: Path) -> None:
    contest, entry = load_contest("tiny"), Path("runs/all")
    for folder in ("pretrain", "embeddings"):
        (entry / folder).mkdir(parents=True)
    train = contest.manifest("train").usable()
    np.save(entry / "embeddings" / "train.npy", np.eye(80, 8, dtype=np.float32))
    write_manifest(entry / "pretrain" / "trained_on.csv", train)
    assert comparison._knn_on_train(contest, entry) is None
    write_manifest(entry / "pretrain" / "trained_on.csv", train.take(np.arange(60)))
    assert comparison._knn_on_train(contest, entry) is not None


def test_what_cannot_be_compared_is_refused_before_anything_runs(calls: list[Call]) -> None:
    def refused(file: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as error:
            compare(str(file))
        assert "\n" not in str(error.value)

    with pytest.raises(InputError, match=r"there is no recipes/mini98_\*\.yaml"):
        compare()
    file = write_recipe("mini98_a", 0.2)
    text = file.read_text()
    file.write_text(text.replace("tiny", "absent"))
    refused(file, r"contest\.json is not there; `make data ROOT=… CONTEST=absent` makes it")
    file.write_text(text + "evaluate: {k: [1]}\n")
    refused(file, r"evaluate\.k is \[1\]; 20 in it is expected")
    file.write_text(text)
    Path("docs").mkdir()
    Path("docs/methods.md").write_text(f"# Methods\n{comparison.marks('compare-methods')[0]}\n")
    refused(file, r"docs/methods\.md: <!-- .* once each, are expected")
    assert not calls


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"a": 1, "b": 0}, True),  # a later field, at its default
        ({"a": 1}, {"a": 1, "b": 9}, False),  # and one that the recipe sets
        ({"a": 1, "b": 0}, {"a": 1}, False),
        ({"options": {}}, {"options": {"drop_path_rate": 0.3}}, False),
        ({"views": [{"p": 1}, {"p": 2}]}, {"views": [{"p": 1, "size": 1}] * 2}, False),
        ({"views": [{"p": 1}] * 2}, {"views": [{"p": 1, "size": 1}] * 2}, True),
        ({"views": [{"p": 1}]}, {"views": [{"p": 1, "size": 2}]}, False),
        ({"views": [{"p": 1}]}, {"views": [{"p": 1}] * 2}, False),
    ],
)
def test_a_record_holds_while_what_decided_it_is_the_same(
    old: dict[str, object], new: dict[str, object], same: bool
) -> None:
    default = {"a": 5, "b": 0, "options": {}, "views": [{"p": 0, "size": 1}]}
    assert comparison.holds(old, new, default) == same
