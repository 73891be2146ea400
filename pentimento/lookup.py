"""A trained edit on disk, before any weights are loaded: a run folder, a step of it, or an adapter file, and what it says."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import adapters, checkpoint, inspection, runfolder, schema, stored
from . import recipe as recipe_
from .errors import UserError
from .method import Method, Theirs
from .recipe import Recipe, Setup
from .recipes import names
from .schema import Origin

RECORDED = {"weights", "attention_bias"}
"""Of what an adapter's file records of its base model, the keys that are settings of its backbone."""
NO_INSTRUCTION = "say what to change with --instruction: the training pairs had no prompt in common that could stand for it"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A trained edit on disk, before its weights are loaded."""

    setup: Setup
    place: Path
    """A folder of a run's weights, or an adapter file."""
    record: Mapping[str, Any]
    """What the weights say of themselves; empty for files of others."""
    default: str | None
    """The run's own prompt."""
    notes: tuple[str, ...]
    theirs: Theirs | None = None
    """Where the scripts of the method's authors saved it in another form than one LoRA."""

    @property
    def method(self) -> type[Method]:
        """The class of its method."""
        return recipe_.method_class(self.setup.method)

    @property
    def prompt(self) -> str | None:
        """What is asked for where nothing is said; ``None``: there is nothing that could be."""
        return self.method.default_prompt(self.setup.config, trained_prompt(self.place, self.default))


def find(what: str | Path, *, at: int | None = None, overrides: Sequence[str] = ()) -> Found:
    """What ``run.load`` would load, without loading it; arguments and errors are its own."""
    path = Path(what)
    if theirs := _theirs(path, at, overrides):
        return _found_theirs(theirs, overrides)
    place = place_of(path, at)
    record, default, origin = record_of(place), None, place
    notes: tuple[str, ...] = ()
    if (path / runfolder.RECIPE).is_file():
        recipe = recipe_.load(path)
        notes = unfinished(path, recipe) if at is None else ()
        raw = schema.plain(Setup(method=recipe.method, backbone=recipe.backbone, config=recipe.config))
        origin, default = path / runfolder.RECIPE, recipe.data.prompt
    else:
        raw = recorded_setup(place, overrides)
    if other := [name for name in _named_methods(overrides) if name != raw["method"]]:
        raise UserError(f"method={other[0]}: {origin} is of {raw['method']}; leave method out")
    # null stood for the base model's own value; the record knows what that was when the adapter was trained.
    settings = record.get("settings", {})
    raw["config"] = {k: settings.get(k) if v is None else v for k, v in raw["config"].items()}
    setup = recipe_.build_setup(raw, recipe_.override(raw, Origin(name=str(origin)), overrides))
    found = Found(setup=setup, place=place, record=record, default=default, notes=notes)
    main = found.method.main
    if place.is_file() and main and record.get("adapter", main) != main:
        raise UserError(
            f"{place} is the adapter {record['adapter']!r}, which does not carry the edit; name that of {main!r}, or the run folder"
        )
    return found


def _theirs(path: Path, at: int | None, overrides: Sequence[str]) -> Theirs | None:
    """What the authors of the named method left at a path."""
    named = _named_methods(overrides)
    if not named or not path.exists() or (path / runfolder.RECIPE).is_file():
        return None
    return recipe_.method_class(named[-1]).theirs(path, at)


def _found_theirs(theirs: Theirs, overrides: Sequence[str]) -> Found:
    place = next(iter(theirs.files.values()))
    raw: dict[str, Any] = {"method": _named_methods(overrides)[-1]}
    raw |= {"backbone": dict(theirs.backbone), "config": copy.deepcopy(dict(theirs.config))}
    setup = recipe_.build_setup(raw, recipe_.override(raw, Origin(name=str(place)), overrides))
    return Found(setup=setup, place=place, record={}, default=None, notes=(theirs.note,), theirs=theirs)


def begin(method: Method, init: Path) -> None:
    """Start a training from an adapter: ours, one of others, or all that the scripts of the method's authors save.

    Raises:
        UserError: it does not fit, or a part is missing.
    """
    theirs = method.theirs(init)
    if theirs is None:
        found = [init] if init.is_file() else sorted(init.rglob(inspection.WEIGHTS_NAME))
        base = record_of(found[0]).get("backbone", {}) if found else {}
        if base.get("family", method.family) != method.family:
            raise UserError(
                f"--init {init}: it was trained on {base['family']}, but {type(method).__name__} works on {method.family}"
            )
        method.adapters.load(init)
        return
    if missing := {*method.adapters.specs, *method.adapters.tensors} - theirs.files.keys():
        raise UserError(
            f"--init {init}: of {', '.join(sorted(theirs.files))} only; {', '.join(sorted(missing))} is missing: name the folder"
            " of both, or leave it out (no learnt rows: config.rows=0 stages.prompt=null)"
        )
    method.take(theirs)


def check_instruction(what: str | Path, at: int | None = None, overrides: Sequence[str] = ()) -> None:
    """Check, without loading any weights, that an edit may go without an instruction; arguments as for ``find``.

    Raises:
        UserError: it may not, or what ``find`` raises for what is no run and no adapter.
    """
    # Of files of others nothing is known, and `load` says first what else is missing.
    known = _theirs(Path(what), at, overrides) or record_of(place_of(Path(what), at))
    if known and find(what, at=at, overrides=overrides).prompt is None:
        raise UserError(f"{what}: {NO_INSTRUCTION}")


def trained_prompt(place: Path, default: str | None = None) -> str | None:
    """The prompt that all training pairs shared as the weights record it; the default for weights that do not say."""
    prompt = record_of(place).get("prompt", default)
    return None if prompt is None else str(prompt)


def place_of(path: Path, at: int | None) -> Path:
    """Where the weights lie: a folder of a run, or an adapter file."""
    if (path / runfolder.RECIPE).is_file():
        return checkpoint.at(path, at).folder if at is not None else final_weights(path)
    if at is not None:
        raise UserError(
            f"--at takes a step of a run, but {path} is no run folder (it has no {runfolder.RECIPE})"
        )
    if not path.exists() and str(path) in names():
        raise UserError(f"{path} is a recipe; train it first: pentimento train {path} data.root=FOLDER")
    if not path.exists() and (near := schema.nearest(str(path), names())):
        raise UserError(f"{path}: there is no such file or folder; is the recipe {near} meant?")
    return inspection.find(path)


def final_weights(run: Path) -> Path:
    """Where the weights of a run are that has ended; ``UserError`` for one that has not."""
    if next((run / runfolder.WEIGHTS).rglob(inspection.WEIGHTS_NAME), None) is not None:
        return run / runfolder.WEIGHTS
    saved = [str(s.step) for s in checkpoint.saved_steps(run)]
    hint = f"; saved steps, to be used with --at: {', '.join(saved)}" if saved else ""
    raise UserError(f"{run} has no weights yet: its training has not ended; continue it with --resume{hint}")


def unfinished(run: Path, recipe: Recipe) -> tuple[str, ...]:
    """A note where a run's weights are of fewer steps than its recipe has: it is being continued, or that was interrupted."""
    record = record_of(run / runfolder.WEIGHTS)
    last, stage = list(recipe.stages.items())[-1]
    if "step" not in record or (record["stage"], record["step"]) == (last, stage.steps):
        return ()
    return (
        f"{run}: its weights are of step {record['step']} of {record['stage']}, but its recipe ends at step {stage.steps} of {last};"
        f" to finish: pentimento train {run} --resume; saved steps, to be used with --at:"
        f" {', '.join(str(s.step) for s in checkpoint.saved_steps(run))}",
    )


def record_of(place: Path) -> dict[str, Any]:
    """This package's own record in an adapter file, or in the first one of a folder; empty in files of others."""
    file = place if place.is_file() else min(place.rglob(inspection.WEIGHTS_NAME))
    return inspection.own_record(file, stored.read_metadata(file))


def _named_methods(overrides: Sequence[str]) -> list[str]:
    return [o.partition("=")[2].strip() for o in overrides if o.partition("=")[0].strip() == "method"]


def recorded_setup(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Method, base model and settings as a file records them; of a file of others as far as its weights tell."""
    record = record_of(file)
    if record:
        backbone = {key: record["backbone"][key] for key in RECORDED & set(record["backbone"])}
        return {"method": record["method"], "backbone": backbone, "config": dict(record["config"])}
    named = _named_methods(overrides)
    if not named:
        raise UserError(
            f"{file} does not say by which method it was trained; add method=NAME ({', '.join(recipe_.METHODS)}), and"
            " backbone.weights=... for its base model"
        )
    config: dict[str, Any] = {}
    kind = schema.hints(recipe_.method_class(named[-1]).Config).get("lora")
    if kind is not None:
        spec = adapters.spec_of(file)
        config["lora"] = schema.plain(spec)
        if isinstance(spec, adapters.ExpertLoRA) and not schema.knows(kind, "experts"):
            raise UserError(
                f"{file} has experts ({spec.experts} in a layer), but {named[-1]} edits with a plain LoRA; name the method that"
                " it was trained by"
            )
    return {"method": named[-1], "backbone": {}, "config": config}
