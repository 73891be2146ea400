"""Binary spherical quantisation over scales (arXiv:2406.07548, arXiv:2412.04431), and bitwise self-correction.

A vector becomes the signs of its components: ``d`` bits, whose code has the unit-norm components ``+-1 / sqrt(d)``. A feature
map is the sum of one code map per scale, each blown up to the full grid; every scale quantises what the ones before left.

Shapes: B pictures, d bits of the autoencoder, (H, W) grid of a scale for the autoencoder, (h, w) of tokens, which is the same
unless tokens hold ``patch`` x ``patch`` vectors. Features, codes and bits are maps (B, d, H, W), bits of dtype bool; tokens are
(B, h * w, d * patch^2).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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


class RandomFlips:
    """Bits turned over at random: per picture and scale a rate of 0, 1, ... or ``100 * strength`` per cent.

    The public code draws one rate for the whole batch.
    """

    def __init__(self, strength: float = 0.3, scales: int = 13, generator: torch.Generator | None = None):
        """``strength`` is the highest rate in [0, 1]; scales from ``scales`` on stay right."""
        self.most, self.scales, self.generator = round(100 * strength), scales, generator

    def __call__(self, scale: int, bits: Tensor) -> Tensor:
        if scale >= self.scales:
            return torch.zeros_like(bits)
        where = {"generator": self.generator, "device": bits.device}
        rate = torch.randint(0, self.most + 1, (len(bits), 1, 1, 1), **where) / 100
        return torch.rand(bits.shape, **where) < rate


class _Mask(nn.Module):
    """Place values of the bits: part of the published files, used for nothing here."""

    mask: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mask", 2 ** torch.arange(width - 1, -1, -1))


class Quantizer(nn.Module):
    """Bits and codes of feature maps; no parameters."""

    def __init__(self, width: int, patch: int = 1):
        """``width``: bits per vector, d. ``patch``: vectors along each side of a token."""
        super().__init__()
        self.width, self.patch = width, patch
        self.lfq = _Mask(width)

    @property
    def token_width(self) -> int:
        """Bits per token."""
        return self.width * self.patch**2

    def grids(self, schedule: Schedule) -> list[Grid]:
        """The scales' grids of vectors."""
        return [(h * self.patch, w * self.patch) for h, w in schedule.grids]

    def codes(self, bits: Tensor) -> Tensor:
        """Code maps (B, d, H, W) of unit vectors, float32."""
        return (bits.float() * 2 - 1) * self.width**-0.5

    def levels(self, features: Tensor, schedule: Schedule, flips: Flips | None = None) -> Iterator[Level]:
        """Quantise float32 ``features`` (B, d, H, W), one scale after the other.

        With ``flips`` later scales see wrong bits of earlier ones, and their own right bits are those that make good for it:
        bitwise self-correction.
        """
        grids = self.grids(schedule)
        total = torch.zeros_like(features)
        for k, grid in enumerate(grids):
            rest = features - total
            bits = (rest if grid == grids[-1] else F.adaptive_avg_pool2d(rest, grid)) > 0
            seen = bits if flips is None else bits ^ flips(k, bits)
            total = total + up(self.codes(seen), grids[-1])
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
        grids = self.grids(schedule)[1:]
        return torch.cat(
            [self.to_tokens(up(total, grid)) for total, grid in zip(totals, grids, strict=False)], 1
        )

    def to_tokens(self, maps: Tensor) -> Tensor:
        """Maps (B, d, H, W) as tokens (B, h * w, d * patch^2), row by row."""
        if self.patch > 1:
            maps = F.pixel_unshuffle(maps, self.patch)
        return maps.flatten(2).transpose(1, 2)

    def to_maps(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The way back; ``grid`` is that of the tokens."""
        maps = tokens.transpose(1, 2).unflatten(2, grid)
        return F.pixel_shuffle(maps, self.patch) if self.patch > 1 else maps
