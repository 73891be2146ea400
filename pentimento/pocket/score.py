"""Scoring edits of the drawn world: the same cases for an adapter, its untrained base, doing nothing, and the autoencoder alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image

from ..flux.backbone import Flux
from ..images import from_tensor, sheet, stack, to_unit
from ..metrics import interval
from .readout import DiscReading, Reading, judge, judge_disc
from .render import render
from .tasks import Case

Editor = Callable[[Image, str], Image]
"""From a source picture and an instruction to the edited picture."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Per-case values of one editor on one task."""

    success: list[bool]
    kept: list[float]
    """Share of the other attributes that stayed."""
    background: list[float]
    """Strict background PSNR in dB, at most 60."""
    discs: list[DiscReading]
    """Instead of ``kept`` and ``background`` for the Fill-Circles task."""
    pictures: list[Image]

    @property
    def rate(self) -> float:
        return sum(self.success) / len(self.success)


def pictures(cases: Sequence[Case], side: str, size: int = 128) -> list[Image]:
    """Renders of the cases' ``source`` or ``target``."""
    return from_tensor(render([getattr(case, side) for case in cases], size, size) * 2 - 1)


def score(results: Sequence[Image], cases: Sequence[Case]) -> Score:
    """Read every result."""
    readings: list[Reading] = []
    discs: list[DiscReading] = []
    for picture, case in zip(results, cases, strict=True):
        (x,) = to_unit([picture])
        if case.source["kind"] == "disc":
            discs.append(judge_disc(x, case.target))
        else:
            readings.append(judge(x, case.source, case.target, case.wanted))
    return Score(
        success=[r.success for r in readings] + [d.success for d in discs], kept=[r.kept for r in readings],
        background=[r.background for r in readings], discs=discs, pictures=list(results),
    )  # fmt: skip


def run(editor: Editor, cases: Sequence[Case], progress: Callable[[int], None] | None = None) -> Score:
    """Edit every source and read the results."""
    made = []
    for i, (source, case) in enumerate(zip(pictures(cases, "source"), cases, strict=True), 1):
        made.append(editor(source, case.instruction))
        if progress:
            progress(i)
    return score(made, cases)


@torch.no_grad()
def round_trip(flux: Flux) -> Editor:
    """The editor that only encodes and decodes: the best background that a backbone can keep."""

    def editor(source: Image, instruction: str) -> Image:
        mean = flux.encode_images([source]).mean
        return flux.decode(flux.latents(mean, torch.zeros_like(mean), mean), source.size)[0]

    return editor


def wide_sheet(
    cases: Sequence[Case], results: Sequence[Image], failed: Sequence[bool], columns: int = 8
) -> Image:
    """Source, result and truth of every case below each other, ``columns`` cases side by side, instructions above."""
    blocks = []
    for first in range(0, len(cases), columns):
        part = slice(first, first + columns)
        rows = [pictures(cases[part], "source"), list(results[part]), pictures(cases[part], "target")]
        titles = [
            "failed: " * bad + case.instruction for bad, case in zip(failed[part], cases[part], strict=True)
        ]
        blocks.append(sheet(rows, titles=titles, labels=["source", "edited", "truth"], cell=128))
    return stack(blocks)


def table(scores: dict[str, Score]) -> list[list[str]]:
    """Rows of text, a header first: means with 95 % bootstrap intervals over the cases."""
    discs = bool(next(iter(scores.values())).discs)
    header = [
        "",
        "success",
        *(
            ["dE2000 inside", "dE2000 outside", "IoU"]
            if discs
            else ["other attributes kept", "strict background PSNR"]
        ),
    ]
    rows = [header]
    for name, s in scores.items():
        rate = interval([float(x) for x in s.success])
        if discs:
            cells = [_cell([getattr(d, field) for d in s.discs], 2) for field in ("inside", "outside", "iou")]
        else:
            cells = [_cell(s.kept, 3), _cell(s.background, 2, " dB")]
        rows.append([name, f"{rate[0]:.0%} [{rate[1]:.0%}, {rate[2]:.0%}]", *cells])
    return rows


def _cell(values: Sequence[float], digits: int, unit: str = "") -> str:
    mean, low, high = interval(values)
    return f"{mean:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"
