"""Infinity's schedules: for an aspect ratio and a size, the token grids that a picture is drawn on, from coarse to fine.

A size is a prefix of the schedule of its aspect ratio; a picture has 16 x 16 pixels per token of the last grid
(arXiv:2412.04431, table of the public code). Ratios are height over width.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UserError

Grid = tuple[int, int]
"""Rows and columns of tokens."""

PIXELS_PER_TOKEN = 16
LENGTHS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Scales per size; the sizes are named by their pixels (256, 512, 768 and 1024 squared for squares)."""
_TALL = {
    1.000: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.250: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.500: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.750: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.000: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.500: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.000: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _tables() -> dict[float, tuple[Grid, ...]]:
    out: dict[float, tuple[Grid, ...]] = {}
    for ratio, text in _TALL.items():
        grids = [tuple(map(int, grid.split("x"))) for grid in text.split()]
        out[ratio] = tuple((h, w) for h, w in grids)
        out.setdefault(math.floor(1000 / ratio) / 1000, tuple((w, h) for h, w in grids))
    return out


TABLES = _tables()
"""All 13 grids of each ratio; 3, 2.5 ... 1 and their inverses."""


@dataclass(frozen=True)
class Schedule:
    """The grids of one picture. ``Schedule.of`` looks them up."""

    grids: tuple[Grid, ...]
    frame: Grid
    """The last grid at 1M: rotary positions live in its coordinates, whatever the size."""

    @classmethod
    def of(cls, ratio: float, size: str) -> "Schedule":
        """The schedule of a tabled ratio (height / width) and a size such as "1M".

        Raises:
            UserError: there is no such ratio or size.
        """
        if size not in LENGTHS:
            raise UserError(f"no size is called {size!r}; Infinity draws {', '.join(LENGTHS)}")
        if ratio not in TABLES:
            known = ", ".join(f"{r:g}" for r in sorted(TABLES))
            raise UserError(f"no schedule has height / width {ratio:g}; there are {known}")
        return cls(TABLES[ratio][: LENGTHS[size]], TABLES[ratio][-1])

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the picture."""
        height, width = self.grids[-1]
        return height * PIXELS_PER_TOKEN, width * PIXELS_PER_TOKEN

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Index of the token after each scale's last."""
        return tuple(itertools.accumulate(h * w for h, w in self.grids))

    @property
    def tokens(self) -> int:
        """Tokens of all scales."""
        return self.ends[-1]

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First token of each scale and the one after its last."""
        return tuple(zip((0, *self.ends[:-1]), self.ends, strict=True))

    def weights(self) -> Tensor:
        """What each token (L,) counts in the training loss, float32, sum 1: a scale's share grows with its side, not its area."""
        areas = torch.tensor([h * w for h, w in self.grids], dtype=torch.float64)
        each = torch.repeat_interleave(torch.sqrt(areas[-1] / areas), areas.long())
        return (each / each.sum()).float()

    def positions(self) -> Tensor:
        """Row and column (L, 2) of every token in the frame, whole numbers in float32."""
        return torch.cat([_positions(grid, self.frame) for grid in self.grids])


def _positions(grid: Grid, frame: Grid) -> Tensor:
    rows, columns = (
        (torch.arange(n) * torch.tensor(full / n)).round() for n, full in zip(grid, frame, strict=True)
    )
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2)


def nearest_ratio(height: int, width: int, ratios: Sequence[float] = tuple(TABLES)) -> float:
    """The tabled ratio whose difference to ``height / width`` is smallest."""
    return min(ratios, key=lambda ratio: abs(height / width - ratio))
