"""One edited picture in a dictionary of numbers, and many numbers in a mean with its interval."""

import math
from collections.abc import Sequence

import numpy as np

from .edits import (
    changed,
    dilate,
    edit_gain,
    edit_l1,
    edit_overlap,
    edit_psnr_target,
    leak,
    strict_bg_l1,
    strict_bg_psnr,
)
from .effects import colour_shift, grad_corr, pixel_shift, sharpness_ratio
from .pictures import Picture, l1, mse, psnr, region_of, ssim, tensors


def interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95 % percentile-bootstrap interval: ``(mean, low, high)``; NaN values are left out.

    Infinite values (PSNR of equal pictures) make the mean infinite: cap them first where that is not meant.
    """
    kept = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not len(kept):
        return math.nan, math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, len(kept), (draws, len(kept)))
    # Order statistics, for interpolating between infinities gives NaN.
    low, high = np.quantile(kept[picks].mean(axis=1), [0.025, 0.975], method="inverted_cdf")
    return float(kept.mean()), float(low), float(high)


def report(
    source: Picture, output: Picture, target: Picture | None = None, mask: Picture | None = None
) -> dict[str, float]:
    """All values of one edited picture (no batch) that are defined for what is given; some may be infinite or NaN.

    Against the source: ``l1 mse psnr ssim sharpness_ratio grad_corr colour_shift pixel_shift``. With a target or a mask
    also ``edit_l1 leak strict_bg_l1 strict_bg_psnr``, outside of the mask or of the dilated difference of the pair; with a
    target ``target_l1 target_psnr target_ssim edit_gain edit_psnr_target edit_iou``.
    """
    x, y = tensors(source, output)
    t = None if target is None else tensors(source, target)[1]
    region = region_of(mask, x) if mask is not None else dilate(changed(x, t)) if t is not None else None
    structured = min(x.shape[-2:]) >= 6
    values = {
        "l1": l1(x, y),
        "mse": mse(x, y),
        "psnr": psnr(x, y),
        "ssim": ssim(x, y) if structured else math.nan,
        "sharpness_ratio": sharpness_ratio(x, y) if structured else math.nan,
        "grad_corr": grad_corr(x, y) if structured else math.nan,
        "colour_shift": colour_shift(x, y, region).square().sum().sqrt(),
        "pixel_shift": pixel_shift(x, y, region).square().sum().sqrt(),
    }
    if region is not None:
        values |= {
            "edit_l1": edit_l1(x, y, region),
            "leak": leak(x, y, region),
            "strict_bg_l1": strict_bg_l1(x, y, region),
            "strict_bg_psnr": strict_bg_psnr(x, y, region),
        }
    if t is not None and region is not None:
        values |= {
            "target_l1": l1(y, t),
            "target_psnr": psnr(y, t),
            "target_ssim": ssim(y, t) if structured else math.nan,
            "edit_gain": edit_gain(x, y, t, mask),
            "edit_psnr_target": edit_psnr_target(y, t, region),
            "edit_iou": edit_overlap(x, y, t).iou,
        }
    return {name: float(value) for name, value in values.items()}
