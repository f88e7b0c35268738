"""Where a run keeps what, and how every artefact can be trusted: written aside, renamed,
provenance last.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline import InputError
from pipeline.distributed import barrier, leave, rank

_KEPT = (".csv", ".npy", ".png", ".safetensors", ".txt")  # what a finished folder goes on having
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "faiss-gpu", "faiss-cpu", "scikit-learn")


def contest_folder(contest: str) -> Path:
    """data_manifests/CONTEST: contest.json and the label manifests."""
    return Path("data_manifests") / contest


def packed_file(contest: str, split: str) -> Path:
    """data/CONTEST/SPLIT.npy: the packed pixels of a split."""
    return Path("data") / contest / f"{split}.npy"


def made_from_file(contest: str) -> Path:
    """data/CONTEST/made_from.json: what it was packed from, on this machine."""
    return Path("data") / contest / "made_from.json"


def entry_folder(entry: str) -> Path:
    """runs/ENTRY: everything that the stages of an entry write."""
    return Path("runs") / entry


def submission_folder(entry: str) -> Path:
    return Path("submissions") / entry


def finetune_folder(entry: str, round_: int) -> Path:
    """runs/ENTRY/finetune-K."""
    return entry_folder(entry) / f"finetune-{round_}"


def finetune_folders(entry: Path) -> list[Path]:
    """The finetune-K of an entry, finished or not, in the order of K."""
    return numbered(entry, "finetune", "")


def latest_finetune(entry: str) -> Path:
    """The finished finetune-K with the highest K; InputError where there is none."""
    folders = finetune_folders(entry_folder(entry))
    done = [folder for folder in folders if (folder / "provenance.json").is_file()]
    if not done:
        raise InputError(f"{entry_folder(entry)} holds no finished finetune-K; run `make finetune`")
    return done[-1]


def numbered(folder: Path, kind: str, suffix: str = ".csv") -> list[Path]:
    """folder/KIND-K.csv, in the order of K; what people put beside them is left."""
    form = re.compile(rf"{kind}-([0-9]+){re.escape(suffix)}")
    names = {p: form.fullmatch(p.name) for p in folder.glob("*-*")}
    numbers = {path: int(name[1]) for path, name in names.items() if name}
    return sorted(numbers, key=lambda path: numbers[path])


def label_rounds(contest: Path, entry: Path) -> int:
    """The number of label files beyond train: the K of the next finetune-K."""
    return len(numbered(contest, "requested")) + len(numbered(entry, "pseudo"))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` if the block ends well, and vanishes if
    not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path, made_by: str) -> Any:
    """The JSON file at `path`; InputError, naming the command that makes it, where it is not
    there.
    """
    if not path.is_file():
        raise InputError(f"{path} is not there; `{made_by}` makes it")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON file ({error}); `{made_by}` makes it anew") from None


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise InputError where the disk of `folder` has no room for so many bytes of `what`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed for {what}"
        )


def require(path: Path, made_by: str) -> Path:
    """`path`, or InputError naming the command that makes it."""
    if not path.exists():
        raise InputError(f"{path} is not there; `{made_by}` makes it")
    return path


def finished(folder: Path, made_by: str) -> Path:
    """`folder`, or InputError naming the command that fills it, where that did not end or its
    inputs have changed since.
    """
    made = read_json(folder / "provenance.json", made_by)["inputs"]
    if gone := next((name for name in made if not Path(name).is_file()), None):
        raise InputError(
            f"{folder} was made from {gone}, which is no longer there; bring it back, or remove "
            f"{folder} and run `{made_by}`"
        )
    for name, digest in made.items():
        if sha256(Path(name)) != digest:
            raise InputError(f"{folder} was made from another {name}; `{made_by}` makes it anew")
    return folder


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two facts of a run, as 'pretrain.batch_size 128 → 256'; null is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(k for k in old if k not in new)]
        pairs = [(old.get(k), new.get(k), f"{name}.{k}" if name else k) for k in keys]
        return [words for pair in pairs for words in differences(*pair)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        places = enumerate(zip(old, new, strict=True))
        return [words for k, pair in places for words in differences(*pair, f"{name}[{k}]")]
    return [] if old == new else [f"{name.removeprefix('recipe.')} {old} → {new}"]


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@cache
def _commit() -> str:
    """The project's commit, with '-dirty' where tracked files differ from it; '' outside a checkout
    or without git.
    """
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def stamp() -> dict[str, Any]:
    """What made a result: command, commit, package versions."""
    return {"command": sys.orig_argv, "commit": _commit(), "versions": _versions()}


@dataclass(frozen=True)
class Run:
    """The folder of one stage of an entry, and what decides its contents.

    `facts` are the recipe's sections and seed and the SHA-256 of every input; while they are what
    provenance.json says, the stage has nothing to do.
    """

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def of(
        cls, folder: Path, plain: dict[str, Any], sections: Iterable[str], inputs: Iterable[Path]
    ) -> "Run":
        """The run in `folder` of the `sections` of a plain recipe over the files `inputs`."""
        chosen = {name: plain[name] for name in ("seed", *sections)}
        chosen = json.loads(json.dumps(chosen, default=str))  # as it is read back
        for section in chosen.values():
            if isinstance(section, dict):
                for name in ("checkpoint_minutes", "on_collapse"):  # which change no result
                    section.pop(name, None)
        return cls(folder, {"recipe": chosen, "inputs": {str(p): sha256(p) for p in inputs}})

    def is_current(self) -> bool:
        """Whether the folder holds the finished result of just these facts."""
        file = self.folder / "provenance.json"
        if not file.is_file():
            return False
        written = json.loads(file.read_text())
        whole = all((self.folder / name).is_file() for name in written.get("files", []))
        return whole and not differences({k: written.get(k) for k in self.facts}, self.facts)

    def begin(self, anew: bool = False) -> None:
        """From here on the folder is unfinished, until `finish`, and its arrays are gone; `anew`
        forgets an interrupted run.
        """
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = ["provenance.json", *(["plan.json", "checkpoint.pt"] if anew else [])]
            left = self.folder.glob(".*.tmp")  # by a run that was killed
            for file in (*(self.folder / n for n in names), *left, *self.folder.rglob("*.npy")):
                file.unlink(missing_ok=True)
        barrier()  # no process sees what is forgotten

    def finish(self, **results: Any) -> None:
        """Write provenance.json: its existence means that the folder is complete."""
        if rank() == 0:
            found = [*self.folder.iterdir(), *(self.folder / "logits").glob("*.npy")]
            found = [p for p in found if p.is_file() and p.suffix in _KEPT]
            files = sorted(str(p.relative_to(self.folder)) for p in found)
            made = self.facts | stamp() | {"results": results, "files": files}
            write_json(self.folder / "provenance.json", made)


def say(*words: Any) -> None:
    """Print on the main process only."""
    if rank() == 0:
        print(*words, flush=True)


@contextmanager
def interrupts(then: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """The numbers of SIGTERM and SIGINT as they come: `then` is called at each, where they would
    have stopped the program.
    """
    told: list[int] = []

    def note(number: int, frame: Any) -> None:
        told.append(number)
        then()

    try:
        old = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the caller handles signals
        old = {}
    try:
        yield told
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def stage(main: Callable[[], None]) -> None:
    """Run a stage: a user's mistake, a GPU that is too small, or a disk that is full or closed to
    us, ends in one clear line and exit code 1, not in a traceback.
    """
    try:
        main()
        leave()
    except SystemExit:  # all were told to stop
        leave()
        raise
    except InputError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU is out of memory; a smaller batch, micro_batch or ratio helps")
    except OSError as error:
        if error.errno not in _DISK:
            raise
        what = f"{error.filename} cannot be read or written" if error.filename else "a file failed"
        sys.exit(f"error: {what}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
