"""Run folders and editors from Python: what a training leaves, how it is continued, and what is made of it."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import packed
import pytest
from PIL import Image, ImageChops
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pentimento
from pentimento import checkpoint, lookup, preview, recipe, run, runfolder
from pentimento.checkpoint import Interrupted
from pentimento.errors import UserError
from pentimento.method import Example

WEIGHTS = Path("weights") / "pytorch_lora_weights.safetensors"


@pytest.fixture
def plan(settings: list[str]):
    """The recipe of a two-step training, with changes."""

    def make(*overrides: str) -> recipe.Recipe:
        return recipe.load("influxedit-edit", [*settings, *overrides])

    return make


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def test_a_run_folder_holds_everything(plan, tmp_path: Path) -> None:
    watched = plan("watch.every=1", "watch.count=1", "watch.steps=1")
    out = run.train_run(watched, tmp_path / "run")
    assert recipe.load(out) == watched
    assert (out / WEIGHTS).is_file()
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["edit-000001", "edit-000002"]
    assert len(list((out / "samples").glob("*.png"))) == 3
    readme = (out / "README.md").read_text()
    assert "influxedit" in readme and "load_lora_weights" in readme and "licence" in readme
    assert str(tmp_path) not in readme
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {"held_out_loss", "held_out_psnr", "held_out_ssim", "held_out_edit_gain"} <= set(lines[0])
    assert {"loss", "grad_norm", "lr", "seconds"} <= set(lines[1])
    events = EventAccumulator(str(out / "tensorboard" / "edit")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_weights_say_what_they_are_and_not_where_they_come_from(trained: Path) -> None:
    with safe_open(trained / WEIGHTS, framework="pt") as file:
        record = json.loads(file.metadata()["pentimento"])
    assert record["method"] == "influxedit"
    assert record["backbone"]["weights"] == "tiny-fill"
    assert record["settings"]["resolution"] == 64
    assert record["version"] == pentimento.__version__
    assert b"/tmp" not in weights(trained)


def test_equal_runs_give_equal_files(plan, trained: Path, tmp_path: Path) -> None:
    again = run.train_run(plan(), tmp_path / "again")
    assert weights(again) == weights(trained)
    assert (again / "README.md").read_bytes() == (trained / "README.md").read_bytes()
    other = run.train_run(plan("seed=1"), tmp_path / "other")
    assert weights(other) != weights(trained)


def test_a_run_with_raised_steps_is_the_longer_run(plan, trained: Path, tmp_path: Path) -> None:
    out = run.train_run(plan("stages.edit.steps=1"), tmp_path / "run")
    assert weights(out) != weights(trained)
    run.train_run(plan(), out, resume=True)
    assert weights(out) == weights(trained)
    assert recipe.load(out) == plan()


def test_an_interrupted_run_says_how_to_continue_and_ends_the_same(
    plan, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(run.Monitor):
        def __call__(self, report) -> None:
            if report.losses:
                os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(run, "Monitor", Impatient)
        run.train_run(plan("stages.edit.save_every=2"), out)
    assert f"pentimento train {out} --resume" in str(stopped.value)
    with pytest.raises(UserError, match="no weights yet.*--at: [12]"):
        run.load(out)
    run.train_run(recipe.load(out), out, resume=True)
    assert weights(out) == weights(trained)


def test_weights_of_a_run_that_is_continued_say_that_they_are_not_the_last(
    plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **named: object) -> None:
        raise UserError("power cut")

    out = run.train_run(plan("stages.edit.steps=1"), tmp_path / "run")
    assert run.load(out).notes == ()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="power cut"):
        patch.setattr(checkpoint, "save_weights", fails)
        run.train_run(plan(), out, resume=True)
    (note,) = run.load(out).notes
    assert "step 1 of edit, but its recipe ends at step 2 of edit" in note and "--at: 1, 2" in note
    assert run.load(out, at=2).notes == ()
    run.train_run(plan(), out, resume=True)
    assert run.load(out).notes == ()


def without_extra(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "bitsandbytes", None)
    patch.setitem(sys.modules, "bitsandbytes.optim", None)


@pytest.mark.parametrize(
    ("override", "words"),
    [("stages.edit.optimizer=adamw8bit", "extra bnb"), ("backbone.precision=fp16", "fp16 needs a GPU")],
)
def test_what_cannot_train_here_is_known_before_anything_is_loaded(
    plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, words: str
) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("a model was loaded")

    without_extra(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("pentimento.flux.backbone.Flux.load", loaded)
        for work in (preview.plan, lambda chosen: run.train_run(chosen, tmp_path / "run")):
            with pytest.raises(UserError, match=words):
                work(plan(override))
    assert not (tmp_path / "run").exists()
    assert run.train_run(plan("stages.edit.steps=1"), tmp_path / "run").is_dir()


def test_what_cannot_train_on_the_loaded_model_begins_no_run(
    plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "precision_of", lambda method: "fp16")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        run.train_run(plan(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_drawn_are_encoded_last(
    plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backbone remembers a few prompts; those of training must not push them out."""
    order = []
    encode = run.Samples.precompute

    def noted(self, progress=None, *, release=True):
        order.append((len(self), release))
        encode(self, progress, release=release)

    monkeypatch.setattr(run.Samples, "precompute", noted)
    run.train_run(plan("watch.every=9", "watch.steps=1", "stages.edit.steps=1"), tmp_path / "run")
    assert order == [(4, False), (2, True)]


def turn(folder: Path) -> None:
    file = folder / "source" / "1.png"
    with Image.open(file) as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_180)
    turned.putpixel((0, 0), (1, 2, 3))
    turned.save(file)


def take_away(folder: Path) -> None:
    for part, ending in (("source", "png"), ("target", "png"), ("prompts", "txt")):
        (folder / part / f"5.{ending}").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (turn, ["what pictures or masks hold"]),
        (lambda folder: (folder / "prompts" / "1.txt").write_text("turn it round"), ["prompts"]),
        (take_away, ["the number of pairs: 6 -> 5", "names of the pairs"]),
    ],
)
def test_a_run_is_not_continued_on_other_data(
    plan, tmp_path: Path, own_pairs: Path, change: Callable[[Path], None], words: list[str]
) -> None:
    settings = [f"data.root={own_pairs}", "data.held_out=0"]
    out = run.train_run(plan(*settings, "stages.edit.steps=1"), tmp_path / "run")
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    change(own_pairs)
    with pytest.raises(UserError, match=f"--init {out}") as caught:
        run.train_run(plan(*settings), out, resume=True)
    assert all(word in str(caught.value) for word in words)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept


def test_a_run_is_not_continued_on_other_weights(plan, tmp_path: Path, tiny_fill: Path) -> None:
    model = Path(shutil.copytree(tiny_fill, tmp_path / "model"))
    out = run.train_run(plan(f"backbone.weights={model}", "stages.edit.steps=1"), tmp_path / "run")
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config, indent=1))
    with pytest.raises(UserError, match="the weights of the base model: .* -> "):
        run.train_run(plan(f"backbone.weights={model}"), out, resume=True)
    (out / "inputs.json").unlink()  # as in the folder of a version that wrote none
    run.train_run(plan(f"backbone.weights={model}"), out, resume=True)
    assert (out / "inputs.json").is_file()


def test_the_lock_of_a_dead_process_is_no_obstacle(plan, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("left by a process that was killed")
    assert run.train_run(plan("stages.edit.steps=1"), tmp_path / "run").is_dir()


def test_a_run_that_fails_before_it_begins_leaves_no_folder(plan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="to_z"):
        run.train_run(plan("config.lora.targets=[to_z]"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_init_starts_from_an_adapter_also_when_continued_before_the_first_save(
    plan, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = plan("stages.edit.lr=1e-30", "stages.edit.steps=1")
    begun = run.train_run(still, tmp_path / "begun", init=trained)
    assert run.load(begun).edit(picture(), instruction="x") == run.load(trained).edit(
        picture(), instruction="x"
    )

    def fails(*arguments: object) -> None:
        raise UserError("power cut")

    out = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="power cut"):
        patch.setattr(run.train, "train", fails)
        run.train_run(still, out, init=trained)
    run.train_run(still, out, resume=True)
    assert weights(out) == weights(begun)


@pytest.mark.parametrize("cache", ["disk", "off"])
def test_caches_do_not_change_what_is_learnt(plan, trained: Path, tmp_path: Path, cache: str) -> None:
    out = run.train_run(plan(f"data.cache={cache}"), tmp_path / "run")
    assert (out / "cache").is_dir() == (cache == "disk")
    editors = [run.load(folder) for folder in (out, trained)]
    results = [editor.edit(picture(), instruction="x") for editor in editors]
    assert max(high for _, high in ImageChops.difference(*results).getextrema()) <= 1


def picture(width: int = 70, height: int = 40) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def test_an_editor_takes_paths_and_pictures_and_keeps_their_size(trained: Path, tmp_path: Path) -> None:
    editor = pentimento.load(trained)
    picture().save(tmp_path / "photo.png")
    result = editor.edit(tmp_path / "photo.png", instruction="make it negative", seed=3)
    assert result.size == (70, 40)
    assert result == editor.edit(picture(), instruction="make it negative", seed=3)
    assert result != editor.edit(picture(), instruction="make it negative", seed=4)
    assert result != editor.edit(picture(), instruction="make it negative", seed=3, steps=1)
    assert result != editor.edit(picture(), instruction="make it negative", seed=3, guidance=1.0)


def test_an_editor_takes_pictures_of_any_mode_as_it_takes_their_files(trained: Path, tmp_path: Path) -> None:
    editor, clear = run.load(trained), Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    result = editor.edit(clear)
    assert result == editor.edit(tmp_path / "clear.png") == editor.edit(Image.new("RGB", (40, 30), "white"))


def test_scale_0_is_the_base_model(plan, trained: Path) -> None:
    chosen = plan()
    base = recipe.method_class("influxedit").load(chosen.backbone, chosen.config)
    result = run.load(trained).edit(picture(), instruction="x", scale=0.0)
    assert result == run.Editor(method=base).edit(picture(), instruction="x", scale=0.0)
    assert result != run.load(trained).edit(picture(), instruction="x")


def test_a_fixed_prompt_is_the_default_instruction(plan, tmp_path: Path, own_pairs: Path) -> None:
    shutil.rmtree(own_pairs / "prompts")
    out = run.train_run(plan(f"data.root={own_pairs}", "data.prompt=turn it round"), tmp_path / "run")
    editor = run.load(out)
    assert editor.default_instruction == "turn it round"
    assert editor.edit(picture()) == editor.edit(picture(), instruction="turn it round")
    assert editor.edit(picture()) != editor.edit(picture(), instruction="")


def test_the_default_instruction_is_what_all_training_pairs_shared(
    plan, trained: Path, tmp_path: Path, own_pairs: Path
) -> None:
    """Said by the run, by a saved step and by the file alone; runs with several prompts have none."""
    where = [f"backbone.weights={plan().backbone.weights}", "backbone.device=cpu"]
    assert run.load(trained).default_instruction == "make it negative"
    assert run.load(trained, at=1).default_instruction == "make it negative"
    assert run.load(trained / WEIGHTS, overrides=where).default_instruction == "make it negative"
    (own_pairs / "prompts" / "2.txt").write_text("make it bright")
    out = run.train_run(plan(f"data.root={own_pairs}", "data.held_out=0"), tmp_path / "run")
    editor = run.load(out)
    assert editor.default_instruction is None
    with pytest.raises(UserError, match="--instruction"):
        editor.edit(picture())
    assert editor.edit(picture(), instruction="").size == (70, 40)
    for what in (out, out / WEIGHTS):
        with pytest.raises(UserError, match="no prompt in common"):
            lookup.check_instruction(what)
    lookup.check_instruction(trained)


def test_a_prompt_for_pairs_without_one_is_no_default_beside_others(
    plan, tmp_path: Path, own_pairs: Path
) -> None:
    (own_pairs / "prompts" / "2.txt").unlink()
    mixed = plan(f"data.root={own_pairs}", "data.held_out=0", "data.prompt=turn it round")
    assert run.load(run.train_run(mixed, tmp_path / "run")).default_instruction is None


def test_the_geometry_of_training_is_applied_on_other_weights(
    trained: Path, tiny_fill: Path, tmp_path: Path
) -> None:
    model = tmp_path / "tiny-fill"
    shutil.copytree(tiny_fill, model)
    vae = json.loads((model / "vae" / "config.json").read_text())
    (model / "vae" / "config.json").write_text(json.dumps({**vae, "sample_size": 32}))
    editor = run.load(trained, weights=str(model), device="cpu")
    assert editor.method.size(70, 40) == (64, 32)
    assert editor.notes == ()
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config, indent=1))
    assert "differ" in run.load(trained, weights=str(model), device="cpu").notes[0]


def test_held_out_numbers() -> None:
    source, target = Image.new("RGB", (32, 32), "black"), Image.new("RGB", (32, 32), "white")
    perfect = run.measure(Example(source=source, target=target), target)
    assert (perfect["psnr"], perfect["ssim"]) == (100.0, pytest.approx(1.0))
    assert perfect["edit_gain"] == pytest.approx(1.0)
    assert run.measure(Example(source=source, target=target), source)["edit_gain"] == pytest.approx(0.0)
    assert run.measure(Example(source=source, target=source), source)["edit_gain"] == 0.0


@pytest.fixture(scope="module")
def packed_files(tiny_fill: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that take transformer and T5 from GGUF files."""
    folder = tmp_path_factory.mktemp("packed")
    transformer = packed.write_transformer(folder / "fill-Q8_0.gguf", tiny_fill)
    text = packed.write_text_encoder(folder / "t5-Q8_0.gguf", tiny_fill)
    return [f"backbone.transformer_file={transformer}", f"backbone.text_encoder_file={text}"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_weights_are_trained_on_and_edited_with(
    plan, packed_files: list[str], tmp_path: Path, precision: str
) -> None:
    chosen = plan(*packed_files, f"backbone.precision={precision}", "watch.every=1", "watch.count=1")
    out = run.train_run(chosen, tmp_path / "run")
    losses = [json.loads(line).get("loss") for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert None not in losses[1:] and losses[1] != losses[2]
    editor = run.load(out)
    assert editor.notes == ()
    result = editor.edit(picture(), instruction="x")
    assert result.size == (70, 40) and result != editor.edit(picture(), instruction="x", scale=0.0)
    readme = (out / "README.md").read_text()
    assert "weights `tiny-fill` with the transformer of `fill-Q8_0.gguf`" in readme
    assert str(tmp_path.parent) not in readme and b"/tmp" not in weights(out)


def test_an_adapter_says_which_packing_it_was_trained_on(
    plan, trained: Path, packed_files: list[str], tiny_fill: Path, tmp_path: Path
) -> None:
    """An adapter trained on whole weights also loads on packed ones, and the reverse, with a note that tells them apart."""
    transformer = packed_files[0]
    (note,) = run.load(trained, overrides=[transformer]).notes
    assert "trained on tiny-fill, whose weights differ from those of tiny-fill with fill-Q8_0.gguf" in note
    assert run.load(trained, overrides=packed_files[1:]).notes == ()
    out = run.train_run(plan(transformer), tmp_path / "run")
    file = out / "weights" / "pytorch_lora_weights.safetensors"
    (note,) = run.load(file, overrides=[f"backbone.weights={tiny_fill}", "backbone.device=cpu"]).notes
    assert "trained on tiny-fill with fill-Q8_0.gguf, whose weights differ from those of tiny-fill" in note


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_offloading_changes_no_training(plan, trained: Path, tmp_path: Path, cache: str) -> None:
    overrides = ["backbone.offload=model", "watch.every=1", "watch.count=1", "watch.steps=1"]
    out = run.train_run(plan(f"data.cache={cache}", *overrides), tmp_path / "run")
    reference = trained
    if cache == "off":
        reference = run.train_run(plan("data.cache=off"), tmp_path / "reference")
    assert weights(out) == weights(reference)


class Board:
    """Stands for a run of W&B."""

    def __init__(self, project: str, out: Path, config: dict):
        self.made = (project, out, config["seed"])
        self.steps: list[int] = []
        self.failed: bool | None = None
        Board.last = self

    def begin(self, report) -> None:
        assert report.step == 0

    def add(self, report, values, sheet) -> None:
        assert sheet is None or sheet.is_file()
        self.steps.append(report.step)

    def close(self, *, failed: bool) -> None:
        self.failed = failed


def test_a_run_is_reported_to_its_project(plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.tracking, "check", lambda: None)
    monkeypatch.setattr(run.tracking, "Board", Board)
    out = run.train_run(plan("watch.wandb=edits", "watch.every=1", "watch.steps=1"), tmp_path / "run")
    board = Board.last
    assert board.made == ("edits", out, 0)
    assert (board.steps, board.failed) == ([0, 1, 2], False)


def test_without_a_login_nothing_is_loaded_or_left(
    plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise UserError("watch.wandb: not logged in")

    def loaded(*arguments: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run.tracking, "check", refuse)
    monkeypatch.setattr("pentimento.flux.backbone.Flux.load", loaded)
    with pytest.raises(UserError, match="not logged in"):
        run.train_run(plan("watch.wandb=edits"), tmp_path / "run")
    with pytest.raises(UserError, match="not logged in"):
        preview.plan(plan("watch.wandb=edits"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_vanishes_hides_no_error(tmp_path):
    """What ended the run is told, not that its folder is gone."""
    out = tmp_path / "run"
    with pytest.raises(UserError, match="the reason"), runfolder.locked(out):
        shutil.rmtree(out)
        raise UserError("the reason")
