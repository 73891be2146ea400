"""The command line in-process, a small data set, and settings that train a tiny model in a moment."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pentimento import cli

Call = Callable[..., Result]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in an empty folder; anything but a clean exit is an error here."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == code, f"{result.output}{result.stderr}"
        return result

    return invoke


@pytest.fixture
def refuse(call: Call) -> Callable[..., str]:
    """Run a command that must fail as a user's mistake: one message, exit code 2; returns the message."""

    def invoke(*arguments: object) -> str:
        said = call(*arguments, code=2).stderr
        assert said.startswith("pentimento: error: ")
        assert said.count("pentimento: error: ") == 1
        assert "Traceback" not in said
        return said.removeprefix("pentimento: error: ")

    return invoke


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs of 48x32: a grey level and its negative."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    for side in ("source", "target", "prompts"):
        (folder / side).mkdir(parents=True)
    for number in range(6):
        level = 40 * number
        Image.new("RGB", (48, 32), (level, 128, level)).save(folder / "source" / f"{number}.png")
        Image.new("RGB", (48, 32), (255 - level, 127, 255 - level)).save(folder / "target" / f"{number}.png")
        (folder / "prompts" / f"{number}.txt").write_text("make it negative")
    return folder


@pytest.fixture(scope="module")
def settings(pairs: Path, tiny_fill: Path) -> list[str]:
    """Overrides that make a shipped recipe train two steps of a tiny model in a moment."""
    return [
        f"backbone.weights={tiny_fill}",
        "backbone.device=cpu",
        f"data.root={pairs}",
        "data.held_out=2",
        "config.max_sequence_length=16",
        "config.steps=2",
        "config.lora.rank=2",
        "config.lora.alpha=2",
        "stages.edit.steps=2",
        "stages.edit.optimizer=adamw",
        "stages.edit.lr=0.05",
        "stages.edit.accumulate=1",
        "stages.edit.save_every=1",
        "stages.edit.keep_last=5",
        "watch.every=0",
    ]


def train(recipe: str, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train into a folder of its own; returns it."""
    folder = tmp_path_factory.mktemp("runs") / recipe
    result = CliRunner().invoke(
        cli.app, ["train", recipe, *settings, "--out", str(folder)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(folder)
    return folder


@pytest.fixture(scope="module")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; do not write to it."""
    return train("influxedit-edit", settings, tmp_path_factory)


@pytest.fixture(scope="module")
def dev_settings(pairs: Path, tiny_dev: Path) -> list[str]:
    """Overrides that make a slider's recipe train two steps of a tiny model in a moment."""
    return [
        f"backbone.weights={tiny_dev}",
        "backbone.device=cpu",
        f"data.root={pairs}",
        "config.max_sequence_length=16",
        "config.resolution=32",
        "config.steps=3",
        "config.skip=0",
        "config.lora.rank=2",
        "stages.pair.steps=2",
        "stages.pair.lr=0.05",
        "stages.pair.save_every=1",
    ]


@pytest.fixture(scope="module")
def slider(dev_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of PairEdit; do not write to it."""
    return train("pairedit", dev_settings, tmp_path_factory)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((50, 30)).convert("RGB").save(path)
    return path


@pytest.fixture
def own_pairs(pairs: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to be spoilt."""
    return Path(shutil.copytree(pairs, tmp_path / "own"))
