"""Stage 1: the autoencoder, on renders and procedural pictures; and a last stage for its decoder alone.

L1 on pixels and on their gradients with a light KL term; squared error joins late, because PSNR is what is accepted.
The ``decoder`` stage teaches the decoder to forgive latents that are a little off, as a transformer's are: noise of up to
``FORGIVEN`` on latents of unit variance. The encoder stays, so the transformer's latents keep their meaning.
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from . import models, pools, saving
from .optimise import Average, learning_rate

FORGIVEN = 0.1


def gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


def take(drawn: Tensor, free: Tensor, batch: int) -> Tensor:
    """Five renders to three procedural pictures, in [-1, 1], varied."""
    x = torch.cat(
        [
            drawn[torch.randint(len(drawn), (batch * 5 // 8,))],
            free[torch.randint(len(free), (batch * 3 // 8,))],
        ]
    )
    return pools.augment(x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def losses(
    x: Tensor, y: Tensor, mean: Tensor, logvar: Tensor, *, late: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimised, and of it the KL term and the squared error, which joins late."""
    kl = 0.5 * (mean.float() ** 2 + logvar.exp() - 1 - logvar).mean()
    mse = F.mse_loss(y, x)
    loss = (y - x).abs().mean() + 0.5 * gradient_loss(y, x) + (4 * mse if late else 0) + 2e-4 * kl
    return loss, kl, mse


@torch.no_grad()
def measure(vae: AutoencoderKL, drawn: Tensor) -> tuple[dict[str, float], list[float]]:
    """Shift and scale that give latents unit variance, and their deviation in each channel."""
    means = torch.cat(
        [
            vae.encoder(drawn[i : i + 128].float() / 127.5 - 1).chunk(2, 1)[0]
            for i in range(0, min(2048, len(drawn)), 128)
        ]
    )
    spread = [round(s, 2) for s in means.std((0, 2, 3)).tolist()]
    return {"shift_factor": means.mean().item(), "scaling_factor": 1 / means.std().item()}, spread


def train(
    out: Path,
    seconds: float,
    batch: int,
    pool: int,
    device: torch.device,
    start: Path | None = None,
    decoder_only: bool = False,
) -> None:
    torch.manual_seed(int(decoder_only))
    cuda = device.type == "cuda"
    drawn = pools.singles(0, pool, (128, 128), device, 14 if cuda else 2).pictures[:, 0]
    free = pools.procedural(max(256, pool // 3), 128, device)
    print(f"pool of {len(drawn)} renders and {len(free)} procedural pictures", flush=True)
    vae = models.autoencoder().to(device, memory_format=torch.channels_last)
    if start:
        vae.load_state_dict(saving.load_part(start, "vae"))
    params = list((vae.decoder if decoder_only else vae).parameters())
    vae.encoder.requires_grad_(not decoder_only)
    factors = json.loads((start / "vae.json").read_text()) if start and decoder_only else {}
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4, fused=cuda)
    average = Average(params)
    encode, decode = (torch.compile(part) if cuda else part for part in (vae.encoder, vae.decoder))
    began, step, psnr = None, 0, 0.0
    while began is None or time.time() - began < seconds:
        progress = 0.0 if began is None else (time.time() - began) / seconds
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(1.2e-3 if start is None else 4e-4, progress, step)
        x = take(drawn, free, batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            mean, logvar = encode(x).chunk(2, 1)
            logvar = logvar.float().clamp(-20, 10)
            if decoder_only:
                amount = FORGIVEN / factors["scaling_factor"] * torch.rand(len(x), 1, 1, 1, device=device)
            else:
                amount = torch.exp(0.5 * logvar)
            z = mean.float() + torch.randn_like(logvar) * amount
            y = decode(z.to(mean.dtype)).float()
        loss, kl, mse = losses(x, y, mean, logvar, late=progress > 0.3)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        average.update()
        step += 1
        if step == 10:
            began = time.time()
        if step % 500 == 0:
            psnr = -10 * torch.log10(mse / 4).item()
            print(
                f"vae {step} {time.time() - (began or 0):.0f}s loss {loss.item():.4f} kl {kl.item():.3f} psnr {psnr:.2f}",
                flush=True,
            )
    average.swap()
    saving.save_parts(out, {"vae": vae})
    if not decoder_only:
        factors, spread = measure(vae, drawn)
        print(f"vae: {step} steps, {factors}, std per channel {spread}", flush=True)
    (out / "vae.json").write_text(json.dumps(factors))
