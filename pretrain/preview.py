"""A look at a stage's network: drawn captions, filled masks and diptychs beside the truth, with a few numbers."""

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

from pentimento.pocket import captions, readout, tasks
from pentimento.pocket import scene as world
from pentimento.pocket.render import render

from . import saving
from .flux import CLIP_TOKENS, Batch, Codec, Network, mask_tokens, pack


class Artist:
    """Samples a network with plain Euler steps on FLUX's shifted schedule."""

    def __init__(self, folder: Path, tokenizers: Path, device: torch.device):
        self.device, self.codec = device, Codec(folder, device)
        self.t5 = T5TokenizerFast.from_pretrained(str(tokenizers / "tokenizer_2"))
        self.clip = CLIPTokenizer.from_pretrained(str(tokenizers / "tokenizer"))
        self.net = Network(len(self.t5), len(self.clip)).to(device).eval()
        self.net.load_state_dict(saving.load_part(folder, "net"))

    @torch.no_grad()
    def fill(
        self,
        x: Tensor,
        mask: Tensor,
        prompts: list[str],
        guidance: float,
        length: int,
        steps: int = 20,
        seed: int = 0,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]; ``mask`` (B, 1, H, W) is 1 where to draw."""
        n, _, height, width = x.shape
        t5 = self.t5(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        clip = self.clip(
            prompts, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        condition = torch.cat([pack(self.codec.encode(x * (1 - mask))), mask_tokens(mask)], 2)
        grid = (height // 16, width // 16)
        batch = Batch(condition[..., :64], condition, grid, t5.to(self.device), clip.to(self.device))
        mu = 0.5 + (grid[0] * grid[1] - 256) / (4096 - 256) * (1.15 - 0.5)
        t = torch.linspace(1, 1 / steps, steps)
        sigmas = [*(math.exp(mu) / (math.exp(mu) + 1 / t - 1)).tolist(), 0.0]
        latents = torch.randn(n, grid[0] * grid[1], 64, generator=torch.Generator().manual_seed(seed)).to(
            self.device
        )
        text, g = self.net.text(batch), torch.full((n,), guidance, device=self.device)
        for sigma, following in itertools.pairwise(sigmas):
            v = self.net(latents, torch.full((n,), sigma, device=self.device), batch, g, text)
            latents = latents + (following - sigma) * v
        z = latents.view(n, *grid, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, 16, height // 8, width // 8)
        return self.codec.vae.decode(z / self.codec.scale + self.codec.shift).sample.clamp(-1, 1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    return -10 * torch.log10(((a - b) / 2).pow(2).mean((1, 2, 3)).clamp(min=1e-6))


def tile(rows: list[Tensor]) -> Image.Image:
    """Rows of pictures (n, 3, H, W) in [-1, 1], all of one size, as one picture."""
    picture = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    return Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().cpu().numpy())


def diptychs(artist: "Artist", count: int, guidance: tuple[float, ...], device: torch.device) -> list[Tensor]:
    """Rows of sources and results of some edits; prints how many succeeded."""
    rows = []
    chosen = [
        c
        for name in ("add-glasses", "recolour-hair", "background", "remove", "smile", "replace")
        for c in itertools.islice(tasks.cases(name, "dev"), max(2, count // 6))
    ]
    left, right = (
        render([getattr(c, side) for c in chosen]).to(device) * 2 - 1 for side in ("source", "target")
    )
    prompts = [
        f"a diptych of the same scene. on the left, {c.source_prompt}. on the right, {c.target_prompt}"
        for c in chosen
    ]
    mask = torch.zeros(len(chosen), 1, 128, 256, device=device)
    mask[..., 128:] = 1
    for g in guidance:
        made = artist.fill(torch.cat([left, torch.zeros_like(left)], 3), mask, prompts, g, 128)
        good = [
            readout.judge((made[i, :, :, 128:].cpu() + 1) / 2, c.source, c.target, c.wanted)
            for i, c in enumerate(chosen)
        ]
        print(
            f"diptychs at guidance {g}: left half {psnr(made[..., :128], left).mean().item():.2f} dB, success {sum(r.success for r in good) / len(good):.2f}, "
            f"kept {sum(r.kept for r in good) / len(good):.3f}, background {sum(r.background for r in good) / len(good):.2f} dB"
        )
        step = max(1, len(chosen) // 12)
        rows += [left[::step][:12], made[::step][:12, :, :, 128:]]
    return rows


def main(
    folder: Path,
    tokenizers: Path,
    out: Path,
    device: torch.device,
    count: int = 64,
    guidance: tuple[float, ...] = (3.5,),
) -> None:
    artist = Artist(folder, tokenizers, device)
    scenes = [s | {"style": 0} for s in (world.draw(n) for n in itertools.islice(world.seeds("test"), count))]
    truth = render(scenes).to(device) * 2 - 1
    print(
        "round trip",
        psnr(
            artist.codec.vae.decode(artist.codec.vae.encode(truth).latent_dist.mean).sample.clamp(-1, 1),
            truth,
        )
        .mean()
        .item(),
    )
    rows = [truth[:12]]
    everything = torch.ones(count, 1, 128, 128, device=device)
    for g in guidance:
        drawn = artist.fill(torch.zeros_like(truth), everything, [captions.caption(s) for s in scenes], g, 64)
        rows.append(drawn[:12])
        print(f"drawn at guidance {g}:", attributes_found(drawn, scenes))
    hole = torch.zeros_like(everything)
    hole[..., 40:100, 30:110] = 1
    filled = artist.fill(truth, hole, [captions.caption(s) for s in scenes], 3.5, 64)
    outside = (((filled - truth) / 2) ** 2 * (1 - F.max_pool2d(hole, 5, 1, 2))).sum((1, 2, 3)) / (
        3 * (1 - F.max_pool2d(hole, 5, 1, 2))
    ).sum((1, 2, 3))
    print("filled: PSNR outside", (-10 * torch.log10(outside)).mean().item())
    rows += [truth[:12] * (1 - hole[:12]), filled[:12]]
    rows += diptychs(artist, count, guidance, device)
    tile(rows).save(out / "preview.png")


def attributes_found(drawn: Tensor, scenes: list[world.Scene]) -> dict[str, float]:
    """Mean colours against the truth at places that the caption decides; a coarse stand-in for the read-out."""
    corner = (drawn[:, :, 2:6, 2:6].mean((2, 3)) + 1) / 2
    palette = torch.tensor(list(world.COLOURS.values()), device=drawn.device) / 255
    rows = [i for i, s in enumerate(scenes) if s["kind"] != "disc" and s["texture"] == 0]
    near = torch.cdist(corner[rows], palette).argmin(1).tolist()
    return {"background": sum(near[j] == scenes[i]["bg"] for j, i in enumerate(rows)) / len(rows)}
