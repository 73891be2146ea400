"""Dropout that can be repeated."""

import pytest
import torch

from pentimento.layers import Dropout, dropout

SEEDS = torch.tensor([3, 2**32 - 1])


@pytest.mark.parametrize("x", [torch.randn(2, 5, 3), torch.randn(2, 3, 5).transpose(1, 2)])
def test_the_operator_is_what_torch_wants_of_one(x):
    found = torch.library.opcheck(dropout, (x.requires_grad_(), SEEDS, 0.3))
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


def test_a_gradient_is_dropped_as_its_element_was():
    x = torch.ones(2, 50, requires_grad=True)
    out = dropout(x, SEEDS, 0.3)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_the_layout_in_memory_does_not_count():
    x = torch.ones(2, 5, 7).transpose(1, 2).requires_grad_()
    out = dropout(x, SEEDS, 0.3)
    assert torch.equal(out, dropout(x.detach().contiguous(), SEEDS, 0.3))
    out.backward(torch.ones_like(out.transpose(1, 2)).transpose(1, 2))
    assert torch.equal(x.grad, out.detach())


def test_a_row_hangs_on_its_seed_alone():
    x = torch.randn(2, 50)
    both = dropout(x, SEEDS, 0.3)
    for i in range(2):
        assert torch.equal(dropout(x[i : i + 1], SEEDS[i : i + 1], 0.3)[0], both[i])


def test_under_autocast_it_is_as_narrow_as_the_layer_behind():
    layer = Dropout(0.5)
    layer.seeds = SEEDS
    x = torch.randn(2, 50)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow == 0, layer(x) == 0)
