"""The sizes of the pocket FLUX models."""

from typing import Any

from diffusers import AutoencoderKL, FluxTransformer2DModel
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
