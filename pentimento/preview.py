"""Before any training: what would be trained (``train --dry-run``) and what the model would see (``show``). No weights are read."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import data, images, lookup, progress, tracking, train
from .errors import UserError, counted
from .method import Method
from .recipe import Recipe, method_class
from .runfolder import write_text


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe would train."""

    recipe: Recipe
    samples: int
    held_out: int
    prompts: int
    """How many different ones."""
    buckets: dict[tuple[int, int], int] | None
    """Training size (width, height) -> samples; ``None`` where the model's configuration is not on this machine."""
    trainable: dict[str, int] | None
    """Stage -> trainable parameters; ``None`` likewise."""

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        recipe = self.recipe
        yield f"method     {recipe.method} on {recipe.backbone.weights}"
        yield from (f"           {note}" for note in recipe.backbone.notes())
        yield (
            f"data       {recipe.data.root}: {counted(self.samples, 'pair')} to train on, {self.held_out} held out,"
            f" {counted(self.prompts, 'different prompt')}; every picture was decoded"
        )
        if self.buckets is None:
            yield "sizes      known once the weights are on this machine"
        else:
            sizes = sorted(self.buckets.items(), key=lambda item: -item[1])
            yield "sizes      " + ", ".join(f"{w}x{h} ({counted(count, 'pair')})" for (w, h), count in sizes)
        for name, stage in recipe.stages.items():
            count = "" if self.trainable is None else f": {self.trainable[name]:,} parameters"
            batch = f"{stage.batch_size} x {stage.accumulate}"
            passes = stage.steps * stage.batch_size * stage.accumulate / self.samples
            yield f"stage      {name} trains {', '.join(stage.train)}{count}"
            yield (
                f"           {counted(stage.steps, 'step')} of {batch} samples ({passes:.1f} times each),"
                f" {stage.optimizer} at lr {stage.peak:g} ({stage.schedule}), saved every {stage.save_every}"
            )


def plan(recipe: Recipe) -> Plan:
    """Check recipe and data completely, every picture decoded.

    Raises:
        UserError: whatever would stop the training that can be known without weights.
    """
    train.check(recipe.stages, recipe.backbone.precision, recipe.backbone.device)
    if recipe.watch.wandb is not None:
        tracking.check()
    rows = data.open_data(recipe.data)
    method_class(recipe.method).check_data(recipe.backbone, recipe.config, rows)
    training, held = data.held_out(rows, recipe.data)
    with progress.bar("decoding pictures") as advance:
        data.verify([*training, *held], advance)
    method = outline(recipe)
    buckets = None if method is None else dict(Counter(method.size(*row.size) for row in training))
    return Plan(
        recipe=recipe,
        samples=len(training),
        held_out=len(held),
        prompts=len({prompt for row in training for prompt in row.prompts}),
        buckets=buckets,
        trainable=None if method is None else trainable(method, recipe),
    )


def outline(recipe: Recipe) -> Method | None:
    """The recipe's method without weights; ``None`` where the model's configuration is not on this machine."""
    return method_class(recipe.method).outline(recipe.backbone, recipe.config)


def check_start(recipe: Recipe, init: Path) -> None:
    """Check that an adapter fits a recipe, as far as that can be known without weights.

    Raises:
        UserError: it does not fit.
    """
    method = outline(recipe)
    if method is not None:
        lookup.begin(method, init)


def trainable(method: Method, recipe: Recipe) -> dict[str, int]:
    """Trainable parameters of each stage.

    Raises:
        UserError: a stage names an adapter that the method does not have.
    """
    return {
        name: sum(p.numel() for p in method.adapters.train(*stage.train))
        for name, stage in recipe.stages.items()
    }


def show(recipe: Recipe, index: int, out: Path) -> list[Path]:
    """Write what the model will see of one sample: its pictures at training size, the prompt, and the sizes.

    Masks say in their names what white means. ``KEY.json`` holds the prompt after the template.

    Raises:
        UserError: no such sample, bad data, or a model whose configuration is not on this machine.
    """
    rows = data.open_data(recipe.data)
    if not 0 <= index < len(rows):
        raise UserError(
            f"--index {index}: the data set has {counted(len(rows), 'sample')}, counted from 0 to {len(rows) - 1}"
        )
    method_class(recipe.method).check_data(recipe.backbone, recipe.config, rows)
    method = outline(recipe)
    if method is None:
        raise UserError(
            f"backbone.weights: {recipe.backbone.weights} is not on this machine, and its sizes are needed"
        )
    row = rows[index]
    prompt, *alternatives = row.prompts
    views = method.views(row.load())
    written = [images.save_image(view, out / f"{row.key}-{name}.png") for name, view in views.items()]
    about = {
        "key": row.key,
        "index": index,
        "prompt": prompt,
        "alternatives": alternatives,
        "prompt_for_the_model": method.text(prompt),
        "size": list(row.size),
        "training_size": list(method.size(*row.size)),
        "views": {name: list(view.size) for name, view in views.items()},
        "files": dict(row.places()),
    }
    path = out / f"{row.key}.json"
    write_text(path, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return [*written, path]
