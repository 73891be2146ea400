"""Where an edit may change a picture, as pictures for people and masks for the next edit."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import images
from .method import Region

# ColorBrewer's diverging scheme RdBu, reversed: from blue, little, to red, much.
COLOURS = np.array(
    [
        (5, 48, 97), (33, 102, 172), (67, 147, 195), (146, 197, 222), (209, 229, 240), (247, 247, 247),
        (253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43), (103, 0, 31),
    ]
)  # fmt: skip
HEAT = 0.6
"""Share of the heat map where it lies over the picture; the rest is the picture."""
CELL = 512
BAR = 24


def paths(stem: Path) -> dict[str, Path]:
    """What ``save`` may write, by the field of a region that it shows."""
    kinds = {
        "attention": "attention_analysis", "mask": "mask-white-changes", "weights": "weights-white-keeps",
    }  # fmt: skip
    return {field: stem.with_name(f"{stem.name}-{kind}.png") for field, kind in kinds.items()}


def save(region: Region, source: Image.Image, stem: Path) -> Iterator[Path]:
    """Write ``STEM-mask-white-changes.png`` and ``STEM-weights-white-keeps.png`` of the picture's size and, where the region was
    found by attention, ``STEM-attention_analysis.png``; yields each path when it is written.
    """
    to = paths(stem)
    if region.attention is not None:
        yield images.save_image(analysis(region, source), to["attention"])
    for field, picture in (("mask", region.mask), ("weights", region.weights)):
        yield images.save_image(picture.resize(source.size, Image.Resampling.NEAREST), to[field])


def analysis(region: Region, source: Image.Image) -> Image.Image:
    """Attention with a colour bar, attention over the picture, and the picture where it may change."""
    assert region.attention is not None, "the region was given"
    values = region.attention.cpu().numpy()
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / ((high - low) or 1)
    heat = Image.fromarray(scaled.astype(np.float32)).resize(source.size, Image.Resampling.BILINEAR)
    overlay = Image.blend(source, _coloured(np.asarray(heat)), HEAT)
    kept = region.weights.resize(source.size, Image.Resampling.NEAREST)
    open_ = Image.composite(Image.new("RGB", source.size, "white"), source, kept)
    panels = {
        "attention to the word": _coloured(scaled).resize(source.size, Image.Resampling.NEAREST),
        "over the picture": overlay,
        "what may change (white is kept)": open_,
    }
    whole = images.sheet([list(panels.values())], titles=list(panels), cell=CELL)
    return images.stack([whole, _bar(low, high, whole.width)])


def _coloured(values: np.ndarray) -> Image.Image:
    """Numbers from 0 to 1 as colours."""
    at = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(values, at, COLOURS[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def _bar(low: float, high: float, width: int) -> Image.Image:
    """What the colours stand for, centred below a picture of a width."""
    font = ImageFont.load_default(BAR * 2 // 3)
    canvas = Image.new("RGB", (width, 2 * BAR), images.PAPER)
    left, right = width // 2 - CELL // 2, width // 2 + CELL // 2
    canvas.paste(_coloured(np.linspace(0, 1, CELL)[None]).resize((CELL, BAR)), (left, BAR // 2))
    draw = ImageDraw.Draw(canvas)
    draw.text((left - BAR // 2, BAR), f"{low:.2g}", images.INK, font, anchor="rm")
    draw.text((right + BAR // 2, BAR), f"{high:.2g}", images.INK, font, anchor="lm")
    return canvas
