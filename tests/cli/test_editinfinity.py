"""EditInfinity from the command line, on a tiny Infinity: pictures are learnt once and then edited; cases; what may change."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import pentimento
from pentimento import cases, editing, heatmaps, learning, photos, recipe
from pentimento.errors import UserError
from pentimento.infinity.backbone import Infinity
from pentimento.method import Region

CAPTION = "a cat on a red mat"
SIZE = (60, 90)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENTIMENTO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def short(tiny_infinity: Path) -> list[str]:
    """Settings with which a tiny model learns a picture in a moment, and strongly."""
    stages = [
        f"stages.{name}.{key}"
        for name in ("prompt", "lora")
        for key in ("steps=1", "accumulate=1", "lr=0.05")
    ]
    return [f"backbone.weights={tiny_infinity}", "backbone.device=cpu", "config.cfg=1", *stages]


@pytest.fixture
def cat(tmp_path: Path, picture: Callable[..., Image.Image]) -> Path:
    picture(0, *SIZE).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights is an error."""

    def load(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Infinity, "load", load)


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


def learnt(cache: Path) -> set[Path]:
    return set((cache / photos.FOLDER).glob("*"))


def test_a_picture_is_learnt_once_for_all_its_edits(
    call, cat: Path, short: list[str], own_cache: Path
) -> None:
    how = ["--source", CAPTION, "--prompt", "a dog", "--prompt", "a hen"]
    said = call(
        "edit", "editinfinity", cat, *short, *how, "--seed", 3, "--count", 2, "--out", "whole"
    ).stdout.split()
    names = ["cat-1-seed3", "cat-2-seed3", "cat-1-seed4", "cat-2-seed4", "cat-sheet"]
    assert said == [f"whole/{name}.png" for name in names]
    results = [pixels(path) for path in said[:4]]
    assert {result.shape for result in results} == {(90, 60, 3)}
    assert len({result.tobytes() for result in results}) == 4
    (folder,) = learnt(own_cache)
    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert weights and not (folder / "run" / "checkpoints").exists()
    renamed = cat.rename("other.png")
    # Nothing of this changes what is learnt: another recipe, a word, a guidance.
    again = [*short, *how[:-2], "--seed", 4, "config.word=mat", "config.threshold=0.1"]
    call("edit", "editinfinity-mask", renamed, *again, "config.region=whole", "--out", "again.png")
    assert np.array_equal(pixels("again.png"), results[2])
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.safetensors")} == weights


def test_what_a_picture_is_learnt_again_for(cat: Path, short: list[str]) -> None:
    def key(*changes: str, name: str = "editinfinity", turned: bool = False) -> str:
        with Image.open(cat) as photo:
            turning = photo.transpose(Image.Transpose.ROTATE_180) if turned else photo
            return photos.key(turning, recipe.load(name, [*short, *changes]))

    caption = f"config.source_prompt={CAPTION}"
    same = {key(caption), key(caption, "config.cfg=2", "config.region=mask", name="editinfinity-mask")}
    same |= {key(caption, "config.word=mat", "config.use=rows", "data.root=x", "watch.every=3")}
    others = [
        key(),
        key(caption, "config.flips=0.1"),
        key(caption, "stages.lora.steps=2"),
        key(caption, "seed=1"),
    ]
    others += [key(caption, "backbone.attention_bias=false"), key(caption, turned=True)]
    assert len(same) == 1 and len({*same, *others}) == 7


def test_a_recipe_edits_as_its_run_does(call, refuse, cat: Path, short: list[str]) -> None:
    caption = f"config.source_prompt={CAPTION}"
    settings = [*short, caption, "stages.lora.steps=2", "stages.lora.save_every=1"]
    call("train", "editinfinity", *settings, f"data.root={cat}", "--out", "run")
    call("edit", "run", cat, "--prompt", "a dog", "--out", "run.png")
    call("edit", "editinfinity", cat, *settings, "--prompt", "a dog", "--out", "recipe.png")
    assert np.array_equal(pixels("run.png"), pixels("recipe.png"))
    ours = pentimento.learn("editinfinity", cat, source=CAPTION, overrides=settings)
    assert np.array_equal(ours.edit(cat, instruction="a dog"), pixels("run.png"))
    for step in (1, 2):
        call("edit", "run", cat, "--prompt", "a dog", "--at", step, "--out", f"at{step}.png")
    assert np.array_equal(pixels("at2.png"), pixels("run.png"))
    assert not np.array_equal(pixels("at1.png"), pixels("run.png"))
    assert "set stages.lora.steps=1" in refuse(
        "edit", "editinfinity", cat, *settings, "--prompt", "x", "--at", 1
    )
    assert "'dog' does not occur" in refuse("edit", "run", cat, "--prompt", "x", "--target-word", "dog")


def test_an_edit_of_another_picture_is_noticed(call, refuse, cat: Path, picture, short: list[str]) -> None:
    call(
        "train", "editinfinity", *short, f"config.source_prompt={CAPTION}", f"data.root={cat}", "--out", "run"
    )
    picture(1, *SIZE).save("dog.png")
    with Image.open(cat) as opened:
        opened.save("same.bmp")
    for name, noted in (("dog.png", True), ("same.bmp", False)):
        said = call("edit", "run", name, "--prompt", "a dog", "--out", "made.png").stderr
        assert (f"{name}: differs from the picture that was learnt" in said) == noted
    assert "stages are of recipes" in refuse("edit", "run", cat, "--prompt", "x", "stages.lora.steps=3")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], 'say what the picture shows: config.source_prompt="..."'),
        ([f"config.source_prompt={CAPTION}", "config.word=horse"], "'horse' does not occur"),
        ([f"config.source_prompt={'a cat and a dog and ' * 5}"], "config.source_prompt: a text, with"),
        ([f"config.source_prompt={CAPTION}", "data.root=small.png"], "small.png: 16x16 is too small"),
    ],
)
def test_what_cannot_be_trained_on_leaves_no_folder(
    refuse, no_weights, cat: Path, short: list[str], settings: list[str], words: str
) -> None:
    Image.new("RGB", (16, 16)).save(cat.with_name("small.png"))
    arguments = ["train", "editinfinity", *short, f"data.root={cat}", *settings]
    assert words in refuse(*arguments, "--out", "run") and not Path("run").exists()
    assert words in refuse(*arguments, "--dry-run")


def test_titles_begin_where_a_prompt_differs_from_the_caption() -> None:
    caption = "a cat on a red mat"
    told = editing.told_apart(["a cat on a blue mat", "a cat on a red rug"], caption)
    assert told == ["... blue mat", "... red rug"]
    assert editing.told_apart(["a dog on a red mat"], caption) == ["a dog on a red mat"]
    assert editing.told_apart([caption], caption) == [caption]


def test_titles_begin_with_what_tells_them_apart(
    cat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(editing.images, "sheet", lambda rows, titles, **_: seen.append(titles))
    asked = editing.Asked(source=cat, name="cat", instructions=("a dog",))
    several = editing.variants(seed=0, count=1, scales="0,1", steps=None)
    (job,) = editing.jobs_of([asked], variants=several, out=tmp_path / "out")
    one = Image.new("RGB", SIZE)
    editing._sheet(job, one, job.instructions, [[one], [one]])
    assert seen == [["source", "scale0: a dog", "scale1: a dog"]]


def test_a_stage_alone(call, cat: Path, short: list[str]) -> None:
    lone = [s for s in short if "stages.prompt" not in s]
    how = ["--source", CAPTION, "--prompt", "a dog"]
    call("edit", "editinfinity", cat, *lone, "stages.prompt=null", "config.rows=0", *how, "--out", "lora.png")
    call("edit", "editinfinity", cat, *short[:6], "stages.lora=null", *how, "--scale", "0,1", "--out", "rows")
    made = ("lora.png", "rows/cat-scale0.png", "rows/cat-scale1.png")
    assert len({pixels(name).tobytes() for name in made}) == 3


def test_what_may_change_is_shown_and_can_be_given_back(call, refuse, cat: Path, short: list[str]) -> None:
    how = ["--source", CAPTION, "--target-word", "MAT,"]
    printed = call("mask", "editinfinity", cat, *short, *how, "--out", "seen").stdout.split()
    kinds = ("attention_analysis", "mask-white-changes", "weights-white-keeps")
    assert printed == [f"seen/cat-{kind}.png" for kind in kinds]
    mask, weights = pixels(printed[1]), pixels(printed[2])
    assert mask.shape == weights.shape == SIZE[::-1] and set(np.unique(mask)) == {0, 255}
    assert not weights[mask == 255].any() and weights.max() == 255
    edited = call(
        "edit", "editinfinity", cat, *short, *how, "--prompt", "a dog", "--out", "word"
    ).stdout.split()
    assert edited[:3] == [f"word/cat-{kind}.png" for kind in kinds]
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(printed, edited, strict=False))
    given = [*short, "--source", CAPTION, "--prompt", "a dog"]
    call("edit", "editinfinity", cat, *given, "--mask", printed[1], "--out", "mask.png")
    with Image.open(printed[1]) as opened:
        ImageOps.invert(opened).save("keeps.png")
    call(
        "edit",
        "editinfinity",
        cat,
        *given,
        "--mask",
        "keeps.png",
        "--mask-keeps",
        "--out",
        "keeps-result.png",
    )
    assert np.array_equal(pixels("mask.png"), pixels("keeps-result.png"))
    only = call(
        "mask", "editinfinity", cat, *short, "--mask", "keeps.png", "--mask-keeps", "--out", "w"
    ).stdout
    assert only.split() == ["w/cat-mask-white-changes.png", "w/cat-weights-white-keeps.png"]
    assert "--target-word, a word of --source" in refuse("mask", "editinfinity", cat, *short)


def write_case(folder: Path, cat: Path) -> Path:
    for part in ("image", "prompt"):
        (folder / part).mkdir(parents=True)
    (folder / "image" / "original_image.png").write_bytes(cat.read_bytes())
    mask = Image.new("RGBA", (180, 270), "white")  # of another size, as the authors' own are
    mask.paste("black", (0, 0, 90, 270))
    mask.save(folder / "image" / "mask.png")
    texts = {"original_image_prompt": CAPTION, "edit_image_prompt": "a dog", "target_word": "mat"}
    for name, text in texts.items():
        (folder / "prompt" / f"{name}.txt").write_text(f"{text}\n")
    return folder


def test_a_folder_of_the_authors(call, cat: Path, short: list[str]) -> None:
    folder = write_case(Path("example"), cat)
    said = [
        call("edit", name, "--case", folder, *short, "--out", name).stdout.split()
        for name in ("editinfinity-mask", "editinfinity-auto")
    ]
    assert [len(paths) for paths in said] == [2, 5] and said[0][0] == "editinfinity-mask/example.png"
    mask = Image.new("L", SIZE)
    mask.paste(255, (0, 0, 30, 90))
    mask.save("mask.png")
    direct = [cat, *short, "--source", CAPTION, "--prompt", "a dog"]
    call("edit", "editinfinity", *direct, "--mask", "mask.png", "--out", "left.png")
    call("edit", "editinfinity", *direct, "--target-word", "mat", "--out", "word.png")
    for name, result in (("mask", "left"), ("auto", "word")):
        assert np.array_equal(pixels(f"editinfinity-{name}/example.png"), pixels(f"{result}.png"))


def test_a_file_of_cases(call, cat: Path, short: list[str], own_cache: Path) -> None:
    """A failing one stops none, what is there is not made again, and changed settings make it anew."""
    write_case(Path("example"), cat)
    good = {"image": "cat.png", "source_prompt": CAPTION, "target_prompt": "a dog", "target_word": "mat"}
    lines = [
        {**good, "id": "one"},
        {**good, "id": "bad", "target_word": "horse"},
        {**good, "id": "two", "target_prompt": ["a hen", "a pig"], "licence": "passed over"},
        {"case": "example"},
    ]
    Path("list.jsonl").write_text("\n".join([*map(json.dumps, lines), "{", ""]))
    arguments = ["edit", "editinfinity-auto", "--cases", "list.jsonl", *short, "--out", "made"]
    said = call(*arguments, code=2).stderr
    assert "2 cases failed" in said and "line 5: is not JSON" in said and "'horse' does not occur" in said
    assert {path.name for path in Path("made").iterdir()} >= {
        "one.png",
        "two-1.png",
        "two-2.png",
        "example.png",
    }
    assert not list(Path("made").glob("bad*")) and len(learnt(own_cache)) == 1
    before = {path: path.stat().st_mtime_ns for path in Path("made").iterdir()}
    assert "0 cases made, 3 there already, 2 failed" in call(*arguments, code=2).stderr
    assert {path: path.stat().st_mtime_ns for path in Path("made").iterdir()} == before
    Path("made/one.png").unlink()
    Path("list.jsonl").write_text("\n".join(json.dumps(line) for line in [lines[0], lines[3]]))
    assert "1 case made, 1 there already, 0 failed" in call(*arguments).stderr
    Path("list.jsonl").write_text(json.dumps(lines[0]))
    result = call(*arguments, "config.threshold=0.6")
    assert "1 case made, 0 there already" in result.stderr and "made/one.png" in result.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"source_prompt": "a"}, "names no image"),
        ({"image": "a.png", "sorce_prompt": "a"}, "unknown field sorce_prompt; is source_prompt meant?"),
        ({"image": "a.png", "caption": "a", "source": "b"}, "the fields source and caption mean the same"),
        ({"image": "a.png", "mask": "m.png", "mask_white": "maybe"}, "should be change or keep"),
        ({"image": "a.png", "target_word": 3}, "must be one text, not 3"),
        (["a.png"], "is not a JSON object"),
        ({"case": "nowhere"}, "there is no such folder"),
    ],
)
def test_lines_that_are_no_cases(tmp_path: Path, line: object, words: str) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps(line))
    ((name, error),) = cases.from_lines(tmp_path / "list.jsonl")
    assert name == "line 1" and isinstance(error, UserError) and words in str(error)


def test_files_of_cases_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no cases"):
        list(cases.from_lines(file))
    file.write_text('{"image": "a/x.png"}\n{"image": "b/x.png"}')
    with pytest.raises(UserError, match="several cases are called 'x'"):
        list(cases.from_lines(file))


LONG = "a cat and a dog and a hen and a pig and a cow and a bat and a rat"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], 'say what the picture shows: --source "..." (or let a model say it: --caption auto)'),
        (["--source", CAPTION], 'say what the edited picture shows: --prompt "..."'),
        (["--source", CAPTION, "--prompt", " "], 'say what the edited picture shows: --prompt "..."'),
        (["--source", CAPTION, "--target-word", "mats", "--prompt", "x"], "did you mean 'mat'?"),
        (["--source", CAPTION, "--prompt", "x", "config.region=word"], "(--target-word)"),
        (["--source", CAPTION, "--prompt", LONG], "--prompt: a text, with"),
        (["--source", LONG, "--prompt", "x"], "--source: a text, with"),
        (["--source", CAPTION, "--prompt", LONG], "tokens, but this model reads 64; shorten 'a cat and"),
        (["--source", CAPTION, "--prompt", "x", "--mask-keeps"], "give it with --mask"),
        (["--source", CAPTION, "--prompt", "x", "backbone.precision=fp16"], "fp16 needs a GPU"),
        (["--source", CAPTION, "--prompt", "x", "--mask", "small.png"], "they are 30x45 and 60x90"),
        (["--source", CAPTION, "--prompt", "x", "--mask", "black.png"], "by this mask nothing may change"),
        (["--source", CAPTION, "--prompt", "x", "--mask", "white.png"], "by this mask everything may change"),
        (["--source", CAPTION, "--prompt", "x", "--mask", "black.png", "--mask-keeps"], "everything may change"),
        (["--source", CAPTION, "--prompt", "x", "--mask", "small.png", "--target-word", "mat"], "leave one out"),
        (["--source", CAPTION, "--prompt", "x", "config.region=mask"], "mask: this edit needs one"),
        (["--source", CAPTION, "--prompt", "x", "--steps", "3"], "steps: Infinity draws"),
        (["--source", CAPTION, "--prompt", "x", "candidates=2", "judge=exact"], "no quick previews"),
        (["--source", CAPTION, "--prompt", "x", "inversion=run"], "inversion is for sliders"),
        (["--source", CAPTION, "--source", "a dog", "--prompt", "x"], "one picture has one caption"),
        (["--case", "nowhere"], "--case names the picture"),
        (["--cases", "nowhere.jsonl"], "says all of its pictures itself"),
        (["--source", CAPTION, "--prompt", "x", "--prompt", "y", "--out", "a.png"], "there are 2 results"),
        (["--caption", "nowhere", "--prompt", "x"], "--caption: there is no folder 'nowhere'"),
        (["backbone.weights=evil", "--source", CAPTION, "--prompt", "x"], "would run as code (GLOBAL"),
    ],
)  # fmt: skip
def test_mistakes_before_weights_are_read(
    refuse, no_weights, cat: Path, short: list[str], arguments: list[str], words: str
) -> None:
    sizes = {"small": (30, 45), "black": SIZE, "white": SIZE}
    for name, size in sizes.items():
        Image.new("L", size, 255 * (name == "white")).save(cat.with_name(f"{name}.png"))
    (cat.parent / "evil").mkdir()
    for name in ("infinity_2b_reg", "infinity_vae_d32reg"):
        torch.save({"a": print}, cat.parent / "evil" / f"{name}.pth")
    assert words in refuse("edit", "editinfinity", cat, *short, *arguments)


def test_pictures_that_are_too_small_or_too_long(
    refuse, no_weights, tmp_path: Path, short: list[str]
) -> None:
    for size, words in (((16, 16), "16x16 is too small"), ((300, 60), "300x60 is too long")):
        Image.new("RGB", size).save(tmp_path / "odd.png")
        assert words in refuse("edit", "editinfinity", "odd.png", *short, "--source", "a", "--prompt", "b")
        given = [*short, "data.root=odd.png", "config.source_prompt=a"]
        assert words in refuse("train", "editinfinity", *given, "--dry-run")


def test_other_methods_do_not_learn_pictures(refuse, cat: Path, trained: Path) -> None:
    assert "are for methods that learn the picture itself" in refuse("edit", trained, cat, "--source", "a")
    assert "only editinfinity finds where" in refuse("mask", trained, cat)
    assert "pairedit is a recipe; train it first" in refuse("edit", "pairedit", cat)
    assert "is the recipe editinfinity meant?" in refuse("edit", "editinfinty", cat)
    start = [
        "train",
        "editinfinity",
        f"data.root={cat}",
        f"config.source_prompt={CAPTION}",
        "--init",
        trained,
    ]
    assert "it was trained on flux, but EditInfinity works on infinity" in refuse(*start, "--dry-run")
    with pytest.raises(UserError, match="no recipe of a method that learns the picture"):
        pentimento.learn("pairedit", cat)


def test_a_file_of_cases_goes_into_a_folder(refuse, no_weights, short: list[str]) -> None:
    Path("list.jsonl").write_text('{"image": "a.png"}')
    said = refuse("edit", "editinfinity", "--cases", "list.jsonl", *short, "--out", "one.png")
    assert "the results of a file of cases go into a folder" in said


def test_interrupted(monkeypatch: pytest.MonkeyPatch, call, cat: Path, short: list[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learning.photos, "learn", stop)
    result = call("edit", "editinfinity", cat, *short, "--source", CAPTION, "--prompt", "x", code=130)
    assert "the same command goes on from here" in result.stderr


def test_out_of_memory_while_learning(
    monkeypatch: pytest.MonkeyPatch, call, cat: Path, short: list[str], own_cache: Path
) -> None:
    """What it then says to change is no other thing to learn, but may be changed."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    arguments = ["edit", "editinfinity", cat, *short, "--source", CAPTION, "--prompt", "x", "--out", "a.png"]
    with monkeypatch.context() as patch:
        patch.setattr(Infinity, "logits", fail)
        said = call(*arguments, code=2).stderr
    assert "backbone.gradient_checkpointing=true" in said and "config.size" in said
    call(*arguments, "backbone.gradient_checkpointing=true", "watch.every=0")
    assert pixels("a.png").shape == (90, 60, 3) and len(learnt(own_cache)) == 1


def test_shown_masks_replace_none_that_was_given(call, refuse, cat: Path, short: list[str]) -> None:
    mask = Path("masks/cat-mask-white-changes.png")
    mask.parent.mkdir()
    Image.linear_gradient("L").resize(SIZE).save(mask)
    before = mask.read_bytes()
    assert "would replace an input" in refuse("mask", "editinfinity", cat, *short, "--mask", mask)
    assert mask.read_bytes() == before and len(list(mask.parent.iterdir())) == 1
    call("mask", "editinfinity", cat, *short, "--mask", mask, "--out", "other")


def test_the_analysis_shows_the_extremes_in_the_outermost_colours() -> None:
    attention = torch.zeros(4, 4)
    attention[1, 2] = 0.25
    grey = Image.new("RGB", (400, 400), "grey")
    region = Region(mask=Image.new("L", (4, 4)), weights=Image.new("L", (4, 4), 255), attention=attention)
    sheet = np.asarray(heatmaps.analysis(region, grey))
    blue, red = (tuple(heatmaps.COLOURS[end]) for end in (0, -1))
    counts = {colour: int((sheet == colour).all(-1).sum()) for colour in (blue, red)}
    cell = (heatmaps.CELL // 4) ** 2
    assert counts[red] == pytest.approx(cell, rel=0.1) and counts[blue] > 14 * cell
