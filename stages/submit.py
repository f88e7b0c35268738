"""Write the submission of the latest fine-tuned classifier, checked as the organizers check it.

python -m stages.submit --recipe recipes/demo.yaml
Reads runs/ENTRY/finetune-K, the contest's val images and data/CONTEST/TEST.npy; writes
submissions/ENTRY/{submission.py, model.pth, predictions.csv, card.json}, the card last.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline import InputError, config, ensembles, runs, submission
from pipeline.checkpoint import load_tensors
from pipeline.classifiers import MARKS
from pipeline.manifest import Contest, load_contest
from pipeline.recipe import Recipe
from pipeline.selection import unlabeled_logits


def _made_with(plain: dict[str, Any], entry: str, tuned: dict[str, Any]) -> dict[str, Any]:
    """The recipe that the weights were made with, whatever its other sections say by now."""
    made: dict[str, Any] = plain | tuned["recipe"] | {"pretrain": None}
    for name in map(Path, tuned["inputs"]):  # the labels that it was trained on
        if name.name.startswith("pseudo-") and name.with_suffix(".json").is_file():
            record = runs.read_json(name.with_suffix(".json"), "make pseudo-label")
            made["pseudo_label"] = record["recipe"]["pseudo_label"]
        request = runs.entry_folder(entry) / "label_request" / "request.json"
        if name.name.startswith("requested-") and request.is_file():
            record = runs.read_json(request, "make label-request")
            made["label_request"] = {k: record.get(k) for k in plain["label_request"]}
    if made["finetune"]["init"] == "pretrained":
        file = runs.entry_folder(entry) / "pretrain" / "provenance.json"
        ours = runs.read_json(file, "make pretrain")["recipe"]
        made |= {"encoder": ours["encoder"], "pretrain": {"seed": ours["seed"]} | ours["pretrain"]}
    return made


def _test_split(recipe: Recipe, contest: Contest) -> str | None:
    split = recipe.submit.test or ("test" if "test" in contest.splits else None)
    if split is not None and split not in contest.splits:
        raise InputError(
            f"submit: test is {split!r}; one of the contest's splits is expected: "
            f"{', '.join(contest.splits)}"
        )
    return split


def _newer(contest: Contest, finetune: Path, tuned: dict[str, Any]) -> str:
    """What is newer than a fine-tuning, in words; nothing where it is the newest."""
    entry, last = finetune.parent, runs.finetune_folders(finetune.parent)[-1]
    if last != finetune:
        return f"{last} is newer, but unfinished"
    if tuned["results"]["round"] >= runs.label_rounds(contest.folder, entry):
        return ""
    files = runs.numbered(contest.folder, "requested") + runs.numbered(entry, "pseudo")
    unknown = " and ".join(str(file) for file in files if str(file) not in tuned["inputs"])
    return f"{unknown} came after it; `make finetune` learns from what came"


def run(recipe: Recipe, plain: dict[str, Any], force: bool = False) -> Path:
    """Write, check and publish the submission; where a check fails the old one is kept."""
    contest, entry = load_contest(recipe.data.contest), recipe.entry
    k = recipe.submit.round
    finetune = runs.latest_finetune(entry) if k is None else runs.finetune_folder(entry, k)
    weights = contest.finished(finetune, "make finetune") / submission.WEIGHTS
    others = [ensembles.member_folder(contest, name) for name in recipe.submit.members]
    tuned = runs.read_json(finetune / "provenance.json", "make finetune")
    made, folder = _made_with(plain, entry, tuned), runs.submission_folder(entry)
    inputs = [contest.folder / "contest.json", weights, finetune / "trained_on.csv"]
    inputs += [folder_ / submission.WEIGHTS for folder_ in others]
    sections = [name for name in made if name != "seed"]
    facts = runs.Run.of(folder, made, sections, inputs).facts
    if k is None and (newer := _newer(contest, finetune, tuned)):
        runs.say(f"{finetune} is submitted, but {newer}")
    if submission.is_current(folder, facts) and not force:
        runs.say(f"{folder} is up to date (--force runs it anew)")
        return folder
    test = _test_split(recipe, contest)
    choice = ensembles.choose(contest, [finetune, *others], recipe.submit.mirror)
    if test == "unlabeled" and choice.plain:
        unlabeled_logits(choice.members[0])
    for what, score in choice.tried.items():
        runs.say(f"{score:6.2f} % of the held-out labels: {what}")
    folder.parent.mkdir(exist_ok=True)
    for left in folder.parent.glob(f".{entry}.*"):  # by a run that was killed
        if "." not in left.name.removeprefix(f".{entry}."):  # another entry's may have a dot more
            shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f".{entry}.", dir=folder.parent) as temporary:
        aside = Path(temporary)
        submission.write_program(aside, choice, contest.size, recipe.submit)
        runs.say("scoring the submission in a fresh process, as the organizers do")
        checked = submission.check(aside, contest, choice)
        unread = submission.write_predictions(aside, choice, contest, test) if test else 0
        card = _card(contest, entry, choice, checked)
        card["predictions"] = {"split": test, "unreadable": unread} if test else None
        submission.publish(aside, folder, card | facts | runs.stamp())
    runs.say(f"{checked.split} top-1 as the organizers score it: {checked.score:.2f} %")
    runs.say(f"wrote {folder}; next: send its submission.py and model.pth to the organizers")
    return folder


def _card(
    contest: Contest, entry: str, choice: ensembles.Choice, checked: submission.Check
) -> dict[str, Any]:
    """What card.json says of the models: how they are scored, and what they were made of."""
    labels = submission.label_counts(choice.members)
    used = [load_tensors(m / submission.WEIGHTS)[1] for m in choice.members]
    transfer, by_val = (any(meta.get(mark) for meta in used) for mark in MARKS)
    of = [runs.read_json(m / "provenance.json", "make finetune") for m in choice.members]
    return {
        "entry": entry,
        "val_top1": checked.score if checked.split == "val" else None,
        "checked": checked._asdict(),
        "notes": submission.notes(contest, transfer, by_val, labels),
        "transfer": transfer,
        "rehearsal": contest.rehearsal,
        "labels": labels,
        "models": {
            "folders": [str(member) for member in choice.members],
            "weights": choice.weights,
            "mirror": choice.mirror,
            "held_out_top1": choice.tried,
        },
        "finetune": [
            {"folder": str(member), "commit": made["commit"], "inputs": made["inputs"]}
            | made["results"]
            for member, made in zip(choice.members, of, strict=True)
        ],
    }


def main() -> None:
    recipe, options, plain = config.parse(__doc__, config.Force)
    run(recipe, plain, options.force)


if __name__ == "__main__":
    runs.stage(main)
