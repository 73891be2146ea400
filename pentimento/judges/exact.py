"""The judge of the drawn world: reads the source from scratch, works out what is wanted, and measures the candidates.

Like every judge it sees pictures and words alone; nothing of how a picture was drawn reaches it.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from .. import images
from ..pocket import instructions, readout
from ..pocket.instructions import Goal
from ..pocket.readout import Reading
from ..pocket.recognise import View, recognise, refine
from ..pocket.render import render
from ..pocket.scene import OBJECT_RANGES, Scene
from . import Verdict

SIDE = 128
"""Pixels of the shorter side at which pictures are read: what the world's details are drawn for."""
REMEMBERED = 64
"""Sources and candidates whose reading is kept; a tournament meets its champion again and again."""
BEST = 60.0
"""dB at which pictures count as equal."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good one candidate is."""

    success: bool
    valid: bool
    kept: float
    """Share of the other attributes that are as in the source."""
    closeness: float
    """dB to the render of what is wanted: the mean of inside and outside of the area that is to change."""

    @property
    def rank(self) -> tuple[bool, bool, float, float]:
        """Larger is better. A failed edit keeps nothing worth counting: doing nothing would keep most."""
        return self.success, self.valid, self.kept if self.success else 0.0, self.closeness

    def __str__(self) -> str:
        done = "done" if self.success else "not done" if self.valid else "not readable"
        return f"{done}, {self.kept:.0%} of the rest kept, {self.closeness:.1f} dB to the truth"


@dataclass(kw_only=True)
class Exact:
    """Compares by read-out; remembers what it has read."""

    name: str = "exact"
    _scenes: dict[bytes, Scene | None] = field(default_factory=dict, repr=False)
    _scores: dict[tuple[bytes, bytes, str], Score] = field(default_factory=dict, repr=False)

    def compare(self, source: Image, first: Image, second: Image, instruction: str) -> Verdict:
        """The candidate with the higher score; the first of equals."""
        if instructions.is_identity(instruction):
            near = [float(_psnr(_pixels(source), _pixels(c, source.size))) for c in (first, second)]
            said = " and ".join(f"{value:.1f} dB" for value in near)
            return Verdict(
                choice=1 if near[0] >= near[1] else 2, reason=f"{said} to the source, which is to stay"
            )
        scene = self._scene(source)
        if scene is None:
            return Verdict(choice=None, reason="the source cannot be read as a picture of the drawn world")
        goals = instructions.goals(instruction, scene)
        if not goals:
            return Verdict(
                choice=None, reason=f"{instruction!r} asks nothing of the picture that the drawn world knows"
            )
        a, b = (self._score(source, candidate, instruction, scene, goals) for candidate in (first, second))
        return Verdict(choice=1 if a.rank >= b.rank else 2, reason=f"1: {a}; 2: {b}")

    def _scene(self, source: Image) -> Scene | None:
        key = _digest(source)
        if key not in self._scenes:
            _forget(self._scenes)
            sight = recognise(_pixels(source))
            self._scenes[key] = sight.scene if sight else None
        return self._scenes[key]

    def _score(
        self, source: Image, candidate: Image, instruction: str, scene: Scene, goals: list[Goal]
    ) -> Score:
        key = (_digest(source), _digest(candidate), instruction)
        if key not in self._scores:
            _forget(self._scores)
            self._scores[key] = _measure(_pixels(source), _pixels(candidate, source.size), scene, goals)
        return self._scores[key]


def _digest(picture: Image) -> bytes:
    return hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes()).digest()


def _forget(known: dict[Any, Any]) -> None:
    while len(known) >= REMEMBERED:
        del known[next(iter(known))]


def _pixels(picture: Image, size: tuple[int, int] | None = None) -> Tensor:
    """``(3, H, W)`` in [0, 1] at the size at which pictures are read, of the aspect of ``size``."""
    width, height = size or picture.size
    scale = min(1.0, SIDE / min(width, height))
    picture = images.resize(
        picture.convert("RGB"), (max(1, round(width * scale)), max(1, round(height * scale)))
    )
    return images.to_unit([picture])[0]


def _measure(source: Tensor, candidate: Tensor, scene: Scene, goals: list[Goal]) -> Score:
    view = View(candidate, SIDE)
    goal = goals[int(view.errors([goal.target for goal in goals]).argmin())]
    # Where the words leave something open, the candidate's own choice is the wanted one.
    target = refine(
        goal.target, {name: OBJECT_RANGES[name.rstrip("0123456789")] for name in goal.free}, view, 6
    )
    reading: Reading = readout.judge(candidate, scene, target, goal.wanted)
    height, width = candidate.shape[1:]
    before, truth = render([scene, target], width, height)
    edited = readout.edited_region(before, truth)
    parts = [_psnr(candidate, truth, region) for region in (edited, ~edited) if region.any()]
    return Score(
        success=reading.success,
        valid=reading.valid,
        kept=reading.kept,
        closeness=float(torch.stack(parts).mean()),
    )


def _psnr(a: Tensor, b: Tensor, region: Tensor | None = None) -> Tensor:
    error = (a - b).pow(2).mean(0)
    mse = error.mean() if region is None else error[region].mean()
    return (-10 * torch.log10(mse.clamp(min=1e-9))).clamp(max=BEST)
