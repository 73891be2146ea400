"""Metrics against other libraries' numbers (tests/golden/metrics), against identities, and at their edges."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pentimento import metrics
from pentimento.errors import UserError
from pentimento.images import open_image, open_mask

FOLDER = Path(__file__).parent / "golden" / "metrics"
GOLDEN = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))


def synthetic(height: int = 168, width: int = 181) -> dict[str, np.ndarray]:
    """Source, output, target (uint8) and mask (bool): a smooth scene, an edit inside a box, an imperfect result.

    The legacy generator's stream is frozen by numpy, so that these arrays are the same everywhere.
    """
    random = np.random.RandomState(20)
    coarse = random.randint(0, 256, (height // 8 + 2, width // 8 + 2, 3))
    blocks = np.kron(coarse, np.ones((8, 8, 1), dtype=np.int64))
    smooth = sum(np.roll(blocks, (dy, dx), (0, 1)) for dy in range(8) for dx in range(8)) // 64
    source = smooth[8 : 8 + height, 8 : 8 + width]
    wanted, mask, done = (np.zeros((height, width), dtype=bool) for _ in range(3))
    wanted[40:110, 60:150] = mask[34:112, 55:155] = done[30:100, 60:140] = True
    target = np.where(wanted[..., None], (255 - source) * np.array([1, 3, 2]) // 3, source)
    noise = random.randint(-9, 10, source.shape)
    output = (2 * target + np.roll(target, 1, 1)) // 3 + noise
    output = np.where(done[..., None], output, source + noise // 2)
    pictures = {"source": source, "output": output, "target": target}
    return {name: np.clip(x, 0, 255).astype(np.uint8) for name, x in pictures.items()} | {"mask": mask}


def tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.astype(np.float32).transpose(2, 0, 1) / 255)


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    arrays = synthetic()
    return {name: tensor(arrays[name]) for name in ("source", "output", "target")} | {
        "mask": torch.from_numpy(arrays["mask"])
    }


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(values: dict[str, Tensor], golden: dict[str, float]) -> None:
    """Relative 1e-6; the structural ones to 2e-5, for the libraries round their windows to float32."""
    for name, value in values.items():
        tolerance = {"abs": 2e-5} if "ssim" in name else {"rel": 1e-6}
        assert float(value) == pytest.approx(golden[name], **tolerance), name


def whole(x: object, y: object) -> dict[str, Tensor]:
    e76, e2000 = metrics.delta_e76(x, y), metrics.delta_e2000(x, y)
    functions = ("l1", "mse", "psnr", "ssim", "ssim_valid", "ms_ssim", "sharpness_ratio", "grad_corr")
    return {name: getattr(metrics, name)(x, y) for name in functions} | {
        "ssim_valid_msssim": metrics.ssim_valid(x, y),
        "delta_e76": e76.mean(),
        "delta_e76_p95": torch.quantile(e76.flatten()[: 1 << 24], 0.95),
        "delta_e2000": e2000.mean(),
    }


def masked(x: object, y: object, mask: object) -> dict[str, Tensor]:
    names = (
        "pie_mse",
        "pie_psnr",
        "pie_ssim",
        "strict_bg_mse",
        "strict_bg_psnr",
        "strict_bg_l1",
        "leak",
        "edit_l1",
    )
    return {name: getattr(metrics, name)(x, y, mask) for name in names}


def test_drawn_pictures_against_the_libraries(case):
    x, y, t, mask = (case[name] for name in ("source", "output", "target", "mask"))
    golden = GOLDEN["synthetic"]
    check(whole(x, y), golden)
    check(masked(x, y, mask), golden)
    check(
        {
            "edit_gain": metrics.edit_gain(x, y, t),
            "edit_gain_mask": metrics.edit_gain(x, y, t, mask),
            "edit_psnr_target": metrics.edit_psnr_target(y, t, mask),
        },
        golden,
    )
    check(metrics.edit_overlap(x, y, t)._asdict(), golden)
    check({f"mask_{k}": v for k, v in metrics.edit_overlap(x, y, mask=mask)._asdict().items()}, golden)
    assert metrics.colour_shift(x, y, mask).tolist() == pytest.approx(golden["colour_shift"], rel=1e-4)


RECORDED = {
    "l1": metrics.l1, "mse": metrics.mse, "psnr": metrics.psnr, "ssim_torchmetrics": metrics.ssim,
    "ssim_skimage_gauss_valid": metrics.ssim_valid, "ms_ssim": metrics.ms_ssim, "deltaE76_mean": metrics.delta_e76,
    "deltaE2000_mean": metrics.delta_e2000,
}  # fmt: skip
RECORDED_MASKED = ("pie_psnr", "pie_mse", "pie_ssim", "strict_bg_mse", "strict_bg_psnr", "strict_bg_l1")


@pytest.mark.parametrize("row", json.loads((FOLDER / "recorded.json").read_text(encoding="utf-8"))["rows"])
def test_rows_that_others_recorded(row):
    """With the tolerances that the recording names."""
    x, y = open_image(FOLDER / row["source"]), open_image(FOLDER / row["target"])
    mask = open_mask(FOLDER / row["mask"], white="keep")
    values = {name: function(x, y).mean() for name, function in RECORDED.items()}
    values |= {name: getattr(metrics, name)(x, y, mask) for name in RECORDED_MASKED}
    assert values.keys() == {key for key, value in row.items() if isinstance(value, float)} - {"bg_fraction"}
    for name, value in values.items():
        tolerance = {"abs": 2e-4} if "ssim" in name else {"rel": 1e-4}
        assert float(value) == pytest.approx(row[name], **tolerance), name


def test_a_real_edit_against_the_libraries():
    x, y = open_image(FOLDER / "source.jpg"), open_image(FOLDER / "output.jpg")
    mask = open_mask(FOLDER / "mask_white_keeps.png", white="keep")
    values = whole(x, y)
    del values["delta_e76_p95"]  # torch's quantile has a limit
    values |= masked(x, y, mask)
    check(values, GOLDEN["pictures"])
    others = {"delta_e76_p95", "delta_e2000_p95", "colour_shift"}
    assert GOLDEN["pictures"].keys() - values.keys() == others, "all else was compared"


@pytest.mark.parametrize("size", [(11, 11), (17, 40), (64, 23)])
def test_ssim_against_the_libraries_at_any_size(size):
    image = pytest.importorskip("torchmetrics.functional.image")
    msssim = pytest.importorskip("pytorch_msssim")
    skimage = pytest.importorskip("skimage.metrics")
    x, y = noise(2, 3, *size), noise(2, 3, *size, seed=1)
    expected = image.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(metrics.ssim(x, y), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        metrics.ssim_valid(x, y), msssim.ssim(x, y, data_range=1.0, size_average=False), atol=1e-5, rtol=0
    )
    one = skimage.structural_similarity(
        x[0].numpy(),
        y[0].numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=0,
        data_range=1.0,
    )
    assert float(metrics.ssim_valid(x, y)[0]) == pytest.approx(one, abs=1e-9)


def test_colour_against_scikit_image():
    color = pytest.importorskip("skimage.color")
    levels = torch.tensor([0, 1, 9, 10, 11, 90, 127, 128, 254, 255], dtype=torch.float64) / 255
    x = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, 25, 40)
    y = x.flatten(1)[:, torch.randperm(1000, generator=torch.Generator().manual_seed(0))].view(3, 25, 40)
    a, b = (color.rgb2lab(z.permute(1, 2, 0).numpy()) for z in (x, y))
    assert np.abs(metrics.lab(x).permute(1, 2, 0).numpy() - a).max() < 1e-9
    assert np.abs(metrics.delta_e76(x, y).numpy() - color.deltaE_cie76(a, b)).max() < 1e-9
    assert np.abs(metrics.delta_e2000(x, y).numpy() - color.deltaE_ciede2000(a, b)).max() < 1e-9


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, -1.3802, -84.2814), (50.0, 0.0, -82.7485), 1.0000),
        ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
        ((50.0, 2.49, -0.001), (50.0, -2.49, 0.0009), 7.1792),
        ((50.0, 2.49, -0.001), (50.0, -2.49, 0.0011), 7.2195),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((50.0, 2.5, 0.0), (50.0, 3.2592, 0.335), 1.0000),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
        ((90.8027, -2.0831, 1.441), (91.1528, -1.6435, 0.0447), 1.4441),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_ciede2000_gives_the_published_values(first, second, expected):
    a, b = (torch.tensor(colour, dtype=torch.float64).view(3, 1, 1) for colour in (first, second))
    assert float(metrics.ciede2000(a, b)) == pytest.approx(expected, abs=5e-5)
    assert float(metrics.ciede2000(b, a)) == pytest.approx(expected, abs=5e-5)


def test_equal_pictures(case):
    x = case["source"]
    assert metrics.psnr(x, x) == math.inf and metrics.mse(x, x) == metrics.l1(x, x) == 0
    for name in ("ssim", "ssim_valid", "ms_ssim", "sharpness_ratio", "grad_corr"):
        assert float(getattr(metrics, name)(x, x)) == pytest.approx(1, abs=1e-12)
    assert metrics.delta_e76(x, x).max() == metrics.delta_e2000(x, x).max() == 0
    assert metrics.pixel_shift(x, x).tolist() == [0, 0] and metrics.colour_shift(x, x).tolist() == [0, 0, 0]
    assert metrics.leak(x, x, case["mask"]) == 0
    assert metrics.strict_bg_psnr(x, x, case["mask"]) == metrics.pie_psnr(x, x, case["mask"]) == math.inf


def test_gain_is_0_for_nothing_1_for_exact_and_negative_for_harm(case):
    x, t = case["source"], case["target"]
    assert float(metrics.edit_gain(x, x, t)) == 0 and float(metrics.edit_gain(x, t, t)) == 1
    halfway = (x.double() + t.double()) / 2
    assert float(metrics.edit_gain(x, halfway, t)) == pytest.approx(0.75)
    assert float(metrics.edit_gain(x, 1 - t, t)) < 0
    assert math.isnan(metrics.edit_gain(x, x, x))


def test_the_changed_area_ignores_one_grey_level_and_grows_by_two_pixels():
    x = torch.full((3, 9, 9), 100 / 255)
    t = x.clone()
    t[0, 4, 4] = 102 / 255
    t[:, 0, 0] = 101 / 255
    area = metrics.changed(x, t)
    assert area.shape == (1, 9, 9) and area.sum() == 1 and area[0, 4, 4] == 1
    assert metrics.dilate(area).sum() == 25 and metrics.dilate(area)[0, 2:7, 2:7].sum() == 25
    # Damage inside the margin counts, damage beyond it does not.
    out = t.clone()
    out[:, 8, 8] = 0
    assert float(metrics.edit_gain(x, out, t)) == 1
    out[0, 6, 6] = 98 / 255
    assert float(metrics.edit_gain(x, out, t)) == pytest.approx(0, abs=1e-5)


def test_pie_psnr_differs_from_the_strict_one_by_the_areas(case):
    x, y, mask = case["source"], case["output"], case["mask"]
    share = float((~mask).double().mean())
    gap = float(metrics.pie_psnr(x, y, mask) - metrics.strict_bg_psnr(x, y, mask))
    assert gap == pytest.approx(-10 * math.log10(share), rel=1e-9)


def test_a_mask_over_everything_leaves_no_background(case):
    x, y = case["source"], case["output"]
    full, empty = torch.ones(168, 181), torch.zeros(168, 181)
    for name in ("pie_mse", "pie_psnr", "pie_ssim", "strict_bg_mse", "strict_bg_psnr", "strict_bg_l1"):
        assert math.isnan(getattr(metrics, name)(x, y, full)), name
    assert metrics.leak(x, y, full) == 0 and metrics.leak(x, y, empty) == 1
    assert math.isnan(metrics.edit_l1(x, y, empty)) and math.isnan(metrics.edit_psnr_target(x, y, empty))
    assert (
        torch.isnan(metrics.colour_shift(x, y, full)).all()
        and torch.isnan(metrics.pixel_shift(x, y, full)).all()
    )


def test_overlap_of_nothing_and_of_everything(case):
    x, t = case["source"], case["target"]
    nothing = metrics.edit_overlap(x, x, t)
    assert math.isnan(nothing.precision) and nothing.recall == nothing.iou == 0
    assert metrics.edit_overlap(x, t, t) == (1, 1, 1)
    assert all(map(math.isnan, metrics.edit_overlap(x, x, x)))
    with pytest.raises(ValueError, match="a target or a mask"):
        metrics.edit_overlap(x, t)


def test_batches_pictures_and_every_form_of_mask_agree(case):
    x, y, t, mask = (case[name] for name in ("source", "output", "target", "mask"))
    batch = [torch.stack(pair) for pair in ((x, t), (y, x), (t, y))]
    masks = torch.stack([mask[None], ~mask[None]])
    for name in (
        "l1",
        "mse",
        "psnr",
        "ssim",
        "ssim_valid",
        "ms_ssim",
        "sharpness_ratio",
        "grad_corr",
        "delta_e76",
    ):
        both = getattr(metrics, name)(*batch[:2])
        torch.testing.assert_close(both[1], getattr(metrics, name)(t, x), rtol=1e-9, atol=1e-12)
    for name in ("pie_ssim", "strict_bg_psnr", "leak", "edit_l1", "colour_shift", "pixel_shift"):
        both = getattr(metrics, name)(*batch[:2], masks)
        torch.testing.assert_close(both[0], getattr(metrics, name)(x, y, mask), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(both[1], getattr(metrics, name)(t, x, ~mask), rtol=1e-9, atol=1e-12)
        shared = getattr(metrics, name)(*batch[:2], mask)
        torch.testing.assert_close(shared[1], getattr(metrics, name)(t, x, mask), rtol=1e-9, atol=1e-12)
    assert metrics.edit_gain(*batch).shape == metrics.edit_overlap(*batch).iou.shape == (2,)
    arrays = synthetic()
    image, other = (Image.fromarray(arrays[name]) for name in ("source", "output"))
    white = Image.fromarray(arrays["mask"].astype(np.uint8) * 255)
    expected = float(metrics.strict_bg_psnr(x, y, mask))
    for form in (mask, mask[None], mask.float(), mask.to(torch.uint8), white):
        assert float(metrics.strict_bg_psnr(image, other, form)) == pytest.approx(expected, rel=1e-6)
    assert metrics.dilate(white).sum() == metrics.dilate(mask).sum() == 82 * 104
    assert float(metrics.mean_where(metrics.delta_e76(x, y), white)) == pytest.approx(
        float(metrics.delta_e76(x, y)[mask].mean())
    )


def test_sizes_and_ranges_must_match():
    x = noise(3, 32, 24)
    for function in (metrics.l1, metrics.ssim, metrics.delta_e76, metrics.pixel_shift, metrics.report):
        with pytest.raises(UserError, match="24x32 and 32x32"):
            function(x, noise(3, 32, 32))
    with pytest.raises(UserError, match=r"the mask \(8x8\).*\(24x32\)"):
        metrics.leak(x, x, torch.zeros(8, 8))
    for wrong in (x * 2 - 1, x * 255, (x * 255).to(torch.uint8), x[:1], x[0]):
        with pytest.raises(ValueError, match="expected"):
            metrics.mse(wrong, wrong)
    with pytest.raises(ValueError, match="batches differ"):
        metrics.mse(noise(2, 3, 8, 8), noise(1, 3, 8, 8))


@pytest.mark.parametrize(
    "function, side",
    [(metrics.ssim, 6), (metrics.ssim_valid, 11), (metrics.ms_ssim, 161), (metrics.grad_corr, 4)],
)
def test_too_small_pictures_are_named(function, side):
    assert math.isfinite(function(noise(3, side, side), noise(3, side, side, seed=1)))
    with pytest.raises(UserError, match=f"at least {side} pixels a side, not {side}x{side - 1}"):
        function(noise(3, side - 1, side), noise(3, side - 1, side))


def moved(x: Tensor, right: float, down: float) -> Tensor:
    """Exact translation of a periodic picture."""
    v, u = (torch.fft.fftfreq(side, dtype=torch.float64) for side in x.shape[-2:])
    return torch.fft.ifft2(
        torch.fft.fft2(x) * torch.exp(-2j * math.pi * (u * right + v[:, None] * down))
    ).real


def textured(seed: int = 0) -> Tensor:
    """Smooth noise, 128 pixels square, well inside [0, 1]."""
    x = torch.nn.functional.avg_pool2d(noise(3, 132, 132, seed=seed), 5, stride=1)
    return (x - x.mean()) * 0.9 + 0.5


@pytest.mark.parametrize("right, down", [(0, 0), (0.5, -0.25), (3, -2), (-7.3, 1.12)])
def test_pixel_shift_measures_fractions_of_a_pixel(right, down):
    x = textured()
    # Cut the borders: what moves in there is not what moved out.
    a, b = (z[:, 10:-10, 10:-10] for z in (x, moved(x, right, down)))
    assert metrics.pixel_shift(a, b).tolist() == pytest.approx([right, down], abs=0.03)
    grainy = (b + 0.05 * (noise(*b.shape, seed=9) - 0.5)).clamp(0, 1)
    assert metrics.pixel_shift(a, grainy).tolist() == pytest.approx([right, down], abs=0.05)
    # Inside the mask anything may happen, and its edge must not vote for standing still.
    mask = torch.zeros(108, 108)
    mask[30:70, 20:80] = 1
    edited = torch.where(mask > 0, noise(3, 1, 1), b)
    assert metrics.pixel_shift(a, edited, mask).tolist() == pytest.approx([right, down], abs=0.05)


def test_flat_and_single_pixels_have_no_shift():
    for x in (torch.full((3, 16, 16), 0.5), noise(3, 1, 1)):
        assert torch.isnan(metrics.pixel_shift(x, x)).all()


def test_side_effects_show(case):
    x = case["source"].double()
    blurred = torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)
    assert metrics.sharpness_ratio(x, blurred) < 0.7 and metrics.grad_corr(x, 1 - x) > 0.99
    assert abs(float(metrics.grad_corr(x, noise(*x.shape)))) < 0.1
    lighter = (x + 0.05).clamp(0, 1)
    shift = metrics.colour_shift(x, lighter)
    assert shift[0] > 2 and shift.shape == (3,)
    only_inside = torch.where(case["mask"], lighter, x)
    assert metrics.colour_shift(x, only_inside, case["mask"]).tolist() == [0, 0, 0]


def test_interval_is_deterministic_and_covers_the_mean():
    values = noise(40).tolist()
    mean, low, high = metrics.interval(values)
    assert mean == pytest.approx(np.mean(values)) and low < mean < high
    assert metrics.interval(values) == (mean, low, high) != metrics.interval(values, seed=1)
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 40**0.5, rel=0.1)
    assert metrics.interval([2.0]) == metrics.interval([2.0, math.nan]) == (2, 2, 2)
    assert metrics.interval([1.0, math.inf])[0] == math.inf
    assert all(map(math.isnan, metrics.interval([math.nan]) + metrics.interval([])))


def test_report_holds_what_is_defined(case):
    x, y, t, mask = (case[name] for name in ("source", "output", "target", "mask"))
    alone, both = metrics.report(x, y), metrics.report(x, y, t, mask)
    assert set(alone) < set(metrics.report(x, y, mask=mask)) < set(both) == set(metrics.report(x, y, t))
    assert all(type(value) is float for value in both.values())
    assert both["psnr"] == float(metrics.psnr(x, y)) and both["target_psnr"] == float(metrics.psnr(y, t))
    assert both["strict_bg_psnr"] == float(metrics.strict_bg_psnr(x, y, mask))
    grown = metrics.dilate(metrics.changed(x, t))
    assert metrics.report(x, y, t)["strict_bg_psnr"] == float(metrics.strict_bg_psnr(x, y, grown))
    assert metrics.report(x, x, t)["edit_gain"] == 0 and metrics.report(x, t, t)["target_psnr"] == math.inf
    tiny = metrics.report(noise(3, 1, 1), noise(3, 1, 1, seed=1))
    assert math.isnan(tiny["ssim"]) and math.isfinite(tiny["psnr"])
