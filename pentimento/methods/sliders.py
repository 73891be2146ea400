"""Concept Sliders on FLUX.1 [dev], the baselines of PairEdit: from pairs of pictures, and from words (arXiv:2311.12092).

The image slider draws targets at scale 1 and sources at scale -1. The text slider learns from no pictures: on the way to a
picture of the target prompt, its velocity is to be moved from the negative prompt's towards the positive one's.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flux.backbone import Text
from ..flux.dev import AttentionLoRA, DevMethod, Sampling
from ..method import Example
from .pairedit import PairMethod, PairTraining

if TYPE_CHECKING:
    from ..train import Draws

TEXTS = ("target", "positive", "negative")


class ImageSlider(PairMethod):
    """One LoRA, ``semantic``: target pictures at scale 1, source pictures at scale -1."""

    called = "image-slider"

    @dataclass(frozen=True, kw_only=True)
    class Config(PairTraining):
        """How the slider is trained and how pictures are drawn with it."""

        noising: Literal["preserving", "flow"] = "flow"
        """flow: the picture fades as the noise comes, as FLUX was trained; preserving: it keeps its full strength (PairEdit)."""

    def losses(self, batch: dict[str, Tensor], draws: "Draws") -> Iterator[tuple[str, Tensor]]:
        """Both sides under the same noise, the target first."""
        batch, step = self.drawn(batch, draws)
        self.adapters.use(semantic=1)
        yield "target", self.error(step.target, step, batch)
        self.adapters.use(semantic=-1)
        yield "source", self.error(step.source, step, batch)


@dataclass(frozen=True, kw_only=True)
class FixedLoRA(AttentionLoRA):
    """The published adapter of text sliders: B stays at random orthonormal columns, and only A is trained."""

    init: Literal["gaussian", "default", "kaiming", "orthogonal"] = "orthogonal"


class TextSlider(DevMethod):
    """One LoRA, ``semantic``, learnt from three prompts."""

    called = "text-slider"

    @dataclass(frozen=True, kw_only=True)
    class Config(Sampling):
        """The prompts, and how pictures are drawn."""

        target: str = "picture of a person"
        """What the slider changes."""
        positive: str = "photo of a person, smiling, happy"
        """What it is at scale 1."""
        negative: str = "photo of a person, frowning"
        """What it is at scale -1."""
        preserve: tuple[str, ...] = ()
        """Concepts that the slider must not change, such as [male person, female person]: each step puts one of them before all
        three prompts, so that the change is the same for all."""
        eta: float = 2.0
        """Strength of the direction from negative to positive."""
        renormalise: bool = True
        """Scale what is learnt to the norm of the positive prompt's velocity, as published for FLUX."""
        steps: int = 30
        """Sampling steps, in training too: a step of training first draws the target prompt up to a random one of them."""
        lora: FixedLoRA = field(default_factory=FixedLoRA)
        """The trained layers."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if empty := [name for name in TEXTS if not getattr(self, name).strip()]:
                raise ValueError(f"{empty[0]} is empty; the slider is learnt from three prompts")
            if self.positive == self.negative:
                raise ValueError(
                    f"positive and negative are both {self.positive!r}; there is nothing to learn"
                )

    @property
    def prompts(self) -> list[list[str]]:
        """Target, positive and negative prompt, once for each of the concepts to preserve."""
        texts = [getattr(self.config, name) for name in TEXTS]
        return [[f"{concept} {text}".strip() for text in texts] for concept in self.config.preserve or ("",)]

    def fingerprint(self) -> str:
        """As for all sliders, and the prompts."""
        return json.dumps({"prompts": self.prompts, "of": super().fingerprint()}, sort_keys=True)

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """No pictures: rows ``(B, 16, h, w)`` of zeros, of the shape that is drawn."""
        side = self.resolution // 8
        return {"blank": torch.zeros(len(examples), self.flux.latent_channels, side, side)}

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """All prompts of the slider for each row: T5 states ``(B, P, 3, S, C)`` and CLIP vectors ``(B, P, 3, D)``."""
        every = [self.flux.encode_prompts(texts, self.text_length) for texts in self.prompts]
        embeds, pooled = torch.stack([t.prompt_embeds for t in every]), torch.stack([t.pooled for t in every])
        return {
            "prompt_embeds": torch.stack([embeds] * len(prompts)), "pooled": torch.stack([pooled] * len(prompts)),
        }  # fmt: skip

    def losses(self, batch: dict[str, Tensor], draws: "Draws") -> Iterator[tuple[str, Tensor]]:
        """``| v(x, target) - w |^2`` where ``w`` is ``v_target + eta (v_positive - v_negative)`` without the adapter.

        Draws: concept to preserve, how far the picture is drawn, its noise.
        """
        config, flux = self.config, self.flux
        batch = {key: value.to(flux.device) for key, value in batch.items()}
        rows = torch.arange(len(batch["blank"]), device=flux.device)
        concept = (draws.uniform() * len(self.prompts)).long().clamp(max=len(self.prompts) - 1)
        embeds, pooled = batch["prompt_embeds"][rows, concept], batch["pooled"][rows, concept]
        texts = [Text(prompt_embeds=embeds[:, n], pooled=pooled[:, n]) for n in range(len(TEXTS))]
        until = (draws.uniform() * config.steps).long().clamp(max=config.steps - 1)
        noise = draws.normal_like(batch["blank"].flatten(1).view(len(rows), -1, 4 * flux.latent_channels))
        x_t, sigma = self._underway(noise, texts[0], until)
        with torch.no_grad():
            self.adapters.use()
            target, positive, negative = (self._predict(x_t, sigma, text) for text in texts)
            wanted = self.wanted(target, positive, negative)
        self.adapters.use(semantic=1)
        yield "text", F.mse_loss(self._predict(x_t, sigma, texts[0]), wanted)

    def wanted(self, target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """What is learnt, from the velocities ``(B, T, 64)`` of the three prompts; norms are those of whole pictures."""
        moved = target + self.config.eta * (positive - negative)
        if not self.config.renormalise:
            return moved
        norms = [torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True) for v in (positive, moved)]
        return moved * (norms[0] / norms[1])

    @torch.no_grad()
    def _underway(self, noise: Tensor, text: Text, until: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures of the base model, each drawn up to a step of its own, and the noise levels there."""
        self.adapters.use()
        sigmas = self.flux.sigmas(self.config.steps, noise.shape[1]).to(noise.device)
        x_t = noise
        for step in range(int(until.max())):
            v = self._predict(x_t, sigmas[step].expand(len(x_t)), text)
            moved = x_t + (sigmas[step + 1] - sigmas[step]) * v
            x_t = torch.where((step < until).view(-1, 1, 1), moved, x_t)
        return x_t, sigmas[until]

    def _predict(self, x_t: Tensor, sigma: Tensor, text: Text) -> Tensor:
        side = self.resolution // 16
        return self.flux.velocity(x_t, sigma, text, grid=(side, side), guidance=self.config.guidance).float()
