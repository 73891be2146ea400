"""Files of adapters on a tiny FLUX: that diffusers reads them, those of others, and strict loading."""

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
from tiny_flux import BLOCKS, build, transformer, velocity
from torch import Tensor, nn

from pentimento import inspection
from pentimento.adapters import Adapters, LoRA, spec_of
from pentimento.errors import UserError

TARGETS = ("attn.to_q", "attn.to_k", "ff.net.2", "proj_out")
NAME = "pytorch_lora_weights.safetensors"


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
    base = transformer().x_embedder
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


def test_icedits_published_file(tmp_path):
    host = transformer()
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
    merged = transformer()
    for layer in layers:
        a, b = (tensors[f"transformer.{layer}.lora_{side}.weight"].float() for side in "AB")
        merged.get_submodule(layer).weight.data += 0.5 * b @ a
    torch.testing.assert_close(changed, velocity(merged), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(changed, velocity(transformer()), atol=0.1)


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
