"""Compare who predicts pseudo-labels on a rehearsal: precision at equal coverage, by true labels.

python -m stages.compare_pseudo_labels --recipe recipes/labels98.yaml
Reads runs/ENTRY/embeddings, the logits of the fine-tunings without a request in
docs/requests/ENTRY.json as `make compare-requests` leaves them (of the latest finetune-K where
there are none), and the rehearsal's OUT.oracle.pt; writes docs/requests/ENTRY-pseudo.json and a
table in docs/labels.md.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import InputError, comparison, config, labeling, runs
from pipeline.machine import processor
from pipeline.manifest import Contest, load_contest
from pipeline.propagation import Propagation
from pipeline.pseudo_labels import Predictor, Softmax
from stages.compare_requests import FLOOR

REQUESTS = Path("docs/requests")
COVERAGES = (25, 50)  # percent of the images, the surest ones
PREDICTORS: dict[str, Predictor] = {
    "arg-max": Softmax(),
    "graph": Propagation(),
    "graph, classes not balanced": Propagation(balanced=False),
    "graph and classifier": Propagation(alpha=0.5, prior=1.0, certainty="largest"),
    "graph of predictions and classifier": Propagation(
        20, alpha=0.5, prior=1.0, space="predictions", certainty="largest"
    ),
}


def run(argv: list[str]) -> None:
    """Every predictor with the classifier of every seed."""
    recipe, _, _ = config.parse("", argv=argv)
    contest, entry = load_contest(recipe.data.contest), runs.entry_folder(recipe.entry)
    truth = labeling.true_labels(contest)
    if truth is None:
        raise InputError(f"{contest.oracle} is not there; a rehearsal's true labels are expected")
    records = []
    for folder in _classifiers(contest, entry):
        for name, predictor in PREDICTORS.items():
            precision = _precision(contest, entry, folder, truth, predictor)
            records.append({"predictor": name, "classifier": str(folder), **precision})
            words = ", ".join(f"{value:.2f} % right of {key}" for key, value in precision.items())
            runs.say(f"{folder}, {name}: {words}")
    command = shlex.join(["python", "-m", "stages.compare_pseudo_labels", *argv])
    done = {"contest": contest.name, "machine": processor(), "command": command}
    file = REQUESTS / f"{entry.name}-pseudo.json"
    runs.write_json(file, done | {"cells": records})
    text = comparison.precision_table(records, "arg-max", done)
    comparison.put(Path("docs/labels.md"), "compare-pseudo-labels", text)
    runs.say(f"wrote {file} and docs/labels.md; next: commit them")


def _classifiers(contest: Contest, entry: Path) -> list[Path]:
    """The fine-tunings without a request in the table of `make compare-requests`; the latest one
    where there are none.
    """
    file, found = REQUESTS / f"{entry.name}.json", list[Path]()
    for cell in runs.read_json(file, "make compare-requests")["cells"] if file.is_file() else []:
        folder = entry / "requests" / f"{FLOOR}-s{cell['seed']}"
        if cell["strategy"] == FLOOR and (folder / "logits" / "unlabeled.npy").is_file():
            contest.finished(folder, "make compare-requests")
            made = runs.read_json(folder / "provenance.json", "make compare-requests")["results"]
            if made["val_top1"] == cell["val_top1"]:  # not of a comparison that was begun since
                found.append(folder)
    return found or [contest.finished(runs.latest_finetune(entry.name), "make finetune")]


def _precision(
    contest: Contest, entry: Path, folder: Path, truth: Any, predictor: Predictor
) -> dict[str, float]:
    """Percent of right labels among the surest images, for each coverage."""
    known = labeling.labeled_images(folder)
    images = labeling.unlabeled_images(contest, known)
    none = images.take(np.arange(0))
    evidence, _ = labeling.evidence_of(contest, entry, folder, images, none, known, predictor)
    labels, sure = predictor(evidence)
    right = (labels == truth[images.index])[np.argsort(-sure, kind="stable")]
    count = {coverage: round(coverage / 100 * len(right)) for coverage in COVERAGES}
    return {f"{c} %": 100 * float(right[:n].mean()) for c, n in count.items()}


def main() -> None:
    config.parse(__doc__)
    run(sys.argv[1:])


if __name__ == "__main__":
    runs.stage(main)
