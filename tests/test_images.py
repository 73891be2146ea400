"""Every kind of file that people put into data folders, the geometry of canvases, tensors and sheets."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pentimento import images
from pentimento.errors import UserError

ORIENTATION = 0x0112


def picture(width: int = 6, height: int = 4, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_orientation(image: Image.Image, path: Path, value: int, **options: bool) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    image.save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "tif", "webp"])
def test_exif_orientation_is_applied_to_pictures_masks_and_sizes(tmp_path, value, extension):
    upright = picture()
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[value]
    path = with_orientation(stored, tmp_path / f"a.{extension}", value, lossless=True)
    assert np.array_equal(pixels(images.open_image(path)), pixels(upright))
    assert np.array_equal(pixels(images.open_mask(path)), pixels(upright.convert("L")))
    assert images.read_size(path) == upright.size


def test_orientation_in_a_jpeg_and_behind_the_pixels_of_a_png(tmp_path):
    path = with_orientation(picture(), tmp_path / "a.jpg", 6)
    assert images.read_size(path) == images.open_image(path).size == (4, 6)
    picture().save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = (tmp_path / "plain.png").read_bytes()
    end = data.index(b"IEND") - 4
    late = tmp_path / "late.png"
    late.write_bytes(data[:end] + chunk(b"eXIf", exif.tobytes()[6:]) + data[end:])
    assert images.read_size(late) == images.open_image(late).size == (4, 6)


def test_the_size_is_read_without_decoding(tmp_path, monkeypatch):
    picture(64, 48).save(tmp_path / "a.png")
    picture(64, 48).save(tmp_path / "b.jpg")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the pixels were decoded"))
    assert images.read_size(tmp_path / "a.png") == images.read_size(tmp_path / "b.jpg") == (64, 48)


def test_transparency_is_composited_on_white(tmp_path):
    rgba = Image.new("RGBA", (4, 1))
    for x, colour in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128), (10, 20, 30, 255)]):
        rgba.putpixel((x, 0), colour)
    rgba.save(tmp_path / "a.png")
    assert pixels(images.open_image(tmp_path / "a.png"))[0].tolist() == [
        [255, 0, 0],
        [255, 255, 255],
        [127, 127, 127],
        [10, 20, 30],
    ]
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "grey.png")
    assert images.open_image(tmp_path / "grey.png").getpixel((0, 0)) == (255, 255, 255)


def test_palettes_with_and_without_transparency(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "a.png")
    palette.save(tmp_path / "b.png", transparency=1)
    palette.save(tmp_path / "c.gif")
    assert pixels(images.open_image(tmp_path / "a.png"))[0].tolist() == [[200, 10, 20], [1, 2, 3]]
    assert pixels(images.open_image(tmp_path / "b.png"))[0].tolist() == [[200, 10, 20], [255, 255, 255]]
    assert pixels(images.open_image(tmp_path / "c.gif"))[0].tolist() == [[200, 10, 20], [1, 2, 3]]


@pytest.mark.parametrize("mode, value, expected", [("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255))])
def test_grey_becomes_rgb(tmp_path, mode, value, expected):
    Image.new(mode, (3, 3), value).save(tmp_path / "a.png")
    image = images.open_image(tmp_path / "a.png")
    assert image.mode == "RGB" and image.getpixel((1, 1)) == expected


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 256 levels, one of each
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "b.tif")
    for name in ("a.png", "b.tif"):
        levels = pixels(images.open_image(tmp_path / name))
        assert np.array_equal(levels[..., 0].ravel(), np.arange(256))
        assert np.array_equal(levels[..., 0], levels[..., 2])
    assert np.array_equal(pixels(images.open_mask(tmp_path / "a.png")).ravel(), np.arange(256))


@pytest.mark.parametrize("kind", ["transparent", "palette", "turned", "sixteen bits", "one bit", "CMYK"])
def test_a_picture_from_python_becomes_what_its_file_becomes(tmp_path, kind):
    path = tmp_path / ("a.tif" if kind == "CMYK" else "a.png")
    if kind == "turned":
        with_orientation(picture(), path, 6)
    else:
        {
            "transparent": Image.new("RGBA", (3, 3), (255, 0, 0, 0)),
            "palette": picture().quantize(5),
            "sixteen bits": Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)),
            "one bit": Image.fromarray(np.eye(4, dtype=bool)),
            "CMYK": picture().convert("CMYK"),
        }[kind].save(path)
    with Image.open(path) as opened:
        assert images.take_image(opened) == images.open_image(path)
    if kind == "transparent":
        assert images.open_image(path).getpixel((1, 1)) == (255, 255, 255)
        with Image.open(path) as opened, pytest.raises(UserError, match="the mask: .* transparent pixels"):
            images.take_mask(opened)
    else:
        with Image.open(path) as opened:
            assert images.take_mask(opened) == images.open_mask(path)


def test_pictures_from_python_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.png"
    picture(60, 40).save(path)
    path.write_bytes(path.read_bytes()[:-60])
    with Image.open(path) as opened, pytest.raises(UserError, match="the picture: the picture is damaged"):
        images.take_image(opened)
    with pytest.raises(UserError, match="floating-point"):
        images.take_image(Image.new("F", (3, 3)))
    picture().save(tmp_path / "a.gif", save_all=True, append_images=[picture(seed=1)])
    with Image.open(tmp_path / "a.gif") as opened, pytest.raises(UserError, match="2 frames"):
        images.take_image(opened)


def test_sixteen_bit_colour(tmp_path):
    row = np.array([[0, 0, 0], [65535, 32896, 257], [65535, 65535, 65535]], dtype=">u2")
    header = struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + row.tobytes())
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    assert pixels(images.open_image(path))[0].tolist() == [[0, 0, 0], [255, 128, 1], [255, 255, 255]]


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = images.open_image(tmp_path / "a.jpg").getpixel((4, 4))
    assert red > 250 and green < 5 and blue < 5


def test_depths_without_a_defined_white_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 1 << 20, dtype=np.int32)).save(tmp_path / "int.tif")
    for name in ("float.tif", "int.tif"):
        with pytest.raises(UserError, match=f"{name}.*no defined white"):
            images.open_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_animations_and_pages_are_refused(tmp_path, name):
    picture().save(tmp_path / name, save_all=True, append_images=[picture(seed=1)])
    with pytest.raises(UserError, match=r"a\..*holds 2 frames"):
        images.open_image(tmp_path / name)


def test_a_phones_mpo_is_its_first_picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]
    )
    assert images.open_image(tmp_path / "a.jpg").getpixel((4, 4))[0] > 250


def bad_files(folder: Path) -> dict[str, str]:
    """File name -> what the message must say."""
    picture(64, 64).save(folder / "whole.png")
    picture(64, 64).save(folder / "whole.jpg")
    png, jpg = (folder / "whole.png").read_bytes(), (folder / "whole.jpg").read_bytes()
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "cut.jpg").write_bytes(jpg[: len(jpg) // 2])
    (folder / "header.png").write_bytes(png[:20])
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "text.png").write_text("hello")
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")
    (folder / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    return {
        "cut.png": "damaged or cut off",
        "cut.jpg": "damaged or cut off",
        "header.png": "damaged or cut off|is not a picture",
        "flipped.png": "damaged or cut off",
        "text.png": "is not a picture",
        "page.jpg": "is not a picture",
        "lfs.png": "git lfs pull",
        "empty.png": "is empty",
        "folder.png": "is a folder",
        "absent.png": "no such picture",
        "nul\0.png": "cannot be read",
    }


def test_bad_files_are_named_with_what_is_wrong(tmp_path):
    for name, words in bad_files(tmp_path).items():
        for reader in (images.open_image, images.open_mask):
            with pytest.raises(UserError, match=words) as caught:
                reader(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")

    def denied(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("PIL.Image.open", denied)
    with pytest.raises(UserError, match=r"a\.png: the picture cannot be read \(Permission denied\)"):
        images.open_image(tmp_path / "a.png")


@pytest.mark.parametrize("side", [10_001, 20_000])  # below and above the size at which Pillow itself raises
def test_huge_pictures_are_refused_without_decoding(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path = tmp_path / "huge.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    for reader in (images.open_image, images.read_size):
        with pytest.raises(UserError, match=r"huge\.png.*100 megapixels"):
            reader(path)


def test_one_pixel_pictures_are_fine(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert images.open_image(tmp_path / "a.png").getpixel((0, 0)) == (1, 2, 3)
    assert images.round_size(1, 1, long_edge=512) == (512, 512)


def test_mask_polarity_and_ambiguous_masks(tmp_path):
    mask = Image.new("L", (4, 2))
    mask.paste(255, (0, 0, 2, 2))
    mask.save(tmp_path / "m.png")
    assert pixels(images.open_mask(tmp_path / "m.png"))[0].tolist() == [255, 255, 0, 0]
    assert pixels(images.open_mask(tmp_path / "m.png", white="keep"))[0].tolist() == [0, 0, 255, 255]
    mask.point(lambda v: v // 255).save(tmp_path / "ones.png")
    with pytest.raises(UserError, match=r"ones\.png.*values 0 and 1"):
        images.open_mask(tmp_path / "ones.png")
    Image.new("RGBA", (2, 2), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    with pytest.raises(UserError, match=r"clear\.png.*transparent"):
        images.open_mask(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (255, 255, 255, 255)).save(tmp_path / "opaque.png")
    assert images.open_mask(tmp_path / "opaque.png").getpixel((0, 0)) == 255


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = images.save_image(picture(), tmp_path / "new" / "a.png")
    assert np.array_equal(pixels(images.open_image(path)), pixels(picture()))
    before = path.read_bytes()

    def full(self: Image.Image, file, **_options: object) -> None:
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(UserError, match=r"a\.png: the picture cannot be written \(No space left on device\)"):
        images.save_image(picture(seed=1), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a.png"]


def test_places_and_names_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        images.save_image(picture(), tmp_path / "file" / "a.png")
    for name in ("a.xyz", "a", "a.gif.txt"):
        with pytest.raises(UserError, match=r"\.png, \.jpg"):
            images.save_image(picture(), tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        images.save_image(picture(), tmp_path / "folder.png")


@pytest.mark.parametrize("extension", [e for e in images.WRITABLE])
def test_every_writable_extension_can_be_read_back(tmp_path, extension):
    path = images.save_image(Image.new("RGB", (9, 7), (200, 100, 50)), tmp_path / f"a{extension.upper()}")
    assert images.open_image(path).size == (9, 7)
    assert extension in images.READABLE


def test_join_and_split_are_inverse():
    left, right = picture(), picture(seed=1)
    again = images.split(images.join(left, right))
    assert np.array_equal(pixels(again[0]), pixels(left)) and np.array_equal(pixels(again[1]), pixels(right))
    with pytest.raises(UserError, match="6x4 and 5x4"):
        images.join(left, picture(5, 4))
    for size in ((7, 4), (1, 1)):
        with pytest.raises(UserError, match="even width"):
            images.split(picture(*size))


@pytest.mark.parametrize("width", [2, 7, 1000, 1001, 1024])
def test_half_masks_meet_in_the_middle(width):
    left, right = (pixels(images.half_mask((width, 3), side)) for side in ("left", "right"))
    assert np.array_equal(left, 255 - right)
    assert right[0].tolist() == [0] * (width // 2) + [255] * (width - width // 2)


@pytest.mark.parametrize(
    "size, long_edge, expected",
    [
        ((500, 333), 512, (512, 336)),  # the reference's 512x340 does not fit the packing
        ((333, 500), 512, (336, 512)),
        ((1024, 1024), 512, (512, 512)),
        ((64, 64), 512, (512, 512)),
        ((3000, 1), 512, (512, 16)),
        ((1001, 500), 72, (80, 32)),
        ((100, 100), 1, (16, 16)),
    ],
)
def test_sizes_are_rounded_to_multiples_of_16(size, long_edge, expected):
    assert images.round_size(*size, long_edge=long_edge) == expected


def test_round_size_refuses_nonsense():
    with pytest.raises(ValueError, match="positive"):
        images.round_size(0, 10, long_edge=512)


def test_resizing_uses_the_references_filter():
    image = picture(40, 30)
    small = images.resize(image, (16, 16))
    assert np.array_equal(pixels(small), pixels(image.resize((16, 16), Image.Resampling.BILINEAR)))
    assert images.resize(image, (40, 30)) is image and images.resize_result(image, (40, 30)) is image
    assert images.resize_result(small, (40, 30)).size == (40, 30)


def test_tensors_and_pictures_are_inverse():
    levels = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (2, 1, 3))
    batch = [Image.fromarray(levels), Image.fromarray(255 - levels)]
    x = images.to_tensor(batch)
    assert x.shape == (2, 3, 2, 256) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    expected = (torch.from_numpy(levels).permute(2, 0, 1).float().div(255) - 0.5) / 0.5
    assert torch.equal(x[0], expected)
    for image, again in zip(batch, images.from_tensor(x), strict=True):
        assert np.array_equal(pixels(image), pixels(again))
    assert pixels(images.from_tensor(torch.full((1, 3, 2, 2), 3.0))[0]).max() == 255


def test_tensors_refuse_mixed_sizes_and_nan():
    with pytest.raises(ValueError, match="one size"):
        images.to_tensor([picture(), picture(8, 8)])
    with pytest.raises(ValueError, match="RGB"):
        images.to_tensor([Image.new("L", (4, 4))])
    with pytest.raises(UserError, match="precision"):
        images.from_tensor(torch.full((1, 3, 2, 2), float("nan")))


def test_mask_tensors_are_binary():
    mask = Image.new("L", (4, 1))
    for x, value in enumerate((0, 127, 128, 255)):
        mask.putpixel((x, 0), value)
    assert images.mask_to_tensor([mask]).flatten().tolist() == [0, 0, 1, 1]


def test_sheet_keeps_aspects_and_draws_every_picture():
    red, blue = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (10, 20), "blue")
    made = images.sheet(
        [[red, blue], [blue, None]], titles=["before", "after"], labels=["one", "two"], cell=64
    )
    colours = {colour: count for count, colour in made.getcolors(1 << 20)}
    assert colours[(255, 0, 0)] == 64 * 32 and colours[(0, 0, 255)] == 2 * 32 * 64
    assert made.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "text", ["", "Größe Ω → 日本語 🙂", "\udcff broken", "a\nb\tc\x00", "word " * 300, "x" * 500, "مرحبا"]
)
def test_sheet_survives_any_text(text):
    made = images.sheet([[picture()]], titles=[text], labels=[text], cell=96)
    assert made.width < 96 * 3 and made.height < 96 * 3


def test_long_texts_are_wrapped_and_shortened():
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    lines = images._wrap("turn the outline into a photograph of a vase on a wooden table", font, 80, 3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 80 for line in lines)
    assert images._wrap("short", font, 80, 3) == ["short"]


def test_sheet_refuses_a_wrong_number_of_texts():
    for rows, titles, labels in (
        ([], ["a"], None),
        ([[picture()]], [], None),
        ([[picture()]], ["a"], ["b", "c"]),
    ):
        with pytest.raises(ValueError, match="one (title|label) per"):
            images.sheet(rows, titles=titles, labels=labels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_pictures_in_memory_keep_their_mode(mode):
    image = picture().convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    read = images.decode(data, "cell 3")
    assert read.mode == mode and np.array_equal(pixels(read), pixels(image))
    assert images.decode_size(data, "cell 3") == read.size


def test_pictures_in_memory_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 8
    data = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    assert images.decode_size(data, "x") == images.decode(data, "x").size == (4, 6)


def test_bad_pictures_in_memory_are_named():
    data = encoded(picture(64, 64))
    for bad, words in ((data[: len(data) // 2], "damaged or cut off"), (b"hello", "is not a picture")):
        with pytest.raises(UserError, match=f"^cell 3: .*{words}"):
            images.decode(bad, "cell 3")
    with pytest.raises(UserError, match="^cell 3: is not a picture"):
        images.decode_size(b"hello", "cell 3")


def test_a_panel_is_scaled_in_its_own_mode_and_then_rgb():
    """Palettes with nearest neighbours, transparent pixels with the colour beneath them."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 0, 200, 100])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = bytes([255, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        colours = images.panel(palette, (8, 8)).getcolors()
    assert sorted(colours) == [(32, (0, 200, 100)), (32, (200, 10, 20))]
    glass = Image.new("RGBA", (3, 3), (10, 20, 30, 128))
    assert images.panel(glass, (3, 3)).getcolors() == [(9, (10, 20, 30))]
    assert images.to_rgb(glass).getcolors() == [(9, (132, 137, 142))]
    wide = picture(40, 20)
    assert np.array_equal(
        pixels(images.panel(wide, (16, 16))), pixels(wide.resize((16, 16), Image.Resampling.BICUBIC))
    )
    assert images.panel(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), (2, 2)).getpixel((0, 0)) == (255, 0, 0)
