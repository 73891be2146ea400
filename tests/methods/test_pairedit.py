"""PairEdit, its baselines and inversion: what is trained against what, and how pictures are drawn with it."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageChops
from steps import encoded

from pentimento import stored
from pentimento.adapters import Adapters, LoRA
from pentimento.errors import UserError
from pentimento.flux import sampling
from pentimento.flux.dev import AttentionLoRA
from pentimento.method import EditSettings, Example
from pentimento.methods.inversion import Inversion
from pentimento.methods.pairedit import PairEdit, preserving, rectified
from pentimento.methods.sliders import FixedLoRA, ImageSlider, TextSlider
from pentimento.train import Draws

SMALL = AttentionLoRA(rank=2)
FEW = EditSettings(seed=3, steps=4, skip=1)
CPU = torch.device("cpu")


@pytest.fixture
def build(dev_config):
    """``build(kind, **config)``: a method on the tiny model, small and quick."""

    def make(kind=PairEdit, **config):
        settings = {"resolution": 32, "max_sequence_length": 16, "steps": 4, "skip": 1, **config}
        return kind.load(dev_config, kind.Config(**{"lora": SMALL, **settings}))

    return make


def awaken(method, *names):
    """Give adapters an effect: their B start at zero."""
    generator = torch.Generator().manual_seed(0)
    for name in names or method.adapters.specs:
        for parameter in method.adapters.parameters(name):
            parameter.data.normal_(0, 0.3, generator=generator)
    return method


def draws(*rows):
    return Draws([(0, "test", row) for row in rows], CPU)


def losses(method, batch, drawn):
    """All of a step, back-propagated one after the other as the loop does."""
    values = {}
    for key, loss in method.losses(batch, drawn):
        loss.backward()
        values[key] = loss.detach()
    return values


def grads(method, name):
    return [None if p.grad is None else p.grad.clone() for p in method.adapters.parameters(name)]


def test_content_learns_the_noise_and_semantic_the_direction_on_top(build, pairs, monkeypatch):
    """By the formulas, on what the model is given; the reference's own numbers are compared in tests/golden."""
    method = awaken(build(eta=2.5, noise_scale=3.0))
    batch, same = encoded(method, pairs), draws(0, 1, 2)
    index = (same.uniform() * 4).long()
    mean, std = batch["source_mean"], batch["source_std"]
    source = method.flux.latents(mean, std, same.normal_like(mean))
    noise = 3 * same.normal_like(source)
    target = method.flux.latents(batch["target_mean"], batch["target_std"], same.normal_like(mean))
    sigma = method.flux.sigmas(4, 4)[index]
    wanted = {"content": noise, "semantic": noise + 2.5 * (source - target)}
    seen = []
    velocity = method.flux.velocity

    def watched(x_t, s, text, **how):
        seen.append((x_t, s, text.prompt_embeds, how["guidance"]))
        return velocity(x_t, s, text, **how)

    monkeypatch.setattr(method.flux, "velocity", watched)
    found = dict(method.losses(batch, draws(0, 1, 2)))
    for key, (x_t, s, _, guidance) in zip(found, list(seen), strict=True):
        assert torch.equal(s, sigma) and guidance == 3.5
        torch.testing.assert_close(x_t, source + sigma.view(-1, 1, 1) * noise)
        method.adapters.use(**({"content": 1} if key == "content" else {"content": 1, "semantic": 1}))
        with torch.no_grad():
            v = method.predict(x_t, s, batch)
        torch.testing.assert_close(found[key].detach(), ((v - wanted[key]) ** 2).mean())
    empty = method.flux.encode_prompts([""] * 3, 16)
    assert torch.equal(seen[0][2], empty.prompt_embeds), "the text is the empty one, whatever the prompts"


def test_each_loss_trains_its_own_adapter(build, pairs):
    method = awaken(build())
    method.adapters.train("content", "semantic")
    batch = encoded(method, pairs)
    steps = method.losses(batch, draws(0, 1, 2))
    _, loss = next(steps)
    loss.backward()
    content = grads(method, "content")
    assert all(g is not None and g.any() for g in content)
    assert all(g is None for g in grads(method, "semantic"))
    _, loss = next(steps)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(content, grads(method, "content"), strict=True))
    assert all(g is not None and g.any() for g in grads(method, "semantic"))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (PairEdit, {}),
        (PairEdit, {"semantic": "reconstruction"}),
        (PairEdit, {"noising": "flow", "content": False}),
        (ImageSlider, {}),
        (Inversion, {}),
    ],
)
def test_a_batch_is_the_mean_of_its_rows(build, pairs, kind, config):
    """So that accumulation equals a bigger batch, for losses and gradients."""
    method = awaken(build(kind, **config))
    method.adapters.train(*method.adapters.specs)
    together = losses(method, encoded(method, pairs), draws(0, 1, 2))
    gradient = [g for name in method.adapters.specs for g in grads(method, name)]
    for parameter in method.adapters.parameters(*method.adapters.specs):
        parameter.grad = None
    alone = [losses(method, encoded(method, [pair]), draws(row)) for row, pair in enumerate(pairs)]
    for key, value in together.items():
        torch.testing.assert_close(value, torch.stack([one[key] for one in alone]).mean())
    summed = [g for name in method.adapters.specs for g in grads(method, name)]
    for a, b in zip(gradient, summed, strict=True):
        torch.testing.assert_close(a, b / 3, rtol=1e-4, atol=1e-7)


def test_the_two_noises_and_their_velocities():
    """The velocity is the derivative of the path by sigma."""
    x, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for path in (preserving, rectified):
        (early, v), (late, _) = path(x, noise, torch.tensor(0.3)), path(x, noise, torch.tensor(0.8))
        torch.testing.assert_close(late - early, 0.5 * v)
    assert torch.equal(preserving(x, noise, torch.tensor(0.0))[0], x)


def test_every_noise_level_of_the_window_is_drawn_and_none_outside(build, pairs):
    method = build(steps=8, start_step=2, end_step=4)
    batch = encoded(method, pairs)
    drawn = {float(s) for n in range(60) for s in method.drawn(batch, draws(n, n + 100, n + 200))[1].sigma}
    assert drawn == {float(s) for s in method.flux.sigmas(8, 4)[2:5]}


def test_noise_is_not_one_of_31(build, pairs):
    method = build()
    batch = encoded(method, pairs[:1])
    first = {float(method.drawn(batch, draws(n))[1].noise[0, 0, 0]) for n in range(100)}
    assert len(first) == 100


def test_mode_of_the_posterior(build, pairs):
    """Equal pictures then give no direction at all."""
    method = build(posterior="mode")
    same = replace(pairs[0], target=pairs[0].source)
    _, step = method.drawn(encoded(method, [same]), draws(0))
    assert torch.equal(step.source, step.target)


def test_the_published_layers(build):
    method = build()
    double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    expected = {f"transformer_blocks.{n}.attn.{leaf}" for n in range(2) for leaf in double}
    expected |= {f"single_transformer_blocks.{n}.attn.{leaf}" for n in range(2) for leaf in double[:3]}
    keys = method.adapters.state_dict()["semantic"]
    assert {key.partition(".lora_")[0] for key in keys} == expected
    assert 19 * 8 + 38 * 3 == 266 and all(stored.pairedit_name(layer) for layer in expected)
    assert (method.config.lora.alpha, AttentionLoRA().rank, AttentionLoRA().scaled) == (1.0, 16, 1.0)
    for key, value in keys.items():
        if ".lora_A." in key:
            bound = (3 / value.shape[1]) ** 0.5
            assert 0.8 * bound < value.abs().max() <= bound
        else:
            assert not value.any()


def test_text_slider_trains_a_with_fixed_orthonormal_b(build):
    method = build(TextSlider, lora=FixedLoRA(rank=2))
    trained = method.adapters.train("semantic")
    state = method.adapters.state_dict()["semantic"]
    assert len(trained) == len(state) / 2
    for key, value in state.items():
        if ".lora_B." in key:
            torch.testing.assert_close(value.T @ value, torch.eye(2))
            assert not any(value.data_ptr() == p.data_ptr() for p in trained)


def test_text_slider_without_a_direction_has_nothing_to_learn(build):
    """Without renormalising, eta 0-like prompts: what is learnt is the target's own velocity."""
    method = build(TextSlider, renormalise=False)
    method.adapters.train("semantic")
    batch = method.encode([Example()]) | method.encode_text([""])
    batch["prompt_embeds"][:, :, 2] = batch["prompt_embeds"][:, :, 1]
    batch["pooled"][:, :, 2] = batch["pooled"][:, :, 1]
    assert losses(method, batch, draws(0)) == {"text": 0}


def test_text_slider_learns_the_positive_prompts_norm(build):
    method = build(TextSlider)
    target, positive, negative = (torch.randn(2, 4, 8) for _ in range(3))
    wanted = method.wanted(target, positive, negative)
    moved = target + 2 * (positive - negative)
    for row in range(2):
        torch.testing.assert_close(wanted[row].norm(), positive[row].norm())
        torch.testing.assert_close(wanted[row] / wanted[row].norm(), moved[row] / moved[row].norm())


def test_text_slider_starts_on_the_way_to_a_picture(build):
    """Each row where stock sampling is after its own number of steps, and at the noise level of that step."""
    method = build(TextSlider)
    text = method.flux.encode_prompts(["a", "a", "a"], 16)
    noise = torch.randn(3, 4, 64)
    until = torch.tensor([0, 3, 1])
    x_t, sigma = method._underway(noise, text, until)
    grid = method.flux.sigmas(4, 4)
    assert torch.equal(sigma, grid[until]) and torch.equal(x_t[0], noise[0])
    one = method.flux.encode_prompts(["a"], 16)

    def velocity(x, s, step):
        return method.flux.velocity(x, s, one, grid=(2, 2), guidance=3.5)

    for row, count in ((1, 3), (2, 1)):
        expected = sampling.euler(velocity, noise[row : row + 1], grid[: count + 1])
        torch.testing.assert_close(x_t[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_concepts_to_preserve_stand_before_all_prompts(build):
    method = build(TextSlider, preserve=("male", "female"), target="a", positive="b", negative="c")
    assert method.prompts == [["male a", "male b", "male c"], ["female a", "female b", "female c"]]
    assert method.encode_text(["", ""])["prompt_embeds"].shape[:3] == (2, 2, 3)
    assert method.fingerprint() != build(TextSlider).fingerprint()
    seen = {tuple(losses_of(method, n)) for n in range(8)}
    assert len(seen) == 8


def losses_of(method, n):
    batch = method.encode([Example()]) | method.encode_text([""])
    return [float(loss) for _, loss in method.losses(batch, draws(n))]


def test_image_slider_is_symmetric(build, pairs):
    """With sources and targets swapped and the scale reversed, the losses change places."""
    method = awaken(build(ImageSlider, posterior="mode"))
    swapped = [replace(pair, source=pair.target, target=pair.source) for pair in pairs]
    plain = dict(method.losses(encoded(method, pairs), draws(0, 1, 2)))
    for parameter in method.adapters.parameters("semantic")[1::2]:
        parameter.data.neg_()
    reverse = dict(method.losses(encoded(method, swapped), draws(0, 1, 2)))
    torch.testing.assert_close(plain["target"], reverse["source"])
    torch.testing.assert_close(plain["source"], reverse["target"])


def test_scale_0_is_the_base_models_picture_in_stock_diffusers(build, tiny_dev):
    method = awaken(build())
    ours = method.edit(Example(prompt="a cat"), replace(FEW, scale=0.0))
    pipeline = FluxPipeline.from_pretrained(tiny_dev)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline(
        "a cat", height=32, width=32, num_inference_steps=4, guidance_scale=3.5, max_sequence_length=16,
        generator=generator,
    ).images[0]  # fmt: skip
    assert ours.tobytes() == theirs.tobytes()


def test_scale_skip_and_seed_change_the_picture(build):
    method = awaken(build())
    base = method.edit(Example(prompt="x"), FEW)
    assert method.edit(Example(prompt="x"), FEW).tobytes() == base.tobytes()
    others = [replace(FEW, **{key: value}) for key, value in
              (("scale", -1.0), ("scale", 0.5), ("seed", 4), ("skip", 2), ("guidance", 1.0), ("steps", 5))]  # fmt: skip
    assert len({method.edit(Example(prompt="x"), s).tobytes() for s in others} | {base.tobytes()}) == 7


def test_until_ends_the_edit(build):
    """A window of one step is neither the whole edit nor none."""
    pictures = {awaken(build(until=until)).edit(Example(prompt="x"), FEW).tobytes() for until in (None, 3, 4)}
    assert len(pictures) == 2, "4 is the end anyway"


def learnt(build, tmp_path, name="photo"):
    """An adapter that stands for one that knows a photograph."""
    inversion = awaken(build(Inversion))
    inversion.adapters.save(tmp_path / name)
    return tmp_path / name


def test_a_photograph_is_drawn_by_its_own_adapter(build, tmp_path, picture):
    """Scale 0, and weight 0, are what inversion itself draws; weight 1 is the edit without it in the active steps."""
    place = learnt(build, tmp_path)
    inversion = build(Inversion, skip=-1)
    inversion.adapters.load(place)
    source = picture(5, 48, 48)
    plain = inversion.edit(Example(prompt="x", source=source), EditSettings(seed=3, steps=4))
    method = awaken(build(weight=0.75), "content", "semantic")
    method.show_photo(place)
    example = Example(prompt="x", source=source)
    assert method.edit(example, replace(FEW, scale=0.0)).tobytes() == plain.tobytes()
    assert plain.size == (48, 48)
    edits = {}
    for config in ({"weight": 0.0}, {"weight": 0.75}, {"weight": 1.0}, {"combine": "merged"}):
        method.config = replace(method.config, combine="velocity")
        method.config = replace(method.config, **config)
        edits[str(config)] = method.edit(example, FEW).tobytes()
    assert edits["{'weight': 0.0}"] == plain.tobytes()
    assert len(set(edits.values())) == 4
    assert method.edit(example, replace(FEW, scale=-1.0)).tobytes() not in edits.values()


def test_another_photograph_takes_the_place_of_the_first(build, tmp_path, picture):
    first = learnt(build, tmp_path, "first")
    other = build(Inversion)
    awaken(other)
    for parameter in other.adapters.parameters("content"):
        parameter.data.mul_(0.5)
    other.adapters.save(tmp_path / "second")
    method = awaken(build(), "semantic")
    example = Example(prompt="x", source=picture(1, 32, 32))
    drawn = []
    for place in (first, tmp_path / "second", first):
        method.show_photo(place)
        drawn.append(method.edit(example, FEW).tobytes())
    assert drawn[0] == drawn[2] != drawn[1]


def test_two_sliders_add_up(build, tmp_path):
    """One adapter at scale 1 is the same as its half twice; and the order does not matter."""
    method = awaken(build(content=False))
    method.adapters.save(tmp_path / "one")
    whole = method.edit(Example(prompt="x"), FEW)
    method.compose([(tmp_path / "one", 0.5)])
    halves = method.edit(Example(prompt="x"), replace(FEW, scale=0.5))
    assert distance(whole, halves) <= 1
    assert distance(method.edit(Example(prompt="x"), FEW), whole) > 1
    alone = build(content=False)
    alone.compose([(tmp_path / "one", 1.0)])
    assert distance(alone.edit(Example(prompt="x"), replace(FEW, scale=0.0)), whole) <= 1


def distance(a: Image.Image, b: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


def test_a_photograph_needs_what_knows_it(build, pairs):
    with pytest.raises(
        UserError, match="p0: pairedit edits a photograph with an adapter that was trained on it"
    ):
        build().edit(pairs[0], FEW)


@pytest.mark.parametrize(("settings", "said"), [({"skip": 3}, "none is left"), ({"steps": 0}, "at least 1")])
def test_an_edit_that_would_never_act(build, settings, said):
    with pytest.raises(UserError, match=said):
        build().edit(Example(prompt="x"), replace(FEW, **settings))
    if "skip" in settings:
        build().edit(Example(prompt="x"), replace(FEW, scale=0.0, **settings))


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        (PairEdit, {"eta": 0.0}, "eta must"),
        (PairEdit, {"noise_scale": 0.0}, "noise_scale must be above 0"),
        (PairEdit, {"noising": "flow", "noise_scale": 2.0}, "noise_scale is for noising preserving"),
        (PairEdit, {"end_step": 4}, "steps from 0 to 3"),
        (PairEdit, {"start_step": 3, "end_step": 2}, "the one not above the other"),
        (PairEdit, {"until": 1}, "until must lie above skip"),
        (PairEdit, {"weight": 1.5}, "weight must lie between 0 and 1"),
        (PairEdit, {"resolution": 40}, "multiple of 16"),
        (PairEdit, {"max_sequence_length": 4}, "8..512"),
        (PairEdit, {"guidance": -1.0}, "guidance must not"),
        (PairEdit, {"steps": 0}, "steps must be at least 1"),
        (PairEdit, {"skip": -2}, "skip must be"),
        (TextSlider, {"positive": " "}, "positive is empty"),
        (TextSlider, {"positive": "a", "negative": "a"}, "nothing to learn"),
    ],
)
def test_impossible_settings(kind, config, said):
    with pytest.raises(ValueError, match=said):
        kind.Config(**{"steps": 4, "skip": 1, **config})


def test_metadata_is_plain_json_and_says_how_to_draw(build):
    for kind in (PairEdit, ImageSlider, TextSlider, Inversion):
        described = build(kind).metadata()
        assert json.loads(json.dumps(described)) == described
        assert (described["resolution"], described["steps"], described["guidance"]) == (32, 4, 3.5)


def test_fill_weights_and_missing_targets_are_refused(build, fill, pairs):
    with pytest.raises(UserError, match=r"pairedit needs FLUX.1 \[dev\]"):
        PairEdit(fill, PairEdit.Config())
    with pytest.raises(UserError, match="p1: pairedit learns from pairs, but there is no target"):
        build().encode([pairs[0], replace(pairs[1], target=None)])
    with pytest.raises(UserError, match="there is no picture to learn"):
        build(Inversion).encode([Example()])


def test_pictures_are_squeezed_or_keep_their_aspect(build):
    assert build().size(640, 480) == (32, 32)
    assert build(shape="aspect", resolution=64).size(640, 480) == (64, 48)


def test_strength_is_the_size_of_the_update_against_the_weights():
    host = torch.nn.Sequential(torch.nn.Linear(6, 5))
    adapters = Adapters(host)
    adapters.add("edit", LoRA(targets="0", rank=3, alpha=1.5))
    assert adapters.strength("edit") == 0
    for parameter in adapters.parameters("edit"):
        parameter.data.normal_()
    a, b = adapters.parameters("edit")
    weight = host[0].base_layer.weight
    expected = (b @ a * 0.5).norm() / weight.norm()
    assert adapters.strength("edit") == pytest.approx(float(expected), rel=1e-5)
