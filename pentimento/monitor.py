"""What one sees while it trains: progress, ``metrics.jsonl``, TensorBoard, W&B, samples and losses on held-out pictures.

A ``Monitor`` is the ``watch`` of ``train.train``. Nothing here can change what is trained: the loop restarts its random
numbers in every step, and a method's losses switch the adapters as they need them.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]  # comes with accelerate
import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from . import files, images
from .cache import Samples
from .errors import UserError, counted
from .method import EditSettings, Example, Method
from .tracking import Board
from .train import Draws, Report

if TYPE_CHECKING:
    from .recipe import Watch

Measure = Callable[[Example, Image], Mapping[str, float]]
"""Numbers on one held-out pair and what the method made of its source."""

METRICS = "metrics.jsonl"
SAMPLES = "samples"
EVENTS = "tensorboard"
REPEATS = 4
"""Draws of noise and time per held-out pair: one alone says little, and these stay the same throughout."""
LINES = 20
"""Lines of progress per stage where there is no terminal."""
CELL = 256


class Monitor(AbstractContextManager["Monitor"]):
    """Watches a training; to be used as a context, on the main process only."""

    def __init__(
        self,
        method: Method,
        out: Path,
        *,
        watch: "Watch",
        held_out: Samples | None = None,
        measure: Measure | None = None,
        seed: int = 0,
        console: Console | None = None,
        board: Board | None = None,
    ):
        """``board``: where the numbers are sent to as well."""
        shows = held_out is not None or (method.generates and watch.every > 0)
        self.gallery = Gallery(method, out, watch, held_out, measure, seed) if shows else None
        self.book = Book(out)
        self.board = board
        self.display = Display(console or Console(file=sys.stderr))

    def __call__(self, report: Report) -> None:
        """Take note of a step; raises ``UserError`` where something cannot be written."""
        if not report.losses:
            self.book.begin(report)
            self.display.begin(report)
            if self.board:
                self.board.begin(report)
        values, sheet = numbers(report), None
        if self.gallery and not (
            report.step and not report.losses
        ):  # on resuming this step was looked at already
            seen, sheet = self.gallery.look(report)
            values |= seen
        self.book.add(report, values)
        if self.board:
            self.board.add(report, values, sheet)
        self.display.show(report, values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.display.close()
        self.book.close()
        if self.board:
            self.board.close(failed=error is not None)


def numbers(report: Report) -> dict[str, float]:
    """What is written down of a step."""
    if not report.losses:
        return {}
    parts = {f"loss_{key}": value for key, value in report.losses.items()} if len(report.losses) > 1 else {}
    return {
        "loss": sum(report.losses[key] for key in report.trained),
        **parts,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "seconds": report.seconds,
        "memory_gib": memory() / 2**30,
    }


def memory() -> int:
    """Bytes: the most that tensors took on the GPU so far, else what this process takes now."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


class Gallery:
    """Held-out pictures: drawn with fixed seeds, measured, and their loss under fixed draws.

    Methods that generate draw their own prompt and need none.
    """

    def __init__(
        self,
        method: Method,
        out: Path,
        watch: "Watch",
        held_out: Samples | None,
        measure: Measure | None,
        seed: int,
    ):
        self.method, self.folder, self.watch = method, out / SAMPLES, watch
        self.held_out, self.measure, self.seed = held_out, measure, seed

    def look(self, report: Report) -> tuple[dict[str, float], Path | None]:
        """Whatever is due at this step, and the contact sheet if one was drawn; at the last step too, where anything is."""
        values: dict[str, float] = {}
        sheet = None
        if self._due(report, self.watch.every):
            values, sheet = self.draw(report)
            if self.held_out is None or self.held_out.cached:
                self.method.release_encoders()
        if self.held_out is not None and self._due(report, self.watch.loss_every or self.watch.every):
            values |= self.losses(self.held_out)
        return values, sheet

    def _due(self, report: Report, every: int) -> bool:
        return every > 0 and (report.step % every == 0 or report.step == report.steps)

    def losses(self, held_out: Samples) -> dict[str, float]:
        """Means over all held-out pairs, each with the same draws every time; ``held_out_loss`` is of those that train."""
        sums: dict[str, float] = {}
        total = 0.0
        count = len(held_out) * REPEATS
        device = next(iter(self.method.adapters.host.parameters())).device
        for index in range(len(held_out)):
            for repeat in range(REPEATS):
                draws = Draws([(self.seed, "held-out", repeat, index)], device)
                with torch.no_grad():
                    batch = held_out.batch([index], draws)
                # With gradients, though none are taken: they tell which of the numbers are trained.
                for key, loss in self.method.losses(batch, draws):
                    sums[key] = sums.get(key, 0.0) + loss.item() / count
                    total += loss.item() / count if loss.requires_grad else 0.0
        parts = {f"held_out_loss_{key}": value for key, value in sums.items()} if len(sums) > 1 else {}
        return {"held_out_loss": total, **parts}

    def _examples(self) -> list[Example]:
        if self.held_out is None:
            return [Example()] * self.watch.count
        return [row.load() for row in self.held_out.rows[: self.watch.count]]

    @torch.no_grad()
    def draw(self, report: Report) -> tuple[dict[str, float], Path | None]:
        """Edit held-out pictures; returns the means of what ``measure`` says, and the contact sheet that was written."""
        rows, labels, measured = [], [], []
        for index, example in enumerate(self._examples()):
            settings = EditSettings(seed=self.seed + index, steps=self.watch.steps)
            shown = self.method.preview(example, settings)
            rows.append(shown)
            labels.append(example.prompt or example.key or f"seed {settings.seed}")
            if self.measure and "result" in shown:
                measured.append(self.measure(example, shown["result"]))
        if not rows:
            return {}, None
        titles = [f"step {report.step}" if title == "result" else title for title in rows[0]]
        sheet = images.sheet([[*row.values()] for row in rows], titles=titles, labels=labels, cell=CELL)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            written = images.save_image(sheet, self.folder / f"{report.stage}-{report.step:06d}.png")
        except OSError as error:
            raise UserError(f"{self.folder}: samples cannot be written ({error.strerror})") from error
        keys = measured[0].keys() if measured else ()
        means = {f"held_out_{key}": sum(values[key] for values in measured) / len(measured) for key in keys}
        return means, written


class Book:
    """``metrics.jsonl`` and TensorBoard events, with each step once however often a run is resumed."""

    def __init__(self, out: Path):
        self.file, self.events = out / METRICS, out / EVENTS
        self._writer: Any = None

    def begin(self, report: Report) -> None:
        """Take back what was written after the step that a stage continues from."""
        from torch.utils.tensorboard import SummaryWriter

        kept = [
            e
            for e in self._entries()
            if e["stage"] != report.stage or (report.step and e["step"] <= report.step)
        ]
        folder = self.events / report.stage
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            files.write(self.file, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
            self.close()
            # Written anew: TensorBoard's own way to take steps back goes by the time in the names of its files.
            shutil.rmtree(folder, ignore_errors=True)
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise UserError(f"{self.file.parent}: cannot be written ({error.strerror})") from error
        for entry in kept:
            if entry.pop("stage") == report.stage:
                self._scalars(entry.pop("step"), entry)

    def _entries(self) -> list[dict[str, Any]]:
        """The lines that are whole; the last may have been cut off when a process died."""
        if not self.file.exists():
            return []
        lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def _scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        for key, value in values.items():
            if value is not None:
                self._writer.add_scalar(key, value, step)

    def add(self, report: Report, values: Mapping[str, float]) -> None:
        """One line per step; a step of which nothing is known has none."""
        if not values:
            return
        known = {
            key: value if math.isfinite(value) else None for key, value in values.items()
        }  # JSON has no infinity
        line = json.dumps({"stage": report.stage, "step": report.step, **known})
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(
                f"{self.file}: cannot be written ({error.strerror}); make room, then continue with --resume"
            ) from error
        self._scalars(report.step, known)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._writer is not None:
            self._writer.close()


class Display:
    """A bar on a terminal, some plain lines elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[values]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        self._seconds = 0.0

    def begin(self, report: Report) -> None:
        """A stage starts or continues."""
        self._seconds = 0.0
        if self.console.is_terminal:
            self.bar.start()
            self._task = self.bar.add_task(report.stage, total=report.steps, completed=report.step, values="")
        else:
            self._line(
                f"{report.stage}: {counted(report.steps - report.step, 'step')}"
                + (f" from {report.step}" * bool(report.step))
            )

    def show(self, report: Report, values: Mapping[str, float]) -> None:
        """The step's numbers."""
        if report.losses:
            self._seconds = (
                report.seconds if not self._seconds else 0.9 * self._seconds + 0.1 * report.seconds
            )
        text = described(values)
        if self._task is not None:
            self.bar.update(self._task, completed=report.step, values=text)
        elif values and self._line_is_due(report, values):
            left = (report.steps - report.step) * self._seconds
            self._line(f"{report.stage} {report.step}/{report.steps}  {text}  left {clock(left)}")

    def _line_is_due(self, report: Report, values: Mapping[str, float]) -> bool:
        looked = any(key.startswith("held_out") for key in values)
        return looked or report.step in (1, report.steps) or report.step % max(1, report.steps // LINES) == 0

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._task is not None:  # stopping a bar that never started prints an empty line
            self.bar.stop()


def described(values: Mapping[str, float]) -> str:
    """The numbers of a step in one line."""
    short = {"loss": ".4f", "grad_norm": ".3f", "lr": ".2e"}
    parts = [f"{key.replace('_', ' ')} {values[key]:{form}}" for key, form in short.items() if key in values]
    parts += [
        f"{key.replace('_', ' ')} {value:.3f}" for key, value in values.items() if key.startswith("held_out")
    ]
    if "seconds" in values:
        parts += [f"{values['seconds']:.2f} s/step", f"{values['memory_gib']:.1f} GiB"]
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
