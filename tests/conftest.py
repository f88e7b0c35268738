"""What all tests share: one thread, fixed seeds, a tiny contest, the contest's own programs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and faiss read it
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import subprocess
import sys
import tarfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pipeline import entrants

ROOT = Path(__file__).parents[1]
"""The project."""
SHARED = ROOT.parent / "shared"
"""The organizers' programs and the real images; absent where the project stands alone."""
SHAPES = ("disk", "square", "cross", "ring")


def pytest_configure() -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # of which a GPU's figures would be too coarse


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (what libraries draw from)
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder of the organizers' programs and real images; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED.name} folder beside the project")
    return SHARED


def draw(shape: str, rng: np.random.Generator, size: int = 32) -> Image.Image:
    """A picture [size, size] of a shape, its colors, place and noise random."""
    picture = Image.new("RGB", (size, size), tuple(rng.integers(0, 120, 3).tolist()))
    pen = ImageDraw.Draw(picture)
    color = tuple(rng.integers(130, 256, 3).tolist())
    r = int(rng.integers(size // 5, size // 3))
    x, y = rng.integers(r, size - r, 2).tolist()
    box = (x - r, y - r, x + r, y + r)
    if shape == "disk":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "ring":
        pen.ellipse(box, outline=color, width=max(1, r // 3))
    else:
        pen.line((x - r, y, x + r, y), fill=color, width=max(1, r // 2))
        pen.line((x, y - r, x, y + r), fill=color, width=max(1, r // 2))
    noisy = np.asarray(picture, np.int16) + rng.integers(-10, 11, (size, size, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_contest_folder(root: Path, images: dict[str, int], size: int = 32) -> Path:
    """A contest in its own layout: images[SPLIT] pictures; labels but for unlabeled and test."""
    rng = np.random.default_rng(0)
    for split, count in images.items():
        folder = root / split
        folder.mkdir(parents=True)
        labels = np.arange(count) % len(SHAPES)
        for n, label in enumerate(labels):
            draw(SHAPES[label], rng, size).save(folder / f"{n}.png")
        if split not in ("unlabeled", "test"):
            torch.save(torch.from_numpy(labels), root / f"{split}_label_tensor.pt")
    return root


@pytest.fixture
def contest_folder(tmp_path: Path) -> Path:
    """A contest as it is handed out, not prepared: 4 classes of 32×32 shapes, with a test split."""
    images = {"unlabeled": 64, "train": 80, "val": 40, "test": 12}
    return make_contest_folder(tmp_path / "given", images)


@pytest.fixture
def tiny_contest(contest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, prepared as 'tiny' by stages.prepare; the working directory is its parent."""
    from pipeline import config
    from stages import prepare

    monkeypatch.chdir(tmp_path)
    argv = ["--data.root", str(contest_folder), "--data.contest", "tiny", "--data.workers", "1"]
    recipe, _, plain = config.parse(prepare.__doc__, argv=argv)
    prepare.run(recipe, plain)
    return contest_folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with what prepare and embed leave (tests/fake_run.py)."""
    from tests.fake_run import write_run

    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    return tmp_path


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, as embeddings are, in float32."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="session")
def mini98() -> Path:
    """The archive of photographs; skips where it is absent."""
    archive = SHARED / "data" / "mini98.tar.gz"
    if not archive.is_file():
        pytest.skip(f"no {SHARED.name}/data/mini98.tar.gz beside the project")
    return archive


@pytest.fixture(scope="session")
def real_images(mini98: Path) -> np.ndarray:
    """400 photographs [400, 96, 96, 3] uint8."""
    pictures = []
    with tarfile.open(mini98) as tar:
        for k, member in enumerate(m for m in tar if m.isfile()):
            if k % 10 == 0:
                with Image.open(tar.extractfile(member)) as image:  # type: ignore[arg-type]
                    pictures.append(np.asarray(image.convert("RGB").resize((96, 96))))
            if len(pictures) == 400:
                break
    return np.stack(pictures)


TINY = [
    "--data.contest=tiny",
    "--encoder.name=resnet10t",
    "--pretrain.resolutions=[32]",
    "--pretrain.knn_images=32",
    "--finetune.holdout=0.25",
]
"""Options that make a stage small enough for the tiny contest."""


@pytest.fixture
def run_stage():  # type: ignore[no-untyped-def]
    """Run a stage (a module, or Python's arguments) on the tiny contest in a process of its own."""

    def run(  # type: ignore[no-untyped-def]
        module: str | list[str],
        *options: str,
        wait: bool = True,
        environment: dict[str, str] | None = None,
    ):
        head = ["-m", module] if isinstance(module, str) else module
        command = [sys.executable, *head, *TINY, *options]
        process = subprocess.Popen(
            command,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{command}\n{out}\n{err}"
        return out

    return run


@pytest.fixture
def calls(tiny_contest: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The (stage, entry) that a comparison called, in this process, which spares the imports."""
    made: list[tuple[str, str]] = []

    def call(stage: str, words: list[str]) -> int:
        made.append((stage, words[words.index("--entry") + 1]))
        monkeypatch.setattr(sys, "argv", [stage, *words])
        import_module(f"stages.{stage}").main()
        return 0

    monkeypatch.setattr(entrants, "call", call)
    return made
