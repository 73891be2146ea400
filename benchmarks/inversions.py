"""EditInfinity on the drawn world: each picture is learnt by heart, then drawn again with another caption.

python -m benchmarks.inversions --out FOLDER [--arms mask,auto,whole,base-mask,base] [--tasks recolour,add] [--cases 30]
  [--workers 1] [--phrasing 1] [key=value ...]

Cases are of the test split, nothing is pasted back, seed 0; captions say where things are (phrasing 1; 3 is the wording that training
never saw). Per arm of a case: whether the edit is read off the picture, other attributes kept, PSNR outside of the true change and
how far it lies below the tokenizer's own round trip on the same pixels and on those at least a cell of the grid away from the change,
how the region found by attention overlaps the true one, and how well the caption of the source draws the source: bits right when
teacher forced, PSNR when drawn. For `add` no word of the caption names what changes, so it has no arm `auto`. An arm of a case that has
its result.json is not made again, so that the same command goes on where it stopped. Means over the cases with 95 % bootstrap
intervals. It needs neither TensorBoard nor pyarrow.
"""

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import pentimento
from pentimento import images, metrics, recipe, runfolder
from pentimento.infinity import regions
from pentimento.infinity.backbone import extend
from pentimento.infinity.config import InfinityConfig
from pentimento.infinity.quantizer import to_tokens
from pentimento.method import EditSettings, Example
from pentimento.methods.editinfinity import LORA, PROMPT, EditInfinity
from pentimento.pocket import captions, readout, score
from pentimento.pocket.tasks import Case, cases
from pentimento.recipe import Recipe

from .cells import Gathered, intervals, machine, pool, show, trained, words

TASKS = ("recolour", "replace", "background", "add")
TOKENIZER, ALL = "encode and decode", "all tasks"
PARTS = {
    "hair": "hair", "shirt": "shirt", "hat_colour": "hat", "hat": "hat", "glasses": "glasses", "bg": "background",
}  # fmt: skip
"""What captions call the attributes of portraits, and the ground."""
COLUMNS = (
    "success", "kept", "background", "below the tokenizer", "below it a cell off", "region IoU", "region recall", "bits right", "drawn again",
    "seconds of learning", "seconds of the edit",
)  # fmt: skip


CLEAN = 60.0
"""dB that count as no difference, as in the read-out."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make the edit."""

    recipe: str = "editinfinity"
    learns: tuple[str, ...] = (PROMPT, LORA)
    """Stages of the recipe; none: the base model draws."""
    masked: bool = False
    """Is given the true mask."""
    scale: float = 1.0
    """Of the LoRA in the edit."""


ARMS = {
    "mask": Arm(recipe="editinfinity-mask", masked=True),
    "auto": Arm(recipe="editinfinity-auto"),
    "whole": Arm(),
    "mask-half": Arm(recipe="editinfinity-mask", masked=True, scale=0.5),
    "prompt-only": Arm(recipe="editinfinity-mask", learns=(PROMPT,), masked=True),
    "lora-only": Arm(recipe="editinfinity-mask", learns=(LORA,), masked=True),
    "base-mask": Arm(recipe="editinfinity-mask", learns=(), masked=True),
    "base": Arm(learns=()),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """A case, and those of its arms that are not made yet."""

    case: Case
    arms: tuple[str, ...]
    place: Path


def word_of(case: Case) -> str | None:
    """What the caption of the source calls that which changes; none if it does not name it."""
    for name in case.wanted:
        if name in PARTS and case.task != "add":
            absent = name in ("glasses", "hat") and not case.source[name]
            if not absent and not (name == "hat_colour" and not case.source["hat"]):
                return PARTS[name]
        slot = name.removeprefix("colour").removeprefix("shape")
        if slot.isdigit() and case.source[f"present{slot}"]:
            return captions.thing(case.source, int(slot))
    return None


def plan_of(name: str, case: Case, source: Path, overrides: Iterable[str]) -> Recipe:
    """The recipe of an arm, confined to the stages that it learns."""
    arm, word = ARMS[name], word_of(case)
    settings = [f"data.root={source}", f"config.source_prompt={case.source_prompt}", "data.held_out=0"]
    if word is not None:
        settings.append(f"config.word={word}")
    plan = recipe.load(arm.recipe, [*settings, *overrides])
    return replace(
        plan,
        stages={stage: how for stage, how in plan.stages.items() if stage in arm.learns},
        config=plan.config if PROMPT in arm.learns else replace(plan.config, rows=0),
    )


@lru_cache(maxsize=1)
def loaded(overrides: tuple[str, ...]) -> EditInfinity:
    """The model, once in every worker."""
    plan = recipe.load("editinfinity", overrides)
    assert isinstance(plan.backbone, InfinityConfig)
    return EditInfinity.load(plan.backbone, plan.config)


def one_case(work: Work, overrides: tuple[str, ...]) -> None:
    """Make all of a case's arms; each leaves result.json and result.png."""
    method, case = loaded(overrides), work.case
    schedule = method.schedule(1, 1)
    rows, columns = schedule.pixels
    cell = columns // schedule.grids[-1][1]
    source, target = (score.pictures([case], side, columns)[0] for side in ("source", "target"))
    images.save_image(source, work.place / "source.png")
    images.save_image(target, work.place / "target.png")
    before, truth = images.to_unit([source, target])
    changed = readout.edited_region(before, truth)
    mask = Image.fromarray((changed.numpy() * 255).astype("uint8"))
    for name in work.arms:
        out = work.place / name
        found: dict[str, Any] = {}
        if name == TOKENIZER:
            codes = method.infinity.encode_images([source], schedule)
            result = method.infinity.decode(torch.stack(codes.codes).sum(0))[0]
        else:
            plan = plan_of(name, case, work.place / "source.png", overrides)
            result, found = edited(method, name, plan, case, Example(source=source, mask=mask))
        reading = readout.judge(images.to_unit([result])[0], case.source, case.target, case.wanted)
        images.save_image(result, out / "result.png")
        found |= {
            "task": case.task, "key": case.key, "arm": name, "success": float(reading.success), "kept": reading.kept,
            "background": outside(result, source, changed, 0), "cell off": outside(result, source, changed, cell), "explained": reading.explained,
            "instruction": case.instruction, "target_prompt": case.target_prompt,
        }  # fmt: skip
        runfolder.write_text(out / "result.json", json.dumps(found, indent=1) + "\n")


def outside(result: Image.Image, source: Image.Image, changed: Tensor, margin: int) -> float | None:
    """PSNR of the pixels more than ``margin`` away from those that change (H, W); ``None`` where there are none."""
    psnr = float(metrics.strict_bg_psnr(source, result, metrics.dilate(changed, margin)))
    return None if math.isnan(psnr) else min(CLEAN, psnr)


def edited(
    method: EditInfinity, name: str, plan: Recipe, case: Case, example: Example
) -> tuple[Image.Image, dict[str, Any]]:
    """The edit of an arm, and what is known of it besides its picture."""
    arm = ARMS[name]
    method.config = replace(plan.config, region="whole")  # the source is drawn again without a mask
    found = learnt(method, plan, case, example)
    method.config = plan.config
    target = replace(example, prompt=case.target_prompt, mask=example.mask if arm.masked else None)
    if plan.config.region == "word":
        found |= overlap(method, example)
    began = time.perf_counter()
    result = method.edit(target, EditSettings(scale=arm.scale if arm.learns else 0.0))
    return result, {**found, "seconds of the edit": time.perf_counter() - began}


def learnt(method: EditInfinity, plan: Recipe, case: Case, example: Example) -> dict[str, Any]:
    """Learn the picture, or load what another arm of the case learnt of it with the same stages; how well it is known."""
    place = Path(plan.data.root).parent / "-".join(
        ["learnt", *(f"{name}{stage.steps}" for name, stage in plan.stages.items())]
    )
    known = place / "known.json"
    if known.is_file():
        if plan.stages:
            method.adapters.load(place)
        found: dict[str, Any] = json.loads(known.read_text())
        return found
    shutil.rmtree(place, ignore_errors=True)  # what was interrupted would not know its seconds
    began = time.perf_counter()
    if plan.stages:
        trained(plan, method, place, release=False)
    found = {"seconds of learning": time.perf_counter() - began if plan.stages else None}
    found |= known_by_heart(method, case, example, scale=float(bool(plan.stages)))
    runfolder.write_text(known, json.dumps(found, indent=1) + "\n")
    return found


def known_by_heart(method: EditInfinity, case: Case, example: Example, *, scale: float) -> dict[str, float]:
    """How well the caption of the source draws it: share of right bits when teacher forced, PSNR when drawn."""
    assert example.source is not None
    infinity, caption = method.infinity, case.source_prompt
    schedule = method.schedule(*example.source.size)
    levels = list(infinity.quantizer.levels(method.encode([example])["features"], schedule))
    text = infinity.encode_prompts([method.text(caption) if scale else caption])
    if scale and method.config.rows:
        text = extend(text, method.adapters.tensors[PROMPT])
    method.adapters.use(**({LORA: scale} if scale else {}))  # type: ignore[arg-type]
    with torch.no_grad():
        logits = infinity.logits(text, [level.total for level in levels], schedule)
    bits = torch.cat([to_tokens(level.bits) for level in levels], 1)
    right = (logits[..., 1] > logits[..., 0]) == bits
    again = method.edit(Example(source=example.source, prompt=caption), EditSettings(scale=scale))
    return {
        "bits right": float(right.float().mean()),
        "drawn again": float(metrics.psnr(example.source, again)),
    }


def overlap(method: EditInfinity, example: Example) -> dict[str, float]:
    """The region of the word against the true one, in cells of the last grid."""
    assert example.source is not None and example.mask is not None
    schedule = method.schedule(*example.source.size)
    codes = method.infinity.encode_images([example.source], schedule)
    seen = regions.region_of_attention(method.attention(codes, schedule), method.config.threshold).cpu()
    white = regions.region_of_mask(example.mask).float()[None]
    true = F.adaptive_avg_pool2d(white, schedule.grids[-1])[0] >= regions.FILLED
    both = float((seen & true).sum())
    return {
        "region IoU": both / max(1.0, float((seen | true).sum())),
        "region recall": both / max(1.0, float(true.sum())),
    }


def table(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Means with intervals by arm and task, and over all tasks."""
    results = list(results)
    best = {(r["task"], r["key"]): r for r in results if r["arm"] == TOKENIZER}
    gathered: Gathered = {}
    for result in results:
        floor = best[result["task"], result["key"]]
        below = {"below the tokenizer": "background", "below it a cell off": "cell off"}
        values = dict(result)
        for column, name in below.items():
            values[column] = None if result[name] is None else floor[name] - result[name]
        for task in (result["task"], ALL):
            columns = gathered.setdefault((result["arm"], task), {})
            for name in COLUMNS:
                value = values.get(name)
                columns.setdefault(name, []).append(math.nan if value is None else float(value))
    report = intervals(gathered)
    return {**{task: rows for task, rows in report.items() if task != ALL}, ALL: report[ALL]}


def works(args: argparse.Namespace) -> Iterator[Work]:
    """All cases, each with the arms that it can have and that are not made yet."""
    for task in args.tasks:
        for case in itertools.islice(cases(task, "test", phrasing=args.phrasing), args.cases):
            place = args.out / "cells" / f"{task}-{case.key}"
            named = [name for name in args.arms if ARMS[name].recipe != "editinfinity-auto" or word_of(case)]
            left = [name for name in [TOKENIZER, *named] if not (place / name / "result.json").is_file()]
            yield Work(case=case, arms=tuple(left), place=place)


def draw_sheets(args: argparse.Namespace, shown: int = 12) -> None:
    """Of every task its first cases: source, every arm, truth."""
    for task in args.tasks:
        rows, labels = [], []
        for work in itertools.islice((work for work in works(args) if work.case.task == task), shown):
            files = [f"{name}/result.png" for name in (TOKENIZER, *args.arms)]
            paths = [work.place / file for file in ("source.png", *files, "target.png")]
            rows.append([images.open_image(path) if path.is_file() else None for path in paths])
            labels.append(work.case.instruction)
        titles = ["source", TOKENIZER, *args.arms, "truth"]
        images.save_image(
            images.sheet(rows, titles=titles, labels=labels, cell=160), args.out / f"{task}.png"
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="EditInfinity on the drawn world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--arms",
        default=["mask", "auto", "whole", "base-mask", "base"],
        type=words,
        help=f"of {', '.join(ARMS)}",
    )
    parser.add_argument("--tasks", default=list(TASKS), help=f"of {', '.join(TASKS)}", type=words)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--phrasing", type=int, default=1, choices=range(captions.TEST_PHRASING + 1))
    parser.add_argument("--workers", type=int, default=1, help="processes, each of one thread")
    args, overrides = parser.parse_known_args()
    args.overrides = tuple(overrides)
    if unknown := [a for a in args.arms if a not in ARMS] + [t for t in args.tasks if t not in TASKS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    every = list(works(args))
    left = [work for work in every if work.arms]
    about = {
        "pentimento": pentimento.__version__, "torch": torch.__version__, "device": machine(), "workers": args.workers,
        "cases": args.cases, "phrasing": args.phrasing, "overrides": args.overrides,
    }  # fmt: skip
    print(f"{json.dumps(about)}\n{len(left)} of {len(every)} cases", flush=True)
    began = time.perf_counter()
    with pool(args.workers) as workers:
        waiting = {workers.submit(one_case, work, args.overrides): work for work in left}
        for number, future in enumerate(as_completed(waiting), 1):
            future.result()
            took = time.perf_counter() - began
            print(f"{number} of {len(left)}: {waiting[future].place.name}, {took:.0f} s", flush=True)
    arms = (TOKENIZER, *args.arms)
    files = [work.place / name / "result.json" for name in arms for work in every]
    report = table(json.loads(file.read_text()) for file in files if file.is_file())
    runfolder.write_text(
        args.out / "report.json", json.dumps({"about": about, "tables": report}, indent=1) + "\n"
    )
    draw_sheets(args)
    show(report)


if __name__ == "__main__":
    main()
