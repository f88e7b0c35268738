"""Pictures, each written whole to a PNG file: rows of images by Pillow, the rest by matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from pipeline.metrics import confusion_counts
from pipeline.runs import replacing

Ints = npt.NDArray[np.int64]

INK, SOFT, MIST, PALE, PAPER = "#1f2430", "#7a8194", "#c5cede", "#dfe3ec", "#ffffff"
BLUE, GREEN, RED, AMBER = "#2f6fde", "#1f9d6b", "#d64545", "#e0a030"
HEAT = LinearSegmentedColormap.from_list("heat", [PAPER, "#cfe0fb", "#6d9df0", BLUE, "#12306e"])
matplotlib.rcParams["text.parse_math"] = False  # a class may be named '$100'
FEW = 30  # classes whose names fit into a picture
_CELLS = 200  # of a confusion matrix, that an eye can tell apart
_TILE, _GAP, _MARGIN, _FRAME = 112, 12, 28, 5  # pixels


@dataclass(frozen=True)
class Tile:
    """An image [h, w, 3] uint8 with a line under it and, where it stands out, a frame."""

    image: npt.NDArray[np.uint8]
    caption: str = ""
    frame: str | None = None


def image_rows(
    path: Path, rows: Sequence[tuple[str, Sequence[Tile]]], title: str, note: str = ""
) -> None:
    """Rows of images, each with a heading of one or more lines at its left."""
    heading, small = ImageFont.load_default(15), ImageFont.load_default(12)
    lines = [line for text, _ in rows for line in text.split("\n")]
    left = _MARGIN + int(max((heading.getlength(line) for line in lines), default=0)) + 2 * _GAP
    top, step = _MARGIN + (62 if note else 40), _TILE + 22 + _GAP
    columns = max((len(tiles) for _, tiles in rows), default=0)
    words = ImageFont.load_default(22)
    wide = max(left + columns * (_TILE + _GAP), _MARGIN + int(words.getlength(title)))
    wide = max(wide, _MARGIN + int(heading.getlength(note))) + _MARGIN
    sheet = Image.new("RGB", (wide, top + len(rows) * step + _MARGIN - _GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), title, INK, words)
    draw.text((_MARGIN, _MARGIN + 26), note, SOFT, heading)
    for r, (text, tiles) in enumerate(rows):
        y = top + r * step
        draw.text((_MARGIN, y + _TILE / 2), text, INK, heading, "lm")
        for c, tile in enumerate(tiles):
            x = left + c * (_TILE + _GAP)
            if tile.frame:
                box = (x - _FRAME, y - _FRAME, x + _TILE + _FRAME - 1, y + _TILE + _FRAME - 1)
                draw.rounded_rectangle(box, _FRAME, tile.frame)
            sheet.paste(_fitted(tile.image), (x, y))
            draw.text(
                (x + _TILE / 2, y + _TILE + 13),
                shortened(tile.caption),
                tile.frame or SOFT,
                small,
                "mm",
            )
    with replacing(path) as aside:
        sheet.save(aside, "PNG")


def _fitted(image: npt.NDArray[np.uint8]) -> Image.Image:
    """The image on a square of the tile's size, its proportions kept."""
    whole = Image.fromarray(image)
    scale = _TILE / max(whole.size)
    size = (max(1, round(whole.width * scale)), max(1, round(whole.height * scale)))
    square = Image.new("RGB", (_TILE, _TILE), PALE)
    resized = whole.resize(size, Image.Resampling.BICUBIC)
    square.paste(resized, ((_TILE - size[0]) // 2, (_TILE - size[1]) // 2))
    return square


def house_axes(figure: Figure, where: tuple[float, float, float, float], title: str) -> Axes:
    """Axes at (left, bottom, width, height) of the figure, in the house's style."""
    axes = figure.add_axes(where)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.tick_params(colors=SOFT, labelsize=9, length=3)
    for side in axes.spines.values():
        side.set_color(PALE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def save_figure(figure: Figure, path: Path) -> None:
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=110, bbox_inches="tight", pad_inches=0.3)


def confusion(path: Path, labels: Ints, predicted: Ints, names: Sequence[str]) -> None:
    """Confusion matrix of the true `labels` [n] and `predicted` [n]; `names` are the classes'.

    Few classes show every share of the true class in percent; many show the matrix as a map (a cell
    of it is the largest of several), and in words the pairs that are most often confused and the
    hardest and easiest classes.
    """
    counts = confusion_counts(labels, predicted, len(names))
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few, block = len(names) <= FEW, -(-len(names) // _CELLS)
    side = max(3.2, 0.42 * len(names)) if few else 7.0
    figure = Figure((side + 2, side + 1))
    where = (1 / (side + 2), 0.5 / (side + 1), side / (side + 2), side / (side + 1))
    accuracy = 100 * float(np.trace(counts)) / max(len(labels), 1)
    axes = house_axes(figure, where, f"{accuracy:.1f} % of {len(labels):,} images right")
    axes.grid(False)
    starts = np.arange(0, len(names), block)
    cells = np.maximum.reduceat(np.maximum.reduceat(shares, starts, 0), starts, 1)
    edges = (-0.5, len(starts) * block - 0.5)
    norm = PowerNorm(0.5, 0, 100)
    axes.imshow(cells, cmap=HEAT, norm=norm, interpolation="nearest", extent=(*edges, *edges[::-1]))
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    if few:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for t, p in np.argwhere(shares >= 0.5):
            color = PAPER if shares[t, p] > 40 else INK
            text = f"{shares[t, p]:.0f}"
            axes.text(p, t, text, ha="center", va="center", color=color, fontsize=8)
    else:
        words = _in_words(counts, names)
        axes.text(1.04, 1, words, va="top", fontsize=9, color=INK, transform=axes.transAxes)
    save_figure(figure, path)


def _in_words(counts: Ints, names: Sequence[str]) -> str:
    """The most confused pairs and the hardest and easiest classes, a line each."""
    wrong = counts - np.diag(np.diag(counts))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:16]
    lines = ["most often confused (true → predicted)"]
    for t, p in zip(*np.unravel_index(pairs, counts.shape), strict=True):
        if wrong[t, p]:
            lines.append(f"{wrong[t, p]:>5}   {shortened(names[t])} → {shortened(names[p])}")
    seen = np.flatnonzero(counts.sum(1))
    right = 100 * np.diag(counts)[seen] / counts.sum(1)[seen]
    order = np.argsort(right, kind="stable")
    for what, chosen in (("hardest classes", order[:8]), ("easiest classes", order[::-1][:8])):
        lines += ["", what]
        lines += [f"{right[k]:>5.0f} %   {shortened(names[seen[k]])}" for k in chosen]
    return "\n".join(lines)


def shortened(name: str, length: int = 20) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def curve(path: Path, history: Sequence[dict[str, float]], title: str) -> None:
    """The course of a run from its `history`: dicts of a "step" and any of loss and accuracies.

    Losses (keys that end in "loss") are in one panel, percentages (all others but lr and
    images_per_second) in one above it.
    """
    keys = {k for point in history for k in point} - {"step", "lr", "images_per_second"}
    losses = sorted(k for k in keys if k.endswith("loss"))
    panels = [p for p in (sorted(keys - set(losses)), losses) if p]
    height = 1.1 + 2.7 * max(len(panels), 1)
    figure = Figure((8, height))
    figure.text(0.03, 1 - 0.32 / height, title, fontsize=13, color=INK, va="center")
    steps = [point["step"] for point in history]
    for row, panel in enumerate(panels):
        bottom = 1 - (0.75 + 2.7 * (row + 1) - 0.55) / height
        axes = house_axes(figure, (0.09, bottom, 0.86, 1.95 / height), "")
        for key, color in zip(panel, (BLUE, GREEN, AMBER, RED) * len(panel), strict=False):
            points = [(p["step"], p[key]) for p in history if key in p]
            marker = "o" if len(points) <= 40 else None
            x, y = zip(*points, strict=True)
            last = f"{key.replace('_', ' ')}, {y[-1]:.2f} at the end"
            axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.6, label=last)
        axes.set_ylabel("loss" if panel is losses else "%", color=SOFT)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        axes.set_xlim(min(steps), max(steps) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if row == len(panels) - 1:
            axes.set_xlabel("step", color=SOFT)
    save_figure(figure, path)


def coverage(
    path: Path,
    predicted: Ints,
    accepted: Ints,
    confidences: npt.NDArray[np.float32],
    correct: npt.NDArray[np.bool_],
    names: Sequence[str],
    title: str,
) -> None:
    """Pseudo-labels: images per class, and how often labeled images of a confidence are right.

    `predicted` and `accepted` [classes] count unlabeled images; `confidences` and `correct` [n] are
    those of labeled images that the classifier was not trained on.
    """
    figure = Figure((12, 5))
    figure.text(0.03, 0.93, title, fontsize=13, color=INK, va="center")
    few, order = len(names) <= FEW, np.argsort(-predicted, kind="stable")
    axes = house_axes(figure, (0.06, 0.25 if few else 0.13, 0.5, 0.55 if few else 0.67), "")
    axes.set_title("unlabeled images of each predicted class", loc="left", color=INK, fontsize=11)
    for counts, color, what in ((predicted, MIST, "predicted"), (accepted, BLUE, "pseudo-labeled")):
        label = f"{what}, {counts.sum():,}"
        if few:
            axes.bar(range(len(names)), counts[order], 0.8, color=color, label=label)
        else:
            axes.stairs(counts[order], fill=True, color=color, label=label)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlim(*((-0.6, len(names) - 0.4) if few else (0, len(names))))
    if few:
        axes.set_xticks(range(len(names)), [shortened(names[k]) for k in order], rotation=90)
    else:
        axes.set_xlabel(f"{len(names)} classes, most often predicted first", color=SOFT)
    right = house_axes(
        figure, (0.63, 0.13, 0.34, 0.67), f"{len(correct):,} labeled images it never saw"
    )
    bins = np.clip((confidences * 10).astype(np.int64), 0, 9)
    n, hits = np.bincount(bins, minlength=10), np.bincount(bins, correct, 10)
    share = 100 * hits / np.maximum(n, 1)
    right.bar(np.arange(10) * 10 + 5, share, 8.6, color=GREEN)
    right.plot([0, 100], [0, 100], color=SOFT, linewidth=1, linestyle="--")
    for k in np.flatnonzero(n):
        inside = share[k] > 8
        y, color = (2.0, PAPER) if inside else (share[k] + 1.5, SOFT)
        right.text(10.0 * k + 5, y, f"{n[k]:,}", ha="center", color=color, fontsize=8)
    right.set(xlim=(0, 100), ylim=(0, 108))
    right.set_xlabel("confidence, %", color=SOFT)
    right.set_ylabel("right, %", color=SOFT)
    save_figure(figure, path)
