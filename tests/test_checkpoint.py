"""Files are whole or absent, and loading one runs nothing."""

import pickle
import resource
from pathlib import Path

import pytest
import torch

from pipeline import InputError
from pipeline.checkpoint import load_tensors, load_torch, save_tensors, save_torch
from pipeline.runs import replacing

from .conftest import Malicious


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, how: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / "label_07.pt"
    if how == "torch":
        torch.save({"labels": Malicious(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(InputError) as error:
        load_torch(file)
    assert str(error.value).startswith(f"{file}: refused, it holds more than tensors")
    assert not mark.exists()


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.pt is not there; a file that torch\.save wrote"):
        load_torch(tmp_path / "gone.pt")
    good = tmp_path / "good.pt"
    save_torch(good, torch.arange(1000))
    assert torch.equal(load_torch(good), torch.arange(1000))
    cut = tmp_path / "cut.pt"
    cut.write_bytes(good.read_bytes()[:200])
    with pytest.raises(InputError, match=r"cut\.pt"):
        load_torch(cut)
    with pytest.raises(InputError, match=r"good\.pt: not a safetensors file"):
        load_tensors(good)


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7)}
    metadata = {"encoder": {"name": "resnet18"}, "mean": [0.1, 0.2]}
    save_tensors(tmp_path / "x.safetensors", tensors, metadata)
    got, meta = load_tensors(tmp_path / "x.safetensors")
    assert meta == metadata
    assert all(torch.equal(got[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("kind", ["x.pt", "x.safetensors"])
def test_a_disk_that_takes_no_more_is_one_line_and_keeps_the_old_file(
    tmp_path: Path, kind: str
) -> None:
    """Files of this process may be no larger than 64 KiB for a moment."""
    file, tensors = tmp_path / kind, {"a": torch.zeros(100_000)}
    file.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(InputError, match=rf"{kind} cannot be written \(.+\); a disk with room"):
            save_torch(file, tensors) if kind == "x.pt" else save_tensors(file, tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [f.name for f in tmp_path.iterdir()] == [kind]
    assert file.read_text() == "old"


def test_nan_is_never_written(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="not written, a holds NaN or infinity"):
        save_tensors(file, {"a": torch.tensor([1.0, float("nan")])}, {})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("old")

    def interrupted() -> None:
        with replacing(file) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.txt", "old")]
