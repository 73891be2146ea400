"""Adapters on a tiny FLUX: switching, whole modules, files that diffusers reads, and strict loading."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pentimento import inspection
from pentimento.adapters import Adapters, LoRA, bare, spec_of
from pentimento.errors import UserError

TARGETS = ("attn.to_q", "attn.to_k", "ff.net.2", "proj_out")
BLOCKS = r"(single_)?transformer_blocks\.\d+\.attn\.to_(q|k)"
NAME = "pytorch_lora_weights.safetensors"


def tiny_transformer() -> nn.Module:
    """2 double and 2 single blocks of width 32, with FLUX.1 Fill's 384 channels."""
    torch.manual_seed(0)
    host = FluxTransformer2DModel(
        in_channels=384, out_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.normal_(0, 0.15)
    return host


def velocity(host: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(host.parameters()).dtype
    return host(
        hidden_states=torch.randn(2, 16, 384, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(2, 4, 32, generator=generator).to(dtype),
        pooled_projections=torch.randn(2, 24, generator=generator).to(dtype),
        timestep=torch.tensor([0.3, 0.7]).to(dtype),
        guidance=torch.full((2,), 3.5),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(4, 3),
        return_dict=False,
    )[0]


def awake(adapters: Adapters, *names: str) -> Adapters:
    """With weights as if trained."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters.train(*names):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return adapters


@pytest.fixture
def host() -> nn.Module:
    return tiny_transformer()


def build(
    spec: LoRA | None = None, *names: str, trained: bool = True, host: nn.Module | None = None
) -> Adapters:
    adapters = Adapters(host or tiny_transformer())
    for name in names or ("edit",):
        adapters.add(name, spec or LoRA(targets=BLOCKS, rank=4, alpha=6.0, full=("x_embedder",)))
    return awake(adapters, *(names or ("edit",))) if trained else adapters


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
    host = tiny_transformer().bfloat16()
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
    host = tiny_transformer()
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


@pytest.mark.parametrize("targets", [TARGETS, BLOCKS])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_stock_diffusers_reads_our_files(tiny_fill, tmp_path, targets, alpha):
    """Rank and alpha too; the result is ours to the last digit that float32 keeps."""
    host = FluxTransformer2DModel.from_pretrained(tiny_fill / "transformer")
    adapters = build(LoRA(targets=targets, rank=4, alpha=alpha), host=host)
    adapters.use(edit=1)
    adapters.save(tmp_path, {})
    pipeline = FluxFillPipeline.from_pretrained(tiny_fill)
    base = velocity(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path, weight_name=NAME)
    config = next(iter(pipeline.transformer.peft_config.values()))
    assert (config.r, config.lora_alpha) == (4, 6.0 if alpha else 4.0)
    ours, theirs = velocity(adapters.host), velocity(pipeline.transformer)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert float((theirs - base).detach().abs().max()) > 1e-3


def test_layout_and_metadata(tmp_path):
    adapters = build()
    adapters.save(tmp_path, {"method": "influxedit", "steps": 28})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flux_x_embedder.safetensors", NAME]
    tensors = load_file(tmp_path / NAME)
    assert all(
        key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight"))
        for key in tensors
    )
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert load_file(tmp_path / "flux_x_embedder.safetensors").keys() == {"weight", "bias"}
    with safe_open(tmp_path / NAME, framework="pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["pentimento"])
    assert (record["method"], record["steps"]) == ("influxedit", 28)
    assert record["adapters"] == {
        "edit": {"rank": 4, "alpha": 6.0, "targets": BLOCKS, "full": ["x_embedder"]}
    }
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"] == 6.0
    assert metadata["format"] == "pt" and str(tmp_path) not in str(metadata)


@pytest.mark.parametrize("said", ["no json", "[]", '{"transformer.lora_alpha": "much"}'])
def test_a_damaged_record_of_alpha_is_found_by_loading_and_by_inspecting(tmp_path, said):
    adapters = build(LoRA(targets=BLOCKS, rank=4))
    adapters.save(tmp_path)
    file = tmp_path / NAME
    tensors = load_file(file)
    save_file(tensors, file, {"lora_adapter_metadata": said})
    with pytest.raises(UserError, match="its lora_adapter_metadata is damaged"):
        adapters.load(file)
    assert any("lora_adapter_metadata is damaged" in one for one in inspection.inspect_file(file).problems)


def test_equal_weights_give_equal_bytes_in_every_process(tmp_path):
    """Hash seeds differ between processes, and with them the order of sets and of Rust's hash maps."""
    toy.Toy().adapters.save(tmp_path / "here", {"b": 1, "a": {"y": 1, "x": 2}})
    code = (
        "import sys, toy; from pathlib import Path; "
        "toy.Toy().adapters.save(Path(sys.argv[1]), {'a': {'x': 2, 'y': 1}, 'b': 1})"
    )
    environment = toy.environment() | {"PYTHONHASHSEED": "77"}
    environment["PYTHONPATH"] += f":{Path(toy.__file__).parent}"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], env=environment, check=True)
    for name in ("content", "semantic"):
        assert (tmp_path / "here" / name / NAME).read_bytes() == (
            tmp_path / "there" / name / NAME
        ).read_bytes()


@pytest.mark.parametrize("names", [("edit",), ("content", "semantic")])
@pytest.mark.parametrize("whole_run", [False, True])
def test_save_and_load(tmp_path, names, whole_run):
    saved = build(None, *names)
    saved.add_tensor("prompt", torch.randn(3, 2))
    saved.save(tmp_path / "weights", {})
    loaded = build(None, *names, trained=False)
    loaded.add_tensor("prompt", torch.zeros(3, 2))
    loaded.load(tmp_path if whole_run else tmp_path / "weights")
    assert toy.difference(saved.state_dict(), loaded.state_dict()) == 0
    with pytest.raises(UserError, match="holds one adapter.*prompt; give the folder"):
        loaded.load(next((tmp_path / "weights").rglob(NAME)))


def test_one_adapter_from_a_file(tmp_path):
    saved = build(None, "content", "semantic")
    saved.save(tmp_path, {})
    loaded = build(None, "content", "semantic", trained=False)
    start = {k: v.clone() for k, v in loaded.state_dict()["content"].items()}
    loaded.load(tmp_path / "semantic" / NAME, "semantic")
    assert toy.difference({"": loaded.state_dict()["semantic"]}, {"": saved.state_dict()["semantic"]}) == 0
    assert toy.difference({"": loaded.state_dict()["content"]}, {"": start}) == 0
    with pytest.raises(UserError, match="holds one adapter.*content, semantic"):
        loaded.load(tmp_path / "semantic" / NAME)


def published(
    folder: Path, *, prefix: str = "transformer.", alpha: float | None = None, rank: int = 4
) -> dict[str, Tensor]:
    """A file as others publish it: no record, half precision."""
    state = build(LoRA(targets=BLOCKS, rank=rank)).state_dict()["edit"]
    tensors = {prefix + key: value.bfloat16() for key, value in state.items()}
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    scales = {} if alpha is None else {f"{module}.alpha": torch.tensor(alpha) for module in modules}
    folder.mkdir(exist_ok=True)
    save_file({**tensors, **scales}, folder / NAME, {"format": "pt"})
    return state


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_published_files(tmp_path, prefix, alpha):
    state = published(tmp_path, prefix=prefix, alpha=alpha)
    spec = spec_of(tmp_path / NAME)
    assert (spec.rank, spec.scaled, spec.full) == (4, alpha or 4.0, ())
    for ours in (spec, LoRA(targets=BLOCKS, rank=4, alpha=alpha)):
        adapters = build(ours, trained=False)
        adapters.load(tmp_path / NAME)
        assert toy.difference({"": adapters.state_dict()["edit"]}, {"": state}) < 2e-3


def test_published_file_leaves_the_whole_module_as_in_the_base(tmp_path):
    published(tmp_path)
    adapters = build(LoRA(targets=BLOCKS, rank=4, full=("x_embedder",)))
    adapters.load(tmp_path / NAME)
    module = adapters.host.x_embedder
    assert torch.equal(module.modules_to_save["edit"].weight, module.original_module.weight)


def test_a_whole_module_that_is_missing(tmp_path):
    build().save(tmp_path, {})
    (tmp_path / "flux_x_embedder.safetensors").unlink()
    with pytest.raises(UserError, match=r"flux_x_embedder\.safetensors"):
        build(trained=False).load(tmp_path)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_whole_module_that_is_not_wanted(tmp_path, recorded):
    build(LoRA(targets=BLOCKS, rank=4, full=("x_embedder",))).save(tmp_path, {})
    if not recorded:
        published(tmp_path)
    without = build(LoRA(targets=BLOCKS, rank=4), trained=False)
    with pytest.raises(UserError, match=r"x_embedder was trained too.*train_embedder: true"):
        without.load(tmp_path)


def test_a_whole_module_equal_to_the_base_is_passed_over(tmp_path):
    """The reference writes such files."""
    published(tmp_path)
    base = tiny_transformer().x_embedder
    save_file({"weight": base.weight.data, "bias": base.bias.data}, tmp_path / "flux_x_embedder.safetensors")
    adapters = build(LoRA(targets=BLOCKS, rank=4), trained=False)
    untouched = {key: value.clone() for key, value in adapters.state_dict()["edit"].items()}
    adapters.load(tmp_path)
    loaded = adapters.state_dict()["edit"]
    assert not any("x_embedder" in key for key in loaded)
    assert toy.difference({"": loaded}, {"": untouched}) > 0


def refused(folder: Path, spec: LoRA | None = None) -> str:
    """The message, after checking that nothing was loaded."""
    adapters = build(spec or LoRA(targets=BLOCKS, rank=4), trained=False)
    before = {key: value.clone() for key, value in adapters.state_dict()["edit"].items()}
    with pytest.raises(UserError) as caught:
        adapters.load(folder / NAME)
    assert toy.difference({"": adapters.state_dict()["edit"]}, {"": before}) == 0
    return str(caught.value)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / NAME)
    save_file({k: v for key, value in tensors.items() for k, v in change(key, value)}, folder / NAME)


def test_missing_and_unknown_keys(tmp_path):
    published(tmp_path)
    rewrite(tmp_path, lambda k, v: [] if "blocks.1.attn.to_q" in k else [(k.replace("to_k", "to_key"), v)])
    said = refused(tmp_path)
    assert "missing: 12 of 16 keys (transformer_blocks.0.attn.to_k.lora_A.weight, " in said
    assert "not known: 8 keys (" in said and "to_key" in said
    assert "keys as diffusers, rank 4" in said


def test_another_rank(tmp_path):
    published(tmp_path, rank=2)
    said = refused(tmp_path)
    assert (
        "of another shape: 16 keys" in said and "is (2, 32) there, (4, 32) here" in said and "rank 2" in said
    )


def test_another_alpha(tmp_path):
    published(tmp_path, alpha=2.0)
    assert "was trained with alpha 2, adapter 'edit' has 4; set alpha=2" in refused(tmp_path)


def test_another_dialect(tmp_path):
    published(tmp_path)
    rewrite(tmp_path, lambda k, v: [(k.replace("transformer.", "diffusion_model.", 1), v)])
    assert "keys as ComfyUI" in refused(tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "empty"), (b"PK\x03\x04", "pickled"), (b"rubbish" * 9, "safetensors"), (None, "no such")],
)
def test_files_that_are_none(tmp_path, data, said):
    if data is not None:
        (tmp_path / NAME).write_bytes(data)
    assert said in refused(tmp_path)


def test_cut_off_and_not_finite(tmp_path):
    published(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:-100])
    assert "damaged" in refused(tmp_path)
    (tmp_path / NAME).write_bytes(whole)
    rewrite(tmp_path, lambda k, v: [(k, v * torch.inf)])
    assert "not finite" in refused(tmp_path)


def test_mixed_ranks(tmp_path):
    published(tmp_path)
    rewrite(tmp_path, lambda k, v: [(k, v[:, :2].clone() if "to_q.lora_B" in k else v)])
    with pytest.raises(UserError, match=r"mixed ranks \[2, 4\]"):
        spec_of(tmp_path / NAME)


def test_a_state_of_other_adapters():
    with pytest.raises(ValueError, match="other adapters"):
        build().load_state_dict(build(None, "content").state_dict())


def test_only_the_weights_of_adapters_are_kept():
    parameters = build().parameters("edit")
    assert sum(p.numel() for p in parameters) == 8 * 2 * 4 * 32 + 385 * 32


ICEDIT = (
    r"(.*x_embedder|.*(?<!single_)transformer_blocks\.[0-9]+\.(norm1\.linear|attn\.to_[kqv]|attn\.to_out\.0|ff\.net\.2)"
    r"|.*single_transformer_blocks\.[0-9]+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[kqv]))"
)
"""The layers of ICEdit's published LoRA."""


def icedit_file(file: Path, host: nn.Module, rank: int) -> dict[str, Tensor]:
    """What River-Zhang/ICEdit publishes: bfloat16 factors under diffusers' names, no alpha, no metadata."""
    generator = torch.Generator().manual_seed(0)
    layers = [name for name, module in host.named_modules() if isinstance(module, nn.Linear)]
    tensors = {}
    for layer in filter(lambda name: re.fullmatch(ICEDIT, name), layers):
        module = host.get_submodule(layer)
        a, b = (
            torch.randn(s, generator=generator) * 0.1
            for s in ((rank, module.in_features), (module.out_features, rank))
        )
        tensors |= {
            f"transformer.{layer}.lora_A.weight": a.bfloat16(),
            f"transformer.{layer}.lora_B.weight": b.bfloat16(),
        }
    save_file(tensors, file)
    return tensors


def test_icedits_published_file(tmp_path, host):
    tensors = icedit_file(tmp_path / NAME, host, rank=32)
    spec = spec_of(tmp_path / NAME)
    assert (spec.rank, spec.alpha, spec.full) == (32, 32.0, ())
    adapters = Adapters(host)
    adapters.add("edit", spec)
    adapters.load(tmp_path / NAME)
    layers = {key.rpartition(".lora_")[0] for key in adapters.state_dict()["edit"]}
    assert {
        "x_embedder",
        "transformer_blocks.1.norm1.linear",
        "single_transformer_blocks.0.norm.linear",
    } < layers
    assert len(layers) == 1 + 2 * 6 + 2 * 6 == len(tensors) / 2
    adapters.use(edit=0.5)
    changed = velocity(host)
    merged = tiny_transformer()
    for layer in layers:
        a, b = (tensors[f"transformer.{layer}.lora_{side}.weight"].float() for side in "AB")
        merged.get_submodule(layer).weight.data += 0.5 * b @ a
    torch.testing.assert_close(changed, velocity(merged), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(changed, velocity(tiny_transformer()), atol=0.1)


def test_icedits_layers_on_flux_as_it_is(tmp_path):
    """The 343 layers of the real model, whose shapes need no memory."""
    with torch.device("meta"):
        host = FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True)
    tensors = icedit_file(tmp_path / NAME, host, rank=1)
    spec = spec_of(tmp_path / NAME)
    adapters = Adapters(host)
    adapters.add("edit", spec)
    adapters.load(tmp_path / NAME)
    assert len(tensors) == 686 == len(adapters.state_dict()["edit"])
    assert 32 * sum(p.numel() for p in adapters.parameters("edit")) == 115_912_704


def test_a_bare_host_is_the_base_model_on_the_same_weights(host):
    before = velocity(host)
    adapters = build(host=host)
    twin = bare(host)
    adapters.use(edit=1)
    assert torch.equal(velocity(twin), before) and not torch.equal(velocity(host), before)
    own = {parameter.data_ptr() for parameter in host.parameters()}
    assert {parameter.data_ptr() for parameter in twin.parameters()} < own
    assert twin.state_dict().keys() == tiny_transformer().state_dict().keys()
