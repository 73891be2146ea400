"""Saved steps of a run: ``RUN/checkpoints/STAGE-000500/`` holds all that continues training bit for bit.

A checkpoint is written as ``STAGE-000500.partial`` and renamed when everything in it has reached the disk; it loses that name
before it is deleted. So whatever lacks the ending is complete, and whatever bears it is rubbish of a process that died.
"""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import files
from .adapters import Adapters
from .errors import UserError

FOLDER = "checkpoints"
WEIGHTS = "weights"
STATE = "state.pt"
ABOUT = "checkpoint.json"
NAME = re.compile(r"(?P<stage>.+)-(?P<step>\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One complete checkpoint. Its folder also holds the adapters' weights, as ``Adapters.save`` writes them."""

    stage: str
    step: int
    folder: Path
    index: int = 0
    """Place of the stage in its recipe, from 0."""


def saved_steps(out: Path) -> list[Saved]:
    """The complete checkpoints of a run, in the order of training."""
    found = []
    for folder in sorted((out / FOLDER).glob("*")):
        match = NAME.fullmatch(folder.name)
        if match and folder.is_dir() and (folder / ABOUT).is_file():
            index = int(_about(folder)["index"])
            found.append(Saved(stage=match["stage"], step=int(match["step"]), folder=folder, index=index))
    return sorted(found, key=lambda saved: (saved.index, saved.step))


def at(out: Path, step: int) -> Saved:
    """The checkpoint of a step; where several stages have it, that of the last one.

    Raises:
        UserError: that step was not saved; the message lists those that were.
    """
    every = saved_steps(out)
    chosen = [saved for saved in every if saved.step == step]
    if chosen:
        return chosen[-1]
    if not every:
        raise UserError(f"{out}: no step was saved yet (no complete checkpoint in {FOLDER}/)")
    several = len({saved.stage for saved in every}) > 1
    listed = ", ".join(f"{saved.step} ({saved.stage})" if several else str(saved.step) for saved in every)
    raise UserError(f"{out}: step {step} was not saved; saved steps: {listed}")


def prepare(out: Path) -> None:
    """Make the folder of checkpoints, and delete what dead processes left half-written or half-deleted.

    Raises:
        UserError: it cannot be written; better known before the first step than at the first save.
    """
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        for partial in (out / FOLDER).glob(f"*{files.PARTIAL}"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        files.write(out / FOLDER / "writable", b"")
        (out / FOLDER / "writable").unlink()
    except OSError as error:
        raise UserError(
            f"{out / FOLDER}: cannot be written ({error.strerror}); choose another folder with --out"
        ) from error


def save(
    out: Path, saved: Saved, adapters: Adapters, state: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Write a checkpoint. ``state`` is what ``torch.load`` reads without running code: numbers, texts, tensors.

    Raises:
        UserError: it cannot be written (disk full, no permission, ...); the earlier ones are untouched.
    """
    if saved.folder.exists():
        return  # interrupted again before another step was done
    partial = saved.folder.with_name(saved.folder.name + files.PARTIAL)
    buffer = io.BytesIO()  # torch.save to a full disk fails with an error that does not say so
    torch.save({**state, "adapters": adapters.state_dict()}, buffer)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files.write(partial / STATE, buffer.getvalue())
        adapters.save(partial, {**record, "stage": saved.stage, "step": saved.step})
        about = {"stage": saved.stage, "step": saved.step, "index": saved.index, "samples": state["samples"]}
        about["sha256"] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        files.write(partial / ABOUT, json.dumps(about).encode())
        files.sync_folder(partial)
        os.rename(partial, saved.folder)
        files.sync_folder(saved.folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        earlier = saved_steps(out)
        kept = f"step {earlier[-1].step} is saved and intact" if earlier else "no step was saved yet"
        raise UserError(
            f"{saved.folder}: step {saved.step} cannot be saved ({error.strerror or error}); {kept}. Make room or "
            "mend the folder, then continue with --resume"
        ) from error


def save_weights(out: Path, adapters: Adapters, record: Mapping[str, Any], *, stage: str, step: int) -> None:
    """Write the result of a training to ``out/weights``, all of its files or none, with the stage and step that it ended at.

    Raises:
        UserError: it cannot be written; what was there before is untouched.
    """
    new, old = (out / f"{WEIGHTS}{kind}{files.PARTIAL}" for kind in ("", "-before"))
    try:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        adapters.save(new, {**record, "stage": stage, "step": step})
        files.sync_folder(new)
        if (out / WEIGHTS).exists():  # a folder that is not empty cannot be renamed over
            os.rename(out / WEIGHTS, old)
        os.rename(new, out / WEIGHTS)
        files.sync_folder(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(
            f"{out / WEIGHTS}: cannot be written ({error.strerror}); the last step is saved. Make room, then continue with --resume"
        ) from error


def load(saved: Saved, adapters: Adapters) -> dict[str, Any]:
    """Put the adapters into the state of a checkpoint; returns the rest of its state.

    Raises:
        UserError: damaged, or of other adapters.
    """
    file = saved.folder / STATE
    remedy = f"delete {saved.folder} to continue from the step before"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: damaged ({error.strerror}); {remedy}") from error
    if hashlib.sha256(data).hexdigest() != _about(saved.folder).get("sha256"):
        raise UserError(f"{file}: damaged (its checksum is wrong); {remedy}")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    try:
        adapters.load_state_dict(state.pop("adapters"))
    except ValueError as error:
        raise UserError(f"{file}: of other adapters than those of this recipe; {remedy}") from error
    return state


def prune(out: Path, stage: str, keep_last: int, keep_steps: tuple[int, ...]) -> None:
    """Delete a stage's checkpoints but the last ``keep_last`` and those of ``keep_steps``."""
    mine = [saved for saved in saved_steps(out) if saved.stage == stage]
    for saved in mine[:-keep_last]:
        if saved.step not in keep_steps:
            partial = saved.folder.with_name(saved.folder.name + files.PARTIAL)
            os.rename(saved.folder, partial)
            shutil.rmtree(partial)


def folder_of(out: Path, stage: str, step: int) -> Path:
    """Where a step of a stage is saved."""
    return out / FOLDER / f"{stage}-{step:06d}"


def _about(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / ABOUT).read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / ABOUT}: damaged ({error}); delete {folder}") from error


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and stopped after it had saved; the message says how to continue."""


class Stop:
    """Whether training was asked to stop."""

    def __init__(self, patient: bool):
        self.patient = patient
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first asks, the second stops at once, unless ``patient``."""
        if self.requested:
            if self.patient:
                return
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        # Not print: a signal may arrive in the middle of another write to the same stream.
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{name}: saving after this step\n".encode()
        )


@contextmanager
def deferred_signals(*, patient: bool = False) -> Iterator[Stop]:
    """Within, Ctrl-C and SIGTERM only ask to stop, so that the step under way is finished and saved.

    ``patient``: however often they ask. torchrun passes a Ctrl-C on to processes that have got it already.
    """
    stop = Stop(patient)
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
