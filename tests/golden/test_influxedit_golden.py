"""InFluxEdit against tensors recorded from the unmodified reference (float32, CPU; diffusers 0.32, torch 2.13).

The subset beside this file runs always; ``pytest -m golden --golden DIR`` runs every case of an unpacked recording.
Given the recorded random numbers, the transformer's input must be equal bit for bit, the loss within 1e-6 and every
gradient within 1e-5 of its largest value.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pentimento import images
from pentimento.flux import sampling
from pentimento.flux.backbone import Flux, Text
from pentimento.flux.config import FluxConfig
from pentimento.method import EditSettings, Example
from pentimento.methods.influxedit import EditLoRA, InFluxEdit

from .recorded import Recorded, close, distance, tiny, watch

pytestmark = pytest.mark.golden

SAVED = "pytorch_lora_weights.safetensors"
ONE_LEVEL = 1.01 / 127.5
"""One of 255 grey levels, of pixels in [-1, 1]."""
RECORDING = ("influxedit", "inference_diffusers032")
SUBSET = Path(__file__).parent / "influxedit"
PUBLISHED = {"max_sequence_length": 32, "lora": EditLoRA(rank=4), "guidance": 1.0}


def standard_normal(mean: Tensor, std: Tensor, sample: Tensor) -> Tensor:
    """The draw behind ``sample = mean + std * draw``, to the last bit: the quotient or a near neighbour of it."""
    m, s, x = mean.numpy(), std.numpy(), sample.numpy()
    centre = ((x.astype(np.float64) - m) / s).astype(np.float32)
    found = centre.copy()
    for direction in (-np.inf, np.inf):
        neighbour = centre.copy()
        for _ in range(16):
            wrong = m + s * found != x
            found[wrong] = neighbour[wrong]
            neighbour = np.nextafter(neighbour, np.float32(direction))
    assert (m + s * found == x).all()
    return torch.from_numpy(found)


def raw_uniform(u: Tensor, mode_scale: float = 1.29) -> Tensor:
    """The uniform draw behind a recorded time of the "mode" density, which falls from 1 to 0."""
    low, high = torch.zeros_like(u, dtype=torch.float64), torch.ones_like(u, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        above = sampling.density("mode", middle, mode_scale) > u
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return low.float()


def draws(record: dict[str, Tensor], scheme: str) -> Recorded:
    posteriors = [
        standard_normal(record[f"{k}_mean"], record[f"{k}_std"], record[f"{k}_sample_raw"])
        for k in ("vae_in_x0", "vae_in_masked")
    ]
    normals, uniforms = [*posteriors, record["noise"]], [record["u"]]
    if scheme == "logit_normal":
        normals, uniforms = [*normals, torch.logit(record["u"])], []
    if scheme == "mode":
        uniforms = [raw_uniform(record["u"])]
    return Recorded(normals, uniforms)


def batch_of(record: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "x0_mean": record["vae_in_x0_mean"],
        "x0_std": record["vae_in_x0_std"],
        "condition_mean": record["vae_in_masked_mean"],
        "condition_std": record["vae_in_masked_std"],
        "prompt_embeds": record["tf_encoder_hidden_states"],
        "pooled": record["tf_pooled_projections"],
    }


def build(flux: Flux, lora: dict[str, Tensor], **config: object) -> InFluxEdit:
    """The method with the recorded initial adapter; names as peft gives them, with our adapter's name."""
    method = InFluxEdit(flux, InFluxEdit.Config(**{**PUBLISHED, **config}))
    own = dict(flux.transformer.named_parameters())
    with torch.no_grad():
        for name, value in lora.items():
            own[name.replace(".default.", ".edit.")].copy_(value)
    return method


def check_step(
    method: InFluxEdit, record: dict[str, Tensor], draws: Recorded, gradients: float = 1e-5
) -> float:
    """One micro-step: input bit-equal, gradients 1e-5; returns the loss."""
    calls = watch(method.flux)
    method.adapters.train("edit")
    losses = dict(method.losses(batch_of(record), draws))
    losses["flow"].backward()
    inputs, output = calls[0]
    assert torch.equal(inputs["hidden_states"], record["tf_hidden_states"])
    assert torch.equal(inputs["timestep"], record["tf_timestep"])
    assert torch.equal(inputs["guidance"], record["tf_guidance"])
    assert torch.equal(inputs["img_ids"], sampling.image_ids(grid_of(record["noise"]), torch.device("cpu")))
    close(output, record["tf_out_packed"], 1e-5)
    own = dict(method.flux.transformer.named_parameters())
    recorded = {k.removeprefix("grad::"): v for k, v in record.items() if k.startswith("grad::")}
    for name, expected in recorded.items():
        name = name.replace(".default.", ".edit.").replace("x_embedder.", "x_embedder.modules_to_save.edit.")
        close(own[name].grad, expected, gradients)
    trained = [name for name, p in own.items() if p.requires_grad and p.grad is not None and p.grad.any()]
    assert len(trained) == sum(bool(v.any()) for v in recorded.values()) > 0
    return losses["flow"].item()


def loss_of(record: dict[str, Tensor]) -> object:
    """The recorded loss, to compare with."""
    return pytest.approx(record["loss"].item(), rel=1e-6)


def grid_of(latents: Tensor) -> tuple[int, int]:
    return latents.shape[-2] // 2, latents.shape[-1] // 2


@pytest.mark.parametrize(
    ("run", "config"),
    [
        ("intended_edit_white_frozen", {}),
        ("edit_asis", {"mask": "black", "train_embedder": True}),
        ("spatial_right", {"mode": "split"}),
    ],
)
def test_step_of_the_subset(run: str, config: dict[str, object]) -> None:
    record = load_file(SUBSET / "runs" / run / "step0.safetensors")
    method = build(tiny(SUBSET), load_file(SUBSET / "lora_init.safetensors"), **config)
    assert check_step(method, record, draws(record, "none")) == loss_of(record)


@pytest.mark.parametrize("run", ["intended_edit_white_frozen", "spatial_right"])
def test_posteriors_of_the_subset(run: str) -> None:
    """From the reference's pictures to its posteriors: geometry exact, the autoencoder up to the CPU's kernels."""
    for ours, theirs in posteriors(SUBSET, run, tiny(SUBSET)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def posteriors(root: Path, run: str, flux: Flux) -> list[tuple[Tensor, Tensor]]:
    """Ours and the recorded ones: mean and deviation of what is to be drawn and of what Fill is shown."""
    record = load_file(root / "runs" / run / "step0.safetensors")
    mode = "split" if run.startswith("spatial") else "edit"
    method = InFluxEdit(flux, InFluxEdit.Config(mode=mode, resolution=64, **PUBLISHED))
    prompts = json.loads((root / "runs" / run / "step0.json").read_text())["prompts"]
    examples = [recorded_pair(root, mode, prompt) for prompt in prompts]
    encoded = method.encode(examples)
    parts = [
        (a, b, part)
        for a, b in (("x0", "vae_in_x0"), ("condition", "vae_in_masked"))
        for part in ("mean", "std")
    ]
    return [(encoded[f"{ours}_{part}"], record[f"{theirs}_{part}"]) for ours, theirs, part in parts]


def test_edit_of_the_subset() -> None:
    """Noise, condition, sigmas, every prediction and the picture of FluxFillEditPipeline (diffusers 0.32, 4 steps)."""
    assert check_edit(tiny(SUBSET), SUBSET, "edit_white_nolora") <= ONE_LEVEL


def check_edit(flux: Flux, root: Path, case: str, saved: Path | None = None) -> float:
    """All that the transformer is given and says; returns how far the picture is from the recorded one."""
    record = load_file(root / "inference_diffusers032" / f"{case}.safetensors")
    method = build(flux, {}, resolution=64, steps=4)
    if saved is not None:
        method.adapters.load(saved)
    text = Text(prompt_embeds=record["tf0_encoder_hidden_states"], pooled=record["tf0_pooled_projections"])
    flux._prompts["p", 32] = text.prompt_embeds[0], text.pooled[0]
    calls = watch(flux)
    source = images.open_image(root / "data" / "train_A" / "000000.png")
    settings = EditSettings(seed=0, scale=0.0 if saved is None else 1.0)
    result = method.edit(Example(source=source, prompt="p"), settings)
    check_calls(calls, record)
    return distance(images.to_tensor([result]), images.to_tensor([as_image(record["image"])]))


def check_calls(calls: list[tuple[dict[str, Tensor], Tensor]], record: dict[str, Tensor]) -> None:
    first, expected = calls[0][0]["hidden_states"], record["tf0_hidden_states"]
    assert torch.equal(first[..., :64], expected[..., :64]), "initial noise"
    assert torch.equal(first[..., 128:], expected[..., 128:]), "mask channels"
    # The condition goes through the autoencoder, whose convolutions differ between CPUs in the last bits.
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-4)
    assert len(calls) == 4
    for step, (inputs, output) in enumerate(calls):
        assert torch.equal(inputs["timestep"], record[f"timestep_{step}"])
        assert torch.equal(inputs["guidance"], record["tf0_guidance"])
        close(output, record[f"noise_pred_{step}"], 1e-4)


def as_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())


CASES = {
    "intended_edit_white_frozen": {},
    "edit_asis": {"mask": "black", "train_embedder": True},
    "spatial_right": {"mode": "split"},
    "weight_logit_normal": {"mode": "split", "weighting_scheme": "logit_normal"},
    "weight_mode": {"mode": "split", "weighting_scheme": "mode"},
    "guidance30_gradckpt": {"mode": "split", "guidance": 30.0},
}


@pytest.mark.parametrize("run", CASES)
def test_step(golden_dir: Path, run: str) -> None:
    record = load_file(golden_dir / "runs" / run / "step0.safetensors")
    config = CASES[run]
    method = build(tiny(golden_dir), load_file(golden_dir / "runs" / run / "lora_init.safetensors"), **config)
    if run == "guidance30_gradckpt":
        method.flux.transformer.enable_gradient_checkpointing()
    drawn = draws(record, str(config.get("weighting_scheme", "none")))
    assert check_step(method, record, drawn) == loss_of(record)


@pytest.mark.parametrize("run", ["intended_edit_white_frozen", "spatial_right"])
def test_posteriors(golden_dir: Path, run: str) -> None:
    for ours, theirs in posteriors(golden_dir, run, tiny(golden_dir)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("run", ["intended_edit_white_frozen", "spatial_right"])
def test_texts(golden_dir: Path, run: str) -> None:
    """From the captions to what the transformer was given; the checkpoint is opened as a user's folder is."""
    flux = Flux.load(FluxConfig(weights=str(golden_dir / "tiny_flux_fill"), device="cpu"), "fill")
    record = load_file(golden_dir / "runs" / run / "step0.safetensors")
    prompts = json.loads((golden_dir / "runs" / run / "step0.json").read_text())["prompts"]
    text = flux.encode_prompts(prompts, 32)
    torch.testing.assert_close(text.prompt_embeds, record["tf_encoder_hidden_states"])
    torch.testing.assert_close(text.pooled, record["tf_pooled_projections"])


def test_second_step(golden_dir: Path) -> None:
    """After one AdamW update from the recorded start, the second micro-step's input, loss and gradients of A and B."""
    first, second = (
        load_file(golden_dir / "runs" / "spatial_right" / f"step{i}.safetensors") for i in (0, 1)
    )
    lora = load_file(golden_dir / "runs" / "spatial_right" / "lora_init.safetensors")
    method = build(tiny(golden_dir), lora, mode="split")
    optimizer = torch.optim.AdamW(method.adapters.train("edit"), lr=1e-3, weight_decay=1e-4)
    for _, loss in method.losses(batch_of(first), draws(first, "none")):
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    # Adam divides by the size of a gradient and so enlarges rounding where that is nearly zero.
    assert check_step(method, second, draws(second, "none"), gradients=1e-4) == loss_of(second)


@pytest.mark.parametrize(("case", "run"), [("edit_white_nolora", None), ("edit_white_lora", "edit_asis")])
def test_edit(golden_dir: Path, case: str, run: str | None) -> None:
    """Also with weights as the reference saved them."""
    saved = golden_dir / "runs" / run / SAVED if run else None
    assert check_edit(tiny(golden_dir), golden_dir, case, saved) <= ONE_LEVEL


def test_checkpoint_with_an_embedder(golden_dir: Path) -> None:
    """The reference saves an x_embedder that it never trained: it is equal to the base's, so nothing is lost."""
    method = build(tiny(golden_dir), {})
    file = golden_dir / "runs" / "ckpt_embedder" / "checkpoint-6" / SAVED
    method.adapters.load(file)
    ours = method.adapters.state_dict()["edit"]
    theirs = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_split_edit(golden_dir: Path) -> None:
    """The stock Fill pipeline on a canvas, with the reference's mask: one column of the right half counts as known."""
    record = load_file(golden_dir / "inference_diffusers032" / "fill_pipeline_spatial.safetensors")
    flux = tiny(golden_dir)
    method = build(flux, {}, mode="split")
    method.adapters.load(golden_dir / "runs" / "spatial_right" / SAVED)
    method.adapters.use(edit=1.0)
    source = images.open_image(golden_dir / "data" / "train_A" / "000000.png")
    mask = Image.new("L", (128, 64), 255)
    mask.paste(0, (0, 0, 65, 64))
    pixels = images.to_tensor([images.join(source, Image.new("RGB", source.size))])
    pixels = pixels.contiguous(memory_format=torch.channels_last) * (1 - images.mask_to_tensor([mask]))
    generator = torch.Generator().manual_seed(0)
    noise, draw = (torch.randn(1, 16, 8, 16, generator=generator) for _ in range(2))
    condition = torch.cat((flux.latents(*flux.encode_pixels(pixels), draw), flux.mask_tokens([mask])), dim=2)
    text = Text(prompt_embeds=record["tf0_encoder_hidden_states"], pooled=record["tf0_pooled_projections"])
    calls = watch(flux)
    latents = flux.sample(
        lambda x, s, _: flux.velocity(x, s, text, grid=(4, 8), guidance=30, condition=condition),
        sampling.pack(noise),
        4,
    )
    check_calls(calls, record)
    result = images.to_tensor(flux.decode(latents, (128, 64)))
    assert distance(result, images.to_tensor([as_image(record["image"])])) <= ONE_LEVEL


@pytest.mark.parametrize(
    ("case", "mode", "resolution"),
    [
        ("edit_64", "edit", 64),
        ("edit_32_down", "edit", 32),
        ("edit_96_upscale", "edit", 96),
        ("split_right_128", "split", 64),
        ("split_right_64_down2", "split", 32),
    ],
)
def test_pictures_as_the_model_sees_them(golden_dir: Path, case: str, mode: str, resolution: int) -> None:
    """Scaling and normalising, bit for bit; masks as documented (the reference's edit masks are black by mistake)."""
    record = load_file(golden_dir / "dataset" / f"{case}.safetensors")
    described = json.loads((golden_dir / "dataset" / f"{case}.json").read_text())
    flux = tiny(golden_dir)
    method = InFluxEdit(flux, InFluxEdit.Config(mode=mode, resolution=resolution, **PUBLISHED))
    seen = []
    encode = flux.encode_pixels
    flux.encode_pixels = lambda pixels: seen.append(pixels) or encode(pixels)
    method.encode([recorded_pair(golden_dir, mode, prompt) for prompt in described["prompts"]])
    expected = record["targets"] if mode == "edit" else record["pixel_values"]
    if mode == "edit" or resolution == 64:
        assert torch.equal(seen[0], expected) and torch.equal(seen[1], record["masked_images"])
    else:
        # The reference scales the canvas, whose halves run into each other at the seam: ours scales each half.
        inner = [i for i in range(64) if i not in (31, 32)]
        assert torch.equal(seen[0][..., inner], expected[..., inner])
    if mode == "split":
        mask = images.half_mask((2 * resolution, resolution))
        assert torch.equal(images.mask_to_tensor([mask] * 2), record["masks"])


def recorded_pair(root: Path, mode: str, prompt: str) -> Example:
    folder = "prompts" if mode == "edit" else "prompts_combined"
    name = (
        next(p.stem for p in sorted((root / "data" / folder).iterdir()) if p.read_text().strip() == prompt)
        + ".png"
    )
    if mode == "split":
        source, target = images.split(images.open_image(root / "data" / "train_combined" / name))
        return Example(source=source, target=target)
    return Example(
        source=images.open_image(root / "data" / "train_A" / name),
        target=images.open_image(root / "data" / "train_B" / name),
    )


@pytest.mark.parametrize("case", ["land_500x333", "port_333x500", "sq_512", "wide_1024x512", "odd_1001x500"])
def test_sizes(golden_dir: Path, case: str) -> None:
    """The reference truncates the short edge; ours is the nearest multiple of 16 to it, and equal where both fit."""
    described = json.loads((golden_dir / "dataset" / f"geom_{case}.json").read_text())
    width, height = described["native_sizes"][0]
    _, _, rows, columns = described["shapes"]["pixel_values"]
    long_edge = int(described["argv"][-1])
    ours = images.round_size(width, height, long_edge=long_edge)
    assert max(ours) == max(rows, columns) == long_edge
    assert abs(ours[0] - columns) <= 8 and abs(ours[1] - rows) <= 8
    if rows % 16 == 0 and columns % 16 == 0:
        assert ours == (columns, rows)
