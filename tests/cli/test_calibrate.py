"""Calibrating from the command line, and what editing, inspecting and exporting make of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pentimento
from pentimento import calibrate, calibration, lookup
from pentimento.calibration import Calibration
from pentimento.method import Example
from pentimento.pocket import dataset

NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture
def own(slider: Path, tmp_path: Path) -> Path:
    """A copy of the slider's run, to be changed."""
    return Path(shutil.copytree(slider, tmp_path / "own"))


@pytest.fixture
def calibrated(own: Path, half: Calibration) -> Path:
    """The same with a known calibration."""
    calibration.write(own / "weights" / "semantic" / NAME, half)
    return own


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


def test_a_probe_draws_what_an_edit_draws(slider: Path) -> None:
    editor = pentimento.load(slider)
    probe = editor.method.probe()
    latents = probe.draw([("a cat", 3)], [0.0, -1.0, 2.0])
    for scale, latent in latents.items():
        (picture,) = probe.pictures(latent)
        assert picture.tobytes() == editor.edit(instruction="a cat", seed=3, scale=scale).tobytes()
    pair = Example(source=Image.new("RGB", (40, 30), "red"), target=Image.new("RGB", (40, 30), "blue"))
    shown = probe.shown([pair])
    assert shown.shape == latents[0.0].shape[1:]
    back = Example(source=pair.target, target=pair.source)
    torch.testing.assert_close(probe.shown([back]), -shown)
    torch.testing.assert_close(probe.shown([pair, back]), torch.zeros_like(shown))


class Straight:
    """Moves the shown way, evenly: half of the shown change at raw scale 1."""

    direction = torch.tensor([[3.0, 4.0]])

    def draw(self, asked, scales):
        return {scale: scale * 0.5 * self.direction.expand(len(asked), 1, 2) for scale in scales}

    def pictures(self, latents):
        return [Image.new("RGB", (32, 32))] * len(latents)

    def shown(self, pairs):
        return self.direction


class Sideways(Straight):
    """Moves almost across the shown way: twice the shown length at raw scale 1."""

    def draw(self, asked, scales):
        way = torch.tensor([[-7.0, 7.0]]) + 0.2 * self.direction
        return {scale: scale * way.expand(len(asked), 1, 2) for scale in scales}


def test_latents_are_measured_along_the_pairs() -> None:
    asked, scales = [("", 0), ("", 1)], [-1.0, 0.0, 1.0, 2.0, 3.0]
    measured = calibrate.in_latents(Straight(), [Example()], asked, scales)
    assert measured.measure == "latents, by projection" and measured.faces == 2
    assert [point.response for point in measured.points] == pytest.approx([-0.5, 0, 0.5, 1, 1.5])
    found = calibration.decide(measured.points, measure=measured.measure, faces=2)
    assert found is not None and found.unit == pytest.approx(2)


def test_a_change_of_other_coordinates_is_measured_by_its_size() -> None:
    measured = calibrate.in_latents(Sideways(), [Example()], [("", 0)], [-1.0, 0.0, 0.5, 0.75, 1.0])
    assert measured.measure == "latents, by size"
    length = float(torch.linalg.vector_norm(torch.tensor([-7 + 0.6, 7 + 0.8]))) / 5
    assert [point.response for point in measured.points] == pytest.approx(
        [-length, 0, length / 2, length * 0.75, length], rel=1e-4
    )
    assert [point.intact for point in measured.points] == [0, 1, 1, 1, 0], (
        "twice the shown change is too much"
    )
    assert [row["projection"] for row in measured.rows][-1] == pytest.approx(0.48, abs=0.01)


def test_pairs_without_a_change_are_refused() -> None:
    class Nothing(Straight):
        direction = torch.zeros(1, 2)

    with pytest.raises(pentimento.errors.UserError, match="the same pictures"):
        calibrate.in_latents(Nothing(), [Example()], [("", 0)], [0.0, 1.0])


def test_a_run_is_measured_and_drawn(call, own: Path) -> None:
    """What the tiny model's slider does is of no matter here, but that it is said and drawn."""
    before = (own / "weights" / "semantic" / NAME).read_bytes()
    arguments = ["calibrate", own, "--scale", "0.5,1,-1", "--count", 2, "--measure-only"]
    result = call(*arguments, code=_verdict(own))
    assert result.stdout.splitlines()[0].split() == [
        "raw", "scale", "response", "same", "faces", "projection", "size",
    ]  # fmt: skip
    numbers = json.loads((own / "calibration" / "response.json").read_text())
    assert [point["scale"] for point in numbers["points"]] == [-1, 0, 0.5, 1]
    for name in ("curve.png", "sheet.png"):
        with Image.open(own / "calibration" / name) as picture:
            assert picture.width > 300
    assert (own / "weights" / "semantic" / NAME).read_bytes() == before


def _verdict(run: Path) -> int:
    done = calibrate.calibrate(
        calibrate.Request(what=str(run), scales=(-1, 0.5, 1), count=2, record=False, out=run / "x")
    )
    return 0 if done.calibration else 1


def test_scale_1_is_the_calibrated_one_and_the_raw_one_is_reached(
    call, calibrated: Path, slider: Path
) -> None:
    result = call("edit", calibrated, "--scale", "1", "--out", "one.png")
    assert "note: scale 1 is raw 0.5" in result.stderr and "outside" not in result.stderr
    call("edit", slider, "--scale", "0.5", "--out", "half.png")
    assert (pixels("one.png") == pixels("half.png")).all()
    raw = call("edit", calibrated, "--scale", "1", "raw=true", "--out", "raw.png")
    assert "calibrated" not in raw.stderr and "raw 0.5" not in raw.stderr
    call("edit", slider, "--scale", "1", "--out", "trained.png")
    assert (pixels("raw.png") == pixels("trained.png")).all()
    assert (pixels("raw.png") != pixels("one.png")).any()
    far = call("edit", calibrated, "--scale", "1,2,3", "--out", "far").stderr
    assert "scale 3: outside of what was measured to hold" in far
    assert "1 (calibrated default)" in Path("far/slider.html").read_text()


def test_sliders_beside_it_have_units_of_their_own(call, calibrated: Path, slider: Path) -> None:
    call("edit", slider, "--scale", "0.5", f"also={calibrated}@1", "--out", "a.png")
    call("edit", slider, "--scale", "0.5", f"also={slider}@0.5", "--out", "b.png")
    call("edit", slider, "--scale", "0.5", f"also={calibrated}@0.5", "raw=true", "--out", "c.png")
    assert (pixels("a.png") == pixels("b.png")).all() and (pixels("c.png") == pixels("b.png")).all()


def test_inspect_and_exports_say_and_hold_the_unit(call, calibrated: Path, slider: Path) -> None:
    assert "calibrated  scale 1 is raw 0.5" in call("inspect", calibrated).stdout
    assert "calibrated" not in call("inspect", slider).stdout
    for to in ("diffusers", "comfyui"):
        said = call("export", calibrated, "--to", to, "--out", f"{to}.safetensors").stdout
        assert "times 0.5, the calibrated scale 1," in said
    plain = load_file(calibrated / "weights" / "semantic" / NAME)
    folded = load_file("diffusers.safetensors")
    for key, value in plain.items():
        factor = 0.5 / 2 if ".lora_B." in key else 1  # alpha 1, rank 2
        torch.testing.assert_close(folded[key], value * factor, rtol=0, atol=0)
    call("edit", "diffusers.safetensors", "--scale", "1", "--out", "folded.png", *_base(slider))
    call("edit", calibrated, "--scale", "1", "--out", "run.png")
    assert abs(pixels("folded.png") - pixels("run.png")).max() <= 1
    said = call("export", calibrated, "--to", "pairedit", "--out", "mine.pt").stdout
    assert "calibrated default is a scale of 0.5 there" in said


def _base(run: Path) -> list[str]:
    return [f"backbone.weights={lookup.find(run).setup.backbone.weights}", "backbone.device=cpu"]


def test_a_run_that_was_stopped_before_its_weights_were_written_goes_on(call, own: Path) -> None:
    shutil.rmtree(own / "weights" / "semantic")
    shutil.rmtree(own / "weights" / "content")
    call("train", own, "--resume")
    assert (own / "weights" / "semantic" / NAME).is_file()


def test_a_calibrated_run_still_trains_on(call, calibrated: Path, half: Calibration) -> None:
    """More steps are other weights: the calibration does not outlive them."""
    file = calibrated / "weights" / "semantic" / NAME
    assert "calibrated" not in call("train", calibrated, "--resume").stderr
    assert calibration.read(file) == half, "no step was left to be trained"
    said = call("train", calibrated, "stages.pair.steps=3", "--resume").stderr
    assert f"note: {file.relative_to(calibrated)}" in said.replace(f"{calibrated}/", "")
    assert "other weights than those that were calibrated" in said
    assert calibration.read(file) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "0"], "count"),
        (["--scale", "0,-1"], "at least one strength must be above 0"),
        (["--scale", "much"], "give a number, or several with commas"),
        (["measured=latents"], "Did you mean measure?"),
        (["measure=eyes"], "measure"),
        (["measure=read-out"], "holds no drawn portraits with one and the same change"),
        (["data.root=nowhere"], "nowhere"),
        (["data.rot=x"], "data.rot"),
        (["x"], "write settings as key=value"),
    ],
)
def test_mistakes(refuse, slider: Path, arguments: list[str], words: str) -> None:
    assert words in refuse("calibrate", slider, *arguments)
    assert not (slider / "calibration").exists()


def test_what_cannot_be_calibrated(call, refuse, slider: Path, trained: Path, pairs: Path) -> None:
    assert "InFluxEdit is no slider" in refuse("calibrate", trained)
    call("export", slider, "--to", "pairedit", "--out", "theirs.pt")
    how = ["method=pairedit", *_base(slider), f"data.root={pairs}"]
    assert "has no record of its training" in refuse("calibrate", "theirs.pt", *how)
    file = slider / "weights" / "semantic" / NAME
    assert "name pairs that show its change with data.root=FOLDER" in refuse("calibrate", file)


def test_drawn_pairs_are_read_off(slider: Path, tmp_path: Path) -> None:
    dataset.write("smile", 2, size=32, out=tmp_path / "smile")
    config = calibrate.pairs_of(str(slider), [f"data.root={tmp_path / 'smile'}"])
    change = calibrate.drawn_change(config, "auto")
    assert change is not None and change.attribute == "smile"
    assert calibrate.drawn_change(config, "latents") is None
