"""A label request as a project of Label Studio, and the export of what was annotated there.

Files and formats: https://labelstud.io/guide/tasks (tasks), /guide/storage (images served from a
local folder) and /guide/export (JSON and JSON-MIN).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline import InputError
from pipeline.classifiers import MARKS
from pipeline.manifest import Contest
from pipeline.progress import progress
from pipeline.runs import read_json, replacing, write_json
from pipeline.tables import Column, read_table, write_table

Ints = npt.NDArray[np.int64]

_CHOICE, _IMAGE = "label", "image"  # names of the two tags of the labeling config
_MODEL = "few-labels"  # the version that Label Studio shows beside a prediction
_EXPECTED = "Label Studio's export as JSON or JSON-MIN is expected"


def project_folder(request: Path) -> Path:
    """The folder of Label Studio's files beside the request that they are made from."""
    return request.parent / "label-studio"


def disagreements_file(request: Path) -> Path:
    """Where an import lists the images that annotators label differently."""
    return project_folder(request) / "disagreements.csv"


def write_project(request: Path, contest: Contest, indices: Ints) -> Path:
    """Write images/N.png, config.xml and, last, tasks.json of the images [n] that `request` asks
    for; the folder that holds them, Label Studio's document root.

    Guessed classes and their probabilities are those of picks.csv beside the request.
    """
    folder, names = project_folder(request), contest.names
    most = contest.classes - 1
    columns = {
        "index": Column(np.int64, required=True),
        "class": Column(np.int64, most=most, empty=-1, required=True),
        "confidence": Column(np.float32, most=1, empty=0, required=True),
    } | {name: Column(np.object_) for name in ("cluster", "margin", "nearest_labeled")}
    picks = read_table(request.with_name("picks.csv"), columns)
    found = zip(picks["class"].tolist(), picks["confidence"].tolist(), strict=True)
    guesses = dict(zip(picks["index"].tolist(), found, strict=True))
    every = np.union1d(indices, earlier_tasks(request))
    _write_images(folder / "images", contest.packed("unlabeled"), every)
    with replacing(folder / "config.xml") as aside:
        aside.write_text(labeling_config(names), encoding="utf-8")
    tasks = [_task(n, names, *guesses.get(n, (-1, 0.0))) for n in indices.tolist()]
    write_json(folder / "tasks.json", tasks)
    return folder


def forget_project(request: Path) -> None:
    """A request that is replaced leaves no disagreements, and of its tasks the images' numbers and
    the marks of who chose them (`classifiers.MARKS`) in earlier.csv: people may go on with them.
    """
    tasks, made = project_folder(request) / "tasks.json", request.with_name("request.json")
    if tasks.is_file():
        facts = read_json(made, "make label-request") if made.is_file() else {}
        marks, every = {mark for mark in MARKS if facts.get(mark)}, _earlier(request)
        for task in read_json(tasks, "make label-request"):
            every[task["data"]["index"]] = every.get(task["data"]["index"], set()) | marks
        rows = ([index, " ".join(sorted(every[index]))] for index in sorted(every))
        write_table(_earlier_file(request), ["index", "marks"], rows)
        tasks.unlink()
    disagreements_file(request).unlink(missing_ok=True)


def _earlier_file(request: Path) -> Path:
    return project_folder(request) / "earlier.csv"


def _earlier(request: Path) -> dict[int, set[str]]:
    """The marks of each image that requests asked for which this one replaced."""
    if not _earlier_file(request).is_file():
        return {}
    columns = {
        "index": Column(np.int64, required=True),
        "marks": Column(np.object_, required=True),
    }
    table = read_table(_earlier_file(request), columns)
    marks = map(str.split, table["marks"].tolist())
    return dict(zip(table["index"].tolist(), map(set, marks), strict=True))


def earlier_tasks(request: Path) -> Ints:
    """The images [n] of the tasks of requests that this one replaced, sorted."""
    return np.array(sorted(_earlier(request)), np.int64)


def earlier_marks(request: Path, indices: Ints) -> set[str]:
    """The marks of who chose any of the images `indices`, in requests that this one replaced."""
    earlier = _earlier(request)
    return set[str]().union(*(earlier.get(index, set()) for index in indices.tolist()))


def labeling_config(names: Sequence[str]) -> str:
    """One choice of the classes for an image; a search field narrows many classes down."""
    choices = "".join(f"    <Choice value={quoteattr(name)}/>\n" for name in names)
    return (
        f'<View>\n  <Image name="{_IMAGE}" value="$image"/>\n'
        f'  <Filter name="filter" toName="{_CHOICE}" minlength="0" placeholder="Find a class"/>\n'
        f'  <Choices name="{_CHOICE}" toName="{_IMAGE}" choice="single" required="true"'
        f' showInline="true">\n{choices}  </Choices>\n</View>\n'
    )


def _task(index: int, names: Sequence[str], label: int, confidence: float) -> dict[str, Any]:
    """An image as Label Studio imports it; without a prediction where the guess is -1."""
    task: dict[str, Any] = {
        "data": {"image": f"/data/local-files/?d=images/{index}.png", "index": index}
    }
    if label >= 0:
        guess = {"from_name": _CHOICE, "to_name": _IMAGE, "type": "choices"}
        result = [guess | {"value": {"choices": [names[label]]}}]
        score = round(confidence, 4)
        task["predictions"] = [{"model_version": _MODEL, "score": score, "result": result}]
    return task


def _write_images(folder: Path, images: npt.NDArray[np.uint8], indices: Ints) -> None:
    """Write images[index] as folder/INDEX.png, and remove all others."""
    wanted = {folder / f"{index}.png": index for index in indices.tolist()}
    for old in set(folder.glob("*.png")) - set(wanted):
        old.unlink()
    with progress("images", len(wanted), "images") as advance:
        for file, index in wanted.items():
            with replacing(file) as aside:
                Image.fromarray(images[index]).save(aside, format="PNG")
            advance()


class Vote(NamedTuple):
    """What one annotation says of an image."""

    label: int
    annotator: str


@dataclass(frozen=True)
class Export:
    """What annotators say of the images [n] of a request, in its order.

    `labels` [n] are -1 where an image has no annotation, only skipped ones, or several that
    differ; `disputed` has the last kind, by image.
    """

    labels: Ints
    disputed: dict[int, list[Vote]]


def read_export(path: Path, request: Path, indices: Ints, names: Sequence[str]) -> Export:
    """What the export `path` says of the images `indices` [n] that the file `request` asks for.

    Raises InputError, naming file, item (from 1) and image, where it is no export of Label Studio,
    or labels an image that is not asked for or with anything but one of the class `names`.
    """
    place = {int(index): n for n, index in enumerate(indices)}
    classes = {name: label for label, name in enumerate(names)}
    votes: dict[int, list[Vote]] = {}
    for number, item in enumerate(_items(path), 1):
        where = f"{path}: item {number}"
        index, annotations = _annotations(where, item)
        if index not in place:
            raise InputError(f"{where} is {index}.png; {request} does not ask for it")
        for choices, annotator in annotations:
            given = f"{where} ({index}.png) is labeled {' and '.join(map(repr, choices))}"
            if len(choices) > 1:
                raise InputError(f"{given}; one class is expected, as config.xml asks for it")
            if choices and choices[0] not in classes:
                raise InputError(
                    f"{given}; one of the {len(names):,} classes of config.xml is expected"
                )
            for choice in choices:
                votes.setdefault(index, []).append(Vote(classes[choice], annotator))
    labels = np.full(len(indices), -1, np.int64)
    disputed = {}
    for index, cast in sorted(votes.items()):
        if len({vote.label for vote in cast}) > 1:
            disputed[index] = sorted(cast)  # the formats have orders of their own
        else:
            labels[place[index]] = cast[0].label
    return Export(labels, disputed)


def write_disagreements(path: Path, export: Export, names: Sequence[str]) -> None:
    """A row for each annotation of an image that is disputed; no file where none is."""
    if not export.disputed:
        path.unlink(missing_ok=True)
        return
    disputed = ((index, v) for index, votes in export.disputed.items() for v in votes)
    rows = ([index, v.label, names[v.label], v.annotator] for index, v in disputed)
    write_table(path, ["index", "class", "name", "annotator"], rows)


def _items(path: Path) -> list[Any]:
    """The list in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no JSON file ({error}); {_EXPECTED}") from None
    if not isinstance(value, list):
        raise InputError(f"{path} holds no list of tasks; {_EXPECTED}")
    return value


def _annotations(where: str, item: Any) -> tuple[int, list[tuple[list[str], str]]]:
    """The image that an item is about, and the choices and the annotator of each annotation of it
    that was not skipped: in JSON an item is a task, in JSON-MIN one annotation.
    """
    if not isinstance(item, dict) or not {"annotations", "annotation_id"} & set(item):
        raise InputError(f"{where} has no annotations; {_EXPECTED}")
    data = item.get("data") if "annotations" in item else item
    index = data.get("index") if isinstance(data, dict) else None
    if not isinstance(index, int) or isinstance(index, bool):
        raise InputError(f"{where} has no index; an export of the tasks of tasks.json is expected")
    try:
        found = list(_of_task(item) if "annotations" in item else _of_annotation(item))
    except (AttributeError, KeyError, TypeError):
        raise InputError(
            f"{where} ({index}.png) has an annotation without choices; {_EXPECTED}"
        ) from None
    return index, found


def _of_task(item: dict[str, Any]) -> Iterator[tuple[list[str], str]]:
    for annotation in item["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        results = [
            r
            for r in annotation["result"] or []
            if r["type"] == "choices" and r.get("from_name", _CHOICE) == _CHOICE
        ]
        choices = [choice for r in results for choice in _texts(r["value"]["choices"])]
        yield choices, _annotator(annotation.get("completed_by"))


def _of_annotation(item: dict[str, Any]) -> Iterator[tuple[list[str], str]]:
    value = item.get(_CHOICE, [])
    choices = [value] if isinstance(value, str) else value
    choices = choices["choices"] if isinstance(choices, dict) else choices
    yield _texts(choices), _annotator(item.get("annotator"))


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("choices are a list of texts")
    return values


def _annotator(who: Any) -> str:
    """Who annotated: the number of a user, or the address where the export has it."""
    return str(who.get("email", who.get("id", "")) if isinstance(who, dict) else who)
