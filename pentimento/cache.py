"""Samples as the training loop takes them: encoded once, kept in memory or on disk, put together into batches.

An entry is keyed by all it depends on: the pictures' content and the row's other fields, or a prompt, and the method's
fingerprint (weights of the encoders, resolution, ...). A changed picture or setting makes another key, never a wrong hit.
"""

import hashlib
import json
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import files
from .data import Pair
from .errors import UserError
from .method import Example, Method
from .train import Draws

Entry = dict[str, Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A micro-batch: which rows, and their pictures where they were loaded ahead."""

    indices: list[int]
    examples: list[Example] | None = None
    error: UserError | None = None
    """Why they could not be loaded; raised where the batch is wanted."""


class Samples:
    """Rows of a data set, encoded by a method.

    ``cache``: ``memory`` and ``disk`` (in ``folder``) encode each picture and prompt once, one by one, so that an entry does not
    depend on its neighbours; ``off`` encodes every batch anew, with ``workers`` processes loading pictures ahead.
    """

    def __init__(
        self,
        rows: Sequence[Pair],
        method: Method,
        *,
        cache: Literal["memory", "disk", "off"] = "memory",
        folder: Path | None = None,
        caption_dropout: float = 0.0,
        workers: int = 0,
    ):
        if not rows:
            raise UserError("data: there is no pair to train on")
        if cache == "disk" and folder is None:
            raise ValueError("a cache on disk needs a folder")
        self.rows, self.method = list(rows), method
        self.cached = cache != "off"
        self.caption_dropout = caption_dropout
        self.workers = workers
        self._fingerprint = method.fingerprint()
        # Only then is one drawn: the random numbers of data sets without alternatives stay what they always were.
        self._alternatives = any(len(row.prompts) > 1 for row in self.rows)
        self._store = Store(folder if cache == "disk" else None)

    def __len__(self) -> int:
        return len(self.rows)

    def buckets(self) -> dict[tuple[int, int], list[int]]:
        """Indices of the rows by the size (width, height) that the method takes them at; only equals share a batch."""
        buckets: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(self.rows):
            buckets.setdefault(self.method.size(*row.size), []).append(index)
        return dict(sorted(buckets.items()))

    def precompute(self, progress: Progress | None = None, *, release: bool = True) -> None:
        """Encode all that is not cached yet, if anything is; then (``release``) let the method free its encoders.

        ``progress`` is called with the number of entries done and of all. Each process of a training fills its own memory;
        a folder they fill together, each beginning elsewhere and reading what another has done.
        """
        if self.cached:
            self._fill(progress)
        if release:
            self.method.release_encoders()

    def _fill(self, progress: Progress | None) -> None:
        prompts = list(dict.fromkeys(prompt for row in self.rows for prompt in row.prompts))
        if self.caption_dropout > 0:
            prompts = list(dict.fromkeys([*prompts, ""]))
        total = len(self.rows) + len(prompts)
        first = 0
        if torch.distributed.is_initialized():
            first = len(self.rows) * torch.distributed.get_rank() // torch.distributed.get_world_size()
        for done, row in enumerate(self.rows[first:] + self.rows[:first], start=1):
            self._pictures(row)
            if progress:
                progress(done, total)
        for done, prompt in enumerate(prompts, start=len(self.rows) + 1):
            self._text(prompt)
            if progress:
                progress(done, total)

    def stream(self, batches: Iterable[list[int]]) -> Iterator[Loaded]:
        """The batches in their order; without a cache, workers load their pictures ahead."""
        if self.cached or self.workers == 0:
            return (Loaded(indices=batch) for batch in batches)
        loader = DataLoader(
            Pictures(self.rows),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_loaded,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # its own: else starting the loader would draw from the global one
        )
        return iter(loader)

    def batch(self, loaded: Loaded | Sequence[int], draws: Draws) -> dict[str, Tensor]:
        """What ``encode`` and ``encode_text`` give for these rows, on the device of ``draws``.

        Of rows with several prompts one is drawn from ``draws``. Then, with a chance of ``caption_dropout``, drawn row by row
        too, a prompt is replaced by the empty one.
        """
        if not isinstance(loaded, Loaded):
            loaded = Loaded(indices=list(loaded))
        if loaded.error:
            raise loaded.error
        rows = [self.rows[index] for index in loaded.indices]
        prompts = self._prompts(rows, draws)
        if self.caption_dropout > 0:
            chances = draws.uniform().tolist()
            prompts = ["" if c < self.caption_dropout else p for p, c in zip(prompts, chances, strict=True)]
        if self.cached:
            pictures = _stack([self._pictures(row) for row in rows])
            text = _stack([self._text(prompt) for prompt in prompts])
        else:
            pictures = self.method.encode(loaded.examples or [row.load() for row in rows])
            text = self.method.encode_text(prompts)
        if shared := pictures.keys() & text.keys():
            raise ValueError(f"encode and encode_text both give {sorted(shared)}")
        return {key: value.to(draws.device) for key, value in {**pictures, **text}.items()}

    def _prompts(self, rows: Sequence[Pair], draws: Draws) -> list[str]:
        if not self._alternatives:
            return [row.prompts[0] for row in rows]
        chances = draws.uniform().tolist()
        return [row.prompts[int(c * len(row.prompts))] for row, c in zip(rows, chances, strict=True)]

    def _pictures(self, row: Pair) -> Entry:
        extra = json.dumps(row.extra, sort_keys=True, default=str)
        key = _key("pictures", row.digest(), row.prompts[0], extra, self._fingerprint)
        return self._store.get(key, lambda: self.method.encode([row.load()]))

    def _text(self, prompt: str) -> Entry:
        key = _key("text", prompt, self._fingerprint)
        return self._store.get(key, lambda: self.method.encode_text([prompt]))


class Store:
    """Entries by their keys, in memory or, with a folder, in one safetensors file each."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._entries: dict[str, Entry] = {}

    def get(self, key: str, compute: Callable[[], Entry]) -> Entry:
        """The entry; computed where there is none or a damaged one. A row's tensors lack the batch dimension."""
        if self.folder is None:
            if key not in self._entries:
                self._entries[key] = _one(compute())
            return self._entries[key]
        file = self.folder / f"{key}.safetensors"
        entry = _read(file) if file.exists() else None
        if entry is None:
            entry = _one(compute())
            self._write(file, entry)
        return entry

    def _write(self, file: Path, entry: Entry) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            data = files.safetensors_bytes(entry, {"sha256": _checksum(entry)})
            files.write(file, data, durable=False)  # the checksum tells what a power cut left
        except OSError as error:
            raise UserError(
                f"{file}: cannot be written ({error.strerror}); make room, or set data.cache to memory or off"
            ) from error


class Pictures(Dataset[tuple[int, Example | UserError]]):
    """Pictures loaded by worker processes."""

    def __init__(self, rows: Sequence[Pair]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Example | UserError]:
        try:
            return index, self.rows[index].load()
        except UserError as error:  # raised in the main process: a worker would wrap it into its traceback
            return index, error


def _loaded(items: list[tuple[int, Example | UserError]]) -> Loaded:
    return Loaded(
        indices=[index for index, _ in items],
        examples=[loaded for _, loaded in items if isinstance(loaded, Example)],
        error=next((loaded for _, loaded in items if isinstance(loaded, UserError)), None),
    )


def _ignore_interrupts(worker: int) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the main process ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _one(batch: Entry) -> Entry:
    """The only row of a batch, on the CPU and in memory of its own."""
    return {key: value[0].detach().cpu().clone() for key, value in batch.items()}


def _stack(entries: Sequence[Entry]) -> Entry:
    return {key: torch.stack([entry[key] for entry in entries]) for key in entries[0]}


def _key(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _checksum(entry: Entry) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(entry.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path) -> Entry | None:
    """An entry from its file; ``None`` with a warning if it is damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            entry = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - the handle is no mapping
            checksum = (stored.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        reason = str(error)
    else:
        if checksum == _checksum(entry):
            return entry
        reason = "its checksum is wrong"
    warnings.warn(f"{file}: the cached entry is damaged ({reason}); it is computed again", stacklevel=2)
    return None
