"""How FLUX.1 Fill is shown a picture side by side with its edit: a canvas whose right half is hidden and to be filled.

In-Context LoRA (arXiv:2410.23775), ACE++ (arXiv:2501.02487) and ICEdit (arXiv:2504.20690) all use it. Shapes: ``B`` pictures,
``(h, w)`` latent rows and columns of the canvas, ``T`` tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from .. import images
from ..adapters import LoRA
from . import sampling
from .backbone import Flux, Posterior, Text
from .method import FluxMethod

ADAPTER = "edit"


class FillMethod(FluxMethod):
    """What methods share that train one adapter, ``edit``, on FLUX.1 Fill."""

    variant = "fill"

    @classmethod
    def layers(cls, config: Any) -> LoRA:
        """What the adapter trains."""
        lora: LoRA = config.lora
        return lora

    @classmethod
    def loras(cls, config: Any) -> dict[str, LoRA]:
        """One adapter, ``edit``."""
        return {ADAPTER: cls.layers(config)}

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5 states ``(B, S, C)`` and CLIP vectors ``(B, D)`` of the prompts, put into the template."""
        text = self.flux.encode_prompts([self.text(p) for p in prompts], self.text_length)
        return {"prompt_embeds": text.prompt_embeds, "pooled": text.pooled}


def check_settings(config: Any, *numbers: str) -> None:
    """Settings that these methods share, and ``numbers`` that must not be negative; raises ``ValueError``."""
    if config.max_sequence_length is not None and not 8 <= config.max_sequence_length <= 512:
        raise ValueError(f"max_sequence_length must lie in 8..512, not {config.max_sequence_length}")
    if config.prompt_template.count("{prompt}") != 1:
        raise ValueError(f"prompt_template must hold {{prompt}} once: {config.prompt_template!r}")
    if config.steps < 1:
        raise ValueError(f"steps must be at least 1, but it is {config.steps}")
    for name in ("guidance", "sampling_guidance", *numbers):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must not be negative, but it is {getattr(config, name)}")


def encode_canvas(flux: Flux, canvas: Tensor) -> dict[str, Tensor]:
    """Posteriors of canvases ``(B, 3, H, W)`` in [-1, 1]: whole (``x0``) and as Fill is shown them (``condition``)."""
    x0, condition = flux.encode_pixels(canvas), flux.encode_pixels(hide(canvas, right_half(canvas)))
    return {
        "x0_mean": x0.mean,
        "x0_std": x0.std,
        "condition_mean": condition.mean,
        "condition_std": condition.std,
    }


def hide(pixels: Tensor, mask: Tensor) -> Tensor:
    """What Fill is shown of ``pixels (B, 3, H, W)`` in [-1, 1]: 0 where ``mask (B, 1, H, W)`` is 1, a grey between two levels."""
    return pixels * (1 - mask)


def right_half(pixels: Tensor) -> Tensor:
    """The mask ``(B, 1, H, W)`` of canvases ``(B, 3, H, W)``: 1 from the middle column on."""
    mask = torch.zeros_like(pixels[:, :1])
    mask[..., mask.shape[-1] // 2 :] = 1
    return mask


def right_half_of_latents(latents: Tensor) -> Tensor:
    """The same mask, in pixels, from latents ``(B, 16, h, w)`` of canvases."""
    batch, _, h, w = latents.shape
    return right_half(latents.new_zeros(batch, 3, h * sampling.CELL, w * sampling.CELL))


def condition(flux: Flux, shown: Posterior, noise: Tensor, mask: Tensor) -> Tensor:
    """Fill's 320 channels ``(B, T, 320)``: a packed draw from the posterior of what it is shown, then the mask."""
    latents = flux.latents(shown.mean.float(), shown.std.float(), noise)
    return torch.cat((latents, sampling.pack_mask(mask.to(latents.device))), dim=2)


def canvas_views(source: Image, target: Image) -> dict[str, Image]:
    """What Fill is given of a pair, as pictures: the canvas, what is shown of it, and the mask."""
    canvas = images.join(source, target)
    hidden = canvas.copy()
    # 0 in [-1, 1] lies between two 8-bit values; the picture shows the upper one.
    hidden.paste((128, 128, 128), (canvas.width // 2, 0, canvas.width, canvas.height))
    return {"target": canvas, "condition": hidden, "mask-white-changes": images.half_mask(canvas.size)}


@torch.no_grad()
def sample(flux: Flux, noise: Tensor, shown: Tensor, text: Text, *, steps: int, guidance: float) -> Image:
    """The picture that Fill draws from ``noise (1, 16, h, w)`` under its condition ``shown (1, T, 320)``."""
    h, w = noise.shape[-2:]

    def velocity(x_t: Tensor, sigma: Tensor, step: int) -> Tensor:
        return flux.velocity(x_t, sigma, text, grid=(h // 2, w // 2), guidance=guidance, condition=shown)

    latents = flux.sample(velocity, sampling.pack(noise), steps)
    return flux.decode(latents, (w * sampling.CELL, h * sampling.CELL))[0]
