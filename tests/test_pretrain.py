"""The pretraining stage: resumed runs are bit-identical, signals and NaN stop it with nothing
lost.
"""

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import InputError, config, pretraining
from pipeline.checkpoint import load_torch
from pipeline.plan import Plan, plan_steps
from pipeline.runs import read_json, write_json
from stages import embed, pretrain

from .conftest import TINY

STEPS = 40
OPTIONS = [
    f"--pretrain.steps={STEPS}",
    "--pretrain.batch_size=12",
    "--pretrain.resolutions=[24,32]",
    "--pretrain.checkpoint_minutes=0",
    "--pretrain.knn_evals=2",
    "--pretrain.log_steps=3",
]


def run(*options: str, force: bool = False) -> Path:
    recipe, _, plain = config.parse("", argv=[*TINY, *options])
    pretrain.run(recipe, plain, force)
    return Path("runs") / str(recipe.entry) / "pretrain"


def weights(entry: str) -> dict[str, torch.Tensor]:
    return load_torch(Path(f"runs/{entry}/pretrain/checkpoint.pt"))["module"]  # type: ignore[no-any-return]


def wait_for_step(process, step: int, entry: str) -> None:  # type: ignore[no-untyped-def]
    file = Path(f"runs/{entry}/pretrain/checkpoint.pt")
    while process.poll() is None:
        if file.is_file() and load_torch(file)["step"] >= step:
            return
        time.sleep(0.01)


@pytest.mark.dist
def test_a_run_killed_at_three_random_steps_ends_bit_identical(
    tiny_contest: Path, run_stage
) -> None:  # type: ignore[no-untyped-def]
    run_stage("stages.pretrain", "--entry=whole", *OPTIONS)
    rng = random.Random(time.time_ns())
    steps = sorted(rng.sample(range(1, STEPS - 4), 3))
    print("killed after steps", steps)
    for step in steps:
        process = run_stage("stages.pretrain", "--entry=killed", *OPTIONS, wait=False)
        wait_for_step(process, step, "killed")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not Path("runs/killed/pretrain/encoder.safetensors").exists()
    out = run_stage("stages.pretrain", "--entry=killed", *OPTIONS)
    assert "going on from step" in out
    whole, killed = weights("whole"), weights("killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    histories = [
        read_json(Path(f"runs/{e}/pretrain/history.json"), "") for e in ("whole", "killed")
    ]
    for a, b in zip(*histories, strict=True):
        a.pop("images_per_second", None), b.pop("images_per_second", None)
        assert a == b
    assert "is up to date" in run_stage("stages.pretrain", "--entry=killed", *OPTIONS)


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(
    number: int, tiny_contest: Path, run_stage
) -> None:  # type: ignore[no-untyped-def]
    options = [*OPTIONS, "--pretrain.steps=100000", "--pretrain.checkpoint_minutes=60"]
    process = run_stage("stages.pretrain", "--entry=stopped", *options, wait=False)
    plan = Path("runs/stopped/pretrain/plan.json")
    while not plan.is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "the same command goes on from there" in out
    assert "Traceback" not in err
    step = load_torch(Path("runs/stopped/pretrain/checkpoint.pt"))["step"]
    assert f"stopped after step {step:,}" in out
    assert step > 0


def test_a_nan_loss_stops_within_a_logging_interval(tiny_contest: Path) -> None:
    options = [*OPTIONS, "--entry=bad", "--pretrain.optimizer.lr=1e30", "--pretrain.log_steps=5"]
    with pytest.raises(InputError) as error:
        run(*options, "--pretrain.checkpoint_minutes=60")
    message = str(error.value)
    assert "at step" in message
    assert "there is no checkpoint yet" in message
    assert int(message.split("at step ")[1].split(";")[0]) <= 10
    assert not Path("runs/bad/pretrain/checkpoint.pt").exists()
    with pytest.raises(InputError) as error:  # every step is saved: the good ones stay
        run(*options)
    if Path("runs/bad/pretrain/checkpoint.pt").exists():
        assert "the last good checkpoint is step" in str(error.value)
        state = weights("bad")
        assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())


def test_another_recipe_starts_anew(tiny_contest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(*OPTIONS, "--entry=x", "--pretrain.steps=3")
    before = (folder / "encoder.safetensors").read_bytes()
    run(*OPTIONS, "--entry=x", "--pretrain.steps=3")
    assert "is up to date" in capsys.readouterr().out
    run(*OPTIONS, "--entry=x", "--pretrain.steps=4")
    assert "up to date" not in capsys.readouterr().out
    assert (folder / "encoder.safetensors").read_bytes() != before
    assert read_json(folder / "plan.json", "")["steps"] == [2, 2]


def test_a_budget_in_minutes_is_a_number_of_steps_before_step_0(tiny_contest: Path) -> None:
    folder = run(*OPTIONS, "--pretrain.steps=null", "--entry=m", "--pretrain.minutes=0.02")
    plan = read_json(folder / "plan.json", "")
    assert plan["resolutions"] == [24, 32]
    assert min(plan["steps"]) >= 1
    history = read_json(folder / "history.json", "")
    assert history[-1]["step"] == sum(plan["steps"])
    assert sum("knn" in h for h in history) == 3  # the untrained encoder's and two evaluations


def test_plans_share_the_budget() -> None:
    recipe, _, _ = config.parse("", argv=["--pretrain.epochs=3", "--pretrain.batch_size=10"])
    plan = plan_steps(recipe.pretrain, 101, [48, 64, 96], lambda r: 0.0)
    assert plan == Plan([48, 64, 96], [10, 10, 10])
    recipe, _, _ = config.parse("", argv=["--pretrain.minutes=3"])
    plan = plan_steps(recipe.pretrain, 101, [48, 96], lambda r: r / 48)
    assert plan == Plan([48, 96], [90, 45], [1.0, 2.0])
    assert [plan.resolution(s) for s in (0, 89, 90, 134)] == [48, 48, 96, 96]
    assert [plan.share(s) for s in (0, 90, 135)] == [0, 1 / 2, 1]
    assert [Plan([48, 96], [90, 45]).share(s) for s in (0, 90, 135)] == [0, 1 / 3, 1]  # pixels


def test_too_few_images_for_a_batch_are_one_clear_line(tiny_contest: Path) -> None:
    with pytest.raises(
        InputError, match=r"pretrain: 144 images in unlabeled, train and a batch_size"
    ):
        run(*OPTIONS, "--pretrain.batch_size=145")


def test_a_refused_command_leaves_what_is_finished(tiny_contest: Path) -> None:
    options = [*OPTIONS, "--entry=kept", "--pretrain.steps=3"]
    folder = run(*options)
    before = sorted(p.name for p in folder.iterdir())
    for refused in ("--pretrain.batch_size=100000", "--pretrain.splits=[nope]"):
        with pytest.raises(InputError):
            run(*options, refused, force=True)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_embeddings_are_of_unit_length_and_whole(tiny_contest: Path) -> None:
    import numpy as np

    run(*OPTIONS, "--entry=e", "--pretrain.steps=3")
    recipe, _, plain = config.parse("", argv=[*TINY, "--entry=e", "--evaluate.batch_size=7"])
    embed.run(recipe, plain)
    for split, images in {"unlabeled": 64, "train": 80, "val": 40, "test": 12}.items():
        x = np.load(f"runs/e/embeddings/{split}.npy")
        assert x.shape == (images, 512)
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-4)
    recipe, _, plain = config.parse("", argv=[*TINY, "--entry=e", "--evaluate.batch_size=64"])
    before = np.load("runs/e/embeddings/val.npy")
    embed.run(recipe, plain)
    np.testing.assert_allclose(np.load("runs/e/embeddings/val.npy"), before, atol=0.02)


def test_a_queue_longer_than_the_images_is_warned_of(
    tiny_contest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS, "--pretrain.method=MoCo", "--pretrain.method.bn_group=0"]
    run(*options, "--pretrain.method.queue=100", "--pretrain.steps=1", "--entry=m")
    assert "its own negative" not in capsys.readouterr().out
    run(*options, "--pretrain.method.queue=5000", "--pretrain.steps=1", "--entry=m")
    assert "queue holds keys of 5,000 images, and there are" in capsys.readouterr().out


def test_a_resolution_that_leaves_nothing_is_refused(tiny_contest: Path) -> None:
    with pytest.raises(InputError, match="images of 16 pixels are too small for this encoder"):
        run(*OPTIONS, "--pretrain.resolutions=[16]")
    with pytest.raises(InputError, match="the encoder cannot take images of 32 pixels"):
        run(*OPTIONS, "--pretrain.resolutions=[32]", "--encoder.name=vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder.name=resnet19"], "encoder: encoder 'resnet19' is not a timm model; near it"),
        (["--encoder.options={depth: 3}"], "encoder: .*'depth'"),
        (["--encoder.options={act_layer: rellu}"], r"cannot build .*KeyError: 'rellu'"),
        (["--encoder.options={global_pool: ''}"], r"the encoder gives \[1, 512, \d, \d\] for an"),
        (["--encoder.options={features_only: true}"], "encoder.options has features_only; an enc"),
        (["--entry=a/b"], "entry is 'a/b'; a name without / is expected"),
        (["--finetune.view.count=2"], "finetune: view has count 2 and size 1; 1 and 1 are expec"),
        (["--finetune.strong_view.size=0.5"], "finetune: strong_view has count 1 and size 0.5; 1"),
        (["--pretrain.views=[{count: 1}]"], "pretrain: 2 views or more are expected"),
        (["--pretrain.log_steps=0"], "pretrain: log_steps is 0; 1 or more is expected"),
        (["--pretrain.resolutions=[4]"], r"pretrain: resolutions are \[4\]; 8 pixels or more"),
        (["--finetune.resolutions=[]"], r"finetune: resolutions are \[\]; 8 pixels or more"),
        (
            ["--pretrain.steps=null", "--pretrain.epochs=1", "--pretrain.minutes=1"],
            "pretrain: one of epochs, steps and minutes is expected as a budget",
        ),
        (["--pretrain.steps=-1"], "pretrain: steps is -1; above 0 is expected"),
        (["--pretrain.epochs=x"], "pretrain.epochs is x; a number or null is expected"),
        (["--pretrain.resolutions=48,64"], "pretrain.resolutions is 48,64; a list in brackets"),
        (["--encoder.stem=x"], "encoder.stem is x; one of 'imagenet', 'low_stride', 'cifar' is"),
        (["--recipe=nope.yaml"], r"--recipe .*nope.yaml is not there; a file is expected"),
        (["--pretrain.bach=4"], "there is no --pretrain.bach; --help lists what there is"),
        (["--pretrain.method=Moco"], "pretrain.method is Moco; BYOL or BarlowTwins or MoCo or"),
        (
            ["--pretrain.method.queue=4"],
            "pretrain.method: SimCLR has no queue; --pretrain.method.h",
        ),
        (
            ["--pretrain.method=MoCo", "--pretrain.method.queue=x"],
            "pretrain.method.queue is x; a whole number is expected",
        ),
        (["--pretrain.views=[x]"], "pretrain.views"),
        (
            ["--pretrain.method=MoCo", "--pretrain.method.final_momentum=x"],
            "pretrain.method.final_momentum is x; a number or null is expected",
        ),
        (["--pretrain.views=[{count: x}]"], "pretrain.views.count is x; a whole number is expec"),
        (["--finetune.consistency=Mix"], "finetune.consistency is Mix; FixMatch or FreeMatch is"),
        (["--pretrain.optimizer.momentum=1"], "optimizer: momentum is 1.0; from 0 to below 1 is"),
        (["--pretrain.optimizer.betas=[0.9,1]"], "optimizer: betas is 1.0; from 0 to below"),
        (["--pretrain.optimizer.lr_batch=0"], "optimizer: lr_batch is 0; above 0 is expected"),
        (["--pretrain.optimizer.weight_decay=-1"], "optimizer: weight_decay is -1.0; 0 or more"),
        (
            ["--pretrain.optimizer.nesterov=true", "--pretrain.optimizer.momentum=0"],
            "optimizer: nesterov is true and momentum 0; above 0 is expected",
        ),
        (["--evaluate.k=[]"], r"evaluate: k is \[\]; one or more numbers above 0 are expected"),
        (["--evaluate.linear_c=-1"], "evaluate: linear_c is -1.0; above 0 is expected"),
        (["--data.workers=-1"], "data: workers is -1; 1 or more is expected"),
        (["--seed=-1"], "seed is -1; 0 to 4294967295 is expected"),
        (["--pretrain.method=MoCo", "--pretrain.method.hidden=-1"], "hidden is -1; 0 or more is"),
        (["--pretrain.micro_batch=7"], "pretrain: batch_size is .* and micro_batch 7; a multiple"),
        (["--pretrain.method.temperature=0"], "SimCLR: temperature is 0.0; above 0 is expected"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_one_clear_line(
    tiny_contest: Path, options: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(*OPTIONS, *options)


def test_val_is_not_trained_on_in_a_rehearsal(tiny_contest: Path) -> None:
    file = Path("data_manifests/tiny/contest.json")
    file.write_text(file.read_text().replace('"rehearsal": false', '"rehearsal": true'))
    with pytest.raises(InputError, match="val is among the splits"):
        run(*OPTIONS, "--pretrain.splits=[unlabeled,val]")


def test_another_recipe_keeps_the_old_checkpoint(
    tiny_contest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*OPTIONS, "--entry=k", "--pretrain.steps=3")
    (folder / "provenance.json").unlink()  # as if interrupted
    old = (folder / "checkpoint.pt").read_bytes()
    run(*OPTIONS, "--entry=k", "--pretrain.steps=4")
    assert "as this changed: pretrain.steps 3 → 4; the old check" in capsys.readouterr().out
    assert (folder / "checkpoint-1.pt").read_bytes() == old
    newer = (folder / "checkpoint.pt").read_bytes()
    run(*OPTIONS, "--entry=k", "--pretrain.steps=5")
    assert (folder / "checkpoint-2.pt").read_bytes() == newer
    (folder / "checkpoint-1.pt").unlink()
    run(*OPTIONS, "--entry=k", "--pretrain.steps=4")
    assert (folder / "checkpoint-2.pt").read_bytes() == newer
    assert (folder / "checkpoint-3.pt").is_file()
    capsys.readouterr()
    run(*OPTIONS, "--entry=k", "--pretrain.steps=4", force=True)
    assert "going on from" not in capsys.readouterr().out
    run(*OPTIONS, "--entry=k", "--pretrain.steps=4", "--pretrain.checkpoint_minutes=9")
    assert "is up to date" in capsys.readouterr().out

    # a field that is null and that an earlier commit did not have changes nothing
    for file in (folder / "plan.json", made := folder / "provenance.json"):
        written = read_json(file, "")
        assert written.get("facts", written)["recipe"]["pretrain"].pop("micro_batch") is None
        write_json(file, written)
    run(*OPTIONS, "--entry=k", "--pretrain.steps=4")
    assert "is up to date" in capsys.readouterr().out
    made.unlink()
    run(*OPTIONS, "--entry=k", "--pretrain.steps=4")
    assert "going on from step 4" in capsys.readouterr().out


def test_knn_on_the_way_is_by_cosine(tiny_contest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(pretraining, "knn_accuracy", lambda *x: seen.append(x) or 50.0)
    options = ["--pretrain.steps=2", "--pretrain.batch_size=12", "--pretrain.knn_evals=1"]
    recipe, _, plain = config.parse("", argv=[*TINY, *options])
    pretrain.run(recipe, plain)
    for known, _, queries, _, k in seen:
        lengths = np.linalg.norm(np.concatenate([known, queries]), axis=1)
        np.testing.assert_allclose(lengths, 1, rtol=1e-5)
        assert (len(known), len(queries), k) == (16, 16, 4)  # of 4 classes
    assert len(seen) == 2
