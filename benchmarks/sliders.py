"""Sliders on the drawn world: PairEdit, its ablations and Concept Sliders, measured on unseen faces.

python -m benchmarks.sliders --out FOLDER [--methods pairedit,image-slider] [--tasks smile,add-glasses] [--draws 3] [--pairs 3,1]
  [--faces 10] [--steps 500] [--workers 1] [key=value ...]

Each cell of (method, task, number of pairs, draw of the pairs) trains a slider, calibrates it on faces of the dev split, and
measures it on faces of the test split that the base model draws from captions which say nothing of the change. A cell that has its
result.json is not made again, so that the same command goes on where it stopped; a single pair is tried of on/off tasks only.
The table has means over faces and draws, with 95 % bootstrap intervals. It needs neither TensorBoard nor pyarrow.
"""

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pentimento
from pentimento import calibrate, images, metrics, recipe, runfolder
from pentimento.flux.dev import Sampling
from pentimento.method import Probe
from pentimento.pocket import dataset, faces
from pentimento.pocket import scene as world
from pentimento.pocket.faces import Change, Face
from pentimento.pocket.tasks import SLIDERS, Case, cases
from pentimento.recipe import Recipe
from pentimento.run import Editor

from .cells import Gathered, intervals, pool, show, trained, words

METHODS = (
    "pairedit", "pairedit-no-content", "pairedit-flow", "pairedit-no-direction", "pairedit-no-direction-target",
    "image-slider", "text-slider",
)  # fmt: skip
TASKS = (*SLIDERS, "add-glasses", "add-hat", "recolour-hair")
SCALES = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
"""Calibrated ones."""
MOST = 30
"""Pictures that are drawn for each face that is needed, before it is given up."""
RAW = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""What calibration measures."""
SAMPLING = {field.name for field in dataclasses.fields(Sampling)} - {"lora"}
PERSON = "a portrait of a person"
WORDS = {
    "smile": ("a portrait of a smiling person", "a portrait of a frowning person"),
    "age": ("a portrait of an old person", "a portrait of a young person"),
    "chubby": (f"{PERSON} with a chubby face", f"{PERSON} with a slim face"),
    "eye-size": (f"{PERSON} with big eyes", f"{PERSON} with small eyes"),
    "hair-length": (f"{PERSON} with long hair", f"{PERSON} with short hair"),
    "add-glasses": (f"{PERSON} with glasses", PERSON),
    "add-hat": (f"{PERSON} with {{hat}}", PERSON),
    "recolour-hair": (f"{PERSON} with {{hair}} hair", PERSON),
}
"""Positive and negative prompt of the text slider."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One slider."""

    method: str
    task: str
    pairs: int
    draw: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-{self.task}-{self.pairs}p-{self.draw}"

    def exemplars(self) -> list[Case]:
        """Its pairs, of the train split; those of on/off tasks all with the same hat or hair."""
        found = cases(self.task, "train", self.draw)
        first = next(found)
        alike = (case for case in found if self.task in SLIDERS or case.wanted == first.wanted)
        return [first, *itertools.islice(alike, self.pairs - 1)]


def cells(args: argparse.Namespace) -> list[Cell]:
    """All that are asked for."""
    return [
        Cell(method=method, task=task, pairs=pairs, draw=draw)
        for method in args.methods
        for task in args.tasks
        for pairs in args.pairs
        if pairs > 1 or task not in SLIDERS
        for draw in range(args.draws)
    ]


def settings(cell: Cell, args: argparse.Namespace, pairs: Path) -> Recipe:
    """The cell's recipe."""
    (stage,) = recipe.load(cell.method).stages
    changes = [
        f"seed={cell.draw}",
        f"stages.{stage}.steps={args.steps}",
        f"stages.{stage}.save_every={args.steps}",
    ]
    if cell.method == "text-slider":
        wanted = cell.exemplars()[0].wanted
        named = {
            "hat": f"a {world.COLOUR_NAMES[wanted.get('hat_colour', 0)]} hat",
            "hair": world.COLOUR_NAMES[wanted.get("hair", 0)],
        }
        positive, negative = (text.format(**named) for text in WORDS[cell.task])
        changes += [f"config.target={PERSON}", f"config.positive={positive}", f"config.negative={negative}"]
    else:
        changes += [f"data.root={pairs}"]
    return recipe.load(cell.method, [*changes, *args.overrides])


def test_faces(task: str, args: argparse.Namespace) -> list[Face]:
    """The unseen faces of a task, which every method and draw is measured on; found once."""
    file: Path = args.out / "faces" / f"{task}-{args.faces}.json"
    if file.is_file():
        return [Face(**one) for one in json.loads(file.read_text())]
    changes = [change_of(cell.exemplars()) for cell in cells(args) if cell.task == task]
    base = recipe.load("pairedit", [text for text in args.overrides if of_sampling(text)])
    probe = recipe.method_class(base.method).load(base.backbone, base.config).probe()
    found = faces.find(probe, faces.prompts(task, "test"), changes, args.faces, MOST * args.faces)
    runfolder.write_text(file, json.dumps([dataclasses.asdict(face) for face in found], indent=1))
    return found


def of_sampling(text: str) -> bool:
    """Whether a setting is of how faces are drawn, by all methods alike, and not of one method's training."""
    key = text.partition("=")[0]
    return key.startswith("backbone.") or key.removeprefix("config.") in SAMPLING


def change_of(exemplars: Sequence[Case]) -> Change:
    """What they show."""
    change = faces.change_of(exemplars)
    if change is None:
        raise ValueError(f"{exemplars[0].task}: its pairs have no change in common")
    return change


def learn(cell: Cell, place: Path, args: argparse.Namespace) -> None:
    """Train a slider in a folder, unless that was done."""
    if (place / "run" / runfolder.RECIPE).is_file():
        return
    dataset.save(cell.exemplars(), out=place / "pairs")
    plan = settings(cell, args, place / "pairs")
    trained(plan, recipe.method_class(plan.method).load(plan.backbone, plan.config), place / "run")


def calibrated(place: Path, args: argparse.Namespace, overrides: Sequence[str] = ()) -> Editor:
    """The slider of a folder, calibrated unless it was; ``overrides`` are of the edits alone."""
    what, shown = str(place / "run"), (f"data.root={place / 'pairs'}",)
    editor = pentimento.load(what, overrides=overrides)
    if editor.calibration is not None:
        return editor
    request = calibrate.Request(what=what, scales=RAW, count=args.calibration_faces, settings=shown)
    calibrate.calibrate(request)
    return pentimento.load(what, overrides=overrides)


def one_cell(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Train, calibrate, measure; writes result.json and sheet.png."""
    out: Path = args.out / "cells" / cell.name
    began = time.perf_counter()
    learn(cell, out, args)
    seconds = time.perf_counter() - began
    editor = calibrated(out, args)
    chosen, change = test_faces(cell.task, args), change_of(cell.exemplars())
    looks, sheet = measured(editor.method.probe(), chosen, change, editor.unit)
    images.save_image(sheet, out / "sheet.png")
    result = {
        **dataclasses.asdict(cell), "steps": args.steps, "seconds of training": round(seconds, 1), "unit": editor.unit,
        "calibrated": editor.calibration is not None, "continuous": change.continuous, "looks": looks,
    }  # fmt: skip
    runfolder.write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def measured(
    probe: Probe, chosen: Sequence[Face], change: Change, unit: float
) -> tuple[list[list[dict[str, Any]]], images.Image.Image]:
    """For each face what is seen at each of ``SCALES``, and all pictures."""
    latents = probe.draw([(face.prompt, face.seed) for face in chosen], [scale * unit for scale in SCALES])
    pictures = [probe.pictures(latents[scale * unit]) for scale in SCALES]
    rows = list(zip(*pictures, strict=True))
    flat, whose = [picture for row in rows for picture in row], [face for face in chosen for _ in SCALES]
    every = faces.looks(flat, whose, change, probe.device)
    looks = [
        [dataclasses.asdict(look) for look in every[i : i + len(SCALES)]]
        for i in range(0, len(every), len(SCALES))
    ]
    return looks, images.sheet(rows, titles=[f"scale {scale:g}" for scale in SCALES], cell=128)


def scores(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """The numbers of each face."""
    found: dict[str, list[float]] = {}
    zero, one = SCALES.index(0), SCALES.index(1)
    for looks in result["looks"]:
        responses = [look["response"] for look in looks]
        values = {name: float(looks[one][name]) for name in ("interference", "kept", "intact")}
        if result["continuous"]:
            values |= {
                "Spearman": or_zero(metrics.spearman(SCALES, responses)),
                "reached": responses[one] - responses[zero],
                "linearity": or_zero(metrics.linearity(SCALES[zero : one + 1], responses[zero : one + 1])),
                "symmetry": metrics.symmetry(responses[0], responses[zero], responses[one]),
            }
        else:
            states = [response > 0.5 for response in responses]
            values |= {
                "off at 0": float(not states[zero]),
                "on at 1": float(states[one]),
                "switches": float(metrics.switches(states)),
                "switches once": float(metrics.switches(states) == 1),
            }
        values["score"] = values["kept"] * success(values)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def success(values: Mapping[str, float]) -> float:
    """How well one face does what the slider was shown, from 0 to 1: in order and to its end, or off, on, and nothing between."""
    if "reached" in values:
        return max(0.0, values["Spearman"]) * min(1.0, max(0.0, values["reached"]))
    return values["off at 0"] * values["on at 1"] * values["switches once"]


def or_zero(value: float) -> float:
    """A face on which nothing moves has no order and no line: it counts as a failure."""
    return 0.0 if math.isnan(value) else value


def table(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Means with intervals by method, number of pairs and task, and over the tasks of a kind."""
    gathered: Gathered = {}
    for result in results:
        row = f"{result['method']}, {result['pairs']} pair{'s' * (result['pairs'] > 1)}"
        kind = "all continuous" if result["continuous"] else "all on/off"
        for name, values in scores(result).items():
            for task in (result["task"], kind):
                gathered.setdefault((row, task), {}).setdefault(name, []).extend(values)
    return intervals(gathered)


def numbers(text: str) -> list[int]:
    """What commas part, as whole numbers."""
    return [int(part) for part in words(text)]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Sliders on the drawn world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=["pairedit"], help=f"of {', '.join(METHODS)}; all", type=words)
    parser.add_argument("--tasks", default=list(TASKS), help=f"of {', '.join(TASKS)}", type=words)
    parser.add_argument("--pairs", default=[3, 1], type=numbers)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--faces", type=int, default=10)
    parser.add_argument("--calibration-faces", type=int, default=12)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--workers", type=int, default=1, help="processes, each of one thread")
    args, overrides = parser.parse_known_args()
    args.overrides = overrides
    args.methods = list(METHODS) if args.methods == ["all"] else args.methods
    if unknown := [m for m in args.methods if m not in METHODS] + [t for t in args.tasks if t not in TASKS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    return args


def main() -> None:
    args = arguments()
    tasks = list(dict.fromkeys(cell.task for cell in cells(args)))
    args.out.mkdir(parents=True, exist_ok=True)
    every = cells(args)
    left = [cell for cell in every if not (args.out / "cells" / cell.name / "result.json").is_file()]
    print(
        f"pentimento {pentimento.__version__}, torch {torch.__version__}: {len(left)} of {len(every)} cells"
    )
    with pool(args.workers) as workers:
        for task, found in zip(tasks, workers.map(test_faces, tasks, itertools.repeat(args)), strict=True):
            print(f"{task}: {len(found)} unseen faces", flush=True)
        waiting = {workers.submit(one_cell, cell, args): cell for cell in left}
        for number, future in enumerate(as_completed(waiting), 1):
            unit = future.result()["unit"]
            print(f"{number} of {len(left)}: {waiting[future].name}, scale 1 is raw {unit:.2f}", flush=True)
    files = [args.out / "cells" / cell.name / "result.json" for cell in every]
    report = table([json.loads(file.read_text()) for file in files])
    runfolder.write_text(args.out / "report.json", json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
