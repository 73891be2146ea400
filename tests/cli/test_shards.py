"""Parquet shards from the command line: checked, shown and trained on like any other data set."""

import json
import shutil
from pathlib import Path

import pytest
import shards
from PIL import Image


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both public sets in small; do not write to it."""
    return shards.mix(tmp_path_factory.mktemp("data") / "mix")


@pytest.fixture
def onto(settings: list[str], mix: Path) -> list[str]:
    """The settings of a quick training, on the mix."""
    return [*settings, f"data.root={mix}", "data.kind=icedit", "config.resolution=32"]


def test_dry_run_counts_rows_instructions_and_sizes(call, onto: list[str]) -> None:
    printed = call("train", "influxedit-edit", *onto, "--dry-run").stdout
    assert "8 pairs to train on, 2 held out" in printed
    assert "32x16 (8 pairs)" in printed
    chosen = ("data.tasks=[swap]", "data.min_score=8.3", "data.held_out=0")
    printed = call("train", "influxedit-edit", *onto, *chosen, "--dry-run").stdout
    assert "6 pairs to train on, 0 held out, 7 different prompts" in printed


@pytest.mark.parametrize("recipe", ["influxedit-edit", "influxedit-split"])
def test_show_says_where_a_row_lies_and_what_else_it_may_be_told(
    call, onto: list[str], mix: Path, recipe: str
) -> None:
    call("show", recipe, *onto, "--index", 6, "--out", "seen")
    key = "omniedit-train-00000-of-00105-00001"
    about = json.loads(Path(f"seen/{key}.json").read_text())
    assert (about["prompt"], about["alternatives"]) == ("omni 1", ["omni 1 in other words"])
    shard = mix / "omniedit" / "data" / "train-00000-of-00105.parquet"
    assert about["files"] == {
        "source": f"{shard}, row 1, src_img",
        "target": f"{shard}, row 1, edited_img",
        "mask": None,
    }
    assert about["size"] == [24, 16] and Path(f"seen/{key}-condition.png").is_file()


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_training_takes_pictures_of_every_mode(call, settings: list[str], cache: str) -> None:
    """Grey, palette, transparent and CMYK pictures, as held-out ones too."""
    drawn = shards.noise(0)
    cells = [
        shards.cell(drawn.convert("L")),
        shards.cell(drawn.quantize(8)),
        shards.cell(drawn.convert("RGBA")),
        shards.cell(drawn.convert("CMYK"), "TIFF"),
    ]
    rows = [shards.magic(n, source_img=cell, target_img=cells[n - 1]) for n, cell in enumerate(cells)]
    shards.write(Path("set/train-0.parquet"), rows)
    where = ["data.root=set", "data.kind=magicbrush", "config.resolution=32", f"data.cache={cache}"]
    watch = ["data.workers=1", "watch.every=2", "watch.count=2", "watch.steps=1"]
    call("train", "influxedit-edit", *settings, *where, *watch, "--out", "run")
    with Image.open("run/samples/edit-000002.png") as sheet:
        assert sheet.width > 3 * 24
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert {"held_out_loss", "held_out_psnr"} <= set(metrics[-1])


def test_a_resumed_training_draws_the_same_instructions(call, onto: list[str]) -> None:
    def weights(run: str) -> bytes:
        return Path(f"{run}/weights/pytorch_lora_weights.safetensors").read_bytes()

    call("train", "influxedit-edit", *onto, "stages.edit.steps=4", "--out", "whole")
    call("train", "influxedit-edit", *onto, "--out", "half")
    call("train", "half", "--resume", "stages.edit.steps=4")
    assert weights("half") == weights("whole")


def _schema(root: Path) -> None:
    shards.write(root / "omniedit" / "data" / "train-00566-of-00571.parquet", [shards.magic(0)])


def _instruction(root: Path) -> None:
    shards.write(root / "magicbrush" / "data" / "dev-0.parquet", [shards.magic(0, instruction=" ")])


def _cut(root: Path) -> None:
    path = root / "omniedit" / "data" / "train-00000-of-00105.parquet"
    path.write_bytes(path.read_bytes()[:-50])


def _broken(root: Path) -> None:
    cell = {"bytes": shards.cell(shards.noise(0, (64, 64)))["bytes"][:500], "path": None}
    shards.write(root / "magicbrush" / "data" / "dev-0.parquet", [shards.magic(0, target_img=cell)])


def _animated(root: Path) -> None:
    cell = shards.cell(shards.noise(0), "GIF", save_all=True, append_images=[shards.noise(1)])
    shards.write(root / "magicbrush" / "data" / "dev-0.parquet", [shards.magic(0, source_img=cell)])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_schema, "has no column src_img"),
        (_instruction, "dev-0.parquet, row 0, instruction"),
        (_cut, "damaged or cut off"),
        (_broken, "dev-0.parquet, row 0, target_img: the picture is damaged"),
        (_animated, "dev-0.parquet, row 0, source_img: holds 2 frames"),
        (lambda root: shutil.rmtree(root / "omniedit"), "omniedit: there is no such folder"),
    ],
)
def test_a_spoilt_data_set(refuse, onto: list[str], mix: Path, spoil, words: str) -> None:
    root = Path(shutil.copytree(mix, "own"))
    spoil(root)
    assert words in refuse("train", "influxedit-edit", *onto, f"data.root={root}", "--dry-run")
    assert words in refuse("train", "influxedit-edit", *onto, f"data.root={root}", "--out", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.tasks=[swaps]", "the nearest is swap"),
        ("data.tasks=swap", "data.tasks should be a list"),
        ("data.min_score=high", "data.min_score should be a number"),
        ("data.prompt=a", "override data.prompt=a: data.prompt has no meaning with data.kind=icedit"),
        ("data.kind=omniedits", "Did you mean omniedit?"),
        ("data.kind=omniedit", "or data.kind=icedit for both sets"),
    ],
)
def test_settings_that_cannot_be(refuse, onto: list[str], override: str, words: str) -> None:
    assert words in refuse("train", "influxedit-edit", *onto, override, "--dry-run")
