"""ICEdit: instructed edits with FLUX.1 Fill, drawn as the right half of a diptych (arXiv:2504.20690).

The left half shows the picture, the right half is masked, and the text says that the right is the same "but" for the instruction.
One LoRA learns it, in the published mixture with experts on the layers that leave the feed-forward parts.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from .. import images
from ..adapters import ExpertLoRA, LoRA
from ..errors import UserError
from ..flux import fill
from ..flux.backbone import Posterior, Text
from ..method import EditSettings, Example

if TYPE_CHECKING:
    from ..train import Draws

TEMPLATE = (
    "A diptych with two side-by-side images of the same scene. "
    "On the right, the scene is exactly the same as on the left but {prompt}"
)
"""The published text, to the letter: the weights know no other."""
TARGETS = (
    r"x_embedder"
    r"|transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])"
)
"""The published 343 layers of FLUX.1: the input layer, the picture's stream of double blocks, single blocks whole."""
LARGEST_NATIVE = 512
MULTIPLE = 16
TALLEST = 4
"""Height over width up to which a picture is taken at full width; a taller one is scaled down to that height: its tokens would
exceed every memory."""


@dataclass(frozen=True, kw_only=True)
class DiptychLoRA(LoRA):
    """The published adapter: rank 32, alpha = rank, A drawn from N(0, 1/rank^2) ("gaussian"), B zero."""

    targets: str | tuple[str, ...] = TARGETS
    rank: int = 32


@dataclass(frozen=True, kw_only=True)
class DiptychExperts(ExpertLoRA):
    """The published mixture: four experts of rank 32, one per token, on the layers that leave the feed-forward parts (57 of
    FLUX.1's); the plain adapter on the others."""

    targets: str | tuple[str, ...] = TARGETS
    rank: int = 32


class ICEdit(fill.FillMethod):
    """One LoRA named ``edit`` on FLUX.1 Fill, plain or with experts."""

    called = "icedit"
    largest_native = LARGEST_NATIVE

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How diptychs are made, trained on and sampled."""

        resolution: int | None = None
        """Width in pixels of each half. null: what the model was made for, at most 512 (pocket: 128), as published."""
        shape: Literal["square", "aspect"] = "square"
        """Halves in training: square (published: both pictures are squeezed to resolution x resolution) or aspect (as when
        editing: resolution wide, the height by the source's aspect)."""
        prompt_template: str = TEMPLATE
        """Text given to the model; {prompt} stands for the instruction."""
        dropped_text: str = " "
        """Text given to the model, without the template, where the instruction is empty or dropped (data.caption_dropout)."""
        max_sequence_length: int | None = None
        """T5 tokens per text, 8 to 512; longer ones are cut. null: what the model was made for (FLUX.1: 512)."""
        guidance: float = 1.0
        """Guidance input while training."""
        sampling_guidance: float = 50.0
        """Guidance input while editing."""
        steps: int = 28
        """Sampling steps of an edit; the paper's tables use 50."""
        loss_on: Literal["both", "right"] = "both"
        """Which half counts in the loss: both (published), or right, the one that the edit is taken from."""
        offset_noise: float = 0.0
        """Strength of noise that is the same everywhere in a picture, added to the noise while training (published: 0,
        optionally 0.1)."""
        lora: DiptychLoRA | DiptychExperts = field(default_factory=DiptychLoRA)
        """The trained layers. With experts: lora.experts and the keys that go with it."""
        balance_weight: float = 0.0
        """Weight of the Switch transformer's load-balancing loss (arXiv:2101.03961) among experts; 0: none, as published."""

        def __post_init__(self) -> None:
            if self.resolution is not None and (self.resolution < MULTIPLE or self.resolution % MULTIPLE):
                raise ValueError(
                    f"resolution must be a multiple of {MULTIPLE} or null, not {self.resolution}"
                )
            fill.check_settings(self, "offset_noise", "balance_weight")
            if self.balance_weight and not isinstance(self.lora, ExpertLoRA):
                raise ValueError("balance_weight is for experts; set lora.experts, or leave it out")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Pixels of each half in training."""
        if self.config.shape == "square":
            return self.resolution, self.resolution
        return self.edit_size(width, height)

    def edit_size(self, width: int, height: int) -> tuple[int, int]:
        """Pixels of each half when a picture of this size is edited: ``resolution`` wide, the height rounded down to 16.

        The reference keeps heights that are no multiple of 16 and paints the rest black; see ``docs/differences.md``.
        """
        high = height if width == self.resolution else int(height * (self.resolution / width))
        fitting = min(1.0, TALLEST * self.resolution / max(1, high))
        wide, high = (
            max(MULTIPLE, int(side * fitting) // MULTIPLE * MULTIPLE) for side in (self.resolution, high)
        )
        return wide, high

    def fingerprint(self) -> str:
        """The encoders, the geometry and the text settings, as one line of JSON."""
        names = ("shape", "prompt_template", "dropped_text")
        settings = {name: getattr(self.config, name) for name in names}
        settings |= {"resolution": self.resolution, "max_sequence_length": self.text_length}
        settings |= {"method": "icedit", "encoders": self.flux.encoder_digest()}
        return json.dumps(settings, sort_keys=True)

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Posteriors ``(B, 16, h, w)`` of the diptychs, whole (x0) and with the right half hidden (condition)."""
        canvas = images.to_tensor([images.join(*self._pair(example)) for example in examples])
        return fill.encode_canvas(self.flux, canvas)

    def _pair(self, example: Example) -> tuple[Image, Image]:
        source, target = self.both(example)
        size = self.size(*source.size)
        return images.panel(source, size), images.panel(target, size)

    def views(self, example: Example) -> dict[str, Image]:
        """What Fill is given of a pair: the diptych, what is shown of it, and the mask."""
        return fill.canvas_views(*self._pair(example))

    def text(self, prompt: str) -> str:
        """The instruction in the template; an empty one is the text that stands for none."""
        return self.config.prompt_template.replace("{prompt}", prompt) if prompt else self.config.dropped_text

    def losses(self, batch: dict[str, Tensor], draws: "Draws") -> Iterator[tuple[str, Tensor]]:
        """Flow matching on the diptych: ``mean (v - (noise - x_0))^2``, over both halves unless ``loss_on`` is right."""
        self.adapters.use(edit=1.0)
        v, target = self.flow(batch, draws)
        error = (v.float() - target) ** 2
        if self.config.loss_on == "right":
            columns = batch["x0_mean"].shape[-1] // 2
            error = error.unflatten(1, (-1, columns))[:, :, columns // 2 :]
        loss = error.mean()
        if not isinstance(self.config.lora, ExpertLoRA):
            yield "flow", loss
            return
        usage = self.adapters.expert_usage(fill.ADAPTER)
        if self.config.balance_weight:
            balance = self.adapters.balance(fill.ADAPTER)
            # One sum and not two losses: both come from one forward pass, whose graph the first would free.
            yield "flow_and_balance", loss + self.config.balance_weight * balance
            yield "balance", balance.detach()
            yield "flow", loss.detach()
        else:
            yield "flow", loss
        yield from ((f"expert_{number}", share) for number, share in enumerate(usage))

    def predict(self, batch: dict[str, Tensor], draws: "Draws") -> Tensor:
        """Velocity ``(B, T, 64)`` at a random time with the adapters as they are set."""
        return self.flow(batch, draws)[0]

    def flow(self, batch: dict[str, Tensor], draws: "Draws") -> tuple[Tensor, Tensor]:
        """Velocity ``(B, T, 64)`` at a random time with the adapters as they are set, and what it should be.

        Draws, in the reference's order: posterior of x0, posterior of the condition, time, noise, offset.
        """
        flux = self.flux
        batch = {key: value.to(flux.device) for key, value in batch.items()}
        mean, std = batch["x0_mean"].float(), batch["x0_std"].float()
        x0 = flux.latents(mean, std, draws.normal_like(mean))
        shown = Posterior(batch["condition_mean"], batch["condition_std"])
        condition = fill.condition(flux, shown, draws.normal_like(mean), fill.right_half_of_latents(mean))
        sigma = torch.sigmoid(draws.normal_like(mean[:, 0, 0, 0]))
        noise = draws.normal_like(x0)
        if self.config.offset_noise:
            noise = noise + self.config.offset_noise * draws.normal_like(noise[:, :1])
        s = sigma.view(-1, 1, 1)
        x_t = (1 - s) * x0 + s * noise
        text = Text(prompt_embeds=batch["prompt_embeds"], pooled=batch["pooled"])
        grid = (mean.shape[-2] // 2, mean.shape[-1] // 2)
        v = flux.velocity(x_t, sigma, text, grid=grid, guidance=self.config.guidance, condition=condition)
        return v, noise - x0

    @torch.no_grad()
    def edit(self, example: Example, settings: EditSettings) -> Image:
        """Edit one picture; the same seed starts from the same noise whatever the number of steps."""
        source = example.source
        if source is None:
            raise UserError(f"{example.key or 'edit'}: there is no picture to edit")
        steps = self.config.steps if settings.steps is None else settings.steps
        guidance = self.config.sampling_guidance if settings.guidance is None else settings.guidance
        if steps < 1:
            raise UserError(f"steps must be at least 1, but it is {steps}")
        flux = self.flux
        picture = images.panel(source, self.edit_size(*source.size))
        # Laid out as the stock pipelines do: then the convolutions sum in the same order, to the last bit.
        pixels = images.to_tensor([images.join(picture, picture)]).contiguous(
            memory_format=torch.channels_last
        )
        mask = fill.right_half(pixels)
        shown = flux.encode_pixels(fill.hide(pixels, mask))
        # On the CPU, in the order of diffusers since 0.33, whose pipeline also draws from the whole picture's posterior.
        generator = torch.Generator().manual_seed(settings.seed)
        _, noise, draw = (torch.randn(shown.mean.shape, generator=generator) for _ in range(3))
        condition = fill.condition(flux, shown, draw.to(flux.device), mask)
        text = flux.encode_prompts([self.text(example.prompt)], self.text_length)
        self.adapters.use(edit=settings.scale)
        diptych = fill.sample(flux, noise, condition, text, steps=steps, guidance=guidance)
        return images.resize_result(images.split(diptych)[1], source.size)

    def metadata(self) -> dict[str, Any]:
        """Geometry, text and sampling settings, as an edit with these weights needs them."""
        return {
            "resolution": self.resolution,
            "multiple": MULTIPLE,
            "mask": "right half",
            "prompt_template": self.config.prompt_template,
            "max_sequence_length": self.text_length,
            "guidance": self.config.sampling_guidance,
            "steps": self.config.steps,
        }

    def usage(self) -> str:
        """How a stock ``FluxFillPipeline`` uses the weights."""
        return (
            "The diptych is the picture beside itself; the pipeline fills its right half, which is cut out. "
            "The lines are in `docs/interoperability.md`, section icedit."
        )
