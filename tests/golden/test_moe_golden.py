"""MoE-LoRA against tensors recorded from ICEdit's own library (its peft 0.14 and diffusers 0.32; float32, CPU, torch 2.13).

The subset beside this file (of the layers' activations every second, or every 34th token) runs always;
``pytest -m golden --golden DIR`` runs an unpacked recording. Layers, prediction and loss agree within 1e-6 of their largest
value and gradients within 1e-6 of the largest one. Taken layer by layer, gradients differ by up to 2e-6 of the layer's largest:
both lie within 5e-6 of what float64 gives.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from pentimento import images, moe
from pentimento.adapters import Adapters, ExpertLoRA, spec_of
from pentimento.flux import loading, sampling
from pentimento.flux.backbone import Flux
from pentimento.flux.config import FluxConfig
from pentimento.optimizers import make_optimizer
from pentimento.train import Stage

pytestmark = pytest.mark.golden
RECORDING = ("icedit", "train_moe1")

HERE = Path(__file__).parent
MODEL, SUBSET = HERE / "icedit" / "tiny_flux_fill", HERE / "icedit_moe"
SAVED = "pytorch_lora_weights.safetensors"


@pytest.fixture
def run(golden_dir: Path) -> Path:
    """The recorded training with experts, one per token. (One with two is described, but in no archive.)"""
    return golden_dir / "train_moe1"


def build(model: Path, weights: Path, top_k: int = 1) -> Adapters:
    """A recorded model with recorded weights, switched on and to be trained."""
    folder = loading.Weights(name="golden", folder=model, variant="fill")
    host: FluxTransformer2DModel = loading.load_transformer(folder, torch.float32)
    adapters = Adapters(host)
    read = spec_of(weights / SAVED)
    assert isinstance(read, ExpertLoRA)
    assert (read.experts, read.expert_rank, read.rank, read.top_k, read.gate) == (4, 4, 4, 1, "topk-softmax")
    spec = ExpertLoRA(
        targets=read.targets, rank=read.rank, experts=read.experts, expert_rank=read.expert_rank, top_k=top_k
    )
    adapters.add("edit", spec)
    # The published choice of layers, which the file's names confirm.
    assert list(adapters._expert_layers(spec)) == list(adapters._expert_layers(read))
    adapters.load(weights / SAVED)
    adapters.train("edit")
    adapters.use(edit=1.0)
    return adapters


def close(ours: Tensor | None, theirs: Tensor, tolerance: float = 1e-6) -> None:
    assert ours is not None and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def check_layers(adapters: Adapters, record: dict[str, Tensor]) -> int:
    """Outputs and router logits; returns how many layers there are."""
    names = sorted({key.rpartition(".")[0] for key in record})
    for name in names:
        layer = adapters.host.get_submodule(name)
        x = record[f"{name}.in"]
        close(layer.lora_route["edit"](x), record[f"{name}.router_logits"])
        close(layer(x), record[f"{name}.out"])
    return len(names)


def check_step(adapters: Adapters, step: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    """Prediction, loss, and the gradients of all parameters under their published names."""
    grid = (4, step["pred"].shape[1] // 4)
    prediction = predict(adapters, step["hidden_states"], step, grid)
    close(prediction, step["pred"])
    loss = F.mse_loss(prediction, step["target"])
    assert loss.item() == pytest.approx(step["loss"].item(), rel=1e-6)
    loss.backward()
    ours = gradients(adapters)
    theirs = {key.replace(".default.", "."): value for key, value in grads.items()}
    assert ours.keys() == theirs.keys()
    largest = max(value.abs().max() for value in theirs.values())
    for key, expected in theirs.items():
        close(ours[key], expected, 5e-6)
        assert (ours[key] - expected).abs().max() <= 1e-6 * largest


def predict(adapters: Adapters, x: Tensor, step: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
    return adapters.host(
        hidden_states=x,
        timestep=step["t"],
        guidance=step["guidance"],
        pooled_projections=step["pooled"],
        encoder_hidden_states=step["prompt_embeds"],
        txt_ids=torch.zeros(step["prompt_embeds"].shape[1], 3),
        img_ids=sampling.image_ids(grid, torch.device("cpu")),
        return_dict=False,
    )[0]


def gradients(adapters: Adapters) -> dict[str, Tensor]:
    return moe.published({key: p.grad for key, p in adapters._named("edit").items()}, 4)


def test_layers_of_the_subset() -> None:
    layers = load_file(SUBSET / "moe_layers.safetensors")
    assert check_layers(build(MODEL, SUBSET / "lora_start"), layers) == 4


def test_step_of_the_subset() -> None:
    adapters = build(MODEL, SUBSET / "lora_start")
    # The plain adapter's step had the same inputs.
    step = load_file(MODEL.parent / "step0.safetensors") | load_file(SUBSET / "step0.safetensors")
    check_step(adapters, step, load_file(SUBSET / "step0_grads.safetensors"))
    routers = [value for key, value in gradients(adapters).items() if "lora_route" in key]
    assert len(routers) == 4 and not any(value.any() for value in routers), "top-1 as published never learns"


def test_saving_gives_the_published_tensors(tmp_path: Path) -> None:
    build(MODEL, SUBSET / "lora_start").save(tmp_path)
    ours, theirs = load_file(tmp_path / SAVED), load_file(SUBSET / "lora_start" / SAVED)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_layers(golden_dir: Path, run: Path) -> None:
    """All tokens, and the weights stored beside them."""
    adapters = build(golden_dir / "tiny_flux_fill", run / "lora_start")
    record = load_file(run / "moe_layers.safetensors")
    assert check_layers(adapters, record) == 4
    info = json.loads((run / "info.json").read_text())["moe_layers"]
    state = moe.published(adapters.state_dict()["edit"], 4)
    for name, about in info.items():
        assert torch.equal(state[f"{name}.lora_route.weight"], record[f"{name}.router_weight"])
        for expert in range(4):
            for factor in "AB":
                assert torch.equal(
                    state[f"{name}.lora_{factor}.expert_{expert}.weight"], record[f"{name}.{factor}{expert}"]
                )
        adapters.host.get_submodule(name)(record[f"{name}.in"])
        share = adapters.routing("edit")[name].share
        close(share, torch.tensor(about["usage"]) / sum(about["usage"]), 1e-5)


def test_step(golden_dir: Path, run: Path) -> None:
    adapters = build(golden_dir / "tiny_flux_fill", run / "lora_start")
    check_step(adapters, load_file(run / "step0.safetensors"), load_file(run / "step0_grads.safetensors"))
    norms = json.loads((run / "info.json").read_text())["moe_layers"]
    for name, about in norms.items():
        norm = float(gradients(adapters)[f"{name}.lora_route.weight"].norm())
        assert norm == pytest.approx(about["router_grad_norm"], rel=1e-5)
        assert norm == 0, "top 1 as published never learns"


def test_start(golden_dir: Path, run: Path) -> None:
    """Our own start is distributed as the recorded one: A has deviation 1/rank, B is zero, routers as nn.Linear has them."""
    adapters = build(golden_dir / "tiny_flux_fill", run / "lora_init")
    adapters.reset(seed=3)
    ours = moe.published(adapters.state_dict()["edit"], 4)
    for key, theirs in load_file(run / "lora_init" / SAVED).items():
        own = ours[key.removeprefix("transformer.")]
        assert own.any() == theirs.any()
        if "lora_route" in key:
            bound = own.shape[1] ** -0.5
            assert max(float(own.abs().max()), float(theirs.abs().max())) <= bound
        assert float(own.std()) == pytest.approx(float(theirs.std()), rel=0.25)


def test_prodigy(golden_dir: Path, run: Path) -> None:
    """The six recorded steps from the pictures on: loss, gradient norm, Prodigy's estimate, and the weights after them."""
    adapters = build(golden_dir / "tiny_flux_fill", run / "lora_start")
    flux = Flux.load(FluxConfig(weights=str(golden_dir / "tiny_flux_fill"), device="cpu"), "fill")
    info = json.loads((run / "info.json").read_text())
    noise = load_file(run / "prodigy_noise.safetensors")
    published = {"optimizer": "prodigy", "lr": 1.0, "weight_decay": 0.01, "max_grad_norm": 0.5}
    stage = Stage(train=("edit",), steps=6, **published)
    params = adapters.train(*stage.train)
    adapters.use(edit=1.0)
    optimizer = make_optimizer(stage, params)
    for log in info["prodigy"]["log"]:
        drawn = {
            key: noise[f"{log['i']}.{key}"] for key in ("vae_noise_image", "vae_noise_masked", "t", "x_1")
        }
        x_0, x = noised(flux, golden_dir, info["prodigy"]["images"][log["batch"]], drawn)
        text = flux.encode_prompts(info["prodigy"]["prompts"][log["batch"]], 512)
        step = {**vars(text), "t": drawn["t"], "guidance": torch.ones(2)}
        loss = F.mse_loss(predict(adapters, x, step, (4, 8)), drawn["x_1"] - x_0)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, stage.max_grad_norm)
        optimizer.step()
        assert loss.item() == pytest.approx(log["loss"], rel=1e-6)
        assert float(norm) == pytest.approx(log["grad_norm_before_clip"], rel=1e-5)
        assert optimizer.param_groups[0]["d"] == pytest.approx(log["d"], rel=1e-6)
    ours = moe.published(adapters.state_dict()["edit"], 4)
    start, after = (load_file(run / f"lora_{when}" / SAVED) for when in ("start", "after"))
    for key, value in after.items():
        moved = value - start[key]
        own = ours[re.sub("^transformer\\.", "", key)] - start[key]
        assert (own - moved).abs().max() <= 1e-6 * value.abs().max()
        assert not moved.any() or F.cosine_similarity(own.flatten(), moved.flatten(), dim=0) > 0.99


def noised(flux: Flux, root: Path, names: list[str], drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The clean tokens of recorded diptychs, and what the transformer is given."""
    pixels = images.to_tensor([images.open_image(root / "data" / name) for name in names])
    visible, mask = pixels.clone(), torch.zeros_like(pixels[:, :1])
    visible[..., pixels.shape[-1] // 2 :] = 0
    mask[..., pixels.shape[-1] // 2 :] = 1
    x_0 = flux.latents(*flux.encode_pixels(pixels), drawn["vae_noise_image"])
    shown = flux.latents(*flux.encode_pixels(visible), drawn["vae_noise_masked"])
    t = drawn["t"].view(-1, 1, 1)
    x_t = (1 - t) * x_0 + t * drawn["x_1"]
    return x_0, torch.cat((x_t, shown, sampling.pack_mask(mask)), dim=2)
