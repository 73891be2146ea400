"""Reading adapter files strictly: every key must fit, and a file that does not is said to be what it seems to be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import files, inspection, stored
from .errors import UserError, counted, some

PREFIX = "transformer."
"""What diffusers puts before the keys of a transformer's LoRA."""
TENSORS_NAME = "tensors.safetensors"
Shape = tuple[int, ...]


def full_name(module: str) -> str:
    """Name of the file of a module trained whole."""
    return f"flux_{module}.safetensors"


def read_record(file: Path) -> dict[str, Any]:
    """What this package wrote of how the weights were trained; empty for files of others."""
    return inspection.own_record(file, stored.read_metadata(file))


def recorded_adapter(file: Path, name: str = "") -> dict[str, Any]:
    """What this package wrote of the adapter in a file; ``name`` where the file does not say which it is."""
    record = read_record(file)
    return dict(record.get("adapters", {}).get(record.get("adapter", name), {}))


def recorded_alpha(file: Path, default: float) -> float:
    """Alpha in the record that diffusers reads, or the default."""
    try:
        alpha = stored.recorded_alpha(stored.read_metadata(file))
    except ValueError as error:
        raise UserError(f"{file}: its {error}") from error
    return default if alpha is None else alpha


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, in float32 and finite."""
    tensors = {key: value.float() for key, value in stored.read_tensors(file).items()}
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(f"{file}: {broken[0]} holds values that are not finite; the weights are of no use")
    return tensors


class Factors(NamedTuple):
    """A LoRA as a file has it."""

    tensors: dict[str, Tensor]
    """Without prefix."""
    alpha: float | None
    """Where the file has such keys."""
    editinfinity: bool
    """Saved by EditInfinity's scripts: possibly flat, and without a word on alpha, which is not the rank."""


def read_lora(file: Path) -> Factors:
    """The factors of a file; raises ``UserError`` for several alphas."""
    own = read_tensors(file)
    named = stored.in_diffusers_names(own)
    tensors = {key.removeprefix(PREFIX): value for key, value in named.items()}
    alphas = {float(tensors.pop(key)) for key in [k for k in tensors if k.endswith(".alpha")]}
    if len(alphas) > 1:
        raise UserError(f"{file}: its layers have several alphas ({sorted(alphas)}), which is not supported")
    return Factors(tensors, alphas.pop() if alphas else None, stored.is_editinfinity(own))


def unflattened(file: Path, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flat factors, as EditInfinity's scripts leave them on several GPUs, in the shapes of an adapter's own.

    Raises:
        UserError: they are of another rank.
    """
    flat = {key: value for key, value in found.items() if value.dim() == 1 and key in own}
    for key, value in flat.items():
        here = own[key].shape[0]
        there, rest = divmod(value.numel(), own[key].shape[1])
        if ".lora_A." in key and not rest and there != here:
            raise UserError(f"{file} is of rank {there}, the adapter of rank {here}; set lora.rank={there}")
    fitting = {
        key: value.view(own[key].shape) for key, value in flat.items() if value.numel() == own[key].numel()
    }
    return {**found, **fitting}


def write(
    file: Path,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    more: Mapping[str, str] | None = None,
) -> None:
    """Write tensors with this package's record and ``more`` metadata; raises ``OSError`` where it cannot be written."""
    about = {"format": "pt", "pentimento": json.dumps(dict(record), sort_keys=True), **(more or {})}
    files.write(file, files.safetensors_bytes(tensors, about))


def fit(
    file: Path, what: str, found: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of own and found tensors; everything that does not fit is one error."""
    shapes, wanted = ({key: tuple(value.shape) for key, value in side.items()} for side in (found, own))
    if problems := misfits(shapes, wanted):
        raise UserError(f"{file} does not fit {what}: {'; '.join(problems)}. {seems(file)}")
    return [(own[key], found[key]) for key in own]


def misfits(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    """What keeps tensors from being taken, by their names and shapes."""
    missing, unknown = [k for k in wanted if k not in found], [k for k in found if k not in wanted]
    shapes = [
        f"{k} is {found[k]} there, {wanted[k]} here" for k in wanted if k in found and found[k] != wanted[k]
    ]
    problems = []
    if missing:
        problems.append(f"missing: {len(missing)} of {counted(len(wanted), 'key')} ({some(missing)})")
    if unknown:
        problems.append(f"not known: {counted(len(unknown), 'key')} ({some(unknown)})")
    if shapes:
        problems.append(f"of another shape: {counted(len(shapes), 'key')} ({some(shapes)})")
    return problems


def seems(file: Path) -> str:
    """What a file seems to be, in one sentence."""
    about = inspection.inspect_file(file)
    ranks = " and ".join(str(rank) for rank in about.ranks)
    experts = " and ".join(str(number) for number in about.experts)
    said = [
        f"keys as {about.dialect}",
        f"rank {ranks}" if ranks else "no plain LoRA factors" if experts else "no LoRA factors",
        *([f"{experts} experts in some layers"] if experts else []),
        f"base: {about.base}",
    ]
    return f"The file seems to be: {', '.join([about.method] * bool(about.method) + said)}"
