"""Differences of colour as people see them: CIE Lab, CIE76, CIEDE2000."""

import torch
from torch import Tensor

from .pictures import Picture, tensors


def lab(picture: Picture) -> Tensor:
    """CIE Lab of an sRGB picture, ``(..., 3, H, W)``; white is D65, 2 degrees."""
    (x,) = tensors(picture)
    linear = torch.where(x > 0.04045, ((x.clamp(min=0) + 0.055) / 1.055) ** 2.4, x / 12.92)
    matrix = torch.tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
        dtype=x.dtype,
    )
    white = torch.tensor([0.95047, 1.0, 1.08883], dtype=x.dtype)
    xyz = torch.einsum("ij,...jhw->...ihw", matrix / white[:, None], linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=0) ** (1 / 3), 7.787 * xyz + 16 / 116)
    fx, fy, fz = f.unbind(-3)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=-3)


def delta_e76(a: Picture, b: Picture) -> Tensor:
    """Map of colour differences ``(..., H, W)``: Euclidean distance in Lab (CIE76). 2.3 is just noticeable."""
    x, y = tensors(a, b)
    return (lab(x) - lab(y)).square().sum(-3).sqrt()


def delta_e2000(a: Picture, b: Picture) -> Tensor:
    """Map of colour differences ``(..., H, W)`` by CIEDE2000."""
    x, y = tensors(a, b)
    return ciede2000(lab(x), lab(y))


def ciede2000(a: Tensor, b: Tensor) -> Tensor:
    """CIEDE2000 between Lab colours ``(..., 3, H, W)`` as ``(..., H, W)``, after Sharma, Wu and Dalal (2005)."""
    (l1_, a1, b1), (l2_, a2, b2) = a.unbind(-3), b.unbind(-3)
    chroma = (torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * _saturation(chroma)
    a1, a2 = a1 * stretch, a2 * stretch
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = (torch.rad2deg(torch.atan2(q, p)) % 360 for p, q in ((a1, b1), (a2, b2)))
    grey = c1 * c2 == 0  # without chroma there is no hue
    turn = h2 - h1
    turn = torch.where(turn > 180, turn - 360, torch.where(turn < -180, turn + 360, turn))
    turn = torch.where(grey, torch.zeros_like(turn), turn)
    # The mean hue lies halfway along the shorter way from one to the other.
    hue = torch.where(grey, h1 + h2, (h1 + turn / 2) % 360)
    lightness, chroma = (l1_ + l2_) / 2, (c1 + c2) / 2

    def cos(degrees: Tensor) -> Tensor:
        return torch.cos(torch.deg2rad(degrees))

    t = 1 - 0.17 * cos(hue - 30) + 0.24 * cos(2 * hue) + 0.32 * cos(3 * hue + 6) - 0.20 * cos(4 * hue - 63)
    offset = (lightness - 50).square()
    dl = (l2_ - l1_) / (1 + 0.015 * offset / (20 + offset).sqrt())
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * (c1 * c2).sqrt() * torch.sin(torch.deg2rad(turn / 2)) / (1 + 0.015 * chroma * t)
    rotation = 60 * torch.exp(-(((hue - 275) / 25) ** 2))
    coupling = -torch.sin(torch.deg2rad(rotation)) * 2 * _saturation(chroma)
    return (dl**2 + dc**2 + dh**2 + coupling * dc * dh).clamp(min=0).sqrt()


def _saturation(chroma: Tensor) -> Tensor:
    return (chroma**7 / (chroma**7 + 25.0**7)).sqrt()
