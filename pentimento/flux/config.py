"""Settings of the FLUX backbone: the recipe's ``backbone`` section. ``Flux.load(config, variant)`` takes it.

It stands alone, without torch, so that recipes are read without loading a deep-learning library.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..licences import POCKET, BaseModel

PUBLISHER = "black-forest-labs/"
LICENCE = (
    "The base model's weights are under the FLUX.1 [dev] Non-Commercial License; this adapter is a derivative of them and"
    " under the same licence (https://huggingface.co/{weights}/blob/main/LICENSE.md)."
)
UNKNOWN = (
    "The base model's licence holds for this adapter too. If the weights are FLUX.1 [dev] or FLUX.1 Fill [dev], that is the"
    " FLUX.1 [dev] Non-Commercial License."
)


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Which weights, on which device, in which arithmetic."""

    family: Literal["flux"] = "flux"
    """Kind of base model."""
    weights: str = "pocket"
    """Base model: `pocket` (the small models that ship), a diffusers-format folder, or a hub id such as
    black-forest-labs/FLUX.1-Fill-dev."""
    transformer_file: str | None = None
    """A GGUF file of the FLUX transformer, as published for ComfyUI, in place of the one in weights; all else comes from
    there. Needs the extra gguf. It stays packed in memory, and each layer is unpacked as it runs. To train, leave
    gradient_checkpointing on: else the backward pass keeps every unpacked layer."""
    text_encoder_file: str | None = None
    """A GGUF file of the T5 text encoder in place of the one in weights (text_encoder_2). Needs the extra gguf. It is
    unpacked when it is read: smaller on disk, not in memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the frozen model; adapters are always float32. `auto`: bf16 on CUDA, else fp32."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: slower, far less memory. null: on for models above a
    billion parameters."""
    compile: bool = False
    """Compile the transformer's repeated blocks: the first step takes long, later ones are faster."""
    attention: str | None = None
    """Attention backend by diffusers' name, such as `native`, `_native_flash` or `flash`. null: torch
    chooses, on CUDA never cuDNN's."""
    offload: Literal["none", "model"] = "none"
    """none: what was loaded stays on the device. model: text encoders, transformer and autoencoder are there one at a
    time, only while they run, and wait in main memory: slower, less of the device's memory. To train, this holds while
    pictures and prompts are encoded; then the transformer stays, and encoders take turns beside it."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` or `mps`."""

    def about(self) -> BaseModel:
        """What a model card says of these weights."""
        library = "library_name: diffusers"
        if self.weights == "pocket":
            return BaseModel(licence=POCKET, front=(library,))
        if not self.weights.startswith(PUBLISHER):
            return BaseModel(licence=UNKNOWN, front=(library,))
        front = (
            f"base_model: {self.weights}",
            "license: other",
            "license_name: flux-1-dev-non-commercial-license",
            f"license_link: https://huggingface.co/{self.weights}/blob/main/LICENSE.md",
        )
        return BaseModel(licence=LICENCE.format(weights=self.weights), front=(library, *front))

    def notes(self) -> Iterator[str]:
        """What is loaded otherwise than the whole folder onto the device."""
        named = {"transformer": self.transformer_file, "T5 text encoder": self.text_encoder_file}
        for part, file in named.items():
            path = Path(file or "").expanduser()
            if file is not None:
                size = f" ({path.stat().st_size / 2**30:.2f} GiB)" if path.is_file() else ""
                yield f"{part} from {file}{size}"
        if self.offload == "model":
            yield "encoders and transformer take turns on the device; they wait in main memory"
