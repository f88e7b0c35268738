"""rehearse: the same contests, answers and scores as the organizers' own programs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import InputError, organizers, runs, sources
from pipeline.contest_layout import read_layout
from pipeline.organizers import Refused, Shape
from stages import rehearse
from tests.conftest import ROOT, Malicious


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image folder of three classes, 9 + 4 images each; the working directory is its parent."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 4)):
        for name in "cab":
            folder = Path("images") / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 256, (14, 18, 3), np.uint8)
                mode = ("RGB", "L", "P")[n % 3]
                Image.fromarray(pixels).convert(mode).save(folder / f"{n}.png")
    return Path("images")


def ours(*argv: object) -> SimpleNamespace:
    """What `python -m stages.rehearse …` prints, and its exit code."""
    command = [sys.executable, "-m", "stages.rehearse", *map(str, argv)]
    return _finish(command, os.environ | {"PYTHONPATH": str(ROOT)})


def theirs(program: Path, *argv: object) -> SimpleNamespace:
    return _finish([sys.executable, str(program), *map(str, argv)], dict(os.environ))


def _finish(command: list[str], environment: dict[str, str]) -> SimpleNamespace:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def make(*argv: object) -> None:
    arguments = rehearse.parse(["make", *map(str, argv)])
    arguments.run(arguments)


SMALL = ("--per-class", 3, "--val-per-class", 2, "--size", 12, "--max-unlabeled-per-class", 5)


@pytest.mark.parametrize("options", [SMALL, ("--size", 8, "--per-class", 4, "--seed", 7)])
def test_a_contest_equals_the_organizers(images: Path, shared: Path, options: tuple, capsys):
    make("--source", images, "--out", "mine", *options)
    program = shared / "contest" / "make_contest.py"
    done = theirs(program, images, "yours", *options)
    assert done.code == 0, done.err
    assert capsys.readouterr().out.startswith(done.out)
    files = sorted(p.relative_to("yours") for p in Path("yours").rglob("*"))
    assert sorted(p.relative_to("mine") for p in Path("mine").rglob("*")) == files
    assert sum(p.suffix == ".png" for p in files) > 20
    tensors = [p for p in files if p.suffix == ".pt"]
    assert len(tensors) == 2
    for file in (p for p in files if p.suffix == ".png"):
        assert (Path("mine") / file).read_bytes() == (Path("yours") / file).read_bytes()
    pairs = [(Path("mine") / p, Path("yours") / p) for p in tensors]
    for a, b in [*pairs, (Path("mine.oracle.pt"), Path("yours.oracle.pt"))]:
        mine, yours = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
        assert mine.dtype == yours.dtype
        assert torch.equal(mine, yours)


def test_a_contest_without_val(images: Path):
    make("--source", images, "--out", "mine", *SMALL, "--val-per-class", 0)
    assert sorted(p.name for p in Path("mine").iterdir()) == [
        "train",
        "train_label_tensor.pt",
        "unlabeled",
    ]
    assert sorted(read_layout(Path("mine"), None).splits) == ["train", "unlabeled"]


def test_a_contest_that_fails_leaves_nothing(images: Path):
    left = Path(f".mine.{2**22 + 1}.tmp")  # by a run that was killed
    (left / "train").mkdir(parents=True)
    for file in (images / "val").rglob("*.png"):
        file.write_bytes(b"none")
    before = sorted(p.name for p in Path().iterdir())
    with pytest.raises(InputError, match="is no readable image"):
        make("--source", images, "--out", "mine", *SMALL)
    assert sorted(p.name for p in Path().iterdir()) == [n for n in before if n != left.name]


def test_a_contest_is_made_in_a_folder_that_is_empty(images: Path, shared: Path):
    Path("out").mkdir()
    make("--source", images, "--out", "out", *SMALL)
    program = shared / "contest" / "make_contest.py"
    yours = theirs(program, images, "out", *SMALL)
    mine = ours("make", "--source", images, "--out", "out", *SMALL)
    assert (yours.code, yours.err) == (1, "out is not empty\n")
    assert (mine.code, mine.err) == (1, "error: out is not empty\n")


REQUESTS = {
    "commas": "3.png,\n0.png,\n7.png",
    "names": "3.png\n0.png\n7.png\n",
    "numbers": "\n3\n\n0\n07\n",
    "a header": "index\n3\n0\n7\n",
    "too few": "3\n0\n",
    "twice": "3\n0\n3\n",
    "twice, otherwise written": "3\n0\n003.png,\n",
    "beyond": "3\n0\n10\n",
    "negative": "3\n-1\n0\n",
    "two in a row": "3,0\n7\n1\n",
    "nothing": "",
}


RUN_THEM = """
import contextlib, io, json, runpy, sys
results = {}
for name in sys.argv[2:]:
    out, err, code = io.StringIO(), "", 0
    sys.argv[1:] = [f"{name}/request_07.csv", "oracle.pt", "3", f"{name}/theirs.pt"]
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(PROGRAM, run_name="__main__")
        except SystemExit as end:  # as the interpreter ends
            code, err = (1, f"{end.code}\\n") if isinstance(end.code, str) else (end.code, "")
    results[name] = (code, out.getvalue(), err)
print(json.dumps(results))
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", 0], "make: size is 0; 8 or more is expected"),
        (["--per-class", -5], "make: per_class is -5; 1 or more is expected"),
        (["--val-per-class", -1], "make: val_per_class is -1; 0 or more is expected"),
        (["--out", "file"], "file is no folder; another name is expected"),
    ],
)
def test_a_contest_of_no_shape_is_refused(images: Path, words: list[object], message: str) -> None:
    Path("file").write_text("")
    with pytest.raises(InputError, match=f"^{message}$"):
        make("--source", images, "--out", "mine", *words)


def test_a_request_that_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.zeros(4, dtype=torch.int64), "oracle.pt")
    arguments = rehearse.parse(["answer", "oracle.pt", "oracle.pt", "1", "out.pt"])
    with pytest.raises(InputError, match=r"^refused: row 1 is "):
        arguments.run(arguments)


def test_a_contest_with_nothing_unlabeled_is_refused(images: Path) -> None:
    with pytest.raises(
        InputError, match="unlabeled would be empty: 1000 images of each class go to"
    ):
        make("--source", images, "--out", "mine", "--per-class", 1000)
    assert not Path("mine").exists()


def test_answers_equal_the_organizers(shared: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.tensor([5, 1, 4, 2, 0, 0, 3, 9, 8, 7]), "oracle.pt")
    for name, text in REQUESTS.items():
        Path(name).mkdir()
        (Path(name) / "request_07.csv").write_text(text)
    program = shared / "contest" / "answer_request.py"
    code = RUN_THEM.replace("PROGRAM", repr(str(program)))  # one process, one import of torch
    done = _finish([sys.executable, "-c", code, "", *REQUESTS], dict(os.environ))
    for name, (code, out, err) in json.loads(done.out).items():
        argv = [f"{name}/request_07.csv", "oracle.pt", "3", f"{name}/ours.pt"]
        monkeypatch.setattr(sys, "argv", ["rehearse", "answer", *argv])
        mine = _ours_in_process(capsys)
        assert mine == (code, out.replace("theirs.pt", "ours.pt"), err), name
        files = [Path(name) / "ours.pt", Path(name) / "theirs.pt"]
        assert [f.exists() for f in files] == [code == 0] * 2, name
        if code == 0:
            found, expected = (torch.load(f, weights_only=True) for f in files)
            assert found.dtype == torch.int64
            assert torch.equal(found, expected)
        else:
            assert err.startswith("refused: "), name


def _ours_in_process(capsys: pytest.CaptureFixture) -> tuple[object, str, str]:
    capsys.readouterr()
    code: object = 0
    try:
        rehearse.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("oracle", [torch.arange(5.0), [1, 2], torch.zeros(2, 2).long()])
def test_an_oracle_that_is_no_label_tensor_is_refused(oracle: object, tmp_path: Path):
    torch.save(oracle, tmp_path / "oracle.pt")
    (tmp_path / "request.csv").write_text("1\n")
    files = [str(tmp_path / n) for n in ("request.csv", "oracle.pt")]
    arguments = rehearse.parse(["answer", *files, "1", str(tmp_path / "out.pt")])
    with pytest.raises(InputError, match=r"oracle\.pt: one int64 label for each unlabeled image"):
        arguments.run(arguments)


SUBMISSION = """
import torch
from torch import nn
team_id, team_name, email_address = 7, "ours", "us@example.org"
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12 * 12 * 3, 3)
    def forward(self, x):
        return self.linear(x.flatten(1))
def get_model():
    return Net()
def eval_transform(image):
    assert image.mode == "RGB"
    return torch.tensor(list(image.tobytes())).float().view(12, 12, 3) / 255 - 0.5
"""


@pytest.fixture
def submission(images: Path) -> Path:
    """A contest in contest/ and a submission to it."""
    make("--source", images, "--out", "contest", *SMALL)
    folder = Path("submission")
    folder.mkdir()
    (folder / "submission.py").write_text(SUBMISSION)
    weights = {"linear.weight": torch.randn(3, 432), "linear.bias": torch.zeros(3)}
    torch.save(weights, folder / "model.pth")
    return folder


def both(
    shared: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *argv: object
) -> tuple[tuple[object, str], tuple[object, str]]:
    """Exit code and output of our scoring and of theirs."""
    monkeypatch.setattr(sys, "argv", ["rehearse", "score", *map(str, argv)])
    yours = theirs(shared / "contest" / "evaluate.py", *argv)
    return _ours_in_process(capsys)[:2], (yours.code, yours.out)


def test_scores_equal_the_organizers(submission: Path, shared: Path, capsys, monkeypatch):
    mine, yours = both(shared, capsys, monkeypatch, submission, "contest")
    assert mine == yours
    assert yours[0] == 0
    assert '"images": 6' in yours[1]
    argv = ["--split", "train", "--labels", "other.pt", "--checkpoint", "submission/model.pth"]
    torch.save(torch.zeros(9, dtype=torch.int64), "other.pt")
    mine, yours = both(shared, capsys, monkeypatch, submission, "contest", *argv)
    assert mine == yours
    assert '"images": 9' in yours[1]


def test_a_score_is_what_the_labels_say(submission: Path):
    torch.save({"linear.weight": torch.zeros(3, 432), "linear.bias": torch.eye(3)[2]}, "two.pth")
    labels = torch.tensor([2, 0, 2, 1, 2, 2])
    torch.save(labels, "labels.pt")
    files = Path("labels.pt"), Path("two.pth")
    found = organizers.score(submission, Path("contest"), "val", *files)
    line = "Team 7: ours Accuracy: 66.67%"
    assert found == {"split": "val", "images": 6, "accuracy": 66.667, "team": line}


@pytest.mark.parametrize("rule", ["no program", "no checkpoint", "no name", "wrong shape"])
def test_refusals_equal_the_organizers(
    submission: Path, shared: Path, rule: str, capsys, monkeypatch
):
    program = submission / "submission.py"
    if rule == "no program":
        program.unlink()
    elif rule == "no checkpoint":
        (submission / "model.pth").unlink()
    elif rule == "no name":
        program.write_text(SUBMISSION.replace("team_name", "team"))
    else:
        program.write_text(SUBMISSION.replace("(x.flatten(1))", "(x.flatten(1))[:1]"))
    mine, yours = both(shared, capsys, monkeypatch, submission, "contest")
    assert mine == yours
    assert yours[1].startswith("refused: ")


@pytest.mark.parametrize("line", ["import pipeline", "import helper", "open('helper.py')"])
def test_a_submission_cannot_reach_the_entrants_files(
    submission: Path, line: str, monkeypatch: pytest.MonkeyPatch
):
    Path("helper.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path.cwd())]))
    program = submission / "submission.py"
    program.write_text(f"{line}\n{SUBMISSION}")
    kind = "FileNotFoundError" if "open" in line else "ModuleNotFoundError"
    with pytest.raises(InputError, match=f"submission: the evaluation fails: {kind}: "):
        organizers.score(submission, Path("contest"))


def test_the_entrants_code_is_out_of_reach_where_it_is_installed(submission: Path):
    (submission / "submission.py").write_text(f"import stages.embed\n{SUBMISSION}")
    command = [sys.executable, str(ROOT / "pipeline" / "evaluator.py"), "submission", "contest"]
    done = _finish(command, os.environ | {"PYTHONPATH": str(ROOT)})
    assert "ModuleNotFoundError" in done.err


def test_a_checkpoint_that_runs_programs_is_refused(submission: Path):
    trace = Path("ran").absolute()
    torch.save({"linear.bias": Malicious(trace)}, submission / "model.pth")
    with pytest.raises(InputError, match="the evaluation fails: "):
        organizers.score(submission, Path("contest"))
    assert not trace.exists()


def test_refusals_are_input_errors_with_the_organizers_words():
    oracle = np.arange(9)
    assert organizers.answer([3, 0], oracle, 2).tolist() == [3, 0]
    with pytest.raises(Refused, match=r"^refused: image 9 does not exist$"):
        organizers.answer([3, 9], oracle, 2)
    with pytest.raises(Refused, match=r"^refused: row 2 is 'x'$"):
        organizers.read_request("1\nx\n")
    with pytest.raises(Refused, match=r"^refused: row 1 is '9"):
        organizers.read_request("9" * 5000)


def test_class_folders_alone_give_a_share_to_val(images: Path, capsys):
    source = sources.read_folder(images / "train", val_per_class=50, seed=1)
    assert [len(own) for own in source.held] == [1, 1, 1]  # a fifth of nine at most
    assert [len(own) for own in source.train] == [8, 8, 8]
    again = sources.read_folder(images / "train", val_per_class=50, seed=1)
    assert [own[0].args for own in again.held] == [own[0].args for own in source.held]
    drawn = {opener.args[0] for part in (source.train, source.held) for o in part for opener in o}
    assert drawn == set((images / "train").rglob("*.png"))
    make("--source", images / "train", "--out", "out", *SMALL)
    assert "images/train has no train/: 3 of its images are drawn as val" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("rm -r images", "images is no folder; an image folder, cifar10, cifar100, stl10, oxford"),
        ("rm -r images/val", "images holds train/ but neither val/ nor test/; one is expected"),
        ("rm -r images/val/b", "images/val lacks b/; the classes of train/ are expected"),
        ("rm images/train/b/*", "images/train/b holds no images"),
        ("rm -r images/train/*", "images/train holds no class folders; CLASS/* is expected"),
        ("echo x > images/train/b/3.png", "images/train/b/3.png is no readable image (cannot"),
    ],
)
def test_a_bad_source_is_one_line_and_leaves_nothing(images: Path, spoil: str, message: str):
    subprocess.run(spoil, shell=True, check=True)
    with pytest.raises(InputError) as raised:
        make("--source", images, "--out", "out", *SMALL)
    assert str(raised.value).startswith(message)
    assert not Path("out").exists()
    assert not list(Path().glob(".*tmp"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "oxford-iiit-pet"])
def test_a_download_that_fails_is_one_clear_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import urllib.request

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(InputError) as raised:
        make("--source", name, "--out", tmp_path / "out", "--downloads", tmp_path / "kept")
    message = str(raised.value)
    assert message.startswith(f"cannot download {name} (")
    assert message.endswith(" or name an image folder")
    assert f"): put it in {tmp_path}/kept/" in message
    assert "\n" not in message


def test_a_named_data_set_becomes_a_contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision import datasets

    class Fake:
        def __init__(self, folder: Path, train: bool, download: bool) -> None:
            self.targets = [n % 2 for n in range(12 if train else 6)]

        def __getitem__(self, n: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (6, 6), (n, self.targets[n], 0)), self.targets[n]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    out = tmp_path / "out"
    options = ("--downloads", tmp_path / "kept", *SMALL)
    make("--source", "cifar10", "--out", out, *options)
    labels = torch.load(out / "train_label_tensor.pt", weights_only=True)
    assert torch.bincount(labels).tolist() == [3, 3]
    for n, label in enumerate(labels.tolist()):
        assert Image.open(out / "train" / f"{n}.png").getpixel((0, 0))[1] == label
    assert len(list((out / "unlabeled").iterdir())) == 6


def test_a_generated_contest_has_the_asked_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def generate(
        split: str, classes: int, per_class: int, size: int, seed: int
    ) -> Iterator[tuple[np.ndarray, int]]:
        asked.append((split, per_class, seed))
        for n in range(classes * per_class):
            label = n % classes
            yield np.full((size, size, 3), 10 * label + (split == "val"), np.uint8), label

    fake = SimpleNamespace(make=generate)
    monkeypatch.setitem(sys.modules, "pipeline.synthetic", fake)
    out = tmp_path / "out"
    make("--source", "synthetic", "--out", out, "--classes", 4, *SMALL)
    assert asked == [("train", 8, 2021), ("val", 2, 2021)]
    for split, per_class in (("train", 3), ("val", 2)):
        labels = torch.load(out / f"{split}_label_tensor.pt", weights_only=True)
        assert torch.bincount(labels).tolist() == [per_class] * 4
        for n, label in enumerate(labels.tolist()):
            pixel = Image.open(out / split / f"{n}.png").getpixel((5, 5))[0]
            assert pixel == 10 * label + (split == "val")
    assert torch.bincount(torch.load(f"{out}.oracle.pt", weights_only=True)).tolist() == [5] * 4


def test_an_interrupted_contest_is_not_there(images: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(organizers, "save_torch", stop)
    source = sources.read_folder(images, 2, 0)
    with pytest.raises(KeyboardInterrupt):
        organizers.make_contest(source, Path("out"), Shape(2, 2, 2, 8), 0)
    assert sorted(p.name for p in Path().iterdir()) == ["images"]


def test_the_stage_ends_a_mistake_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rehearse", "make", "--source", "none", "--out", "x"])
    with pytest.raises(SystemExit) as end:
        runs.stage(rehearse.main)
    assert str(end.value.code).startswith("error: none is no folder; an image folder, cifar10")
