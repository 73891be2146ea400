"""Objects read off a picture. Each cell of the 3 x 3 grid is fitted for itself, all of them in the same renders.

Objects stay within their cells, so the error of a cell depends on its own object alone: one render tries a hypothesis in
every cell at once.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import scene as world
from .recognise import CLEAR, DIFFERENT, View, gauss_newton, moved
from .render import FILL_SHADE, shade
from .scene import OBJECT_RANGES as BOUNDS
from .scene import Scene

START = {name: (low + high) / 2 for name, (low, high) in BOUNDS.items()}
SPREADS = (0.636, 0.653, 0.5, 0.492, 0.721, 0.556)
"""Root mean square distance of each shape's points from their middle, in units of its size."""
ROTATIONS = (-0.24, -0.12, 0.0, 0.12, 0.24)
OCCUPIED = 0.03
"""Share of a cell that must differ from the background: the slimmest object covers a tenth."""
KEPT = (5, 2)
"""Hypotheses of a cell that are refined, first roughly, then finely."""

Object = dict[str, Any]
"""Attributes of one object without its number: shape, colour, fill, size, jx, jy, rotation."""


def shapes(views: Sequence[View], ground: Mapping[str, int]) -> Scene | None:
    """The objects that fit best, on the known background; ``None`` where there are too many to be a scene."""
    middle, fine = views[1:]
    bare = _scene({}, ground, 0)
    cells = _occupied(fine, bare)
    if len(cells) > world.SLOTS:
        return None
    if not cells:
        return bare
    rough = _Cells(middle, ground, 0)
    guesses = {cell: _guesses(fine, bare, cell) for cell in cells}
    ranks = rough.rank(guesses, KEPT[0], apart=("colour", "shape", "fill"))
    ranks = [rough.refine(rank, 4) for rank in ranks]
    ranks = rough.rank({cell: [rank[cell] for rank in ranks] for cell in cells}, KEPT[1])
    likely = int(fine.best([_scene(ranks[0], ground, value) for value in (0, 1)])["shadow"])
    found = _finished(ranks, ground, likely, fine)
    if fine.decibel(found) >= CLEAR:
        return found
    return max(found, _finished(ranks, ground, 1 - likely, fine), key=fine.decibel)


def _finished(
    ranks: Sequence[Mapping[int, Object]], ground: Mapping[str, int], shadow: int, fine: View
) -> Scene:
    cells = _Cells(fine, ground, shadow)
    ranks = [cells.refine(rank, 3) for rank in ranks]
    best = cells.rank({cell: [rank[cell] for rank in ranks] for cell in ranks[0]}, 1)[0]
    return _scene(cells.refine(best, 4), ground, shadow)


def _guesses(view: View, bare: Scene, cell: int) -> list[Object]:
    """What may be in a cell: of its two likeliest colours every shape, fill and rough rotation, in its place."""
    rows, columns = _cell(view, cell)
    pixels, differs = view.pixels[:, rows, columns], _difference(view, bare)[rows, columns]
    half = min(view.size) / 2
    made = []
    for colour, near in _colours(pixels, differs, bare["bg"]):
        points = near.nonzero().float()
        if len(points) < 2:
            points = torch.ones_like(near).nonzero().float()
        spread = float(points.var(0).sum().sqrt())
        y, x = ((points.mean(0) + 0.5) / half - 0.32).tolist()
        for shape, unit in enumerate(SPREADS):
            place = {"jx": x, "jy": y, "size": spread / half / unit}
            inside = {
                name: min(BOUNDS[name][1], max(BOUNDS[name][0], value)) for name, value in place.items()
            }
            made += [
                inside | {"colour": colour, "shape": shape, "fill": fill, "rotation": rotation}
                for fill, rotation in itertools.product(range(len(world.FILLS)), ROTATIONS)
            ]
    return made


def _colours(pixels: Tensor, differs: Tensor, bg: int) -> list[tuple[int, Tensor]]:
    """The two colours of the palette that explain most of an object together with their shades, and where they are."""
    palette = torch.tensor(list(world.COLOURS.values()))[:, :, None, None] / 255
    distance = torch.minimum(
        *((tone - pixels).abs().amax(1) for tone in (palette, shade(palette, FILL_SHADE)))
    )
    explained = (distance.clamp(max=0.06) * differs).sum((1, 2))
    explained[bg] = float("inf")  # no object has the colour of the background
    return [(c, (distance[c] < 0.06) & differs) for c in explained.argsort()[:2].tolist()]


def _scene(objects: Mapping[int, Object], ground: Mapping[str, int], shadow: int) -> Scene:
    scene: Scene = {"kind": "shapes", "style": 0, "shadow": shadow, **ground}
    for k in range(world.SLOTS):
        empty = START | {"shape": 0, "fill": 0, "colour": 0}
        cell, thing = list(objects.items())[k] if k < len(objects) else (0, empty)
        scene |= {f"present{k}": int(k < len(objects)), f"cell{k}": cell}
        scene |= {f"{name}{k}": value for name, value in thing.items()}
    return scene


def _cell(view: View, cell: int) -> tuple[slice, slice]:
    """Rows and columns of a cell, whose sides are 0.64 of half the shorter side of the picture."""
    height, width = view.size
    half = min(height, width) / 2
    middle = (height / 2 + (cell // 3 - 1) * 0.64 * half, width / 2 + (cell % 3 - 1) * 0.64 * half)
    top, left = (max(0, round(m - 0.32 * half)) for m in middle)
    return slice(top, round(middle[0] + 0.32 * half)), slice(left, round(middle[1] + 0.32 * half))


def _difference(view: View, bare: Scene) -> Tensor:
    """Where something stands before the background, ``(H, W)`` bool."""
    return (view.renders([bare])[0] - view.pixels).abs().amax(0) > DIFFERENT


def _occupied(view: View, bare: Scene) -> list[int]:
    differs = _difference(view, bare).float()
    return [cell for cell in range(9) if float(differs[_cell(view, cell)].mean()) > OCCUPIED]


class _Cells:
    """Fits one picture's cells side by side."""

    def __init__(self, view: View, ground: Mapping[str, int], shadow: int):
        self.view, self.ground, self.shadow = view, ground, shadow

    def _residuals(self, tried: Sequence[Mapping[int, Object]]) -> dict[int, Tensor]:
        """Differences to the picture within each cell, ``(n, values)``."""
        made = self.view.renders([_scene(objects, self.ground, self.shadow) for objects in tried])
        made -= self.view.pixels
        return {cell: made[(..., *_cell(self.view, cell))].flatten(1) for cell in tried[0]}

    def rank(
        self, options: Mapping[int, Sequence[Object]], count: int, apart: Sequence[str] = ()
    ) -> list[dict[int, Object]]:
        """Every cell's best option, its second best, ..., ``count`` of them; of those equal in ``apart`` only the best.

        All cells have equally many options.
        """
        tried = [dict(zip(options, row, strict=True)) for row in zip(*options.values(), strict=True)]
        found = self._residuals(tried)
        order = {}
        for cell, things in options.items():
            seen: dict[Any, Object] = {}
            for i in found[cell].pow(2).mean(1).argsort().tolist():
                seen.setdefault(tuple(things[i][name] for name in apart) or i, things[i])
            order[cell] = list(seen.values())
        return [{cell: things[i] for cell, things in order.items()} for i in range(count)]

    def refine(self, objects: Mapping[int, Object], rounds: int) -> dict[int, Object]:
        """Place, size and turn every object where it fits best."""
        spans = torch.tensor([high - low for low, high in BOUNDS.values()])
        current = dict(objects)
        for _ in range(rounds):
            nudges = [{cell: moved(o, BOUNDS, {name: 0.03 * float(span)}) for cell, o in current.items()}
                      for name, span in zip(BOUNDS, spans, strict=True)]  # fmt: skip
            found = self._residuals([current, *nudges])
            steps: dict[int, Tensor] = {}
            for cell, residual in found.items():
                taken = torch.tensor(
                    [n[cell][name] - current[cell][name] for n, name in zip(nudges, BOUNDS, strict=True)]
                )
                jacobian = (residual[1:] - residual[0]) * (spans / torch.where(taken == 0, 1, taken))[:, None]
                steps[cell] = gauss_newton(jacobian, residual[0]) * spans
            count = len(next(iter(steps.values())))
            tried = [
                {
                    cell: moved(
                        current[cell], BOUNDS, dict(zip(BOUNDS, steps[cell][i].tolist(), strict=True))
                    )
                    for cell in current
                }
                for i in range(count)
            ]
            after = self._residuals([current, *tried])
            best = {cell: int(after[cell].pow(2).mean(1).argmin()) for cell in current}
            current = {cell: [current, *tried][best[cell]][cell] for cell in current}
            if not any(best.values()):
                break
        return current
