"""Every kind of mistake is answered by one message and exit code 2, most of them before any weights are loaded."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import Result

from pentimento import editing, recipe
from pentimento.errors import UserError


def test_every_command_answers_a_wrong_name(refuse, photo: Path, settings: list[str]) -> None:
    near = "Did you mean influxedit-edit?"
    assert near in refuse("recipes", "influxedit-edti")
    assert near in refuse("train", "influxedit-edti", *settings)
    assert near in refuse("show", "influxedit-edti", *settings)
    assert "no-such-run: there is no such file or folder" in refuse("edit", "no-such-run", photo)
    assert "no-such-file: there is no such file or folder" in refuse("inspect", "no-such-file")
    said = refuse("world", "--task", "add-glases", "--count", 1, "--out", "drawn")
    assert "add-glases" in said and "add-glasses" in said
    assert "tets" in refuse("world", "--task", "add-hat", "--count", 1, "--split", "tets", "--out", "drawn")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "nonsense"),
        (["train"], "RECIPE"),
        (["train", "influxedit-edit", "--rseume"], "--rseume"),
        (["edit", "run", "photo.png", "--count", "0"], "--count"),
        (["edit", "run", "photo.png", "--seed", "first"], "--seed"),
        (["world", "--count", "3", "--out", "drawn"], "--task"),
    ],
)
def test_a_wrong_use_of_the_command_line(refuse, arguments: list[str], words: str) -> None:
    assert words in refuse(*arguments)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("colour=red", "colour is not a known key"),
        ("stages.edit.step=3", "Did you mean steps?"),
        ("stages.edit.steps=soon", "should be a whole number"),
        ("stages.edit.warmup=3", "warmup"),
        ("stages.edit.train=[semantic]", "semantic"),
        ("config.mode=fill", "edit, split"),
        ("steps", "key=value"),
        ("backbone.device=cuda:77", "cuda:77"),
        ("backbone.attention=flsah", "backbone.attention"),
        ("config.lora.full=[x_embeder]", "x_embedder"),
        ("config.lora.targets=[to_z]", "to_z"),
    ],
)
def test_a_key_that_is_unknown_misspelt_ill_typed_or_impossible(
    refuse, settings, override: str, words: str
) -> None:
    assert words in refuse("train", "influxedit-edit", *settings, override)


def test_broken_yaml(refuse, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("method: influxedit\nstages: {edit: [\n")
    assert "mine.yaml, line 3, column 1: not valid YAML" in refuse("train", "mine.yaml")


def _lonely(root: Path) -> None:
    (root / "target" / "2.png").rename(root / "target" / "two.png")


def _cut(root: Path) -> None:
    path = root / "source" / "2.png"
    path.write_bytes(path.read_bytes()[:-30])


def _fake(root: Path) -> None:
    (root / "source" / "2.png").write_text("no picture")


def _nothing(root: Path) -> None:
    (root / "source" / "2.png").write_bytes(b"")


def _no_prompt(root: Path) -> None:
    (root / "prompts" / "2.txt").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_lonely, "no partner"),
        (_cut, "2.png"),
        (_fake, "2.png"),
        (_nothing, "2.png"),
        (_no_prompt, "no prompt"),
    ],
)
def test_a_spoilt_data_set(refuse, settings, own_pairs: Path, spoil, words: str) -> None:
    root = own_pairs
    spoil(root)
    assert words in refuse("train", "influxedit-edit", *settings, f"data.root={root}", "--dry-run")
    assert words in refuse("train", "influxedit-edit", *settings, f"data.root={root}", "--out", "run")
    assert not Path("run").exists()


def test_a_data_folder_that_is_missing_empty_unreadable_or_a_file(refuse, settings, photo: Path) -> None:
    def with_root(root: str) -> str:
        return refuse("train", "influxedit-edit", *settings, f"data.root={root}")

    Path("empty").mkdir()
    os.symlink("loop", "loop")
    assert "there is no such folder" in with_root("missing")
    assert "empty" in with_root("empty")
    assert "loop" in with_root("loop")
    assert "photo.png" in with_root(str(photo))
    assert "data.root" in with_root("")


def _empty_weights(folder: Path, tiny: Path) -> None:
    folder.mkdir()


def _other_architecture(folder: Path, tiny: Path) -> None:
    folder.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def _corrupted(folder: Path, tiny: Path) -> None:
    shutil.copytree(tiny, folder)
    path = next((folder / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("make", "words"),
    [(_empty_weights, "empty"), (_other_architecture, "architecture"), (_corrupted, "damaged")],
)
def test_weights_that_cannot_be_used(refuse, settings, tiny_fill: Path, make, words: str) -> None:
    make(Path("model"), tiny_fill)
    arguments = ("influxedit-edit", *settings, "backbone.weights=model")
    assert words in refuse("train", *arguments, "--out", "run")
    assert words in refuse("train", *arguments, "--dry-run")
    assert words in refuse("show", *arguments)


def test_a_file_where_a_folder_should_be(refuse, settings, trained: Path, photo: Path) -> None:
    Path("taken").write_text("a file")
    assert "taken" in refuse("train", "influxedit-edit", *settings, "--out", "taken")
    assert "taken" in refuse("train", "influxedit-edit", *settings, "--out", "taken/run")
    assert "taken" in refuse("edit", trained, photo, "--out", "taken")
    assert "taken" in refuse("edit", trained, photo, "--out", "taken/result.png")
    assert "taken" in refuse("show", "influxedit-edit", *settings, "--out", "taken")
    assert "taken" in refuse("world", "--task", "add-hat", "--count", 1, "--out", "taken")


def test_a_full_disk(refuse, settings, trained: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refuse("train", "influxedit-edit", *settings, "--out", "run")
    assert "No space left on device" in refuse("edit", trained, photo)
    assert not list(Path("edited").iterdir())


def test_a_run_folder_in_use(refuse, settings, trained: Path) -> None:
    Path("run").mkdir()
    with FileLock("run/.lock"):
        assert "in use" in refuse("train", "influxedit-edit", *settings, "--out", "run")


def test_a_used_run_folder(refuse, settings, trained: Path) -> None:
    assert "--resume" in refuse("train", "influxedit-edit", *settings, "--out", trained)
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    assert "thesis.txt" in refuse("train", "influxedit-edit", *settings, "--out", "full")


def test_resume_of_nothing_or_with_other_settings(refuse, settings, trained: Path) -> None:
    assert "holds no run" in refuse("train", "influxedit-edit", *settings, "--out", "new", "--resume")
    assert "which run" in refuse("train", "influxedit-edit", *settings, "--resume")
    changed = (*settings, "stages.edit.lr=0.08", "stages.edit.steps=1")
    said = refuse("train", "influxedit-edit", *changed, "--out", trained, "--resume")
    assert "stages.edit.lr: 0.05 -> 0.08" in said
    assert "stages.edit.steps: 2 -> 1" in said
    assert "--init" in refuse("train", trained, "--resume", "--init", trained)


def test_dry_run_finds_what_is_wrong_with_out_resume_and_init(
    call, refuse, settings, trained: Path, tmp_path: Path
) -> None:
    dry = ("train", "influxedit-edit", *settings, "--dry-run")
    Path("taken").write_text("a file")
    assert "already holds a run" in refuse(*dry, "--out", trained)
    assert "a file stands in its way" in refuse(*dry, "--out", "taken")
    assert "a file stands in its way" in refuse(*dry, "--out", "taken/run")
    assert "holds no run" in refuse(*dry, "--out", "new", "--resume")
    assert "which run" in refuse(*dry, "--resume")
    changed = (*dry, "stages.edit.lr=0.06", "--out", trained, "--resume")
    assert "stages.edit.lr: 0.05 -> 0.06" in refuse(*changed)
    assert "there is no such file" in refuse(*dry, "--init", "absent")
    assert "cannot be given with --resume" in refuse(*dry, "--out", trained, "--resume", "--init", trained)
    assert "of another shape" in refuse(*dry, "config.lora.rank=3", "--init", trained)
    call(*dry, "--out", trained, "--resume")
    call(*dry, "--out", "new", "--init", trained)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_processes_that_train_together_share_a_named_folder(
    call, refuse, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would choose a name of its own by the second at which it began."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--out FOLDER" in refuse("train", "influxedit-edit", *settings)


def test_init_and_edit_with_adapters_that_do_not_fit(
    refuse, settings, trained: Path, photo: Path, tiny_fill: Path
) -> None:
    other_rank = (*settings, "config.lora.rank=3", "--out", "run")
    assert "there is no such file" in refuse(
        "train", "influxedit-edit", *settings, "--init", "absent", "--out", "run"
    )
    assert "rank" in refuse("train", "influxedit-edit", *other_rank, "--init", trained)
    save_file({"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}, "other.safetensors")
    where = ("method=influxedit", f"backbone.weights={tiny_fill}", "backbone.device=cpu")
    assert "other.safetensors" in refuse("edit", "other.safetensors", photo, *where)


def test_a_step_that_was_not_saved(refuse, trained: Path, photo: Path) -> None:
    said = refuse("edit", trained, photo, "--at", 7)
    assert "7" in said and "1, 2" in said


def test_what_is_no_run(refuse, photo: Path, settings: list[str]) -> None:
    assert "train it first" in refuse("edit", "influxedit-edit", photo)
    Path("begun").mkdir()
    Path("begun/recipe.yaml").write_text(recipe.dump(recipe.load("influxedit-edit", settings)))
    assert "no weights" in refuse("edit", "begun", photo)
    Path("empty").mkdir()
    assert "empty" in refuse("edit", "empty", photo)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "at least one picture"),
        (["missing.png"], "missing.png"),
        (["photo.png", "--scale", "strong"], "--scale 'strong'"),
        (["photo.png", "--seed", "99999999999999999999999"], "--seed 99999999999999999999999: seeds lie"),
        (["photo.png", "--out", "photo.png"], "replace an input"),
        (["photo.png", "--count", "2", "--out", "one.png"], "2 results"),
        (["photo.png", "photo.png"], "photo.png"),
        (["photo.png", "--mask", "mask.png"], "10x10 and 50x30"),
        (
            ["photo.png", "wide.png", "--instruction", "a", "--instruction", "b", "--instruction", "c"],
            "3 instructions",
        ),
        (["photo.png", "--mask", "whole.png"], "takes no mask"),
        (["cut.png"], "cut.png"),
        (["fake.png"], "fake.png"),
        (["zero.png"], "zero.png"),
        (["photo.png", "config.mod=edit"], "Did you mean mode?"),
        (["photo.png", "candidates=6"], "judge=exact: the read-out of the drawn world"),
        (["photo.png", "candidate=6", "judge=http"], "Did you mean candidates?"),
        (["photo.png", "candidates=six", "judge=http"], "should be a whole number"),
        (["photo.png", "judge=http"], "ask for two or more"),
        (["photo.png", "candidates=2", "judge=gpt"], "one of http, local, exact"),
        (["photo.png", "candidates=2", "judge=local"], "judge_model"),
        (["photo.png", "candidates=2", "judge=exact"], "early_steps=10 is more than the 2 steps"),
        (["photo.png", "paste_back=maybe"], "true or false"),
        (["photo.png", "photo-sheet.png"], "would be written twice"),
        (["photo.png", "backbone.weights=absent"], "absent"),
    ],
)
def test_a_wrong_edit(refuse, trained: Path, photo: Path, arguments: list[str], words: str) -> None:
    Image.new("L", (10, 10)).save("mask.png")
    Image.new("L", (50, 30)).save("whole.png")
    Image.new("RGB", (60, 20)).save("wide.png")
    Image.new("RGB", (60, 20)).save("photo-sheet.png")
    Path("cut.png").write_bytes(photo.read_bytes()[:-40])
    Path("fake.png").write_text("GIF89a, or so")
    Path("zero.png").write_bytes(b"")
    assert words in refuse("edit", trained, *arguments)


def test_an_edit_without_an_instruction_after_training_on_several(
    refuse, trained: Path, photo: Path, tmp_path: Path
) -> None:
    """Before any weights are loaded; those of the run are not even there."""
    several = shutil.copytree(trained, tmp_path / "several")
    file = several / "weights" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    record = json.loads(metadata["pentimento"]) | {"prompt": None}
    save_file(load_file(file), file, metadata | {"pentimento": json.dumps(record)})
    for what in (several, file):
        said = refuse("edit", what, photo, "backbone.weights=absent")
        assert "--instruction" in said and "no prompt in common" in said
    assert "absent" in refuse("edit", several, photo, "backbone.weights=absent", "--instruction", "x")
    assert "--instruction is empty" in refuse("edit", several, photo, "--instruction", " ")
    for what in (several, file):
        said = refuse("edit", what, photo, "method=icedit", "--instruction", "x")
        assert "method=icedit" in said and "is of influxedit" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["photo.png", "photo-sheet.png"], "results/photo-sheet.png would be written twice"),
        (["photo.png", "photo-1.png", "--instruction", "a"], None),
        (["photo.png", "--scale", "1,1.0"], "photo-scale1.png would be written twice"),
    ],
)
def test_results_and_sheets_never_replace_each_other(photo: Path, arguments, words: str | None) -> None:
    names = [a for a in arguments if a.endswith(".png")]
    for name in names:
        (photo.parent / name).write_bytes(photo.read_bytes())
    scales = arguments[-1] if "--scale" in arguments else "1"
    settled = {
        "instructions": ["a"],
        "variants": editing.variants(seed=0, count=1, scales=scales, steps=None),
        "out": Path("results"),
    }
    pictures = [str(photo.parent / name) for name in names]
    if words is None:
        jobs = editing.plan(pictures, **settled)
        written = [path for job in jobs for path in (*job.results, job.sheet)]
        assert len(set(written)) == len(written) == 4
        return
    with pytest.raises(UserError, match=words):
        editing.plan(pictures, **settled)


@pytest.mark.parametrize("name", ["result.gif", "result.AVIF", "folder/result.jfif"])
def test_a_result_in_a_format_that_is_only_read(refuse, trained: Path, photo: Path, name: str) -> None:
    assert f"--out {name}: no picture is written as" in refuse("edit", trained, photo, "--out", name)
    assert [p.name for p in photo.parent.iterdir()] == ["photo.png"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "damaged"),
        (b"no safetensors, only words", "damaged"),
        (b"PK\x03\x04 and so on", "pickled"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the weights"),
    ],
)
def test_a_file_that_is_no_adapter(refuse, trained: Path, photo: Path, content: bytes, words: str) -> None:
    Path("bad.safetensors").write_bytes(content)
    assert words in refuse("inspect", "bad.safetensors")
    assert words in refuse("edit", "bad.safetensors", photo)


def test_a_damaged_adapter_and_folders_without_one(refuse, trained: Path) -> None:
    whole = (trained / "weights" / "pytorch_lora_weights.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-100])
    assert "damaged" in refuse("inspect", "cut.safetensors")
    Path("folder").mkdir()
    assert "holds no .safetensors file" in refuse("inspect", "folder")
    for name in ("one", "two"):
        Path(f"folder/{name}.safetensors").write_bytes(whole)
    assert "name one of them" in refuse("inspect", "folder")


def test_a_sample_that_is_not_there(refuse, settings: list[str]) -> None:
    assert "6 samples" in refuse("show", "influxedit-edit", *settings, "--index", 6)
    assert "--index" in refuse("show", "influxedit-edit", *settings, "--index", -1)


def test_show_needs_the_models_configuration(refuse, settings: list[str]) -> None:
    assert "nobody/nothing" in refuse("show", "influxedit-edit", *settings, "backbone.weights=nobody/nothing")


def test_ctrl_c_says_how_to_continue(
    call: Callable[..., Result], settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pentimento import run

    def interrupted(*arguments: object, **options: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_run", interrupted)
    train = ("train", "influxedit-edit", *settings, "--out", "my-run")
    assert "nothing had begun yet" in call(*train, code=130).stderr
    Path("my-run").mkdir()
    Path("my-run/recipe.yaml").touch()
    assert "continue with: pentimento train my-run --resume" in call(*train, code=130).stderr
