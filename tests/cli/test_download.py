"""Public data sets are fetched from a hub that is made up: what is said, asked, fetched, gone on with, and refused."""

import errno
import os
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shards
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from typer.testing import CliRunner

from pentimento import cli, download
from pentimento.data import DataConfig, open_data, verify

MAGIC, MINI, FILTERED = "osunlp/MagicBrush", "sayakpaul/OmniEdit-mini", "TIGER-Lab/OmniEdit-Filtered-1.2M"
Usage = namedtuple("Usage", "total used free")


@dataclass
class Hub:
    """Stands for ``HfApi`` and ``snapshot_download``."""

    repos: dict[str, dict[str, bytes]]
    licences: dict[str, Any]
    gated: set[str] = field(default_factory=set)
    asking: Exception | None = None
    """Raised when a repository is asked for."""
    fetching: Exception | None = None
    """Raised when a file is to be fetched after ``allowed`` others."""
    allowed: int = 0
    fetched: list[str] = field(default_factory=list)

    def dataset_info(self, repo: str, *, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        if self.asking:
            raise self.asking
        files = [SimpleNamespace(rfilename=name, size=len(data)) for name, data in self.repos[repo].items()]
        card = SimpleNamespace(license=self.licences[repo]) if repo in self.licences else None
        return SimpleNamespace(
            siblings=files,
            sha=f"revision of {repo}",
            card_data=card,
            gated="auto" if repo in self.gated else False,
        )

    def snapshot_download(
        self, repo: str, *, repo_type: str, revision: str, local_dir: Path, allow_patterns: list[str]
    ) -> str:
        assert (repo_type, revision) == ("dataset", f"revision of {repo}")
        for name, data in self.repos[repo].items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                if self.fetching and len(self.fetched) >= self.allowed:
                    raise self.fetching
                self.fetched.append(name)
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes(data)
                notes = local_dir / ".cache" / "huggingface"
                notes.mkdir(parents=True, exist_ok=True)
                (notes / "note").touch()
        return str(local_dir)


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The three repositories, each shard with one row, among other files."""
    folder = tmp_path_factory.mktemp("made")
    magic = shards.write(folder / "magic.parquet", [shards.magic(0)]).read_bytes()
    omni = shards.write(folder / "omni.parquet", [shards.omni(0)]).read_bytes()
    names = [f"data/train-{n:05d}-of-00051-9fd9.parquet" for n in range(3)] + [
        "data/dev-00000-of-00004-a1.parquet"
    ]
    return {
        MAGIC: {**dict.fromkeys(names, magic), "README.md": b"---", "data/other.txt": b"x"},
        MINI: {**{f"data/train-{n:05d}-of-00105.parquet": omni for n in range(105)}, ".gitattributes": b"x"},
        FILTERED: {
            **{f"data/train-{n:05d}-of-00571.parquet": omni for n in range(571)},
            "data/dev-00000-of-00001.parquet": omni,
        },
    }


@pytest.fixture
def hub(repos, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(
        repos={repo: dict(files) for repo, files in repos.items()},
        licences={MAGIC: "cc-by-4.0", MINI: ["mit"]},
    )
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "HfApi", lambda: made)
    monkeypatch.setattr(download, "snapshot_download", made.snapshot_download)
    return made


def files_of(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    )


def test_sizes_and_licences_are_told_before_anything_is_fetched(hub: Hub, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage(10**12, 0, 345 * 10**9))
    hub.gated.add(FILTERED)
    result = CliRunner().invoke(cli.app, ["download", "icedit", "--out", "sets"], input="n\n")
    assert result.exit_code == 1 and "nothing was fetched" in result.stderr
    assert not hub.fetched and not Path("sets").exists()
    size = len(hub.repos[MAGIC]["data/dev-00000-of-00004-a1.parquet"])
    for words in (
        f"https://huggingface.co/datasets/{MAGIC}\n  licence  cc-by-4.0\n  files    4 shards, {4 * size / 1e3:.1f} kB",
        f"datasets/{MINI}\n  licence  mit\n  files    105 shards",
        f"datasets/{FILTERED} (access must be asked for on that page)\n  licence  unknown: its card names none\n",
        "12 shards",
        "free disk  345.0 GB",
        "fetch it? [y/N]",
    ):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("name", "rows", "folders"),
    [
        ("magicbrush", 4, {"data"}),
        ("omniedit", 117, {"data"}),
        ("icedit", 121, {"magicbrush/data", "omniedit/data"}),
    ],
)
def test_what_was_fetched_can_be_opened_at_once(
    call, hub: Hub, name: str, rows: int, folders: set[str]
) -> None:
    printed = call("download", name, "--out", "sets", "--yes").stdout
    assert printed.splitlines()[-1] == f"data.kind={name} data.root=sets"
    assert "fetch it?" not in printed
    assert {str(Path(file).parent) for file in files_of(Path("sets"))} == folders
    found = open_data(DataConfig(root="sets", kind=name))
    assert len(found) == rows == len({row.key for row in found})
    verify(found[-2:])


def test_only_the_shards_of_the_published_training_are_fetched(call, hub: Hub) -> None:
    call("download", "omniedit", "--out", "sets", "--yes")
    filtered = [file for file in files_of(Path("sets")) if "of-00571" in file]
    numbers = ["00000", "00100", "00115", "00130", "00145", "00160", "00175"]
    numbers += ["00566", "00567", "00568", "00569", "00570"]
    assert filtered == [f"data/train-{number}-of-00571.parquet" for number in numbers]


def test_an_interrupted_download_is_gone_on_with(call, refuse, hub: Hub) -> None:
    hub.fetching, hub.allowed = ConnectionResetError("reset by peer"), 50
    message = refuse("download", "omniedit", "--out", "sets", "--yes")
    assert (
        "the hub cannot be reached (reset by peer); what has arrived is kept; run the command again"
        in message
    )
    cut = Path("sets/data/train-00007-of-00105.parquet")
    cut.write_bytes(cut.read_bytes()[:100])
    hub.fetching, hub.fetched = None, []
    printed = call("download", "omniedit", "--out", "sets", "--yes").stdout
    assert "are there already)" in printed
    assert len(hub.fetched) == 117 - 49 and hub.fetched[0] == "data/train-00007-of-00105.parquet"
    assert len(files_of(Path("sets"))) == 117
    hub.fetched = []
    printed = call("download", "omniedit", "--out", "sets").stdout
    assert "to fetch   0 bytes" in printed and "fetch it?" not in printed and not hub.fetched


def test_a_person_may_agree_and_a_script_must_say_so(hub: Hub, tmp_path, monkeypatch, refuse) -> None:
    assert "add --yes" in refuse("download", "magicbrush", "--out", "sets")
    assert not hub.fetched
    assert (
        CliRunner().invoke(cli.app, ["download", "magicbrush", "--out", "sets"], input="y\n").exit_code == 0
    )
    assert len(hub.fetched) == 4


def test_too_little_space(refuse, hub: Hub, monkeypatch) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Usage(10**9, 0, 1000))
    size = sum(len(data) for name, data in hub.repos[MAGIC].items() if name.endswith(".parquet"))
    message = refuse("download", "magicbrush", "--out", "a/b/sets", "--yes")
    assert f"a/b/sets: magicbrush needs {size / 1000:.1f} kB, but only 1.0 kB are free" in message
    assert not hub.fetched and not Path("a").exists()


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def http(kind: Callable[..., Exception], status: int) -> Exception:
    return kind(f"{status} Client Error", response=response(status))


PROBLEMS = [
    (http(GatedRepoError, 403), f"datasets/{MAGIC}: access is restricted. Open that page"),
    (http(HfHubHTTPError, 401), "HF_TOKEN"),
    (http(RepositoryNotFoundError, 404), f"datasets/{MAGIC}: the hub shows no such data set"),
    (http(HfHubHTTPError, 503), "the hub refused (503 Client Error)"),
    (HTTPError("no route to host"), "the hub cannot be reached (no route to host)"),
    (OfflineModeIsEnabled("offline"), "the hub cannot be reached (offline)"),
    (LocalEntryNotFoundError("nothing cached"), "the hub cannot be reached (nothing cached)"),
    (TimeoutError("timed out"), "the hub cannot be reached (timed out)"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
]


@pytest.mark.parametrize(("error", "words"), PROBLEMS)
@pytest.mark.parametrize("moment", ["asking", "fetching"])
def test_what_the_hub_and_the_disk_may_do(
    refuse, hub: Hub, error: Exception, words: str, moment: str
) -> None:
    setattr(hub, moment, error)
    assert words in refuse("download", "magicbrush", "--out", "sets", "--yes")


def test_the_real_client_offline(refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    assert "the variable HF_HUB_OFFLINE is set" in refuse("download", "magicbrush", "--out", "sets", "--yes")
    assert not Path("sets").exists()


def test_other_errors_of_the_system_are_not_hidden(hub: Hub, tmp_path: Path) -> None:
    hub.fetching = OSError(errno.EIO, "I/O error")
    with pytest.raises(OSError, match="I/O error"):
        download.fetch(download.plan("magicbrush", tmp_path))


def test_files_that_do_not_arrive_whole(refuse, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "snapshot_download", lambda *args, **options: None)
    message = refuse("download", "magicbrush", "--out", "sets", "--yes")
    assert f"{MAGIC}: 4 files did not arrive whole; run the command again" in message


def test_an_unknown_name(refuse, hub: Hub) -> None:
    message = refuse("download", "magic-brush", "--out", "sets")
    assert (
        "'magic-brush' to download. Did you mean magicbrush? There are: magicbrush, omniedit, icedit"
        in message
    )
    assert "--out" in refuse("download", "magicbrush")


def test_a_folder_with_other_files_and_a_file_in_its_place(refuse, call, hub: Hub) -> None:
    Path("sets/data").mkdir(parents=True)
    Path("sets/data/train-00000-of-00009.parquet").write_bytes(b"mine")
    Path("sets/.hidden").touch()
    message = refuse("download", "magicbrush", "--out", "sets", "--yes")
    assert "holds other files than those of magicbrush" in message
    assert message.rstrip().endswith("data/train-00000-of-00009.parquet")
    assert "is a file" in refuse("download", "magicbrush", "--out", "sets/.hidden", "--yes")
    assert not hub.fetched
    Path("sets/data/train-00000-of-00009.parquet").unlink()
    call("download", "magicbrush", "--out", "sets", "--yes")


@pytest.mark.parametrize(
    ("repo", "name", "words"),
    [
        (
            MAGIC,
            "data/dev-00000-of-00004-a1.parquet",
            "has 3 files named data/train-*.parquet, data/dev-*.parquet",
        ),
        (
            MINI,
            "data/train-00050-of-00105.parquet",
            "104 files named data/train-*-of-00105*.parquet, but 105 of them",
        ),
        (FILTERED, "data/train-00566-of-00571.parquet", "has 11 files named"),
    ],
)
def test_a_repository_that_has_changed(refuse, hub: Hub, repo: str, name: str, words: str) -> None:
    del hub.repos[repo][name]
    message = refuse("download", "icedit", "--out", "sets", "--yes")
    assert words in message and message.startswith(repo) and "the repository has changed" in message
    assert not hub.fetched
