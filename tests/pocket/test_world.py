"""The drawn world: scenes and splits, the renderer, captions, tasks, data sets on disk."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pentimento.errors import UserError
from pentimento.pocket import captions, dataset, readout, render, scene, tasks


def test_a_scene_is_a_function_of_its_seed():
    assert scene.draw(12) == scene.draw(12)
    assert scene.draw(12) != scene.draw(13)
    assert json.loads(json.dumps(scene.draw(12))) == scene.draw(12)


def test_splits_have_their_shares_and_never_change():
    counts = {name: 0 for name in ("train", "dev", "test", "hidden")}
    for seed in range(4000):
        counts[scene.split_of(seed)] += 1
    shares = {name: n / 4000 for name, n in counts.items()}
    assert shares == pytest.approx({"train": 0.80, "dev": 0.05, "test": 0.07, "hidden": 0.08}, abs=0.02)
    assert [scene.split_of(s) for s in (5, 17, 29, 40)] == ["train", "train", "train", "train"]


def test_training_never_sees_a_held_out_combination():
    drawn = [scene.draw(s) for s in itertools.islice(scene.seeds("train"), 1500)]
    assert not any(map(scene.held_out, drawn))
    tested = [scene.draw(s) for s in itertools.islice(scene.seeds("test"), 1500)]
    assert any(map(scene.held_out, tested))
    for task in ("recolour", "recolour-hair", "background", "add", "replace"):
        for case in itertools.islice(tasks.cases(task, "train"), 60):
            assert not scene.held_out(case.source)
            assert not scene.held_out(case.target)


def test_no_two_scenes_are_equal():
    keys = {json.dumps(scene.draw(s), sort_keys=True) for s in range(600)}
    assert len(keys) == 600


def test_named_colours_are_far_apart():
    from pentimento.metrics.colour import lab

    rgb = torch.tensor(list(scene.COLOURS.values())).T.view(3, 1, -1) / 255
    values = lab(rgb)[:, 0].T
    distance = torch.cdist(values, values) + 1e3 * torch.eye(len(values))
    assert distance.min() >= 25


def test_rendering_is_the_same_alone_in_a_batch_and_again():
    scenes = [scene.draw(s) for s in range(24)] + [scene.draw(3, "portrait") | {"style": k} for k in range(5)]
    together = render.render(scenes, 64, 64)
    assert torch.equal(together, render.render(scenes, 64, 64))
    alone = torch.cat([render.render([s], 64, 64) for s in scenes])
    assert (together - alone).abs().max() <= 1 / 255 + 1e-6


def test_render_matches_recorded_pictures():
    recorded = Image.open(Path(__file__).parents[1] / "golden" / "pocket" / "world.png")
    scenes = [scene.draw(s) for s in range(8)] + [
        scene.draw(9, "portrait") | {"style": k} for k in range(1, 5)
    ]
    expected = (
        torch.frombuffer(bytearray(recorded.tobytes()), dtype=torch.uint8).view(64, -1, 3).permute(2, 0, 1)
        / 255
    )
    made = torch.cat(list(render.render(scenes, 64, 64)), dim=2)
    # Another machine's arithmetic may round a pixel differently, never shift a line.
    assert (made - expected).abs().mean() < 1 / 255


def test_a_wide_picture_shows_the_same_scene_with_more_background():
    one = scene.draw(9, "portrait") | {"texture": 0, "style": 0}
    square, wide = render.render([one], 64, 64)[0], render.render([one], 96, 64)[0]
    assert (wide[:, :, 16:80] - square).abs().max() < 0.02


def test_the_plain_captions_of_the_grammar():
    shapes = scene.draw(0, "shapes") | {f"present{k}": int(k == 0) for k in range(scene.SLOTS)}
    shapes |= {
        "shape0": 0,
        "colour0": 0,
        "fill0": 0,
        "bg": scene.COLOUR_NAMES.index("white"),
        "texture": 0,
        "style": 0,
    }
    assert captions.caption(shapes) == "a red circle on a white background"
    person = scene.draw(0, "portrait") | {
        "age": 0.1,
        "smile": 0.8,
        "hair_style": 0,
        "hair_length": 0.1,
        "glasses": 0,
        "hat": 0,
        "beard": 0,
    }
    names = scene.COLOUR_NAMES.index
    person |= {
        "earring": 0,
        "hair": names("brown"),
        "shirt": names("blue"),
        "bg": names("green"),
        "texture": 0,
        "style": 0,
    }
    expected = (
        "a portrait of a young smiling person with short brown hair and a blue shirt on a green background"
    )
    assert captions.caption(person) == expected
    disc = scene.draw(0, "disc") | {
        "disc": scene.CSS_NAMES.index("pale golden rod"),
        "ground": scene.CSS_NAMES.index("old lace"),
    }
    assert captions.caption(disc) == "pale golden rod circle with old lace background"


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_changes_what_it_says_and_nothing_else(task):
    for case in itertools.islice(tasks.cases(task, "test"), 6):
        changed = {name for name in case.target if case.target[name] != case.source.get(name)}
        assert changed <= set(case.wanted)
        assert all(case.target[name] == value for name, value in case.wanted.items())
        assert case.instruction
        assert scene.split_of(case.seed) == "test"
        before, after = render.render([case.source, case.target], 64, 64)
        assert (task == "identity") == torch.equal(before, after)


def test_one_phrasing_is_kept_for_testing():
    train = {case.instruction for case in itertools.islice(tasks.cases("add-glasses", "train"), 80)}
    test = {case.instruction for case in itertools.islice(tasks.cases("add-glasses", "test"), 80)}
    assert train == {"add glasses", "put glasses on the person", "make the person wear glasses"}
    assert test - train == {"give the person a pair of glasses"}


@pytest.mark.parametrize(
    "task", ["add-glasses", "recolour-hair", "smile", "remove", "replace", "background", "count", "style"]
)
def test_the_read_out_accepts_the_truth_and_rejects_the_source(task):
    for case in itertools.islice(tasks.cases(task, "test"), 2):
        source, target = render.render([case.source, case.target])
        right = readout.judge(target, case.source, case.target, case.wanted)
        wrong = readout.judge(source, case.source, case.target, case.wanted)
        assert right.success
        assert right.kept == 1
        assert not wrong.success


def test_the_read_out_survives_blur_but_not_another_face():
    case = next(tasks.cases("smile", "test"))
    target = render.render([case.target])
    blurred = torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(target, 2), scale_factor=2, mode="bicubic"
    )[0].clamp(0, 1)
    assert readout.judge(blurred, case.source, case.target, case.wanted).success
    other = render.render([scene.draw(77, "portrait") | {"smile": 0.9}])[0]
    assert not readout.judge(other, case.source, case.target, case.wanted).valid


def test_an_untouched_background_is_capped_and_a_changed_one_costs():
    case = next(tasks.cases("add-glasses", "test"))
    target = render.render([case.target])[0]
    assert readout.judge(target, case.source, case.target, case.wanted).background == 60
    noisy = (target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert readout.judge(noisy, case.source, case.target, case.wanted).background < 25


def test_a_filled_circle_is_judged_by_colour_and_place():
    case = next(tasks.cases("fill-circles", "test"))
    outline, filled = render.render([case.source, case.target])
    right = readout.judge_disc(filled, case.target)
    assert right.success
    assert right.iou > 0.95
    assert not readout.judge_disc(outline, case.target).success
    moved = render.render([case.target | {"cx": case.target["cx"] - 0.15}])[0]
    assert readout.judge_disc(moved, case.target).iou < 0.9


def test_a_data_set_on_disk_is_complete_and_repeatable(tmp_path):
    chosen = dataset.write("recolour", 5, split="dev", seed=2, size=64, out=tmp_path / "a")
    dataset.write("recolour", 5, split="dev", seed=2, size=64, out=tmp_path / "b")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 16
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert dataset.read(tmp_path / "a") == chosen
    assert Image.open(tmp_path / "a" / "source" / f"{chosen[0].key}.png").size == (64, 64)


def test_several_tasks_take_turns(tmp_path: Path) -> None:
    chosen = dataset.write("add, remove,background", 7, size=32, out=tmp_path / "mixed")
    assert [c.task for c in chosen] == ["add", "remove", "background"] * 2 + ["add"]
    assert len({c.key for c in chosen}) == 7 and all(c.key.startswith(c.task) for c in chosen)
    alone = list(itertools.islice(tasks.cases("remove"), 2))
    assert [c.instruction for c in chosen if c.task == "remove"] == [c.instruction for c in alone]
    with pytest.raises(UserError, match="named twice"):
        dataset.write("add,add", 2, out=tmp_path / "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "ad-glasses"}, "the tasks are"),
        ({"split": "training"}, "the splits are"),
        ({"count": 0}, "count must be"),
        ({"size": 100}, "multiple of 16"),
        ({"size": 16}, "multiple of 16 between"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    given = {"task": "add", "count": 2, "split": "train", "size": 64} | arguments
    with pytest.raises(UserError, match=message):
        dataset.write(given.pop("task"), given.pop("count"), out=tmp_path / "x", **given)


def test_a_used_folder_and_a_foreign_folder_are_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        dataset.write("add", 2, out=tmp_path)
    with pytest.raises(UserError, match="lacks scenes.jsonl"):
        dataset.read(tmp_path)
    (tmp_path / "scenes.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1"):
        dataset.read(tmp_path)
