"""Portraits read off a picture: colours and wear by sweeps, pose and face by Gauss-Newton steps."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from . import scene as world
from .recognise import NEAR, View, empty, refine
from .scene import Scene

BOUNDS = dict(world.PORTRAIT_RANGES)
START = {name: (low + high) / 2 for name, (low, high) in BOUNDS.items()} | {"age": 0.3}
HALF_SHIRT, SHIRT_TOP = 0.74, 0.7
"""Of a portrait of scale 1: half the width of the shirt, and where it begins below the middle."""
CHUBBY = (0.5, 0.1, 0.9)
"""Widths of the face to start from: a wide bald head and hair around a slim one are a dead end to each other."""
ROUGH = 28.0
"""dB at the coarsest size that every right start reaches, and hardly any wrong one."""
POSE = ("dx", "dy", "scale", "tilt", "chubby", "hair_length")


def portrait(views: Sequence[View], ground: Mapping[str, int]) -> Scene:
    """The portrait that fits best, on the known background."""
    coarse, middle, fine = views
    figure = {"kind": "portrait", "style": 0, **{n: 0 for n in world.PORTRAIT_CHOICES}, **START, **ground}
    figure |= _shirt(fine, ground)
    rough: list[Scene] = []
    for chubby in CHUBBY:
        rough.append(_rough(figure | {"chubby": chubby}, coarse))
        if coarse.decibel(rough[-1]) >= ROUGH:
            break
    scene = coarse.best(rough)
    for view in (middle, fine):
        scene = refine(scene, BOUNDS, view, 5)
        scene = _sweep(scene, view, _blocks(scene, full=view is middle))
        scene = refine(scene, BOUNDS, view, 5)
    return scene


def _rough(scene: Scene, view: View) -> Scene:
    for _ in range(2):
        scene = _sweep(scene, view, _blocks(scene, full=True))
        scene = refine(scene, {n: BOUNDS[n] for n in POSE}, view, 4)
    return scene


def _shirt(view: View, ground: Mapping[str, int]) -> dict[str, Any]:
    """The shirt's colour, and by its place that of the whole figure: nothing else reaches down to the lower edge."""
    palette = torch.tensor(list(world.COLOURS.values()))[:, :, None, None] / 255
    behind = (view.renders([empty(ground)])[0] - view.pixels).abs().amax(0)
    distance = (view.pixels - palette).abs().amax(1)  # (colours, H, W)
    near = (distance < NEAR) & (distance < behind)
    near[ground["bg"]] = False
    shirt = int(near[:, -1].sum(1).argmax())
    height, width = view.size
    half = min(height, width) / 2
    columns = near[shirt, -1].nonzero().flatten()
    if not len(columns):
        return {"shirt": shirt}
    left, right = int(columns[0]), int(columns[-1]) + 1
    scale = (right - left) / (2 * HALF_SHIRT * half)
    # On either side of neck and beard: how far up the shirt reaches without a gap.
    sides = [round((left + right) / 2 + side * 0.4 * scale * half) for side in (-1, 1)]
    runs = [near[shirt, :, max(0, min(width - 1, x))].flip(0).long().cumprod(0).sum() for x in sides]
    top = height - float(torch.stack(runs).float().mean())
    found = {
        "dx": (left + right - width) / 2 / half,
        "dy": (top - height / 2) / half - SHIRT_TOP * scale,
        "scale": scale,
    }
    return {"shirt": shirt} | {
        name: min(BOUNDS[name][1], max(BOUNDS[name][0], value)) for name, value in found.items()
    }


def _grid(name: str, count: int) -> list[float]:
    low, high = BOUNDS[name]
    return [low + (high - low) * (i + 0.5) / count for i in range(count)]


def _blocks(scene: Scene, *, full: bool) -> Iterable[dict[str, list[Any]]]:
    """Attributes that are tried together, with the values to try besides the present ones."""
    colours = list(range(len(world.COLOURS)))
    if full:
        yield {"skin": list(range(len(world.SKINS)))}
        yield {"hair_style": list(range(4)), "hair": colours, "beard": [0, 1]}
        yield {"hat": [1], "hat_colour": colours}
        yield {"hair": colours, "age": _grid("age", 10)}
        yield {"tilt": _grid("tilt", 7)}
        yield {"chubby": _grid("chubby", 4)}
        yield {"hair_length": _grid("hair_length", 6), "hair_style": list(range(4))}
        yield {"smile": _grid("smile", 7)}
        yield {"eye_size": _grid("eye_size", 4), "eyes": list(range(4))}
    else:
        yield {"hair": colours}
        yield {"hair_style": list(range(4))}
        yield {"hat_colour": colours}
        yield {"eyes": list(range(4))}
        yield {"shirt": colours}
    yield {name: [0, 1] for name in ("glasses", "hat", "beard", "earring")}


def _sweep(scene: Scene, view: View, blocks: Iterable[Mapping[str, list[Any]]]) -> Scene:
    for block in blocks:
        tried = [
            scene | dict(zip(block, values, strict=True)) for values in itertools.product(*block.values())
        ]
        scene = view.best([scene, *tried])
    return scene
