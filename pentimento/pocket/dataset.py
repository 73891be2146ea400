"""Drawn data sets on disk: ``source/``, ``target/``, ``prompts/`` and ``scenes.jsonl`` (``pentimento world``)."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from ..images import from_tensor, save_image
from .render import render
from .tasks import Case, mixture

CASES_FILE = "scenes.jsonl"
SIZES = (32, 1024)


def write(
    task: str,
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    size: int = 128,
    out: Path,
    progress: Callable[[int], None] | None = None,
) -> list[Case]:
    """Draw ``count`` pairs of a task, or of several with commas between them, in turn; equal arguments give equal files.

    Raises:
        UserError: an unknown task or split, a count or size out of range, a folder that holds something else.
    """
    if not 1 <= count <= 100_000:
        raise UserError(f"count must be between 1 and 100000, not {count}")
    if not SIZES[0] <= size <= SIZES[1] or size % 16:
        raise UserError(f"size must be a multiple of 16 between {SIZES[0]} and {SIZES[1]}, not {size}")
    chosen = list(itertools.islice(mixture(task, split, seed), count))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another with --out")
    save(chosen, size=size, out=out, progress=progress)
    return chosen


def save(
    chosen: Sequence[Case], *, size: int = 128, out: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Draw cases into a folder; raises ``UserError`` where it cannot be written."""
    try:
        for name in ("source", "target", "prompts"):
            (out / name).mkdir(parents=True, exist_ok=True)
        for i in range(0, len(chosen), 16):
            part = chosen[i : i + 16]
            for side in ("source", "target"):
                pictures = render([getattr(case, side) for case in part], size, size)
                for case, picture in zip(part, from_tensor(pictures * 2 - 1), strict=True):
                    save_image(picture, out / side / f"{case.key}.png")
            for case in part:
                (out / "prompts" / f"{case.key}.txt").write_text(case.instruction + "\n", encoding="utf-8")
            if progress:
                progress(min(len(chosen), i + 16))
        lines = [json.dumps(dataclasses.asdict(case)) for case in chosen]
        (out / CASES_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the data set to {out}: {error.strerror or error}") from error


def read(folder: Path) -> list[Case]:
    """The cases of a data set that ``write`` made.

    Raises:
        UserError: the folder has no ``scenes.jsonl``, or a line of it is not a case.
    """
    file = folder / CASES_FILE
    if not file.is_file():
        raise UserError(f"{folder} is no drawn data set: it lacks {CASES_FILE} (pentimento world writes one)")
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            out.append(Case(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}, line {number}: not a case of the drawn world ({error})") from error
    return out
