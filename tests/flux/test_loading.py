"""Every way in which weights can be wrong is told before anything large is read."""

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from pentimento import pretrained
from pentimento.errors import UserError
from pentimento.flux import loading
from pentimento.flux.backbone import Flux
from pentimento.flux.config import FluxConfig

FILL = "black-forest-labs/FLUX.1-Fill-dev"


@pytest.fixture
def broken(tiny_fill, tmp_path):
    """A copy of the tiny Fill model to damage."""
    return shutil.copytree(tiny_fill, tmp_path / "model")


def load(weights, variant="fill"):
    return Flux.load(FluxConfig(weights=str(weights), device="cpu"), variant)


def test_pocket_comes_from_the_package(tiny_fill, tiny_dev, monkeypatch):
    shipped = {"pocket-fill": tiny_fill, "pocket-dev": tiny_dev}
    monkeypatch.setattr("pentimento.pocket.weights.folder", shipped.__getitem__)
    for variant in ("fill", "dev"):
        flux = load("pocket", variant)
        assert flux.variant == variant and flux.describe()["weights"] == "pocket"


def test_description_holds_no_path(fill, tiny_fill):
    described = fill.describe()
    assert described["weights"] == tiny_fill.name and str(tiny_fill.parent) not in json.dumps(described)
    assert described["family"] == "flux" and len(described["digest"]) == 12


def test_digest_follows_the_contents(broken):
    weights = loading.locate(FluxConfig(weights=str(broken)), "fill")
    before = weights.digest("vae"), weights.digest("transformer")
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert weights.digest("vae") != before[0] and weights.digest("transformer") == before[1]


def test_digest_of_large_files_samples_them(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SMALL_FILE", 2**20)
    (tmp_path / "vae").mkdir()
    path = tmp_path / "vae" / "model.safetensors"
    weights = loading.Weights(name="x", folder=tmp_path, variant="fill")
    path.write_bytes(b"a" * 3 * 2**20)
    before = weights.digest("vae")
    path.write_bytes(b"a" * (3 * 2**20 - 1) + b"b")
    assert weights.digest("vae") != before


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder.*model_index.json.*FLUX.1-Fill-dev"):
        load(tmp_path / "nothing" / "here")


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="the folder is empty"):
        load(tmp_path)


def test_folder_without_index(broken):
    (broken / "model_index.json").unlink()
    with pytest.raises(UserError, match="model: the folder has no model_index.json"):
        load(broken)


def test_single_file(broken):
    with pytest.raises(UserError, match="is a file; the weights must be a folder"):
        load(broken / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("text", ["{broken", "[]", "\x00"])
def test_broken_index(broken, text):
    (broken / "model_index.json").write_text(text)
    with pytest.raises(UserError, match="model_index.json"):
        load(broken)


@pytest.mark.parametrize(
    ("pipeline", "model"),
    [
        ("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
        ("Flux2Pipeline", "Flux2Transformer2DModel"),
        ("FluxKontextPipeline", "FluxTransformer2DModel"),
        ("StableDiffusionPipeline", None),
    ],
)
def test_another_architecture(broken, pipeline, model):
    index = {"_class_name": pipeline}
    if model:
        index["transformer"] = ["diffusers", model]
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"another architecture, a {pipeline}"):
        load(broken)


def test_dev_where_fill_is_needed_and_the_reverse(tiny_dev, tiny_fill):
    with pytest.raises(
        UserError, match=r"holds FLUX.1 \[dev\] \(64 input channels\).*needs FLUX.1 Fill \(384.*Fill-dev"
    ):
        load(tiny_dev, "fill")
    with pytest.raises(UserError, match=r"holds FLUX.1 Fill \(384 input channels\).*needs FLUX.1 \[dev\]"):
        load(tiny_fill, "dev")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_cut_off_weights_name_the_file(broken, part):
    path = next((broken / part).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{part}/{path.name}: the file is damaged or cut off"):
        load(broken)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64])
def test_fake_weights_name_the_file(broken, content):
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}: the file is damaged"):
        load(broken)


def test_git_lfs_pointer(broken):
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
        load(broken)


def test_missing_shard(broken):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (broken / "text_encoder_2" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00001-of-00002.safetensors: is missing"):
        load(broken)


def test_pickled_weights_are_not_read(broken):
    (broken / "vae" / "diffusion_pytorch_model.safetensors").rename(
        broken / "vae" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(UserError, match="vae: holds no .safetensors"):
        load(broken)


def test_missing_part(broken):
    shutil.rmtree(broken / "tokenizer_2")
    with pytest.raises(UserError, match="tokenizer_2: tokenizer_config.json is missing"):
        load(broken)


def test_weights_of_another_size(broken):
    path = broken / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 3}))
    with pytest.raises(UserError, match="transformer: "):
        load(broken)


def test_broken_tokenizer(broken):
    (broken / "tokenizer_2" / "tokenizer.json").write_text("{}")
    flux = load(broken)
    with pytest.raises(UserError, match="tokenizer_2: the tokenizer cannot be loaded"):
        flux.encode_prompts(["x"], 8)


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


def http(kind, status):
    return kind(f"{status} Client Error", response=response(status))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http(GatedRepoError, 403),
            f"huggingface.co/{FILL} is restricted.*accept its licence.*non-commercial.*HF_TOKEN",
        ),
        (http(GatedRepoError, 401), f"huggingface.co/{FILL} is restricted.*HF_TOKEN"),
        (http(HfHubHTTPError, 403), "accept its licence.*HF_TOKEN"),
        (http(RepositoryNotFoundError, 401), "no model of this name is visible.*spelling.*HF_TOKEN"),
        (http(RepositoryNotFoundError, 404), "no model of this name is visible"),
        (http(HfHubHTTPError, 503), "the hub refused.*503"),
        (
            LocalEntryNotFoundError("no snapshot"),
            "not .completely. in the hub cache and the variable HF_HUB_OFFLINE",
        ),
        (IncompleteSnapshotError("part", snapshot_path="x"), "not .completely. in the hub cache"),
        (HTTPError("no route to host"), "not .completely. in the hub cache"),
        (ConnectionResetError("reset"), "not .completely. in the hub cache"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.*HF_HOME"),
    ],
)
def test_hub_errors(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(pretrained, "snapshot_download", fail)
    monkeypatch.setattr(pretrained.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        load(FILL)


def test_other_errors_of_the_system_are_not_hidden(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(pretrained, "snapshot_download", fail)
    with pytest.raises(OSError, match="I/O error"):
        load(FILL)


def test_offline_without_cache(monkeypatch, tmp_path):
    """The real hub client, with no network allowed and nothing cached."""
    monkeypatch.setattr(pretrained.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not .completely. in the hub cache"):
        load("nobody/nothing-at-all")


def test_invalid_hub_name(monkeypatch):
    with pytest.raises(UserError, match="neither a folder nor a valid hub name"):
        load("a/" + "b" * 120)


def test_hub_model_is_loaded_from_the_cache(tiny_fill, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tiny_fill)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    flux = load(FILL)
    assert flux.describe()["weights"] == FILL
    assert not any(pattern.startswith("*.") for pattern in asked[FILL]), (
        "the single files of the root stay where they are"
    )


def test_automatic_precision(monkeypatch):
    assert pretrained.choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert pretrained.choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    for capable, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda capable=capable, **_: capable)
        assert pretrained.choose_dtype("auto", torch.device("cuda")) == expected


def test_outline_has_the_shapes_and_no_weights(fill, fill_config):
    outline = Flux.outline(fill_config, "fill")
    assert outline is not None and all(p.is_meta for p in outline.transformer.parameters())
    assert outline.transformer.num_parameters() == fill.transformer.num_parameters()
    assert outline.encoder_digest() == fill.encoder_digest()


def test_outline_of_a_hub_model_downloads_nothing(tiny_dev, monkeypatch):
    name = "black-forest-labs/FLUX.1-dev"
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *_: None)
    assert Flux.outline(FluxConfig(weights=name, device="cpu"), "dev") is None
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda _, file: str(tiny_dev / file))
    outline = Flux.outline(FluxConfig(weights=name, device="cpu"), "dev")
    assert outline is not None and outline.weights.name == name
    with pytest.raises(UserError, match=r"holds FLUX.1 \[dev\].*needs FLUX.1 Fill"):
        Flux.outline(FluxConfig(weights=name, device="cpu"), "fill")
