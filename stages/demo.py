"""Make a small contest, enter it with every stage, score the entry as the organizers do.

python -m stages.demo [--source FOLDER] [--options of recipes/demo.yaml]
SOURCE is an image folder (train/CLASS/*, val/CLASS/*); without it the images are generated.  Writes
rehearsals/NAME, data_manifests/NAME, data/NAME, runs/NAME and submissions/NAME, each begun anew.
The last line is one JSON object: top-1 on val in percent at each step, and the minutes it took.
"""

import json
import re
import shlex
import shutil
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import InputError, config, organizers, runs
from pipeline.encoders import build_encoder, features
from pipeline.inference import predict
from pipeline.manifest import Contest, load_contest
from pipeline.metrics import knn_accuracy
from pipeline.packed import Pool
from stages import (
    embed,
    evaluate,
    finetune,
    import_labels,
    label_request,
    prepare,
    pretrain,
    pseudo_label,
    rehearse,
    submit,
)

RECIPE = Path("recipes/demo.yaml")
SYNTHETIC = "--classes 16 --per-class 8 --val-per-class 60 --max-unlabeled-per-class 240"
REAL = "--per-class 32 --val-per-class 50 --max-unlabeled-per-class 400"
# Rate and crops: as good as any of seven tried on a contest of another seed
SCRATCH = "--finetune.init scratch --finetune.optimizer.lr 0.4 --finetune.view.crop_scale [0.5,1.0]"
WORDS = {
    "raw_pixel_knn": "kNN on raw pixels",
    "random_encoder_knn": "kNN on a random encoder",
    "from_scratch": "supervised from scratch, the same fine-tuning",
    "pretrained_knn": "kNN on the pretrained encoder",
    "pretrained_linear": "linear classifier on the pretrained encoder",
    "finetuned": "fine-tuned",
    "with_pseudo_labels": "with pseudo-labels",
    "with_requested_labels": "with requested labels",
    "organisers_score": "the submission, as the organizers score it",
}


class Demo:
    """The entry NAME of a contest of its own: calls stages and tells the command of each."""

    def __init__(self, name: str, recipe: Path, options: list[str]) -> None:
        self.name, self.file, self.options = name, recipe, options

    def call(self, stage: Any, *more: str, entry: str | None = None) -> Any:
        """Run a stage as its command would."""
        words = ["--recipe", str(self.file), "--entry", entry or self.name]
        words += ["--data.contest", self.name, *self.options, *more]
        name = stage.__name__.removeprefix("stages.")
        runs.say(f"\n$ python -m stages.{name} {shlex.join(words)}")
        recipe, _, plain = config.parse(stage.__doc__, argv=words)
        return stage.run(recipe, plain)

    def top1(self, folder: Path) -> float:
        return float(
            runs.read_json(folder / "provenance.json", "make finetune")["results"]["val_top1"]
        )


def _pixels(contest: Contest, split: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Raw pixels [n, d] of unit length, averaged to a third of the side, gray level taken out."""
    rows, labels = contest.usable(split), contest.labels(split)
    images = torch.from_numpy(contest.packed(split)[rows]).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(images, scale_factor=1 / 3, mode="area").flatten(1)
    x = torch.nn.functional.normalize(x - x.mean(1, keepdim=True))
    return x.numpy(), labels[rows]


def _random_encoder(
    demo: Demo, contest: Contest, split: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Embeddings [n, d] of an encoder with its initial weights."""
    recipe, _, _ = config.parse("", argv=["--recipe", str(demo.file), *demo.options])
    torch.manual_seed(recipe.seed)
    encoder = build_encoder(recipe.encoder.name, recipe.encoder.stem, **recipe.encoder.options)
    rows, labels = contest.usable(split), contest.labels(split)
    x = np.empty((len(rows), features(encoder)), np.float32)
    size, pool = recipe.pretrain.resolutions[-1], Pool([(contest.packed(split), rows)])
    predict(encoder, pool, size, contest.mean, contest.std, x, unit=True, what="random encoder")
    return x, labels[rows]


def _make_contest(a: Namespace, name: str) -> Path:
    for parent in ("data_manifests", "data", "runs", "submissions", "rehearsals"):
        for folder in (name, f"{name}-scratch"):
            shutil.rmtree(Path(parent) / folder, ignore_errors=True)
    root = Path("rehearsals") / name
    words = ["make", "--source", a.source or "synthetic", "--out", str(root)]
    words += (REAL if a.source else SYNTHETIC).split()
    runs.say(f"$ python -m stages.rehearse {shlex.join(words)}")
    if a.source:
        runs.say("at most 400 unlabeled images of each class are taken, to stay within the time")
    rehearse.make(rehearse.parse(words))
    return root


def run(a: Namespace, options: list[str]) -> dict[str, float]:
    """Every stage, in order; the scores."""
    name = f"demo-{Path(a.source).resolve().name}" if a.source else "demo"
    name = re.sub(r"[^\w.-]", "-", name)
    recipe, _, _ = config.parse("", argv=["--recipe", str(RECIPE), *options])
    if 20 not in recipe.evaluate.k:  # before the last demo is removed
        raise InputError(f"demo: evaluate.k is {recipe.evaluate.k}; 20 among them is expected")
    root, scores = _make_contest(a, name), dict[str, float]()
    oracle = root.with_name(f"{name}.oracle.pt")
    demo = Demo(name, RECIPE, ["--data.rehearsal", "true", *options])
    demo.call(prepare, "--data.root", str(root))
    contest = load_contest(name)
    budget = len(contest.usable("train")) // 2
    demo.options += ["--label_request.budget", str(budget)]
    scores["raw_pixel_knn"] = knn_accuracy(*_pixels(contest, "train"), *_pixels(contest, "val"), 20)
    known, queries = (_random_encoder(demo, contest, s) for s in ("train", "val"))
    scores["random_encoder_knn"] = knn_accuracy(*known, *queries, 20)
    scores["from_scratch"] = demo.top1(
        demo.call(finetune, *SCRATCH.split(), entry=f"{name}-scratch")
    )
    for stage in (pretrain, embed, evaluate):
        demo.call(stage)
    found = runs.read_json(Path("runs") / name / "evaluate" / "scores.json", "make evaluate")[
        "scores"
    ]
    scores["pretrained_knn"] = found["knn_20_majority"]["1"]
    scores["pretrained_linear"] = found["linear"]["1"]
    scores["finetuned"] = demo.top1(demo.call(finetune))
    demo.call(pseudo_label)
    scores["with_pseudo_labels"] = demo.top1(demo.call(finetune))
    demo.call(label_request)
    request = next((Path("runs") / name / "label_request").glob("request_*.csv"))
    answer = root.with_name(f"{name}.label.pt")
    runs.say(f"\n$ python -m stages.rehearse answer {request} {oracle} {budget} {answer}")
    rehearse.answer(rehearse.parse(["answer", str(request), str(oracle), str(budget), str(answer)]))
    words = ["--recipe", str(demo.file), "--entry", name, "--data.contest", name]
    recipe, _, _ = config.parse("", argv=words)
    runs.say(f"\n$ python -m stages.import_labels {shlex.join([*words, '--answer', str(answer)])}")
    import_labels.run(recipe, answer)
    # made before the answer came, the pseudo-labels are not used beside it
    labels = ("--finetune.manifests", "[train,requested]")
    scores["with_requested_labels"] = demo.top1(demo.call(finetune, *labels))
    folder = demo.call(submit)
    runs.say(f"\n$ python -m stages.rehearse score {folder} {root}")
    scores["organisers_score"] = float(organizers.score(folder, root, "val")["accuracy"])
    return scores


def main() -> None:
    began = time.monotonic()
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--source", help="an image folder; none generates images")
    arguments, options = parser.parse_known_args()
    if arguments.source and not Path(arguments.source).is_dir():
        raise InputError(
            f"{arguments.source} is no folder; train/CLASS/* and val/CLASS/* are expected"
        )
    scores = run(arguments, options)
    print(f"\n{'top-1 on val':50}     %")
    for key, score in scores.items():
        print(f"{WORDS[key]:50} {score:5.1f}")
    minutes = round((time.monotonic() - began) / 60, 2)
    print(json.dumps({k: round(v, 2) for k, v in scores.items()} | {"minutes": minutes}))


if __name__ == "__main__":
    runs.stage(main)
