"""Reading an edit off a picture by render-and-compare: exact truth without any network.

The scene is known, so every attribute is estimated as the value whose render is nearest to the picture, by coordinate
descent; the result counts only if its render explains the picture (the validity gate).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import metrics
from . import scene as world
from .render import render
from .scene import Scene

GATE = 23.0
"""dB between a picture and the render of its read-out, below which the read-out is void."""
TOLERANCE = 0.15
"""Of a continuous change: how far from the wanted value still counts as success."""
STEPS = {"smile": 21, "age": 11, "eye_size": 7, "chubby": 7, "hair_length": 7}
DISCRETE = ("style", "bg", "texture")
PORTRAIT = ("glasses", "hat", "hat_colour", "beard", "earring", "hair", "hair_style", "shirt", "skin", "eyes")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a picture shows, seen as an edit of ``source`` towards ``target``."""

    scene: Scene
    valid: bool
    explained: float
    """PSNR in dB between the picture and the render of ``scene``."""
    success: bool
    kept: float
    """Share of the other attributes that are as in the source."""
    background: float
    """PSNR in dB against the source, outside the true change dilated by two pixels; at most 60."""


def values(scene: Scene, attribute: str) -> list[Any]:
    """The grid on which an attribute is looked for."""
    if attribute in STEPS:
        low, high = world.PORTRAIT_RANGES[attribute]
        n = STEPS[attribute]
        return [low + (high - low) * i / (n - 1) for i in range(n)]
    sizes = {
        "style": len(world.STYLES),
        "shape": len(world.SHAPES),
        "colour": len(world.COLOURS),
        "cell": 9,
        "fill": len(world.FILLS),
        "present": 2,
        "shadow": 2,
    }
    base = attribute.rstrip("0123456789")
    return list(range(sizes[base] if base in sizes else world.PORTRAIT_CHOICES[attribute]))


def attributes(source: Scene, target: Scene) -> list[str]:
    """What can be read of an edit, the changed attributes first."""
    if source["kind"] == "portrait":
        names = [*PORTRAIT, *STEPS, *DISCRETE]
    else:
        slots = [k for k in range(world.SLOTS) if source[f"present{k}"] or target[f"present{k}"]]
        names = [f"{part}{k}" for k in slots for part in ("present", "colour", "shape", "fill", "cell")] + [
            *DISCRETE,
            "shadow",
        ]
    changed = [n for n in names if source.get(n) != target.get(n)]
    return changed + [n for n in names if n not in changed]


def visible(scene: Scene, attribute: str) -> bool:
    """False where an attribute leaves no trace: the colour of an absent hat, the eyes in a 16 x 16 mosaic."""
    if attribute == "hat_colour":
        return bool(scene["hat"])
    if (
        scene["kind"] == "portrait"
        and scene["hair_style"] == world.HAIR_STYLES.index("bald")
        and attribute in ("hair", "hair_length")
    ):
        return attribute == "hair" and bool(scene["beard"])
    if attribute == "hair_length":
        return scene["hair_style"] != world.HAIR_STYLES.index("spiky")
    base = attribute.rstrip("0123456789")
    if base in ("colour", "shape", "fill", "cell") and base != attribute:
        return bool(scene[f"present{attribute[len(base) :]}"])
    return True


def read(picture: Tensor, source: Scene, target: Scene) -> tuple[Scene, float]:
    """The scene that explains ``picture`` (3, H, W in [0, 1]) best, and how well in dB."""
    return read_all(picture[None], [source], [target])[0]


def read_all(
    pictures: Tensor, sources: Sequence[Scene], targets: Sequence[Scene]
) -> list[tuple[Scene, float]]:
    """``read`` of each picture (n, 3, H, W in [0, 1]): a GPU that holds them compares all of them at once."""
    both = [[source, target] for source, target in zip(sources, targets, strict=True)]
    begun = _errors(pictures, range(len(both)), both)
    current = [pair[_least(found)] for pair, found in zip(both, begun, strict=True)]
    best = [min(found) for found in begun]
    names = [attributes(*pair) for pair in both]
    active: Sequence[int] = range(len(both))
    for _ in range(2):
        before = list(current)
        for turn in range(max(map(len, names))):
            chosen = {i: names[i][turn] for i in active if turn < len(names[i])}
            chosen = {i: name for i, name in chosen.items() if visible(current[i], name)}
            for i, (value, error) in _step(pictures, current, chosen).items():
                if error < best[i] * 0.999:
                    current[i], best[i] = current[i] | {chosen[i]: value}, error
        active = [i for i in active if current[i] != before[i]]
    return [
        (scene, float(-10 * torch.log10(torch.tensor(max(error, 1e-6)))))
        for scene, error in zip(current, best, strict=True)
    ]


def _errors(pictures: Tensor, rows: Sequence[int], scenes: Sequence[Sequence[Scene]]) -> list[list[float]]:
    """Mean squared errors of the renders of some scenes for each of some pictures."""
    height, width = pictures.shape[2:]
    flat = [(row, scene) for row, some in zip(rows, scenes, strict=True) for scene in some]
    most = 32 if pictures.device.type == "cpu" else 512
    errors: list[float] = []
    for part in (flat[i : i + most] for i in range(0, len(flat), most)):
        made = render([scene for _, scene in part], width, height, pictures.device)
        errors += (made - pictures[[row for row, _ in part]]).pow(2).mean((1, 2, 3)).tolist()
    left = iter(errors)
    return [list(itertools.islice(left, len(some))) for some in scenes]


def _step(
    pictures: Tensor, current: Sequence[Scene], chosen: Mapping[int, str]
) -> dict[int, tuple[Any, float]]:
    """For some pictures the best value of one attribute each, and its error."""
    grids = {i: values(current[i], name) for i, name in chosen.items()}
    found = _errors(
        pictures, list(chosen), [[current[i] | {n: v} for v in grids[i]] for i, n in chosen.items()]
    )
    errors = dict(zip(chosen, found, strict=True))
    out = {i: (grids[i][_least(errors[i])], min(errors[i])) for i in chosen}
    inner = {i: n for i, n in chosen.items() if n in STEPS and 0 < _least(errors[i]) < len(grids[i]) - 1}
    lowest = {i: _between(grids[i], errors[i]) for i in inner}
    refined = _errors(pictures, list(inner), [[current[i] | {n: lowest[i]}] for i, n in inner.items()])
    closer = {i: (lowest[i], error) for i, (error,) in zip(inner, refined, strict=True) if error < out[i][1]}
    return out | closer


def _least(errors: Sequence[float]) -> int:
    return min(range(len(errors)), key=errors.__getitem__)


def _between(grid: Sequence[float], errors: Sequence[float]) -> float:
    """The lowest point of the parabola through the best value and its neighbours."""
    i = _least(errors)
    a, b, c = errors[i - 1 : i + 2]
    shift = 0.5 * (a - c) / max(a - 2 * b + c, 1e-12)
    return grid[i] + max(-0.5, min(0.5, shift)) * (grid[1] - grid[0])


def edited_region(source: Tensor, target: Tensor, dilate: int = 2) -> Tensor:
    """Where the truth changes, ``(H, W)`` bool, grown by ``dilate`` pixels; both pictures (3, H, W) in [0, 1]."""
    changed = ((source - target).abs().amax(0) > 1.5 / 255).float()[None, None]
    return F.max_pool2d(changed, 2 * dilate + 1, 1, dilate)[0, 0] > 0


def judge(picture: Tensor, source: Scene, target: Scene, wanted: dict[str, Any]) -> Reading:
    """Success and preservation of one edit; ``picture`` (3, H, W) in [0, 1]. Not for discs: see ``judge_disc``."""
    height, width = picture.shape[1:]
    before, truth = render([source, target], width, height)
    scene, explained = read(picture, source, target)
    valid = explained >= GATE
    right = []
    for name, value in wanted.items():
        if name in STEPS:
            right.append(abs(scene[name] - value) <= TOLERANCE * abs(value - source[name]))
        elif not visible(scene | wanted, name):
            continue
        else:
            right.append(scene[name] == value)
    others = [
        n for n in attributes(source, target) if n not in wanted and visible(source, n) and visible(target, n)
    ]
    kept = [same(n, scene[n], source[n]) for n in others]
    outside = ~edited_region(before, truth)
    background = 60.0
    if outside.any():
        error = (picture - before).pow(2).mean(0)[outside].mean()
        background = min(60.0, float(-10 * torch.log10(error.clamp(min=1e-9))))
    return Reading(
        scene=scene,
        valid=valid,
        explained=explained,
        success=valid and all(right),
        kept=sum(kept) / max(1, len(kept)),
        background=background,
    )


def same(name: str, a: Any, b: Any) -> bool:
    """Whether two values of an attribute count as equal: continuous ones within a tenth of their range."""
    if name in STEPS:
        low, high = world.PORTRAIT_RANGES[name]
        return abs(a - b) <= 0.1 * (high - low)
    return bool(a == b)


@dataclass(frozen=True, kw_only=True)
class DiscReading:
    """How well a filled circle matches the truth."""

    inside: float
    """Mean CIEDE2000 against the truth inside the disc, a pixel and a half from its edge."""
    outside: float
    iou: float
    """Of the true disc and the pixels whose colour is nearer to the disc's than to the ground's."""

    @property
    def success(self) -> bool:
        """The bar of the Fill-Circles task: colours within 5 on both sides and IoU of at least 0.9."""
        return self.inside <= 5 and self.outside <= 5 and self.iou >= 0.9


def judge_disc(picture: Tensor, target: Scene) -> DiscReading:
    """Read a filled circle; ``picture`` (3, H, W) in [0, 1]."""
    height, width = picture.shape[1:]
    truth = render([target], width, height)[0]
    table = torch.tensor(list(world.CSS.values())) / 255
    colours = [table[target[name]].view(3, 1, 1).expand_as(picture) for name in ("disc", "ground")]
    near = metrics.delta_e76(picture, colours[0]) < metrics.delta_e76(picture, colours[1])
    disc = metrics.delta_e76(truth, colours[0]) < metrics.delta_e76(truth, colours[1])
    edge = (
        F.max_pool2d(disc.float()[None, None], 3, 1, 1)[0, 0]
        != -F.max_pool2d(-disc.float()[None, None], 3, 1, 1)[0, 0]
    )
    difference = metrics.delta_e2000(picture, truth)
    union = (near | disc).sum().clamp(min=1)
    return DiscReading(
        inside=float(difference[disc & ~edge].mean()),
        outside=float(difference[~disc & ~edge].mean()),
        iou=float((near & disc).sum() / union),
    )
