"""The training loop of the stages: until a point in time, on one GPU or several, with an average of the weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn

from .muon import Muon
from .processes import Processes

SAVE_EVERY = 120
"""Seconds between snapshots."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a stage may use, and how it learns."""

    seconds: float
    """For the whole stage, from making the pools to saving."""
    batch: int
    """Per process, as is the pool."""
    pool: int
    again: int
    """Repetitions of the stage before: each has its own scenes and noise."""
    device: torch.device
    peak: float | None
    """Learning rate; ``None``: the stage's own."""
    muon: bool
    eager: bool
    """Compile nothing."""


def learning_rate(peak: float, progress: float, step: int, warmup: int = 300) -> float:
    """Linear warm-up, constant, then a cosine-like fall to 2 % over the second 60 %."""
    fall = max(0.0, (progress - 0.4) / 0.6)
    return (
        peak
        * min(1.0, (step + 1) / warmup)
        * max(0.02, 0.5 * (1 + torch.cos(torch.tensor(fall * 3.14159)).item()))
    )


class Average:
    """Exponential moving average of parameters, with a warm-up."""

    def __init__(self, params: list[nn.Parameter], decay: float = 0.999):
        self.params, self.decay, self.steps = params, decay, 0
        self.values = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (self.steps + 1) / (self.steps + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.params], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average into the model and the model's values here; twice is nothing."""
        for p, value in zip(self.params, self.values, strict=True):
            kept = p.detach().clone()
            p.copy_(value)
            value.copy_(kept)


def optimizers(net: nn.Module, peak: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices (and kernels) inside blocks and AdamW for the rest."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    inner = [
        p
        for name, p in named
        if muon
        and p.ndim in (2, 4)
        and min(p.shape[:2]) > 1
        and "block" in name
        and "embed" not in name
        and "relative" not in name
    ]
    chosen = {id(p) for p in inner}
    outer = [p for _, p in named if id(p) not in chosen]
    out: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=outer[0].is_cuda)
    ]
    return [*out, Muon(inner, peak)] if inner else out


def optimise(
    net: nn.Module,
    loss_of: Callable[[float], tuple[str, Tensor]],
    finish: float,
    peak: float,
    muon: bool,
    processes: Processes,
    snapshot: Callable[[], None],
) -> None:
    """Train until a point in time with an average of the weights; the average is what stays, and what snapshots hold.

    ``loss_of`` is given the share of the time that is over.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    steppers = optimizers(net, peak, muon)
    average = Average(params, 0.9993)
    rhythm = 20 if params[0].is_cuda else 2  # steps between looks at the clock
    began, step, progress = 0.0, 0, 0.0
    sums: dict[str, list[Tensor]] = {}
    opened = saved = time.time()
    while progress < 1:
        for group in (g for o in steppers for g in o.param_groups):
            group["lr"] = learning_rate(peak, progress, step)
        name, loss = loss_of(progress)
        net.zero_grad(set_to_none=True)
        loss.backward()
        processes.mean_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for stepper in steppers:
            stepper.step()
        average.update()
        step += 1
        sums.setdefault(name, []).append(loss.detach())
        if step == 2 * rhythm:
            if params[0].is_cuda:
                torch.cuda.synchronize()
            began = time.time()
            print(f"first {step} steps took {began - opened:.0f}s", flush=True)
        if (
            began and step % rhythm == 0
        ):  # the clock of one process counts for all, so that they stop together
            progress = processes.of_first((time.time() - began) / max(1.0, finish - began))
        if step % 500 == 0 or progress >= 1:
            means = {k: round(torch.stack(v).mean().item(), 4) for k, v in sorted(sums.items())}
            if processes.rank == 0:
                print(f"step {step} {time.time() - began:.0f}s {means}", flush=True)
            sums.clear()
        if processes.rank == 0 and time.time() - saved > SAVE_EVERY:
            average.swap()
            snapshot()
            average.swap()
            saved = time.time()
    print(f"{step} steps", flush=True)
    average.swap()


def prepare_torch() -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward has been seen to fail on this kind of model
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    # An assertion of this analysis fails on FLUX's blocks with dynamic shapes (torch 2.11); eager is the way out of others.
    torch._inductor.config.triton.coalesce_tiling_analysis = False
    torch._dynamo.config.suppress_errors = True
