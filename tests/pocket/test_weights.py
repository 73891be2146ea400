"""The shipped models: stock diffusers loads them, our pictures are its pictures, and one is folded from the other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline, FluxPipeline
from PIL import Image

from pentimento.errors import UserError
from pentimento.flux.backbone import Flux
from pentimento.flux.config import FluxConfig
from pentimento.method import EditSettings, Example
from pentimento.methods.influxedit import InFluxEdit
from pentimento.pocket import captions, render, scene, weights

TEXT = {"max_sequence_length": 64}
MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENTIMENTO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def portrait() -> tuple[scene.Scene, Image.Image]:
    drawn = scene.draw(9, "portrait") | {"style": 0}
    pixels = (render.render([drawn])[0] * 255).round().byte().permute(1, 2, 0).numpy()
    return drawn, Image.fromarray(pixels)


def stock(kind: type, name: str):
    pipe = kind.from_pretrained(weights.folder(name), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_shipped_files_are_small():
    files = [p for p in weights.folder("pocket-fill").rglob("*.safetensors")]
    assert sum(p.stat().st_size for p in files) <= 26e6
    assert max(p.stat().st_size for p in files) <= 15 * MIB


def test_stock_fill_draws_what_the_caption_says_and_keeps_the_rest():
    drawn, picture = portrait()
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (0, 96, 128, 128))
    pipe = stock(FluxFillPipeline, "pocket-fill")
    filled = pipe(
        captions.caption(drawn),
        image=picture,
        mask_image=mask,
        height=128,
        width=128,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
        **TEXT,
    )
    before, after = (np.asarray(p, dtype=np.float64)[:88] for p in (picture, filled.images[0]))
    assert 10 * np.log10(255**2 / ((before - after) ** 2).mean()) > 30


def test_our_split_edit_is_stock_diffusers_picture_for_the_same_noise():
    _, picture = portrait()
    flux = Flux.load(FluxConfig(device="cpu"), "fill")
    method = InFluxEdit(flux, InFluxEdit.Config(mode="split", steps=4, sampling_guidance=30.0))
    ours = method.edit(Example(source=picture, prompt="add glasses"), EditSettings(seed=3))
    canvas, mask = Image.new("RGB", (256, 128)), Image.new("L", (256, 128))
    canvas.paste(picture, (0, 0))
    mask.paste(255, (128, 0, 256, 128))
    pipe = stock(FluxFillPipeline, "pocket-fill")
    generator = torch.Generator().manual_seed(3)
    noise = pipe._pack_latents(torch.randn(1, 16, 16, 32, generator=generator), 1, 16, 16, 32)
    size = {"height": 128, "width": 256, "guidance_scale": 30.0, "num_inference_steps": 4}
    result = pipe(
        "add glasses", image=canvas, mask_image=mask, latents=noise, generator=generator, **size, **TEXT
    )
    theirs = result.images[0].crop((128, 0, 256, 128))  # fmt: skip
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def test_our_dev_sampling_is_stock_diffusers_picture_for_the_same_noise():
    flux = Flux.load(FluxConfig(device="cpu"), "dev")
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1))
    text = flux.encode_prompts(["a red circle on a white background"], 64)
    latents = flux.sample(
        lambda x, sigma, step: flux.velocity(x, sigma, text, grid=(8, 8), guidance=3.5), noise, 4
    )
    ours = flux.decode(latents, (128, 128))[0]
    theirs = stock(FluxPipeline, "pocket-dev")(
        "a red circle on a white background", latents=noise, height=128, width=128, guidance_scale=3.5, num_inference_steps=4, **TEXT
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def test_pocket_dev_is_pocket_fill_under_a_white_mask():
    fill, dev = (Flux.load(FluxConfig(device="cpu"), variant) for variant in ("fill", "dev"))
    from safetensors.torch import load_file

    constant = load_file(weights.folder("pocket-fill") / weights.FOLDED)["condition"]
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    text = fill.encode_prompts(["a portrait", "a blue star"], 64)
    options = {"grid": (8, 8), "guidance": 3.5}
    sigma = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        a = fill.velocity(x, sigma, text, condition=constant.expand(2, 64, -1), **options)
        b = dev.velocity(x, sigma, text, **options)
    # The folded bias is rounded to bfloat16 once.
    assert (a - b).abs().max() < 0.05
    assert (a - b).pow(2).mean().sqrt() < 0.01


def test_folding_happens_once_and_needs_a_writable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PENTIMENTO_CACHE", str(tmp_path / "c"))
    first = weights.folder("pocket-dev")
    stamp = (first / "model_index.json").stat().st_mtime_ns
    assert weights.folder("pocket-dev") == first
    assert (first / "model_index.json").stat().st_mtime_ns == stamp
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENTIMENTO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set PENTIMENTO_CACHE"):
        weights.folder("pocket-dev")


def test_an_unknown_shipped_model_is_named():
    with pytest.raises(UserError, match="pocket-fill, pocket-dev, pocket-infinity"):
        weights.folder("pocket-fil")


def test_a_capitalised_word_means_the_same():
    flux = Flux.load(FluxConfig(device="cpu"), "fill")
    small, capital = (flux.encode_prompts([text], 64) for text in ("make the hair red", "Make the hair Red"))
    assert torch.equal(small.prompt_embeds, capital.prompt_embeds)
    assert torch.equal(small.pooled, capital.pooled)
