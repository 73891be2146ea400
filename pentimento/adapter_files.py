"""Reading adapter files strictly: every key must fit, and a file that does not is said to be what it seems to be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import files, inspection
from .errors import UserError

PREFIX = "transformer."
"""What diffusers puts before the keys of a transformer's LoRA."""
TENSORS_NAME = "tensors.safetensors"
SHOWN = 3


def full_name(module: str) -> str:
    """Name of the file of a module trained whole."""
    return f"flux_{module}.safetensors"


def read_record(file: Path) -> dict[str, Any]:
    """What this package wrote of how the weights were trained; empty for files of others."""
    text = inspection.read_metadata(file).get("pentimento", "{}")
    try:
        return dict(json.loads(text))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file}: its record of how it was trained is damaged ({error})") from error


def recorded_adapter(file: Path, name: str = "") -> dict[str, Any]:
    """What this package wrote of the adapter in a file; ``name`` where the file does not say which it is."""
    record = read_record(file)
    return dict(record.get("adapters", {}).get(record.get("adapter", name), {}))


def recorded_alpha(file: Path, default: float) -> float:
    """Alpha in the record that diffusers reads, or the default."""
    text = inspection.read_metadata(file).get("lora_adapter_metadata", "{}")
    try:
        return float(json.loads(text).get(f"{PREFIX}lora_alpha", default))
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: its lora_adapter_metadata is damaged ({error})") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, in float32 and finite."""
    inspection.read_metadata(file)  # explains files that are missing, empty, pickled, ...
    try:
        tensors = {key: value.float() for key, value in load_file(file).items()}
    except SafetensorError as error:
        raise UserError(f"{file}: damaged, or not a safetensors file ({error})") from error
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(f"{file}: {broken[0]} holds values that are not finite; the weights are of no use")
    return tensors


def read_lora(file: Path) -> tuple[dict[str, Tensor], float | None]:
    """LoRA factors without prefix, and alpha where the file has such keys."""
    tensors = {key.removeprefix(PREFIX): value for key, value in read_tensors(file).items()}
    alphas = {float(tensors.pop(key)) for key in [k for k in tensors if k.endswith(".alpha")]}
    if len(alphas) > 1:
        raise UserError(f"{file}: its layers have several alphas ({sorted(alphas)}), which is not supported")
    return tensors, alphas.pop() if alphas else None


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
    missing, unexpected = [k for k in own if k not in found], [k for k in found if k not in own]
    shapes = [
        (k, tuple(found[k].shape), tuple(own[k].shape))
        for k in own
        if k in found and found[k].shape != own[k].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(own)} keys are missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} keys are not known ({_some(unexpected)})")
    if shapes:
        some = [f"{key} is {theirs} there, {ours} here" for key, theirs, ours in shapes]
        problems.append(f"{len(shapes)} have another shape ({_some(some)})")
    if problems:
        raise UserError(f"{file} does not fit {what}: {'; '.join(problems)}. {seems(file)}")
    return [(own[key], found[key]) for key in own]


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


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
