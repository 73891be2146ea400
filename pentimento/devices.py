"""Where training runs: the processes that train together, their devices, and what the arithmetic of a device allows."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from .errors import UserError, first_line

Precision = Literal["fp32", "bf16", "fp16"]
MIXED: Mapping[Precision, str] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
NO_FP16 = "backbone.precision: fp16 needs a GPU; use fp32 or bf16"


def processes(*, cpu: bool = False) -> PartialState:
    """The processes that train together; to be called before anything else of accelerate.

    Without a GPU accelerate has to be told, or each process of torchrun would train a copy of its own without a word.
    """
    state = PartialState(cpu=cpu or not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise UserError(
            f"{started} processes were started, but {state.num_processes} of them work together on {state.device}"
        )
    return state


def make_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    """The accelerator of a stage; raises ``UserError`` for a precision that the device does not have."""
    cpu = device.type == "cpu"
    processes(cpu=cpu)
    AcceleratorState._reset_state()  # its precision is for good otherwise: one session may train in several
    if cpu and precision == "fp16":  # accelerate would compute in float32 without a word
        raise UserError(NO_FP16)
    try:
        accelerator = Accelerator(mixed_precision=MIXED[precision], cpu=cpu)
    except ValueError as error:
        raise UserError(
            f"backbone.precision: {precision} does not work on {device.type} ({error}); use bf16 or fp32"
        ) from error
    if accelerator.num_processes > 1 and device.index not in (None, accelerator.device.index):
        raise UserError(
            f"backbone.device: {device} is one GPU, but {accelerator.num_processes} processes train together; use auto"
        )
    return accelerator


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within, kernels that ask for no device (of optimizers in 8 bits) run on this one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def explained_memory(stage: str = "") -> Iterator[None]:
    """Say what helps where memory runs out, in a stage of training or elsewhere."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(
            said in text for said in ("out of memory", "can't allocate memory", "not enough memory")
        ):
            raise
        raise UserError(
            f"{f'stages.{stage}: ' * bool(stage)}out of memory; to train: a smaller stages.{stage or 'NAME'}.batch_size (and more"
            " accumulate), a smaller config.resolution (for Infinity config.size), backbone.gradient_checkpointing=true, or"
            " backbone.precision=bf16; to edit with FLUX: backbone.offload=model, or a GGUF file as backbone.transformer_file"
            f" ({first_line(error)})"
        ) from error
