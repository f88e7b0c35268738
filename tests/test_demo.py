"""The demo, as its command, in full on generated images and in short on photographs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .test_chain import photographs

KEYS = [
    "raw_pixel_knn",
    "random_encoder_knn",
    "from_scratch",
    "pretrained_knn",
    "pretrained_linear",
    "finetuned",
    "with_pseudo_labels",
    "with_requested_labels",
    "organisers_score",
    "minutes",
]


def demo(folder: Path, *options: str) -> dict[str, float]:
    """The last line of the demo, run in `folder` on every core."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "stages.demo", *options],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    scores = json.loads(done.stdout.splitlines()[-1])
    assert list(scores) == KEYS
    assert abs(scores["organisers_score"] - scores["with_requested_labels"]) <= 0.1
    return scores


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_generated_images(tmp_path: Path) -> None:
    scores = demo(tmp_path)
    print(scores)
    assert scores["finetuned"] >= scores["from_scratch"] + 10
    assert scores["raw_pixel_knn"] < scores["finetuned"] / 2
    assert scores["pretrained_knn"] > 2 * scores["random_encoder_knn"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_photographs(tmp_path: Path, mini98: Path) -> None:
    images = photographs(mini98, tmp_path / "images")
    demo(tmp_path, "--source", str(images), "--pretrain.steps", "20", "--finetune.steps", "20")
