"""What is written where: mistakes and full disks in one line, provenance without git."""

import errno
import os
import subprocess
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline import InputError, runs
from stages import demo


def raising(error: BaseException) -> Any:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_nothing_is_one_line(number: int) -> None:
    error = OSError(number, os.strerror(number), "runs/x/history.json")
    with pytest.raises(SystemExit) as end:
        runs.stage(raising(error))
    expected = f"error: runs/x/history.json cannot be read or written: {os.strerror(number)}"
    assert end.value.code == expected


def test_a_gpu_that_is_too_small_is_one_line() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(SystemExit, match="error: the GPU is out of memory; a smaller batch"):
        runs.stage(fails)


def test_what_is_no_mistake_keeps_its_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        runs.stage(raising(FileNotFoundError(errno.ENOENT, "no such file")))
    with pytest.raises(SystemExit) as end:
        runs.stage(raising(InputError("a.csv: row 3 is x; y is expected")))
    assert end.value.code == "error: a.csv: row 3 is x; y is expected"


@pytest.mark.parametrize("end", [None, SystemExit(143)])
def test_a_stage_leaves_its_group_of_processes(end: SystemExit | None) -> None:
    """Also where it was told to stop; a thread of the group could abort the process otherwise."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with nullcontext() if end is None else pytest.raises(SystemExit):
            runs.stage(raising(end) if end else lambda: None)
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_room_is_looked_for_before_writing(tmp_path: Path) -> None:
    runs.check_room(tmp_path, 1, "a file")
    with pytest.raises(InputError, match=r"GB free; 1000000000\.0 GB are needed for test\.npy"):
        runs.check_room(tmp_path, 10**18, "test.npy")


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    runs._commit.cache_clear()
    monkeypatch.setattr(subprocess, "run", missing)
    assert runs.stamp()["commit"] == ""
    runs._commit.cache_clear()


def test_a_misspelt_option_does_not_cost_the_last_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Path("recipes/demo.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/demo.yaml").write_text(recipe)
    Path("runs/demo").mkdir(parents=True)
    with pytest.raises(InputError, match=r"there is no --pretrain\.stepz; --help"):
        demo.run(Namespace(source=None), ["--pretrain.stepz=1"])
    assert Path("runs/demo").is_dir()
