"""A picture's codes, one file per scale, as EditInfinity's ``get_each_scale_code.py`` saves them: ``each_scale_code_0.pt`` to ``_12.pt``.

Shapes: d bits per vector, (H, W) the last grid, (h, w) that of a scale. A file holds one scale's code resized to the last grid,
(1, d, 1, H, W) float32; the sum of all is what the decoder takes.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from .. import files, stored
from ..errors import UserError, counted
from .backbone import Codes
from .quantizer import Quantizer, up
from .scales import LENGTHS, TABLES, Grid, Schedule

NAME = re.compile(r"each_scale_code_(\d+)\.pt")
FOLDER = "each_scale_code"
TOLERANCE = 1e-4


def found(folder: Path) -> list[Path]:
    """The files of a folder, or of the folder each_scale_code of a case, in the order of their scales."""
    for place in (folder, folder / FOLDER):
        numbered = {
            int(match[1]): path for path in place.glob("*.pt") if (match := NAME.fullmatch(path.name))
        }
        if numbered:
            return [numbered[number] for number in sorted(numbered)]
    return []


def read(folder: Path) -> tuple[Codes, Schedule]:
    """The codes of one picture and the schedule that they are of.

    Raises:
        UserError: no such files, one that is missing, damaged or of another shape, or codes that are no bits of that scale.
    """
    paths = found(folder)
    if not paths:
        raise UserError(f"{folder}: holds no each_scale_code_0.pt and so on")
    lacking = [n for n in range(len(paths)) if paths[n].name != f"each_scale_code_{n}.pt"]
    if lacking:
        raise UserError(f"{paths[0].parent}: each_scale_code_{lacking[0]}.pt is missing")
    codes = [_read(path) for path in paths]
    shape = codes[-1].shape
    for path, code in zip(paths, codes, strict=True):
        if code.shape != shape:
            raise UserError(f"{path}: is {tuple(code.shape)}, but the last scale is {tuple(shape)}")
    schedule = _schedule(paths[0].parent, len(paths), (shape[2], shape[3]))
    bits = [_bits(*each) for each in zip(paths, codes, schedule.grids, strict=True)]
    return Codes(bits=bits, codes=codes), schedule


def _read(path: Path) -> Tensor:
    """(1, d, H, W) float32."""
    tensors = stored.read_tensors(path)
    value = tensors.get(stored.ROWS)
    if len(tensors) != 1 or value is None or value.dim() != 5 or value.shape[0] != 1 or value.shape[2] != 1:
        raise UserError(f"{path}: holds no codes of one picture, a tensor (1, bits, 1, height, width)")
    if not value.is_floating_point() or not value.isfinite().all():
        raise UserError(f"{path}: holds values that are not finite numbers")
    return value[:, :, 0].float()


def _schedule(place: Path, count: int, last: Grid) -> Schedule:
    lengths = [size for size, length in LENGTHS.items() if length == count]
    for ratio, grids in TABLES.items():
        if lengths and grids[count - 1] == last:
            return Schedule.of(ratio, lengths[0])
    raise UserError(
        f"{place}: no schedule of Infinity has {counted(count, 'scale')} that end with {last[0]} x {last[1]} tokens"
    )


def _bits(path: Path, code: Tensor, grid: Grid) -> Tensor:
    """The bits (1, d, h, w) whose codes were resized to ``code``."""
    rows, columns = (_resizing(n, full) for n, full in zip(grid, code.shape[-2:], strict=True))
    # The resize is linear along both edges, so that its least-squares inverse gives back what was resized.
    inner = torch.linalg.pinv(rows) @ code.double() @ torch.linalg.pinv(columns).mT
    bits = inner > 0
    last = (code.shape[-2], code.shape[-1])
    if (up(Quantizer(code.shape[1]).codes(bits), last) - code).abs().max() > TOLERANCE:
        raise UserError(
            f"{path}: is not made of bits on {grid[0]} x {grid[1]} tokens, which this scale has; the files are of another schedule,"
            " or their codes are not of unit length"
        )
    return bits


def _resizing(count: int, full: int) -> Tensor:
    """What ``up`` does along one edge, (full, count) float64."""
    return up(torch.eye(count, dtype=torch.float64)[None, None], (full, count))[0, 0]


def write(folder: Path, codes: Codes) -> list[Path]:
    """The files of one picture; raises ``OSError`` where they cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, code in enumerate(codes.codes):
        path = folder / f"each_scale_code_{number}.pt"
        files.write(path, stored.pickled(code[:, :, None].float().cpu().contiguous()))
        written.append(path)
    return written


def report(folder: Path) -> list[tuple[str, str]]:
    """The lines of ``pentimento inspect``: name and value."""
    codes, schedule = read(folder)
    height, width = schedule.pixels
    return [
        ("folder", str(found(folder)[0].parent)),
        ("loads", "yes, every code is made of bits of its scale"),
        ("format", "EditInfinity, codes of a picture's scales"),
        ("picture", f"{width} x {height} pixels"),
        ("scales", " ".join(f"{h}x{w}" for h, w in schedule.grids)),
        ("bits", f"{codes.bits[0].shape[1]} per token, {schedule.tokens:,} tokens"),
    ]
