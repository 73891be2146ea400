"""A curve as a picture, drawn with Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIZE = (720, 440)
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 44, 56
INK, FAINT, GRID = (20, 20, 24), (110, 112, 118), (226, 227, 230)
COLOURS = ((38, 84, 214), (217, 98, 38), (50, 130, 62))
TICKS = 6


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    values: Sequence[float]


def curve(
    title: str, x: Sequence[float], lines: Sequence[Line], *, across: str, marks: Sequence[tuple[str, float]]
) -> Image.Image:
    """Lines over ``x`` (ascending), named in their colours; ``marks`` are names and places on the x axis."""
    every = [value for line in lines for value in line.values]
    low, high = min([0.0, *every]), max([1.0, *every])
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)

    def place(at: float, value: float) -> tuple[float, float]:
        wide, tall = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
        return (
            LEFT + wide * (at - x[0]) / ((x[-1] - x[0]) or 1),
            SIZE[1] - BOTTOM - tall * (value - low) / (high - low),
        )

    for n in range(TICKS):
        value = low + (high - low) * n / (TICKS - 1)
        left, y = place(x[0], value)
        draw.line([(left, y), place(x[-1], value)], GRID)
        draw.text((left - 8, y), f"{value:.2f}", FAINT, font, anchor="rm")
    for at in x:
        below = place(at, low)
        draw.line([below, place(at, high)], GRID)
        draw.text((below[0], below[1] + 8), f"{at:g}", FAINT, font, anchor="mt")
    for name, at in marks:
        foot, head = place(at, low), place(at, high)
        draw.line([foot, head], INK, 2)
        draw.text((head[0], head[1] - 4), name, INK, font, anchor="mb")
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(at, value) for at, value in zip(x, line.values, strict=True)]
        draw.line(points, colour, 2)
        for px, py in points:
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), colour)
        draw.text((SIZE[0] - RIGHT, 8 + 15 * number), line.name, colour, font, anchor="rt")
    draw.text((8, 8), title, INK, font)
    draw.text((SIZE[0] / 2, SIZE[1] - 10), across, FAINT, font, anchor="mb")
    return image
