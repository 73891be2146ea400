"""Settings of the FLUX backbone: the recipe's ``backbone`` section. ``Flux.load(config, variant)`` takes it.

It stands alone, without torch, so that recipes are read without loading a deep-learning library.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Which weights, on which device, in which arithmetic."""

    weights: str = "pocket"
    """Base model: `pocket` (the small models that ship), a diffusers-format folder, or a hub id such as
    black-forest-labs/FLUX.1-Fill-dev."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the frozen model; adapters are always float32. `auto`: bf16 on CUDA, else fp32."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: slower, far less memory. null: on for models above a
    billion parameters."""
    compile: bool = False
    """Compile the transformer's repeated blocks: the first step takes long, later ones are faster."""
    attention: str | None = None
    """Attention backend by diffusers' name, such as `native`, `_native_flash` or `flash`. null: torch
    chooses, on CUDA never cuDNN's."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` or `mps`."""
