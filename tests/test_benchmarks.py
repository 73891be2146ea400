"""What benchmarks reuse and compare with."""

import argparse
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from benchmarks import inversions, photographs, quality, slider_composition, slider_photos, sliders, true_size
from pentimento import images, recipe
from pentimento.flux.backbone import Flux
from pentimento.infinity import regions
from pentimento.methods.influxedit import InFluxEdit
from pentimento.pocket import readout, score
from pentimento.pocket.faces import Face
from pentimento.pocket.tasks import Case, cases


def test_drawn_pairs_are_reused_for_the_same_settings_only() -> None:
    folders = {
        quality.pairs_folder(task, argparse.Namespace(out=Path("out"), pairs=pairs, captions=captions))
        for task in ("add-hat", "remove")
        for pairs in (64, 8)
        for captions in (False, True)
    }
    assert len(folders) == 8


def test_photographs_are_measured_beside_doing_nothing_and_the_autoencoder(fill: Flux, picture) -> None:
    sources = [picture(seed, 70, 45) for seed in (0, 1)]
    pairs = [(source, photographs.duotone(source)) for source in sources]
    editors = {
        "perfect": lambda image, words: photographs.duotone(image),
        "inverted": lambda image, words: ImageOps.invert(image),
        "nothing_done": lambda image, words: image,
        "encode_and_decode": photographs.round_trip(InFluxEdit(fill, InFluxEdit.Config()), fill),
    }
    gains, made = photographs.measure(pairs, editors)
    assert gains["perfect"] == pytest.approx([1, 1])
    assert gains["nothing_done"] == pytest.approx([0, 0], abs=1e-6)
    assert gains.keys() == made.keys() == editors.keys()
    assert all(
        isinstance(result, Image.Image) and result.size == (70, 45) for result in made["encode_and_decode"]
    )
    assert all(gain != 0 for gain in gains["encode_and_decode"])


def looks(*responses: float) -> list[dict[str, float]]:
    """What is read of one face at each scale."""
    return [{"response": r, "interference": abs(r) / 10, "kept": 1.0, "intact": 1.0} for r in responses]


def test_sliders_are_scored_face_by_face() -> None:
    even = [scale * 0.9 for scale in sliders.SCALES]
    stuck = [0.0] * len(sliders.SCALES)
    gradual = {"continuous": True, "looks": [looks(*even), looks(*stuck)]}
    found = sliders.scores(gradual)
    assert found["Spearman"] == pytest.approx([1, 0]) and found["reached"] == pytest.approx([0.9, 0])
    assert found["linearity"] == pytest.approx([1, 0]) and found["symmetry"][0] == pytest.approx(1)
    assert found["interference"] == pytest.approx([0.09, 0])
    on = [float(scale > 0.6) for scale in sliders.SCALES]
    flickering = [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    switching = sliders.scores({"continuous": False, "looks": [looks(*on), looks(*flickering)]})
    assert (switching["on at 1"], switching["off at 0"]) == ([1, 0], [1, 1])
    assert (switching["switches"], switching["switches once"]) == ([1, 5], [1, 0])
    named = {"method": "pairedit", "pairs": 3, "task": "smile"}
    report = sliders.table([gradual | named])
    assert (
        report["smile"]["pairedit, 3 pairs"]["reached"][0]
        == 0.45
        == report["all continuous"]["pairedit, 3 pairs"]["reached"][0]
    )


def test_exemplars_of_a_cell_show_one_change() -> None:
    args = argparse.Namespace(
        methods=["pairedit"], tasks=["smile", "recolour-hair", "add-hat"], pairs=[3, 1], draws=2
    )
    cells = sliders.cells(args)
    assert [(c.task, c.pairs) for c in cells[::2]] == [
        ("smile", 3), ("recolour-hair", 3), ("recolour-hair", 1), ("add-hat", 3), ("add-hat", 1),
    ]  # fmt: skip
    assert len({c.name for c in cells}) == 10
    for cell in cells:
        exemplars = cell.exemplars()
        assert len(exemplars) == cell.pairs and sliders.change_of(exemplars)
        assert cell.task == "smile" or len({str(case.wanted) for case in exemplars}) == 1
    assert cells[0].exemplars() != cells[1].exemplars()


@pytest.fixture(scope="module")
def random_infinity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return true_size.write(tmp_path_factory.mktemp("random") / "weights", true_size.TINY)


FEW_STEPS = (
    "stages.prompt.steps=1",
    "stages.lora.steps=2",
    "stages.prompt.lr=0.1",
    "stages.lora.lr=0.1",
    "config.rows=2",
    "backbone.device=cpu",
)


def test_words_name_what_changes_in_the_caption() -> None:
    named = set()
    for task in inversions.TASKS:
        for case in itertools.islice(cases(task, "test", phrasing=1), 30):
            word = inversions.word_of(case)
            assert (word is None) == (task == "add")
            if word is not None:
                every = range(len(case.source_prompt.split()))
                begin, end = regions.token_span(case.source_prompt, word, every)
                assert end - begin == len(word.split())
                named.add(word)
    assert named >= {"background", "glasses", "hat", "shirt", "hair"} and any(
        "star" in word for word in named
    )


def test_arms_of_a_case_share_what_they_learn(
    random_infinity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is made is not made again."""
    reading = readout.Reading(scene={}, valid=True, explained=30.0, success=True, kept=0.5, background=31.0)
    monkeypatch.setattr(readout, "judge", lambda *given: reading)
    learnt: list[tuple[str, ...]] = []
    real = inversions.trained
    monkeypatch.setattr(
        inversions,
        "trained",
        lambda plan, *rest, **how: learnt.append(tuple(plan.stages)) or real(plan, *rest, **how),
    )
    arms = ["mask", "whole", "auto", "prompt-only", "base"]
    args = argparse.Namespace(tasks=["recolour"], cases=1, phrasing=1, out=tmp_path, arms=arms)
    overrides = (f"backbone.weights={random_infinity}", *FEW_STEPS)
    (work,) = inversions.works(args)
    assert work.arms == (inversions.TOKENIZER, *arms)
    inversions.one_case(work, overrides)
    assert learnt == [("prompt", "lora"), ("prompt",)]
    assert [left.arms for left in inversions.works(args)] == [()]
    found: dict[str, dict[str, Any]] = {
        name: json.loads((work.place / name / "result.json").read_text()) for name in work.arms
    }
    assert found["mask"]["drawn again"] == found["whole"]["drawn again"]
    assert found["base"]["seconds of learning"] is None and 0 < found["base"]["bits right"] < 1
    assert 0 <= found["auto"]["region IoU"] <= found["auto"]["region recall"] <= 1
    pictures = {name: images.open_image(work.place / name / "result.png").tobytes() for name in work.arms}
    assert len(set(pictures.values())) == len(work.arms)
    inversions.draw_sheets(args)
    assert (tmp_path / "recolour.png").is_file()


def test_edits_are_compared_with_the_tokenizer_case_by_case() -> None:
    def result(arm: str, key: str, background: float | None, task: str = "add") -> dict[str, Any]:
        off = None if background is None else 2 * background
        found = {"arm": arm, "key": key, "task": task, "background": background, "cell off": off}
        return {**found, "success": 1.0, "kept": 1.0}

    rows = [result(inversions.TOKENIZER, "a", 34.0), result(inversions.TOKENIZER, "b", 30.0)]
    rows += [result("mask", "b", 29.0), result("mask", "a", 32.0)]
    rows += [result(inversions.TOKENIZER, "a", None, "background"), result("mask", "a", None, "background")]
    report = inversions.table(rows)
    assert list(report) == ["add", "background", "all tasks"]
    assert report["add"]["mask"]["below the tokenizer"] == [1.5, 1.0, 2.0]
    assert report["add"]["mask"]["below it a cell off"] == [3.0, 2.0, 4.0]
    assert report["all tasks"]["mask"]["background"][0] == 30.5
    assert report["background"]["mask"]["below the tokenizer"] == [None] * 3
    assert report["add"]["mask"]["region IoU"] == [None] * 3


def test_background_is_measured_away_from_the_change() -> None:
    source, result = (Image.new("RGB", (32, 32), "black") for _ in range(2))
    changed = torch.zeros(32, 32, dtype=torch.bool)
    changed[:8, :8] = True
    result.paste((255, 0, 0), (8, 0, 12, 4))  # beside the change
    assert inversions.outside(result, source, changed, 0) == pytest.approx(-10 * math.log10(16 / 3 / 960))
    assert inversions.outside(result, source, changed, 4) == 60.0
    assert inversions.outside(result, source, changed, 32) is None


def test_every_part_at_true_size_is_timed(random_infinity: Path, tmp_path: Path) -> None:
    photo = true_size.picture(256)
    file = images.save_image(photo, tmp_path / "photo.png")
    named = [f"backbone.weights={random_infinity}", f"data.root={file}", "config.source_prompt=a cup"]
    report = true_size.measure(recipe.load("editinfinity-mask", [*named, *FEW_STEPS]), photo, tmp_path, 1)
    assert {"start-up", "stage prompt", "stage lora", "edit with blending", "of it: decoding"} <= set(
        report["parts"]
    )
    seconds = {name: part["seconds"] for name, part in report["parts"].items()}
    assert all(value > 0 for value in seconds.values())
    assert (
        report["totals"]["both stages and an edit"] > seconds["stage prompt"] + seconds["stage lora"] - 0.01
    )


@pytest.fixture(scope="module")
def two_sliders() -> list[slider_photos.Slider]:
    """What they were shown, without the sliders themselves."""
    return [
        slider_photos.Slider(task=task, editor=None, change=sliders.change_of(cell.exemplars()))
        for task in ("smile", "add-glasses")
        for cell in [sliders.Cell(method="pairedit", task=task, pairs=3, draw=0)]
    ]


def edited(case: Case, *some: slider_photos.Slider) -> Image.Image:
    """A face with some of the changes, as it should be."""
    wanted = {name: value for one in some for name, value in one.change.wanted.items()}
    return score.pictures([replace(case, source=case.source | wanted)], "source", 64)[0]


def test_a_slider_on_a_given_face_is_read_off_its_truth(two_sliders) -> None:
    (case,) = slider_photos.drawn_faces(two_sliders, 1)
    assert case.source["smile"] < 0 and not case.source["glasses"]
    for one in two_sliders:
        right = slider_photos.read(case, one, edited(case, one))
        assert (right["happened"], right["kept"]) == (1, 1)
        assert right["reached"] == pytest.approx(1, abs=0.1) and right["background"] == 60
        nothing = slider_photos.read(case, one, edited(case))
        assert (nothing["happened"], nothing["kept"]) == (0, 1)
        assert nothing["reached"] == pytest.approx(0, abs=0.1)


def test_two_sliders_are_read_together(two_sliders) -> None:
    (case,) = slider_photos.drawn_faces(two_sliders, 1)
    face = Face(prompt="", seed=0, scene=case.source, explained=40.0)
    for some in ([], two_sliders[:1], two_sliders[1:], two_sliders):
        found = slider_composition.read(edited(case, *some), face, two_sliders)
        for one in two_sliders:
            assert found[one.task] == pytest.approx(float(one in some), abs=0.1)
        assert found["others kept"] == 1 and found["interference"] < 0.05


def test_given_pictures_are_tabled_with_and_without_truth() -> None:
    look = {"happened": 1.0, "kept": 0.5}
    seen = {"psnr": {"drawn again": [20.0, 30.0]}, "looks": {"smile, scale 1": [look, look | {"kept": 1.0}]}}
    report = slider_photos.table({"faces": seen, "photographs": seen | {"looks": {}}})
    assert report["faces"] == {"smile, scale 1": {"happened": [1.0] * 3, "kept": [0.75, 0.5, 1.0]}}
    for kind in ("faces", "photographs"):
        assert report[f"{kind}, how they are drawn"]["drawn again"]["PSNR in dB"][0] == 25.0
    assert len(report) == 3


def test_photographs_are_taken_as_squares(tmp_path: Path, picture) -> None:
    picture(1, 70, 45).save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("credits")
    ((name, square, caption),) = slider_photos.photographs(tmp_path)
    assert (name, square.size, caption) == ("a", (128, 128), "a")
