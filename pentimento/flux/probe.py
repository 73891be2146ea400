"""Measuring a slider: the same faces at many scales, in few calls of the model.

Until the edit sets in, a picture is the base model's whatever the scale: these steps are taken once. Shapes: ``B`` pictures,
``T`` tokens of 64 channels.
"""

from collections.abc import Mapping, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from ..method import EditSettings, Example
from . import sampling
from .dev import DevMethod, Drawing, check_window

TOGETHER = 8
"""Pictures that are drawn at once."""


class Probe:
    """What a slider on FLUX.1 [dev] draws, and what it was shown, as latents."""

    def __init__(self, method: DevMethod):
        self.method = method
        self.device = method.flux.device

    @torch.no_grad()
    def draw(self, asked: Sequence[tuple[str, int]], scales: Sequence[float]) -> Mapping[float, Tensor]:
        """Latents ``(B, T, 64)`` in float32 of pairs of prompt and seed, by raw scale; as ``edit`` draws them.

        Raises:
            UserError: the edit would never act.
        """
        parts = [self._part(asked[i : i + TOGETHER], scales) for i in range(0, len(asked), TOGETHER)]
        return {scale: torch.cat([part[scale] for part in parts]) for scale in scales}

    def _part(self, asked: Sequence[tuple[str, int]], scales: Sequence[float]) -> dict[float, Tensor]:
        method, flux, side = self.method, self.method.flux, self.method.resolution
        steps, skip = method.config.steps, method.config.skip
        text = flux.encode_prompts([prompt for prompt, _ in asked], method.text_length)
        noise = torch.cat([method.noise(seed, (side, side)) for _, seed in asked])
        sigmas = flux.sigmas(steps, noise.shape[1])

        def run(x: Tensor, scale: float, first: int, last: int) -> Tensor:
            how = Drawing(
                text=text,
                grid=(side // 16, side // 16),
                guidance=method.config.guidance,
                scale=scale,
                skip=skip,
                until=steps if method.config.until is None else method.config.until,
                photo=False,
            )
            check_window(method.config, EditSettings(scale=scale), photo=False)
            velocity = method.steered(how)
            return sampling.euler(
                lambda x_t, sigma, step: velocity(x_t, sigma, first + step), x, sigmas[first : last + 1]
            )

        shared = min(skip + 1, steps)
        begun = run(noise.to(flux.device, flux.dtype), 0.0, 0, shared)
        return {scale: run(begun, scale, shared, steps).float().cpu() for scale in scales}

    def pictures(self, latents: Tensor) -> list[Image]:
        """Latents ``(B, T, 64)`` decoded."""
        flux, side = self.method.flux, self.method.resolution
        parts = latents.to(flux.device).split(TOGETHER)
        return [picture for part in parts for picture in flux.decode(part, (side, side))]

    def shown(self, pairs: Sequence[Example]) -> Tensor:
        """The mean difference of target and source of pairs in latents, ``(T, 64)``: what the slider was shown.

        Pairs are squeezed to the size that is drawn; those of a text slider are none, and nothing is shown.
        """
        flux, side = self.method.flux, self.method.resolution
        found = []
        for pair in pairs:
            both = [picture.resize((side, side)) for picture in self.method.both(pair)]
            mean = flux.encode_images([self.method.scaled(picture) for picture in both]).mean
            source, target = flux.latents(mean, torch.zeros_like(mean), torch.zeros_like(mean)).float().cpu()
            found.append(target - source)
        return torch.stack(found).mean(0)
