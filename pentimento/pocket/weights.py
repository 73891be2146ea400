"""Where the shipped models lie, and the one that is built from another at first use.

``pocket-dev`` needs no weights of its own: with everything masked and a grey picture the 320 extra input channels of
``pocket-fill`` are constant, so they fold into the bias of ``x_embedder``.
"""

import hashlib
import json
import os
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import UserError

NAMES = ("pocket-fill", "pocket-dev", "pocket-infinity")
FOLDED = "folded.safetensors"
"""Beside pocket-fill's transformer: the constant condition that pocket-dev folds, (320,) float32."""


def folder(name: str) -> Path:
    """The folder of a shipped model; ``pocket-dev`` is written into the user's cache once.

    Raises:
        UserError: the name is unknown, or the installation lacks the weights.
    """
    if name not in NAMES:
        raise UserError(f"no shipped model is called {name!r}; there are {', '.join(NAMES)}")
    shipped = "pocket-fill" if name == "pocket-dev" else name
    found = Path(str(files("pentimento.pocket") / "models" / shipped))
    if not any((found / mark).is_file() for mark in ("model_index.json", "config.json")):
        raise UserError(
            f"the shipped weights are missing from this installation ({found}); install pentimento again"
        )
    return dev_from(found) if name == "pocket-dev" else found


def cache_folder() -> Path:
    """Where derived files go: ``PENTIMENTO_CACHE``, else ``XDG_CACHE_HOME/pentimento``, else ``~/.cache/pentimento``."""
    if chosen := os.environ.get("PENTIMENTO_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pentimento"


def dev_from(fill: Path) -> Path:
    """``pocket-dev`` for a ``pocket-fill`` folder, written to the cache once per content."""
    shards = sorted((fill / "transformer").glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in [*shards, fill / FOLDED]:
        digest.update(file.read_bytes())
    out = cache_folder() / f"pocket-dev-{digest.hexdigest()[:12]}"
    if (out / "model_index.json").is_file():
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=".pocket-dev-"))
        _fold(fill, shards, beside)
        if out.exists():  # another process was faster
            shutil.rmtree(beside)
        else:
            beside.rename(out)
    except OSError as error:
        raise UserError(
            f"cannot write pocket-dev to {out}: {error}; set PENTIMENTO_CACHE to a folder you may write"
        ) from error
    return out


def _fold(fill: Path, shards: list[Path], out: Path) -> None:
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(fill / part, out / part)
    (out / "transformer").mkdir()
    state: dict[str, torch.Tensor] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            state |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    with safe_open(fill / FOLDED, "pt") as file:
        constant = file.get_tensor("condition")
    weight, bias = state["x_embedder.weight"], state["x_embedder.bias"]
    state["x_embedder.bias"] = (bias.float() + weight[:, 64:].float() @ constant).to(bias.dtype)
    state["x_embedder.weight"] = weight[:, :64].clone()
    save_file(state, out / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = json.loads((fill / "transformer" / "config.json").read_text())
    config |= {"in_channels": 64, "out_channels": 64}
    (out / "transformer" / "config.json").write_text(json.dumps(config, indent=2))
    index = json.loads((fill / "model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    (out / "model_index.json").write_text(json.dumps(index, indent=2))


def constant_condition(grey_latents: torch.Tensor) -> torch.Tensor:
    """The 320 channels of a token far from the border: packed grey latents (T, 64) on a square grid, then a white mask."""
    side = int(len(grey_latents) ** 0.5)
    centre = grey_latents[(side // 2) * side + side // 2]
    return torch.cat([centre, torch.ones(256)])
