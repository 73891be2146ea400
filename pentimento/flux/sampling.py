"""The arithmetic of FLUX.1: packing, position ids, mask channels, times of training and of sampling, Euler.

Shapes: ``B`` batch, ``(h, w)`` latent rows and columns (pixels / 8), ``T = hw/4`` tokens, ``C`` channels.
Times are ``sigma`` in [0, 1], from the clean picture to noise: ``x_t = (1 - sigma) x_0 + sigma noise``, and the
velocity ``dx/dsigma`` is ``noise - x_0`` (rectified flow, arXiv:2403.03206).
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

Weighting = Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"]

CELL = 8
"""Pixels per latent row or column."""

VelocityFn = Callable[[Tensor, Tensor, int], Tensor]
"""``(x_t (B, T, C), sigma (B,), step) -> velocity (B, T, C)``."""


def pack(latents: Tensor) -> Tensor:
    """``(B, C, h, w)`` to tokens ``(B, h/2 * w/2, 4C)``: rows of 2x2 blocks, channel order (c, dy, dx)."""
    batch, channels, height, width = latents.shape
    blocks = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of ``pack``; ``grid`` is (rows, columns) of tokens."""
    batch, _, channels = tokens.shape
    rows, columns = grid
    blocks = tokens.reshape(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(batch, channels // 4, rows * 2, columns * 2)


def pack_mask(masks: Tensor) -> Tensor:
    """``(B, 1, 8h, 8w)`` of zeros and ones to ``(B, T, 256)``: every pixel keeps a channel, none is averaged.

    A pixel's channel inside its latent cell is ``8 * row + column``; the 64 are then packed like latents.
    """
    batch, _, height, width = masks.shape
    cells = masks.reshape(batch, height // CELL, CELL, width // CELL, CELL).permute(0, 2, 4, 1, 3)
    return pack(cells.reshape(batch, CELL * CELL, height // CELL, width // CELL))


def image_ids(grid: tuple[int, int], device: torch.device) -> Tensor:
    """``(T, 3)`` position ids (0, row, column), float32 also beside bf16, which is exact only up to 256."""
    rows, columns = grid
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None]
    return ids.reshape(rows * columns, 3)


def density(weighting: Weighting, uniform: Tensor, mode_scale: float) -> Tensor:
    """Map uniform draws ``(B,)`` to training times ``u`` in [0, 1], as arXiv:2403.03206 and diffusers do.

    "mode" is ``1 - u - s (cos^2(pi u / 2) - 1 + u)``; none, sigma_sqrt and cosmap stay uniform. The times of
    logit_normal are ``sigmoid(N(mean, std))`` and need no uniform draw.
    """
    if weighting == "mode":
        return 1 - uniform - mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    return uniform


def training_sigmas(scheduler: Any, u: Tensor) -> Tensor:
    """``sigma (B,)`` at index floor(1000 u) of the scheduler's own table, which runs from 1 down to 0.001.

    The table and not ``1 - u``: a scheduler without dynamic shifting holds a shifted table (FLUX.1's is not).
    The index is clamped, for ``u`` can reach 1 in float32 (mode, a saturated sigmoid).
    """
    table: Tensor = scheduler.sigmas.to(u.device)
    steps = int(scheduler.config["num_train_timesteps"])
    return table[(u * steps).long().clamp(0, steps - 1)]


def loss_weights(weighting: Weighting, sigma: Tensor) -> Tensor:
    """Weight of the error: 1, sigma^-2 (sigma_sqrt) or 2 / (pi (1 - 2 sigma + 2 sigma^2)) (cosmap)."""
    weights: Tensor = compute_loss_weighting_for_sd3(weighting, sigma)
    return weights.float()


def sampling_sigmas(scheduler: Any, steps: int, tokens: int) -> Tensor:
    """``(steps + 1,)`` sigmas from 1 to 0; more tokens shift them towards noise, as the pipelines do."""
    settings = scheduler.config
    mu = calculate_shift(
        tokens,
        settings.get("base_image_seq_len", 256),
        settings.get("max_image_seq_len", 4096),
        settings.get("base_shift", 0.5),
        settings.get("max_shift", 1.15),
    )
    own = copy.deepcopy(scheduler)  # set_timesteps replaces the table that training reads
    own.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sigmas: Tensor = own.sigmas
    return sigmas


def euler(velocity: VelocityFn, x: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate from noise ``x``: summed in float32, kept in the model's dtype, as the stock scheduler does."""
    sigmas = sigmas.to(x.device)
    for step in range(len(sigmas) - 1):
        v = velocity(x, sigmas[step].expand(len(x)), step)
        x = (x.float() + (sigmas[step + 1] - sigmas[step]) * v).to(v.dtype)
    return x
