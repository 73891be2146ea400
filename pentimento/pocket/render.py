"""The renderer of the drawn world: signed distances in plain torch, batched, deterministic on a CPU, fast on a GPU.

Shapes: ``n`` scenes, ``H`` x ``W`` pixels. Every attribute is a column ``(n, 1, 1)`` that broadcasts over the pixels.
The shorter side spans [-1, 1], the longer one shows more background. No fonts, no drawing library.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import scene as world
from .scene import Scene

INK = (26, 24, 30)
LIP = (176, 52, 60)
GREY_HAIR = (206, 206, 210)
FAR = 9.0  # a distance that paints nothing
FILL_SHADE = 0.45


def stack(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Scenes as columns ``(n, 1, 1)``; attributes that a kind lacks are 0."""
    names = sorted({name for s in scenes for name in s} - {"kind"})
    columns = {name: [float(s.get(name, 0)) for s in scenes] for name in names}
    columns["kind"] = [float(world.KINDS.index(s["kind"])) for s in scenes]
    return {name: torch.tensor(values, device=device).view(-1, 1, 1) for name, values in columns.items()}


def render(
    scenes: Sequence[Scene], width: int = 128, height: int = 128, device: torch.device | str = "cpu"
) -> Tensor:
    """Pictures ``(n, 3, height, width)`` in [0, 1], float32, on the device, quantised to 8 bits as a PNG would be."""
    most = 32 if torch.device(device).type == "cpu" else 512
    parts = [scenes[i : i + most] for i in range(0, len(scenes), most)]
    pictures = torch.cat([render_columns(stack(part, device), width, height) for part in parts])
    return (pictures * 255).round() / 255


@torch.no_grad()
def render_columns(p: dict[str, Tensor], width: int = 128, height: int = 128) -> Tensor:
    """Pictures ``(n, 3, height, width)`` in [0, 1] of the columns that ``stack`` makes, on their device."""
    kind, outlined = p["kind"].flatten(), p["style"].flatten() == 1
    out = torch.empty(len(kind), 3, height, width, device=kind.device)
    for index, paint in enumerate((_shapes, _portrait, _disc)):
        for edges in (False, True):  # only the outline style needs them
            rows = ((kind == index) & (outlined == edges)).nonzero().flatten()
            if len(rows):
                canvas = Canvas({name: column[rows] for name, column in p.items()}, width, height, edges)
                paint(canvas)
                out[rows] = _styled(canvas)
    return out


class Canvas:
    """Pixels, coordinates and attributes of ``n`` scenes of one kind."""

    def __init__(self, columns: dict[str, Tensor], width: int, height: int, edges: bool):
        self.columns = columns
        device = columns["kind"].device
        self.n, self.size = len(columns["kind"]), (height, width)
        self.pixel = 2 / min(width, height)
        ys = (torch.arange(height, device=device) + 0.5 - height / 2) * self.pixel
        xs = (torch.arange(width, device=device) + 0.5 - width / 2) * self.pixel
        self.y, self.x = ys.view(1, -1, 1), xs.view(1, 1, -1)
        self.image = torch.zeros(self.n, 3, height, width, device=device)
        self.edges = torch.zeros(self.n, height, width, device=device) if edges else None
        """How much of each pixel lies on the border of something, (n, H, W)."""

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def is_(self, name: str, value: int = 1) -> Tensor:
        return self.columns[name] == value

    def palette(self, table: Sequence[tuple[int, int, int]], index: Tensor) -> Tensor:
        """Colours ``(n, 3, 1, 1)`` in [0, 1]."""
        rgb = torch.tensor(table, device=index.device, dtype=torch.float32) / 255
        return rgb[index.flatten().long()][:, :, None, None]

    def colour(self, name: str) -> Tensor:
        return self.palette(tuple(world.COLOURS.values()), self.columns[name])

    def paint(self, distance: Tensor, colour: Tensor | tuple[int, int, int]) -> None:
        """Cover where ``distance`` (n, H, W) is negative, antialiased over one and a half pixels."""
        if isinstance(colour, tuple):
            colour = self.image.new_tensor(colour).view(1, 3, 1, 1) / 255
        alpha = (0.5 - distance / (1.5 * self.pixel)).clamp(0, 1)
        if self.edges is not None:
            self.edges = torch.maximum(
                self.edges * (1 - alpha), 1 - (distance.abs() / (1.2 * self.pixel)).clamp(0, 1)
            )
        self.image = torch.lerp(
            self.image, colour.expand_as(self.image), alpha[:, None].expand_as(self.image)
        )


def _where(condition: Tensor, distance: Tensor) -> Tensor:
    return torch.where(condition, distance, FAR)


def _ellipse(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Distance to an ellipse, exact to first order (value over gradient length)."""
    k = torch.sqrt((x / a) ** 2 + (y / b) ** 2 + 1e-9)
    gradient = torch.sqrt((x / (a * a)) ** 2 + (y / (b * b)) ** 2 + 1e-9)
    return k * (k - 1) / gradient


def _box(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float, radius: Tensor | float = 0.0) -> Tensor:
    qx, qy = x.abs() - a + radius, y.abs() - b + radius
    return (
        torch.sqrt(qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2 + 1e-9)
        + torch.maximum(qx, qy).clamp(max=0)
        - radius
    )


def _stripes(u: Tensor, period: float) -> Tensor:
    """Distance to stripes that cover half of each period."""
    return (torch.remainder(u, period) - period / 2).abs() - period / 4


def _dots(x: Tensor, y: Tensor, period: float, radius: float) -> Tensor:
    dx, dy = torch.remainder(x, period) - period / 2, torch.remainder(y, period) - period / 2
    return torch.sqrt(dx * dx + dy * dy + 1e-9) - radius


def shade(colour: Tensor, amount: float = 0.3) -> Tensor:
    """A lighter tone of dark colours and a darker one of light colours: textures and wrinkles."""
    dark = colour.mean(1, keepdim=True) < 0.45
    return torch.where(dark, colour + (1 - colour) * amount, colour * (1 - amount))


def _background(c: Canvas) -> None:
    bg = c.colour("bg")
    c.image = bg.expand_as(c.image)
    second = shade(bg)
    ramp = (c.y * 0.5 + 0.5).clamp(0, 1) * torch.ones_like(c.x)
    gradient = bg + (shade(bg, 0.45) - bg) * ramp[:, None]
    c.image = torch.where(c.is_("texture", 1)[:, None], gradient, c.image)
    ones = torch.ones(c.n, *c.size, device=bg.device)
    c.paint(_where(c.is_("texture", 2), _stripes((c.x + c.y) * ones, 0.36) * 0.7071), second)
    check = -(_stripes(c.x * ones, 0.66).clamp(-0.1, 0.1) * _stripes(c.y * ones, 0.66).clamp(-0.1, 0.1)) * 10
    c.paint(_where(c.is_("texture", 3), check), second)
    c.paint(_where(c.is_("texture", 4), _dots(c.x * ones, c.y * ones, 0.36, 0.1)), second)
    if c.edges is not None:
        c.edges = torch.zeros_like(c.edges)  # a line drawing leaves the background out


def _shape_distance(c: Canvas, k: int, x: Tensor, y: Tensor) -> Tensor:
    """Distance to object ``k`` in units of its size."""
    r = torch.sqrt(x * x + y * y + 1e-9)
    circle = r - 0.9
    square = _box(x, y, 0.8, 0.8)
    triangle = torch.maximum(x.abs() * 0.866 - y * 0.5 - 0.45, y - 0.6)
    # The star folds onto one edge, from a tip at radius 0.95 to a notch at radius 0.45.
    angle = torch.remainder(torch.atan2(x, -y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
    star = (r * torch.cos(angle) - 0.95) * 0.4114 + r * angle.sin().abs() * 0.9114
    ring = (r - 0.68).abs() - 0.24
    cross = torch.minimum(_box(x, y, 0.85, 0.28), _box(x, y, 0.28, 0.85))
    shape = c[f"shape{k}"]
    out = cross
    for index, distance in enumerate((circle, square, triangle, star, ring)):
        out = torch.where(shape == index, distance, out)
    return out


def _shapes(c: Canvas) -> None:
    _background(c)
    for k in range(world.SLOTS):
        there = c.is_(f"present{k}")
        if not there.any():
            continue
        cell, size = c[f"cell{k}"], c[f"size{k}"]
        ox = (torch.remainder(cell, 3) - 1) * 0.64 + c[f"jx{k}"]
        oy = (torch.div(cell, 3, rounding_mode="floor") - 1) * 0.64 + c[f"jy{k}"]
        cos, sin = torch.cos(c[f"rotation{k}"]), torch.sin(c[f"rotation{k}"])
        u, v = (c.x - ox) / size, (c.y - oy) / size
        x, y = u * cos + v * sin, v * cos - u * sin
        # What none of the scenes has is not computed: most scenes have few objects and no shadows.
        if (under := there & c.is_("shadow")).any():
            s = 0.12
            shadow = _shape_distance(c, k, x - s * cos - s * sin, y - s * cos + s * sin) * size
            c.paint(_where(under, shadow), c.image * 0.6)
        distance = _shape_distance(c, k, x, y) * size
        colour = c.colour(f"colour{k}")
        c.paint(_where(there, distance), colour)
        second = shade(colour, FILL_SHADE)
        if (striped := there & c.is_(f"fill{k}", 1)).any():
            stripes = torch.maximum(_stripes(x + 0.125, 0.5) * size, distance)
            c.paint(_where(striped, stripes), second)
        if (dotted := there & c.is_(f"fill{k}", 2)).any():
            dots = torch.maximum(_dots(x, y, 0.5, 0.15) * size, distance)
            c.paint(_where(dotted, dots), second)


def _portrait(c: Canvas) -> None:
    _background(c)
    # The whole figure moves and scales; only the head tilts, about the neck.
    x, y = (c.x - c["dx"]) / c["scale"], (c.y - c["dy"]) / c["scale"]
    cos, sin = torch.cos(c["tilt"]), torch.sin(c["tilt"])
    hx, hy = x * cos + (y - 0.5) * sin, (y - 0.5) * cos - x * sin + 0.5
    skin = c.palette(world.SKIN_RGB, c["skin"])
    grey = c.image.new_tensor(GREY_HAIR).view(1, 3, 1, 1) / 255
    greying = ((c["age"] - 0.5) * 1.6).clamp(0, 0.8)[:, None]
    hair = c.colour("hair") * (1 - greying) + grey * greying
    width, height = 0.36 + 0.13 * c["chubby"], 0.47
    _hair_behind(c, hx, hy, width, height, hair)
    c.paint(_box(x, y - 2.0, 0.74, 1.3, 0.28), c.colour("shirt"))
    c.paint(_box(x, y - 0.58, 0.15, 0.24, 0.08), skin * 0.9)
    c.paint(_ellipse(hx, hy + 0.02, width, height), skin)
    _hair_front(c, hx, hy, width, height, hair)
    _face(c, hx, hy, width, skin, hair)
    earrings = (
        torch.minimum(_circle(hx - width - 0.01, hy - 0.12), _circle(hx + width + 0.01, hy - 0.12)) - 0.055
    )
    c.paint(_where(c.is_("earring"), earrings), (250, 205, 40))
    c.paint(_where(c.is_("earring"), earrings + 0.032), (205, 140, 10))
    hat = torch.minimum(
        _box(hx, hy + 0.56, width * 0.86, 0.17, 0.05), _box(hx, hy + 0.40, width + 0.15, 0.045, 0.04)
    )
    c.paint(_where(c.is_("hat"), hat), c.colour("hat_colour"))
    band = _box(hx, hy + 0.465, width * 0.86, 0.028)
    c.paint(_where(c.is_("hat"), band), shade(c.colour("hat_colour"), 0.4))


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-9)


def _hair_behind(c: Canvas, x: Tensor, y: Tensor, width: Tensor, height: float, hair: Tensor) -> None:
    has = ~c.is_("hair_style", 3)
    spiky, curly = c.is_("hair_style", 2), c.is_("hair_style", 1)
    angle = torch.atan2(x, -(y + 0.05))
    wave = torch.where(
        curly,
        0.028 * torch.cos(angle * 15),
        torch.where(spiky, 0.05 * (torch.remainder(angle * 2.55, 1) - 0.5).abs(), 0),
    )
    cap = _ellipse(x, y + 0.07, width + 0.09, height + 0.06) - wave
    # Spiky hair stands up whatever its length; the others fall to between the ear and below the shoulder.
    fall = torch.where(spiky, torch.zeros_like(c["hair_length"]), c["hair_length"])
    bottom = 0.02 + 0.72 * fall
    curtain = _box(x, y - (bottom - 0.1) / 2, width + 0.09, (bottom + 0.1) / 2 + 0.02, 0.1) - 0.6 * wave
    c.paint(_where(has, torch.minimum(cap, curtain)), hair)


def _hair_front(c: Canvas, x: Tensor, y: Tensor, width: Tensor, height: float, hair: Tensor) -> None:
    """The hairline: the part of the cap above the brow."""
    has = ~c.is_("hair_style", 3)
    line = (
        y
        + 0.30
        - 0.10 * (x / width) ** 2
        + torch.where(c.is_("hair_style", 0), 0.10 * x, torch.zeros_like(x))
    )
    front = torch.maximum(_ellipse(x, y + 0.07, width + 0.05, height + 0.04), line)
    c.paint(_where(has, front), hair)


def _face(c: Canvas, x: Tensor, y: Tensor, width: Tensor, skin: Tensor, hair: Tensor) -> None:
    beard = torch.maximum(_ellipse(x, y + 0.02, width + 0.005, 0.475), 0.17 - y)
    mouth_hole = _ellipse(x, y - 0.27, 0.17, 0.085)
    c.paint(_where(c.is_("beard"), torch.maximum(beard, -mouth_hole)), hair * 0.85)
    wrinkle = skin * 0.72
    depth = c["age"] * 0.022
    for height, half in ((-0.245, 0.15), (-0.185, 0.18)):
        line = torch.maximum((y - height).abs() - depth, x.abs() - half)
        c.paint(_where(c["age"] > 0.05, line), wrinkle)
    for side in (-1, 1):
        fold = torch.maximum(
            (x * side - 0.2 - 0.25 * (y - 0.2)).abs() - depth * 0.9, (y - 0.17).abs() - 0.085
        )
        c.paint(_where((c["age"] > 0.05) & ~c.is_("beard"), fold), wrinkle)
    size = 0.052 + 0.05 * c["eye_size"]
    iris = c.palette(world.EYE_RGB, c["eyes"])
    for side in (-1, 1):
        ex, ey = x - 0.17 * side, y + 0.05
        c.paint(_ellipse(ex, ey, size * 1.35, size), (250, 250, 250))
        c.paint(_circle(ex, ey) - size * 0.68, iris)
        c.paint(_circle(ex, ey) - size * 0.3, (10, 10, 12))
        brow = _box(ex, ey + 0.03 + size + 0.025, 0.095, 0.02, 0.015)
        c.paint(brow, skin * 0.45)
        c.paint(_where(c.is_("glasses"), (_circle(ex, ey) - 0.138).abs() - 0.026), INK)
    bridge = torch.maximum((y + 0.06).abs() - 0.022, x.abs() - 0.04)
    arms = torch.maximum(
        (y + 0.06).abs() - 0.018, ((x.abs() - (0.30 + width) / 2).abs() - (width - 0.30).clamp(min=0.02) / 2)
    )
    c.paint(_where(c.is_("glasses"), torch.minimum(bridge, arms)), INK)
    c.paint(_ellipse(x, y - 0.1, 0.042, 0.062), skin * 0.82)
    # The mouth is a parabola: smile bends its corners up, a frown down.
    curve = y - 0.275 + c["smile"] * 4.2 * (x * x - 0.0115)
    slope = torch.sqrt(1 + (8.4 * c["smile"] * x) ** 2)
    c.paint(torch.maximum(curve.abs() / slope - 0.026, x.abs() - 0.155), LIP)


def _disc(c: Canvas) -> None:
    """InFluxEdit's example data: a white outline on black, or a disc on a plain ground, in CSS colours."""
    table = tuple(world.CSS.values())
    c.image = c.palette(table, c["ground"]).expand_as(c.image)
    c.image = torch.where(c.is_("outline")[:, None], torch.zeros_like(c.image), c.image)
    distance = _circle(c.x - (2 * c["cx"] - 1), c.y - (2 * c["cy"] - 1)) - 2 * c["radius"]
    c.paint(_where(~c.is_("outline"), distance), c.palette(table, c["disc"]))
    c.paint(_where(c.is_("outline"), distance.abs() - 0.022), (255, 255, 255))


def _styled(c: Canvas) -> Tensor:
    """The whole-picture styles, from the painted image."""
    image, (height, width) = c.image, c.size
    if c.edges is not None:
        return (1 - 0.92 * c.edges[:, None]).expand_as(image)
    style = c["style"].flatten()
    luma = (image * image.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if (rows := style == 2).any():
        cells = torch.nn.functional.adaptive_avg_pool2d(
            image[rows], (max(1, height // 8), max(1, width // 8))
        )
        image[rows] = torch.nn.functional.interpolate(cells, size=(height, width), mode="nearest")
    if (rows := style == 3).any():
        image[rows] = luma[rows] * image.new_tensor((1.08, 0.90, 0.66)).view(1, 3, 1, 1)
    if (rows := style == 4).any():
        screen = _dots(c.x + 0 * c.y, c.y + 0 * c.x, 0.1875, 0.0)[:, None]
        ink = 0.128 * (1 - luma[rows]).clamp(0.03, 1)
        image[rows] = (0.5 + (screen - ink) / (1.5 * c.pixel)).clamp(0, 1).expand(-1, 3, -1, -1)
    return image.clamp(0, 1)
