"""PairEdit, its ablations, baselines and real pictures against tensors recorded from the reference (float32, CPU; diffusers 0.31).

The subset beside this file runs always (of long tensors the first 16 tokens); ``pytest -m golden --golden DIR`` compares all of an
unpacked recording. Losses agree within 1e-5 and gradients within 1e-4 of their largest value, velocities within 1e-5.
Which of the ablations are public code and which are inferred is said in the recording's ``losses_onestep.json``.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pentimento import export, stored
from pentimento.errors import UserError
from pentimento.flux import sampling
from pentimento.flux.backbone import Flux, Text
from pentimento.flux.dev import AttentionLoRA, DevMethod, Drawing
from pentimento.method import EditSettings, Example
from pentimento.methods.inversion import Inversion
from pentimento.methods.pairedit import NOISINGS, PairEdit
from pentimento.methods.sliders import ImageSlider, TextSlider

from .recorded import Recorded, close, distance, tiny, watch

pytestmark = pytest.mark.golden

RECORDING = ("pairedit", "generate_outputs_listing.json")
SUBSET = Path(__file__).parent / "pairedit"
PUBLISHED = {"resolution": 512, "max_sequence_length": 512}
LOSS, GRADIENT, VELOCITY = 1e-5, 1e-4, 1e-5
SMALLEST = 1e-10
"""Absolute error of gradients, which are between 1e-6 and 1e-4 at their largest."""
TOKENS_OF_512 = 1024


def flux_of(root: Path) -> Flux:
    return tiny(root, "tiny_flux", "dev")


def build(kind: type[DevMethod], root: Path, **config: object) -> DevMethod:
    return kind(flux_of(root), kind.Config(**{**PUBLISHED, **config}))


def fill(method: DevMethod, state: dict[str, Tensor], name: str, folder: Path) -> None:
    """Load an adapter that is recorded under the reference's names, through a file as the reference writes it."""
    file = folder / f"{name}.pt"
    torch.save(state, file)
    method.adapters.load(file, name)


def known(method: DevMethod, root: Path) -> DevMethod:
    for name in method.adapters.specs:
        method.adapters.load(root / "checkpoints" / f"known_{name}.pt", name)
    return method


def as_given(method: DevMethod) -> None:
    """Latents are recorded after the draw from their posterior: hand them through. And the grid is that of 512 pixels."""
    flux, sigmas = method.flux, method.flux.sigmas
    flux.latents = lambda mean, std, noise: sampling.pack(mean)
    flux.sigmas = lambda steps, tokens: sigmas(steps, TOKENS_OF_512)


def batch_of(source: Tensor, target: Tensor | None, root: Path) -> dict[str, Tensor]:
    """As ``encode`` and ``encode_text`` give it, from latents ``(1, C, h, w)``; the text is the empty one."""
    embeds = load_file(root / "prompt_embeds.safetensors")
    batch = {"source_mean": source, "source_std": torch.zeros_like(source)}
    if target is not None:
        batch |= {"target_mean": target, "target_std": torch.zeros_like(target)}
    return batch | {"prompt_embeds": embeds["prompt_embeds"][:1], "pooled": embeds["pooled"][:1]}


def draws_of(index: int, noise: Tensor, source: Tensor) -> Recorded:
    """Time, posterior of the source, noise, posterior of the target."""
    blank = torch.zeros_like(source)
    return Recorded([blank, noise, blank], [torch.tensor([(index + 0.5) / 28])])


def gradients(method: DevMethod, name: str) -> dict[str, Tensor]:
    """By the reference's names."""
    found = {}
    for key, parameter in method.adapters._parts(name)[""].items():
        layer, _, factor = key.removesuffix(".weight").rpartition(".")
        word = {"lora_A": "lora_down", "lora_B": "lora_up"}[factor]
        found[f"{stored.pairedit_name(layer)}.{word}.weight"] = parameter.grad
    return found


def backward(method: DevMethod, batch: dict[str, Tensor], draws: Recorded) -> dict[str, float]:
    losses = {}
    for key, loss in method.losses(batch, draws):
        loss.backward()
        losses[key] = loss.item()
    return losses


def check_gradients(method: DevMethod, name: str, record: dict[str, Tensor], prefix: str) -> int:
    """Compare all that are recorded; returns how many."""
    ours = gradients(method, name)
    theirs = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= GRADIENT * value.abs().max() + SMALLEST
    return len(theirs)


def check_grids(root: Path) -> float:
    """The largest distance of noise levels over all recorded grids."""
    scheduler = flux_of(root).scheduler
    worst = []
    for case, record in json.loads((root / "schedule.json").read_text()).items():
        steps, tokens = (int(part) for part in case.removeprefix("N").split("_seq"))
        ours = sampling.sampling_sigmas(scheduler, steps, tokens)
        worst.append(distance(ours, torch.tensor(record["sigmas"])))
    return float(torch.tensor(worst).max())  # unlike max(), not a number if any is not


def check_noise(root: Path) -> set[str]:
    """The five noise functions of the reference are two here: three of them differ in nothing but the factor on the noise.

    Returns which were compared.
    """
    record = load_file(root / "add_noise.safetensors")
    flux = flux_of(root)
    x_0 = flux.latents(record["vae_mean"], record["vae_std"], record["posterior_eps_seed321"])
    torch.testing.assert_close(x_0, record["init_latents_packed"], rtol=1e-6, atol=1e-6)
    cases = json.loads((root / "meta.json").read_text())["add_noise"]["cases"]
    assert {case["fn"] for case in cases} == {
        "add_noise_scale", "add_noise", "add_noise_precision", "add_noise_rect", "get_noisy_image",
    }  # fmt: skip
    sigmas = flux.sigmas(28, TOKENS_OF_512)
    compared = set()
    for case in cases:
        unit = torch.randn(1, TOKENS_OF_512, 16, generator=torch.Generator().manual_seed(case["noise_seed"]))
        rows = torch.arange(x_0.shape[1]) if x_0.shape[1] == TOKENS_OF_512 else corner()
        noise = (case["scale"] or 1) * unit[:, rows]
        kind = "flow" if case["fn"] in ("add_noise_rect", "get_noisy_image") else "preserving"
        x_t, velocity = NOISINGS[kind](x_0, noise, sigmas[case["step"]].view(1, 1, 1))
        torch.testing.assert_close(x_t, record[f"{case['key']}.x_t"], rtol=1e-6, atol=1e-6)
        if kind == "preserving" and case["scale"] is not None:
            torch.testing.assert_close(velocity, record[f"{case['key']}.noise"], rtol=1e-6, atol=1e-6)
        compared.add(case["fn"])
    return compared


def corner() -> Tensor:
    """Tokens of the 4 x 4 corner of a 32 x 32 grid, which the subset keeps."""
    return torch.tensor([row * 32 + column for row in range(4) for column in range(4)])


def check_forward(root: Path) -> float:
    """Both adapters on one transformer, at seven pairs of scales; files as the reference saves them. The largest distance."""
    record = load_file(root / "lora_forward.safetensors")
    method = known(build(PairEdit, root), root)
    pairs = [(0, 0), (1, 0), (0, 1), (1, 1), (0, -1), (0, 0.5), (0.75, 0.3)]
    worst = []
    for content, semantic in pairs:
        method.adapters.use(content=content, semantic=semantic)
        ours = method.flux.velocity(
            record["hidden_states"],
            record["timestep_over_1000"],
            Text(
                prompt_embeds=record["encoder_hidden_states"][None], pooled=record["pooled_projections"][None]
            ),
            grid=(8, 8),
            guidance=float(record["guidance"]),
        )
        worst.append(distance(ours, record[f"out.c{content}_s{semantic}"]))
    assert len(worst) == 7
    return float(torch.tensor(worst).max())  # unlike max(), not a number if any is not


ABLATIONS = {
    "full_beta1": (PairEdit, {}),
    "full_beta3": (PairEdit, {"noise_scale": 3.0}),
    "wocontent": (PairEdit, {"content": False}),
    "fm": (PairEdit, {"noising": "flow"}),
    "wocfg": (PairEdit, {"semantic": "target"}),
    "wocfg_bi": (PairEdit, {"semantic": "reconstruction"}),
    "sliders_cp": (ImageSlider, {"noising": "preserving"}),
    "sliders_fm": (ImageSlider, {}),
}
COUNTS = dict.fromkeys(ABLATIONS, 2) | {"wocontent": 1, "wocfg_bi": 3}
"""Losses of a step."""
IN_JSON = {"wocfg": "wocfg_candidate", "wocfg_bi": "wocfg_bidirectional_candidate"}
LOSSES = {
    "content": "loss1", "semantic": ("loss2", "loss_high"), "semantic_source": "loss_low", "target": "loss_high",
    "source": "loss_low",
}  # fmt: skip


def check_ablation(root: Path, case: str) -> int:
    """Returns how many losses were compared. Losses, norms of the gradients and some gradients of one step from the known adapters."""
    record = load_file(root / "losses_onestep.safetensors")
    numbers = json.loads((root / "losses_onestep.json").read_text())[IN_JSON.get(case, case)]
    kind, config = ABLATIONS[case]
    method = known(build(kind, root, **config), root)
    as_given(method)
    source, target = (sampling.unpack(record[f"x_{side}"], (8, 8)) for side in ("source", "target"))
    method.adapters.train(*method.adapters.specs)
    losses = backward(method, batch_of(source, target, root), draws_of(14, record["eps"], source))
    compared = 0
    for key, loss in losses.items():
        names = [LOSSES[key]] if isinstance(LOSSES[key], str) else LOSSES[key]
        expected = next(numbers[name] for name in names if name in numbers)
        assert loss == pytest.approx(expected, rel=LOSS), key
        compared += 1
    assert compared == sum(key.startswith("loss") for key in numbers)
    for name in method.adapters.specs:
        norm = torch.stack([g.norm() for g in gradients(method, name).values()]).norm()
        assert float(norm) == pytest.approx(numbers[f"grad_norm_{name}"], rel=GRADIENT)
        prefix = f"{case}.{name}.grad."
        if any(key.startswith(prefix) for key in record):
            assert check_gradients(method, name, record, prefix) > 0
    return compared


def check_pipeline(root: Path, case: dict[str, object], file: Path | None = None) -> float:
    """Every velocity and every latent of one recorded drawing; returns the largest distance of velocities."""
    record = load_file(root / "pipelines.safetensors")
    key, skip = str(case["key"]), int(str(case["skip"]))
    real = key.startswith("real")
    method = build(PairEdit, root, resolution=256, steps=8, skip=skip, weight=case.get("cfg_scale", 0.75))
    method.adapters.load(root / "checkpoints" / "known_semantic.pt", "semantic")
    if real:
        method.show_photo(root / "checkpoints" / "known_content.pt")
    embeds = load_file(root / "prompt_embeds.safetensors")
    method.flux._prompts["p", 512] = embeds["prompt_embeds"][1], embeds["pooled"][1]
    calls = watch(method.flux)
    decoded: list[Tensor] = []
    method.flux.decode = lambda latents, size: decoded.append(latents) or [Image.new("RGB", size)]
    # The reference takes a negative scale of a real picture for 0.
    scale = max(0.0, float(str(case["scale"]))) if real else float(str(case["scale"]))
    example = Example(source=Image.new("RGB", (256, 256)) if real else None, prompt="p")
    method.edit(example, EditSettings(seed=6666, scale=scale))
    velocities = torch.cat([output for _, output in calls])
    latents = [x["hidden_states"] for x, _ in calls if x["timestep"].item() < 1]
    steps = torch.cat([*unique(latents), decoded[0]])
    expected = record[f"{key}.v_calls" if real else f"{key}.v"]
    shown = slice(0, expected.shape[1])
    if not real:
        assert torch.equal(calls[0][0]["hidden_states"][:, shown], record["gen.init_noise_packed"])
    close(steps[:, shown], record[f"{key}.latents_steps"], VELOCITY)
    assert len(velocities) == len(expected)
    return distance(velocities[:, shown], expected)


def unique(latents: list[Tensor]) -> list[Tensor]:
    """Without the repetition of a step that asks the model twice."""
    return [x for i, x in enumerate(latents) if i == 0 or not torch.equal(x, latents[i - 1])]


def cases(root: Path, *keys: str) -> list[dict[str, object]]:
    every = json.loads((root / "meta.json").read_text())["pipelines"]["cases"]
    return [case for case in every if not keys or case["key"] in keys]


def test_grids_of_the_subset() -> None:
    assert check_grids(SUBSET) <= 1e-6


def test_noise_of_the_subset() -> None:
    assert len(check_noise(SUBSET)) == 5


def test_forward_of_the_subset() -> None:
    assert check_forward(SUBSET) <= VELOCITY


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablation_of_the_subset(case: str) -> None:
    assert check_ablation(SUBSET, case) == COUNTS[case]


@pytest.mark.parametrize("case", cases(SUBSET, "gen.scale1.0.skip2", "real.scale1.0.skip3.cfg0.75"))
def test_pipeline_of_the_subset(case: dict[str, object]) -> None:
    assert check_pipeline(SUBSET, case) <= VELOCITY


def test_grids(golden_dir: Path) -> None:
    assert check_grids(golden_dir) <= 1e-6


def test_noise(golden_dir: Path) -> None:
    assert len(check_noise(golden_dir)) == 5


def test_forward(golden_dir: Path) -> None:
    assert check_forward(golden_dir) <= VELOCITY


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablation(golden_dir: Path, case: str) -> None:
    assert check_ablation(golden_dir, case) == COUNTS[case]


def test_pipelines(golden_dir: Path) -> None:
    every = [case for case in cases(golden_dir) if case["key"] != "gen.scale1.0.skip7"]
    assert len(every) == 9
    assert max(check_pipeline(golden_dir, case) for case in every) <= VELOCITY


def test_a_skip_that_leaves_no_step(golden_dir: Path) -> None:
    """The reference draws the base model's picture without a word; here it is a mistake."""
    (case,) = cases(golden_dir, "gen.scale1.0.skip7")
    with pytest.raises(UserError, match="none is left for the edit"):
        check_pipeline(golden_dir, case)
    assert check_pipeline(golden_dir, {**case, "scale": 0.0}) <= VELOCITY


def test_twenty_steps_of_training(golden_dir: Path, tmp_path: Path) -> None:
    """From the recorded start through 20 updates of AdamW: every loss; at four steps the weights' gradients too."""
    folder = golden_dir / "train_fp32"
    log = json.loads((folder / "log.json").read_text())
    method = build(PairEdit, golden_dir, eta=log["eta"], noise_scale=log["noise_scale"])
    as_given(method)
    first = load_file(folder / "step00.safetensors")
    for name in method.adapters.specs:
        prefix = f"{name}."
        fill(
            method,
            {k.removeprefix(prefix): v for k, v in first.items() if k.startswith(prefix)},
            name,
            tmp_path,
        )
    optimizer = torch.optim.AdamW(method.adapters.train("content", "semantic"), lr=2e-3, weight_decay=0.01)
    for step, entry in enumerate(log["log"]):
        record = load_file(folder / f"step{step:02d}.safetensors")
        source, target = record["init_latents_source"], record["init_latents_target"]
        noise = torch.randn(
            1, TOKENS_OF_512, 16, generator=torch.Generator().manual_seed(entry["noise_seed"])
        )
        draws = draws_of(entry["timestep_index"], noise, source)
        losses = backward(method, batch_of(source, target, golden_dir), draws)
        assert losses["content"] == pytest.approx(entry["loss1"], rel=LOSS)
        assert losses["semantic"] == pytest.approx(entry["loss2"], rel=LOSS)
        compared = [check_gradients(method, name, record, f"grad.{name}.") for name in method.adapters.specs]
        assert compared == ([44, 44] if step in (0, 1, 5, 19) else [0, 0])
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("step", [1, 5, 19])
def test_content_of_a_real_picture(golden_dir: Path, tmp_path: Path, step: int) -> None:
    """Loss and gradients of one step from the recorded weights (the record of step 0 is not in the archive)."""
    folder = golden_dir / "real_fp32"
    record = load_file(folder / f"step{step:02d}.safetensors")
    entry = json.loads((folder / "log.json").read_text())["log"][step]
    method = build(Inversion, golden_dir)
    as_given(method)
    fill(
        method,
        {k.removeprefix("content."): v for k, v in record.items() if k.startswith("content.")},
        "content",
        tmp_path,
    )
    method.adapters.train("content")
    source = record["init_latents_source"]
    noise = torch.randn(1, TOKENS_OF_512, 16, generator=torch.Generator().manual_seed(entry["noise_seed"]))
    calls = watch(method.flux)
    losses = backward(
        method, batch_of(source, None, golden_dir), draws_of(entry["timestep_index"], noise, source)
    )
    close(calls[0][0]["hidden_states"], record["x_t_packed"], 1e-6)
    close(calls[0][1], record["model_pred_content_packed"], VELOCITY)
    assert losses == {"content": pytest.approx(entry["loss1"], rel=LOSS)}
    assert check_gradients(method, "content", record, "grad.content.") == 44


def test_text_slider(golden_dir: Path) -> None:
    """What is learnt and the loss, at the recorded latents, whose time does not belong to them (see docs/differences.md)."""
    record = load_file(golden_dir / "losses_onestep.safetensors")
    numbers = json.loads((golden_dir / "losses_onestep.json").read_text())["slider_text"]
    embeds = load_file(golden_dir / "prompt_embeds.safetensors")
    method = known(build(TextSlider, golden_dir, lora=AttentionLoRA(), resolution=128), golden_dir)
    method._underway = lambda noise, text, until: (record["slider_text.x_t"], torch.tensor([0.6]))
    method.adapters.train("semantic")
    batch = {
        "blank": torch.zeros(1, 4, 16, 16),
        "prompt_embeds": embeds["prompt_embeds"][1:4][None, None],
        "pooled": embeds["pooled"][1:4][None, None],
    }
    draws = Recorded([torch.zeros(1, 64, 16)], [torch.tensor([0.0]), torch.tensor([0.4])])
    losses = backward(method, batch, draws)
    parts = [record[f"slider_text.v_{name}"] for name in ("target", "positive", "negative")]
    close(method.wanted(*parts), record["slider_text.gt"], 1e-6)
    assert losses == {"text": pytest.approx(numbers["loss"], rel=1e-4)}
    norm = torch.stack([g.norm() for g in gradients(method, "semantic").values()]).norm()
    assert float(norm) == pytest.approx(numbers["grad_norm"], rel=GRADIENT)
    assert check_gradients(method, "semantic", record, "slider_text.semantic.grad.") > 0


@pytest.mark.parametrize("name", ["known_content", "known_semantic"])
def test_conversions(golden_dir: Path, tmp_path: Path, name: str) -> None:
    """The published file as diffusers' with its scale in B: equal to the recorded conversion, and to ours in a stock model."""
    source = golden_dir / "checkpoints" / f"{name}.pt"
    done = export.export(source, "diffusers", tmp_path / "out.safetensors")
    written = load_file(done.file)
    recorded = load_file(golden_dir / "converted" / f"{name}_baked.safetensors")
    assert written.keys() == recorded.keys()
    assert all(torch.equal(written[key], value) for key, value in recorded.items())
    stock = FluxTransformer2DModel.from_pretrained(golden_dir / "tiny_flux" / "transformer")
    stock.load_lora_adapter(written, adapter_name="theirs")
    record = load_file(golden_dir / "lora_forward.safetensors")
    inputs = {
        "hidden_states": record["hidden_states"],
        "timestep": record["timestep_over_1000"],
        "guidance": record["guidance"],
        "pooled_projections": record["pooled_projections"][None],
        "encoder_hidden_states": record["encoder_hidden_states"][None],
        "txt_ids": record["txt_ids"],
        "img_ids": record["img_ids"][0],
        "return_dict": False,
    }
    theirs = stock(**inputs)[0]
    method = known(build(PairEdit, golden_dir), golden_dir)
    method.adapters.use(**{name.removeprefix("known_"): 1})
    assert torch.equal(theirs, method.flux.transformer(**inputs)[0])
    close(theirs, record["out.c1_s0" if name == "known_content" else "out.c0_s1"], VELOCITY)


@pytest.mark.parametrize("kind", ["baked", "alpha_keys", "onetrainer"])
def test_files_of_others(golden_dir: Path, kind: str) -> None:
    """The same weights in other dialects are the same adapter; without alpha its scale is 1, as it is meant."""
    file = golden_dir / "converted" / f"known_semantic_{kind}.safetensors"
    lora = replace(AttentionLoRA(), alpha=16.0 if kind == "baked" else 1.0)
    method = build(PairEdit, golden_dir, lora=lora)
    method.adapters.load(file, "semantic")
    original = known(build(PairEdit, golden_dir), golden_dir)
    assert method.adapters.strength("semantic") == original.adapters.strength("semantic")


def test_a_file_at_the_wrong_scale(golden_dir: Path) -> None:
    strengths = []
    for kind in ("baked", "noscale"):
        method = build(PairEdit, golden_dir, lora=replace(AttentionLoRA(), alpha=16.0))
        method.adapters.load(golden_dir / "converted" / f"known_semantic_{kind}.safetensors", "semantic")
        strengths.append(method.adapters.strength("semantic"))
    assert strengths[1] == 16 * strengths[0]


def test_saved_as_the_reference_saves(golden_dir: Path, tmp_path: Path) -> None:
    done = export.export(golden_dir / "checkpoints" / "known_content.pt", "pairedit", tmp_path / "out.pt")
    ours = torch.load(done.file, weights_only=True)
    theirs = torch.load(golden_dir / "checkpoints" / "known_content_bf16.pt", weights_only=True)
    assert list(ours) == list(theirs)
    assert all(ours[k].dtype == v.dtype and torch.equal(ours[k], v) for k, v in theirs.items())


def test_a_step_before_the_skip_is_the_base_models(golden_dir: Path) -> None:
    """``>`` for pictures of prompts and ``>=`` for photographs, as published."""
    method = known(build(PairEdit, golden_dir), golden_dir)
    used: list[dict[str, float]] = []
    method.adapters.use = lambda **scales: used.append(scales)
    method.flux.velocity = lambda x_t, *args, **kwargs: x_t
    for photo in (False, True):
        how = Drawing(
            text=Text(prompt_embeds=torch.zeros(0), pooled=torch.zeros(0)),
            grid=(1, 1), guidance=1.0, scale=0.5, skip=2, until=8, photo=photo,
        )  # fmt: skip
        velocity = method.steered(how)
        for step in (2, 3):
            velocity(torch.zeros(1, 1, 1), torch.zeros(1), step)
    edited, photo = {"semantic": 0.5}, {"photo": 1.0}
    assert used == [{}, edited, edited, photo, edited, photo]
