"""What this machine offers: versions, devices, memory, extras, where weights are looked for, tokens, licences."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .errors import UserError, counted

LICENCES = (
    "pentimento: Apache-2.0",
    "pocket models: Apache-2.0, they ship with the package",
    "FLUX.1 [dev] and FLUX.1 Fill [dev] weights: FLUX.1 [dev] Non-Commercial License; adapters trained on them are"
    " derivatives. Accept it at https://huggingface.co/black-forest-labs/FLUX.1-Fill-dev",
)
HUB_MODELS = ("black-forest-labs/FLUX.1-Fill-dev", "black-forest-labs/FLUX.1-dev")
WORKING_EXTRAS = {"data", "bnb", "gguf", "wandb"}
"""Extras that commands use; no other is missed by anyone."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    topic: str
    name: str
    value: str
    ok: bool = True
    """False: something that commands need is not as it must be."""


def examine() -> list[Finding]:
    """Everything the report shows; nothing is downloaded and no weights are loaded."""
    return [*_versions(), *_devices(), *_extras(), *_weights(), *_tokens(), *_licences()]


def _versions() -> Iterator[Finding]:
    yield Finding(
        topic="versions", name="python", value=f"{platform.python_version()} on {platform.platform()}"
    )
    if installed("pentimento") is None:
        yield Finding(
            topic="versions", name="pentimento", value="run from a folder, not installed: pip install -e ."
        )
    for requirement in _requirements():
        name, wanted, extra = _split(requirement)
        if extra is None:
            found = installed(name)
            ok = found is not None and _numbers(found) >= _numbers(wanted)
            value = f"{found or 'missing'}{'' if ok else f', needs {wanted} or newer: pip install --upgrade {name}'}"
            yield Finding(topic="versions", name=name, value=value, ok=ok)


def _requirements() -> list[str]:
    """What the installed package asks for; nothing where it was not installed."""
    return [] if installed("pentimento") is None else metadata.requires("pentimento") or []


def _split(requirement: str) -> tuple[str, str, str | None]:
    """Name, lower bound and extra of a line such as ``torch>=2.11; extra == "gpu"``."""
    name = re.match(r"[\w.-]+", requirement)
    wanted = re.search(r">=\s*([\d.]+)", requirement)
    extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
    return name[0] if name else requirement, wanted[1] if wanted else "0", extra[1] if extra else None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare: ``2.13.0+cpu`` is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def installed(name: str) -> str | None:
    """The version of a distribution, ``None`` if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = _memory()
    of_memory = f", {memory / 2**30:.1f} GiB of memory" if memory else ""
    threads = torch.get_num_threads()
    yield Finding(
        topic="devices",
        name="cpu",
        value=f"{counted(cores or 1, 'core')}, {counted(threads, 'torch thread')}{of_memory}",
    )
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if about.major >= 8 else "no bf16: set backbone.precision=fp16"
        value = f"{about.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {bf16}"
        yield Finding(topic="devices", name=f"cuda:{index}", value=value)
    if torch.cuda.device_count() == 0:
        built = (
            f"torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "torch is built for CPU only"
        )
        yield Finding(topic="devices", name="cuda", value=f"none ({built})")
    if torch.backends.mps.is_available():
        yield Finding(topic="devices", name="mps", value="Apple GPU")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(topic="devices", name="disk", value=f"{free / 2**30:.1f} GiB free in this folder")


def _memory() -> int | None:
    """Bytes of main memory; ``None`` where the system does not say (Windows)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _extras() -> Iterator[Finding]:
    members: dict[str, list[str]] = {}
    for requirement in _requirements():
        name, _, extra = _split(requirement)
        if extra in WORKING_EXTRAS:
            members.setdefault(extra, []).append(name)
    for extra, names in sorted(members.items()):
        found = {name: installed(name) for name in names}
        if all(found.values()):
            value = ", ".join(f"{name} {version}" for name, version in found.items())
        else:
            value = f"not installed; pip install 'pentimento[{extra}]'"
        yield Finding(topic="extras", name=extra, value=value)


def _weights() -> Iterator[Finding]:
    from huggingface_hub import constants, try_to_load_from_cache

    for name in ("pocket-fill", "pocket-dev"):
        yield _pocket(name)
    yield Finding(topic="weights", name="hub cache", value=f"{constants.HF_HUB_CACHE} (moved by HF_HOME)")
    for model in HUB_MODELS:
        held = isinstance(try_to_load_from_cache(model, "model_index.json"), str)
        value = "in the hub cache" if held else "not in the hub cache; fetched when a recipe names it"
        yield Finding(topic="weights", name=model, value=value)
    if constants.HF_HUB_OFFLINE:
        yield Finding(topic="weights", name="HF_HUB_OFFLINE", value="set: nothing is fetched")


def _pocket(name: str) -> Finding:
    from .pocket.weights import cache_folder, folder

    try:
        # pocket-dev is not asked for by its name, which would build it.
        shipped = folder("pocket-fill")
        made = f"made from pocket-fill at first use, in {cache_folder()}"
        return Finding(topic="weights", name=name, value=made if name == "pocket-dev" else str(shipped))
    except UserError as error:
        return Finding(topic="weights", name=name, value=str(error), ok=False)


def _tokens() -> Iterator[Finding]:
    from huggingface_hub import get_token

    if os.environ.get("HF_TOKEN"):
        value = "set in the environment"
    elif get_token():
        value = "not set, but a saved login is found"
    else:
        value = "not set; gated weights such as FLUX.1 need it (https://huggingface.co/settings/tokens)"
    yield Finding(topic="tokens", name="HF_TOKEN", value=value)


def _licences() -> Iterator[Finding]:
    for line in LICENCES:
        name, _, value = line.partition(": ")
        yield Finding(topic="licences", name=name, value=value)


def negative(findings: list[Finding]) -> bool:
    """Whether something that commands need is missing or too old."""
    return not all(f.ok for f in findings) or sys.version_info < (3, 11)
