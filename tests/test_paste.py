"""Pasting back on drawn pictures, whose truth is known: the rest becomes exact and the edit stays."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pentimento import images
from pentimento.paste import paste_back
from pentimento.pocket import readout, render, tasks


def redrawn(truth: Image.Image, seed: int = 0) -> Image.Image:
    """As a model's autoencoder gives it back: softer, noisy, a little off in colour."""
    soft = truth.filter(ImageFilter.GaussianBlur(0.6))
    noise = np.random.default_rng(seed).normal(1.5, 3.0, (*truth.size[::-1], 3))
    return Image.fromarray((np.asarray(soft) + noise).clip(0, 255).astype(np.uint8))


def pair(case: tasks.Case) -> tuple[Image.Image, Image.Image]:
    before, after = images.from_tensor(render.render([case.source, case.target]) * 2 - 1)
    return before, after


@pytest.mark.parametrize("task", ["add-glasses", "recolour-hair", "remove", "add", "replace", "smile"])
def test_what_the_edit_left_alone_becomes_exact_and_the_edit_stays(task: str) -> None:
    for case in itertools.islice(tasks.cases(task, "test"), 2):
        source, truth = pair(case)
        result = redrawn(truth)
        pasted = paste_back(source, result)
        edited = readout.edited_region(*images.to_unit([source, truth]), dilate=0).numpy()
        mask, mixed = np.asarray(pasted.mask), np.asarray(pasted.picture)
        assert (mixed[mask == 0] == np.asarray(source)[mask == 0]).all()
        assert (mixed[mask == 255] == np.asarray(result)[mask == 255]).all()
        assert pasted.pasted == pytest.approx((mask == 0).mean())
        assert pasted.pasted > 0.7 * (~edited).mean()
        assert (mask[edited] == 0).mean() < 0.02
        assert (mask[edited] == 255).mean() > 0.9
        assert 30 < pasted.before < 45
        far = ~readout.edited_region(*images.to_unit([source, truth]), dilate=12).numpy()
        assert (mixed[far] == np.asarray(source)[far]).all()


def test_an_edit_that_succeeded_still_does_with_a_better_background() -> None:
    case = next(tasks.cases("add-glasses", "test"))
    source, truth = pair(case)
    result = redrawn(truth)
    reading = [
        readout.judge(images.to_unit([p])[0], case.source, case.target, case.wanted)
        for p in (result, paste_back(source, result).picture)
    ]
    assert reading[0].success and reading[1].success
    assert reading[1].background > reading[0].background + 5


def test_nothing_changed_gives_the_source_and_everything_changed_the_result() -> None:
    case = next(tasks.cases("identity", "test"))
    source, _ = pair(case)
    pasted = paste_back(source, redrawn(source))
    assert np.array_equal(np.asarray(pasted.picture), np.asarray(source))
    assert pasted.trace()["pasted"] == 1
    assert "pasted 100% of the source back" in str(pasted)
    inverted = Image.eval(source, lambda level: 255 - level)
    assert paste_back(source, inverted).pasted < 0.05


def test_a_changed_background_keeps_what_stands_before_it() -> None:
    source = Image.new("RGB", (96, 96), "white")
    source.paste((200, 30, 30), (30, 30, 66, 66))
    result = Image.new("RGB", (96, 96), (20, 60, 200))
    result.paste((205, 33, 28), (30, 30, 66, 66))
    pasted = paste_back(source, redrawn(result))
    assert pasted.picture.getpixel((48, 48)) == (200, 30, 30)
    assert np.asarray(pasted.mask)[:24].min() == 255


def test_large_and_tiny_pictures() -> None:
    large = Image.linear_gradient("L").resize((1600, 400)).convert("RGB")
    changed = large.copy()
    changed.paste((0, 200, 0), (700, 100, 900, 300))
    pasted = paste_back(large, changed)
    assert pasted.picture.size == pasted.mask.size == (1600, 400)
    assert pasted.picture.getpixel((800, 200)) == (0, 200, 0)
    assert pasted.picture.crop((0, 0, 600, 400)).tobytes() == large.crop((0, 0, 600, 400)).tobytes()
    dot = Image.new("RGB", (1, 1), "red")
    assert paste_back(dot, dot).picture.getpixel((0, 0)) == (255, 0, 0)
    assert paste_back(dot, Image.new("RGB", (1, 1), "blue")).picture.getpixel((0, 0)) == (0, 0, 255)


def test_the_numbers_are_json_able_and_bounded() -> None:
    source = Image.new("RGB", (32, 32), "red")
    same = paste_back(source, source).trace()
    assert same == {"pasted": 1.0, "psnr_before": 100.0, "psnr_after": 100.0}
    other = paste_back(source, Image.new("RGB", (32, 32), "blue"))
    assert "nothing pasted back" in str(other)
    assert other.trace() == {"pasted": 0.0, "psnr_before": None, "psnr_after": None}
