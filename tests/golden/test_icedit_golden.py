"""ICEdit against tensors recorded from the reference (float32, CPU; training under diffusers 0.32, pictures under 0.42.1).

The subset beside this file runs always; ``pytest -m golden --golden DIR`` runs every case of an unpacked recording.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pentimento import images
from pentimento.flux import fill, sampling
from pentimento.flux.backbone import Flux, Text
from pentimento.flux.config import FluxConfig
from pentimento.method import EditSettings, Example
from pentimento.methods.icedit import TARGETS, DiptychLoRA, ICEdit
from pentimento.optimizers import make_optimizer
from pentimento.train import Stage

from .recorded import Recorded, close, tiny, watch

pytestmark = pytest.mark.golden

RECORDING = ("icedit", "train_normal")
SUBSET = Path(__file__).parent / "icedit"
SAVED = "pytorch_lora_weights.safetensors"
GRADIENTS = 50
"""Two matrices on each of the recorded model's 25 layers."""


def build(root: Path, lora: str, flux: Flux | None = None, **config: object) -> ICEdit:
    """The method on the recorded checkpoint with a recorded adapter."""
    flux = flux or tiny(root)
    method = ICEdit(flux, ICEdit.Config(lora=DiptychLoRA(rank=4), max_sequence_length=512, **config))
    method.adapters.load(root / "train_normal" / lora / SAVED)
    return method


def batch_of(flux: Flux, x_0: Tensor, x_cond: Tensor, grid: tuple[int, int], text: Text) -> dict[str, Tensor]:
    """Posteriors without spread whose draws are the recorded latents, up to rounding."""
    settings = flux._vae_config
    unscaled = [
        sampling.unpack(part, grid) / settings["scaling_factor"] + settings["shift_factor"]
        for part in (x_0, x_cond[..., :64])
    ]
    return {
        "x0_mean": unscaled[0], "x0_std": torch.zeros_like(unscaled[0]),
        "condition_mean": unscaled[1], "condition_std": torch.zeros_like(unscaled[1]),
        "prompt_embeds": text.prompt_embeds, "pooled": text.pooled,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """With one thread the autoencoder rounds otherwise, 3e-6 away from the recordings."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def check_step(
    method: ICEdit, record: dict[str, Tensor], batch: dict[str, Tensor], posteriors: list[Tensor]
) -> float:
    """One micro-step: input and prediction; returns the loss."""
    calls = watch(method.flux)
    method.adapters.train("edit")
    draws = Recorded([*posteriors, torch.logit(record["t"].double()).float(), record["x_1"]])
    ((name, loss),) = method.losses(batch, draws)
    loss.backward()
    inputs, output = calls[0]
    torch.testing.assert_close(inputs["hidden_states"], record["hidden_states"], rtol=0, atol=2e-6)
    assert torch.equal(inputs["hidden_states"][..., 128:], record["hidden_states"][..., 128:]), (
        "mask channels"
    )
    torch.testing.assert_close(inputs["timestep"], record["t"], rtol=0, atol=1e-6)
    assert torch.equal(inputs["guidance"], record["guidance"])
    assert torch.equal(inputs["img_ids"], record["img_ids"])
    close(output, record["pred"], 1e-5)
    assert name == "flow"
    return loss.item()


def check_gradients(method: ICEdit, recorded: dict[str, Tensor]) -> int:
    """All of them; returns how many there are."""
    own = dict(method.flux.transformer.named_parameters())
    for name, expected in recorded.items():
        close(own[name.replace(".default.", ".edit.")].grad, expected, 2e-6)
    trained = [p for p in own.values() if p.grad is not None]
    assert len(trained) == len(recorded)
    return len(trained)


def test_step_of_the_subset() -> None:
    record = load_file(SUBSET / "step0.safetensors")
    method = build(SUBSET, "lora_start")
    text = Text(prompt_embeds=record["prompt_embeds"], pooled=record["pooled"])
    batch = batch_of(method.flux, record["x_0"], record["hidden_states"][..., 64:], (4, 8), text)
    nothing = torch.zeros_like(batch["x0_mean"])
    loss = check_step(method, record, batch, [nothing, nothing])
    assert loss == pytest.approx(record["loss"].item(), rel=1e-6)
    assert (
        check_gradients(method, load_file(SUBSET / "train_normal" / "step0_grads.safetensors")) == GRADIENTS
    )


def test_layers_are_the_published_ones() -> None:
    """Our pattern names the layers of the reference's longer one: on the recorded model, and 343 on FLUX.1's names."""
    theirs = json.loads((SUBSET / "info.json").read_text())
    names = {key.removesuffix(".weight").partition(".lora_")[0] for key in theirs["saved_keys"]}
    flux = tiny(SUBSET)
    modules = [n for n, m in flux.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    ours = {f"transformer.{n}" for n in modules if re.fullmatch(TARGETS, n)}
    assert ours == names
    wide = {re.sub(r"\.\d+\.", ".{}.", n, count=1) for n in modules}
    blocks = {"transformer_blocks": 19, "single_transformer_blocks": 38}
    full = [n.format(i) for n in wide for i in range(blocks.get(n.split(".")[0], 1))]
    published = re.compile(theirs["target_modules"])
    hit = [n for n in full if re.fullmatch(TARGETS, n)]
    assert len(hit) == 343
    assert hit == [n for n in full if published.fullmatch(n)]


@pytest.mark.parametrize("case", ["a", "c"])
def test_encoding(golden_dir: Path, case: str) -> None:
    """Irregular masks too: posterior draws, hidden part and mask channels. (Case b has sides that ours never has.)"""
    record = load_file(golden_dir / "encode_fill.safetensors")
    flux = tiny(golden_dir)
    pixels, mask = record[f"{case}.image"] * 2 - 1, (record[f"{case}.mask"] >= 0.5).float()
    x0 = flux.latents(*flux.encode_pixels(pixels), record[f"{case}.noise_image"])
    shown = flux.encode_pixels(fill.hide(pixels, mask))
    x_cond = fill.condition(flux, shown, record[f"{case}.noise_masked"], mask)
    # Equal bit for bit with two threads on the machine that this was written on; convolutions sum otherwise elsewhere.
    torch.testing.assert_close(x0, record[f"{case}.x_0"], rtol=0, atol=5e-6)
    torch.testing.assert_close(x_cond, record[f"{case}.x_cond"], rtol=0, atol=5e-6)
    assert torch.equal(x_cond[..., 64:], record[f"{case}.x_cond"][..., 64:])


def test_step(golden_dir: Path) -> None:
    """From pictures and instructions to every gradient."""
    record = load_file(golden_dir / "train_normal" / "step0.safetensors")
    info = json.loads((golden_dir / "train_normal" / "info.json").read_text())
    flux = Flux.load(FluxConfig(weights=str(golden_dir / "tiny_flux_fill"), device="cpu"), "fill")
    method = build(golden_dir, "lora_start", flux, resolution=64)
    halves = images.from_tensor(record["image"] * 2 - 1)
    pairs = [images.split(half) for half in halves]
    prompts = [p.removeprefix(method.text("").strip()) for p in info["step0"]["prompts"]]
    before = method.config.prompt_template.removesuffix("{prompt}")
    batch = method.encode([Example(source=a, target=b) for a, b in pairs])
    batch |= method.encode_text([p.removeprefix(before) for p in prompts])
    close(batch["prompt_embeds"], record["prompt_embeds"], 1e-6)
    close(batch["pooled"], record["pooled"], 1e-6)
    loss = check_step(method, record, batch, [record["vae_noise_image"], record["vae_noise_masked"]])
    assert loss == pytest.approx(record["loss"].item(), rel=1e-6)
    gradients = load_file(golden_dir / "train_normal" / "step0_grads.safetensors")
    assert check_gradients(method, gradients) == GRADIENTS


def test_prodigy_trajectory(golden_dir: Path) -> None:
    """24 steps of the published optimizer, clip at 0.5: losses, gradient norms and Prodigy's estimate."""
    folder = golden_dir / "train_normal"
    noise = load_file(folder / "prodigy_noise.safetensors")
    recorded = json.loads((folder / "info.json").read_text())["prodigy"]
    flux = Flux.load(FluxConfig(weights=str(golden_dir / "tiny_flux_fill"), device="cpu"), "fill")
    method = build(golden_dir, "lora_start", flux, resolution=64)
    stage = Stage(
        train=("edit",), steps=24, lr=1.0, optimizer="prodigy", weight_decay=0.01, max_grad_norm=0.5
    )
    params = method.adapters.train("edit")
    optimizer = make_optimizer(stage, params)
    batches = [
        _recorded_batch(method, golden_dir, *row)
        for row in zip(recorded["images"], recorded["prompts"], strict=True)
    ]
    for row in recorded["log"]:
        i = row["i"]
        posteriors = [noise[f"{i}.vae_noise_{part}"] for part in ("image", "masked")]
        time = torch.logit(noise[f"{i}.t"].double()).float()
        ((_, loss),) = method.losses(batches[row["batch"]], Recorded([*posteriors, time, noise[f"{i}.x_1"]]))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, stage.max_grad_norm)
        assert loss.item() == pytest.approx(row["loss"], rel=1e-5)
        assert norm.item() == pytest.approx(row["grad_norm_before_clip"], rel=1e-5)
        optimizer.step()
        assert optimizer.param_groups[0]["d"] == pytest.approx(row["d"], rel=1e-4)
        optimizer.zero_grad()
    after = load_file(folder / "lora_after" / SAVED)
    for key, value in method.adapters.state_dict()["edit"].items():
        close(value, after[f"transformer.{key}"], 1e-5)


def _recorded_batch(method: ICEdit, root: Path, names: list[str], prompts: list[str]) -> dict[str, Tensor]:
    pairs = [images.split(Image.open(root / "data" / name)) for name in names]
    text = method.flux.encode_prompts(prompts, 512)
    batch = method.encode([Example(source=a, target=b) for a, b in pairs])
    return batch | {"prompt_embeds": text.prompt_embeds, "pooled": text.pooled}


@pytest.mark.parametrize("case", ["main_a", "d_small", "gradio_a", "gradio_a_scale05", "gradio_a_scale0"])
def test_edit(golden_dir: Path, case: str) -> None:
    """The picture of stock diffusers 0.42 in the reference's script and page: equal up to one grey level."""
    folder = golden_dir / "infer_d042"
    recorded = json.loads((folder / "info.json").read_text())
    about = {"instruction": recorded["main_a"]["instruction"], **recorded[case]}
    flux = Flux.load(FluxConfig(weights=str(golden_dir / "tiny_flux_fill"), device="cpu"), "fill")
    method = build(golden_dir, "lora_start", flux, resolution=512)
    picture = images.open_image(golden_dir / "infer_inputs" / f"{about['input']}.png")
    scale = {"gradio_a_scale05": 0.5, "gradio_a_scale0": 0.0}.get(case, 1.0)
    calls = watch(flux)
    diptychs = []
    decode = flux.decode
    flux.decode = lambda *a: diptychs.extend(decode(*a)) or diptychs[-1:]
    method.edit(
        Example(source=picture, prompt=about["instruction"]),
        EditSettings(seed=about["seed"], steps=4, scale=scale),
    )
    record = load_file(folder / f"{case}.safetensors")
    assert torch.equal(calls[0][0]["hidden_states"][..., :64], sampling.pack(record["init_noise"]))
    result = Image.open(folder / f"{case}_result.png")
    ours = images.split(diptychs[0])[1]
    assert ours.size == result.size
    close(images.to_tensor([ours]), images.to_tensor([result.convert("RGB")]), 1.01 / 127.5)


def test_sizes(golden_dir: Path) -> None:
    """The reference's sizes wherever it gives no black rows; elsewhere its pipeline's height."""
    method = build(golden_dir, "lora_start", resolution=512)
    for row in json.loads((golden_dir / "size_table.json").read_text()):
        (width, height), (double, high) = row["input"], row["pipeline_size"]
        if high >= 16 and height / width <= 4:
            assert method.edit_size(width, height) == (double // 2, high)
        else:  # where the reference fails, or its sequence exceeds every memory
            assert min(method.edit_size(width, height)) >= 16
