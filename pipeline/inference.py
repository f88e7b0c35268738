"""Outputs of a model over packed images, in bounded memory, on every process."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from pipeline import InputError
from pipeline.batches import prefetch, slice_of
from pipeline.distributed import barrier, rank, world_size
from pipeline.encoders import build_encoder, features
from pipeline.manifest import Contest
from pipeline.packed import Pool, write_rows
from pipeline.progress import progress
from pipeline.runs import check_room
from pipeline.views import WHOLE, Views, matmul_dtype, uniforms


def encoder_for(spec: Mapping[str, Any]) -> nn.Module:
    """The encoder of a recipe's section (name, stem, options); InputError where there is none."""
    if spec["options"].get("features_only"):
        raise InputError("encoder.options has features_only; an encoder of one output is expected")
    try:
        return build_encoder(spec["name"], spec["stem"], **spec["options"])
    except (ValueError, TypeError) as error:
        raise InputError(f"encoder: {error}") from None
    except Exception as error:  # whatever timm makes of values that it does not know
        raise InputError(
            f"encoder: timm cannot build {spec['name']} with options {spec['options']} "
            f"({type(error).__name__}: {error})"
        ) from None


@torch.no_grad()
def check_size(encoder: nn.Module, size: int) -> None:
    """Raise InputError where the encoder cannot take, or wastes, images of `size` pixels, or does
    not give one vector for each.
    """
    was, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    try:
        out = encoder(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise InputError(
            f"the encoder cannot take images of {size} pixels ({error}); another resolution, or "
            f"encoder.options as {{img_size: {size}}}, is expected"
        ) from None
    if list(out.shape) != (wanted := [1, features(encoder)]):
        raise InputError(
            f"the encoder gives {list(out.shape)} for an image; {wanted} is expected (another "
            f"global_pool in encoder.options)"
        )
    with suppress(RuntimeError, AssertionError):  # a transformer takes no other size
        # With 1×1 maps before the last stage nothing is learned, and torch's bf16 convolutions on
        # a CPU return garbage gradients for them.
        twice = torch.zeros(1, 3, 2 * size, 2 * size, device=device)
        if encoder.forward_features(twice).shape[2:] == (1, 1):  # type: ignore[operator]
            raise InputError(
                f"images of {size} pixels are too small for this encoder: nothing is left of them "
                f"before its last stage; stem low_stride or cifar, or a larger resolution, is "
                f"expected"
            )
    encoder.train(was)


def predict(
    model: nn.Module,
    pool: Pool,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    out: "npt.NDArray[np.float32] | _Rows",
    rows: npt.NDArray[np.int64] | None = None,
    batch: int = 512,
    exact: bool = False,
    unit: bool = False,
    what: str = "embed",
    part: slice | None = None,
) -> None:
    """Write model(image) of every image of `pool` to `out`, image i to row rows[i] (or i).

    Images are resized to `size`, not augmented.  `exact` computes in float32, else in bf16 where
    the processor has it; `unit` scales each output to unit length; `part` limits the work to some
    of the images.  The model is left in evaluation mode.
    """
    model.eval()
    mine = part or slice(0, len(pool))
    for at, y in outputs_of(model, pool, size, mean, std, mine, batch, exact, what):
        y = F.normalize(y) if unit else y
        out[at if rows is None else rows[at]] = y.cpu().numpy()


@torch.no_grad()
def outputs_of(
    model: nn.Module,
    pool: Pool,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    part: slice,
    batch: int,
    exact: bool,
    what: str,
) -> Iterator[tuple[npt.NDArray[np.int64], torch.Tensor]]:
    """What `predict` writes, batch by batch: positions in the pool, and the model's outputs in
    float32; the model stays in its mode.
    """
    device = next(model.parameters()).device
    dtype = torch.float32 if exact else matmul_dtype(device)
    whole = Views([WHOLE], mean, std, dtype)
    starts = range(part.start, part.stop, batch)

    def fetch(k: int) -> torch.Tensor:
        positions = np.arange(starts[k], min(starts[k] + batch, part.stop))
        return torch.from_numpy(pool.gather(positions)).to(device, non_blocking=True)

    with progress(what, part.stop - part.start, "images") as advance:
        for start, images in zip(starts, prefetch(fetch, 0, len(starts)), strict=True):
            drawn = whole.draw(uniforms(0, 0, len(images), 1), *images.shape[1:3])
            x = whole(images, drawn.to(device), size)[0]
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = model(x).float()
            yield np.arange(start, start + len(images)), y
            advance(len(images))


class _Rows:
    """Rows of a .npy file, written as bytes: where nodes share a disk, whole pages of a memory map
    would undo what another node wrote to their other rows.
    """

    def __init__(self, file: Path) -> None:
        array = np.lib.format.open_memmap(file, "r")
        self.file, self.start, self.size = file, array.offset, array.strides[0]

    def __setitem__(self, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        write_rows(self.file, self.start, self.size, rows.tolist(), values.tobytes())


def predict_split(
    model: nn.Module,
    contest: Contest,
    split: str,
    file: Path,
    outputs: int,
    size: int,
    batch: int = 512,
    exact: bool = False,
    unit: bool = False,
) -> None:
    """Write model(image) of every usable image of a split to the float32 array `file` [images,
    outputs].

    Rows of unusable images are zero.  Every process writes its part; the file appears when it is
    whole.
    """
    aside = file.with_name(f".{file.name}.tmp")
    if rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)  # by a run that was killed
        shape = (contest.splits[split]["images"], outputs)
        check_room(file.parent, 4 * shape[0] * shape[1], f"{file.name} [{shape[0]:,}, {outputs}]")
        np.lib.format.open_memmap(aside, "w+", np.float32, shape)
    barrier()
    rows = contest.usable(split)
    pool = Pool([(contest.packed(split), rows)])
    mean, std = contest.mean, contest.std
    mine = slice_of(len(pool), rank(), world_size())
    try:
        predict(model, pool, size, mean, std, _Rows(aside), rows, batch, exact, unit, split, mine)
        barrier()
        if rank() == 0:
            aside.replace(file)
    finally:
        if rank() == 0:
            aside.unlink(missing_ok=True)
    barrier()
