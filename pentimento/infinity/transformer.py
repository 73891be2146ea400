"""Infinity's transformer: from text and the coarser scales to the bits of the next (arXiv:2412.04431).

Parameters are named as in the published ``infinity_2b_reg.pth``, so it loads as it is. Attention is torch's own: a scale sees
itself and the ones before, so one call per scale needs no mask.

Shapes: B pictures, L tokens (of all scales, or of the current one), K tokens seen, C channels, H heads, D channels per head,
S text tokens, d bits per token. The residual stream is float32, and so is all but the blocks' linear layers where these are
narrower.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .scales import Schedule

EPS = 1e-6
MAX_SCALE = math.log(100)
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
Span = tuple[int, int]
Watch = Callable[[Tensor], None]
"""Is given the cross attention (B, H, L, S) of a block, after the softmax."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes; the defaults are those of ``infinity_2b_reg``."""

    width: int = 2048
    heads: int = 16
    hidden: int = 8192
    """Width of the feed-forward layers."""
    chunks: tuple[int, int] = (8, 4)
    """Groups of blocks and blocks per group; only names depend on the grouping."""
    bits: int = 32
    """Bits per token, d."""
    text_width: int = 2048
    text_length: int = 512
    """Rows that stand for an absent text."""
    text_heads: int = 16
    """Of the pooling of the text."""
    scales: int = 15
    """Rows of the table of scale embeddings."""
    attention_bias: bool = True
    """Apply the learnt biases of queries and values, as the published base does; EditInfinity leaves them out."""

    @property
    def depth(self) -> int:
        return self.chunks[0] * self.chunks[1]


def rotations(positions: Tensor, head_width: int) -> Tensor:
    """Cosines and sines (2, L, D / 2) for rows and columns (L, 2): the first half turns by rows, the second by columns."""
    half = head_width // 2
    omega = 1.0 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half)
    angles = (positions[:, :, None] * omega).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels of (..., L, D) float32."""
    cos, sin = rotation
    if torch.compiler.is_compiling():  # which fuses everything but complex numbers
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    # As complex numbers: one pass over x instead of seven.
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


class Linear(nn.Linear):
    """Computes in the dtype of its weights, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Cache:
    """One block's keys and values: of the scales drawn so far, and of the text."""

    def __init__(self, tokens: int) -> None:
        """``tokens``: of all scales."""
        self.tokens, self._seen = tokens, 0
        self._past: tuple[Tensor, Tensor] | None = None
        self._text: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of a scale; all so far (B, H, K, D) come back."""
        if self._past is None:
            # Room for all at once: nothing is copied again with every scale.
            room = (*k.shape[:2], self.tokens, k.shape[3])
            self._past = k.new_empty(room), v.new_empty(room)
        start, self._seen = self._seen, self._seen + k.shape[2]
        for past, new in zip(self._past, (k, v), strict=True):
            past[:, :, start : self._seen] = new
        return self._past[0][:, :, : self._seen], self._past[1][:, :, : self._seen]

    def of_text(self, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, made once."""
        if self._text is None:
            self._text = make()
        return self._text


class Place(NamedTuple):
    """Where tokens are: what self-attention needs to know."""

    rotation: Tensor
    spans: Sequence[Span]
    """Of the scales within these tokens; the last of one call is the end."""
    cache: Cache | None = None
    cudnn: bool = False
    """Attend with cuDNN's kernels where they can."""


class SelfAttention(nn.Module):
    """Cosine attention with a learnt temperature per head; rotary positions after normalisation."""

    zero_k_bias: Tensor

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.width
        self.heads, self.biased = config.heads, config.attention_bias
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), math.log(4.0)))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        qkv = self.mat_qkv(x)
        if self.biased:
            qkv = qkv + torch.cat([self.q_bias, self.zero_k_bias, self.v_bias]).to(qkv.dtype)
        qkv = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        temperature = self.scale_mul_1H11.float().clamp(max=MAX_SCALE).exp()
        # Queries and keys in the same passes; only queries have a temperature.
        temperatures = torch.stack([temperature, torch.ones_like(temperature)])
        qk = F.normalize(qkv[:2].float(), dim=-1) * temperatures
        q, k = rotate(qk, place.rotation).to(qkv.dtype)
        v = qkv[2]
        if place.cache is not None:
            k, v = place.cache.extend(k, v)
        with sdpa_kernel(CUDNN_FIRST, set_priority=True) if place.cudnn else nullcontext():
            out = self._by_scales(q, k, v, place.spans)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _by_scales(self, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span]) -> Tensor:
        seen = k.shape[2] - q.shape[2]
        scales = list(zip(q.split([end - start for start, end in spans], 2), spans, strict=True))
        out: list[Tensor] = []
        for queries, (_, end) in reversed(scales):
            # A slice of the slice before: its gradient is as long as that one, not as long as all scales.
            k, v = k[:, :, : seen + end], v[:, :, : seen + end]
            out.insert(0, F.scaled_dot_product_attention(queries, k, v, scale=1.0))
        return torch.cat(out, 2)


class Text(NamedTuple):
    """Text features of a batch."""

    features: Tensor
    """(B, S, text_width) float32, rows padded to the longest."""
    mask: Tensor | None
    """(B, S) bool, true where there is text; ``None`` if no row is padded."""

    def to(self, device: torch.device) -> "Text":
        """The same on a device."""
        return Text(self.features.to(device), None if self.mask is None else self.mask.to(device))

    def known(self) -> Tensor:
        """The mask, also where no row is padded."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)


class _TextAttention(nn.Module):
    """What attention to text has in common: keys and values from one matrix, a bias for the values."""

    zero_k_bias: Tensor

    def __init__(self, config: TransformerConfig, inputs: int, heads: int):
        super().__init__()
        width = config.width
        self.heads, self.biased = heads, config.attention_bias
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_kv = Linear(inputs, 2 * width, bias=False)
        self.proj = Linear(width, width)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Both (B, H, S, D)."""
        kv = self.mat_kv(text)
        if self.biased:
            kv = kv + torch.cat([self.zero_k_bias, self.v_bias]).to(kv.dtype)
        k, v = kv.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        where = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(q.to(v.dtype), k, v, attn_mask=where)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(_TextAttention):
    def __init__(self, config: TransformerConfig):
        super().__init__(config, config.width, config.heads)
        self.mat_q = Linear(config.width, config.width)

    def forward(
        self, x: Tensor, text: Text, cache: Cache | None = None, watch: Watch | None = None
    ) -> Tensor:
        q = self.mat_q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        make = partial(self.keys_values, text.features)
        k, v = make() if cache is None else cache.of_text(make)
        if watch is not None:
            scores = (q.float() @ k.float().mT) / math.sqrt(q.shape[-1])
            if text.mask is not None:
                scores = scores.masked_fill(~text.mask[:, None, None], -math.inf)
            watch(scores.softmax(-1))
        return self.attend(q, k, v, text.mask)


class _Pooling(_TextAttention):
    """One learnt query."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config, config.text_width, config.text_heads)
        self.mat_q = nn.Parameter(torch.empty(1, config.text_heads, config.width // config.text_heads))

    def forward(self, text: Text) -> Tensor:
        k, v = self.keys_values(text.features)
        q = self.mat_q[:, :, None].expand(len(k), -1, -1, -1)
        return self.attend(q, k, v, text.mask)[:, 0].float()


class TextPooling(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.ca = _Pooling(config)

    def forward(self, text: Text) -> Tensor:
        return self.ca(text)


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.fc1 = Linear(config.width, config.hidden)
        self.fc2 = Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        # Weights of adapters are float32; with autocast they compute as narrow as the layers do.
        dtype = self.fc1.weight.dtype
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TextNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.weight


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalised, then scaled and shifted."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS) * (1 + scale) + shift


def drop_path(uniform: Tensor, rate: float) -> Tensor:
    """Factors (blocks, 2, B) of the two gated branches of every block, for random numbers (B, blocks, 2) in [0, 1).

    A branch is left out for a share of the pictures, which is made up for in the others. The share rises linearly from 0 in the
    first block to ``rate``, below 1, in the last (stochastic depth, arXiv:1603.09382).
    """
    rates = torch.linspace(0, rate, uniform.shape[1], device=uniform.device)[:, None]
    return ((uniform >= rates) / (1 - rates)).permute(1, 2, 0)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, config.width))
        self.sa, self.ca = SelfAttention(config), CrossAttention(config)
        self.ffn = FeedForward(config)
        self.ca_norm = nn.LayerNorm(config.width, eps=EPS)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Text,
        place: Place,
        watch: Watch | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """``modulation`` (B, 1, 6, C): gates, scales and shifts of self-attention and of the feed-forward layer.

        ``branches`` (2, B): what both are multiplied with besides, see ``drop_path``.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = (self.ada_gss + modulation).unbind(2)
        if branches is not None:
            gate1, gate2 = (
                gate * each[:, None, None] for gate, each in zip((gate1, gate2), branches, strict=True)
            )
        x = x + gate1 * self.sa(modulated(x, scale1, shift1), place)
        x = x + self.ca(self.ca_norm(x), text, place.cache, watch)
        return x + gate2 * self.ffn(modulated(x, scale2, shift2))


class Chunk(nn.Module):
    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.module = nn.ModuleList(blocks)


class HeadNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition).float()[:, None].chunk(2, 2)
        return modulated(x, scale, shift)


class Condition(NamedTuple):
    """What the text says, as the blocks use it."""

    pooled: Tensor
    """(B, C)"""
    modulation: Tensor
    """(B, 1, 6, C), for all blocks."""
    context: Text
    """Of width C, for cross attention."""


class InfinityTransformer(nn.Module):
    """The model; ``forward`` is teacher forcing, ``sampling.draw`` draws."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.checkpointing = 0.0
        """Share of the blocks, from the first on, that keep no activations for the backward pass."""
        self.cudnn = False
        """Attend with cuDNN's kernels in ``forward``: on Hopper twice as fast, after seconds of preparing for every length."""
        width = config.width
        self.cfg_uncond = nn.Parameter(torch.empty(config.text_length, config.text_width))
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.text_norm = TextNorm(config.text_width)
        self.text_proj_for_sos = TextPooling(config)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_width, width), nn.GELU("tanh"), nn.Linear(width, width)
        )
        self.lvl_embed = nn.Embedding(config.scales, width)
        self.word_embed = nn.Linear(config.bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        groups, size = config.chunks
        self.block_chunks = nn.ModuleList(Chunk([Block(config) for _ in range(size)]) for _ in range(groups))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, 2 * config.bits)

    @property
    def blocks(self) -> Iterator[Block]:
        """All blocks in order."""
        for chunk in self.block_chunks:
            yield from chunk.module  # type: ignore[misc]

    def condition(self, text: Text) -> Condition:
        """Encode the text once for all scales."""
        normal = text._replace(features=self.text_norm(text.features))
        pooled = self.text_proj_for_sos(normal)
        modulation = self.shared_ada_lin(pooled).float().unflatten(1, (1, 6, -1))
        return Condition(pooled, modulation, text._replace(features=self.text_proj_for_ca(normal.features)))

    def without_text(self, text: Text) -> Text:
        """As many rows as ``text`` has, but the ones that stand for no text; no more than there are of these."""
        rows = self.cfg_uncond[: text.features.shape[1]]
        mask = None if text.mask is None else text.mask[:, : len(rows)]
        return Text(rows.expand(len(text.features), -1, -1), mask)

    def embed(self, tokens: Tensor | None, condition: Condition, scale: int) -> Tensor:
        """The blocks' input (B, h * w, C) for one scale; ``tokens`` (B, h * w, d) are ``None`` for the first."""
        if tokens is None:
            x = condition.pooled[:, None] + self.pos_start
        else:
            x = self.word_embed(tokens).float()
        return x + self.lvl_embed.weight[scale]

    def rotation(self, schedule: Schedule) -> Tensor:
        """Rotary table (2, L, D / 2) of a schedule."""
        return _tables(schedule, self.config.width // self.config.heads, self.pos_start.device)[0]

    def logits(self, x: Tensor, condition: Condition) -> Tensor:
        """Of both values of every bit, (B, L, d, 2) float32."""
        return self.head(self.head_nm(x, condition.pooled)).float().unflatten(2, (-1, 2))

    def forward(
        self, inputs: Tensor, text: Text, schedule: Schedule, branches: Tensor | None = None
    ) -> Tensor:
        """Logits (B, L, d, 2) of all scales; ``inputs`` (B, L - 1, d) are what ``Quantizer.inputs`` gives.

        ``branches`` (blocks, 2, B): factors of the blocks' branches in training, see ``drop_path``.
        """
        condition = self.condition(text)
        start = condition.pooled[:, None] + self.pos_start
        x = torch.cat([start, self.word_embed(inputs).float()], 1)
        rotation, scale_of = _tables(schedule, self.config.width // self.config.heads, x.device)
        x = x + self.lvl_embed(scale_of)
        place = Place(rotation, schedule.spans, cudnn=self.cudnn)
        for number, block in enumerate(self.blocks):
            factors = None if branches is None else branches[number]
            arguments = (x, condition.modulation, condition.context, place, None, factors)
            # Compiled with torch 2.11 for an H200, gradients of the modulation come out as random numbers: where the text is
            # learnt, blocks run as they are.
            run = block.forward if condition.modulation.requires_grad else block
            # Caches are no part of teacher forcing: a block may run twice. The first ones do, whose turn in the backward pass
            # comes when the others' activations are gone.
            if number < self.checkpointing * self.config.depth:
                x = checkpoint(run, *arguments, use_reentrant=False)
            else:
                x = run(*arguments)
        return self.logits(x, condition)


@lru_cache(maxsize=4)
def _tables(schedule: Schedule, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary table and the scale (L,) of every token."""
    # Made on the CPU and kept: making them on a GPU in every step would make the step wait.
    counts = torch.tensor([end - begin for begin, end in schedule.spans])
    scale_of = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return rotations(schedule.positions(), head_width).to(device), scale_of.to(device)


def bit_cross_entropy(logits: Tensor, bits: Tensor) -> Tensor:
    """Mean over a token's bits, (B, L); ``logits`` (B, L, d, 2), ``bits`` (B, L, d) bool."""
    # With two classes the cross entropy is the softplus of the wrong one's advantage.
    advantage = logits[..., 1] - logits[..., 0]
    return F.softplus(torch.where(bits, -advantage, advantage)).mean(-1)
