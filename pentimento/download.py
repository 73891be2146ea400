"""Public data sets from the Hugging Face hub (``pentimento download``): first how large they are and under which licence."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the HTTP client underneath, whatever it is called in this version
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    XetDownloadError,
)

from .errors import UserError, counted, first_line
from .layouts import listed
from .parquet import MIXES
from .schema import nearest


@dataclass(frozen=True, kw_only=True)
class Source:
    """The part of a public repository that a data set is made of."""

    repo: str
    shards: tuple[str, ...]
    """Patterns of its files; each must be there."""
    count: int | None = None
    """Files that all patterns give together; none: as many as there are."""


FILTERED = (0, 100, 115, 130, 145, 160, 175, 566, 567, 568, 569, 570)
"""Shards of the filtered OmniEdit that ICEdit's training takes besides the whole of the small edition."""
SOURCES = {
    "magicbrush": (Source(repo="osunlp/MagicBrush", shards=("data/train-*.parquet", "data/dev-*.parquet")),),
    "omniedit": (
        Source(repo="sayakpaul/OmniEdit-mini", shards=("data/train-*-of-00105*.parquet",), count=105),
        Source(
            repo="TIGER-Lab/OmniEdit-Filtered-1.2M",
            shards=tuple(f"data/train-{number:05d}-of-00571*.parquet" for number in FILTERED),
            count=len(FILTERED),
        ),
    ),
}
FOLDERS = {name: {name: ""} for name in SOURCES} | {
    mix: {name: name for name in names} for mix, names in MIXES.items()
}
"""What can be asked for: its data sets, and where each lies in the folder that is named, as the same ``data.kind`` reads it."""
UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}
"""Of sizes, as disks are sold."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is to be fetched from one repository."""

    repo: str
    revision: str
    licence: str
    gated: bool
    folder: Path
    files: dict[str, int]
    """Names in the repository, and bytes."""

    def missing(self) -> dict[str, int]:
        """Files that are not here yet, or not whole."""
        return {
            name: size
            for name, size in self.files.items()
            if not (self.folder / name).is_file() or (self.folder / name).stat().st_size != size
        }

    @property
    def page(self) -> str:
        """Where a person reads about it."""
        return f"{constants.ENDPOINT}/datasets/{self.repo}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A download, before it begins."""

    name: str
    out: Path
    parts: tuple[Part, ...]

    def missing(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(size for part in self.parts for size in part.missing().values())

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        for part in self.parts:
            yield f"{part.page}{' (access must be asked for on that page)' if part.gated else ''}"
            yield f"  licence  {part.licence}"
            yield f"  files    {counted(len(part.files), 'shard')}, {size_of(sum(part.files.values()))}, into {part.folder}"
        here = sum(size for part in self.parts for size in part.files.values()) - self.missing()
        yield f"to fetch   {size_of(self.missing())}{f' ({size_of(here)} are there already)' if here else ''}"
        yield f"free disk  {size_of(free(self.out))}"


def size_of(count: int) -> str:
    """Bytes in words."""
    unit, digits = next((unit, digits) for unit, digits in UNITS.items() if count >= digits or digits == 1)
    return f"{count / digits:.{0 if digits == 1 else 1}f} {unit}"


def free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def plan(name: str, out: Path) -> Plan:
    """Ask the hub what there is; nothing is written.

    Raises:
        UserError: an unknown name, a folder that holds something else, no network, a repository that has changed, or too
            little free space.
    """
    if name not in FOLDERS:
        near = nearest(name, list(FOLDERS))
        meant = f" Did you mean {near}?" if near else ""
        raise UserError(f"there is no data set {name!r} to download.{meant} There are: {', '.join(FOLDERS)}")
    parts = tuple(
        _part(source, out / folder) for known, folder in FOLDERS[name].items() for source in SOURCES[known]
    )
    made = Plan(name=name, out=out, parts=parts)
    _check_folder(made)
    if made.missing() > free(out):
        raise UserError(
            f"{out}: {name} needs {size_of(made.missing())}, but only {size_of(free(out))} are free; free some space, or "
            "choose another disk"
        )
    return made


def _part(source: Source, folder: Path) -> Part:
    with explained(source.repo):
        info = HfApi().dataset_info(source.repo, files_metadata=True)
    files = {
        sibling.rfilename: sibling.size or 0
        for sibling in info.siblings or ()
        if any(fnmatchcase(sibling.rfilename, pattern) for pattern in source.shards)
    }
    lacking = [pattern for pattern in source.shards if not any(fnmatchcase(name, pattern) for name in files)]
    if lacking or (source.count is not None and len(files) != source.count):
        wanted = f"{source.count} of them" if source.count is not None else "some of each"
        raise UserError(
            f"{source.repo}: has {counted(len(files), 'file')} named {', '.join(source.shards)}, but {wanted} were expected; "
            "the repository has changed, so download it by hand"
        )
    licence = getattr(info.card_data, "license", None)
    licences = [licence] if isinstance(licence, str) else licence or []
    return Part(
        repo=source.repo,
        revision=info.sha or "main",
        licence=", ".join(licences) or "unknown: its card names none",
        gated=bool(info.gated),
        folder=folder,
        files=files,
    )


def _check_folder(made: Plan) -> None:
    if made.out.exists() and not made.out.is_dir():
        raise UserError(f"{made.out}: is a file; choose a folder with --out")
    known = {part.folder / name for part in made.parts for name in part.files}
    # Hidden are the hub client's own notes, by which it goes on after an interruption.
    other = [
        str(path.relative_to(made.out))
        for path in sorted(made.out.rglob("*"))
        if not path.is_dir() and path not in known
        if not any(part.startswith(".") for part in path.relative_to(made.out).parts)
    ]
    if other:
        raise UserError(
            f"{made.out}: holds other files than those of {made.name}; choose another folder:{listed(other)}"
        )


def fetch(made: Plan) -> None:
    """Fetch what is missing; what an interruption left is gone on with.

    Raises:
        UserError: access is restricted, the network fails, the disk is full or cannot be written.
    """
    for part in made.parts:
        if not (missing := part.missing()):
            continue
        with explained(part.repo):
            snapshot_download(
                part.repo,
                repo_type="dataset",
                revision=part.revision,
                local_dir=part.folder,
                allow_patterns=list(missing),
            )
        if still := part.missing():
            raise UserError(
                f"{part.repo}: {counted(len(still), 'file')} did not arrive whole; run the command again:{listed(list(still))}"
            )


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """What the hub, the network and the disk may do to a download, as ``UserError``."""
    page = f"{constants.ENDPOINT}/datasets/{repo}"
    again = "what has arrived is kept; run the command again to go on"
    restricted = (
        f"{page}: access is restricted. Open that page, log in and accept its terms, then set the variable HF_TOKEN to an "
        "access token of that account"
    )
    try:
        yield
    except GatedRepoError as error:
        raise UserError(restricted) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{page}: the hub shows no such data set; it may have been moved or made private"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(restricted) from error
        raise UserError(f"{repo}: the hub refused ({first_line(error)}); {again}") from error
    except (HTTPError, LocalEntryNotFoundError, XetDownloadError, ConnectionError, TimeoutError) as error:
        why = "the variable HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else first_line(error)
        raise UserError(f"{repo}: the hub cannot be reached ({why}); {again}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(f"{repo}: cannot be written ({error.strerror}); {again}") from error
