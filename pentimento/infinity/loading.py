"""Where Infinity's weights lie and how they are read: the published files, the shipped model, a T5 encoder.

The published files are pickles. They are read without running anything that is in them and converted to safetensors once. What
a user can get wrong becomes a ``UserError`` before anything large is read.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import T5EncoderModel

from .. import pretrained
from ..errors import UserError
from ..pocket.weights import folder
from ..pretrained import HUB_NAME
from ..schema import Origin, parse
from .config import OFFICIAL, InfinityConfig
from .files import SUFFIXES, as_safetensors, shapes_of
from .scales import LENGTHS
from .tokenizer import Tokenizer, TokenizerConfig, groups_of
from .transformer import InfinityTransformer, Linear, TransformerConfig

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]
"""Of a file's tensors, by name."""

TRANSFORMER, TOKENIZER = "infinity_2b_reg", "infinity_vae_d32reg"
"""Published files, without their suffix."""
OFFICIAL_TEXT = "google/flan-t5-xl"
OWN, SETTINGS = "infinity_reg.", "config.json"
"""A transformer of another size than published, and the file beside it that says what its weights do not."""
TEXT_DOWNLOAD = [
    "config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "spiece.model", "*.safetensors",
    "*.safetensors.index.json",
]  # fmt: skip
WIDTH_8B, BITS_8B = 3584, 14
NO_8B = (
    "holds Infinity 8B, which is not supported: its tokens are 2 x 2 vectors of another autoencoder, and EditInfinity was "
    f"published for 2B. Use {TRANSFORMER}.pth with {TOKENIZER}.pth"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a folder's ``config.json`` says that the shapes of its weights do not; the defaults are the published model's."""

    size: str = "1M"
    """Size of picture that the model draws best, by its name in the schedules."""
    groups: int | None = None
    """Of the visual tokenizer's group norms; null: by the published rule."""
    text_encoder: str = OFFICIAL_TEXT
    """The text encoder that the model was trained with: `pocket`, or a hub id."""

    def __post_init__(self) -> None:
        if self.size not in LENGTHS:
            raise ValueError(f"size should be one of {', '.join(LENGTHS)}, not {self.size!r}")


class TextFolder(NamedTuple):
    """A T5 encoder and its tokenizer."""

    folder: Path
    encoder: str
    """Folders within the folder; empty where everything lies in it."""
    tokenizer: str


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Checked files of an Infinity model."""

    name: str
    """As it is recorded: "pocket", the hub name, or the name of the file (never its path)."""
    transformer: Path
    tokenizer: Path
    text: TextFolder
    transformer_config: TransformerConfig
    tokenizer_config: TokenizerConfig
    settings: Settings = field(default_factory=Settings)

    def digest(self) -> str:
        """Twelve hex digits over the transformer's file."""
        return _digest([self.transformer])

    def encoder_digest(self) -> str:
        """The same over the visual tokenizer's and the text encoder's."""
        parts = [self.text.folder / part for part in (self.text.encoder, self.text.tokenizer)]
        suffixes = (".json", ".safetensors", ".model")
        files = {file for part in parts for file in part.iterdir() if file.suffix in suffixes}
        return _digest([self.tokenizer, *sorted(files)])


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.stat().st_size}:".encode())
        total.update(pretrained.sample(file))
    return total.hexdigest()[:12]


class _Absent(Exception):
    """A hub model is not on this machine."""


def locate_outline(config: InfinityConfig) -> Weights | None:
    """Like ``locate``, but nothing is downloaded: ``None`` for a hub model that is not, or not wholly, in the cache."""

    def held(name: str, files: Sequence[str], key: str, size: str) -> Path:
        folder = pretrained.cached(name, [file for file in files if file.endswith((".pth", "config.json"))])
        if folder is None or ("*.safetensors" in files and not pretrained.is_complete(folder)):
            raise _Absent
        return folder

    try:
        return locate(config, held)
    except _Absent:
        return None


def locate(
    config: InfinityConfig, get: Callable[[str, Sequence[str], str, str], Path] = pretrained.fetch
) -> Weights:
    """Find and check what a recipe's ``backbone`` names; ``get`` gives the folder of a hub model.

    Raises:
        UserError: a file or folder that is missing, damaged, of another architecture or does not fit the others.
    """
    name, transformer, tokenizer, settings = _files(config, get)
    shapes = shapes_of(transformer)
    transformer_config = check_transformer(shapes, transformer)
    tokenizer_config = check_tokenizer(shapes_of(tokenizer), tokenizer, settings.groups)
    if transformer_config.bits != tokenizer_config.width:
        raise UserError(
            f"{tokenizer}: makes vectors of {tokenizer_config.width} bits, but the transformer in {transformer} was trained on "
            f"{transformer_config.bits}; name the autoencoder of that width with backbone.tokenizer ({TOKENIZER}.pth for 2B)"
        )
    text = _text(config.text_encoder or settings.text_encoder, get)
    check_text(text, transformer_config.text_width)
    return Weights(
        name=name, transformer=transformer, tokenizer=tokenizer, text=text, settings=settings,
        transformer_config=replace(transformer_config, attention_bias=config.attention_bias),
        tokenizer_config=tokenizer_config,
    )  # fmt: skip


def _files(config: InfinityConfig, get: Callable[..., Path]) -> tuple[str, Path, Path, Settings]:
    """Name, transformer, visual tokenizer and settings."""
    path = folder("pocket-infinity") if config.weights == "pocket" else Path(config.weights).expanduser()
    name = "pocket" if config.weights == "pocket" else path.resolve().name
    if not path.exists():
        if not HUB_NAME.fullmatch(config.weights):
            raise UserError(
                f"backbone.weights: there is no file or folder {config.weights!r}; give {TRANSFORMER}.pth, the folder that holds "
                f"it, {OFFICIAL}, or pocket"
            )
        names = [f"{TRANSFORMER}.pth"] + [f"{TOKENIZER}.pth"] * (config.tokenizer is None)
        path = get(
            config.weights, names, "backbone.weights", "Infinity 2B needs 19 GB, half of it as safetensors"
        )
        name = config.weights
    beside = path if path.is_dir() else path.parent
    transformer = (
        _one_of(path, "infinity_*reg", "infinity_vae", "backbone.weights") if path.is_dir() else path
    )
    if config.tokenizer is None:
        tokenizer = _one_of(beside, "infinity_vae_*", "", "backbone.tokenizer")
    else:
        tokenizer = Path(config.tokenizer).expanduser()
        if not tokenizer.is_file():
            raise UserError(
                f"backbone.tokenizer: there is no file {config.tokenizer!r}; give {TOKENIZER}.pth"
            )
    # Published files need no settings, and what is called so beside them is something else.
    settings = read_settings(beside / SETTINGS) if transformer.name.startswith(OWN) else Settings()
    return name, transformer, tokenizer, settings


def _one_of(place: Path, pattern: str, but: str, key: str) -> Path:
    """The published file in a folder, or the only one of such a name; safetensors before a pickle of the same name."""
    # What was converted is found through its pickle, which may be newer by now.
    whole = [p for p in place.glob(f"{pattern}.*") if p.suffix in SUFFIXES and "." not in p.stem]
    files = [p for p in whole if not (but and p.name.startswith(but))]
    named = {p.name.partition(".")[0]: p for p in sorted(files, key=lambda p: -SUFFIXES.index(p.suffix))}
    wanted = TOKENIZER if key == "backbone.tokenizer" else TRANSFORMER
    if len(named) == 1 or wanted in named:
        return named.get(wanted) or next(iter(named.values()))
    what = f"holds several files ({', '.join(sorted(named))})" if named else f"holds no {wanted}.pth"
    raise UserError(f"{key}: {place} {what}; name the file itself")


def read_settings(path: Path) -> Settings:
    """A folder's ``config.json``."""
    return parse(Settings, pretrained.read_json(path), Origin(name=str(path)))


def _text(named: str, get: Callable[..., Path]) -> TextFolder:
    """The encoder that a recipe or a folder names."""
    if named == "pocket":
        return TextFolder(folder("pocket-fill"), "text_encoder_2", "tokenizer_2")
    path = Path(named).expanduser()
    if path.is_dir():
        if (path / "text_encoder_2").is_dir():
            return TextFolder(path, "text_encoder_2", "tokenizer_2")
        return TextFolder(path, "", "")
    if not HUB_NAME.fullmatch(named):
        raise UserError(
            f"backbone.text_encoder: there is no folder {named!r}; give the folder of {OFFICIAL_TEXT}, its hub name, or pocket"
        )
    held = get(named, TEXT_DOWNLOAD, "backbone.text_encoder", "flan-t5-xl needs 11.4 GB")
    return TextFolder(held, "", "")


def check_text(text: TextFolder, width: int) -> None:
    """Raise ``UserError`` unless this is a complete T5 encoder of that width."""
    encoder = text.folder / text.encoder
    config = pretrained.read_json(encoder / "config.json")
    if config.get("model_type") != "t5":
        raise UserError(
            f"backbone.text_encoder: {encoder} holds a {config.get('model_type')} model; T5 is needed, such as {OFFICIAL_TEXT}"
        )
    if config.get("d_model") != width:
        raise UserError(
            f"backbone.text_encoder: {encoder} makes features of width {config.get('d_model')}, but the transformer was trained "
            f"on {width} ({OFFICIAL_TEXT} has 2048)"
        )
    pretrained.check_weights(encoder)


def check_transformer(shapes: Shapes, path: Path) -> TransformerConfig:
    """The sizes of a transformer, by the shapes of its weights; ``UserError`` says what else a file holds."""
    if any(name.startswith(("encoder.", "decoder.")) for name in shapes):
        raise UserError(
            f"{path}: holds an autoencoder; it belongs in backbone.tokenizer, the transformer in backbone.weights"
        )
    heads, hidden = (f"block_chunks.0.module.0.{name}" for name in ("sa.scale_mul_1H11", "ffn.fc1.weight"))
    pooling = "text_proj_for_sos.ca.mat_q"
    asked = ("word_embed.weight", "cfg_uncond", pooling, "lvl_embed.weight", heads, hidden)
    if absent := [name for name in asked if name not in shapes]:
        raise UserError(
            f"{path}: holds no Infinity transformer ({absent[0]} is missing); use {TRANSFORMER}.pth"
        )
    width, bits = shapes["word_embed.weight"]
    if width == WIDTH_8B or bits == 4 * BITS_8B:
        raise UserError(f"{path}: {NO_8B}")
    numbers = [name.split(".") for name in shapes if name.startswith("block_chunks.")]
    config = TransformerConfig(
        width=width, bits=bits, heads=shapes[heads][1], hidden=shapes[hidden][0],
        chunks=(1 + max(int(n[1]) for n in numbers), 1 + max(int(n[3]) for n in numbers)),
        text_length=shapes["cfg_uncond"][0], text_width=shapes["cfg_uncond"][1],
        text_heads=shapes[pooling][1], scales=shapes["lvl_embed.weight"][0],
    )  # fmt: skip
    _check(outline(InfinityTransformer, config), shapes, path, TRANSFORMER)
    return config


def check_tokenizer(shapes: Shapes, path: Path, groups: int | None) -> TokenizerConfig:
    """The same of a visual tokenizer."""
    if "pos_start" in shapes:
        raise UserError(
            f"{path}: holds a transformer; it belongs in backbone.weights, the autoencoder in backbone.tokenizer"
        )
    shapes = {published(name): shape for name, shape in shapes.items()}
    asked = ("encoder.conv_in.conv.weight", "encoder.conv_out.conv.weight")
    if absent := [name for name in asked if name not in shapes]:
        raise UserError(
            f"{path}: holds no autoencoder of Infinity ({absent[0]} is missing); use {TOKENIZER}.pth"
        )
    channels, bits = (shapes[name][0] for name in asked)
    if bits == BITS_8B:
        raise UserError(f"{path}: {NO_8B}")
    levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down."))
    blocks = 1 + max(int(name.split(".")[4]) for name in shapes if name.startswith("encoder.down.0.block."))
    wide = (shapes.get(f"encoder.down.{i}.block.0.conv1.conv.weight", (0,))[0] for i in range(levels))
    config = TokenizerConfig(
        width=bits,
        channels=channels,
        factors=tuple(w // channels for w in wide),
        blocks=blocks,
        groups=groups,
    )
    if wrong := [w for w in config.widths if w % groups_of(w, groups)]:
        raise UserError(
            f"{path}: {wrong[0]} channels are not normalised in {groups_of(wrong[0], groups)} groups; use {TOKENIZER}.pth, or "
            f"say groups in {SETTINGS} beside {OWN}safetensors"
        )
    _check(outline(Tokenizer, config), {k: v for k, v in shapes.items() if _is_part(k)}, path, TOKENIZER)
    return config


def published(name: str) -> str:
    """A name of the autoencoder's as the published file has it; files without the wrappers around its layers exist too."""
    kind, _, last = name.rpartition(".")
    if last not in ("weight", "bias") or kind.endswith((".conv.conv", ".norm")):
        return name
    if re.search(r"norm(\d|_out)$", kind):
        return f"{kind}.norm.{last}"
    plain = re.search(r"(conv(\d|_in|_out)|nin_shortcut|sample\.conv)$", kind)
    return f"{kind}.conv.{last}" if plain else name


def _is_part(name: str) -> bool:
    """The autoencoder's file may hold what it was trained against too."""
    return name.startswith(("encoder.", "decoder."))


def outline(kind: Callable[[C], M], config: C) -> M:
    """A model's modules and shapes without weights; its constants are there."""
    with init_empty_weights(include_buffers=False):
        return kind(config).requires_grad_(False)


def _check(model: nn.Module, shapes: Shapes, path: Path, official: str) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    constants = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, shape in wanted.items():
        if name not in shapes:
            raise UserError(
                f"{path}: {name} is missing; the file is incomplete or of another version, use {official}.pth"
            )
        if shapes[name] != shape:
            raise UserError(
                f"{path}: {name} has the shape {shapes[name]}, but the rest of the file asks for {shape}; use {official}.pth"
            )
    if unknown := sorted(set(shapes) - set(wanted) - constants):
        raise UserError(f"{path}: holds {unknown[0]}, which Infinity does not have; use {official}.pth")


def load_transformer(weights: Weights, dtype: torch.dtype) -> InfinityTransformer:
    """The transformer, which hosts the adapters: linear layers of blocks in ``dtype``, all else in float32."""
    model = outline(InfinityTransformer, weights.transformer_config)
    blocks = dict(model.block_chunks.named_modules(prefix="block_chunks"))
    narrow = {name for name, module in blocks.items() if isinstance(module, Linear)}

    def cast(name: str, value: Tensor) -> Tensor:
        return value.to(dtype if name.rpartition(".")[0] in narrow else torch.float32)

    return _filled(model, weights.transformer, cast)


def load_tokenizer(weights: Weights) -> Tokenizer:
    """The visual tokenizer in float32: whether a number is above zero must not hang on rounding."""
    return _filled(
        outline(Tokenizer, weights.tokenizer_config), weights.tokenizer, lambda _, value: value.float()
    )


def load_words(weights: Weights) -> Any:
    """T5's tokenizer."""
    return pretrained.read_tokenizer(weights.text.folder / weights.text.tokenizer)


def load_text(weights: Weights, dtype: torch.dtype) -> Any:
    """T5's encoder."""
    text = weights.text
    # As for FLUX: torch's fused attention takes T5's position bias through a coarser kernel.
    options = {"attn_implementation": "eager", "use_safetensors": True}
    where = text.folder / text.encoder
    return pretrained.read_model(T5EncoderModel, text.folder, text.encoder, dtype, where, **options)


def _filled(model: M, path: Path, cast: Callable[[str, Tensor], Tensor]) -> M:
    wanted = {name for name, _ in model.named_parameters()}
    file = path if path.suffix == SUFFIXES[0] else as_safetensors(path)
    with safe_open(file, "pt") as tensors:
        names = {published(n) if isinstance(model, Tokenizer) else n: n for n in tensors.keys()}  # noqa: SIM118
        state = {name: cast(name, tensors.get_tensor(names[name])) for name in wanted}
    model.load_state_dict(state, strict=False, assign=True)
    return model.requires_grad_(False).eval()
