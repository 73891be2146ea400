"""What benchmarks of many small trainings share: a pool of workers, a training that nothing watches, tables with intervals."""

import math
import multiprocessing
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch

from pentimento import data, metrics, run, runfolder, train
from pentimento.cache import Samples
from pentimento.method import Method
from pentimento.recipe import Recipe

Gathered = dict[tuple[str, str], dict[str, list[float]]]
"""Values of the columns, by row and table."""


def machine() -> str:
    """The GPU's name, or the kind of CPU and the threads that torch takes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each; where there are GPUs, every worker has one of them as torch's current device."""
    spawning = multiprocessing.get_context("spawn")
    numbers: SimpleQueue[int] = spawning.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(workers, spawning, begin, (numbers,)) as made:
        yield made


def begin(numbers: "SimpleQueue[int]") -> None:
    """What a worker does first."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


def trained(plan: Recipe, method: Method, out: Path, *, release: bool = True) -> Path:
    """A run folder as ``run.train_run`` leaves it, without what is watched while it trains.

    ``release``: free the method's encoders before.
    """
    method.adapters.reset(plan.seed)
    rows = data.open_data(plan.data)
    samples = Samples(rows, method, cache="memory", folder=out / run.CACHE)
    samples.precompute(lambda done, total: None, release=release)
    record = run.record_of(plan, method, run.shared_prompt(rows))
    how = train.Run(out=out, seed=plan.seed, precision=run.precision_of(method), record=record)
    train.train(method, plan.stages, samples, how)
    runfolder.record(out, plan, {})
    return out


def intervals(gathered: Gathered) -> dict[str, Any]:
    """By table and row, for every column its mean and 95 % bootstrap interval; null where there is no number."""
    report: dict[str, Any] = {}
    for (row, table), columns in gathered.items():
        report.setdefault(table, {})[row] = {
            name: [None if math.isnan(x) else round(x, 3) for x in metrics.interval(values)]
            for name, values in columns.items()
        }
    return report


def show(report: Mapping[str, Any]) -> None:
    """The report as Markdown."""
    for table, rows in report.items():
        columns = list(next(iter(rows.values())))
        print(f"\n{table}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        for name, values in rows.items():
            said = [cell_text(*values[column]) for column in columns]
            print(f"| {name} | {' | '.join(said)} |")


def cell_text(mean: float | None, low: float | None, high: float | None) -> str:
    """A mean with its interval, where there is one."""
    return "-" if mean is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def words(text: str) -> list[str]:
    """What commas part."""
    return text.split(",")
