"""A tiny FLUX transformer with random weights, and adapters on it."""

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from pentimento.adapters import Adapters, LoRA

BLOCKS = r"(single_)?transformer_blocks\.\d+\.attn\.to_(q|k)"


def transformer(in_channels: int = 384) -> FluxTransformer2DModel:
    """2 double and 2 single blocks of width 32."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The initial output layers are nearly silent; a picture should depend on every input.
            parameter.normal_(0, 0.3 if name.startswith(("norm_out", "proj_out")) else 0.12)
    return model


def velocity(host: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(host.parameters()).dtype
    return host(
        hidden_states=torch.randn(2, 16, 384, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(2, 4, 32, generator=generator).to(dtype),
        pooled_projections=torch.randn(2, 24, generator=generator).to(dtype),
        timestep=torch.tensor([0.3, 0.7]).to(dtype),
        guidance=torch.full((2,), 3.5),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(4, 3),
        return_dict=False,
    )[0]


def awake(adapters: Adapters, *names: str) -> Adapters:
    """With weights as if trained."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters.train(*names):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return adapters


def build(
    spec: LoRA | None = None, *names: str, trained: bool = True, host: nn.Module | None = None
) -> Adapters:
    adapters = Adapters(host or transformer())
    for name in names or ("edit",):
        adapters.add(name, spec or LoRA(targets=BLOCKS, rank=4, alpha=6.0, full=("x_embedder",)))
    return awake(adapters, *(names or ("edit",))) if trained else adapters
