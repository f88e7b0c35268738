"""Packed arrays: gathered from, opened, and what decoding makes of odd images."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from pipeline import InputError
from pipeline.packed import Form, Pool, decode, histogram, open_packed
from pipeline.preparation import mean_std

RNG = np.random.default_rng(0)


def images(n: int, h: int = 2, w: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (n, h, w, 3), np.uint8)


@given(st.data())
def test_a_pool_equals_indexing_the_concatenation(data: st.DataObject):
    parts = []
    for n in data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)):
        rows = data.draw(arrays(np.int64, st.integers(0, 12), elements=st.integers(0, n - 1)))
        parts.append((images(n), rows))
    pool, plain = Pool(parts), np.concatenate([a[r] for a, r in parts])
    assert len(pool) == len(plain)
    if len(plain):
        index = st.integers(0, len(plain) - 1)
        positions = data.draw(arrays(np.int64, st.integers(0, 20), elements=index))
        assert np.array_equal(pool.gather(positions), plain[positions])


def test_a_gathered_batch_has_memory_of_its_own():
    array = images(5)
    before = array.copy()
    batch = Pool([(array, np.arange(5))]).gather(np.arange(5))
    batch[:] = 0
    assert batch.flags["C_CONTIGUOUS"]
    assert np.array_equal(array, before)


def test_a_pool_refuses_positions_and_sizes_that_do_not_fit():
    pool = Pool([(images(5), np.arange(5)), (images(4), np.array([3]))])
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match="positions from 0 to 5 are expected"):
            pool.gather(np.array([0, wrong]))
    with pytest.raises(InputError, match="one size are expected in a pool; found 2 × 3, 4 × 3"):
        Pool([(images(1), np.arange(1)), (images(1, 4), np.arange(1))])


def test_only_packed_images_open(tmp_path: Path):
    array, path = images(3), tmp_path / "a.npy"
    np.save(path, array)
    opened = open_packed(path)
    assert isinstance(opened, np.memmap)
    assert np.array_equal(opened, array)
    for wrong in (array.astype(np.int16), array[..., :2], array[0]):
        np.save(path, wrong)
        with pytest.raises(InputError, match=r"a\.npy: uint8 \[n, h, w, 3\] is expected"):
            open_packed(path)
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match=r"a\.npy: no packed images"):
        open_packed(path)
    with pytest.raises(InputError, match=r"b\.npy: no packed images"):
        open_packed(tmp_path / "b.npy")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_what_pillow_makes_of_it(mode: str):
    image = Image.fromarray(images(1, 8, 8)[0]).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    found = decode(data, Form(8, 8, False, 100))
    assert found.mode == "RGB"
    assert np.array_equal(found, image.convert("RGB"))


@pytest.mark.parametrize("cut", [1, 5, 12, 13, 40])
def test_a_png_without_its_end_is_truncated(cut: int):
    data = encoded(Image.fromarray(images(1, 8, 8)[0]))
    with pytest.raises(Exception, match="is truncated or damaged"):
        decode(data[:-cut], Form(8, 8, False, 100))


def test_resizing_is_bicubic_as_the_organizers_do_it():
    image = Image.fromarray(images(1, 20, 30)[0])
    found = decode(encoded(image), Form(16, 12, True, 1000))
    assert np.array_equal(found, image.resize((12, 16), Image.Resampling.BICUBIC))


def test_mean_and_deviation_are_those_of_the_pixels():
    array = images(7, 5, 4)
    rows = np.array([0, 2, 6])
    mean, std = mean_std(histogram(array, rows))
    pixels = array[rows].reshape(-1, 3) / 255
    assert np.allclose(mean, pixels.mean(0), rtol=1e-12)
    assert np.allclose(std, pixels.std(0), rtol=1e-12)
    array[..., 2] = 7  # nothing in blue: there is no deviation to divide by
    mean, std = mean_std(histogram(array, rows))
    assert (mean[2], std[2]) == (pytest.approx(7 / 255), 1)
    with pytest.raises(InputError, match="no usable image is left"):
        mean_std(np.zeros((3, 256), np.int64))
