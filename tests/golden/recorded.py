"""What the golden tests of several methods share: recorded random numbers, the recorded FLUX, and comparisons."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pentimento.flux import loading
from pentimento.flux.backbone import Flux


@dataclass
class Recorded:
    """Stands for ``Draws``: hands out recorded numbers in the order in which they are asked for."""

    normals: list[Tensor]
    uniforms: list[Tensor] = field(default_factory=list)

    def normal_like(self, x: Tensor) -> Tensor:
        drawn = self.normals.pop(0)
        assert drawn.shape == x.shape
        return drawn

    def uniform(self) -> Tensor:
        return self.uniforms.pop(0)


def tiny(root: Path, folder: str = "tiny_flux_fill", variant: loading.Variant = "fill") -> Flux:
    """The recorded checkpoint; subsets hold no text encoders, so it is put together from its parts."""
    weights = loading.Weights(name="golden", folder=root / folder, variant=variant)
    transformer = loading.load_transformer(weights, torch.float32)
    scheduler = loading.load_scheduler(weights)
    return Flux(weights, transformer, scheduler, device=torch.device("cpu"), dtype=torch.float32)


def watch(flux: Flux) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Inputs and outputs of every call of the transformer."""
    calls: list[tuple[dict[str, Tensor], Tensor]] = []
    flux.transformer.register_forward_hook(
        lambda m, a, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True
    )
    return calls


def distance(ours: Tensor | None, theirs: Tensor) -> float:
    """The largest difference, as a part of the largest value; of equal tensors 0, also where all is 0."""
    assert ours is not None
    difference = (ours.detach() - theirs).abs().max()
    return float(difference / theirs.abs().max()) if difference else 0.0


def close(ours: Tensor | None, theirs: Tensor, tolerance: float) -> None:
    """Equal within ``tolerance`` of the largest value."""
    assert distance(ours, theirs) <= tolerance
