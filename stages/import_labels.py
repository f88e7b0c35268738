"""Import the answer to a label request: the organizers', or an export of Label Studio.

python -m stages.import_labels --recipe recipes/demo.yaml --answer label_00.pt
Reads the answer (an int64 tensor in the request's order, a CSV of N.png,label, or Label Studio's
JSON or JSON-MIN, also of a request half answered) and runs/ENTRY/label_request/request_NN.csv;
writes data_manifests/CONTEST/requested-K.csv (and .json, where outside weights or labels of val
chose what was asked for), and label-studio/disagreements.csv beside the request where annotators
disagree.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import InputError, config, label_studio, runs
from pipeline.answers import check_request, read_answer, read_request, shown
from pipeline.classifiers import MARKS
from pipeline.manifest import Contest, Manifest, load_contest, read_manifest, write_manifest
from pipeline.recipe import Recipe

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    answer: Path | None = field(
        default=None,
        metadata={
            "help": "The organizers' label_NN.pt, a CSV of N.png,label, or Label Studio's .json."
        },
    )
    request: Path | None = field(
        default=None, metadata={"help": "The request that it answers; the entry's, if not given."}
    )


def run(recipe: Recipe, answer: Path, request: Path | None = None) -> Path:
    """Import the labels in `answer`, unless they were before; the manifest that holds them."""
    contest, entry = load_contest(recipe.data.contest), runs.entry_folder(recipe.entry)
    if not answer.is_file():
        raise InputError(
            f"{answer} is not there; the organizers' answer to the request is expected"
        )
    folder, digest = contest.folder, runs.sha256(answer)[:16]
    earlier = {file: read_manifest(file) for file in runs.numbered(folder, "requested")}
    request = request or entry / "label_request" / f"request_{recipe.label_request.team}.csv"
    same: Path | None = None
    for file, manifest in earlier.items():
        if len(manifest) and str(manifest.source[0]).endswith(digest):
            same = file
            if answer.suffix.lower() in (".pt", ".pth") and request.is_file():
                _check_images(answer, request, contest, file, manifest)
            if not _asks_for_more(request, contest, manifest, earlier):
                return _imported_before(answer, file)
    of_teams = sorted(request.parent.glob("request_*.csv"))
    if of_teams and not request.is_file():
        raise InputError(
            f"{request} is not there; to import an answer to {of_teams[0]}, name it as --request"
        )
    runs.require(request, "make label-request")
    indices = read_request(request, contest.images("unlabeled"))
    check_request(request, indices, contest)
    is_export, asked = answer.suffix.lower() == ".json", indices
    if is_export:  # of a project that may hold the tasks of earlier requests, too
        before = [m.index[(m.split == "unlabeled") & (m.label >= 0)] for m in earlier.values()]
        others = np.concatenate([label_studio.earlier_tasks(request), *before])
        indices = np.concatenate([indices, np.setdiff1d(others, indices)])
    known, of_file = _known(contest, indices, earlier)
    if is_export:
        export = label_studio.read_export(answer, request, indices, contest.names)
        _check_same(answer, indices, export.labels, known, of_file, contest.names)
        labels = _open_labels(answer, request, len(asked), indices, export, known, contest.names)
    else:
        labels = read_answer(answer, request, indices, contest.classes, known >= 0)
        _check_same(answer, indices, labels, known, of_file, contest.names)
    new = (known < 0) & (labels >= 0)
    if not new.any():
        if same:
            return _imported_before(answer, same)
        runs.say(f"every label in {answer} was imported before; next: make finetune")
        return [file for file, m in earlier.items() if np.isin(indices, m.index).any()][-1]
    indices, labels = indices[new], labels[new]
    number = 1 + max((int(file.stem.split("-")[1]) for file in earlier), default=0)
    out, order = folder / f"requested-{number}.csv", np.argsort(indices)
    manifest = Manifest.of(
        "unlabeled", indices[order], labels[order], source=f"{answer.name} {digest}"
    )
    _write(out, manifest, request, asked)
    classes = len(np.unique(labels))
    runs.say(f"{len(labels):,} labels of {classes:,} of the {contest.classes:,} classes")
    runs.say(f"wrote {out}; next: make finetune")
    return out


def _write(out: Path, manifest: Manifest, request: Path, asked: Ints) -> None:
    """Write requested-K.csv and, where outside weights or labels of val chose, its marks: those of
    the request, which is for the images `asked`, and of earlier ones.
    """
    made, own = request.with_name("request.json"), np.isin(manifest.index, asked)
    facts = runs.read_json(made, "make label-request") if made.is_file() else {}
    facts = facts if facts.get("file") == request.name and own.any() else {}
    late = label_studio.earlier_marks(request, manifest.index[~own])
    out.with_suffix(".json").unlink(missing_ok=True)
    if marks := {mark: True for mark in MARKS if facts.get(mark) or mark in late}:
        runs.write_json(out.with_suffix(".json"), marks)
    write_manifest(out, manifest)


def _imported_before(answer: Path, file: Path) -> Path:
    runs.say(f"{answer} was imported before, as {file}; next: make finetune")
    return file


def _asks_for_more(
    request: Path, contest: Contest, manifest: Manifest, earlier: dict[Path, Manifest]
) -> bool:
    """Whether a request asks for the images of `manifest`, and for some without a label yet."""
    if not request.is_file():
        return False
    asked = read_request(request, contest.images("unlabeled"))
    return bool(
        np.isin(manifest.index, asked).all() and (_known(contest, asked, earlier)[0] < 0).any()
    )


def _check_images(
    answer: Path, request: Path, contest: Contest, file: Path, manifest: Manifest
) -> None:
    """Raise InputError where an answer that names no images, and was imported as `file`, may be one
    to another request with just the same labels.
    """
    if not np.isin(manifest.index, read_request(request, contest.images("unlabeled"))).all():
        raise InputError(
            f"{answer} was imported before, as {file}, but {request} asks for other images; its "
            f"own answer is expected (if the labels are the same, as a CSV of N.png,label)"
        )


def _known(
    contest: Contest, indices: Ints, earlier: dict[Path, Manifest]
) -> tuple[Ints, list[Path | None]]:
    """The labels [n] that earlier answers gave the images `indices` [n] (-1: none), and where."""
    label = np.full(contest.images("unlabeled"), -1, np.int64)
    number, files = label.copy(), [*earlier]
    for k, manifest in enumerate(earlier.values()):
        of = (manifest.split == "unlabeled") & (manifest.label >= 0)
        label[manifest.index[of]], number[manifest.index[of]] = manifest.label[of], k
    return label[indices], [files[k] if k >= 0 else None for k in number[indices]]


def _check_same(
    answer: Path,
    indices: Ints,
    labels: Ints,
    known: Ints,
    of_file: list[Path | None],
    names: list[str],
) -> None:
    """Raise InputError where an earlier answer gave another label."""
    differs = (known >= 0) & (labels >= 0) & (known != labels)
    if differs.any():
        k = int(differs.argmax())
        raise InputError(
            f"{answer}: {differs.sum():,} of its labels, {indices[k]}.png's first, differ from "
            f"those imported before: {names[labels[k]]!r}, and {names[known[k]]!r} in "
            f"{of_file[k]}; the same is expected (delete {of_file[k]} to replace it)"
        )


def _open_labels(
    answer: Path,
    request: Path,
    asked: int,
    indices: Ints,
    export: label_studio.Export,
    known: Ints,
    names: list[str],
) -> Ints:
    """The labels [n] in an export of Label Studio, -1 where it has none, of the `asked` images that
    `request` asks for, which come first, and of earlier ones.

    Says what is missing and what annotators disagree on.  Raises InputError where there is no
    label at all.
    """
    open_ = (export.labels < 0) & (known < 0) & (np.arange(len(indices)) < asked)
    disputed = np.isin(indices, list(export.disputed))
    label_studio.write_disagreements(label_studio.disagreements_file(request), export, names)
    if disputed.any():
        _say_disputed(request, export, names, int((disputed & (known >= 0)).sum()))
    missing = indices[open_ & ~disputed]
    if not (export.labels >= 0).any():
        raise InputError(
            f"{answer} has no label to import: of the {asked:,} images that {request} asks for "
            f"{len(missing):,} have none, and annotators disagree on {disputed.sum():,}"
        )
    if len(missing):
        runs.say(
            f"{len(missing):,} of the {asked:,} images asked for have no label yet: "
            f"{shown(missing)}; import a later export when they have"
        )
    return export.labels


def _say_disputed(request: Path, export: label_studio.Export, names: list[str], known: int) -> None:
    """The first few images that annotators disagree on, and their answers."""
    first = [
        f"{n}.png ({' or '.join(dict.fromkeys(names[vote.label] for vote in votes))})"
        for n, votes in list(export.disputed.items())[:3]
    ]
    more = ", …" if len(export.disputed) > len(first) else ""
    kept = f" ({known:,} as imported before)" if known else ""
    runs.say(
        f"annotators disagree on {len(export.disputed):,} images, which are left out{kept}: "
        f"{', '.join(first)}{more}; all in {label_studio.disagreements_file(request)}"
    )


def main() -> None:
    recipe, options, _ = config.parse(__doc__, Options)
    if options.answer is None:
        raise InputError(
            "import-labels: --answer FILE is expected, the organizers' label_NN.pt or Label "
            "Studio's export.json"
        )
    run(recipe, options.answer, options.request)


if __name__ == "__main__":
    runs.stage(main)
