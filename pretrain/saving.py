"""How parts of a network are saved between stages and for good."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn


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
