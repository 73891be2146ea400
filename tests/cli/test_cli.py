"""The command line: what it prints, writes and returns."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import packed
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from typer.testing import Result

from pentimento import __version__, cli, recipe
from pentimento.adapters import Adapters, spec_of
from pentimento.errors import UserError
from pentimento.recipes import shipped


def test_help_lists_the_commands_and_version_is_printed(call: Callable[..., Result]) -> None:
    for arguments in ((), ("--help",)):
        printed = call(*arguments).stdout
        assert all(
            name in printed
            for name in ("recipes", "train", "edit", "show", "inspect", "world", "download", "doctor")
        )
    assert call("--version").stdout.strip() == __version__


def test_recipes_lists_and_explains(call: Callable[..., Result], tmp_path: Path) -> None:
    listed = call("recipes").stdout
    assert all(name in listed and about in listed for name, about in shipped().items())
    explained = call("recipes", "influxedit-edit").stdout
    (tmp_path / "mine.yaml").write_text(explained)
    assert recipe.load(tmp_path / "mine.yaml") == recipe.load("influxedit-edit")


def test_dry_run_says_what_would_be_trained_and_writes_nothing(
    call: Callable[..., Result], settings: list[str], tmp_path: Path
) -> None:
    printed = call("train", "influxedit-edit", *settings, "--dry-run").stdout
    assert "4 pairs to train on, 2 held out, 1 different prompt;" in printed
    assert "64x48 (4 pairs)" in printed
    assert "edit trains edit: " in printed
    assert "2 steps of 1 x 1 samples" in printed
    assert list(tmp_path.iterdir()) == []


def test_dry_run_counts_what_training_trains(
    call: Callable[..., Result], settings: list[str], trained: Path
) -> None:
    printed = call("train", "influxedit-edit", *settings, "--dry-run").stdout
    inspected = call("inspect", trained).stdout
    count = printed.split("edit trains edit: ")[1].split(" parameters")[0]
    assert f"{count} parameters" in inspected


def test_dry_run_says_what_is_loaded_otherwise(
    call: Callable[..., Result], refuse, settings: list[str], tiny_fill: Path, tmp_path: Path
) -> None:
    transformer = packed.write_transformer(tmp_path / "fill.gguf", tiny_fill)
    text = packed.write_text_encoder(tmp_path / "t5.gguf", tiny_fill)
    changes = [f"backbone.transformer_file={transformer}", f"backbone.text_encoder_file={text}"]
    plain = call("train", "influxedit-edit", *settings, "--dry-run").stdout.splitlines()
    dry = call("train", "influxedit-edit", *settings, *changes, "backbone.offload=model", "--dry-run").stdout
    assert [line.strip() for line in dry.splitlines() if line not in plain] == [
        f"transformer from {transformer} ({transformer.stat().st_size / 2**30:.2f} GiB)",
        f"T5 text encoder from {text} ({text.stat().st_size / 2**30:.2f} GiB)",
        "encoders and transformer take turns on the device; they wait in main memory",
    ]
    absent = f"backbone.transformer_file={tmp_path / 'absent.gguf'}"
    assert "absent.gguf' on this machine" in refuse(
        "train", "influxedit-edit", *settings, absent, "--dry-run"
    )


def test_dry_run_without_the_models_configuration(call: Callable[..., Result], settings: list[str]) -> None:
    printed = call(
        "train", "influxedit-edit", *settings, "backbone.weights=nobody/nothing", "--dry-run"
    ).stdout
    assert "known once the weights are on this machine" in printed


def test_dry_run_decodes_every_picture(refuse, settings: list[str], own_pairs: Path) -> None:
    broken = own_pairs
    path = broken / "target" / "3.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert "3.png" in refuse("train", "influxedit-edit", *settings, f"data.root={broken}", "--dry-run")


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("influxedit-edit", {"condition": (64, 48), "target": (64, 48), "mask-white-changes": (64, 48)}),
        ("influxedit-split", {"condition": (128, 48), "target": (128, 48), "mask-white-changes": (128, 48)}),
    ],
)
def test_show_writes_what_the_model_sees(
    call: Callable[..., Result], settings: list[str], name: str, views: dict, tmp_path: Path
) -> None:
    template = "config.prompt_template=Look: {prompt}!"
    printed = call("show", name, *settings, template, "--index", 1, "--out", "seen").stdout.split()
    assert sorted(printed) == sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "seen").iterdir())
    about = json.loads((tmp_path / "seen" / "1.json").read_text())
    assert about["prompt_for_the_model"] == "Look: make it negative!"
    assert (about["size"], about["training_size"]) == ([48, 32], [64, 48])
    for view, size in views.items():
        with Image.open(tmp_path / "seen" / f"1-{view}.png") as picture:
            assert picture.size == size == tuple(about["views"][view])
    white = Image.open(tmp_path / "seen" / "1-mask-white-changes.png").get_flattened_data()
    assert sum(white) / len(white) == (255 if name == "influxedit-edit" else 127.5)


def test_edit_writes_results_of_the_pictures_size_and_a_sheet(
    call: Callable[..., Result], trained: Path, photo: Path
) -> None:
    printed = call("edit", trained, photo, "--instruction", "make it negative").stdout.split()
    assert printed == ["edited/photo.png", "edited/photo-sheet.png"]
    with Image.open("edited/photo.png") as result, Image.open("edited/photo-sheet.png") as sheet:
        assert result.size == (50, 30)
        assert sheet.width > 2 * 50


def test_edit_makes_every_combination_of_seed_and_scale(
    call: Callable[..., Result], trained: Path, photo: Path
) -> None:
    printed = call(
        "edit", trained, photo, "--count", 2, "--seed", 5, "--scale", "0,1", "--steps", 1, "--out", "out"
    ).stdout
    assert printed.split() == [
        "out/photo-scale0-seed5.png", "out/photo-scale0-seed6.png", "out/photo-scale1-seed5.png",
        "out/photo-scale1-seed6.png", "out/photo-sheet.png", "out/slider.html",
    ]  # fmt: skip
    results = [Path(path).read_bytes() for path in printed.split()]
    assert len(set(results)) == len(results)


def test_edit_pairs_instructions_with_pictures(
    call: Callable[..., Result], trained: Path, photo: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "photo.png"
    other.parent.mkdir()
    other.write_bytes(photo.read_bytes())
    both = ("--instruction", "a", "--instruction", "b", "--steps", 1)
    call("edit", trained, photo, "--instruction", "b", "--steps", 1, "--out", "alone.png")
    named = call("edit", trained, photo, other, *both).stdout.split()
    assert named[2:] == ["edited/other-photo.png", "edited/other-photo-sheet.png"]
    assert Path(named[2]).read_bytes() == Path("alone.png").read_bytes()


def test_edit_applies_several_instructions_one_after_the_other(
    call: Callable[..., Result], trained: Path, photo: Path
) -> None:
    both = ("--instruction", "a", "--instruction", "b", "--steps", 1)
    printed = call("edit", trained, photo, *both).stdout.split()
    assert printed == ["edited/photo-1.png", "edited/photo-2.png", "edited/photo-sheet.png"]
    call("edit", trained, photo, "--instruction", "a", "--steps", 1, "--out", "first.png")
    assert Path("first.png").read_bytes() == Path("edited/photo-1.png").read_bytes()
    call("edit", trained, "edited/photo-1.png", "--instruction", "b", "--steps", 1, "--out", "second.png")
    assert Path("second.png").read_bytes() == Path("edited/photo-2.png").read_bytes()
    with Image.open("edited/photo-sheet.png") as sheet:
        assert sheet.width > 3 * 128
    printed = call("edit", trained, photo, *both, "--out", "one/last.png").stdout.split()
    assert printed == ["one/last.png", "one/last-sheet.png"]
    assert sorted(path.name for path in Path("one").iterdir()) == ["last-sheet.png", "last.png"]
    assert Path("one/last.png").read_bytes() == Path("edited/photo-2.png").read_bytes()


def test_edit_makes_a_sequence_for_every_seed(
    call: Callable[..., Result], trained: Path, photo: Path
) -> None:
    both = ("--instruction", "a", "--instruction", "b", "--steps", 1, "--count", 2)
    printed = call("edit", trained, photo, *both).stdout.split()
    assert printed == [
        "edited/photo-1-seed0.png", "edited/photo-2-seed0.png", "edited/photo-1-seed1.png", "edited/photo-2-seed1.png",
        "edited/photo-sheet.png",
    ]  # fmt: skip
    with Image.open("edited/photo-sheet.png") as sheet:
        assert sheet.height > 2 * 70


def test_edit_into_one_file_takes_the_weights_of_a_step(
    call: Callable[..., Result], trained: Path, photo: Path
) -> None:
    run = ("edit", trained, photo, "--seed", 3)
    assert call(*run, "--out", "a/result.jpg").stdout.split() == ["a/result.jpg", "a/result-sheet.png"]
    call(*run, "--out", "last.png")
    call(*run, "--out", "two.png", "--at", 2)
    call(*run, "--out", "one.png", "--at", 1)
    assert Path("two.png").read_bytes() == Path("last.png").read_bytes()


def test_edit_takes_an_adapter_file_with_overrides(
    call: Callable[..., Result], trained: Path, photo: Path, tiny_fill: Path
) -> None:
    file = trained / "weights" / "pytorch_lora_weights.safetensors"
    where = (f"backbone.weights={tiny_fill}", "backbone.device=cpu")
    call("edit", trained, photo, "--out", "run.png", "--instruction", "x")
    call("edit", file, photo, *where, "--out", "file.png", "--instruction", "x")
    assert Path("file.png").read_bytes() == Path("run.png").read_bytes()


def test_edit_takes_a_published_adapter_when_the_method_is_named(
    call: Callable[..., Result], refuse, trained: Path, photo: Path, tiny_fill: Path, tmp_path: Path
) -> None:
    published = tmp_path / "published.safetensors"
    ours = load_file(trained / "weights" / "pytorch_lora_weights.safetensors")
    save_file(ours, published, metadata={"format": "pt"})
    where = (
        f"backbone.weights={tiny_fill}",
        "backbone.device=cpu",
        "config.steps=2",
        "config.max_sequence_length=16",
    )
    assert "method=" in refuse("edit", published, photo, *where)
    call(
        "edit", published, photo, "method=influxedit", *where, "--out", "published.png", "--instruction", "x"
    )
    call("edit", trained, photo, "--out", "run.png", "--instruction", "x")
    assert Path("published.png").read_bytes() == Path("run.png").read_bytes()


def test_edit_takes_icedits_published_file(
    call: Callable[..., Result], photo: Path, tiny_fill: Path, tmp_path: Path
) -> None:
    """bfloat16 factors of rank 32 with neither alpha nor metadata, also on the input layer and on modulations; on GGUF too."""
    generator = torch.Generator().manual_seed(0)
    weights = load_file(tiny_fill / "transformer" / "diffusion_pytorch_model.safetensors")
    published = {}
    for layer in ("x_embedder", "transformer_blocks.0.norm1.linear", "single_transformer_blocks.1.attn.to_q"):
        rows, columns = weights[f"{layer}.weight"].shape
        a, b = (0.2 * torch.randn(shape, generator=generator) for shape in ((32, columns), (rows, 32)))
        published[f"transformer.{layer}.lora_A.weight"] = a.bfloat16()
        published[f"transformer.{layer}.lora_B.weight"] = b.bfloat16()
    save_file(published, tmp_path / "pytorch_lora_weights.safetensors")
    gguf = packed.write_transformer(tmp_path / "fill.gguf", tiny_fill, packed.Kind.F32)
    common = ("method=influxedit", "config.mode=split", "config.steps=2", "config.max_sequence_length=16")
    where = (f"backbone.weights={tiny_fill}", "backbone.device=cpu", "--instruction", "x")
    command = ("edit", tmp_path / "pytorch_lora_weights.safetensors", photo, *common, *where)
    call(*command, "--scale", "0,1", "--out", "plain")
    call(*command, f"backbone.transformer_file={gguf}", "backbone.offload=model", "--out", "packed.png")
    base, changed = (Image.open(f"plain/photo-scale{scale}.png").convert("RGB") for scale in (0, 1))
    assert max(high for _, high in ImageChops.difference(base, changed).getextrema()) > 20
    from_gguf = Image.open("packed.png").convert("RGB")
    assert max(high for _, high in ImageChops.difference(from_gguf, changed).getextrema()) <= 1


def test_inspect_tells_what_a_run_holds(call: Callable[..., Result], trained: Path) -> None:
    printed = call("inspect", trained / "weights" / "pytorch_lora_weights.safetensors").stdout
    for words in ("influxedit", "flux fill", "yes, every tensor is finite", "diffusers"):
        assert words in printed
    assert printed.split("rank ")[1].split()[0] == "2"
    assert str(trained.parents[1]) not in printed.split("loads")[1]


def test_inspect_reads_files_of_others(call: Callable[..., Result], tmp_path: Path) -> None:
    kohya = {
        "lora_unet_double_blocks_0_img_attn_qkv": (8, 3072, 9216),
        "lora_unet_single_blocks_3_linear1": (8, 3072, 64),
    }
    tensors = {}
    for name, (rank, wide, out) in kohya.items():
        tensors |= {
            f"{name}.lora_down.weight": torch.zeros(rank, wide),
            f"{name}.lora_up.weight": torch.zeros(out, rank),
        }
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "kohya.safetensors", metadata={"ss_base_model_version": "flux1"})
    printed = call("inspect", "kohya.safetensors", code=1).stdout
    refused = "no: its keys are those of kohya (sd-scripts), and only diffusers' are read"
    for words in ("kohya", "flux1", refused, "not said; name one with method="):
        assert words in printed
    assert printed.split("rank ")[1].split()[0] == "8"
    assert printed.split("alpha ")[1].split()[0] == "4"


def factors(module: str, rank: int = 2, down: str = "lora_A", up: str = "lora_B") -> dict[str, torch.Tensor]:
    return {f"{module}.{down}.weight": torch.ones(rank, 4), f"{module}.{up}.weight": torch.ones(4, rank)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (factors("transformer.a"), None),
        (factors("a") | {"a.alpha": torch.tensor(2.0)}, None),
        (factors("lora_unet_a", down="lora_down", up="lora_up"), "kohya"),
        (factors("base_model.model.a"), "peft"),
        (factors("diffusion_model.a"), "ComfyUI"),
        (
            factors("transformer.a", down="lora.down", up="lora.up"),
            "a factor is called transformer.a.lora.down.weight",
        ),
        (factors("transformer.a", down="lora_A.edit", up="lora_B.edit"), "a factor is called"),
        (factors("transformer.a") | factors("transformer.b", 3), "several ranks (2, 3)"),
        (
            factors("a") | factors("b") | {"a.alpha": torch.tensor(2.0), "b.alpha": torch.tensor(4.0)},
            "several alphas (2, 4)",
        ),
        (factors("a") | {"b.weight": torch.ones(3)}, "b.weight is no LoRA factor"),
    ],
)
def test_inspect_says_that_a_file_loads_only_where_loading_takes_it(
    call: Callable[..., Result], tmp_path: Path, tensors: dict, words: str | None
) -> None:
    save_file(tensors, "some.safetensors")
    host = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "ab"})
    own = Adapters(host)
    try:
        own.add("edit", spec_of(tmp_path / "some.safetensors"))
        own.load(tmp_path / "some.safetensors")
        refused = False
    except UserError:
        refused = True
    assert refused == (words is not None)
    printed = call("inspect", "some.safetensors", code=1 if refused else 0).stdout
    assert (words or "yes, every tensor is finite") in printed


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"transformer.a.lora_A.weight": torch.ones(2, 4)}, "only factor A"),
        (
            {
                "transformer.a.lora_A.weight": torch.ones(2, 4),
                "transformer.a.lora_B.weight": torch.ones(4, 3),
            },
            "do not fit",
        ),
        (
            {"a.lora_A.weight": torch.full((2, 4), float("nan")), "a.lora_B.weight": torch.ones(4, 2)},
            "not finite",
        ),
        ({"conv.weight": torch.ones(3)}, "no LoRA factors"),
        (
            {"block_chunks.0.module.0.ffn.fc1.lora_A": torch.ones(8)},
            "block_chunks.0.module.0.ffn.fc1 has only factor A",
        ),
        ({"rows": torch.ones(2, 8, dtype=torch.int64)}, "holds int64"),
    ],
)
def test_inspect_of_what_cannot_be_used_is_a_negative_result(
    call: Callable[..., Result], tensors: dict, words: str
) -> None:
    save_file(tensors, "bad.safetensors")
    assert words in call("inspect", "bad.safetensors", code=1).stdout


def test_doctor_says_what_there_is_and_never_a_token(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pentimento import doctor

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    findings = doctor.examine()
    printed = call("doctor", code=1 if doctor.negative(findings) else 0).stdout
    for words in ("python", "torch", "cpu", "wandb", "hub cache", "set in the environment", "Non-Commercial"):
        assert words in printed
    assert "hf_secret" not in printed


def test_doctor_builds_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pentimento import doctor

    monkeypatch.setenv("PENTIMENTO_CACHE", str(tmp_path / "cache"))
    found = {f.name: f for f in doctor.examine() if f.topic == "weights"}
    assert found["pocket-fill"].ok and found["pocket-dev"].ok
    assert str(tmp_path / "cache") in found["pocket-dev"].value
    assert list(tmp_path.iterdir()) == []


def test_doctor_lists_every_extra_that_commands_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from pentimento import doctor

    described = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = described["optional-dependencies"]
    lines = [f'{line}; extra == "{name}"' for name, several in extras.items() for line in several]
    monkeypatch.setattr(doctor, "_requirements", lambda: lines)
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    found = {f.name: f.value for f in doctor.examine() if f.topic == "extras"}
    assert found.keys() == doctor.WORKING_EXTRAS == {"data", "bnb", "gguf", "wandb"} <= extras.keys()
    assert found["gguf"] == "not installed; pip install 'pentimento[gguf]'"


def test_world_draws_a_data_set_that_can_be_trained_on(
    call: Callable[..., Result], settings: list[str]
) -> None:
    drawn = ("world", "--task", "add-glasses", "--count", 3, "--size", 64, "--out", "drawn")
    assert call(*drawn).stdout == "drawn\n"
    assert len(Path("drawn/scenes.jsonl").read_text().splitlines()) == 3
    onto = ("data.root=drawn", "data.held_out=1")
    assert "2 pairs to train on" in call("train", "influxedit-edit", *settings, *onto, "--dry-run").stdout


def test_the_module_is_the_command() -> None:
    run = [sys.executable, "-m", "pentimento", "train", "no-such-recipe"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pentimento: error: no recipe named 'no-such-recipe'")
