"""The import-labels stage: every form of request and answer, and every mistake in them."""

import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import InputError, runs
from pipeline.manifest import read_manifest
from stages import import_labels
from tests.fake_run import (
    parsed,
)


def answer(path: str, **options: Any) -> Path:
    return import_labels.run(parsed().recipe, Path(path), **options)


REQUEST = "runs/entry/label_request/request_00.csv"
ASKED, LABELS = [9, 2, 30, 17], [1, 0, 3, 2]


@pytest.fixture
def asked(here: Path) -> Path:
    """A request in the organizers' hands, in an order of its own."""
    path = here / REQUEST
    path.parent.mkdir(parents=True)
    path.write_text("9.png,\n2.png,\n30.png,\n17.png,\n")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "9.png,\n2.png,\n30.png,\n17.png",
        "9.png\n2.png\n30.png\n17.png\n",
        "9\n2\n30\n17\n",
        "9,\r\n2.png,\r\n\r\n30\r\n 17.png\r\n",
        "\ufeff9.png,\n2.png,\n30.png,\n17.png,\n",
    ],
)
def test_every_form_of_a_request_is_read(asked: Path, text: str) -> None:
    asked.write_text(text, newline="", encoding="utf-8")
    torch.save(torch.tensor(LABELS), "label_00.pt")
    manifest = read_manifest(answer("label_00.pt"))
    assert manifest.index.tolist() == [2, 9, 17, 30]
    assert manifest.label.tolist() == [0, 1, 2, 3]
    assert set(manifest.split) == {"unlabeled"}
    assert all(source.startswith("label_00.pt ") for source in manifest.source)


@pytest.mark.parametrize(
    "text",
    [
        "9.png,1\n2.png,0\n30.png,3\n17.png,2\n",
        "id,label\n17.png,2\n2.png,0\n9.png,1\n30.png,3",
        "17,2\n30,3\n2,0\n9,1\n",
        "id,label\r\n2, 0\r\n9 ,1\r\n17.png,2\r\n\r\n30,3\r\n",
    ],
)
def test_a_csv_answers_in_any_order(asked: Path, text: str) -> None:
    Path("label_00.csv").write_text(text, newline="")
    manifest = read_manifest(answer("label_00.csv"))
    assert manifest.index.tolist() == [2, 9, 17, 30]
    assert manifest.label.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("of", ["request_00.csv", "request_01.csv"])
def test_an_answer_has_the_marks_of_its_own_request_alone(asked: Path, of: str) -> None:
    digest = hashlib.sha256(np.array(ASKED, "<i8").tobytes()).hexdigest()
    made = {"file": of, "indices_sha256": digest, "transfer": True}
    asked.with_name("request.json").write_text(json.dumps(made))
    torch.save(torch.tensor(LABELS), "label_00.pt")
    marks = answer("label_00.pt").with_suffix(".json")
    assert marks.is_file() == (of == asked.name)
    if marks.is_file():
        assert json.loads(marks.read_text()) == {"transfer": True}


def test_the_manifest_is_plain_text(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.tensor(LABELS), "label_00.pt")
    digest = hashlib.sha256(Path("label_00.pt").read_bytes()).hexdigest()[:16]
    out = answer("label_00.pt")
    assert out == Path("data_manifests/small/requested-1.csv")
    expected = ["split,index,label,source"]
    expected += [
        f"unlabeled,{n},{k},label_00.pt {digest}" for n, k in ((2, 0), (9, 1), (17, 2), (30, 3))
    ]
    assert out.read_text().splitlines() == expected
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out}; next: make finetune"


def tensor(*values: Any, dtype: torch.dtype = torch.int64) -> Callable[[Path], None]:
    return lambda path: torch.save(torch.tensor(values, dtype=dtype), path)


def text(value: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(value) and None


HOLDS = "one int64 tensor in the order of the request is expected"
BAD = {
    "sparse": (
        "a.pt",
        lambda path: torch.save(torch.tensor([1, 0, 3, 2]).to_sparse(), path),
        f"a.pt holds int64 of shape [4]; {HOLDS}",
    ),
    "junk": ("a.pt", text("junk"), "a.pt: damaged, or not a file that torch.save wrote"),
    "hello": ("a.pt", text("hello"), "a.pt: damaged, or not a file that torch.save wrote"),
    "short": ("a.pt", tensor(1, 0, 3), f"a.pt has 3 labels; {REQUEST} asks for 4, one each"),
    "long": ("a.pt", tensor(1, 0, 3, 2, 2), f"a.pt has 5 labels; {REQUEST} asks for 4, one each"),
    "high": ("a.pt", tensor(1, 0, 4, 2), "a.pt: row 3 (30.png) has label 4; 0 to 3 is expected"),
    "low": ("a.pt", tensor(1, -1, 3, 2), "a.pt: row 2 (2.png) has label -1; 0 to 3 is expected"),
    "float": (
        "a.pt",
        tensor(1, 0, 3, 2, dtype=torch.float32),
        f"a.pt holds float32 of shape [4]; {HOLDS}",
    ),
    "int32": (
        "a.pt",
        tensor(1, 0, 3, 2, dtype=torch.int32),
        f"a.pt holds int32 of shape [4]; {HOLDS}",
    ),
    "2-D": ("a.pt", tensor([1, 0], [3, 2]), f"a.pt holds int64 of shape [2, 2]; {HOLDS}"),
    "dict": ("a.pt", lambda p: torch.save({"a": 1}, p), f"a.pt holds a dict; {HOLDS}"),
    "suffix": (
        "a.xml",
        text("[1]"),
        "a.xml: an answer is a .pt file (an int64 tensor), a .csv (N.png,label) or a .json (Label "
        "Studio's export)",
    ),
    "row": (
        "a.csv",
        text("9.png,1\nhello\n"),
        "a.csv: row 2 is 'hello'; 'N.png,LABEL' is expected",
    ),
    "real": (
        "a.csv",
        text("9.png,1.5\n"),
        "a.csv: row 1 is '9.png,1.5'; 'N.png,LABEL' is expected",
    ),
    "not asked": (
        "a.csv",
        text("id,label\n9.png,1\n3.png,0\n"),
        f"a.csv: row 3 labels 3.png; {REQUEST} does not ask for it",
    ),
    "twice": ("a.csv", text("9,1\n2,0\n9,1\n"), "a.csv: rows 1 and 3 both label 9.png"),
    "range": ("a.csv", text("9.png,4\n"), "a.csv: row 1 (9.png) has label 4; 0 to 3 is expected"),
    "missing": (
        "a.csv",
        text("9.png,1\n30.png,3\n"),
        f"a.csv lacks 2 of the 4 labels that {REQUEST} asks for: 2.png, 17.png",
    ),
    "empty": (
        "a.csv",
        text("id,label\n"),
        f"a.csv lacks 4 of the 4 labels that {REQUEST} asks for: 9.png, 2.png, 30.png, …",
    ),
    "binary": (
        "a.csv",
        lambda p: p.write_bytes(b"\xff\xfe\x00"),
        "a.csv: no text file; a row for each image is expected",
    ),
    "absent": (
        "a.pt",
        lambda p: None,
        "a.pt is not there; the organizers' answer to the request is expected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_refused(asked: Path, case: str) -> None:
    name, write, message = BAD[case]
    write(Path(name))
    with pytest.raises(InputError) as error:
        answer(name)
    assert str(error.value) == message
    assert not list(Path("data_manifests/small").glob("requested-*"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("9.png,\nx.png,\n", "row 2 is 'x.png,'; 'N.png,' is expected"),
        ("9.png,1\n", "row 1 is '9.png,1'; 'N.png,' is expected"),
        ("-1\n", "row 1 is '-1'; 'N.png,' is expected"),
        ("9.png,\n\n9\n", "rows 1 and 3 both ask for 9.png"),
        ("9.png,\n60.png\n", "row 2 asks for 60.png; unlabeled images are 0 to 59"),
    ],
)
def test_a_bad_request_is_refused(asked: Path, value: str, message: str) -> None:
    asked.write_text(value)
    torch.save(torch.tensor(LABELS), "label_00.pt")
    with pytest.raises(InputError) as error:
        answer("label_00.pt")
    assert str(error.value) == f"{REQUEST}: {message}"


def test_an_empty_request_is_refused(asked: Path) -> None:
    asked.write_text("\n")
    torch.save(torch.tensor(LABELS), "label_00.pt")
    with pytest.raises(
        InputError, match=r"request_00\.csv asks for nothing; a row 'N.png,' for each"
    ):
        answer("label_00.pt")


def test_without_a_request_there_is_no_answer(here: Path) -> None:
    torch.save(torch.tensor(LABELS), "label_00.pt")
    with pytest.raises(InputError) as error:
        answer("label_00.pt")
    assert str(error.value) == f"{REQUEST} is not there; `make label-request` makes it"


class Malice:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_a_malicious_answer_is_refused_and_nothing_runs(asked: Path, how: str) -> None:
    mark, path = Path.cwd() / "was_run", Path("label_00.pt")
    if how == "pickle":
        path.write_bytes(pickle.dumps(Malice(mark)))
    else:
        torch.save(Malice(mark), path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(InputError, match=r"^label_00\.pt: refused"):
        answer("label_00.pt")
    assert not mark.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists()  # it would have run


def test_the_same_answer_is_imported_once(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.tensor(LABELS), "label_00.pt")
    first = answer("label_00.pt")
    written = first.read_bytes()
    assert answer("label_00.pt") == first
    asked.unlink()  # even where the request is gone
    assert answer("label_00.pt") == first
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"label_00.pt was imported before, as {first}; next: make finetune"
    assert first.read_bytes() == written
    assert runs.numbered(Path("data_manifests/small"), "requested") == [first]


@pytest.mark.parametrize("name", ["label_00.pt", "label_00.pth"])
def test_the_same_labels_for_other_images_are_no_answer_imported_before(
    asked: Path, name: str
) -> None:
    """A tensor names no images: nothing tells whether it is this request's answer."""
    torch.save(torch.tensor(LABELS), name)
    first = answer(name)
    asked.write_text("1.png,\n3.png,\n4.png,\n5.png,\n")
    expected = rf"{name} was imported before, as {first}, but .* asks for other images; its"
    with pytest.raises(InputError, match=expected):
        answer(name)
    rows = zip((1, 3, 4, 5), LABELS, strict=True)
    Path("label.csv").write_text("".join(f"{n}.png,{k}\n" for n, k in rows))
    assert read_manifest(answer("label.csv")).label.tolist() == LABELS


def test_a_second_answer_is_the_next_manifest(asked: Path) -> None:
    torch.save(torch.tensor(LABELS), "label_00.pt")
    answer("label_00.pt")
    Path("other.csv").write_text("1\n3\n")
    Path("answer.csv").write_text("3,0\n1,2\n")
    second = answer("answer.csv", request=Path("other.csv"))
    assert second == Path("data_manifests/small/requested-2.csv")
    assert read_manifest(second).label.tolist() == [2, 0]


def test_an_image_is_labeled_by_one_answer(asked: Path) -> None:
    torch.save(torch.tensor(LABELS), "label_00.pt")
    first = answer("label_00.pt")
    torch.save(torch.tensor(LABELS[::-1]), "label_01.pt")
    with pytest.raises(InputError) as error:
        answer("label_01.pt")
    assert str(error.value) == (
        f"label_01.pt: 4 of its labels, 9.png's first, differ from those imported before: 'cat', "
        f"and 'bee' in {first}; the same is expected (delete {first} to replace it)"
    )


def test_requests_may_share_images(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels that are known already are not asked for, and taken where they are the same."""
    torch.save(torch.tensor(LABELS), "label_00.pt")
    first = answer("label_00.pt")
    Path("other.csv").write_text("5\n2\n9\n1\n")
    Path("some.csv").write_text("5,3\n2,0\n1,1\n")
    second = read_manifest(answer("some.csv", request=Path("other.csv")))
    assert (second.index.tolist(), second.label.tolist()) == ([1, 5], [1, 3])
    torch.save(torch.tensor([3, 0, 1, 1]), "all.pt")
    assert answer("all.pt", request=Path("other.csv")).name == "requested-2.csv"
    said = capsys.readouterr().out
    assert said.endswith("every label in all.pt was imported before; next: make finetune\n")
    Path("wrong.csv").write_text("5,3\n2,2\n1,1\n")
    expected = rf"1 of its labels, 2.png's first, differ .*: 'cat', and 'ant' in {first};"
    with pytest.raises(InputError, match=expected):
        answer("wrong.csv", request=Path("other.csv"))
    assert len(runs.numbered(Path("data_manifests/small"), "requested")) == 2
    first.unlink()  # with it the labels that both had
    Path("whole.csv").write_text("5,3\n2,0\n1,1\n9,1\n")
    third = read_manifest(answer("whole.csv", request=Path("other.csv")))
    assert third.index.tolist() == [2, 9]
    Path("data_manifests/small/requested-3.csv").unlink()
    torch.save(torch.tensor([3, 0, 1, 1]), "again.pt")
    assert read_manifest(answer("again.pt", request=Path("other.csv"))).index.tolist() == [2, 9]
    assert answer("again.pt", request=Path("other.csv")).name == "requested-3.csv"


def test_a_mistake_ends_the_program_with_one_line(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["stage", "--data.contest", "small"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=r"^error: import-labels: --answer FILE is expected"):
        runs.stage(import_labels.main)
    monkeypatch.setattr(sys, "argv", [*argv, "--answer", "no.pt", "--request", REQUEST])
    with pytest.raises(SystemExit, match=r"^error: no\.pt is not there"):
        runs.stage(import_labels.main)
    torch.save(torch.tensor(LABELS), "label_00.pt")
    monkeypatch.setattr(sys, "argv", [*argv, "--answer", "label_00.pt", "--request", REQUEST])
    runs.stage(import_labels.main)
    assert Path("data_manifests/small/requested-1.csv").is_file()
