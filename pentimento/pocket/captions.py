"""Captions of scenes: one grammar, three phrasings for training and one that only tests use.

``caption(scene)`` is the plain one: ``a red circle on a white background``, ``a portrait of a young smiling person with
short brown hair and a blue shirt on a green background``.
"""

from collections.abc import Sequence

import numpy as np

from . import scene as world
from .scene import Scene

TRAIN_PHRASINGS = 3
TEST_PHRASING = 3
STYLE_PREFIX = ("", "an outline drawing of ", "pixel art of ", "a sepia photo of ", "a halftone print of ")


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def background(scene: Scene) -> str:
    texture = "" if scene["texture"] == 0 else world.TEXTURES[scene["texture"]] + " "
    return f"{texture}{world.COLOUR_NAMES[scene['bg']]} background"


def thing(scene: Scene, k: int) -> str:
    """Object ``k`` without its article: ``striped red circle``."""
    fill = "" if scene[f"fill{k}"] == 0 else world.FILLS[scene[f"fill{k}"]] + " "
    return f"{fill}{world.COLOUR_NAMES[scene[f'colour{k}']]} {world.SHAPES[scene[f'shape{k}']]}"


def place(scene: Scene, k: int) -> str:
    cell = world.CELLS[scene[f"cell{k}"]]
    return (
        f"in the {cell}"
        if cell == "center"
        else f"on the {cell}"
        if cell in ("left", "right")
        else f"at the {cell}"
    )


def present(scene: Scene) -> list[int]:
    return [k for k in range(world.SLOTS) if scene[f"present{k}"]]


def age(scene: Scene) -> str:
    return "young" if scene["age"] < 0.35 else "old" if scene["age"] > 0.65 else "middle-aged"


def expression(scene: Scene) -> str:
    return "smiling" if scene["smile"] > 0.3 else "frowning" if scene["smile"] < -0.3 else "calm"


def hair(scene: Scene) -> str:
    style = world.HAIR_STYLES[scene["hair_style"]]
    if style == "bald":
        return "a bald head"
    length = "short " if scene["hair_length"] < 0.35 else "long " if scene["hair_length"] > 0.65 else ""
    kind = "" if style == "straight" else style + " "
    return f"{'' if style == 'spiky' else length}{kind}{world.COLOUR_NAMES[scene['hair']]} hair"


def accessories(scene: Scene) -> list[str]:
    out = ["glasses"] if scene["glasses"] else []
    if scene["hat"]:
        out.append(a(f"{world.COLOUR_NAMES[scene['hat_colour']]} hat"))
    return out + (["a beard"] if scene["beard"] else []) + (["earrings"] if scene["earring"] else [])


def details(scene: Scene) -> list[str]:
    """What a caption may say but seldom does: face width, eyes, skin."""
    out = [f"{world.EYES[scene['eyes']]} eyes", f"{world.SKINS[scene['skin']]} skin"]
    if not 0.25 <= scene["eye_size"] <= 0.75:
        out.append("big eyes" if scene["eye_size"] > 0.5 else "small eyes")
    if not 0.25 <= scene["chubby"] <= 0.75:
        out.append("a chubby face" if scene["chubby"] > 0.5 else "a slim face")
    return out


def caption(scene: Scene, phrasing: int = 0, rng: np.random.Generator | None = None) -> str:
    """Describe a scene. With ``rng`` some parts are left out and some details added, as people's captions do."""
    text = {"shapes": _shapes, "portrait": _portrait, "disc": _disc}[scene["kind"]](scene, phrasing, rng)
    return STYLE_PREFIX[scene["style"]] + text


def _thin(parts: list[str], rng: np.random.Generator | None, keep: float) -> list[str]:
    return parts if rng is None else [p for p in parts if rng.random() < keep]


def _shapes(scene: Scene, phrasing: int, rng: np.random.Generator | None) -> str:
    where = phrasing in (1, TEST_PHRASING) or (rng is not None and rng.random() < 0.3)
    things = [a(thing(scene, k)) + (f" {place(scene, k)}" if where else "") for k in present(scene)]
    ground = background(scene)
    if not things:
        return f"an empty {ground}"
    if phrasing == 1:
        return f"{a(ground)} with {listing(things)}"
    if phrasing == 2:
        return ", ".join([thing(scene, k) for k in present(scene)] + [ground])
    if phrasing == TEST_PHRASING:
        return f"a picture of {listing(things)} in front of {a(ground)}"
    return f"{listing(things)} on {a(ground)}"


def _portrait(scene: Scene, phrasing: int, rng: np.random.Generator | None) -> str:
    wears = [hair(scene), *accessories(scene)]
    shirt = f"{world.COLOUR_NAMES[scene['shirt']]} shirt"
    who = " ".join([*_thin([age(scene)], rng, 0.8), *_thin([expression(scene)], rng, 0.8), "person"])
    if rng is not None:
        wears = _thin(wears, rng, 0.85) + _thin(details(scene), rng, 0.3)
    ground = f" on {a(background(scene))}" if rng is None or rng.random() < 0.85 else ""
    if phrasing == 1:
        with_ = f" with {listing(wears)}" if wears else ""
        return f"{a(who)} in {a(shirt)}{with_}{ground.replace(' on ', ' in front of ', 1)}"
    if phrasing == 2:
        return ", ".join(["portrait", who, *wears, shirt, *([background(scene)] if ground else [])])
    if phrasing == TEST_PHRASING:
        return f"{a(who)} wearing {listing([a(shirt), *wears])}, seen{ground}"
    return f"a portrait of {a(who)} with {listing([*wears, a(shirt)])}{ground}"


def _disc(scene: Scene, phrasing: int, rng: np.random.Generator | None) -> str:
    inside, outside = world.CSS_NAMES[scene["disc"]], world.CSS_NAMES[scene["ground"]]
    if scene["outline"]:
        return "a white circle outline on a black background"
    if phrasing == 1:
        return f"{a(inside)} circle on {a(outside)} background"
    if phrasing == 2:
        return f"{outside} background, {inside} circle"
    if phrasing == TEST_PHRASING:
        return f"a picture of {a(inside)} circle in front of {a(outside)} background"
    return f"{inside} circle with {outside} background"
