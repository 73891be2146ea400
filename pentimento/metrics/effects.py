"""Side effects of an edit on the whole picture: blur, lost structure, re-lighting, movement."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .colour import lab
from .pictures import PIXELS, Picture, check_side, region_of, tensors


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(-3)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(-3)


def _filtered(x: Tensor, *kernels: Sequence[Sequence[float]]) -> list[Tensor]:
    check_side(x, 4, "a gradient")
    grey = _luma(x)
    return [F.conv2d(grey, torch.tensor([[k]], dtype=x.dtype)) for k in kernels]


def sharpness_ratio(source: Picture, output: Picture) -> Tensor:
    """Variance of the output's Laplacian over the source's: below 1 is blur, which flatters the squared error."""
    laplacian = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
    before, after = (_filtered(x, laplacian)[0].var(PIXELS) for x in tensors(source, output))
    return after / before


def grad_corr(source: Picture, output: Picture) -> Tensor:
    """Pearson correlation of the Sobel magnitudes: whether the structure stayed. NaN for flat pictures."""
    across = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
    down = ((-1.0, -2.0, -1.0), (0.0, 0.0, 0.0), (1.0, 2.0, 1.0))
    maps = [torch.hypot(*_filtered(x, across, down)) for x in tensors(source, output)]
    p, q = (m - m.mean(PIXELS, keepdim=True) for m in maps)
    return (p * q).sum(PIXELS) / (p.square().sum(PIXELS) * q.square().sum(PIXELS)).sqrt()


def colour_shift(source: Picture, output: Picture, mask: Picture | None = None) -> Tensor:
    """Mean change of the Lab channels outside the mask, ``(..., 3)``: an edit that re-lights the whole picture shows here."""
    x, y = tensors(source, output)
    keep = torch.ones_like(x[..., :1, :, :]) if mask is None else 1 - region_of(mask, x)
    return ((lab(y) - lab(x)) * keep).sum((-2, -1)) / keep.sum((-2, -1))


def pixel_shift(source: Picture, output: Picture, mask: Picture | None = None) -> Tensor:
    """How far the background moved: ``(..., 2)``, pixels to the right and down, to 0.01 pixel, by phase correlation.

    Low frequencies weigh more, because an autoencoder does not keep the phase of the highest. NaN where the picture is flat
    or the mask leaves less than a twentieth of it.
    """
    x, y = tensors(source, output)
    region = torch.zeros_like(x[..., :1, :, :]) if mask is None else region_of(mask, x)
    window = _window(region).expand_as(x[..., :1, :, :]).squeeze(-3)
    spectra = []
    for grey in (_luma(z).squeeze(-3) for z in (x, y)):
        mean = (grey * window).sum((-2, -1), keepdim=True) / window.sum((-2, -1), keepdim=True)
        spectra.append(torch.fft.fft2((grey - mean) * window))
    cross = spectra[1] * spectra[0].conj()
    height, width = x.shape[-2:]
    v, u = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    power = cross.abs()
    floor = 1e-2 * power.mean((-2, -1), keepdim=True)
    cross = cross / (power + floor + 1e-300) * torch.exp(-(v[:, None] ** 2 + u**2) / (2 * 0.2**2))
    shifts = [
        _peak(one, v, u) if big > 1e-12 and kept > 0.05 else torch.full((2,), math.nan, dtype=torch.float64)
        for one, big, kept in zip(
            cross.view(-1, height, width),
            power.amax((-2, -1)).view(-1),
            (1 - region).mean(PIXELS).expand(x.shape[:-3]).reshape(-1),
            strict=True,
        )
    ]
    return torch.stack(shifts).view(*x.shape[:-3], 2)


def _window(region: Tensor) -> Tensor:
    """A window that falls off smoothly towards the borders and the region, whose edges would otherwise vote for no shift."""
    height, width = region.shape[-2:]
    reach = max(1, min(height, width) // 16)
    # Row by row and column by column: a window of a hundred pixels squared takes ten seconds at 1024 pixels.
    passes = (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach)))
    for kernel, padding in passes:
        region = F.max_pool2d(region, kernel, stride=1, padding=padding)
    keep = 1 - region
    for kernel, padding in passes:
        keep = F.avg_pool2d(keep, kernel, stride=1, padding=padding, count_include_pad=False)
    hann = [
        torch.hann_window(side + 2, periodic=False, dtype=torch.float64)[1:-1] for side in (height, width)
    ]
    return keep * hann[0][:, None] * hann[1]


def _peak(cross: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """``(right, down)`` at which the inverse transform of a spectrum is largest, to 0.01 pixel."""
    height, width = cross.shape
    down, right = divmod(int(torch.fft.ifft2(cross).real.argmax()), width)
    best = [
        float(down - height if down > height // 2 else down),
        float(right - width if right > width // 2 else right),
    ]
    for step in (0.1, 0.01):
        near = torch.arange(-10, 11, dtype=torch.float64) * step
        waves = [
            torch.exp(2j * torch.pi * (at + near)[:, None] * f) for at, f in zip(best, (v, u), strict=True)
        ]
        surface = (waves[0] @ cross @ waves[1].T).real
        row, column = divmod(int(surface.argmax()), len(near))
        best = [best[0] + float(near[row]), best[1] + float(near[column])]
    return torch.tensor([best[1], best[0]], dtype=torch.float64)
