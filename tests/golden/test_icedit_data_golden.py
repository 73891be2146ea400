"""ICEdit's training samples against those of the reference's dataset classes, pixel for pixel.

The recorded pictures are written to Parquet shards first. The subset beside this file (rows in four modes, the smaller size)
runs always; ``pytest -m golden --golden DIR`` runs every row and size of an unpacked recording.

The reference draws instructions and dropped texts with Python's ``random``, which is not imitated: checked is that the drawn
ones are the same set. A dropped text, " " or "" there depending on the class, is "" here, for the method to turn into what it
wants.

The reference leaves the scaling to Pillow, and so do we. Recorded with Pillow 13, which begins with the height where a picture
is much taller than its square; older ones begin with the width, and their pixels differ.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import shards
import torch
import toy
from PIL import Image

from pentimento import images
from pentimento.cache import Loaded, Samples
from pentimento.data import DataConfig, Pair, open_data, verify
from pentimento.method import Example
from pentimento.train import Draws

pytestmark = pytest.mark.golden
RECORDING = ("icedit", "train_normal")

SUBSET = Path(__file__).parent / "icedit_data"
SAME = "A diptych with two side-by-side images of the same scene. On the right, the scene is exactly the same as on the left"
PREFIXES = {"edit": f"{SAME} but ", "edit_n": f"{SAME}. \n "}
KINDS: dict[str, dict[str, Any]] = {
    "edit": {"kind": "magicbrush"},
    "edit_mask": {"kind": "magicbrush"},
    "edit_nocrop": {"kind": "magicbrush", "crop_noise": False},
    "omini": {"kind": "omniedit"},
    "mixed": {"kind": "icedit"},
}
"""Dataset classes of the reference, and settings, as settings of ours."""

TALL = {"m2", "o2"}
"""Pictures whose pixels depend on Pillow's version."""
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13

Opened = Callable[[str], dict[int, Pair]]


def recorded(root: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((root / "data.json").read_text())
    return record


def cell(path: Path) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": path.name}


def write(root: Path, folder: Path) -> None:
    """Shards of the rows whose pictures are there, in several files and row groups."""
    record = recorded(root)
    for split in ("train", "dev"):
        rows = [
            {
                "source_img": cell(root / f"{row['name']}_source.png"),
                "target_img": cell(root / f"{row['name']}_target.png"),
                "instruction": f"magic instruction {number}",
            }
            for number, row in enumerate(record["magic_rows"])
            if row["split"] == split and (root / f"{row['name']}_source.png").exists()
        ]
        shards.write(folder / "magicbrush" / "data" / f"{split}-00000-of-00001.parquet", rows)
    for number, row in enumerate(record["omni_rows"]):
        if (root / f"{row['name']}_source.png").exists():
            made = {
                "task": row["task"],
                "src_img": cell(root / f"{row['name']}_source.png"),
                "edited_img": cell(root / f"{row['name']}_target.png"),
                "edited_prompt_list": row["edited_prompt_list"],
            }
            shards.write(folder / "omniedit" / "data" / f"train-{number:05d}-of-00105.parquet", [made])


def names(root: Path, kind: str) -> list[str]:
    """What the recording calls the rows of a data set, in their order."""
    record = recorded(root)
    sets = {"magicbrush": record["magic_rows"], "omniedit": record["omni_rows"]}
    sets["icedit"] = [*sets["magicbrush"], *sets["omniedit"]]
    return [row["name"] for row in sets[kind]]


def opener(root: Path, folder: Path) -> Opened:
    """Our rows by the reference's index, for a class of the reference."""
    write(root, folder)

    def rows(name: str) -> dict[int, Pair]:
        options = KINDS[name]
        kind = options["kind"]
        place = folder if kind == "icedit" else folder / kind
        there = [i for i, one in enumerate(names(root, kind)) if (root / f"{one}_source.png").exists()]
        return dict(zip(there, open_data(DataConfig(root=str(place), **options)), strict=True))

    return rows


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opener(SUBSET, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def everything(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opener(golden_dir / "data", tmp_path_factory.mktemp("shards"))


def sha(picture: Image.Image) -> str:
    """As recorded: of the bytes, channels first."""
    array = np.atleast_3d(np.asarray(picture))
    return hashlib.sha256(array.transpose(2, 0, 1).tobytes()).hexdigest()


def check_case(root: Path, case: str, opened: Opened) -> list[str]:
    """All of a case's samples; returns the names of those whose pixels were compared."""
    about = recorded(root)["cases"][case]
    name, size = case.rsplit("_", 1)
    rows = opened(name)
    assert [sample["idx"] for sample in about["samples"]] == [*rows][: len(about["samples"])]
    assert about["samples"] and about["size"] == int(size)
    compared = []
    for sample in about["samples"]:
        row = rows[sample["idx"]]
        example = row.load()
        diptych = images.join(
            *(images.panel(side, (about["size"], about["size"])) for side in (example.source, example.target))
        )
        assert [3, diptych.height, diptych.width] == sample["image_shape"]
        called = names(root, KINDS[name]["kind"])[sample["idx"]]
        if called not in TALL or PILLOW_13:
            check_pixels(diptych, sample, root)
            compared.append(called)
        check_mask(images.half_mask(diptych.size), sample)
        prefix = PREFIXES[sample["condition_type"]]
        dropped = not sample["description"].strip()
        assert dropped or sample["description"] in {prefix + prompt for prompt in row.prompts}
    return compared


def to_compare(root: Path, case: str) -> list[str]:
    """Names of a case's samples, less those that an older Pillow scales otherwise."""
    every = names(root, KINDS[case.rsplit("_", 1)[0]]["kind"])
    recorded_names = [every[sample["idx"]] for sample in recorded(root)["cases"][case]["samples"]]
    return [name for name in recorded_names if name not in TALL or PILLOW_13]


def check_pixels(diptych: Image.Image, sample: dict[str, Any], root: Path) -> None:
    assert sha(diptych) == sample["image_sha256"]
    if (root / sample["image"]).exists():
        with Image.open(root / sample["image"]) as theirs:
            assert np.array_equal(np.asarray(diptych), np.asarray(theirs))


def check_mask(mask: Image.Image, sample: dict[str, Any]) -> None:
    values = np.asarray(mask)
    assert sha(mask) == sample["condition_sha256"]
    assert [1, *values.shape] == sample["condition_shape"]
    assert values.any(axis=0).argmax() == sample["mask_first_col"]
    assert float((values / 255).sum()) == sample["mask_sum"]


def told(rows: list[Pair], dropout: float = 0.0, steps: int = 80) -> list[list[str]]:
    """The texts that a method is given of each row, step by step."""
    heard: list[str] = []
    method = toy.Toy()

    def encode_text(prompts: list[str]) -> dict[str, torch.Tensor]:
        heard.extend(prompts)
        return {}

    method.encode_text = encode_text  # type: ignore[method-assign]
    method.encode = lambda examples: {}  # type: ignore[method-assign]
    samples = Samples(rows, method, cache="off", caption_dropout=dropout)
    for step in range(steps):
        draws = Draws([(7, "edit", step, position) for position in range(len(rows))], torch.device("cpu"))
        without_pictures = Loaded(indices=[*range(len(rows))], examples=[Example()] * len(rows))
        samples.batch(without_pictures, draws)
    return [heard[index :: len(rows)] for index in range(len(rows))]


def check_trace(root: Path, name: str, opened: Opened) -> float:
    """The reference's sixty descriptions are among ours, and all of ours where each row comes often enough.

    Returns the share of dropped texts, of which a tenth is asked for.
    """
    record = recorded(root)
    trace = record["description_trace_seed7"][name]
    length = record["cases"][f"{name}_64"]["len"]
    assert any(not text.strip() for text in trace)
    rows = opened(name)
    for (index, row), texts in zip(rows.items(), told([*rows.values()]), strict=True):
        theirs = {text for text in trace[index::length] if text.strip()}
        ours = {PREFIXES["edit"] + text for text in texts}
        assert theirs <= ours == {PREFIXES["edit"] + prompt for prompt in row.prompts}
        if len(trace) // length >= 4 * len(row.prompts):
            assert theirs == ours
    every = [text for texts in told([*rows.values()], dropout=0.1) for text in texts]
    return every.count("") / len(every)


@pytest.mark.parametrize("case", ["edit_64", "edit_mask_64", "edit_nocrop_64", "omini_64", "mixed_64"])
def test_samples_of_the_subset(subset: Opened, case: str) -> None:
    assert check_case(SUBSET, case, subset) == to_compare(SUBSET, case)


def test_the_subset_has_every_mode(subset: Opened) -> None:
    rows = subset("mixed")
    verify(rows.values())
    assert {row.load().source.mode for row in rows.values()} == {"RGBA", "P", "L", "RGB"}


@pytest.mark.parametrize("name", ["edit", "omini", "mixed"])
def test_descriptions_of_the_subset(subset: Opened, name: str) -> None:
    assert 0.05 < check_trace(SUBSET, name, subset) < 0.16


@pytest.mark.parametrize(
    "case", ["edit_64", "edit_mask_64", "edit_nocrop_64", "omini_64", "mixed_64", "edit_512", "omini_512"]
)
def test_samples(everything: Opened, golden_dir: Path, case: str) -> None:
    root = golden_dir / "data"
    assert check_case(root, case, everything) == to_compare(root, case)


def test_the_recorded_mask(golden_dir: Path) -> None:
    theirs = Image.open(golden_dir / "data" / "condition_512.png")
    assert np.array_equal(np.asarray(images.half_mask((1024, 512))), np.asarray(theirs))


@pytest.mark.parametrize("name", ["edit", "omini", "mixed"])
def test_descriptions(everything: Opened, golden_dir: Path, name: str) -> None:
    assert 0.05 < check_trace(golden_dir / "data", name, everything) < 0.16


def test_rows_of_some_tasks(golden_dir: Path, everything: Opened, tmp_path: Path) -> None:
    """As many as the reference keeps with its list of tasks."""
    write(golden_dir / "data", tmp_path)
    chosen = DataConfig(root=str(tmp_path / "omniedit"), kind="omniedit", tasks=("removal", "style"))
    assert len(open_data(chosen)) == recorded(golden_dir / "data")["specific_task_len"]
