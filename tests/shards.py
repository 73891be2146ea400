"""Parquet shards as the hub holds them, small: pictures are structs of bytes and path, next to texts and numbers."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MAGICBRUSH = pa.schema(
    [
        ("img_id", pa.string()),
        ("turn_index", pa.int32()),
        ("source_img", PICTURE),
        ("mask_img", PICTURE),
        ("instruction", pa.string()),
        ("target_img", PICTURE),
    ]
)
OMNIEDIT = pa.schema(
    [
        ("omni_edit_id", pa.string()),
        ("task", pa.string()),
        ("src_img", PICTURE),
        ("edited_img", PICTURE),
        ("edited_prompt_list", pa.list_(pa.string())),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("sc_score_1", pa.int64()),
        ("sc_score_2", pa.int64()),
        ("sc_reasoning", pa.string()),
        ("pq_score", pa.int64()),
        ("o_score", pa.float64()),
    ]
)


def noise(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture like no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def cell(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    """A picture as a cell holds it."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return {"bytes": file.getvalue(), "path": "picture"}


def magic(seed: int, **changes: Any) -> dict[str, Any]:
    """A row of MagicBrush."""
    row = {
        "img_id": str(seed),
        "turn_index": 1,
        "source_img": cell(noise(seed)),
        "mask_img": {"bytes": b"never read", "path": None},
        "instruction": f"magic {seed}",
        "target_img": cell(noise(1000 + seed)),
    }
    return {**row, **changes}


def omni(seed: int, **changes: Any) -> dict[str, Any]:
    """A row of OmniEdit."""
    row = {
        "omni_edit_id": f"task_{seed}",
        "task": ("removal", "swap", "style")[seed % 3],
        "src_img": cell(noise(2000 + seed)),
        "edited_img": cell(noise(3000 + seed)),
        "edited_prompt_list": [f"omni {seed}", f"omni {seed} in other words"],
        "height": 16,
        "width": 24,
        "sc_score_1": 9,
        "sc_score_2": 10,
        "sc_reasoning": "because",
        "pq_score": 8,
        "o_score": 8.0 + seed / 10,
    }
    return {**row, **changes}


def write(
    path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None, group: int = 2
) -> Path:
    """Write a shard with ``group`` rows in each row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = schema or (MAGICBRUSH if "source_img" in rows[0] else OMNIEDIT)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=group)
    return path


def magicbrush(folder: Path) -> Path:
    """Five rows in two splits, the second of which comes first by name."""
    write(folder / "data" / "train-00000-of-00002-5a1c.parquet", [magic(0), magic(1), magic(2)])
    write(folder / "data" / "train-00001-of-00002-77fe.parquet", [magic(3)])
    write(folder / "data" / "dev-00000-of-00001-c0de.parquet", [magic(4)])
    return folder


def omniedit(folder: Path) -> Path:
    """Five rows of two repositories, each with two instructions."""
    write(folder / "data" / "train-00000-of-00105.parquet", [omni(0), omni(1), omni(2)])
    write(folder / "data" / "train-00100-of-00571.parquet", [omni(3), omni(4)])
    return folder


def mix(folder: Path) -> Path:
    """Both."""
    magicbrush(folder / "magicbrush")
    omniedit(folder / "omniedit")
    return folder
