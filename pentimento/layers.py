"""Modules that adapters put into a host: float32 copies of small modules, and dropout that can be repeated."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@torch.library.custom_op("pentimento::dropout", mutates_args=())
def dropout(x: Tensor, seeds: Tensor, rate: float) -> Tensor:
    """Leave elements out, those of every row by its own seed.

    An operator of its own, so that compiled code calls it as it is, and what is left out is drawn again in the backward pass
    instead of being kept.

    Args:
        x: (n B, ...) for B seeds; several times B where a method predicts for several states of a row at once.
        seeds: (B,) int64, on the CPU.
        rate: probability in [0, 1) with which an element is left out.
    """
    # Contiguous: what is drawn must not hang on the layout of x, which a gradient need not share.
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    numbers = seeds.tolist()
    for i, row in enumerate(kept):
        seed = numbers[i % len(numbers)] + i // len(numbers)
        row.bernoulli_(1 - rate, generator=torch.Generator(x.device).manual_seed(seed))
    return torch.where(kept, x.contiguous(), 0).mul_(1 / (1 - rate))


@dropout.register_fake
def _(x: Tensor, seeds: Tensor, rate: float) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.seeds, ctx.rate = inputs


def _dropout_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return dropout(gradient, ctx.seeds, ctx.rate), None, None


dropout.register_autograd(_dropout_backward, setup_context=_keep)


class Dropout(nn.Module):
    """Leaves inputs out at random, by a seed for every row instead of the global generator.

    So equal rows lose the same inputs however a batch is divided, and again when activations are recomputed.
    """

    def __init__(self, rate: float):
        """``rate``: probability in [0, 1) with which an input is left out."""
        super().__init__()
        self.rate = rate
        self.seeds: Tensor | None = None
        """(B,), of the rows of a batch; none: nothing is left out."""

    def forward(self, x: Tensor) -> Tensor:
        """x (n B, ...) for B seeds, see ``dropout``; under autocast as narrow as the layer behind would make it."""
        if self.seeds is None:
            return x
        kind = x.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return dropout(x.to(narrow), self.seeds, self.rate)


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
