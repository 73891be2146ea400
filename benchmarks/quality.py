"""How well an edit is learnt, on the drawn world where the truth is known.

python -m benchmarks.quality add-glasses recolour-hair fill-circles --out FOLDER [--recipe NAME ...] [key=value ...]

Protocol: 30 cases of the test split, seed 0, 28 sampling steps, nothing pasted back; 64 training pairs and 600 steps
unless said otherwise. Beside the adapter stand its untrained base, doing nothing, and the autoencoder alone.
"""

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import torch

import pentimento
from pentimento import images, recipe, run
from pentimento.flux.backbone import Flux
from pentimento.flux.config import FluxConfig
from pentimento.pocket import dataset, score
from pentimento.pocket.tasks import cases

from .cells import machine


def pairs_folder(task: str, args: argparse.Namespace) -> Path:
    """Where a task's drawn pairs lie: other pairs or other prompts, another folder."""
    return args.out / f"{task}-{args.pairs}-pairs{'-captions' if args.captions else ''}"


def measure(task: str, name: str, args: argparse.Namespace) -> dict[str, object]:
    """Train one recipe on one task and score it; writes a sheet and returns what the table says."""
    out = args.out / f"{task}-{name}"
    data = pairs_folder(task, args)
    chosen = list(itertools.islice(cases(task, "test"), args.cases))
    if not data.exists():
        drawn = dataset.write(task, args.pairs, out=data)
        if args.captions:
            for case in drawn:
                (data / "prompts" / f"{case.key}.txt").write_text(case.target_prompt + "\n")
    if args.captions:
        chosen = [dataclasses.replace(case, instruction=case.target_prompt) for case in chosen]
    settings = recipe.load(
        name,
        [f"data.root={data}", "data.held_out=0", "watch.every=0", f"stages.edit.steps={args.steps}",
         f"stages.edit.save_every={args.steps}", *args.overrides],
    )  # fmt: skip
    began = time.perf_counter()
    run.train_run(settings, out / "run")
    training = time.perf_counter() - began
    editor = run.load(out / "run")
    flux = Flux.load(FluxConfig(), "fill")
    began = time.perf_counter()
    scores = {"trained": score.run(lambda image, words: editor.edit(image, instruction=words), chosen)}
    edited = (time.perf_counter() - began) / len(chosen)
    scores["untrained base"] = score.run(
        lambda image, words: editor.edit(image, instruction=words, scale=0.0), chosen
    )
    scores["nothing done"] = score.run(lambda image, words: image, chosen)
    scores["encode and decode"] = score.run(score.round_trip(flux), chosen)
    trained = scores["trained"]
    sheet = score.wide_sheet(chosen[:16], trained.pictures[:16], [not ok for ok in trained.success[:16]])
    images.save_image(sheet, out / "sheet.png")
    return {
        "task": task, "recipe": name, "pairs": args.pairs, "steps": args.steps, "overrides": args.overrides,
        "captions": args.captions,
        "train_seconds": round(training, 1), "seconds_per_edit_and_reading": round(edited, 2), "table": score.table(scores),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality on the drawn world.")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--recipe", action="append", dest="recipes")
    parser.add_argument(
        "--captions", action="store_true", help="prompts describe the result instead of instructing"
    )
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    args, rest = parser.parse_known_args()
    args.overrides = [a for a in (*args.tasks, *rest) if "=" in a]
    args.tasks = [a for a in args.tasks if "=" not in a]
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"pentimento {pentimento.__version__}, torch {torch.__version__}, {machine()}")
    for task in args.tasks:
        for name in args.recipes or ["influxedit-edit"]:
            result = measure(task, name, args)
            with (args.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"\n{task}, {name}: {args.pairs} pairs, {args.steps} steps, {result['train_seconds']} s of training"
            )
            for i, row in enumerate(result["table"]):  # type: ignore[arg-type, var-annotated]
                print("| " + " | ".join(row) + " |")
                if i == 0:
                    print("|" + "---|" * len(row))


if __name__ == "__main__":
    main()
