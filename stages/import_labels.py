"""Import the organizers' answer to a label request.

python -m stages.import_labels --recipe recipes/demo.yaml --answer label_00.pt
Reads the answer (an int64 tensor in the request's order, or a CSV of N.png,label) and
runs/ENTRY/label_request/request_NN.csv; writes data_manifests/CONTEST/requested-K.csv.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import InputError, config, runs
from pipeline.answers import read_answer, read_request
from pipeline.manifest import Manifest, load_contest, read_manifest, write_manifest
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Options:
    answer: Path | None = field(
        default=None, metadata={"help": "The organizers' label_NN.pt, or a CSV of N.png,label."}
    )
    request: Path | None = field(
        default=None, metadata={"help": "The request that it answers; the entry's, if not given."}
    )


def run(recipe: Recipe, answer: Path, request: Path | None = None) -> Path:
    """Import the labels in `answer`, unless they were before; the manifest that holds them."""
    contest, entry = load_contest(recipe.data.contest), runs.entry_folder(recipe.entry or "entry")
    if not answer.is_file():
        raise InputError(
            f"{answer} is not there; the organizers' answer to the request is expected"
        )
    folder, digest = contest.folder, runs.sha256(answer)[:16]
    earlier = {file: read_manifest(file) for file in runs.numbered(folder, "requested")}
    for file, manifest in earlier.items():
        if len(manifest) and str(manifest.source[0]).endswith(digest):
            runs.say(f"{answer} was imported before, as {file}; next: make finetune")
            return file
    request = request or entry / "label_request" / f"request_{recipe.label_request.team}.csv"
    runs.require(request, "make label-request")
    indices = read_request(request, contest.images("unlabeled"))
    _check_request(request, indices)
    labels = read_answer(answer, request, indices, contest.classes)
    for file, manifest in earlier.items():
        both = indices[np.isin(indices, manifest.index[manifest.split == "unlabeled"])]
        if len(both):
            raise InputError(
                f"{answer}: {len(both):,} of its images, {both[0]}.png first, are labeled in "
                f"{file}; labels of other images are expected (delete {file} to replace it)"
            )
    number = 1 + max((int(file.stem.split("-")[1]) for file in earlier), default=0)
    out, order = folder / f"requested-{number}.csv", np.argsort(indices)
    manifest = Manifest.of(
        "unlabeled", indices[order], labels[order], source=f"{answer.name} {digest}"
    )
    write_manifest(out, manifest)
    classes = len(np.unique(labels))
    runs.say(f"{len(labels):,} labels of {classes:,} of the {contest.classes:,} classes")
    runs.say(f"wrote {out}; next: make finetune")
    return out


def _check_request(request: Path, indices: npt.NDArray[np.int64]) -> None:
    """Raise InputError where a request is not the one that label-request wrote there."""
    made = request.with_name("request.json")
    if not made.is_file():
        return
    facts = runs.read_json(made, "make label-request")
    digest = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
    if facts["file"] == request.name and facts["indices_sha256"] != digest:
        raise InputError(
            f"{request} was changed since label-request wrote it; the answer's order would be "
            f"another one (`make label-request ARGS=--force` asks anew)"
        )


def main() -> None:
    recipe, options, _ = config.parse(__doc__, Options)
    if options.answer is None:
        raise InputError("import-labels: --answer FILE is expected, the organizers' label_NN.pt")
    run(recipe, options.answer, options.request)


if __name__ == "__main__":
    runs.stage(main)
