"""Views against Pillow and torchvision: each operation alone, then their distribution on real
images.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from pipeline import InputError
from pipeline.view_maps import crop_boxes
from pipeline.views import WHOLE, View, Views, parameters, uniforms

OFF = {
    "crop_p": 0,
    "flip_p": 0,
    "jitter_p": 0,
    "grayscale_p": 0,
    "blur_p": 0,
}


def view(**on: object) -> View:
    return View(**({"count": 1} | OFF | on))  # type: ignore[arg-type]


def smooth_images(n: int = 6, size: int = 48) -> np.ndarray:
    """Images with structure at every scale, far from black and white (so that no clamp acts)."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(90, 165, (n, 6, 6, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((size, size))) for c in coarse])


def one_view(images: np.ndarray, spec: View, size: int, seed: int = 0) -> tuple[torch.Tensor, dict]:
    u = uniforms(seed, 3, len(images), 1)
    make = Views([spec], (0, 0, 0), (1, 1, 1), torch.float32)
    x = make(torch.from_numpy(images), make.draw(u, *images.shape[1:3]), size)
    return x[0], parameters(spec, u[0], *images.shape[1:3])


def as_float(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([TF.pil_to_tensor(i) for i in images]).float() / 255


@pytest.mark.parametrize("size", [24, 48, 61])
def test_resized_crop_and_flip_equal_pillow(size: int) -> None:
    images = smooth_images(16)
    x, p = one_view(images, view(crop_p=1, flip_p=0.5), size)
    expected = []
    for image, (top, left, h, w), flip in zip(images, p["boxes"], p["flip"], strict=True):
        crop = Image.fromarray(image).crop((left, top, left + w, top + h))
        crop = crop.resize((size, size), Image.Resampling.BILINEAR)
        expected.append(TF.hflip(crop) if flip else crop)
    assert 0 < p["flip"].sum() < 16
    assert (x - as_float(expected)).abs().max() < 2.5 / 255  # Pillow rounds after each pass


def test_whole_view_is_the_image_itself() -> None:
    images = smooth_images()
    x, _ = one_view(images, WHOLE, 48)
    torch.testing.assert_close(x, torch.from_numpy(images).permute(0, 3, 1, 2) / 255)


def test_odd_batches_in_pieces_equal_single_images() -> None:
    images, spec = smooth_images(35, 24), View()
    u = uniforms(1, 2, 35, 2)
    make = Views([spec], (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), torch.float32)
    drawn = make.draw(u, 24, 24)
    together = [x.clone() for x in make(torch.from_numpy(images), drawn, 16)]
    for k in (0, 31, 34):
        alone = make(torch.from_numpy(images[k : k + 1]), drawn[:, k : k + 1], 16)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "low_high", "operation"),
    [
        ("brightness", (0.8, 1.2), TF.adjust_brightness),
        ("contrast", (0.5, 1.5), TF.adjust_contrast),
        ("saturation", (0.2, 1.8), TF.adjust_saturation),
    ],
)
def test_color_operations_equal_torchvision(name: str, low_high, operation) -> None:  # type: ignore[no-untyped-def]
    images = smooth_images()
    off = {f"{o}_p": 0 for o in ("brightness", "contrast", "saturation", "hue")}
    x, p = one_view(images, view(**(off | {"jitter_p": 1, f"{name}_p": 1, name: low_high})), 48)
    column = ["brightness", "contrast", "saturation"].index(name)
    factors = p["factors"][:, column]
    assert np.ptp(factors) > 0.1
    plain = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    expected = [operation(i, float(f)) for i, f in zip(plain, factors, strict=True)]
    torch.testing.assert_close(x, torch.stack(expected), rtol=0, atol=2e-3)


def test_color_operations_compose_in_each_images_own_order() -> None:
    images = smooth_images(24)
    spec = view(
        jitter_p=1, brightness=(0.9, 1.1), contrast=(0.5, 1.2), saturation=(0.5, 1.5), hue_p=0
    )
    x, p = one_view(images, spec, 48)
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, lambda i, f: i]
    for image, got, factors, order in zip(images, x, p["factors"], p["order"], strict=True):
        y = torch.from_numpy(image).permute(2, 0, 1) / 255
        for k in order:
            y = steps[k](y, float(factors[k]))
        torch.testing.assert_close(got, y, rtol=0, atol=2e-3)
    assert len({tuple(o) for o in p["order"]}) > 8


def test_hue_keeps_the_mean_of_the_channels_and_turns_like_torchvision() -> None:
    images = smooth_images()
    off = {f"{o}_p": 0 for o in ("brightness", "contrast", "saturation")}
    x, p = one_view(images, view(**(off | {"jitter_p": 1, "hue": (0.08, 0.1)})), 48)
    plain = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(x.mean(1), plain.mean(1), rtol=0, atol=2e-3)
    turned = torch.stack(
        [TF.adjust_hue(i, float(h)) for i, h in zip(plain, p["factors"][:, 3], strict=True)]
    )
    chroma = lambda i: (i - i.mean(1, keepdim=True)).flatten()  # noqa: E731
    same = torch.cosine_similarity(chroma(x), chroma(turned), 0)
    before = torch.cosine_similarity(chroma(plain), chroma(turned), 0)
    assert same > 0.95 > before


def test_grayscale_blur_solarize_and_rotation() -> None:
    images = smooth_images()
    plain = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x, _ = one_view(images, view(grayscale_p=1), 48)
    torch.testing.assert_close(x, TF.rgb_to_grayscale(plain, 3), rtol=0, atol=2e-3)
    x, p = one_view(images, view(blur_p=1, blur_sigma=(0.5, 2.0)), 48)
    for got, image, sigma in zip(x, plain, p["sigma"], strict=True):
        padded = torch.nn.functional.pad(image[None], (12, 12, 12, 12), "replicate")
        blurred = TF.gaussian_blur(padded, 23, float(sigma))[0, :, 12:-12, 12:-12]
        torch.testing.assert_close(got, blurred, rtol=0, atol=4e-3)
    x, _ = one_view(images, view(solarize_p=1, solarize_threshold=0.5), 48)
    torch.testing.assert_close(x, TF.solarize(plain, 0.5), rtol=0, atol=1e-5)
    x, p = one_view(images, view(rotation_p=1, rotation=(20, 40)), 48)
    bilinear = InterpolationMode.BILINEAR
    for got, image, angle in zip(x, plain, p["degrees"], strict=True):
        torch.testing.assert_close(got, TF.rotate(image, float(angle), bilinear), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["crop", "flip", "rotation", "jitter", "grayscale", "blur", "solarize"]
)
def test_an_operation_with_probability_zero_is_off(name: str) -> None:
    """Each probability governs its own operation and no other one's random numbers."""
    full = View(1, rotation_p=0.5, solarize_p=0.5)
    without = View(1, **({"rotation_p": 0.5, "solarize_p": 0.5} | {f"{name}_p": 0}))
    u = uniforms(0, 0, 400, 1)[0]
    a, b = parameters(full, u, 96, 96), parameters(without, u, 96, 96)
    own = {
        "crop": "boxes",
        "rotation": "degrees",
        "jitter": "factors",
        "grayscale": "gray",
        "blur": "sigma",
    }.get(name, name)
    for key in a:
        assert np.array_equal(a[key], b[key]) == (key != own), key


def test_uniforms_are_a_function_of_seed_step_and_place() -> None:
    assert np.array_equal(uniforms(1, 2, 8, 2), uniforms(1, 2, 8, 2))
    assert not np.array_equal(uniforms(1, 2, 8, 2), uniforms(1, 3, 8, 2))
    assert not np.array_equal(uniforms(1, 2, 8, 2), uniforms(2, 2, 8, 2))


def test_crop_area_and_aspect_are_distributed_as_torchvisions() -> None:
    u = uniforms(0, 0, 20_000, 1)[0]
    ours = crop_boxes(u, 1.0, (0.08, 1.0), (3 / 4, 4 / 3), 96, 96)
    image = torch.zeros(3, 96, 96)
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(20_000)]
    )
    levels = np.linspace(0.02, 0.98, 25)
    for measure, tolerance in (
        (lambda b: b[:, 2] * b[:, 3] / 96**2, 0.02),
        (lambda b: np.log(b[:, 3] / b[:, 2]), 0.02),
        (lambda b: b[:, 0], 1.6),
        (lambda b: b[:, 1], 1.6),
    ):
        a, b = np.quantile(measure(ours), levels), np.quantile(measure(theirs), levels)
        assert np.abs(a - b).max() <= tolerance
    assert (ours[:, 0] + ours[:, 2] <= 96).all()
    assert (ours >= 0).all()


def reference(image: np.ndarray, p: dict, k: int, size: int) -> torch.Tensor:
    """SimCLR's chain as torchvision and lightly run it on a Pillow image, with given parameters."""
    top, left, h, w = (int(v) for v in p["boxes"][k])
    bilinear = InterpolationMode.BILINEAR
    x = TF.resized_crop(Image.fromarray(image), top, left, h, w, [size, size], bilinear)
    x = TF.hflip(x) if p["flip"][k] else x
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for o in p["order"][k]:
        if p["factors"][k, o] != (0 if o == 3 else 1):
            x = steps[o](x, float(p["factors"][k, o]))
    x = TF.rgb_to_grayscale(x, 3) if p["gray"][k] else x
    if p["sigma"][k]:
        x = x.filter(ImageFilter.GaussianBlur(radius=float(p["sigma"][k])))
    return TF.pil_to_tensor(x).float() / 255


def test_distribution_on_real_images_is_torchvisions(real_images: np.ndarray) -> None:
    """The same draws through both chains: mean and deviation within 2 %, and the histograms."""
    spec = View(1)
    u = uniforms(0, 0, len(real_images), 1)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    make = Views([spec], mean, std)
    ours = make(torch.from_numpy(real_images), make.draw(u, 96, 96), 96)[0].float()
    p = parameters(spec, u[0], 96, 96)
    theirs = torch.stack([reference(real_images[k], p, k, 96) for k in range(len(real_images))])
    dims = (0, 2, 3)
    assert (ours.mean(dims) / theirs.mean(dims) - 1).abs().max() < 0.02
    assert (ours.std(dims) / theirs.std(dims) - 1).abs().max() < 0.02
    within = ours.std((2, 3)).mean(0) / theirs.std((2, 3)).mean(0)  # contrast inside an image
    assert (within - 1).abs().max() < 0.05
    for channel in range(3):
        a = torch.histc(ours[:, channel], 16, 0, 1) / ours[:, channel].numel()
        b = torch.histc(theirs[:, channel], 16, 0, 1) / theirs[:, channel].numel()
        assert (a - b).abs().sum() / 2 < 0.05  # total variation


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"flip_p": 1.5}, "views: flip_p is 1.5; from 0 to 1 is expected"),
        ({"hue": (0.3, 0.1)}, "views: hue is [0.3, 0.1]; [low, high] is expected"),
        (
            {"crop_scale": (0.0, 1.0)},
            "views: crop_scale is [0.0, 1.0]; 0 < low <= high <= 1 is expected",
        ),
        ({"count": 0}, "views: count is 0; 1 or more is expected"),
    ],
)
def test_bad_ranges_are_refused_by_name(field: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        View(**field)
    assert str(error.value) == message


def test_views_of_other_sizes_and_only_some() -> None:
    """A local view is what the same view would be at its own resolution; views that are not asked
    for are not made.
    """
    images = torch.randint(0, 256, (5, 20, 20, 3), dtype=torch.uint8)
    u = uniforms(0, 3, 5, 4)
    both = Views([View(2), View(2, size=0.5, crop_scale=(0.05, 0.3))], [0.5] * 3, [0.2] * 3)
    drawn = both.draw(u, 20, 20)
    made = [view.clone() for view in both(images, drawn, 16)]
    assert [tuple(view.shape) for view in made] == [(5, 3, 16, 16)] * 2 + [(5, 3, 8, 8)] * 2
    small = Views([View(4, crop_scale=(0.05, 0.3))], [0.5] * 3, [0.2] * 3)
    assert torch.equal(made[3], small(images, small.draw(u, 20, 20), 8)[3])
    assert torch.equal(both(images, drawn, 16, [3])[0], made[3])
    two, none = both(images, drawn, 16, [2, 0]), both(images, drawn, 16, [])
    assert torch.equal(two[0], made[2])
    assert torch.equal(two[1], made[0])
    assert none == []
    with pytest.raises(InputError, match="size is 0"):
        View(size=0)


def test_erased_rectangles_are_of_the_drawn_size_and_the_mean() -> None:
    images = smooth_images(64)
    plain, _ = one_view(images, view(), 48)
    plain = plain.clone()
    erased, p = one_view(images, view(erase_p=0.5, erase_area=(0.1, 0.3)), 48)
    hit = p["erased"][:, 2] > 0
    assert 15 < hit.sum() < 50
    assert torch.equal(erased[~hit], plain[~hit])
    for x, before, (top, left, height, width) in zip(
        erased[hit], plain[hit], p["erased"][hit], strict=True
    ):
        gone = (x == 0).all(0) & (before != 0).any(0)
        assert gone.float().mean() == pytest.approx(height * width, abs=0.05)
        rows, columns = gone.any(1).nonzero().ravel() + 0.5, gone.any(0).nonzero().ravel() + 0.5
        for places, start, length in ((rows, top, height), (columns, left, width)):
            assert places[0] / 48 >= start
            assert places[-1] / 48 <= start + length
            assert len(places) == len(places.unique()) == places[-1] - places[0] + 1
        assert torch.equal(x[:, ~gone], before[:, ~gone])


def test_areas_of_erased_rectangles_are_those_asked_for() -> None:
    p = parameters(view(erase_p=1, erase_area=(0.1, 0.3)), uniforms(0, 0, 20_000, 1)[0], 32, 32)
    _, _, height, width = p["erased"].T
    assert (p["erased"] >= 0).all()
    assert (p["erased"][:, :2] + p["erased"][:, 2:] <= 1 + 1e-6).all()
    area = height * width
    assert area.min() == pytest.approx(0.1, abs=0.01)
    assert area.max() == pytest.approx(0.3, abs=0.01)
    assert np.median(height / width) == pytest.approx(1, abs=0.05)
    with pytest.raises(InputError, match=r"views: erase_area is \[0.5, 0.2\]"):
        view(erase_area=(0.5, 0.2))
