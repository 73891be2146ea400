"""Data sets of before/after pairs: what lies in folders, JSONL files and shards, checked strictly before anything is trained.

A pair whose other half has a slightly different name is an error with the nearest name, never a guess and never left out:
trainers that leave such pairs out silently, or shift the rest up, learn from the wrong partners.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

from . import images, parquet
from .errors import UserError, counted
from .layouts import Found, listed, scan_jsonl, scan_pairs, scan_picture, scan_side_by_side, scan_splits
from .method import Example

ASPECT_TOLERANCE = 1.02  # a target 2 % wider than its source is a crop, not rounding
SCANS: Mapping[str, Callable[[Path], tuple[list[Found], str]]] = {
    "pairs": scan_pairs,
    "side_by_side": scan_side_by_side,
    "jsonl": scan_jsonl,
    "picture": scan_picture,
    "infinity": scan_splits,
}
"""Kinds whose pictures are files of their own."""
USED_BY = {
    "prompt": tuple(SCANS),
    "mask_white": ("pairs", "side_by_side", "jsonl"),
    "match": ("pairs",),
    "tasks": ("omniedit", "icedit"),
    "min_score": ("omniedit", "icedit"),
    "crop_noise": ("magicbrush", "icedit"),
}
"""Fields that not every kind of data set has a use for."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The recipe's ``data`` section."""

    root: str = ""
    """Folder of the data set; for ``jsonl`` the file, or a folder that holds one such file."""
    kind: Literal[
        "pairs", "side_by_side", "jsonl", "magicbrush", "omniedit", "icedit", "picture", "infinity", "none"
    ] = "pairs"
    """``pairs``: folders source/ and target/ (or train_A/ and train_B/, or control/ and target/), files matched by stem.
    ``side_by_side``: one folder of double-wide pictures, left before, right after. ``jsonl``: one JSON object per line with
    the fields source, target, prompt, mask (paths relative to the file; the names of other trainers are understood).
    For the first two, prompts lie in prompts/STEM.txt, train_prompts.json, or STEM.txt beside the target, and masks in
    masks/. ``magicbrush``, ``omniedit``: Parquet shards of these public sets (``pentimento download``), in root or its
    folder data/; ``icedit``: the former in root/magicbrush, then the latter in root/omniedit. ``picture``: root is one picture
    file, for methods that learn one by heart; ``infinity``: captioned pictures of a JSONL file of Infinity's, such as EditInfinity's
    splits (root: the file, its folder, or the case). ``none``: no pictures, for methods that learn from words."""
    match: Literal["stem", "position"] = "stem"
    """``pairs``: what makes two files a pair: stem, the same name but for its ending; position, their place in the order of
    names."""
    prompt: str | None = None
    """Instruction of every pair for which the data set has none; "" trains without one."""
    mask_white: Literal["change", "keep"] = "change"
    """What white means in masks: where the picture may change, or what must be kept (EditInfinity's own files)."""
    tasks: tuple[str, ...] = ()
    """OmniEdit: use only rows of these tasks, such as removal, swap, style; none named: all."""
    min_score: float | None = None
    """OmniEdit: use only rows whose o_score (where that is absent, the mean of sc_score_1, sc_score_2 and pq_score) is at
    least this; none: all, as the published training did."""
    crop_noise: bool = True
    """MagicBrush: cut the lowest 1/32 off source and target, as the published training does because of noise there."""
    limit: int | None = None
    """Use only the first so many pairs, in the order of their names (of a JSONL file: of its lines); none: all."""
    held_out: int = 4
    """Pairs kept out of training for samples and held-out loss; the choice depends on the names of the pairs alone."""
    held_out_root: str | None = None
    """Another data set of the same kind whose pairs serve for that instead; then all of ``root`` is trained on."""
    caption_dropout: float = 0.0
    """Probability with which a pair's prompt is replaced by the empty one in a step, 0 to 1."""
    workers: int = 0
    """Processes that load pictures beside training; 0 loads them in the training process."""
    cache: Literal["memory", "disk", "off"] = "memory"
    """Where encoded pictures and prompts are kept, so that each is encoded once; ``off`` encodes in every step."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"data.limit is the number of pairs to use, at least 1, not {self.limit}")
        if self.held_out < 0:
            raise UserError(f"data.held_out is a number of pairs, 0 or more, not {self.held_out}")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"data.caption_dropout is a probability from 0 to 1, not {self.caption_dropout}")
        if self.workers < 0:
            raise UserError(f"data.workers is a number of processes, 0 or more, not {self.workers}")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise UserError(f"data.min_score is the lowest score to use, not {self.min_score}")
        for one in fields(self):
            kinds = USED_BY.get(one.name, (self.kind,))
            if self.kind not in kinds and getattr(self, one.name) != one.default:
                raise UserError(
                    f"data.{one.name} has no meaning with data.kind={self.kind}, only with {', '.join(kinds)}; leave it out"
                )


class Picture(Hashable, Protocol):
    """One stored picture; equal ones are the same picture."""

    def check(self) -> None:
        """Decode it; raises ``UserError`` naming it if it cannot be."""


class Pair(Protocol):
    """One pair wherever it lies, its pictures not yet decoded: what all shared code knows of a data set."""

    @property
    def key(self) -> str:
        """Name of the sample, unique in its data set and usable as a file name."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Its instructions, at least one; training draws one of them for each step."""

    @property
    def size(self) -> tuple[int, int]:
        """``(width, height)`` of the source, upright; may have to read the picture's header first."""

    @property
    def extra(self) -> dict[str, Any]:
        """Further fields of the data set."""

    def load(self) -> Example:
        """Decode the pictures, each in its own size; the prompt is the first. Raises ``UserError`` naming what cannot be."""

    def digest(self) -> str:
        """SHA-256 over what the pictures hold: independent of prompt, names and place. Computed once."""

    def stamp(self) -> str:
        """Text that changes with the stored pictures: their digest, or what tells it without reading much."""

    def pictures(self) -> tuple[Picture, ...]:
        """The stored pictures that it is made of."""

    def places(self) -> Mapping[str, str | None]:
        """Where source, target and mask lie, in words."""


@dataclass(frozen=True)
class PictureFile:
    """A picture or a mask in a file of its own."""

    path: Path
    is_mask: bool = False

    def check(self) -> None:
        """Decode it; raises ``UserError`` naming it if it cannot be."""
        images.open_mask(self.path) if self.is_mask else images.open_image(self.path)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pair of files as found, its pictures not yet decoded."""

    key: str
    """Name of the sample, unique in its data set and usable as a file name."""
    source: Path
    target: Path
    prompt: str
    size: tuple[int, int]
    """``(width, height)`` of the source, upright; the target has the same aspect but may have another size."""
    mask: Path | None = None
    mask_white: Literal["change", "keep"] = "change"
    more_prompts: tuple[str, ...] = ()
    """Further ones, of which one is drawn for each step."""
    side_by_side: bool = False
    """``source`` and ``target`` are one file, of which they are the left and right half."""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further fields of a JSONL line."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The one prompt, or all that it has."""
        return (self.prompt, *self.more_prompts)

    def load(self) -> Example:
        """Decode the pictures, each in its own size; raises ``UserError`` naming a file that cannot be."""
        if self.side_by_side:
            source, target = images.split(images.open_image(self.source))
        else:
            source, target = images.open_image(self.source), images.open_image(self.target)
        mask = images.open_mask(self.mask, white=self.mask_white) if self.mask else None
        return Example(
            source=source, target=target, prompt=self.prompt, mask=mask, key=self.key, extra=self.extra
        )

    def digest(self) -> str:
        """SHA-256 over what the pictures hold: independent of prompt, names and place. Computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(
            f"row 1 {self.side_by_side} {self.mask_white if self.mask else None}".encode()
        )
        for path in (self.source, None if self.side_by_side else self.target, self.mask):
            digest.update(_file_digest(path) if path else bytes(32))
        return digest.hexdigest()

    def stamp(self) -> str:
        """The digest."""
        return self.digest()

    def pictures(self) -> tuple[PictureFile, ...]:
        """The files; source and target may be one."""
        pair = (PictureFile(self.source), PictureFile(self.target))
        return (*pair, PictureFile(self.mask, is_mask=True)) if self.mask else pair

    def places(self) -> dict[str, str | None]:
        """Paths of the files."""
        paths = {"source": self.source, "target": self.target, "mask": self.mask}
        return {name: str(path) if path else None for name, path in paths.items()}


@dataclass(frozen=True)
class Blank:
    """The one sample of ``data.kind=none``."""

    key: str = "none"
    prompts: tuple[str, ...] = ("",)
    size: tuple[int, int] = (1, 1)

    @property
    def extra(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load(self) -> Example:
        """An example without pictures."""
        return Example(key=self.key)

    def digest(self) -> str:
        """Always the same."""
        return self.key

    def stamp(self) -> str:
        """The digest."""
        return self.key

    def pictures(self) -> tuple[Picture, ...]:
        """None."""
        return ()

    def places(self) -> dict[str, str | None]:
        """None."""
        return {}


def open_data(config: DataConfig) -> list[Pair]:
    """Find the pairs of a data set, read their prompts, and check all that names, headers and columns can tell.

    Raises ``UserError`` for folders that are missing, empty or unreadable, pictures without partner (with the nearest name),
    two pictures of one stem, stray files, unreadable headers, pairs of different aspect, missing prompts, broken JSONL, and
    shards that are damaged or have other columns. Pictures within shards are not looked at yet, see ``verify``.
    """
    if config.kind == "none":
        if config.root:
            raise UserError(f"data.root is {config.root}, but data.kind=none has no pictures; leave it out")
        return [Blank()]
    if not config.root:
        raise UserError("data.root is empty; give the folder that holds the data set")
    root = Path(config.root).expanduser()
    if config.kind in SCANS:
        return [*_open_files(root, config)]
    chosen = parquet.Choice(tasks=config.tasks, min_score=config.min_score, crop_noise=config.crop_noise)
    return [*parquet.open_shards(root, config.kind, chosen)[: config.limit]]


def _open_files(root: Path, config: DataConfig) -> list[Row]:
    scan = partial(scan_pairs, by_position=True) if config.match == "position" else SCANS[config.kind]
    found, where = scan(root)
    found = found[: config.limit]
    bare = [one.key for one in found if not one.prompt]
    if bare and config.prompt is None:
        raise UserError(
            f"{root}: no prompt for {len(bare)} of {counted(len(found), 'pair')}; it is looked for in {where}. Write the prompts "
            f'there, or give all the same with data.prompt="..." ("" trains without).{listed(bare)}'
        )
    rows, problems = [], []
    for one in found:
        try:
            rows.append(_row(one, config))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f"{root}: {len(problems)} of {counted(len(found), 'pair')} cannot be used:{listed(problems)}"
        )
    return rows


def _row(one: Found, config: DataConfig) -> Row:
    width, height = images.read_size(one.source)
    if one.side_by_side:
        if width % 2:
            raise UserError(f"{one.source}: {width}x{height} has no two halves; the width must be even")
        width //= 2
    else:
        _check_aspect(one.source, (width, height), one.target, images.read_size(one.target))
    if one.mask:
        _check_aspect(one.source, (width, height), one.mask, images.read_size(one.mask))
    return Row(
        key=one.key,
        source=one.source,
        target=one.target,
        prompt=one.prompt or config.prompt or "",
        size=(width, height),
        more_prompts=one.more_prompts,
        mask=one.mask,
        mask_white=config.mask_white,
        side_by_side=one.side_by_side,
        extra=one.extra,
    )


def _check_aspect(path: Path, size: tuple[int, int], other: Path, other_size: tuple[int, int]) -> None:
    ratio = size[0] * other_size[1] / (size[1] * other_size[0])
    if max(ratio, 1 / ratio) > ASPECT_TOLERANCE:
        sizes = f"{size[0]}x{size[1]} and {other_size[0]}x{other_size[1]}"
        raise UserError(f"{path} and {other}: their aspects differ ({sizes}); crop them alike")


def held_out(rows: Sequence[Pair], config: DataConfig) -> tuple[list[Pair], list[Pair]]:
    """Split into pairs to train on and pairs held out; the latter are those with the smallest hash of their key.

    So the same pairs are held out on every machine, whatever their order. With ``held_out_root`` all rows are trained on
    and that data set is held out. Raises ``UserError`` where more would be held out than trained on.
    """
    if config.held_out_root is not None:
        if Path(config.held_out_root).expanduser().resolve() == Path(config.root).expanduser().resolve():
            raise UserError("data.held_out_root is data.root itself; set data.held_out to split one data set")
        return list(rows), open_data(
            replace(config, root=config.held_out_root, held_out_root=None, limit=None)
        )
    if 2 * config.held_out > len(rows):
        raise UserError(
            f"data.held_out={config.held_out} would keep more than half of {counted(len(rows), 'pair')} from training; set it "
            "lower (0 trains on all), or name other pairs with data.held_out_root"
        )
    chosen = sorted(rows, key=lambda row: hashlib.sha256(row.key.encode("utf-8", "surrogateescape")).digest())
    keys = {row.key for row in chosen[: config.held_out]}
    return [row for row in rows if row.key not in keys], [row for row in rows if row.key in keys]


def inventory(rows: Sequence[Pair]) -> dict[str, Any]:
    """The pairs in short, in their order: how many, and a digest each of their names, prompts and pictures."""
    columns = {
        "names": [row.key for row in rows],
        "prompts": [json.dumps(row.prompts) for row in rows],
        "pictures": [row.stamp() for row in rows],
    }
    digests = {
        name: hashlib.sha256("\n".join(values).encode("utf-8", "surrogateescape")).hexdigest()[:12]
        for name, values in columns.items()
    }
    return {"pairs": len(rows), **digests}


def verify(rows: Iterable[Pair], progress: Callable[[int, int], None] | None = None) -> None:
    """Decode every picture once and raise one ``UserError`` with all that cannot be.

    A cut-off picture has a sound header, so that only this finds it before training does. ``progress`` is called with the
    number of pictures done and of all.
    """
    # A dictionary drops repeated pictures and keeps their order, in which those of a shard lie together.
    jobs = list(dict.fromkeys(picture for row in rows for picture in row.pictures()))
    problems = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, problem in enumerate(pool.map(_problem, jobs), start=1):
            if problem:
                problems.append(problem)
            if progress:
                progress(done, len(jobs))
    if problems:
        raise UserError(
            f"{len(problems)} of {counted(len(jobs), 'picture')} cannot be used:{listed(problems, most=50)}"
        )


def _problem(picture: Picture) -> str:
    try:
        picture.check()
    except UserError as error:
        return str(error)
    return ""


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); did the data set change?") from error
