"""Weights and training state on disk: saved whole or not at all, loaded without running
anything.
"""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import InputError
from pipeline.runs import replacing


def save_torch(path: Path, value: Any) -> None:
    """Write tensors in plain containers as torch does; InputError where the disk takes no more."""
    try:
        with replacing(path) as aside:
            torch.save(value, aside)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        raise InputError(_unwritten(path, error)) from None


def _unwritten(path: Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{path} cannot be written ({reason}); a disk with room, open to us, is expected"


def load_torch(path: Path) -> Any:
    """What a torch file holds, on the CPU.

    Raises InputError where it is missing, damaged, or holds anything but tensors in plain
    containers (a pickle can run programs: such a file is refused before anything of it runs).
    """
    if not path.is_file():
        raise InputError(f"{path} is not there; a file that torch.save wrote is expected")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused, it holds more than tensors in plain containers and could run a "
            f"program when loaded; a file saved by torch.save(tensor) or torch.save(state_dict) is "
            f"expected"
        ) from None
    except Exception as error:  # torch raises nearly anything on a damaged file
        reason = str(error).splitlines()[0] if isinstance(error, RuntimeError | OSError) else ""
        reason = reason and f" ({reason})"
        raise InputError(f"{path}: damaged, or not a file that torch.save wrote{reason}") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file with `metadata` (plain data) in its header.

    Raises InputError where a tensor holds NaN or infinity, as no file of weights ever does, and
    where the disk does not take it.
    """
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise InputError(
            f"{path}: not written, {bad[0]} holds NaN or infinity; lower the learning rate"
        )
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        with replacing(path) as aside:
            aside.touch()  # with the permissions of other files
            save_file(plain, aside, {"json": json.dumps(metadata)})
    except (OSError, SafetensorError) as error:
        raise InputError(_unwritten(path, error)) from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file; InputError where it is none."""
    try:
        with safe_open(path, "pt") as f:
            metadata = json.loads((f.metadata() or {}).get("json", "{}"))
            return {k: f.get_tensor(k) for k in f.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
