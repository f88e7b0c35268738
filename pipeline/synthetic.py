"""Wallpapers: generated pictures that SimCLR learns from and a few labels alone do not teach.

The class of a wallpaper is the motif that is printed all over it: an anchor, a cat, a snowflake.
Each print has a size, tilt, slant, mirroring and color of its own, the paper shades from corner to
corner, and the pattern starts anywhere.  So two crops of a wallpaper have little in common but the
motif, which is what a contrastive method finds, while pixels, colors and positions say nothing
about it.  The motifs are glyphs of DejaVu Sans, which matplotlib brings along.
"""

import colorsys
import math
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipeline import InputError

_MOTIFS = {  # each drawn in one way, or in two that share a wallpaper
    "anchor": "⚓",
    "airplane": "✈",
    "cat": "🐱😸",
    "clover": "♣☘",
    "flower": "✿❀",
    "gear": "⚙",
    "knight": "♞♘",
    "music": "♫♬",
    "rook": "♜♖",
    "scissors": "✂✄",
    "skull": "☠",
    "smiley": "☻☺",
    "snowflake": "❄❆",
    "star": "★✩",
    "telephone": "☎☏",
    "umbrella": "☂☔",
    "cup": "☕",
    "envelope": "✉",
    "radiation": "☢",
    "wheel": "☸",
}
CLASS_NAMES = tuple(_MOTIFS)
"""What label k shows."""

_CELLS = 2, 3  # prints that fit side by side, least and most
_FILL = 0.85, 1.05  # size of a print, in cells
_SHIFT = 0.2  # of a print, either way, in cells
_TILT = 0.5  # either way, in radians
_SLANT = 0.2  # either way, pixels to the side per pixel down
_STRETCH = 0.15  # log of width over height, either way, halved
_PAPER = (0.0, 1.0), (0.3, 1.0), (0.05, 0.45)  # hue, saturation and value
_INK = (0.0, 1.0), (0.0, 0.7), (0.75, 1.0)
_DRAWN = 256  # pixels of a glyph before it is scaled

Draws = npt.NDArray[np.float64]


def make(
    split: str, classes: int, per_class: int, size: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    """Yield `per_class` wallpapers of each class, as pixels [size, size, 3] and label.

    Picture i has the label i % classes and is a function of (seed, split, i, size).  Raises
    InputError where there are not so many motifs.
    """
    if not 1 <= classes <= len(_MOTIFS):
        raise InputError(f"synthetic: classes is {classes}; 1 to {len(_MOTIFS)} is expected")
    for i in range(classes * per_class):
        rng = np.random.default_rng([seed, zlib.crc32(split.encode()), i])
        yield _wallpaper(_MOTIFS[CLASS_NAMES[i % classes]], size, rng), i % classes


def _wallpaper(glyphs: str, size: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    corners = [_color(u, *_PAPER) for u in rng.random((4, 3))]
    paper = Image.new("RGB", (2, 2))
    paper.putdata(corners)
    image = paper.resize((size, size), Image.Resampling.BILINEAR)
    cells = int(rng.integers(_CELLS[0], _CELLS[1] + 1))
    cell, start = size / cells, rng.random(2)
    draws = rng.random((cells + 1, cells + 1, 11))
    for row, column in product(range(cells + 1), repeat=2):
        u = draws[row, column]
        stamp = _print(glyphs[int(u[0] * len(glyphs))], cell * _between(u[1], *_FILL), u[2:6])
        shift = (u[6:8] * 2 - 1) * _SHIFT
        x, y = (np.array([column, row]) + 0.5 - start + shift) * cell - stamp.width / 2
        image.paste(_color(u[8:11], *_INK), (round(x), round(y)), stamp)
    return np.asarray(image)


def _print(glyph: str, extent: float, u: Draws) -> Image.Image:
    """The ink of a glyph `extent` pixels large, tilted, slanted, stretched and perhaps mirrored."""
    source = _glyph(glyph, 8 * math.ceil(extent / 8))
    tilt, slant = (2 * u[0] - 1) * _TILT, (2 * u[1] - 1) * _SLANT
    stretch, mirror = math.exp((2 * u[2] - 1) * _STRETCH), 1 if u[3] < 0.5 else -1
    turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    forward = turn @ [[1, slant], [0, 1]] @ np.diag([mirror * stretch, 1 / stretch])
    back = np.linalg.inv(forward) * (source.width / extent)  # where a pixel of the print comes from
    room = math.ceil(1.35 * extent)
    offset = source.width / 2 - back @ [room / 2, room / 2]
    matrix = (*back[0], offset[0], *back[1], offset[1])
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return source.transform((room, room), affine, matrix, bilinear)


@cache
def _glyph(glyph: str, pixels: int) -> Image.Image:
    """The glyph as a gray picture, `pixels` square, that its ink just fills."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), _DRAWN, layout_engine=ImageFont.Layout.BASIC)
    image = Image.new("L", (3 * _DRAWN, 3 * _DRAWN))
    ImageDraw.Draw(image).text((_DRAWN, _DRAWN), glyph, 255, font)
    ink = image.crop(image.getbbox())
    square = Image.new("L", (max(ink.size), max(ink.size)))
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    return square.resize((pixels, pixels), Image.Resampling.LANCZOS)


def _color(u: Draws, *ranges: tuple[float, float]) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(*(_between(x, *r) for x, r in zip(u, ranges, strict=True)))
    return round(255 * r), round(255 * g), round(255 * b)


def _between(u: float, low: float, high: float) -> float:
    return low + (high - low) * float(u)
