"""Drawing a picture with Infinity: bits of one scale after the other, with guidance.

Shapes as in ``transformer`` and ``quantizer``; under guidance the batch is doubled, prompts first, then what they are held
against.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, counted
from .quantizer import Quantizer, to_maps, to_tokens, up
from .scales import Schedule
from .transformer import Cache, Condition, InfinityTransformer, Place, Text

EditCode = Callable[[int, Tensor], Tensor]
"""From a scale's index and its codes, resized to the last grid, to those that count in their place."""
WatchAll = Callable[[int, int, Tensor], None]
"""Is given indices of scale and block, and that block's cross attention to the prompts (B, H, h * w, S) after the softmax."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How bits are drawn."""

    cfg: float | Sequence[float] = 4.0
    """Classifier-free guidance, for all scales or for each; 1 is none."""
    tau: float | Sequence[float] = 0.5
    """Temperature, for all scales or for each."""
    top_k: int = 0
    """1 takes the likelier value of every bit; 0 and more than 1 leave both."""
    top_p: float = 0.97
    """A bit whose less likely value has at most 1 - this is certain; 0 leaves both values."""
    cfg_blocks: tuple[int, ...] = ()
    """Negative numbers of blocks after which guidance acts on hidden states, instead of on logits if 0 is not among them."""

    def per_scale(self, scales: int) -> tuple[list[float], list[float]]:
        """Guidance and temperature of every scale."""
        cfg, tau = (list(v) if isinstance(v, Sequence) else [v] * scales for v in (self.cfg, self.tau))
        for name, values in (("cfg", cfg), ("tau", tau)):
            if len(values) != scales:
                raise UserError(
                    f"{name} has {counted(len(values), 'value')}, but the picture has {scales} scales"
                )
        return cfg, tau


class Texts(NamedTuple):
    """What is drawn, and what guidance leads away from."""

    prompts: Text
    against: Text | None = None
    """One row for each prompt; ``None``: the model's own rows for no text."""


@dataclass(frozen=True, kw_only=True)
class Interventions:
    """What reaches into the drawing of scales."""

    edit_code: EditCode | None = None
    watch: WatchAll | None = None
    given: Mapping[int, Tensor] = field(default_factory=dict)
    """Bits (B, d, H, W) of some scales that count instead of the drawn ones."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The result of ``draw``."""

    z: Tensor
    """Sum of all codes (B, d, H, W), the decoder's input."""
    bits: list[Tensor]
    """Of each scale, (B, d, h, w) bool."""


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Of both values of every bit (..., 2), filtered."""
    p = logits.softmax(-1)
    if sampling.top_k == 1:
        p = p * (logits == logits.max(-1, keepdim=True).values)
    if sampling.top_p > 0:
        lowest = p.min(-1, keepdim=True).values
        p = torch.where(
            (p == lowest) & (p < p.max(-1, keepdim=True).values) & (lowest <= 1 - sampling.top_p), 0, p
        )
    return p / p.sum(-1, keepdim=True)


def chosen(p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw for each pair of probabilities (..., 2) whether it is the second: (...) bool."""
    # As torch.multinomial does, which asks the device whether the probabilities are sound and waits for the answer.
    first, second = (p / torch.empty_like(p).exponential_(generator=generator)).unbind(-1)
    return second > first


@torch.no_grad()
def draw(
    model: InfinityTransformer,
    quantizer: Quantizer,
    texts: Texts,
    schedule: Schedule,
    sampling: Sampling,
    generator: torch.Generator,
    interventions: Interventions = Interventions(),  # noqa: B008 (frozen)
) -> Drawn:
    """Draw pictures for prompts, scale by scale."""
    scales = len(schedule.grids)
    cfg, tau = sampling.per_scale(scales)
    guided = any(value != 1 for value in cfg)
    count = len(texts.prompts.features)
    condition = model.condition(texts.prompts)
    if guided:
        condition = joined(condition, model.condition(texts.against or model.without_text(texts.prompts)))
    guide = {model.config.depth + n for n in sampling.cfg_blocks if n < 0}
    on_logits = not sampling.cfg_blocks or 0 in sampling.cfg_blocks
    rotation, caches = model.rotation(schedule), [Cache(schedule.tokens) for _ in range(model.config.depth)]
    last = schedule.grids[-1]
    total, drawn = torch.zeros(count, quantizer.width, *last, device=rotation.device), []
    tokens: Tensor | None = None
    for k, (start, end) in enumerate(schedule.spans):
        x = model.embed(tokens, condition, k)
        watch = interventions.watch
        for i, (block, cache) in enumerate(zip(model.blocks, caches, strict=True)):
            place = Place(rotation[:, start:end], ((0, end - start),), cache)
            seen = None if watch is None else partial(_watch, watch, k, i, count)
            # Not through the call, which may be compiled: every scale has another size.
            x = block.forward(x, condition.modulation, condition.context, place, seen)
            if i in guide and cfg[k] != 1:
                mixed = cfg[k] * x[:count] + (1 - cfg[k]) * x[count:]
                x = torch.cat([mixed, mixed])
        logits = model.logits(x, condition) / tau[k]
        if cfg[k] != 1 and on_logits:
            logits = cfg[k] * logits[:count] + (1 - cfg[k]) * logits[count:]
        p = probabilities(logits[:count], sampling)
        bits = to_maps(chosen(p, generator), schedule.grids[k])
        bits = interventions.given.get(k, bits)
        drawn.append(bits)
        code = up(quantizer.codes(bits), last)
        if interventions.edit_code is not None:
            code = interventions.edit_code(k, code)
        total = total + code
        if k + 1 < scales:
            tokens = to_tokens(up(total, schedule.grids[k + 1]))
            tokens = torch.cat([tokens, tokens]) if guided else tokens
    return Drawn(z=total, bits=drawn)


def _watch(watch: WatchAll, scale: int, block: int, count: int, attention: Tensor) -> None:
    watch(scale, block, attention[:count])


def joined(a: Condition, b: Condition) -> Condition:
    """Two conditions as one batch, their texts padded to the longer."""
    texts = (a.context, b.context)
    length = max(text.features.shape[1] for text in texts)
    missing = [length - text.features.shape[1] for text in texts]
    features = [F.pad(text.features, (0, 0, 0, n)) for text, n in zip(texts, missing, strict=True)]
    masks = [F.pad(text.known(), (0, n)) for text, n in zip(texts, missing, strict=True)]
    padded = any(missing) or any(text.mask is not None for text in texts)
    context = Text(torch.cat(features), torch.cat(masks) if padded else None)
    return Condition(torch.cat([a.pooled, b.pooled]), torch.cat([a.modulation, b.modulation]), context)
