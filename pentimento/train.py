"""The training loop. There is one, for all methods.

A step takes ``batch_size * accumulate * processes`` samples of one picture size and lets the method compute its losses; each is
back-propagated before the next is computed, so that one graph is alive at a time and a method may switch adapters between
its losses. Everything random is a function of (seed, stage, step, position in the batch): equal batches see equal noise
however they are divided among micro-steps and processes, and a resumed run is the uninterrupted one bit for bit.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from . import checkpoint, optimizers
from .checkpoint import Interrupted, Saved, Stop
from .devices import NO_FP16, current, explained_memory, make_accelerator
from .devices import Precision as Precision
from .devices import processes as processes
from .draws import Draws as Draws
from .draws import derive as derive
from .errors import UserError, counted
from .method import Method
from .optimizers import current_lr, follow, make_optimizer, make_schedule

if TYPE_CHECKING:
    from .cache import Loaded, Samples

LOWEST_FACTOR, HIGHEST_RATE = 0.01, 0.1
"""Of prodigy's lr, and of the others': beyond them it was meant for the other."""
SMALLEST_SCALE = 2.0**-10


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One uninterrupted optimisation of some of a method's adapters."""

    train: tuple[str, ...]
    """Names of the adapters and tensors to optimise."""
    steps: int
    """Updates of the weights. A step sees batch_size * accumulate * processes samples."""
    lr: float | None = None
    """Learning rate at its peak; for prodigy a factor on its own estimate, 1 unless there is reason. null: what suits the
    optimizer, 1 for prodigy and 1e-4 for the others."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    """adamw; adamw8bit (its state in 8 bits, needs the extra bnb); prodigy (finds its step size, arXiv:2306.06101)."""
    batch_size: int = 1
    """Samples computed at once by each process; memory grows with it."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one update: like a larger batch_size, without its memory."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square, per step."""
    eps: float = 1e-8
    """Keeps the update finite where gradients vanish."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm over all trained weights. 0: never."""
    schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Course of the learning rate over the steps, as in diffusers; constant with a warmup has one. Where a continued run
    has more steps than before, it follows the course over all of them from there on; what was done had the shorter one."""
    warmup: int = 0
    """Steps in which the learning rate rises from 0."""
    cycles: int = 1
    """Restarts of cosine_with_restarts."""
    power: float = 1.0
    """Exponent of polynomial."""
    prodigy_beta3: float | None = None
    """Prodigy: decay of the average behind its step size. null: the square root of the second beta."""
    prodigy_decouple: bool = True
    """Prodigy: decoupled weight decay, as in AdamW."""
    prodigy_bias_correction: bool = True
    """Prodigy: Adam's bias correction."""
    prodigy_safeguard_warmup: bool = True
    """Prodigy: keep the estimate of the step size sound during a warm-up."""
    prodigy_d0: float = 1e-6
    """Prodigy: first estimate of the step size."""
    prodigy_d_coef: float = 1.0
    """Prodigy: factor on the estimate; the way to make it bolder or more careful."""
    save_every: int = 500
    """Save everything needed to continue every so many steps; a crash loses at most these."""
    keep_last: int = 2
    """Saved steps that are kept, besides keep_steps."""
    keep_steps: tuple[int, ...] = ()
    """Steps that are saved and kept whatever else is."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train is empty; name the adapters that this stage trains")
        if len(set(self.train)) < len(self.train):
            raise ValueError(f"train names an adapter twice: {', '.join(self.train)}")
        for name in ("steps", "batch_size", "accumulate", "cycles", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        for name in ("lr", "eps", "power", "prodigy_d0", "prodigy_d_coef"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, but it is {getattr(self, name)}")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, but it is {getattr(self, name)}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must lie between 0 and the {self.steps} steps, but it is {self.warmup}")
        decays = (*self.betas, *([] if self.prodigy_beta3 is None else [self.prodigy_beta3]))
        if not all(0 <= beta < 1 for beta in decays):
            raise ValueError(
                f"betas (and prodigy_beta3) must be at least 0 and below 1, but they are {decays}"
            )
        if wrong := [step for step in self.keep_steps if not 1 <= step <= self.steps]:
            raise ValueError(
                f"keep_steps must be steps of the stage, from 1 to {self.steps}, but it names {wrong[0]}"
            )
        self._check_rate()

    def _check_rate(self) -> None:
        """Rates of the one kind of optimizer are four orders of magnitude from those of the other."""
        if self.optimizer == "prodigy" and self.peak < LOWEST_FACTOR:
            raise ValueError(
                f"lr is {self.peak:g}, but prodigy multiplies its own estimate with it; set lr=1, or null for its default (or"
                " another optimizer)"
            )
        if self.optimizer != "prodigy" and self.peak > HIGHEST_RATE:
            raise ValueError(
                f"lr is {self.peak:g}, which {self.optimizer} does not learn with; set lr=1e-4, or null for its default (1 suits"
                " prodigy)"
            )

    @property
    def peak(self) -> float:
        """The learning rate at its peak: ``lr``, or what stands for null."""
        return self.lr if self.lr is not None else 1.0 if self.optimizer == "prodigy" else 1e-4


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all stages of a training share."""

    out: Path
    """Run folder: ``checkpoints/`` and ``weights/`` are written there."""
    seed: int = 0
    precision: Precision = "fp32"
    """Of the frozen backbone's arithmetic; adapters and their optimizer are float32."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What every saved weights file says of where it comes from, see ``Adapters.save``."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened in one step; before the first one of a stage, and on resuming, one without losses."""

    stage: str
    step: int
    """Steps done in this stage."""
    steps: int
    """Steps that the stage has."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Means over the step's samples, of all that the method yielded."""
    trained: tuple[str, ...] = ()
    """Which of them were back-propagated; the others only tell."""
    grad_norm: float = 0.0
    """Norm of all gradients before clipping."""
    lr: float = 0.0
    """Learning rate of this step; under prodigy multiplied with its own estimate."""
    seconds: float = 0.0
    """Duration of the step, data included."""


Watch = Callable[[Report], None]


def train(
    method: Method, stages: Mapping[str, Stage], samples: "Samples", run: Run, watch: Watch | None = None
) -> None:
    """Run the stages of a recipe in order; what a former call saved in ``run.out`` is continued.

    ``watch`` is called on the main process after every step.

    Raises:
        UserError: nothing to train on, a loss that is not finite, too little memory, a folder that cannot be written.
        Interrupted: Ctrl-C or SIGTERM, after the step under way was saved.
    """
    if not stages:
        raise UserError("stages is empty; name at least one, with `train` and `steps`")
    device = _device(method, stages)
    state = processes(cpu=device.type == "cpu")
    if state.is_main_process:
        checkpoint.prepare(run.out)
    state.wait_for_everyone()
    with current(device), checkpoint.deferred_signals(patient=state.num_processes > 1) as stop:
        for name in stages:
            fit(method, stages, name, samples, run, watch if state.is_main_process else None, stop)
            # The next stage reads which steps are saved, while the main process still deletes some.
            state.wait_for_everyone()
    if state.is_main_process:
        last, stage = list(stages.items())[-1]
        checkpoint.save_weights(run.out, method.adapters, run.record, stage=last, step=stage.steps)
    state.wait_for_everyone()


def fit(
    method: Method,
    stages: Mapping[str, Stage],
    name: str,
    samples: "Samples",
    run: Run,
    watch: Watch | None,
    stop: Stop,
) -> None:
    """Run one stage, from where it stopped."""
    stage = stages[name]
    params = method.adapters.train(*stage.train)
    accelerator = make_accelerator(run.precision, params[0].device)
    plain = make_optimizer(stage, params)
    # Not prepared: accelerate would step the schedule once per process.
    schedule = make_schedule(stage, plain)
    optimizer = accelerator.prepare(plain)
    size = stage.batch_size * stage.accumulate * accelerator.num_processes
    kept = {"optimizer": optimizer, "schedule": schedule, "scaler": accelerator.scaler}
    begun = resume(method, stages, name, run, kept, size)
    if begun >= stage.steps:
        return
    report = partial(Report, stage=name, steps=stage.steps)
    if watch:
        watch(report(step=begun))
    batches = islice(order(samples.buckets().values(), size, derive(run.seed, name)), begun, stage.steps)
    stream = samples.stream(micro_batches(batches, stage, accelerator))

    for step in range(begun + 1, stage.steps + 1):
        start = time.perf_counter()
        # Restarted in every step, so that nothing drawn elsewhere (samples, workers) can change what follows.
        key = (run.seed, name, step)
        set_seed(derive(*key, accelerator.process_index) % 2**32)
        with explained_memory(name):
            losses, trained = backward(method, stage, samples, stream, accelerator, step=key)
            average_gradients(params, accelerator)
            means, stopping = agree(losses, stop.requested, accelerator)
            grad_norm = float(accelerator.clip_grad_norm_(params, stage.max_grad_norm or math.inf))
            require_finite(means, grad_norm, accelerator, run.out, f"stages.{name}, step {step}")
            lr = current_lr(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:  # fp16: gradients overflowed, the scale was lowered
            schedule.step()
        took = time.perf_counter() - start

        if watch:
            watch(report(step=step, losses=means, trained=trained, grad_norm=grad_norm, lr=lr, seconds=took))
        if accelerator.num_processes == 1:
            stopping = stop.requested  # several must agree, which they do in the next step
        due = step % stage.save_every == 0 or step in stage.keep_steps or step == stage.steps
        if accelerator.is_main_process and (due or stopping):
            state = {key: part.state_dict() for key, part in kept.items() if part is not None}
            save(method, stages, name, step, run, {**state, "samples": size})
        if stopping:
            accelerator.wait_for_everyone()  # for what the main process saves
            raise Interrupted(
                f"stopped after step {step} of {name}; continue with: pentimento train {run.out} --resume"
            )


def backward(
    method: Method,
    stage: Stage,
    samples: "Samples",
    stream: Iterator["Loaded"],
    accelerator: Accelerator,
    *,
    step: tuple[int | str, ...],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Add up this process's gradients of one step; returns its mean losses, and which of them have gradients."""
    means: dict[str, Tensor] = {}
    trained: dict[str, None] = {}
    # Not the accelerator's, which is always the first GPU where there is but one process.
    device = method.adapters.parameters(*stage.train)[0].device
    for micro in range(stage.accumulate):
        draws = Draws([(*step, position) for position in share(stage, micro, accelerator)], device)
        with torch.no_grad():
            batch = samples.batch(next(stream), draws)
        method.adapters.drop(draws.seeds)
        losses = method.losses(batch, draws)
        while True:
            with accelerator.autocast():
                named = next(losses, None)
            if named is None:
                break
            key, loss = named
            if loss.requires_grad:  # else it belongs to adapters that this stage does not train
                accelerator.backward(loss / stage.accumulate)
                trained[key] = None
            means[key] = means.get(key, 0) + loss.detach().float() / stage.accumulate
        method.adapters.drop(())
    if not trained:
        raise UserError(
            f"train: no loss of the method depends on {', '.join(stage.train)}; name what it trains"
        )
    return means, tuple(trained)


def average_gradients(params: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Data parallelism for adapters: average their few gradients once per step, in one message.

    Without a DDP wrapper a method may run the backbone any number of times per step, with any adapters switched on.
    """
    if accelerator.num_processes > 1:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for p, part in zip(params, mean.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p).clone()


def agree(
    losses: Mapping[str, Tensor], stop: bool, accelerator: Accelerator
) -> tuple[dict[str, float], bool]:
    """Losses averaged over the processes, and whether any of them was asked to stop."""
    flag = torch.tensor(float(stop), device=next(iter(losses.values())).device)
    values = accelerator.reduce(torch.stack([*losses.values(), flag]), "mean").tolist()
    return dict(zip(losses, values[:-1], strict=True)), values[-1] > 0


def order(buckets: Iterable[Sequence[int]], size: int, seed: int) -> Iterator[list[int]]:
    """Batches of ``size`` samples of one bucket, endlessly; every epoch goes once through all samples.

    What is left of a bucket at the end of an epoch opens its first batch in the next: none is dropped or favoured.
    """
    queues: dict[int, list[int]] = {}
    for bucket in buckets:
        queues |= dict.fromkeys(bucket, [])
    epoch = sorted(queues)
    rng = random.Random(seed)
    while True:
        rng.shuffle(epoch)
        for sample in epoch:
            queue = queues[sample]
            queue.append(sample)
            if len(queue) == size:
                yield queue.copy()
                queue.clear()


def share(stage: Stage, micro: int, accelerator: Accelerator) -> range:
    """Positions in a step's batch that this process takes in a micro-step."""
    first = (micro * accelerator.num_processes + accelerator.process_index) * stage.batch_size
    return range(first, first + stage.batch_size)


def micro_batches(
    batches: Iterable[Sequence[int]], stage: Stage, accelerator: Accelerator
) -> Iterator[list[int]]:
    """This process's share of each step's batch, one micro-step after the other."""
    for batch in batches:
        for micro in range(stage.accumulate):
            yield [batch[position] for position in share(stage, micro, accelerator)]


def save(
    method: Method, stages: Mapping[str, Stage], name: str, step: int, run: Run, state: Mapping[str, Any]
) -> None:
    """Write the checkpoint of a step, then delete those that are too old."""
    folder = checkpoint.folder_of(run.out, name, step)
    saved = Saved(stage=name, step=step, folder=folder, index=list(stages).index(name))
    checkpoint.save(run.out, saved, method.adapters, state, run.record)
    checkpoint.prune(run.out, name, stages[name].keep_last, stages[name].keep_steps)


def resume(
    method: Method, stages: Mapping[str, Stage], name: str, run: Run, kept: Mapping[str, Any], size: int
) -> int:
    """Put everything into the state of the stage's newest checkpoint; returns its step, 0 if there is none.

    Raises:
        UserError: a checkpoint that is damaged or of another batch size, or a finished stage that is to go on although the
            next one has begun.
    """
    every = checkpoint.saved_steps(run.out)
    mine = [saved for saved in every if saved.stage == name]
    if not mine:
        return 0
    newest = mine[-1]
    state = checkpoint.load(newest, method.adapters)
    if newest.step < stages[name].steps:
        if later := [saved.stage for saved in every if saved.index > newest.index]:
            raise UserError(
                f"stages.{name}.steps: the stage cannot go on after step {newest.step}, since {later[0]} has begun on top of "
                "it; only the last stage can be made longer"
            )
        if state["samples"] != size:
            raise UserError(
                f"{newest.folder}: a step had {counted(state['samples'], 'sample')} (batch_size * accumulate * processes), now it has "
                f"{size}; continue with as many processes as before"
            )
    for key, part in kept.items():
        if part is not None:
            part.load_state_dict(state[key])
    follow(kept["schedule"], kept["optimizer"])
    return newest.step


def check(stages: Mapping[str, Stage], precision: str, device: str) -> None:
    """What can be known of stages and of a recipe's ``backbone`` section before weights are loaded.

    Raises:
        UserError: an optimizer whose extra is missing, or a precision that the device does not have.
    """
    for stage in stages.values():
        optimizers.check(stage)
    if precision == "fp16" and (device == "cpu" or not torch.accelerator.is_available()):
        raise UserError(NO_FP16)


def check_loaded(method: Method, stages: Mapping[str, Stage], precision: Precision) -> None:
    """The rest, once they are: adapters that the method does not have, and the precision on its device."""
    for stage in stages.values():
        make_accelerator(precision, method.adapters.train(*stage.train)[0].device)


def _device(method: Method, stages: Mapping[str, Stage]) -> torch.device:
    return method.adapters.train(*next(iter(stages.values())).train)[0].device


def require_finite(
    means: Mapping[str, float], grad_norm: float, accelerator: Accelerator, out: Path, where: str
) -> None:
    """Stop before a broken number reaches the weights."""
    wrong = {f"the loss {key}": value for key, value in means.items() if not math.isfinite(value)}
    scaler = accelerator.scaler
    # Under fp16 an overflow of the scaled gradients is part of the method, as long as the scale can still fall.
    if not math.isfinite(grad_norm) and (scaler is None or scaler.get_scale() < SMALLEST_SCALE):
        wrong["the norm of the gradients"] = grad_norm
    if wrong:
        what, value = next(iter(wrong.items()))
        saved = checkpoint.saved_steps(out)
        kept = f"Step {saved[-1].step} of {saved[-1].stage} is saved" if saved else "Nothing was saved yet"
        raise UserError(
            f"{where}: {what} is {value}; training was stopped before it reached the weights. {kept}. "
            "Try a lower lr or a warmup, or backbone.precision bf16 or fp32"
        )
