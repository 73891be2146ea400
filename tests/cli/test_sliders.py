"""Sliders from the command line: training from pairs, drawing prompts, photographs learnt by heart, files of PairEdit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import pentimento
from pentimento import generation, photos, recipe, series, stored
from pentimento.errors import UserError
from pentimento.flux.backbone import Flux
from pentimento.methods.inversion import Inversion
from pentimento.pocket import weights as pocket_weights

NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENTIMENTO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(path: Path | str) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def test_a_run_holds_both_adapters_and_says_what_it_is(call, slider: Path) -> None:
    assert sorted(p.name for p in (slider / "weights").iterdir()) == ["content", "semantic"]
    printed = call("inspect", slider).stdout
    assert "semantic" in printed and "pairedit" in printed and "flux dev" in printed
    record = json.loads(stored.read_metadata(slider / "weights" / "semantic" / NAME)["pentimento"])
    assert record["prompt"] == "image of a person", "the pairs' own prompts are no captions"
    assert (record["settings"]["skip"], record["settings"]["resolution"]) == (0, 32)


def test_a_run_of_another_method_lacks_an_adapter(refuse, dev_settings: list[str], trained: Path) -> None:
    said = refuse("train", "pairedit", *dev_settings, "--init", trained, "--dry-run")
    assert "does not hold the adapter 'content'" in said


def test_prompts_seeds_scales_and_skips_are_all_combined(call, slider: Path) -> None:
    printed = call(
        "edit", slider, "--prompt", "a cat", "--prompt", "A dog!", "--seed", 5, "--count", 2, "--scale", "0,1",
        "skips=0,1", "--out", "drawn",
    ).stdout.split()  # fmt: skip
    names = [
        f"drawn/{prompt}-scale{scale}-seed{seed}-skip{skip}.png"
        for prompt in ("a-cat", "a-dog") for scale in (0, 1) for seed in (5, 6) for skip in (0, 1)
    ]  # fmt: skip
    assert printed == [*names, "drawn/sheet.png", "drawn/slider.html"]
    assert pixels("drawn/a-cat-scale0-seed5-skip0.png") == pixels("drawn/a-cat-scale0-seed5-skip1.png")
    others = {pixels(name) for name in names}
    assert len(others) == 12, "scale 0 is the same for all skips"
    with Image.open("drawn/a-cat-scale1-seed5-skip0.png") as picture:
        assert picture.size == (32, 32)


def test_the_default_prompt_and_one_result(call, slider: Path) -> None:
    assert call("edit", slider, "--out", "one.png").stdout.split() == ["one.png"]
    call("edit", slider, "--prompt", "image of a person", "--out", "two.png")
    call("edit", slider, "config.prompt=image of a person", "--out", "three.png")
    assert pixels("one.png") == pixels("two.png") == pixels("three.png")


def test_a_file_of_prompts_and_random_seeds(call, slider: Path) -> None:
    Path("people.yaml").write_text("- male person\n- female person\n")
    Path("people.txt").write_text("male person\n\nfemale person\n")
    drawn = [
        call("edit", slider, f"prompts={name}", "--count", 6, "--out", f"of-{name}").stdout.split()
        for name in ("people.yaml", "people.txt")
    ]
    assert [Path(p).name for p in drawn[0]] == [Path(p).name for p in drawn[1]]
    assert {Path(p).name.split("-person")[0] for p in drawn[0][:-1]} == {"male", "female"}
    random = call("edit", slider, "random_seeds=true", "--count", 3, "--out", "random").stdout.split()
    seeds = {int(Path(p).stem.rpartition("seed")[2]) for p in random[:-1]}
    assert len(seeds) == 3 and max(seeds) <= 32768


def test_sliders_compose(call, slider: Path) -> None:
    """Half of it beside half of it is the whole; a scale of its own, also a negative one."""
    call("edit", slider, "--scale", "1", "--out", "whole.png")
    call("edit", slider, "--scale", "0.5", f"also={slider}@0.5", "--out", "halves.png")
    call("edit", slider, "--scale", "1", f"also={slider}/weights/semantic/{NAME}@-1", "--out", "none.png")
    call("edit", slider, "--scale", "0", "--out", "base.png")
    pictures = {n: np.asarray(Image.open(f"{n}.png"), dtype=int) for n in ("whole", "halves", "none", "base")}
    assert abs(pictures["whole"] - pictures["halves"]).max() <= 1
    assert abs(pictures["none"] - pictures["base"]).max() <= 1
    assert abs(pictures["whole"] - pictures["base"]).max() > 1


INVERSION = ["inversion.stages.inversion.steps=2", "inversion.stages.inversion.lr=0.05"]


def test_photographs_are_learnt_once_each(call, slider: Path, photo: Path, own_cache: Path) -> None:
    other = photo.with_name("other.png")
    Image.linear_gradient("L").rotate(90).resize((40, 60)).convert("RGB").save(other)
    arguments = ["edit", slider, photo, other, *INVERSION, "--scale", "0,1,-1", "--out", "edited"]
    printed = call(*arguments).stdout.split()
    assert printed[3] == "edited/photo-sheet.png" and len(printed) == 9
    with Image.open("edited/other-scale1.png") as result:
        assert result.size == (40, 60)
    assert len({pixels(f"edited/photo-scale{scale}.png") for scale in ("0", "1", "-1")}) == 3
    folders = sorted((own_cache / photos.FOLDER).iterdir())
    assert len(folders) == 2 and not (folders[0] / "run" / "checkpoints").exists()
    before = {p: p.stat().st_mtime_ns for p in own_cache.rglob("*.safetensors")}
    copy = photo.rename("renamed.png")
    again = [copy if argument == photo else argument for argument in arguments]
    again[again.index("edited")] = "again"
    call(*again)
    assert {p: p.stat().st_mtime_ns for p in own_cache.rglob("*.safetensors")} == before
    assert pixels("again/renamed-scale1.png") == pixels("edited/photo-scale1.png")
    again[again.index(INVERSION[0])] = "inversion.stages.inversion.steps=3"
    call(*again[:-1], "longer")
    assert len(list((own_cache / photos.FOLDER).iterdir())) == 4


def test_an_inversion_of_ones_own(
    call, slider: Path, photo: Path, dev_settings: list[str], own_cache: Path
) -> None:
    settings = [s for s in dev_settings if not s.startswith(("data", "stages", "config.skip"))]
    stages = [s.removeprefix("inversion.") for s in INVERSION]
    call("train", "inversion", *settings, *stages, f"data.root={photo}", "--out", "known")
    call("edit", slider, photo, "inversion=known", "--scale", "1", "--out", "a.png")
    file = f"known/weights/{NAME}"
    call("edit", slider, photo, f"inversion={file}", "--scale", "1", "--out", "b.png")
    assert pixels("a.png") == pixels("b.png") and not own_cache.exists()
    call("edit", "known", photo, "--out", "again.png")
    call("edit", slider, photo, "inversion=known", "--scale", "0", "--out", "plain.png")
    assert pixels("again.png") == pixels("plain.png"), (
        "scale 0 of the slider is the photograph as it is known"
    )


def test_an_interrupted_inversion_is_continued(slider: Path, photo: Path, own_cache: Path) -> None:
    editor = pentimento.load(slider)
    half = photos.learnt(photo, editor.setup, [*INVERSION, "stages.inversion.steps=2"][2:])
    whole = (half / "weights" / NAME).read_bytes()
    (half / "weights").rename(half / "gone")
    assert photos.learnt(photo, editor.setup, ["stages.inversion.steps=2"]) == half
    assert (half / "weights" / NAME).read_bytes() == whole


def test_python_learns_a_picture_by_itself_on_the_weights_in_memory(
    slider: Path, photo: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = recipe.recipes.text

    def short(name: str) -> str:
        return shipped(name).replace("steps: 1500", "steps: 1")

    monkeypatch.setattr(recipe.recipes, "text", short)
    editor = pentimento.load(slider)
    drawn = editor.edit(instruction="a cat")
    with monkeypatch.context() as loading:
        loading.delattr(Flux, "load")
        result = editor.edit(Image.open(photo), seed=3)
    assert result.size == (50, 30)
    assert editor.edit(photo, seed=3).tobytes() == result.tobytes()
    assert editor.edit(instruction="a cat").tobytes() == drawn.tobytes(), "the slider is as it was"
    (learnt,) = own_cache.rglob(NAME)
    before = learnt.read_bytes()
    own_cache.rename(own_cache.with_name("before"))
    photos.learnt(photo, editor.setup)
    assert learnt.read_bytes() == before, "and so is a model that was loaded for it"


def test_a_model_that_is_moved_about_is_not_shared(slider: Path) -> None:
    offloaded = pentimento.load(slider, overrides=["backbone.offload=model"])
    assert offloaded.method.learner(Inversion, None) is None


def test_edits_that_would_be_none_are_refused_before_a_photograph_is_learnt(
    refuse, slider: Path, photo: Path, own_cache: Path
) -> None:
    search = ["candidates=2", "judge=exact", "early_steps=1"]
    assert "of 1 steps, none is left for the edit" in refuse("edit", slider, photo, *search, "skips=1")
    assert "of 3 steps, none is left for the edit" in refuse("edit", slider, photo, "skips=0,3")
    assert "of 2 steps, none is left for the edit" in refuse("edit", slider, photo, "skips=2", "--steps", 2)
    assert not own_cache.exists()


def test_a_series_is_what_edit_draws(call, slider: Path) -> None:
    call("edit", slider, "--prompt", "a cat", "--seed", 4, "--scale", "0,0.5", "--out", "drawn")
    wanted = series.shots(["a cat"], [4], [0.0, 0.5])
    drawn = {shot.scale: picture for shot, picture in series.generate(pentimento.load(slider), wanted)}
    assert drawn[0.0].tobytes() == pixels("drawn/a-cat-scale0.png")
    assert drawn[0.5].tobytes() == pixels("drawn/a-cat-scale0.5.png")


def test_shots_of_one_seed_follow_each_other() -> None:
    made = series.shots(["a", "b"], [1, 2], [0.0, 1.0], skips=[5, 9])
    assert len(made) == 16 == len(set(made))
    assert [(s.prompt, s.seed, s.skip, s.scale) for s in made[:3]] == [
        ("a", 1, 5, 0.0), ("a", 1, 5, 1.0), ("a", 1, 9, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mask", "m.png"], "--mask is for edits of pictures"),
        (["candidates=2", "judge=exact"], "candidates is for edits of pictures"),
        (["paste_back=true"], "paste_back is for edits of pictures"),
        (["skips=soon"], "give a step, or several with commas"),
        (["skips=2"], "none is left for the edit"),
        (["prompts=none.yaml"], "none.yaml: cannot be read"),
        (["prompts=none.yaml", "--prompt", "x"], "prompts and --prompt"),
        (["also=nowhere@1"], "nowhere: there is no such file"),
        (["also=x@much"], "its scale after @"),
        (["--scale", "0,1", "--out", "one.png"], "one.png is one file, but there are 2 results"),
        (["--prompt", "a b", "--prompt", "a  b"], "would be written twice"),
        (["--count", "40000", "random_seeds=true"], "there are 32769 random seeds"),
    ],
)
def test_mistakes_without_a_picture(refuse, slider: Path, arguments: list[str], words: str) -> None:
    assert words in refuse("edit", slider, *arguments)


def test_mistakes_with_a_picture(refuse, slider: Path, photo: Path, trained: Path) -> None:
    assert "Did you mean steps?" in refuse("edit", slider, photo, "inversion.stages.inversion.stps=3")
    assert "nowhere: there is no such file" in refuse("edit", slider, photo, "inversion=nowhere")
    assert "holds the adapter 'semantic', not what knows a photograph" in refuse(
        "edit", slider, photo, f"inversion={slider}"
    )
    content = slider / "weights" / "content" / NAME
    assert "holds the adapter 'content', not a slider" in refuse("edit", slider, f"also={content}")
    assert "several pictures" in refuse("edit", slider, photo, photo, "inversion=x")
    assert "influxedit edits pictures as they are" in refuse("edit", trained, photo, "inversion=x")
    assert "edits in all steps" in refuse("edit", trained, photo, "skips=3")
    assert "edits with one adapter" in refuse("edit", trained, photo, f"also={trained}")
    assert "name at least one picture" in refuse("edit", trained)
    file = slider / "weights" / "content" / NAME
    assert "does not carry the edit; name that of 'semantic'" in refuse("edit", file)


def test_a_file_of_prompts_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for text in ("a: b", "- 1", ""):
        file.write_text(text)
        with pytest.raises(UserError, match="a YAML list of texts|not valid"):
            generation.read_prompts(file)
    empty = tmp_path / "a.txt"
    empty.write_text("\n")
    with pytest.raises(UserError, match="there is no prompt in it"):
        generation.read_prompts(empty)


def test_pairedits_own_files_are_written_and_read(call, slider: Path, tiny_dev: Path) -> None:
    result = call("export", slider, "--to", "pairedit", "--out", "mine.pt")
    assert (
        "read back without running code" in result.stdout
        and "PairEdit's scripts build rank 16" in result.stdout
    )
    printed = call("inspect", "mine.pt").stdout
    assert "PairEdit and Concept Sliders" in printed and "yes, every tensor" in printed and "66" in printed
    how = ["method=pairedit", f"backbone.weights={tiny_dev}", "backbone.device=cpu"]
    same = ["config.resolution=32", "config.steps=3", "config.skip=0", "config.max_sequence_length=16"]
    call("edit", "mine.pt", *how, *same, "--out", "theirs.png")
    call("edit", slider, "--out", "ours.png")
    ours, theirs = (np.asarray(Image.open(name), dtype=int) for name in ("ours.png", "theirs.png"))
    assert abs(ours - theirs).max() <= 8, "the published file has bfloat16's eight bits"
    call("train", "pairedit", *TRAINS_ON(slider), "--init", "mine.pt", "--out", "on", code=2)


def TRAINS_ON(slider: Path) -> list[str]:
    return [
        f"data.root={recipe.load(slider).data.root}",
        f"backbone.weights={recipe.load(slider).backbone.weights}",
    ]


def test_exports_are_the_same_edit_in_stock_diffusers(call, slider: Path, tiny_dev: Path) -> None:
    """1/16 is a power of two: nothing is lost, and readers of alpha and those that take it for the rank agree."""
    editor = pentimento.load(slider)
    hidden = torch.randn(1, 4, 64)
    inputs = {
        "hidden_states": hidden,
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "pooled_projections": torch.randn(1, 24),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.zeros(4, 3),
        "return_dict": False,
    }
    editor.method.adapters.use(semantic=1)
    with torch.no_grad():
        ours = editor.method.flux.transformer(**inputs)[0]
        for to in ("diffusers", "comfyui"):
            call("export", slider, "--to", to, "--out", f"{to}.safetensors")
            bare = load_file(f"{to}.safetensors")
            stock = FluxTransformer2DModel.from_pretrained(tiny_dev / "transformer")
            stock.load_lora_adapter(bare)
            torch.testing.assert_close(stock(**inputs)[0], ours, rtol=1e-5, atol=1e-5)


def test_a_file_at_the_wrong_scale_is_found_out(slider: Path, tiny_dev: Path, tmp_path: Path) -> None:
    """PairEdit's weights under diffusers' names, without the factor alpha / rank that is 1/16 there."""
    how = {"overrides": ["method=pairedit", f"backbone.weights={tiny_dev}", "backbone.device=cpu"]}
    tensors = load_file(slider / "weights" / "semantic" / NAME)
    save_file(tensors, tmp_path / "as-it-is.safetensors")
    adapters = pentimento.load(tmp_path / "as-it-is.safetensors", **how).method.adapters
    trained = 0.03 / adapters.strength("semantic")  # of the weights, as in a run of 500 steps
    tensors = {key: value * trained if "lora_B" in key else value for key, value in tensors.items()}
    strong = {key: value * 16 if "lora_B" in key else value for key, value in tensors.items()}
    for name, state in (("right", tensors), ("wrong", strong)):
        save_file(state, tmp_path / f"{name}.safetensors")
    assert pentimento.load(tmp_path / "right.safetensors", **how).notes == ()
    (note,) = pentimento.load(tmp_path / "wrong.safetensors", **how).notes
    assert "16 times too strong, and right at --scale 0.0625" in note


@pytest.mark.parametrize("name", ["pairedit-no-content", "image-slider"])
def test_ablations_and_baselines_train_and_draw(call, dev_settings: list[str], name: str) -> None:
    stage = next(iter(recipe.load(name).stages))
    settings = [s.replace("stages.pair", f"stages.{stage}") for s in dev_settings]
    call(
        "train", name, *settings, f"stages.{stage}.steps=1", "watch.every=1", "watch.count=1", "--out", "run"
    )
    assert len(list(Path("run/samples").glob("*.png"))) == 2, "before and after, although nothing is held out"
    call("edit", "run", "--scale", "0,1", "--out", "drawn")
    assert pixels("drawn/image-of-a-person-scale0.png") != pixels("drawn/image-of-a-person-scale1.png")


def test_a_slider_from_words_needs_no_pictures(call, refuse, dev_settings: list[str]) -> None:
    settings = [s.replace("stages.pair", "stages.slider") for s in dev_settings if not s.startswith("data")]
    printed = call("train", "text-slider", *settings, "--dry-run").stdout
    assert "slider trains semantic" in printed
    more = ["config.preserve=[male, female]", "stages.slider.batch_size=2"]
    call("train", "text-slider", *settings, *more, "--out", "run")
    call("edit", "run", "--out", "a.png")
    assert "has no pictures; leave it out" in refuse("train", "text-slider", *settings, "data.root=x")


def test_pairs_by_position(call, refuse, own_pairs: Path, dev_settings: list[str]) -> None:
    for number, path in enumerate(sorted((own_pairs / "target").iterdir())):
        path.rename(path.with_name(f"after{number}.png"))
    settings = [*dev_settings, f"data.root={own_pairs}"]
    assert "no partner for 12 pictures" in refuse("train", "pairedit", *settings, "--dry-run")
    call("show", "pairedit", *settings, "data.match=position", "--index", 2, "--out", "seen")
    about = json.loads(Path("seen/2.json").read_text())
    assert about["files"]["target"].endswith("after2.png") and about["prompt_for_the_model"] == ""
    (own_pairs / "target" / "after5.png").unlink()
    said = refuse("train", "pairedit", *settings, "data.match=position", "--dry-run")
    assert "6 sources and 5 targets cannot be paired by position" in said


def test_a_resumed_run_of_two_adapters_is_the_uninterrupted_one(
    call, dev_settings: list[str], slider: Path
) -> None:
    call("train", "pairedit", *dev_settings, "stages.pair.steps=1", "--out", "run")
    call("train", "pairedit", *dev_settings, "--out", "run", "--resume")
    for name in ("content", "semantic"):
        file = Path("weights") / name / NAME
        assert (Path("run") / file).read_bytes() == (slider / file).read_bytes()


def test_the_cache_is_where_derived_models_are(own_cache: Path) -> None:
    assert pocket_weights.cache_folder() == own_cache
