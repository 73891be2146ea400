"""Exact resume, whatever ends a run and whenever."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import toy

from pentimento import checkpoint, files, stored
from pentimento.errors import UserError
from pentimento.train import Stage

EVERYTHING = {
    "steps": 24,
    "save_every": 5,
    "schedule": "cosine",
    "warmup": 3,
    "accumulate": 2,
    "samples": {"caption_dropout": 0.5},
}
PRODIGY = {**EVERYTHING, "optimizer": "prodigy", "lr": 1.0, "prodigy_d0": 1e-3}


def steps(out: Path) -> list[int]:
    return [saved.step for saved in checkpoint.saved_steps(out)]


@pytest.fixture(scope="module")
def killed() -> Callable[..., None]:
    """``killed(folder, death, at, settings)``: a process of its own trains and dies of SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy"])  # imported once, found by the path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([toy.environment()["PYTHONPATH"], str(Path(toy.__file__).parent)])
        )
        forkserver.ensure_running()

    def run(folder: Path, death: str, at: int, settings: dict) -> None:
        process = context.Process(target=toy.doomed, args=(folder, "run", death, at, settings))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL

    return run


@pytest.mark.parametrize("settings", [EVERYTHING, PRODIGY], ids=["adamw", "prodigy"])
def test_resumed_is_uninterrupted(tmp_path, settings):
    """With a schedule, accumulation, caption dropout, and a method that draws global random numbers."""
    whole = toy.run(tmp_path, "whole", toy=noisy(), **settings)
    for stop in (7, 8, 19):
        with pytest.raises(KeyboardInterrupt):
            toy.run(tmp_path, toy=noisy(), watch=interrupt_at(stop), **settings)
    resumed = toy.run(tmp_path, toy=noisy(), **settings)
    assert toy.difference(whole, resumed) == 0
    for name in ("content", "semantic"):
        weights = Path("weights") / name / "pytorch_lora_weights.safetensors"
        assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def noisy() -> toy.Toy:
    return toy.Toy(toy.Toy.Config(global_noise=True, full=("embedder",)))


def interrupt_at(step: int) -> Callable[..., None]:
    return lambda report: signal.raise_signal(signal.SIGINT) if report.step == step else None


def test_more_steps_continue_a_finished_run(tmp_path):
    whole = toy.run(tmp_path, "whole", steps=9)
    toy.run(tmp_path, steps=4)
    assert toy.difference(toy.run(tmp_path, steps=9), whole) == 0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_more_steps_follow_the_longer_course_of_the_rate(tmp_path, schedule):
    """A shorter course had ended at 0: the first step of the continuation must not be made at that."""
    whole, continued = toy.Note(), toy.Note()
    settings = {"schedule": schedule, "warmup": 2}
    toy.run(tmp_path, "whole", watch=whole, steps=9, **settings)
    toy.run(tmp_path, steps=4, **settings)
    toy.run(tmp_path, steps=9, watch=continued, **settings)
    rates = [[report.lr for report in note.reports if report.losses] for note in (whole, continued)]
    assert rates[1] == rates[0][4:] and rates[1][0] > 0


def test_weights_are_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """A file of the new weights fails: the old ones stay, all of them, and no rubbish."""
    toy.run(tmp_path, toy=noisy(), steps=2)
    weights = tmp_path / "run" / "weights"
    before = {path: path.read_bytes() for path in weights.rglob("*.safetensors")}
    assert len(before) == 3
    write = files.write

    def full(path, data, *, durable=True):
        if "weights" in path.parent.parent.name and path.name.startswith("flux_"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data, durable=durable)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="weights: cannot be written"):
        patch.setattr(files, "write", full)
        toy.run(tmp_path, toy=noisy(), steps=4)
    assert {path: path.read_bytes() for path in weights.rglob("*.safetensors")} == before
    toy.run(tmp_path, toy=noisy(), steps=4)
    assert {path: path.read_bytes() for path in weights.rglob("*.safetensors")}.keys() == before.keys()
    assert sorted(path.name for path in weights.parent.iterdir()) == ["checkpoints", "weights"]
    file = weights / "content" / "pytorch_lora_weights.safetensors"
    record = json.loads(stored.read_metadata(file)["pentimento"])
    assert (record["stage"], record["step"]) == ("pair", 4)


def test_nothing_is_done_twice(tmp_path):
    first = toy.run(tmp_path)
    note, method = toy.Note(), toy.Toy()
    assert toy.difference(toy.run(tmp_path, toy=method, watch=note), first) == 0
    assert not note.reports and not method.calls["losses"]


def test_resume_in_the_second_stage(tmp_path):
    stages = {
        name: Stage(train=(trained,), steps=4, lr=1e-2, save_every=2)
        for name, trained in (("first", "content"), ("second", "semantic"))
    }
    whole = toy.run(tmp_path, "whole", stages=stages)

    def interrupt(report):
        if (report.stage, report.step) == ("second", 3):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, stages=stages, watch=interrupt)
    assert [(s.stage, s.step) for s in checkpoint.saved_steps(tmp_path / "run")][-1] == ("second", 3)
    assert toy.difference(toy.run(tmp_path, stages=stages), whole) == 0
    longer = {**stages, "first": Stage(train=("content",), steps=6)}
    with pytest.raises(UserError, match=r"stages\.first\.steps.*second has begun"):
        toy.run(tmp_path, stages=longer)


def test_sigkill_at_ten_steps(tmp_path, killed):
    """At most ``save_every`` steps are lost, and the resumed run is the uninterrupted one."""
    whole = toy.run(tmp_path, "whole", **EVERYTHING)
    for number, step in enumerate(random.Random(0).sample(range(1, 25), 10)):
        folder = tmp_path / str(number)
        killed(folder, "step", step, EVERYTHING)
        note = toy.Note()
        assert toy.difference(toy.run(folder, watch=note, **EVERYTHING), whole) == 0
        begun = note.reports[0].step
        assert 0 < step - begun <= EVERYTHING["save_every"]


@pytest.mark.parametrize(
    ("death", "at"),
    [("write", 9), ("write", 6), ("write", 8), ("rename", 3), ("rename", 4), ("delete", 1), ("delete", 2)],
)
def test_sigkill_inside_a_save(tmp_path, killed, death, at):
    """While a file is written, before and after the rename, and while an old checkpoint is deleted."""
    settings = {"steps": 8, "save_every": 2, "keep_last": 1}
    whole = toy.run(tmp_path, "whole", **settings)
    killed(tmp_path, death, at, settings)
    rubbish = list((tmp_path / "run" / "checkpoints").glob(f"*{files.PARTIAL}"))
    assert bool(rubbish) == ((death, at) != ("rename", 4)), "after the rename all is complete"
    for saved in checkpoint.saved_steps(tmp_path / "run"):
        checkpoint.load(saved, toy.Toy().adapters)
    assert toy.difference(toy.run(tmp_path, **settings), whole) == 0
    assert not list((tmp_path / "run" / "checkpoints").glob(f"*{files.PARTIAL}"))


def test_what_is_kept(tmp_path):
    toy.run(tmp_path, steps=11, save_every=3, keep_last=2, keep_steps=(2, 3))
    assert steps(tmp_path / "run") == [2, 3, 9, 11]
    assert (tmp_path / "run/checkpoints/pair-000009").is_dir()


def test_weights_of_a_step_load_alone(tmp_path):
    toy.run(tmp_path, toy=noisy(), save_every=4, steps=6)
    saved = checkpoint.at(tmp_path / "run", 4)
    loaded, restored = noisy(), noisy()
    loaded.adapters.load(saved.folder)
    checkpoint.load(saved, restored.adapters)
    assert toy.difference(toy.weights(loaded), toy.weights(restored)) == 0
    assert (saved.folder / "semantic" / "flux_embedder.safetensors").is_file()


def test_an_absent_step_lists_the_saved_ones(tmp_path):
    with pytest.raises(UserError, match="no step was saved yet"):
        checkpoint.at(tmp_path, 3)
    toy.run(tmp_path, steps=5, save_every=2, keep_last=9)
    with pytest.raises(UserError, match="step 3 was not saved; saved steps: 2, 4, 5"):
        checkpoint.at(tmp_path / "run", 3)


def test_a_step_that_two_stages_have(tmp_path):
    stages = {name: Stage(train=("content",), steps=2) for name in ("z", "a")}
    toy.run(tmp_path, stages=stages)
    assert checkpoint.at(tmp_path / "run", 2).stage == "a"
    with pytest.raises(UserError, match=r"2 \(z\), 2 \(a\)"):
        checkpoint.at(tmp_path / "run", 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("at", [4, 5, 6])
def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch, number, at):
    whole = toy.run(tmp_path, "whole")
    write, count = files.write, 0

    def full(path, data, *, durable=True):
        nonlocal count
        count += path.suffix in (".pt", ".safetensors", ".json")
        if count > at:
            path.with_name("half").write_bytes(data[:10])
            raise OSError(number, "No space left on device")
        write(path, data, durable=durable)

    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(files, "write", full)
        toy.run(tmp_path, save_every=2)
    assert "step 4 cannot be saved (No space left on device)" in str(caught.value)
    assert "step 2 is saved and intact" in str(caught.value) and "--resume" in str(caught.value)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["pair-000002"]
    assert toy.difference(toy.run(tmp_path, save_every=2), whole) == 0


def test_a_folder_that_cannot_be_written_is_known_before_the_first_step(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file")
    method = toy.Toy()
    with pytest.raises(UserError, match=r"checkpoints: cannot be written .*--out"):
        toy.run(tmp_path, toy=method)
    assert not method.calls["losses"]


@pytest.mark.parametrize("damage", ["state", "cut", "bit", "json"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    toy.run(tmp_path, steps=2)
    folder = checkpoint.at(tmp_path / "run", 2).folder
    file = folder / ("checkpoint.json" if damage == "json" else checkpoint.STATE)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= damage == "bit"
    file.write_bytes({"cut": data[:-500], "bit": data}.get(damage, b"rubbish"))
    with pytest.raises(UserError, match=f"damaged.*delete {folder}"):
        toy.run(tmp_path, steps=4)


def test_a_checkpoint_of_other_adapters(tmp_path):
    toy.run(tmp_path, steps=2)
    with pytest.raises(UserError, match="of other adapters"):
        toy.run(tmp_path, toy=noisy(), steps=4)


def test_another_number_of_samples_per_step(tmp_path):
    toy.run(tmp_path, steps=2)
    with pytest.raises(UserError, match=r"a step had 2 samples .* now it has 4; .*processes"):
        toy.run(tmp_path, steps=4, accumulate=2)


def test_strange_folders_are_passed_over(tmp_path):
    toy.run(tmp_path, steps=2)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "pair-000009").mkdir()  # no record of its own: not ours, or emptied by hand
    (folder / "notes").mkdir()
    assert steps(tmp_path / "run") == [2]


def test_the_record_says_what_it_is(tmp_path):
    toy.run(tmp_path, steps=2)
    folder = checkpoint.at(tmp_path / "run", 2).folder
    about = json.loads((folder / "checkpoint.json").read_text())
    assert about.pop("sha256") == hashlib.sha256((folder / checkpoint.STATE).read_bytes()).hexdigest()
    assert about == {"stage": "pair", "step": 2, "index": 0, "samples": 2}
    state = torch.load(folder / checkpoint.STATE, weights_only=True)
    assert {"optimizer", "schedule", "adapters", "samples"} <= state.keys()
