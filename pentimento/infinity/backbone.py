"""Infinity (arXiv:2412.04431): the verbs that editing methods use.

Shapes: B pictures, d bits per vector, (H, W) the last grid of a schedule (pixels / 16), (h, w) a scale's, L tokens of all scales,
S text tokens, C_text channels of T5. Features, codes and bits are maps.
"""

import gc
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import images, pretrained
from . import loading
from .config import InfinityConfig
from .loading import Weights
from .quantizer import Quantizer, up
from .sampling import Drawn, Interventions, Sampling, Texts, draw
from .scales import Schedule
from .tokenizer import Tokenizer
from .transformer import InfinityTransformer, Text


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Pictures in bits."""

    bits: list[Tensor]
    """Per scale, (B, d, h, w) bool."""
    codes: list[Tensor]
    """Per scale on the last grid, (B, d, H, W) float32; their sum is what ``Infinity.decode`` takes."""


class Infinity:
    """Infinity with frozen weights; text encoder and visual tokenizer are read on demand and can be released."""

    def __init__(
        self, weights: Weights, transformer: InfinityTransformer, *, device: torch.device, dtype: torch.dtype
    ):
        """``dtype``: of the blocks' arithmetic, and of the text encoder."""
        self.weights = weights
        self.transformer = transformer.to(device)
        self.quantizer = Quantizer(weights.tokenizer_config.width)
        self.device = device
        self.dtype = dtype
        self._tokenizer: Tokenizer | None = None
        self._text: Any = None
        self._prompts: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def load(cls, config: InfinityConfig) -> "Infinity":
        """Load the transformer that ``config.weights`` names; everything else is checked now and follows on demand.

        Raises ``UserError`` for weights that are missing, damaged, of another model or do not fit each other, and for a device
        that this machine does not have.
        """
        device = pretrained.choose_device(config.device)
        dtype = pretrained.choose_dtype(config.precision, device)
        pretrained.avoid_cudnn_attention(device)
        weights = loading.locate(config)
        infinity = cls(weights, loading.load_transformer(weights, dtype), device=device, dtype=dtype)
        checkpointing = config.gradient_checkpointing
        if checkpointing is None:
            parameters = sum(p.numel() for p in infinity.transformer.parameters())
            checkpointing = parameters >= pretrained.CHECKPOINT_FROM
        infinity.transformer.checkpointing = float(checkpointing)
        if config.compile:
            infinity.transformer.cudnn = device.type == "cuda"
            for block in infinity.transformer.blocks:
                block.compile()
        return infinity

    @classmethod
    def outline(cls, config: InfinityConfig) -> "Infinity | None":
        """The model's shapes without its weights, on the meta device; ``None`` where they are not on this machine."""
        weights = loading.locate_outline(config)
        if weights is None:
            return None
        transformer = loading.outline(InfinityTransformer, weights.transformer_config)
        return cls(weights, transformer, device=torch.device("meta"), dtype=torch.float32)

    @property
    def native_size(self) -> str:
        """Name of the size of schedules that the model was made for: "1M" for the published one."""
        return self.weights.settings.size

    @property
    def native_text_length(self) -> int:
        """T5 tokens per prompt; longer ones are cut."""
        return self.weights.transformer_config.text_length

    def describe(self) -> dict[str, Any]:
        """What an adapter's file records of its base: no path, no time."""
        return {
            "family": "infinity",
            "weights": self.weights.name,
            "attention_bias": self.weights.transformer_config.attention_bias,
            "digest": self.weights.digest(),
        }

    def encoder_digest(self) -> str:
        """Changes with the visual tokenizer, the text encoder and the precision: for cache keys."""
        return self._encoder_digest

    @cached_property
    def _encoder_digest(self) -> str:
        # Once: the cache asks in every step, and the files are hashed for it.
        return f"{self.weights.encoder_digest()}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def tokenizer(self) -> Tokenizer:
        """The visual tokenizer, on the device; read on first use."""
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(self.weights).to(self.device)
        return self._tokenizer

    @property
    def text(self) -> Any:
        """T5's encoder, on the device; read on first use."""
        if self._text is None:
            self._text = loading.load_text(self.weights, self.dtype).to(self.device)
        return self._text

    @cached_property
    def words(self) -> Any:
        """T5's tokenizer."""
        return loading.load_words(self.weights)

    def release_encoders(self) -> None:
        """Free the text encoder and the visual tokenizer; prompts encoded lately stay known."""
        self._tokenizer = self._text = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Features (B, d, H, W) float32, not quantised yet, of pixels in [-1, 1] of a schedule's size."""
        return self.tokenizer.encode(pixels.to(self.device, torch.float32))

    def quantize(self, features: Tensor, schedule: Schedule) -> Codes:
        """Features as bits and codes, from coarse to fine."""
        return quantize(self.quantizer, features.to(self.device), schedule)

    def encode_images(self, pictures: Sequence[Image], schedule: Schedule) -> Codes:
        """Bits and codes of RGB pictures of the schedule's size."""
        return self.quantize(self.encode_pixels(images.to_tensor(pictures)), schedule)

    @torch.no_grad()
    def decode(self, z: Tensor) -> list[Image]:
        """RGB pictures of sums of codes (B, d, H, W)."""
        return images.from_tensor(self.tokenizer.decode(z.to(self.device, torch.float32)))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """T5's states of each prompt's own tokens, the end token included, in float32.

        The last prompts are remembered, so that samples drawn while training need no text encoder in memory.
        """

        def encode(missing: list[str]) -> list[Tensor]:
            length = self.native_text_length
            given = self.words(missing, padding=True, truncation=True, max_length=length, return_tensors="pt")
            states = self.text(**given.to(self.device)).last_hidden_state.float()
            counts = given.attention_mask.sum(1).tolist()
            return [row[:count].clone() for row, count in zip(states, counts, strict=True)]

        return ragged(pretrained.remember(self._prompts, prompts, encode))

    def logits(
        self, text: Text, totals: Sequence[Tensor], schedule: Schedule, branches: Tensor | None = None
    ) -> Tensor:
        """Logits (B, L, d, 2) float32 of both values of every bit, all scales at once, each given the ones before.

        Args:
            totals: running sums (B, d, H, W) of the codes, as ``Quantizer.levels`` gives them.
            branches: factors (blocks, 2, B) of the blocks' branches in training, see ``transformer.drop_path``.
        """
        inputs = self.quantizer.inputs([total.to(self.device) for total in totals], schedule)
        # Blocks compute in their own dtype; what is outside of them stays in float32 also while a loop trains in less.
        with torch.autocast(self.device.type, enabled=False):
            logits: Tensor = self.transformer(inputs, text.to(self.device), schedule, branches)
        return logits

    def generate(
        self,
        text: Text,
        schedule: Schedule,
        sampling: Sampling,
        *,
        seed: int,
        against: Text | None = None,
        interventions: Interventions = Interventions(),  # noqa: B008 (frozen)
    ) -> Drawn:
        """Draw bits for ``text``, from coarse to fine; ``decode`` makes pictures of the result's ``z``.

        Args:
            against: what guidance leads away from, such as a negative prompt; else the model's own rows for no text.
            interventions: what reaches into the drawing of scales, and what looks on.

        Raises:
            UserError: the settings name another number of scales than the schedule has.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        texts = Texts(text.to(self.device), None if against is None else against.to(self.device))
        with torch.autocast(self.device.type, enabled=False):
            return draw(
                self.transformer, self.quantizer, texts, schedule, sampling, generator, interventions
            )  # fmt: skip


def quantize(quantizer: Quantizer, features: Tensor, schedule: Schedule) -> Codes:
    """Features (B, d, H, W) float32 as bits and codes, from coarse to fine."""
    bits = [level.bits for level in quantizer.levels(features, schedule)]
    return Codes(bits=bits, codes=[up(quantizer.codes(each), schedule.grids[-1]) for each in bits])


def ragged(rows: Sequence[Tensor]) -> Text:
    """Texts (S_i, C_text) of several lengths as one batch."""
    features = pad_sequence(list(rows), batch_first=True)
    if all(len(row) == features.shape[1] for row in rows):
        return Text(features, None)
    lengths = torch.tensor([len(row) for row in rows], device=features.device)
    return Text(features, torch.arange(features.shape[1], device=features.device) < lengths[:, None])


def extend(text: Text, rows: Tensor) -> Text:
    """Append the same learnt rows (N, C_text) to every text, directly after its own last row."""
    if text.mask is None:
        return Text(
            torch.cat([text.features, rows.to(text.features).expand(len(text.features), -1, -1)], 1), None
        )
    features, count = F.pad(text.features, (0, 0, 0, len(rows))), len(rows)
    at = torch.arange(features.shape[1], device=features.device)
    lengths = text.mask.sum(1, keepdim=True)
    index = (lengths + at[:count])[:, :, None].expand(-1, -1, features.shape[2])
    added = rows.to(features).expand(len(features), -1, -1)
    return Text(features.scatter(1, index, added), at < lengths + count)
