"""Adapter files on disk: safetensors, and the pickled files of PairEdit, Concept Sliders and EditInfinity, read without running code.

PairEdit's name a layer ``lora_unet_transformer_blocks_0_attn_to_out_0`` and hold ``alpha``, ``lora_down.weight`` and
``lora_up.weight`` of it; here and in diffusers it is ``transformer_blocks.0.attn.to_out.0`` with ``lora_A`` and ``lora_B``.
EditInfinity's names of factors lack ``.weight``, and its learnt rows are one tensor without a name.
"""

import io
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from . import files
from .errors import UserError

PICKLED = (b"PK\x03\x04", b"\x80\x02")
PAIREDIT, ONETRAINER = "lora_unet_", "lora_transformer_"
# Leaves hold underscores of their own, so that they are named and never split.
LAYER = re.compile(
    r"(?P<prefix>lora_unet_|lora_transformer_)(?P<blocks>(?:single_)?transformer_blocks)_(?P<number>\d+)_attn_"
    r"(?P<leaf>to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)\.(?P<part>alpha|lora_down\.weight|lora_up\.weight)"
)
PARTS = {"alpha": "alpha", "lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
DIFFUSERS = re.compile(
    r"(?P<blocks>(?:single_)?transformer_blocks)\.(?P<number>\d+)\.attn\.(?P<leaf>to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
)

EDITINFINITY = re.compile(r"(?P<layer>block_chunks\.\d+\.module\.\d+\.ffn\.fc[12])\.lora_(?P<factor>[AB])")
ROWS = "rows"
"""What a lone tensor is called here."""


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; a pickled file has none.

    Raises:
        UserError: unreadable, empty, or none of these.
    """
    if _pickled(path):
        read_tensors(path)  # explains what is damaged, or no list of tensors
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file under their own names, on the CPU; raises ``UserError`` as ``read_metadata`` does."""
    pickled = _pickled(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if pickled:
        return _unpickled(path, data)
    try:
        return dict(sorted(load(data).items()))
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from error


def recorded_alpha(metadata: Mapping[str, str]) -> float | None:
    """Alpha in the record that diffusers reads; ``None`` where it says nothing, ``ValueError`` where it is damaged."""
    try:
        alpha = json.loads(metadata.get("lora_adapter_metadata", "{}")).get("transformer.lora_alpha")
        return None if alpha is None else float(alpha)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"lora_adapter_metadata is damaged ({error})") from error


def _pickled(path: Path) -> bool:
    """Whether a file is a pickled one; refuses what both libraries would answer with a riddle."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not start:
        raise UserError(f"{path}: the file is empty")
    if said := files.pointer(start, "the weights"):
        raise UserError(f"{path}: {said}")
    return start.startswith(PICKLED)


def _unpickled(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: a pickled PyTorch file that is damaged, or holds more than tensors, which could run code when it is read;"
            " convert it to safetensors"
        ) from error
    if isinstance(found, Tensor):
        return {ROWS: found.data}
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise UserError(
            f"{path}: a pickled PyTorch file that is no list of named tensors, so no LoRA as PairEdit or EditInfinity saves it"
        )
    return found


def in_diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names are PairEdit's (OneTrainer's for the same layers) or EditInfinity's, under diffusers'; others as they are.

    A file of which only some names are known stays as it is, so that it is refused under its own names.
    """
    if is_editinfinity(tensors):
        return {f"transformer.{key}.weight": value for key, value in tensors.items()}
    matches = {key: LAYER.fullmatch(key) for key in tensors}
    if not all(matches.values()):
        return dict(tensors)
    renamed = {}
    for key, match in matches.items():
        if match is not None:
            leaf = "to_out.0" if match["leaf"] == "to_out_0" else match["leaf"]
            layer = f"{match['blocks']}.{match['number']}.attn.{leaf}"
            renamed[f"transformer.{layer}.{PARTS[match['part']]}"] = tensors[key]
    return renamed


def is_editinfinity(names: Iterable[str]) -> bool:
    """Whether all names are those of a LoRA that EditInfinity's scripts saved."""
    every = list(names)
    return bool(every) and all(EDITINFINITY.fullmatch(name) for name in every)


def pairedit_name(layer: str) -> str | None:
    """PairEdit's name of a layer that diffusers calls ``layer``; ``None`` for layers that it never trains."""
    match = DIFFUSERS.fullmatch(layer)
    if match is None:
        return None
    return f"{PAIREDIT}{match['blocks']}_{match['number']}_attn_{match['leaf'].replace('.', '_')}"


def pairedit_bytes(factors: Mapping[str, tuple[Tensor, Tensor]]) -> bytes:
    """A ``.pt`` file as PairEdit saves it, bfloat16 with alpha 1, of ``lora_down`` and ``lora_up`` by its names of layers."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        state[f"{name}.alpha"] = torch.ones((), dtype=torch.bfloat16)
        state[f"{name}.lora_down.weight"] = down.detach().cpu().bfloat16().contiguous()
        state[f"{name}.lora_up.weight"] = up.detach().cpu().bfloat16().contiguous()
    return pickled(state)


def pickled(content: Tensor | Mapping[str, Tensor]) -> bytes:
    """What ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
