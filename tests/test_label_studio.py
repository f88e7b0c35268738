"""A label request answered with Label Studio: what it imports, and everything its export may be."""

import csv
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline import InputError, config, label_studio, request_report
from pipeline.manifest import load_contest, read_manifest
from stages import import_labels, label_request
from tests.conftest import ROOT
from tests.fake_run import label, parsed, start, write_finetune

NAMES = ["ant", "bee", "cat", "dog"]
REQUEST = "runs/entry/label_request/request_00.csv"
PROJECT = Path("runs/entry/label_request/label-studio")
ASKED = [9, 2, 30, 17]
MADE = Path("data_manifests/small")


@pytest.fixture
def here(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for picture in ("_contact_sheet", "_map", "_classes"):  # which test_label_request looks at
        monkeypatch.setattr(request_report, picture, lambda *_: None)
    return here


@pytest.fixture
def asked(here: Path) -> Path:
    """A request in the annotators' hands, in an order of its own."""
    path = here / REQUEST
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{n}.png,\n" for n in ASKED))
    return path


def ask(*argv: str, **options: Any) -> list[int]:
    """Run label_request for 8 labels; the images of its request."""
    start(label_request, "--label_request.budget", "8", *argv, **options)
    return [int(row.removesuffix(".png,")) for row in Path(REQUEST).read_text().splitlines()]


def tasks() -> list[dict[str, Any]]:
    return json.loads((PROJECT / "tasks.json").read_text())  # type: ignore[no-any-return]


def test_a_task_shows_the_image_and_the_guess(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_finetune()
    indices = ask("--label_request.strategy", "MarginClusters", format="label-studio")
    with (PROJECT.parent / "picks.csv").open() as file:
        picks = list(csv.DictReader(file))
    assert [task["data"]["index"] for task in tasks()] == indices
    for task, pick in zip(tasks(), picks, strict=True):
        n, (prediction,) = int(pick["index"]), task["predictions"]
        (result,) = prediction["result"]
        assert task["data"]["image"] == f"/data/local-files/?d=images/{n}.png"
        assert result["value"] == {"choices": [NAMES[int(pick["class"])]]}
        assert prediction["score"] == pytest.approx(float(pick["confidence"]), abs=1e-4)
        with Image.open(PROJECT / "images" / f"{n}.png") as image:
            np.testing.assert_array_equal(image, np.load("data/small/unlabeled.npy")[n])
    assert len({p["class"] for p in picks}) > 1
    view = ElementTree.parse(PROJECT / "config.xml").getroot()
    choices = view.find("Choices")
    assert choices is not None
    assert [choice.get("value") for choice in choices] == NAMES
    assert (result["from_name"], result["to_name"]) == (choices.get("name"), choices.get("toName"))
    assert view.find("Image").attrib == {"name": choices.get("toName"), "value": "$image"}  # type: ignore[union-attr]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith(
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
        f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={(here / PROJECT).resolve()} label-studio start"
    )


def test_without_a_guess_nothing_is_filled_in(here: Path) -> None:
    request = here / REQUEST
    request.parent.mkdir(parents=True)
    rows = ["index,cluster,class,confidence,margin,nearest_labeled", "9,0,2,0.7500,,-0.25"]
    request.with_name("picks.csv").write_text("\n".join([*rows, "2,0,,0.0000,,"]) + "\n")
    label_studio.write_project(request, load_contest("small"), np.array([9, 2, 30]))
    guessed, *others = tasks()
    assert guessed["predictions"][0]["result"][0]["value"] == {"choices": ["cat"]}
    assert guessed["predictions"][0]["score"] == 0.75
    assert [task["data"]["index"] for task in others] == [2, 30]
    assert not any("predictions" in task for task in others)


@pytest.mark.parametrize(
    "names",
    [["<b>", 'say "a" & b', "it's", "Käfer", "a\nb"], [f"class {n}" for n in range(800)]],
    ids=["escaped", "many"],
)
def test_the_config_has_every_class_as_it_is(names: list[str]) -> None:
    view = ElementTree.fromstring(label_studio.labeling_config(names))
    choices, search = view.find("Choices"), view.find("Filter")
    assert choices is not None
    assert search is not None
    assert [choice.get("value") for choice in choices] == names
    assert (choices.get("choice"), choices.get("required")) == ("single", "true")
    assert (search.get("toName"), search.get("minlength")) == (choices.get("name"), "0")


def test_classes_without_names_are_numbers(asked: Path) -> None:
    file = MADE / "contest.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"class_names": None}))
    assert load_contest("small").names == ["0", "1", "2", "3"]
    manifest = read_manifest(imported([task(9, "3"), task(2, "0")]))
    assert manifest.label.tolist() == [0, 3]


def test_the_files_of_a_request_that_was_made(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are written without choosing anew; those of a request that was changed are not."""
    indices = ask()
    assert not PROJECT.exists()
    with monkeypatch.context() as patched:
        patched.setattr(label_request, "choose", None)
        assert ask(format="label-studio") == indices
        assert [task["data"]["index"] for task in tasks()] == indices
        assert "is up to date" in capsys.readouterr().out
        Path(REQUEST).write_text("".join(f"{n}.png,\n" for n in reversed(indices)))
        with pytest.raises(InputError, match="was changed since label-request wrote it"):
            ask(format="label-studio")


def test_another_request_leaves_no_tasks_but_the_numbers_of_the_first(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ask(format="label-studio")
    (PROJECT / "disagreements.csv").touch()
    (PROJECT / "export.json").touch()
    with pytest.raises(InputError, match="has no answer yet, and would be another request by now"):
        ask("--seed", "1", format="label-studio")
    assert [task["data"]["index"] for task in tasks()] == first
    second = ask("--seed", "1", force=True)
    kept = ["config.xml", "earlier.csv", "export.json", "images"]
    assert sorted(p.name for p in PROJECT.iterdir()) == kept
    assert ask("--seed", "1", format="label-studio") == second
    assert [task["data"]["index"] for task in tasks()] == second
    assert {p.stem for p in (PROJECT / "images").iterdir()} == {str(n) for n in first + second}
    assert label_studio.earlier_tasks(Path(REQUEST)).tolist() == sorted(first)
    third = ask("--seed", "2", force=True)
    assert label_studio.earlier_tasks(Path(REQUEST)).tolist() == sorted({*first, *second})
    now, (late, disputed) = third[0], [n for n in first if n not in third][:2]
    export = [task(late, "bee"), task(disputed, "ant", "bee"), task(now, "ant")]
    found = read_manifest(imported(export))  # also what was asked for before
    assert "7 of the 8 images asked for have no label yet" in capsys.readouterr().out
    expected = sorted([(late, 1), (now, 0)])
    assert list(zip(found.index.tolist(), found.label.tolist(), strict=True)) == expected


def test_late_answers_have_the_marks_of_their_own_request(here: Path) -> None:
    """Of what is imported together, all of who chose any of it."""
    first = ask(format="label-studio")
    made = Path(REQUEST).with_name("request.json")
    made.write_text(json.dumps(json.loads(made.read_text()) | {"transfer": True}))
    second = ask("--seed", "1", force=True, format="label-studio")
    assert "transfer" not in json.loads(made.read_text())
    made.write_text(json.dumps(json.loads(made.read_text()) | {"by_val": True}))
    third = ask("--seed", "2", force=True, format="label-studio")
    late = next(n for n in first if n not in second and n not in third)
    later = next(n for n in second if n not in first and n not in third)
    now = next(n for n in third if n not in first and n not in second)
    assert not imported([task(now, "ant")]).with_suffix(".json").is_file()
    marks = imported([task(now, "ant"), task(late, "bee")]).with_suffix(".json")
    assert json.loads(marks.read_text()) == {"transfer": True}
    marks = imported([task(late, "bee"), task(later, "bee")]).with_suffix(".json")
    assert json.loads(marks.read_text()) == {"by_val": True}


def test_a_format_is_known() -> None:
    argv = ["--data.contest", "small", "--format", "labelbox"]
    with pytest.raises(
        InputError, match=r"format is labelbox; one of 'contest', 'label-studio' is"
    ):
        config.parse("", label_request.Options, argv=argv)
    command = ["make", "-n", "label-request", "RECIPE=recipes/demo.yaml", "FORMAT=label-studio"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert '--format "label-studio"' in done.stdout


def annotation(*choices: str, by: Any = 1, cancelled: bool = False) -> dict[str, Any]:
    """An annotation as Label Studio exports it."""
    found = {"from_name": "label", "to_name": "image", "type": "choices"}
    result = [found | {"value": {"choices": list(choices)}}] if choices else []
    return {"completed_by": by, "result": result, "was_cancelled": cancelled}


def task(index: int, *labels: str, more: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """A task of an export as JSON, with an annotation for each label."""
    annotations = [*(annotation(name, by=k) for k, name in enumerate(labels, 1)), *more]
    data = {"image": f"/data/local-files/?d=images/{index}.png", "index": index}
    return {"id": 100 + index, "data": data, "annotations": annotations, "drafts": []}


def least(index: int, value: Any = None, by: Any = 1) -> dict[str, Any]:
    """An item of an export as JSON-MIN: one annotation."""
    item: dict[str, Any] = {
        "image": f"/data/local-files/?d=images/{index}.png",
        "index": index,
        "id": 100 + index,
    }
    if value is not None:
        item["label"] = value
    return item | {"annotator": by, "annotation_id": 7, "lead_time": 1.5}


def imported(export: Any, name: str = "export.json") -> Path:
    """Import this export."""
    Path(name).write_text(export if isinstance(export, str) else json.dumps(export))
    return import_labels.run(parsed().recipe, Path(name))


WHOLE = {
    "JSON": [task(9, "bee"), task(2, "ant"), task(30, "dog"), task(17, "cat")],
    "JSON-MIN": [least(30, "dog"), least(17, "cat"), least(9, "bee"), least(2, "ant")],
    "several that agree": [task(30, "dog", "dog"), task(17, "cat"), task(9, "bee"), task(2, "ant")],
    "imported twice": [
        task(9, "bee"),
        task(9, "bee"),
        *map(task, [2, 30, 17], ["ant", "dog", "cat"]),
    ],
    "min, that agree": [least(30, "dog", by=b) for b in (1, "b@c.d")]
    + [least(17, {"choices": ["cat"]}), least(9, ["bee"]), least(2, "ant")],
}


@pytest.mark.parametrize("form", WHOLE)
def test_every_form_of_an_export_is_read(
    asked: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    out = imported(WHOLE[form])
    manifest = read_manifest(out)
    assert manifest.index.tolist() == [2, 9, 17, 30]
    assert manifest.label.tolist() == [0, 1, 2, 3]
    assert set(manifest.split) == {"unlabeled"}
    assert all(source.startswith("export.json ") for source in manifest.source)
    said = capsys.readouterr().out.splitlines()
    assert said == ["4 labels of 4 of the 4 classes", f"wrote {out}; next: make finetune"]
    assert not PROJECT.exists()


@pytest.mark.parametrize(
    "export",
    [
        [task(9, "bee"), task(2, "ant")],
        [task(30), task(9, "bee"), task(17, more=(annotation(),)), task(2, "ant")],
        [
            task(9, "bee", more=(annotation("cat", cancelled=True),)),
            task(2, "ant"),
            task(30, more=(annotation("dog", cancelled=True),)),
        ],
        [task(9, "bee"), task(2, "ant"), task(17) | {"drafts": [annotation("cat")]}],
        [least(9, "bee"), least(2, "ant"), least(17), least(30, [])],
    ],
    ids=["left out", "empty", "skipped", "draft", "min"],
)
def test_half_an_answer_is_imported_and_says_what_is_missing(
    asked: Path, capsys: pytest.CaptureFixture[str], export: list[Any]
) -> None:
    manifest = read_manifest(imported(export))
    assert manifest.index.tolist() == [2, 9]
    assert manifest.label.tolist() == [0, 1]
    assert capsys.readouterr().out.splitlines()[:2] == [
        "2 of the 4 images asked for have no label yet: 30.png, 17.png; import a later export when "
        "they have",
        "2 labels of 2 of the 4 classes",
    ]


@pytest.mark.parametrize(
    "export",
    [
        [
            task(9, "bee", "cat", "bee"),
            task(2, "ant"),
            task(30, more=(annotation("ant", by={"id": 4, "email": "b@c.d"}), annotation("dog"))),
            task(17),
        ],
        [
            *(least(9, name, by=k) for k, name in enumerate(["bee", "cat", "bee"], 1)),
            *(least(2, "ant"), least(30, "ant", by="b@c.d"), least(30, "dog")),
        ],
    ],
    ids=["JSON", "JSON-MIN"],
)
def test_annotators_who_disagree_are_reported(
    asked: Path, capsys: pytest.CaptureFixture[str], export: list[Any]
) -> None:
    manifest = read_manifest(imported(export))
    assert (manifest.index.tolist(), manifest.label.tolist()) == ([2], [0])
    file = PROJECT / "disagreements.csv"
    assert capsys.readouterr().out.splitlines()[:2] == [
        "annotators disagree on 2 images, which are left out: 9.png (bee or cat), 30.png (ant or "
        f"dog); all in {file}",
        "1 of the 4 images asked for have no label yet: 17.png; import a later export when they "
        "have",
    ]
    assert file.read_text().splitlines() == [
        "index,class,name,annotator",
        *("9,1,bee,1", "9,1,bee,3", "9,2,cat,2"),
        *("30,0,ant,b@c.d", "30,3,dog,1"),
    ]


def test_later_exports_add_what_is_new(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = imported([task(9, "bee"), task(2, "ant", "bee")])
    before = first.read_bytes()
    assert (PROJECT / "disagreements.csv").is_file()
    second = imported([task(9, "bee"), task(2, "ant"), task(17, "cat")], "later.json")
    assert not (PROJECT / "disagreements.csv").exists()
    assert second == MADE / "requested-2.csv"
    assert read_manifest(second).index.tolist() == [2, 17]
    assert read_manifest(second).label.tolist() == [0, 2]
    assert first.read_bytes() == before
    said = capsys.readouterr().out
    assert "1 of the 4 images asked for have no label yet: 30.png;" in said
    assert imported([task(9, "bee"), task(2, "ant")], "less.json") == second
    said = capsys.readouterr().out
    assert "every label in less.json was imported before; next: make finetune" in said
    assert imported([task(9, "bee"), task(2, "ant")], "less.json") == second
    assert imported([task(9, "bee"), task(2, "ant", "bee")]) == first
    assert f"export.json was imported before, as {first}" in capsys.readouterr().out
    assert imported([task(30, "dog"), task(2, "ant", "cat")], "last.json").stem == "requested-3"
    said = capsys.readouterr().out
    assert "on 1 images, which are left out (1 as imported before): 2" in said
    assert "no label yet" not in said  # those that this export leaves out were imported before
    assert sorted(p.name for p in MADE.glob("requested-*")) == [
        f"requested-{k}.csv" for k in (1, 2, 3)
    ]


def test_a_project_may_hold_several_requests(
    asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tasks of a second one are imported beside those of the first, and so exported."""
    first = [task(9, "bee"), task(2, "ant"), task(30, "dog"), task(17, "cat")]
    imported(first)
    asked.write_text("1.png,\n4.png,\n")
    capsys.readouterr()
    second = imported([*first, task(4, "bee"), task(1)], "later.json")
    found = read_manifest(second)
    assert (found.index.tolist(), found.label.tolist()) == ([4], [1])
    said = capsys.readouterr().out
    assert "1 of the 2 images asked for have no label yet: 1.png;" in said
    with pytest.raises(InputError, match=r"differ from those imported before: 'cat', and 'bee' in"):
        imported([task(9, "cat"), task(1, "ant")], "changed.json")
    with pytest.raises(InputError, match=r"item 1 is 3.png; .* does not ask for it"):
        imported([task(3, "cat"), task(1, "ant")], "changed.json")


def test_choices_of_other_names_are_not_the_label(asked: Path) -> None:
    """A project may ask for more than config.xml."""
    more = task(9, "bee")
    other = {"from_name": "quality", "to_name": "image", "type": "choices"}
    more["annotations"][0]["result"].insert(0, other | {"value": {"choices": ["blurred"]}})
    assert read_manifest(imported([more])).label.tolist() == [1]
    assert read_manifest(imported([least(2, "ant") | {"quality": "blurred"}])).label.tolist() == [0]


def test_a_label_that_has_changed_is_refused(asked: Path) -> None:
    first = imported([task(9, "bee"), task(2, "ant")])
    with pytest.raises(InputError) as error:
        imported([task(9, "cat"), task(2, "bee"), task(17, "cat")], "later.json")
    assert str(error.value) == (
        f"later.json: 2 of its labels, 9.png's first, differ from those imported before: 'cat', "
        f"and 'bee' in {first}; the same is expected (delete {first} to replace it)"
    )
    assert not (MADE / "requested-2.csv").exists()


def test_a_request_answered_in_part_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    indices = ask(format="label-studio")
    imported([task(n, "bee") for n in indices[:3]])
    with pytest.raises(InputError) as error:
        ask()
    assert str(error.value) == (
        f"{REQUEST} still lacks 5 of its 8 labels, and would be another request by now; import "
        f"them, or replace it with --force"
    )
    shutil.rmtree(PROJECT)
    assert ask(format="label-studio") == indices
    assert [task["data"]["index"] for task in tasks()] == indices
    assert "request_00.csv still lacks 5 of its 8 labels" in capsys.readouterr().out
    imported([task(n, "bee") for n in indices], "later.json")
    assert ask() == indices
    said = capsys.readouterr().out.splitlines()[-1]
    both = f"{MADE}/requested-1.csv, {MADE}/requested-2.csv"
    assert said.startswith(f"{REQUEST} was answered by {both} (--force asks for other images)")
    assert not set(ask(force=True)) & set(indices)


FORMATS = "Label Studio's export as JSON or JSON-MIN is expected"
GIVEN = [{"id": 1, "data": {"image": "a.png"}, "annotations": []}]
BAD: dict[str, tuple[Any, str]] = {
    "broken": (
        '[{"id": 1,',
        ": no JSON file (Expecting property name enclosed in double quotes: line 1 column 11 "
        f"(char 10)); {FORMATS}",
    ),
    "empty": ("", f": no JSON file (Expecting value: line 1 column 1 (char 0)); {FORMATS}"),
    "COCO": ({"images": [], "annotations": []}, f" holds no list of tasks; {FORMATS}"),
    "texts": (["9.png"], f": item 1 has no annotations; {FORMATS}"),
    "another tool": ([{"file": "9.png", "label": 1}], f": item 1 has no annotations; {FORMATS}"),
    "the tasks": (
        [{"data": {"index": 9}, "predictions": [annotation("ant")]}],
        f": item 1 has no annotations; {FORMATS}",
    ),
    "another project": (
        GIVEN,
        ": item 1 has no index; an export of the tasks of tasks.json is expected",
    ),
    "data": (
        [{"data": [9], "annotations": []}],
        ": item 1 has no index; an export of the tasks of tasks.json is expected",
    ),
    "true": (
        [least(9, "bee") | {"index": True}],
        ": item 1 has no index; an export of the tasks of tasks.json is expected",
    ),
    "not asked": (
        [task(9, "bee"), task(3, "ant")],
        f": item 2 is 3.png; {REQUEST} does not ask for it",
    ),
    "not asked, min": ([least(10**20)], f": item 1 is {10**20}.png; {REQUEST} does not ask for it"),
    "no class": (
        [task(2, "ant"), task(9, "cow")],
        ": item 2 (9.png) is labeled 'cow'; one of the 4 classes of config.xml is expected",
    ),
    "no class, min": (
        [least(9, "1")],
        ": item 1 (9.png) is labeled '1'; one of the 4 classes of config.xml is expected",
    ),
    "two classes": (
        [task(9, more=(annotation("ant", "bee"),))],
        ": item 1 (9.png) is labeled 'ant' and 'bee'; one class is expected, as config.xml asks "
        "for it",
    ),
    "two classes, min": (
        [least(9, {"choices": ["ant", "bee"]})],
        ": item 1 (9.png) is labeled 'ant' and 'bee'; one class is expected, as config.xml asks "
        "for it",
    ),
    "annotations": (
        [task(9) | {"annotations": 3}],
        f": item 1 (9.png) has an annotation without choices; {FORMATS}",
    ),
    "boxes": (
        [task(9) | {"annotations": [{"result": [{"type": "choices", "value": {"x": 1}}]}]}],
        f": item 1 (9.png) has an annotation without choices; {FORMATS}",
    ),
    "numbers": ([least(9, 1)], f": item 1 (9.png) has an annotation without choices; {FORMATS}"),
    "text": (
        [task(9, more=({"result": [{"type": "choices", "value": {"choices": "bee"}}]},))],
        f": item 1 (9.png) has an annotation without choices; {FORMATS}",
    ),
    "nothing": (
        [],
        f" has no label to import: of the 4 images that {REQUEST} asks for 4 have none, and "
        "annotators disagree on 0",
    ),
    "no agreement": (
        [task(9, "ant", "bee"), task(2)],
        f" has no label to import: of the 4 images that {REQUEST} asks for 3 have none, and "
        "annotators disagree on 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_export_is_refused(asked: Path, case: str) -> None:
    export, message = BAD[case]
    with pytest.raises(InputError) as error:
        imported(export)
    assert str(error.value) == f"export.json{message}"
    assert not list(MADE.glob("requested-*"))


TOKEN = "0123456789abcdef0123456789abcdef01234567"
"""Of the one user of a server that lives as long as its test."""
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CACHED = Path(tempfile.gettempdir()) / "label-studio-venv"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """label-studio in an environment of its own: the one kept in /tmp, or a new one."""
    folder = tmp_path / "venv"
    if (CACHED / "bin" / "label-studio").is_file() and CACHED.stat().st_uid == os.getuid():
        folder = CACHED
    else:
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "label-studio==1.23.2"]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"label-studio cannot be installed: {done.stderr.strip()[-200:]}")
    return folder / "bin" / "label-studio"


class Server:
    """The API of a Label Studio server on loopback."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def call(self, path: str, body: Any = None) -> bytes:
        """What a GET answers, or with a body a POST."""
        headers = {"Authorization": f"Token {TOKEN}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with LOOPBACK.open(request, timeout=120) as answer:
                return answer.read()  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error} {error.read()[:2000]!r}") from None

    def json(self, path: str, body: Any = None) -> Any:
        return json.loads(self.call(path, body))


@pytest.fixture
def server(program: Path, here: Path) -> Iterator[Server]:
    """A server that serves the files of `PROJECT`, as the request's last line says to start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(program), "start", "--no-browser", "--internal-host", "127.0.0.1"]
    command += ["--port", str(port), "--data-dir", str(here / "server"), "--log-level", "ERROR"]
    command += ["--username", "a@localhost.org", "--password", "annotates", "--user-token", TOKEN]
    environment = os.environ | {
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str((here / PROJECT).resolve()),
        "HOME": str(here),
        **dict.fromkeys(("COLLECT_ANALYTICS", "LATEST_VERSION_CHECK"), "false"),
        **dict.fromkeys(("SENTRY_DSN", "FRONTEND_SENTRY_DSN"), ""),
    }
    log = here / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--enable-legacy-api-token"], env=environment, stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 900
        while True:
            try:
                LOOPBACK.open(f"http://127.0.0.1:{port}/health", timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        yield Server(port)
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(2400)  # the installation may take long
def test_a_real_label_studio_is_asked_and_answers(
    here: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Import, look at an image and a guess, annotate, export in both formats, import here; then
    the rest.
    """
    write_finetune()
    indices = ask(format="label-studio")
    config_xml = (PROJECT / "config.xml").read_text()
    project = server.json("/api/projects/", {"title": "request", "label_config": config_xml})["id"]
    images = str((here / PROJECT / "images").resolve())
    server.json(
        "/api/storages/localfiles", {"project": project, "path": images, "use_blob_urls": True}
    )
    made = server.json(f"/api/projects/{project}/import", tasks())
    assert (made["task_count"], made["prediction_count"]) == (8, 8)

    listed = server.json(f"/api/tasks?project={project}&fields=all")["tasks"]
    of = {t["data"]["index"]: t for t in listed}
    assert sorted(of) == indices
    guesses = dict(zip(indices, tasks(), strict=True))
    for n in indices:
        shown = server.call(of[n]["data"]["image"])
        assert shown == (PROJECT / "images" / f"{n}.png").read_bytes()
        (prediction,) = server.json(f"/api/tasks/{of[n]['id']}")["predictions"]
        (ours,) = guesses[n]["predictions"]
        assert prediction["score"] == pytest.approx(ours["score"])
        (value,) = (r["value"] for r in prediction["result"])
        assert value == ours["result"][0]["value"]

    facts = server.json(f"/api/projects/{project}/")
    assert (facts["show_collab_predictions"], facts["model_version"]) == (True, "few-labels")
    first = server.json(f"/api/projects/{project}/next")  # as the annotator's page loads it
    assert first["predictions"][0]["result"][0]["value"]["choices"][0] in NAMES

    def annotate(index: int, name: str, **facts: Any) -> None:
        body = {"result": annotation(name)["result"], "lead_time": 1.0} | facts
        server.json(f"/api/tasks/{of[index]['id']}/annotations/", body)

    def export(name: str, form: str, *, every: str = "false") -> Path:
        query = f"exportType={form}&download_all_tasks={every}"
        Path(name).write_bytes(server.call(f"/api/projects/{project}/export?{query}"))
        return Path(name)

    truth = {n: label("unlabeled", n) for n in indices}
    person = {"email": "b@localhost.org", "username": "b", "first_name": "B", "last_name": "B"}
    second = server.json("/api/users/", person)["id"]
    for n in indices[:3]:
        annotate(n, NAMES[truth[n]])
    annotate(indices[3], "ant")
    annotate(indices[3], "bee", completed_by=second)
    annotate(indices[4], "cat", was_cancelled=True)
    results = []
    for form in ("JSON_MIN", "JSON"):
        for every in ("true", "false"):
            file = export("export.json", form, every=every)
            manifest = import_labels.run(parsed().recipe, file)
            found = read_manifest(manifest)
            results.append((found.index.tolist(), found.label.tolist()))
            said = capsys.readouterr().out
            n = f"{indices[3]}.png"
            assert f"disagree on 1 images, which are left out: {n} (ant or bee)" in said
            assert "4 of the 8 images asked for have no label yet: " in said
            with (PROJECT / "disagreements.csv").open() as rows:
                by = {row["name"]: row["annotator"] for row in csv.DictReader(rows)}
            assert by["bee"] == str(second)
            assert by["ant"] != by["bee"]
            if (form, every) != ("JSON", "false"):
                manifest.unlink()
    assert results == [(indices[:3], [truth[n] for n in indices[:3]])] * 4

    for n in indices[4:]:
        annotate(n, NAMES[truth[n]])
    found = read_manifest(import_labels.run(parsed().recipe, export("later.json", "JSON")))
    assert found.index.tolist() == indices[4:]
    assert found.label.tolist() == [truth[n] for n in indices[4:]]
    assert "have no label yet" not in capsys.readouterr().out
