"""Classified images to make a rehearsal of: a folder, a data set by name, or a generator."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import InputError
from pipeline.packed import FORMATS

Opener = Callable[[], Image.Image]
_HELD = ("val", "test")
# torchvision's class, its two splits, and the folder that it looks in
_NAMED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}, "cifar-100-python"),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}, "stl10_binary"),
    "oxford-iiit-pet": (
        "OxfordIIITPet",
        {"split": "trainval"},
        {"split": "test"},
        "oxford-iiit-pet",
    ),
}


@dataclass(frozen=True)
class Source:
    """Images to train with and images held from it: for each class, functions that open them."""

    train: list[list[Opener]]
    held: list[list[Opener]]
    note: str = ""


def read_folder(folder: Path, val_per_class: int, seed: int) -> Source:
    """The images of an image folder, train/CLASS/* and val/CLASS/* (or test/), in sorted order.

    Where there are only CLASS/* folders, `val_per_class` images of each class, at most a fifth, are
    drawn by seed as val.  Raises InputError where a class has no images or the folder no classes.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder; an image folder, {', '.join(_NAMED)} or synthetic is expected"
        )
    if not (folder / "train").is_dir():
        classes = _classes(folder)
        files = [_files(folder / c) for c in classes]
        rng, held = random.Random(f"val {seed}"), []
        for own in files:
            drawn = set(rng.sample(own, min(val_per_class, len(own) // 5)))
            held.append([f for f in own if f in drawn])
            own[:] = [f for f in own if f not in drawn]
        note = f"{folder} has no train/: {sum(map(len, held)):,} of its images are drawn as val"
        return Source(_openers(files), _openers(held), note)
    name = next((d for d in _HELD if (folder / d).is_dir()), None)
    if name is None:
        raise InputError(f"{folder} holds train/ but neither val/ nor test/; one is expected")
    classes = _classes(folder / "train")
    missing = [c for c in classes if not (folder / name / c).is_dir()]
    if missing:
        raise InputError(f"{folder / name} lacks {missing[0]}/; the classes of train/ are expected")
    train = [_files(folder / "train" / c) for c in classes]
    return Source(_openers(train), _openers([_files(folder / name / c) for c in classes]))


def _classes(folder: Path) -> list[str]:
    found = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not found:
        raise InputError(f"{folder} holds no class folders; CLASS/* is expected")
    return found


def _files(folder: Path) -> list[Path]:
    found = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    if not found:
        raise InputError(f"{folder} holds no images")
    return found


def _openers(files: Iterable[Iterable[Path]]) -> list[list[Opener]]:
    return [[partial(_open, f) for f in own] for own in files]


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise InputError(f"{file} is no readable image ({error})") from None


def download(name: str, folder: Path) -> Source:
    """CIFAR-10, CIFAR-100, STL-10 (its labeled images) or Oxford-IIIT Pet, through torchvision.

    What is not in `folder` is downloaded and its checksum compared.  Raises InputError where that
    fails.
    """
    datasets = import_module("torchvision.datasets")  # slow to import
    kind, train, held, where = _NAMED[name]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        parts = [getattr(datasets, kind)(folder, download=True, **split) for split in (train, held)]
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"cannot download {name} ({reason}): put it in {folder / where} or name an image folder"
        ) from None
    return Source(_by_class(parts[0]), _by_class(parts[1]))


def _by_class(images: Any) -> list[list[Opener]]:
    """A torchvision data set's images by class; each kind keeps its labels under another name."""
    names = ("targets", "labels", "_labels")
    labels = next(getattr(images, n) for n in names if hasattr(images, n))
    found: list[list[Opener]] = [[] for _ in range(int(max(labels)) + 1)]
    for k, label in enumerate(labels):
        found[int(label)].append(partial(_item, images, k))
    return found


def _item(images: Any, k: int) -> Image.Image:
    image: Image.Image = images[k][0]
    return image


def generate(classes: int, train: int, held: int, size: int, seed: int) -> Source:
    """Generated images, `train` and `held` of each class."""
    synthetic = import_module("pipeline.synthetic")
    parts = []
    for split, per_class in (("train", train), ("val", held)):
        found: list[list[Opener]] = [[] for _ in range(classes)]
        for pixels, label in synthetic.make(split, classes, per_class, size, seed):
            found[label].append(partial(Image.fromarray, np.asarray(pixels)))
        parts.append(found)
    return Source(parts[0], parts[1])


def is_named(name: str) -> bool:
    """Whether `download` knows a data set of this name."""
    return name in _NAMED
