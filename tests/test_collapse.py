"""Signs of collapse are what their papers say, and a collapsed run is stopped."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import InputError, config, pretraining
from pipeline.assignments import assignment_entropy
from pipeline.collapse import (
    CAUSES,
    GAIN,
    GRACE,
    LINES,
    LOWEST,
    STEPS,
    judge,
    judge_views,
    signs_of,
)
from pipeline.runs import read_json
from pipeline.views import View
from stages import pretrain

from .conftest import TINY
from .small_methods import METHODS, VARIANTS, built, feed_of, reader


def test_signs_of_embeddings_all_over_the_sphere() -> None:
    a, b = torch.randn(2, 256, 16)
    found = signs_of(a, b)
    assert found["spread"].item() == pytest.approx(1, abs=0.03)
    assert found["rank"].item() == pytest.approx(16, abs=0.5)
    assert found["alignment"].item() == pytest.approx(2, abs=0.1)
    # the mean of exp(-2 · |x - y|²) for x · y spread as on the sphere of 16 dimensions
    x, y = F.normalize(torch.randn(2, 20_000, 16), dim=2)
    expected = (-2 * (x - y).square().sum(1)).exp().mean().log().item()
    assert found["uniformity"].item() == pytest.approx(expected, abs=0.1)


def test_signs_are_the_papers_formulas() -> None:
    a, b = torch.randn(2, 12, 5, dtype=torch.float64)
    found, x, y = signs_of(a, b), F.normalize(a, dim=1), F.normalize(b, dim=1)
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s / s.sum()
    assert found["rank"].item() == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-5)
    pairs = [(i, j) for i in range(12) for j in range(i)]
    near = [math.exp(-2 * (x[i] - x[j]).square().sum().item()) for i, j in pairs]
    assert found["uniformity"].item() == pytest.approx(math.log(np.mean(near)), rel=1e-4)
    assert found["alignment"].item() == pytest.approx((x - y).square().sum(1).mean().item(), 1e-4)


def test_signs_of_a_point_and_of_a_line() -> None:
    point = torch.ones(64, 8)
    found = signs_of(point, point)
    assert found["spread"].item() == pytest.approx(0, abs=1e-5)
    assert found["alignment"].item() == pytest.approx(0, abs=1e-9)
    assert found["uniformity"].item() == pytest.approx(0, abs=1e-5)
    line = torch.linspace(-1, 1, 64)[:, None] * torch.randn(8) * 1e-2 + torch.ones(8)
    assert signs_of(line, line)["rank"].item() < 1.2


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 1000])
def test_signs_of_any_number_of_images(n: int) -> None:
    a = torch.randn(n, 4)
    assert signs_of(a, a)["alignment"].item() == pytest.approx(0, abs=1e-6)


def test_entropy_of_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.assignments.LOGITS", 12)  # 3 rows at a time
    classes = torch.eye(4)
    rows = {
        "unsure": torch.zeros(5, 4),
        "all in one": 9.0 * classes[[2]].expand(5, 4),
        "each in its own": 9.0 * classes,
        "two of four": 9.0 * classes[[0, 0, 3, 3]],
    }
    found = {name: assignment_entropy(x, classes, 0.1).item() for name, x in rows.items()}
    expected = {"unsure": 1, "all in one": 0, "each in its own": 1, "two of four": 0.5}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_tells_its_signs(variant: str) -> None:
    method = built(variant)
    method(*reader(feed_of(variant, method, 8, 0, 1), 0)(0))
    method.after_update(0.5)
    found = method.signs()
    expected = {"spread", "rank", "alignment", "uniformity"}
    expected |= {"queue_age"} if getattr(method, "queue", None) is not None else set()
    assigns = variant.startswith(("SwAV", "SelfClassifier"))
    expected |= {"assignment_entropy"} if assigns else set()
    assert found.keys() == expected
    assert all(isinstance(v, Tensor) and v.ndim == 0 and v.isfinite() for v in found.values())


@pytest.mark.parametrize("sign", LOWEST)
def test_a_sign_below_its_limit_is_named_with_causes(sign: str) -> None:
    bad = [{"step": STEPS, "loss": 1.0, sign: LOWEST[sign] * 0.99}] * LINES
    wrong = judge(bad, GRACE)
    assert wrong is not None
    assert f"{sign} is " in wrong
    assert CAUSES[sign] in wrong
    assert judge([*bad, {"step": STEPS, "knn": 1.0}], GRACE) is not None
    assert judge([{"step": STEPS, "loss": 1.0, sign: math.nan}] * LINES, GRACE) is not None
    assert judge([*bad, {"step": STEPS, "loss": 1.0, sign: LOWEST[sign]}], GRACE) is None
    assert judge(bad[1:], GRACE) is None  # once is no collapse
    assert judge(bad, GRACE - 0.01) is None  # too early to tell
    early = {"step": STEPS - 1, "loss": 1.0, sign: 0.0}
    assert judge([early] * LINES, 1) is None
    assert judge([early, early, bad[0]], 1) is None  # lines of the first steps do not count


def test_knn_is_held_against_the_untrained_encoders() -> None:
    def history(knn: float) -> list[dict[str, float]]:
        return [{"step": 0, "knn": 10.0}, {"step": 500, "knn": 99.0}, {"step": 900, "knn": knn}]

    assert judge(history(10 * GAIN + 0.1), 0.9) is None
    wrong = judge(history(10 * GAIN - 0.1), 0.9)
    assert wrong is not None
    assert "kNN is 11.90 % after 90% of the run, untrained it was 10.00 %" in wrong
    assert judge(history(10.0), 0.4) is None
    assert judge([{"step": 900, "knn": 1.0}], 0.9) is None  # nothing to hold it against
    good = [{"step": 0, "knn": 85.0}, {"step": 900, "knn": 87.0}]  # 1.2 times is not to be had
    assert judge(good, 0.9) is None
    assert judge([good[0], {"step": 900, "knn": 86.0}], 0.9) is not None
    assert judge(history(10.0), 0.9, queries=1000) is not None
    assert judge(history(10.0), 0.9, queries=20) is None  # its standard error is 6.7


def run(*options: str) -> Path:
    argv = [*TINY, "--pretrain.batch_size=16", "--pretrain.log_steps=10", *options]
    recipe, _, plain = config.parse("", argv=argv)
    pretrain.run(recipe, plain)
    return Path("runs") / str(recipe.entry) / "pretrain"


WITHOUT_SAFEGUARD = ["--pretrain.method=BYOL", "--pretrain.method.predictor=false"]
WITHOUT_SAFEGUARD += ["--pretrain.method.momentum=0", "--pretrain.method.final_momentum=0"]
WITHOUT_SAFEGUARD += ["--pretrain.method.hidden=64", "--pretrain.method.output=32"]
WITHOUT_SAFEGUARD += ["--pretrain.optimizer.lr=0.5", "--pretrain.optimizer.lr_rule=constant"]
WITHOUT_SAFEGUARD += ["--pretrain.resolutions=[32]", "--pretrain.steps=120"]


def test_a_method_without_its_safeguard_is_stopped(tiny_contest: Path) -> None:
    """BYOL without predictor and slow copy: all images get one embedding."""
    options = [*WITHOUT_SAFEGUARD, "--entry=bare", "--pretrain.knn_evals=0"]
    with pytest.raises(InputError, match=r"has collapsed: (spread|rank) is [01]\.") as error:
        run(*options)
    assert "missing safeguard" in str(error.value)
    assert "docs/methods.md" in str(error.value)
    assert Path("runs/bare/pretrain/checkpoint.pt").is_file()  # of its end, where it was judged
    with pytest.raises(InputError, match="has collapsed"):  # so it is when started again
        run(*options)
    assert not Path("runs/bare/pretrain/encoder.safetensors").exists()


def falling(monkeypatch: pytest.MonkeyPatch) -> None:
    """kNN is 40 % with the untrained encoder, then 10 %."""
    values = iter([40.0])
    monkeypatch.setattr(pretraining, "knn_accuracy", lambda *_: next(values, 10.0))


def test_a_run_that_forgets_is_stopped(tiny_contest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its kNN accuracy, which falls below the untrained encoder's."""
    falling(monkeypatch)
    with pytest.raises(InputError, match=r"kNN is 10\.00 % after 100% of the run, untrained"):
        run("--pretrain.steps=100", "--pretrain.knn_evals=2", "--entry=same")


def test_few_labels_are_no_reason_to_stop(
    tiny_contest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each class as many vote as there are; with all of them, all images would get one class."""
    asked = list[int]()

    def accuracy(known: np.ndarray, labels: Any, of: Any, truth: Any, k: int) -> float:
        asked.append(k)
        return 100 * np.bincount(truth).max() / len(truth)  # as a vote of all would have it

    monkeypatch.setattr(pretraining, "knn_accuracy", accuracy)
    options = ["--pretrain.steps=100", "--pretrain.knn_evals=2", "--pretrain.knn_images=24"]
    run(*options, "--entry=few")
    assert set(asked) == {3}  # 12 images of 4 classes


def test_it_is_stopped_on_the_way(tiny_contest: Path) -> None:
    options = [*WITHOUT_SAFEGUARD, "--pretrain.steps=400", "--entry=long", "--pretrain.knn_evals=0"]
    with pytest.raises(
        InputError, match=r"has collapsed: (spread|rank) is .* after [2-9]\d% of the"
    ):
        run(*options)


def test_told_to_warn_it_says_that_knn_is_low(
    tiny_contest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one of kNN, too, which comes in a line of its own after that of the loss."""
    falling(monkeypatch)
    options = ["--pretrain.steps=200", "--pretrain.knn_evals=6", "--pretrain.on_collapse=warn"]
    folder = run(*options, "--entry=warned", "--pretrain.log_steps=5")
    said = capsys.readouterr().out
    assert said.count("warning: the encoder has collapsed: kNN is 10.00 % after") == 4  # of 3 to 6
    assert (folder / "encoder.safetensors").is_file()


def test_with_its_safeguard_it_goes_on(tiny_contest: Path) -> None:
    """The same run with predictor and slow copy."""
    options = [o for o in WITHOUT_SAFEGUARD if "momentum" not in o and "predictor" not in o]
    folder = run(*options, "--entry=whole", "--pretrain.knn_evals=0")
    history = read_json(folder / "history.json", "")
    assert history[-1]["spread"] > LOWEST["spread"]


def test_no_random_resized_crop_is_caught(
    tiny_contest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the week is lost; told to warn, it goes on."""
    for view in ("{crop_p: 0}", "{crop_scale: [0.9, 1.0]}", "{crop_p: 0.2}"):
        with pytest.raises(InputError, match="no random resized crop is among the views"):
            run(f"--pretrain.views=[{view}]", "--pretrain.steps=2", "--entry=same")
    folder = run(
        "--pretrain.views=[{crop_p: 0}]",
        "--pretrain.steps=2",
        "--entry=same",
        "--pretrain.on_collapse=warn",
    )
    assert "warning: no random resized crop" in capsys.readouterr().out
    assert (folder / "encoder.safetensors").is_file()


def test_one_cropped_view_is_enough() -> None:
    assert judge_views([View()]) is None
    assert judge_views([View(1, crop_p=0), View(1, crop_scale=(0.2, 1))]) is None
    assert judge_views([View(2, crop_scale=(0.71, 1))]) is not None


@pytest.mark.parametrize("method", METHODS)
def test_a_run_logs_every_sign(tiny_contest: Path, method: str) -> None:
    options = [f"--pretrain.method={method}", "--pretrain.steps=10", f"--entry={method}"]
    options += ["--pretrain.optimizer.lr=0.001"]
    if method == "MoCo":
        options += ["--pretrain.method.bn_group=4"]
    options += ["--pretrain.method.hidden=32", "--pretrain.method.output=32"]
    folder = run(*options)
    logged = [h for h in read_json(folder / "history.json", "") if "loss" in h]
    assert {"spread", "rank", "alignment", "uniformity"} <= logged[-1].keys()
    assert read_json(folder / "history.json", "")[0].keys() == {"step", "knn"}
