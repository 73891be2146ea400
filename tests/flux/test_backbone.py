"""Our verbs are diffusers' own: texts, velocity, Euler, decoding, packing; and what is released comes back."""

import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxFillPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from transformers import CLIPTextModel, T5EncoderModel

from pentimento import images
from pentimento.errors import UserError
from pentimento.flux import sampling
from pentimento.flux.backbone import Flux
from pentimento.flux.config import FluxConfig
from pentimento.method import EditSettings, Example
from pentimento.methods.influxedit import InFluxEdit
from pentimento.train import Draws

PROMPT = "add red glasses, please"


@pytest.fixture
def stock_fill(tiny_fill):
    pipe = FluxFillPipeline.from_pretrained(tiny_fill)
    pipe.text_encoder_2.set_attn_implementation("eager")  # as FLUX was trained, and as ours
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pack_is_the_pipelines_and_unpack_its_inverse():
    latents = torch.randn(2, 16, 6, 10)
    packed = sampling.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(sampling.unpack(packed, (3, 5)), latents)


def test_position_ids_are_the_pipelines():
    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(sampling.image_ids((3, 5), torch.device("cpu")), expected)


def test_every_mask_pixel_has_its_own_channel():
    """Channel 8 * row + column inside a latent cell, then the cell's place in its 2x2 token."""
    for x, y in ((0, 0), (5, 3), (15, 15), (20, 9), (31, 2)):
        mask = torch.zeros(1, 1, 16, 32)
        mask[0, 0, y, x] = 1
        token, channel = divmod(int(sampling.pack_mask(mask).flatten().argmax()), 256)
        inside = 8 * (y % 8) + x % 8
        dy, dx = y // 8 % 2, x // 8 % 2
        assert (token, channel) == (x // 16, inside * 4 + dy * 2 + dx)


def test_mask_tokens_are_the_fill_pipelines(fill, stock_fill):
    mask = Image.fromarray((np.random.default_rng(0).random((32, 48)) > 0.5).astype(np.uint8) * 255)
    pixels = stock_fill.mask_processor.preprocess(mask, height=32, width=48)
    picture = torch.zeros(1, 3, 32, 48)
    expected, _ = stock_fill.prepare_mask_latents(
        pixels, picture, 1, 16, 1, 32, 48, torch.float32, torch.device("cpu"), torch.Generator()
    )
    assert torch.equal(fill.mask_tokens([mask]), expected)


def test_prompts_are_encoded_as_stock_does_and_remembered(fill, stock_fill):
    prompts = [PROMPT, "x", PROMPT, ""]
    with torch.no_grad():
        embeds, pooled, _ = stock_fill.encode_prompt(prompts, max_sequence_length=48)
        alone, _, _ = stock_fill.encode_prompt([PROMPT, "x", ""], max_sequence_length=48)
    text = fill.encode_prompts(prompts, 48)
    assert torch.equal(text.prompt_embeds, alone[[0, 1, 0, 2]])
    torch.testing.assert_close(text.prompt_embeds, embeds)
    torch.testing.assert_close(text.pooled, pooled)
    fill.release_encoders()
    assert fill._text is None and fill._vae is None
    assert torch.equal(fill.encode_prompts(prompts, 48).prompt_embeds, text.prompt_embeds)
    assert fill._text is None, "remembered prompts need no text encoder"
    assert fill.encode_prompts(["new"], 48).prompt_embeds.shape == (1, 48, 32)
    assert fill._text is not None, "a new prompt brings the encoders back"


def test_only_the_last_prompts_are_remembered(fill):
    fill.encode_prompts([f"p{i}" for i in range(80)], 8)
    assert len(fill._prompts) == 64 and ("p79", 8) in fill._prompts and ("p0", 8) not in fill._prompts
    fill.encode_prompts(["p16"], 8)  # the oldest, but used again
    fill.encode_prompts(["new"], 8)
    assert ("p16", 8) in fill._prompts and ("p17", 8) not in fill._prompts


def test_posterior_is_the_vaes(fill, stock_fill, picture):
    pictures = [picture(1), picture(2)]
    mean, std = fill.encode_images(pictures)
    pixels = stock_fill.image_processor.preprocess(pictures)
    assert torch.equal(images.to_tensor(pictures), pixels)
    with torch.no_grad():
        # Frozen and contiguous as ours: else torch takes other kernels, which sum in another order.
        stock_fill.vae.requires_grad_(False)
        dist = stock_fill.vae.encode(pixels.contiguous()).latent_dist
    assert torch.equal(mean, dist.mean) and torch.equal(std, dist.std)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    z = dist.sample(torch.Generator().manual_seed(3))
    assert torch.equal(fill.latents(mean, std, noise), sampling.pack((z - 0.1159) * 0.3611))


@pytest.mark.parametrize("guidance", [1.0, 30.0])
def test_velocity_is_the_transformers_call(fill, stock_fill, guidance):
    x, condition = torch.randn(2, 12, 64), torch.randn(2, 12, 320)
    sigma = fill.scheduler.sigmas[[100, 813]]
    text = fill.encode_prompts([PROMPT, "x"], 16)
    ours = fill.velocity(x, sigma, text, grid=(3, 4), guidance=guidance, condition=condition)
    expected = stock_fill.transformer(
        hidden_states=torch.cat((x, condition), dim=2),
        timestep=fill.scheduler.timesteps[[100, 813]] / 1000,
        guidance=torch.full((2,), guidance),
        pooled_projections=text.pooled,
        encoder_hidden_states=text.prompt_embeds,
        txt_ids=torch.zeros(16, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 3, 4, torch.device("cpu"), torch.float32),
        return_dict=False,
    )[0]
    assert torch.equal(ours, expected)


def test_dev_pictures_are_stock_pictures(dev, tiny_dev):
    pipe = FluxPipeline.from_pretrained(tiny_dev)
    pipe.set_progress_bar_config(disable=True)
    noise = sampling.pack(torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(0)))
    settings = {
        "num_inference_steps": 5,
        "guidance_scale": 3.5,
        "max_sequence_length": 32,
        "height": 48,
        "width": 64,
    }
    expected = pipe(PROMPT, latents=noise, **settings).images[0]
    text = dev.encode_prompts([PROMPT], 32)
    latents = dev.sample(lambda x, s, _: dev.velocity(x, s, text, grid=(3, 4), guidance=3.5), noise, 5)
    assert dev.decode(latents, (64, 48))[0].tobytes() == expected.tobytes()


def test_sampling_sigmas_are_the_pipelines(fill, stock_fill):
    for steps, tokens in ((1, 16), (4, 256), (28, 1024), (50, 4096)):
        scheduler = stock_fill.scheduler
        scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15)
        )
        assert torch.equal(fill.sigmas(steps, tokens), scheduler.sigmas)
    assert len(fill.scheduler.sigmas) == 1000, "the table of training stays"


def test_training_times_run_through_the_table():
    class Table:
        sigmas = torch.arange(1000, 0, -1) / 1000
        config = {"num_train_timesteps": 1000}

    u = torch.tensor([0.0, 0.0937, 0.9561, 0.99999994, 1.0])
    assert sampling.training_sigmas(Table(), u).tolist() == pytest.approx([1.0, 0.907, 0.044, 0.001, 0.001])


def test_densities_are_diffusers():
    state = torch.Generator().manual_seed(5)
    uniform = torch.rand(64, generator=state)
    expected = compute_density_for_timestep_sampling(
        "mode", 64, mode_scale=1.29, generator=state.manual_seed(5)
    )
    assert torch.equal(sampling.density("mode", uniform, 1.29), expected)
    assert torch.equal(sampling.density("cosmap", uniform, 1.29), uniform)


def test_loss_weights():
    sigma = torch.tensor([0.1, 0.5])
    assert sampling.loss_weights("sigma_sqrt", sigma).tolist() == pytest.approx([100, 4])
    assert sampling.loss_weights("cosmap", sigma).tolist() == pytest.approx([2 / np.pi / 0.82, 4 / np.pi])
    assert sampling.loss_weights("none", sigma).tolist() == [1, 1]


def test_euler_integrates_a_constant_velocity_exactly():
    x, target = torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    result = sampling.euler(lambda *_: x - target, x, torch.tensor([1.0, 0.7, 0.25, 0.0]))
    torch.testing.assert_close(result, target)


def test_defaults_on_a_cpu(fill):
    assert fill.dtype == torch.float32 and fill.device.type == "cpu"
    assert not fill.transformer.gradient_checkpointing and not fill.transformer.training
    assert not any(p.requires_grad for p in fill.transformer.parameters())
    assert (fill.native_resolution, fill.native_text_length) == (64, 64)


def test_fp16_keeps_the_autoencoder_in_fp32(tiny_fill):
    half = Flux.load(FluxConfig(weights=str(tiny_fill), device="cpu", precision="fp16"), "fill")
    assert half.transformer.dtype == torch.float16 and half.vae.dtype == torch.float32


def test_bf16_latents_are_stock_latents_too(tiny_dev):
    """Rounding of times, latents and sums follows the pipelines also below float32."""
    pipe = FluxPipeline.from_pretrained(tiny_dev, dtype=torch.bfloat16)
    pipe.text_encoder_2.set_attn_implementation("eager")
    pipe.set_progress_bar_config(disable=True)
    brain = Flux.load(FluxConfig(weights=str(tiny_dev), device="cpu", precision="bf16"), "dev")
    noise = sampling.pack(torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    settings = {
        "num_inference_steps": 7,
        "guidance_scale": 3.5,
        "max_sequence_length": 16,
        "height": 64,
        "width": 64,
    }
    expected = pipe(PROMPT, latents=noise, output_type="latent", **settings).images
    text = brain.encode_prompts([PROMPT], 16)
    latents = brain.sample(lambda x, s, _: brain.velocity(x, s, text, grid=(4, 4), guidance=3.5), noise, 7)
    assert latents.dtype == torch.bfloat16 and torch.equal(latents, expected)


def test_gradient_checkpointing_changes_no_gradient(tiny_fill):
    gradients = []
    for checkpointing in (False, True):
        config = FluxConfig(weights=str(tiny_fill), device="cpu", gradient_checkpointing=checkpointing)
        flux = Flux.load(config, "fill")
        text = flux.encode_prompts([PROMPT], 16)
        torch.manual_seed(0)
        x = torch.randn(1, 16, 64, requires_grad=True)
        sigma, condition = torch.tensor([0.5]), torch.randn(1, 16, 320)
        flux.velocity(x, sigma, text, grid=(4, 4), guidance=1, condition=condition).square().mean().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("name", "near"), [("natve", "native"), ("flash2", "flash")])
def test_unknown_attention_backend_names_the_nearest(tiny_fill, name, near):
    with pytest.raises(UserError, match=f"attention.*{name}.*Did you mean {near}"):
        Flux.load(FluxConfig(weights=str(tiny_fill), device="cpu", attention=name), "fill")


def test_attention_backend_that_is_not_installed(tiny_fill):
    with pytest.raises(UserError, match="attention: 'sage' is not usable.*sageattention"):
        Flux.load(FluxConfig(weights=str(tiny_fill), device="cpu", attention="sage"), "fill")


def test_attention_backend_is_set(tiny_fill):
    flux = Flux.load(FluxConfig(weights=str(tiny_fill), device="cpu", attention="_native_math"), "fill")
    assert flux.transformer.transformer_blocks[0].attn.processor._attention_backend.value == "_native_math"
    flux.transformer.reset_attention_backend()


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "tpu:0"])
def test_absent_device(tiny_fill, device):
    with pytest.raises(UserError, match="backbone.device"):
        Flux.load(FluxConfig(weights=str(tiny_fill), device=device), "fill")


def test_repeated_blocks_are_compiled_when_asked(tiny_fill, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(type(self).__name__)
    )
    Flux.load(FluxConfig(weights=str(tiny_fill), device="cpu", compile=True), "fill")
    assert compiled == ["FluxTransformerBlock"] * 2 + ["FluxSingleTransformerBlock"] * 2


def test_cudnn_attention_is_off_on_cuda(tiny_fill, monkeypatch):
    switched = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    monkeypatch.setattr("pentimento.pretrained.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("pentimento.flux.loading.locate", lambda *_: (_ for _ in ()).throw(UserError("stop")))
    with pytest.raises(UserError, match="stop"):
        Flux.load(FluxConfig(weights=str(tiny_fill), precision="bf16"), "fill")
    assert switched == [False]


@pytest.fixture
def turns(monkeypatch):
    """The parts that are on the device after each move: to cpu:0 is onto it, to cpu away from it. All run there only."""
    parts = {
        FluxTransformer2DModel: "transformer",
        AutoencoderKL: "vae",
        CLIPTextModel: "text",
        T5EncoderModel: "text",
    }
    present: weakref.WeakSet = weakref.WeakSet()
    seen: list[set[str]] = []

    def spy(kind):
        move, run = kind.to, kind.forward if kind is not AutoencoderKL else kind.encode

        def to(self, device):
            (present.add if device == torch.device("cpu:0") else present.discard)(self)
            seen.append({parts[type(one)] for one in present})
            return move(self, device)

        def forward(self, *args, **kwargs):
            assert self in present, f"{kind.__name__} runs elsewhere"
            return run(self, *args, **kwargs)

        monkeypatch.setattr(kind, "to", to)
        monkeypatch.setattr(kind, "encode" if kind is AutoencoderKL else "forward", forward)

    for kind in parts:
        spy(kind)
    return seen


def offloaded(model, offload="model", mode="edit") -> InFluxEdit:
    config = FluxConfig(weights=str(model), device="cpu:0", offload=offload)
    return InFluxEdit.load(config, InFluxEdit.Config(mode=mode, max_sequence_length=24))


@pytest.mark.parametrize("mode", ["edit", "split"])
def test_offloaded_parts_take_turns_and_the_picture_is_the_same(tiny_fill, turns, picture, mode):
    results = []
    for offload in ("none", "model"):
        gc.collect()
        turns.clear()
        method = offloaded(tiny_fill, offload, mode)
        for seed in (1, 2):
            example = Example(source=picture(seed), prompt=f"make it rain {seed}")
            results.append(method.edit(example, EditSettings(seed=seed, steps=3)))
        if offload == "none":
            assert turns[-1] == {"transformer", "vae", "text"}
        del method
    assert results[:2] == results[2:] and results[0] != results[1]
    assert max(map(len, turns)) == 1, "never two at a time"
    runs = [
        next(iter(part))
        for part, before in zip(turns, [set(), *turns], strict=False)
        if part and part != before
    ]
    assert runs == ["vae", "text", "transformer", "vae", "text", "transformer", "vae"]


def test_offloading_while_training(tiny_fill, turns, picture):
    """The encoders take turns while the transformer waits, then it stays; samples bring them back one at a time."""
    method = offloaded(tiny_fill)
    assert turns == [], "nothing is on the device before it is needed"
    method.adapters.train("edit")
    pair = Example(source=picture(1), target=picture(2), prompt="x")
    batch = {**method.encode([pair]), **method.encode_text(["x"])}
    assert max(map(len, turns)) == 1 and not any("transformer" in part for part in turns)
    method.release_encoders()
    assert turns[-1] == {"transformer"}
    turns.clear()
    for _, loss in method.losses(batch, Draws([(0, 0)], torch.device("cpu"))):
        loss.backward()
    assert turns == []
    method.edit(Example(source=picture(3), prompt="new"), EditSettings(steps=1))
    assert all("transformer" in part and len(part) <= 2 for part in turns)
    assert {"transformer", "vae"} in turns and {"transformer", "text"} in turns


def test_running_out_of_memory_while_moving_leaves_no_wrong_belief(tiny_fill, monkeypatch):
    flux = Flux.load(FluxConfig(weights=str(tiny_fill), device="cpu:0", offload="model"), "fill")
    flux.encode_prompts(["x"], 8)
    with monkeypatch.context() as patch:

        def full(self, device):
            raise torch.OutOfMemoryError("full")

        patch.setattr(AutoencoderKL, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            flux.encode_pixels(torch.zeros(1, 3, 16, 16))
    assert flux._present == set()
    assert flux.encode_pixels(torch.zeros(1, 3, 16, 16)).mean.shape == (1, 16, 2, 2)
    assert flux._present == {"vae"}
