"""Infinity's tokenizer for the drawn world: the autoencoder whose features are bits.

The decoder sees the sum of the quantised scales; the encoder gets its gradient as if nothing had been quantised (arXiv:1308.3432)
and is held near what the codes can say. L1 on pixels and on their gradients; squared error joins late, because PSNR is what
is accepted. The ``bsq-decoder`` stage goes on with the decoder alone, some bits wrong, as a transformer's are.

Shapes: B pictures (B, 3, 256, 256) in [-1, 1], features (B, d, 16, 16).
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pentimento.infinity.quantizer import RandomFlips
from pentimento.infinity.scales import Schedule
from pentimento.infinity.tokenizer import Tokenizer, TokenizerConfig
from pentimento.pocket import scene as world
from pentimento.pocket.render import render

from . import pools, saving
from .autoencoder import gradient_loss
from .optimise import Budget, optimise, prepare_torch
from .processes import Processes
from .reading import psnr

CONFIG = TokenizerConfig(width=16, channels=24, factors=(1, 2, 3, 3, 4), blocks=1, groups=4)
SCHEDULE = Schedule.of(1.0, "0.06M")
COMMITMENT = 0.25
WRONG = 0.1
"""Highest share of wrong bits in the decoder's stage."""
PEAKS = {"bsq": 2e-3, "bsq-decoder": 6e-4}


def load(folder: Path, device: torch.device) -> Tokenizer:
    """The tokenizer that an earlier stage left in ``folder``, frozen."""
    tokenizer = Tokenizer(CONFIG)
    tokenizer.load_state_dict(saving.load_part(folder, "bsq"))
    return tokenizer.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def features(tokenizer: Tokenizer, pictures: Tensor) -> Tensor:
    """Features (n, d, 16, 16) of uint8 pictures (n, 3, 256, 256)."""
    out = []
    for part in pictures.split(128):
        x = (part.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            out.append(tokenizer.encode(x))
    return torch.cat(out)


@torch.no_grad()
def round_trip(tokenizer: Tokenizer, pictures: Tensor) -> Tensor:
    """Pictures (n, 3, 256, 256) in [0, 1] through their bits."""
    out = []
    for x in pictures.split(32):
        *_, level = tokenizer.quantizer.levels(tokenizer.encode(x * 2 - 1), SCHEDULE)
        out.append(tokenizer.decode(level.total).float() / 2 + 0.5)
    return torch.cat(out)


def test_pictures(count: int, device: torch.device) -> Tensor:
    """Renders of held-out scenes, (count, 3, 256, 256) in [0, 1]."""
    scenes = [world.draw(n) for n in itertools.islice(world.seeds("test"), count)]
    return render(scenes, *SCHEDULE.pixels).to(device)


def take(drawn: Tensor, free: Tensor, batch: int) -> Tensor:
    """Renders, of eight one varied in colour, and of eight one procedural picture; all in [-1, 1]."""
    other = max(1, batch // 8)
    x = drawn[torch.randint(len(drawn), (batch - other,), device=drawn.device)].float() / 127.5 - 1
    y = free[torch.randint(len(free), (other,), device=free.device)].float() / 127.5 - 1
    x[:other] = pools.augment(x[:other])
    return torch.cat([x, pools.augment(y)]).contiguous(memory_format=torch.channels_last)


class GlobalDraws:
    """Numbers of torch's global generator for a batch of features, as ``RandomFlips`` asks for them."""

    def __init__(self, features: Tensor):
        self.features = features

    def uniform(self) -> Tensor:
        """(B,)"""
        return torch.rand(len(self.features), device=self.features.device)

    def uniform_like(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        return torch.rand(x.shape, device=self.features.device)


def losses(
    tokenizer: Tokenizer, batch: Callable[[], Tensor], decoder_only: bool, compiled: bool
) -> Callable[[float], tuple[str, Tensor]]:
    """The loss of a step, by the share of the time that is over."""
    encode, decode = tokenizer.encoder, tokenizer.decoder
    if compiled:
        encode, decode = torch.compile(encode), torch.compile(decode)

    def loss_of(progress: float) -> tuple[str, Tensor]:
        x = batch()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            f = encode(x).float()
            flips = RandomFlips(GlobalDraws(f), WRONG) if decoder_only else None
            with torch.no_grad():
                *_, level = tokenizer.quantizer.levels(f.detach(), SCHEDULE, flips)
            y = decode(f + (level.total - f).detach()).float()
        mse = F.mse_loss(y, x)
        loss = (y - x).abs().mean() + 0.5 * gradient_loss(y, x) + COMMITMENT * F.mse_loss(f, level.total)
        return "loss", loss + (4 * mse if decoder_only or progress > 0.3 else 0)

    return loss_of


def train(
    stage: str,
    out: Path,
    start: Path | None,
    budget: Budget,
) -> None:
    """``bsq`` starts from nothing, or from ``start``; ``bsq-decoder`` from ``start``."""
    opened = time.time()
    processes = Processes(budget.device)
    device, decoder_only = processes.device, stage == "bsq-decoder"
    prepare_torch()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(10 * budget.again + decoder_only)
    tokenizer = Tokenizer(CONFIG)
    if start:
        tokenizer.load_state_dict(saving.load_part(start, "bsq"))
    tokenizer.to(device, memory_format=torch.channels_last)
    tokenizer.encoder.requires_grad_(not decoder_only)
    torch.manual_seed(10 * budget.again + decoder_only + 1000 * processes.rank)
    first = 300_000_000 + 40_000_000 * (2 * budget.again + decoder_only) + 1_000_000_000 * processes.rank
    drawn = pools.singles(
        first, budget.pool, SCHEDULE.pixels, device, 14 if device.type == "cuda" else 2
    ).pictures[:, 0]
    free = pools.procedural(max(8, budget.pool // 6), SCHEDULE.pixels[0], device)
    print(f"pools took {time.time() - opened:.0f}s", flush=True)

    def save() -> None:
        saving.save_parts(out, {"bsq": tokenizer})

    loss_of = losses(
        tokenizer,
        lambda: take(drawn, free, budget.batch),
        decoder_only,
        device.type == "cuda" and not budget.eager,
    )
    optimise(
        tokenizer, loss_of, opened + budget.seconds, budget.peak or PEAKS[stage], budget.muon, processes, save
    )
    if processes.rank == 0:
        save()
        tokenizer.eval()
        x = test_pictures(200 if device.type == "cuda" else 4, device)
        print(
            f"round trip on test scenes: {psnr(round_trip(tokenizer, x), x).mean().item():.2f} dB", flush=True
        )
    if processes.count > 1:
        dist.destroy_process_group()
