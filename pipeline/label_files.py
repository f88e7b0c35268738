"""The label files that a fine-tuning learns from, and what their records say about them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import InputError, runs
from pipeline.classifiers import MARKS
from pipeline.draws import learned_labels
from pipeline.labeling import labeled_images
from pipeline.manifest import Contest, Manifest

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.training_recipe import Finetune


def label_files(recipe: "Recipe", contest: Contest) -> list[Path]:
    """The label files that the recipe names, as they are now; InputError where one is missing."""
    files: list[Path] = []
    for name in recipe.finetune.manifests:
        if name == "requested":
            files += runs.numbered(contest.folder, "requested")
        elif name == "pseudo":
            files += (newest := runs.numbered(runs.entry_folder(recipe.entry), "pseudo")[-1:])
            for file in newest:
                runs.require(file.with_suffix(".json"), "make pseudo-label")
        elif name == "train":
            files.append(runs.require(contest.folder / "train.csv", "make data"))
        else:
            files.append(Path(name))
            if not files[-1].is_file():
                raise InputError(
                    f"finetune: {name} is not there; among manifests train, requested, pseudo and "
                    f"CSV files of split,index,label are expected"
                )
    return files


def check_pseudo_labels(labels: Path, contest: Contest, encoder: Path | None) -> None:
    """Raise InputError where pseudo-labels are of other images, or those of a classifier that began
    at another state of the `encoder`.
    """
    record = labels.with_suffix(".json")
    if "classifier" not in (guessed := _record(labels)):
        return
    anew = f"to begin anew, remove the pseudo-* and finetune-* of {labels.parent}"
    contest.check_same(labels, record, anew)
    if encoder is None:
        return
    latest = Path(guessed["classifier"])
    if not (file := latest / "provenance.json").is_file():
        return  # removed since
    made = runs.read_json(file, "make finetune")["inputs"]
    if made.get(str(encoder), (now := runs.sha256(encoder))) != now:
        raise InputError(
            f"{labels} was labeled by {latest}, which began at another {encoder}; {anew}"
        )


def learned_before(files: list[Path], encoder: Path | None) -> Manifest:
    """Images whose labels the encoder, or who gave the pseudo-labels among `files`, learned."""
    learned = [learned_labels(encoder.parents[1])] if encoder else []
    for file in files:
        guesser = _record(file).get("classifier")
        if guesser and Path(guesser, "trained_on.csv").is_file():  # or removed since
            learned.append(labeled_images(Path(guesser)))
    return Manifest.concatenate([Manifest.of("", []), *learned])


def marks_of(c: "Finetune", train: Manifest, files: list[Path]) -> dict[str, bool]:
    """`classifiers.MARKS` of this fine-tuning, of who gave the pseudo-labels among `files`, or of
    who chose the requested ones.
    """
    own = c.init == "outside", c.monitor == "val" or bool((train.split == "val").any())
    of_files = [_record(file) for file in files]
    return {m: o or any(r.get(m) for r in of_files) for m, o in zip(MARKS, own, strict=True)}


def _record(labels: Path) -> dict[str, Any]:
    """The record of a file of pseudo-labels or of requested ones; of any other file nothing."""
    record = labels.with_suffix(".json")
    if not labels.name.startswith(("pseudo-", "requested-")) or not record.is_file():
        return {}
    return dict(runs.read_json(record, "make pseudo-label"))
