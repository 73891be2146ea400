"""A slider's effect read off drawn faces."""

import itertools

import pytest
import torch

from pentimento.images import from_tensor
from pentimento.pocket import faces, readout
from pentimento.pocket import scene as world
from pentimento.pocket.render import render
from pentimento.pocket.tasks import cases


def drawn(scene: world.Scene):
    return from_tensor(render([scene], 64, 64) * 2 - 1)[0]


def exemplars(task: str, count: int = 3):
    return list(itertools.islice(cases(task, "train"), count))


def a_face(**changes) -> faces.Face:
    case = next(c for c in cases("smile", "test") if not c.source["beard"] and not c.source["hat"])
    scene = case.source | changes
    return faces.Face(prompt="", seed=0, scene=scene, explained=40.0)


def test_pairs_say_what_they_change() -> None:
    smile = faces.change_of(exemplars("smile"))
    assert smile is not None and smile.continuous
    assert (smile.attribute, smile.after) == ("smile", pytest.approx(0.9)) and -0.9 < smile.before < -0.3
    glasses = faces.change_of(exemplars("add-glasses"))
    assert glasses is not None and (glasses.attribute, glasses.before, glasses.after) == ("glasses", 0, 1)
    hats = faces.change_of(exemplars("add-hat"))
    assert hats is not None and hats.attribute == "hat", "the colours of the hats may differ"
    colours = exemplars("recolour-hair", 6)
    assert len({c.wanted["hair"] for c in colours}) > 1 and faces.change_of(colours) is None
    assert faces.change_of(exemplars("recolour-hair", 1)) is not None
    assert faces.change_of([*exemplars("smile"), *exemplars("add-glasses")]) is None
    assert faces.change_of([]) is None


def test_captions_say_nothing_of_the_change() -> None:
    for task, silent in {
        "smile": ("smiling", "frowning", "calm"),
        "age": ("young", "old", "middle-aged"),
        "hair-length": ("short", "long"),
    }.items():
        for prompt, _ in itertools.islice(faces.prompts(task, "test"), 40):
            assert not set(silent) & set(prompt.replace(",", "").split()), prompt
            assert "a portrait of" in prompt and " a a" not in prompt and " an s" not in prompt
    colours = [case for case, _ in zip(cases("recolour-hair", "test", phrasing=0), range(20), strict=False)]
    for case in colours:
        assert f"{world.COLOUR_NAMES[case.source['hair']]} hair" not in faces.unsaid(case)
        assert "hair" in faces.unsaid(case)


def test_only_faces_that_can_show_the_change_are_taken() -> None:
    smile = faces.change_of(exemplars("smile"))
    hair = faces.change_of(exemplars("hair-length"))
    assert smile is not None and hair is not None
    assert smile.fits(a_face(smile=-0.6).scene) and not smile.fits(a_face(smile=0.7).scene)
    assert not smile.fits(a_face(smile=-0.6, beard=1).scene)
    assert all("beard" not in prompt for prompt, _ in itertools.islice(faces.prompts("smile", "dev"), 20))
    assert any("beard" in prompt for prompt, _ in itertools.islice(faces.prompts("age", "dev"), 20))
    bald = world.HAIR_STYLES.index("bald")
    assert hair.fits(a_face(hair_style=0, hair_length=0.1).scene)
    assert not hair.fits(a_face(hair_style=bald, hair_length=0.1).scene)


def test_a_smile_is_measured_and_the_rest_is_seen_to_stay() -> None:
    change = faces.change_of(exemplars("smile"))
    face = a_face(smile=-0.6)
    assert change is not None
    half = faces.look(drawn(face.scene | {"smile": 0.15}), face, change)
    assert half.response == pytest.approx(0.5, abs=0.05)
    assert half.intact and half.kept == 1 and half.interference < 0.02
    other = world.COLOUR_NAMES.index("red" if face.scene["shirt"] else "teal")
    spoilt = faces.look(drawn(face.scene | {"smile": 0.9, "shirt": other}), face, change)
    assert spoilt.response == pytest.approx(1, abs=0.05) and spoilt.kept < 1 and spoilt.interference > 0.05


def test_another_face_is_not_the_same_one() -> None:
    change = faces.change_of(exemplars("add-glasses"))
    face = a_face(glasses=0)
    assert change is not None
    on = faces.look(drawn(face.scene | {"glasses": 1}), face, change)
    assert on.response == 1 and on.intact
    moved = faces.look(drawn(face.scene | {"dx": -face.scene["dx"] + 0.1, "scale": 0.88}), face, change)
    assert not moved.intact


def test_faces_that_are_read_together_are_read_as_alone() -> None:
    change = faces.change_of(exemplars("smile"))
    assert change is not None
    some = [a_face(smile=-0.6), a_face(smile=-0.5, glasses=1), a_face(smile=-0.4, hat=1)]
    pictures = [
        drawn(face.scene | {"smile": smile}) for face, smile in zip(some, (0.9, 0.15, -0.4), strict=True)
    ]
    alone = [faces.look(picture, face, change) for picture, face in zip(pictures, some, strict=True)]
    assert len({look.response for look in alone}) == 3
    assert faces.looks(pictures, some, change, torch.device("cpu")) == alone


def test_how_an_edit_is_drawn_does_not_make_it_another_face() -> None:
    change = faces.change_of(exemplars("add-hat"))
    assert change is not None
    face = a_face(hat=0, glasses=0)
    wanted = face.scene | change.wanted
    region = readout.edited_region(*render([face.scene, wanted]))
    assert 0.05 < region.float().mean() < 0.5
    seen = render([wanted])[0]
    noise = 0.25 * torch.rand(seen.shape, generator=torch.Generator().manual_seed(0))
    inside, outside = (
        faces.look(
            from_tensor(torch.where(where, seen + noise, seen).clamp(0, 1)[None] * 2 - 1)[0], face, change
        )
        for where in (region, ~region)
    )
    assert inside.response == 1 and inside.intact
    assert not outside.intact
    assert not change.fits(face.scene | change.wanted) and change.fits(face.scene)


def test_hair_is_looked_for_on_heads_without_hats() -> None:
    hair = faces.change_of(exemplars("recolour-hair", 1))
    assert hair is not None
    other = next(c for c in range(len(world.COLOURS)) if c != hair.after)
    plain = {"hair": other, "hair_style": 0, "beard": 0}
    assert hair.fits(a_face(**plain, hat=0).scene) and not hair.fits(a_face(**plain, hat=1).scene)
