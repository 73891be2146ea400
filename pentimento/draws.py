"""Everything random in training, as a function of keys: equal keys give equal numbers, whatever was drawn before."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Random numbers of one micro-batch; row i comes from a generator seeded by its key alone.

    Keys are (seed, stage, step, position in the step's batch). Drawn on the CPU, moved to ``device``.
    """

    def __init__(self, keys: Sequence[tuple[int | str, ...]], device: torch.device):
        self.device = device
        self.seeds = tuple(derive(*key) for key in keys)
        """Of the rows, for what draws its own numbers, such as the dropout of LoRAs."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers of the shape and dtype of x (B, ...), drawn in float32."""
        rows = [torch.randn(x.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(self.device, x.dtype)

    def uniform_like(self, x: Tensor) -> Tensor:
        """Float32 numbers in [0, 1) of the shape of x (B, ...)."""
        rows = [torch.rand(x.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(self.device)

    def uniform(self) -> Tensor:
        """(B,) float32 in [0, 1)."""
        return torch.stack([torch.rand((), generator=generator) for generator in self.generators]).to(
            self.device
        )

    def twin(self) -> "Draws":
        """Draws that go on with the same numbers: for a second prediction from the same noise."""
        twin = Draws((), self.device)
        twin.seeds = self.seeds
        twin.generators = [generator.clone_state() for generator in self.generators]
        return twin


def derive(*key: int | str) -> int:
    """A seed of 63 bits from a key; keys that differ anywhere give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
