"""LoRA layers with experts: what they compute, what is learnt, how they switch, and files that keep them apart."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import toy
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_flux import awake, transformer, velocity
from torch import Tensor, nn

from pentimento import inspection
from pentimento.adapters import Adapters, ExpertLoRA, LoRA, spec_of
from pentimento.errors import UserError

NAME = "pytorch_lora_weights.safetensors"
TARGETS = (
    "attn.to_q",
    "transformer_blocks.0.ff.net.2",
    "transformer_blocks.1.ff.net.2",
    "0.proj_out",
    "1.proj_out",
)
# The published layers: those of real FLUX too, see test_the_published_layers.
PUBLISHED = (
    r".*x_embedder|.*(?<!single_)transformer_blocks\.[0-9]+\.(norm1\.linear|attn\.to_[kqv]|attn\.to_out\.0|ff\.net\.2)"
    r"|.*single_transformer_blocks\.[0-9]+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[kqv])"
)
EXPERTS = [
    "transformer_blocks.0.ff.net.2",
    "transformer_blocks.1.ff.net.2",
    "single_transformer_blocks.0.proj_out",
    "single_transformer_blocks.1.proj_out",
]


class One(nn.Module):
    """A single linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def one(**spec: object) -> Adapters:
    """Experts on a single layer, as if trained."""
    adapters = Adapters(One())
    wanted = {"targets": ("layer",), "expert_targets": "layer", "experts": 5, "expert_rank": 3, **spec}
    adapters.add("edit", ExpertLoRA(**wanted))
    awake(adapters, "edit").use(edit=1.0)
    return adapters


def flux(*names: str, host: nn.Module | None = None, trained: bool = True, **spec: object) -> Adapters:
    """Experts and plain layers on the tiny FLUX."""
    adapters = Adapters(host or transformer())
    for name in names or ("edit",):
        adapters.add(name, ExpertLoRA(**{"targets": TARGETS, "rank": 4, "expert_rank": 3, **spec}))
    return awake(adapters, *(names or ("edit",))) if trained else adapters


def by_hand(layer: nn.Module, x: Tensor, top_k: int, gate: str, scale: float) -> Tensor:
    """The layer, one expert and one token after the other."""
    a, b = layer.lora_A["edit"].weight.chunk(5, 0), layer.lora_B["edit"].weight.chunk(5, 1)
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = layer.lora_route["edit"].weight @ token
        best = logits.argsort(descending=True)[:top_k]
        weights = logits[best].softmax(0) if gate == "topk-softmax" else logits.softmax(0)[best]
        update = sum(w * scale * b[e] @ (a[e] @ token) for w, e in zip(weights, best.tolist(), strict=True))
        out.append(layer.base_layer(token) + update)
    return torch.stack(out).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("gate", ["topk-softmax", "softmax-topk"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 4)])
def test_experts_at_once_are_one_after_the_other(gate, top_k, shape):
    adapters = one(top_k=top_k, gate=gate, expert_alpha=6.0)
    x = torch.randn(*shape, 12)
    expected = by_hand(adapters.host.layer, x, top_k, gate, scale=6.0 / 3)
    assert torch.allclose(adapters.host(x), expected, atol=1e-6)
    adapters.use(edit=-0.5)
    expected = by_hand(adapters.host.layer, x, top_k, gate, scale=-0.5 * 6.0 / 3)
    assert torch.allclose(adapters.host(x), expected, atol=1e-6)


def test_off_is_the_base_model_bit_for_bit():
    host = transformer()
    base = velocity(host)
    adapters = flux(host=host, trained=False)
    adapters.use(edit=1)
    assert torch.equal(velocity(host), base), "B is zero at first"
    awake(adapters, "edit")
    adapters.use(edit=1)
    assert not torch.allclose(velocity(host), base, atol=1e-3)
    for off in ({}, {"edit": 0.0}):
        adapters.use(**off)
        assert torch.equal(velocity(host), base)


def test_the_scale_reaches_the_experts():
    """Twice the scale is twice the update, while the gates stay as they are."""
    adapters, x = one(), torch.randn(7, 12)
    adapters.use()
    base = adapters.host(x)
    adapters.use(edit=1.0)
    update = adapters.host(x) - base
    adapters.use(edit=2.0)
    assert torch.allclose(adapters.host(x) - base, 2 * update, atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "top_k", "learns"),
    [
        ("topk-softmax", 1, False),
        ("topk-softmax", 2, True),
        ("softmax-topk", 1, True),
        ("softmax-topk", 2, True),
    ],
)
def test_which_routers_learn(gate, top_k, learns):
    """The published top-1 router gets a gradient that is exactly zero; experts always learn."""
    adapters = one(gate=gate, top_k=top_k)
    adapters.host(torch.randn(9, 12)).square().mean().backward()
    layer = adapters.host.layer
    assert bool(layer.lora_route["edit"].weight.grad.any()) == learns
    assert layer.lora_A["edit"].weight.grad.any() and layer.lora_B["edit"].weight.grad.any()


def test_balance_trains_the_published_router_too():
    adapters, x = one(), torch.randn(9, 12)
    adapters.host(x)
    adapters.balance("edit").backward()
    assert adapters.host.layer.lora_route["edit"].weight.grad.any()


def test_balance_and_usage_are_switch_transformers():
    """E sum_e f_e P_e: shares of the tokens, times the mean probabilities; means over the layers."""
    adapters = flux(top_k=2)
    adapters.use(edit=1)
    seen: dict[str, Tensor] = {}
    for path in EXPERTS:
        layer = adapters.host.get_submodule(path)
        layer.register_forward_pre_hook(
            lambda _, inputs, p=path, w=layer.lora_route["edit"].weight: seen.update({p: inputs[0] @ w.T})
        )
    velocity(adapters.host)
    losses, usages = [], []
    for logits in (seen[path].flatten(0, 1) for path in EXPERTS):
        best = logits.topk(2).indices
        share = torch.stack([(best == e).float().sum() for e in range(4)]) / best.numel()
        losses.append(4 * (share * logits.softmax(-1).mean(0)).sum())
        usages.append(share)
    assert torch.allclose(adapters.balance("edit"), torch.stack(losses).mean())
    usage = adapters.expert_usage("edit")
    assert torch.allclose(usage, torch.stack(usages).mean(0))
    assert not usage.requires_grad and float(usage.sum()) == pytest.approx(1)
    assert list(adapters.routing("edit")) == EXPERTS


def test_balance_at_its_ends():
    """1 where all experts get the same, E where one gets everything."""
    adapters = one(experts=4)
    weight = adapters.host.layer.lora_route["edit"].weight
    with torch.no_grad():
        weight.zero_()[:, :4] = 1e3 * torch.eye(4)
        adapters.host(torch.eye(12)[:4])
        assert float(adapters.balance("edit")) == pytest.approx(1)
        adapters.host(torch.eye(12)[:1])
    assert float(adapters.balance("edit")) == pytest.approx(4)
    assert adapters.expert_usage("edit").tolist() == [1, 0, 0, 0]


def test_usage_before_a_pass_and_without_experts():
    adapters = flux()
    adapters.add("plain", LoRA(targets=TARGETS))
    with pytest.raises(ValueError, match="not run yet"):
        adapters.expert_usage("edit")
    with pytest.raises(ValueError, match="no experts"):
        adapters.balance("plain")


def gradients(adapters: Adapters) -> tuple[list[Tensor], list[weakref.ref[Tensor]]]:
    """Gradients of a loss with the balance in it, and what the expert layers were given on the way."""
    given: list[weakref.ref[Tensor]] = []
    layers = [adapters.host.get_submodule(path) for path in EXPERTS]
    hooks = [la.register_forward_pre_hook(lambda _, x: given.append(weakref.ref(x[0]))) for la in layers]
    adapters.train("edit")
    adapters.use(edit=1)
    loss = velocity(adapters.host).square().mean()
    (loss + 0.3 * adapters.balance("edit")).backward()
    for hook in hooks:
        hook.remove()
    return [p.grad.clone() for p in adapters.parameters("edit")], given


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradient_checkpointing_changes_nothing_and_keeps_nothing(top_k):
    plain, given = gradients(flux(top_k=top_k))
    assert len(given) == 4
    adapters = flux(top_k=top_k)
    adapters.host.train()
    adapters.host.enable_gradient_checkpointing()
    again, also_given = gradients(adapters)
    assert len(also_given) == 8, "each layer ran twice"
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    gc.collect()
    assert not any(x() is not None for x in (*given, *also_given))
    assert adapters.balance("edit").grad_fn is None
    assert float(adapters.balance("edit")) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_whose_balance_nobody_asked_for_keeps_nothing(checkpointing):
    adapters = flux()
    adapters.host.train()
    if checkpointing:
        adapters.host.enable_gradient_checkpointing()
    adapters.use(edit=1)
    velocity(adapters.host).square().mean().backward()
    assert not any(routing.probability.requires_grad for routing in adapters.routing("edit").values())
    with torch.no_grad():
        velocity(adapters.host)
    assert not adapters.balance("edit").requires_grad


def test_two_passes_before_one_backward():
    """The second pass is not let go of with the first."""
    adapters, x = one(), torch.randn(4, 12)
    first = adapters.host(x).sum()
    adapters.host(x + 1)
    first.backward()
    before = {key: p.grad.clone() for key, p in adapters._named("edit").items() if p.grad is not None}
    adapters.balance("edit").backward()
    router = adapters._named("edit")["layer.lora_route.weight"].grad
    assert router is not None and (router - before.get("layer.lora_route.weight", 0)).any()


@pytest.mark.parametrize("order", [("edit", "other", "plain"), ("plain", "other", "edit")])
def test_adapters_beside_each_other(order):
    """Plain ones and several with experts share layers; each acts as it does alone, in whatever order they came."""
    specs = {
        "edit": ExpertLoRA(targets=TARGETS, rank=4, expert_rank=3, top_k=2),
        "other": ExpertLoRA(targets=TARGETS, rank=2, expert_rank=2, experts=3, gate="softmax-topk"),
        "plain": LoRA(targets=TARGETS, rank=5, alpha=2.0),
    }
    alone = {}
    for name, spec in specs.items():
        adapters = Adapters(transformer())
        adapters.add(name, spec)
        awake(adapters, name).use(**{name: 0.5})
        alone[name] = adapters
    together = Adapters(transformer())
    for name in order:
        together.add(name, specs[name])
        together.load_state_dict({**together.state_dict(), name: alone[name].state_dict()[name]})
    for name in specs:
        together.use(**{name: 0.5})
        assert torch.equal(velocity(together.host), velocity(alone[name].host))
    together.train("edit", "plain")
    together.use(edit=1, other=1, plain=1, frozen=("plain",))
    velocity(together.host).square().mean().backward()
    reached = {name for name in specs if all(p.grad is not None for p in together.parameters(name))}
    assert reached == {"edit"}
    layer = together.host.transformer_blocks[0].ff.net[2]
    layer.delete_adapter("edit")
    assert set(layer.lora_route) == {"other"} and set(layer.lora_A) == {"other", "plain"}


def test_half_precision_and_autocast():
    """A half-precision host with float32 adapters; the gates are computed in float32, the update lands in the host's dtype."""
    adapters = flux(host=transformer().bfloat16(), top_k=2)
    adapters.use(edit=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = velocity(adapters.host).float().square().mean()
    (loss + adapters.balance("edit")).backward()
    parameters = adapters.parameters("edit")
    assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {torch.float32}
    with torch.no_grad():
        assert velocity(adapters.host).dtype == torch.bfloat16
    assert adapters.routing("edit")[EXPERTS[0]].weight.dtype == torch.float32


def test_merging_is_refused():
    layer = one().host.layer
    before = layer.base_layer.weight.clone()
    for safe in (False, True):
        with pytest.raises(UserError, match="experts, which cannot be merged.*--to lora"):
            layer.merge(safe_merge=safe)
    assert torch.equal(layer.base_layer.weight, before)


def test_the_start():
    """A is N(0, 1/rank^2) with the experts' own rank, B zero, the router as nn.Linear starts; from seed and name alone."""
    host = transformer()
    before = torch.get_rng_state()
    adapters = flux(host=host, rank=4, expert_rank=8, trained=False)
    assert torch.equal(torch.get_rng_state(), before)
    state = adapters.state_dict()["edit"]
    a = torch.cat([v.flatten() for k, v in state.items() if k.removesuffix(".lora_A.weight") in EXPERTS])
    assert float(a.std()) == pytest.approx(1 / 8, rel=0.05)
    a = torch.cat([v.flatten() for k, v in state.items() if k.endswith("to_q.lora_A.weight")])
    assert float(a.std()) == pytest.approx(1 / 4, rel=0.1)
    assert not any(v.any() for k, v in state.items() if "lora_B" in k)
    for path in EXPERTS:
        router = state[f"{path}.lora_route.weight"]
        bound = router.shape[1] ** -0.5
        assert 0.9 * bound < float(router.abs().max()) <= bound
        assert float(router.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    start = {k: v.clone() for k, v in state.items()}
    awake(adapters, "edit").reset(seed=1)
    assert not torch.equal(
        adapters.state_dict()["edit"][f"{EXPERTS[0]}.lora_route.weight"],
        start[f"{EXPERTS[0]}.lora_route.weight"],
    )
    adapters.reset()
    assert toy.difference(adapters.state_dict() | {"tensors": {}}, {"edit": start, "tensors": {}}) == 0


def test_the_published_layers():
    """57 of FLUX's 343 layers: the image stream's second feed-forward matrix, and the output of single blocks."""
    with torch.device("meta"):
        host = FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True)
    adapters = Adapters(host)
    spec = ExpertLoRA(targets=PUBLISHED, rank=1, expert_rank=1)
    adapters.add("edit", spec)
    layers = list(adapters._expert_layers(spec))
    assert layers == [f"transformer_blocks.{i}.ff.net.2" for i in range(19)] + [
        f"single_transformer_blocks.{i}.proj_out" for i in range(38)
    ]
    named = adapters._named("edit")
    assert sum(key.endswith("lora_A.weight") for key in named) == 343
    routers = sum(p.numel() for key, p in named.items() if "lora_route" in key)
    factors = sum(p.numel() for p in named.values()) - routers
    assert 32 * factors + routers == 214_437_888  # at the published rank
    assert len(adapters._published("edit", named)) == 1085


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"experts": 1}, "experts must be at least 2"),
        ({"expert_rank": 0}, "expert_rank must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 5}, "at most the number of experts, 4"),
        ({"expert_alpha": 0.0}, "expert_alpha must be above 0"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_impossible_specs(wrong, said):
    with pytest.raises(ValueError, match=said):
        ExpertLoRA(**{"targets": TARGETS, **wrong})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"targets": ("attn.to_q",)}, "matches none of the layers that lora.targets names"),
        ({"expert_targets": "("}, "lora.expert_targets: '\\(' is not a regular expression"),
    ],
)
def test_experts_on_nothing(spec, said):
    with pytest.raises(UserError, match=said):
        flux(**spec)


def test_experts_on_a_convolution():
    host = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(UserError, match="0 is a Conv2d; experts fit on linear layers only"):
        Adapters(host).add("edit", ExpertLoRA(targets=("0",), expert_targets="0"))


def test_names_and_shapes_in_a_file(tmp_path: Path):
    adapters = flux(top_k=2, rank=4)
    adapters.save(tmp_path, {"method": "icedit"})
    tensors = load_file(tmp_path / NAME)
    stacked = adapters.state_dict()["edit"]
    for path in EXPERTS:
        inputs = stacked[f"{path}.lora_A.weight"].shape[1]
        assert stacked[f"{path}.lora_A.weight"].shape == (12, inputs)
        for expert in range(4):
            a = tensors.pop(f"transformer.{path}.lora_A.expert_{expert}.weight")
            b = tensors.pop(f"transformer.{path}.lora_B.expert_{expert}.weight")
            assert torch.equal(a, stacked[f"{path}.lora_A.weight"][3 * expert : 3 * expert + 3])
            assert torch.equal(b, stacked[f"{path}.lora_B.weight"][:, 3 * expert : 3 * expert + 3])
        assert tensors.pop(f"transformer.{path}.lora_route.weight").shape == (4, inputs)
    assert {k.partition(".attn.")[2] for k in tensors} == {"to_q.lora_A.weight", "to_q.lora_B.weight"}
    with safe_open(tmp_path / NAME, framework="pt") as file:
        record = json.loads(file.metadata()["pentimento"])["adapters"]["edit"]
    assert record == {
        "rank": 4, "alpha": 4.0, "targets": sorted(TARGETS), "full": [], "expert_targets": r".*(ff\.net|proj_out).*",
        "experts": 4, "expert_rank": 3, "expert_alpha": 3.0, "top_k": 2, "gate": "topk-softmax",
    }  # fmt: skip


@pytest.mark.parametrize("names", [("edit",), ("content", "semantic")])
def test_save_and_load(tmp_path: Path, names):
    saved = flux(*names, top_k=2, gate="softmax-topk", expert_alpha=5.0, full=("x_embedder",))
    saved.save(tmp_path / "weights")
    loaded = flux(*names, trained=False, top_k=2, gate="softmax-topk", expert_alpha=5.0, full=("x_embedder",))
    assert toy.difference(saved.state_dict(), loaded.state_dict()) > 0
    loaded.load(tmp_path)
    assert toy.difference(saved.state_dict(), loaded.state_dict()) == 0
    with pytest.raises(ValueError, match="other adapters"):
        flux(*names, experts=3).load_state_dict(saved.state_dict())


def published(folder: Path, **spec: object) -> Adapters:
    """A file as others publish it: no record, half precision."""
    adapters = flux(**spec)
    adapters.save(folder)
    tensors = {key: value.bfloat16() for key, value in load_file(folder / NAME).items()}
    save_file(tensors, folder / NAME, {"format": "pt"})
    return adapters


def test_a_published_file_says_what_it_needs(tmp_path: Path):
    saved = published(tmp_path, experts=3)
    spec = spec_of(tmp_path / NAME)
    assert isinstance(spec, ExpertLoRA)
    assert (spec.experts, spec.expert_rank, spec.expert_scaled, spec.rank, spec.scaled) == (3, 3, 3.0, 4, 4.0)
    assert (spec.top_k, spec.gate, spec.full) == (1, "topk-softmax", ())
    adapters = Adapters(transformer())
    adapters.add("edit", spec)
    assert list(adapters._expert_layers(spec)) == EXPERTS
    adapters.load(tmp_path / NAME)
    assert toy.difference(adapters.state_dict(), saved.state_dict()) < 2e-2
    chosen = flux(experts=3, top_k=2)
    chosen.load(tmp_path / NAME)  # such a file does not store top_k: whoever knows better may say so


def test_our_own_file_says_all(tmp_path: Path):
    flux(experts=3, top_k=2, gate="softmax-topk", expert_alpha=1.5).save(tmp_path)
    spec = spec_of(tmp_path / NAME)
    assert isinstance(spec, ExpertLoRA)
    assert (spec.experts, spec.top_k, spec.gate, spec.expert_alpha) == (3, 2, "softmax-topk", 1.5)


def test_a_file_of_one_expert(tmp_path: Path):
    """What a single one would be is a plain LoRA with a router that decides nothing."""
    published(tmp_path, experts=2)
    tensors = load_file(tmp_path / NAME)
    changed = {
        k: v[:1].clone() if "lora_route" in k else v for k, v in tensors.items() if "expert_1" not in k
    }
    save_file(changed, tmp_path / NAME)
    with pytest.raises(UserError, match="experts must be at least 2, but it is 1"):
        spec_of(tmp_path / NAME)


def test_experts_only_and_mixed(tmp_path: Path):
    flux(targets=(*TARGETS[1:],)).save(tmp_path)
    assert spec_of(tmp_path / NAME).rank == 3
    tensors = load_file(tmp_path / NAME)
    last = [key for key in tensors if "blocks.1.proj_out" in key and "expert_3" in key]
    save_file({k: v for k, v in tensors.items() if k not in last}, tmp_path / NAME)
    with pytest.raises(UserError, match=r"mixed numbers of experts \[3, 4\]"):
        spec_of(tmp_path / NAME)


def refused(adapters: Adapters, folder: Path) -> str:
    """The message, after checking that nothing was loaded."""
    before = {k: v.clone() for k, v in adapters.state_dict()["edit"].items()}
    with pytest.raises(UserError) as caught:
        adapters.load(folder / NAME)
    assert toy.difference({"": adapters.state_dict()["edit"]}, {"": before}) == 0
    return str(caught.value)


def plain() -> Adapters:
    adapters = Adapters(transformer())
    adapters.add("edit", LoRA(targets=TARGETS, rank=4))
    return awake(adapters, "edit")


def test_experts_into_a_plain_adapter(tmp_path: Path):
    published(tmp_path)
    said = refused(plain(), tmp_path)
    assert "has experts (4 in 4 layers), but adapter 'edit' is a plain LoRA; set lora.experts=4" in said
    assert "--to lora" in said


def test_a_plain_file_into_experts(tmp_path: Path):
    plain().save(tmp_path)
    assert "is a plain LoRA, but adapter 'edit' has 4 experts; leave lora.experts" in refused(
        flux(), tmp_path
    )


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"experts": 6}, "was trained with experts 6, adapter 'edit' has 4; set lora.experts=6"),
        ({"top_k": 2}, "was trained with top_k 2, adapter 'edit' has 1; set lora.top_k=2"),
        ({"gate": "softmax-topk"}, "with gate softmax-topk, adapter 'edit' has topk-softmax; set lora.gate=softmax-topk"),
        ({"expert_alpha": 6.0}, "with expert_alpha 6.0, adapter 'edit' has 3.0; set lora.expert_alpha=6.0"),
        ({"expert_rank": 2}, "was trained with expert_rank 2, adapter 'edit' has 3; set lora.expert_rank=2"),
        ({"targets": TARGETS[:-1]}, "missing"),
    ],
)  # fmt: skip
def test_other_experts(tmp_path: Path, there, said):
    flux(**there).save(tmp_path)
    assert said in refused(flux(), tmp_path)


def test_other_experts_in_a_file_of_others(tmp_path: Path):
    published(tmp_path, experts=6)
    assert "was trained with experts 6, adapter 'edit' has 4" in refused(flux(), tmp_path)


def test_stock_diffusers_refuses_our_files(tiny_fill: Path, tmp_path: Path):
    adapters = flux(host=FluxTransformer2DModel.from_pretrained(tiny_fill / "transformer"))
    adapters.save(tmp_path)
    pipeline = FluxFillPipeline.from_pretrained(tiny_fill)
    before = velocity(pipeline.transformer)
    with pytest.raises(TypeError, match="LoraConfig"):
        pipeline.load_lora_weights(tmp_path, weight_name=NAME)
    assert torch.equal(velocity(pipeline.transformer), before)


def test_stock_diffusers_takes_a_published_file_for_a_plain_one(tiny_fill: Path, tmp_path: Path):
    """The reason for that: it loads without an error, and gives something else."""
    adapters = flux(host=FluxTransformer2DModel.from_pretrained(tiny_fill / "transformer"))
    adapters.save(tmp_path)
    tensors = load_file(tmp_path / NAME)
    save_file(tensors, tmp_path / NAME)
    pipeline = FluxFillPipeline.from_pretrained(tiny_fill)
    pipeline.load_lora_weights(tmp_path, weight_name=NAME, adapter_name="default")
    assert not hasattr(pipeline.transformer.transformer_blocks[0].ff.net[2], "lora_route")
    adapters.use(edit=1)
    ours, theirs = velocity(adapters.host), velocity(pipeline.transformer)
    assert not torch.allclose(ours, theirs, atol=0.01)


def lines(folder: Path) -> dict[str, str]:
    about = inspection.inspect_file(folder)
    assert not about.problems
    return dict(inspection.report(about))


def test_inspect_knows_experts(tmp_path: Path):
    flux(top_k=2, gate="softmax-topk").save(tmp_path)
    said = lines(tmp_path)
    assert said["experts"] == "4 in each of 4 layers"
    assert (said["expert rank"], said["rank"], said["alpha"]) == ("3", "4", "4")
    assert said["top-k"] == "2, gate softmax-topk"
    assert "stock diffusers refuses it" in said["elsewhere"] and "--to lora" in said["elsewhere"]
    assert said["full"] == "none: LoRA factors, experts only"
    assert said["format"] == "diffusers"


def test_inspect_knows_published_experts(tmp_path: Path):
    published(tmp_path, experts=3)
    said = lines(tmp_path)
    assert said["experts"] == "3 in each of 4 layers"
    assert said["top-k"] == "not stored, 1 as published"
    assert "stock diffusers loads it without an error, but" in said["elsewhere"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k, v: {} if "0.ff.net.2.lora_B.expert_1" in k else {k: v}, "missing or incomplete"),
        (lambda k, v: {} if "0.ff.net.2.lora_route" in k else {k: v}, "missing or incomplete"),
        (lambda k, v: {k: v[:3] if "lora_route" in k else v}, "the router [3, 128] does not fit 4 experts"),
        (lambda k, v: {k: v[:2] if "lora_A.expert_2" in k else v}, "do not fit together"),
        (lambda k, v: {k: v * torch.nan if "lora_A.expert_2" in k else v}, "not finite"),
    ],
)
def test_inspect_finds_incomplete_experts(tmp_path: Path, change, said):
    published(tmp_path)
    tensors = load_file(tmp_path / NAME)
    changed = {k: v.contiguous() for key, value in tensors.items() for k, v in change(key, value).items()}
    save_file(changed, tmp_path / NAME)
    assert any(said in problem for problem in inspection.inspect_file(tmp_path).problems)
    with pytest.raises(UserError):
        flux().load(tmp_path / NAME)
