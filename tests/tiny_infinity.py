"""A tiny Infinity with random weights, as the folder that pretraining exports, written in milliseconds."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import T5EncoderModel, T5Tokenizer

from pentimento.infinity.tokenizer import Tokenizer, TokenizerConfig
from pentimento.infinity.transformer import InfinityTransformer, TransformerConfig

BITS, TEXT_LENGTH = 8, 64
TRANSFORMER = TransformerConfig(
    width=32, heads=2, hidden=64, chunks=(2, 2), bits=BITS, text_width=32, text_length=TEXT_LENGTH, text_heads=2
)  # fmt: skip
TOKENIZER = TokenizerConfig(width=BITS, channels=8, factors=(1, 1, 1, 1, 1), blocks=1, groups=4)
SIZE = "0.06M"


def write(folder: Path, text: tuple[T5EncoderModel, T5Tokenizer]) -> Path:
    """The folder; its text encoder lies in ``t5``, as flan-t5-xl lies in one."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    net = randomised(InfinityTransformer(TRANSFORMER), 0.2)
    save_file(net.state_dict(), folder / "infinity_reg.safetensors")
    state = {k: v.clone() for k, v in Tokenizer(TOKENIZER).state_dict().items()}
    save_file(state, folder / "infinity_vae_d8reg.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"size": SIZE, "groups": TOKENIZER.groups, "text_encoder": str(folder / "t5")})
    )
    for part in text:
        part.save_pretrained(folder / "t5")
    return folder


def randomised(net: nn.Module, spread: float) -> nn.Module:
    """Everything matters: biases, gates, the rows for no text."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, spread)
    return net
