"""EditInfinity: edits of one picture with Infinity, which draws bits scale by scale (arXiv:2510.20217).

The picture is learnt by heart in two stages: ``prompt``, rows after its caption that say how it is captioned, then ``lora``, the
feed-forward layers that draw it. A caption of the wanted picture then draws the edit; outside of a region the source's own codes
are blended in, at every scale.

Shapes: B pictures, d bits per vector, (H, W) the last grid, L tokens of all scales, S text tokens of C_text channels.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from .. import images
from ..adapters import Adapters, LoRA
from ..errors import UserError, named
from ..infinity import authored, loading, regions
from ..infinity.backbone import Codes, Infinity, extend
from ..infinity.config import InfinityConfig
from ..infinity.quantizer import RandomFlips, to_tokens
from ..infinity.sampling import Interventions, Sampling
from ..infinity.scales import LENGTHS, Schedule, nearest_ratio
from ..infinity.transformer import Text, bit_cross_entropy, drop_path
from ..method import EditSettings, Example, Method, Region, Theirs

if TYPE_CHECKING:
    from ..data import Pair
    from ..train import Draws

PROMPT, LORA = "prompt", "lora"
NAMES = {authored.ROWS: PROMPT, authored.LORA: LORA}
"""Ours, of what EditInfinity's scripts save."""
INSTRUCTION = "{prompt}, the language style of this prompt is"
"""What the learnt rows follow, as published."""
FEED_FORWARD = r".*\.ffn\.fc[12]"
SMALLEST = 24
"""Pixels of a side of the smallest picture that is taken."""
LONGEST = 4
"""Longest aspect that is squeezed into the tabled ones, which end at 3."""
NO_CAPTION = 'say what the picture shows: config.source_prompt="..."'
SHOWN = 60
"""Characters of a text in messages."""


@dataclass(frozen=True, kw_only=True)
class FeedForwardLoRA(LoRA):
    """The published adapter: rank 4 and alpha 32, so a scale of 8; A as peft's default, B zero."""

    elsewhere: ClassVar[str] = (
        "Neither stock diffusers nor ComfyUI knows Infinity; `pentimento export RUN --to editinfinity --out CASE` writes the files of"
        " EditInfinity's own scripts."
    )
    targets: str | tuple[str, ...] = FEED_FORWARD
    rank: int = 4
    alpha: float | None = 32.0
    dropout: float = 0.1
    init: Literal["gaussian", "default", "kaiming", "orthogonal"] = "default"


class Loss(NamedTuple):
    """Cross entropy of bits."""

    weighted: Tensor
    """Mean over the pictures, tokens weighted so that a scale counts with its side."""
    total: Tensor
    """Sum over a picture's tokens and bits, mean over the pictures: what the published code calls a KL divergence."""


def cross_entropy(logits: Tensor, bits: Tensor, schedule: Schedule) -> Loss:
    """Both sums for logits (B, L, d, 2) and bits (B, L, d) bool."""
    per_token = bit_cross_entropy(logits, bits)
    weighted = (per_token * schedule.weights().to(per_token.device)).sum(1).mean()
    return Loss(weighted, per_token.sum(1).mean() * bits.shape[-1])


class EditInfinity(Method):
    """Learnt rows ``prompt`` and a LoRA ``lora`` on Infinity, of one picture."""

    family = "infinity"
    takes_mask = True
    learns_picture = True
    only_edits = frozenset(
        {"target_prompt", "region", "word", "threshold", "use", "cfg", "tau", "top_p"}
    )  # fmt: skip
    main = LORA

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is learnt of the picture, and how edits of it are drawn."""

        source_prompt: str = ""
        """What the picture shows; empty: the data set's prompt. For region word it must be given here."""
        target_prompt: str = ""
        """What an edit shows where it is given no instruction; empty: each must be given one."""
        region: Literal["whole", "mask", "word"] = "whole"
        """Where an edit may change the picture: whole; mask (each edit is given one); word (where the model looks for the word in
        the source). A mask that an edit is given always counts."""
        word: str = ""
        """Region word: the word or phrase of source_prompt that names what changes."""
        threshold: float = 0.5
        """Region word: attention that counts is above this, from 0 (the least anywhere in the picture) to below 1 (the most)."""
        size: str | None = None
        """Pixels of pictures: 0.06M, 0.25M, 0.60M or 1M (a square's edge is 256, 512, 768 or 1024). null: what the model was
        made for."""
        rows: int = 20
        """Learnt rows after the caption. 0: none, and the caption as it is."""
        flips: float = 0.3
        """Highest share of a scale's bits that are wrong in what later scales are given in training."""
        flip_scales: int = 13
        """Scales from the first on that have wrong bits."""
        text_dropout: float = 0.1
        """Probability with which the text, learnt rows included, is left out in a step."""
        drop_path: float = 0.1
        """Share of the pictures for which the last block's branches are left out in a step of training; in the blocks before it
        is less, in the first 0."""
        kl_weight: float = 2e-7
        """While the LoRA is trained: weight of the second term of the loss, which the published code calls a KL divergence. It is
        the cross entropy again, summed over all tokens and bits with equal weights."""
        use: Literal["both", "rows", "lora"] = "both"
        """What of it acts in edits: both; rows (the LoRA does not); lora (the prompt goes without the learnt rows)."""
        cfg: float = 4.0
        """Classifier-free guidance of edits; 1 is none."""
        tau: float = 0.5
        """Temperature of edits."""
        top_p: float = 0.97
        """A bit whose less likely value has at most 1 - this is certain; 0 draws every bit."""
        lora: FeedForwardLoRA = field(default_factory=FeedForwardLoRA)
        """The trained layers."""

        def __post_init__(self) -> None:
            if self.size is not None and self.size not in LENGTHS:
                raise ValueError(f"size should be one of {', '.join(LENGTHS)} or null, not {self.size!r}")
            for name in ("flips", "text_dropout", "top_p"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"{name} must lie between 0 and 1, but it is {getattr(self, name)}")
            for name in ("rows", "flip_scales", "kl_weight", "cfg"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} must not be negative, but it is {getattr(self, name)}")
            for name in ("threshold", "drop_path"):
                if not 0 <= (value := getattr(self, name)) < 1:
                    raise ValueError(f"{name} must be at least 0 and below 1, but it is {value}")
            if not self.tau > 0:
                raise ValueError(f"tau must be above 0, but it is {self.tau}")

    @classmethod
    def names(cls, config: Any) -> tuple[str, ...]:
        """The learnt rows, if there are any, and the LoRA."""
        return (PROMPT, LORA) if config.rows else (LORA,)

    @classmethod
    def theirs(cls, place: Path, at: int | None = None) -> Theirs | None:
        """Learnt rows, a LoRA or both of EditInfinity's scripts; in a folder those of the most iterations."""
        found = authored.files_of(place, at)
        if not found:
            return None
        config: dict[str, Any] = {"rows": authored.COUNT if authored.ROWS in found else 0}
        if authored.LORA in found and (rank := authored.rank_of(found[authored.LORA])):
            config["lora"] = {"rank": rank}
        named = " and ".join(file.name for file in found.values())
        silent = f"; alpha, which they do not record, is {authored.ALPHA:g} unless config.lora.alpha says otherwise"
        return Theirs(
            files={NAMES[kind]: file for kind, file in found.items()},
            backbone={"attention_bias": False},
            config=config,
            note=f"{named} of EditInfinity's scripts: the base model's attention biases are left out, as there, unless"
            f" backbone.attention_bias=true{silent if authored.LORA in found else ''}",
        )

    def take(self, theirs: Theirs) -> None:
        """Load their files; what there is no file of stays as it is, which for the LoRA is without effect."""
        file = theirs.files.get(PROMPT)
        width = self.infinity.transformer.config.text_width
        rows = None if file is None else authored.read_rows(file, self.config.rows, width)
        if LORA in theirs.files:
            self.adapters.load(theirs.files[LORA], LORA)
        if rows is not None:
            self.adapters.tensors[PROMPT].data.copy_(rows)

    @classmethod
    def load(cls, backbone: InfinityConfig, config: Any) -> Self:
        """The method on the weights that a recipe names; raises ``UserError`` as ``Infinity.load`` does."""
        return cls(Infinity.load(backbone), config)

    @classmethod
    def outline(cls, backbone: InfinityConfig, config: Any) -> Self | None:
        """The method without weights; ``None`` where they are not on this machine."""
        infinity = Infinity.outline(backbone)
        return None if infinity is None else cls(infinity, config)

    @classmethod
    def base_digest(cls, backbone: InfinityConfig) -> str:
        """Of the transformer, the visual tokenizer and the text encoder."""
        weights = loading.locate(backbone)
        return f"{weights.digest()}-{weights.encoder_digest()}"

    def __init__(self, backbone: Infinity, config: Any):
        self.infinity, self.config = backbone, config
        self.pixels = config.size or backbone.native_size
        self.adapters = Adapters(backbone.transformer)
        if config.rows:
            width = backbone.transformer.config.text_width
            self.adapters.add_tensor(PROMPT, torch.zeros(config.rows, width, device=backbone.device))
        self.adapters.add(LORA, config.lora)

    def schedule(self, width: int, height: int) -> Schedule:
        """The grids for a picture: those of the nearest aspect ratio."""
        return Schedule.of(nearest_ratio(height, width), self.pixels)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Pixels of the schedule; the picture is squeezed into them. ``UserError`` for one that is too small or too long."""
        _check_size("the picture", width, height)
        rows, columns = self.schedule(width, height).pixels
        return columns, rows

    def fingerprint(self) -> str:
        """The encoders, the geometry and the text settings, as one line of JSON."""
        settings = {"method": "editinfinity", "encoders": self.infinity.encoder_digest(), "size": self.pixels}
        settings |= {"source_prompt": self.config.source_prompt, "rows": self.config.rows > 0}
        return json.dumps(settings, sort_keys=True)

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Features (B, d, H, W) of the pictures, not quantised yet."""
        pictures = [self._scaled(self._source(example)) for example in examples]
        return {"features": self.infinity.encode_pixels(images.to_tensor(pictures))}

    def _source(self, example: Example) -> Image:
        if example.source is None:
            raise UserError(
                f"{example.key or 'edit'}: there is no picture; editinfinity learns and edits one"
            )
        return example.source

    def _scaled(self, picture: Image) -> Image:
        return images.resize(images.to_rgb(picture), self.size(*picture.size))

    def check_text(self, prompt: str) -> None:
        """Raise ``UserError`` for a caption that, with what the learnt rows follow, is longer than the model's text."""
        count = len(self.infinity.words(self._instructed(prompt)).input_ids)
        if count > self.infinity.native_text_length:
            with_rows = ", with what the learnt rows follow," if self.config.rows else ""
            shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
            raise UserError(
                f"a text{with_rows} has {count} tokens, but this model reads {self.infinity.native_text_length}; shorten {shown!r}"
            )

    def text(self, prompt: str) -> str:
        """The text of training: the caption of the picture, with what the learnt rows follow."""
        return self._instructed(self.config.source_prompt or prompt)

    def _instructed(self, caption: str) -> str:
        return INSTRUCTION.replace("{prompt}", caption) if self.config.rows else caption

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5 states (B, S, C_text) padded to the longest text that the model takes, and the mask (B, S) of what is text.

        Raises:
            UserError: a picture of which nothing says what it shows.
        """
        if not (self.config.source_prompt or all(prompts)):
            raise UserError(NO_CAPTION)
        for prompt in prompts:
            self.check_text(self.config.source_prompt or prompt)
        text = self.infinity.encode_prompts([self.text(prompt) for prompt in prompts])
        missing = self.infinity.native_text_length - text.features.shape[1]
        return {
            "text_features": F.pad(text.features, (0, 0, 0, missing)),
            "text_mask": F.pad(text.known(), (0, missing)),
        }

    def release_encoders(self) -> None:
        """Free the text encoder and the visual tokenizer."""
        self.infinity.release_encoders()

    def losses(self, batch: dict[str, Tensor], draws: "Draws") -> Iterator[tuple[str, Tensor]]:
        """Cross entropy of all bits, given scales before with wrong bits; the LoRA acts in the stage that trains it.

        Draws, in this order: per scale the share of wrong bits and which they are; whether the text is left out; which branches
        of the blocks are.
        """
        config, infinity = self.config, self.infinity
        features = batch["features"].to(infinity.device)
        rows, columns = features.shape[-2:]
        schedule = self.schedule(columns, rows)
        flips = RandomFlips(draws, config.flips, config.flip_scales)
        levels = list(infinity.quantizer.levels(features, schedule, flips))
        bits = torch.cat([to_tokens(level.bits) for level in levels], 1)
        trains_lora = LORA in self.adapters.trained
        self.adapters.use(**({LORA: 1.0} if trains_lora else {}))  # type: ignore[arg-type]
        text = self._with_rows(Text(batch["text_features"], batch["text_mask"]).to(infinity.device))
        if config.text_dropout:
            text = self._dropped(text, draws.uniform().to(infinity.device) < config.text_dropout)
        logits = infinity.logits(
            text, [level.total for level in levels], schedule, self._branches(len(features), draws)
        )
        loss = cross_entropy(logits, bits, schedule)
        if not (trains_lora and config.kl_weight):
            yield "bits", loss.weighted
            return
        yield "bits", loss.weighted + config.kl_weight * loss.total
        yield "unweighted", config.kl_weight * loss.total.detach()

    def _branches(self, count: int, draws: "Draws") -> Tensor | None:
        """Factors of the blocks' branches for so many pictures; ``None`` where none is ever left out."""
        if not self.config.drop_path:
            return None
        numbers = draws.uniform_like(torch.empty(count, self.infinity.transformer.config.depth, 2))
        return drop_path(numbers.to(self.infinity.device), self.config.drop_path)

    def _with_rows(self, text: Text) -> Text:
        """A padded text, cut to the longest of its rows, with the learnt ones after each."""
        lengths = text.known().sum(1).tolist()
        length = max(lengths)
        mask = None if length == min(lengths) else text.known()[:, :length]
        cut = Text(text.features[:, :length], mask)
        return extend(cut, self.adapters.tensors[PROMPT]) if self.config.rows else cut

    def _dropped(self, text: Text, dropped: Tensor) -> Text:
        """The rows for no text in the place of some texts."""
        empty = self.infinity.transformer.without_text(text)
        kept = len(empty.features[0])
        missing = text.features.shape[1] - kept
        features = F.pad(empty.features, (0, 0, 0, missing))
        features = torch.where(dropped[:, None, None], features, text.features)
        if text.mask is None and not missing:
            return Text(features, None)
        mask = F.pad(text.known()[:, :kept], (0, missing))
        return Text(features, torch.where(dropped[:, None], mask, text.known()))

    @torch.no_grad()
    def edit(self, example: Example, settings: EditSettings) -> Image:
        """Draw the prompt of an example; outside of the region the codes of its picture are blended in.

        Scale 0 is the base model, without the learnt rows.

        Raises:
            UserError: no picture, no mask where the configuration asks for one, a word that the caption does not have, a prompt
                that is too long, or steps.
        """
        source, infinity = self._source(example), self.infinity
        self.check_edit(self.config, example, settings)
        self.check_text(example.prompt)
        schedule = self.schedule(*source.size)
        seams = Interventions()
        if example.mask is not None or self.config.region == "word":
            codes = self._codes(example, source, schedule)
            weight = regions.weights(self._region(example, codes, schedule)[0], schedule)
            seams = blending(codes, weight.to(infinity.device))
        with_rows = bool(settings.scale) and self.config.use != "lora"
        self.adapters.use(**{LORA: settings.scale if self.config.use != "rows" else 0.0})  # type: ignore[arg-type]
        text = infinity.encode_prompts([self._instructed(example.prompt) if with_rows else example.prompt])
        if with_rows:
            text = self._with_rows(text)
        cfg = self.config.cfg if settings.guidance is None else settings.guidance
        sampling = Sampling(cfg=cfg, tau=self.config.tau, top_p=self.config.top_p)
        drawn = infinity.generate(text, schedule, sampling, seed=settings.seed, interventions=seams)
        return images.resize_result(infinity.decode(drawn.z)[0], source.size)

    @classmethod
    def check_data(cls, backbone: InfinityConfig, config: Any, rows: Sequence["Pair"]) -> None:
        """Raise ``UserError`` for a picture that could not be edited, a caption that is missing or too long, or a word that it lacks."""
        outline = cls.outline(backbone, config)
        for row in rows:
            _check_size(row.places().get("source") or row.key, *row.size)
            captions = (config.source_prompt,) if config.source_prompt else row.prompts
            if not all(caption.strip() for caption in captions):
                raise UserError(NO_CAPTION)
            if outline is None:
                continue
            for caption in captions:
                with named("config.source_prompt" if config.source_prompt else row.key):
                    outline.check_text(caption)
        if config.word and config.source_prompt:
            regions.find_words(config.source_prompt, config.word)

    def _codes(self, example: Example, source: Image, schedule: Schedule) -> Codes:
        """The source's codes: those that are given (``extra["codes"]``, of ``pyramids.read``), else encoded."""
        given = example.extra.get("codes")
        if given is None:
            return self.infinity.encode_images([self._scaled(source)], schedule)
        grids = tuple((bits.shape[-2], bits.shape[-1]) for bits in given.bits)
        if grids != schedule.grids or given.bits[0].shape[1] != self.infinity.quantizer.width:
            raise UserError(
                f"codes: they have {len(grids)} scales up to {grids[-1]} tokens of {given.bits[0].shape[1]} bits, but this picture is"
                f" drawn in {len(schedule.grids)} up to {schedule.grids[-1]} of {self.infinity.quantizer.width}"
            )
        device = self.infinity.device
        return Codes(
            bits=[each.to(device) for each in given.bits], codes=[each.to(device) for each in given.codes]
        )

    @classmethod
    def check_edit(cls, config: Any, example: Example, settings: EditSettings) -> None:
        """Raise ``UserError`` for a picture that is too small, a mask or word that is missing, or steps."""
        if settings.steps is not None:
            raise UserError(
                "steps: Infinity draws a picture in the scales of its size, not in steps; leave it out"
            )
        if example.source is not None:
            _check_size(example.key or "the picture", *example.source.size)
        if example.mask is not None:
            regions.check_mask(example.mask)
        elif config.region == "mask":
            raise UserError(
                "mask: this edit needs one, white where the picture may change (or config.region=whole)"
            )
        elif config.region == "word":
            if not (config.word and config.source_prompt):
                raise UserError(
                    "config.region is word: give the picture's caption as config.source_prompt (--source) and a word of it as"
                    " config.word (--target-word)"
                )
            regions.find_words(config.source_prompt, config.word)

    @torch.no_grad()
    def region(self, example: Example) -> Region | None:
        """The mask that is given, else where the base model looks for the word; with the weights of the source's codes."""
        source = self._source(example)
        self.check_edit(self.config, example, EditSettings())
        if example.mask is None and self.config.region == "whole":
            return None
        schedule = self.schedule(*source.size)
        codes = self._codes(example, source, schedule)
        region, attention = self._region(example, codes, schedule)
        return regions.describe(region, regions.weights(region, schedule), attention)

    def _region(self, example: Example, codes: Codes, schedule: Schedule) -> tuple[Tensor, Tensor | None]:
        """Where the picture may change, of any resolution, and the attention that says so."""
        if example.mask is not None:
            return regions.region_of_mask(example.mask), None
        attention = self.attention(codes, schedule)
        return regions.region_of_attention(attention, self.config.threshold), attention

    def attention(self, codes: Codes, schedule: Schedule) -> Tensor:
        """Map (H, W) of where the base model, which is led through the source's codes, looks for the word."""
        config, infinity = self.config, self.infinity
        encoded = infinity.words(
            config.source_prompt, truncation=True, max_length=infinity.native_text_length
        )
        seen = regions.AttentionMap(
            schedule, regions.token_span(config.source_prompt, config.word, encoded.word_ids())
        )
        self.look(infinity.encode_prompts([config.source_prompt]), codes.codes, schedule, seen)
        return seen.mean()

    def look(
        self, text: Text, codes: Sequence[Tensor], schedule: Schedule, seen: regions.AttentionMap
    ) -> None:
        """Lead the base model through a picture's codes, (1, d, H, W) for every scale, and watch its attention."""
        seams = Interventions(edit_code=lambda scale, code: codes[scale], watch=seen)
        self.adapters.use()
        # What would be drawn does not matter, so that guidance would only double the work.
        self.infinity.generate(text, schedule, Sampling(cfg=1.0), seed=0, interventions=seams)

    @classmethod
    def default_prompt(cls, config: Any, shared: str | None) -> str | None:
        """The configuration's target prompt; what was trained is the caption of the source."""
        return config.target_prompt or None

    def metadata(self) -> dict[str, Any]:
        """Geometry, text, region and sampling settings, as an edit with these weights needs them."""
        names = ("source_prompt", "region", "word", "threshold", "rows", "cfg", "tau", "top_p")
        return {
            "size": self.pixels,
            "instruction": INSTRUCTION if self.config.rows else "",
            **{name: getattr(self.config, name) for name in names},
        }

    def usage(self) -> str:
        """What the adapter is good for, and where it is written down."""
        return (
            "It knows one picture, the one that it was trained on, and edits that: the instruction is a caption of the wanted picture."
            " All of it is in `docs/editinfinity.md`."
        )

    def base(self) -> dict[str, Any]:
        """Family, name and digest of the Infinity weights, and whether their attention has its biases."""
        return self.infinity.describe()


def _check_size(name: str, width: int, height: int) -> None:
    if min(width, height) < SMALLEST:
        raise UserError(
            f"{name}: {width}x{height} is too small to be learnt and edited; its sides must be at least {SMALLEST} pixels"
        )
    if max(width, height) > LONGEST * min(width, height):
        raise UserError(
            f"{name}: {width}x{height} is too long; Infinity draws up to 3:1, so cut it to at most {LONGEST}:1"
        )


def blending(codes: Codes, weight: Tensor) -> Interventions:
    """At every scale ``weight`` (H, W) of the source's codes, and the rest of what was drawn."""
    return Interventions(edit_code=lambda scale, code: torch.lerp(code, codes.codes[scale], weight))
