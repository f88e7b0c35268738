"""Pictures are whole PNG files that show what they were given; no global state is left."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import figures
from pipeline.figures import BLUE, Tile, confusion, coverage, curve, image_rows


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def flat(color: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.full((*size, 3), color, np.uint8)


def count(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((picture == color).all(2).sum())


def test_rows_show_every_image_and_frame(tmp_path: Path) -> None:
    rows = [
        ("first\nrow", [Tile(flat((255, 0, 0)), "red", BLUE), Tile(flat((0, 255, 0)))]),
        ("second", [Tile(flat((0, 0, 255), (16, 32)))]),
    ]
    image_rows(tmp_path / "rows.png", rows, "A title", "a note")
    picture = pixels(tmp_path / "rows.png")
    tile = figures._TILE**2
    assert count(picture, (255, 0, 0)) == tile
    assert count(picture, (0, 255, 0)) == tile
    assert count(picture, (0, 0, 255)) == tile // 2  # its proportions are kept
    frame = tuple(int(BLUE[k : k + 2], 16) for k in (1, 3, 5))
    assert count(picture, frame) > 4 * figures._FRAME * figures._TILE * 0.9
    assert [p.name for p in tmp_path.iterdir()] == ["rows.png"]


def test_a_long_title_and_no_rows_fit(tmp_path: Path) -> None:
    image_rows(tmp_path / "rows.png", [], "A title that is longer than any row " * 3)
    picture = pixels(tmp_path / "rows.png")
    assert (picture[:, -figures._MARGIN // 2 :] == 255).all()


@pytest.mark.parametrize("classes", [2, 10, 98, 800])
def test_confusion_of_few_and_many_classes(tmp_path: Path, classes: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 3000)
    names = [f"class number {k} has a long name" for k in range(classes)]
    confusion(tmp_path / "right.png", labels, labels, names)
    confusion(tmp_path / "wrong.png", labels, rng.permutation(labels), names)
    right, wrong = pixels(tmp_path / "right.png"), pixels(tmp_path / "wrong.png")
    assert 300 < right.shape[0] < 2500
    assert 300 < right.shape[1] < 2500
    darkest = (18, 48, 110)  # of the color map: every image of a class in one cell
    assert count(right, darkest) > 300
    assert count(wrong, darkest) < count(right, darkest)


def test_confusion_of_classes_without_images(tmp_path: Path) -> None:
    empty = np.empty(0, np.int64)
    confusion(tmp_path / "c.png", empty, empty, ["a", "b"])
    confusion(tmp_path / "d.png", np.array([0]), np.array([60]), [str(k) for k in range(64)])
    assert pixels(tmp_path / "c.png").size
    assert pixels(tmp_path / "d.png").size


def test_the_most_confused_pairs_come_first() -> None:
    counts = np.diag([5, 5, 5, 0])
    counts[0, 2] = 9
    counts[1, 0] = 3
    lines = figures._in_words(counts, ["ant", "bee", "cat", "dog"]).split("\n")
    assert [line.split() for line in lines[1:3]] == [
        ["9", "ant", "→", "cat"],
        ["3", "bee", "→", "ant"],
    ]
    assert not any("dog" in line for line in lines)  # no image of it


@pytest.mark.parametrize(
    "history",
    [
        [{"step": 10 * k, "loss": 3 / k, "lr": 0.1} for k in range(1, 9)]
        + [{"step": 80, "knn": 30.0}],
        [{"step": 1, "loss": 2.0}],
        [{"step": k, "heldout_loss": 1.0, "heldout_top1": 5.0} for k in range(99)],
        [],
    ],
)
def test_curves_of_any_history(tmp_path: Path, history: list[dict[str, float]]) -> None:
    curve(tmp_path / "curve.png", history, "pretraining")
    assert pixels(tmp_path / "curve.png").size


@pytest.mark.parametrize(("classes", "apart"), [(4, 50), (800, 50), (4, 0)])
def test_coverage_of_few_and_many_classes(tmp_path: Path, classes: int, apart: int) -> None:
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 99, classes)
    sure = rng.random(apart, dtype=np.float32)
    names = [str(k) for k in range(classes)]
    path = tmp_path / "coverage.png"
    coverage(path, predicted, predicted // 3, sure, sure > 0.5, names, "a title")
    blue = tuple(int(BLUE[k : k + 2], 16) for k in (1, 3, 5))
    assert count(pixels(path), blue) > 1000


def test_a_picture_replaces_another_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curve.png"
    curve(path, [{"step": 1, "loss": 1.0}], "old")
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(figures.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        curve(path, [{"step": 1, "loss": 2.0}], "new")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_no_global_state_of_pyplot_is_used() -> None:
    assert "pyplot" not in Path(figures.__file__).read_text()


def test_a_class_may_be_named_as_mathematics_is(tmp_path: Path) -> None:
    labels = np.array([0, 1, 1])
    confusion(tmp_path / "c.png", labels, labels, ["$^$", "$100%_$"])
    assert (tmp_path / "c.png").is_file()
