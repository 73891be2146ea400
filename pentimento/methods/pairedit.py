"""PairEdit: an edit learnt from one to three before/after pairs, without words, as a slider (arXiv:2506.07992).

A *content* LoRA absorbs what the pair has in common, and a *semantic* LoRA learns the direction from source to target on top of
it. Only the source is ever noised, and it is not scaled down: the content-preserving noise schedule. The semantic LoRA alone
then carries the edit to new pictures.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters import LoRA
from ..flux.dev import CONTENT, EDIT, DevMethod, Sampling

if TYPE_CHECKING:
    from ..train import Draws

Losses = Iterator[tuple[str, Tensor]]


def preserving(x_0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Content-preserving noise: ``x_0 + sigma noise``, all ``(B, T, C)``; and the velocity of this path, ``noise``."""
    return x_0 + sigma * noise, noise


def rectified(x_0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """FLUX's own noise: ``(1 - sigma) x_0 + sigma noise``; and its velocity, ``noise - x_0``."""
    return (1 - sigma) * x_0 + sigma * noise, noise - x_0


NOISINGS: Mapping[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "preserving": preserving,
    "flow": rectified,
}


@dataclass(frozen=True, kw_only=True)
class PairTraining(Sampling):
    """What training from pairs, or from one picture, draws."""

    noising: Literal["preserving", "flow"] = "preserving"
    """preserving: the picture keeps its full strength under the noise (PairEdit); flow: it fades as the noise comes, as FLUX was
    trained."""
    noise_scale: float = 1.0
    """Factor on the noise (the paper's beta); 1 with noising flow."""
    start_step: int = 0
    """First step of the grid whose noise level is trained, counted from 0 at pure noise."""
    end_step: int | None = None
    """Last one, itself included. null: the last of the grid (27 of 28)."""
    posterior: Literal["sample", "mode"] = "sample"
    """What is taken of the autoencoder: a draw (published; equal parts of source and target then differ by a little noise), or
    the mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start_step <= self.last_step < self.steps:
            raise ValueError(
                f"start_step and end_step must be steps from 0 to {self.steps - 1}, the one not above the other, but they are"
                f" {self.start_step} and {self.last_step}"
            )
        if not self.noise_scale > 0:
            raise ValueError(f"noise_scale must be above 0, but it is {self.noise_scale}")
        if self.noising == "flow" and self.noise_scale != 1:
            raise ValueError("noise_scale is for noising preserving; leave it out")

    @property
    def last_step(self) -> int:
        """``end_step`` as a number."""
        return self.steps - 1 if self.end_step is None else self.end_step


@dataclass(frozen=True, kw_only=True)
class Noised:
    """One step's draws. Latents are ``(B, T, 64)`` in float32, ``sigma`` is ``(B,)``."""

    source: Tensor
    target: Tensor
    noise: Tensor
    """Already scaled by ``noise_scale``."""
    sigma: Tensor


class PairMethod(DevMethod):
    """A slider that is trained on noised pairs."""

    def drawn(self, batch: dict[str, Tensor], draws: "Draws") -> tuple[dict[str, Tensor], Noised]:
        """The batch on the device, and this step's noise level, latents and noise.

        Draws, in the reference's order: time, posterior of the source, noise, posterior of the target.
        """
        config, flux = self.config, self.flux
        batch = {key: value.to(flux.device) for key, value in batch.items()}
        mean = batch["source_mean"].float()
        tokens = mean.shape[-2] * mean.shape[-1] // 4
        count = config.last_step + 1 - config.start_step
        # Clamped: a uniform number may round up to 1.
        index = config.start_step + (draws.uniform() * count).long().clamp(max=count - 1)
        sigma = flux.sigmas(config.steps, tokens).to(index.device)[index]
        source = self._latents(batch, "source", draws)
        noise = config.noise_scale * draws.normal_like(source)
        # Where there is one picture only, it stands for both sides.
        target = self._latents(batch, "target", draws) if "target_mean" in batch else source
        return batch, Noised(source=source, target=target, noise=noise, sigma=sigma)

    def _latents(self, batch: Mapping[str, Tensor], side: str, draws: "Draws") -> Tensor:
        mean, std = batch[f"{side}_mean"].float(), batch[f"{side}_std"].float()
        noise = draws.normal_like(mean) if self.config.posterior == "sample" else torch.zeros_like(mean)
        return self.flux.latents(mean, std, noise)

    def noised(self, x_0: Tensor, step: Noised) -> tuple[Tensor, Tensor]:
        """A picture under this step's noise, and the velocity of its path."""
        return NOISINGS[self.config.noising](x_0, step.noise, step.sigma.view(-1, 1, 1))

    def error(self, picture: Tensor, step: Noised, batch: Mapping[str, Tensor]) -> Tensor:
        """How far the adapters, as they are set, are from drawing a picture: mean squared error of its velocity."""
        x_t, velocity = self.noised(picture, step)
        return F.mse_loss(self.predict(x_t, step.sigma, batch), velocity)


class PairEdit(PairMethod):
    """Two LoRAs on the attention of FLUX.1 [dev]: ``content`` and, trained on top of it, ``semantic``."""

    called = "pairedit"

    @dataclass(frozen=True, kw_only=True)
    class Config(PairTraining):
        """What the edit is learnt from, and how pictures are drawn with it."""

        eta: float = 4.0
        """Strength of the direction from source to target in what the semantic adapter learns."""
        content: bool = True
        """Train a content adapter first (ablation: off)."""
        semantic: Literal["direction", "reconstruction", "target"] = "direction"
        """What the semantic adapter learns: direction (published: the velocity plus eta times source minus target);
        reconstruction (ablation: to draw targets at scale 1 and sources at -1, as the visual sliders of arXiv:2311.12092); target
        (ablation: to draw targets)."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not -100 < self.eta < 100 or not self.eta:
                raise ValueError(f"eta must lie between -100 and 100 and not be 0, but it is {self.eta}")

    @classmethod
    def loras(cls, config: Any) -> Mapping[str, LoRA]:
        """Content, unless it is left out, and semantic."""
        return {CONTENT: config.lora, EDIT: config.lora} if config.content else {EDIT: config.lora}

    def losses(self, batch: dict[str, Tensor], draws: "Draws") -> Losses:
        """First the content adapter alone, then the semantic one on top of it, which is frozen but acts."""
        batch, step = self.drawn(batch, draws)
        if self.config.content:
            self.adapters.use(content=1)
            yield "content", self.error(step.source, step, batch)
        yield from SEMANTICS[self.config.semantic](self, step, batch)

    def use(self, scale: float) -> None:
        """The semantic adapter at a scale, on top of the frozen content adapter."""
        if self.config.content:
            self.adapters.use(content=1, semantic=scale, frozen=(CONTENT,))
        else:
            self.adapters.use(semantic=scale)


def direction(method: PairEdit, step: Noised, batch: Mapping[str, Tensor]) -> Losses:
    """``| v(x_t) - (velocity + eta (source - target)) |^2``: sampling goes against the velocity, so towards the target."""
    method.use(1)
    x_t, velocity = method.noised(step.source, step)
    wanted = method.config.eta * (step.source - step.target) + velocity
    yield "semantic", F.mse_loss(method.predict(x_t, step.sigma, batch), wanted)


def reconstruction(method: PairEdit, step: Noised, batch: Mapping[str, Tensor]) -> Losses:
    """Targets at scale 1, sources at scale -1, under the same noise."""
    yield from target_only(method, step, batch)
    method.use(-1)
    yield "semantic_source", method.error(step.source, step, batch)


def target_only(method: PairEdit, step: Noised, batch: Mapping[str, Tensor]) -> Losses:
    """Targets at scale 1."""
    method.use(1)
    yield "semantic", method.error(step.target, step, batch)


SEMANTICS: Mapping[str, Callable[[PairEdit, Noised, Mapping[str, Tensor]], Losses]] = {
    "direction": direction,
    "reconstruction": reconstruction,
    "target": target_only,
}
