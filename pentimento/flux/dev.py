"""Edits as sliders on FLUX.1 [dev]: pictures of prompts, and of photographs that a LoRA knows by heart.

One adapter, ``semantic``, carries the edit. It acts from some step on, so that the layout is the base model's. A photograph
is drawn by an adapter ``photo`` that was trained on it alone; then the velocities of both are blended, as PairEdit does
(arXiv:2506.07992). Shapes: ``B`` pictures, ``T`` tokens of 64 channels; ``grid`` is (rows, columns) of tokens.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from .. import adapter_files, images, inspection
from ..adapters import LoRA, spec_of
from ..errors import UserError
from ..method import EditSettings, Example, Method, Probe
from . import sampling
from .backbone import Flux, Text
from .method import FluxMethod

EDIT, CONTENT, PHOTO = inspection.MAIN, "content", "photo"
ATTENTION = (
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|single_transformer_blocks\.\d+\.attn\.to_[qkv]"
)
"""The published 266 layers of FLUX.1: eight of a double block, three of a single one."""
LARGEST_NATIVE = 512
MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class AttentionLoRA(LoRA):
    """The published adapter: rank 16 and alpha 1, so a scale of 1/16; A uniform up to sqrt(3 / inputs), B zero."""

    targets: str | tuple[str, ...] = ATTENTION
    rank: int = 16
    alpha: float | None = 1.0
    init: Literal["gaussian", "default", "kaiming", "orthogonal"] = "kaiming"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are sized, trained at and sampled."""

    prompt: str = "image of a person"
    """What is drawn where no prompt is given."""
    training_prompt: str = ""
    """Text given to the model in training, whatever the data set says (published: the empty one)."""
    resolution: int | None = None
    """Edge in pixels, of pictures of prompts too. null: what the model was made for, at most 512 as published (pocket: 128)."""
    shape: Literal["square", "aspect"] = "square"
    """Pictures in training, and photographs: square (published: squeezed to resolution x resolution) or aspect (the long edge
    is resolution)."""
    max_sequence_length: int | None = None
    """T5 tokens per prompt, 8 to 512; longer ones are cut. null: what the model was made for (FLUX.1: 512)."""
    guidance: float = 3.5
    """Guidance input, in training and in sampling."""
    steps: int = 28
    """Sampling steps, and the length of the grid of noise levels that training draws from."""
    skip: int = 14
    """The edit acts from the step after this one on, counted from 0: 14 means steps 15 to 27 of 28. On photographs from this step
    on."""
    until: int | None = None
    """The edit acts before this step only. null: to the end."""
    weight: float = 0.75
    """On photographs, where the edit acts: share of the edit's velocity; the rest is that of the photograph's own adapter."""
    combine: Literal["velocity", "merged"] = "velocity"
    """On photographs: velocity (published) predicts with each adapter alone and blends by weight; merged switches both on in one
    prediction."""
    lora: AttentionLoRA = field(default_factory=AttentionLoRA)
    """The trained layers."""

    def __post_init__(self) -> None:
        if self.resolution is not None and (self.resolution < MULTIPLE or self.resolution % MULTIPLE):
            raise ValueError(f"resolution must be a multiple of {MULTIPLE} or null, not {self.resolution}")
        if self.max_sequence_length is not None and not 8 <= self.max_sequence_length <= 512:
            raise ValueError(f"max_sequence_length must lie in 8..512, not {self.max_sequence_length}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, but it is {self.steps}")
        if self.skip < -1:
            raise ValueError(f"skip must be at least 0 (-1: from the first step on), but it is {self.skip}")
        if self.until is not None and self.until <= self.skip:
            raise ValueError(f"until must lie above skip, {self.skip}, but it is {self.until}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must not be negative, but it is {self.guidance}")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must lie between 0 and 1, but it is {self.weight}")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What one picture is drawn with."""

    text: Text
    grid: tuple[int, int]
    guidance: float
    scale: float
    skip: int
    until: int
    """The edit acts before this step."""
    photo: bool
    """The picture is the photograph that adapter ``photo`` knows."""


class DevMethod(FluxMethod):
    """A method whose adapter ``semantic`` is a slider for pictures of prompts and for photographs."""

    variant = "dev"
    generates = True
    per_photo = "inversion"
    main = EDIT
    largest_native = LARGEST_NATIVE

    def __init__(self, backbone: Flux, config: Any):
        super().__init__(backbone, config)
        self._also: dict[str, float] = {}
        self._photo = False

    @classmethod
    def loras(cls, config: Any) -> Mapping[str, LoRA]:
        """The edit alone."""
        return {EDIT: config.lora}

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Pixels at which a picture of this size is trained, and drawn where it is a photograph."""
        if self.config.shape == "square":
            return self.resolution, self.resolution
        return images.round_size(width, height, long_edge=self.resolution, multiple=MULTIPLE)

    def fingerprint(self) -> str:
        """The encoders, the geometry and the text settings, as one line of JSON."""
        settings = {name: getattr(self.config, name) for name in ("shape", "training_prompt")}
        settings |= {"resolution": self.resolution, "max_sequence_length": self.text_length}
        settings |= {"method": self.called, "encoders": self.flux.encoder_digest()}
        return json.dumps(settings, sort_keys=True)

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Posteriors ``(B, 16, h, w)`` of the pictures of pairs."""
        pairs = [self.both(example) for example in examples]
        source = self.flux.encode_images([self.scaled(source) for source, _ in pairs])
        sizes = [self.size(*source.size) for source, _ in pairs]
        target = self.flux.encode_images(
            [images.panel(images.to_rgb(t), size) for (_, t), size in zip(pairs, sizes, strict=True)]
        )
        return {
            "source_mean": source.mean, "source_std": source.std, "target_mean": target.mean, "target_std": target.std,
        }  # fmt: skip

    def scaled(self, picture: Image) -> Image:
        """A picture as the model sees it: bicubic, on white where it is transparent."""
        return images.panel(images.to_rgb(picture), self.size(*picture.size))

    def views(self, example: Example) -> dict[str, Image]:
        """Source and target at training size."""
        pictures = {"source": example.source, "target": example.target}
        return {name: self.scaled(picture) for name, picture in pictures.items() if picture is not None}

    def text(self, prompt: str) -> str:
        """The one text of training."""
        return str(self.config.training_prompt)

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5 states ``(B, S, C)`` and CLIP vectors ``(B, D)`` of the text of training, whatever the prompts."""
        text = self.flux.encode_prompts([self.text(p) for p in prompts], self.text_length)
        # Remembered, so that samples drawn while training need no text encoder in memory.
        self.flux.encode_prompts([self.config.prompt], self.text_length)
        return {"prompt_embeds": text.prompt_embeds, "pooled": text.pooled}

    def preview(self, example: Example, settings: EditSettings) -> dict[str, Image]:
        """The configuration's prompt without and with the edit; of a photograph nothing could be shown."""
        drawn = Example(prompt=self.config.prompt)
        return {f"scale {scale}": self.edit(drawn, replace(settings, scale=scale)) for scale in (0, 1)}

    def predict(self, x_t: Tensor, sigma: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Velocity ``(B, T, 64)`` in float32 with the adapters as they are set, for a batch of encoded pictures and texts."""
        text = Text(prompt_embeds=batch["prompt_embeds"], pooled=batch["pooled"])
        h, w = batch["source_mean"].shape[-2:]
        return self.flux.velocity(
            x_t, sigma, text, grid=(h // 2, w // 2), guidance=self.config.guidance
        ).float()

    @classmethod
    def default_prompt(cls, config: Any, shared: str | None) -> str | None:
        """The configuration's prompt: training pairs have instructions, which are no captions."""
        return str(config.prompt)

    @classmethod
    def check(cls, config: Any, settings: EditSettings, *, photo: bool) -> None:
        """As for all methods: the edit must have steps to act in."""
        check_window(config, settings, photo=photo)

    def learner(self, kind: Callable[[Flux, Any], Method], config: Any) -> Method | None:
        """A method of another kind on this one's weights, without its adapters; the encoders make room for it."""
        flux = self.flux.bare()
        if flux is None:
            return None
        self.release_encoders()
        return kind(flux, config)

    def show_photo(self, place: Path) -> None:
        """Load the adapter that knows a photograph: a file, or the folder of a run of the recipe ``inversion``."""
        file = file_of(place, CONTENT)
        if PHOTO not in self.adapters.specs:
            self.adapters.add(PHOTO, spec_of(file))
        self.adapters.load(file, PHOTO)
        self._photo = True

    def compose(self, others: Sequence[tuple[Path, float]]) -> None:
        """Add further sliders (files or run folders), each with its scale; they act in the same steps, and add up."""
        for place, scale in others:
            name = f"also_{len(self._also) + 1}"
            file = file_of(place, EDIT)
            self.adapters.add(name, spec_of(file))
            self.adapters.load(file, name)
            self._also[name] = scale

    @torch.no_grad()
    def edit(self, example: Example, settings: EditSettings) -> Image:
        """Draw the prompt, or the photograph that ``show_photo`` took; scale 0 is the base model, or the photograph again."""
        photo = example.source
        if photo is not None and not self._photo:
            raise UserError(
                f"{example.key or 'edit'}: {self.called} edits a photograph with an adapter that was trained on it; see the recipe"
                f" {self.per_photo}"
            )
        check_window(self.config, settings, photo=photo is not None)
        width, height = self.size(*photo.size) if photo is not None else (self.resolution, self.resolution)
        steps = self.config.steps if settings.steps is None else settings.steps
        how = Drawing(
            text=self.flux.encode_prompts([example.prompt], self.text_length),
            grid=(height // 16, width // 16),
            guidance=self.config.guidance if settings.guidance is None else settings.guidance,
            scale=settings.scale,
            skip=self.config.skip if settings.skip is None else settings.skip,
            until=steps if self.config.until is None else self.config.until,
            photo=photo is not None,
        )
        noise = self.noise(settings.seed, (width, height))
        result = self.flux.decode(self.flux.sample(self.steered(how), noise, steps), (width, height))[0]
        return result if photo is None else images.resize_result(result, photo.size)

    def noise(self, seed: int, size: tuple[int, int]) -> Tensor:
        """What a picture of ``size`` (width, height) is drawn from, ``(1, T, 64)``."""
        # On the CPU for the same picture everywhere, and in the layout in which the stock pipeline draws.
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.flux.latent_channels, size[1] // sampling.CELL, size[0] // sampling.CELL)
        return sampling.pack(torch.randn(shape, generator=generator))

    def probe(self) -> "Probe":
        """What measures the edit over scales."""
        from . import probe

        return probe.Probe(self)

    def steered(self, how: Drawing) -> sampling.VelocityFn:
        """The velocity of sampling: which adapters act in which step."""
        edit = {self.main: how.scale, **self._also}

        def velocity(x_t: Tensor, sigma: Tensor, **scales: float) -> Tensor:
            self.adapters.use(**scales)  # type: ignore[arg-type]  # no adapter may be called frozen
            return self.flux.velocity(x_t, sigma, how.text, grid=how.grid, guidance=how.guidance)

        def of_prompt(x_t: Tensor, sigma: Tensor, step: int) -> Tensor:
            return velocity(x_t, sigma, **(edit if how.skip < step < how.until else {}))

        def of_photo(x_t: Tensor, sigma: Tensor, step: int) -> Tensor:
            if not (how.skip <= step < how.until and any(edit.values())):
                return velocity(x_t, sigma, **{PHOTO: 1.0})
            if self.config.combine == "merged":
                return velocity(x_t, sigma, **{PHOTO: 1.0, **edit})
            edited = velocity(x_t, sigma, **edit)
            plain = velocity(x_t, sigma, **{PHOTO: 1.0})
            return plain + self.config.weight * (edited - plain)

        return of_photo if how.photo else of_prompt

    def metadata(self) -> dict[str, Any]:
        """Geometry, text and sampling settings, as pictures with these weights need them."""
        names = (
            "prompt",
            "training_prompt",
            "shape",
            "guidance",
            "steps",
            "skip",
            "until",
            "weight",
            "combine",
        )
        settings = {name: getattr(self.config, name) for name in names}
        return {
            "resolution": self.resolution,
            "multiple": MULTIPLE,
            "max_sequence_length": self.text_length,
            **settings,
        }

    def usage(self) -> str:
        """How a stock ``FluxPipeline`` uses the weights."""
        return (
            f"The weights in `weights/` are loaded from step {self.config.skip + 1} on by a callback; the lines are in"
            " `docs/interoperability.md`, section pairedit."
        )


def file_of(place: Path, wanted: str) -> Path:
    """The adapter file that a path means; ``UserError`` where it says that it is another adapter than the one ``wanted``."""
    file = inspection.find(place)
    recorded = adapter_files.read_record(file).get("adapter", wanted)
    if recorded != wanted:
        meant = {EDIT: "a slider", CONTENT: "what knows a photograph by heart (recipe inversion)"}[wanted]
        raise UserError(f"{place} holds the adapter {recorded!r}, not {meant}, which is called {wanted!r}")
    return file


def check_window(config: Sampling, settings: EditSettings, *, photo: bool) -> None:
    """Raise ``UserError`` where an edit that is asked for would never act."""
    steps = config.steps if settings.steps is None else settings.steps
    skip = config.skip if settings.skip is None else settings.skip
    if steps < 1:
        raise UserError(f"steps must be at least 1, but it is {steps}")
    until = steps if config.until is None else min(config.until, steps)
    if settings.scale and skip + (not photo) >= until:
        raise UserError(
            f"skip {skip}: of {steps} steps, none is left for the edit; give a smaller skip (skips={max(0, steps // 2 - 1)}), or"
            " scale 0 for a picture without it"
        )
