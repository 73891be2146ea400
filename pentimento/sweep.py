"""Several runs of one recipe, one after the other: data sets x noise scales x seeds, each in a folder of its own."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import checkpoint, data, lookup, preview, run, runfolder, schema, train
from . import recipe as recipe_
from .errors import UserError, counted
from .recipe import Recipe, Sweep
from .schema import Keys, Origin

FILE = "sweep.yaml"
"""The recipe with its sweep, in the folder of the runs."""


@dataclass(frozen=True, kw_only=True)
class One:
    """One run of a sweep."""

    name: str
    recipe: Recipe


def runs(recipe: Recipe) -> list[One]:
    """The runs of a recipe with a sweep; data sets change slowest, seeds fastest.

    Raises:
        UserError: data sets of one name, or a noise scale for a method that has none.
    """
    sweep = recipe.sweep or Sweep()
    stems = [Path(root).name for root in sweep.data or ()]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(
            f"sweep.data: {counted(stems.count(twice[0]), 'data set')} would be called {twice[0]}; rename their folders"
        )
    axes: list[list[tuple[str, Keys, Any]]] = [
        [(Path(root).name, ("data", "root"), root) for root in sweep.data or ()],
        [(f"noise{scale:g}", ("config", "noise_scale"), scale) for scale in sweep.noise_scales or ()],
        [(f"seed{seed}", ("seed",), seed) for seed in sweep.seeds or ()],
    ]
    found = []
    for chosen in itertools.product(*(axis for axis in axes if axis)):
        raw = schema.plain(replace(recipe, sweep=None))
        for _, keys, value in chosen:
            inner: Any = raw
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = value
        name = "-".join(part for part, _, _ in chosen)
        found.append(One(name=name, recipe=recipe_.build(raw, Origin(name=f"sweep, run {name}"))))
    return found


def check(recipe: Recipe, out: Path, *, resume: bool) -> list[One]:
    """The runs, after everything was checked that can be known before the first of them begins.

    Raises:
        UserError: a used folder without ``resume``, or whatever would stop one of the runs.
    """
    every = runs(recipe)
    if resume and not (out / FILE).is_file():
        raise UserError(f"--resume: {out} holds no sweep (no {FILE})")
    if not resume and (out / FILE).is_file():
        raise UserError(f"{out} already holds a sweep; continue it with --resume, or choose another --out")
    if not resume:
        runfolder.check_new(out)
    for one in every:
        begun = (out / one.name / runfolder.RECIPE).is_file()
        run.check_folder(out / one.name, one.recipe, resume=begun)
        train.check(one.recipe.stages, one.recipe.backbone.precision, one.recipe.backbone.device)
        data.held_out(data.open_data(one.recipe.data), one.recipe.data)
    return every


def lines(recipe: Recipe, out: Path, *, resume: bool) -> Iterator[str]:
    """What would be trained: each run, and the plan of the first."""
    every = check(recipe, out, resume=resume)
    yield f"sweep      {counted(len(every), 'run')} in {out}"
    for one in every:
        yield f"           {one.name}{' (done)' if done(out / one.name, one.recipe) else ''}"
    yield f"the first  {every[0].name}"
    yield from preview.plan(every[0].recipe).lines()


def done(folder: Path, recipe: Recipe) -> bool:
    """Whether a run has ended, with all steps of its recipe."""
    weights = folder / checkpoint.WEIGHTS
    if not (folder / runfolder.RECIPE).is_file() or not next(weights.rglob("*.safetensors"), None):
        return False
    return not lookup.unfinished(folder, recipe)


def train_all(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Path]:
    """Train the runs that are not done yet; yields the folder of each run when it has ended.

    Raises:
        UserError: as ``check`` and ``run.train_run`` do.
        Interrupted: as ``run.train_run`` does; the same call with ``resume`` goes on where it stopped.
    """
    every = check(recipe, out, resume=resume)
    runfolder.write_text(out / FILE, recipe_.dump(recipe))
    for number, one in enumerate(every, 1):
        folder = out / one.name
        if not done(folder, one.recipe):
            say(f"run {number} of {len(every)}: {one.name}")
            begun = (folder / runfolder.RECIPE).is_file()
            run.train_run(one.recipe, folder, resume=begun, say=say)
        yield folder
