"""Two whole pictures compared, and what all metrics share: tensors of one size, masks, masked means."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError

Picture = Tensor | Image.Image

PIXELS = (-3, -2, -1)


def tensors(*pictures: Picture) -> list[Tensor]:
    """Float64 tensors of one size on the CPU."""
    found = [tensor(picture) for picture in pictures]
    sizes = list(dict.fromkeys(f"{x.shape[-1]}x{x.shape[-2]}" for x in found))
    if len(sizes) > 1:
        raise UserError(f"only pictures of one size can be compared, not {' and '.join(sizes)}; resize them")
    if len({x.shape for x in found}) > 1:
        raise ValueError(f"batches differ: {[tuple(x.shape) for x in found]}")
    return found


def tensor(picture: Picture) -> Tensor:
    """One picture or batch as float64 in [0, 1] on the CPU; ``ValueError`` for another range or layout."""
    if isinstance(picture, Image.Image):
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).double() / 255
    if picture.ndim not in (3, 4) or picture.shape[-3] != 3 or not picture.is_floating_point():
        raise ValueError(
            f"expected float (3, H, W) or (B, 3, H, W), not {picture.dtype} {tuple(picture.shape)}"
        )
    x = picture.detach().to("cpu", torch.float64)
    if x.numel() and (x.min() < -1e-3 or x.max() > 1 + 1e-3):
        raise ValueError(f"expected values in [0, 1], not [{x.min():.3g}, {x.max():.3g}]")
    return x


def region_of(mask: Picture, like: Tensor) -> Tensor:
    """The mask as float64 0 or 1, ``(1, H, W)`` or ``(B, 1, H, W)``."""
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.array(mask.convert("L"))).double() / 255
    if mask.ndim == 2:
        mask = mask.unsqueeze(0)
    if mask.shape[-2:] != like.shape[-2:] or mask.shape[-3] != 1:
        size = f"{mask.shape[-1]}x{mask.shape[-2]}"
        raise UserError(f"the mask ({size}) must have the picture's size ({like.shape[-1]}x{like.shape[-2]})")
    return (mask.detach().to("cpu", torch.float64) > 0.5).double()


def mean_over(values: Tensor, region: Tensor) -> Tensor:
    """Mean of ``(..., C, H, W)`` where the region is 1; NaN where it is nowhere."""
    region = region.expand_as(values)
    return (values * region).sum(PIXELS) / region.sum(PIXELS)


def decibel(mse: Tensor) -> Tensor:
    """PSNR of a mean squared error of values in [0, 1]."""
    return -10 * torch.log10(mse)


def l1(a: Picture, b: Picture) -> Tensor:
    """Mean absolute difference."""
    x, y = tensors(a, b)
    return (x - y).abs().mean(PIXELS)


def mse(a: Picture, b: Picture) -> Tensor:
    """Mean squared difference."""
    x, y = tensors(a, b)
    return (x - y).square().mean(PIXELS)


def psnr(a: Picture, b: Picture) -> Tensor:
    """Peak signal-to-noise ratio in dB; infinity for equal pictures."""
    return decibel(mse(a, b))


def ssim(a: Picture, b: Picture) -> Tensor:
    """Structural similarity as torchmetrics and PIE-Bench compute it: reflected borders, mean of the whole map.

    11x11 Gaussian of sigma 1.5, K = 0.01 and 0.03, mean over the channels. Needs at least 6 pixels a side.
    """
    x, y = tensors(a, b)
    check_side(x, 6, "ssim")
    return _ssim_maps(*(F.pad(z, (5, 5, 5, 5), mode="reflect") for z in (x, y)))[0].mean(PIXELS)


def ssim_valid(a: Picture, b: Picture) -> Tensor:
    """Structural similarity as scikit-image (Gaussian) and pytorch-msssim compute it: only whole windows count."""
    x, y = tensors(a, b)
    check_side(x, 11, "ssim_valid")
    return _ssim_maps(x, y)[0].mean(PIXELS)


def ms_ssim(a: Picture, b: Picture) -> Tensor:
    """Multi-scale SSIM over five scales; negative terms count as 0. Needs more than 160 pixels a side."""
    x, y = tensors(a, b)
    check_side(x, 161, "ms_ssim")
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    result = torch.ones(x.shape[:-2], dtype=x.dtype)
    for scale, weight in enumerate(weights):
        luminance, contrast = (m.mean((-2, -1)).clamp(min=0) for m in _ssim_maps(x, y))
        result = result * (luminance if scale == len(weights) - 1 else contrast) ** weight
        odd = [side % 2 for side in x.shape[-2:]]
        x, y = (F.avg_pool2d(z, 2, padding=odd) for z in (x, y))
    return result.mean(-1)


def check_side(x: Tensor, least: int, name: str) -> None:
    """``UserError`` for pictures too small for a metric's window."""
    if min(x.shape[-2:]) < least:
        raise UserError(f"{name} needs at least {least} pixels a side, not {x.shape[-1]}x{x.shape[-2]}")


def _ssim_maps(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of similarity and of its contrast-structure part, 10 pixels smaller than the pictures."""
    mean_x, mean_y, xx, yy, xy = (_blurred(z) for z in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01**2, 0.03**2
    contrast = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * contrast, contrast


def _blurred(x: Tensor) -> Tensor:
    """Whole 11x11 windows of a Gaussian of sigma 1.5, by sums of slices: three times faster in float64 than ``conv2d``."""
    window = [math.exp(-(offset**2) / (2 * 1.5**2)) for offset in range(-5, 6)]
    for dim in (-2, -1):
        length = x.shape[dim] - 10
        total = x.narrow(dim, 5, length) * (window[5] / sum(window))
        for i in range(5):
            pair = x.narrow(dim, i, length) + x.narrow(dim, 10 - i, length)
            total.add_(pair, alpha=window[i] / sum(window))
        x = total
    return x
