"""Settings of the Infinity backbone: the recipe's ``backbone`` section. ``Infinity.load(config)`` takes it.

It stands alone, without torch, so that recipes are read without loading a deep-learning library.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..licences import POCKET, BaseModel

OFFICIAL = "FoundationVision/Infinity"
LICENCE = (
    f"Infinity's weights are published under the MIT License (https://huggingface.co/{OFFICIAL}), the text encoder"
    " google/flan-t5-xl, which is used as it is, under the Apache License 2.0."
)
UNKNOWN = f"The licence of the base model's weights holds. If they are the published ones: {LICENCE}"


@dataclass(frozen=True, kw_only=True)
class InfinityConfig:
    """Which weights, on which device, in which arithmetic."""

    family: Literal["infinity"] = "infinity"
    """Kind of base model."""
    weights: str = "pocket"
    """Transformer: `pocket` (the small model that ships), the published file infinity_2b_reg.pth, a folder that holds it, or
    the hub id FoundationVision/Infinity. A .pth file is converted to safetensors once, beside it or in the cache."""
    tokenizer: str | None = None
    """The visual tokenizer's file, infinity_vae_d32reg.pth. null: the one beside the transformer."""
    text_encoder: str | None = None
    """T5 encoder: a folder such as a copy of google/flan-t5-xl, or a hub id. null: google/flan-t5-xl; for pocket weights its
    own."""
    attention_bias: bool = True
    """Apply the learnt biases of queries and values, as the published base model does. false: leave them out, as EditInfinity's
    code does; for adapters that it trained."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the transformer's blocks and of the text encoder; adapters and everything else are float32. `auto`: bf16 on
    CUDA, else fp32."""
    gradient_checkpointing: bool | float | None = None
    """Recompute activations in the backward pass: slower, far less memory. A number: in this share of the blocks. null: in all of
    models above a billion parameters."""
    compile: bool = False
    """Compile the transformer's blocks for training adapters: the first step takes long, later ones are faster. Learnt rows are
    trained without it."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` or `mps`."""

    def __post_init__(self) -> None:
        if not 0 <= (self.gradient_checkpointing or 0) <= 1:
            raise ValueError(
                f"gradient_checkpointing must lie between 0 and 1, but it is {self.gradient_checkpointing}"
            )

    def about(self) -> BaseModel:
        """What a model card says of these weights."""
        if self.weights == "pocket":
            return BaseModel(licence=POCKET)
        if self.weights != OFFICIAL:
            return BaseModel(licence=UNKNOWN)
        return BaseModel(licence=LICENCE, front=(f"base_model: {OFFICIAL}", "license: mit"))

    def notes(self) -> Iterator[str]:
        """What is loaded from elsewhere than beside the transformer, or otherwise than published."""
        named = {"visual tokenizer": self.tokenizer, "T5 text encoder": self.text_encoder}
        yield from (f"{part} from {place}" for part, place in named.items() if place is not None)
        if not self.attention_bias:
            yield "attention without the base model's biases, as in EditInfinity's code"
