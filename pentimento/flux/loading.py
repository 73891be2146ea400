"""Where FLUX.1 weights lie and how they are read: a diffusers folder, a hub name, or the shipped model.

What a user can get wrong here (path, architecture, variant, damaged file, gated page, no network) becomes a
``UserError`` before the first gigabyte is read into memory.
"""

import hashlib
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from .. import pretrained
from ..errors import UserError
from ..pretrained import HUB_NAME, read_json
from . import gguf_files
from .config import FluxConfig

Variant = Literal["fill", "dev"]

# 64 channels are the packed latents; Fill adds 64 of the condition and 256 of the mask.
IN_CHANNELS: dict[Variant, int] = {"dev": 64, "fill": 384}
CALLED: dict[Variant, str] = {"dev": "FLUX.1 [dev]", "fill": "FLUX.1 Fill"}
OFFICIAL: dict[Variant, str] = {
    "dev": "black-forest-labs/FLUX.1-dev",
    "fill": "black-forest-labs/FLUX.1-Fill-dev",
}
PARTS = {
    "transformer": ("config.json",),
    "vae": ("config.json",),
    "text_encoder": ("config.json",),
    "text_encoder_2": ("config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "tokenizer_2": ("tokenizer_config.json",),
    "scheduler": ("scheduler_config.json",),
}
WITH_WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")

# Without the 24 GB single file that lies beside the folders of the official repositories.
DOWNLOAD = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model"]
CONVERSION = "FluxPipeline.from_single_file(...).save_pretrained(...)"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checked folder of FLUX.1 weights."""

    name: str
    """As it is recorded: "pocket", the hub name, or the name of the folder (never its path)."""
    folder: Path
    variant: Variant
    files: Mapping[str, Path] = field(default_factory=dict)
    """GGUF files that stand for the weights of a part, by its name: ``transformer``, ``text_encoder_2``."""

    def digest(self, *parts: str) -> str:
        """Twelve hex digits over these parts' files; of files above 64 MiB: size, first and last MiB."""
        total = hashlib.sha256()
        for part in sorted(parts):
            for path in sorted((self.folder / part).iterdir()):
                unused = part in self.files and ".safetensors" in path.name
                if (
                    path.is_file()
                    and path.suffix in (".json", ".safetensors", ".txt", ".model")
                    and not unused
                ):
                    total.update(f"{part}/{path.name}:{path.stat().st_size}:".encode())
                    total.update(pretrained.sample(path))
            if part in self.files:  # whatever it is called
                total.update(f"{part}.gguf:{self.files[part].stat().st_size}:".encode())
                total.update(pretrained.sample(self.files[part]))
        return total.hexdigest()[:12]


def locate(config: FluxConfig, variant: Variant) -> Weights:
    """Find and check what a recipe's ``backbone`` names; ``UserError`` if it cannot serve as this variant."""
    weights, files = config.weights, _gguf_files(config, variant)
    if weights == "pocket":
        from ..pocket.weights import folder

        found = Weights(name="pocket", folder=folder(f"pocket-{variant}"), variant=variant, files=files)
    else:
        path = Path(weights).expanduser()
        if path.exists():
            found = Weights(name=path.resolve().name, folder=path, variant=variant, files=files)
        elif HUB_NAME.fullmatch(weights):
            found = Weights(name=weights, folder=download(weights, files), variant=variant, files=files)
        else:
            raise UserError(
                f"backbone.weights: there is no folder {weights!r}; give the folder of a FLUX.1 model in "
                f"diffusers format (with model_index.json), a hub name such as {OFFICIAL[variant]}, or pocket"
            )
    check_folder(found)
    return found


def _gguf_files(config: FluxConfig, variant: Variant) -> dict[str, Path]:
    """The files that stand for weights, by part; checked as far as they can be alone, before others are downloaded."""
    named = {part: getattr(config, key) for part, key in gguf_files.FIELDS.items()}
    files = {part: Path(name).expanduser() for part, name in named.items() if name is not None}
    if file := files.get("transformer"):
        channels = gguf_files.transformer_shapes(file)["x_embedder.weight"][1]
        if channels != IN_CHANNELS[variant]:
            raise UserError(_wrong_variant(file, variant, "GGUF", channels))
    if file := files.get("text_encoder_2"):
        gguf_files.check_text_encoder(file)
    return files


def locate_outline(config: FluxConfig, variant: Variant) -> Weights | None:
    """Like ``locate``, but nothing is downloaded: ``None`` for a hub model whose configuration is not in the cache."""
    weights, files = config.weights, _gguf_files(config, variant)
    if weights == "pocket" or Path(weights).expanduser().exists() or not HUB_NAME.fullmatch(weights):
        return locate(config, variant)
    held = pretrained.cached(weights, [f"{part}/{file}" for part, names in PARTS.items() for file in names])
    if held is None:
        return None
    found = Weights(name=weights, folder=held, variant=variant, files=files)
    check_variant(found, "FLUX")
    return found


def download(name: str, replaced: Collection[str] = ()) -> Path:
    """The folder of a hub model without the weights of the parts ``replaced``."""
    wanted = [f"{part}/*.safetensors" for part in WITH_WEIGHTS if part not in replaced]
    return pretrained.fetch(name, [*DOWNLOAD, *wanted], "backbone.weights", "FLUX.1 needs 34 GB")


def check_folder(weights: Weights) -> None:
    """Raise ``UserError`` unless the folder holds a complete, readable FLUX.1 model of the wanted variant."""
    folder = weights.folder
    if not folder.is_dir():
        gguf = folder.suffix.lower() == ".gguf"
        raise UserError(
            f"{folder}: is a file; the weights must be a folder in diffusers format (with model_index.json). "
            + (
                "A GGUF takes the place of its transformer: "
                if gguf
                else "Diffusers converts a single file: "
            )
            + (f"backbone.transformer_file={folder}" if gguf else CONVERSION)
        )
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    transformer = index.get("transformer")
    model = transformer[1] if isinstance(transformer, list) and len(transformer) == 2 else "no transformer"
    if model != "FluxTransformer2DModel" or "Kontext" in kind:
        raise UserError(
            f"{folder}: holds another architecture, a {kind} ({model}); FLUX.1 [dev] or FLUX.1 Fill is needed"
        )
    for part, files in PARTS.items():
        for file in files:
            if not (folder / part / file).is_file():
                raise UserError(
                    f"{folder / part}: {file} is missing; the folder is incomplete, copy or download it again"
                )
    check_variant(weights, kind)
    for part in WITH_WEIGHTS:
        if part not in weights.files:
            pretrained.check_weights(folder / part)


def check_variant(weights: Weights, kind: str) -> None:
    """Raise ``UserError`` unless the transformer is of the variant by its configuration, and its own file fits that."""
    channels = read_json(weights.folder / "transformer" / "config.json").get("in_channels", 64)
    if channels != IN_CHANNELS[weights.variant]:
        raise UserError(_wrong_variant(weights.folder, weights.variant, kind, channels))
    if file := weights.files.get("transformer"):
        gguf_files.check_fit(file, outline_transformer(weights).state_dict())


def _wrong_variant(place: Path, variant: Variant, kind: str, channels: object) -> str:
    held = next((CALLED[v] for v, n in IN_CHANNELS.items() if n == channels), f"an unknown variant ({kind})")
    return (
        f"{place}: holds {held} ({channels} input channels); this method needs "
        f"{CALLED[variant]} ({IN_CHANNELS[variant]} input channels), for example {OFFICIAL[variant]}"
    )


def load_model(model: Any, weights: Weights, part: str, dtype: torch.dtype, **options: Any) -> Any:
    """One model of the folder, frozen, on the CPU; incomplete weights are an error, not a warning."""
    where = weights.files.get(part, weights.folder / part)
    if part in weights.files:
        options |= gguf_files.text_encoder_options(where, weights.folder)
    else:
        options["use_safetensors"] = True
        pretrained.check_weights(where)
    quiet = gguf_files.quiet_unpacking() if part in weights.files else nullcontext()
    with quiet:
        return pretrained.read_model(model, weights.folder, part, dtype, where, **options)


def load_transformer(weights: Weights, dtype: torch.dtype) -> Any:
    """The flow transformer, which hosts the adapters."""
    if file := weights.files.get("transformer"):
        with pretrained.quiet_loading(), pretrained.explained(file, FluxTransformer2DModel.__name__):
            packed = gguf_files.load_transformer(file, weights.folder, dtype)
        return packed.requires_grad_(False).eval()
    return load_model(FluxTransformer2DModel, weights, "transformer", dtype)


def outline_transformer(weights: Weights) -> Any:
    """The flow transformer's modules and shapes on the meta device, from its config alone."""
    kind: Any = FluxTransformer2DModel
    with torch.device("meta"):
        return kind.from_config(read_json(weights.folder / "transformer" / "config.json")).requires_grad_(
            False
        )


def load_vae(weights: Weights, dtype: torch.dtype) -> Any:
    """The autoencoder; in float32 instead of float16, which overflows (its config says ``force_upcast``)."""
    return load_model(AutoencoderKL, weights, "vae", torch.float32 if dtype == torch.float16 else dtype)


def load_scheduler(weights: Weights) -> Any:
    """The noise schedule of the folder."""
    kind: Any = FlowMatchEulerDiscreteScheduler  # diffusers' lazy modules are opaque to type checkers
    return kind.from_pretrained(weights.folder, subfolder="scheduler", local_files_only=True)


def load_text(weights: Weights, dtype: torch.dtype) -> Any:
    """A stock pipeline of text encoders and tokenizers alone: its ``encode_prompt`` is the definition."""
    # T5's position bias goes through a coarser kernel in torch's fused attention: 1e-4 away from what FLUX was trained with.
    eager = {"attn_implementation": "eager"}
    encoders = {
        "text_encoder": load_model(CLIPTextModel, weights, "text_encoder", dtype),
        "text_encoder_2": load_model(T5EncoderModel, weights, "text_encoder_2", dtype, **eager),
    }
    tokenizers = {
        part: pretrained.read_tokenizer(weights.folder / part) for part in ("tokenizer", "tokenizer_2")
    }
    return FluxPipeline(scheduler=None, vae=None, transformer=None, **encoders, **tokenizers)
