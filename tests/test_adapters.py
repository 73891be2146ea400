"""Adapters on a tiny FLUX: switching, whole modules, what they start from, and what they refuse."""

import pytest
import torch
import toy
from tiny_flux import BLOCKS, awake, build, transformer, velocity
from torch import nn

from pentimento.adapters import Adapters, LoRA, bare
from pentimento.errors import UserError

TARGETS = ("attn.to_q", "attn.to_k", "ff.net.2", "proj_out")


@pytest.fixture
def host() -> nn.Module:
    return transformer()


@pytest.mark.parametrize("full", [(), ("x_embedder",), ("x_embedder", "norm_out")])
def test_off_is_the_base_model_bit_for_bit(host, full):
    base = velocity(host)
    adapters = Adapters(host)
    adapters.add("edit", LoRA(targets=BLOCKS, rank=4, full=full))
    adapters.use(edit=1)
    assert torch.equal(velocity(host), base), "B is zero and the copy equals the base at first"
    awake(adapters, "edit")
    changed = velocity(host)
    assert not torch.allclose(changed, base, atol=1e-3)
    adapters.use()
    assert torch.equal(velocity(host), base)
    adapters.use(edit=0)
    assert torch.equal(velocity(host), base)
    adapters.use(edit=1)
    assert torch.equal(velocity(host), changed)


def test_whole_modules_are_blended():
    """Scale s gives base + s (trained - base); two adapters add up."""
    adapters = build(LoRA(targets=("ff.net.2",), rank=1, full=("x_embedder",)), "one", "two")
    module = adapters.host.x_embedder
    x = torch.randn(3, 384)
    base, one, two = (m(x) for m in (module.original_module, *module.modules_to_save.values()))
    adapters.use(one=0.25)
    assert torch.allclose(module(x), base + 0.25 * (one - base), atol=1e-5)
    adapters.use(one=-1.0, two=0.5)
    assert torch.allclose(module(x), base - (one - base) + 0.5 * (two - base), atol=1e-5)
    adapters.use(two=1.0)
    assert torch.equal(module(x), two)


def test_gradients_reach_what_is_trained_and_used():
    adapters = build(None, "content", "semantic")
    adapters.train("content", "semantic")

    def reached() -> set[str]:
        for parameter in adapters.parameters("content", "semantic"):
            parameter.grad = None
        velocity(adapters.host).square().mean().backward()
        return {n for n in ("content", "semantic") if all(p.grad is not None for p in adapters.parameters(n))}

    adapters.use(content=1, semantic=0.5)
    assert reached() == {"content", "semantic"}
    adapters.use(content=1, semantic=1, frozen=("content",))
    assert reached() == {"semantic"}
    adapters.train("content")
    adapters.use(content=1, semantic=1)
    assert reached() == {"content"}
    assert not any(
        p.grad is not None for n, p in adapters.host.named_parameters() if "content" not in n.split(".")
    )


def test_half_precision_host_with_float32_adapters():
    """Also outside of autocast, whole module included."""
    host = transformer().bfloat16()
    adapters = Adapters(host)
    adapters.add("edit", LoRA(targets=BLOCKS, rank=4, full=("x_embedder",)))
    awake(adapters, "edit")
    adapters.use(edit=1)
    velocity(host).float().square().mean().backward()
    parameters = adapters.parameters("edit")
    assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {torch.float32}
    adapters.use(edit=0.5)
    assert velocity(host).dtype == torch.bfloat16


def test_the_start_depends_on_seed_and_name_alone():
    host = transformer()
    before = torch.get_rng_state()
    Adapters(host).add("edit", LoRA(targets=BLOCKS))
    assert torch.equal(torch.get_rng_state(), before)
    a, b = build(trained=False), build(trained=False)
    assert toy.difference(a.state_dict(), b.state_dict()) == 0
    b.reset(seed=1)
    assert toy.difference(a.state_dict(), b.state_dict()) > 0
    awake(b, "edit").reset()
    assert toy.difference(a.state_dict(), b.state_dict()) == 0


@pytest.mark.parametrize(("init", "deviation"), [("gaussian", 1 / 8), ("default", 32**-0.5 / 3**0.5)])
def test_the_start_has_pefts_distribution(init, deviation):
    """Standard deviation of A: 1 / rank, or that of a uniform distribution of +-1/sqrt(inputs)."""
    state = build(LoRA(targets=("attn.to_q",), rank=8, init=init), trained=False).state_dict()["edit"]
    a = torch.cat([value.flatten() for key, value in state.items() if "lora_A" in key])
    assert float(a.std()) == pytest.approx(deviation, rel=0.1)
    assert not any(value.any() for key, value in state.items() if "lora_B" in key)


@pytest.mark.parametrize(("alpha", "scaled"), [(None, 4.0), (6.0, 6.0)])
def test_alpha_scales_the_update(alpha, scaled):
    adapters = build(LoRA(targets=("transformer_blocks.0.ff.net.2",), rank=4, alpha=alpha))
    layer = adapters.host.transformer_blocks[0].ff.net[2]
    a, b = (p.data for p in adapters.parameters("edit"))
    adapters.use(edit=0.5)
    x = torch.randn(2, a.shape[1])
    update = 0.5 * scaled / 4 * x @ a.T @ b.T
    assert torch.allclose(layer(x), layer.base_layer(x) + update, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (LoRA(targets=("attn.to_qq",)), r"called 'attn.to_qq'; did you mean .*attn\.to_q"),
        (LoRA(targets=("attn.to_q", "nonsense")), "called 'nonsense'"),
        (LoRA(targets=r".*attn\.q_proj"), r"called '.*attn\\\\.q_proj'"),
        (LoRA(targets="("), "not a regular expression"),
        (LoRA(targets=("attn",)), "a FluxAttention; a LoRA fits on linear layers only"),
        (LoRA(targets=("attn.to_q",), full=("x_embeder",)), "'x_embeder'.*x_embedder"),
        (LoRA(targets=("x_embedder",), full=("x_embedder",)), "whole and a target of the LoRA too"),
    ],
)
def test_targets_that_match_nothing(host, spec, said):
    with pytest.raises(UserError, match=said):
        Adapters(host).add("edit", spec)


@pytest.mark.parametrize("name", ["attn", "frozen", "tensors", "a.b", ""])
def test_impossible_names(host, name):
    with pytest.raises(ValueError, match="name"):
        Adapters(host).add(name, LoRA(targets=TARGETS))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"targets": ()}])
def test_impossible_specs(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoRA(**{"targets": TARGETS, **wrong})


def test_unknown_adapters(host):
    adapters = Adapters(host)
    adapters.add("edit", LoRA(targets=BLOCKS))
    with pytest.raises(UserError, match="'edti'.*edit"):
        adapters.train("edti")
    with pytest.raises(ValueError, match="'edti'"):
        adapters.use(edti=1)


def test_a_bare_host_is_the_base_model_on_the_same_weights(host):
    before = velocity(host)
    adapters = build(host=host)
    twin = bare(host)
    adapters.use(edit=1)
    assert torch.equal(velocity(twin), before) and not torch.equal(velocity(host), before)
    own = {parameter.data_ptr() for parameter in host.parameters()}
    assert {parameter.data_ptr() for parameter in twin.parameters()} < own
    assert twin.state_dict().keys() == transformer().state_dict().keys()
