"""The pseudo-label stage: its manifest, its audit and its rounds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import InputError, labeling, metrics, runs
from pipeline.label_files import label_files
from pipeline.manifest import load_contest, read_manifest
from pipeline.propagation import Propagation
from stages import finetune, pseudo_label
from tests.fake_run import (
    CLASSES,
    IN_VAL,
    LIKE_TRAIN,
    SKIPPED,
    TWINS,
    label,
    parsed,
    start,
    write_finetune,
    write_run,
)


@pytest.fixture
def fine_tuned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """stages.finetune replaced by one that writes logits; the names of the label files it found."""
    calls: list[str] = []

    def run(recipe: Any, plain: dict[str, Any], force: bool = False) -> Path:
        files = [f.name for f in runs.numbered(Path("runs/entry"), "pseudo")]
        calls.append(" ".join(files))
        return write_finetune(len(files))

    monkeypatch.setattr(finetune, "run", run)
    return calls


def record(number: int = 1) -> Any:
    return json.loads(Path(f"runs/entry/pseudo-{number}.json").read_text())


def test_pseudo_labels_are_a_manifest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latest = write_finetune()
    Path("data_manifests/small/requested-1.csv").write_text(
        "split,index,label,source\nunlabeled,0,1,x\nunlabeled,50,2,x\n"
    )
    start(pseudo_label, "--pseudo_label.strategy.fraction", "1.0")
    lines = Path("runs/entry/pseudo-1.csv").read_text().splitlines()
    assert lines[0] == "split,index,label,confidence,source"
    manifest = read_manifest(Path("runs/entry/pseudo-1.csv"))
    expected = sorted(set(range(60)) - {SKIPPED, IN_VAL, 0, 50, LIKE_TRAIN, max(TWINS)})
    assert manifest.index.tolist() == expected  # all that is usable and not labeled, once
    logits = np.load(latest / "logits/unlabeled.npy")
    np.testing.assert_array_equal(manifest.label, logits[expected].argmax(1))
    assert set(manifest.source) == {str(latest)}
    found = record()
    assert (found["eligible"], found["labeled"], found["coverage"]) == (54, 54, 100)
    held = np.load(latest / "logits/train.npy")[0:20:2]
    right = held.argmax(1) == [label("train", k) for k in range(0, 20, 2)]
    assert found["precision"] == pytest.approx(100 * right.mean())
    assert (found["precision_on"], found["precision_images"]) == ("the held-out labels", 10)
    assert Path("runs/entry/pseudo-1.png").is_file()
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("100.0 % of 54 unlabeled images labeled; ")
    assert said[-1] == "wrote runs/entry/pseudo-1.csv, .png and .json; next: make finetune"


def test_a_threshold_takes_only_sure_images(here: Path) -> None:
    latest = write_finetune()
    options = ("--pseudo_label.strategy", "Threshold", "--pseudo_label.strategy.confidence", "0.97")
    start(pseudo_label, *options)
    manifest = read_manifest(Path("runs/entry/pseudo-1.csv"))
    logits = np.load(latest / "logits/unlabeled.npy").astype(np.float64) / record()["temperature"]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    possible = set(range(60)) - {SKIPPED, IN_VAL, LIKE_TRAIN, max(TWINS)}
    sure = [k for k in sorted(possible) if p[k].max() >= 0.97]
    assert manifest.index.tolist() == sure
    assert (manifest.confidence >= 0.97).all()


def test_confidences_are_calibrated_by_held_out_labels(here: Path) -> None:
    """The temperature is that of the least cross entropy; without held-out labels there is none."""
    latest = write_finetune(sharp=8.0)
    start(pseudo_label, "--pseudo_label.strategy.fraction", "1.0")
    logits = np.load(latest / "logits/train.npy")[0:20:2].astype(np.float64)
    truth = np.array([label("train", k) for k in range(0, 20, 2)])

    def loss(t: float) -> float:
        log_p = logits / t - np.log(np.exp(logits / t).sum(1, keepdims=True))
        return -float(11 / 12 * log_p[np.arange(10), truth].mean() + 1 / 12 * log_p.mean())

    t = record()["temperature"]
    assert loss(t) < min(loss(0.9 * t), loss(1.1 * t))
    sure = read_manifest(Path("runs/entry/pseudo-1.csv")).confidence
    np.save(latest / "logits/unlabeled.npy", 10 * np.load(latest / "logits/unlabeled.npy"))
    np.save(latest / "logits/train.npy", 10 * np.load(latest / "logits/train.npy"))
    start(pseudo_label, "--pseudo_label.strategy.fraction", "1.0")
    again = read_manifest(Path("runs/entry/pseudo-1.csv")).confidence
    np.testing.assert_allclose(again, sure, rtol=1e-2)  # sharper logits are as sure
    of_all, held = record()["temperature"], (latest / "holdout.csv").read_text().splitlines()
    doubt = [f"train,{k},{(label('train', k) + 1) % 4},train.csv,doubtful label" for k in (1, 3, 5)]
    rows = [f"{held[0]},note", *(f"{row}," for row in held[1:]), *doubt]
    (latest / "holdout.csv").write_text("\n".join(rows) + "\n")
    start(pseudo_label, force=True)
    assert record()["temperature"] == pytest.approx(of_all, rel=1e-3)  # wrong labels say nothing
    (latest / "holdout.csv").write_text("split,index,label,source\n")
    start(pseudo_label, force=True)
    assert record()["temperature"] is None


def test_labels_propagate_over_the_embeddings(here: Path) -> None:
    """From train and what was requested, without what is held out, to what is near."""
    write_finetune()
    Path("data_manifests/small/requested-1.csv").write_text(
        "split,index,label,source\nunlabeled,0,1,x\nunlabeled,50,2,x\n"
    )
    options = ("--pseudo_label.predictor", "Propagation", "--pseudo_label.predictor.neighbors", "8")
    start(pseudo_label, *options, "--pseudo_label.strategy.fraction", "1.0")
    manifest = read_manifest(Path("runs/entry/pseudo-1.csv"))
    right = [
        label("unlabeled", k) == given
        for k, given in zip(manifest.index, manifest.label, strict=True)
    ]
    assert len(right) == 54
    assert np.mean(right) > 0.8
    assert ((manifest.confidence >= 0) & (manifest.confidence <= 1)).all()
    assert record()["precision_images"] == 10
    Path("runs/entry/embeddings/train.npy").unlink()
    with pytest.raises(InputError, match=r"train.npy is not there; `make embed` makes it"):
        start(pseudo_label, *options)


def test_labels_propagate_over_the_predictions_without_embeddings(here: Path) -> None:
    write_finetune()
    for split in ("train", "unlabeled"):
        Path(f"runs/entry/embeddings/{split}.npy").unlink()
    options = [f"--pseudo_label.predictor.{word}" for word in ("neighbors=8", "space=predictions")]
    start(pseudo_label, "--pseudo_label.predictor=Propagation", *options)
    manifest = read_manifest(Path("runs/entry/pseudo-1.csv"))
    true = [label("unlabeled", k) for k in manifest.index]
    assert len(true) >= 4
    assert np.mean(manifest.label == true) > 0.8


def test_labeled_images_are_as_calibrated_as_the_others(here: Path) -> None:
    latest, contest = write_finetune(), load_contest("small")
    known = labeling.labeled_images(latest)
    images = labeling.unlabeled_images(contest, known)
    given, temperature = labeling.evidence_of(
        contest,
        here,
        latest,
        images,
        known.take(np.arange(2)),
        known,
        Propagation(space="predictions"),
    )
    assert temperature not in (None, 1)
    np.testing.assert_allclose(given.labeled[:2], given.x[-2:], atol=1e-6)


def test_probabilities_become_vectors_of_unit_length(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    monkeypatch.setattr(metrics, "_CELLS", 10)  # two rows at a time
    roots = labeling._roots(logits)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(roots @ roots.T, np.sqrt(p) @ np.sqrt(p).T, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(roots, axis=1), 1, atol=1e-6)


def test_a_rehearsal_tells_the_true_precision(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_finetune()
    Path("data/small/made_from.json").write_text(
        json.dumps({"asked": {"root": str(here / "small")}})
    )
    torch.save(torch.tensor([label("unlabeled", k) for k in range(60)]), here / "small.oracle.pt")
    start(pseudo_label, "--pseudo_label.strategy.fraction", "0.5")
    manifest = read_manifest(Path("runs/entry/pseudo-1.csv"))
    right = [
        label("unlabeled", k) == given
        for k, given in zip(manifest.index, manifest.label, strict=True)
    ]
    assert record()["true_precision"] == pytest.approx(100 * np.mean(right))
    assert f"; in truth {100 * np.mean(right):.1f} %" in capsys.readouterr().out


def test_no_sure_image_is_a_mistake(here: Path) -> None:
    write_finetune()
    options = ("--pseudo_label.strategy", "Threshold", "--pseudo_label.strategy.confidence", "1.0")
    with pytest.raises(
        InputError, match="none of 56 images is sure enough; a lower bar is expected"
    ):
        start(pseudo_label, *options)
    assert not list(Path("runs/entry").glob("pseudo-*"))


def test_precision_falls_back_on_val_and_says_so(here: Path) -> None:
    latest = write_finetune(held=False)
    start(pseudo_label, "--pseudo_label.strategy.fraction", "1.0")
    right = np.load(latest / "logits/val.npy").argmax(1) == [label("val", k) for k in range(24)]
    found = record()
    assert found["precision_on"] == "val (reported, not chosen by)"
    assert found["precision"] == pytest.approx(100 * right.mean())


def test_labels_of_val_that_were_learned_tell_no_precision(here: Path) -> None:
    write_finetune(held=False)
    learned = Path("runs/entry/finetune-0/trained_on.csv")
    with learned.open("a") as file:
        file.writelines(f"val,{k},{label('val', k)},val.csv\n" for k in range(20))
    start(pseudo_label, "--pseudo_label.strategy.fraction", "1.0")
    assert record()["precision_images"] == 4


def test_precision_is_an_upper_one_where_guesses_were_learned(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_finetune() / "trained_on.csv"
    start(pseudo_label, "--pseudo_label.strategy.fraction", "1.0")
    assert not record()["precision_upper"]
    assert "at most" not in capsys.readouterr().out
    file.write_text(file.read_text() + "unlabeled,7,1,runs/entry/finetune-0\n")
    start(pseudo_label, "--pseudo_label.strategy.fraction", "1.0", force=True)
    assert record()["precision_upper"]
    assert f"; at most {record()['precision']:.1f} ± " in capsys.readouterr().out


def test_logits_that_were_left_out_are_asked_for_by_the_option(here: Path) -> None:
    (write_finetune() / "logits" / "unlabeled.npy").unlink()
    with pytest.raises(InputError, match=r"ARGS='--finetune\.unlabeled true'` makes it"):
        start(pseudo_label)


@pytest.mark.parametrize("space", ["", "embeddings", "predictions"])
def test_val_changes_no_label(here: Path, space: str) -> None:
    """Nothing of a rehearsal is chosen by its val."""
    latest = write_finetune(held=False)
    options = [f"--pseudo_label.predictor.{word}" for word in ("neighbors=8", f"space={space}")]
    options = ["--pseudo_label.predictor=Propagation", *options] if space else []
    start(pseudo_label, *options)
    first = Path("runs/entry/pseudo-1.csv").read_bytes()
    other = np.random.default_rng(9).standard_normal((24, 8)).astype(np.float32)
    np.save(latest / "logits/val.npy", other[:, :CLASSES])
    np.save("runs/entry/embeddings/val.npy", other / np.linalg.norm(other, axis=1, keepdims=True))
    start(pseudo_label, *options, force=True)
    assert not space or record()["precision"] is None
    assert Path("runs/entry/pseudo-1.csv").read_bytes() == first


def test_a_contest_without_any_labels_apart_has_no_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, val=False)
    write_finetune(held=False)
    start(pseudo_label)
    assert record()["precision"] is None


def test_the_same_classifier_labels_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_finetune()
    start(pseudo_label)
    written = Path("runs/entry/pseudo-1.csv").stat().st_mtime_ns
    start(pseudo_label)
    assert (
        "runs/entry/pseudo-1.csv is up to date (--force makes it anew)" in capsys.readouterr().out
    )
    assert Path("runs/entry/pseudo-1.csv").stat().st_mtime_ns == written
    before = record()["labeled"]
    start(pseudo_label, "--pseudo_label.strategy.fraction", "0.5")  # another rule replaces it
    assert record()["labeled"] > before
    start(pseudo_label, "--pseudo_label.strategy.fraction", "0.5", force=True)
    write_finetune(1)
    start(pseudo_label, "--pseudo_label.strategy.fraction", "0.5")
    files = runs.numbered(Path("runs/entry"), "pseudo")
    assert [f.name for f in files] == ["pseudo-1.csv", "pseudo-2.csv"]
    assert record(2)["classifier"] == "runs/entry/finetune-1"


def test_only_labels_that_the_fine_tuning_had_propagate(here: Path) -> None:
    """Neither the rest of train, nor answers that the recipe does not learn from, nor what earlier
    pseudo-labels said.
    """
    file = write_finetune() / "trained_on.csv"
    rows = [
        row for row in file.read_text().splitlines() if row.split(",")[2] in ("label", "0", "1")
    ]
    rows += ["unlabeled,0,3,runs/entry/finetune-0"]
    file.write_text("\n".join(rows) + "\n")
    Path("data_manifests/small/requested-1.csv").write_text(
        "split,index,label,source\nunlabeled,50,2,x\n"
    )
    options = ["--pseudo_label.predictor=Propagation", "--pseudo_label.strategy.fraction=1.0"]
    start(pseudo_label, *options, "--finetune.manifests=[train,pseudo]")
    assert set(read_manifest(Path("runs/entry/pseudo-1.csv")).label) == {0, 1}
    start(pseudo_label, *options)
    found = read_manifest(Path("runs/entry/pseudo-1.csv"))
    assert set(found.label) == {0, 1, 2}
    assert 50 not in found.index


def test_a_fine_tuning_of_other_files_is_not_used(here: Path) -> None:
    folder, file = write_finetune(), Path("data_manifests/small/requested-1.csv")
    file.write_text("split,index,label,source\nunlabeled,50,2,x\n")
    inputs = {str(file): runs.sha256(file)}
    (folder / "provenance.json").write_text(json.dumps({"inputs": inputs}))
    file.write_text("split,index,label,source\nunlabeled,50,1,x\n")
    with pytest.raises(InputError, match=r"from another .*requested-1.csv; `make finetune` makes"):
        start(pseudo_label)
    file.unlink()
    with pytest.raises(InputError, match=r"made from .*requested-1.csv, which is no longer there"):
        start(pseudo_label)


def test_a_round_that_was_killed_before_its_record_is_left_out(here: Path) -> None:
    write_finetune()
    start(pseudo_label)
    Path("runs/entry/pseudo-1.json").unlink()
    write_finetune(1)
    start(pseudo_label)
    rows = Path("runs/entry/pseudo-rounds.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["pseudo-2.csv"]


def test_labels_of_another_rule_have_no_record_of_the_one_before(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two files, neither stage takes one for the other's."""
    write_finetune()
    start(pseudo_label)
    file = Path("runs/entry/pseudo-1.csv")
    before = file.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(pseudo_label, "coverage", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(pseudo_label, "--pseudo_label.strategy.fraction=0.5")
    assert file.read_bytes() != before
    with pytest.raises(InputError, match=r"pseudo-1.json is not there; `?make pseudo-label`? mak"):
        label_files(parsed().recipe, load_contest("small"))
    start(pseudo_label)
    assert file.read_bytes() == before


def test_a_round_that_was_killed_before_its_record_is_made_again(
    here: Path, fine_tuned: list[str]
) -> None:
    """The rounds before it count: it is the second of two, not the first of further ones."""
    write_finetune()
    start(pseudo_label, "--pseudo_label.rounds", "2")
    Path("runs/entry/pseudo-2.json").unlink()
    start(pseudo_label, "--pseudo_label.rounds", "2")
    assert [record(k)["round"] for k in (1, 2)] == [1, 2]
    assert len(fine_tuned) == 1
    assert not Path("runs/entry/pseudo-3.csv").exists()


def test_rounds_that_nothing_would_learn_from_are_refused(here: Path) -> None:
    write_finetune()
    with pytest.raises(InputError, match="rounds is 2, but no fine-tuning would learn from them"):
        start(pseudo_label, "--pseudo_label.rounds=2", "--finetune.manifests=[train]")


def test_without_a_classifier_there_are_no_pseudo_labels(here: Path) -> None:
    with pytest.raises(InputError, match="holds no finished finetune-K"):
        start(pseudo_label)


def test_rounds_fine_tune_in_between(here: Path, fine_tuned: list[str]) -> None:
    write_finetune()
    start(pseudo_label, "--pseudo_label.rounds", "3")
    assert fine_tuned == ["pseudo-1.csv", "pseudo-1.csv pseudo-2.csv"]
    assert [record(k)["classifier"][-1] for k in (1, 2, 3)] == ["0", "1", "2"]
    assert [record(k)["round"] for k in (1, 2, 3)] == [1, 2, 3]
    start(pseudo_label, "--pseudo_label.rounds", "3")  # nothing left to do
    assert len(fine_tuned) == 2


def test_rounds_stop_when_little_changes(
    here: Path, fine_tuned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The classifiers of the rounds differ by noise: some labels change, but not 90 %."""
    write_finetune()
    options = ("--pseudo_label.rounds", "5", "--pseudo_label.strategy.fraction", "1.0")
    start(pseudo_label, *options, "--pseudo_label.stop_below", "90")
    assert len(fine_tuned) == 1
    changed = record(2)["changed"]
    assert 0 < changed < 90
    assert f"{changed:.1f} % of the labels changed: no further round" in capsys.readouterr().out
    start(pseudo_label, *options, "--pseudo_label.stop_below", "90")
    assert len(fine_tuned) == 1
    rows = Path("runs/entry/pseudo-rounds.csv").read_text().splitlines()
    assert rows[0].startswith("file,round,classifier,labeled,coverage,precision")
    assert [row.split(",")[0] for row in rows[1:]] == ["pseudo-1.csv", "pseudo-2.csv"]
    assert Path("runs/entry/pseudo-rounds.png").is_file()


@pytest.mark.parametrize("finished", [False, True])
def test_interrupted_rounds_go_on(
    here: Path, fine_tuned: list[str], monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """Stopped in, or right after, the fine-tuning between the rounds 1 and 2 of 2."""
    write_finetune()
    whole = finetune.run

    def stopped(*args: Any) -> Path:
        if finished:
            whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        start(pseudo_label, "--pseudo_label.rounds", "2")
    monkeypatch.setattr(finetune, "run", whole)
    start(pseudo_label, "--pseudo_label.rounds", "2")
    assert len(fine_tuned) == 1
    assert [record(k)["round"] for k in (1, 2)] == [1, 2]
    assert not Path("runs/entry/pseudo-3.csv").exists()


def test_new_labels_repeat_the_round(here: Path, fine_tuned: list[str]) -> None:
    write_finetune()
    start(pseudo_label, "--pseudo_label.strategy.fraction", "1.0")
    Path("data_manifests/small/requested-1.csv").write_text(
        "split,index,label,source\nunlabeled,10,1,x\n"
    )
    start(pseudo_label, "--pseudo_label.strategy.fraction", "1.0")
    assert 10 not in read_manifest(Path("runs/entry/pseudo-1.csv")).index
    assert not fine_tuned
    assert not Path("runs/entry/pseudo-2.csv").exists()


def test_a_round_that_is_repeated_is_held_against_the_one_before(
    here: Path, fine_tuned: list[str]
) -> None:
    write_finetune()
    options = ("--pseudo_label.rounds", "2", "--pseudo_label.strategy.fraction", "1.0")
    start(pseudo_label, *options)
    Path("data_manifests/small/requested-1.csv").write_text(
        "split,index,label,source\nunlabeled,10,1,x\n"
    )
    start(pseudo_label, *options)
    first, second = (read_manifest(Path(f"runs/entry/pseudo-{k}.csv")) for k in (1, 2))
    assert 10 not in second.index
    assert record(2)["changed"] == pytest.approx(labeling.changed(first, second))
