"""Models from GGUF files: the FLUX transformer as it is published for ComfyUI, and a T5 as the second text encoder.

Such a file holds one model, most of it in blocks of a few bits per weight. The transformer stays in blocks: a layer is
unpacked whenever it runs (diffusers' ``GGUFLinear``). The text encoder is unpacked when it is read, so it saves disk, not memory.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from torch import Tensor
from transformers import T5Config
from transformers.utils import logging as transformers_logging

from .. import files
from ..adapter_files import misfits
from ..errors import UserError, first_line

FIELDS = {"transformer": "transformer_file", "text_encoder_2": "text_encoder_file"}
"""Parts of a model that a GGUF file can stand for, and the fields of ``backbone`` that name it."""
T5_ARCHITECTURES = ("t5encoder", "t5")

# From the names of FLUX's own code, which GGUF files keep, to those of diffusers. Several names: rows one below the other.
EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
BLOCK = re.compile(
    r"(?P<kind>double|single)_blocks\.(?P<number>\d+)\.(?P<layer>.+)\.(?P<tensor>weight|bias|scale)"
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says of itself, read without its weights."""

    architecture: str
    """As the file has it, such as flux, t5encoder or llama; "" where it does not say."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor when unpacked, rows first."""
    types: dict[str, Any]
    """How every tensor is packed."""


def read_header(file: Path, part: str) -> Header:
    """Open a file and check that it is a whole GGUF; ``part`` is what it is to stand for.

    Raises:
        UserError: no such file, another format, damaged or cut off, or the extra gguf is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        field = f"backbone.{FIELDS[part]}"
        raise UserError(f"{field}: GGUF files need the extra gguf: pip install 'pentimento[gguf]'") from error
    _refuse(file, part)
    try:
        reader = GGUFReader(file)
        architecture = reader.fields.get("general.architecture")
        return Header(
            architecture=str(architecture.contents()) if architecture else "",
            shapes={t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors},
            types={t.name: t.tensor_type for t in reader.tensors},
        )
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(
            f"{file}: damaged or cut off, or of a kind that this version of the package gguf does not know "
            f"({first_line(error)}); copy or download it again"
        ) from error


def _refuse(file: Path, part: str) -> None:
    """Say what a file is that is no GGUF."""
    field = f"backbone.{FIELDS[part]}"
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except FileNotFoundError as error:
        raise UserError(
            f"{field}: there is no file {str(file)!r} on this machine; give the path of a .gguf file"
        ) from error
    except IsADirectoryError as error:
        raise UserError(f"{field}: {file} is a folder; name the .gguf file in it") from error
    except OSError as error:
        raise UserError(f"{field}: {file} cannot be read ({error.strerror})") from error
    if start.startswith(b"GGUF"):
        return
    if said := files.pointer(start, "the weights"):
        raise UserError(f"{file}: {said}")
    if start[8:10] in (b'{"', b"{ "):
        raise UserError(
            f"{field}: {file} is a safetensors file, and a GGUF is needed. Weights in safetensors are read from a folder in "
            f"diffusers format that backbone.weights names; leave {field} away then"
        )
    raise UserError(f"{field}: {file} {'is not a GGUF file' if start else 'is empty'}; give a .gguf file")


def transformer_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a FLUX transformer by diffusers' names.

    Raises:
        UserError: as ``read_header`` does; a model that is no FLUX transformer, or packed as diffusers cannot unpack it.
    """
    header = read_header(file, "transformer")
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
    from gguf import GGMLQuantizationType

    hollow = {name: torch.empty(shape, device="meta") for name, shape in header.shapes.items()}
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in to_diffusers(hollow).items()}
    except (RuntimeError, KeyError):  # layers that cannot be divided as FLUX's
        shapes = {}
    if not {"x_embedder.weight", "context_embedder.weight", "proj_out.weight"} <= shapes.keys():
        hint = "; a T5 is named by backbone.text_encoder_file" * (header.architecture in T5_ARCHITECTURES)
        raise UserError(f"{file}: holds {_model(header)}, not a FLUX.1 transformer{hint}")
    known = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, *SUPPORTED_GGUF_QUANT_TYPES}
    if strange := sorted({kind.name for kind in header.types.values() if kind not in known}):
        names = ", ".join(sorted(kind.name for kind in known))
        raise UserError(f"{file}: is packed as {strange[0]}, which diffusers does not unpack; known: {names}")
    return shapes


def check_fit(file: Path, model: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` unless a file holds exactly the tensors of a transformer's state."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.items()}
    if problems := misfits(transformer_shapes(file), wanted):
        raise UserError(
            f"{file}: does not fit the transformer that backbone.weights describes; {'; '.join(problems)}"
        )


def check_text_encoder(file: Path) -> None:
    """Raise ``UserError`` unless a file holds a T5 encoder."""
    header = read_header(file, "text_encoder_2")
    if header.architecture not in T5_ARCHITECTURES:
        hint = "; a FLUX transformer is named by backbone.transformer_file" * (
            "img_in.weight" in header.shapes
        )
        raise UserError(f"{file}: holds {_model(header)}, not a T5 encoder{hint}")


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A FLUX transformer's tensors named and divided as diffusers has them; what FLUX does not know keeps its name."""
    tensors = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names = _names(name)
        if len(names) > 1:
            width = len(tensors["img_in.weight"])
            last = len(tensor) - width * (len(names) - 1)
            renamed |= zip(names, tensor.split([width] * (len(names) - 1) + [last]), strict=True)
        elif names[0].startswith("norm_out.linear.") and names[0] != name:
            renamed[names[0]] = torch.cat(
                list(reversed(tensor.chunk(2)))
            )  # shift, scale: here the other way round
        else:
            renamed[names[0]] = tensor
    return renamed


def _names(name: str) -> tuple[str, ...]:
    layer, _, tensor = name.rpartition(".")
    if layer in EMBEDDERS:
        return (f"{EMBEDDERS[layer]}.{tensor}",)
    block = BLOCK.fullmatch(name)
    if block is None:
        return (name,)
    table, blocks = (
        (DOUBLE, "transformer_blocks") if block["kind"] == "double" else (SINGLE, "single_transformer_blocks")
    )
    tensor = block["tensor"].replace("scale", "weight")
    return tuple(
        f"{blocks}.{block['number']}.{layer}.{tensor}" for layer in table.get(block["layer"], ())
    ) or (name,)


def load_transformer(file: Path, folder: Path, dtype: torch.dtype) -> Any:
    """The transformer, its layers packed as in the file; ``folder`` is the model's, whose configuration is taken."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    tensors = load_gguf_checkpoint(file)
    # Only the matrices of linear layers are unpacked as they run; and packed vectors could not be divided.
    tensors = {name: dequantize_gguf_tensor(t) if t.ndim == 1 else t for name, t in tensors.items()}
    kind: Any = FluxTransformer2DModel
    return kind.from_single_file(
        to_diffusers(tensors),
        config=str(folder),
        subfolder="transformer",
        dtype=dtype,
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        local_files_only=True,
    )


def _model(header: Header) -> str:
    return f"a model of the architecture {header.architecture}" if header.architecture else "another model"


def text_encoder_options(file: Path, folder: Path) -> dict[str, Any]:
    """What ``T5EncoderModel.from_pretrained`` needs to read a GGUF with the configuration of the model in ``folder``."""
    config = T5Config.from_pretrained(folder, subfolder="text_encoder_2", local_files_only=True)
    return {"gguf_file": str(file.absolute()), "config": config}


@contextlib.contextmanager
def quiet_unpacking() -> Iterator[None]:
    """Hide transformers' progress bar of GGUF files, which heeds no setting, and its warning that they lack a vocabulary."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
