"""Infinity's transformer for the drawn world: teacher forced on the bits of renders, with bitwise self-correction.

Pictures are encoded once; a step draws features, turns random bits over and asks for the bits that make good for it. The text
encoder is that of the pocket FLUX models, frozen.

Shapes: B pictures, S text tokens, L picture tokens, d bits; features (B, d, 16, 16).
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor, nn
from transformers import T5EncoderModel

from pentimento.infinity.quantizer import RandomFlips, to_tokens
from pentimento.infinity.transformer import (
    InfinityTransformer,
    Text,
    TransformerConfig,
    bit_cross_entropy,
)

from . import bsq, pools, saving
from .optimise import Budget, optimise, prepare_torch
from .processes import Processes

CONFIG = TransformerConfig(
    width=192, heads=6, hidden=768, chunks=(7, 1), bits=16, text_width=192, text_length=96, text_heads=1
)
STRENGTH = 0.3
"""Highest share of bits turned over."""
DROPPED = 0.1
"""Share of captions that are dropped."""
SHAPES = 0.5
"""Share of scenes that surely have shapes, whose captions are the harder ones."""
PEAK = 2e-3


@torch.no_grad()
def initialise(model: InfinityTransformer) -> None:
    """Infinity's initial weights, for training from nothing."""
    config = model.config
    std = math.sqrt(1 / config.width / 3)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear | nn.Embedding) and name == "weight":
                nn.init.trunc_normal_(p, std=std)
            elif isinstance(module, nn.Linear) and name == "bias":
                p.zero_()
    for p in (model.pos_start, model.text_proj_for_sos.ca.mat_q):
        nn.init.trunc_normal_(p, std=std)
    generator = torch.Generator().manual_seed(0)
    rows = nn.init.trunc_normal_(torch.empty(model.cfg_uncond.shape), std=1.2, generator=generator)
    model.cfg_uncond.copy_(rows / math.sqrt(config.text_width))
    model.head_nm.ada_lin[1].weight.mul_(1e-3)
    model.head.weight.mul_(0.02)
    for block in model.blocks:
        for linear in (block.sa.proj, block.ca.proj, block.ffn.fc2):
            linear.weight.div_(math.sqrt(2 * config.depth))
        block.ada_gss.normal_(std=config.width**-0.5)
        block.ada_gss[:, :, 2:].mul_(1e-3)
        block.ada_gss[:, :, :2].mul_(5e-6)


class Words:
    """Texts as token tables, and their features."""

    def __init__(self, folder: Path, device: torch.device):
        """``folder``: one with ``tokenizer_2`` and ``text_encoder_2``, as the pocket FLUX models have."""
        self.device = device
        self.tokenizer = TextTokenizer.from_file(str(folder / "tokenizer_2" / "tokenizer.json"))
        encoder = T5EncoderModel.from_pretrained(str(folder / "text_encoder_2")).float()
        self.encoder = encoder.to(device).eval().requires_grad_(False)

    def table(self, texts: list[str]) -> Tensor:
        """Token numbers (n, S) of texts, zeros behind the end, int16."""
        rows = [e.ids for e in self.tokenizer.encode_batch(texts)]
        table = torch.zeros(len(rows), CONFIG.text_length, dtype=torch.int16)
        for row, ids in zip(table, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids[: len(row)])
        return table.to(self.device)

    @torch.no_grad()
    def text(self, table: Tensor) -> Text:
        """Features of rows of a table."""
        ids, mask = table.long(), table > 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            states = self.encoder(ids, attention_mask=mask).last_hidden_state
        return Text(states.float(), mask)


class World:
    """Features of a pool of renders and the tokens of their captions."""

    def __init__(self, folder: Path, words: Words, size: int, first: int):
        device = words.device
        tokenizer = bsq.load(folder, device)
        self.quantizer, self.words = tokenizer.quantizer, words
        workers = 14 if device.type == "cuda" else 2
        pool = pools.singles(first, size, bsq.SCHEDULE.pixels, device, workers, SHAPES)
        self.features = bsq.features(tokenizer, pool.pictures[:, 0])
        variants = len(pool.texts[0])
        self.tokens = words.table([t for row in pool.texts for t in row]).view(len(pool.texts), variants, -1)

    def batch(self, n: int) -> tuple[Tensor, Text]:
        """Features and text of random rows."""
        rows = torch.randint(len(self.features), (n,), device=self.features.device)
        which = torch.randint(self.tokens.shape[1], (n,), device=rows.device)
        return self.features[rows], self.words.text(self.tokens[rows, which])


def dropped(net: InfinityTransformer, text: Text) -> Text:
    """Some rows without text, of random lengths so that every row that stands for no text is learnt."""
    assert text.mask is not None
    n, length = text.mask.shape
    gone = torch.rand(n, 1, device=text.mask.device) < DROPPED
    lengths = torch.randint(1, length + 1, (n, 1), device=text.mask.device)
    mask = torch.where(gone, torch.arange(length, device=text.mask.device) < lengths, text.mask)
    return Text(torch.where(gone[:, :, None], net.without_text(text).features, text.features), mask)


def losses(net: InfinityTransformer, world: World, batch: int) -> Callable[[float], tuple[str, Tensor]]:
    """The loss of a step: of every bit, scales weighted by their side."""
    weights = bsq.SCHEDULE.weights().to(world.features.device)

    def loss_of(progress: float) -> tuple[str, Tensor]:
        features, text = world.batch(batch)
        with torch.no_grad():
            flips = RandomFlips(bsq.GlobalDraws(features), STRENGTH)
            levels = list(world.quantizer.levels(features, bsq.SCHEDULE, flips))
            inputs = world.quantizer.inputs([level.total for level in levels], bsq.SCHEDULE)
            bits = torch.cat([to_tokens(level.bits) for level in levels], 1)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=features.is_cuda):
            logits = net(inputs, dropped(net, text), bsq.SCHEDULE)
        return "bits", (bit_cross_entropy(logits, bits) * weights).sum(1).mean()

    return loss_of


def run(
    out: Path,
    start: Path,
    text: Path,
    budget: Budget,
) -> None:
    """Train from nothing, or on from what ``start`` holds."""
    opened = time.time()
    processes = Processes(budget.device)
    device = processes.device
    prepare_torch()
    torch.manual_seed(budget.again)
    net = InfinityTransformer(CONFIG)
    initialise(net)
    if list(start.glob("infinity-*.safetensors")):
        net.load_state_dict(saving.load_part(start, "infinity"))
    net.to(device)
    torch.manual_seed(1 + budget.again + 1000 * processes.rank)
    world = World(
        start,
        Words(text, device),
        budget.pool,
        600_000_000 + 40_000_000 * budget.again + 1_000_000_000 * processes.rank,
    )
    longest = int((world.tokens > 0).sum(-1).max())
    print(f"pools took {time.time() - opened:.0f}s; longest text {longest} tokens", flush=True)
    if device.type == "cuda" and not budget.eager:
        for block in net.blocks:
            block.compile()
    tokenizer = saving.load_part(start, "bsq")

    def save() -> None:
        saving.save_parts(out, {"infinity": net, "bsq": tokenizer})

    optimise(
        net,
        losses(net, world, budget.batch),
        opened + budget.seconds,
        budget.peak or PEAK,
        budget.muon,
        processes,
        save,
    )
    if processes.rank == 0:
        save()
    if processes.count > 1:
        dist.destroy_process_group()


def export(start: Path, out: Path) -> None:
    """The shipped folder: weights in bf16 under the published names, and their sizes."""
    parts: dict[str, nn.Module] = {
        "infinity_reg": InfinityTransformer(CONFIG),
        "infinity_vae_d16reg": bsq.Tokenizer(bsq.CONFIG),
    }
    for (name, part), held in zip(parts.items(), ("infinity", "bsq"), strict=True):
        part.load_state_dict(saving.load_part(start, held))
        state = {
            key: (value.bfloat16() if value.is_floating_point() else value).contiguous().clone()
            for key, value in part.state_dict().items()
        }
        save_file(state, out / f"{name}.safetensors", {"format": "pt"})
    config = {"size": "0.06M", "groups": bsq.CONFIG.groups, "text_encoder": "pocket"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print({path.name: path.stat().st_size for path in out.iterdir()})
