"""One adapter for many instructions, on the drawn world: ICEdit on five kinds of edits at once.

python -m benchmarks.instructions --out FOLDER [--recipe icedit] [--pairs 1500] [--steps 1500] [--cases 30] [key=value ...]

Per task the same cases are asked for in a wording of training and in one that training never saw; nothing is pasted back. Beside
the adapter stand its untrained base and the autoencoder alone. ``--run WHAT`` measures a run or an adapter file that exists.
``--candidates 6`` adds searches: with the exact judge, and with one that lies in a fifth of its answers.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

import pentimento
from pentimento import images, recipe, run, scaling
from pentimento.flux.backbone import Flux
from pentimento.flux.config import FluxConfig
from pentimento.judges import Judge, Unreliable, exact
from pentimento.metrics import interval
from pentimento.pocket import dataset, score
from pentimento.pocket.captions import TEST_PHRASING
from pentimento.pocket.tasks import Case, cases

from .cells import machine

TASKS = ("recolour", "add", "remove", "replace", "background")
WORDINGS = {"seen wording": 0, "unseen wording": TEST_PHRASING}


def train(args: argparse.Namespace) -> tuple[Path, float]:
    """The run folder and the seconds of training, 0 for one that exists."""
    if args.run:
        return args.run, 0.0
    data = args.out / "pairs"
    if not data.exists():
        dataset.write(",".join(TASKS), args.pairs, out=data)
    settings = recipe.load(
        args.recipe,
        ["data.kind=pairs", f"data.root={data}", "data.held_out=0", "data.cache=memory", "data.workers=0", "watch.every=0",
         f"stages.edit.steps={args.steps}", f"stages.edit.save_every={args.steps}", *args.overrides],
    )  # fmt: skip
    began = time.perf_counter()
    run.train_run(settings, args.out / "run")
    return args.out / "run", time.perf_counter() - began


def searches(
    editor: pentimento.Editor, chosen: list[Case], args: argparse.Namespace
) -> dict[str, score.Score]:
    """Scores of the best of several candidates, by judge."""
    judges: dict[str, Judge] = {
        "exact judge": exact.Exact(),
        "judge wrong in 20 %": Unreliable(judge=exact.Exact(), probability=0.2),
    }
    made = {}
    for name, judge in judges.items():
        settings = scaling.Search(candidates=args.candidates, early_steps=args.early_steps)

        def edit(
            image: Image, words: str, judge: Judge = judge, settings: scaling.Search = settings
        ) -> Image:
            return editor.search(image, instruction=words, search=settings, judge=judge).picture

        made[f"{args.candidates} candidates, {name}"] = score.run(edit, chosen)
    return made


def measure(editor: pentimento.Editor, task: str, args: argparse.Namespace) -> dict[str, score.Score]:
    """Scores of one task by row of the table; writes its sheet."""
    made: dict[str, score.Score] = {}
    for name, phrasing in WORDINGS.items():
        chosen = list(itertools.islice(cases(task, "test", phrasing=phrasing), args.cases))
        made[name] = score.run(lambda image, words: editor.edit(image, instruction=words), chosen)
    worst = made["unseen wording"]
    sheet = score.wide_sheet(chosen[:16], worst.pictures[:16], [not ok for ok in worst.success[:16]])
    images.save_image(sheet, args.out / f"{task}.png")
    if args.candidates > 1:
        made |= searches(editor, chosen, args)
    if not args.trained_only:
        made["untrained base"] = score.run(
            lambda image, words: editor.edit(image, instruction=words, scale=0.0), chosen
        )
        made["encode and decode"] = score.run(score.round_trip(Flux.load(FluxConfig(), "fill")), chosen)
    return made


def macro(scores: dict[str, dict[str, score.Score]], row: str) -> dict[str, Any]:
    """Means over the tasks, each with its 95 % interval over all cases."""
    present = [s[row] for s in scores.values() if row in s]
    values = {
        "success": [float(ok) for s in present for ok in s.success],
        "kept": [k for s in present for k in s.kept],
        "background": [b for s in present for b in s.background],
    }
    return {name: [round(x, 4) for x in interval(value)] for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Instructed edits on the drawn world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="icedit")
    parser.add_argument("--run", type=Path, help="measure this run or adapter file instead of training one")
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--candidates", type=int, default=1)
    parser.add_argument("--early-steps", type=int, default=10)
    parser.add_argument("--trained-only", action="store_true", help="leave the base and the autoencoder out")
    args, overrides = parser.parse_known_args()
    args.overrides = overrides
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"pentimento {pentimento.__version__}, torch {torch.__version__}, {machine()}")
    folder, seconds = train(args)
    if seconds:
        print(f"{args.recipe}: {args.pairs} pairs, {args.steps} steps, {seconds:.0f} s of training")
    editor = run.load(folder)
    scores: dict[str, dict[str, score.Score]] = {}
    for task in args.tasks:
        scores[task] = measure(editor, task, args)
        print(f"\n{task}")
        for row in score.table(scores[task]):
            print("| " + " | ".join(row) + " |", flush=True)
    report = {row: macro(scores, row) for row in next(iter(scores.values()))}
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print("\nmean over the tasks\n" + json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
