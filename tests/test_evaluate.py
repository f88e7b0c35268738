"""The evaluate stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from pipeline import InputError
from pipeline.manifest import Manifest
from pipeline.neighbours import search
from pipeline.runs import sha256
from stages import audit, evaluate, label_request
from tests.fake_run import (
    COUNTS,
    label,
    parsed,
    start,
    write_run,
)


def scores() -> Any:
    return json.loads(Path("runs/entry/evaluate/scores.json").read_text())


def test_evaluate_prints_and_keeps_the_scores(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(evaluate, "--evaluate.k", "[1, 5, 200]")
    found, said = scores(), capsys.readouterr().out
    x, queries = (np.load(f"runs/entry/embeddings/{s}.npy") for s in ("train", "val"))
    y, truth = ([label(s, k) for k in range(COUNTS[s])] for s in ("train", "val"))
    for k in (1, 5):
        peer = KNeighborsClassifier(k, metric="cosine").fit(x, y)
        expected = 100 * peer.score(queries, truth)
        assert found["scores"][f"knn_{k}_majority"]["1"] == pytest.approx(
            expected, abs=100 / 24 + 0.1
        )
    names = [f"knn_{k}_{kind}" for k in (1, 5, 200) for kind in ("weighted", "majority")]
    assert list(found["scores"]) == [*names, "linear"]
    for values in found["scores"].values():
        assert values["1"] <= values["3"] <= values["5"] <= 100
    assert found["scores"]["linear"]["1"] > 60
    assert (found["queries"], found["images"], found["labeled"]) == ("val", 24, 20)
    assert "only 20 labels: k = 200 takes them all" in said
    assert "in a rehearsal val stands for the secret test: choose nothing by it" in said
    assert "top-1   top-3   top-5" in said
    with Image.open("runs/entry/evaluate/neighbours.png") as picture:
        assert picture.width > 1000
    start(evaluate, "--evaluate.k", "[1, 5, 200]")
    assert "runs/entry/evaluate is up to date" in capsys.readouterr().out


def test_evaluate_without_val_holds_out_a_part_of_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, rehearsal=False, val=False)
    start(evaluate)
    found = scores()
    assert found["queries"] == "the images held out of train"
    assert (found["images"], found["labeled"]) == (4, 16)
    assert not any("rehearsal" in note for note in found["notes"])


def test_the_nearest_of_several_splits_are_those_of_one_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    sizes = {"a": 9, "b": 40}
    embeddings = {s: rng.standard_normal((n, 5)).astype(np.float32) for s, n in sizes.items()}
    gallery = Manifest.concatenate(
        [Manifest.of(s, rng.permutation(len(x))[: len(x) - 2]) for s, x in embeddings.items()]
    )
    queries = rng.standard_normal((6, 5)).astype(np.float32)
    x = np.stack([embeddings[s][k] for s, k in zip(gallery.split, gallery.index, strict=True)])
    monkeypatch.setattr(evaluate, "_BLOCK", 5)  # blocks of less than k, and one of both splits
    found, expected = evaluate._nearest(queries, embeddings, gallery, 7), search(queries, x, 7)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


def test_embeddings_of_another_contest_are_refused(here: Path) -> None:
    recipe, _, plain = parsed()
    made = Path("runs/entry/embeddings/provenance.json")
    other = Path("data_manifests/other.json")
    other.write_text("{}")
    made.write_text(json.dumps({"inputs": {str(other): sha256(other)}}))
    for stage in (evaluate, label_request, audit):
        argv = () if stage is audit else (plain,)
        with pytest.raises(InputError, match=r"embeddings is of another contest than small, or of"):
            stage.run(recipe, *argv)


def test_evaluate_needs_embeddings(here: Path) -> None:
    made = Path("runs/entry/embeddings/provenance.json")
    facts = json.loads(made.read_text())
    made.write_text(json.dumps(facts | {"inputs": {"data_manifests/small/train.csv": "older"}}))
    with pytest.raises(InputError) as error:
        start(evaluate)
    assert str(error.value) == (
        "runs/entry/embeddings was made from another data_manifests/small/train.csv; "
        "`make embed` makes it anew"
    )
    made.write_text(json.dumps(facts | {"inputs": {"gone.csv": "older"}}))
    expected = r"embeddings was made from gone\.csv, which is no longer there; bring it back, or"
    with pytest.raises(InputError, match=expected):
        start(evaluate)
    made.unlink()  # never ended
    with pytest.raises(InputError, match=r"provenance\.json is not there; `make embed` makes it"):
        start(evaluate)
