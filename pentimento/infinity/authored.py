"""Weights as EditInfinity's own scripts save them: the learnt rows, and the LoRA. Read without running code, and written.

A case of theirs holds ``trained_language_style_embedding/embedding_it9.pth``, one tensor (1, 512, C) of which the first rows count,
and ``lora_weight/lora_weight_50iter.pt``. The number is that of the iterations in the second name, and one less in the first.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import stored
from ..errors import UserError, some

ROWS, LORA = "rows", "lora"
PLACES = {
    ROWS: ("trained_language_style_embedding", "embedding_it*.pth"),
    LORA: ("lora_weight", "lora_weight_*iter.pt"),
}
"""Folder in a case and pattern of the names."""
ALPHA = 32.0
"""Of all their scripts; no file says it."""
COUNT, LENGTH = 20, 512
"""Rows that their scripts use, and rows of their files."""


def files_of(place: Path, at: int | None = None) -> dict[str, Path]:
    """Their files at a place, by what they are: of a folder (of a case, or of both files) those of the most iterations.

    Args:
        place: a folder, or one of the files.
        at: iterations of the LoRA.

    Raises:
        UserError: a folder without a LoRA of so many iterations.
    """
    if place.is_file():
        kind = kind_of(place)
        return {} if kind is None else {kind: place}
    found = {kind: _numbered(place, kind) for kind in PLACES}
    if at is not None and found[LORA]:
        if at not in found[LORA]:
            saved = ", ".join(str(n) for n in sorted(found[LORA]))
            raise UserError(f"--at {at}: {place} holds no lora_weight_{at}iter.pt; saved iterations: {saved}")
        found[LORA] = {at: found[LORA][at]}
    return {kind: files[max(files)] for kind, files in found.items() if files}


def _numbered(place: Path, kind: str) -> dict[int, Path]:
    folder, pattern = PLACES[kind]
    name = re.compile(pattern.replace("*", r"(\d+)"))
    files = [*place.glob(pattern), *(place / folder).glob(pattern)]
    return {int(match[1]): file for file in files if (match := name.fullmatch(file.name))}


def kind_of(file: Path) -> str | None:
    """What a file of weights is by what it holds; ``None`` for all but theirs."""
    if file.suffix not in (".pt", ".pth"):
        return None
    names = stored.read_tensors(file)
    if list(names) == [stored.ROWS]:
        return ROWS
    return LORA if stored.is_editinfinity(names) else None


def rank_of(file: Path) -> int | None:
    """Rank of a LoRA; ``None`` where the factors are flat, so that only the model tells it."""
    ranks = {
        value.shape[0]
        for key, value in stored.read_tensors(file).items()
        if key.endswith("lora_A") and value.dim() == 2
    }
    return ranks.pop() if len(ranks) == 1 else None


def read_rows(file: Path, count: int, width: int) -> Tensor:
    """The first ``count`` learnt rows (count, width), float32.

    Raises:
        UserError: no learnt rows, of another width, fewer, not finite, or more of them learnt than ``count``.
    """
    tensors = stored.read_tensors(file)
    if list(tensors) != [stored.ROWS]:
        raise UserError(f"{file}: holds {some(list(tensors))}, not the learnt rows that EditInfinity saves")
    value = tensors[stored.ROWS]
    if problem := row_problem(value):
        raise UserError(f"{file}: {problem}")
    rows = value.float().flatten(0, -2)
    if rows.shape[1] != width:
        raise UserError(
            f"{file}: its rows are {rows.shape[1]} wide, but the text features of the model are {width} wide; it was trained on"
            " another model"
        )
    if len(rows) < count:
        raise UserError(f"{file}: holds {len(rows)} rows, but config.rows is {count}")
    if rows[count:].any():
        used = int(rows.any(1).nonzero().max()) + 1
        raise UserError(f"{file}: {used} rows are learnt, but config.rows is {count}; set config.rows={used}")
    return rows[:count].clone()


def row_problem(value: Tensor) -> str:
    """What keeps a tensor from being learnt rows; empty if nothing does."""
    if not (value.dim() == 2 or (value.dim() == 3 and len(value) == 1)):
        return f"is a tensor of the shape {tuple(value.shape)}, not (1, rows, width) as EditInfinity saves learnt rows"
    if not value.is_floating_point():
        return f"holds {str(value.dtype).removeprefix('torch.')}, not the decimal numbers of learnt rows"
    return "" if value.isfinite().all() else "holds values that are not finite"


def rows_bytes(rows: Tensor) -> bytes:
    """The file of learnt rows (rows, C), padded with zeros to the length of theirs."""
    whole = F.pad(rows.detach().cpu().float(), (0, 0, 0, LENGTH - len(rows)))
    return stored.pickled(torch.nn.Parameter(whole[None]))


def file_name(kind: str, iterations: int) -> str:
    """Where a case has a file, by what it is and the iterations that their settings name."""
    folder, pattern = PLACES[kind]
    return f"{folder}/{pattern.replace('*', str(iterations - (kind == ROWS)))}"
