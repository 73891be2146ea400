"""InFluxEdit: edits with FLUX.1 Fill, learnt from before/after pairs (github.com/andjoer/InFluxEdit).

Next to the noisy picture, Fill sees a condition picture, a mask and a text. Two ways to use them:

* ``edit``: the condition is the whole source picture, unmasked, under a white mask ("all may change"). The
  extra channels alone carry the source, so half the tokens of the other way are needed.
* ``split``: source and result stand side by side on one canvas, as in In-Context LoRA (arXiv:2410.23775) and
  ACE++ (arXiv:2501.02487); the right half is masked and filled.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor

from .. import images
from ..adapters import LoRA
from ..errors import UserError
from ..flux import fill, sampling
from ..flux.backbone import Posterior, Text
from ..method import EditSettings, Example

if TYPE_CHECKING:
    from ..train import Draws

TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
"""Suffixes of module names: twelve layers of a double block, but only to_q, to_k and to_v of a single one."""

USAGE = {
    "split": "The canvas is the picture beside itself; the pipeline fills its right half, which is cut out.",
    "edit": "The pipeline blanks what its mask covers, but this edit needs the whole picture beside a white mask: the condition "
    "is handed over ready-made, as `masked_image_latents` of 320 channels.",
}
"""How stock pipelines use the weights, by mode; ``docs/interoperability.md`` has the lines."""
LARGEST_NATIVE = 256
"""Long edge of a picture in the published runs; in split mode the canvas is 512 wide."""
MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class EditLoRA(LoRA):
    """The published adapter: rank 16, alpha = rank, A drawn from N(0, 1/rank^2) ("gaussian"), B zero."""

    targets: str | tuple[str, ...] = TARGETS
    rank: int = 16


class InFluxEdit(fill.FillMethod):
    """One LoRA named ``edit`` on FLUX.1 Fill, in one of two modes."""

    called = "influxedit"
    largest_native = LARGEST_NATIVE

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What the edit is learnt from and how it is sampled."""

        mode: Literal["edit", "split"] = "edit"
        """How Fill sees the source: edit (extra channels, white mask) or split (left half of a canvas)."""
        resolution: int | None = None
        """Long edge in pixels of a picture (in split mode: of each half). null: what the model was made for,
        at most 256 as in the published runs (pocket: 128)."""
        prompt_template: str = "{prompt}"
        """Text given to the model; {prompt} stands for the instruction or caption of the pair."""
        max_sequence_length: int | None = None
        """T5 tokens per prompt, 8 to 512; longer prompts are cut. null: what the model was made for (FLUX.1:
        512)."""
        mask: Literal["white", "black"] = "white"
        """Mask in edit mode. white: as documented by the authors; black: what their training script really
        feeds, for weights trained with it."""
        guidance: float = 1.0
        """Guidance input while training."""
        sampling_guidance: float = 30.0
        """Guidance input while editing."""
        steps: int = 28
        """Sampling steps of an edit."""
        weighting_scheme: sampling.Weighting = "none"
        """Which noise levels are trained (none: all alike; logit_normal, mode) or weigh more (sigma_sqrt,
        cosmap)."""
        logit_mean: float = 0.0
        """Mean of the normal under logit_normal."""
        logit_std: float = 1.0
        """Standard deviation of the normal under logit_normal."""
        mode_scale: float = 1.29
        """Strength of the mode density."""
        lora: EditLoRA = field(default_factory=EditLoRA)
        """The trained layers."""
        train_embedder: bool = False
        """Also train the input layer x_embedder as a whole (saved beside the LoRA)."""

        def __post_init__(self) -> None:
            if self.resolution is not None and self.resolution < MULTIPLE:
                raise ValueError(f"resolution must be at least {MULTIPLE} or null, not {self.resolution}")
            if self.mode == "split" and self.mask == "black":
                raise ValueError("mask: black is for mode edit; in mode split the mask is the right half")
            fill.check_settings(self)
            if not self.logit_std > 0:
                raise ValueError(f"logit_std must be above 0, but it is {self.logit_std}")

    @classmethod
    def layers(cls, config: Config) -> LoRA:
        """The LoRA, with the input layer beside it if that is trained too."""
        lora: LoRA = config.lora
        if config.train_embedder and "x_embedder" not in lora.full:
            lora = dataclasses.replace(lora, full=(*lora.full, "x_embedder"))
        return lora

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Pixels at which a picture of this size is trained and edited; in split mode those of each half."""
        return images.round_size(width, height, long_edge=self.resolution, multiple=MULTIPLE)

    def fingerprint(self) -> str:
        """The encoders, the geometry and the text settings, as one line of JSON."""
        names = ("mode", "prompt_template")
        settings = {name: getattr(self.config, name) for name in names}
        settings |= {"resolution": self.resolution, "max_sequence_length": self.text_length}
        settings |= {"method": "influxedit", "encoders": self.flux.encoder_digest()}
        return json.dumps(settings, sort_keys=True)

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Posteriors ``(B, 16, h, w)`` of what is to be drawn (x0) and of what Fill is shown (condition)."""
        pairs = [self._pair(example) for example in examples]
        sources = [source for source, _ in pairs]
        targets = [target for _, target in pairs]
        if self.config.mode == "split":
            return fill.encode_canvas(self.flux, images.to_tensor([images.join(*pair) for pair in pairs]))
        x0, condition = self.flux.encode_images(targets), self.flux.encode_images(sources)
        return {
            "x0_mean": x0.mean,
            "x0_std": x0.std,
            "condition_mean": condition.mean,
            "condition_std": condition.std,
        }

    def _pair(self, example: Example) -> tuple[Image, Image]:
        source, target = self.both(example)
        size = self.size(*source.size)
        return images.resize(images.to_rgb(source), size), images.resize(images.to_rgb(target), size)

    def views(self, example: Example) -> dict[str, Image]:
        """What Fill is given of a pair: the picture to draw, the condition, and the mask; in split mode whole canvases."""
        source, target = self._pair(example)
        if self.config.mode == "edit":
            level = 255 if self.config.mask == "white" else 0
            mask = PIL.Image.new("L", source.size, level)
            return {"target": target, "condition": source, "mask-white-changes": mask}
        return fill.canvas_views(source, target)

    def text(self, prompt: str) -> str:
        """The prompt, put into the template."""
        return self.config.prompt_template.replace("{prompt}", prompt)

    def losses(self, batch: dict[str, Tensor], draws: "Draws") -> Iterator[tuple[str, Tensor]]:
        """Flow matching on the whole picture: ``mean w(sigma) (v - (noise - x_0))^2``.

        Draws, in the reference's order: posterior of x0, posterior of the condition, noise, time.
        """
        config, flux = self.config, self.flux
        batch = {key: value.to(flux.device) for key, value in batch.items()}
        mean, std = batch["x0_mean"].float(), batch["x0_std"].float()
        x0 = flux.latents(mean, std, draws.normal_like(mean))
        condition = self._condition(batch["condition_mean"], batch["condition_std"], draws.normal_like(mean))
        noise = sampling.pack(draws.normal_like(mean))
        sigma = sampling.training_sigmas(flux.scheduler, self._times(draws, mean))
        s = sigma.view(-1, 1, 1)
        # In float32 also under bf16, where the reference rounds sigma and x_t and loses precision near 0 and 1.
        x_t = (1.0 - s) * x0 + s * noise

        self.adapters.use(edit=1.0)
        text = Text(prompt_embeds=batch["prompt_embeds"], pooled=batch["pooled"])
        grid = (mean.shape[-2] // 2, mean.shape[-1] // 2)
        v = flux.velocity(x_t, sigma, text, grid=grid, guidance=config.guidance, condition=condition)
        weight = sampling.loss_weights(config.weighting_scheme, s)
        yield "flow", (weight * (v.float() - (noise - x0)) ** 2).mean()

    def _times(self, draws: "Draws", rows: Tensor) -> Tensor:
        config = self.config
        if config.weighting_scheme == "logit_normal":
            return torch.sigmoid(config.logit_mean + config.logit_std * draws.normal_like(rows[:, 0, 0, 0]))
        return sampling.density(config.weighting_scheme, draws.uniform(), config.mode_scale)

    def _condition(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Fill's 320 channels ``(B, T, 320)``: packed latents of the condition, then the mask."""
        mask = fill.right_half_of_latents(mean)
        if self.config.mode == "edit":
            mask = torch.full_like(mask, float(self.config.mask == "white"))
        return fill.condition(self.flux, Posterior(mean, std), noise, mask)

    @torch.no_grad()
    def edit(self, example: Example, settings: EditSettings) -> Image:
        """Edit one picture; a mask of the example is not used (both modes may change everything)."""
        source = example.source
        if source is None:
            raise UserError(f"{example.key or 'edit'}: there is no picture to edit")
        steps = self.config.steps if settings.steps is None else settings.steps
        guidance = self.config.sampling_guidance if settings.guidance is None else settings.guidance
        if steps < 1:
            raise UserError(f"steps must be at least 1, but it is {steps}")
        size = self.size(*source.size)
        picture = images.resize(images.to_rgb(source), size)
        split = self.config.mode == "split"
        pixels = images.to_tensor([images.join(picture, picture) if split else picture])
        # Laid out as the stock pipelines do: then the convolutions sum in the same order, to the last bit.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        shown = self.flux.encode_pixels(fill.hide(pixels, fill.right_half(pixels)) if split else pixels)
        result = self._sample(shown, example.prompt, settings, steps=steps, guidance=guidance)
        if split:
            result = images.split(result)[1]
        return images.resize_result(result, source.size)

    def _sample(
        self, shown: Posterior, prompt: str, settings: EditSettings, *, steps: int, guidance: float
    ) -> Image:
        flux = self.flux
        # Drawn on the CPU for the same picture everywhere; noise first, as in diffusers before 0.33.
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(shown.mean.shape, generator=generator)
        draw = torch.randn(shown.mean.shape, generator=generator).to(flux.device)
        condition = self._condition(*shown, draw)
        text = flux.encode_prompts([self.text(prompt)], self.text_length)
        self.adapters.use(edit=settings.scale)
        return fill.sample(flux, noise, condition, text, steps=steps, guidance=guidance)

    def metadata(self) -> dict[str, Any]:
        """Geometry, text and sampling settings, as an edit with these weights needs them."""
        return {
            "mode": self.config.mode,
            "mask": "right half" if self.config.mode == "split" else self.config.mask,
            "resolution": self.resolution,
            "multiple": MULTIPLE,
            "prompt_template": self.config.prompt_template,
            "max_sequence_length": self.text_length,
            "guidance": self.config.sampling_guidance,
            "steps": self.config.steps,
        }

    def usage(self) -> str:
        """How a stock ``FluxFillPipeline`` uses the weights."""
        return f"{USAGE[self.config.mode]} The lines are in `docs/interoperability.md`, section influxedit-{self.config.mode}."
