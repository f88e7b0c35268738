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
from pipeline.checks import check
from pipeline.view_maps import (
    Range,
    Uniforms,
    between,
    blur_integrals,
    blur_matrices,
    color_maps,
    crop_boxes,
    erase,
    erased_boxes,
    recolor,
    resize_grid,
    resize_matrices,
    rotate,
    solarize,
)

_PIECE = 32  # images that stay in the cache of a CPU core
_DRAWS, _MORE = 43, 5  # uniform numbers per image and view, those of erasing after the others
_NUMBERS = {"boxes": 4, "flip": 1, "factors": 4, "order": 4, "gray": 1, "sigma": 1, "degrees": 1}
_NUMBERS |= {"solarize": 1, "erased": 4}  # of each of the `parameters`


@dataclass(frozen=True)
class View:
    """The augmentations of a view: for each operation a probability (0 turns it off) and a range.

    The defaults are SimCLR's (arXiv 2002.05709, appendix A) at color strength 1.
    """

    count: int = 2
    """How many views are drawn this way."""
    size: float = 1.0
    """Pixels of the view as a fraction of the resolution: below 1 in the local views of
    multi-crop.
    """
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
    erase_p: float = 0.0
    """Probability that a rectangle is erased, filled with the mean color (arXiv 1708.04896)."""
    erase_area: Range = (0.02, 0.33)
    """Area of that rectangle as a fraction of the view; its aspect ratio is 0.3 to 3.3."""

    def __post_init__(self) -> None:
        check("views", "1 or more", count=self.count)
        check("views", "above 0", size=self.size)
        for name, value in vars(self).items():
            if name.endswith("_p"):
                check("views", "from 0 to 1", **{name: value})
            if isinstance(value, tuple) and not value[0] <= value[1]:
                raise InputError(f"views: {name} is {list(value)}; [low, high] is expected")
        for name in ("crop_scale", "erase_area"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise InputError(
                    f"views: {name} is {[low, high]}; 0 < low <= high <= 1 is expected"
                )
        if self.crop_ratio[0] <= 0:
            raise InputError(f"views: crop_ratio is {list(self.crop_ratio)}; above 0 is expected")

    def pixels(self, resolution: int) -> int:
        """Pixels of the view at a resolution."""
        return max(1, round(self.size * resolution))


WHOLE = View(1, crop_p=0, flip_p=0, jitter_p=0, grayscale_p=0, blur_p=0)
"""No augmentation at all: the image, resized."""


def uniforms(seed: int, step: int, batch: int, views: int) -> Uniforms:
    """Every random number of the views of step `step`, [views, batch, draws] in [0, 1).

    A pure function of (seed, step, view, place in the global batch): a rank, or a micro-batch,
    takes its slice of the second axis and sees the augmentations that one process would see.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    parts = [rng.random((views, batch, k), dtype=np.float32) for k in (_DRAWS, _MORE)]
    return np.concatenate(parts, axis=2)


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
        "erased": erased_boxes(u[:, 43:48], view.erase_p, view.erase_area),
    }


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The type of matrix products and autocast: bf16 where the processor has it, else float32."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has else torch.float32
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class Views:
    """Makes the views of batches, in memory of its own: fresh pages cost more than the sums.

    What a call returns is therefore overwritten by the next one (autograd notices where a graph
    still needs it).
    """

    def __init__(
        self,
        views: Sequence[View],
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype | None = None,
    ) -> None:
        """`mean` and `std` are of values from 0 to 1; `dtype` is that of the matrix products and of
        the result, None takes `matmul_dtype`.
        """
        self.views = [view for view in views for _ in range(view.count)]
        self.std, self.dtype = std, dtype
        self.limits = [(-m / s, (1 - m) / s) for m, s in zip(mean, std, strict=True)]
        self.held = dict[str, Tensor]()

    def draw(self, u: Uniforms, height: int, width: int) -> Tensor:
        """What is random in the views of images of this size, from `uniforms`: [v, b, numbers]."""
        drawn = [parameters(view, u[k], height, width) for k, view in enumerate(self.views)]
        of_view = [[p[name].reshape(u.shape[1], -1) for name in _NUMBERS] for p in drawn]
        return torch.from_numpy(np.stack([np.hstack(p, dtype=np.float32) for p in of_view]))

    @torch.no_grad()
    def __call__(
        self, images: Tensor, drawn: Tensor, size: int, only: Sequence[int] | None = None
    ) -> list[Tensor]:
        """A uint8 batch [b, h, w, 3] as normalized views, each [b, 3, s, s], where s is `size`
        times the view's own.

        `drawn` is from `draw`, on the device of the images; `only` names the views that are made.
        On a CPU a batch goes through in pieces that stay in the cache.
        """
        self.device, b = images.device, len(images)
        dtype = self.dtype or matmul_dtype(self.device)
        chosen = range(len(self.views)) if only is None else only
        views = [self.views[k] for k in chosen]
        sizes = [view.pixels(size) for view in views]
        maps_of = [
            self._maps(v, drawn[k], images, s) for k, v, s in zip(chosen, views, sizes, strict=True)
        ]
        results = [
            self._memory(f"view {k}", dtype, b, 3, s, s) for k, s in zip(chosen, sizes, strict=True)
        ]
        piece = _PIECE if self.device.type == "cpu" else b
        for start in range(0, b, piece):
            part = slice(start, start + piece)
            planar = _planar(images[part])
            planes = self._memory("planes", dtype, *planar.shape).copy_(planar)
            for view, maps, s, result in zip(views, maps_of, sizes, results, strict=True):
                own = {k: t[part] for k, t in maps.items()}
                result[part] = self._augment(planes, view, own, s)
        return results

    def _memory(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A tensor of any content, in the memory held under `name`."""
        size = math.prod(shape) * dtype.itemsize
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.held[name][:size].view(dtype).view(shape)

    def _maps(self, view: View, drawn: Tensor, images: Tensor, size: int) -> dict[str, Tensor]:
        """What the maps of one view are made from, for each image of a batch."""
        _, height, width, _ = images.shape
        parts = zip(_NUMBERS, drawn.split([*_NUMBERS.values()], 1), strict=True)
        p = {name: part if part.shape[1] > 1 else part[:, 0] for name, part in parts}
        top, left, crop_height, crop_width = p["boxes"].unbind(1)
        maps = {"solarize": p["solarize"] > 0, "degrees": p["degrees"], "erased": p["erased"]}
        maps["row_in"], maps["row_out"] = resize_grid(top, crop_height, height, size)
        columns = resize_grid(left, crop_width, width, size, p["flip"] > 0)
        maps["column_in"], maps["column_out"] = columns
        if view.blur_p:
            maps["blur"] = blur_integrals(p["sigma"], size)
        colors = color_maps(p["factors"], p["order"].long(), p["gray"], self.std)
        return maps | dict(zip(("of_pixel", "of_mean"), colors, strict=True))

    def _augment(self, planes: Tensor, view: View, maps: dict[str, Tensor], size: int) -> Tensor:
        """One view of planes [b, h, 3, w] (0 to 255) as normalized float32 [b, 3, size, size]."""
        (b, height, _, width), dtype = planes.shape, planes.dtype
        blur = blur_matrices(maps["blur"], size).to(dtype) if view.blur_p else None

        def matrices(axis: str, inputs: int) -> Tensor:
            shape = b, size, inputs
            weights = self._memory("weights", torch.float32, *shape)
            resize_matrices(maps[f"{axis}_in"], maps[f"{axis}_out"], weights)
            resize = self._memory("resize", dtype, *shape).copy_(weights)
            if blur is None:
                return resize
            return torch.bmm(blur, resize, out=self._memory("blurred", dtype, *shape))

        half = self._memory("half", dtype, b, size, 3 * width)
        torch.bmm(matrices("row", height), planes.view(b, height, 3 * width), out=half)
        columns = matrices("column", width).transpose(1, 2)
        whole = self._memory("whole", dtype, b, size * 3, size)
        torch.bmm(half.view(b, size * 3, width), columns, out=whole)
        x = self._memory("x", torch.float32, b, 3, size, size)
        x.copy_(whole.view(b, size, 3, size).transpose(1, 2))
        if view.rotation_p:
            x = rotate(x, maps["degrees"])
        spare = self._memory("half", torch.float32, b, 3, size * size)  # which is done with
        recolor(x.view(spare.shape), spare, maps["of_pixel"], maps["of_mean"], self.limits)
        if view.solarize_p:
            solarize(x, maps["solarize"], view.solarize_threshold, self.limits)
        if view.erase_p:
            erase(x, maps["erased"])
        return x


def _planar(images: Tensor) -> Tensor:
    """[b, h, w, 3] as [b, h, 3, w]; on a CPU numpy moves bytes twice as fast as torch."""
    if images.device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(images.numpy().transpose(0, 1, 3, 2)))
    return images.transpose(2, 3)
