"""Make a contest out of classified images, and play its organizers.

python -m stages.rehearse make --source SOURCE --out contests/NAME [--per-class 32 …]
    SOURCE: an image folder (train/CLASS/*, val/CLASS/* or test/CLASS/*, or CLASS/* alone), cifar10,
    cifar100, stl10, oxford-iiit-pet, or synthetic.  Writes the contest to OUT, and the labels that
    only the organizers know to OUT.oracle.pt.
python -m stages.rehearse answer REQUEST.csv ORACLE.pt BUDGET OUT.pt
    Answers a label request.
python -m stages.rehearse score SUBMISSION_DIR CONTEST_ROOT [--split val] [--labels FILE]
    Scores a submission in a fresh process and prints its accuracy.
"""

import json
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from pipeline import InputError, organizers, runs, sources
from pipeline.checkpoint import load_torch, save_torch
from pipeline.organizers import Refused, Shape


def make(a: Namespace) -> None:
    """Make a contest."""
    shape = Shape(a.per_class, a.val_per_class, a.max_unlabeled_per_class, a.size)
    if a.source == "synthetic":
        train = a.per_class + min(a.max_unlabeled_per_class, 400)
        source = sources.generate(a.classes, train, a.val_per_class, a.size, a.seed)
    elif sources.is_named(a.source):
        source = sources.download(a.source, a.downloads)
    else:
        source = sources.read_folder(Path(a.source), a.val_per_class, a.seed)
    if source.note:
        runs.say(source.note)
    for split, images in organizers.make_contest(source, a.out, shape, a.seed).items():
        runs.say(split, images, len(source.train), "classes")
    then = f"make data ROOT={a.out} CONTEST={a.out.name} ARGS='--data.rehearsal true'"
    runs.say(f"wrote {a.out} and {a.out}.oracle.pt; next: {then}")


def answer(a: Namespace) -> None:
    """Answer a label request."""
    oracle = load_torch(a.oracle)
    if not isinstance(oracle, torch.Tensor) or oracle.dtype != torch.int64 or oracle.ndim != 1:
        raise InputError(f"{a.oracle}: one int64 label for each unlabeled image is expected")
    text = runs.require(a.request, "make label-request").read_text("utf-8", errors="replace")
    index = organizers.read_request(text)
    labels = organizers.answer(index, oracle.numpy(), a.budget)
    save_torch(a.out, torch.from_numpy(labels))
    runs.say(f"{a.budget} labels in {a.out}")


def score(a: Namespace) -> None:
    """Score a submission."""
    found = organizers.score(a.submission, a.root, a.split, a.labels, a.checkpoint)
    print(found.pop("team"))
    print(json.dumps(found))


def parse(argv: list[str]) -> Namespace:
    parser = ArgumentParser("rehearse", None, __doc__, formatter_class=RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    p = parts.add_parser("make", help="make a contest")
    p.add_argument("--source", required=True, help="an image folder, or the name of a data set")
    p.add_argument("--out", type=Path, required=True, help="the contest's folder")
    p.add_argument("--per-class", type=int, default=Shape.per_class, help="labels of a class")
    p.add_argument("--val-per-class", type=int, default=Shape.val_per_class)
    p.add_argument("--max-unlabeled-per-class", type=int, default=Shape.max_unlabeled_per_class)
    p.add_argument("--size", type=int, default=Shape.size, help="pixels of a side")
    p.add_argument("--seed", type=int, default=2021)
    p.add_argument("--downloads", type=Path, default=Path("data/downloads"))
    p.add_argument("--classes", type=int, default=10, help="of synthetic, 400 images each")
    p.set_defaults(run=make)
    p = parts.add_parser("answer", help="answer a label request")
    for name, kind in (("request", Path), ("oracle", Path), ("budget", int), ("out", Path)):
        p.add_argument(name, type=kind)
    p.set_defaults(run=answer)
    p = parts.add_parser("score", help="score a submission")
    for name in ("submission", "root", "--checkpoint", "--labels"):
        p.add_argument(name, type=Path)
    p.add_argument("--split", default="val")
    p.set_defaults(run=score)
    return parser.parse_args(argv)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, leave nothing behind
    arguments = parse(sys.argv[1:])
    try:
        arguments.run(arguments)
    except Refused as refusal:
        print(refusal, file=sys.stderr if arguments.part == "answer" else sys.stdout)
        sys.exit(1)


if __name__ == "__main__":
    runs.stage(main)
