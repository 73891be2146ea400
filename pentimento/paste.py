"""Pasting back: the source's own pixels wherever an edit left it alone, through a soft mask.

A model redraws the whole picture, and its autoencoder blurs what the edit did not mean to touch. What changed on purpose is
found in the difference of the blurred pictures: a codec's errors are small or fine-grained, an edit is neither.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from . import images, metrics

LONGEST_EDGE = 768
"""Pixels at which the mask is made; it is soft, and scaled up for larger pictures."""
BLUR = 0.008
"""Radius of the blur before comparing, as a share of the shorter side; at least one pixel."""
THRESHOLD = 7.0
"""Difference of colour (CIE76) from which something counts as changed: three times what is just noticeable."""
NOISE, MOST = 4.0, 14.0
"""The threshold is raised to so many times what the quietest part of the picture differs by, up to this."""
SURE = 1.5
"""A changed area must exceed the threshold so many times somewhere; fainter specks are noise."""
MARGIN = 0.02
"""Width of the seam around a changed area, as a share of the shorter side; at least two pixels."""
HIGHEST_PSNR = 100.0


@dataclass(frozen=True, kw_only=True)
class Pasted:
    """A result with the unchanged part of its source."""

    picture: Image
    mask: Image
    """L: white is the edit, black the source, grey the seam between them."""
    pasted: float
    """Share of pixels that are the source's own."""
    before: float
    """PSNR in dB against the source where the mask is black, before pasting; at most 100. After it they are equal."""

    def trace(self) -> dict[str, Any]:
        """The numbers, JSON-able."""
        after = HIGHEST_PSNR if self.pasted else None
        before = round(self.before, 3) if self.pasted else None
        return {"pasted": round(self.pasted, 4), "psnr_before": before, "psnr_after": after}

    def __str__(self) -> str:
        if not self.pasted:
            return "nothing pasted back: the edit changed the whole picture"
        return f"pasted {self.pasted:.0%} of the source back, which differed by {self.before:.1f} dB and is exact now"


def paste_back(source: Image, result: Image) -> Pasted:
    """Put the source's pixels wherever ``result``, an edit of it of equal size, did not change it on purpose."""
    alpha = _mask(source, result)
    mask = PIL.Image.fromarray((alpha * 255).round().byte().numpy())
    mask = mask.resize(source.size, PIL.Image.Resampling.BILINEAR)
    weight = np.asarray(mask, dtype=np.float32)[..., None] / 255
    old, new = (np.asarray(p.convert("RGB"), dtype=np.float32) for p in (source, result))
    mixed = PIL.Image.fromarray((old + (new - old) * weight).round().astype(np.uint8))
    kept = weight[..., 0] == 0
    return Pasted(
        picture=mixed,
        mask=mask,
        pasted=float(kept.mean()),
        before=_psnr(float(((new - old)[kept] ** 2).mean())) if kept.any() else HIGHEST_PSNR,
    )


def _psnr(mse: float) -> float:
    return min(HIGHEST_PSNR, -10 * math.log10(max(mse, 1e-9) / 255**2))


def _mask(source: Image, result: Image) -> Tensor:
    """How much of the result shows, (H, W) in [0, 1], at most ``LONGEST_EDGE`` pixels wide or high."""
    scale = min(1.0, LONGEST_EDGE / max(source.size))
    size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    before, after = (
        _blurred(images.to_unit([images.resize(p.convert("RGB"), size)]), _radius(BLUR, size, 1))
        for p in (source, result)
    )
    difference = metrics.delta_e76(before[0], after[0])
    # A fifth of nearly every edit is left alone, and shows how much the codec alone changes.
    threshold = min(MOST, max(THRESHOLD, NOISE * float(difference.flatten().quantile(0.2))))
    changed = _connected(difference > SURE * threshold, difference > threshold)
    margin = _radius(MARGIN, size, 2)
    # Grown by all of the blur's reach, so that the edit itself stays whole.
    grown = F.max_pool2d(changed[None, None].float(), 2 * margin + 1, 1, margin)
    return _blurred(grown, margin / 2)[0, 0].clamp(0, 1)


def _radius(share: float, size: tuple[int, int], least: int) -> int:
    return max(least, round(share * min(size)))


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``(1, C, H, W)`` that ends at two sigma; borders are repeated."""
    reach = max(1, math.ceil(2 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=x.dtype)
    window = torch.exp(-(at**2) / (2 * sigma**2))
    window = (window / window.sum()).view(1, 1, -1, 1).repeat(x.shape[1], 1, 1, 1)
    for kernel, pad in ((window, (0, 0, reach, reach)), (window.transpose(2, 3), (reach, reach, 0, 0))):
        x = F.conv2d(F.pad(x, pad, mode="replicate"), kernel, groups=x.shape[1])
    return x


def _connected(sure: Tensor, possible: Tensor) -> Tensor:
    """The parts of ``possible`` that touch something ``sure``; both (H, W) bool."""
    grown = sure & possible
    for _ in range(sum(sure.shape)):
        spread = (F.max_pool2d(grown[None, None].float(), 3, 1, 1)[0, 0] > 0) & possible
        if torch.equal(spread, grown):
            break
        grown = spread
    return grown
