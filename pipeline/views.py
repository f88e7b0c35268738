"""Batched augmentations: two matrices and two color maps per image, not a chain of Pillow calls.

Resized crop, flip and blur are separable linear maps, so their product is one matrix for the rows
and one for the columns of each image.  Brightness, contrast, saturation, hue and grayscale are
affine in color, so two of them, in each image's own random order, are one 3×4 map.  What is
approximate against torchvision on Pillow images: values are clamped after every second color
operation, not after each; hue turns color space about the gray axis where torchvision turns the HSV
hexagon; the blur is an exact Gaussian where Pillow's is three box filters; nothing is rounded to 8
bits in between.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline import InputError
from pipeline.view_maps import (
    Range,
    Uniforms,
    between,
    blur_matrices,
    color_maps,
    crop_boxes,
    recolor,
    resize_matrices,
    rotate,
)

_PIECE = 32  # images that stay in the cache of a CPU core
_DRAWS = 43  # uniform numbers per image and view; each operation reads columns of its own


@dataclass(frozen=True)
class View:
    """The augmentations of a view: for each operation a probability (0 turns it off) and a range.

    The defaults are SimCLR's (arXiv 2002.05709, appendix A) at color strength 1.
    """

    count: int = 2
    """How many views are drawn this way."""
    crop_p: float = 1.0
    """Probability of the random resized crop; without it the whole image is resized."""
    crop_scale: Range = (0.08, 1.0)
    """Area of the crop as a fraction of the image."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the crop, drawn log-uniformly."""
    flip_p: float = 0.5
    """Probability of the horizontal flip."""
    rotation_p: float = 0.0
    """Probability of the rotation."""
    rotation: Range = (-15.0, 15.0)
    """Angle in degrees, counter-clockwise; corners that come into sight are black."""
    jitter_p: float = 0.8
    """Probability that any of brightness, contrast, saturation and hue is applied."""
    brightness_p: float = 1.0
    """Probability of the brightness change, given jitter."""
    brightness: Range = (0.2, 1.8)
    """Brightness factor."""
    contrast_p: float = 1.0
    """Probability of the contrast change, given jitter."""
    contrast: Range = (0.2, 1.8)
    """Contrast factor, around the image's mean gray."""
    saturation_p: float = 1.0
    """Probability of the saturation change, given jitter."""
    saturation: Range = (0.2, 1.8)
    """Saturation factor; 0 is gray."""
    hue_p: float = 1.0
    """Probability of the hue change, given jitter."""
    hue: Range = (-0.2, 0.2)
    """Hue shift in turns of the color circle."""
    grayscale_p: float = 0.2
    """Probability of grayscale."""
    blur_p: float = 0.5
    """Probability of the Gaussian blur."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur, in output pixels."""
    solarize_p: float = 0.0
    """Probability of solarization."""
    solarize_threshold: float = 0.5
    """Values (0 to 1) from here on are inverted by solarization."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"views: count is {self.count}; 1 or more is expected")
        for name, value in vars(self).items():
            if name.endswith("_p") and not 0 <= value <= 1:
                raise InputError(f"views: {name} is {value}; a probability from 0 to 1 is expected")
            if isinstance(value, tuple) and not value[0] <= value[1]:
                raise InputError(f"views: {name} is {list(value)}; [low, high] is expected")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(
                f"views: crop_scale is {list(self.crop_scale)}; 0 < low <= high <= 1 is expected"
            )
        if self.crop_ratio[0] <= 0:
            raise InputError(f"views: crop_ratio is {list(self.crop_ratio)}; above 0 is expected")


WHOLE = View(1, crop_p=0, flip_p=0, jitter_p=0, grayscale_p=0, blur_p=0)
"""No augmentation at all: the image, resized."""


def uniforms(seed: int, step: int, batch: int, views: int) -> Uniforms:
    """Every random number of the views of step `step`, [views, batch, draws] in [0, 1).

    A pure function of (seed, step, view, place in the global batch): a rank, or a micro-batch,
    takes its slice of the second axis and sees the augmentations that one process would see.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    return rng.random((views, batch, _DRAWS), dtype=np.float32)


def parameters(view: View, u: Uniforms, height: int, width: int) -> dict[str, npt.NDArray[Any]]:
    """The parameters of every operation for every image, from uniform numbers [b, draws]."""
    jitter = u[:, 24] < view.jitter_p

    def factor(column: int, p: float, low_high: Range, neutral: float) -> npt.NDArray[Any]:
        return np.where(
            jitter & (u[:, column + 4] < p), between(u[:, column], low_high), neutral
        ).astype(np.float32)

    return {
        "boxes": crop_boxes(u, view.crop_p, view.crop_scale, view.crop_ratio, height, width),
        "flip": u[:, 23] < view.flip_p,
        "factors": np.stack(
            [
                factor(25, view.brightness_p, view.brightness, 1),
                factor(26, view.contrast_p, view.contrast, 1),
                factor(27, view.saturation_p, view.saturation, 1),
                factor(28, view.hue_p, view.hue, 0),
            ],
            axis=1,
        ),
        "order": np.argsort(u[:, 33:37], axis=1),
        "gray": (u[:, 37] < view.grayscale_p).astype(np.float32),
        "sigma": np.where(u[:, 38] < view.blur_p, between(u[:, 39], view.blur_sigma), 0),
        "degrees": np.where(u[:, 40] < view.rotation_p, between(u[:, 41], view.rotation), 0),
        "solarize": u[:, 42] < view.solarize_p,
    }


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The type of matrix products and autocast: bf16 where the processor has it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    supported = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


class _Scratch:
    """Memory for intermediate results, used by every piece: fresh pages cost more than the sums."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.held = device, dict[str, Tensor]()

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.held[name][:size].view(shape)


def _augment(
    planes: Tensor,
    p: dict[str, Tensor],
    blurred: Tensor,
    turned: Tensor,
    size: int,
    mean: Tensor,
    std: Tensor,
    scratch: _Scratch,
) -> Tensor:
    """One view of planes [b, h, 3, w] (0 to 255) as normalized float32 [b, 3, size, size].

    `p` are the parameters of the images, `blurred` and `turned` the positions of those that are.
    """
    (b, height, _, width), dtype = planes.shape, planes.dtype
    top, left, crop_height, crop_width = p["boxes"].unbind(1)
    rows = resize_matrices(top, crop_height, height, size).to(dtype)
    columns = resize_matrices(left, crop_width, width, size, p["flip"]).to(dtype)
    if len(blurred):
        blur = blur_matrices(p["sigma"][blurred], size).to(dtype)
        rows[blurred] = torch.bmm(blur, rows[blurred])
        columns[blurred] = torch.bmm(blur, columns[blurred])
    half = scratch("half", dtype, b, size, 3 * width)
    torch.bmm(rows, planes.view(b, height, 3 * width), out=half)
    whole = scratch("whole", dtype, b, size * 3, size)
    torch.bmm(half.view(b, size * 3, width), columns.transpose(1, 2), out=whole)
    x = scratch("x", torch.float32, b, 3, size, size)
    x.copy_(whole.view(b, size, 3, size).transpose(1, 2))
    if len(turned):
        x[turned] = rotate(x[turned], p["degrees"][turned])
    flat = x.view(b, 3, size * size)
    spare = scratch("spare", torch.float32, *flat.shape)
    recolor(flat, spare, p["of_pixel"], p["of_mean"], mean, std)
    return x


def _solarize(x: Tensor, where: Tensor, threshold: float, mean: Tensor, std: Tensor) -> Tensor:
    """Invert normalized values x [b, 3, s, s] from `threshold` on, in the images `where` [b]."""
    mean, std = mean[:, None, None], std[:, None, None]
    inverted = where[:, None, None, None] & (x >= (threshold - mean) / std)
    return torch.where(inverted, (1 - 2 * mean) / std - x, x)


def _on_device(
    view: View, u: Uniforms, height: int, width: int, mean: Tensor, std: Tensor
) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
    """The parameters of a batch as tensors on the device of `mean`, and as they are drawn."""
    host = parameters(view, u, height, width)
    p = {k: torch.from_numpy(v).to(mean.device, non_blocking=True) for k, v in host.items()}
    p["of_pixel"], p["of_mean"] = color_maps(p["factors"], p["order"], p["gray"], mean, std)
    return p, host


@torch.no_grad()
def make_views(
    images: Tensor,
    views: Sequence[View],
    u: Uniforms,
    size: int,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Views of a uint8 batch [b, h, w, 3] as a list of normalized tensors [b, 3, size, size].

    `u` is [v, b, draws] from `uniforms`, where v is the sum of the counts; `mean` and `std` are of
    values from 0 to 1; `dtype` is that of the products and the result, None takes `matmul_dtype`.
    On a CPU a batch goes through in pieces that stay in the cache.
    """
    device, (b, height, width) = images.device, images.shape[:3]
    dtype = dtype or matmul_dtype(device)
    specs = [view for view in views for _ in range(view.count)]
    mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    drawn = [_on_device(v, u[k], height, width, mean, std) for k, v in enumerate(specs)]
    out = [torch.empty(b, 3, size, size, dtype=dtype, device=device) for _ in specs]
    piece, scratch = (_PIECE if device.type == "cpu" else b), _Scratch(device)
    for start in range(0, b, piece):
        part = slice(start, start + piece)
        planar = images[part].permute(0, 1, 3, 2).contiguous()
        planes = scratch("planes", dtype, *planar.shape).copy_(planar)
        for view, (p, host), result in zip(specs, drawn, out, strict=True):
            own = {k: t[part] for k, t in p.items()}
            blurred, turned = (
                torch.from_numpy(np.flatnonzero(host[k][part])).to(device, non_blocking=True)
                for k in ("sigma", "degrees")
            )
            x = _augment(planes, own, blurred, turned, size, mean, std, scratch)
            if view.solarize_p:
                x = _solarize(x, own["solarize"], view.solarize_threshold, mean, std)
            result[part] = x
    return out
