"""A submission stands alone, scores what the fine-tuned model scores, and says how it was made."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from pipeline import InputError, config, ensembles, runs, submission
from pipeline.checkpoint import save_tensors
from pipeline.classifiers import (
    Classifier,
    build_head,
    load_classifier,
    probe,
)
from pipeline.encoders import build_encoder
from pipeline.ensembles import Choice, cross_fitted, mixture_weights, vote_weights
from pipeline.inference import predict, predict_split
from pipeline.manifest import Contest, load_contest, read_manifest, write_manifest
from pipeline.packed import Form, decode
from pipeline.recipe import Recipe, Submit
from pipeline.views import WHOLE, Views, uniforms
from stages import submit
from tests.conftest import draw

NASTY = "Robert'); \"\"\" {team_id!r} \\ \n#''' Ünïcode"
ARGV = ["--entry=tried", "--data.contest=tiny", "--finetune.init=scratch"]


def parsed(*argv: str) -> tuple[Recipe, dict[str, Any]]:
    recipe, _, plain = config.parse(submit.__doc__, config.Force, [*ARGV, *argv])
    return recipe, plain


def finetuned(
    contest: Contest,
    resolution: int = 32,
    transfer: bool = False,
    entry: str = "tried",
    seed: int = 0,
) -> Path:
    """runs/tried/finetune-0 as the stage leaves it: here a random encoder and a fitted head."""
    plain = parsed()[1]
    folder = runs.finetune_folder(entry, 0)
    spec = {"name": "test_resnet", "stem": "imagenet", "options": {}}
    torch.manual_seed(seed)
    encoder = build_encoder("test_resnet")
    classifier = Classifier(encoder, build_head("linear", int(encoder.num_features), 4)).eval()
    labels = contest.manifest("train").usable()
    probe(classifier, contest.pool(labels), labels.label, resolution, contest, 10.0)
    inputs = [contest.folder / "contest.json"]
    facts = runs.Run.of(folder, plain, ("data", "encoder", "finetune"), inputs)
    facts.begin()
    head = {"kind": "linear", "features": encoder.num_features, "classes": 4}
    metadata = {"encoder": spec, "head": head, "mean": contest.mean, "std": contest.std}
    metadata |= {"resolution": resolution, "transfer": transfer}
    for split in contest.splits:
        file = folder / "logits" / f"{split}.npy"
        predict_split(classifier, contest, split, file, 4, resolution, exact=True)
    save_tensors(folder / "classifier.safetensors", classifier.state_dict(), metadata)
    write_manifest(folder / "trained_on.csv", labels.take(np.arange(70)))
    write_manifest(folder / "holdout.csv", labels.take(np.arange(70, 80)))
    facts.finish(round=0, val_top1=own_accuracy(contest, folder))
    return folder


def single(finetune: Path) -> Choice:
    return Choice([finetune], [1.0], False, {})


def own_accuracy(contest: Contest, folder: Path) -> float:
    predicted = np.load(folder / "logits" / "val.npy").argmax(1)
    return 100 * float(np.mean(predicted == contest.labels("val")))


def load_program(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("a_submission", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def contest(tiny_contest: Path) -> Contest:
    return load_contest("tiny")


@pytest.fixture
def instant(contest: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The organizers find the model's own accuracy, without the seconds of a fresh process."""
    accuracy = own_accuracy(contest, finetuned(contest))
    monkeypatch.setattr(submission.organizers, "score", lambda *_: {"accuracy": accuracy})


@pytest.mark.usefixtures("instant")
def test_round_trip(contest: Contest) -> None:
    """Loaded strictly and weights_only, the submission's logits are the classifier's."""
    finetune = runs.latest_finetune("tried")
    folder = submit.run(*parsed())
    program = load_program(folder / "submission.py")
    model = program.get_model().eval()
    state = torch.load(folder / "model.pth", weights_only=True)
    model.load_state_dict(state, strict=True)
    images = [Image.open(contest.root / "val" / f"{n}.png") for n in range(40)]
    with torch.no_grad():
        logits = model(torch.stack([program.eval_transform(image) for image in images]))
    expected = np.load(finetune / "logits" / "val.npy")
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_card_states_the_fresh_process_score_and_how_it_was_made(contest: Contest) -> None:
    finetune = finetuned(contest)
    own = own_accuracy(contest, finetune)
    assert own > 35  # better than guessing among four: the comparison below could fail
    card = json.loads((submit.run(*parsed()) / "card.json").read_text())
    assert card["val_top1"] == pytest.approx(own, abs=1e-3)
    assert card["checked"]["images"] == 40
    assert card["labels"] == {"train": 70, "held out": 10}
    assert card["inputs"][str(finetune / "classifier.safetensors")] == runs.sha256(
        finetune / "classifier.safetensors"
    )
    assert (card["recipe"]["data"]["contest"], card["recipe"]["seed"]) == ("tiny", 0)
    assert (card["transfer"], card["notes"]) == (False, [])
    assert {"commit", "versions", "command"} <= card.keys()


@pytest.mark.usefixtures("instant")
def test_predictions_are_the_models_labels_in_the_order_of_the_files() -> None:
    finetune = runs.latest_finetune("tried")
    folder = submit.run(*parsed())
    with (folder / "predictions.csv").open() as f:
        rows = list(csv.reader(f))
    expected = np.load(finetune / "logits" / "test.npy").argmax(1)
    assert rows == [["id", "label"], *([str(n), str(k)] for n, k in enumerate(expected))]
    assert len(set(expected.tolist())) > 1


def test_the_organizers_accept_it_and_print_the_cards_figure(
    contest: Contest, shared: Path
) -> None:
    finetuned(contest, resolution=48)
    folder = submit.run(*parsed())
    command = [sys.executable, str(shared / "contest" / "evaluate.py"), str(folder)]
    command.append(str(contest.root))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = re.search(r"Accuracy: ([\d.]+)%", done.stdout)
    assert printed is not None
    card = json.loads((folder / "card.json").read_text())
    assert printed[1] == f"{card['val_top1']:.2f}"
    assert card["val_top1"] == json.loads(done.stdout.splitlines()[-1])["accuracy"]


@pytest.mark.usefixtures("instant")
def test_a_mismatch_is_refused_and_the_old_submission_kept() -> None:
    finetune = runs.latest_finetune("tried")
    folder = submit.run(*parsed())
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    file = finetune / "logits" / "val.npy"
    np.save(file, np.roll(np.load(file), 1, axis=1))  # the model's own figure is another now
    with pytest.raises(InputError, match=r"refused: as the organizers score it .* on val"):
        submit.run(*parsed(), force=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert list(Path("submissions").iterdir()) == [folder]


@pytest.mark.usefixtures("instant")
def test_what_a_killed_run_left_is_cleared_and_an_unfinished_round_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    left, other = Path("submissions/.tried.killed"), Path("submissions/.tried.2.running")
    left.mkdir(parents=True)
    other.mkdir()
    (runs.entry_folder("tried") / "finetune-7").mkdir()
    folder = submit.run(*parsed())
    assert {*Path("submissions").iterdir()} == {folder, other}  # of the entry tried.2
    assert "finetune-7 is newer, but unfinished" in capsys.readouterr().out


@pytest.mark.usefixtures("instant")
def test_labels_that_were_not_learned_are_named(
    contest: Contest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the submission is as it was."""
    submit.run(*parsed())
    assert "is submitted, but" not in capsys.readouterr().out
    file = contest.folder / "requested-1.csv"
    write_manifest(file, contest.manifest("unlabeled").take(np.arange(3)))
    submit.run(*parsed())
    said = capsys.readouterr().out
    assert f"finetune-0 is submitted, but {file} came after it; `make finetune` learns" in said
    assert "is up to date" in said
    submit.run(*parsed("--submit.round=0"))  # as asked for
    assert "came after" not in capsys.readouterr().out


@pytest.mark.usefixtures("instant")
def test_a_first_mismatch_leaves_nothing() -> None:
    file = runs.latest_finetune("tried") / "logits" / "val.npy"
    np.save(file, np.roll(np.load(file), 1, axis=1))
    with pytest.raises(InputError, match="refused"):
        submit.run(*parsed())
    assert not any(Path("submissions").iterdir())


@pytest.mark.usefixtures("instant")
def test_nothing_is_done_twice(capsys: pytest.CaptureFixture[str]) -> None:
    folder = submit.run(*parsed())
    written = (folder / "card.json").stat().st_mtime_ns
    submit.run(*parsed())
    assert "is up to date" in capsys.readouterr().out
    assert (folder / "card.json").stat().st_mtime_ns == written
    (folder / "model.pth").unlink()  # as in a fresh clone
    submit.run(*parsed())
    assert (folder / "model.pth").is_file()
    submit.run(*parsed("--submit.team_name=another"))
    assert load_program(folder / "submission.py").team_name == "another"


def test_a_nasty_team_name_is_only_a_name(contest: Contest, tmp_path: Path) -> None:
    finetune = finetuned(contest)
    team = Submit(team_id=7, team_name=NASTY, email_address="o'neil@example.org")
    submission.write_program(tmp_path, single(finetune), contest.size, team)
    program = load_program(tmp_path / "submission.py")
    assert (program.team_id, program.team_name) == (7, NASTY)
    assert program.email_address == "o'neil@example.org"
    submission.check(tmp_path, contest, single(finetune))


MEAN, STD = [0.4, 0.5, 0.3], [0.2, 0.3, 0.25]


def transform(folder: Path, resolution: int, image: Image.Image) -> torch.Tensor:
    """What the submission of a classifier of 32×32 images makes of an image."""
    encoder = {"name": "test_resnet", "stem": "imagenet", "options": {}}
    head = {"kind": "mlp", "features": 96, "classes": 4}
    metadata = {"encoder": encoder, "head": head, "resolution": resolution}
    metadata = metadata | {"mean": MEAN, "std": STD}
    text = submission.program([metadata], single(folder), (32, 32), Submit())
    (folder / "submission.py").write_text(text, encoding="utf-8")
    return load_program(folder / "submission.py").eval_transform(image)


def pipelines(image: Image.Image, resolution: int) -> torch.Tensor:
    """What the pipeline makes of the image, packed."""
    pixels = torch.from_numpy(np.array(image))[None]
    whole = Views([WHOLE], MEAN, STD, torch.float32)
    drawn = whole.draw(uniforms(0, 0, 1, 1), *pixels.shape[1:3])
    return whole(pixels, drawn, resolution)[0][0]


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "I;16"])
@pytest.mark.parametrize("resolution", [24, 32, 48])
def test_eval_transform_is_the_pipelines_preprocessing(
    mode: str, resolution: int, tmp_path: Path
) -> None:
    image = draw("disk", np.random.default_rng(0))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    ours = transform(tmp_path, resolution, image)
    assert ours.std() > 0.2
    torch.testing.assert_close(ours, pipelines(image.convert("RGB"), resolution), rtol=0, atol=2e-4)


def test_eval_transform_of_another_size_is_what_packing_makes_of_it(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    draw("cross", np.random.default_rng(0), 75).crop((0, 0, 75, 51)).save(file)
    packed = decode(file.read_bytes(), Form(32, 32, True, 10**6))
    ours = transform(tmp_path, 24, Image.open(file))
    torch.testing.assert_close(ours, pipelines(packed, 24), rtol=0, atol=2e-4)


@pytest.mark.usefixtures("instant")
def test_transfer_is_marked_as_such(contest: Contest) -> None:
    finetuned(contest, transfer=True)
    card = json.loads((submit.run(*parsed()) / "card.json").read_text())
    assert card["transfer"] is True
    assert "not allowed in a contest entry, comparison only" in card["notes"][0]


def test_what_is_missing_is_named(contest: Contest) -> None:
    with pytest.raises(InputError, match="make finetune"):
        submit.run(*parsed())
    finetuned(contest)
    with pytest.raises(InputError, match="test is 'secret'; one of the contest's splits"):
        submit.run(*parsed("--submit.test=secret"))
    with pytest.raises(InputError, match=r"finetune-3/provenance.json is not there"):
        submit.run(*parsed("--submit.round=3"))


def test_mixture_weights_are_those_of_the_likeliest_mixture() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 500)
    good = np.where(np.eye(3)[labels] > 0, 0.6, 0.2)
    bad = np.where(np.eye(3)[(labels + 1) % 3] > 0, 0.6, 0.2)
    mixed = np.stack([good, bad]).astype(np.float32)
    np.testing.assert_allclose(mixture_weights(mixed, labels), [1, 0], atol=0.02)
    half = np.where((np.arange(500) % 2)[:, None] == 0, mixed, mixed[::-1])  # each right by turns
    np.testing.assert_allclose(mixture_weights(half, labels), [0.5, 0.5], atol=0.02)


def test_a_vote_is_judged_with_weights_of_other_labels() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(4), (3, 9)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 4, 9)
    seen = cross_fitted(p, labels)
    for k in range(9):
        other = np.arange(9) % 2 != k % 2
        weights = vote_weights(p[:, other], labels[other])
        np.testing.assert_allclose(seen[k], weights @ p[:, k], rtol=1e-5)
    assert cross_fitted(p[:, :1], labels[:1]).shape == (1, 4)  # no other label: all weigh the same


def test_who_votes_is_judged_by_other_labels_too() -> None:
    """The third model knows one half of the images alone: there it votes by itself, and is judged
    on the other half; the first two know all, and are dropped beside it."""
    labels = np.arange(40) % 4
    right, wrong = 0.996 * np.eye(4)[labels] + 0.001, np.roll(np.eye(4), 1, 0)[labels]
    even = (np.arange(40) % 2 == 0)[:, None]
    fair = 0.6 * np.eye(4)[labels] + 0.1
    p = np.stack([fair, fair, np.where(even, right, wrong)]).astype(np.float32)
    assert not vote_weights(p[:, ::2], labels[::2])[:2].any()
    seen = cross_fitted(p, labels).argmax(1) == labels
    assert not seen[1::2].any()
    assert seen[::2].all()
    np.testing.assert_allclose(vote_weights(p, labels).sum(), 1, rtol=1e-5)
    many = np.repeat(p[:1], 30, 0)  # none weighs 0.05
    np.testing.assert_allclose(vote_weights(many, labels), 1 / 30, rtol=1e-5)


def test_several_vote_only_where_that_is_better(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight labels held out by all; a member of no use, then two that are right by turns."""
    first, second = finetuned(contest), finetuned(contest, entry="other")
    held = contest.manifest("train").usable().take(np.arange(70, 78))
    write_manifest(second / "holdout.csv", held)
    sure, wrong = 0.9 * np.eye(4)[held.label] + 0.025, np.full((8, 4), 0.25)
    wrong[np.arange(8), (held.label + 1) % 4] += 0.1
    answers = {first: sure, second: wrong}
    monkeypatch.setattr(ensembles, "_probabilities", lambda c, h, folder, m: answers[folder])
    chosen = ensembles.choose(contest, [first, second], mirror=True)
    assert (chosen.members, chosen.weights, chosen.mirror) == ([first], [1.0], False)
    assert chosen.plain
    assert len(chosen.tried) == 4  # the vote is that of the first alone
    seconds = np.isin(np.arange(8), [0, 3, 6])[:, None]  # some of either half
    answers[first] = np.where(seconds, 0.2 * wrong + 0.2, sure)
    answers[second] = np.where(seconds, sure, 0.2 * wrong + 0.2)
    chosen = ensembles.choose(contest, [first, second], mirror=False)
    assert chosen.members == [first, second]
    assert sum(chosen.weights) == pytest.approx(1)
    assert max(chosen.tried.values()) == 100
    third = finetuned(contest, entry="third")  # of no use: judged without it, as it is submitted
    answers[third], voted = np.full((8, 4), 0.25), chosen.tried
    chosen = ensembles.choose(contest, [first, second, third], mirror=False)
    assert chosen.members == [first, second]
    assert voted.items() <= chosen.tried.items()
    write_manifest(second / "holdout.csv", held.take(np.arange(0)))
    with pytest.raises(InputError, match="held out no labels in common to choose by"):
        ensembles.choose(contest, [first, second], mirror=False)


def test_members_are_judged_as_they_are_submitted(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a size of their own, in the numbers of the logits, whatever else the machine knows."""
    folder = finetuned(contest, 48)
    monkeypatch.setattr("pipeline.inference.matmul_dtype", lambda _: torch.bfloat16)
    chosen = ensembles.choose(contest, [folder], mirror=True)
    held = read_manifest(folder / "holdout.csv")
    own = np.load(folder / "logits" / "train.npy")[held.index]
    right = 100 * float((own.argmax(1) == held.label).mean())
    assert chosen.tried[f"1.00 {folder}"] == pytest.approx(right)
    p = ensembles._probabilities(contest, held, folder, mirror=False)
    np.testing.assert_allclose(p, softmax(own, axis=1), atol=2e-3)


def test_an_ensemble_stands_alone_and_scores_as_its_own_logits(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sizes and mirror images, scored in a fresh process as the organizers do."""
    first, second = finetuned(contest), finetuned(contest, 24, entry="other", seed=3)
    weights = [0.7, 0.3]

    def both(contest: Contest, folders: list[Path], mirror: bool) -> Choice:
        return Choice(folders, weights, mirror, {"both": 50.0})

    monkeypatch.setattr(ensembles, "choose", both)
    folder = submit.run(*parsed("--submit.members=[other]", "--submit.mirror=true"))
    card = json.loads((folder / "card.json").read_text())
    assert card["models"]["folders"] == [str(first), str(second)]
    assert card["models"]["mirror"] is True
    program = load_program(folder / "submission.py")
    model = program.get_model()
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True), strict=True)
    images = [Image.open(contest.root / "val" / f"{n}.png") for n in range(40)]
    x = torch.stack([program.eval_transform(image) for image in images])
    small = torch.nn.functional.interpolate(x, (24, 24), mode="bilinear", antialias=True)
    a, b = (load_classifier(f / "classifier.safetensors")[0] for f in (first, second))
    with torch.no_grad():
        p = 0.35 * (a(x).softmax(1) + a(x.flip(3)).softmax(1))
        p += 0.15 * (b(small).softmax(1) + b(small.flip(3)).softmax(1))
        torch.testing.assert_close(model.eval()(x), p.log(), rtol=1e-4, atol=1e-4)
    right = 100 * (p.argmax(1).numpy() == contest.labels("val")).mean()
    assert card["val_top1"] == pytest.approx(right, abs=1e-3)
    assert [made["folder"] for made in card["finetune"]] == [str(first), str(second)]


def test_every_member_sees_what_it_sees_alone(contest: Contest) -> None:
    """Nothing that was enlarged for another and made smaller again."""
    folders = [finetuned(contest, s, entry=f"e{s}", seed=s) for s in (32, 24, 48)]
    model, size = ensembles.build(folders, [0.5, 0.3, 0.2], False, contest.size)
    own = [softmax(np.load(f / "logits" / "val.npy"), axis=1) for f in folders]
    out = np.empty((40, 4), np.float32)
    mean, std = contest.mean, contest.std
    predict(model, contest.pool(contest.manifest("val")), size, mean, std, out, exact=True)
    expected = 0.5 * own[0] + 0.3 * own[1] + 0.2 * own[2]
    np.testing.assert_allclose(np.exp(out), expected, atol=1e-4)
    assert ensembles.shown_size([32, 24, 48], (32, 40)) == 48  # not square: the largest


@pytest.mark.usefixtures("instant")
def test_the_card_is_of_the_model_that_is_submitted(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetuned(contest)
    other = finetuned(contest, entry="other", seed=3)
    monkeypatch.setattr(ensembles, "choose", lambda *_: single(other))
    own = own_accuracy(contest, other)
    monkeypatch.setattr(submission.organizers, "score", lambda *_: {"accuracy": own})
    card = json.loads((submit.run(*parsed("--submit.members=[other]")) / "card.json").read_text())
    (made,) = card["finetune"]
    assert (made["folder"], made["val_top1"]) == (str(other), own)


@pytest.mark.usefixtures("instant")
def test_one_image_is_no_mismatch(contest: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty images: one is 2.5 points."""
    own = own_accuracy(contest, runs.latest_finetune("tried"))
    for images, refused in ((1, False), (2, True)):
        score = {"accuracy": own - 2.5 * images}
        monkeypatch.setattr(submission.organizers, "score", lambda *_, s=score: s)
        with pytest.raises(InputError, match=r"at most 2\.5") if refused else nullcontext():
            submit.run(*parsed("--submit.test=test"), force=True)


@pytest.mark.usefixtures("instant")
def test_predictions_of_a_split_without_logits_are_refused(contest: Contest) -> None:
    (runs.latest_finetune("tried") / "logits" / "unlabeled.npy").unlink()
    with pytest.raises(InputError, match=r"unlabeled\.npy is not there; `make finetune ARGS="):
        submit.run(*parsed("--submit.test=unlabeled"))
    assert not Path("submissions/tried/card.json").exists()


@pytest.mark.usefixtures("instant")
def test_a_member_that_is_not_there_is_named(contest: Contest) -> None:
    with pytest.raises(InputError, match="runs/other holds no finished finetune-K"):
        submit.run(*parsed("--submit.members=[other]"))
    with pytest.raises(InputError, match=r"runs/tried/finetune-9/provenance\.json is not"):
        submit.run(*parsed("--submit.members=[tried/finetune-9]"))
    other = Path("runs/other/finetune-0")
    shutil.copytree(runs.latest_finetune("tried"), other)
    Path("elsewhere.json").touch()
    made = {"inputs": {"elsewhere.json": runs.sha256(Path("elsewhere.json"))}}
    runs.write_json(other / "provenance.json", made)
    with pytest.raises(InputError, match="runs/other/finetune-0 is of another contest than"):
        submit.run(*parsed("--submit.members=[other]"))
