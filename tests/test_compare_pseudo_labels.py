"""The comparison of predictors: precision by true labels, at equal coverage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import InputError, runs
from stages import compare_pseudo_labels
from tests.fake_run import IN_VAL, LIKE_TRAIN, SKIPPED, TWINS, label, write_finetune

ARGV = ["--data.contest", "small"]


@pytest.fixture
def here(here: Path) -> Path:
    made = {"asked": {"root": str(here / "small")}}
    Path("data/small/made_from.json").write_text(json.dumps(made))
    torch.save(torch.tensor([label("unlabeled", k) for k in range(60)]), "small.oracle.pt")
    for seed in range(4):
        folder = write_finetune(seed, sharp=1.0)
        provenance = runs.read_json(folder / "provenance.json", "")
        runs.write_json(folder / "provenance.json", provenance | {"results": {"val_top1": seed}})
        Path("runs/entry/requests").mkdir(exist_ok=True)
        shutil.move(folder, f"runs/entry/requests/none-s{seed}")
    # none-s2 and none-s3 are of other comparisons, before and after
    cells = [("none", 0, 0), ("Random", 0, 2), ("none", 1, 1), ("Random", 2, 2), ("none", 3, 7)]
    keys = "strategy", "seed", "val_top1"
    record = {"cells": [dict(zip(keys, cell, strict=True)) for cell in cells]}
    Path("docs/requests").mkdir(parents=True)
    Path("docs/requests/entry.json").write_text(json.dumps(record))
    return here


def test_precision_is_that_of_the_surest_images(here: Path) -> None:
    compare_pseudo_labels.run(ARGV)
    records = runs.read_json(Path("docs/requests/entry-pseudo.json"), "")["cells"]
    assert len(records) == 2 * len(compare_pseudo_labels.PREDICTORS)
    logits = np.load("runs/entry/requests/none-s1/logits/unlabeled.npy").astype(np.float64)
    possible = sorted(set(range(60)) - {SKIPPED, IN_VAL, LIKE_TRAIN, max(TWINS)})
    p = np.exp(logits[possible])
    sure = (p / p.sum(1, keepdims=True)).max(1)
    right = p.argmax(1) == [label("unlabeled", k) for k in possible]
    record = next(
        r for r in records if r["predictor"] == "arg-max" and r["classifier"].endswith("-s1")
    )
    for share in (25, 50):
        surest = np.argsort(-sure, kind="stable")[: round(share / 100 * 56)]
        assert record[f"{share} %"] == pytest.approx(100 * right[surest].mean())
    text = Path("docs/labels.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0][:3] == ["predictor", "right of 25 %", "right of 50 %"]
    assert [row[0] for row in rows[2:]] == list(compare_pseudo_labels.PREDICTORS)
    own = [r["50 %"] for r in records if r["predictor"] == "graph"]
    control = [r["50 %"] for r in records if r["predictor"] == "arg-max"]
    more = np.mean(own) - np.mean(control)
    assert rows[3][4].startswith(f"{more:+.2f} ± ")
    assert rows[2][3:] == ["control", "control"]


def test_an_entry_of_another_contest_is_refused(here: Path) -> None:
    file = Path("runs/entry/requests/none-s0/provenance.json")
    runs.write_json(file, runs.read_json(file, "") | {"inputs": {}})
    with pytest.raises(InputError, match="none-s0 is of another contest than small, or of other"):
        compare_pseudo_labels.run(ARGV)
    assert not Path("docs/requests/entry-pseudo.json").exists()


def test_true_labels_are_needed(here: Path) -> None:
    (here / "small.oracle.pt").unlink()
    with pytest.raises(InputError, match=r"small\.oracle\.pt is not there; a rehearsal's true"):
        compare_pseudo_labels.run(ARGV)
