"""Data for pretraining, made on the spot: renders of train scenes with their captions, and procedural pictures.

Scenes and captions are made by processes on the CPU, pictures on the device. A pool lives in device memory as uint8.
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pentimento.pocket import captions, tasks
from pentimento.pocket import scene as world
from pentimento.pocket.render import render_columns, stack

PAIR_TASKS = (
    "add", "add-glasses", "add-hat", "remove", "recolour", "recolour-hair", "replace", "background", "smile", "age",
    "chubby", "eye-size", "hair-length", "style", "count", "identity",
)  # fmt: skip
PAIR_FRAMES = (
    "a diptych of the same scene. on the left, {0}. on the right, {1}",
    "a diptych with two side-by-side images of the same scene. on the left {0}. on the right {1}",
    "left: {0}. right: {1}",
)


@dataclass(frozen=True)
class Pool:
    """Pictures ``(n, sides, 3, H, W)`` uint8 on the device and, per row, the texts that describe it."""

    pictures: Tensor
    texts: list[tuple[str, ...]]


def _single(job: tuple[int, int], shapes: float = 0.0) -> tuple[dict[str, np.ndarray], list[tuple[str, ...]]]:
    start, count = job
    rng = np.random.default_rng([7, start])
    scenes = [
        world.draw(seed, "shapes" if shapes and rng.random() < shapes else None)
        for seed in itertools.islice(world.seeds("train", start), count)
    ]
    texts = [
        tuple(captions.caption(s, phrasing, rng) for phrasing in range(captions.TRAIN_PHRASINGS))
        for s in scenes
    ]
    return _columns(scenes), texts


def _pair(job: tuple[int, int]) -> tuple[dict[str, np.ndarray], list[tuple[str, ...]]]:
    """Pairs that differ in one attribute, described by two captions and never by an instruction."""
    start, count = job
    rng = np.random.default_rng([8, start])
    scenes, texts = [], []
    for number in itertools.islice(world.seeds("train", start), count):
        while True:
            name = PAIR_TASKS[rng.integers(len(PAIR_TASKS))]
            scene = world.draw(number)
            edit = tasks.TASKS[name](scene if name in ("style", "identity") else scene | {"style": 0}, rng)
            if edit is None:
                number = next(world.seeds("train", int(rng.integers(2**31))))
                continue
            before = edit.wanted.get("", scene if name in ("style", "identity") else scene | {"style": 0})
            if not (world.held_out(before) or world.held_out(edit.target)):
                break
        scenes += [before, edit.target]
        phrasing = int(rng.integers(captions.TRAIN_PHRASINGS))
        frame = PAIR_FRAMES[rng.integers(len(PAIR_FRAMES))]
        words = [captions.caption(s, phrasing) for s in (before, edit.target)]
        texts.append((frame.format(*words), captions.caption(edit.target, phrasing)))
    return _columns(scenes), texts


def _columns(scenes: list[world.Scene]) -> dict[str, np.ndarray]:
    return {name: column.numpy() for name, column in stack(scenes).items()}


def _make(
    kind, start: int, count: int, size: tuple[int, int], device: torch.device, workers: int, sides: int
) -> Pool:
    chunk = 1000
    # Consecutive jobs start far apart so that islice over the split's seeds never overlaps the next job.
    jobs = [(start + i * 2 * chunk, min(chunk, count - i * chunk)) for i in range(-(-count // chunk))]
    pictures, texts = [], []
    with ProcessPoolExecutor(workers) as pool:
        for columns, words in pool.map(kind, jobs):
            p = {name: torch.from_numpy(c).to(device) for name, c in columns.items()}
            names, n = list(p), len(p["kind"])
            for i in range(0, n, 500):
                x = render_columns({name: p[name][i : i + 500] for name in names}, *size)
                pictures.append((x * 255).round().byte())
            texts += words
    x = torch.cat(pictures)
    return Pool(x.view(-1, sides, *x.shape[1:]), texts)


def singles(
    start: int,
    count: int,
    size: tuple[int, int],
    device: torch.device,
    workers: int = 14,
    shapes: float = 0.0,
) -> Pool:
    """``shapes``: the share that surely has shapes; the rest is drawn as the world draws its kinds."""
    return _make(partial(_single, shapes=shapes), start, count, size, device, workers, 1)


def pairs(start: int, count: int, size: tuple[int, int], device: torch.device, workers: int = 14) -> Pool:
    return _make(_pair, start, count, size, device, workers, 2)


@torch.no_grad()
def procedural(count: int, size: int, device: torch.device) -> Tensor:
    """Pictures ``(count, 3, size, size)`` uint8 with the statistics of photographs: dead leaves, 1/f noise, gradients."""
    out = []
    n = min(256, count)
    for _ in range(-(-count // n)):
        a, b = _noise(n, size, device), _leaves(n, size, device)
        k = torch.rand(n, 1, 1, 1, device=device)
        x = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.3, a, b + (a - 0.5) * 0.5 * k)
        x = torch.lerp(
            x, x.mean(1, keepdim=True), 0.9 * torch.rand(n, 1, 1, 1, device=device)
        )  # most photographs are pale
        contrast = 0.4 + 0.9 * torch.rand(n, 1, 1, 1, device=device)
        x = (
            (x - x.mean((1, 2, 3), keepdim=True)) * contrast
            + 0.2
            + 0.6 * torch.rand(n, 1, 1, 1, device=device)
        )
        out.append((x.clamp(0, 1) * 255).round().byte())
    return torch.cat(out)[:count]


def _noise(n: int, size: int, device: torch.device) -> Tensor:
    """Coloured 1/f^alpha noise; alpha 0.9 to 1.9, mostly grey with some colour, as photographs are."""
    fy = torch.fft.fftfreq(size, device=device)[:, None]
    fx = torch.fft.rfftfreq(size, device=device)[None]
    radius = torch.sqrt(fx**2 + fy**2).clamp(min=1 / size)
    alpha = 0.9 + 1.0 * torch.rand(n, 1, 1, 1, device=device)
    spectrum = torch.fft.rfft2(torch.randn(n, 3, size, size, device=device)) / radius**alpha
    x = torch.fft.irfft2(spectrum, s=(size, size))
    x = x / x.std((1, 2, 3), keepdim=True)
    grey = 0.3 + 0.7 * torch.rand(n, 1, 1, 1, device=device)
    x = x.mean(1, keepdim=True) * 1.6 * grey + x * (1 - grey)
    tint = torch.rand(n, 3, 1, 1, device=device) * 0.6 + 0.2
    return (tint + 0.22 * x).clamp(0, 1)


def _leaves(n: int, size: int, device: torch.device) -> Tensor:
    """Dead leaves: occluding ellipses and boxes with power-law sizes, each with its own colour, slope and texture."""
    axis = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    picture = torch.rand(n, 3, 1, 1, device=device).expand(n, 3, size, size)
    texture = _noise(n, size, device) - 0.5
    palette = torch.rand(n, 8, 3, device=device) * 0.9 + 0.05
    rows = torch.arange(n, device=device)
    for i in range(70):
        scale = (0.9 / (1 + i / 6)) * (0.5 + torch.rand(n, 1, 1, device=device))
        cx, cy, angle, ratio = (
            torch.rand(n, 1, 1, device=device) * w + o
            for w, o in ((2.4, -1.2), (2.4, -1.2), (3.14, 0), (0.7, 0.3))
        )
        u = (x - cx) * torch.cos(angle) + (y - cy) * torch.sin(angle)
        v = ((y - cy) * torch.cos(angle) - (x - cx) * torch.sin(angle)) / ratio
        box = torch.rand(n, 1, 1, device=device) < 0.35
        distance = torch.where(box, torch.maximum(u.abs(), v.abs()), torch.sqrt(u * u + v * v)) - scale
        soft = 1 + 4 * (torch.rand(n, 1, 1, device=device) < 0.2)
        alpha = (0.5 - distance * size / (3 * soft)).clamp(0, 1)[:, None]
        colour = palette[rows, torch.randint(8, (n,), device=device)][:, :, None, None]
        slope = (u * 0.25 * torch.randn(n, 1, 1, device=device))[:, None]
        grain = (
            texture * torch.rand(n, 1, 1, 1, device=device) * (torch.rand(n, 1, 1, 1, device=device) < 0.5)
        )
        picture = picture + (colour + slope + grain - picture) * alpha
    return picture.clamp(0, 1)


def augment(x: Tensor) -> Tensor:
    """Random contrast, brightness and channel gains, and flips, of pictures in [-1, 1]."""
    n = len(x)
    gain = 1 + 0.25 * torch.randn(n, 3, 1, 1, device=x.device) * (
        torch.rand(n, 1, 1, 1, device=x.device) < 0.5
    )
    shift = 0.15 * torch.randn(n, 3, 1, 1, device=x.device) * (torch.rand(n, 1, 1, 1, device=x.device) < 0.5)
    flipped = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return (flipped * gain + shift).clamp(-1, 1)


def random_masks(n: int, height: int, width: int, device: torch.device) -> Tensor:
    """Masks ``(n, 1, H, W)`` of 0 and 1, 1 = to fill: boxes, halves, brush strokes, now and then everything."""
    y = torch.arange(height, device=device).view(1, -1, 1)
    x = torch.arange(width, device=device).view(1, 1, -1)
    r = lambda lo, hi: torch.rand(n, 1, 1, device=device) * (hi - lo) + lo  # noqa: E731
    cx, cy, half_w, half_h = r(0, width), r(0, height), r(8, width / 2), r(8, height / 2)
    box = ((x - cx).abs() < half_w) & ((y - cy).abs() < half_h)
    side = torch.randint(4, (n, 1, 1), device=device)
    halves = torch.where(
        side == 0,
        x >= width // 2,
        torch.where(side == 1, x < width // 2, torch.where(side == 2, y >= height // 2, y < height // 2)),
    )
    field = F.interpolate(torch.randn(n, 1, 5, 5, device=device), (height, width), mode="bicubic")[:, 0]
    brush = field > r(-0.3, 0.6)
    kind = torch.rand(n, 1, 1, device=device)
    mask = torch.where(kind < 0.45, box, torch.where(kind < 0.6, halves, brush))
    return mask[:, None].float()
