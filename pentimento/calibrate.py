"""The ``calibrate`` command: a slider's response over its scales, measured, drawn, and recorded in its file.

Where the pairs are of the drawn world, the change is read off exactly (``pocket/faces.py``). Elsewhere it is measured in latents
against those of the pairs: ``projection`` is <d, x_s - x_0> / <d, d> with d the pairs' mean difference. Where it never comes to 1
while pictures change by less than ``LARGEST_CHANGE`` (a smile of a face that lies elsewhere than the pairs' is a change of other
coordinates), the response is ``size``, |x_s - x_0| over the pairs' mean |d|, with the projection's sign.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from . import calibration, data, images, lookup, plots, run, runfolder, schema
from . import recipe as recipe_
from .calibration import Calibration, Point
from .data import DataConfig
from .errors import UserError, counted
from .method import Example, Probe
from .pocket import dataset, faces
from .schema import Origin

FOLDER = "calibration"
MOST = 6
"""Pictures that are drawn for each face that is needed, before it is given up."""
LARGEST_CHANGE = 2.0
"""Of the shown change in latents, up to which a picture counts as the same one."""
SHOWN = 8
"""Faces on the sheet."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What calibrating takes as ``key=value``, besides changes of the run's data, backbone and method."""

    measure: Literal["auto", "read-out", "latents"] = "auto"
    """How the response is measured: read-out, exactly, where the pairs are of the drawn world; latents, against those of the
    pairs; auto, the former where it is possible."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the command."""

    what: str
    prompts: tuple[str, ...] = ()
    """Empty: captions of the dev split for the read-out, the adapter's own prompt for latents."""
    scales: tuple[float, ...]
    """Raw ones."""
    seed: int = 0
    count: int = 8
    settings: tuple[str, ...] = ()
    out: Path | None = None
    record: bool = True
    """Write the calibration into the adapter's file."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A response curve."""

    measure: str
    points: tuple[Point, ...]
    rows: tuple[Mapping[str, float], ...]
    """More of each point, for the table."""
    sheet: tuple[tuple[Image, ...], ...]
    """Rows are faces, columns scales."""
    faces: int
    gradual: bool = True
    """Whether a face can make a part of the change."""

    @property
    def scales(self) -> list[float]:
        """Raw scales, ascending."""
        return [point.scale for point in self.points]

    def lines(self) -> Iterator[str]:
        """The table."""
        more = list(self.rows[0])
        yield "  ".join(f"{name:>12}" for name in ("raw scale", "response", "same faces", *more))
        for point, row in zip(self.points, self.rows, strict=True):
            values = (point.response, point.intact, *row.values())
            yield "  ".join([f"{point.scale:>12g}", *(f"{value:>12.3f}" for value in values)])


@dataclass(frozen=True, kw_only=True)
class Done:
    """What came of it."""

    measured: Measured
    calibration: Calibration | None
    file: Path
    written: tuple[Path, ...]


def calibrate(request: Request, say: Callable[[str], None] = lambda text: None) -> Done:
    """Measure a slider, and record what its scale 1 should be.

    Raises:
        UserError: no slider, no pairs, a file that cannot take a record, too few faces.
    """
    if request.count < 1:
        raise UserError(f"--count {request.count}: at least one face is measured")
    options, of_data, overrides = split(request.settings)
    scales = sorted({0.0, *request.scales})
    if scales[-1] <= 0:
        raise UserError("--scale: at least one strength must be above 0")
    found = lookup.find(request.what, overrides=overrides)
    file = calibration.file_of(found.place, found.method.main)
    if request.record:
        calibration.check(file)
    config = pairs_of(request.what, of_data)
    rows = data.open_data(config)
    change = drawn_change(config, options.measure)
    out = request.out or (
        Path(request.what) / FOLDER if Path(request.what).is_dir() else file.parent / FOLDER
    )
    editor = run.load(request.what, overrides=overrides, raw=True)
    for note in editor.notes:
        say(note)
    probe = editor.method.probe()
    if change is not None:
        asked = asked_for(request, config)
        measured = read_out(probe, change, asked, scales, request.count)
    else:
        prompts = itertools.cycle(request.prompts or (editor.asked(None),))
        asked = zip(prompts, itertools.count(request.seed), strict=False)
        pairs = [row.load() for row in rows]
        measured = in_latents(probe, pairs, list(itertools.islice(asked, request.count)), scales)
    decided = calibration.decide(
        measured.points, measure=measured.measure, faces=measured.faces, gradual=measured.gradual
    )
    written = draw(measured, decided, out)
    if decided is not None and request.record:
        calibration.write(file, decided)
    return Done(measured=measured, calibration=decided, file=file, written=tuple(written))


def split(settings: Sequence[str]) -> tuple[Options, list[str], list[str]]:
    """The command's own settings, changes of the data, and those of backbone and method."""
    known = schema.hints(Options)
    raw: dict[str, Any] = {}
    written: dict[tuple[str, ...], str] = {}
    of_data: list[str] = []
    rest: list[str] = []
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text}: write settings as key=value, such as data.root=FOLDER")
        if "." not in key and key != "method":
            if key not in known:
                near = schema.nearest(key, list(known))
                raise UserError(
                    f"{text}: calibrate has no setting {key!r}.{f' Did you mean {near}?' if near else ''} Its own: {', '.join(known)};"
                    " those of the run are written data.KEY, backbone.KEY and config.KEY"
                )
            raw[key], written[(key,)] = value, text
        else:
            (of_data if key.startswith("data.") else rest).append(text)
    return schema.parse(Options, raw, Origin(name="calibrate", overrides=written)), of_data, rest


def pairs_of(what: str, overrides: Sequence[str]) -> DataConfig:
    """The data set that shows the change: the one that a run was trained on unless ``data.`` settings name another.

    Raises:
        UserError: none is known.
    """
    raw: dict[str, Any] = {"data": {}}
    name = what
    if (Path(what) / runfolder.RECIPE).is_file():
        raw["data"] = schema.plain(recipe_.load(what).data)
        name = str(Path(what) / runfolder.RECIPE)
    if any(text.startswith("data.root=") for text in overrides) and raw["data"].get("kind") == "none":
        raw["data"] = {}
    origin = recipe_.override(raw, Origin(name=name), overrides)
    config = schema.parse(DataConfig, raw["data"], origin, ("data",))
    if not config.root:
        raise UserError(
            f"{what}: nothing says what the slider was shown; name pairs that show its change with data.root=FOLDER"
        )
    return config


def drawn_change(config: DataConfig, measure: str) -> faces.Change | None:
    """What pairs of the drawn world change; ``None`` where latents are to be measured.

    Raises:
        UserError: the read-out was asked for, but these pairs do not allow it.
    """
    if measure == "latents":
        return None
    root = Path(config.root)
    change = faces.change_of(dataset.read(root)) if (root / dataset.CASES_FILE).is_file() else None
    if change is None and measure == "read-out":
        raise UserError(
            f"measure=read-out: {root} holds no drawn portraits with one and the same change (pentimento world draws them)"
        )
    return change


def asked_for(request: Request, config: DataConfig) -> Iterator[tuple[str, int]]:
    """Prompts and seeds of the faces that the read-out may take."""
    if request.prompts:
        return zip(itertools.cycle(request.prompts), itertools.count(request.seed), strict=False)
    return faces.prompts(dataset.read(Path(config.root))[0].task, "dev", request.seed)


def read_out(
    probe: Probe,
    change: faces.Change,
    asked: Iterator[tuple[str, int]],
    scales: Sequence[float],
    count: int,
) -> Measured:
    """The response as it is seen in the pictures.

    Raises:
        UserError: no face that could be read and could show the change.
    """
    chosen = faces.find(probe, asked, [change], count, MOST * count)
    if not chosen:
        raise UserError(
            f"of {counted(MOST * count, 'picture')} none is a drawn face that could show the change; measure=latents needs none,"
            " or say what to draw with --prompt"
        )
    latents = probe.draw([(face.prompt, face.seed) for face in chosen], scales)
    pictures = {scale: probe.pictures(latents[scale]) for scale in scales}
    flat = [picture for scale in scales for picture in pictures[scale]]
    every = faces.looks(flat, chosen * len(scales), change, probe.device)
    points, rows = [], []
    for n, scale in enumerate(scales):
        looks = every[n * len(chosen) : (n + 1) * len(chosen)]
        response, intact, value, kept = (
            mean([float(getattr(look, name)) for look in looks])
            for name in ("response", "intact", "value", "kept")
        )
        points.append(Point(scale=scale, response=response, intact=intact))
        rows.append({change.attribute: value, "others kept": kept})
    return Measured(
        measure="read-out",
        points=tuple(points),
        rows=tuple(rows),
        sheet=tuple(tuple(pictures[scale][i] for scale in scales) for i in range(min(SHOWN, len(chosen)))),
        faces=len(chosen),
        gradual=change.continuous,
    )


def in_latents(
    probe: Probe, pairs: Sequence[Example], asked: Sequence[tuple[str, int]], scales: Sequence[float]
) -> Measured:
    """The response in latents.

    Raises:
        UserError: pairs that show no change.
    """
    shown = [probe.shown([pair]) for pair in pairs]
    direction, length = torch.stack(shown).mean(0), mean([float(one.norm()) for one in shown])
    if not float(direction.norm()) > 0:
        raise UserError("data.root: sources and targets are the same pictures; there is no change to measure")
    latents = probe.draw(asked, scales)
    projections, sizes = [], []
    for scale in scales:
        change = latents[scale] - latents[0.0]
        projections.append(along(change, direction))
        sizes.append(change.flatten(1).norm(dim=1) / length)
    intact = [float((size <= LARGEST_CHANGE).float().mean()) for size in sizes]
    held = [p for p, whole in zip(projections, intact, strict=True) if whole >= calibration.HOLDS]
    signed = [math.copysign(float(size.mean()), p) for size, p in zip(sizes, projections, strict=True)]
    name, responses = ("projection", projections) if max(held) >= 1 else ("size", signed)
    some = {scale: probe.pictures(latents[scale][:SHOWN]) for scale in scales}
    return Measured(
        measure=f"latents, by {name}",
        points=tuple(
            Point(scale=scale, response=response, intact=whole)
            for scale, response, whole in zip(scales, responses, intact, strict=True)
        ),
        rows=tuple({"projection": p, "size": s} for p, s in zip(projections, signed, strict=True)),
        sheet=tuple(tuple(some[scale][i] for scale in scales) for i in range(len(asked[:SHOWN]))),
        faces=len(asked),
    )


def along(change: Tensor, direction: Tensor) -> float:
    """``<d, x> / <d, d>``, mean over the rows of ``change (B, ...)``."""
    return float((change * direction).flatten(1).sum(1).mean() / direction.square().sum())


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def draw(measured: Measured, decided: Calibration | None, out: Path) -> list[Path]:
    """Curve, sheet and numbers."""
    marks = [] if decided is None else [("1", decided.unit)]
    curve = plots.curve(
        f"response over scales, {measured.measure}, {counted(measured.faces, 'face')}",
        measured.scales,
        [
            plots.Line(name="response (1: as shown)", values=[p.response for p in measured.points]),
            plots.Line(name="faces that stay the same", values=[p.intact for p in measured.points]),
        ],
        across="raw scale",
        marks=marks,
    )
    titles = [f"raw {scale:g}" for scale in measured.scales]
    sheet = images.sheet(measured.sheet, titles=titles, cell=min(256, max(128, *measured.sheet[0][0].size)))
    numbers = {
        "calibration": None if decided is None else schema.plain(decided),
        "measure": measured.measure,
        "points": [
            schema.plain(point) | dict(row) for point, row in zip(measured.points, measured.rows, strict=True)
        ],
    }
    text = json.dumps(numbers, indent=1) + "\n"
    runfolder.write_text(out / "response.json", text)
    return [
        images.save_image(curve, out / "curve.png"), images.save_image(sheet, out / "sheet.png"), out / "response.json",
    ]  # fmt: skip
