"""Published files are read as they are, converted once and never run; every way in which they can be wrong is told."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_infinity as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pentimento import pretrained
from pentimento.errors import UserError
from pentimento.infinity import files
from pentimento.infinity.backbone import Infinity
from pentimento.infinity.config import InfinityConfig
from pentimento.infinity.tokenizer import Tokenizer

NET, VAE = "infinity_reg.safetensors", "infinity_vae_d8reg.safetensors"


@pytest.fixture
def broken(tiny_infinity: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_infinity, tmp_path / "model")


@pytest.fixture
def published(broken: Path) -> Path:
    """The same with its weights in pickles, as they are published."""
    torch.save(load_file(broken / NET), broken / "infinity_reg.pth")
    state = load_file(broken / VAE)
    state["quantize.lfq.mask"] = state["quantizer.lfq.mask"]
    torch.save({"vae": state | {"image_disc.weight": torch.ones(2)}}, broken / "infinity_vae_d32reg.pth")
    (broken / NET).unlink()
    (broken / VAE).unlink()
    return broken


def load(weights: Path | str, **more: Any) -> Infinity:
    return Infinity.load(InfinityConfig(weights=str(weights), device="cpu", **more))


def mistake(weights: Path | str, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(weights, **more)
    return str(caught.value)


def edit(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


def same(a: Infinity, b: Infinity) -> bool:
    return all(
        all(torch.equal(p, q) for p, q in zip(x.state_dict().values(), y.state_dict().values(), strict=True))
        for x, y in ((a.transformer, b.transformer), (a.tokenizer, b.tokenizer))
    )


def test_pocket_comes_from_the_package(
    tiny_infinity: Path, infinity: Infinity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pentimento.infinity.loading.folder", {"pocket-infinity": tiny_infinity}.__getitem__)
    shipped = load("pocket")
    assert same(shipped, infinity) and shipped.describe()["weights"] == "pocket"


def test_description_holds_no_path(infinity: Infinity, tiny_infinity: Path) -> None:
    described = infinity.describe()
    assert described["weights"] == tiny_infinity.name and str(tiny_infinity.parent) not in json.dumps(
        described
    )
    assert described["family"] == "infinity" and len(described["digest"]) == 12


def test_digests_follow_the_contents(broken: Path) -> None:
    def digests() -> tuple[str, str]:
        model = load(broken)
        return model.describe()["digest"], model.encoder_digest()

    before = digests()
    edit(broken / VAE, lambda state: state["decoder.conv_out.conv.bias"].add_(1))
    after = digests()
    assert after[0] == before[0] and after[1] != before[1]
    edit(broken / NET, lambda state: state["head.bias"].add_(1))
    assert digests()[0] != before[0]


def test_outline_has_the_shapes_and_no_weights(infinity: Infinity, infinity_config: InfinityConfig) -> None:
    outline = Infinity.outline(infinity_config)
    assert outline is not None and all(p.is_meta for p in outline.transformer.parameters())
    shapes = [{k: v.shape for k, v in each.transformer.state_dict().items()} for each in (outline, infinity)]
    assert shapes[0] == shapes[1] and outline.describe() == infinity.describe()
    assert outline.native_size == "0.06M" and outline.native_text_length == 64


def test_pickles_are_read_as_they_are_published(published: Path, infinity: Infinity) -> None:
    assert same(load(published), infinity)
    assert same(load(published / "infinity_reg.pth"), infinity)


def test_pickles_are_converted_once(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(published)
    first.tokenizer  # noqa: B018 (read on first use)
    converted = sorted(p.name for p in published.glob("*.pth.safetensors"))
    assert converted == ["infinity_reg.pth.safetensors", "infinity_vae_d32reg.pth.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "read_pickle", lambda path: pytest.fail("the pickle was read again"))
        assert same(load(published), first)
    state = files.read_pickle(published / "infinity_reg.pth")
    torch.save({k: v + 1 if k == "head.bias" else v.clone() for k, v in state.items()}, published / "new.pth")
    (published / "new.pth").rename(published / "infinity_reg.pth")
    assert not same(load(published), first), "a newer pickle counts"


def test_what_cannot_be_written_beside_goes_to_the_cache(
    published: Path, infinity: Infinity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENTIMENTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    assert same(load(published), infinity)
    assert not list(published.glob("*.pth.safetensors"))
    assert len(list((tmp_path / "cache" / "converted").glob("*.safetensors"))) == 2
    monkeypatch.setenv("PENTIMENTO_CACHE", str(published / "config.json"))  # no folder can be made there
    assert "cannot be converted to safetensors" in mistake(published)
    assert not list(published.glob(".*"))


class Trap:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def test_pickles_are_never_run(published: Path, tmp_path: Path) -> None:
    place = tmp_path / "it ran"
    file = published / "infinity_reg.pth"
    torch.save({"pos_start": torch.ones(1), "extra": Trap(place)}, file)
    said = mistake(published)
    assert str(file) in said and "would run as code" in said and "published" in said
    file.write_bytes(pickle.dumps(Trap(place), protocol=2))
    assert "would run as code" in mistake(published)
    assert not place.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or cut off|no file of weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        (b"no pickle at all", "is no file of weights"),
    ],
)
def test_damaged_pickles(published: Path, content: bytes, message: str) -> None:
    (published / "infinity_reg.pth").write_bytes(content)
    with pytest.raises(UserError, match=f"infinity_reg.pth: .*({message})"):
        load(published)


def test_cut_off_files(published: Path, tiny_infinity: Path) -> None:
    file = published / "infinity_reg.pth"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "damaged or cut off" in mistake(published)
    shutil.copy(tiny_infinity / NET, file.with_name("infinity_reg.safetensors"))
    cut = file.with_name("infinity_reg.safetensors")
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "infinity_reg.safetensors: the file is damaged or cut off" in mistake(published)


@pytest.mark.parametrize("held", [{}, [1, 2], {"epoch": 3}])
def test_pickles_without_weights(published: Path, held: object) -> None:
    torch.save(held, published / "infinity_reg.pth")
    assert "holds no weights" in mistake(published)


def test_training_checkpoints_are_read(published: Path, infinity: Infinity) -> None:
    file = published / "infinity_reg.pth"
    torch.save({"trainer": {"gpt_fsdp": torch.load(file), "config": {}}, "epoch": 1}, file)
    assert same(load(published), infinity)


def test_plain_names_of_the_autoencoder_are_read(broken: Path, infinity: Infinity) -> None:
    """Without the wrappers that the published file has around convolutions and norms."""

    def rename(state: dict[str, Tensor]) -> None:
        for name in [n for n in state if n.startswith(("encoder.", "decoder."))]:
            kind, last = name.rsplit(".", 1)
            state[f"{kind.rsplit('.', 1)[0]}.{last}"] = state.pop(name)

    edit(broken / VAE, rename)
    assert "encoder.down.0.downsample.conv.weight" in load_file(broken / VAE)
    assert same(load(broken), infinity)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("block_chunks.1.module.0.ffn.fc1.bias"), "block_chunks.1.module.0.ffn.fc1.bias is missing"),
        (lambda s: s.update({"head.extra": torch.ones(1)}), "holds head.extra, which Infinity does not have"),
        (lambda s: s.update({"head.bias": torch.ones(3)}), r"head.bias has the shape \(3,\).*asks for \(16,\)"),
        (lambda s: s.pop("cfg_uncond"), "no Infinity transformer .cfg_uncond is missing"),
    ],
)  # fmt: skip
def test_names_and_shapes_are_strict(broken: Path, change: Callable[..., object], message: str) -> None:
    edit(broken / NET, change)
    with pytest.raises(UserError, match=f"{NET}: .*{message}.*infinity_2b_reg.pth"):
        load(broken)


def test_names_of_the_autoencoder_are_strict(broken: Path) -> None:
    edit(broken / VAE, lambda s: s.pop("decoder.mid.block_2.norm1.norm.weight"))
    assert "decoder.mid.block_2.norm1.norm.weight is missing" in mistake(broken)


def test_constants_may_be_absent(broken: Path, infinity: Infinity) -> None:
    for file in (NET, VAE):
        edit(broken / file, lambda s: [s.pop(n) for n in list(s) if n.endswith(("zero_k_bias", "lfq.mask"))])
    assert same(load(broken), infinity)


def test_files_in_each_others_place(broken: Path) -> None:
    net, vae = broken / NET, broken / VAE
    text = str(broken / "t5")
    assert "belongs in backbone.tokenizer" in mistake(vae, tokenizer=str(vae), text_encoder=text)
    assert "belongs in backbone.weights" in mistake(net, tokenizer=str(net), text_encoder=text)


def test_parts_that_do_not_fit_each_other(broken: Path) -> None:
    other = broken / "infinity_vae_d4reg.safetensors"
    state = load_file(broken / VAE)
    state |= {n: state[n][:4] for n in ("encoder.conv_out.conv.weight", "encoder.conv_out.conv.bias")}
    state["decoder.conv_in.conv.weight"] = state["decoder.conv_in.conv.weight"][:, :4].contiguous()
    save_file(state, other)
    said = mistake(broken, tokenizer=str(other))
    assert "4 bits" in said and "trained on 8" in said and "backbone.tokenizer" in said
    assert "holds several files (infinity_vae_d4reg, infinity_vae_d8reg)" in mistake(broken)
    config = broken / "t5" / "config.json"
    about = json.loads(config.read_text())
    config.write_text(json.dumps(about | {"d_model": 48}))
    assert "features of width 48" in mistake(
        broken, tokenizer=str(broken / VAE), text_encoder=str(broken / "t5")
    )
    config.write_text(json.dumps(about | {"model_type": "clip_text_model"}))
    said = mistake(broken, tokenizer=str(broken / VAE), text_encoder=str(broken / "t5"))
    assert "a clip_text_model model; T5 is needed, such as google/flan-t5-xl" in said


def test_places_that_hold_nothing(broken: Path, tmp_path: Path) -> None:
    assert "there is no file or folder" in mistake(tmp_path / "no" / "where" / "at all")
    assert "backbone.tokenizer: there is no file 'absent.pth'" in mistake(broken, tokenizer="absent.pth")
    assert "backbone.text_encoder: there is no folder 'absent'" in mistake(broken, text_encoder="absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} holds no infinity_2b_reg.pth" in mistake(empty)
    shutil.copy(broken / NET, empty)
    assert f"{empty} holds no infinity_vae_d32reg.pth" in mistake(empty)
    assert "is no file of weights" in mistake(broken / "config.json", tokenizer=str(broken / VAE))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"size": "2M"}', "size should be one of"),
        ('{"sizes": 1}', "Did you mean size"),
        ("{", "not valid JSON"),
    ],
)
def test_broken_settings(broken: Path, text: str, message: str) -> None:
    (broken / "config.json").write_text(text)
    said = mistake(broken)
    assert message in said and "config.json" in said


@pytest.fixture
def hub(tiny_infinity: Path, tmp_path: Path) -> Path:
    """A repository as the published one: only two pickles matter, and they need no settings."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    torch.save(load_file(tiny_infinity / NET), folder / "infinity_2b_reg.pth")
    tokenizer = Tokenizer(replace(tiny.TOKENIZER, channels=32, groups=None))
    torch.save({"vae": tokenizer.state_dict()}, folder / "infinity_vae_d32reg.pth")
    (folder / "config.json").write_text('{"model_type": "infinity"}')
    return folder


def test_hub_models(hub: Path, tiny_infinity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published repository and flan-t5-xl, no more of them than is needed."""
    asked: dict[str, list[str]] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tiny_infinity / "t5" if name.startswith("google/") else hub)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    infinity = load("FoundationVision/Infinity")
    assert infinity.describe()["weights"] == "FoundationVision/Infinity" and infinity.native_size == "1M"
    assert asked.pop("FoundationVision/Infinity") == ["infinity_2b_reg.pth", "infinity_vae_d32reg.pth"]
    assert "*.safetensors" in asked.pop("google/flan-t5-xl") and not asked
    load("FoundationVision/Infinity", tokenizer=str(hub / "infinity_vae_d32reg.pth"))
    assert asked["FoundationVision/Infinity"] == ["infinity_2b_reg.pth"]


def test_outline_of_a_hub_model_downloads_nothing(
    hub: Path, tiny_infinity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = InfinityConfig(weights="FoundationVision/Infinity", device="cpu")
    cached = {"FoundationVision/Infinity": hub}
    monkeypatch.setattr(
        pretrained,
        "try_to_load_from_cache",
        lambda name, file: str(cached[name] / file) if name in cached else None,
    )
    assert Infinity.outline(config) is None, "flan-t5-xl is not there"
    whole = tiny_infinity / "t5"
    cached["google/flan-t5-xl"] = tmp_path / "t5"
    shutil.copytree(whole, tmp_path / "t5", ignore=shutil.ignore_patterns("*.safetensors"))
    assert Infinity.outline(config) is None, "only its tokenizer is there"
    shutil.copy(whole / "model.safetensors", tmp_path / "t5" / "1.safetensors")
    index = tmp_path / "t5" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert Infinity.outline(config) is None, "half of it is there"
    cached["google/flan-t5-xl"] = whole
    outline = Infinity.outline(config)
    assert outline is not None and outline.weights.name == "FoundationVision/Infinity"
    del cached["FoundationVision/Infinity"]
    assert Infinity.outline(config) is None


def test_published_files_come_first(hub: Path, tiny_infinity: Path) -> None:
    """A folder may hold autoencoders of other widths too."""
    torch.save({"vae": {}}, hub / "infinity_vae_d16.pth")
    infinity = load(hub, text_encoder=str(tiny_infinity / "t5"))
    assert infinity.weights.tokenizer.name == "infinity_vae_d32reg.pth"


def test_norms_that_do_not_fit(hub: Path, tiny_infinity: Path) -> None:
    shutil.copy(tiny_infinity / VAE, hub / "infinity_vae_d8.safetensors")
    said = mistake(hub / "infinity_2b_reg.pth", tokenizer=str(hub / "infinity_vae_d8.safetensors"))
    assert "8 channels are not normalised in 32 groups" in said and "config.json" in said
