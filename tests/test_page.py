"""The page with sliders needs nothing but itself, and its pictures are those that were drawn."""

import base64
import html.parser
import io
import json
from pathlib import Path

from PIL import Image

from pentimento import page, strips
from pentimento.calibration import Calibration
from pentimento.strips import Strip


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the ones that are still open."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def two(tmp_path: Path, picture) -> list[Strip]:
    found = []
    for seed in (1, 2):
        frames = []
        for scale in (1.0, 0.0, 2.0):
            path = tmp_path / f"{seed}-scale{scale:g}.png"
            picture(seed * 10 + int(scale)).save(path)
            frames.append((scale, path))
        title = 'a "cat" <b> & dog'
        found.append(Strip(title=title, seed=seed, skip=3, name=f"{seed}", frames=tuple(frames)))
    return found


def test_pictures_are_in_the_page_as_they_are(tmp_path: Path, picture, half: Calibration) -> None:
    made = two(tmp_path, picture)
    parsed = Page(page.page(made, half))
    assert parsed.open == []
    shown = parsed.all("img")
    wanted = [path for strip in made for _, path in sorted(strip.frames)]
    for image, path in zip(shown, wanted, strict=True):
        data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
        assert data == path.read_bytes()
        with Image.open(io.BytesIO(data)) as decoded, Image.open(path) as drawn:
            assert decoded.tobytes() == drawn.tobytes()
    assert [image["data-scale"] for image in shown if "hidden" not in image] == ["1", "1"]
    assert shown[0]["alt"] == 'a "cat" <b> & dog, scale 0'


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path, picture) -> None:
    text = page.page(two(tmp_path, picture))
    parsed = Page(text)
    assert not parsed.all("link") and all("src" not in script for script in parsed.all("script"))
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    (policy,) = [m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'") and "img-src data:" in str(policy)


def test_each_strip_has_a_slider_of_its_scales_and_all_have_one(
    tmp_path: Path, picture, half: Calibration
) -> None:
    parsed = Page(page.page(two(tmp_path, picture), half))
    every, *own = parsed.all("input")
    assert every["id"] == "all" and [one["id"] for one in own] == ["s0", "s1"]
    for one in parsed.all("input"):
        assert one["type"] == "range" and (one["min"], one["max"], one["value"]) == ("0", "2", "1")
        assert json.loads(str(one["data-scales"])) == [0, 1, 2] and one["data-unit"] == "0.5"
        assert one["aria-label"] and one["aria-valuetext"] == "scale 1"
    assert len(Page(page.page(two(tmp_path, picture)[:1])).all("input")) == 1


def test_what_the_scales_mean_is_said(tmp_path: Path, picture, half: Calibration) -> None:
    made = two(tmp_path, picture)
    text = page.page(made, half)
    assert "1 (calibrated default)" in text and "scale 1 is raw 0.5" in text and "seed 2, skip 3" in text
    assert "1 (trained)" in page.page(made) and "prefers-color-scheme: dark" in text


def test_grids_have_five_scales_a_row(tmp_path: Path, picture) -> None:
    path = tmp_path / "a.png"
    picture().save(path)

    def grid(count: int) -> Image.Image:
        frames = tuple((n / 5, path) for n in range(count))
        strip = Strip(title="a cat", seed=1, skip=14, name="a-cat", frames=frames)
        ((name, made),) = strips.grids([strip], "run")
        assert name == "a-cat-grid.png"
        return made

    five, six, ten = grid(5), grid(6), grid(10)
    assert five.width == six.width == ten.width > grid(4).width
    assert six.height == ten.height > five.height
    sheet, row = ten.height - five.height, five.crop((0, 0, five.width, ten.height - five.height))
    assert ten.crop((0, 0, five.width, sheet)).tobytes() == row.tobytes(), "the first row is that of five"
