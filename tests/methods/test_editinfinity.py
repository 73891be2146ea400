"""EditInfinity on a tiny Infinity: what is trained when, what an edit may change, and its recipes from picture to edit."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_infinity import SIZE
from torch import Tensor

from pentimento import data, images, recipe, run, train
from pentimento.cache import Samples
from pentimento.data import DataConfig
from pentimento.errors import UserError
from pentimento.infinity import regions
from pentimento.infinity.backbone import Infinity
from pentimento.infinity.config import InfinityConfig
from pentimento.infinity.sampling import Sampling
from pentimento.infinity.scales import Schedule
from pentimento.method import EditSettings, Example
from pentimento.methods.editinfinity import EditInfinity, FeedForwardLoRA
from pentimento.train import Draws, Report, Stage

CAPTION = "a cat on a red mat"
SQUARE, TALL = Schedule.of(1.0, SIZE), Schedule.of(1.5, SIZE)


def method(infinity: Infinity, **config: Any) -> EditInfinity:
    """Trained as far as its edits are not those of the base model."""
    edit = EditInfinity(
        infinity, EditInfinity.Config(**{"source_prompt": CAPTION, "text_dropout": 0.0, "cfg": 1.0, **config})
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in edit.adapters.parameters("prompt", "lora"):
        parameter.data.normal_(0, 0.1, generator=generator)
    return edit


def batch_of(edit: EditInfinity, picture: Image.Image) -> dict[str, Tensor]:
    return {**edit.encode([Example(source=picture)]), **edit.encode_text([""])}


def draws(step: int = 1) -> Draws:
    return Draws([(0, "stage", step, 0)], torch.device("cpu"))


def trained_by(
    edit: EditInfinity, batch: dict[str, Tensor], *names: str
) -> tuple[dict[str, float], set[str]]:
    """Losses of a stage, and the adapters that they have gradients for."""
    edit.adapters.train(*names)
    losses = dict(edit.losses(batch, draws()))
    losses["bits"].backward()
    found = {
        name for name in ("prompt", "lora") if any(p.grad is not None for p in edit.adapters.parameters(name))
    }
    return {name: float(loss.detach()) for name, loss in losses.items()}, found


def test_a_stage_trains_its_own(infinity: Infinity, picture: Callable[..., Image.Image]) -> None:
    """The LoRA acts only where it is trained, and then the loss has its second term."""
    edit = method(infinity, kl_weight=1e-4)
    batch = batch_of(edit, picture(0, 80, 80))
    losses, trained = trained_by(edit, batch, "prompt")
    assert trained == {"prompt"} and losses.keys() == {"bits"}
    rows = edit.adapters.tensors["prompt"]
    assert rows.shape == (20, 32) and rows.grad is not None and (rows.grad.abs().sum(1) > 0).all()
    rows.grad = None
    with_lora, trained = trained_by(edit, batch, "lora")
    assert trained == {"lora"} and with_lora.keys() == {"bits", "unweighted"}
    edit.config = replace(edit.config, kl_weight=0.0)
    one_term, _ = trained_by(edit, batch, "lora")
    assert one_term["bits"] == pytest.approx(with_lora["bits"] - with_lora["unweighted"])
    assert one_term["bits"] != pytest.approx(losses["bits"])


def test_left_out_texts(infinity: Infinity, picture: Callable[..., Image.Image]) -> None:
    """The loss is then that of no text, and does not depend on the learnt rows."""
    edit = method(infinity, text_dropout=1.0)
    losses, _ = trained_by(edit, batch_of(edit, picture(0, 80, 80)), "prompt")
    gradient = edit.adapters.tensors["prompt"].grad
    assert gradient is not None and not gradient.any()
    edit.adapters.tensors["prompt"].data.add_(1)
    assert trained_by(edit, batch_of(edit, picture(0, 80, 80)), "prompt")[0] == losses


def test_without_rows(infinity: Infinity) -> None:
    config = EditInfinity.Config(rows=0, source_prompt=CAPTION)
    edit = EditInfinity(infinity, config)
    assert EditInfinity.names(config) == ("lora",) and edit.text("x") == CAPTION
    assert not edit.adapters.tensors


def test_captions(infinity: Infinity) -> None:
    said = EditInfinity(infinity, EditInfinity.Config())
    assert said.text("a cat") == "a cat, the language style of this prompt is"
    with pytest.raises(UserError, match="say what the picture shows"):
        said.encode_text([""])


def mask(*box: int) -> Image.Image:
    """White in a box of a black picture of 80 x 80."""
    out = Image.new("L", (80, 80))
    out.paste(255, box or (0, 0, 0, 0))
    return out


def test_an_edit_keeps_what_a_mask_covers(infinity: Infinity, picture: Callable[..., Image.Image]) -> None:
    edit, source = method(infinity), picture(0, 80, 80)
    kept = edit.edit(Example(source=source, prompt="a dog", mask=mask()), EditSettings())
    whole = edit.edit(Example(source=source, prompt="a dog", mask=mask(0, 0, 80, 80)), EditSettings())
    plain = edit.edit(Example(source=source, prompt="a dog"), EditSettings())
    assert kept.size == whole.size == (80, 80)
    assert np.array_equal(whole, plain) and not np.array_equal(whole, kept)
    codes = infinity.encode_images([images.resize(source, (256, 256))], SQUARE).codes
    (drawn_again,) = infinity.decode(torch.stack(codes).sum(0))
    assert np.abs(np.asarray(kept, float) - images.resize_result(drawn_again, (80, 80))).max() <= 1


def test_scale_0_is_the_base_model(infinity: Infinity, picture: Callable[..., Image.Image]) -> None:
    edit, example = method(infinity), Example(source=picture(0, 80, 80), prompt="a dog")
    base = edit.edit(example, EditSettings(scale=0))
    edit.adapters.use()
    drawn = infinity.generate(infinity.encode_prompts(["a dog"]), SQUARE, Sampling(cfg=1.0), seed=0)
    assert np.array_equal(base, images.resize_result(infinity.decode(drawn.z)[0], (80, 80)))
    assert not np.array_equal(base, edit.edit(example, EditSettings()))


def test_either_half_of_what_was_learnt(infinity: Infinity, picture: Callable[..., Image.Image]) -> None:
    """Without its LoRA and without its rows, as if they had not been trained or were not there."""
    edit, example = method(infinity), Example(source=picture(0, 80, 80), prompt="a dog")
    both = edit.edit(example, EditSettings())
    edit.config = replace(edit.config, use="lora")
    lora = edit.edit(example, EditSettings())
    edit.config = replace(edit.config, use="rows")
    rows = edit.edit(example, EditSettings())
    assert len({each.tobytes() for each in (both, lora, rows)}) == 3
    for parameter in edit.adapters.parameters("lora"):
        parameter.data.zero_()
    edit.config = replace(edit.config, use="both")
    assert np.array_equal(edit.edit(example, EditSettings()), rows)
    edit.config = replace(edit.config, use="lora")
    assert np.array_equal(edit.edit(example, EditSettings()), edit.edit(example, EditSettings(scale=0)))


def test_mistakes_of_edits(infinity: Infinity, picture: Callable[..., Image.Image]) -> None:
    example = Example(source=picture(0, 80, 80), prompt="a dog")
    edit = method(infinity)
    with pytest.raises(UserError, match="steps: Infinity draws"):
        edit.edit(example, EditSettings(steps=3))
    with pytest.raises(UserError, match="there is no picture"):
        edit.edit(Example(prompt="a dog"), EditSettings())
    dot = Image.new("L", (320, 320))
    dot.putpixel((40, 40), 255)
    with pytest.raises(UserError, match="by it nothing may change: white must fill 20% of at least one cell"):
        edit.edit(Example(source=example.source, prompt="a dog", mask=dot), EditSettings())
    for config, said in (
        ({"region": "mask"}, "mask: this edit needs one"),
        ({"region": "word"}, "config.region is word: give"),
        ({"region": "word", "word": "horse"}, "'horse' does not occur"),
    ):
        edit.config = EditInfinity.Config(source_prompt=CAPTION, **config)
        with pytest.raises(UserError, match=said):
            edit.edit(example, EditSettings())


def test_mistakes_of_settings() -> None:
    for wrong, said in (
        ({"size": "2M"}, "size should be one of"),
        ({"flips": 1.5}, "flips must lie between 0 and 1"),
        ({"rows": -1}, "rows must not be negative"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"threshold": 1}, "threshold must be at least 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=said):
            EditInfinity.Config(**wrong)  # type: ignore[arg-type]


def test_weights_of_a_region() -> None:
    """On the grid of 1M the published ramp; on a smaller one its means."""
    large = Schedule.of(1.0, "1M")
    region = torch.zeros(64, 64, dtype=torch.bool)
    region[20:24, 20:24] = True
    fine = regions.weights(region, large)
    assert fine[21, 24:30].tolist() == [0, 0.25, 0.5, 0.75, 1, 1]
    assert fine[24, 24].item() == 0.25  # two steps
    coarse = regions.weights(region, SQUARE)
    assert coarse[5, 5:8].tolist() == [0, 0.375, 1]
    assert torch.equal(coarse, fine.unflatten(0, (16, 4)).unflatten(2, (16, 4)).mean((1, 3)))
    assert regions.weights(torch.zeros(5, 7, dtype=torch.bool), SQUARE).eq(1).all()
    big = torch.zeros(64, 64, dtype=torch.bool)
    big[:, :40] = True
    assert regions.weights(big, large)[0, 38:43].tolist() == [0, 0, 0, 1, 1]
    assert regions.weights(region, TALL).shape == TALL.grids[-1]


def test_attention_to_a_word(infinity: Infinity, picture: Callable[..., Image.Image]) -> None:
    """Attention to all tokens of a text sums to one everywhere."""
    edit = method(infinity)
    codes = infinity.encode_images([picture(0, 224, 336)], TALL)
    text = infinity.encode_prompts([CAPTION])
    count = text.features.shape[1]
    seen = regions.AttentionMap(TALL, (0, count))
    edit.look(text, codes.codes, TALL, seen)
    torch.testing.assert_close(seen.mean(), torch.full(TALL.grids[-1], 1 / count))
    words = infinity.words(CAPTION).word_ids()
    assert regions.token_span(CAPTION, "red mat", words) == (
        words.index(4), len(words) - 1
    )  # fmt: skip


@pytest.fixture
def learn(
    infinity_config: InfinityConfig, tmp_path: Path, picture: Callable[..., Image.Image]
) -> Callable[..., dict[str, Tensor]]:
    """``learn(out)``: both stages with all that is dropped at random, by a model that was just loaded; what was learnt."""
    file = tmp_path / "photo.png"
    picture(0, 60, 60).save(file)
    rows = data.open_data(DataConfig(root=str(file), kind="picture", prompt="", held_out=0))
    dropping: dict[str, Any] = {"text_dropout": 0.3, "drop_path": 0.5, "lora": FeedForwardLoRA(dropout=0.5)}

    def learn(
        out: str, watch: train.Watch | None = None, checkpointing: bool = False, **layout: Any
    ) -> dict[str, Tensor]:
        backbone = replace(infinity_config, gradient_checkpointing=checkpointing)
        edit = EditInfinity.load(backbone, EditInfinity.Config(source_prompt=CAPTION, rows=4, **dropping))
        edit.adapters.reset(1)
        samples = Samples(rows, edit)
        samples.precompute()
        stages = {
            name: Stage(train=(name,), steps=3, lr=0.1, eps=1e-3, **{"accumulate": 2, **layout})
            for name in ("prompt", "lora")
        }
        train.train(edit, stages, samples, train.Run(out=tmp_path / out), watch)
        state = edit.adapters.state_dict()
        return {**state["tensors"], **state["lora"]}

    return learn


def test_a_resumed_run_is_the_uninterrupted_one(learn: Callable[..., dict[str, Tensor]]) -> None:
    """Bit for bit, with drop path and dropout, interrupted in either stage; also where activations are recomputed."""

    def stop(stage: str, step: int) -> train.Watch:
        def watch(report: Report) -> None:
            if (report.stage, report.step) == (stage, step):
                signal.raise_signal(signal.SIGINT)

        return watch

    whole = learn("whole")
    for stage, step in (("prompt", 1), ("lora", 2)):
        with pytest.raises(KeyboardInterrupt, match=f"after step {step} of {stage}"):
            learn("run", stop(stage, step))
        torch.rand(7)  # whatever was drawn elsewhere
    for other in (learn("run"), learn("recomputed", checkpointing=True)):
        assert other.keys() == whole.keys() and all(torch.equal(other[key], whole[key]) for key in whole)


def test_accumulated_batches_are_a_larger_one(learn: Callable[..., dict[str, Tensor]]) -> None:
    halves, together, half = learn("a"), learn("b", accumulate=1, batch_size=2), learn("c", accumulate=1)
    for key, value in halves.items():
        torch.testing.assert_close(value, together[key], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(value, half[key], rtol=1e-2, atol=1e-4)


def test_the_loop_knows_the_precision(
    infinity_config: InfinityConfig, picture: Callable[..., Image.Image]
) -> None:
    """That of the blocks, although the largest single weight lies outside of them; the loss is the same under its autocast."""
    edit = method(Infinity.load(replace(infinity_config, precision="bf16")), text_dropout=0.5)
    weights = dict(edit.infinity.transformer.named_parameters())
    assert max(weights, key=lambda name: weights[name].numel()) == "shared_ada_lin.1.weight"
    assert weights["shared_ada_lin.1.weight"].dtype == torch.float32
    assert run.precision_of(edit) == "bf16"
    batch = batch_of(edit, picture(0, 80, 80))
    plain, trained = trained_by(edit, batch, "lora")
    with torch.autocast("cpu", torch.bfloat16):
        assert trained_by(edit, batch, "lora") == (plain, trained)


@pytest.mark.parametrize("name", ["editinfinity", "editinfinity-mask", "editinfinity-auto"])
def test_recipes(name: str, tiny_infinity: Path, tmp_path: Path, picture: Callable[..., Image.Image]) -> None:
    """Trained on a picture, saved, loaded and used."""
    file = tmp_path / "photo.png"
    picture(0, 60, 90).save(file)
    loaded = recipe.load(
        name,
        [
            f"backbone.weights={tiny_infinity}", "backbone.device=cpu", f"data.root={file}",
            f"config.source_prompt={CAPTION}", "config.word=mat", "stages.prompt.accumulate=1", "stages.lora.accumulate=1",
            "stages.prompt.steps=1", "stages.lora.steps=1",
        ],
    )  # fmt: skip
    out = run.train_run(loaded, tmp_path / "run")
    editor = run.load(out)
    state = editor.method.adapters.state_dict()
    assert state["tensors"]["prompt"].any() and any(
        v.any() for k, v in state["lora"].items() if "lora_B" in k
    )
    given = {"mask": Image.new("L", (60, 90), 255)} if name == "editinfinity-mask" else {}
    result = editor.edit(file, instruction="a dog on a red mat", **given)
    assert result.size == (60, 90)
    with pytest.raises(UserError, match="instruction"):
        editor.edit(file, **given)


def test_published_values() -> None:
    for name, steps in (("editinfinity", 50), ("editinfinity-mask", 50), ("editinfinity-auto", 20)):
        loaded = recipe.load(name)
        prompt, lora = loaded.stages["prompt"], loaded.stages["lora"]
        assert (prompt.train, prompt.steps, lora.train, lora.steps) == (("prompt",), 10, ("lora",), steps)
        assert replace(prompt, train=("lora",), steps=steps) == lora
        # A base rate of 6e-3 per 256 samples, with two in a step.
        assert prompt.lr == 6e-3 * prompt.batch_size * prompt.accumulate / 256
        config = loaded.config
        assert (config.lora.rank, config.lora.alpha, config.rows, config.kl_weight) == (4, 32, 20, 2e-7)
