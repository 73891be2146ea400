"""Stages 2 to 4: the Fill transformer with its text encoders, then guidance distillation.

One network learns three kinds of batch from the start: pictures drawn from a caption (everything masked), pictures with
a part masked, and diptychs whose right half is masked. The last differ in one attribute and carry two descriptions, never
an instruction. ``pocket-dev`` is the same network with the condition of the first kind folded into a bias.

Shapes: B batch, T picture tokens, S text tokens; latents packed (B, T, 64), condition (B, T, 64), mask (B, T, 256).
"""

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5TokenizerFast

from . import models, pools, saving
from .optimise import Budget, optimise, prepare_torch
from .processes import Processes

CLIP_TOKENS = 72
GUIDANCE = (1.0, 50.0)
TEACHER_SCALE = 3.0
FIRST_SCENE = {"base": 0, "fill": 100_000_000, "distil": 200_000_000}
SHARES = {
    "base": (0.6, 0.15, 0.23, 0.02),
    "fill": (0.36, 0.14, 0.48, 0.02),
    "distil": (0.4, 0.13, 0.45, 0.02),
}
"""Of the kinds of batch: drawn, filled, diptychs, with long texts."""
PEAKS = {"base": 1e-3, "fill": 7e-4, "distil": 4e-4}
"""Learning rates."""
DIFFERS = 0.15
"""Root mean square difference of latents above which a token of a pair counts as changed."""


@dataclass
class Batch:
    x0: Tensor
    condition: Tensor
    """Packed condition and mask, (B, T, 320)."""
    grid: tuple[int, int]
    """Rows and columns of picture tokens."""
    t5: Tensor
    clip: Tensor
    weight: Tensor | None = None
    """Of each token in the loss, (B, T, 1)."""


def pack(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def mask_tokens(mask: Tensor) -> Tensor:
    """Masks (B, 1, H, W) as 256 channels per token, as FluxFillPipeline packs them."""
    b, _, h, w = mask.shape
    cells = mask.view(b, h // 8, 8, w // 8, 8).permute(0, 2, 4, 1, 3).reshape(b, 64, h // 8, w // 8)
    return pack(cells)


class Codec:
    """The frozen autoencoder, with its shift and scale."""

    def __init__(self, folder: Path, device: torch.device):
        self.vae = models.autoencoder()
        self.vae.load_state_dict(saving.load_part(folder, "vae"))
        self.vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        factors = json.loads((folder / "vae.json").read_text())
        self.shift, self.scale = factors["shift_factor"], factors["scaling_factor"]
        self.device = device

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, 16, h, w) of pictures in [-1, 1]."""
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean = self.vae.encoder(x).chunk(2, 1)[0]
        return (mean.float() - self.shift) * self.scale

    def encode_bytes(self, x: Tensor) -> Tensor:
        return torch.cat([self.encode(part.float() / 127.5 - 1).bfloat16() for part in x.split(256)])


class Words:
    """Texts of a pool as token tables; rows are padded to the longest."""

    def __init__(
        self, texts: list[tuple[str, ...]], t5: T5TokenizerFast, clip: CLIPTokenizer, device: torch.device
    ):
        flat = [t for row in texts for t in row]
        self.variants = len(texts[0])
        ids = t5(flat, padding="longest").input_ids
        self.t5 = torch.tensor(ids, dtype=torch.int16, device=device).view(len(texts), self.variants, -1)
        ids = clip(flat, padding="max_length", max_length=CLIP_TOKENS, truncation=True).input_ids
        self.clip = torch.tensor(ids, dtype=torch.int16, device=device).view(len(texts), self.variants, -1)

    def take(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        which = torch.randint(self.variants, (len(rows),), device=rows.device)
        t5 = self.t5[rows, which].long()
        return F.pad(t5, (0, length - t5.shape[1])) if length >= t5.shape[1] else t5[:, :length], self.clip[
            rows, which
        ].long()


class World:
    """All pools in device memory, and the three kinds of batch."""

    def __init__(self, codec: Codec, tokenizers: Path, size: int, first: int, device: torch.device):
        self.codec, self.device = codec, device
        self.t5_tokenizer = T5TokenizerFast.from_pretrained(str(tokenizers / "tokenizer_2"))
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(str(tokenizers / "tokenizer"))
        words = lambda pool: Words(pool.texts, self.t5_tokenizer, self.clip_tokenizer, device)  # noqa: E731
        workers = 14 if device.type == "cuda" else 2
        self.singles, self.pairs = [], []
        shapes = (
            (1.0, (128, 128)),
            (0.12, (128, 96)),
            (0.12, (96, 128)),
            (0.06, (128, 80)),
            (0.06, (80, 128)),
        )
        for i, (share, shape) in enumerate(shapes):
            pool = pools.singles(first + i * 3_000_000, max(40, int(size * share)), shape, device, workers)
            pictures = pool.pictures[:, 0]
            self.singles.append((share, pictures, codec.encode_bytes(pictures), words(pool)))
        for i, (share, shape) in enumerate(((1.0, (128, 128)), (0.15, (128, 96)), (0.15, (96, 128)))):
            pool = pools.pairs(
                first + 20_000_000 + i * 3_000_000, max(40, int(size * 0.7 * share)), shape, device, workers
            )
            canvas = pool.pictures.permute(0, 2, 3, 1, 4).flatten(3)
            self.pairs.append(
                (share, canvas, codec.encode_bytes(canvas), self._half_hidden(canvas), words(pool))
            )
        self.free = pools.procedural(max(64, size // 8), 128, device)
        self.empty = (
            torch.tensor(self.t5_tokenizer("").input_ids, device=device),
            torch.tensor(
                self.clip_tokenizer("", padding="max_length", max_length=CLIP_TOKENS).input_ids, device=device
            ),
        )
        self.grey: dict[tuple[int, int], Tensor] = {}

    def _half_hidden(self, canvas: Tensor) -> Tensor:
        """Latents of the canvases with the right half grey."""
        out = []
        for part in canvas.split(256):
            x = part.float() / 127.5 - 1
            x[..., x.shape[3] // 2 :] = 0
            out.append(self.codec.encode(x).bfloat16())
        return torch.cat(out)

    def drop(self, t5: Tensor, clip: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Empty captions for a share of the rows."""
        gone = (torch.rand(len(t5), device=self.device) < share)[:, None]
        nothing = F.pad(self.empty[0], (0, t5.shape[1] - len(self.empty[0])))
        return torch.where(gone, nothing, t5), torch.where(gone, self.empty[1], clip)

    def grey_condition(self, height: int, width: int) -> Tensor:
        """Latents of a grey picture (1, 16, h, w), the masked image of a drawn-from-nothing batch."""
        if (height, width) not in self.grey:
            self.grey[height, width] = self.codec.encode(torch.zeros(1, 3, height, width, device=self.device))
        return self.grey[height, width]

    def draw(self, n: int) -> Batch:
        _, pictures, latents, words = random.choices(self.singles, [s[0] for s in self.singles])[0]
        rows = torch.randint(len(latents), (n,), device=self.device)
        height, width = pictures.shape[2:]
        x0 = latents[rows].float()
        grey = self.grey_condition(height, width).expand_as(x0)
        # pocket-dev folds one constant into a bias, so half of the rows see the centre's value everywhere.
        flat = grey[:, :, height // 16, width // 16][:, :, None, None].expand_as(x0)
        grey = torch.where(torch.rand(n, 1, 1, 1, device=self.device) < 0.5, grey, flat)
        mask = torch.ones(n, 1, height, width, device=self.device)
        t5, clip = self.drop(*words.take(rows, random.choices((64, 96, 160), (0.7, 0.2, 0.1))[0]), 0.1)
        return Batch(
            pack(x0), torch.cat([pack(grey), mask_tokens(mask)], 2), (height // 16, width // 16), t5, clip
        )

    def fill(self, n: int) -> Batch:
        _, pictures, _, words = random.choices(self.singles, [s[0] for s in self.singles])[0]
        rows = torch.randint(len(pictures), (n,), device=self.device)
        height, width = pictures.shape[2:]
        x = pictures[rows].float() / 127.5 - 1
        t5, clip = self.drop(*words.take(rows, 64), 0.15)
        if (height, width) == (128, 128):
            other = n // 4
            free = self.free[torch.randint(len(self.free), (other,), device=self.device)]
            x[:other] = pools.augment(free.float() / 127.5 - 1)
            t5[:other], clip[:other] = (
                F.pad(self.empty[0], (0, t5.shape[1] - len(self.empty[0]))),
                self.empty[1],
            )
        mask = pools.random_masks(n, height, width, self.device)
        latents = self.codec.encode(torch.cat([x, x * (1 - mask)]))
        condition = torch.cat([pack(latents[n:]), mask_tokens(mask)], 2)
        return Batch(pack(latents[:n]), condition, (height // 16, width // 16), t5, clip)

    def pair(self, n: int) -> Batch:
        _, canvas, latents, hidden, words = random.choices(self.pairs, [p[0] for p in self.pairs])[0]
        rows = torch.randint(len(latents), (n,), device=self.device)
        height, width = canvas.shape[2:]
        mask = torch.zeros(n, 1, height, width, device=self.device)
        mask[..., width // 2 :] = 1
        t5, clip = self.drop(*words.take(rows, random.choices((128, 192), (0.9, 0.1))[0]), 0.1)
        condition = torch.cat([pack(hidden[rows].float()), mask_tokens(mask)], 2)
        x0, grid = pack(latents[rows].float()), (height // 16, width // 16)
        # What differs is a small part of most pairs and would be learnt last: it counts four times.
        left, right = x0.view(n, *grid, 64).chunk(2, 2)
        weight = 1 + 3 * ((left - right).pow(2).mean(3) > DIFFERS**2).float()
        weight = torch.cat([torch.ones_like(weight), weight], 2).view(n, -1, 1)
        return Batch(x0, condition, grid, t5, clip, weight)

    def long_text(self, n: int) -> Batch:
        """Stock pipelines pad to 512 tokens unless told otherwise: seen now and then, so that it does no harm."""
        batch = self.draw(max(8, n // 5))
        batch.t5 = F.pad(batch.t5, (0, 512 - batch.t5.shape[1]))
        return batch


class Network(nn.Module):
    """The transformer and its text encoders."""

    def __init__(self, vocab_t5: int, vocab_clip: int):
        super().__init__()
        self.transformer, self.t5, self.clip = (
            models.transformer(),
            models.t5(vocab_t5),
            models.clip(vocab_clip),
        )

    def text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        # CLIP is causal and pooled at the first end token, so 72 of its 77 positions give the same vector.
        return self.t5(batch.t5).last_hidden_state, self.clip(batch.clip).pooler_output

    def forward(
        self, x_t: Tensor, sigma: Tensor, batch: Batch, guidance: Tensor, text: tuple[Tensor, Tensor]
    ) -> Tensor:
        ids = torch.zeros(*batch.grid, 3, device=x_t.device)
        ids[..., 1] = torch.arange(batch.grid[0], device=x_t.device)[:, None]
        ids[..., 2] = torch.arange(batch.grid[1], device=x_t.device)[None]
        return self.transformer(
            hidden_states=torch.cat([x_t, batch.condition], 2), timestep=sigma, guidance=guidance,
            encoder_hidden_states=text[0], pooled_projections=text[1], txt_ids=torch.zeros(text[0].shape[1], 3, device=x_t.device),
            img_ids=ids.view(-1, 3), return_dict=False,
        )[0]  # fmt: skip


def sample_sigma(n: int, device: torch.device) -> Tensor:
    """Logit-normal times, a fifth uniform so that the ends are seen too."""
    normal = torch.sigmoid(torch.randn(n, device=device) + 0.2)
    return torch.where(torch.rand(n, device=device) < 0.2, torch.rand(n, device=device), normal).clamp(
        1e-3, 1
    )


def sample_guidance(n: int, device: torch.device) -> Tensor:
    low, high = (math.log(g) for g in GUIDANCE)
    return torch.exp(torch.rand(n, device=device) * (high - low) + low)


def effective_scale(guidance: Tensor) -> Tensor:
    """Classifier-free guidance that a guidance input stands for: 1 at 1, ``TEACHER_SCALE`` at 50, linear in the logarithm."""
    return 1 + (TEACHER_SCALE - 1) * torch.log(guidance) / math.log(GUIDANCE[1])


def flow_loss(net: Network, batch: Batch, guidance: float | None = None) -> Tensor:
    """Flow matching; the guidance input is random where it has no meaning yet."""
    n, device = len(batch.x0), batch.x0.device
    sigma, noise = sample_sigma(n, device), torch.randn_like(batch.x0)
    x_t = torch.lerp(batch.x0, noise, sigma.view(-1, 1, 1))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        g = sample_guidance(n, device) if guidance is None else torch.full((n,), guidance, device=device)
        v = net(x_t, sigma, batch, g, net.text(batch))
    error = (v.float() - (noise - batch.x0)).pow(2)
    return (error if batch.weight is None else error * batch.weight).mean()


def distillation_loss(net: Network, teacher: Network, world: World, batch: Batch) -> Tensor:
    n, device = len(batch.x0), batch.x0.device
    sigma, noise, guidance = sample_sigma(n, device), torch.randn_like(batch.x0), sample_guidance(n, device)
    x_t = torch.lerp(batch.x0, noise, sigma.view(-1, 1, 1))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        with torch.no_grad():
            text = teacher.text(batch)
            t5, clip = world.drop(batch.t5, batch.clip, 2.0)
            nothing = teacher.text(Batch(batch.x0, batch.condition, batch.grid, t5, clip))
            v_text = teacher(x_t, sigma, batch, guidance, text).float()
            v_nothing = teacher(x_t, sigma, batch, guidance, nothing).float()
        v = net(x_t, sigma, batch, guidance, text)
    return F.mse_loss(v.float(), torch.lerp(v_nothing, v_text, effective_scale(guidance).view(-1, 1, 1)))


def teacher_of(net: Network, world: World) -> Network:
    """A frozen copy of the network, whose text encoders stay as they are from then on."""
    teacher = Network(len(world.t5_tokenizer), len(world.clip_tokenizer)).to(world.device)
    teacher.load_state_dict(net.state_dict())
    teacher.eval().requires_grad_(False)
    net.t5.requires_grad_(False)
    net.clip.requires_grad_(False)
    if world.device.type == "cuda":
        teacher.transformer.compile_repeated_blocks(dynamic=True)
    return teacher


def losses(
    net: Network, teacher: Network | None, world: World, shares: tuple[float, ...], batch: int
) -> Callable[[float], tuple[str, Tensor]]:
    """The loss of a step with the kind of its batch, drawn by ``shares``; with a teacher, that of distilling."""
    kinds = {"draw": world.draw, "fill": world.fill, "pair": world.pair, "long": world.long_text}
    sizes = {"draw": batch, "fill": batch, "pair": batch * 5 // 8, "long": batch}

    def loss_of(progress: float) -> tuple[str, Tensor]:
        name = random.choices(list(kinds), shares)[0]
        rows = kinds[name](sizes[name])
        if teacher is None:
            return name, flow_loss(net, rows)
        if random.random() < 0.3:  # guidance 1 is the data itself: go on learning from it
            return f"{name} data", flow_loss(net, rows, GUIDANCE[0])
        return name, distillation_loss(net, teacher, world, rows)

    return loss_of


def run(
    stage: str,
    out: Path,
    start: Path,
    tokenizers: Path,
    budget: Budget,
) -> None:
    """``base`` starts from nothing, ``fill`` continues it with more diptychs, ``distil`` gives the guidance its meaning."""
    processes = Processes(budget.device)
    device = processes.device
    seed = 10 * budget.again + {"base": 1, "fill": 2, "distil": 3}[stage]
    random.seed(f"{stage}{budget.again}")
    prepare_torch()
    opened = time.time()
    torch.manual_seed(seed + 1000 * processes.rank)
    codec = Codec(start, device)
    world = World(
        codec,
        tokenizers,
        budget.pool,
        FIRST_SCENE[stage] + 40_000_000 * budget.again + 1_000_000_000 * processes.rank,
        device,
    )
    print(
        f"pools took {time.time() - opened:.0f}s; longest texts {world.singles[0][3].t5.shape[2]}, {world.pairs[0][4].t5.shape[2]} tokens",
        flush=True,
    )
    torch.manual_seed(seed)
    net = Network(len(world.t5_tokenizer), len(world.clip_tokenizer)).to(device)
    torch.manual_seed(seed + 1000 * processes.rank)
    if stage != "base":
        net.load_state_dict(saving.load_part(start, "net"))
    teacher = teacher_of(net, world) if stage == "distil" else None
    if device.type == "cuda" and not budget.eager:
        net.transformer.compile_repeated_blocks(dynamic=True)

    def save() -> None:
        state = {key.replace("_orig_mod.", ""): value for key, value in net.state_dict().items()}
        saving.save_parts(out, {"net": state, "vae": codec.vae})
        (out / "vae.json").write_text(
            json.dumps({"shift_factor": codec.shift, "scaling_factor": codec.scale})
        )

    loss_of = losses(net, teacher, world, SHARES[stage], budget.batch)
    optimise(net, loss_of, opened + budget.seconds, budget.peak or PEAKS[stage], budget.muon, processes, save)
    if processes.rank == 0:
        save()
    if processes.count > 1:
        dist.destroy_process_group()
