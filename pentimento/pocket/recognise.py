"""Reading a whole scene off a picture about which nothing is known: coarse-to-fine render-and-compare, without any network.

The background first, by a robust fit; then a portrait and a set of objects are tried, each from rough to fine: what is
discrete by sweeps over its values, what is continuous by damped Gauss-Newton steps on differences of renders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scene as world
from .readout import GATE
from .render import render_columns, stack
from .scene import Scene

LEVELS = (32, 64, 128)
"""Pixels of the shorter side at which a picture is compared; a larger one is read at the last."""
CLEAR = 33.0
"""dB from which a fit is taken without a look at the alternatives: drawn pictures reach 40, damaged ones 27."""
DIFFERENT = 0.06
"""Of a channel's range, from which a pixel is not the background's."""
NEAR = 0.15
"""Of a channel's range, up to which a pixel may have a colour."""
DAMPING = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A scene that explains a picture."""

    scene: Scene
    explained: float
    """PSNR in dB between the picture and the scene's render."""


class View:
    """One picture at one size, to which renders are compared."""

    def __init__(self, picture: Tensor, shorter: int):
        height, width = picture.shape[1:]
        scale = min(1.0, shorter / min(height, width))
        self.size = (max(1, round(height * scale)), max(1, round(width * scale)))
        self.pixels = picture if scale == 1 else F.interpolate(picture[None], self.size, mode="area")[0]

    def renders(self, scenes: Sequence[Scene]) -> Tensor:
        """Pictures ``(n, 3, H, W)``, not rounded to 8 bits: differences of parameters must show."""
        height, width = self.size
        parts = [scenes[i : i + 32] for i in range(0, len(scenes), 32)]
        return torch.cat([render_columns(stack(part), width, height) for part in parts])

    def errors(self, scenes: Sequence[Scene]) -> Tensor:
        """Mean squared error of each scene's render, ``(n,)``."""
        return (self.renders(scenes) - self.pixels).pow(2).mean((1, 2, 3))

    def best(self, scenes: Sequence[Scene]) -> Scene:
        """The scene whose render is nearest; of equals the first."""
        return scenes[int(self.errors(scenes).argmin())]

    def decibel(self, scene: Scene) -> float:
        return float(-10 * torch.log10(self.errors([scene])[0].clamp(min=1e-6)))


def recognise(picture: Tensor) -> Sight | None:
    """The scene of ``picture`` (3, H, W in [0, 1]): a portrait or objects in the flat style, the only one with colours.

    ``None`` where no scene explains the picture to within ``readout.GATE``.
    """
    from .recognise_portrait import portrait
    from .recognise_shapes import shapes

    views = [View(picture, shorter) for shorter in LEVELS]
    ground = background(views[-1])
    sights = []
    for fit in (portrait, shapes) if _bust(views[-1], ground) else (shapes, portrait):
        scene = fit(views, ground)
        if scene is not None:
            sights.append(Sight(scene=scene, explained=views[-1].decibel(scene)))
            if sights[-1].explained >= CLEAR:
                break
    found = max(sights, key=lambda sight: sight.explained, default=None)
    return found if found is not None and found.explained >= GATE else None


def _bust(view: View, ground: Mapping[str, int]) -> bool:
    """Whether something stands on the lower edge, as the shirt of every portrait does and no object."""
    edge = (view.renders([empty(ground)])[0] - view.pixels).abs().amax(0)[-1]
    return bool((edge > DIFFERENT).float().mean() > 0.4)


def empty(ground: Mapping[str, Any]) -> Scene:
    """Nothing but a background."""
    bare = {f"present{k}": 0 for k in range(world.SLOTS)} | {"style": 0, "shadow": 0}
    return world.draw(0, "shapes") | bare | dict(ground)


def background(view: View) -> dict[str, int]:
    """Colour and texture behind everything: the ones that agree with most of the picture."""
    choices = [
        {"bg": bg, "texture": texture}
        for bg in range(len(world.COLOURS))
        for texture in range(len(world.TEXTURES))
    ]
    renders = view.renders([empty(choice) for choice in choices])
    # Cut off, so that what stands in front counts alike for every choice.
    distance = (renders - view.pixels).abs().amax(1).clamp(max=0.12).mean((1, 2))
    return choices[int(distance.argmin())]


def gauss_newton(jacobian: Tensor, residual: Tensor) -> Tensor:
    """Steps ``(len(DAMPING), p)`` that lessen ``residual`` (m,), whose change per unit is ``jacobian`` (p, m)."""
    normal, slope = jacobian @ jacobian.T, jacobian @ residual
    scale = normal.diagonal().clamp(min=1e-9)
    systems = torch.stack([normal + torch.diag(damping * scale) for damping in DAMPING])
    return -torch.linalg.solve(systems, slope.expand(len(DAMPING), -1)[..., None])[..., 0]


def refine(scene: Scene, bounds: Mapping[str, tuple[float, float]], view: View, rounds: int) -> Scene:
    """Move continuous attributes within their bounds to where the render fits best."""
    names = list(bounds)
    spans = torch.tensor([high - low for low, high in bounds.values()])
    for _ in range(rounds):
        # Half a pixel or so of change: less would drown in the antialiasing, more would not be a slope.
        nudged = [moved(scene, bounds, {n: 0.02 * float(s)}) for n, s in zip(names, spans, strict=True)]
        made = view.renders([scene, *nudged])
        taken = torch.tensor([nudge[n] - scene[n] for nudge, n in zip(nudged, names, strict=True)])
        jacobian = (made[1:] - made[0]).flatten(1) * (spans / taken)[:, None]
        steps = gauss_newton(jacobian, (made[0] - view.pixels).flatten()) * spans
        tried = [moved(scene, bounds, dict(zip(names, step.tolist(), strict=True))) for step in steps]
        before, scene = scene, view.best([scene, *tried])
        if scene is before:
            break
    return scene


def moved(
    values: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]], change: Mapping[str, float]
) -> Scene:
    """With attributes changed, each kept within its bounds; a single one goes the other way where it is at its end."""
    out: dict[str, Any] = dict(values)
    for name, by in change.items():
        low, high = bounds[name]
        if len(change) == 1 and not low <= values[name] + by <= high:
            by = -by
        out[name] = min(high, max(low, values[name] + by))
    return out
