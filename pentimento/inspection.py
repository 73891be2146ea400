"""What an adapter file is: ours, or one that diffusers, peft, kohya, ComfyUI or x-flux wrote. Nothing is loaded into a model."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import stored
from .errors import UserError, counted
from .infinity import authored

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"

MAIN = "semantic"
"""The adapter that is meant by the folder of several: the one that carries the edit."""

# Endings of the two factors of a LoRA in the dialects that are about; the groups name the module and the factor.
FACTORS = re.compile(
    r"^(?P<module>.+?)[._](?:"
    r"lora_(?P<ab>[AB])(?:\.[\w-]+)?\.weight|lora_(?P<word>down|up)\.weight|lora\.(?P<old>down|up)\.weight"
    r"|(?P<xflux>\w+_lora\d?)\.(?P<xword>down|up)\.weight)$"
)
# A layer with several LoRAs and a router, as ICEdit's MoE-LoRA and this package name them.
EXPERT = re.compile(r"^(?P<module>.+)\.lora_(?P<ab>[AB])\.expert_(?P<number>\d+)\.weight$")
ROUTER = ".lora_route.weight"
GARBAGE = "leaves in the layers of the experts whatever is in memory"
DIALECTS = (
    ("lora_unet_", "kohya (sd-scripts)"),
    ("lora_transformer_", "kohya (OneTrainer)"),
    ("base_model.model.", "peft"),
    ("diffusion_model.", "ComfyUI"),
    ("transformer.", "diffusers"),
    ("unet.", "diffusers (not a transformer)"),
)
PAIREDIT = "PairEdit and Concept Sliders"
PAIREDIT_RANK = 16
EDITINFINITY = "EditInfinity"
READ = ("diffusers", "without a prefix", PAIREDIT, "kohya (OneTrainer)", EDITINFINITY)
"""Dialects that are loaded."""
READ_KEY = "transformer.MODULE.lora_A.weight"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What one adapter file holds."""

    path: Path
    dialect: str
    """Whose key names it uses."""
    method: str = ""
    base: str = ""
    """The base model it was trained on, as far as the file says."""
    ranks: dict[int, int] = field(default_factory=dict)
    """Rank -> how many modules have it."""
    alphas: dict[float, int] = field(default_factory=dict)
    """Alpha -> how many modules have it; empty: the file does not say, and readers take alpha = rank."""
    experts: dict[int, int] = field(default_factory=dict)
    """Experts of a layer -> how many layers have so many; empty: a plain LoRA."""
    expert_ranks: dict[int, int] = field(default_factory=dict)
    """Rank of each expert -> how many layers."""
    tensors: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    """Module names with their numbers struck out -> how many."""
    full: tuple[str, ...] = ()
    """Tensors that are no LoRA factor: whole layers, biases."""
    metadata: dict[str, str] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    """This package's own record; empty for files of others."""
    problems: tuple[str, ...] = ()
    """Why it cannot be used; empty if it can."""
    rows: tuple[int, int] | None = None
    """Of learnt rows, which are no LoRA: how many are not zero, and their width."""
    flat: tuple[int, ...] = ()
    """Numbers in the A of layers whose factors are flat, so that their rank is not known."""


def find(what: str | Path) -> Path:
    """The adapter file that a path means: the file, or the one in a run folder, weights folder or checkpoint.

    Raises:
        UserError: no such path, or a folder without one adapter file, or with several.
    """
    path = Path(what)
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    for folder in (path, path / "weights", path / MAIN, path / "weights" / MAIN):
        if (folder / WEIGHTS_NAME).is_file():
            return folder / WEIGHTS_NAME
    if theirs := authored.files_of(path):
        return theirs.get(authored.LORA) or theirs[authored.ROWS]
    files = sorted(path.rglob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if not files:
        raise UserError(f"{path}: the folder holds no .safetensors file")
    listed = ", ".join(str(f.relative_to(path)) for f in files[:5])
    raise UserError(f"{path}: the folder holds {len(files)} .safetensors files; name one of them: {listed}")


def inspect_file(what: str | Path) -> Adapter:
    """Read an adapter file completely and say what it is.

    Raises:
        UserError: no such file, unreadable, empty, or not a safetensors file.
    """
    path = find(what)
    metadata = stored.read_metadata(path)
    tensors = stored.read_tensors(path)
    if list(tensors) == [stored.ROWS]:
        return _learnt_rows(path, tensors[stored.ROWS])
    own_names = list(tensors)
    tensors = stored.in_diffusers_names(tensors)
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    problems = [
        f"{key} holds values that are not finite"
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()
    ]
    scalars = {
        key.removesuffix(".alpha"): float(tensor)
        for key, tensor in tensors.items()
        if key.endswith(".alpha") and tensor.numel() == 1
    }
    experts = experts_of(shapes)
    inner = _expert_ranks(shapes, experts, problems)
    theirs = stored.is_editinfinity(own_names)
    flat = {key: shape for key, shape in shapes.items() if theirs and len(shape) == 1}
    plain = {key: shape for key, shape in shapes.items() if key not in flat and not _of_experts(key)}
    pairs, full = _pairs(plain, problems)
    problems += _alone(flat)
    if not pairs and not experts and not flat:
        problems.append("it holds no LoRA factors")
    modules = [*pairs, *experts, *(key.partition(".lora_A")[0] for key in flat if ".lora_A" in key)]
    ours = own_record(path, metadata)
    dialect = _dialect(shapes, [*pairs, *experts]) if list(tensors) == own_names else _translated(own_names)
    problems += _unread(shapes, dialect, full if pairs or experts else [])
    problems += _mixed(ranks=pairs, alphas=scalars, numbers_of_experts=experts, ranks_of_experts=inner)
    alphas = _alphas(scalars, metadata, pairs, problems)
    return Adapter(
        path=path,
        dialect=dialect,
        method=str(ours.get("method", "")),
        base=_base(ours, metadata, shapes),
        ranks=dict(sorted(Counter(pairs.values()).items())),
        alphas=dict(sorted(alphas.items())),
        flat=tuple(sorted({shape[0] for key, shape in flat.items() if ".lora_A." in key})),
        experts=dict(sorted(Counter(experts.values()).items())),
        expert_ranks=dict(sorted(Counter(inner.values()).items())),
        tensors=len(shapes),
        parameters=sum(torch.Size(s).numel() for s in shapes.values()),
        dtypes=dict(dtypes),
        kinds=dict(Counter(re.sub(r"(?<=[._])\d+(?=[._]|$)", "*", module) for module in modules)),
        full=tuple(full),
        metadata=metadata,
        ours=ours,
        problems=tuple(problems),
    )


def _learnt_rows(path: Path, value: torch.Tensor) -> Adapter:
    """What EditInfinity's scripts learn before the LoRA."""
    problem = authored.row_problem(value)
    used = 0 if problem else int(value.float().flatten(0, -2).any(1).sum())
    return Adapter(
        path=path,
        dialect=EDITINFINITY,
        base="not said",
        tensors=1,
        parameters=value.numel(),
        dtypes={str(value.dtype).removeprefix("torch."): 1},
        problems=(problem,) if problem else (),
        rows=(used, value.shape[-1]) if value.dim() else (0, 0),
    )


def _pairs(shapes: Mapping[str, list[int]], problems: list[str]) -> tuple[dict[str, int], list[str]]:
    """Rank of each module that has both factors, and the other tensors' names."""
    sides: dict[str, dict[str, list[int]]] = {}
    full = []
    for key, shape in shapes.items():
        match = FACTORS.match(key)
        if match:
            module = match["module"] + (f".{match['xflux']}" if match["xflux"] else "")
            first = (match["ab"] or match["word"] or match["old"] or match["xword"]) in ("A", "down")
            sides.setdefault(module, {})["A" if first else "B"] = shape
        elif not key.endswith(".alpha"):
            full.append(key)
    ranks = {}
    for module, found in sides.items():
        if len(found) != 2:
            problems.append(f"{module} has only factor {', '.join(found)}")
        elif len(found["A"]) < 2 or len(found["B"]) < 2 or found["A"][0] != found["B"][1]:
            problems.append(f"{module}: the factors {found['A']} and {found['B']} do not fit together")
        else:
            ranks[module] = found["A"][0]
    return ranks, full


def _alone(flat: Mapping[str, list[int]]) -> Iterator[str]:
    """Flat factors without their other one."""
    for key in flat:
        module, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        if f"{module}.lora_{'B' if factor == 'A' else 'A'}.weight" not in flat:
            yield f"{module} has only factor {factor}"


def _unread(shapes: Mapping[str, list[int]], dialect: str, full: Sequence[str]) -> Iterator[str]:
    """What loading refuses by the names of the tensors alone."""
    factors = [key for key in shapes if FACTORS.match(key) and not _of_experts(key)]
    if dialect not in READ and factors:
        yield f"its keys are those of {dialect}, and only diffusers' are read, such as {READ_KEY}"
    elif other := [key for key in factors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]:
        yield f"a factor is called {other[0]}, and only names such as {READ_KEY} are read"
    if full:
        yield f"{full[0]} is no LoRA factor; a module trained whole lies in a file of its own"


def _mixed(**values: Mapping[str, float]) -> Iterator[str]:
    """What loading refuses because one adapter here has one value in all layers."""
    for what, of_layers in values.items():
        found = sorted(set(of_layers.values()))
        if len(found) > 1:
            listed = ", ".join(f"{value:g}" for value in found)
            yield f"its layers have several {what.replace('_', ' ')} ({listed}), which is not supported"


def experts_of(keys: Iterable[str]) -> dict[str, int]:
    """The layers that have experts by the names of a file's tensors, and how many each has."""
    numbers: dict[str, set[str]] = {}
    for key in keys:
        if match := EXPERT.match(key):
            numbers.setdefault(match["module"], set()).add(match["number"])
        elif key.endswith(ROUTER):
            numbers.setdefault(key.removesuffix(ROUTER), set())
    return {module: len(found) for module, found in numbers.items()}


def _of_experts(key: str) -> bool:
    return key.endswith(ROUTER) or EXPERT.match(key) is not None


def _expert_ranks(
    shapes: Mapping[str, list[int]], experts: Mapping[str, int], problems: list[str]
) -> dict[str, int]:
    """Rank of the experts of each layer that is complete and fits together."""
    ranks = {}
    for module, count in experts.items():
        a, b = ([shapes.get(f"{module}.lora_{f}.expert_{n}.weight", []) for n in range(count)] for f in "AB")
        router = shapes.get(module + ROUTER, [])
        if not count or [] in (*a, *b, router):
            problems.append(f"{module}: an expert or the router is missing or incomplete")
        elif len({*map(tuple, a)}) > 1 or len({*map(tuple, b)}) > 1 or a[0][0] != b[0][1]:
            problems.append(f"{module}: the factors of its experts do not fit together")
        elif router != [count, a[0][1]]:
            problems.append(f"{module}: the router {router} does not fit {count} experts of {a[0][1]} inputs")
        else:
            ranks[module] = a[0][0]
    return ranks


def _dialect(shapes: Mapping[str, list[int]], modules: Sequence[str]) -> str:
    if any("_lora" in module for module in modules):
        return "x-flux"
    for prefix, name in DIALECTS:
        if any(key.startswith(prefix) for key in shapes):
            return name
    return "without a prefix" if modules else "unknown"


def silent_on_alpha(path: Path) -> bool:
    """Whether a LoRA file says nothing of alpha, so that readers take alpha = rank."""
    about = inspect_file(path)
    return bool(about.ranks) and not about.alphas


def _translated(own_names: Sequence[str]) -> str:
    """The dialect of a file whose names are known to mean diffusers' layers, or Infinity's."""
    if stored.is_editinfinity(own_names):
        return EDITINFINITY
    return PAIREDIT if own_names[0].startswith(stored.PAIREDIT) else "kohya (OneTrainer)"


def own_record(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What this package recorded in a file, empty in files of others; ``UserError`` where it is damaged."""
    if "pentimento" not in metadata:
        return {}
    try:
        record = json.loads(metadata["pentimento"])
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: its record of how it was trained is damaged ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: its record of how it was trained is damaged (no mapping)")
    return record


def _base(ours: Mapping[str, Any], metadata: Mapping[str, str], shapes: Mapping[str, list[int]]) -> str:
    """The base model by what the file says of itself, else by the names of its layers."""
    backbone = ours.get("backbone")
    if isinstance(backbone, dict):
        keys = ("family", "variant", "weights", "transformer_file")
        return " ".join(str(backbone[key]) for key in keys if key in backbone)
    for key in ("modelspec.architecture", "ss_base_model_version", "base_model", "baseModel"):
        if metadata.get(key):
            return metadata[key]
    names = " ".join(shapes)
    if "block_chunks." in names:
        return "Infinity by the names of its layers"
    if re.search(r"single_transformer_blocks|single_blocks", names):
        wide = any(3072 in shape for shape in shapes.values())
        return "FLUX.1 by the names of its layers" + (
            "" if wide else ", of another width than the published model"
        )
    return "not said"


def _alphas(
    scalars: Mapping[str, float], metadata: Mapping[str, str], pairs: Mapping[str, int], problems: list[str]
) -> Counter[float]:
    """Alpha of the modules: stored beside them, or in the record that diffusers reads."""
    if scalars:
        return Counter(scalars.values())
    try:
        alpha = stored.recorded_alpha(metadata)
    except ValueError as error:
        problems.append(str(error))
        return Counter()
    return Counter() if alpha is None else Counter({alpha: len(pairs)})


def report(adapter: Adapter) -> list[tuple[str, str]]:
    """The lines of ``pentimento inspect``: name and value."""
    size = adapter.path.stat().st_size
    types = ", ".join(f"{count} {name}" for name, count in adapter.dtypes.items())
    kind = ", ".join(["LoRA factors"] + ["experts"] * bool(adapter.experts))
    full = f"{len(adapter.full)} ({', '.join(adapter.full[:4])}{', ...' if len(adapter.full) > 4 else ''})"
    lines = [
        ("file", f"{adapter.path} ({size / 2**20:.2f} MiB)"),
        (
            "loads",
            "no: " + "; ".join(adapter.problems[:3]) if adapter.problems else "yes, every tensor is finite",
        ),
        ("method", adapter.method or "not said; name one with method=... to edit with it"),
        ("base model", adapter.base),
        ("format", adapter.dialect),
        ("tensors", f"{adapter.tensors} ({types}), {adapter.parameters:,} parameters"),
    ]
    if adapter.rows is not None:
        count, width = adapter.rows
        return [*lines, ("rows", f"{count} learnt, of width {width:,}, to follow a caption; no LoRA")]
    lines[-1:-1] = [
        ("rank", _tally(adapter.ranks) or _flat(adapter) or "none"),
        ("alpha", _tally(adapter.alphas) or _no_alpha(adapter)),
        *_expert_lines(adapter),
    ]
    lines.append(("full", full if adapter.full else f"none: {kind} only"))
    lines += [("layers", f"{count:>4} x {kind}") for kind, count in adapter.kinds.items()]
    for key, value in adapter.metadata.items():
        if key not in ("format", "pentimento"):
            short = " ".join(value.split())
            lines.append(("metadata", f"{key}: {short if len(short) <= 200 else short[:200] + ' ...'}"))
    lines += [
        ("record", f"{key}: {json.dumps(value, ensure_ascii=False)}") for key, value in adapter.ours.items()
    ]
    return lines


def _flat(adapter: Adapter) -> str:
    """What is known of the rank of flat factors."""
    if not adapter.flat:
        return ""
    sizes = " and ".join(f"{size:,}" for size in adapter.flat)
    return (
        f"not said: the factors are flat, as several GPUs leave them, A of {sizes} numbers: rank times inputs"
    )


def _no_alpha(adapter: Adapter) -> str:
    if adapter.dialect == EDITINFINITY:
        return f"not said; {authored.ALPHA:g} in all of EditInfinity's scripts"
    said = "not said; readers take alpha = rank"
    if list(adapter.ranks) == [PAIREDIT_RANK] and all(".attn." in kind for kind in adapter.kinds):
        said += ". PairEdit's weights are right at 1/16 of that: `pentimento edit` tells by their size whether it was forgotten"
    return said


def _expert_lines(adapter: Adapter) -> list[tuple[str, str]]:
    if not adapter.experts:
        return []
    recorded = adapter.ours.get("adapters", {}).get(adapter.ours.get("adapter", ""), {})
    if "top_k" in recorded:
        top_k = f"{recorded['top_k']}, gate {recorded.get('gate')}"
    else:
        top_k = "not stored, 1 as published"
    if "transformer.experts" in adapter.metadata.get("lora_adapter_metadata", ""):
        stock = (
            f"refuses it by its lora_adapter_metadata; a version that reads none {GARBAGE}, without an error"
        )
    else:
        stock = f"loads it without an error, but {GARBAGE}"
    return [
        ("experts", f"{_tally(adapter.experts)} in each of {sum(adapter.experts.values())} layers"),
        ("expert rank", _tally(adapter.expert_ranks) or "none"),
        ("top-k", top_k),
        ("elsewhere", f"stock diffusers {stock}; pentimento export RUN --to lora makes a plain one"),
    ]


def _tally(counts: Mapping[Any, int]) -> str:
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} ({counted(count, 'module')})" for value, count in counts.items())
