"""Photographs learnt by heart, so that they can be edited: each once, in a run folder of its own in the user's cache.

The folder's name is a hash of the picture's pixels, of all settings that the training depends on and of the base model.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from . import checkpoint, images, recipes, runfolder, schema
from . import recipe as recipe_
from .errors import UserError
from .method import Method
from .pocket.weights import cache_folder
from .recipe import Recipe, Setup

FOLDER = "inversions"
SHARED = ("resolution", "shape", "max_sequence_length")
"""Settings of a slider that the photograph's own adapter must have too: both draw the same picture together."""
NOT_IN_THE_KEY = ("device", "attention", "compile", "offload", "gradient_checkpointing")
"""Settings of the backbone that say where and how fast, but not what is learnt."""


def recipe_for(setup: Setup, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that learns a photograph for a slider: on the same base model, in the same geometry.

    Raises:
        UserError: the slider's method needs none, or an override that the recipe does not know.
    """
    name = recipe_.method_class(setup.method).per_photo
    if not name:
        raise UserError(f"inversion: {setup.method} edits pictures as they are")
    raw, origin = schema.read(recipes.text(name), f"recipe {name}")
    raw["backbone"] = schema.plain(setup.backbone)
    given = schema.plain(setup.config)
    raw["config"] |= {key: given[key] for key in SHARED}
    return recipe_.build(raw, recipe_.override(raw, origin, overrides))


def learnt(
    picture: Image | Path, setup: Setup, overrides: Sequence[str] = (), on: Method | None = None
) -> Path:
    """The run folder of what learnt a photograph by heart for a slider; trained unless it has been.

    Args:
        picture: a file, or a picture of any mode.
        setup: the slider's, see ``run.load``.
        overrides: ``key=value`` changes of the recipe ``inversion``, such as ``stages.inversion.steps=300``.
        on: the slider, where it is in memory: the photograph is learnt on its weights, if that is possible.

    Raises:
        UserError: as ``run.train_run`` does.
    """
    photo = images.open_image(picture) if isinstance(picture, Path) else images.take_image(picture)
    return learn(photo, recipe_for(setup, overrides), on)


def learn(photo: Image, recipe: Recipe, on: Method | None = None) -> Path:
    """The run folder of a recipe trained on an RGB picture, whatever its data section says; trained unless it has been.

    Settings that only edits have are left at their defaults there: edits are given their own.

    Raises:
        UserError: as ``run.train_run`` does.
    """
    from . import run  # the editor there calls this

    folder = cache_folder() / FOLDER / key(photo, recipe)
    out = folder / "run"
    if (out / runfolder.RECIPE).is_file() and (out / checkpoint.WEIGHTS).is_dir():
        return out
    file = folder / "picture.png"
    if not file.is_file():
        images.save_image(photo, file)
    raw = _trained(recipe)
    raw["data"]["root"] = str(file)
    named = recipe_.build(raw, schema.Origin(name=f"recipe {recipe.method}"))
    method = on and on.learner(recipe_.method_class(named.method), named.config)
    begun = (out / runfolder.RECIPE).is_file()
    if begun:
        # By the key it learns the same; where and how fast may differ, as after it ran out of memory.
        runfolder.write_text(out / runfolder.RECIPE, recipe_.dump(named))
    run.train_run(named, out, resume=begun, method=method)
    # The optimizer's state is three times as large as the adapter, and this run has ended.
    shutil.rmtree(out / checkpoint.FOLDER)
    return out


def key(photo: Image, recipe: Recipe) -> str:
    """What the folder of a photograph is called."""
    plain = {k: v for k, v in _trained(recipe).items() if k not in ("about", "data", "watch")}
    plain["backbone"] = {k: v for k, v in plain["backbone"].items() if k not in NOT_IN_THE_KEY}
    base = recipe_.method_class(recipe.method).base_digest(recipe.backbone)
    parts = json.dumps([images.digest(photo), plain, base], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def _trained(recipe: Recipe) -> dict[str, Any]:
    """A recipe's plain values without what only edits depend on."""
    raw = schema.plain(recipe)
    only_edits = recipe_.method_class(recipe.method).only_edits
    raw["config"] = {k: v for k, v in raw["config"].items() if k not in only_edits}
    return raw
