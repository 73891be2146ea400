"""Tiny models written as GGUF files: the transformer by the names of FLUX's own code, the T5 by llama.cpp's."""

import re
from pathlib import Path

import gguf
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel

Kind = gguf.GGMLQuantizationType

NAMES = {
    r"x_embedder": "img_in",
    r"context_embedder": "txt_in",
    r"time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
    r"time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
    r"time_text_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
    r"time_text_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
    r"proj_out": "final_layer.linear",
    r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"double_blocks.\1.img_mod.lin",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"double_blocks.\1.txt_mod.lin",
    r"transformer_blocks\.(\d+)\.attn\.to_[qkv]": r"double_blocks.\1.img_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj": r"double_blocks.\1.txt_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.norm_q": r"double_blocks.\1.img_attn.norm.query_norm",
    r"transformer_blocks\.(\d+)\.attn\.norm_k": r"double_blocks.\1.img_attn.norm.key_norm",
    r"transformer_blocks\.(\d+)\.attn\.norm_added_q": r"double_blocks.\1.txt_attn.norm.query_norm",
    r"transformer_blocks\.(\d+)\.attn\.norm_added_k": r"double_blocks.\1.txt_attn.norm.key_norm",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"double_blocks.\1.img_mlp.0",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"double_blocks.\1.img_mlp.2",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": r"double_blocks.\1.txt_mlp.0",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2": r"double_blocks.\1.txt_mlp.2",
    r"single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks.\1.modulation.lin",
    r"single_transformer_blocks\.(\d+)\.(?:attn\.to_[qkv]|proj_mlp)": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks.\1.linear2",
    r"single_transformer_blocks\.(\d+)\.attn\.norm_q": r"single_blocks.\1.norm.query_norm",
    r"single_transformer_blocks\.(\d+)\.attn\.norm_k": r"single_blocks.\1.norm.key_norm",
}
"""From diffusers to FLUX's own names; layers that meet in one name lie one below the other, in this order."""
ORDER = ("to_q", "to_k", "to_v", "proj_mlp", "add_q_proj", "add_k_proj", "add_v_proj")


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's tensors as FLUX's own code has them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        pattern = next(pattern for pattern in NAMES if re.fullmatch(pattern, layer))
        own = re.sub(pattern, NAMES[pattern], layer)
        kind = "scale" if own.endswith("_norm") else kind
        if layer == "norm_out.linear":
            tensor = torch.cat(tensor.chunk(2)[::-1])
        parts.setdefault(f"{own}.{kind}", {})[layer.rpartition(".")[2]] = tensor
    rank = {layer: place for place, layer in enumerate(ORDER)}
    return {
        name: torch.cat([one[layer] for layer in sorted(one, key=lambda n: rank.get(n, 0))])
        for name, one in parts.items()
    }


def write(path: Path, tensors: dict[str, Tensor], kind: Kind, architecture: str = "flux") -> Path:
    """A GGUF file; as published ones it keeps vectors, and rows that are no whole blocks, in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    for name, tensor in tensors.items():
        values = tensor.detach().float().numpy()
        own = kind if values.ndim > 1 and values.shape[-1] % block == 0 else Kind.F32
        writer.add_tensor(name, gguf.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_transformer(path: Path, model: Path, kind: Kind = Kind.Q8_0) -> Path:
    """The transformer of a model folder."""
    transformer = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
    return write(path, original(transformer.state_dict()), kind)


def write_text_encoder(path: Path, model: Path, kind: Kind = Kind.Q8_0) -> Path:
    """The T5 of a model folder."""
    t5 = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_2")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, t5.config.num_layers)
    found = {key.rpartition("."): tensor for key, tensor in t5.state_dict().items()}
    tensors = {f"{names.get_name(key[0])}.{key[2]}": tensor for key, tensor in found.items()}
    return write(path, {k: v for k, v in tensors.items() if not k.startswith("None")}, kind, "t5encoder")
