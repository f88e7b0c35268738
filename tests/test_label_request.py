"""The label-request stage: eligible images only, once, in the contest's form."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import InputError, config, runs
from pipeline.manifest import PREPARED, Manifest, load_contest, read_manifest, write_manifest
from pipeline.selection import Candidates, Strategy, candidates_of
from pipeline.strategies import Picks, Random
from stages import import_labels, label_request
from tests.fake_run import (
    IN_VAL,
    LIKE_TRAIN,
    SKIPPED,
    TWINS,
    label,
    parsed,
    start,
    write_finetune,
)


def test_answers_count_as_labeled(here: Path) -> None:
    """Their images are known in a further request, with what people said."""
    embeddings = Path("runs/entry/embeddings")
    first = Manifest.of("unlabeled", [2, 30, 9], [1, 3, -1])
    write_manifest(Path("data_manifests/small/requested-1.csv"), first)
    of = load_contest("small")
    found = candidates_of(of, embeddings, [], [Path("data_manifests/small/requested-1.csv")], 1.1)
    x, train = (np.load(embeddings / f"{split}.npy") for split in ("unlabeled", "train"))
    np.testing.assert_array_equal(found.labeled, np.concatenate([train, x[[2, 30]]]))
    assert found.labels[20:].tolist() == [1, 3]
    assert not np.isin([2, 30], found.eligible).any()
    assert 9 in found.eligible  # nobody knew it
    assert found.known[found.eligible == 9] < 1


STRATEGIES = [kind.__name__ for kind in Strategy.__subclasses__()]


def ask(*argv: str, **options: Any) -> list[str]:
    """Run label_request for 8 labels; the rows of its request."""
    start(label_request, "--label_request.budget", "8", *argv, **options)
    return Path("runs/entry/label_request/request_00.csv").read_text().splitlines()


def answer(path: str, **options: Any) -> Path:
    return import_labels.run(parsed().recipe, Path(path), **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_request_has_the_contests_form(here: Path, strategy: str) -> None:
    write_finetune()
    rows = ask("--label_request.strategy", strategy)
    indices = [int(row.removesuffix(".png,")) for row in rows]
    assert rows == [f"{n}.png," for n in indices]
    assert indices == sorted(set(indices))
    assert len(indices) == 8
    folder = here / "runs/entry/label_request"
    facts = json.loads((folder / "request.json").read_text())
    digest = hashlib.sha256(np.array(indices, "<i8").tobytes()).hexdigest()
    assert facts["indices_sha256"] == digest
    assert facts["strategy"]["class_path"] == f"pipeline.strategies.{strategy}"
    assert (facts["budget"], facts["seed"], facts["file"]) == (8, 0, "request_00.csv")
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 900
        assert sheet.height > 600


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_request_never_asks_for_what_is_not_eligible(here: Path, strategy: str) -> None:
    """56 of 60 can be asked for: not skipped, not in val, not like train, one of the twins."""
    write_finetune()
    rows = ask("--label_request.strategy", strategy, "--label_request.budget", "56")
    expected = set(range(60)) - {SKIPPED, IN_VAL, LIKE_TRAIN, TWINS[1]}
    assert {int(row.removesuffix(".png,")) for row in rows} == expected


def test_an_answer_is_for_the_images_that_were_asked_for(here: Path) -> None:
    """Not for those of another contest, or that are in their places by now."""
    indices = [int(row.removesuffix(".png,")) for row in ask()]
    torch.save(torch.zeros(8, dtype=torch.int64), "label_00.pt")
    manifest = load_contest("small").manifest("unlabeled")
    digest = manifest.sha256[indices[0]]
    manifest.sha256[indices[0]] = b"other"
    prepared(manifest)
    with pytest.raises(InputError, match="asks for images of another contest than small, or"):
        answer("label_00.pt")
    manifest.sha256[indices[0]] = digest
    others = np.setdiff1d(np.arange(60), indices)
    manifest.note[others] = "excluded: also in a test set that came later"
    prepared(manifest)
    assert read_manifest(answer("label_00.pt")).index.tolist() == indices


def prepared(manifest: Manifest) -> None:
    """Other unlabeled images, as `make data` leaves them."""
    folder = Path("data_manifests/small")
    write_manifest(folder / "unlabeled.csv", manifest, PREPARED)
    facts = runs.read_json(folder / "contest.json", "")
    facts["splits"]["unlabeled"]["manifest_sha256"] = runs.sha256(folder / "unlabeled.csv")
    runs.write_json(folder / "contest.json", facts)


def test_a_request_of_another_team_is_named(here: Path) -> None:
    ask()
    torch.save(torch.zeros(8, dtype=torch.int64), "label_00.pt")
    recipe = parsed("--label_request.team", "07").recipe
    with pytest.raises(InputError, match=r"request_07.csv is not there; .*request_00.csv, name it"):
        import_labels.run(recipe, Path("label_00.pt"))


def test_a_contest_without_unlabeled_images_is_told(here: Path) -> None:
    file = here / "data_manifests/small/contest.json"
    facts = json.loads(file.read_text())
    del facts["splits"]["unlabeled"]
    file.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="contest 'small' has no split 'unlabeled'; it has train"):
        ask()


def test_a_budget_above_what_is_eligible_is_refused(here: Path) -> None:
    with pytest.raises(InputError, match="budget is 57 and 56 unlabeled images can be asked for"):
        ask("--label_request.budget", "57")
    assert not (here / "runs/entry/label_request/request_00.csv").exists()
    assert not (here / "runs/entry/label_request/provenance.json").exists()


def test_an_answer_about_images_that_are_not_there_is_refused(here: Path) -> None:
    answer = here / "data_manifests/small/requested-1.csv"
    answer.write_text("split,index,label\nunlabeled,60,1\n")
    with pytest.raises(InputError, match=r"requested-1.csv labels unlabeled 60; there are 60 im"):
        ask("--label_request.budget", "5")


def test_near_duplicates_are_not_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two copies of one embedding: a budget that needs both is refused, and says why."""
    file = here / "runs/entry/embeddings/unlabeled.npy"
    x = np.load(file)
    x[31] = x[30]
    np.save(file, x)
    with pytest.raises(InputError, match="1 near-duplicates left out"):
        ask("--label_request.budget", "56")
    assert "31.png," not in ask("--label_request.budget", "55")
    assert "1 images were no choice, as near-duplicates" in capsys.readouterr().out
    made = json.loads((here / "runs/entry/label_request/provenance.json").read_text())["results"]
    assert made["near_duplicates"] == 1
    assert (
        len(ask("--label_request.budget", "56", "--label_request.near_duplicate", "2", force=True))
        == 56
    )


def test_what_a_request_shows(here: Path) -> None:
    """A row for each pick, and what the other strategies would have asked for, also later on."""
    write_finetune()
    rows = ask("--label_request.strategy", "MarginClusters")
    folder = here / "runs/entry/label_request"
    assert not (folder / "overlap.csv").exists()
    assert ask("--label_request.strategy", "MarginClusters", compare=True) == rows
    with (folder / "picks.csv").open() as file:
        picks = list(csv.DictReader(file))
    assert [f"{pick['index']}.png," for pick in picks] == rows
    logits = np.load("runs/entry/finetune-0/logits/unlabeled.npy")
    for pick in picks:
        p = np.exp(logits[int(pick["index"])]) / np.exp(logits[int(pick["index"])]).sum()
        assert int(pick["class"]) == p.argmax()
        assert float(pick["confidence"]) == pytest.approx(p.max(), abs=1e-4)
        assert float(pick["margin"]) == pytest.approx(p.max() - np.sort(p)[-2], abs=1e-4)
        assert -1 < float(pick["nearest_labeled"]) < 1
    with (folder / "overlap.csv").open() as file:
        shared = {row.pop("strategy"): row for row in csv.DictReader(file)}
    assert sorted(shared) == sorted(STRATEGIES)
    assert all(float(shared[name][name]) == 100 for name in STRATEGIES)
    for picture in ("contact_sheet", "map", "classes", "overlap"):
        with Image.open(folder / f"{picture}.png") as image:
            assert min(image.size) > 300


def test_before_any_fine_tuning_the_neighbors_guess(here: Path) -> None:
    ask("--label_request.strategy", "ProbCover", compare=True)
    folder = here / "runs/entry/label_request"
    with (folder / "picks.csv").open() as file:
        picks = list(csv.DictReader(file))
    right = [int(pick["class"]) == label("unlabeled", int(pick["index"])) for pick in picks]
    assert sum(right) >= 6
    assert {pick["margin"] for pick in picks} == {""}
    assert "Margin," not in (folder / "overlap.csv").read_text()


def test_logits_that_are_not_there_are_missed_only_where_needed(here: Path) -> None:
    """A fine-tuning that left the unlabeled split out is none to ask."""
    (write_finetune() / "logits" / "unlabeled.npy").unlink()
    assert len(ask("--label_request.strategy", "Random")) == 8
    with pytest.raises(InputError, match=r"unlabeled\.npy is not there; `make finetune ARGS="):
        ask("--label_request.strategy", "Margin", force=True)


def test_further_entries_vote(here: Path) -> None:
    write_finetune()
    alone = ask("--label_request.strategy", "Margin")
    with pytest.raises(InputError, match="runs/other holds no finished finetune-K"):
        ask("--label_request.strategy", "Margin", "--label_request.voters", "[other]", force=True)
    shutil.copytree("runs/entry/finetune-0", "runs/other/finetune-0")
    logits = np.load("runs/entry/finetune-0/logits/unlabeled.npy")
    unsure = [int(row.removesuffix(".png,")) for row in alone]
    sure = np.zeros_like(logits)
    sure[unsure] = 20 * np.eye(4)[logits[unsure].argmax(1)]
    np.save("runs/other/finetune-0/logits/unlabeled.npy", sure)
    both = ask(
        "--label_request.strategy", "Margin", "--label_request.voters", "[other]", force=True
    )
    assert not set(both) & set(alone)


def test_a_voter_of_another_contest_is_refused(here: Path) -> None:
    write_finetune()
    other = Path("runs/other/finetune-0")
    shutil.copytree("runs/entry/finetune-0", other)
    vote = ("--label_request.strategy", "Margin", "--label_request.voters", "[other]")
    np.save(other / "logits/unlabeled.npy", np.zeros((59, 4), np.float32))
    with pytest.raises(InputError, match=r"unlabeled.npy holds \[59, 4\]; \[60, 4\] is expected"):
        ask(*vote)
    np.save(other / "logits/unlabeled.npy", np.zeros((60, 4), np.float32))
    Path("elsewhere.json").touch()
    made = {"inputs": {"elsewhere.json": hashlib.sha256(b"").hexdigest()}}
    (other / "provenance.json").write_text(json.dumps(made))
    expected = "runs/other/finetune-0 is of another contest than small, or of other images; a fine"
    with pytest.raises(InputError, match=expected):
        ask(*vote)
    assert not Path("runs/entry/label_request/request_00.csv").exists()


def test_a_request_is_there_before_it_is_compared(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while other strategies are seen, it is whole, and they are seen the next time."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    write_finetune()
    with monkeypatch.context() as m:
        m.setattr(label_request, "_compare", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(compare=True)
    file = here / "runs/entry/label_request/request_00.csv"
    written = file.stat().st_mtime_ns
    ask(compare=True)
    assert file.stat().st_mtime_ns == written
    assert file.with_name("overlap.csv").is_file()


def test_a_strategy_that_cannot_fill_the_budget_is_left_out_of_the_overlap(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = label_request.choose

    def chosen(strategy: Strategy, *rest: Any) -> Any:
        if type(strategy).__name__ == "ProbCover":
            raise InputError("label_request: budget is 8 and 7 unlabeled images can be asked for")
        return whole(strategy, *rest)

    write_finetune()
    monkeypatch.setattr(label_request, "choose", chosen)
    ask("--label_request.strategy=Random", compare=True)
    assert "ProbCover is left out: label_request: budget is 8 and 7" in capsys.readouterr().out
    with Path("runs/entry/label_request/overlap.csv").open() as file:
        names = [row["strategy"] for row in csv.DictReader(file)]
    assert sorted(names) == sorted({*STRATEGIES} - {"ProbCover"})


def test_logits_that_are_no_numbers_hinder_only_who_needs_them(here: Path) -> None:
    file = write_finetune() / "logits" / "unlabeled.npy"
    first = ask("--label_request.strategy=Random")
    logits = np.load(file)
    logits[int(first[0].removesuffix(".png,"))] = np.nan
    np.save(file, logits)
    with pytest.raises(InputError, match=f"^logits of 1 unlabeled images, {first[0][:-1]} the"):
        ask("--label_request.strategy=Margin", force=True)
    made = Path("runs/entry/label_request/request_00.csv")
    assert made.read_text().split() == first  # it may be with people
    assert ask("--label_request.strategy=Random", force=True) == first


def test_equal_embeddings_have_no_map(here: Path) -> None:
    """Those of a collapsed encoder; t-SNE would end the process."""
    for split in ("unlabeled", "train"):
        file = Path(f"runs/entry/embeddings/{split}.npy")
        x = np.zeros_like(np.load(file))
        x[:, 0] = 1
        np.save(file, x)
    assert len(ask("--label_request.near_duplicate=2", "--label_request.strategy=Random")) == 8
    assert Path("runs/entry/label_request/map.png").is_file()


def test_a_request_is_made_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ask()
    file = here / "runs/entry/label_request/request_00.csv"
    written = file.stat().st_mtime_ns
    assert ask() == rows
    assert (
        "is up to date (--force chooses anew); next: make import-labels" in capsys.readouterr().out
    )
    assert file.stat().st_mtime_ns == written
    assert ask(force=True) == rows  # the same seed
    assert file.stat().st_mtime_ns != written
    with pytest.raises(InputError, match="has no answer yet, and would be another request by now"):
        ask("--seed", "1")
    assert file.read_text().splitlines() == rows
    assert ask("--seed", "1", force=True) != rows


def test_a_request_that_was_changed_is_not_imported(here: Path) -> None:
    rows = ask()
    file = here / "runs/entry/label_request/request_00.csv"
    file.write_text("\n".join(reversed(rows)))
    torch.save(torch.zeros(8, dtype=torch.int64), "label_00.pt")
    with pytest.raises(InputError, match="was changed since label-request wrote it"):
        answer("label_00.pt")


@pytest.mark.parametrize("team", ["../../x", "a b", ""])
def test_a_team_is_no_path(team: str) -> None:
    with pytest.raises(InputError, match=r"label_request: team is .*; letters, digits"):
        config.parse("", argv=[f"--label_request.team={team}"])


def test_another_team_does_not_ask_beside_a_request_without_answer(here: Path) -> None:
    """Its answer would be taken for that of the newer request."""
    ask("--label_request.strategy", "Random")
    write_finetune()
    folder, options = Path("runs/entry/label_request"), ["--label_request.strategy", "Margin"]
    options += ["--label_request.budget", "8", "--label_request.team", "07"]
    with pytest.raises(InputError, match=r"request_00\.csv has no answer yet, and would be"):
        start(label_request, *options)
    start(label_request, *options, force=True)
    assert [f.name for f in folder.glob("request_*.csv")] == ["request_07.csv"]


def test_an_answered_request_is_not_made_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ask()
    torch.save(torch.zeros(8, dtype=torch.int64), "label_00.pt")
    answer("label_00.pt")
    assert ask() == rows
    assert "was answered by data_manifests/small/requested-1.csv" in capsys.readouterr().out
    others = ask(force=True)
    assert not set(others) & set(rows)


def test_a_strategy_that_needs_logits_gets_the_latest(here: Path) -> None:
    seen = []

    class LeastSure(Random):
        uses_logits = True

        def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
            seen.append(candidates)
            return candidates.margin[candidates.free].argsort()[:budget], None

    recipe, _, plain = config.parse("", argv=["--data.contest", "small"])
    object.__setattr__(recipe.label_request, "strategy", LeastSure)
    object.__setattr__(recipe.label_request, "budget", 5)
    with pytest.raises(InputError, match="holds no finished finetune-K"):
        label_request.run(recipe, plain)
    write_finetune(0)
    latest = write_finetune(2)
    label_request.run(recipe, plain)
    np.testing.assert_array_equal(seen[0].logits, [np.load(latest / "logits/unlabeled.npy")])
    assert seen[0].labeled.shape == (20, 8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_organizers_accept_the_request(here: Path, shared: Path, strategy: str) -> None:
    write_finetune()
    rows = ask("--label_request.strategy", strategy)
    oracle = torch.tensor([label("unlabeled", k) for k in range(60)])
    torch.save(oracle, "oracle.pt")
    program = shared / "contest" / "answer_request.py"
    request = "runs/entry/label_request/request_00.csv"
    command = [sys.executable, str(program), request, "oracle.pt", "8", "label_00.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = read_manifest(answer("label_00.pt"))
    asked = [int(row.removesuffix(".png,")) for row in rows]
    assert manifest.index.tolist() == sorted(asked)
    assert manifest.label.tolist() == [label("unlabeled", k) for k in sorted(asked)]
