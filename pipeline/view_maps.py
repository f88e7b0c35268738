"""The maps that views are made of, each for a whole batch: crop, resize, blur, color, rotation."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

Range = tuple[float, float]
Limits = Sequence[Range]
"""What 0 and 1 are in each channel when normalized."""
Uniforms = npt.NDArray[np.float32]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow and torchvision
CROP_TRIES = 10  # as in torchvision's RandomResizedCrop


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to the device once: such a copy waits for all that is queued there."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def between(u: Uniforms, low_high: Range) -> Uniforms:
    low, high = low_high
    return low + (high - low) * u


def crop_boxes(
    u: Uniforms, p: float, scale: Range, ratio_range: Range, height: int, width: int
) -> Uniforms:
    """Crops as [b, 4] rows of (top, left, height, width) in whole pixels, drawn as by torchvision.

    `u` is [b, draws].  Ten tries at area and aspect ratio; if none fits, the largest central crop.
    """
    b = len(u)
    area = height * width * between(u[:, :CROP_TRIES], scale)
    low, high = math.log(ratio_range[0]), math.log(ratio_range[1])
    ratio = np.exp(between(u[:, CROP_TRIES : 2 * CROP_TRIES], (low, high)))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first, rows = fits.argmax(1), np.arange(b)
    w, h = w[rows, first], h[rows, first]
    top = np.floor(u[:, 20] * (height - h + 1))
    left = np.floor(u[:, 21] * (width - w + 1))
    boxes = np.stack([top, left, h, w], 1)
    aspect = min(max(width / height, ratio_range[0]), ratio_range[1])
    fw = min(width, round(height * aspect))
    fh = min(height, round(width / aspect))
    boxes[~fits.any(1)] = [(height - fh) // 2, (width - fw) // 2, fh, fw]
    boxes[u[:, 22] >= p] = [0, 0, height, width]
    return boxes.astype(np.float32)


def resize_grid(
    start: Tensor, length: Tensor, inputs: int, outputs: int, mirror: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where the pixels of [start, start + length) and those resampled from them lie.

    Returns places in units of the filter's support: of the inputs [b, inputs], infinite outside of
    the range, and of the outputs [b, outputs], in reverse order where `mirror` [b] holds.
    """
    device = start.device
    scale = (length / outputs)[:, None]
    per_support = scale.clamp_min(1).reciprocal()
    center = (torch.arange(outputs, device=device) + 0.5).expand(len(start), -1)
    if mirror is not None:
        center = torch.where(mirror[:, None], outputs - center, center)
    offset = torch.arange(inputs, device=device) - start[:, None]
    inside = (offset >= 0) & (offset < length[:, None])
    position = torch.where(inside, (offset + 0.5) * per_support, torch.inf)
    return position, center * scale * per_support


def resize_matrices(position: Tensor, center: Tensor, out: Tensor) -> Tensor:
    """Antialiased bilinear resampling on a `resize_grid`, as matrices `out` [b, outputs, inputs].

    Pillow's triangle filter (`ImagingResample`): its support grows with the reduction, and it never
    reads outside the crop.
    """
    weights = torch.sub(position[:, None, :], center[:, :, None], out=out).abs_()
    weights.neg_().add_(1).clamp_min_(0)
    return weights.mul_(weights.sum(2, keepdim=True).reciprocal_())


def blur_integrals(sigma: Tensor, size: int) -> Tensor:
    """Integrals of Gaussians up to the borders of pixels, [b, 2 * size], around the one between."""
    border = torch.arange(1 - size, size + 1, device=sigma.device) - 0.5
    below: Tensor = torch.special.ndtr(border / sigma.clamp_min(1e-3)[:, None])
    return below


def blur_matrices(below: Tensor, size: int) -> Tensor:
    """Gaussian blur, the edge pixel repeated outside, as [b, size, size]; sigma 0 is the
    identity.  `below` are the `blur_integrals`.
    """
    kernel = below.diff(dim=1)  # weight of the pixel at distance 1 - size … size - 1
    # Row i is kernel[size - 1 - i :][:size]: windows of the kernel, from the last to the first.
    matrix = kernel.unfold(1, size, 1).flip(1)
    # what falls outside is folded onto the first and the last pixel
    matrix[:, :, 0] = below[:, 1 : size + 1].flip(1)
    matrix[:, :, -1] = 1 - below[:, size - 1 : 2 * size - 1].flip(1)
    return matrix


def hue_matrices(turns: Tensor) -> Tensor:
    """Rotation of color space about the gray axis, [b, 3, 3]; a third of a turn makes red green."""
    angle = 2 * math.pi * turns[:, None, None]
    mean = torch.full((3, 3), 1 / 3, device=turns.device)
    eye = torch.eye(3, device=turns.device)
    cross = (eye.roll(1, 0) - eye.roll(-1, 0)) / math.sqrt(3)
    return mean + torch.cos(angle) * (eye - mean) + torch.sin(angle) * cross


def color_steps(factors: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation and hue as color matrices, in each image's own order.

    `factors` [b, 4], `order` [b, 4] (a permutation of 0..3 in each row).  Returns the matrices
    [4, b, 3, 3] and the shares [4, b, 1] of the mean gray that a step adds (for contrast).
    """
    b, device = len(factors), factors.device
    luma, eye = _constant(_LUMA, device), torch.eye(3, device=device)
    bright, contrast, saturation, turns = factors.T[:, :, None, None]
    hue = hue_matrices(turns.view(b))
    maps = [bright * eye, contrast * eye, saturation * eye + (1 - saturation) * luma, hue]
    matrices = torch.stack([m.expand(b, 3, 3) for m in maps], 1)
    matrices = matrices.gather(1, order[:, :, None, None].expand(-1, -1, 3, 3))
    pivots = torch.where(order == 1, 1 - contrast.view(b, 1), 0)
    return matrices.transpose(0, 1), pivots.T[:, :, None]


def color_maps(
    factors: Tensor, order: Tensor, gray: Tensor, std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """All color operations as two maps of images x [b, 3, n], to be clamped after each of them.

    Returns (A, B), both [b, 2, 3, 3].  The first map is A x + B m, where m [b, 3, 1] is the mean
    color of x (for contrast), and goes from 0 … 255 to 0 … 1; the second one normalizes too, and
    makes gray where `gray` [b] is 1: A x + B m - mean / std.
    """
    matrices, pivots = color_steps(factors, order)
    luma, eye = _constant(_LUMA, gray.device), torch.eye(3, device=gray.device)
    to_gray = gray[:, None, None] * luma + (1 - gray[:, None, None]) * eye
    last = torch.stack(
        [(eye / 255).expand_as(to_gray), to_gray / _constant((*std,), gray.device)[:, None]]
    )
    # two steps at once: the first ones of both maps, then the second ones
    first, second = matrices[::2], matrices[1::2]
    mixed = pivots[::2, :, :, None] * luma.expand_as(first)
    mean_gray = pivots[1::2, :, :, None] * (luma @ (first + mixed))[:, :, None]
    a, m = last @ second @ first, last @ (second @ mixed + mean_gray)
    return a.transpose(0, 1), m.transpose(0, 1)


def recolor(x: Tensor, spare: Tensor, of_pixel: Tensor, of_mean: Tensor, limits: Limits) -> None:
    """The maps A and B of `color_maps` in place on x [b, 3, n], 0 to 255, clamped after each.

    `spare` is of the shape of x and overwritten.
    """
    first = of_mean[:, 0] @ x.mean(2, keepdim=True)
    torch.baddbmm(first, of_pixel[:, 0], x, out=spare).clamp_(0, 1)
    shift = _constant(tuple(low for low, _ in limits), x.device)[:, None]
    second = of_mean[:, 1] @ spare.mean(2, keepdim=True) + shift
    torch.baddbmm(second, of_pixel[:, 1], spare, out=x)
    for channel, (low, high) in zip(x.unbind(1), limits, strict=True):
        channel.clamp_(low, high)


def solarize(x: Tensor, chosen: Tensor, threshold: float, limits: Limits) -> None:
    """Invert, in place, the values from `threshold` (0 to 1) on of the images where `chosen` [b]
    holds; x [b, 3, s, s] is normalized.
    """
    for channel, (low, high) in zip(x.unbind(1), limits, strict=True):
        inverted = chosen[:, None, None] & (channel >= low + threshold * (high - low))
        channel.copy_(torch.where(inverted, low + high - channel, channel))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Bilinear rotation about the center, counter-clockwise, black outside; [b, 3, s, s]."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def erased_boxes(u: Uniforms, p: float, area: Range) -> Uniforms:
    """Rectangles as [b, 4] rows of (top, left, height, width), parts of the view; empty where none
    is drawn.  `u` is [b, 5].
    """
    low, high = math.log(0.3), math.log(3.3)
    size, ratio = between(u[:, 1], area), np.exp(between(u[:, 2], (low, high)))
    height, width = (np.minimum(np.sqrt(size * r), 1) for r in (ratio, 1 / ratio))
    boxes = np.stack([u[:, 3] * (1 - height), u[:, 4] * (1 - width), height, width], 1)
    boxes[u[:, 0] >= p] = 0
    return boxes.astype(np.float32)


def erase(x: Tensor, boxes: Tensor) -> None:
    """Set rectangles of normalized views [b, 3, s, s] to 0, the mean, in place."""
    size = x.shape[2]
    middle = (torch.arange(size, device=x.device) + 0.5) / size
    top, left, height, width = boxes[:, :, None].unbind(1)  # [b, 1] each
    rows = (middle >= top) & (middle < top + height)
    columns = (middle >= left) & (middle < left + width)
    x.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
