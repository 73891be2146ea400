"""Schedules, bits and their codes, wrong bits, and how bits are drawn."""

import pytest
import torch
from tiny_infinity import BITS

from pentimento.draws import Draws
from pentimento.errors import UserError
from pentimento.infinity.quantizer import Quantizer, RandomFlips, to_maps, to_tokens, up
from pentimento.infinity.sampling import Sampling, probabilities
from pentimento.infinity.scales import TABLES, Schedule, nearest_ratio
from pentimento.infinity.transformer import bit_cross_entropy, drop_path

SCHEDULE = Schedule.of(1.0, "0.06M")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_schedules() -> None:
    assert len(TABLES) == 15
    for ratio in TABLES:
        whole = Schedule.of(ratio, "1M")
        assert len(whole.grids) == 13 and whole.grids[0] == (1, 1)
        assert whole.spans[-1][1] == whole.tokens == sum(h * w for h, w in whole.grids)
        height, width = whole.pixels
        assert abs(height / width - ratio) < 0.01 and abs(height * width / 1024**2 - 1) < 0.06
        assert nearest_ratio(height, width) == ratio
    assert Schedule.of(1.0, "1M").tokens == 10521
    with pytest.raises(UserError, match="no size is called '2M'"):
        Schedule.of(1.0, "2M")
    with pytest.raises(UserError, match=r"no schedule has height / width 1.1; there are .*0.8, 1, 1.25"):
        Schedule.of(1.1, "1M")


def test_positions_are_those_of_the_largest_picture() -> None:
    """A token of a coarse scale stands where it would in the last grid at 1M, whatever the size."""
    positions = SCHEDULE.positions()
    assert torch.equal(positions, Schedule.of(1.0, "1M").positions()[: SCHEDULE.tokens])
    start, end = SCHEDULE.spans[-1]
    assert positions[start:end, 1].view(16, 16)[3].tolist() == list(range(0, 64, 4))


def test_weights_count_scales_by_their_side() -> None:
    weights = Schedule.of(1.0, "1M").weights()
    shares = [float(weights[a:b].sum()) for a, b in Schedule.of(1.0, "1M").spans]
    sides = [w for _, w in Schedule.of(1.0, "1M").grids]
    assert shares == pytest.approx([side / sum(sides) for side in sides], rel=1e-4)


def test_levels_quantise_what_is_left() -> None:
    quantizer, features = Quantizer(BITS), noise(2, BITS, 16, 16)
    total = torch.zeros_like(features)
    for level, grid in zip(quantizer.levels(features, SCHEDULE), SCHEDULE.grids, strict=True):
        rest = torch.nn.functional.adaptive_avg_pool2d(features - total, grid)
        assert torch.equal(level.bits, rest > 0)
        total = total + up(quantizer.codes(level.bits), (16, 16))
        assert torch.equal(level.total, total)
    assert (features - total).square().mean() < features.square().mean()


def test_tokens_are_maps_row_by_row() -> None:
    maps = noise(2, BITS, 3, 5)
    tokens = to_tokens(maps)
    assert torch.equal(tokens[1, 5 * 2 + 4], maps[1, :, 2, 4])
    assert torch.equal(to_maps(tokens, (3, 5)), maps)


def test_inputs_are_what_the_scales_before_gave() -> None:
    quantizer = Quantizer(BITS)
    totals = [level.total for level in quantizer.levels(noise(1, BITS, 16, 16), SCHEDULE)]
    inputs = quantizer.inputs(totals, SCHEDULE)
    assert inputs.shape == (1, SCHEDULE.tokens - 1, BITS)
    start, end = SCHEDULE.spans[-1]
    assert torch.equal(to_maps(inputs[:, start - 1 : end - 1], (16, 16)), totals[-2])


def test_wrong_bits_are_made_good_for() -> None:
    """Labels are right for the history that holds the wrong bits, which themselves are no labels."""
    quantizer, features = Quantizer(BITS), noise(2, BITS, 16, 16)
    clean = list(quantizer.levels(features, SCHEDULE))
    wrong = list(quantizer.levels(features, SCHEDULE, lambda k, bits: torch.full_like(bits, k == 0)))
    assert torch.equal(wrong[0].bits, clean[0].bits)
    flipped = up(quantizer.codes(~clean[0].bits), (16, 16))
    assert torch.equal(wrong[0].total, flipped)
    rest = torch.nn.functional.adaptive_avg_pool2d(features - flipped, (2, 2))
    assert torch.equal(wrong[1].bits, rest > 0) and not torch.equal(wrong[1].bits, clean[1].bits)


def test_flips_have_a_rate_per_picture() -> None:
    draws = Draws([(0, row) for row in range(64)], torch.device("cpu"))
    flips = RandomFlips(draws, 0.3, scales=3)
    bits = torch.zeros(64, BITS, 20, 20, dtype=torch.bool)
    rates = flips(0, bits).float().mean((1, 2, 3))
    assert rates.max() < 0.34 and rates.min() < 0.05 and rates.std() > 0.05
    assert not flips(3, bits).any()
    assert not RandomFlips(draws, 0.0)(0, bits).any()


def test_unlikely_values_are_never_drawn() -> None:
    p = torch.tensor([0.02, 0.031, 0.4, 0.5, 0.99])
    logits = torch.stack([1 - p, p], -1).log()
    kept = probabilities(logits, Sampling(top_p=0.97))
    assert kept[:, 1].tolist() == pytest.approx([0.0, 0.031, 0.4, 0.5, 1.0])
    assert torch.equal(kept.sum(-1), torch.ones(5))
    everything = probabilities(logits, Sampling(top_p=0.0))
    assert everything[:, 1].tolist() == pytest.approx(p.tolist())
    greedy = probabilities(logits, Sampling(top_p=0.0, top_k=1))
    assert greedy[:, 1].tolist() == [0.0, 0.0, 0.0, 0.5, 1.0]


def test_loss_is_the_cross_entropy_of_two_values() -> None:
    logits, bits = noise(2, 5, BITS, 2) * 8, noise(2, 5, BITS, seed=1) > 0
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 2), bits.flatten().long(), reduction="none")
    torch.testing.assert_close(bit_cross_entropy(logits, bits), theirs.view(2, 5, BITS).mean(-1))


def test_dropped_branches_are_made_up_for() -> None:
    """Never in the first block, most often in the last."""
    factors = drop_path(torch.rand(4000, 3, 2, generator=torch.Generator().manual_seed(0)), 0.25)
    assert factors.shape == (3, 2, 4000) and factors[0].eq(1).all()
    assert sorted(set(factors[1].flatten().tolist())) == [0.0, pytest.approx(8 / 7)]
    assert sorted(set(factors[2].flatten().tolist())) == [0.0, pytest.approx(4 / 3)]
    assert (factors.mean(2) - 1).abs().max() < 0.05
