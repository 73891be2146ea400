"""The strength at which a slider makes the change that it was shown, as its file records it.

Training fixes a direction, but not how far scale 1 goes. A calibration says which raw scale makes the shown change, and within
which scales the picture stays the same one. An editor's scale 1 is then that raw scale.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import adapter_files, inspection, schema, stored
from .errors import UserError
from .metrics import spearman
from .schema import Origin

KEY = "calibration"
"""Where a file's record has it."""
HOLDS = 0.75
"""Share of the faces that must stay themselves within the range."""
TURNS = 0.1
"""Of the shown change: how far the response may fall back before the range ends."""
NEAR_PEAK = 0.95
"""Of the largest response before it levels off, where the shown change is not reached by then."""
SLOW = 0.15
"""Of the mean slope so far: less in two steps that follow each other, and the response has levelled off."""
LEAST = 0.15
"""Of the shown change: a slider that moves less has no unit."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured at one raw scale, means over the faces."""

    scale: float
    response: float
    """Of the shown change: 0 without the edit, 1 as in the pairs."""
    intact: float
    """Share of the faces that are still the same."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a calibrated file says."""

    unit: float
    """Raw scale that scale 1 stands for."""
    low: float
    """Lowest raw scale of those measured within which the response goes one way and faces stay the same; ``high`` the highest."""
    high: float
    response: float
    """At scale 1, of the shown change."""
    monotone: float
    """Spearman's rank correlation of scale and response, from ``low`` to ``high``."""
    measure: str
    """How it was measured: read-out or latents."""
    faces: int
    curve: tuple[tuple[float, ...], ...]
    """Raw scale, response and share of intact faces."""

    def __post_init__(self) -> None:
        if not 0 < self.unit < 100:
            raise ValueError(f"unit must lie between 0 and 100, but it is {self.unit}")
        if not self.low <= 0 < self.high:
            raise ValueError(f"low and high must enclose 0, but they are {self.low} and {self.high}")

    def covers(self, scale: float) -> bool:
        """Whether a calibrated scale lies within what was measured to hold."""
        return self.low <= scale * self.unit <= self.high * (1 + 1e-6)

    def folded(self) -> "Calibration":
        """The same of weights that are ``unit`` times as strong."""
        return replace(
            self,
            unit=1.0,
            low=self.low / self.unit,
            high=self.high / self.unit,
            curve=tuple((scale / self.unit, *rest) for scale, *rest in self.curve),
        )

    def __str__(self) -> str:
        ends = f"{self.low / self.unit:.2g} to {self.high / self.unit:.2g}"
        return (
            f"scale 1 is raw {self.unit:.3g} and makes {self.response:.0%} of the shown change; measured to hold from {ends}"
            f" ({self.measure}, {self.faces} faces)"
        )


def decide(points: Sequence[Point], *, measure: str, faces: int, gradual: bool = True) -> Calibration | None:
    """The calibration that a curve gives; ``None`` where the slider does not do what it was shown.

    The range grows from 0 both ways while faces hold and the response goes on in its direction. The unit is the first scale in it
    that reaches the shown change or, where the response levels off before, nearly that level: what a slider gains behind it,
    it gains at the price of the picture.

    Args:
        points: with ascending scales, 0 among them.
        gradual: whether a face can make a part of the change. Of changes that faces make one by one, the unit is a measured step
            beyond the scale at which all have, if the range goes so far: others are a little later.
    """
    zero = next(i for i, point in enumerate(points) if point.scale == 0)
    up = _holding(points[zero:], 1)
    down = _holding(points[zero::-1], -1)
    rising = _rising(up)
    peak = max(point.response for point in rising)
    if peak < LEAST:
        return None
    unit = _crossing(rising, 1.0 if peak >= 1 else NEAR_PEAK * peak)
    if not gradual:
        later = [point.scale for point in up if point.scale > unit and point.response >= peak]
        unit = min(later, default=unit)
    held = [*down[:0:-1], *up]
    return Calibration(
        unit=unit,
        low=down[-1].scale,
        high=up[-1].scale,
        response=at(points, unit),
        monotone=spearman([p.scale for p in held], [p.response for p in held]),
        measure=measure,
        faces=faces,
        curve=tuple((p.scale, round(p.response, 4), round(p.intact, 4)) for p in points),
    )


def _rising(points: Sequence[Point]) -> list[Point]:
    """The points from 0 on until the response has levelled off."""
    for n, point in enumerate(points[1:-2], 1):
        slope = SLOW * point.response / point.scale
        steps = itertools.pairwise(points[n : n + 3])
        if point.response >= LEAST and all(
            b.response - a.response < slope * (b.scale - a.scale) for a, b in steps
        ):
            return list(points[: n + 1])
    return list(points)


def _holding(points: Sequence[Point], sign: int) -> list[Point]:
    """The points from 0 outwards while faces hold and the response does not turn back."""
    held = [points[0]]
    for point in points[1:]:
        furthest = max(sign * p.response for p in held)
        if point.intact < HOLDS or sign * point.response < furthest - TURNS:
            break
        held.append(point)
    return held


def _crossing(points: Sequence[Point], wanted: float) -> float:
    """Where the response first reaches a value, on straight lines between the points."""
    for a, b in zip(points, points[1:], strict=False):
        if b.response >= wanted:
            return a.scale + (b.scale - a.scale) * (wanted - a.response) / (b.response - a.response)
    raise ValueError(f"the response never reaches {wanted}")


def at(points: Sequence[Point], scale: float) -> float:
    """The response at a scale between measured ones."""
    for a, b in zip(points, points[1:], strict=False):
        if a.scale <= scale <= b.scale:
            return a.response + (b.response - a.response) * (scale - a.scale) / (b.scale - a.scale)
    raise ValueError(f"{scale} was not measured")


def of_record(record: Mapping[str, Any], file: Path) -> Calibration | None:
    """The calibration in a file's own record; raises ``UserError`` where it is damaged."""
    raw = record.get(KEY)
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise UserError(f"{file}: its calibration is damaged; run pentimento calibrate again")
    return schema.parse(Calibration, dict(raw), Origin(name=f"{file}, its record of a calibration"))


def file_of(place: Path, main: str) -> Path:
    """The file of the adapter that carries the edit, among the weights of a run or as it is."""
    inside = place / main / inspection.WEIGHTS_NAME
    return inside if main and inside.is_file() else inspection.find(place)


def read(file: Path) -> Calibration | None:
    """The calibration of an adapter file; ``None`` for one that was never calibrated."""
    return of_record(adapter_files.read_record(file), file)


def check(file: Path) -> dict[str, Any]:
    """The record of a file that can take a calibration; raises ``UserError`` for files of others."""
    record = adapter_files.read_record(file)
    if not record:
        raise UserError(
            f"{file} has no record of its training, so that a calibration has no place in it; only files that pentimento trained"
            " can be calibrated (--measure-only draws the curve of any slider)"
        )
    return record


def report(adapter: inspection.Adapter) -> list[tuple[str, str]]:
    """What ``pentimento inspect`` says of it."""
    known = of_record(adapter.ours, adapter.path)
    return [] if known is None else [("calibrated", str(known))]


@contextlib.contextmanager
def kept(file: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Within, a file is written anew: its calibration stays if the tensors do; else ``say`` is told that it is gone."""
    known = read(file)
    before = stored.read_tensors(file) if known else {}
    yield
    if known is None:
        return
    now = stored.read_tensors(file)
    if now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before):
        write(file, known)
    elif read(file) is None:
        say(
            f"{file}: other weights than those that were calibrated; to know what their scale 1 is: pentimento calibrate"
        )


def write(file: Path, calibration: Calibration | None) -> None:
    """Put a calibration into an adapter file, or take it out; its tensors stay as they are, to the bit.

    Raises:
        UserError: a file that this package did not write, or that cannot be written.
    """
    record = check(file)
    record.pop(KEY, None)
    if calibration is not None:
        record[KEY] = schema.plain(calibration)
    metadata = stored.read_metadata(file)
    more = {key: value for key, value in metadata.items() if key not in ("format", "pentimento")}
    try:
        adapter_files.write(file, stored.read_tensors(file), record, more)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error
