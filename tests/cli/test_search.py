"""``edit`` with candidates and a judge, and with pasting back: what it writes, prints and survives."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from endpoint import KEY, Endpoint, hang_up, refuse, say, send
from PIL import Image
from typer.testing import Result

SEARCH = ("judge=http", "early_steps=1", "judge_timeout=5", "--instruction", "make it negative")


def read(path: str) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_the_judges_choice_is_made_in_all_steps(
    call: Callable[..., Result], trained: Path, photo: Path, endpoint: Endpoint
) -> None:
    endpoint.answers = [say("2 is greener"), say("1, clearly")]
    result = call("edit", trained, photo, *SEARCH, "candidates=3", "--seed", 4)
    assert result.stdout.split() == [
        "edited/photo-candidates.png", "edited/photo-candidates.json", "edited/photo.png", "edited/photo-sheet.png",
    ]  # fmt: skip
    assert result.stderr == ""
    trace = read("edited/photo-candidates.json")
    assert (trace["seeds"], trace["winner"], trace["instruction"]) == ([4, 5, 6], 5, "make it negative")
    assert (trace["early_steps"], trace["steps"], trace["function_evaluations"]) == (1, 2, 2 + 3 * 1)
    assert [c["answers"][0]["reason"] for c in trace["comparisons"]] == ["is greener", "clearly"]
    call("edit", trained, photo, "--instruction", "make it negative", "--seed", 5, "--out", "five.png")
    assert Path("edited/photo.png").read_bytes() == Path("five.png").read_bytes()
    with Image.open("edited/photo-candidates.png") as sheet:
        assert sheet.width > 4 * 128
    assert len(endpoint.asked) == 2
    assert all(KEY.encode() not in path.read_bytes() for path in Path("edited").iterdir())


def test_a_judge_that_fails_is_survived_and_reported(
    call: Callable[..., Result], trained: Path, photo: Path, endpoint: Endpoint
) -> None:
    endpoint.answers = [refuse(401, f"{KEY} has expired")]
    result = call("edit", trained, photo, *SEARCH, "candidates=3", "--out", "a.png")
    assert "no usable answer in 2 of 2 comparisons" in result.stderr
    assert "*** has expired" in result.stderr
    assert read("a-candidates.json")["failures"] == 2
    assert all(
        KEY not in text for text in (result.stderr, result.stdout, Path("a-candidates.json").read_text())
    )
    call("edit", trained, photo, "--instruction", "make it negative", "--out", "plain.png")
    assert Path("a.png").read_bytes() == Path("plain.png").read_bytes()


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (refuse(401, f"bad key {KEY}"), "refuses the key in OPENAI_API_KEY"),
        (refuse(403), "refuses the key in OPENAI_API_KEY"),
        (hang_up, "check OPENAI_BASE_URL"),
    ],
)
def test_a_judge_that_cannot_work_is_known_before_anything_is_loaded(
    refuse, photo: Path, endpoint: Endpoint, probe, words: str
) -> None:
    endpoint.probe = probe
    said = refuse("edit", "no-such-run", photo, *SEARCH, "candidates=3")
    assert words in said
    assert KEY not in said
    assert endpoint.asked == []


def test_no_endpoint_and_one_without_a_list_of_models(
    call: Callable[..., Result],
    refuse,
    trained: Path,
    photo: Path,
    endpoint: Endpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint.probe = send(b"<html>not here</html>", status=404, kind="text/html")
    call("edit", trained, photo, *SEARCH, "candidates=2")
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert "set OPENAI_BASE_URL" in refuse("edit", trained, photo, *SEARCH, "candidates=2")


def test_every_result_has_candidates_of_its_own(
    call: Callable[..., Result], trained: Path, photo: Path, endpoint: Endpoint
) -> None:
    endpoint.answers = [say("2")]
    several = ("candidates=2", "--count", 2, "--seed", 3)
    printed = call("edit", trained, photo, *SEARCH, *several).stdout.split()
    assert [p for p in printed if "candidates" not in p] == [
        "edited/photo-seed3.png", "edited/photo-seed5.png", "edited/photo-sheet.png",
    ]  # fmt: skip
    seeds = [read(f"edited/photo-seed{seed}-candidates.json")["seeds"] for seed in (3, 5)]
    assert seeds == [[3, 4], [5, 6]]


def test_every_step_of_a_sequence_is_searched_for(
    call: Callable[..., Result], trained: Path, photo: Path, endpoint: Endpoint
) -> None:
    endpoint.answers = [say("2"), say("1")]
    steps = ("--instruction", "a second edit", "candidates=2", "--steps", 1)
    call("edit", trained, photo, *SEARCH, *steps)
    traces = [read(f"edited/photo-{number}-candidates.json") for number in (1, 2)]
    assert [(t["instruction"], t["winner"]) for t in traces] == [
        ("make it negative", 1),
        ("a second edit", 0),
    ]
    assert [t["function_evaluations"] for t in traces] == [2, 2]  # as many early steps as steps: made once


def test_pasting_back_is_reported_and_keeps_what_did_not_change(
    call: Callable[..., Result], trained: Path, photo: Path, endpoint: Endpoint
) -> None:
    call("edit", trained, photo, "--scale", 0, "--out", "plain.png")
    result = call("edit", trained, photo, "paste_back=true", "--scale", 0, "--out", "pasted.png")
    assert "pentimento: note: pasted.png: " in result.stderr
    source, plain, pasted = (
        np.asarray(Image.open(path)).astype(int) for path in (photo, "plain.png", "pasted.png")
    )
    assert (np.abs(pasted - source) <= np.abs(plain - source)).all()
    found = call("edit", trained, photo, *SEARCH, "candidates=2", "paste_back=true", "--out", "found.png")
    assert "found.png: " in found.stderr
    assert set(read("found-candidates.json")["paste_back"]) == {"pasted", "psnr_before", "psnr_after"}
