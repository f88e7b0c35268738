"""Batched augmentations: two matrices and two color maps per image, not a chain of Pillow calls.

Resized crop, flip and blur are separable linear maps, so their product is one matrix for the rows and
one for the columns of each image.  Brightness, contrast, saturation, hue and grayscale are affine in
color, so two of them, in each image's own random order, are one 3×4 map.  What is approximate against
torchvision on Pillow images: values are clamped after every second color operation, not after each;
hue turns color space about the gray axis where torchvision turns the HSV hexagon; the blur is an exact
Gaussian where Pillow's is three box filters; nothing is rounded to 8 bits in between.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import InputError

Range = tuple[float, float]
Uniforms = npt.NDArray[np.float32]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow and torchvision
_CROP_TRIES = 10  # as in torchvision's RandomResizedCrop
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

    A pure function of (seed, step, view, place in the global batch): a rank, or a micro-batch, takes
    its slice of the second axis and sees the same augmentations as one process would.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    return rng.random((views, batch, _DRAWS), dtype=np.float32)


def _between(u: Uniforms, low_high: Range) -> Uniforms:
    low, high = low_high
    return low + (high - low) * u


def crop_boxes(view: View, u: Uniforms, height: int, width: int) -> Uniforms:
    """Crops as [b, 4] rows of (top, left, height, width) in whole pixels, drawn as by torchvision.

    `u` is [b, draws].  Ten tries at area and aspect ratio; where none fits, the largest central crop.
    """
    b = len(u)
    area = height * width * _between(u[:, :_CROP_TRIES], view.crop_scale)
    low, high = math.log(view.crop_ratio[0]), math.log(view.crop_ratio[1])
    ratio = np.exp(_between(u[:, _CROP_TRIES : 2 * _CROP_TRIES], (low, high)))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first, rows = fits.argmax(1), np.arange(b)
    w, h = w[rows, first], h[rows, first]
    top = np.floor(u[:, 20] * (height - h + 1))
    left = np.floor(u[:, 21] * (width - w + 1))
    boxes = np.stack([top, left, h, w], 1)
    aspect = min(max(width / height, view.crop_ratio[0]), view.crop_ratio[1])
    fw = min(width, round(height * aspect))
    fh = min(height, round(width / aspect))
    boxes[~fits.any(1)] = [(height - fh) // 2, (width - fw) // 2, fh, fw]
    boxes[u[:, 22] >= view.crop_p] = [0, 0, height, width]
    return boxes.astype(np.float32)


def _resize_matrices(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """Antialiased bilinear resampling of [start, start + length) to `outputs` pixels.

    The result is [b, outputs, inputs].
    Pillow's triangle filter (`ImagingResample`): its support grows with the reduction, and it never
    reads outside the crop.
    """
    device = start.device
    scale = (length / outputs)[:, None]
    per_support = scale.clamp_min(1).reciprocal()
    center = (torch.arange(outputs, device=device) + 0.5) * scale * per_support
    offset = torch.arange(inputs, device=device) - start[:, None]
    inside = (offset >= 0) & (offset < length[:, None])
    position = torch.where(inside, (offset + 0.5) * per_support, torch.inf)
    weights = (position[:, None, :] - center[:, :, None]).abs_().neg_().add_(1).clamp_min_(0)
    return weights.mul_(weights.sum(2, keepdim=True).reciprocal_())


def _blur_matrices(sigma: Tensor, size: int) -> Tensor:
    """Gaussian blur that repeats the edge pixel outside, [b, size, size]; sigma 0 is the identity."""
    distance = torch.arange(1 - size, size + 1, device=sigma.device) - 0.5  # of pixel borders
    below = torch.special.ndtr(distance / sigma.clamp_min(1e-3)[:, None])  # [b, 2 * size]
    kernel = below.diff(dim=1)  # weight of the pixel at distance 1 - size … size - 1
    # Row i is kernel[size - 1 - i :][:size]: windows of the kernel, from the last to the first.
    matrix = kernel.unfold(1, size, 1).flip(1)
    # what falls outside is folded onto the first and the last pixel
    matrix[:, :, 0] = below[:, 1 : size + 1].flip(1)
    matrix[:, :, -1] = 1 - below[:, size - 1 : 2 * size - 1].flip(1)
    return matrix


def _hue_matrices(turns: Tensor) -> Tensor:
    """Rotation of color space about the gray axis, [b, 3, 3]; a third of a turn makes red green."""
    angle = 2 * math.pi * turns[:, None, None]
    mean = torch.full((3, 3), 1 / 3, device=turns.device)
    eye = torch.eye(3, device=turns.device)
    cross = (eye.roll(1, 0) - eye.roll(-1, 0)) / math.sqrt(3)
    return mean + torch.cos(angle) * (eye - mean) + torch.sin(angle) * cross


def _color_steps(factors: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation and hue as color matrices, in each image's own order.

    `factors` [b, 4], `order` [b, 4] (a permutation of 0..3 in each row).  Returns the matrices
    [4, b, 3, 3] and the shares [4, b, 1] of the mean gray that a step adds (contrast turns about it).
    """
    b, device = len(factors), factors.device
    luma, eye = torch.tensor(_LUMA, device=device), torch.eye(3, device=device)
    bright, contrast, saturation, turns = factors.T[:, :, None, None]
    hue = _hue_matrices(turns.view(b))
    maps = [bright * eye, contrast * eye, saturation * eye + (1 - saturation) * luma, hue]
    matrices = torch.stack([m.expand(b, 3, 3) for m in maps], 1)
    matrices = matrices.gather(1, order[:, :, None, None].expand(-1, -1, 3, 3))
    pivots = torch.where(order == 1, 1 - contrast.view(b, 1), 0)
    return matrices.transpose(0, 1), pivots.T[:, :, None]


def _compose(matrices: Tensor, pivots: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of `_color_steps` as one affine map of images whose mean color is `means` [b, 3]."""
    b, device = len(means), means.device
    luma = torch.tensor(_LUMA, device=device)
    matrix, offset = (
        torch.eye(3, device=device).expand(b, 3, 3),
        torch.zeros(b, 3, 1, device=device),
    )
    for step, pivot in zip(matrices, pivots, strict=True):
        mean_gray = luma @ (matrix @ means[:, :, None] + offset)  # [b, 1]
        matrix, offset = step @ matrix, step @ offset + (pivot * mean_gray)[:, :, None]
    return matrix, offset


def _recolor(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The color operations on x [b, 3, n] from 0 to 1, clamped after two of them and at the end."""
    matrices, pivots = _color_steps(p["factors"], p["order"])
    luma, eye = torch.tensor(_LUMA, device=x.device), torch.eye(3, device=x.device)
    matrix, offset = _compose(matrices[:2], pivots[:2], x.mean(2))
    x = torch.bmm(matrix, x).add_(offset).clamp_(0, 1)
    matrix, offset = _compose(matrices[2:], pivots[2:], x.mean(2))
    gray = p["gray"][:, None, None]
    to_gray = gray * luma + (1 - gray) * eye
    return torch.bmm(to_gray @ matrix, x).add_(to_gray @ offset).clamp_(0, 1)


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Bilinear rotation about the center, counter-clockwise, black outside; [b, 3, s, s]."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _parameters(view: View, u: Uniforms, height: int, width: int) -> dict[str, npt.NDArray[Any]]:
    """The parameters of every operation for every image, from uniform numbers [b, draws]."""
    jitter = u[:, 24] < view.jitter_p

    def factor(column: int, p: float, low_high: Range, neutral: float) -> npt.NDArray[Any]:
        return np.where(
            jitter & (u[:, column + 4] < p), _between(u[:, column], low_high), neutral
        ).astype(np.float32)

    return {
        "boxes": crop_boxes(view, u, height, width),
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
        "sigma": np.where(u[:, 38] < view.blur_p, _between(u[:, 39], view.blur_sigma), 0),
        "degrees": np.where(u[:, 40] < view.rotation_p, _between(u[:, 41], view.rotation), 0),
        "solarize": u[:, 42] < view.solarize_p,
    }


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The type of matrix products and autocast: bf16 where the processor has it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    supported = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


def _augment(planes: Tensor, view: View, u: Uniforms, size: int, dtype: torch.dtype) -> Tensor:
    """One view of planes [b, 3, h, w] (0 to 255) as float32 [b, 3, size, size] from 0 to 1."""
    device, (b, _, height, width) = planes.device, planes.shape
    host = _parameters(view, u, height, width)
    turned = np.flatnonzero(host["degrees"])  # known on the host: no synchronization
    p = {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in host.items()}
    top, left, crop_height, crop_width = p["boxes"].unbind(1)
    rows = _resize_matrices(top, crop_height, height, size).to(dtype)
    columns = _resize_matrices(left, crop_width, width, size)
    columns = torch.where(p["flip"][:, None, None], columns.flip(1), columns).to(dtype)
    if view.blur_p:
        blur = _blur_matrices(p["sigma"], size).to(dtype)
        rows, columns = blur @ rows, blur @ columns
    x = torch.bmm(planes.view(b, 3 * height, width), columns.transpose(1, 2))  # [b, 3 h, size]
    rows = rows[:, None].expand(b, 3, size, height).reshape(3 * b, size, height)
    x = torch.bmm(rows, x.view(3 * b, height, size)).view(b, 3, size, size).float()
    if turned.size:
        index = torch.from_numpy(turned).to(device)
        x[index] = _rotate(x[index], p["degrees"][index])
    x = _recolor(x.view(b, 3, size * size).mul_(1 / 255), p)
    if view.solarize_p:
        inverted = p["solarize"][:, None, None] & (x >= view.solarize_threshold)
        x = torch.where(inverted, 1 - x, x)
    return x.view(b, 3, size, size)


@torch.no_grad()
def make_views(
    images: Tensor,
    views: Sequence[View],
    u: Uniforms,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Views of a uint8 batch [b, h, w, 3] as a list of normalized tensors [b, 3, size, size].

    `u` is [v, b, draws] from `uniforms`, where v is the sum of the counts; `mean` and `std` are of
    values from 0 to 1; `dtype` is that of the products and the result, None takes `matmul_dtype`.
    On a CPU a batch goes through in pieces that stay in the cache.
    """
    device, b = images.device, len(images)
    dtype = dtype or matmul_dtype(device)
    specs = [view for view in views for _ in range(view.count)]
    shift = torch.tensor(mean, device=device)[:, None, None]
    scale = torch.tensor(std, device=device).reciprocal()[:, None, None]
    out = [torch.empty(b, 3, size, size, dtype=dtype, device=device) for _ in specs]
    piece = _PIECE if device.type == "cpu" else b
    for start in range(0, b, piece):
        part = slice(start, start + piece)
        planes = images[part].permute(0, 3, 1, 2).contiguous().to(dtype)
        for k, view in enumerate(specs):
            x = _augment(planes, view, u[k, part], size, dtype)
            out[k][part] = x.sub_(shift).mul_(scale)
    return out
