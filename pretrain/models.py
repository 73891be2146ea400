"""The pocket models' sizes, and how their parts are saved between stages and for good."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

LATENT_CHANNELS = 16
T5_WIDTH, CLIP_WIDTH = 192, 96


def autoencoder(**overrides: Any) -> AutoencoderKL:
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    config = {
        "in_channels": 3, "out_channels": 3, "down_block_types": blocks[0], "up_block_types": blocks[1],
        "block_out_channels": (32, 64, 96, 96), "layers_per_block": 1, "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 8, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False,
        "sample_size": 128, "force_upcast": False,
    }  # fmt: skip
    return AutoencoderKL(**(config | overrides))


def transformer(**overrides: Any) -> FluxTransformer2DModel:
    config = {
        "patch_size": 1, "in_channels": 384, "out_channels": 64, "num_layers": 2, "num_single_layers": 5,
        "attention_head_dim": 48, "num_attention_heads": 5, "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": CLIP_WIDTH, "guidance_embeds": True, "axes_dims_rope": (8, 20, 20),
    }  # fmt: skip
    return FluxTransformer2DModel(**(config | overrides))


def t5(vocab: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            d_model=T5_WIDTH, d_ff=2 * T5_WIDTH, d_kv=48, num_heads=4, num_layers=2, vocab_size=vocab, dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def clip(vocab: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab, hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def save_parts(folder: Path, parts: dict[str, nn.Module | dict[str, Tensor]], limit: int = 14 << 20) -> None:
    """Write float32 state dicts as files ``NAME-0.safetensors``, ``NAME-1...`` of at most ``limit`` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        state = part.state_dict() if isinstance(part, nn.Module) else part
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for key, value in state.items():
            nbytes = value.numel() * value.element_size()
            if shards[-1] and size + nbytes > limit:
                shards.append({})
                size = 0
            shards[-1][key] = value.detach().cpu().contiguous().clone()
            size += nbytes
        for i, shard in enumerate(shards):
            save_file(shard, folder / f"{name}-{i}.safetensors")


def load_part(folder: Path, name: str) -> dict[str, Tensor]:
    files = sorted(folder.glob(f"{name}-*.safetensors"))
    if not files:
        raise SystemExit(f"{folder} holds no {name}-*.safetensors: run the earlier stage first")
    return {key: value for file in files for key, value in load_file(file).items()}


class Average:
    """Exponential moving average of parameters, with a warm-up."""

    def __init__(self, params: list[nn.Parameter], decay: float = 0.999):
        self.params, self.decay, self.steps = params, decay, 0
        self.values = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (self.steps + 1) / (self.steps + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.params], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average into the model and the model's values here; twice is nothing."""
        for p, value in zip(self.params, self.values, strict=True):
            kept = p.detach().clone()
            p.copy_(value)
            value.copy_(kept)
