"""Seconds of one training step, with and without the caches, and of one edit: medians in a warm process.

python -m benchmarks.speed [--weights pocket] [--size 128] [--batch 4] [--steps 20] [key=value ...]
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from pentimento import data, images, recipe
from pentimento.cache import Samples
from pentimento.method import EditSettings, Method
from pentimento.optimizers import make_optimizer
from pentimento.pocket import dataset
from pentimento.train import Draws, Stage

from .cells import machine


def median(work: Callable[[], object], repeats: int, warm: int = 3) -> tuple[float, float, float]:
    """Seconds: median, fastest, slowest."""
    times = []
    for i in range(warm + repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= warm:
            times.append(time.perf_counter() - began)
    return statistics.median(times), min(times), max(times)


def stepper(method: Method, samples: Samples, stage: Stage, device: torch.device) -> Callable[[], None]:
    """One whole step: batch, forward, backward, clipping, optimizer."""
    params = method.adapters.train(*stage.train)
    optimizer = make_optimizer(stage, params)
    numbers = itertools.count()

    def step() -> None:
        n = next(numbers)
        draws = Draws([(0, "edit", n, i) for i in range(stage.batch_size)], device)
        rows = [(n * stage.batch_size + i) % 16 for i in range(stage.batch_size)]
        with torch.no_grad():
            batch = samples.batch(rows, draws)
        for _, loss in method.losses(batch, draws):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of training steps and edits.")
    parser.add_argument("--recipe", default="influxedit-edit")
    parser.add_argument("--weights", default="pocket")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    args, overrides = parser.parse_known_args()
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{machine()}; {versions}; {args.recipe}, weights {args.weights}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "pairs"
        dataset.write("recolour-hair", 16, size=args.size, out=root)
        settings = recipe.load(
            args.recipe,
            [f"data.root={root}", "data.held_out=0", f"backbone.weights={args.weights}", *overrides],
        )
        rows = data.open_data(settings.data)
        method = recipe.method_class(settings.method).load(settings.backbone, settings.config)
        stage = Stage(train=("edit",), steps=1000, batch_size=args.batch, lr=1e-4)
        device = method.adapters.train("edit")[0].device
        print("| what | median | fastest | slowest |\n|---|---|---|---|")
        for cache in ("off", "memory"):
            samples = Samples(rows, method, cache=cache)
            if cache == "memory":
                samples.precompute(release=False)
            times = median(stepper(method, samples, stage, device), args.steps)
            label = "encoders in every step" if cache == "off" else "cached latents and text"
            print(
                f"| training step, batch {args.batch}, {label} | "
                + " | ".join(f"{t:.3f} s" for t in times)
                + " |"
            )
        example = rows[0].load()
        times = median(lambda: method.edit(example, EditSettings()), max(3, args.steps // 4), warm=1)
        size = images.open_image(root / "source" / f"{example.key}.png").size
        print(
            f"| edit of {size[0]} x {size[1]}, {method.metadata()['steps']} sampling steps | "
            + " | ".join(f"{t:.2f} s" for t in times)
            + " |"
        )
    if torch.cuda.is_available():
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
