"""Scenes read off pictures of which nothing is known, and instructions read backwards."""

import itertools

import pytest
import torch
from PIL import Image

from pentimento import images
from pentimento.judges import Verdict
from pentimento.judges.exact import Exact
from pentimento.pocket import captions, instructions, readout, render, scene, tasks
from pentimento.pocket.recognise import recognise


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def picture(of: scene.Scene, width: int = 64, height: int = 64) -> Image.Image:
    return images.from_tensor(render.render([of], width, height) * 2 - 1)[0]


def objects(of: scene.Scene) -> set[tuple[str, int]]:
    return {(captions.thing(of, k), of[f"cell{k}"]) for k in captions.present(of)}


def flat(seed: int, kind: str) -> scene.Scene:
    return scene.draw(seed, kind) | {"style": 0}


@pytest.mark.parametrize(("seed", "size"), [(34, (64, 64)), (81, (64, 48)), slow(5, (128, 128))])
def test_objects_are_read_with_their_places(seed: int, size: tuple[int, int]) -> None:
    drawn = flat(seed, "shapes")
    sight = recognise(render.render([drawn], *size)[0])
    assert sight is not None
    assert sight.explained > 30
    assert objects(sight.scene) == objects(drawn)
    assert all(sight.scene[name] == drawn[name] for name in ("bg", "texture"))


@pytest.mark.parametrize(("seed", "size"), [(51, (64, 64)), slow(7, (128, 128)), slow(52, (48, 64))])
def test_portraits_are_read_with_face_wear_and_pose(seed: int, size: tuple[int, int]) -> None:
    drawn = flat(seed, "portrait")
    sight = recognise(render.render([drawn], *size)[0])
    assert sight is not None
    assert sight.explained > 30
    for name in scene.PORTRAIT_CHOICES:
        if readout.visible(drawn, name):
            assert sight.scene[name] == drawn[name], name
    for name, (low, high) in scene.PORTRAIT_RANGES.items():
        if readout.visible(drawn, name) and not (name == "hair_length" and drawn["hat"]):
            assert abs(sight.scene[name] - drawn[name]) < 0.15 * (high - low), name


def test_a_blurred_picture_is_read_too() -> None:
    drawn = flat(51, "portrait")
    blurred = (
        picture(drawn).resize((48, 48), Image.Resampling.BILINEAR).resize((64, 64), Image.Resampling.BICUBIC)
    )
    sight = recognise(images.to_unit([blurred])[0])
    assert sight is not None
    assert all(
        sight.scene[name] == drawn[name] for name in ("hair_style", "glasses", "hat", "beard", "shirt", "bg")
    )


def test_what_is_no_drawn_scene_is_not_read() -> None:
    noise = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (
        recognise(torch.nn.functional.interpolate(noise[None], (64, 64), mode="bicubic")[0].clamp(0, 1))
        is None
    )


def test_an_empty_background_is_a_scene() -> None:
    empty = flat(3, "shapes") | {f"present{k}": 0 for k in range(scene.SLOTS)}
    sight = recognise(render.render([empty], 64, 64)[0])
    assert sight is not None
    assert captions.present(sight.scene) == []


@pytest.mark.parametrize("task", [name for name in tasks.TASKS if name not in ("fill-circles", "count")])
def test_every_instruction_is_understood_as_it_was_meant(task: str) -> None:
    cases = [c for c in itertools.islice(tasks.cases(task, "test"), 60) if c.source["kind"] != "disc"]
    assert len({c.instruction for c in cases}) >= 4
    for case in cases:
        (goal,) = instructions.goals(case.instruction, case.source)
        assert goal.wanted == case.wanted
        assert all(goal.target[name] == value for name, value in case.target.items() if name not in goal.free)
        assert instructions.is_identity(case.instruction) == (task == "identity")


def test_where_words_leave_the_place_open_every_place_is_meant() -> None:
    """`two more red stars`: the task drew them somewhere, but anywhere is right."""
    for case in itertools.islice(tasks.cases("count", "test"), 60):
        goals = instructions.goals(case.instruction, case.source)
        assert any(objects(goal.target) == objects(case.target) for goal in goals)
        assert len(goals) == (
            1 if " to the " in case.instruction else len({frozenset(objects(g.target)) for g in goals})
        )


def test_phrasings_are_taken_with_other_spaces_capitals_and_a_full_stop() -> None:
    person = flat(7, "portrait") | {"glasses": 0}
    assert instructions.goals(" Add  glasses.", person) == instructions.goals("add glasses", person) != []


@pytest.mark.parametrize(
    "words",
    ["make her happy", "add a purple dog at the top", "remove the nose", "make the hair plaid", "", "add"],
)
def test_other_words_mean_nothing(words: str) -> None:
    assert instructions.goals(words, flat(7, "portrait")) == []
    assert instructions.goals(words, flat(5, "shapes")) == []


def judged(case: tasks.Case, first: scene.Scene, second: scene.Scene) -> Verdict:
    return Exact().compare(picture(case.source), picture(first), picture(second), case.instruction)


@pytest.mark.parametrize("task", ["recolour-hair", "add"])
def test_the_exact_judge_prefers_the_truth_to_doing_nothing(task: str) -> None:
    case = next(tasks.cases(task, "test"))
    judge = Exact()
    source, truth = picture(case.source), picture(case.target)
    blurred = truth.resize((48, 48), Image.Resampling.BILINEAR).resize((64, 64), Image.Resampling.BICUBIC)
    assert judge.compare(source, source, blurred, case.instruction).choice == 2
    assert judge.compare(source, blurred, source, case.instruction).choice == 1
    assert judge.compare(source, blurred, truth, case.instruction).choice == 2


@pytest.mark.slow
def test_the_exact_judge_prefers_what_keeps_the_rest() -> None:
    case = next(c for c in tasks.cases("recolour-hair", "test") if not c.target["glasses"])
    spoilt = case.target | {"glasses": 1, "shirt": (case.target["shirt"] + 5) % 12}
    verdict = judged(case, spoilt, case.target)
    assert verdict.choice == 2
    assert verdict.reason.startswith("1: done, ")


def test_the_exact_judge_takes_any_place_for_an_object_that_was_to_be_added_anywhere() -> None:
    case = next(c for c in tasks.cases("count", "test") if c.instruction.startswith("add one more"))
    k = max(captions.present(case.target))
    taken = {case.target[f"cell{j}"] for j in captions.present(case.target)}
    elsewhere = case.target | {f"cell{k}": next(cell for cell in range(9) if cell not in taken)}
    assert judged(case, case.source, elsewhere).choice == 2


def test_the_exact_judge_keeps_the_first_of_equals_and_reads_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pentimento.judges import exact

    case = next(tasks.cases("recolour-hair", "test"))
    source, truth = picture(case.source), picture(case.target)
    judge = Exact()
    assert judge.compare(source, truth, truth, case.instruction).choice == 1
    monkeypatch.setattr(exact, "recognise", None)
    monkeypatch.setattr(exact, "_measure", None)
    assert judge.compare(source, truth, truth, case.instruction).choice == 1


def test_the_exact_judge_says_what_it_cannot_judge() -> None:
    case = next(tasks.cases("recolour-hair", "test"))
    source = picture(case.source)
    verdict = Exact().compare(source, source, source, "make it nicer")
    assert verdict.choice is None
    assert "'make it nicer' asks nothing" in verdict.reason
    photo = Image.effect_noise((32, 32), 80).convert("RGB")
    unknown = Exact().compare(photo, photo, photo, "add glasses")
    assert unknown.choice is None
    assert "cannot be read" in unknown.reason
    assert Exact().compare(photo, source, photo, "change nothing").choice == 2
