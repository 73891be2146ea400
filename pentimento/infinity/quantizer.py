"""Binary spherical quantisation over scales (arXiv:2406.07548, arXiv:2412.04431), and bitwise self-correction.

A vector becomes the signs of its components: ``d`` bits, whose code has the unit-norm components ``+-1 / sqrt(d)``. A feature
map is the sum of one code map per scale, each blown up to the full grid; every scale quantises what the ones before left.

Shapes: B pictures, d bits per vector, (H, W) the full grid, (h, w) that of a scale, of L tokens in all. Features, codes and bits
are maps (B, d, h, w), bits of dtype bool; tokens are (B, h * w, d), row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scales import Grid, Schedule

Flips = Callable[[int, Tensor], Tensor]
"""From a scale's index and its bits to the mask of those that are wrong in what the next scales see."""


class Level(NamedTuple):
    """One scale of a picture."""

    bits: Tensor
    """What the transformer has to predict, (B, d, H, W)."""
    total: Tensor
    """Sum of the codes up to here on the full grid, flips included, float32."""


def up(x: Tensor, grid: Grid) -> Tensor:
    """Resize a map linearly, to a smaller grid also without any filter, as Infinity's trilinear resize of one frame does."""
    return x if x.shape[-2:] == grid else F.interpolate(x, grid, mode="bilinear", align_corners=False)


class Uniform(Protocol):
    """Random numbers in [0, 1), float32, on the device of the bits; ``draws.Draws`` is such."""

    def uniform(self) -> Tensor:
        """One for every picture, (B,)."""

    def uniform_like(self, x: Tensor) -> Tensor:
        """Of the shape of x (B, ...)."""


class RandomFlips:
    """Bits turned over at random: per picture and scale a rate of 0, 1, ... or ``100 * strength`` per cent.

    The public code draws one rate for the whole batch.
    """

    def __init__(self, draws: Uniform, strength: float = 0.3, scales: int = 13):
        """``strength`` is the highest rate in [0, 1]; scales from ``scales`` on stay right."""
        self.draws, self.most, self.scales = draws, round(100 * strength), scales

    def __call__(self, scale: int, bits: Tensor) -> Tensor:
        if scale >= self.scales:
            return torch.zeros_like(bits)
        # Clamped: a uniform number may round up to 1.
        rates = (self.draws.uniform() * (self.most + 1)).floor().clamp(max=self.most) / 100
        return self.draws.uniform_like(bits) < rates.view(-1, 1, 1, 1)


class _Mask(nn.Module):
    """Place values of the bits: part of the published files, used for nothing here."""

    mask: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mask", 2 ** torch.arange(width - 1, -1, -1))


class Quantizer(nn.Module):
    """Bits and codes of feature maps; no parameters."""

    def __init__(self, width: int):
        """``width``: bits per vector, d."""
        super().__init__()
        self.width = width
        self.lfq = _Mask(width)

    def codes(self, bits: Tensor) -> Tensor:
        """Code maps (B, d, h, w) of unit vectors, float32."""
        return (bits.float() * 2 - 1) * self.width**-0.5

    def levels(self, features: Tensor, schedule: Schedule, flips: Flips | None = None) -> Iterator[Level]:
        """Quantise float32 ``features`` (B, d, H, W), one scale after the other.

        With ``flips`` later scales see wrong bits of earlier ones, and their own right bits are those that make good for it:
        bitwise self-correction.
        """
        last = schedule.grids[-1]
        total = torch.zeros_like(features)
        for k, grid in enumerate(schedule.grids):
            rest = features - total
            bits = (rest if grid == last else F.adaptive_avg_pool2d(rest, grid)) > 0
            seen = bits if flips is None else bits ^ flips(k, bits)
            total = total + up(self.codes(seen), last)
            yield Level(bits, total)

    def totals(self, bits: Sequence[Tensor]) -> Iterator[Tensor]:
        """Running sums of the scales' codes on the grid of the last."""
        grid = (bits[-1].shape[-2], bits[-1].shape[-1])
        total = torch.zeros(bits[-1].shape, device=bits[-1].device)
        for each in bits:
            total = total + up(self.codes(each), grid)
            yield total

    def inputs(self, totals: Sequence[Tensor], schedule: Schedule) -> Tensor:
        """Tokens (B, L - 1, .) that the transformer sees: before each scale but the first, all before it at its resolution.

        ``totals``: the running sum of every scale (that of the last is not used).
        """
        pairs = zip(totals[:-1], schedule.grids[1:], strict=True)
        return torch.cat([to_tokens(up(total, grid)) for total, grid in pairs], 1)


def to_tokens(maps: Tensor) -> Tensor:
    """Maps (B, d, h, w) as tokens (B, h * w, d), row by row."""
    return maps.flatten(2).transpose(1, 2)


def to_maps(tokens: Tensor, grid: Grid) -> Tensor:
    """The way back."""
    return tokens.transpose(1, 2).unflatten(2, grid)
