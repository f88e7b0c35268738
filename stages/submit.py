"""Write the submission of the latest fine-tuned classifier, checked as the organizers check it.

python -m stages.submit --recipe recipes/demo.yaml
Reads runs/ENTRY/finetune-K, the contest's val images and data/CONTEST/TEST.npy; writes
submissions/ENTRY/{submission.py, model.pth, predictions.csv, card.json}, the card last.
"""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline import InputError, config, runs, submission
from pipeline.classifiers import load_classifier
from pipeline.config import Recipe
from pipeline.inference import predict_split
from pipeline.manifest import Contest, load_contest


@dataclass(frozen=True)
class Options:
    round: int | None = field(
        default=None, metadata={"help": "K of the finetune-K to submit; the latest by default."}
    )
    force: bool = field(
        default=False, metadata={"help": "Write it anew even where nothing has changed."}
    )


def run(
    recipe: Recipe, plain: dict[str, Any], force: bool = False, round_: int | None = None
) -> Path:
    """Write, check and publish the submission; its folder.  InputError where the check fails."""
    contest, entry = load_contest(recipe.data.contest), recipe.entry or "entry"
    latest = round_ is None
    finetune = runs.latest_finetune(entry) if latest else runs.finetune_folder(entry, round_ or 0)
    weights = runs.require(finetune / "classifier.safetensors", "make finetune")
    folder, test = runs.submission_folder(entry), _test_split(recipe, contest)
    inputs = [contest.file, weights, finetune / "trained_on.csv"]
    facts = runs.Run.of(folder, _made_with(plain, finetune), _SECTIONS, inputs).facts
    if submission.is_current(folder, facts) and not force:
        runs.say(f"{folder} is up to date (--force runs it anew)")
        return folder
    folder.parent.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix=f".{entry}.", dir=folder.parent) as made:
        aside = Path(made)
        submission.write_program(aside, weights, contest.size, recipe.submit)
        runs.say("scoring the submission in a fresh process, as the organizers do …")
        checked = submission.check(aside, contest, finetune / "logits")
        if test is not None:
            _predict(aside, weights, contest, test)
        stated = {"entry": entry, "finetune": str(finetune)} | submission.statement(
            checked, contest, finetune, recipe.finetune.monitor == "val"
        )
        submission.publish(aside, folder, stated | facts | runs.stamp())
    runs.say(f"{checked.split} top-1 as the organizers score it: {checked.score:.2f} %")
    runs.say(f"wrote {folder}; next: send {folder}/submission.py and model.pth to the organizers")
    return folder
