"""What all backbones share of published weights: files and folders, the hub, devices and precisions.

What a user can get wrong here becomes a ``UserError`` that names the field or the file.
"""

import errno
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP client underneath, whatever it is called in this version
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    XetDownloadError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from . import files
from .errors import UserError, first_line

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILE = 64 * 2**20
CHECKPOINT_FROM = 1_000_000_000
"""Parameters above which gradients are checkpointed unless the recipe says otherwise."""
REMEMBERED = 64
"""Prompts whose encodings stay known."""
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def sample(path: Path) -> bytes:
    """What a digest looks at: the whole file, or of one above 64 MiB the first and the last MiB."""
    size = path.stat().st_size
    if size <= SMALL_FILE:
        return path.read_bytes()
    with path.open("rb") as file:
        start = file.read(2**20)
        file.seek(size - 2**20)
        return start + file.read()


def fetch(name: str, patterns: Sequence[str], key: str, size: str) -> Path:
    """The folder of a hub model, downloaded as far as it is not in the cache.

    Args:
        patterns: the files that are wanted.
        key: what the recipe names the model with, such as ``backbone.weights``.
        size: the model in words, such as "FLUX.1 needs 34 GB".

    Raises:
        UserError: whatever goes wrong with the hub or with its cache.
    """
    page = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(_gated(page, key)) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{key}: there is no folder {name!r}, and no model of this name is visible on the hub "
            f"({page}); check the spelling. For a private model, set the variable HF_TOKEN to an access token "
            "of an account that may read it"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(_offline(name, key)) from error
    except HFValidationError as error:
        raise UserError(
            f"{key}: {name!r} is neither a folder nor a valid hub name ({first_line(error)})"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(_gated(page, key)) from error
        raise UserError(f"{key}: the hub refused {name}: {first_line(error)}; try again later") from error
    except (HTTPError, XetDownloadError, ConnectionError, TimeoutError) as error:
        raise UserError(_offline(name, key)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"{key}: {name} cannot be written to the hub cache ({error.strerror}); free some space "
            f"({size}) or set the variable HF_HOME to another folder"
        ) from error


def cached(name: str, files: Sequence[str]) -> Path | None:
    """The folder of a hub model if all these files are on this machine; nothing is downloaded."""
    held = [try_to_load_from_cache(name, file) for file in files]
    paths = [Path(path) for path in held if isinstance(path, str)]
    return paths[0].parents[files[0].count("/")] if len(paths) == len(files) else None


def _gated(page: str, key: str) -> str:
    return (
        f"{key}: access to {page} is restricted. Open that page, log in and accept its licence "
        "(non-commercial for FLUX.1 [dev] and Fill), then set the variable HF_TOKEN to an access token of that "
        "account (https://huggingface.co/settings/tokens)"
    )


def _offline(name: str, key: str) -> str:
    why = "the variable HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    return (
        f"{key}: {name} is not (completely) in the hub cache and {why}. If a folder was meant, it "
        "does not exist; otherwise connect once to download the model, or give the folder of a copy"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ``UserError`` naming the file if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        empty = "is empty" if not any(path.parent.iterdir()) else f"has no {path.name}"
        raise UserError(
            f"{path.parent}: the folder {empty}; the weights must be a folder in diffusers format, as "
            "save_pretrained writes it"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; copy or download it again")
    return content


def is_complete(folder: Path) -> bool:
    """Whether a folder holds safetensors files, and all that its indices name: of a model in the hub's cache some may be missing."""
    return any(folder.glob("*.safetensors")) and not _missing(folder)


def _missing(folder: Path) -> dict[str, str]:
    """Files of weights that are named but not there, each with what names it."""
    named = {
        file: index.name
        for index in folder.glob("*.safetensors.index.json")
        for file in read_json(index).get("weight_map", {}).values()
    }
    return {file: index for file, index in sorted(named.items()) if not (folder / file).is_file()}


def check_weights(folder: Path) -> None:
    """Open every safetensors file of a folder, which verifies header and length; errors name the file."""
    if missing := _missing(folder):
        file, index = next(iter(missing.items()))
        raise UserError(f"{folder / file}: is missing, though {index} names it; download the model again")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder}: holds no .safetensors file; other formats (.bin, .ckpt) are not read, and a .gguf file is named by "
            "backbone.transformer_file or backbone.text_encoder_file"
        )
    for path in files:
        check_file(path)


def check_file(path: Path) -> None:
    """Open a safetensors file, which verifies header and length."""
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        check_pointer(path)
        raise UserError(
            f"{path}: the file is damaged or cut off ({first_line(error)}); copy or download it again"
        ) from error


def check_pointer(path: Path) -> None:
    """Raise ``UserError`` if the file is what Git leaves in place of a large one."""
    with path.open("rb") as file:
        if said := files.pointer(file.read(64), "the weights"):
            raise UserError(f"{path}: {said}")


@contextmanager
def explained(where: Path, model: str) -> Iterator[None]:
    """Turn the libraries' ways of failing at a file into one ``UserError``."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{where}: cannot be loaded as {model}: {first_line(error)}") from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the libraries' progress bars while files are read: they would tear a training run's display."""
    shown = [
        library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def remember(known: OrderedDict[K, V], keys: Sequence[K], make: Callable[[list[K]], Sequence[V]]) -> list[V]:
    """The values of keys; those that are missing are made together, and the last ones stay known."""
    if missing := [key for key in dict.fromkeys(keys) if key not in known]:
        known.update(zip(missing, make(missing), strict=True))
    values = [known[key] for key in keys]
    for key in keys:
        known.move_to_end(key)
    while len(known) > REMEMBERED:
        known.popitem(last=False)
    return values


def read_model(model: Any, folder: Path, part: str, dtype: torch.dtype, where: Path, **options: Any) -> Any:
    """A model of a library from ``folder / part``, frozen, on the CPU; incomplete weights are an error, not a warning.

    ``where`` is the file or folder that errors name.
    """
    with quiet_loading(), explained(where, model.__name__):
        loaded, info = model.from_pretrained(
            folder, subfolder=part, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    wrong = {*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])}
    if wrong:
        raise UserError(
            f"{where}: the weights do not fit {model.__name__}; {sorted(wrong)[0]} is missing or misshapen"
        )
    return loaded.requires_grad_(False).eval()


def read_tokenizer(where: Path) -> Any:
    """The tokenizer of a folder."""
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: the tokenizer cannot be loaded: {first_line(error)}") from error


def choose_device(name: str) -> torch.device:
    """The device of ``backbone.device``; "auto" takes this process's GPU, else the CPU."""
    if name == "auto":
        from accelerate import PartialState

        # One process per GPU under torchrun: accelerate knows which one is ours.
        return PartialState().device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"backbone.device: {name!r} is no device; use auto, cpu, cuda, cuda:0 or mps"
        ) from error
    usable = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not usable.get(device.type, False):
        raise UserError(
            f"backbone.device: {name!r} is not usable here with this build of torch; use auto or cpu"
        )
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of frozen weights: "auto" is bf16 on CUDA (fp16 on cards without bf16) and fp32 elsewhere."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return named[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def avoid_cudnn_attention(device: torch.device) -> None:
    """Keep torch from choosing cuDNN's attention."""
    if device.type == "cuda":
        # FLUX's backward pass died in it with an illegal memory access (torch 2.11, H200).
        torch.backends.cuda.enable_cudnn_sdp(False)
