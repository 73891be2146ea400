"""Files of weights: safetensors, and pickles as Infinity publishes them, which are converted once.

Nothing in a pickle is ever run: torch reads plain data out of it and refuses the rest.
"""

import hashlib
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import pretrained
from ..errors import UserError, first_line
from ..pocket.weights import cache_folder

SUFFIXES = (".safetensors", ".pth", ".pt")
PUBLISHED = "infinity_2b_reg.pth and infinity_vae_d32reg.pth"


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The weights of a .pth file, by the names of the file, not read into memory where its format allows that.

    Raises:
        UserError: the file is damaged, or holds anything but plain data: nothing in it is ever run.
    """
    pretrained.check_pointer(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: is no file of weights, or holds more than weights, which would run as code ({_reason(error)}); use the "
            f"published {PUBLISHED}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: the file is damaged or cut off ({first_line(error)}); copy or download it again"
        ) from error
    # The autoencoder's file holds its weights as "vae", a training checkpoint the transformer's as trainer.gpt_fsdp.
    for keys in (("vae",), ("trainer", "gpt_fsdp")):
        inner: Any = held
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        held = inner or held
    state = {k: v for k, v in held.items() if isinstance(v, Tensor)} if isinstance(held, dict) else {}
    if not state:
        raise UserError(f"{path}: holds no weights; use the published {PUBLISHED}")
    return state


def _reason(error: Exception) -> str:
    """What torch objects to, out of a message of many lines."""
    named = re.search(r"GLOBAL ([\w.]+)|Unsupported operand|invalid load key[^.]*", str(error))
    return named[0] if named else first_line(error)


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of weights, without reading these."""
    if path.suffix not in SUFFIXES or not path.is_file():
        raise UserError(f"{path}: is no file of weights; Infinity's are {PUBLISHED}")
    file = path if path.suffix == SUFFIXES[0] else converted(path)
    if file is None:
        return {name: tuple(value.shape) for name, value in read_pickle(path).items()}
    pretrained.check_file(file)
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def as_safetensors(path: Path) -> Path:
    """A .pth file's weights as safetensors: converted once, beside it or, where nothing may be written, in the cache."""
    if done := converted(path):
        return done
    beside, kept = _conversions(path)
    place = beside if os.access(path.parent, os.W_OK) else kept
    part = place.with_name(f".{place.name}.{os.getpid()}")
    state = {name: value.contiguous() for name, value in read_pickle(path).items() if not _constant(name)}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, part, {"format": "pt", "source": _stamp(path)})
        part.rename(place)
    except (OSError, SafetensorError) as error:
        if part.is_file():
            part.unlink()
        raise UserError(
            f"{path}: cannot be converted to safetensors ({place}: {first_line(error)}); free some space, or set PENTIMENTO_CACHE "
            "to a folder you may write"
        ) from error
    return place


def _constant(name: str) -> bool:
    """Whether it is no weight: the file holds one of these under two names, which safetensors refuses."""
    return name.endswith((".zero_k_bias", "lfq.mask"))


def _stamp(path: Path) -> str:
    about = path.stat()
    return f"{about.st_size}-{about.st_mtime_ns}"


def _conversions(path: Path) -> tuple[Path, Path]:
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    return path.with_name(
        f"{path.name}.safetensors"
    ), cache_folder() / "converted" / f"{path.name}-{name}.safetensors"


def converted(path: Path) -> Path | None:
    """What a .pth file as it is now was converted to, if it was."""
    for place in filter(Path.is_file, _conversions(path)):
        pretrained.check_file(place)
        with safe_open(place, "pt") as tensors:
            if (tensors.metadata() or {}).get("source") == _stamp(path):
                return place
    return None
