"""Where FLUX.1 weights lie and how they are read: a diffusers folder, a hub name, or the shipped model.

What a user can get wrong here (path, architecture, variant, damaged file, gated page, no network) becomes a
``UserError`` before the first gigabyte is read into memory.
"""

import errno
import hashlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP client underneath, whatever it is called in this version
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    XetDownloadError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
from transformers.utils import logging as transformers_logging

from ..errors import UserError, first_line
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

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILE = 64 * 2**20


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
                    total.update(_sample(path))
            if part in self.files:  # whatever it is called
                total.update(f"{part}.gguf:{self.files[part].stat().st_size}:".encode())
                total.update(_sample(self.files[part]))
        return total.hexdigest()[:12]


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= SMALL_FILE:
        return path.read_bytes()
    with path.open("rb") as file:
        start = file.read(2**20)
        file.seek(size - 2**20)
        return start + file.read()


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
    held = [
        try_to_load_from_cache(weights, f"{part}/{file}") for part, files in PARTS.items() for file in files
    ]
    paths = [Path(path) for path in held if isinstance(path, str)]
    if len(paths) < len(held):
        return None
    found = Weights(name=weights, folder=paths[0].parents[1], variant=variant, files=files)
    check_variant(found, "FLUX")
    return found


def download(name: str, replaced: Collection[str] = ()) -> Path:
    """The folder of a hub model, downloaded if it is not in the cache, without the weights of the parts ``replaced``.

    Errors of the hub become ``UserError``.
    """
    page = f"https://huggingface.co/{name}"
    wanted = [f"{part}/*.safetensors" for part in WITH_WEIGHTS if part not in replaced]
    try:
        return Path(snapshot_download(name, allow_patterns=[*DOWNLOAD, *wanted]))
    except GatedRepoError as error:
        raise UserError(_gated(page)) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"backbone.weights: there is no folder {name!r}, and no model of this name is visible on the hub "
            f"({page}); check the spelling. For a private model, set the variable HF_TOKEN to an access token "
            "of an account that may read it"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(_offline(name)) from error
    except HFValidationError as error:
        raise UserError(
            f"backbone.weights: {name!r} is neither a folder nor a valid hub name ({first_line(error)})"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(_gated(page)) from error
        raise UserError(
            f"backbone.weights: the hub refused {name}: {first_line(error)}; try again later"
        ) from error
    except (HTTPError, XetDownloadError, ConnectionError, TimeoutError) as error:
        raise UserError(_offline(name)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"backbone.weights: {name} cannot be written to the hub cache ({error.strerror}); free some space "
            "(FLUX.1 needs 34 GB) or set the variable HF_HOME to another folder"
        ) from error


def _gated(page: str) -> str:
    return (
        f"backbone.weights: access to {page} is restricted. Open that page, log in and accept its licence "
        "(non-commercial for FLUX.1 [dev] and Fill), then set the variable HF_TOKEN to an access token of that "
        "account (https://huggingface.co/settings/tokens)"
    )


def _offline(name: str) -> str:
    why = "the variable HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    return (
        f"backbone.weights: {name} is not (completely) in the hub cache and {why}. If a folder was meant, it "
        "does not exist; otherwise connect once to download the model, or give the folder of a copy"
    )


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
            check_weights(folder / part)


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ``UserError`` naming the file if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        empty = "is empty" if not any(path.parent.iterdir()) else f"has no {path.name}"
        raise UserError(
            f"{path.parent}: the folder {empty}; the weights must be a folder in diffusers format, as "
            "save_pretrained writes it"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; copy or download it again")
    return content


def check_weights(folder: Path) -> None:
    """Open every safetensors file of a folder, which verifies header and length; errors name the file."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        named = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(named - {path.name for path in files}):
            raise UserError(
                f"{folder / missing[0]}: is missing, though {index.name} names it; download the model again"
            )
    if not files:
        raise UserError(
            f"{folder}: holds no .safetensors file; other formats (.bin, .ckpt) are not read, and a .gguf file is named by "
            "backbone.transformer_file or backbone.text_encoder_file"
        )
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            with path.open("rb") as file:
                pointer = file.read(64).startswith(b"version https://git-lfs")
            if pointer:
                raise UserError(
                    f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`"
                ) from error
            raise UserError(
                f"{path}: the file is damaged or cut off ({first_line(error)}); copy or download it again"
            ) from error


def load_model(model: Any, weights: Weights, part: str, dtype: torch.dtype, **options: Any) -> Any:
    """One model of the folder, frozen, on the CPU; incomplete weights are an error, not a warning."""
    where = weights.files.get(part, weights.folder / part)
    if part in weights.files:
        options |= gguf_files.text_encoder_options(where, weights.folder)
    else:
        options["use_safetensors"] = True
        check_weights(where)
    quiet = gguf_files.quiet_unpacking() if part in weights.files else nullcontext()
    with quiet_loading(), quiet, explained(where, model.__name__):
        loaded, info = model.from_pretrained(
            weights.folder,
            subfolder=part,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    wrong = {*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])}
    if wrong:
        raise UserError(
            f"{where}: the weights do not fit {model.__name__}; {sorted(wrong)[0]} is missing or misshapen"
        )
    return loaded.requires_grad_(False).eval()


@contextmanager
def explained(where: Path, model: str) -> Iterator[None]:
    """Turn the libraries' ways of failing at a file into one ``UserError``."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{where}: cannot be loaded as {model}: {first_line(error)}") from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the libraries' progress bars while files are read: they would tear a training run's display."""
    shown = [
        library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def load_transformer(weights: Weights, dtype: torch.dtype) -> Any:
    """The flow transformer, which hosts the adapters."""
    if file := weights.files.get("transformer"):
        with quiet_loading(), explained(file, FluxTransformer2DModel.__name__):
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
    tokenizers = {}
    for part in ("tokenizer", "tokenizer_2"):
        where = weights.folder / part
        try:
            tokenizers[part] = AutoTokenizer.from_pretrained(where, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{where}: the tokenizer cannot be loaded: {first_line(error)}") from error
    return FluxPipeline(scheduler=None, vae=None, transformer=None, **encoders, **tokenizers)


def choose_device(name: str) -> torch.device:
    """The device of ``backbone.device``; "auto" takes this process's GPU, else the CPU."""
    if name == "auto":
        from accelerate import PartialState

        # One process per GPU under torchrun: accelerate knows which one is ours.
        return PartialState().device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"backbone.device: {name!r} is no device; use auto, cpu, cuda, cuda:0 or mps"
        ) from error
    usable = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not usable.get(device.type, False):
        raise UserError(
            f"backbone.device: {name!r} is not usable here with this build of torch; use auto or cpu"
        )
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of frozen weights: "auto" is bf16 on CUDA (fp16 on cards without bf16) and fp32 elsewhere."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return named[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
