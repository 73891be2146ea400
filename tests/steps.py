"""What tests of methods share of a training step: noise that is known, pairs as batches, an adapter with an effect."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pentimento.method import Example, Method


class Noise:
    """Draws of one generator per row, as those of training: row i does not depend on the others. Notes what is asked for."""

    def __init__(self, *seeds: int):
        self.rows = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.asked: list[object] = []

    def normal_like(self, x: Tensor) -> Tensor:
        self.asked.append(tuple(x.shape))
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in self.rows])

    def uniform(self) -> Tensor:
        self.asked.append("uniform")
        return torch.cat([torch.rand(1, generator=g) for g in self.rows])


def awaken(method: Method) -> Method:
    """Give the adapter ``edit`` an effect: its B matrices start at zero."""
    torch.manual_seed(0)
    for parameter in method.adapters.train("edit"):
        torch.nn.init.normal_(parameter, std=0.2)
    return method


def encoded(method: Method, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The batch of a step."""
    return method.encode(examples) | method.encode_text([e.prompt for e in examples])


def flow(method: Method, batch: dict[str, Tensor], noise: Noise) -> Tensor:
    """The loss of FLUX's velocity."""
    return dict(method.losses(batch, noise))["flow"]
