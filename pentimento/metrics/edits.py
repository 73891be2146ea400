"""Source, output and target compared inside and outside of the area that was to change."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .colour import delta_e76
from .pictures import PIXELS, Picture, decibel, mean_over, region_of, ssim, tensor, tensors

# One grey level of 255, and a margin for the rounding of float32.
SAME = 1 / 255 + 1e-4


def mean_where(values: Tensor, mask: Picture | None = None) -> Tensor:
    """Mean of a map ``(..., H, W)`` where the mask is white, or everywhere; NaN where it is white nowhere."""
    values = values.unsqueeze(-3)
    region = torch.ones_like(values) if mask is None else region_of(mask, values)
    return mean_over(values, region)


def pie_mse(source: Picture, output: Picture, mask: Picture) -> Tensor:
    """Squared difference of the background, averaged over all pixels as PIE-Bench does."""
    x, y, background = _background(source, output, mask)
    return _defined((x - y).square().mul(background).mean(PIXELS), background)


def pie_psnr(source: Picture, output: Picture, mask: Picture) -> Tensor:
    """PSNR of the background by PIE-Bench: ``strict_bg_psnr`` plus 10 log10 of the picture's area over the background's."""
    return decibel(pie_mse(source, output, mask))


def pie_ssim(source: Picture, output: Picture, mask: Picture) -> Tensor:
    """``ssim`` of both pictures with the edited area blackened, as PIE-Bench computes it."""
    x, y, background = _background(source, output, mask)
    return _defined(ssim(x * background, y * background), background)


def strict_bg_mse(source: Picture, output: Picture, mask: Picture) -> Tensor:
    """Mean squared difference over the background alone."""
    x, y, background = _background(source, output, mask)
    return mean_over((x - y).square(), background)


def strict_bg_psnr(source: Picture, output: Picture, mask: Picture) -> Tensor:
    """PSNR over the background alone; infinity where it is untouched."""
    return decibel(strict_bg_mse(source, output, mask))


def strict_bg_l1(source: Picture, output: Picture, mask: Picture) -> Tensor:
    """Mean absolute difference over the background alone."""
    x, y, background = _background(source, output, mask)
    return mean_over((x - y).abs(), background)


def leak(source: Picture, output: Picture, mask: Picture) -> Tensor:
    """Share of all change that lies outside the mask: 0 is perfectly local; 0 too where nothing changed."""
    x, y, background = _background(source, output, mask)
    change = (x - y).abs()
    total = change.sum(PIXELS)
    return torch.where(total > 0, (change * background).sum(PIXELS) / total, torch.zeros_like(total))


def _background(source: Picture, output: Picture, mask: Picture) -> tuple[Tensor, Tensor, Tensor]:
    x, y = tensors(source, output)
    return x, y, 1 - region_of(mask, x)


def _defined(values: Tensor, background: Tensor) -> Tensor:
    """NaN where there is no background: the zeros that PIE-Bench would average there mean nothing."""
    return torch.where(background.sum(PIXELS) > 0, values, torch.full_like(values, math.nan))


def changed(source: Picture, target: Picture) -> Tensor:
    """Where a pair differs by more than one of 255 levels in any channel: ``(..., 1, H, W)``, 0 or 1."""
    x, y = tensors(source, target)
    return ((x - y).abs().amax(-3, keepdim=True) > SAME).double()


def dilate(mask: Picture, radius: int = 2) -> Tensor:
    """A mask grown by ``radius`` pixels on every side (square), ``(..., 1, H, W)``."""
    like = mask if isinstance(mask, Tensor) else torch.empty(3, mask.height, mask.width)
    return F.max_pool2d(region_of(mask, like), 2 * radius + 1, stride=1, padding=radius)


def edit_gain(source: Picture, output: Picture, target: Picture, mask: Picture | None = None) -> Tensor:
    """How much of the way from source to target was gone: 1 - |output - target|^2 / |source - target|^2.

    0 is nothing done, 1 exact, below 0 worse than nothing. Summed over the mask, or else over where the pair differs,
    both dilated by 2 pixels. NaN where the pair does not differ there.
    """
    x, y, t = tensors(source, output, target)
    region = dilate(changed(x, t) if mask is None else region_of(mask, x))
    wanted = ((x - t).square() * region).sum(PIXELS)
    missed = ((y - t).square() * region).sum(PIXELS)
    return torch.where(wanted > 0, 1 - missed / wanted, torch.full_like(wanted, math.nan))


def edit_l1(source: Picture, output: Picture, mask: Picture) -> Tensor:
    """Mean absolute difference to the source inside the mask: did anything change?"""
    x, y = tensors(source, output)
    return mean_over((x - y).abs(), region_of(mask, x))


def edit_psnr_target(output: Picture, target: Picture, mask: Picture) -> Tensor:
    """PSNR to the target inside the mask: is it right?"""
    y, t = tensors(output, target)
    return decibel(mean_over((y - t).square(), region_of(mask, y)))


class Overlap(NamedTuple):
    """Agreement of the changed area with the wanted one; NaN where undefined."""

    precision: Tensor
    """Changed pixels that were to change."""
    recall: Tensor
    """Pixels that were to change, changed, and came out as the target has them."""
    iou: Tensor
    """The latter over all pixels that changed or were to change."""


def edit_overlap(
    source: Picture,
    output: Picture,
    target: Picture | None = None,
    mask: Picture | None = None,
    *,
    threshold: float = 10.0,
) -> Overlap:
    """Precision, recall and IoU of an edit at a colour difference (CIE76) of ``threshold``.

    The wanted area is where the target differs from the source by more than that, or the mask where there is no target.
    """
    did = delta_e76(source, output) > threshold
    if target is not None:
        wanted, right = delta_e76(source, target) > threshold, delta_e76(output, target) <= threshold
    elif mask is not None:
        wanted, right = region_of(mask, tensor(source)).squeeze(-3) > 0.5, torch.ones_like(did)
    else:
        raise ValueError("the wanted area needs a target or a mask")
    wanted = wanted.expand_as(did)

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return part.double().sum((-2, -1)) / whole.double().sum((-2, -1))

    hit = right & did & wanted
    return Overlap(share(did & wanted, did), share(hit, wanted), share(hit, wanted | did))
