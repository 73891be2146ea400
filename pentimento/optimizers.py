"""Optimizers and courses of the learning rate that a stage can name."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .errors import UserError

if TYPE_CHECKING:
    from .train import Stage


def make_optimizer(stage: "Stage", params: Sequence[nn.Parameter]) -> Optimizer:
    """The stage's optimizer; raises ``UserError`` naming the extra that is missing."""
    common: dict[str, Any] = {
        "lr": stage.peak,
        "betas": stage.betas,
        "eps": stage.eps,
        "weight_decay": stage.weight_decay,
    }
    if stage.optimizer == "prodigy":
        from prodigyopt import Prodigy

        with contextlib.redirect_stdout(None):  # it prints that it decays weights
            optimizer: Optimizer = Prodigy(
                params,
                **common,
                beta3=stage.prodigy_beta3,
                decouple=stage.prodigy_decouple,
                use_bias_correction=stage.prodigy_bias_correction,
                safeguard_warmup=stage.prodigy_safeguard_warmup,
                d0=stage.prodigy_d0,
                d_coef=stage.prodigy_d_coef,
            )
        return optimizer
    if stage.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError(
                "optimizer: adamw8bit needs the extra bnb: pip install 'pentimento[bnb]'"
            ) from error
        eight_bit: Optimizer = AdamW8bit(params, **common)
        return eight_bit
    return torch.optim.AdamW(params, **common)


def make_schedule(stage: "Stage", optimizer: Optimizer) -> LambdaLR:
    """The stage's course of the learning rate."""
    # diffusers passes over the warm-up of "constant" without a word.
    warm = stage.schedule == "constant" and stage.warmup > 0
    return get_scheduler(
        "constant_with_warmup" if warm else stage.schedule,
        optimizer,
        num_warmup_steps=stage.warmup,
        num_training_steps=stage.steps,
        num_cycles=stage.cycles,
        power=stage.power,
    )


def check(stage: "Stage") -> None:
    """Build both for one number: raises what building them for the stage's parameters would."""
    make_schedule(stage, make_optimizer(stage, [nn.Parameter(torch.zeros(1))]))


def follow(schedule: LambdaLR, optimizer: Optimizer) -> None:
    """Set the rate to what this course has at the step reached; what was loaded may be of the course of fewer steps."""
    parts = zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, peak, course in parts:
        group["lr"] = peak * course(schedule.last_epoch)


def current_lr(optimizer: Optimizer) -> float:
    """Learning rate of the coming update, with Prodigy's estimate."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))
