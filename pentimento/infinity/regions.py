"""Where an edit may change a picture: from attention to a word or from a mask to the weights of the source's codes (arXiv:2510.20217).

Shapes: (H, W) the last grid of a schedule, (h, w) a scale's, S text tokens. A region is bool, true where the picture may change;
weights are float32 in [0, 1], 1 where the source's codes are kept.
"""

import string
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import images, schema
from ..errors import UserError
from ..method import Region
from .quantizer import up
from .scales import Schedule, nearest_ratio

FILLED = 0.2
"""Share of a cell's pixels that makes it part of a region."""
COARSE, FEW = (4, 4), 6
"""A region that touches fewer of these coarse cells is small, and has a soft border."""
HARD, SOFT = 1, 4
"""Cells around a region that change with it, and cells of the ramp that follows around a small one."""


class AttentionMap:
    """Watches a drawing (``Interventions.watch``): mean cross attention to some tokens, over heads, blocks and scales."""

    def __init__(self, schedule: Schedule, tokens: tuple[int, int]):
        """``tokens``: the first one and the one after the last."""
        self.schedule, self.tokens = schedule, tokens
        self._sum: Tensor | None = None
        self._count = 0

    def __call__(self, scale: int, block: int, attention: Tensor) -> None:
        """``attention`` (1, heads, h * w, S) after the softmax."""
        begin, end = self.tokens
        seen = attention[..., begin:end].mean((1, 3)).unflatten(1, self.schedule.grids[scale])
        seen = up(seen[:, None], self.schedule.grids[-1])[0, 0]
        self._sum = seen if self._sum is None else self._sum + seen
        self._count += 1

    def mean(self) -> Tensor:
        """The map (H, W)."""
        if self._sum is None:
            raise ValueError("nothing was drawn yet")
        return self._sum / self._count


def find_words(prompt: str, phrase: str) -> range:
    """Which of a prompt's words, counted at white space, a word or phrase is; where it occurs twice, the last time.

    Case and punctuation around words do not count.

    Raises:
        UserError: it does not occur.
    """
    words, wanted = (
        [word.strip(string.punctuation).casefold() for word in text.split()] for text in (prompt, phrase)
    )
    starts = [i for i in range(len(words)) if wanted and words[i : i + len(wanted)] == wanted]
    if not starts:
        near = schema.nearest(phrase, words)
        raise UserError(
            f"--target-word (config.word): {phrase!r} does not occur in the picture's caption, {prompt!r} (--source,"
            f" config.source_prompt); {f'did you mean {near!r}?' if near else 'name a word that does'}"
        )
    return range(starts[-1], starts[-1] + len(wanted))


def token_span(prompt: str, phrase: str, word_ids: Sequence[int | None]) -> tuple[int, int]:
    """First token of a word or phrase in a prompt, and the one after its last.

    Args:
        word_ids: of every token the word it is part of, counted at white space; ``None`` for the end token.

    Raises:
        UserError: the phrase does not occur, or only where the prompt was cut.
    """
    chosen = find_words(prompt, phrase)
    tokens = [token for token, word in enumerate(word_ids) if word is not None and word in chosen]
    if not tokens:
        raise UserError(f"config.word: the model's text ends before {phrase!r}; shorten {prompt!r}")
    return tokens[0], tokens[-1] + 1


def region_of_attention(attention: Tensor, threshold: float) -> Tensor:
    """Where a map (H, W) is above ``threshold`` between its lowest value, 0, and its highest, 1."""
    low, high = attention.min(), attention.max()
    return attention > low + threshold * (high - low)


def region_of_mask(mask: Image.Image) -> Tensor:
    """The white pixels of a mask of mode L."""
    return torch.from_numpy(np.asarray(mask) >= images.WHITE)


def check_mask(mask: Image.Image) -> None:
    """Raise ``UserError`` for a mask of mode L whose white fills no cell, so that nothing would change."""
    schedule = Schedule.of(nearest_ratio(mask.height, mask.width), "1M")
    region = region_of_mask(mask)
    if region.any() and not _filled(region, schedule.frame).any():
        rows, columns = schedule.frame
        raise UserError(
            f"mask: by it nothing may change: white must fill {FILLED:.0%} of at least one cell of {mask.width / columns:.3g} x"
            f" {mask.height / rows:.3g} pixels; paint a larger part white"
        )


def describe(region: Tensor, weight: Tensor, attention: Tensor | None) -> Region:
    """A region with its weights (H, W) for other programs and for people."""
    return Region(
        mask=Image.fromarray(region.cpu().numpy().astype(np.uint8) * 255),
        weights=Image.fromarray((weight.cpu() * 255).round().byte().numpy()),
        attention=attention,
    )


def weights(region: Tensor, schedule: Schedule) -> Tensor:
    """Weights (H, W) of the source's codes outside of a region of any resolution: 0 in it and close to it, 1 far away.

    They are made in the cells of the last grid at 1M, whatever the size: on smaller grids a cell has the mean of those that it
    covers.
    """
    grid = schedule.grids[-1]
    cells = _filled(region, schedule.frame)
    if not cells.any():
        return torch.ones(grid)
    distance = _distances(cells)
    if int(_filled(region, COARSE).sum()) < FEW:
        weight = ((distance - HARD) / SOFT).clamp(0, 1)
    else:
        weight = (distance > HARD).float()
    return F.adaptive_avg_pool2d(weight[None], grid)[0]


def _filled(region: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cells (H, W) of which enough lies in the region."""
    return F.adaptive_avg_pool2d(region.cpu().double()[None], grid)[0] >= FILLED


def _distances(cells: Tensor) -> Tensor:
    """City-block distance of every cell to the nearest true one, (H, W) float32."""
    along_y, along_x = ((torch.arange(count)[:, None] - torch.arange(count)).abs() for count in cells.shape)
    start = torch.where(cells, 0.0, torch.inf)
    in_rows = (start[:, None, :] + along_x).amin(2)
    return (in_rows[None] + along_y[:, :, None]).amin(1)
