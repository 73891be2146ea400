"""Several processes that pretrain together."""

import os

import torch
import torch.distributed as dist
from torch import nn


class Processes:
    """The processes of one run, one per GPU, as torchrun starts them; a plain start is one process."""

    def __init__(self, device: torch.device):
        self.count, self.rank, self.device = (
            int(os.environ.get("WORLD_SIZE", 1)),
            int(os.environ.get("RANK", 0)),
            device,
        )
        if self.count > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def mean_gradients(self, params: list[nn.Parameter]) -> None:
        if self.count == 1:
            return
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat /= self.count
        torch._foreach_copy_(
            grads,
            [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)],
        )

    def of_first(self, value: float) -> float:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], device=self.device, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)
