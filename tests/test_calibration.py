"""What a response curve means, and how a file keeps it."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pentimento import adapter_files, calibration, inspection, metrics, stored
from pentimento.calibration import Calibration, Point
from pentimento.errors import UserError


def points(*rows: tuple[float, float, float]) -> list[Point]:
    return [Point(scale=scale, response=response, intact=intact) for scale, response, intact in rows]


def decide(*rows: tuple[float, float, float]) -> Calibration | None:
    return calibration.decide(points(*rows), measure="read-out", faces=4)


def test_the_unit_is_where_the_shown_change_is_reached() -> None:
    found = decide((-1, -0.6, 1), (0, 0, 1), (0.5, 0.4, 1), (1, 0.8, 1), (2, 1.6, 1))
    assert found is not None
    assert found.unit == pytest.approx(1.25)
    assert found.response == pytest.approx(1)
    assert (found.low, found.high, found.monotone) == (-1, 2, 1)
    assert found.covers(1.6) and not found.covers(1.7) and found.covers(-0.8) and not found.covers(-0.9)


def test_a_slider_that_never_gets_there_has_its_unit_before_the_plateau() -> None:
    found = decide((0, 0, 1), (1, 0.6, 1), (2, 0.62, 1))
    assert found is not None and found.unit == pytest.approx(0.95 * 0.62 / 0.6)
    assert found.response == pytest.approx(0.95 * 0.62)


def test_what_is_gained_behind_a_plateau_is_left() -> None:
    """As measured for a smile on the pocket model: at 3 the pictures fall apart, and a mouth is seen in the ruins."""
    found = decide(
        (0, 0, 1), (0.5, 0.49, 1), (1, 0.69, 1), (1.25, 0.82, 1), (1.5, 0.82, 1), (2, 0.82, 1), (3, 1.07, 1)
    )
    assert found is not None and 1 < found.unit < 1.25 and found.high == 3
    assert decide((0, 0, 1), (1, 0.5, 1), (1.5, 0.5, 1), (2, 1, 1)).unit == 2, "one flat step is no plateau"


def test_on_and_off() -> None:
    curve = points((-1, 0, 0.2), (0, 0, 1), (0.5, 0.25, 1), (0.75, 1, 1), (1, 1, 0.8), (2, 1, 0.5))
    found = calibration.decide(curve, measure="read-out", faces=4, gradual=False)
    assert found is not None and (found.unit, found.low, found.high) == (1, 0, 1)
    curve = points((0, 0, 1), (0.75, 1, 1), (1, 1, 0.5))
    found = calibration.decide(curve, measure="read-out", faces=4, gradual=False)
    assert found is not None and found.unit == 0.75, "the range goes no further"


@pytest.mark.parametrize(
    "end",
    [(3.0, 1.5, 0.5), (3.0, 0.7, 1.0)],
    ids=["faces break", "the response turns back"],
)
def test_the_range_ends(end: tuple[float, float, float]) -> None:
    found = decide((0, 0, 1), (1, 0.5, 1), (2, 0.9, 0.75), end, (4, 2, 1))
    assert found is not None and (found.high, found.unit) == (2, pytest.approx(1 + (0.855 - 0.5) / 0.4))


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 0, 1), (1, 0.1, 1), (2, 0.12, 1)],
        [(-1, 0.5, 1), (0, 0, 1), (1, -0.5, 1)],
        [(0, 0, 1), (0.5, 1, 0.5), (1, 1, 1)],
    ],
    ids=["no effect", "reversed", "faces break at once"],
)
def test_sliders_without_a_unit(rows: list[tuple[float, float, float]]) -> None:
    assert decide(*rows) is None


def written(tmp_path: Path, record: dict[str, object] | None = None) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "a.safetensors"
    tensors = {f"transformer.to_q.lora_{f}.weight": torch.randn(2, 2) for f in "AB"}
    adapter_files.write(file, tensors, {"method": "m"} if record is None else record, {"more": "kept"})
    return file


def test_a_file_keeps_its_tensors_and_its_other_words(tmp_path: Path) -> None:
    file = written(tmp_path)
    before, bytes_before = load_file(file), file.read_bytes()
    found = decide((0, 0, 1), (0.5, 1, 1))
    calibration.write(file, found)
    assert calibration.read(file) == found
    assert stored.read_metadata(file)["more"] == "kept" and calibration.check(file)["method"] == "m"
    assert all(torch.equal(value, before[key]) for key, value in load_file(file).items())
    (line,) = calibration.report(inspection.inspect_file(file))
    assert line[0] == "calibrated" and "scale 1 is raw 0.5 and makes 100% of the shown change" in line[1]
    calibration.write(file, None)
    assert file.read_bytes() == bytes_before and calibration.read(file) is None


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unit must lie between 0 and 100"):
        found = decide((0, 0, 1), (0.5, 1, 1))
        raw = {**json.loads(json.dumps(found.__dict__)), "unit": -1}
        calibration.read(written(tmp_path, {"calibration": raw}))
    with pytest.raises(UserError, match="its calibration is damaged"):
        calibration.read(written(tmp_path, {"calibration": 3}))
    with pytest.raises(UserError, match="has no record of its training"):
        calibration.write(written(tmp_path, {}), None)


def test_folded_weights_have_the_unit_in_them() -> None:
    found = decide((-1, -1, 1), (0, 0, 1), (0.5, 1, 1), (1, 1.5, 1))
    assert found is not None
    folded = found.folded()
    assert (folded.unit, folded.low, folded.high) == (1, -2, 2)
    assert [scale for scale, _, _ in folded.curve] == [-2, 0, 1, 2]


def test_numbers_of_sliders() -> None:
    assert metrics.spearman([0, 1, 2, 3], [1, 2, 4, 8]) == pytest.approx(1)
    assert metrics.spearman([0, 1, 2, 3], [8, 4, 2, 1]) == pytest.approx(-1)
    # By hand: ranks 0 1.5 1.5 3 against 0 1 2 3.
    assert metrics.spearman([0, 1, 2, 3], [0, 5, 5, 9]) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert math.isnan(metrics.spearman([0, 1], [3, 3]))
    assert metrics.linearity([0, 0.5, 1], [1, 2, 3]) == pytest.approx(1)
    # The best line through 0, 1, 0 is flat at 1/3: it explains nothing.
    assert metrics.linearity([0, 0.5, 1], [0, 1, 0]) == pytest.approx(0)
    assert math.isnan(metrics.linearity([0, 1], [2, 2]))
    assert metrics.symmetry(-0.4, 0.1, 1.1) == pytest.approx(0.5)
    assert math.isnan(metrics.symmetry(1, 0, 0))
    assert metrics.switches([False, True, True, False]) == 2
