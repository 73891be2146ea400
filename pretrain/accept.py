"""What the model card reports: every acceptance number of the shipped folders, through stock diffusers.

``python -m pretrain accept --start FOLDER --out FILE.json`` with FOLDER a ``FluxFillPipeline`` folder.
"""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxFillPipeline, FluxPipeline
from PIL import Image, ImageOps
from torch import Tensor

from pentimento.pocket import captions, readout, tasks
from pentimento.pocket import scene as world
from pentimento.pocket.render import render

from .reading import captions_found, drawn_scenes, psnr, to_pictures, to_tensor

TEXT = 64


@torch.no_grad()
def round_trip(vae: Any, x: Tensor) -> Tensor:
    out = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mean).sample for part in x.split(16)]
    return (torch.cat(out) / 2 + 0.5).clamp(0, 1)


def filler(
    pipe: FluxFillPipeline, guidance: float, steps: int = 20
) -> Callable[[list[str]], list[Image.Image]]:
    grey, white = Image.new("RGB", (128, 128), (128, 128, 128)), Image.new("L", (128, 128), 255)

    def draw(prompts: list[str]) -> list[Image.Image]:
        made = []
        for i in range(0, len(prompts), 8):
            part = prompts[i : i + 8]
            made += pipe(
                prompt=part, image=[grey] * len(part), mask_image=[white] * len(part), height=128, width=128, guidance_scale=guidance,
                num_inference_steps=steps, max_sequence_length=TEXT, generator=torch.Generator().manual_seed(i),
            ).images  # fmt: skip
        return made

    return draw


def holes(pipe: FluxFillPipeline, count: int) -> dict[str, float]:
    """A box filled again from the caption: what happens outside, against the autoencoder alone."""
    scenes = drawn_scenes("portrait", count)
    x = render(scenes)
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (30, 40, 110, 100))
    inside = F.max_pool2d(to_tensor([mask.convert("RGB")])[:, :1], 5, 1, 2)
    made = pipe(
        prompt=[captions.caption(s) for s in scenes], image=to_pictures(x), mask_image=[mask] * count, height=128, width=128,
        guidance_scale=30, num_inference_steps=28, max_sequence_length=TEXT, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    outside = 1 - inside

    def decibel(y: Tensor) -> float:
        error = ((y - x).pow(2) * outside).sum((1, 2, 3)) / (3 * outside.sum())
        return float((-10 * torch.log10(error)).mean())

    return {"outside": decibel(to_tensor(made)), "round_trip": decibel(round_trip(pipe.vae, x))}


def diptychs(pipe: FluxFillPipeline, count: int, guidance: float) -> dict[str, float]:
    """Right half drawn from two descriptions: the left half, the scene on the right, and the described change."""
    names = ("add-glasses", "recolour-hair", "background", "remove", "smile", "replace")
    cases = [
        c for name in names for c in itertools.islice(tasks.cases(name, "test"), max(1, count // len(names)))
    ]
    left = render([c.source for c in cases])
    canvas = to_pictures(torch.cat([left, torch.full_like(left, 0.5)], 3))
    mask = Image.new("L", (256, 128), 0)
    mask.paste(255, (128, 0, 256, 128))
    prompts = [
        f"a diptych of the same scene. on the left, {c.source_prompt}. on the right, {c.target_prompt}"
        for c in cases
    ]
    made = pipe(
        prompt=prompts, image=canvas, mask_image=[mask] * len(cases), height=128, width=256, guidance_scale=guidance,
        num_inference_steps=28, max_sequence_length=128, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    y = to_tensor(made)
    readings = [readout.judge(y[i, :, :, 128:], c.source, c.target, c.wanted) for i, c in enumerate(cases)]
    mean = lambda values: float(np.mean(list(values)))  # noqa: E731
    return {
        "left_half": float(psnr(y[..., :128], left).mean()),
        "left_half_round_trip": float(psnr(round_trip(pipe.vae, torch.cat([left, left], 3))[..., :128], left).mean()),
        "described_change": mean(r.success for r in readings), "other_attributes": mean(r.kept for r in readings),
        "right_background": mean(r.background for r in readings),
    }  # fmt: skip


def main(folder: Path, out: Path, photos: Path | None, count: int = 48) -> None:
    pipe = FluxFillPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {}
    scenes = [world.draw(n) for n in itertools.islice(world.seeds("test"), 200)]
    x = render(scenes)
    report["round_trip_scenes"] = float(psnr(round_trip(pipe.vae, x), x).mean())
    if photos:
        files = sorted(p for p in photos.rglob("*") if p.suffix in (".jpg", ".png"))
        real = to_tensor(
            [ImageOps.fit(Image.open(p).convert("RGB"), (128, 128), Image.Resampling.LANCZOS) for p in files]
        )
        report["round_trip_photographs"] = float(psnr(round_trip(pipe.vae, real), real).mean())
    for guidance in (1.0, 3.5, 30.0, 50.0):
        report[f"captions_found_guidance_{guidance:g}"] = captions_found(filler(pipe, guidance), count)
        print(json.dumps(report), flush=True)
    report["filled_box"] = holes(pipe, count)
    for guidance in (1.0, 30.0):
        report[f"diptych_guidance_{guidance:g}"] = diptychs(pipe, count, guidance)
    from pentimento.pocket import weights

    dev = FluxPipeline.from_pretrained(weights.dev_from(folder), torch_dtype=torch.float32)
    dev.set_progress_bar_config(disable=True)

    def draw(prompts: list[str]) -> list[Image.Image]:
        made = []
        for i in range(0, len(prompts), 8):
            generator = torch.Generator().manual_seed(i)
            made += dev(
                prompts[i : i + 8],
                height=128,
                width=128,
                guidance_scale=3.5,
                num_inference_steps=20,
                max_sequence_length=TEXT,
                generator=generator,
            ).images
        return made

    report["dev_captions_found_guidance_3.5"] = captions_found(draw, count)
    began = time.perf_counter()
    dev(
        "a red circle on a white background",
        height=128,
        width=128,
        num_inference_steps=20,
        max_sequence_length=TEXT,
    )
    report["seconds_one_picture_20_steps"] = time.perf_counter() - began
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
