"""What is sent to Weights & Biases, recorded by a module in its place: the real one is not needed here."""

import io
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import toy
from rich.console import Console

from pentimento import tracking
from pentimento.cache import Samples
from pentimento.errors import UserError
from pentimento.monitor import Monitor
from pentimento.recipe import Watch


class Run:
    """A run as W&B keeps it."""

    def __init__(self, number: int):
        self.id = f"id{number}"
        self.metrics: list[tuple[str, str | None]] = []
        self.logged: list[dict] = []
        self.exit_codes: list[int] = []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        assert not self.exit_codes, "after the end"
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


class WandB(ModuleType):
    """As much of the module as is used, with a server in memory."""

    def __init__(self):
        super().__init__("wandb")
        self.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.mode = "online"
        self.answer: bool | Exception = True
        self.runs: dict[str, Run] = {}
        self.begun: list[dict] = []
        self.asked = 0
        """How often somebody asked whether a person is logged in."""
        self.Settings = self.Image = lambda *args, **kwargs: (args, kwargs)

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, *, prompt):
        assert not prompt, "nobody sits at a training"
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def init(self, *, id, **settings):
        if isinstance(self.answer, Exception):
            raise self.answer
        self.begun.append({"id": id, **settings})
        run = self.runs.get(id) or Run(len(self.runs))
        self.runs[run.id] = run
        run.exit_codes.clear()
        return run


@pytest.fixture
def wandb(monkeypatch) -> WandB:
    stub = WandB()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def watched(folder, *, stop=0, **settings):
    """Train the toy with a board, crashing after step ``stop``."""
    method = toy.Toy()
    held_out = Samples(toy.rows(folder / "held", [(8, 8)]), method)
    board = tracking.Board("edits", folder / "run", {"seed": 1})
    quiet = Console(file=io.StringIO())
    with Monitor(
        method, folder / "run", watch=Watch(every=4), held_out=held_out, console=quiet, board=board
    ) as monitor:

        def both(report) -> None:
            monitor(report)
            if stop and report.step == stop:
                raise RuntimeError("a crash")

        return toy.run(folder, toy=method, watch=both, **{"steps": 8, "save_every": 4, **settings})


def test_the_scalars_of_every_step_and_the_sheets(tmp_path, wandb):
    blind = toy.run(tmp_path, "blind", steps=8, save_every=4)
    (tmp_path / "run").mkdir()
    assert toy.difference(blind, watched(tmp_path)) == 0, "reporting changes nothing"
    (begun,) = wandb.begun
    assert (begun["project"], begun["name"], begun["id"], begun["resume"]) == ("edits", "run", None, "allow")
    assert (begun["dir"], begun["config"]) == (str(tmp_path / "run"), {"seed": 1})
    assert begun["settings"] == ((), {"console": "off"})
    (run,) = wandb.runs.values()
    assert run.metrics == [("pair/step", None), ("pair/*", "pair/step")]
    assert [entry["pair/step"] for entry in run.logged] == list(range(9))
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(written) == 9
    lines = [json.loads(line) for line in written]
    for line, entry in zip(lines, run.logged, strict=True):
        sent = {key.removeprefix("pair/"): value for key, value in entry.items() if key != "pair/samples"}
        assert sent == {key: value for key, value in line.items() if key != "stage"}
    sheets = {
        entry["pair/step"]: entry["pair/samples"][0][0] for entry in run.logged if "pair/samples" in entry
    }
    assert sheets == {n: str(tmp_path / "run" / "samples" / f"pair-{n:06d}.png") for n in (0, 4, 8)}
    assert run.exit_codes == [0]


def test_a_resumed_training_goes_on_with_its_run(tmp_path, wandb):
    (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError, match="a crash"):
        watched(tmp_path, stop=6)
    (run,) = wandb.runs.values()
    assert run.exit_codes == [1]
    assert (tmp_path / "run" / tracking.RUN_ID).read_text() == "id0\n"
    watched(tmp_path)
    assert list(wandb.runs) == ["id0"] and [begun["id"] for begun in wandb.begun] == [None, "id0"]
    # Steps 5 and 6 were done twice, since the crash came after the save of step 4; they are equal.
    assert [entry["pair/step"] for entry in run.logged] == [*range(7), *range(5, 9)]
    losses = {(entry["pair/step"], entry["pair/loss"]) for entry in run.logged if "pair/loss" in entry}
    assert len(losses) == 8


def test_the_extra_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"watch.wandb needs the extra wandb: pip install 'pentimento\[wandb\]'"
    ):
        tracking.check()


def test_nobody_is_logged_in(wandb, tmp_path):
    tracking.check()
    wandb.answer = False
    with pytest.raises(UserError, match="not logged in.*`wandb login`.*WANDB_MODE=offline"):
        tracking.check()
    wandb.answer = wandb.errors.Error("no route to host\nmore")
    with pytest.raises(UserError, match="watch.wandb: no route to host; .*`wandb login`.*WANDB_MODE=offline"):
        tracking.check()
    with pytest.raises(UserError, match="the run cannot be begun .no route to host.*WANDB_MODE=offline"):
        tracking.Board("edits", tmp_path, {})


@pytest.mark.parametrize("mode", ["offline", "dryrun", "disabled"])
def test_nobody_need_be_logged_in_where_nothing_is_sent(wandb, mode):
    wandb.mode, wandb.answer = mode, False
    tracking.check()
    assert wandb.asked == 0


def test_a_setting_that_is_not_valid(wandb, monkeypatch):
    def refuse():
        raise ValueError("1 validation error\nmode\n  Input should be 'online'")

    monkeypatch.setattr(wandb, "setup", refuse)
    with pytest.raises(
        UserError, match="watch.wandb: a setting of W&B is not valid: 1 validation error mode Input"
    ):
        tracking.check()
