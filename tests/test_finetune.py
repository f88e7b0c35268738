"""The fine-tuning stage: rounds, what is trained, what is chosen by, what is kept."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import InputError, config, finetuning, inference, runs
from pipeline.checkpoint import load_tensors, load_torch
from pipeline.classifiers import (
    Classifier,
    Supervised,
    build_head,
    freeze,
    load_classifier,
    renew_statistics,
)
from pipeline.encoders import build_encoder
from pipeline.manifest import DOUBTFUL, Manifest, load_contest, read_manifest, write_manifest
from pipeline.runs import read_json
from pipeline.trainer import Trainer
from pipeline.views import WHOLE, Views, uniforms
from stages import embed, finetune, import_labels, label_request, pretrain, pseudo_label

from .conftest import TINY, unit

OPTIONS = [
    "--finetune.steps=20",
    "--finetune.batch_size=24",
    "--finetune.optimizer.lr=0.05",
    "--finetune.evals=2",
]


def run(*options: str, entry: str = "f", force: bool = False) -> Path:
    recipe, _, plain = config.parse("", argv=[*TINY, *OPTIONS, f"--entry={entry}", *options])
    return finetune.run(recipe, plain, force)


@pytest.fixture
def pretrained(tiny_contest: Path) -> Path:
    options = ["--entry=f", "--pretrain.steps=4", "--pretrain.batch_size=12"]
    recipe, _, plain = config.parse("", argv=[*TINY, *options])
    pretrain.run(recipe, plain)
    return tiny_contest


def results(folder: Path) -> dict[str, Any]:
    return read_json(folder / "provenance.json", "")["results"]  # type: ignore[no-any-return]


def test_a_round_learns_and_keeps_what_follows(pretrained: Path) -> None:
    folder = run(
        "--finetune.steps=120", "--finetune.backbone_lr=1.0", "--finetune.view.crop_scale=[0.6,1.0]"
    )
    assert folder.name == "finetune-0"
    contest, scores = load_contest("tiny"), results(folder)
    assert scores["val_top1"] > 35  # chance is 25
    for split in contest.splits:
        assert np.load(folder / "logits" / f"{split}.npy").shape == (contest.images(split), 4)
    known = np.load(folder / "logits" / "train.npy").argmax(1) == contest.labels("train")
    assert known.mean() > 0.6  # three quarters of them were trained on
    logits = np.load(folder / "logits" / "val.npy")
    assert scores["val_top1"] == pytest.approx(
        100 * (logits.argmax(1) == contest.labels("val")).mean()
    )
    classifier, meta = load_classifier(folder / "classifier.safetensors")
    x = torch.from_numpy(contest.packed("val")[:3].copy()).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(contest.mean)[:, None, None]) / torch.tensor(contest.std)[:, None, None]
    with torch.no_grad():
        np.testing.assert_allclose(classifier(x).numpy(), logits[:3], rtol=1e-3, atol=1e-3)
    assert meta["transfer"] is False
    assert meta["resolution"] == 32
    train, held = (read_manifest(folder / f"{n}.csv") for n in ("trained_on", "holdout"))
    assert len(train) + len(held) == 80
    assert len(held) == 20
    assert not set(train.index) & set(held.index)
    text = (folder / "report.txt").read_text()
    assert "precision" in text
    assert (folder / "confusion.png").stat().st_size > 1000


def test_images_may_be_classified_larger_than_trained_with(pretrained: Path) -> None:
    folder = run(
        "--finetune.steps=4", "--finetune.resolutions=[32,40]", "--finetune.eval_resolution=48"
    )
    assert read_json(folder / "plan.json", "")["resolutions"] == [32, 40]
    classifier, meta = load_classifier(folder / "classifier.safetensors")
    assert meta["resolution"] == 48
    contest = load_contest("tiny")
    pixels = torch.from_numpy(contest.packed("val")[:3].copy())
    whole = Views([WHOLE], contest.mean, contest.std, torch.float32)
    with torch.no_grad():
        logits = classifier(
            whole(pixels, whole.draw(uniforms(0, 0, 3, 1), *pixels.shape[1:3]), 48)[0]
        )
    kept = np.load(folder / "logits" / "val.npy")[:3]
    np.testing.assert_allclose(logits.numpy(), kept, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_batch_norm_is_of_whole_images_in_the_end(pretrained: Path, ema: str) -> None:
    """The first norm's mean and variance are those of what it is given of the images trained on,
    at the size that is classified; nothing that is learned moves.
    """
    options = [f"--finetune.ema={ema}", "--finetune.steps=4", "--finetune.resolutions=[32]"]
    options += ["--finetune.mixup=0.4", "--finetune.eval_resolution=64"]
    before = load_classifier(run(*options) / "classifier.safetensors")[0]
    folder = run(*options, "--finetune.precise_bn=1000")
    after, metadata = load_classifier(folder / "classifier.safetensors")
    assert metadata["resolution"] == 64
    learned = dict(before.named_parameters())
    assert all(torch.equal(p, learned[name]) for name, p in after.named_parameters())

    contest, images = load_contest("tiny"), read_manifest(folder / "trained_on.csv")
    seen = nn.Sequential(after.encoder.conv1, nn.Flatten(2))
    out = np.empty((len(images), 64, 32 * 32), np.float32)
    rest = contest.mean, contest.std, out
    inference.predict(seen, contest.pool(images), 64, *rest, exact=True)
    norm, old = after.encoder.bn1, before.encoder.bn1
    np.testing.assert_allclose(norm.running_mean, out.mean((0, 2)), rtol=0.02, atol=0.005)
    np.testing.assert_allclose(norm.running_var, out.var((0, 2)), rtol=0.02)
    assert not np.allclose(old.running_var, out.var((0, 2)), rtol=0.05)


def test_batch_norm_is_of_all_batches_alike(pretrained: Path) -> None:
    """1,030 images are three batches; the largest 512 and a small rest would be far off."""
    classifier = Classifier(build_encoder("resnet10t", "imagenet"), build_head("linear", 512, 4))
    contest = load_contest("tiny")
    train = contest.manifest("train").usable()
    rows = np.r_[np.zeros(1024, np.int64), np.full(6, 1)]  # the last are of another image
    pool = contest.pool(train.take(rows))
    norm = classifier.encoder.conv1[1]
    momentum = norm.momentum
    renew_statistics(classifier, classifier, pool, 32, contest)
    out = np.empty((len(pool), norm.num_features, 16 * 16), np.float32)
    seen = nn.Sequential(classifier.encoder.conv1[0], nn.Flatten(2))
    inference.predict(seen, pool, 32, contest.mean, contest.std, out, exact=True)
    np.testing.assert_allclose(norm.running_mean, out.mean((0, 2)), rtol=0.02, atol=0.003)
    assert not classifier.training
    assert norm.momentum == momentum


def test_precise_batch_norm_leaves_what_is_frozen(pretrained: Path) -> None:
    options = ["--finetune.train=last", "--finetune.blocks=1", "--finetune.steps=4"]
    before = load_tensors(run(*options) / "classifier.safetensors")[0]
    after = load_tensors(run(*options, "--finetune.precise_bn=40") / "classifier.safetensors")[0]
    moved = {name for name, v in after.items() if not torch.equal(v, before[name])}
    norms = {n for n in after if n.startswith("encoder.layer4") and "running" in n}
    assert norms <= moved
    assert all(n in norms or "num_batches" in n for n in moved)
    assert all(n.startswith("encoder.layer4") for n in moved)


def test_rounds_follow_the_label_files(pretrained: Path) -> None:
    assert run().name == "finetune-0"
    contest = load_contest("tiny")
    write_manifest(contest.folder / "requested-1.csv", Manifest.of("unlabeled", [3, 5], [0, 1]))
    folder = run()
    assert folder.name == "finetune-1"
    assert results(folder)["labels"] == 60 + 2
    pseudo = Manifest.of("unlabeled", [3, 9, 10], [2, 2, 2], confidence=0.9)
    write_manifest(Path("runs/f/pseudo-1.csv"), pseudo, ("split", "index", "label", "confidence"))
    with pytest.raises(InputError, match=r"pseudo-1.json is not there; `make pseudo-label` makes"):
        run()
    Path("runs/f/pseudo-1.json").write_text("{}")
    folder = run()
    assert folder.name == "finetune-2"
    train = read_manifest(folder / "trained_on.csv")
    known = {(s, i): k for s, i, k in zip(train.split, train.index, train.label, strict=True)}
    assert len(train) == 60 + 2 + 2
    assert known["unlabeled", 3] == 0  # an answer counts more than a pseudo-label
    only = run("--finetune.manifests=[train]", "--finetune.per_class=5", "--finetune.holdout=0")
    assert results(only)["labels"] == 20
    tenth = run("--finetune.manifests=[train]", "--finetune.fraction=0.1", "--finetune.holdout=0")
    assert results(tenth)["labels"] == 8


@pytest.mark.parametrize(("train", "moved"), [("head", 0), ("last", 1), ("all", 3)])
def test_what_is_frozen_does_not_move(pretrained: Path, train: str, moved: int) -> None:
    before = load_tensors(Path("runs/f/pretrain/encoder.safetensors"))[0]
    folder = run(f"--finetune.train={train}", "--finetune.steps=3", "--finetune.head=mlp")
    after = load_tensors(folder / "classifier.safetensors")[0]
    changed = {
        k.split(".")[0] for k, v in before.items() if not torch.equal(v, after[f"encoder.{k}"])
    }
    expected: set[str] = {"layer4"} if train == "last" else set()
    if train != "all":
        assert changed == expected  # running statistics included
    else:
        assert {"conv1", "layer1", "layer4"} <= changed


def test_the_backbone_has_its_own_rate_and_ema_lags() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet10t")
    module = Supervised(Classifier(encoder, build_head("linear", 512, 3)), 3, ema=0.9)
    start = module.averaged.head.weight.clone()  # type: ignore[union-attr, operator]
    with torch.no_grad():
        module.classifier.head.weight.add_(1.0)  # type: ignore[operator]
    module.after_update(0.0)
    got = module.final().head.weight
    torch.testing.assert_close(got, start + 0.1)  # type: ignore[arg-type]
    bare = Supervised(Classifier(nn.Flatten(), nn.Linear(12, 3)), 3, ema=0.9)
    bare.after_update(0.0)  # no batch norm, so nothing but floats
    freeze(encoder, "last", 2)
    free = {n.split(".")[0] for n, p in encoder.named_parameters() if p.requires_grad}
    assert free == {"layer3", "layer4"}


def test_plateau_lowers_the_rate_and_looks_at_the_holdout(pretrained: Path) -> None:
    options = ["--finetune.schedule=plateau", "--finetune.patience=0", "--finetune.evals=10"]
    folder = run(*options, "--finetune.optimizer.lr=1e-4", "--finetune.probe_first=false")
    history = read_json(folder / "history.json", "")
    rates = [h["lr"] for h in history if "lr" in h]
    assert rates[-1] < rates[0]
    assert sum("heldout_loss" in h for h in history) == 10
    for few in ("--finetune.holdout=0", "--finetune.per_class=1"):
        with pytest.raises(InputError, match="'plateau' has no held-out labels to look at"):
            run("--finetune.schedule=plateau", few)


def test_val_may_not_be_chosen_by_in_a_rehearsal(pretrained: Path) -> None:
    file = Path("data_manifests/tiny/contest.json")
    file.write_text(file.read_text().replace('"rehearsal": false', '"rehearsal": true'))
    with pytest.raises(InputError, match="in a rehearsal val stands for the secret test"):
        run("--finetune.monitor=val")
    with pytest.raises(InputError, match="labels of val are among the manifests"):
        run("--finetune.manifests=[train,data_manifests/tiny/val.csv]", "--finetune.init=scratch")
    file.write_text(file.read_text().replace('"rehearsal": true', '"rehearsal": false'))
    with pytest.raises(InputError, match="in a rehearsal val stands"):  # the recipe says so, too
        run("--finetune.monitor=val", "--data.rehearsal=true")


def test_who_gave_pseudo_labels_learned_no_held_out_label(tiny_contest: Path) -> None:
    options = ["--finetune.init=scratch", "--finetune.steps=2"]
    first = run(*options, "--finetune.holdout=0.2", entry="g")
    recipe, _, plain = config.parse("", argv=[*TINY, "--entry=g", "--pseudo_label.rounds=1"])
    pseudo_label.run(recipe, plain)
    second = run(*options, "--finetune.holdout=0.5", entry="g")
    assert second.name == "finetune-1"
    held = [read_manifest(folder / "holdout.csv").index.tolist() for folder in (first, second)]
    assert held[0] == held[1]
    assert len(held[0]) == 16


def test_held_out_labels_are_judged_by_the_logits_of_their_split(pretrained: Path) -> None:
    images = np.arange(40, 64)  # most of them beyond the training images of a class
    file = Path("data_manifests/tiny/requested-1.csv")
    write_manifest(file, Manifest.of("unlabeled", images, images % 4))
    folder = run("--finetune.manifests=[requested]")
    held = read_manifest(folder / "holdout.csv")
    assert set(held.split) == {"unlabeled"}
    logits = np.load(folder / "logits" / "unlabeled.npy")[held.index]
    found = 100 * (logits.argmax(1) == held.label).mean()
    assert results(folder)["holdout_top1"] == pytest.approx(found)


def test_a_deleted_result_is_made_again(
    pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run()
    run()
    assert "is up to date" in capsys.readouterr().out
    (folder / "classifier.safetensors").unlink()
    assert (run() / "classifier.safetensors").is_file()


def test_an_unfinished_pretraining_is_not_started_from(pretrained: Path) -> None:
    Path("runs/f/pretrain/provenance.json").unlink()
    with pytest.raises(InputError, match="`make pretrain` makes it"):
        run()


@pytest.mark.parametrize("stage", [embed, finetune])
def test_a_pretraining_on_other_images_is_not_started_from(pretrained: Path, stage: Any) -> None:
    """Nor one of another contest: what it saw, or learned the labels of, may be val by now."""
    recipe, _, plain = config.parse("", argv=[*TINY, *OPTIONS, "--entry=f"])
    facts = Path("data_manifests/tiny/contest.json")
    shutil.copytree(facts.parent, "data_manifests/other")
    facts.write_text(facts.read_text() + "\n")
    with pytest.raises(InputError, match=r"pretrain was made from another .*`make pretrain` makes"):
        stage.run(recipe, plain)
    facts.write_text(facts.read_text()[:-1])
    recipe, _, plain = config.parse("", argv=[*TINY, *OPTIONS, "--entry=f", "--data.contest=other"])
    shutil.copytree("data/tiny", "data/other")
    with pytest.raises(InputError, match=r"^runs/f/pretrain is of another contest than other, or"):
        stage.run(recipe, plain)


def test_no_array_of_an_earlier_run_is_left(pretrained: Path) -> None:
    """They are not those of the newest weights, where this run does not write them."""
    recipe, _, plain = config.parse("", argv=[*TINY, *OPTIONS, "--entry=f"])
    embed.run(recipe, plain)
    folder = run("--finetune.steps=2")
    files = [Path("runs/f/embeddings/unlabeled.npy"), folder / "logits" / "unlabeled.npy"]
    assert all(file.is_file() for file in files)
    words = ["--evaluate.unlabeled=false", "--evaluate.resolution=24", "--entry=f"]
    recipe, _, plain = config.parse("", argv=[*TINY, *OPTIONS, *words])
    embed.run(recipe, plain)
    run("--finetune.steps=3", "--finetune.unlabeled=false")
    assert not any(file.is_file() for file in files)
    assert all(file.with_name("train.npy").is_file() for file in files)


def test_an_interrupted_prediction_leaves_nothing(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert Path("runs/f/finetune-0/logits").is_dir()
    assert not list(Path("runs/f/finetune-0/logits").iterdir())


def test_files_that_people_put_aside_are_no_rounds(pretrained: Path) -> None:
    run()
    Path("runs/f/finetune-0").rename("runs/f/finetune-0-old")
    for name in ("requested-old", "requested-old-1", "requested-1.csv"):
        write_manifest(Path(f"data_manifests/tiny/{name}.csv"), Manifest.of("train", [0], 0))
    assert run().name == "finetune-0"


def test_from_scratch_needs_no_encoder_and_pretrained_does(tiny_contest: Path) -> None:
    with pytest.raises(InputError) as error:
        run(entry="s")
    expected = "runs/s/pretrain/provenance.json is not there; `make pretrain` makes it"
    assert str(error.value) == expected
    assert run("--finetune.init=scratch", "--finetune.steps=2", entry="s").is_dir()


def test_an_encoder_other_than_the_pretrained_one_is_refused(pretrained: Path) -> None:
    with pytest.raises(InputError, match=r"holds another encoder .*: encoder\.stem imagenet → cif"):
        run("--encoder.stem=cifar")


def test_pseudo_labels_of_another_encoder_are_refused(pretrained: Path) -> None:
    """They are the labels of a fine-tuning from weights that are no longer there."""
    folder = run("--finetune.steps=2")
    pseudo = folder.parent / "pseudo-1.csv"
    pseudo.write_text("split,index,label,confidence,source\nunlabeled,1,0,0.9,x\n")
    contest = Path("data_manifests/tiny/contest.json")
    record = {"classifier": str(folder), "inputs": {str(contest): runs.sha256(contest)}}
    runs.write_json(pseudo.with_suffix(".json"), record)
    run("--finetune.steps=2")
    made = runs.read_json(folder / "provenance.json", "")
    weights = next(name for name in made["inputs"] if name.endswith("encoder.safetensors"))
    made["inputs"][weights] = "0" * 64
    runs.write_json(folder / "provenance.json", made)
    with pytest.raises(InputError, match=r"pseudo-1.csv was labeled by .*, which began at another"):
        run("--finetune.steps=3")


def test_pseudo_labels_of_other_images_are_refused(tiny_contest: Path) -> None:
    """Where images came or went since, a number is another image."""
    folder = run("--finetune.init=scratch", "--finetune.steps=2", entry="s")
    pseudo = folder.parent / "pseudo-1.csv"
    pseudo.write_text("split,index,label,confidence,source\nunlabeled,1,0,0.9,x\n")
    record = {"classifier": str(folder), "inputs": {"data_manifests/tiny/contest.json": "0" * 64}}
    runs.write_json(pseudo.with_suffix(".json"), record)
    expected = "pseudo-1.csv is of another contest than tiny, or of other images; to begin anew"
    with pytest.raises(InputError, match=expected):
        run("--finetune.init=scratch", "--finetune.steps=2", entry="s")


def test_outside_weights_are_marked_as_transfer(tiny_contest: Path) -> None:
    torch.save(build_encoder("resnet10t").state_dict(), "outside.pth")
    options = ["--finetune.init=outside", "--finetune.weights=outside.pth", "--finetune.steps=2"]
    folder = run(*options, entry="o")
    assert load_tensors(folder / "classifier.safetensors")[1]["transfer"] is True
    written = (folder / "provenance.json").stat().st_mtime_ns
    run(*options, entry="o")
    assert (folder / "provenance.json").stat().st_mtime_ns == written
    torch.save(build_encoder("resnet10t").state_dict(), "outside.pth")
    run(*options, entry="o")  # other weights are another result
    assert (folder / "provenance.json").stat().st_mtime_ns != written


@pytest.mark.parametrize(
    "used", ["init=outside", "monitor=val", "manifests=[train,data_manifests/tiny/val.csv]"]
)
def test_who_learns_from_guesses_has_the_marks_of_who_guessed(
    tiny_contest: Path, used: str
) -> None:
    """Outside weights, and val's labels, chosen by or learned."""
    torch.save(build_encoder("resnet10t").state_dict(), "outside.pth")
    first = ["--finetune.init=scratch", "--finetune.weights=outside.pth", "--finetune.steps=2"]
    folder = run(*first, f"--finetune.{used}", entry="g")
    recipe, _, plain = config.parse("", argv=[*TINY, "--entry=g", "--pseudo_label.rounds=1"])
    pseudo_label.run(recipe, plain)
    clean, last = run(*first, entry="c"), run(*first, entry="g")
    assert (folder.name, last.name) == ("finetune-0", "finetune-1")
    marks = {}
    for made in (folder, clean, last):
        metadata = load_tensors(made / "classifier.safetensors")[1]
        marks[made] = metadata["transfer"], metadata["by_val"]
    outside = "outside" in used
    assert marks == {folder: (outside, not outside), clean: (False, False), last: marks[folder]}


def test_who_learns_requested_labels_has_the_marks_of_who_chose_them(tiny_contest: Path) -> None:
    torch.save(build_encoder("resnet10t").state_dict(), "outside.pth")
    first = ["--finetune.weights=outside.pth", "--finetune.steps=2"]
    run(*first, "--finetune.init=outside", entry="g")
    run("--finetune.init=scratch", "--finetune.steps=2", entry="c")
    made = Path("runs/g/embeddings")
    made.mkdir()
    rng = np.random.default_rng(0)
    counts = {split: load_contest("tiny").images(split) for split in ("unlabeled", "train")}
    for split, n in counts.items():
        np.save(made / f"{split}.npy", unit(rng.standard_normal((n, 8))))
    contest = Path("data_manifests/tiny/contest.json")
    (made / "provenance.json").write_text(
        json.dumps({"inputs": {str(contest): runs.sha256(contest)}})
    )
    argv = [*TINY, "--entry=g", "--label_request.budget=4"]
    for strategy, marked in (("Random", False), ("Margin", True)):
        recipe, _, plain = config.parse("", argv=[*argv, f"--label_request.strategy={strategy}"])
        label_request.run(recipe, plain, force=True)
        asked = Path("runs/g/label_request/request_00.csv").read_text().split()
        Path("answer.csv").write_text("".join(f"{row}1\n" for row in asked))
        file = import_labels.run(recipe, Path("answer.csv"))
        folder = run("--finetune.init=scratch", "--finetune.steps=2", entry="c")
        metadata = load_tensors(folder / "classifier.safetensors")[1]
        assert (metadata["transfer"], metadata["by_val"]) == (marked, False)
        file.unlink()
        file.with_suffix(".json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--finetune.schedule=plateau", "schedule 'plateau' has no held-out labels to look at"),
        ("--finetune.manifests=[nope.csv]", "finetune: nope.csv is not there; among manifests"),
        ("--finetune.eval_resolution=1", "too small"),
        ("--finetune.steps=null", "a budget is expected: epochs, steps or minutes"),
    ],
)
def test_a_refused_command_leaves_what_is_finished(
    pretrained: Path, option: str, reason: str
) -> None:
    folder = run("--finetune.steps=2", "--finetune.holdout=0")
    with pytest.raises(InputError, match=reason):
        run("--finetune.steps=2", "--finetune.holdout=0", option, force=True)
    assert (folder / "provenance.json").is_file()
    assert runs.latest_finetune("f") == folder


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("label_smoothing=1.5", "label_smoothing is 1.5; from 0 to below 1 is expected"),
        ("ema=1.5", "ema is 1.5; from 0 to below 1 is expected"),
        ("batch_size=1", "batch_size is 1; 2 or more is expected"),
        ("blocks=0", "blocks is 0; 1 or more is expected"),
        ("evals=-1", "evals is -1; 0 or more is expected"),
        ("per_class=0", "per_class is 0; 1 or more is expected"),
    ],
)
def test_settings_out_of_range_are_refused(option: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"finetune: {reason}"):
        config.parse("", argv=[f"--finetune.{option}"])
    with pytest.raises(InputError, match="schedule 'plateau' looks at evals"):
        config.parse("", argv=["--finetune.evals=0", "--finetune.schedule=plateau"])


def test_steps_are_timed_as_they_are_made(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training mode, which the probe before it has left."""
    step, seen = Trainer.step, list[bool]()

    def watched(self: Any, *rest: Any) -> None:
        seen.append(all(part.training for part in self.module.modules()))
        step(self, *rest)

    monkeypatch.setattr(Trainer, "step", watched)
    run("--finetune.steps=null", "--finetune.minutes=0.001", "--finetune.probe_first=true")
    assert len(seen) > 7
    assert all(seen)


def test_nothing_is_left_of_the_calibration(pretrained: Path) -> None:
    """Neither in the weights nor in the optimizer: as many steps without one end at the same."""
    options = ["--finetune.optimizer.warmup=0", "--finetune.evals=0"]
    folder = run("--finetune.steps=null", "--finetune.minutes=0.005", *options)
    calibrated = load_tensors(folder / "classifier.safetensors")[0]
    steps = sum(read_json(folder / "plan.json", "")["steps"])
    plain = load_tensors(run(f"--finetune.steps={steps}", *options) / "classifier.safetensors")[0]
    assert all(torch.equal(v, plain[k]) for k, v in calibrated.items())


MIXED = ["--finetune.manifests=[train,more.csv]", "--finetune.balanced=true"]
MIXED += ["--finetune.mixup=0.4", "--finetune.cutmix=1.0", "--finetune.layer_decay=0.5"]
MIXED += ["--finetune.weigh_by_confidence=true", "--finetune.ema=0.5"]


def write_more() -> None:
    write_manifest(
        Path("more.csv"),
        Manifest.of("unlabeled", np.arange(9), np.zeros(9, np.int64), np.linspace(0.1, 0.9, 9)),
        ["split", "index", "label", "confidence", "source"],
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--finetune.ema=0.9", "--finetune.schedule=plateau", "--finetune.patience=0"],
        MIXED,
        ["--finetune.consistency=FixMatch", "--finetune.consistency.ratio=2"],
        ["--finetune.consistency=FreeMatch", "--finetune.consistency.aligned=true"],
    ],
)
def test_a_resumed_round_is_bit_identical(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    write_more()
    whole = load_torch(run(*options) / "checkpoint.pt")
    step = Trainer.step

    def stop_at(self: Any, fetched: Any, at: int, *rest: Any) -> None:
        step(self, fetched, at, *rest)
        time.sleep(0.05)
        self._stop = [15] if at == 12 and not self.resumed else []

    monkeypatch.setattr(Trainer, "step", stop_at)
    monkeypatch.setattr(Trainer, "resumed", False, raising=False)
    with pytest.raises(SystemExit):
        run(*options, force=True)
    monkeypatch.setattr(Trainer, "resumed", True)
    monkeypatch.delattr(finetune, "probe")  # what the checkpoint holds is not computed again
    folder = run(*options)
    assert results(folder)["minutes"] >= 20 * 0.05 / 60  # those before the interruption, too
    resumed = load_torch(folder / "checkpoint.pt")
    assert resumed["step"] == whole["step"] == 20
    assert all(torch.equal(v, resumed["module"][k]) for k, v in whole["module"].items())


def test_logits_that_are_gone_are_made_again_without_training(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run()
    file = folder / "logits" / "unlabeled.npy"
    logits = np.load(file)
    file.unlink()
    left = folder / ".checkpoint.pt.4194305.tmp"  # by a run that was killed
    left.touch()
    monkeypatch.delattr(Trainer, "step")
    assert run() == folder
    assert np.array_equal(np.load(file), logits)
    assert not left.exists()
    monkeypatch.delattr(finetune, "finetuner")
    assert run() == folder


def test_doubtful_labels_are_noted_among_those_held_out(pretrained: Path) -> None:
    train = load_contest("tiny").manifest("train")
    train.note[::2] = DOUBTFUL
    write_manifest(Path("clean.csv"), train, ("split", "index", "label", "note"))
    folder = run("--finetune.manifests=[clean.csv]")
    held, trained = (read_manifest(folder / f"{n}.csv") for n in ("holdout", "trained_on"))
    assert set(held.note) == {"", DOUBTFUL}
    assert np.array_equal(held.note == DOUBTFUL, held.index % 2 == 0)
    assert (trained.index % 2 == 1).all()


class Built(Exception):
    pass


def trainer_of(monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Any, list[Any]]:
    """The trainer of a round before its first step, and what its probe was given."""
    made, probes, whole = list[Any](), list[Any](), finetuning.finetuner

    def stop(*args: Any) -> None:
        made.append(whole(*args))
        raise Built

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "finetuner", stop)
        patch.setattr(finetune, "probe", lambda *args: probes.append(args))
        with pytest.raises(Built):
            run(*options, "--finetune.holdout=0")
    return made[0], probes


def test_every_option_reaches_its_place(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone; nothing of it by itself."""
    write_more()
    more = "--finetune.manifests=[train,more.csv]"
    plain, probes = trainer_of(monkeypatch, more)
    module, feed = plain.module, plain.feed
    assert (module.ema, module.averaged, module.mix, module.label_smoothing) == (0, None, None, 0.1)
    labels, weights = feed.targets
    assert labels.bincount().tolist() == [29, 20, 20, 20]  # more.csv has nine of class 0
    assert (weights == 1).all()
    assert [group["lr_factor"] for group in plain.optimizer.param_groups].count(0.1) >= 1
    factors = {group["lr_factor"] for group in plain.optimizer.param_groups}
    assert factors == {1.0, 0.1}
    [(_, pool, known, *_, given)] = probes
    assert len(pool) == len(known) == 89
    assert (given == 1).all()

    balanced, [(*_, given)] = trainer_of(monkeypatch, more, "--finetune.balanced=true")
    feed = balanced.feed
    assert len(feed.pool) == 89  # the labels are drawn more often, not held more often
    epochs = np.concatenate([feed.chosen(step) for step in range(29)])  # six of 4 * 29
    assert feed.targets[0][epochs].bincount().tolist() == [6 * 29] * 4
    assert np.bincount(known, given).tolist() == [29] * 4
    sure, [(*_, given)] = trainer_of(monkeypatch, more, "--finetune.weigh_by_confidence=true")
    expected = np.r_[np.ones(80), np.linspace(0.1, 0.9, 9)]
    np.testing.assert_allclose(np.sort(sure.feed.targets[1]), np.sort(expected), rtol=1e-3)
    np.testing.assert_array_equal(given, sure.feed.targets[1])

    averaged = trainer_of(monkeypatch, "--finetune.ema=0.5")[0].module
    assert averaged.ema == 0.5
    assert averaged.final() is averaged.averaged
    for options, kinds in (
        (["--finetune.mixup=0.4"], [("MixUp", 0.4)]),
        (["--finetune.cutmix=0.7"], [("CutMix", 0.7)]),
        (["--finetune.mixup=0.4", "--finetune.cutmix=1"], [("MixUp", 0.4), ("CutMix", 1.0)]),
    ):
        mix = trainer_of(monkeypatch, *options)[0].module.mix
        assert [(type(m).__name__, m.alpha) for m in mix.transforms] == kinds
    layered = trainer_of(monkeypatch, "--finetune.layer_decay=0.5")[0].optimizer.param_groups
    factors = {round(group["lr_factor"], 6) for group in layered}
    assert factors > {1.0, 0.1, 0.05, 0.025}
    smooth = trainer_of(monkeypatch, "--finetune.label_smoothing=0.3")[0]
    assert smooth.module.label_smoothing == 0.3
    assert not trainer_of(monkeypatch, "--finetune.probe_first=false")[1]

    views = ["--finetune.view.crop_scale=[0.6,1.0]", "--finetune.strong_view.solarize_p=0.7"]
    both = trainer_of(monkeypatch, *views, "--finetune.consistency=FixMatch")[0].feed
    weak, strong = both.unlabeled.views
    assert (weak.crop_scale, strong.solarize_p) == ((0.6, 1.0), 0.7)
    assert [view.crop_scale for view in both.labeled.views] == [(0.6, 1.0)]


@pytest.mark.parametrize("kind", ["FixMatch", "FreeMatch"])
def test_unlabeled_images_are_learned_from(pretrained: Path, kind: str) -> None:
    """Its log tells how many are sure enough."""
    options = [f"--finetune.consistency={kind}", "--finetune.consistency.ratio=2"]
    options += ["--finetune.view.crop_scale=[0.6,1.0]", "--finetune.log_steps=5"]
    folder = run(*options)
    history = read_json(folder / "history.json", "")
    assert all(0 <= point["used"] <= 100 for point in history if "loss" in point)
    first = load_tensors(folder / "classifier.safetensors")[0]
    plain = load_tensors(run(*options[2:], force=True) / "classifier.safetensors")[0]
    assert not torch.equal(first["head.weight"], plain["head.weight"])
    assert set(plain) == set(first)  # no state of the consistency is in what is kept
