"""Pairs in Parquet shards: MagicBrush (arXiv:2306.10012) and OmniEdit (arXiv:2411.07199) as their hub pages hold them.

Texts and scores are read when a data set is opened; pictures are read by row group, when they are wanted, and only a few
groups are kept, so that memory does not grow with the data set. Rows are counted from 0.
"""

import hashlib
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from . import files, images
from .errors import UserError, counted, first_line
from .layouts import entries_of, listed, nearest
from .method import Example

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

KEPT_BYTES = 256 * 2**20
"""Row groups up to about this size together are kept, in each process."""
KEPT_GROUPS = 2
"""So many are kept whatever their size, since threads that read in order meet at the border of two."""
NOISE = 32
"""MagicBrush's pictures lose a row in so many, at the bottom."""
SCORE = "o_score"
PART_SCORES = ("sc_score_1", "sc_score_2", "pq_score")
TASK = "task"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which files of a data set hold what in which columns."""

    name: str
    splits: tuple[str, ...]
    """Patterns of file names, in the order of the rows."""
    source: str
    target: str
    prompts: str
    """Column with the instruction, or with a list of alternatives."""
    noisy: bool = False
    """Its pictures have noise at the bottom."""
    graded: bool = False
    """Its rows have tasks and scores to choose by."""


LAYOUTS = {
    "magicbrush": Layout(
        name="magicbrush",
        splits=("train-*.parquet", "dev-*.parquet"),
        source="source_img",
        target="target_img",
        prompts="instruction",
        noisy=True,
    ),
    "omniedit": Layout(
        name="omniedit",
        splits=("*.parquet",),
        source="src_img",
        target="edited_img",
        prompts="edited_prompt_list",
        graded=True,
    ),
}
MIXES = {"icedit": ("magicbrush", "omniedit")}
"""Data sets put together from several, each in a folder of its name, in the order of their rows."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which rows are wanted, and how; see the fields of ``DataConfig``."""

    tasks: tuple[str, ...] = ()
    min_score: float | None = None
    crop_noise: bool = True


class Groups:
    """The row groups that were read last, of all shards of a data set.

    Several threads may ask; a copy in another process begins empty.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[Path, int], read: Callable[[], "pa.Table"]) -> "pa.Table":
        """The row group; read where it is not at hand, upon which those asked for longest ago may go."""
        with self._lock:
            if key not in self._kept:
                # Before reading, which needs several times the room for a moment.
                while (
                    len(self._kept) >= KEPT_GROUPS and sum(t.nbytes for t in self._kept.values()) > KEPT_BYTES
                ):
                    self._kept.popitem(last=False)
                self._kept[key] = read()
            self._kept.move_to_end(key)
            return self._kept[key]

    def __reduce__(self) -> tuple[type["Groups"], tuple[()]]:
        return Groups, ()


class Shard:
    """One Parquet file; its pictures by row and column."""

    def __init__(self, path: Path, layout: Layout, starts: Sequence[int], groups: Groups, *, crop: bool):
        self.path, self.layout, self.crop = path, layout, crop
        self._starts, self._groups = starts, groups
        self._sizes: dict[tuple[int, str], tuple[int, int]] = {}

    @property
    def rows(self) -> int:
        """How many it holds."""
        return self._starts[-1]

    @cached_property
    def file_size(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def name(self, row: int, column: str) -> str:
        """What to call a picture in messages."""
        return f"{self.path}, row {row}, {column}"

    def cell(self, row: int, column: str) -> bytes:
        """A picture as it is stored: the bytes of a PNG, a JPEG, ..."""
        number = bisect_right(self._starts, row) - 1
        table = self._groups.get((self.path, number), lambda: self._read(number))
        try:
            value = table.column(column)[row - self._starts[number]].as_py()
        except IndexError as error:
            raise UserError(f"{self.path}: has fewer rows than before; did the data set change?") from error
        if value is None or value["bytes"] is None:
            raise UserError(f"{self.name(row, column)}: the cell holds no picture")
        if not value["bytes"]:
            raise UserError(f"{self.name(row, column)}: the picture is empty (0 bytes)")
        data: bytes = value["bytes"]
        return data

    def _read(self, number: int) -> "pa.Table":
        columns = [f"{column}.bytes" for column in (self.layout.source, self.layout.target)]
        with opened(self.path) as file:
            if number >= file.num_row_groups:
                raise UserError(f"{self.path}: has fewer rows than before; did the data set change?")
            # Its own threads would not survive in the worker processes of a DataLoader.
            return file.read_row_group(number, columns=columns, use_threads=False)

    def image(self, row: int, column: str) -> Image:
        """A picture, decoded, upright, in its stored mode, without the noise."""
        image = images.decode(self.cell(row, column), self.name(row, column))
        width, height = image.size
        if self.crop:
            height -= height // NOISE
            image = image.crop((0, 0, width, height))
        self._sizes[row, column] = (width, height)
        return image

    def size(self, row: int, column: str) -> tuple[int, int]:
        """``(width, height)`` of ``image``; remembered, since the header lies in a row group of many megabytes."""
        if (row, column) not in self._sizes:
            width, height = images.decode_size(self.cell(row, column), self.name(row, column))
            self._sizes[row, column] = (width, height - height // NOISE if self.crop else height)
        return self._sizes[row, column]


@dataclass(frozen=True)
class Cell:
    """One picture of a shard."""

    shard: Shard
    row: int
    column: str

    def check(self) -> None:
        """Decode it; raises ``UserError`` naming it if it cannot be."""
        self.shard.image(self.row, self.column)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pair in a shard, its pictures not yet read. Source and target may differ in size, and even in aspect."""

    shard: Shard
    index: int
    """Number of the row in its shard."""
    prompts: tuple[str, ...]
    """Its instructions, exactly as stored, but without empty ones."""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    """The task, where the data set has tasks."""

    @property
    def key(self) -> str:
        """Data set, shard and row."""
        return f"{self.shard.layout.name}-{self.shard.path.stem}-{self.index:05d}"

    @property
    def size(self) -> tuple[int, int]:
        """``(width, height)`` of the source, upright; reads its header the first time."""
        return self.shard.size(self.index, self.shard.layout.source)

    def load(self) -> Example:
        """Decode the pictures, each in its own size and stored mode; raises ``UserError`` naming one that cannot be."""
        layout = self.shard.layout
        return Example(
            source=self.shard.image(self.index, layout.source),
            target=self.shard.image(self.index, layout.target),
            prompt=self.prompts[0],
            key=self.key,
            extra=self.extra,
        )

    def digest(self) -> str:
        """SHA-256 over what the pictures hold: independent of prompt, names and place. Computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(f"shard row 1 {self.shard.crop}".encode())
        for cell in self.pictures():
            digest.update(hashlib.sha256(self.shard.cell(cell.row, cell.column)).digest())
        return digest.hexdigest()

    def stamp(self) -> str:
        """Name, size and rows of the shard, and which row: the pictures of millions of rows are not read for it."""
        shard = self.shard
        return f"{shard.path.name} {shard.file_size} {shard.rows} {self.index} {shard.crop}"

    def pictures(self) -> tuple[Cell, Cell]:
        """Source and target."""
        layout = self.shard.layout
        return Cell(self.shard, self.index, layout.source), Cell(self.shard, self.index, layout.target)

    def places(self) -> dict[str, str | None]:
        """File, row and column."""
        source, target = (self.shard.name(cell.row, cell.column) for cell in self.pictures())
        return {"source": source, "target": target, "mask": None}


def open_shards(root: Path, kind: str, choice: Choice) -> list[Row]:
    """The rows of a data set of ``LAYOUTS`` or ``MIXES`` that are wanted, in their order.

    Raises ``UserError`` for folders that are missing or hold other shards, files that are damaged or no Parquet, other
    columns, rows without instruction or score, unknown tasks, and where no row is left.
    """
    groups = Groups()
    if kind not in MIXES:
        return _open_one(root, LAYOUTS[kind], choice, groups)
    return [row for name in MIXES[kind] for row in _open_one(root / name, LAYOUTS[name], choice, groups)]


def _open_one(root: Path, layout: Layout, choice: Choice, groups: Groups) -> list[Row]:
    rows: list[Row] = []
    tasks: set[str] = set()
    paths = _paths(root, layout)
    for path in paths:
        with opened(path) as file:
            try:
                texts = _texts(path, file, layout, choice)
            except UserError as error:
                beside = f"; {paths[0].name} beside it has other columns" if path != paths[0] else ""
                raise UserError(f"{error}{beside}") from error
            starts = [0]
            for number in range(file.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(number).num_rows)
        shard = Shard(path, layout, starts, groups, crop=choice.crop_noise and layout.noisy)
        tasks.update(filter(None, texts.get(TASK, ())))
        rows += [
            Row(
                shard=shard,
                index=index,
                prompts=_prompts(texts[layout.prompts][index]),
                extra={TASK: texts[TASK][index]} if TASK in texts else {},
            )
            for index in _chosen(path, texts, layout, choice)
        ]
    _check_rows(root, layout, choice, rows, tasks)
    return rows


def _check_rows(root: Path, layout: Layout, choice: Choice, rows: Sequence[Row], tasks: set[str]) -> None:
    for task in choice.tasks if layout.graded else ():
        if task not in tasks:
            near = nearest(task, tasks)
            raise UserError(
                f"data.tasks: no row of {root} has the task {task!r}{f'; the nearest is {near}' if near else ''}; there are: "
                f"{', '.join(sorted(tasks)) or 'none'}"
            )
    bare = [row.shard.name(row.index, layout.prompts) for row in rows if not row.prompts]
    if bare:
        raise UserError(
            f"{root}: an empty instruction in {len(bare)} of {counted(len(rows), 'row')}:{listed(bare)}"
        )
    if not rows:
        left = f" with a score of at least {choice.min_score:g}" if choice.min_score is not None else ""
        raise UserError(f"{root}: holds no rows{left} to train on")


def _paths(root: Path, layout: Layout) -> list[Path]:
    """The shards, split by split; they lie in the folder or, as on the hub, in its folder data/."""
    expected = f"the Parquet shards of {layout.name}, as `pentimento download` fetches them"
    folder = root
    found = _parquets(folder, expected)
    if not found and (root / "data").is_dir():
        folder = root / "data"
        found = _parquets(folder, expected)
    paths = [path for pattern in layout.splits for path in found if fnmatch(path.name, pattern)]
    known = " and ".join(layout.splits)
    stray = listed([path.name for path in found if path not in paths])
    if not paths and (root / layout.name).is_dir():
        raise UserError(
            f"{root}: holds no shard itself; set data.root={root / layout.name}, or data.kind=icedit for both sets"
        )
    if not paths:
        raise UserError(
            f"{folder}: holds no shard {known}; expected {expected}{stray and '; found:' + stray}"
        )
    if stray:
        raise UserError(f"{folder}: holds other Parquet files than {known}; move them elsewhere:{stray}")
    return paths


def _parquets(folder: Path, expected: str) -> list[Path]:
    return [path for path in entries_of(folder, expected) if path.suffix.lower() == ".parquet"]


@contextmanager
def opened(path: Path) -> Iterator["pq.ParquetFile"]:
    """An open Parquet file; what pyarrow raises inside becomes ``UserError``."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError("data.kind: Parquet needs the extra data: pip install 'pentimento[data]'") from error
    try:
        # A row group may hold more pictures than the 2 GiB that arrow's shorter offsets count.
        with pq.ParquetFile(path, binary_type=pa.large_binary(), pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {_what_is_wrong(path, error)}") from error


def _what_is_wrong(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as cause:
        return f"cannot be read ({cause.strerror})"
    if not start:
        return "the file is empty (0 bytes); download it again"
    if said := files.pointer(start, "the data"):
        return said
    if not start.startswith(b"PAR1"):
        return "is not a Parquet file, whatever its name says"
    return f"the file is damaged or cut off ({first_line(error)}); download it again"


def _texts(path: Path, file: "pq.ParquetFile", layout: Layout, choice: Choice) -> dict[str, list[Any]]:
    """The columns without pictures that are needed, after a check of all."""
    schema = file.schema_arrow
    task = (TASK,) if layout.graded and choice.tasks else ()
    for column in (layout.source, layout.target, layout.prompts, *task):
        if column not in schema.names:
            raise UserError(f"{path}: has no column {column}{_meant(column, layout, schema.names)}")
    for column in (layout.source, layout.target):
        if not _holds_pictures(schema.field(column).type):
            raise UserError(
                f"{path}: the column {column} holds {schema.field(column).type}, not pictures (a struct with the field "
                "bytes, as the library datasets writes it)"
            )
    if not _holds_texts(schema.field(layout.prompts).type):
        raise UserError(
            f"{path}: the column {layout.prompts} holds {schema.field(layout.prompts).type}, not texts"
        )
    scores = (SCORE, *PART_SCORES) if choice.min_score is not None else ()
    optional = [name for name in (TASK, *scores) if layout.graded and name in schema.names]
    texts: dict[str, list[Any]] = file.read(
        columns=[layout.prompts, *optional], use_threads=False
    ).to_pydict()
    return texts


def _holds_pictures(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return bool(types.is_binary(kind.field("bytes").type) or types.is_large_binary(kind.field("bytes").type))


def _holds_texts(kind: "pa.DataType") -> bool:
    """Texts, or lists of texts."""
    from pyarrow import types

    inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    return bool(types.is_string(inner) or types.is_large_string(inner))


def _meant(column: str, layout: Layout, names: Sequence[str]) -> str:
    """A hint at what may be wrong where a column is missing."""
    for other in LAYOUTS.values():
        if other is not layout and {other.source, other.target, other.prompts} <= set(names):
            return f"; its columns are those of {other.name}, so set data.kind={other.name}"
    near = nearest(column, names)
    return f"{f'; the nearest is {near}' if near else ''}; its columns: {', '.join(names)}"


def _chosen(path: Path, texts: Mapping[str, Sequence[Any]], layout: Layout, choice: Choice) -> list[int]:
    """Numbers of the rows that are wanted."""
    indices = list(range(len(texts[layout.prompts])))
    if not layout.graded:
        return indices
    if choice.tasks:
        indices = [index for index in indices if texts[TASK][index] in choice.tasks]
    if choice.min_score is None:
        return indices
    scores = {index: _score(texts, index) for index in indices}
    bare = [f"row {index}" for index, score in scores.items() if score is None]
    if bare:
        columns = ", ".join((SCORE, *PART_SCORES))
        raise UserError(
            f"{path}: no score (in {columns}) in {len(bare)} of {counted(len(indices), 'row')}, so data.min_score cannot choose; "
            f"leave it out, or leave out the shard:{listed(bare)}"
        )
    return [index for index, score in scores.items() if score is not None and score >= choice.min_score]


def _score(texts: Mapping[str, Sequence[Any]], index: int) -> float | None:
    """The overall score of a row, else the mean of its partial ones; ``None`` where it has neither."""
    for columns in ((SCORE,), PART_SCORES):
        values = [texts[name][index] for name in columns if name in texts]
        values = [float(value) for value in values if value is not None and math.isfinite(value)]
        if values:
            return sum(values) / len(values)
    return None


def _prompts(value: str | Sequence[str | None] | None) -> tuple[str, ...]:
    """The instructions of a cell, unchanged; those that hold no letter or sign are left out."""
    texts = [value] if isinstance(value, str) else value or []
    return tuple(text for text in texts if text and text.strip())
