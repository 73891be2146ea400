"""Files that are there whole or not at all, and safetensors whose bytes depend on nothing but their content."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

PARTIAL = ".partial"
"""Ending of what is still being written; whatever bears it may be deleted."""


def write(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file beside its place and rename it. ``durable``: it outlives a power cut right after.

    Raises:
        OSError: the disk is full, the folder cannot be written, ...; what was at ``path`` before is untouched.
    """
    # Of its own name in each process: two of them may write one cache entry at the same time.
    part = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def nearest(path: Path) -> Path:
    """The path itself if it is there, else the innermost of its folders that is."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def pointer(start: bytes, what: str) -> str:
    """What to say of a file that begins so, where Git left it in place of ``what``; empty for all other files."""
    if not start.startswith(b"version https://git-lfs"):
        return ""
    return f"is a Git LFS pointer, not {what}; run `git lfs pull`"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut; Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. The library writes the metadata in the random order of a hash map; here it is sorted."""
    data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[end:]
