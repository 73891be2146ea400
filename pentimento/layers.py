"""Modules that adapters put into a host: float32 copies of small modules, and dropout that can be repeated."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Dropout(nn.Module):
    """Leaves inputs out at random, by a seed for every row instead of the global generator.

    So equal rows lose the same inputs however a batch is divided, and again when activations are recomputed.
    """

    def __init__(self, rate: float):
        """``rate``: probability in [0, 1) with which an input is left out."""
        super().__init__()
        self.rate = rate
        self.seeds: Sequence[int] = ()
        """Of the rows of a batch; none: nothing is left out."""

    @torch.compiler.disable  # whose guards would hold the seeds, which every step changes
    def forward(self, x: Tensor) -> Tensor:
        """x (n B, ...) for B seeds; several times B where a method predicts for several states of a row at once."""
        if not self.seeds:
            return x
        seeds = [self.seeds[i % len(self.seeds)] + i // len(self.seeds) for i in range(len(x))]
        kept = [
            torch.rand(x.shape[1:], device=x.device, generator=torch.Generator(x.device).manual_seed(seed))
            >= self.rate
            for seed in seeds
        ]
        return torch.where(torch.stack(kept), x / (1 - self.rate), 0)


class Whole(nn.Module):
    """A module of the host with a float32 copy per adapter that trains it whole; attributes are named as peft's.

    peft's own wrapper knows only on and off. Here scale s gives the weights ``base + s (trained - base)``, as a LoRA's
    scale does, cast to the base's dtype so that a half-precision host computes in its own.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.scales: dict[str, float] = {}

    def add(self, name: str) -> None:
        """Give an adapter its copy."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).float()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.scales:
            return self.original_module(*args, **kwargs)
        return functional_call(self.original_module, self._weights(), args, kwargs)

    def _weights(self) -> dict[str, Tensor]:
        weights = {}
        for key, base in self.original_module.named_parameters():
            trained = [
                (scale, self.modules_to_save[name].get_parameter(key)) for name, scale in self.scales.items()
            ]
            if len(trained) == 1 and trained[0][0] == 1:
                weights[key] = trained[0][1].to(
                    base.dtype
                )  # base + (trained - base) is not trained bit for bit
            else:
                start = base.float()
                weights[key] = (start + sum(scale * (value - start) for scale, value in trained)).to(
                    base.dtype
                )
        return weights
