"""Generated wallpapers: reproducible, of every motif, and not told apart by their pixels."""

import itertools

import numpy as np
import pytest

from pipeline import InputError, synthetic
from pipeline.metrics import knn_accuracy
from pipeline.synthetic import CLASS_NAMES, make


def _arrays(split: str, classes: int, per_class: int, seed: int = 0):  # type: ignore[no-untyped-def]
    images, labels = zip(*make(split, classes, per_class, 96, seed), strict=True)
    return np.stack(images), np.array(labels)


@pytest.mark.parametrize("size", [32, 96, 97])
def test_pictures_are_bytes_of_the_size_asked_for(size: int) -> None:
    for pixels, label in make("train", 5, 1, size, 0):
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8
        assert 0 <= label < 5


def test_every_class_has_as_many_pictures() -> None:
    _, labels = _arrays("train", 7, 3)
    assert np.bincount(labels).tolist() == [3] * 7


def test_a_picture_depends_on_seed_split_and_place_alone() -> None:
    few, _ = _arrays("train", 4, 2)
    more, _ = _arrays("train", 4, 5)
    np.testing.assert_array_equal(few, more[:8])  # however many are drawn
    for other in (_arrays("val", 4, 2)[0], _arrays("train", 4, 2, seed=1)[0]):
        assert not any((a == b).all() for a, b in zip(few, other, strict=True))


def test_no_two_pictures_are_alike() -> None:
    images, _ = _arrays("train", len(CLASS_NAMES), 5)
    assert len({image.tobytes() for image in images}) == len(images)


def test_every_glyph_is_in_the_font_and_like_no_other() -> None:
    glyphs = [g for both in synthetic._MOTIFS.values() for g in both]
    drawn = [np.asarray(synthetic._glyph(g, 48), np.float32) / 255 for g in glyphs]
    missing = np.asarray(synthetic._glyph("\U0010fffe", 48), np.float32) / 255
    for ink in drawn:
        assert ink.any(1).sum() > 40 or ink.any(0).sum() > 40  # it fills its square one way
        assert np.abs(ink - missing).mean() > 0.05
    for a, b in itertools.combinations(drawn, 2):
        assert np.abs(a - b).mean() > 0.02


def test_neither_pixels_nor_colors_tell_the_class() -> None:
    known, labels = _arrays("train", 8, 16)
    asked, truth = _arrays("val", 8, 16)
    for view in (lambda x: x[:, ::8, ::8], lambda x: x.mean((1, 2))):
        x, q = (view(i.astype(np.float32)).reshape(len(i), -1) for i in (known, asked))
        x, q = (a - a.mean(1, keepdims=True) for a in (x, q))
        x, q = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, q))
        score = knn_accuracy(x, labels, q, truth, 5)
        assert score < 30  # chance is 12.5 %


@pytest.mark.parametrize("classes", [0, len(CLASS_NAMES) + 1])
def test_more_classes_than_motifs_are_refused(classes: int) -> None:
    with pytest.raises(InputError, match=f"classes is {classes}; 1 to 20 is expected"):
        next(make("train", classes, 1, 96, 0))
