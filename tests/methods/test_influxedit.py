"""InFluxEdit: what it shows the model, what it trains, and that its pictures are stock diffusers' pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from steps import Noise, awaken, encoded, flow

from pentimento import images
from pentimento.errors import UserError
from pentimento.flux import sampling
from pentimento.flux.backbone import Flux
from pentimento.method import EditSettings, Example
from pentimento.methods.influxedit import TARGETS, EditLoRA, InFluxEdit

Config = InFluxEdit.Config
SMALL = EditLoRA(rank=2)
FEW = EditSettings(seed=3, steps=3)


@pytest.fixture
def method(fill_config):
    def build(**config) -> InFluxEdit:
        config = {"lora": SMALL, "resolution": 32, "max_sequence_length": 16, **config}
        return InFluxEdit.load(fill_config, Config(**config))

    return build


@pytest.mark.parametrize(("mode", "columns"), [("edit", 4), ("split", 8)])
def test_encode_has_a_row_per_pair(method, pairs, mode, columns):
    made = method(mode=mode)
    batch = made.encode(pairs)
    assert set(batch) == {"x0_mean", "x0_std", "condition_mean", "condition_std"}
    assert {tuple(v.shape) for v in batch.values()} == {(3, 16, 4, columns)}
    assert not any(v.requires_grad for v in batch.values())
    again = made.encode(pairs)
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    text = made.encode_text(["a", "b"])
    assert not set(text) & set(batch) and text["prompt_embeds"].shape[:2] == (2, 16)


def test_edit_shows_the_whole_source_and_draws_the_target(method, pairs):
    made = method()
    batch = made.encode(pairs)
    source = made.flux.encode_images([images.resize(e.source, (32, 32)) for e in pairs])
    target = made.flux.encode_images([images.resize(e.target, (32, 32)) for e in pairs])
    assert torch.equal(batch["condition_mean"], source.mean) and torch.equal(batch["x0_std"], target.std)


def test_split_hides_the_right_half_under_grey(method, pairs):
    made = method(mode="split")
    batch = made.encode(pairs[:1])
    source, target = (images.resize(p, (32, 32)) for p in (pairs[0].source, pairs[0].target))
    canvas = images.to_tensor([images.join(source, target)])
    assert torch.equal(batch["x0_mean"], made.flux.encode_pixels(canvas).mean)
    shown = canvas * (images.mask_to_tensor([images.half_mask((64, 32))]) < 0.5)
    torch.testing.assert_close(batch["condition_mean"], made.flux.encode_pixels(shown).mean)


@pytest.mark.parametrize(
    ("config", "left", "right"),
    [({}, 1, 1), ({"mask": "black"}, 0, 0), ({"mode": "split"}, 0, 1)],
)
def test_mask_channels(method, config, left, right):
    made = method(**config)
    latents = torch.zeros(1, 16, 4, 8)
    condition = made._condition(latents, latents, latents)
    assert condition.shape == (1, 8, 320)
    mask = condition[..., 64:].reshape(2, 4, 256)
    assert (mask[:, :2] == left).all() and (mask[:, 2:] == right).all()


def test_draws_come_in_the_references_order(method, pairs):
    noise = Noise(1, 2, 3)
    made = method()
    flow(made, encoded(made, pairs), noise)
    assert noise.asked == [(3, 16, 4, 4)] * 3 + ["uniform"]
    made, noise = method(weighting_scheme="logit_normal"), Noise(1, 2, 3)
    flow(made, encoded(made, pairs), noise)
    assert noise.asked == [(3, 16, 4, 4)] * 3 + [(3,)]


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"])
def test_a_batchs_loss_is_the_mean_of_its_rows(method, pairs, scheme):
    made = method(weighting_scheme=scheme)
    together = flow(made, encoded(made, pairs), Noise(1, 2, 3))
    alone = [flow(made, encoded(made, [p]), Noise(i + 1)) for i, p in enumerate(pairs)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=0)


def test_loss_of_a_perfect_prediction_is_zero(method, pairs, monkeypatch):
    made = method()
    batch = encoded(made, pairs)
    noise = Noise(1, 2, 3)
    drawn = [noise.normal_like(batch["x0_mean"]) for _ in range(3)]
    velocity = sampling.pack(drawn[2]) - made.flux.latents(batch["x0_mean"], batch["x0_std"], drawn[0])
    monkeypatch.setattr(made.flux, "velocity", lambda *args, **kwargs: velocity)
    assert flow(made, batch, Noise(1, 2, 3)) == 0


def test_only_the_adapter_is_trained(method, pairs):
    made = method()
    trained = made.adapters.train("edit")
    flow(made, encoded(made, pairs), Noise(1, 2, 3)).backward()
    with_gradient = [n for n, p in made.flux.transformer.named_parameters() if p.grad is not None]
    assert len(with_gradient) == len(trained) and all(
        "lora_" in name and ".edit." in name for name in with_gradient
    )


def test_published_targets_of_the_lora(method):
    """All twelve in double blocks, three in single blocks; two matrices each."""
    trained = method().adapters.train("edit")
    assert len(trained) == 2 * (2 * len(TARGETS) + 2 * 3)
    assert all(p.dtype == torch.float32 for p in trained)


def test_train_embedder_trains_the_input_layer(method, pairs):
    made = method(train_embedder=True)
    trained = made.adapters.train("edit")
    assert (
        sum(p.numel() for p in trained) - sum(p.numel() for p in method().adapters.train("edit")) == 385 * 32
    )
    base = {
        n: p.clone() for n, p in made.flux.transformer.named_parameters() if "base" in n or "original" in n
    }
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    before = flow(made, encoded(made, pairs), Noise(1, 2, 3))
    before.backward()
    optimizer.step()
    assert flow(made, encoded(made, pairs), Noise(1, 2, 3)) != before
    after = dict(made.flux.transformer.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())


def test_bf16_backbone_with_float32_adapters(fill_config, pairs):
    made = InFluxEdit.load(
        replace(fill_config, precision="bf16"), Config(lora=SMALL, train_embedder=True, resolution=32)
    )
    trained = made.adapters.train("edit")
    flow(made, encoded(made, pairs), Noise(1, 2, 3)).backward()
    assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}
    assert made.edit(pairs[0], FEW).size == (64, 64)


@pytest.mark.parametrize("mode", ["edit", "split"])
def test_scale_0_is_the_base_model(method, pairs, mode):
    untrained = method(mode=mode).edit(pairs[0], FEW)
    made = awaken(method(mode=mode, train_embedder=True))
    assert made.edit(pairs[0], replace(FEW, scale=0.0)).tobytes() == untrained.tobytes()
    assert made.edit(pairs[0], FEW).tobytes() != untrained.tobytes()
    assert made.edit(pairs[0], replace(FEW, scale=0.5)).tobytes() != made.edit(pairs[0], FEW).tobytes()


def test_edits_repeat_and_follow_their_settings(method, pairs):
    made = awaken(method())
    first = made.edit(pairs[0], FEW)
    assert made.edit(pairs[0], FEW).tobytes() == first.tobytes()
    made.release_encoders()
    assert made.edit(pairs[0], FEW).tobytes() == first.tobytes(), "encoders come back"
    others = (replace(FEW, seed=4), replace(FEW, steps=4), replace(FEW, guidance=1.0))
    assert all(made.edit(pairs[0], settings).tobytes() != first.tobytes() for settings in others)
    assert made.edit(replace(pairs[0], prompt="other"), FEW).tobytes() != first.tobytes()
    own = made.edit(pairs[0], replace(FEW, guidance=made.config.sampling_guidance))
    assert own.tobytes() == first.tobytes()


@pytest.mark.parametrize("mode", ["edit", "split"])
@pytest.mark.parametrize("size", [(1, 1), (12000, 7), (5, 3000), (333, 500), (64, 64), (31, 17)])
def test_any_size_in_the_same_size_out(method, mode, size):
    made = method(mode=mode, steps=1)
    result = made.edit(Example(source=Image.new("RGB", size, (90, 120, 30)), prompt="x"), EditSettings())
    assert result.size == size and result.mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_pictures_given_from_python_may_have_any_mode(method, picture, mode):
    assert method(steps=1).edit(Example(source=picture().convert(mode)), EditSettings()).mode == "RGB"


def test_sizes_are_buckets_of_the_resolution(method):
    made = method(resolution=64)
    assert made.size(640, 480) == (64, 48) and made.size(480, 640) == (48, 64)
    assert made.size(1, 1) == (64, 64) and made.size(12000, 5) == (64, 16)


def test_native_settings_of_the_backbone(fill_config, monkeypatch):
    made = InFluxEdit.load(fill_config, Config())
    assert (made.resolution, made.text_length) == (64, 64)
    monkeypatch.setattr(Flux, "native_resolution", 1024)
    assert InFluxEdit.load(fill_config, Config()).resolution == 256


def test_targets_are_scaled_to_the_sources_size(method, picture):
    batch = method().encode([Example(source=picture(0, 64, 48), target=picture(1, 80, 90))])
    assert batch["x0_mean"].shape == batch["condition_mean"].shape == (1, 16, 4, 4)


@pytest.mark.parametrize("missing", ["source", "target"])
def test_a_missing_half_is_named(method, pairs, missing):
    with pytest.raises(UserError, match=f"p1: .*no {missing} picture"):
        method().encode([pairs[0], replace(pairs[1], **{missing: None})])


def test_template_wraps_the_prompt(method):
    made = method(prompt_template="A diptych. {prompt}!")
    plain = method()
    assert torch.equal(
        made.encode_text(["{a} red hat"])["prompt_embeds"],
        plain.encode_text(["A diptych. {a} red hat!"])["prompt_embeds"],
    )


def test_fingerprint_follows_what_is_encoded(method):
    base = method().fingerprint()
    assert base == method(steps=3, guidance=2.0, mask="black", lora=EditLoRA(rank=1)).fingerprint()
    others = [
        {"mode": "split"},
        {"resolution": 48},
        {"max_sequence_length": 20},
        {"prompt_template": "x {prompt}"},
    ]
    assert len({base, *(method(**o).fingerprint() for o in others)}) == 5


def test_metadata_is_plain_json(method):
    described = method(mode="split", steps=9).metadata()
    assert json.loads(json.dumps(described)) == described
    assert (described["steps"], described["resolution"], described["mask"]) == (9, 32, "right half")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resolution": 8}, "resolution must be at least 16"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
        ({"prompt_template": "no place"}, "prompt_template must hold"),
        ({"mode": "split", "mask": "black"}, "mask: black is for mode edit"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": -1.0}, "guidance must not be negative"),
        ({"sampling_guidance": float("nan")}, "sampling_guidance"),
        ({"logit_std": 0.0}, "logit_std must be above 0"),
    ],
)
def test_impossible_settings(config, message):
    with pytest.raises(ValueError, match=message):
        Config(**config)


def test_steps_of_an_edit_are_checked(method, pairs):
    with pytest.raises(UserError, match="steps must be at least 1"):
        method().edit(pairs[0], replace(FEW, steps=0))


def test_dev_weights_are_refused(dev, dev_config):
    with pytest.raises(UserError, match="needs FLUX.1 Fill"):
        InFluxEdit.load(dev_config, Config())
    with pytest.raises(UserError, match="needs FLUX.1 Fill"):
        InFluxEdit(dev, Config())


@pytest.mark.parametrize("mode", ["edit", "split"])
def test_a_few_steps_learn_a_pair(method, picture, mode):
    """The loss at fixed noise falls clearly when one pair is repeated."""
    made = method(mode=mode, lora=EditLoRA(rank=8))
    batch = encoded(made, [Example(source=picture(0), target=picture(1))] * 2)
    optimizer = torch.optim.AdamW(made.adapters.train("edit"), lr=1e-2)
    history = []
    for _ in range(30):
        loss = flow(made, batch, Noise(1, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert np.isfinite(history).all() and history[-1] < 0.8 * history[0]


@pytest.mark.parametrize(("mode", "size"), [("edit", (32, 32)), ("split", (64, 32))])
def test_views_are_what_fill_is_given(method, pairs, mode, size):
    made = method(mode=mode)
    views = made.views(pairs[0])
    assert {v.size for v in views.values()} == {size}
    assert torch.equal(made.flux.encode_images([views["target"]]).mean, made.encode(pairs[:1])["x0_mean"])
    mask = made.flux.mask_tokens([views["mask-white-changes"]])
    latents = torch.zeros(1, 16, size[1] // 8, size[0] // 8)
    assert torch.equal(made._condition(latents, latents, latents)[..., 64:], mask)
