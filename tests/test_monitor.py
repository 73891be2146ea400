"""What is written while it trains, and that looking changes nothing."""

import io
import json
import math

import pytest
import toy
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pentimento import files
from pentimento.cache import Samples
from pentimento.errors import UserError
from pentimento.monitor import Monitor, clock
from pentimento.recipe import Watch
from pentimento.train import Report, Stage

SETTINGS = {"steps": 12, "save_every": 4, "schedule": "cosine", "samples": {"caption_dropout": 0.5}}


def noisy() -> toy.Toy:
    return toy.Toy(toy.Toy.Config(global_noise=True))


def watched(folder, out="run", *, watch=None, stop=0, measure=None, console=None, **settings):
    """Train with a monitor; returns the weights and the method."""
    method = noisy()
    held_out = Samples(toy.rows(folder / "held", [(8, 8), (12, 8)]), method)
    settings = {**SETTINGS, **settings}
    with Monitor(
        method,
        folder / out,
        watch=watch or Watch(every=4),
        held_out=held_out,
        measure=measure,
        seed=1,
        console=console or Console(file=io.StringIO()),
    ) as monitor:

        def both(report: Report) -> None:
            monitor(report)
            if stop and report.step == stop:
                raise RuntimeError("a crash")

        return toy.run(folder, out, toy=method, watch=both, **settings), method


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_looking_changes_nothing(tmp_path):
    """The method reseeds the global generator in ``edit`` and draws from it in ``losses``."""
    blind = toy.run(tmp_path, "blind", toy=noisy(), **SETTINGS)
    seeing, _ = watched(tmp_path, watch=Watch(every=1, loss_every=3))
    assert toy.difference(blind, seeing) == 0


def test_resumed_with_samples_is_uninterrupted_without(tmp_path):
    blind = toy.run(tmp_path, "blind", toy=noisy(), **SETTINGS)
    with pytest.raises(RuntimeError, match="a crash"):
        watched(tmp_path, stop=7)
    resumed, _ = watched(tmp_path, watch=Watch(every=2))
    assert toy.difference(blind, resumed) == 0


@pytest.mark.parametrize("stops", [(), (7,), (2, 3, 9, 10)])
def test_each_step_is_in_the_metrics_once(tmp_path, stops):
    """Also those that were done twice, after a crash between two saves, and before the first one."""
    watched(tmp_path, "whole")
    for stop in stops:
        with pytest.raises(RuntimeError):
            watched(tmp_path, stop=stop)
    watched(tmp_path)
    written = lines(tmp_path / "run")
    assert [entry["step"] for entry in written] == list(range(13))
    fixed = [{k: v for k, v in e.items() if k not in ("seconds", "memory_gib")} for e in written]
    assert fixed == [
        {k: v for k, v in e.items() if k not in ("seconds", "memory_gib")} for e in lines(tmp_path / "whole")
    ]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "pair")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("held_out_loss")] == [0, 4, 8, 12]
    assert events.Scalars("loss")[4].value == pytest.approx(written[5]["loss"])


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    with pytest.raises(RuntimeError):
        watched(tmp_path, stop=6)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    watched(tmp_path)
    assert [entry["step"] for entry in lines(tmp_path / "run")] == list(range(13))


def test_two_stages_share_one_file(tmp_path):
    stages = {name: Stage(train=("content", "semantic"), steps=3) for name in ("one", "two")}
    watched(tmp_path, stages=stages, watch=Watch(every=2))
    assert [(e["stage"], e["step"]) for e in lines(tmp_path / "run")] == [
        (s, n) for s in stages for n in range(4)
    ]
    sheets = [f"{stage}-{step:06d}.png" for stage in stages for step in (0, 2, 3)]
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == sheets


def test_the_numbers_of_a_step(tmp_path):
    watched(tmp_path)
    first, second = lines(tmp_path / "run")[:2]
    assert first.keys() == {
        "stage",
        "step",
        "held_out_loss",
        "held_out_loss_content",
        "held_out_loss_semantic",
    }
    assert second.keys() == {
        "stage", "step", "loss", "loss_content", "loss_semantic", "grad_norm", "lr", "seconds", "memory_gib"
    }  # fmt: skip
    assert second["loss"] == pytest.approx(second["loss_content"] + second["loss_semantic"])
    assert second["seconds"] > 0 and second["memory_gib"] > 0.01


def test_the_loss_is_the_sum_of_what_is_trained(tmp_path):
    """The other adapter's loss is only told."""
    watched(tmp_path, stages={"one": Stage(train=("semantic",), steps=2)}, watch=Watch(every=1))
    begun, *steps = lines(tmp_path / "run")
    assert begun["held_out_loss"] == begun["held_out_loss_semantic"] != begun["held_out_loss_content"] > 0
    assert all(step["loss"] == step["loss_semantic"] and step["loss_content"] > 0 for step in steps)


def test_held_out_loss_has_fixed_draws(tmp_path):
    """Without learning it stays the same, and it falls when the training pairs are the held-out ones."""
    watched(tmp_path, "still", lr=1e-12)
    still = [e["held_out_loss_semantic"] for e in lines(tmp_path / "still") if "held_out_loss_semantic" in e]
    assert len(still) == 4 and still[1:] == pytest.approx(still[:-1], rel=0.2)
    watched(tmp_path, lr=3e-2, steps=40, samples={})
    learnt = [e["held_out_loss_semantic"] for e in lines(tmp_path / "run") if "held_out_loss_semantic" in e]
    assert learnt[-1] < learnt[0]


def test_sheets_and_measures(tmp_path):
    seen = []

    def measure(example, result):
        seen.append((example.key, result.size))
        return {"psnr": 10.0 * len(seen), "bg": math.inf}

    _, method = watched(tmp_path, watch=Watch(every=6, count=1), measure=measure)
    assert seen == [("0", (8, 8))] * 3
    found = {e["step"]: e["held_out_psnr"] for e in lines(tmp_path / "run") if "held_out_psnr" in e}
    assert found == {0: 10.0, 6: 20.0, 12: 30.0}
    assert lines(tmp_path / "run")[0]["held_out_bg"] is None, "JSON has no infinity"
    sheet = Image.open(tmp_path / "run" / "samples" / "pair-000012.png")
    assert sheet.width > 3 * 256 > sheet.height > 256, "source, result, target"
    assert method.calls["release"] >= 3


@pytest.mark.parametrize(("watch", "steps"), [(Watch(), []), (Watch(loss_every=5), [0, 5, 10, 12])])
def test_what_is_not_asked_for_is_not_done(tmp_path, watch, steps):
    watched(tmp_path, watch=watch)
    assert [e["step"] for e in lines(tmp_path / "run") if "held_out_loss" in e] == steps
    assert not (tmp_path / "run" / "samples").exists()


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = io.StringIO()
    watched(tmp_path, console=Console(file=out, force_terminal=False, width=40), steps=50)
    said = out.getvalue().splitlines()
    assert said[0] == "pair: 50 steps"
    assert said[1].startswith("pair 0/50  held out loss")
    assert said[-1].startswith("pair 50/50  loss ") and "left 0:00:00" in said[-1]
    assert 20 <= len(said) < 40 and "\x1b" not in out.getvalue()


def test_a_bar_on_a_terminal(tmp_path):
    out = io.StringIO()
    watched(tmp_path, console=Console(file=out, force_terminal=True, width=160))
    assert "12/12" in out.getvalue() and "s/step" in out.getvalue()


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    def full(path, data, *, durable=True):
        if path.name == "metrics.jsonl":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        watched(tmp_path)


def test_clock():
    assert [clock(s) for s in (0, 61.4, 3723)] == ["0:00:00", "0:01:01", "1:02:03"]
