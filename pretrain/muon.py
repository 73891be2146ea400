"""Muon: an optimizer for matrices whose update has equal singular values."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz steps, for the matrices of blocks (Jordan et al. 2024), with the update
    scaled to AdamW's size (arXiv:2502.16982). Matrices of one shape are treated together, which torch's class does not do:
    a hundred small matrices one by one would take a quarter of the step.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        groups = [{"params": group} for group in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            grad = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - group["momentum"])
            # A convolution's kernel counts as the matrix from patches to channels.
            update = orthogonal(grad.lerp(state["momentum"], group["momentum"]).flatten(2))
            update *= -group["lr"] * 0.2 * math.sqrt(max(update.shape[1:]))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.view_as(grad).unbind()))


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices with equal singular values, roughly: five quintic Newton-Schulz steps on (n, rows, columns)."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return (y.mT if tall else y).to(x.dtype)
