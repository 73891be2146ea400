"""What a stage of Infinity can do: round trip, bits told right per scale, captions read out of drawn pictures, and a sheet."""

import itertools
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pentimento.infinity.quantizer import to_tokens
from pentimento.infinity.sampling import Sampling, Texts, draw
from pentimento.infinity.tokenizer import Tokenizer
from pentimento.infinity.transformer import InfinityTransformer
from pentimento.pocket import captions
from pentimento.pocket import scene as world
from pentimento.pocket.render import render

from . import bsq, saving
from .infinity import CONFIG, Words
from .reading import captions_found, drawn_scenes, psnr, to_pictures

SETTINGS = {
    "cfg 3, tau 0.5": Sampling(cfg=3.0, tau=0.5),
    "cfg 4, tau 0.5": Sampling(cfg=4.0, tau=0.5),
    "cfg 2, tau 0.5": Sampling(cfg=2.0, tau=0.5),
    "cfg 3, greedy": Sampling(cfg=3.0, tau=1.0, top_k=1),
}


class Artist:
    """Draws pictures of captions."""

    def __init__(self, folder: Path, text: Path, device: torch.device):
        self.device, self.words = device, Words(text, device)
        self.tokenizer: Tokenizer = bsq.load(folder, device)
        self.net = InfinityTransformer(CONFIG).to(device).eval().requires_grad_(False)
        self.net.load_state_dict(saving.load_part(folder, "infinity"))

    def draw(self, prompts: list[str], sampling: Sampling, seed: int = 0) -> Tensor:
        """Pictures (n, 3, 256, 256) in [0, 1] on the CPU."""
        generator = torch.Generator(self.device).manual_seed(seed)
        out = []
        for first in range(0, len(prompts), 32):
            text = self.words.text(self.words.table(prompts[first : first + 32]))
            made = draw(self.net, self.tokenizer.quantizer, Texts(text), bsq.SCHEDULE, sampling, generator)
            out.append((self.tokenizer.decode(made.z) / 2 + 0.5).cpu())
        return torch.cat(out)

    @torch.no_grad()
    def right(self, scenes: list[world.Scene]) -> list[float]:
        """Share of bits told right in each scale, teacher forced on the test scenes' own bits."""
        x = render(scenes, *bsq.SCHEDULE.pixels).to(self.device) * 2 - 1
        quantizer = self.tokenizer.quantizer
        levels = list(quantizer.levels(self.tokenizer.encode(x), bsq.SCHEDULE))
        inputs = quantizer.inputs([level.total for level in levels], bsq.SCHEDULE)
        text = self.words.text(self.words.table([captions.caption(s) for s in scenes]))
        logits = self.net(inputs, text, bsq.SCHEDULE)
        bits = torch.cat([to_tokens(level.bits) for level in levels], 1)
        good = ((logits[..., 1] > logits[..., 0]) == bits).float().mean((0, 2))
        return [round(good[start:end].mean().item(), 4) for start, end in bsq.SCHEDULE.spans]


def sheet(rows: list[Tensor]) -> Image.Image:
    """Rows of pictures (n, 3, H, W) in [0, 1], all of one size, as one picture."""
    return to_pictures(torch.cat([torch.cat(list(row), 2) for row in rows], 1)[None])[0]


def main(folder: Path, text: Path, out: Path, device: torch.device, count: int) -> None:
    artist = Artist(folder, text, device)
    x = bsq.test_pictures(max(16, 4 * count), device)
    y = bsq.round_trip(artist.tokenizer, x)
    report: dict[str, object] = {"round_trip": round(psnr(y, x).mean().item(), 3)}
    scenes = [world.draw(n) for n in itertools.islice(world.seeds("test"), 64)]
    report["bits_right_per_scale"] = artist.right(scenes)
    print(json.dumps(report), flush=True)
    some = [s for kind in ("portrait", "shapes") for s in drawn_scenes(kind, 8)]
    rows = [x[:16].cpu(), y[:16].cpu(), render(some, *bsq.SCHEDULE.pixels)]
    prompts = [captions.caption(s, 1 if s["kind"] == "shapes" else 0) for s in some]
    for name, sampling in SETTINGS.items():
        rows.append(artist.draw(prompts, sampling))
        sheet([row[: len(rows[-1])] for row in rows]).save(out / "preview.png")
        report[f"captions_found, {name}"] = captions_found(
            lambda p, s=sampling: to_pictures(artist.draw(p, s)), count
        )
        print(json.dumps(report), flush=True)
        (out / "infinity.json").write_text(json.dumps(report, indent=2) + "\n")
