"""How much of what captions say is in the pictures drawn from them."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pentimento.pocket import captions, readout
from pentimento.pocket import scene as world
from pentimento.pocket.render import render

READ_AT = 64
"""Pixels along a side at which pictures are compared with renders."""
POSE = {
    "dx": np.linspace(-0.2, 0.2, 11), "dy": np.linspace(-0.12, 0.14, 9), "scale": np.linspace(0.8, 1.14, 9), "tilt": np.linspace(-0.16, 0.16, 7),
}  # fmt: skip
PARTS = ("present", "colour", "shape")
NAMED = ("glasses", "hat", "beard", "earring", "hair", "hat_colour", "shirt", "bg", "texture")


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    return torch.stack(
        [torch.from_numpy(np.asarray(p, dtype=np.float32)).permute(2, 0, 1) / 255 for p in pictures]
    )


def to_pictures(x: Tensor) -> list[Image.Image]:
    """Of (n, 3, H, W) in [0, 1] on the CPU."""
    return [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in x]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Per picture of (n, 3, H, W) in [0, 1], dB."""
    return -10 * torch.log10((a - b).pow(2).mean((1, 2, 3)).clamp(min=1e-7))


def explain(picture: Tensor, start: world.Scene) -> world.Scene:
    """The scene whose render is nearest to ``picture`` (3, H, W in [0, 1]), from the captioned one with any pose."""
    height, width = picture.shape[1:]
    if start["kind"] == "portrait":
        grids: dict[str, list[Any]] = {name: grid.tolist() for name, grid in POSE.items()}
        grids |= {n: readout.values(start, n) for n in (*readout.STEPS, *readout.PORTRAIT, "bg", "texture")}
    else:
        slots = captions.present(start)
        grids = {}
        for k in slots:
            grids |= {
                f"jx{k}": np.linspace(-0.2, 0.2, 9).tolist(),
                f"jy{k}": np.linspace(-0.2, 0.2, 9).tolist(),
            }
            grids |= {
                f"size{k}": np.linspace(0.15, 0.32, 7).tolist(),
                f"rotation{k}": np.linspace(-0.4, 0.4, 7).tolist(),
            }
            grids |= {
                f"{part}{k}": readout.values(start, f"{part}{k}")
                for part in ("present", "colour", "shape", "fill")
            }
        grids |= {n: readout.values(start, n) for n in ("bg", "texture", "shadow")}
    current, best = start, float("inf")
    for _ in range(3):
        before = current
        for name, grid in grids.items():
            if not readout.visible(current, name):
                continue
            errors = (
                (render([current | {name: v} for v in grid], width, height) - picture).pow(2).mean((1, 2, 3))
            )
            if float(errors.min()) < best * 0.9999:
                current, best = current | {name: grid[int(errors.argmin())]}, float(errors.min())
        if current == before:
            break
    return current


class Found(NamedTuple):
    """Per attribute that a caption names: is it in the picture?"""

    named: list[bool]
    """Objects may have changed places with each other."""
    placed: list[bool]
    """Objects must be where the caption says."""


def found(picture: Tensor, wanted: world.Scene) -> Found:
    """What of a caption is in a picture (3, H, W) in [0, 1]."""
    small = F.avg_pool2d(picture[None], picture.shape[1] // READ_AT)[0]
    neutral = dict.fromkeys(("dx", "dy", "tilt"), 0.0) | {"scale": 0.97}
    start = wanted | (neutral if wanted["kind"] == "portrait" else {})
    seen = explain(small, start)
    if wanted["kind"] == "portrait":
        names = [n for n in NAMED if readout.visible(wanted, n) and not (n == "hair" and wanted["age"] > 0.6)]
        words = [captions.expression(seen) == captions.expression(wanted)]
        words += [seen[n] == wanted[n] for n in names]
        return Found(words, words)
    slots, ground = captions.present(wanted), [seen["bg"] == wanted["bg"]]
    orders = [
        [
            seen[f"{part}{here}"] == wanted[f"{part}{k}"]
            for k, here in zip(slots, order, strict=True)
            for part in PARTS
        ]
        for order in itertools.permutations(slots)
    ]
    return Found(max(orders, key=sum) + ground, orders[0] + ground)


def drawn_scenes(kind: str, count: int) -> list[world.Scene]:
    """Test scenes that say what they show: no whole-picture style, and a clear expression and age."""
    out: list[world.Scene] = []
    for number in world.seeds("test"):
        scene = world.draw(number, kind) | {"style": 0}
        if kind == "portrait" and (0.2 < abs(scene["smile"]) < 0.5 or world.held_out(scene)):
            continue
        out.append(scene)
        if len(out) == count:
            return out
    return out


def captions_found(draw: Callable[[list[str]], list[Image.Image]], count: int) -> dict[str, float]:
    """Share of the named attributes that are in what ``draw`` makes of captions, for ``count`` portraits and shapes."""
    out = {}
    # Fresh processes: a fork of one whose torch has used its threads may hang.
    with ProcessPoolExecutor(
        mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for kind in ("portrait", "shapes"):
            scenes = drawn_scenes(kind, count)
            pictures = draw([captions.caption(s, 1 if kind == "shapes" else 0) for s in scenes])
            results = list(pool.map(_found, pictures, scenes))
            out[kind] = share([result.named for result in results])
        out["shapes at their places"] = share([result.placed for result in results])
    return out


def share(answers: Sequence[Sequence[bool]]) -> float:
    """Of all that is answered, what is true."""
    return sum(map(sum, answers)) / sum(map(len, answers))


def _found(picture: Image.Image, wanted: world.Scene) -> Found:
    return found(to_tensor([picture])[0], wanted)
