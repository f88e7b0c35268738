"""What a label request asks for, as people would look at it: a table and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from pipeline.figures import (
    AMBER,
    BLUE,
    FEW,
    HEAT,
    INK,
    MIST,
    PALE,
    PAPER,
    SOFT,
    Tile,
    house_axes,
    image_rows,
    save_figure,
    shortened,
)
from pipeline.manifest import Contest
from pipeline.neighbours import search
from pipeline.selection import Candidates, Floats, Ints, Request
from pipeline.tables import write_table

_ROWS, _AROUND = 12, 9  # of the contact sheet
_POINTS = 1500  # of the pool in the map, and as many picks and labeled images at most
_SAMPLE = 20_000  # images of the pool that shares are estimated by


def report(
    folder: Path, contest: Contest, candidates: Candidates, request: Request, seed: int, title: str
) -> None:
    """Write picks.csv, contact_sheet.png, map.png and classes.png into `folder`."""
    picks, rng = np.searchsorted(candidates.eligible, request.indices), np.random.default_rng(seed)
    guessed = candidates.guesses(picks)
    _table(folder / "picks.csv", candidates, request, picks, guessed)
    _contact_sheet(folder / "contact_sheet.png", contest, candidates, request, rng, title)
    _map(folder / "map.png", candidates, picks, rng, title)
    _classes(folder / "classes.png", contest, candidates, guessed[0], rng, title)


def _table(
    path: Path, candidates: Candidates, request: Request, picks: Ints, guessed: tuple[Ints, Floats]
) -> None:
    """A row for each pick; what is not known is left empty."""
    margin = candidates.margin[picks] if candidates.logits else np.full(len(picks), np.nan)
    columns = request.indices, request.groups, *guessed, margin, candidates.known[picks]
    rows = []
    for index, group, label, *numbers in zip(*(c.tolist() for c in columns), strict=True):
        words = ["" if np.isnan(number) else f"{number:.4f}" for number in numbers]
        rows.append([index, group, label if label >= 0 else "", *words])
    names = ["index", "cluster", "class", "confidence", "margin", "nearest_labeled"]
    write_table(path, names, rows)


def _contact_sheet(
    path: Path,
    contest: Contest,
    candidates: Candidates,
    request: Request,
    rng: np.random.Generator,
    title: str,
) -> None:
    """For a sample of the clusters a chosen image and the images around it."""
    groups, first, size = np.unique(request.groups, return_index=True, return_counts=True)
    sample = rng.permutation(len(groups))[:_ROWS]
    chosen = request.indices[first[sample]]
    similarities, near = search(candidates.embeddings[chosen], candidates.x, _AROUND)
    images, asked = contest.packed("unlabeled"), set(request.indices.tolist())
    rows = []
    for g, index, around, values in zip(sample, chosen, near, similarities, strict=True):
        shown = [(index, "asked for")]
        found = zip(candidates.eligible[around], values, strict=True)
        shown += [(n, f"{value:.2f}") for n, value in found if n != index]
        tiles = [Tile(images[n], text, BLUE if n in asked else None) for n, text in shown]
        heading = f"cluster {groups[g]}\n{size[g]} asked for\n{index}.png"
        rows.append((heading, tiles[:_AROUND]))
    note = f"{len(sample)} of {len(groups):,} clusters; framed: asked for; beside it the images "
    note += "nearest to it, with their cosine similarity"
    image_rows(path, rows, title, note)


def _map(
    path: Path, candidates: Candidates, picks: Ints, rng: np.random.Generator, title: str
) -> None:
    """The pool, the labeled images and the picks by t-SNE, and how far images are from a label."""
    pool, shown = (_sample(rng, p, _POINTS) for p in (np.arange(len(candidates.x)), picks))
    labeled = _sample(rng, np.arange(len(candidates.labeled)), _POINTS)
    parts = candidates.x[pool], candidates.labeled[labeled], candidates.x[shown]
    figure = Figure((12, 6))
    figure.text(0.03, 0.95, title, fontsize=13, color=INK, va="center")
    left = house_axes(figure, (0.03, 0.08, 0.5, 0.76), "embeddings of a sample, by t-SNE")
    left.grid(False)
    left.set(xticks=[], yticks=[])
    x = np.concatenate(parts)
    if len(x) > 3 and np.ptp(x, 0).any():  # of equal rows PCA, where t-SNE begins, is not a number
        perplexity = min(30.0, (len(x) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(x)
        looks = (MIST, "unlabeled", 6), (AMBER, "labeled", 8), (BLUE, "asked for", 8)
        starts = np.cumsum([0, *map(len, parts)])
        for (color, what, size), start, stop in zip(looks, starts, starts[1:], strict=False):
            of = points[start:stop]
            left.scatter(of[:, 0], of[:, 1], size, color=color, label=what, linewidths=0)
        left.legend(frameon=False, fontsize=9, labelcolor=INK, markerscale=2)
    right = house_axes(figure, (0.6, 0.12, 0.37, 0.72), "unlabeled images this near to a label")
    sample = _sample(rng, np.arange(len(candidates.x)), _SAMPLE)
    before = candidates.known[sample]
    after = np.maximum(before, search(candidates.x[sample], candidates.x[picks], 1)[0][:, 0])
    share = np.linspace(100, 0, len(sample))
    for values, color, when in (
        (before, SOFT, "before"),
        (after, BLUE, "with the labels asked for"),
    ):
        if values.max(initial=-1) > -1:
            label = f"{when}, median {np.median(values):.2f}"
            right.plot(np.sort(values), share, color=color, linewidth=1.8, label=label)
    right.set_xlabel("cosine to the nearest labeled image, at least", color=SOFT)
    right.set_ylabel("% of the images", color=SOFT)
    right.legend(frameon=False, fontsize=9, labelcolor=INK)
    save_figure(figure, path)


def _sample(rng: np.random.Generator, positions: Ints, count: int) -> Ints:
    return np.sort(rng.permutation(positions)[:count])


def _classes(
    path: Path,
    contest: Contest,
    candidates: Candidates,
    guessed: Ints,
    rng: np.random.Generator,
    title: str,
) -> None:
    """The picks of each class, as guessed, beside what as many random images would be."""
    sample = _sample(rng, np.arange(len(candidates.x)), _SAMPLE)
    of_pool = candidates.guesses(sample)[0]
    k, few = contest.classes, contest.classes <= FEW
    if not (of_pool >= 0).any():
        return
    expected = np.bincount(of_pool, minlength=k) * len(guessed) / len(of_pool)
    found = np.bincount(guessed, minlength=k)
    names = contest.names
    order = np.argsort(-expected, kind="stable")
    figure = Figure((10, 5))
    figure.text(0.03, 0.94, title, fontsize=13, color=INK, va="center")
    words = f"as the {'classifier' if candidates.logits else 'nearest labels'} would say: "
    words += f"{np.count_nonzero(found)} of {k} classes, {found.max()} of the most frequent"
    axes = house_axes(figure, (0.07, 0.28 if few else 0.13, 0.9, 0.5 if few else 0.65), words)
    both = (expected[order], MIST, "of as many random images"), (found[order], BLUE, "asked for")
    for (counts, color, what), width in zip(both, (0.8, 0.45), strict=True):
        axes.bar(range(k), counts, width if few else 1.0, color=color, label=what, alpha=0.8)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlim(-0.6, k - 0.4)
    if few:
        axes.set_xticks(range(k), [shortened(names[n]) for n in order], rotation=90)
    else:
        axes.set_xlabel(f"{k} classes, the most frequent first", color=SOFT)
    axes.set_ylabel("images", color=SOFT)
    save_figure(figure, path)


def overlap(folder: Path, chosen: Mapping[str, Ints]) -> None:
    """Write overlap.csv and overlap.png: how many of the images that one strategy asks for another
    asks for too, in percent; `chosen` are the indices by strategy, as many each.
    """
    names = list(chosen)
    shared = [[100 * np.isin(chosen[a], chosen[b]).mean() for b in names] for a in names]
    rows = [[a, *(f"{s:.1f}" for s in row)] for a, row in zip(names, shared, strict=True)]
    write_table(folder / "overlap.csv", ["strategy", *names], rows)
    side = 0.7 * len(names) + 0.5
    figure = Figure((side + 3, side + 2))
    where = (2 / (side + 3), 1.2 / (side + 2), side / (side + 3), side / (side + 2))
    axes: Axes = house_axes(figure, where, "% of the images that two strategies share")
    axes.grid(False)
    axes.imshow(shared, cmap=HEAT, vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, values in enumerate(shared):
        for column, value in enumerate(values):
            color = PAPER if value > 50 else INK if value else PALE
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9
            )
    save_figure(figure, folder / "overlap.png")


def accuracies(path: Path, records: Sequence[dict[str, Any]], floor: str, title: str) -> None:
    """The top-1 of every strategy with every seed, its mean and standard error, and the floor."""
    by: dict[str, list[float]] = {}
    for record in records:
        by.setdefault(record["strategy"], []).append(record["val_top1"])
    base = float(np.mean(by.pop(floor)))
    names = sorted(by, key=lambda name: np.mean(by[name]))
    height = 1.4 + 0.42 * len(names)
    figure = Figure((9, height))
    figure.text(0.03, 1 - 0.3 / height, title, fontsize=13, color=INK, va="center")
    axes = house_axes(figure, (0.2, 0.6 / height, 0.75, 1 - 1.3 / height), "")
    axes.axvline(base, color=SOFT, linestyle="--", linewidth=1.2)
    axes.text(base, len(names) - 0.4, f" no request, {base:.1f}", color=SOFT, fontsize=9)
    for row, name in enumerate(names):
        values, color = np.array(by[name]), AMBER if name == "Random" else BLUE
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        axes.scatter(values, np.full(len(values), row), 14, color=MIST)
        axes.errorbar(values.mean(), row, xerr=error, color=color, marker="o", capsize=4)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.1)
    axes.set_xlabel("top-1 on val, %; bars: standard error", color=SOFT)
    save_figure(figure, path)
