"""A page with sliders: pictures of several strengths in one HTML file, which needs nothing else, no network and no server."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from .calibration import Calibration
from .strips import Strip

NAME = "slider.html"
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def page(strips: Sequence[Strip], calibration: Calibration | None = None) -> str:
    """The page's text; the pictures' files go into it as they are.

    Args:
        calibration: what scale 1 stands for; it is marked, and raw scales are shown too.
    """
    known = sorted({scale for strip in strips for scale, _ in strip.frames})
    return PAGE.format(
        style=STYLE,
        script=SCRIPT,
        about=html.escape(about(calibration)),
        every=slider("all", "all pictures", known, calibration) if len(strips) > 1 else "",
        strips="\n".join(section(n, strip, calibration) for n, strip in enumerate(strips)),
    )


def about(calibration: Calibration | None) -> str:
    """What the scales mean."""
    if calibration is None:
        return "Scale 0 is the picture without the edit, 1 the strength that was trained."
    return f"Scale 0 is the picture without the edit; {calibration}."


def section(number: int, strip: Strip, calibration: Calibration | None) -> str:
    """One strip: its pictures, of which one is seen, and its slider."""
    frames = sorted(strip.frames)
    shown = start([scale for scale, _ in frames])
    pictures = "\n".join(
        f'<img src="{embedded(path)}" alt="{html.escape(f"{strip.title}, scale {scale:g}")}" data-scale="{scale:g}"'
        f"{'' if n == shown else ' hidden'}>"
        for n, (scale, path) in enumerate(frames)
    )
    source = (
        f'<figure><img src="{embedded(strip.source)}" alt="source"><figcaption>source</figcaption></figure>'
        if strip.source
        else ""
    )
    return (
        f'<section>\n<h2>{html.escape(strip.title)}</h2>\n<p class="note">{html.escape(strip.note)}</p>\n<div class="row">'
        f'{source}<figure class="frames">\n{pictures}\n</figure></div>\n'
        f"{slider(f's{number}', strip.title, [scale for scale, _ in frames], calibration)}\n</section>"
    )


def slider(name: str, label: str, scales: Sequence[float], calibration: Calibration | None) -> str:
    """A range input whose steps are the scales, in their order."""
    shown = start(scales)
    ticks = "".join(
        f"<span{' class=default' if scale == 1 else ''}>{scale:g}{mark(scale, calibration)}</span>"
        for scale in scales
    )
    unit = 0 if calibration is None else calibration.unit
    return (
        f'<div class="slider"><input type="range" id="{name}" min="0" max="{len(scales) - 1}" step="1" value="{shown}"'
        f' aria-label="{html.escape(f"scale of {label}")}" aria-valuetext="scale {scales[shown]:g}"'
        f" data-scales='{json.dumps(list(scales))}' data-unit=\"{unit:g}\">"
        f'<output for="{name}">scale {scales[shown]:g}</output><div class="ticks" aria-hidden="true">{ticks}</div></div>'
    )


def mark(scale: float, calibration: Calibration | None) -> str:
    """What is written at scale 1."""
    if scale != 1:
        return ""
    return " (trained)" if calibration is None else " (calibrated default)"


def start(scales: Sequence[float]) -> int:
    """The one that is seen at first: scale 1, or else the largest."""
    return list(scales).index(1) if 1 in scales else len(scales) - 1


def embedded(path: Path) -> str:
    """A picture's file as a data URL."""
    kind = TYPES[path.suffix.lower()]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


STYLE = """
:root { color-scheme: light dark; --ink: #1b1c20; --faint: #62656d; --paper: #fafafa; --card: #fff; --line: #dcdde2; --accent: #2653d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --faint: #a2a5ae; --paper: #17181b; --card: #202226; --line: #383b42; --accent: #8fabff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 80rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 0 0 1rem; color: var(--faint); }
.note { margin: 0 0 .6rem; font-size: .9rem; }
.all { position: sticky; top: 0; padding: .6rem 0; background: var(--paper); border-bottom: 1px solid var(--line); z-index: 1; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; margin-top: 1rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; }
.row { display: flex; gap: .6rem; }
figure { flex: 1; min-width: 0; margin: 0; }
figcaption { font-size: .85rem; color: var(--faint); }
img { display: block; width: 100%; height: auto; border-radius: .3rem; }
img[hidden] { display: none; }
.slider { margin-top: .6rem; }
input[type=range] { width: 100%; accent-color: var(--accent); }
input[type=range]:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
output { font-variant-numeric: tabular-nums; }
.ticks { display: flex; justify-content: space-between; gap: .4rem; font-size: .8rem; color: var(--faint); }
.ticks .default { color: var(--accent); font-weight: 600; }
"""

SCRIPT = """
function show(input) {
  const scales = JSON.parse(input.dataset.scales), scale = scales[input.value], unit = Number(input.dataset.unit);
  const text = 'scale ' + scale + (unit ? ' (raw ' + Number((scale * unit).toPrecision(3)) + ')' : '');
  input.setAttribute('aria-valuetext', text);
  input.parentElement.querySelector('output').textContent = text;
  const section = input.closest('section');
  if (section) {
    for (const image of section.querySelectorAll('.frames img')) image.hidden = Number(image.dataset.scale) !== scale;
    return;
  }
  for (const other of document.querySelectorAll('main input')) {
    const place = JSON.parse(other.dataset.scales).indexOf(scale);
    if (place >= 0) { other.value = place; show(other); }
  }
}
for (const input of document.querySelectorAll('input[type=range]')) {
  input.addEventListener('input', () => show(input));
  show(input);
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="pentimento">
<title>Slider</title>
<style>{style}</style>
<noscript><style>img[hidden] {{ display: block; }} .slider {{ display: none; }}</style></noscript>
</head>
<body>
<h1>Slider</h1>
<p>{about} Move a slider, or use the arrow keys.</p>
<div class="all">{every}</div>
<main>
{strips}
</main>
<script>{script}</script>
</body>
</html>
"""
