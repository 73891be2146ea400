"""Transformers and text encoders from GGUF files: the same model as far as its bits go, and every wrong file explained."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import gguf
import packed
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from packed import Kind
from PIL import ImageChops
from safetensors.torch import load_file, save_file

from pentimento import metrics, pretrained
from pentimento.adapters import Adapters, LoRA
from pentimento.errors import UserError
from pentimento.flux import gguf_files
from pentimento.flux.backbone import Flux
from pentimento.flux.config import FluxConfig
from pentimento.method import EditSettings, Example
from pentimento.methods.influxedit import EditLoRA, InFluxEdit

PROMPT = "make it rain"


@pytest.fixture(scope="module")
def files(tiny_fill, tmp_path_factory) -> dict[str, Path]:
    """The tiny Fill's transformer in several packings."""
    folder = tmp_path_factory.mktemp("gguf")
    kinds = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_0, Kind.Q4_0)
    return {k.name: packed.write_transformer(folder / f"{k.name}.gguf", tiny_fill, k) for k in kinds}


@pytest.fixture(scope="module")
def t5_files(tiny_fill, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    kinds = (Kind.F32, Kind.F16, Kind.Q8_0)
    return {k.name: packed.write_text_encoder(folder / f"t5-{k.name}.gguf", tiny_fill, k) for k in kinds}


@pytest.fixture
def with_file(fill_config):
    """The tiny Fill's settings with files in the place of its parts."""

    def change(transformer=None, text=None, **settings) -> FluxConfig:
        named = {"transformer_file": transformer, "text_encoder_file": text}
        named = {key: str(path) for key, path in named.items() if path}
        return dataclasses.replace(fill_config, **named, **settings)

    return change


def edited(config: FluxConfig, picture, **method):
    made = InFluxEdit.load(config, InFluxEdit.Config(max_sequence_length=24, **method))
    return made.edit(Example(source=picture(2, 64, 48), prompt=PROMPT), EditSettings(seed=7, steps=4))


def same(config: FluxConfig, reference: FluxConfig, picture) -> bool:
    """Whether weights are equal to the bit, and pictures but for the order in which sums are taken."""
    ours, theirs = (Flux.load(c, "fill").transformer.state_dict() for c in (config, reference))
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    difference = ImageChops.difference(edited(config, picture), edited(reference, picture))
    return equal and max(high for _, high in difference.getextrema()) <= 1


def rounded(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of a model whose transformer's matrices are rounded to a dtype."""

    copy = Path(shutil.copytree(model, folder / "rounded"))
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {k: v.to(dtype).float() if v.ndim > 1 else v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


def test_names_and_rows_are_divided_as_diffusers_does():
    """On layers of FLUX's real width, which diffusers takes for granted; one column tells the rows apart."""
    width = 3072
    rows = {
        "img_in": 1, "txt_in": 1, "time_in.in_layer": 1, "time_in.out_layer": 1, "vector_in.in_layer": 1,
        "vector_in.out_layer": 1, "guidance_in.in_layer": 1, "guidance_in.out_layer": 1, "final_layer.linear": 1,
        "final_layer.adaLN_modulation.1": 2,
    }  # fmt: skip
    for number in range(2):
        double, single = f"double_blocks.{number}", f"single_blocks.{number}"
        rows |= {f"{single}.modulation.lin": 3, f"{single}.linear1": 7, f"{single}.linear2": 1}
        for side in ("img", "txt"):
            rows |= {f"{double}.{side}_mod.lin": 6, f"{double}.{side}_attn.qkv": 3}
            rows |= {
                f"{double}.{side}_attn.proj": 1,
                f"{double}.{side}_mlp.0": 4,
                f"{double}.{side}_mlp.2": 1,
            }
    tensors, count = {}, 0
    for name, multiple in rows.items():
        for kind in ("weight", "bias"):
            tensors[f"{name}.{kind}"] = torch.arange(count, count + width * multiple).reshape(
                -1, *[1] * (kind == "weight")
            )
            count += width * multiple
    norms = (
        "img_attn.norm.query_norm",
        "img_attn.norm.key_norm",
        "txt_attn.norm.query_norm",
        "txt_attn.norm.key_norm",
    )
    for number in range(2):
        for norm in [f"double_blocks.{number}.{n}" for n in norms] + [
            f"single_blocks.{number}.norm.{n}_norm" for n in ("query", "key")
        ]:
            tensors[f"{norm}.scale"] = torch.arange(count, count + 128)
            count += 128
    ours = gguf_files.to_diffusers(tensors)
    prefixed = gguf_files.to_diffusers({f"model.diffusion_model.{k}": v for k, v in tensors.items()})
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(tensors))
    assert ours.keys() == theirs.keys() == prefixed.keys()
    assert all(
        torch.equal(ours[key], theirs[key]) and torch.equal(prefixed[key], theirs[key]) for key in theirs
    )


def test_names_of_diffusers_stay_as_they_are(tiny_fill, with_file, tmp_path, picture):
    state = Flux.load(with_file(), "fill").transformer.state_dict()
    file = packed.write(tmp_path / "renamed.gguf", state, Kind.F32)
    assert same(with_file(file), with_file(), picture)


def test_float32_is_the_model_itself(files, with_file, picture):
    assert same(with_file(files["F32"]), with_file(), picture)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_is_the_rounded_model(files, with_file, tiny_fill, tmp_path, picture, kind):
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    reference = FluxConfig(weights=str(rounded(tiny_fill, tmp_path, dtype)), device="cpu")
    assert edited(reference, picture) != edited(with_file(), picture)
    ours = Flux.load(with_file(files[kind]), "fill")
    theirs = Flux.load(reference, "fill").transformer.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in unpacked(ours).items())
    difference = ImageChops.difference(edited(with_file(files[kind]), picture), edited(reference, picture))
    assert max(high for _, high in difference.getextrema()) <= 1


@pytest.mark.parametrize(
    ("kind", "least"), [("F16", 60), ("BF16", 50), ("Q8_0", 45), ("Q5_0", 30), ("Q4_0", 23)]
)
def test_packed_pictures_are_near_the_model(files, with_file, picture, kind, least):
    psnr = metrics.psnr(edited(with_file(files[kind]), picture), edited(with_file(), picture))
    assert psnr >= least, f"{psnr:.1f} dB"


def test_packed_layers_stay_packed(files, with_file):
    flux = Flux.load(with_file(files["Q8_0"]), "fill")
    weight = flux.transformer.transformer_blocks[0].attn.to_q.weight
    assert weight.dtype == torch.uint8 and weight.numel() == 32 * 34, "34 bytes for each 32 weights"
    assert flux.transformer.dtype == torch.float32 and not flux.transformer.training
    assert not any(p.requires_grad for p in flux.transformer.parameters())


def test_bf16_arithmetic_on_packed_layers(files, with_file, picture):
    half = edited(with_file(files["Q8_0"], precision="bf16"), picture)
    assert metrics.psnr(half, edited(with_file(precision="bf16"), picture)) > 40


def test_packed_vectors_are_unpacked(with_file, tiny_fill, tmp_path, picture):
    """Biases and norms in bf16, as some files have them, are no layers that unpack themselves."""
    state = packed.original(Flux.load(with_file(), "fill").transformer.state_dict())
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "flux")
    for name, tensor in state.items():
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), Kind.BF16), raw_dtype=Kind.BF16)
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    assert metrics.psnr(edited(with_file(tmp_path / "all.gguf"), picture), edited(with_file(), picture)) > 40


@pytest.mark.parametrize(("kind", "difference"), [("F32", 0.0), ("F16", 2e-3), ("Q8_0", 0.05)])
def test_text_encoder(t5_files, with_file, kind, difference, capfd):
    base = Flux.load(with_file(), "fill").encode_prompts([PROMPT], 24)
    flux = Flux.load(with_file(text=t5_files[kind]), "fill")
    text = flux.encode_prompts([PROMPT], 24)
    assert torch.equal(text.pooled, base.pooled)
    assert text.prompt_embeds.dtype == base.prompt_embeds.dtype
    assert float((text.prompt_embeds - base.prompt_embeds).abs().max()) <= difference * float(
        base.prompt_embeds.abs().max()
    )
    assert "quantiz" not in capfd.readouterr().err, "a progress bar would tear the display of a training"


def test_a_model_without_the_weights_that_are_replaced(
    files, t5_files, with_file, tiny_fill, tmp_path, picture
):

    model = Path(shutil.copytree(tiny_fill, tmp_path / "model"))
    for part in ("transformer", "text_encoder_2"):
        for path in (model / part).glob("*.safetensors"):
            path.unlink()
    config = with_file(files["F32"], t5_files["F32"], weights=str(model))
    assert same(config, with_file(), picture)
    with pytest.raises(UserError, match="transformer: holds no .safetensors.*backbone.transformer_file"):
        Flux.load(with_file(weights=str(model)), "fill")


def test_replaced_weights_are_not_downloaded(files, t5_files, with_file, tiny_fill, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append({p for p in allow_patterns if p.endswith(".safetensors")})
        return str(tiny_fill)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    hub = {"weights": "black-forest-labs/FLUX.1-Fill-dev"}
    for config in (with_file(**hub), with_file(files["Q8_0"], t5_files["Q8_0"], **hub)):
        Flux.load(config, "fill")
    whole, rest = asked
    assert rest == {"vae/*.safetensors", "text_encoder/*.safetensors"}
    assert whole - rest == {"transformer/*.safetensors", "text_encoder_2/*.safetensors"}


def test_records_know_the_files(files, t5_files, with_file, tmp_path):
    base = Flux.load(with_file(), "fill")
    eight = Flux.load(with_file(files["Q8_0"]), "fill")
    four = Flux.load(with_file(files["Q4_0"]), "fill")
    again = Flux.load(with_file(shutil.copy(files["Q8_0"], tmp_path / "renamed.gguf")), "fill")
    described = [flux.describe() for flux in (base, eight, four, again)]
    assert [d.get("transformer_file") for d in described] == [None, "Q8_0.gguf", "Q4_0.gguf", "renamed.gguf"]
    digests = [d["digest"] for d in described]
    assert len(set(digests)) == 3 and digests[1] == digests[3], "the contents count, not the name"
    assert eight.encoder_digest() == base.encoder_digest()
    text = Flux.load(with_file(text=t5_files["Q8_0"]), "fill")
    assert text.encoder_digest() != base.encoder_digest()
    assert text.describe()["digest"] == base.describe()["digest"]
    assert text.describe()["text_encoder_file"] == "t5-Q8_0.gguf"


TARGETS = r"x_embedder|transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|ff\.net\.2)|single_transformer_blocks\.\d+\.proj_mlp"


def host(config: FluxConfig) -> Flux:
    flux = Flux.load(config, "fill")
    adapters = Adapters(flux.transformer)
    adapters.add("edit", LoRA(targets=TARGETS, rank=2))
    torch.manual_seed(0)
    for parameter in adapters.train("edit"):
        parameter.data.normal_(0, 0.1)
    adapters.use(edit=1)
    flux.adapters = adapters
    return flux


def unpacked(flux: Flux) -> dict[str, torch.Tensor]:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return {
        name: dequantize_gguf_tensor(tensor).float()
        for name, tensor in flux.transformer.state_dict(keep_vars=True).items()
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_packed_layers_have_the_gradients_of_unpacked_ones(files, with_file, checkpointing):
    """And the output: with the unpacked weights in an ordinary model everything is equal."""
    packed_host = host(with_file(files["Q8_0"], gradient_checkpointing=checkpointing))
    plain = host(with_file())
    plain.transformer.load_state_dict(unpacked(packed_host))
    results = []
    for flux in (packed_host, plain):
        text = flux.encode_prompts([PROMPT], 16)
        torch.manual_seed(1)
        x, condition = torch.randn(1, 16, 64), torch.randn(1, 16, 320)
        v = flux.velocity(x, torch.tensor([0.5]), text, grid=(4, 4), guidance=1, condition=condition)
        v.square().mean().backward()
        results.append((v.detach(), [p.grad for p in flux.adapters.parameters("edit")]))
    (v, grads), (expected, expected_grads) = results
    torch.testing.assert_close(v, expected)
    assert len(grads) == 2 * (1 + 2 * 5 + 2) and all(float(g.abs().max()) > 0 for g in grads)
    torch.testing.assert_close(grads, expected_grads)


def test_a_packed_layer_is_not_trained_whole(files, with_file):
    config = InFluxEdit.Config(lora=EditLoRA(rank=2), train_embedder=True)
    with pytest.raises(
        UserError, match="lora.full: x_embedder is packed.*trained whole.*without backbone.transformer_file"
    ):
        InFluxEdit.load(with_file(files["Q8_0"]), config)
    InFluxEdit.load(with_file(files["F16"]), config)


def refused(config: FluxConfig, variant="fill") -> str:
    said = []
    for attempt in (Flux.load, Flux.outline):
        with pytest.raises(UserError) as caught:
            attempt(config, variant)
        said.append(str(caught.value))
    assert said[0] == said[1], "a dry run says what a run would say"
    return said[0]


@pytest.mark.parametrize("field", ["transformer", "text"])
def test_files_that_are_no_gguf(with_file, tmp_path, tiny_fill, field):
    name = {"transformer": "backbone.transformer_file", "text": "backbone.text_encoder_file"}[field]
    safetensors = tiny_fill / "transformer" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "words.gguf").write_text("no model at all")
    (tmp_path / "pointer.gguf").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    for path, words in (
        (tmp_path / "absent.gguf", f"{name}: there is no file .*absent.gguf' on this machine"),
        (tmp_path, f"{name}: .* is a folder; name the .gguf file in it"),
        (tmp_path / "empty.gguf", f"{name}: .*empty.gguf is empty"),
        (tmp_path / "words.gguf", f"{name}: .*words.gguf is not a GGUF file"),
        (tmp_path / "pointer.gguf", "pointer.gguf: is a Git LFS pointer"),
        (safetensors, f"{name}: .*is a safetensors file, and a GGUF is needed.*backbone.weights"),
    ):
        with pytest.raises(UserError, match=words):
            Flux.load(with_file(**{field: path}), "fill")


def test_a_gguf_where_a_folder_is_needed(files, fill_config):
    config = dataclasses.replace(fill_config, weights=str(files["Q8_0"]))
    assert f"backbone.transformer_file={files['Q8_0']}" in refused(config)


@pytest.mark.parametrize("kept", [6, 40, 500, 20_000, -100])
def test_a_file_that_is_cut_off(files, with_file, tmp_path, kept):
    (tmp_path / "cut.gguf").write_bytes(files["Q8_0"].read_bytes()[:kept])
    assert "cut.gguf: damaged or cut off" in refused(with_file(tmp_path / "cut.gguf"))


def test_models_of_another_architecture(files, t5_files, with_file, tmp_path, tiny_fill):
    llama = packed.write(
        tmp_path / "llama.gguf", {"token_embd.weight": torch.zeros(4, 32)}, Kind.F16, "llama"
    )
    nameless = packed.write(tmp_path / "nameless.gguf", {"a.weight": torch.zeros(4, 32)}, Kind.F16, "")
    odd = {"img_in.weight": torch.zeros(64, 32), "double_blocks.0.img_attn.qkv.weight": torch.zeros(96, 32)}
    odd = packed.write(tmp_path / "odd.gguf", odd, Kind.F16)
    wrong = with_file(llama)
    assert "llama.gguf: holds a model of the architecture llama, not a FLUX.1 transformer" in refused(wrong)
    assert "nameless.gguf: holds another model, not a FLUX.1 transformer" in refused(with_file(nameless))
    assert "odd.gguf: holds a model of the architecture flux, not a FLUX.1 transformer" in refused(
        with_file(odd)
    )
    assert "text_encoder_file" in refused(with_file(t5_files["Q8_0"]))
    assert "not a T5 encoder" in refused(with_file(text=llama))
    assert "backbone.transformer_file" in refused(with_file(text=files["Q8_0"]))


def test_dev_where_fill_is_needed_and_the_reverse(files, tiny_dev, with_file, tmp_path, dev_config):
    dev = packed.write_transformer(tmp_path / "dev.gguf", tiny_dev)
    said = refused(with_file(dev))
    assert "dev.gguf: holds FLUX.1 [dev] (64 input channels); this method needs FLUX.1 Fill (384" in said
    said = refused(dataclasses.replace(dev_config, transformer_file=str(files["Q8_0"])), "dev")
    assert "Q8_0.gguf: holds FLUX.1 Fill (384 input channels); this method needs FLUX.1 [dev]" in said


def test_layers_that_are_missing_unknown_or_of_another_shape(with_file, tmp_path):
    """As in FLUX.1 [schnell], which has no guidance, and in files that hold more than a transformer."""
    state = packed.original(Flux.load(with_file(), "fill").transformer.state_dict())
    schnell = {k: v for k, v in state.items() if not k.startswith("guidance_in")}
    more = {**state, "vae.decoder.weight": torch.zeros(3, 3)}
    other = {**state, "vector_in.in_layer.weight": torch.zeros(32, 96)}
    for tensors, words in (
        (schnell, "missing: 4 of .* keys .time_text_embed.guidance_embedder.linear_1.weight, "),
        (more, "not known: 1 key .vae.decoder.weight"),
        (
            other,
            r"of another shape: 1 key .*text_embedder.linear_1.weight is \(32, 96\) there, \(32, 24\) here",
        ),
    ):
        file = packed.write(tmp_path / "other.gguf", tensors, Kind.F16)
        with pytest.raises(UserError, match=f"other.gguf: does not fit the transformer.*{words}"):
            Flux.load(with_file(file), "fill")


def test_a_packing_that_diffusers_does_not_know(files, with_file, monkeypatch):
    from diffusers.quantizers.gguf import utils

    known = [kind for kind in utils.SUPPORTED_GGUF_QUANT_TYPES if kind != Kind.Q8_0]
    monkeypatch.setattr(utils, "SUPPORTED_GGUF_QUANT_TYPES", known)
    assert "is packed as Q8_0, which diffusers does not unpack; known: BF16, " in refused(
        with_file(files["Q8_0"])
    )


def test_a_text_encoder_of_another_size(t5_files, with_file, tiny_fill, tmp_path):

    model = Path(shutil.copytree(tiny_fill, tmp_path / "model"))
    for change in ({"num_layers": 3}, {"d_ff": 96}):
        config = model / "text_encoder_2" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        flux = Flux.load(with_file(text=t5_files["Q8_0"], weights=str(model)), "fill")
        with pytest.raises(UserError, match=r"t5-Q8_0.gguf: "):
            flux.encode_prompts([PROMPT], 8)


@pytest.mark.parametrize("field", ["transformer", "text"])
def test_the_extra_is_named_where_it_is_missing(files, with_file, field, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    said = refused(with_file(**{field: files["Q8_0"]}))
    assert "GGUF files need the extra gguf: pip install 'pentimento[gguf]'" in said
