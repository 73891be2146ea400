"""ICEdit: what it shows the model, what it trains, and the geometry of its edits."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from steps import Noise, awaken, encoded, flow

from pentimento import images, recipe
from pentimento.errors import UserError
from pentimento.flux import sampling
from pentimento.flux.backbone import Flux
from pentimento.method import EditSettings, Example
from pentimento.methods.icedit import TARGETS, TEMPLATE, DiptychExperts, DiptychLoRA, ICEdit

Config = ICEdit.Config
SMALL = DiptychLoRA(rank=2)
FEW = EditSettings(seed=3, steps=3)


@pytest.fixture
def method(fill_config):
    def build(**config) -> ICEdit:
        return ICEdit.load(
            fill_config, Config(**{"lora": SMALL, "resolution": 32, "max_sequence_length": 40, **config})
        )

    return build


def test_the_diptych_is_source_and_target_with_the_right_hidden(method, pairs):
    made = method()
    batch = made.encode(pairs[:1])
    halves = [p.resize((32, 32), Image.Resampling.BICUBIC) for p in (pairs[0].source, pairs[0].target)]
    canvas = images.to_tensor([images.join(*halves)])
    assert torch.equal(batch["x0_mean"], made.flux.encode_pixels(canvas).mean)
    canvas[..., 32:] = 0
    assert torch.equal(batch["condition_mean"], made.flux.encode_pixels(canvas).mean)


def test_the_text_is_the_published_one(method):
    assert TEMPLATE.format(prompt="x") == (
        "A diptych with two side-by-side images of the same scene. On the right, the scene is exactly the same as on the "
        "left but x"
    )
    made = method()
    assert made.text("add a {hat}") == TEMPLATE.replace("{prompt}", "add a {hat}")
    assert made.text("") == " "
    assert torch.equal(
        made.encode_text([""])["prompt_embeds"], made.flux.encode_prompts([" "], 40).prompt_embeds
    )


def test_draws_come_in_the_references_order(method, pairs):
    noise = Noise(1, 2, 3)
    made = method()
    flow(made, encoded(made, pairs), noise)
    assert noise.asked == [(3, 16, 4, 8)] * 2 + [(3,), (3, 8, 64)]


def test_a_batchs_loss_is_the_mean_of_its_rows(method, pairs):
    made = awaken(method())
    together = flow(made, encoded(made, pairs), Noise(1, 2, 3))
    alone = [flow(made, encoded(made, [p]), Noise(i + 1)) for i, p in enumerate(pairs)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=0)


def test_loss_on_the_right_half_is_the_part_of_the_whole(method, pairs, monkeypatch):
    """The mean over both halves is the mean of the two halves' means; the left one has no part in the other."""
    both, right = method(), method(loss_on="right")
    batch = encoded(both, pairs)
    zero = torch.zeros(3, 8, 64)
    for made in (both, right):
        monkeypatch.setattr(made.flux, "velocity", lambda *a, **k: zero)
    _, target = both.flow(batch, Noise(1, 2, 3))
    grid = (target**2).reshape(3, 2, 4, 64)
    torch.testing.assert_close(flow(right, batch, Noise(1, 2, 3)), grid[:, :, 2:].mean())
    torch.testing.assert_close(flow(both, batch, Noise(1, 2, 3)), grid.mean())


def test_offset_noise_is_one_value_per_channel(method, pairs):
    batch = encoded(method(), pairs)
    _, plain = method().flow(batch, Noise(1, 2, 3))
    _, moved = method(offset_noise=0.1).flow(batch, Noise(1, 2, 3))
    offset = moved - plain
    assert offset.abs().max() > 0.1
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset), rtol=0, atol=1e-6)


def test_only_the_adapter_is_trained(method, pairs):
    made = method()
    trained = made.adapters.train("edit")
    flow(made, encoded(made, pairs), Noise(1, 2, 3)).backward()
    named = [n for n, p in made.flux.transformer.named_parameters() if p.grad is not None]
    assert len(named) == len(trained) and all(".edit." in n for n in named)
    assert any(n.startswith("x_embedder.") for n in named)
    assert not any("add_" in n or "ff_context" in n or "norm1_context" in n for n in named)


def test_scale_0_is_the_base_model(method, pairs):
    untrained = method().edit(pairs[0], FEW)
    made = awaken(method())
    assert made.edit(pairs[0], replace(FEW, scale=0.0)).tobytes() == untrained.tobytes()
    assert made.edit(pairs[0], FEW).tobytes() != untrained.tobytes()


def test_the_same_seed_starts_from_the_same_noise_at_any_number_of_steps(method, pairs):
    made = awaken(method())
    starts = []
    made.flux.transformer.register_forward_pre_hook(
        lambda m, a, kwargs: starts.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    made.edit(pairs[0], replace(FEW, steps=2))
    made.edit(pairs[0], replace(FEW, steps=5))
    assert torch.equal(starts[0], starts[2])
    starts.clear()
    made.edit(pairs[0], replace(FEW, seed=4, steps=1))
    made.edit(pairs[0], replace(FEW, steps=1))
    assert not torch.equal(starts[0][..., :64], starts[1][..., :64])


@pytest.mark.parametrize("size", [(1, 1), (12000, 7), (5, 3000), (333, 500), (64, 64), (31, 17)])
def test_any_size_in_the_same_size_out(method, size):
    result = method(steps=1).edit(
        Example(source=Image.new("RGB", size, (90, 120, 30)), prompt="x"), EditSettings()
    )
    assert result.size == size and result.mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_pictures_given_from_python_may_have_any_mode(method, picture, mode):
    assert method(steps=1).edit(Example(source=picture().convert(mode)), EditSettings()).mode == "RGB"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [((512, 512), (512, 512)), ((640, 480), (512, 384)), ((512, 511), (512, 496)), ((300, 75), (512, 128)),
     ((600, 400), (512, 336)), ((100, 1000), (204 // 16 * 16, 2048)), ((9000, 10), (512, 16))],
)  # fmt: skip
def test_edits_are_512_wide_and_lose_no_rows(method, given, wanted):
    assert method(resolution=512).edit_size(*given) == wanted


def test_training_squeezes_to_squares_unless_told(method):
    assert method().size(640, 480) == (32, 32)
    assert method(shape="aspect", resolution=64).size(640, 480) == (64, 48)


def test_no_row_of_the_result_is_black(method, picture):
    """The reference cut at the height before rounding and left up to 15 black rows."""
    source = Image.new("RGB", (32, 41), (200, 180, 160))
    made = method(steps=2)
    result = made.edit(Example(source=source, prompt="x"), EditSettings())
    assert result.size == (32, 41)
    assert all(
        max(result.crop((0, y, 32, y + 1)).getextrema()[c][1] for c in range(3)) > 0 for y in range(41)
    )


def test_native_settings_of_the_backbone(fill_config, monkeypatch):
    made = ICEdit.load(fill_config, Config())
    assert (made.resolution, made.text_length) == (64, 64)
    monkeypatch.setattr(Flux, "native_resolution", 1024)
    assert ICEdit.load(fill_config, Config()).resolution == 512


@pytest.mark.parametrize("missing", ["source", "target"])
def test_a_missing_half_is_named(method, pairs, missing):
    with pytest.raises(UserError, match=f"p1: .*no {missing} picture"):
        method().encode([pairs[0], replace(pairs[1], **{missing: None})])


def test_fingerprint_follows_what_is_encoded(method):
    base = method().fingerprint()
    assert base == method(steps=3, guidance=2.0, loss_on="right", lora=DiptychLoRA(rank=1)).fingerprint()
    others = [{"shape": "aspect"}, {"resolution": 48}, {"max_sequence_length": 20}, {"prompt_template": "x {prompt}"}, {"dropped_text": ""}]  # fmt: skip
    assert len({base, *(method(**o).fingerprint() for o in others)}) == 6


def test_metadata_is_plain_json(method):
    described = method(steps=9).metadata()
    assert json.loads(json.dumps(described)) == described
    assert (described["steps"], described["resolution"], described["guidance"]) == (9, 32, 50.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resolution": 8}, "resolution must be a multiple of 16"),
        ({"resolution": 500}, "resolution must be a multiple of 16"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
        ({"prompt_template": "no place"}, "prompt_template must hold"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": -1.0}, "guidance must not be negative"),
        ({"offset_noise": float("nan")}, "offset_noise"),
    ],
)
def test_impossible_settings(config, message):
    with pytest.raises(ValueError, match=message):
        Config(**config)


def test_dev_weights_are_refused(dev):
    with pytest.raises(UserError, match="needs FLUX.1 Fill"):
        ICEdit(dev, Config())


def test_views_are_what_fill_is_given(method, pairs):
    made = method()
    views = made.views(pairs[0])
    assert {v.size for v in views.values()} == {(64, 32)}
    assert torch.equal(made.flux.encode_images([views["target"]]).mean, made.encode(pairs[:1])["x0_mean"])
    assert sampling.pack_mask(images.mask_to_tensor([views["mask-white-changes"]])).shape == (1, 8, 256)


EXPERTS = DiptychExperts(rank=2, expert_rank=2)


def test_experts_train_and_their_usage_is_told(method, pairs):
    made = method(lora=EXPERTS)
    trained = made.adapters.train("edit")
    losses = dict(made.losses(encoded(made, pairs), Noise(1, 2, 3)))
    assert list(losses) == ["flow", "expert_0", "expert_1", "expert_2", "expert_3"]
    assert sum(losses[f"expert_{i}"].item() for i in range(4)) == pytest.approx(1)
    losses["flow"].backward()
    routers = [p for n, p in made.flux.transformer.named_parameters() if "lora_route" in n]
    assert len(routers) == 4 and all(p.grad is None or not p.grad.any() for p in routers), (
        "top 1: no gradient"
    )
    assert len(trained) > 8


def test_the_balancing_loss_reaches_the_routers(method, pairs):
    made = method(lora=EXPERTS, balance_weight=0.5)
    made.adapters.train("edit")
    losses = dict(made.losses(encoded(made, pairs), Noise(1, 2, 3)))
    total = losses["flow"] + 0.5 * losses["balance"]
    torch.testing.assert_close(losses["flow_and_balance"], total)
    losses["flow_and_balance"].backward()
    routers = [p for n, p in made.flux.transformer.named_parameters() if "lora_route" in n]
    assert all(p.grad is not None and p.grad.any() for p in routers)


def test_a_balancing_loss_needs_experts():
    with pytest.raises(ValueError, match="balance_weight is for experts"):
        Config(balance_weight=0.1)


@pytest.mark.parametrize("name", ["icedit", "icedit-moe", "icedit-768", "icedit-1024"])
def test_published_values_of_the_recipes(name):
    loaded = recipe.load(name, ["backbone.weights=black-forest-labs/FLUX.1-Fill-dev", "data.root=shards"])
    config, stage, data = loaded.config, loaded.stages["edit"], loaded.data
    assert (stage.optimizer, stage.lr, stage.weight_decay, stage.betas, stage.eps) == (
        "prodigy", 1.0, 0.01, (0.9, 0.999), 1e-8,
    )  # fmt: skip
    assert stage.prodigy_bias_correction and stage.prodigy_safeguard_warmup and stage.prodigy_decouple
    assert (stage.max_grad_norm, stage.save_every, loaded.watch.every) == (0.5, 1000, 1000)
    assert (stage.schedule, stage.batch_size * stage.accumulate) == ("constant", 2)
    assert (data.kind, data.caption_dropout, data.workers, data.crop_noise) == ("icedit", 0.1, 5, True)
    assert (config.guidance, config.sampling_guidance, config.steps, loaded.watch.steps) == (
        1.0,
        50.0,
        28,
        50,
    )
    assert (config.lora.rank, config.lora.alpha, config.lora.init, config.lora.targets) == (
        32,
        None,
        "gaussian",
        TARGETS,
    )
    assert (config.loss_on, config.offset_noise, config.shape, config.dropped_text) == (
        "both",
        0.0,
        "square",
        " ",
    )
    assert config.resolution == {"icedit-768": 768, "icedit-1024": 1024}.get(name)
    assert loaded.seed == 666
    if name == "icedit-moe":
        lora = config.lora
        assert (lora.experts, lora.expert_rank, lora.top_k, lora.gate) == (4, 32, 1, "topk-softmax")
        assert (stage.batch_size, stage.accumulate, loaded.backbone.gradient_checkpointing) == (1, 2, False)
        assert config.balance_weight == 0
    else:
        assert (stage.batch_size, stage.accumulate) == (2, 1)
