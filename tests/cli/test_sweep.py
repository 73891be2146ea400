"""Several runs of one recipe: names, what is refused, and going on where it stopped."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pentimento import checkpoint, cli, recipe, run, sweep
from pentimento.checkpoint import Interrupted
from pentimento.errors import UserError

NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture
def of_two(pairs: Path, tiny_dev: Path, tmp_path: Path) -> list[str]:
    """Two data sets and two seeds of a tiny slider, two steps each."""
    other = tmp_path / "negative"
    other.symlink_to(pairs)
    return [
        "pairedit", f"backbone.weights={tiny_dev}", "backbone.device=cpu", "config.max_sequence_length=16",
        "config.resolution=32", "config.steps=3", "config.skip=0", "config.lora.rank=2", "stages.pair.steps=2",
        f"sweep.data=[{pairs},{other}]", "sweep.seeds=[3,4]",
    ]  # fmt: skip


def test_runs_are_all_combinations_by_readable_names() -> None:
    swept = recipe.load(
        "pairedit", ["sweep.data=[data/age,data/smile]", "sweep.noise_scales=[1,2.5]", "sweep.seeds=[1,2]"]
    )
    made = sweep.runs(swept)
    assert [one.name for one in made][:5] == [
        "age-noise1-seed1", "age-noise1-seed2", "age-noise2.5-seed1", "age-noise2.5-seed2", "smile-noise1-seed1",
    ]  # fmt: skip
    last = made[-1].recipe
    assert (len(made), last.data.root, last.config.noise_scale, last.seed) == (8, "data/smile", 2.5, 2)
    assert last.sweep is None and last.stages == swept.stages


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["sweep.data=[]"], "data is empty; name at least one, or leave it out"),
        (["sweep.seeds=[1,1]"], "seeds names one twice"),
        (["sweep.sets=[a]"], "sweep.sets"),
        (["sweep.seeds=[x]"], "sweep.seeds"),
        (["sweep={}"], "sweep is empty; list data, noise_scales or seeds"),
        (["sweep.data=[a/x,b/x]"], "2 data sets would be called x"),
        (["sweep.data=[nowhere]"], "nowhere"),
        (["sweep.seeds=[-1]"], "seed must lie between 0"),
        (["sweep.noise_scales=[0]"], "noise_scale must be above 0"),
    ],
)
def test_mistakes(refuse, settings: list[str], words: str) -> None:
    assert words in refuse("train", "pairedit", *settings, "--out", "runs", "--dry-run")
    assert not Path("runs").exists()


def test_a_method_without_noise_scales(refuse) -> None:
    said = refuse("train", "text-slider", "sweep.noise_scales=[2]", "--out", "runs")
    assert "noise_scale" in said and "sweep, run noise2" in said


def test_a_sweep_goes_on_where_it_stopped(call, refuse, of_two: list[str], monkeypatch) -> None:
    planned = call("train", *of_two, "--out", "all", "--dry-run").stdout
    assert "4 runs in all" in planned and "pairs-seed3" in planned and "negative-seed4" in planned
    trained = run.train_run
    begun: list[str] = []

    def stopping(plan, out, **how):
        begun.append(Path(out).name)
        if len(begun) == 2:
            raise Interrupted("stopped")
        return trained(plan, out, **how)

    monkeypatch.setattr(run, "train_run", stopping)
    result = CliRunner().invoke(cli.app, ["train", *of_two, "--out", "all"])
    assert result.exit_code == 130 and "pentimento train all/sweep.yaml --out all --resume" in result.stderr
    first = (Path("all/pairs-seed3/weights/semantic") / NAME).stat().st_mtime_ns
    assert "already holds a sweep" in refuse("train", *of_two, "--out", "all")
    assert (
        "pairs-seed3 (done)"
        in call("train", "all/sweep.yaml", "--out", "all", "--resume", "--dry-run").stdout
    )
    printed = call("train", "all/sweep.yaml", "--out", "all", "--resume").stdout.split()
    assert printed == ["all/pairs-seed3", "all/pairs-seed4", "all/negative-seed3", "all/negative-seed4"]
    assert begun[2:] == ["pairs-seed4", "negative-seed3", "negative-seed4"]
    assert (Path("all/pairs-seed3/weights/semantic") / NAME).stat().st_mtime_ns == first
    weights = [(Path("all") / name / "weights/semantic" / NAME).read_bytes() for name in begun[2:]]
    assert weights[0] == weights[2] != weights[1], "the data are the same pictures, the seeds are not"
    assert recipe.load("all/pairs-seed4").seed == 4
    said = refuse("train", "all/sweep.yaml", "config.eta=5", "--out", "all", "--resume")
    assert "was begun with other settings" in said and "config.eta" in said
    assert "holds no sweep" in refuse("train", *of_two, "--out", "elsewhere", "--resume")
    assert "begin afresh" in refuse("train", *of_two, "--out", "new", "--init", "all/pairs-seed3")
    assert checkpoint.saved_steps(Path("all/pairs-seed4"))[-1].step == 2


def test_python_is_told_of_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pentimento\.sweep\.train_all"):
        run.train_run(recipe.load("pairedit", ["sweep.seeds=[1]"]), tmp_path / "run")
