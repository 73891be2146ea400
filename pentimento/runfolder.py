"""A run folder: everything that one training leaves, and all that an edit needs.

``recipe.yaml`` (resolved), ``inputs.json``, ``weights/`` (what diffusers loads), ``checkpoints/``, ``samples/``, ``metrics.jsonl``, TensorBoard
events, ``README.md``, and of W&B, where asked for, its own folder and the run's id. One process may train in it at a time.
"""

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import files, schema
from .errors import UserError
from .recipe import Recipe, dump, load

RECIPE = "recipe.yaml"
WEIGHTS = "weights"
README = "README.md"
LOCK = ".lock"
INPUTS = "inputs.json"
"""What the recipe only names: of the data and of the base model so much that a change is seen."""
MEANING = {
    "data.pairs": "the number of pairs",
    "data.names": "names of the pairs, or their order",
    "data.prompts": "prompts",
    "data.pictures": "what pictures or masks hold",
    "base.digest": "the weights of the base model",
}
IN_THE_WAY = "cannot be a run folder, because a file stands in its way; choose another --out"
RAISABLE = "steps"
"""The one setting of a stage that a continued run may change, upwards."""


def default_folder(recipe: str, *, resume: bool) -> Path:
    """``runs/RECIPE-DATE`` for a new run; a run folder itself when it is to be continued.

    Raises:
        UserError: ``--resume`` without saying which run, or several processes, of which each would choose another name.
    """
    path = Path(recipe)
    if resume:
        if (path / RECIPE).is_file():
            return path
        raise UserError(
            "--resume: say which run to continue: pentimento train RUN --resume, or with --out RUN"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "several processes train together: name the run folder that they share with --out FOLDER"
        )
    name = path.resolve().name.removesuffix(".yaml").removesuffix(".yml")
    return Path("runs") / f"{name}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run folder for this process; the system lets go of the lock when the process dies, however it does.

    Raises:
        UserError: another process trains in it, or a file stands where the folder should be.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{out} {IN_THE_WAY}") from error
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{out} is in use by another process that trains in it; wait for it, or choose another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()
        if out.is_dir() and [p.name for p in out.iterdir()] == [LOCK]:
            # Nothing was begun: leave no trace.
            (out / LOCK).unlink(missing_ok=True)
            out.rmdir()


def check_new(out: Path) -> None:
    """Check that a new run can begin in a folder, which need not be there yet.

    Raises:
        UserError: the folder holds a run, or anything else, or a file stands in its way.
    """
    nearest = files.nearest(out)
    if not nearest.is_dir():
        raise UserError(f"{out} {IN_THE_WAY}")
    if nearest != out:
        return
    held = sorted(p.name for p in out.iterdir() if p.name != LOCK)
    if RECIPE in held:
        raise UserError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    if held:
        raise UserError(
            f"{out} is not empty (it holds {', '.join(held[:3])}); choose a new folder with --out"
        )


def check_resumed(out: Path, recipe: Recipe) -> None:
    """Check that a run can be continued with this recipe.

    Raises:
        UserError: no run there, or a setting other than raised steps differs.
    """
    if not (out / RECIPE).is_file():
        raise UserError(f"--resume: {out} holds no run (no {RECIPE})")
    before, now = _flat(schema.plain(load(out / RECIPE))), _flat(schema.plain(recipe))
    changed = [
        key for key in {**before, **now} if before.get(key) != now.get(key) and not _raised(key, before, now)
    ]
    if changed:
        lines = "".join(f"\n  {key}: {_shown(before, key)} -> {_shown(now, key)}" for key in changed)
        raise UserError(
            f"--resume: {out} was begun with other settings; only the steps of a stage may change, and only upwards:{lines}"
        )


def check_inputs(out: Path, inputs: Mapping[str, Any]) -> None:
    """Check that a run that the folder holds goes on with the data and the base model that it was begun with.

    Raises:
        UserError: something of them is other than before.
    """
    file = out / INPUTS
    if not file.is_file():
        return  # a new run
    try:
        before, now = _flat(json.loads(file.read_text(encoding="utf-8"))), _flat(schema.plain(inputs))
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); delete it to continue without comparing") from error
    lines = "".join(
        f"\n  {MEANING.get(key, key)}: {_shown(before, key)} -> {_shown(now, key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    )
    if lines:
        raise UserError(
            f"--resume: {out} was begun with other data or another base model, which makes another training of it; put back what"
            f" was there, or start a new run from its weights with --init {out}:{lines}"
        )


def record(out: Path, recipe: Recipe, inputs: Mapping[str, Any]) -> None:
    """Write the resolved recipe and what it was begun with: from here on the folder holds a run."""
    write_text(out / INPUTS, json.dumps(schema.plain(inputs), indent=1, sort_keys=True) + "\n")
    write_text(out / RECIPE, dump(recipe))


def _raised(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    parts = key.split(".")
    return (
        parts[0] == "stages" and len(parts) == 3 and parts[2] == RAISABLE and key in before and key in now
        and now[key] > before[key]
    )  # fmt: skip


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {
        k: v
        for key, inner in value.items()
        for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()
    }


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; ``UserError`` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
