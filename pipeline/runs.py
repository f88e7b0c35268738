"""Where a run keeps what, and how every artefact can be trusted: written aside, renamed,
provenance last.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import InputError
from pipeline.distributed import rank

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "faiss-gpu", "faiss-cpu", "scikit-learn")


def contest_folder(contest: str) -> Path:
    """data_manifests/CONTEST: contest.json and the label manifests."""
    return Path("data_manifests") / contest


def packed_file(contest: str, split: str) -> Path:
    """data/CONTEST/SPLIT.npy: the packed pixels of a split."""
    return Path("data") / contest / f"{split}.npy"


def entry_folder(entry: str) -> Path:
    """runs/ENTRY: everything that the stages of an entry write."""
    return Path("runs") / entry


def submission_folder(entry: str) -> Path:
    return Path("submissions") / entry


def finetune_folder(entry: str, round_: int) -> Path:
    """runs/ENTRY/finetune-K."""
    return entry_folder(entry) / f"finetune-{round_}"


def latest_finetune(entry: str) -> Path:
    """The finished finetune-K with the highest K; InputError where there is none."""
    done = entry_folder(entry).glob("finetune-*/provenance.json")
    folders = sorted((p.parent for p in done), key=lambda p: int(p.name.split("-")[1]))
    if not folders:
        raise InputError(f"{entry_folder(entry)} holds no finished finetune-K; run `make finetune`")
    return folders[-1]


def numbered(folder: Path, kind: str) -> list[Path]:
    """folder/KIND-K.csv, in the order of K."""
    return sorted(folder.glob(f"{kind}-*.csv"), key=lambda p: int(p.stem.rsplit("-", 1)[1]))


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


def require(path: Path, made_by: str) -> Path:
    """`path`, or InputError naming the command that makes it."""
    if not path.exists():
        raise InputError(f"{path} is not there; `{made_by}` makes it")
    return path


def finished(folder: Path, made_by: str) -> Path:
    """`folder`, or InputError naming the command that fills it, where that did not end or its
    inputs have changed since.
    """
    made = read_json(folder / "provenance.json", made_by)
    for name, digest in made["inputs"].items():
        if not Path(name).is_file() or sha256(Path(name)) != digest:
            raise InputError(f"{folder} was made from another {name}; `{made_by}` makes it anew")
    return folder


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@cache
def _commit() -> str:
    """The project's commit, with '-dirty' where tracked files differ from it; '' outside a
    checkout.
    """
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
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
        return cls(folder, {"recipe": chosen, "inputs": {str(p): sha256(p) for p in inputs}})

    def is_current(self) -> bool:
        """Whether the folder holds the finished result of just these facts."""
        file = self.folder / "provenance.json"
        if not file.is_file():
            return False
        written = json.loads(file.read_text())
        return all(written.get(k) == v for k, v in self.facts.items())

    def begin(self) -> None:
        """From here on the folder is unfinished, until `finish`."""
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "provenance.json").unlink(missing_ok=True)

    def finish(self, **results: Any) -> None:
        """Write provenance.json: its existence means that the folder is complete."""
        if rank() == 0:
            made = self.facts | stamp() | {"results": results}
            write_json(self.folder / "provenance.json", made)

    def results(self) -> dict[str, Any]:
        """What `finish` was told."""
        file = self.folder / "provenance.json"
        return json.loads(file.read_text())["results"]  # type: ignore[no-any-return]


def say(*words: Any) -> None:
    """Print on the main process only."""
    if rank() == 0:
        print(*words, flush=True)


def stage(main: Callable[[], None]) -> None:
    """Run a stage: a user's mistake ends in one clear line and exit code 1, not in a traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
