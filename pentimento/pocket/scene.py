"""Scenes of the drawn world: a scene is a flat dict of numbers, drawn from a seed, that belongs to one split.

Three kinds: ``shapes`` (objects on a 3 x 3 grid), ``portrait`` (a parametric head) and ``disc`` (the Fill-Circles
pictures of InFluxEdit: an outline or a filled disc in CSS colours).
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

WORLD_VERSION = "1"

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (217, 38, 38),
    "orange": (245, 140, 25),
    "yellow": (245, 222, 60),
    "green": (50, 160, 62),
    "teal": (30, 172, 172),
    "blue": (38, 84, 214),
    "purple": (136, 56, 186),
    "pink": (244, 150, 190),
    "brown": (126, 80, 44),
    "black": (24, 24, 28),
    "white": (242, 242, 238),
    "gray": (140, 142, 146),
}
COLOUR_NAMES = tuple(COLOURS)
SKINS = ("pale", "fair", "tan", "brown", "dark")
SKIN_RGB = ((252, 226, 206), (238, 196, 160), (206, 152, 112), (152, 102, 70), (98, 64, 44))
EYES = ("brown", "blue", "green", "black")
EYE_RGB = ((112, 66, 30), (40, 110, 220), (40, 150, 70), (20, 20, 24))
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
FILLS = ("solid", "striped", "dotted")
TEXTURES = ("plain", "gradient", "striped", "checkered", "dotted")
HAIR_STYLES = ("straight", "curly", "spiky", "bald")
STYLES = ("flat", "outline", "pixel", "sepia", "halftone")
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
KINDS = ("shapes", "portrait", "disc")
SLOTS = 6
"""Objects that a scene can hold; one to four are drawn, tasks may add more."""

# The named colours of CSS whose values differ from each other, split into words as the Fill-Circles prompts do.
CSS: dict[str, tuple[int, int, int]] = {
    "alice blue": (240, 248, 255), "antique white": (250, 235, 215), "aqua": (0, 255, 255), "aqua marine": (127, 255, 212),
    "azure": (240, 255, 255), "beige": (245, 245, 220), "bisque": (255, 228, 196), "black": (0, 0, 0),
    "blanched almond": (255, 235, 205), "blue": (0, 0, 255), "blue violet": (138, 43, 226), "brown": (165, 42, 42),
    "burly wood": (222, 184, 135), "cadet blue": (95, 158, 160), "chart reuse": (127, 255, 0), "chocolate": (210, 105, 30),
    "coral": (255, 127, 80), "corn flower blue": (100, 149, 237), "corn silk": (255, 248, 220), "crimson": (220, 20, 60),
    "dark blue": (0, 0, 139), "dark cyan": (0, 139, 139), "dark golden rod": (184, 134, 11), "dark gray": (169, 169, 169),
    "dark green": (0, 100, 0), "dark khaki": (189, 183, 107), "dark magenta": (139, 0, 139),
    "dark olive green": (85, 107, 47), "dark orange": (255, 140, 0), "dark orchid": (153, 50, 204), "dark red": (139, 0, 0),
    "dark salmon": (233, 150, 122), "dark sea green": (143, 188, 143), "dark slate blue": (72, 61, 139),
    "dark slate gray": (47, 79, 79), "dark turquoise": (0, 206, 209), "dark violet": (148, 0, 211),
    "deep pink": (255, 20, 147), "deep sky blue": (0, 191, 255), "dim gray": (105, 105, 105),
    "dodger blue": (30, 144, 255), "fire brick": (178, 34, 34), "floral white": (255, 250, 240),
    "forest green": (34, 139, 34), "gainsboro": (220, 220, 220), "ghost white": (248, 248, 255), "gold": (255, 215, 0),
    "golden rod": (218, 165, 32), "gray": (128, 128, 128), "green": (0, 128, 0), "green yellow": (173, 255, 47),
    "honey dew": (240, 255, 240), "hot pink": (255, 105, 180), "indian red": (205, 92, 92), "indigo": (75, 0, 130),
    "ivory": (255, 255, 240), "khaki": (240, 230, 140), "lavender": (230, 230, 250), "lavender blush": (255, 240, 245),
    "lawn green": (124, 252, 0), "lemon chiffon": (255, 250, 205), "light blue": (173, 216, 230),
    "light coral": (240, 128, 128), "light cyan": (224, 255, 255), "light golden rod yellow": (250, 250, 210),
    "light gray": (211, 211, 211), "light green": (144, 238, 144), "light pink": (255, 182, 193),
    "light salmon": (255, 160, 122), "light sea green": (32, 178, 170), "light sky blue": (135, 206, 250),
    "light slate gray": (119, 136, 153), "light steel blue": (176, 196, 222), "light yellow": (255, 255, 224),
    "lime": (0, 255, 0), "lime green": (50, 205, 50), "linen": (250, 240, 230), "magenta": (255, 0, 255),
    "maroon": (128, 0, 0), "medium aqua marine": (102, 205, 170), "medium blue": (0, 0, 205),
    "medium orchid": (186, 85, 211), "medium purple": (147, 112, 219), "medium sea green": (60, 179, 113),
    "medium slate blue": (123, 104, 238), "medium spring green": (0, 250, 154), "medium turquoise": (72, 209, 204),
    "medium violet red": (199, 21, 133), "midnight blue": (25, 25, 112), "mint cream": (245, 255, 250),
    "misty rose": (255, 228, 225), "moccasin": (255, 228, 181), "navajo white": (255, 222, 173), "navy": (0, 0, 128),
    "old lace": (253, 245, 230), "olive": (128, 128, 0), "olive drab": (107, 142, 35), "orange": (255, 165, 0),
    "orange red": (255, 69, 0), "orchid": (218, 112, 214), "pale golden rod": (238, 232, 170), "pale green": (152, 251, 152),
    "pale turquoise": (175, 238, 238), "pale violet red": (219, 112, 147), "papaya whip": (255, 239, 213),
    "peach puff": (255, 218, 185), "peru": (205, 133, 63), "pink": (255, 192, 203), "plum": (221, 160, 221),
    "powder blue": (176, 224, 230), "purple": (128, 0, 128), "rebecca purple": (102, 51, 153), "red": (255, 0, 0),
    "rosy brown": (188, 143, 143), "royal blue": (65, 105, 225), "saddle brown": (139, 69, 19), "salmon": (250, 128, 114),
    "sandy brown": (244, 164, 96), "sea green": (46, 139, 87), "sea shell": (255, 245, 238), "sienna": (160, 82, 45),
    "silver": (192, 192, 192), "sky blue": (135, 206, 235), "slate blue": (106, 90, 205), "slate gray": (112, 128, 144),
    "snow": (255, 250, 250), "spring green": (0, 255, 127), "steel blue": (70, 130, 180), "tan": (210, 180, 140),
    "teal": (0, 128, 128), "thistle": (216, 191, 216), "tomato": (255, 99, 71), "turquoise": (64, 224, 208),
    "violet": (238, 130, 238), "wheat": (245, 222, 179), "white": (255, 255, 255), "white smoke": (245, 245, 245),
    "yellow": (255, 255, 0), "yellow green": (154, 205, 50),
}  # fmt: skip
CSS_NAMES = tuple(CSS)

Scene = dict[str, Any]
"""Flat and JSON-able. Discrete attributes are indices into the tables above, continuous ones are floats."""

PORTRAIT_CHOICES = {
    "bg": len(COLOURS), "texture": len(TEXTURES), "skin": len(SKINS), "hair": len(COLOURS), "hair_style": len(HAIR_STYLES),
    "glasses": 2, "hat": 2, "hat_colour": len(COLOURS), "beard": 2, "earring": 2, "shirt": len(COLOURS), "eyes": len(EYES),
}  # fmt: skip
PORTRAIT_RANGES = {
    "smile": (-1.0, 1.0), "age": (0.0, 1.0), "eye_size": (0.0, 1.0), "chubby": (0.0, 1.0), "hair_length": (0.0, 1.0),
    "dx": (-0.14, 0.14), "dy": (-0.06, 0.08), "scale": (0.88, 1.06), "tilt": (-0.12, 0.12),
}  # fmt: skip

OBJECT_RANGES = {"size": (0.19, 0.28), "jx": (-0.04, 0.04), "jy": (-0.04, 0.04), "rotation": (-0.3, 0.3)}


def split_of(seed: int) -> str:
    """``train`` (80 %), ``dev`` (5 %), ``test`` (7 %) or ``hidden`` (8 %): a function of world version and seed."""
    bucket = int(hashlib.sha256(f"{WORLD_VERSION}:{seed}".encode()).hexdigest(), 16) % 100
    return "train" if bucket < 80 else "dev" if bucket < 85 else "test" if bucket < 92 else "hidden"


def seeds(split: str, start: int = 0) -> Iterator[int]:
    """The scene seeds of a split, in order."""
    seed = start
    while True:
        if split_of(seed) == split:
            yield seed
        seed += 1


def held_out(scene: Scene) -> bool:
    """True for combinations that never occur in training: green stars, striped rings, red hair on brown skin, purple dots."""
    if scene["kind"] == "shapes":
        for k in range(SLOTS):
            if not scene[f"present{k}"]:
                continue
            if scene[f"shape{k}"] == SHAPES.index("star") and scene[f"colour{k}"] == COLOUR_NAMES.index(
                "green"
            ):
                return True
            if scene[f"shape{k}"] == SHAPES.index("ring") and scene[f"fill{k}"] == FILLS.index("striped"):
                return True
    if scene["kind"] == "portrait" and (scene["skin"], scene["hair"]) == (
        SKINS.index("brown"),
        COLOUR_NAMES.index("red"),
    ):
        return scene["hair_style"] != HAIR_STYLES.index("bald")
    if scene["kind"] == "disc":
        return False
    return (scene["bg"], scene["texture"]) == (COLOUR_NAMES.index("purple"), TEXTURES.index("dotted"))


def draw(seed: int, kind: str | None = None) -> Scene:
    """The scene of a seed. In the train split held-out combinations are drawn again."""
    rng = np.random.default_rng([int(WORLD_VERSION), seed])
    train = split_of(seed) == "train"
    while True:
        which = kind or rng.choice(KINDS, p=(0.35, 0.55, 0.10))
        scene = {"shapes": _draw_shapes, "portrait": _draw_portrait, "disc": _draw_disc}[str(which)](rng)
        if not (train and held_out(scene)):
            return scene


def _style(rng: np.random.Generator) -> int:
    return int(rng.choice(len(STYLES), p=(0.84, 0.04, 0.04, 0.04, 0.04)))


def _draw_shapes(rng: np.random.Generator) -> Scene:
    bg = int(rng.integers(len(COLOURS)))
    scene: Scene = {
        "kind": "shapes", "bg": bg, "texture": int(rng.choice(5, p=(0.6, 0.1, 0.1, 0.1, 0.1))), "style": _style(rng),
        "shadow": int(rng.random() < 0.2),
    }  # fmt: skip
    cells, count = rng.permutation(9), int(rng.integers(1, 5))
    others = [c for c in range(len(COLOURS)) if c != bg]  # an object never has the background's colour
    for k in range(SLOTS):
        scene |= {
            f"present{k}": int(k < count), f"shape{k}": int(rng.integers(len(SHAPES))), f"colour{k}": int(rng.choice(others)), f"cell{k}": int(cells[k]),
            f"fill{k}": int(rng.choice(3, p=(0.7, 0.15, 0.15))),
        }  # fmt: skip
        scene |= {f"{name}{k}": float(rng.uniform(*bounds)) for name, bounds in OBJECT_RANGES.items()}
    return scene


def _draw_portrait(rng: np.random.Generator) -> Scene:
    scene: Scene = {"kind": "portrait", "style": _style(rng)}
    scene |= {name: int(rng.integers(n)) for name, n in PORTRAIT_CHOICES.items()}
    scene |= {name: float(rng.uniform(*bounds)) for name, bounds in PORTRAIT_RANGES.items()}
    scene["texture"] = int(rng.choice(5, p=(0.6, 0.1, 0.1, 0.1, 0.1)))
    scene["hair_style"] = int(rng.choice(4, p=(0.5, 0.2, 0.15, 0.15)))
    for name, p in {"glasses": 0.35, "hat": 0.3, "beard": 0.25, "earring": 0.25}.items():
        scene[name] = int(rng.random() < p)
    # Hair, hat and shirt must be told apart from the background, the hat from the hair: redraw what coincides.
    for name, others in {"hair": ("bg",), "shirt": ("bg",), "hat_colour": ("bg", "hair")}.items():
        taken = {scene[o] for o in others}
        scene[name] = int(rng.choice([c for c in range(len(COLOURS)) if c not in taken]))
    return scene


def _draw_disc(rng: np.random.Generator) -> Scene:
    table = np.array(list(CSS.values()))
    while True:  # a disc that one can see: at least 60 of 442 apart in RGB
        inside, outside = rng.choice(len(CSS), 2, replace=False)
        if np.linalg.norm(table[inside] - table[outside]) >= 60:
            break
    return {
        "kind": "disc", "style": 0, "outline": 0, "disc": int(inside), "ground": int(outside),
        "cx": float(rng.uniform(96, 416) / 512), "cy": float(rng.uniform(96, 416) / 512), "radius": float(rng.uniform(64, 256) / 512),
    }  # fmt: skip
