"""Pictures: reading them on purpose, geometry of canvases, tensors, and contact sheets.

Outside of the backbones a picture is a PIL image: RGB, or L for a mask, upright, 8 bits. Whatever a file
holds is brought to that form here and nowhere else; only pictures of parquet shards keep their stored mode
until a method takes them, because it matters in which order they are scaled and converted. Colour profiles
are ignored, as diffusers and the reference implementations ignore them.
"""

import hashlib
import math
import os
import stat
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from . import files
from .errors import UserError

MAX_PIXELS = 100_000_000
READABLE = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
"""Extensions that a data folder takes for pictures."""
WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

PAPER, INK, FAINT, FRAME = (255, 255, 255), (33, 37, 41), (90, 96, 104), (206, 210, 215)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Opener = Callable[[], BinaryIO]

# What Pillow's decoders raise for damaged files; a fuzzed header reaches all of them.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)
WHITE = 127
"""From this level on a mask's pixel is white."""


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture as 8-bit RGB, upright.

    EXIF orientation is applied; transparency is composited on white; grey, palette and CMYK become RGB;
    16 bits are scaled to 8. Raises ``UserError`` naming the file: missing, empty, damaged, not a picture,
    animated, over 100 megapixels.
    """
    return to_rgb(_decode(Path(path)))


def take_image(image: Image.Image, name: str = "the picture") -> Image.Image:
    """A picture that Python has opened, in the form that ``open_image`` gives its file; ``UserError`` as there."""
    with _explained(name):
        return to_rgb(_upright(image, name))


def take_mask(image: Image.Image, name: str = "the mask") -> Image.Image:
    """The same for a mask, white where the picture may change, as ``open_mask`` gives its file."""
    with _explained(name):
        return _mask(_upright(image, name), name)


def decode(data: bytes, name: str) -> Image.Image:
    """A picture that lies in memory, such as a cell of a parquet shard: upright, 8 bits, in its stored mode.

    ``name`` stands for it in messages. Raises ``UserError`` as ``open_image`` does.
    """
    return _decoded(lambda: BytesIO(data), name)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any 8-bit mode as RGB, transparency composited on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_mask(path: str | os.PathLike[str], *, white: Literal["change", "keep"] = "change") -> Image.Image:
    """Read a mask as L, upright, white (255) where the picture may change.

    ``white="keep"`` reads files of the opposite polarity. Raises ``UserError`` as ``open_image`` does, and
    for masks that would mean something else than intended: transparent pixels, and the values 0 and 1
    instead of 0 and 255, which are black to every reader.
    """
    mask = _mask(_decode(Path(path)), path)
    return ImageOps.invert(mask) if white == "keep" else mask


def _mask(image: Image.Image, name: object) -> Image.Image:
    """A picture of any 8-bit mode as L, unless that would mean something else than intended."""
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise UserError(
            f"{name}: a mask with transparent pixels can be read in two ways; save it without transparency, "
            "white where the picture may change and black elsewhere"
        )
    mask = image.convert("L")
    if mask.getextrema() == (0, 1):
        raise UserError(f"{name}: the mask holds the values 0 and 1, both black; save it with 0 and 255")
    return mask


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """``(width, height)`` that ``open_image`` will return, from the header alone; ``UserError`` as there."""
    path = Path(path)
    _check_file(path)
    return _size(lambda: path.open("rb"), path)


def decode_size(data: bytes, name: str) -> tuple[int, int]:
    """``(width, height)`` that ``decode`` will return, from the header alone; ``UserError`` as there."""
    return _size(lambda: BytesIO(data), name)


def _size(opener: Opener, name: object) -> tuple[int, int]:
    with _header(opener, name) as image:
        width, height = image.size
        # Pillow turns a TIFF itself, its size included.
        turned = image.format != "TIFF" and _orientation(image, opener) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def _decode(path: Path) -> Image.Image:
    _check_file(path)
    return _decoded(lambda: path.open("rb"), path)


def _decoded(opener: Opener, name: object) -> Image.Image:
    """The decoded picture in its own mode, upright, with 8 bits."""
    with _header(opener, name) as image:
        return _upright(image, name)


def _upright(image: Image.Image, name: object) -> Image.Image:
    frames = getattr(image, "n_frames", 1)  # only some of Pillow's classes have it
    # An MPO is a phone's JPEG; its further frames are previews or depth, the first is the picture.
    if frames > 1 and image.format != "MPO":
        raise UserError(f"{name}: holds {frames} frames or pages; save the wanted one as a PNG")
    image.load()
    return _eight_bits(ImageOps.exif_transpose(image), name)


@contextmanager
def _header(opener: Opener, name: object) -> Iterator[Image.Image]:
    """The picture with its header checked, not decoded; what Pillow raises inside becomes ``UserError``."""
    with _explained(name), opener() as file:
        try:
            with catch_warnings():
                simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is the stricter one
                image = Image.open(file)
        except UnidentifiedImageError as error:
            raise UserError(f"{name}: {_what_it_is(opener)}") from error
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{name}: {_by(image.size)} is over 100 megapixels; scale the picture down")
        yield image


@contextmanager
def _explained(name: object) -> Iterator[None]:
    """What Pillow raises inside becomes ``UserError``."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: the picture is over 100 megapixels; scale it down") from error
    except PermissionError as error:
        raise UserError(f"{name}: the picture cannot be read ({error.strerror})") from error
    except BROKEN as error:
        raise UserError(f"{name}: the picture is damaged or cut off ({error}); export it again") from error


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: there is no such picture") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{path}: the picture cannot be read ({error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: is a folder; a picture file was expected")
    if not status.st_size:
        raise UserError(f"{path}: the file is empty (0 bytes); export it again")


def _what_it_is(opener: Opener) -> str:
    with opener() as file:
        start = file.read(64)
    return files.pointer(start, "the picture itself") or (
        "is not a picture, whatever its name says; PNG, JPEG, WebP, BMP and TIFF can be read"
    )


def _orientation(image: Image.Image, opener: Opener) -> int:
    """The EXIF orientation, 1..8, without decoding the pixels."""
    # Pillow decodes a whole PNG to look for EXIF behind the pixels: only worth it where there is some.
    if image.format == "PNG" and "exif" not in image.info and not _png_has_late_metadata(opener):
        exif = Image.Image.getexif(image)
    else:
        exif = image.getexif()
    return int(exif.get(0x0112, 1))


def _png_has_late_metadata(opener: Opener) -> bool:
    with opener() as file:
        position, pixels = 8, False
        while True:
            file.seek(position)
            chunk = file.read(8)
            if len(chunk) < 8 or chunk[4:] == b"IEND":
                return False
            pixels = pixels or chunk[4:] == b"IDAT"
            if pixels and chunk[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            position += 12 + int.from_bytes(chunk[:4], "big")


def _eight_bits(image: Image.Image, name: object) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own ``convert`` clips at 255: nearly everything becomes white."""
    if image.mode == "F":
        raise UserError(f"{name}: a floating-point picture has no defined white; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name}: a 32-bit picture has no defined white; save it with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture, making its folder, whole or not at all.

    Raises ``UserError`` for an extension that is not in ``WRITABLE`` and for places that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        known = ", ".join(WRITABLE)
        raise UserError(f"{path}: no picture is written as {path.suffix!r}; end the name in one of {known}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file to write the picture to")
    kind = Image.registered_extensions()[path.suffix.lower()]
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}.get(kind, {})
    encoded = BytesIO()
    try:
        image.save(encoded, format=kind, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, encoded.getvalue())
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written ({error.strerror or error})") from error
    return path


def digest(image: Image.Image) -> str:
    """Changes with a picture's pixels, size and mode."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()[:24]


def join(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both pictures side by side, left first; they must be of one size."""
    if left.size != right.size:
        sizes = f"{_by(left.size)} and {_by(right.size)}"
        raise UserError(f"pictures side by side must be of one size, not {sizes}")
    canvas = Image.new("RGB", (2 * left.width, left.height))
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width, 0))
    return canvas


def split(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and right half of a side-by-side picture, whose width must be even."""
    half, odd = divmod(image.width, 2)
    if odd or not half:
        raise UserError(f"a side-by-side picture must have an even width, not {_by(image.size)}")
    return image.crop((0, 0, half, image.height)), image.crop((half, 0, image.width, image.height))


def half_mask(size: tuple[int, int], side: Literal["left", "right"] = "right") -> Image.Image:
    """L mask of a canvas ``(width, height)``, white on one half; right starts at column ``width // 2``.

    The halves never overlap. The reference's left mask is one column wider than the left picture, because its
    rectangles include both ends.
    """
    width, height = size
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, width // 2, height) if side == "left" else (width // 2, 0, width, height))
    return mask


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale to ``(width, height)`` with the reference's filter, antialiased bilinear: what a model sees."""
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def panel(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture of any mode as one RGB half, ``size`` (width, height), of a diptych, as ICEdit makes it.

    Bicubic in the stored mode and only then RGB: Pillow scales palettes with nearest neighbours, and transparent
    pixels show the colour stored beneath them, not white. The aspect is not kept.
    """
    half = image.resize(size, Image.Resampling.BICUBIC)
    half.info.pop("transparency", None)  # without effect on the pixels, but Pillow warns about it
    return half.convert("RGB")


def resize_result(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale a result to the ``(width, height)`` of the picture that came in, with Lanczos."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def round_size(width: int, height: int, *, long_edge: int, multiple: int = 16) -> tuple[int, int]:
    """``(width, height)`` with the long edge at ``long_edge``, both rounded to multiples of ``multiple``.

    FLUX packs 2x2 latents of 8x8 pixels each, so only multiples of 16 fit. Halves are rounded up; no edge
    becomes 0.
    """
    if min(width, height, long_edge, multiple) < 1:
        raise ValueError(f"sizes must be positive: {width}x{height}, {long_edge=}, {multiple=}")
    longest = max(width, height)

    def rounded(edge: int) -> int:
        # round(edge * long_edge / longest / multiple) in integers: no float error decides a bucket
        return max(1, (2 * edge * long_edge + longest * multiple) // (2 * longest * multiple)) * multiple

    return rounded(width), rounded(height)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as ``(B, 3, H, W)`` float32 in [-1, 1], bit-equal to torchvision's."""
    sizes = {image.size for image in images}
    if len(sizes) != 1 or any(image.mode != "RGB" for image in images):
        raise ValueError(f"a batch needs RGB pictures of one size, not {[(i.mode, i.size) for i in images]}")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return pixels.to(torch.float32).div(255).sub(0.5).div(0.5)


def to_unit(images: Sequence[Image.Image]) -> Tensor:
    """The same in [0, 1], as pictures are drawn, read and measured."""
    return (to_tensor(images) + 1) / 2


def mask_to_tensor(masks: Sequence[Image.Image]) -> Tensor:
    """Masks of one size as ``(B, 1, H, W)`` float32: 1 where white (over half of 255), else 0."""
    pixels = torch.from_numpy(np.stack([np.asarray(mask.convert("L")) for mask in masks]))
    return (pixels.unsqueeze(1).to(torch.float32).div(255) > 0.5).to(torch.float32)


def from_tensor(x: Tensor) -> list[Image.Image]:
    """``(B, 3, H, W)`` in [-1, 1], clamped, as RGB; ``UserError`` for NaN, which would pass as black."""
    x = x.detach().to("cpu", torch.float32)
    if not torch.isfinite(x).all():
        raise UserError("the picture came out as NaN; set backbone.precision to bf16 or fp32")
    pixels = ((x * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(picture.contiguous().numpy()) for picture in pixels]


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    titles: Sequence[str],
    labels: Sequence[str] | None = None,
    cell: int = 256,
) -> Image.Image:
    """A labelled contact sheet: a title per column, a label per row or none, pictures fitted into ``cell``.

    Pictures keep their aspect and are scaled up too; ``None`` leaves a cell empty. Long texts are wrapped,
    then shortened. Texts are drawn in Pillow's built-in font, which has Latin letters only.
    """
    if not rows or not titles or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"one title per column: {len(titles)} titles, rows of {[*map(len, rows)]}")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"one label per row or none: {len(labels)} labels, {len(rows)} rows")
    font = ImageFont.load_default(max(11, cell // 15))
    line, margin, gap = max(15, cell // 11), max(10, cell // 16), max(6, cell // 32)
    fitted = [[_fit(image, cell) if image else None for image in row] for row in rows]
    columns = list(zip(*fitted, strict=True))
    widths = [max([cell // 2, *(image.width for image in column if image)]) for column in columns]
    heads = [_wrap(title, font, width, 2) for title, width in zip(titles, widths, strict=True)]
    notes = [_wrap(label, font, cell * 4 // 5, max(1, cell // line)) for label in labels or [""] * len(rows)]
    heights = [
        max([line, len(note) * line, *(image.height for image in row if image)])
        for row, note in zip(fitted, notes, strict=True)
    ]
    side = max([math.ceil(font.getlength(text)) + 2 * gap for note in notes for text in note], default=0)
    lefts = [margin + side + sum(widths[:i]) + gap * i for i in range(len(widths))]
    top = margin + (max(len(head) for head in heads) * line + gap if any(heads) else 0)
    tops = [top + sum(heights[:i]) + gap * i for i in range(len(heights))]
    canvas = Image.new("RGB", (lefts[-1] + widths[-1] + margin, tops[-1] + heights[-1] + margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, width, head in zip(lefts, widths, heads, strict=True):
        for number, text in enumerate(reversed(head)):
            draw.text((x + width / 2, top - gap - number * line), text, font=font, fill=INK, anchor="md")
    for y, height, note, row in zip(tops, heights, notes, fitted, strict=True):
        for number, text in enumerate(note):
            middle = y + height / 2 + (number + 0.5 - len(note) / 2) * line
            draw.text((margin, middle), text, font=font, fill=FAINT, anchor="lm")
        for x, width, image in zip(lefts, widths, row, strict=True):
            if image:
                corner = (x + (width - image.width) // 2, y + (height - image.height) // 2)
                canvas.paste(image, corner)
                # A frame, for a white picture would have no edge on white paper.
                box = (corner[0] - 1, corner[1] - 1, corner[0] + image.width, corner[1] + image.height)
                draw.rectangle(box, outline=FRAME)
    return canvas


def stack(parts: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other, left aligned."""
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def caption(lines: Sequence[str], width: int, cell: int = 256) -> Image.Image:
    """Lines of text as a part of a sheet, each on one line, shortened where it does not fit."""
    font = ImageFont.load_default(max(11, cell // 15))
    line, margin = max(15, cell // 11), max(10, cell // 16)
    canvas = Image.new("RGB", (width, line * len(lines) + margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(lines):
        for shown in _wrap(text, font, width - 2 * margin, 1):
            draw.text((margin, number * line), shown, font=font, fill=INK)
    return canvas


def _fit(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return resize_result(to_rgb(image), size)


def _wrap(text: str, font: Font, width: int, most: int) -> list[str]:
    """At most ``most`` lines no wider than ``width`` pixels; what does not fit ends in an ellipsis."""
    # Lone surrogates (undecodable file names) and control characters cannot be drawn.
    # The built-in font has no accents and few signs: a plain letter reads better than an empty box.
    text = unicodedata.normalize("NFKD", text.encode("utf-8", "replace").decode("utf-8"))
    text = "".join(c for c in text if not unicodedata.combining(c)).translate(str.maketrans("–—×→•", "--x>·"))
    words = ["".join(c if c.isprintable() else "?" for c in word) for word in text.split()]
    lines: list[str] = []
    for word in words:
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "…"]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
