"""The verbs of Infinity, on a tiny one: identities that hold for any weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_infinity import BITS, SIZE, TEXT_LENGTH
from torch import Tensor

from pentimento import lookup
from pentimento.adapters import Adapters, LoRA
from pentimento.errors import UserError
from pentimento.infinity import sampling
from pentimento.infinity.backbone import Infinity, extend, ragged
from pentimento.infinity.config import InfinityConfig
from pentimento.infinity.sampling import Interventions, Sampling
from pentimento.infinity.scales import Schedule
from pentimento.infinity.transformer import Block, Linear, Text

SCHEDULE = Schedule.of(1.0, SIZE)
TALL = Schedule.of(1.5, SIZE)
PROMPTS = ["a cat, red", "a", "two dogs on a"]
PLAIN = Sampling(cfg=1.0, tau=1.0, top_p=0.0)


@pytest.fixture
def totals(infinity: Infinity) -> list[Tensor]:
    """Running sums of three noise pictures."""
    features = torch.randn(3, BITS, *SCHEDULE.grids[-1], generator=torch.Generator().manual_seed(5))
    return [level.total for level in infinity.quantizer.levels(features, SCHEDULE)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits that bits are drawn from, scale by scale."""
    logits: list[Tensor] = []
    real = sampling.probabilities
    monkeypatch.setattr(
        sampling, "probabilities", lambda given, settings: logits.append(given) or real(given, settings)
    )
    return logits


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def one(text: Text, row: int) -> Text:
    """A prompt of a batch, by itself."""
    return Text(text.features[row : row + 1, : int(text.known()[row].sum())], None)


def test_prompts_are_their_own_tokens(infinity: Infinity) -> None:
    together = infinity.encode_prompts(PROMPTS)
    infinity._prompts.clear()
    for row, prompt in enumerate(PROMPTS):
        alone = infinity.encode_prompts([prompt])
        close(one(together, row).features, alone.features)
        assert alone.features.shape[1] == len(infinity.words(prompt).input_ids)  # the end token included


def test_long_prompts_are_cut(infinity: Infinity) -> None:
    assert infinity.encode_prompts(["a b c " * 40]).features.shape == (1, TEXT_LENGTH, 32)


def test_prompts_stay_known_without_the_encoder(infinity: Infinity, monkeypatch: pytest.MonkeyPatch) -> None:
    before = infinity.encode_prompts(PROMPTS)
    infinity.release_encoders()
    monkeypatch.setattr(Infinity, "text", property(lambda self: pytest.fail("the encoder was loaded again")))
    assert torch.equal(infinity.encode_prompts(PROMPTS).features, before.features)


def test_texts_in_a_batch_do_not_mix(infinity: Infinity, totals: list[Tensor]) -> None:
    text = infinity.encode_prompts(PROMPTS)
    together = infinity.logits(text, totals, SCHEDULE)
    assert together.shape == (3, SCHEDULE.tokens, BITS, 2)
    for row in range(3):
        alone = infinity.logits(one(text, row), [t[row : row + 1] for t in totals], SCHEDULE)
        close(together[row : row + 1], alone)


def test_a_scale_sees_those_before_it(infinity: Infinity, totals: list[Tensor]) -> None:
    text = infinity.encode_prompts(PROMPTS)
    before = infinity.logits(text, totals, SCHEDULE)
    changed = [*totals[:4], totals[4] + 1, *totals[5:]]  # what scale 5 is given
    after = infinity.logits(text, changed, SCHEDULE)
    start, end = SCHEDULE.spans[5]
    assert torch.equal(before[:, :start], after[:, :start])
    assert ((before - after)[:, start:].abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("schedule", [SCHEDULE, TALL])
def test_drawing_is_teacher_forcing(infinity: Infinity, schedule: Schedule, seen: list[Tensor]) -> None:
    """With cached keys the logits of given bits are those of all scales at once."""
    text = infinity.encode_prompts(PROMPTS)
    drawn = infinity.generate(text, schedule, PLAIN, seed=1)
    totals = list(infinity.quantizer.totals(drawn.bits))
    assert torch.equal(totals[-1], drawn.z)
    close(torch.cat(seen, 1), infinity.logits(text, totals, schedule))
    given = dict(enumerate(drawn.bits))
    again = infinity.generate(text, schedule, PLAIN, seed=2, interventions=Interventions(given=given))
    assert torch.equal(again.z, drawn.z)


def test_seeds(infinity: Infinity) -> None:
    text = infinity.encode_prompts(PROMPTS[:1])
    first, same, other = (infinity.generate(text, SCHEDULE, Sampling(), seed=s).z for s in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_guidance(infinity: Infinity, seen: list[Tensor]) -> None:
    """Logits of the prompt and of no text, mixed and sharpened."""
    text = infinity.encode_prompts(PROMPTS[:2])
    drawn = infinity.generate(text, SCHEDULE, Sampling(cfg=3.0, tau=0.5), seed=0)
    totals = list(infinity.quantizer.totals(drawn.bits))
    with_text = infinity.logits(text, totals, SCHEDULE)
    without = infinity.logits(infinity.transformer.without_text(text), totals, SCHEDULE)
    mixed = (3 * with_text - 2 * without) / 0.5
    assert torch.allclose(torch.cat(seen, 1), mixed, rtol=0, atol=2e-4)


def test_negative_prompts(infinity: Infinity, seen: list[Tensor]) -> None:
    """Of any length; the rows for no text are what stands there otherwise."""
    text = infinity.encode_prompts(PROMPTS[2:])
    against = infinity.encode_prompts(PROMPTS[:1])
    drawn = infinity.generate(text, SCHEDULE, Sampling(cfg=3.0, tau=1.0), seed=0, against=against)
    totals = list(infinity.quantizer.totals(drawn.bits))
    expected = 3 * infinity.logits(text, totals, SCHEDULE) - 2 * infinity.logits(against, totals, SCHEDULE)
    close(torch.cat(seen, 1), expected, 2e-4)
    default = infinity.generate(text, SCHEDULE, Sampling(), seed=0).z
    named = infinity.transformer.without_text(text)
    assert torch.equal(infinity.generate(text, SCHEDULE, Sampling(), seed=0, against=named).z, default)


def test_scales_may_differ_in_guidance(infinity: Infinity, seen: list[Tensor]) -> None:
    text = infinity.encode_prompts(PROMPTS[:1])
    cfg, tau = (1.0,) * 6 + (4.0,), (0.5,) * 6 + (2.0,)
    drawn = infinity.generate(text, SCHEDULE, Sampling(cfg=cfg, tau=tau), seed=0)
    totals = list(infinity.quantizer.totals(drawn.bits))
    logits = infinity.logits(text, totals, SCHEDULE)
    start, end = SCHEDULE.spans[-1]
    without = infinity.logits(infinity.transformer.without_text(text), totals, SCHEDULE)
    close(torch.cat(seen[:-1], 1), logits[:, :start] / 0.5, 2e-4)
    close(seen[-1], (4 * logits - 3 * without)[:, start:end] / 2, 2e-4)
    with pytest.raises(UserError, match="cfg has 2 values, but the picture has 7 scales"):
        infinity.generate(text, SCHEDULE, Sampling(cfg=(1.0, 2.0)), seed=0)


def test_texts_longer_than_the_rows_for_no_text(infinity: Infinity) -> None:
    text = extend(infinity.encode_prompts(["a b c " * 40]), torch.randn(4, 32))
    assert infinity.transformer.without_text(text).features.shape[1] == TEXT_LENGTH
    assert infinity.generate(text, SCHEDULE, Sampling(cfg=2.0), seed=0).z.isfinite().all()


def test_learnt_rows_follow_every_text(infinity: Infinity, totals: list[Tensor]) -> None:
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    text = infinity.encode_prompts(PROMPTS)
    longer = extend(text, rows)
    for row in range(len(PROMPTS)):
        expected = torch.cat([one(text, row).features[0], rows])
        assert torch.equal(one(longer, row).features[0], expected)
    infinity.logits(longer, totals, SCHEDULE).square().mean().backward()
    assert rows.grad is not None and (rows.grad.abs().sum(1) > 0).all()


def test_codes_of_a_source_take_the_place_of_drawn_ones(
    infinity: Infinity, picture: Callable[..., Image.Image]
) -> None:
    source = infinity.encode_images([picture(0, 256, 256)], SCHEDULE)
    seams = Interventions(edit_code=lambda scale, code: source.codes[scale])
    text = infinity.encode_prompts(PROMPTS[:1])
    drawn = infinity.generate(text, SCHEDULE, Sampling(), seed=0, interventions=seams)
    close(drawn.z, torch.stack(source.codes).sum(0), 1e-6)
    unchanged = Interventions(edit_code=lambda scale, code: code)
    plain = infinity.generate(text, SCHEDULE, Sampling(), seed=0)
    assert torch.equal(
        infinity.generate(text, SCHEDULE, Sampling(), seed=0, interventions=unchanged).z, plain.z
    )
    (result,) = infinity.decode(drawn.z)
    assert result.size == (256, 256)


def test_bits_stand_for_codes(infinity: Infinity, picture: Callable[..., Image.Image]) -> None:
    codes = infinity.encode_images([picture(1, 224, 336), picture(2, 224, 336)], TALL)
    assert [b.shape[-2:] for b in codes.bits] == [torch.Size(grid) for grid in TALL.grids]
    for bits, code in zip(codes.bits, codes.codes, strict=True):
        close(infinity.quantizer.codes(bits).norm(dim=1), torch.ones(2, *bits.shape[-2:]))
        assert code.shape == (2, BITS, *TALL.grids[-1])
    assert torch.equal(codes.codes[-1] > 0, codes.bits[-1])
    sums = list(infinity.quantizer.totals(codes.bits))
    close(sums[-1], torch.stack(codes.codes).sum(0), 1e-6)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_watching(infinity: Infinity, cfg: float) -> None:
    """Attention of the prompts alone to their own tokens, in every block and scale; nothing else changes."""
    text = infinity.encode_prompts(PROMPTS)
    maps: dict[tuple[int, int], Tensor] = {}
    seams = Interventions(watch=lambda scale, block, attention: maps.update({(scale, block): attention}))
    watched = infinity.generate(text, SCHEDULE, Sampling(cfg=cfg), seed=0, interventions=seams)
    assert torch.equal(watched.z, infinity.generate(text, SCHEDULE, Sampling(cfg=cfg), seed=0).z)
    assert len(maps) == 7 * 4
    for (scale, _), attention in maps.items():
        height, width = SCHEDULE.grids[scale]
        assert attention.shape == (3, 2, height * width, text.features.shape[1])
        close(attention.sum(-1), torch.ones(attention.shape[:3]))
        assert not attention.permute(0, 3, 1, 2)[~text.known()].any()


def rows_learnt(infinity: Infinity, totals: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of learnt rows."""
    rows = torch.ones(2, 32, requires_grad=True)
    logits = infinity.logits(extend(infinity.encode_prompts(PROMPTS), rows), totals, SCHEDULE)
    logits.square().mean().backward()
    assert rows.grad is not None
    return logits.detach(), rows.grad


@pytest.mark.parametrize(("share", "again"), [(True, 4), (0.5, 2), (0.3, 2), (False, 0)])
def test_checkpointing_changes_nothing(
    infinity: Infinity,
    infinity_config: InfinityConfig,
    totals: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    share: bool | float,
    again: int,
) -> None:
    """Of four blocks the first ones run again in the backward pass."""
    other = Infinity.load(replace(infinity_config, gradient_checkpointing=share))
    assert not infinity.transformer.checkpointing
    run, ran = Block.forward, []
    monkeypatch.setattr(Block, "forward", lambda block, *given: [ran.append(block), run(block, *given)][1])
    results, counts = [], []
    for each in (infinity, other):
        results.append(rows_learnt(each, totals))
        counts.append(len(ran))
    assert counts == [4, 4 + 4 + again]
    assert ran[8:] == list(other.transformer.blocks)[:again][::-1]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("share", [1.5, -0.1])
def test_a_share_of_the_blocks_is_one(share: float) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing must lie between 0 and 1, but it is"):
        InfinityConfig(gradient_checkpointing=share)


def test_preferring_cudnn_changes_nothing_where_there_is_none(
    infinity: Infinity, totals: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = infinity.encode_prompts(PROMPTS)
    before = infinity.logits(text, totals, SCHEDULE)
    monkeypatch.setattr(infinity.transformer, "cudnn", True)
    assert torch.equal(infinity.logits(text, totals, SCHEDULE), before)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """What was traced of compiled blocks; an error where something changes in every step, and torch gives up tracing it."""
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(Block, "compile", lambda block: torch.nn.Module.compile(block, backend=backend))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield traced


@pytest.fixture
def compiled(infinity_config: InfinityConfig, graphs: list[torch.fx.GraphModule]) -> Infinity:
    return Infinity.load(replace(infinity_config, compile=True, gradient_checkpointing=True))


def test_where_the_text_is_learnt_blocks_are_not_compiled(
    infinity: Infinity, compiled: Infinity, totals: list[Tensor], graphs: list[torch.fx.GraphModule]
) -> None:
    """Compiled for a GPU, gradients of the modulation would be wrong."""
    theirs, ours = (rows_learnt(each, totals) for each in (infinity, compiled))
    assert not graphs
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_compiled_blocks_train_alike(
    infinity: Infinity, compiled: Infinity, totals: list[Tensor], graphs: list[torch.fx.GraphModule]
) -> None:
    """Traced in the first step alone, whatever is dropped; pictures are drawn as ever."""
    counts, gradients = [], []
    for each in (infinity, compiled):
        adapters = Adapters(each.transformer)
        adapters.add("lora", LoRA(targets=r".*\.ffn\.fc[12]", rank=4, alpha=32, dropout=0.5))
        trained = adapters.train("lora")
        for parameter in trained:
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        adapters.use(lora=1)
        text = each.encode_prompts(PROMPTS)
        for step in range(3):
            adapters.drop((step, 7, 8))
            each.logits(text, totals, SCHEDULE).square().mean().backward()
            counts.append(len(graphs))
        gradients.append([parameter.grad for parameter in trained])
        adapters.drop(())
    assert counts == [0, 0, 0, 2, 2, 2]  # the first block's input needs no gradient
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    text = infinity.encode_prompts(PROMPTS)
    drawn = [each.generate(text, SCHEDULE, Sampling(), seed=0).z for each in (infinity, compiled)]
    assert torch.equal(*drawn) and len(graphs) == 2


def test_half_precision_is_for_the_blocks(
    infinity: Infinity, infinity_config: InfinityConfig, totals: list[Tensor]
) -> None:
    half = Infinity.load(replace(infinity_config, precision="bf16"))
    narrow = {n for n, p in half.transformer.named_parameters() if p.dtype == torch.bfloat16}
    modules = dict(half.transformer.block_chunks.named_modules(prefix="block_chunks"))
    linear = {
        f"{n}.{k}" for n, m in modules.items() if isinstance(m, Linear) for k, _ in m.named_parameters()
    }
    assert narrow == linear and len(linear) == 4 * 12
    text = infinity.encode_prompts(PROMPTS)
    ours, theirs = (each.logits(text, totals, SCHEDULE) for each in (half, infinity))
    assert ours.dtype == torch.float32
    assert float((ours - theirs).abs().max()) < 0.1 * float(theirs.std())
    with torch.autocast("cpu", torch.bfloat16):  # as a training loop has it
        assert torch.equal(half.logits(text, totals, SCHEDULE), ours)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_learn_in_full_precision(
    infinity_config: InfinityConfig, totals: list[Tensor], precision: str
) -> None:
    infinity = Infinity.load(replace(infinity_config, precision=precision))
    text = infinity.encode_prompts(PROMPTS)
    before = infinity.logits(text, totals, SCHEDULE)
    adapters = Adapters(infinity.transformer)
    adapters.add("lora", LoRA(targets=r".*\.ffn\.fc[12]", rank=4, alpha=32))
    adapters.use(lora=1)
    assert torch.equal(infinity.logits(text, totals, SCHEDULE), before)
    trained = adapters.train("lora")
    assert len(trained) == 2 * 2 * 4 and {p.dtype for p in trained} == {torch.float32}
    infinity.logits(text, totals, SCHEDULE).square().mean().backward()
    named = {k: p for k, p in infinity.transformer.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(named) == 2 * 4 and all(".lora_B." in k for k in named)  # A's gradient is 0 while B is


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_compute_as_narrow_as_their_layers(
    infinity_config: InfinityConfig, totals: list[Tensor], precision: str
) -> None:
    infinity = Infinity.load(replace(infinity_config, precision=precision))
    adapters = Adapters(infinity.transformer)
    adapters.add("lora", LoRA(targets=r".*\.ffn\.fc[12]", rank=4, alpha=32, dropout=0.1))
    adapters.use(lora=1)
    adapters.drop((0, 1, 2))
    seen = []
    for name, module in infinity.transformer.named_modules():
        if ".lora_" in name and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    infinity.logits(infinity.encode_prompts(PROMPTS), totals, SCHEDULE)
    assert seen == [infinity.dtype] * 2 * 2 * 4


def test_biases_of_attention_can_be_left_out(
    infinity: Infinity, infinity_config: InfinityConfig, totals: list[Tensor]
) -> None:
    """Leaving them out is a model whose biases are zero, and is told apart in records."""
    without = Infinity.load(replace(infinity_config, attention_bias=False))
    text = infinity.encode_prompts(PROMPTS)
    left_out = without.logits(text, totals, SCHEDULE)
    assert not torch.allclose(infinity.logits(text, totals, SCHEDULE), left_out, atol=1e-2)
    for name, parameter in infinity.transformer.named_parameters():
        if name.endswith(("q_bias", "v_bias")):
            parameter.data.zero_()
    close(infinity.logits(text, totals, SCHEDULE), left_out, 1e-6)
    assert [each.describe()["attention_bias"] for each in (infinity, without)] == [True, False]


def test_texts_of_several_lengths() -> None:
    text = ragged([torch.ones(2, 4), torch.full((5, 4), 2.0)])
    assert text.known().sum(1).tolist() == [2, 5]
    assert torch.equal(text.features.sum(2), torch.tensor([[4.0, 4, 0, 0, 0], [8.0, 8, 8, 8, 8]]))


def test_an_adapter_is_loaded_as_it_was_trained(infinity_config: InfinityConfig, tmp_path: Path) -> None:
    """Its file says of which base model it is, and whether that had its biases."""
    infinity = Infinity.load(replace(infinity_config, attention_bias=False))
    adapters = Adapters(infinity.transformer)
    adapters.add("lora", LoRA(targets=r".*\.ffn\.fc[12]", rank=4, alpha=32))
    adapters.save(tmp_path, {"method": "x", "backbone": infinity.describe(), "config": {}})
    setup = lookup.recorded_setup(tmp_path, [])
    assert setup["backbone"] == {"weights": "tiny-infinity", "attention_bias": False}
