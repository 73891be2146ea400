"""Tiny FLUX and Infinity models with random weights, written as diffusers folders in a second, and the ``--golden`` option."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

# Before anything imports the hub's client: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import tiny_flux
import tiny_infinity as tiny_infinity_
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
)
from endpoint import KEY, Endpoint, serving
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from pentimento import pytest_golden
from pentimento.calibration import Calibration
from pentimento.flux.backbone import Flux
from pentimento.flux.config import FluxConfig
from pentimento.infinity.backbone import Infinity
from pentimento.infinity.config import InfinityConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.:-"


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """The option of ``pentimento.pytest_golden`` also where the package runs without being installed."""
    if not pluginmanager.hasplugin(pytest_golden.__name__):
        pytest_golden.pytest_addoption(parser)


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--golden")
    if folder is not None and not folder.is_dir():
        raise pytest.UsageError(f"--golden: there is no folder {folder}")
    transformers_logging.disable_progress_bar()
    # pytest looks for its settings before it knows this option, near DIR, and then misses those of pyproject.toml.
    if config.inipath is None:
        for name in ("slow", "gpu", "golden", "weights"):
            config.addinivalue_line("markers", f"{name}: see pyproject.toml")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that read ``--golden DIR`` remain where DIR holds their recording; those of the small subset here always do."""
    given: Path | None = config.getoption("--golden")
    needing = [item for item in items if "golden_dir" in getattr(item, "fixturenames", ())]
    without = [item for item in needing if given is None or recording(given, item.module) is None]
    if given is not None and needing and len(without) == len(needing):
        raise pytest.UsageError(
            f"--golden: {given} holds none of the recordings that these tests compare with"
        )
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]


def recording(given: Path, module: ModuleType) -> Path | None:
    """The recording that a module's tests read: the folder given by ``--golden``, or the one of its name in there.

    A module names both in ``RECORDING``: the folder, and a file that only this recording has.
    """
    name, mark = module.RECORDING
    return next((folder for folder in (given, given / name) if (folder / mark).exists()), None)


@pytest.fixture(scope="module")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    """The recording that a module's tests read; those without one are not collected."""
    folder = recording(request.config.getoption("--golden"), request.module)
    assert folder is not None
    return folder


def tiny_vae() -> AutoencoderKL:
    """FLUX's autoencoder, 8 channels wide; a sample size of 64 makes that the native resolution."""
    torch.manual_seed(1)
    levels = 4
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_text() -> dict[str, object]:
    """Two text encoders and tokenizers that know letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    torch.manual_seed(2)
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=24,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    t5 = T5Config(
        vocab_size=len(pieces), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, is_gated_act=True
    )
    return {
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
        "tokenizer": CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77),
        "tokenizer_2": T5Tokenizer([(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=64),
    }


def write_tiny(folder: Path, in_channels: int) -> Path:
    """Write a whole model as stock diffusers does."""
    schedule = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        base_shift=0.5,
        max_shift=1.15,
    )
    pipeline = FluxFillPipeline if in_channels == 384 else FluxPipeline
    parts = {
        "transformer": tiny_flux.transformer(in_channels),
        "vae": tiny_vae(),
        "scheduler": schedule,
        **tiny_text(),
    }
    pipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_fill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny FLUX.1 Fill; do not write to it."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny-fill", 384)


@pytest.fixture(scope="session")
def tiny_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny FLUX.1 [dev]; do not write to it."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny-dev", 64)


@pytest.fixture(scope="session")
def tiny_infinity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Infinity; do not write to it."""
    text = tiny_text()
    parts = (text["text_encoder_2"], text["tokenizer_2"])
    return tiny_infinity_.write(tmp_path_factory.mktemp("models") / "tiny-infinity", parts)


@pytest.fixture
def infinity_config(tiny_infinity: Path) -> InfinityConfig:
    return InfinityConfig(weights=str(tiny_infinity), device="cpu")


@pytest.fixture
def infinity(infinity_config: InfinityConfig) -> Infinity:
    """A tiny Infinity, fresh for every test (adapters change the transformer)."""
    return Infinity.load(infinity_config)


@pytest.fixture
def fill_config(tiny_fill: Path) -> FluxConfig:
    return FluxConfig(weights=str(tiny_fill), device="cpu")


@pytest.fixture
def dev_config(tiny_dev: Path) -> FluxConfig:
    return FluxConfig(weights=str(tiny_dev), device="cpu")


@pytest.fixture
def fill(fill_config: FluxConfig) -> Flux:
    """A tiny FLUX.1 Fill, fresh for every test (adapters change the transformer)."""
    return Flux.load(fill_config, "fill")


@pytest.fixture
def dev(dev_config: FluxConfig) -> Flux:
    return Flux.load(dev_config, "dev")


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """``picture(seed, width, height)``: smooth colours, the same on every machine."""

    def draw(seed: int = 0, width: int = 64, height: int = 64) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return draw


@pytest.fixture
def half() -> Calibration:
    """Scale 1 is raw 0.5, and -0.5 to 2 was measured to hold."""
    return Calibration(
        unit=0.5, low=-0.25, high=1, response=1, monotone=1, measure="latents", faces=2, curve=((0, 0, 1), (0.5, 1, 1))
    )  # fmt: skip


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A server that answers as a vision language model, and is the one that judges ask."""
    with serving() as running:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield running
