"""Adapters for other programs: files for stock diffusers and for ComfyUI, read back and compared before they are called done.

A plain LoRA travels as it is. One with experts does not, since nothing else knows routers: ``distil.py`` makes a plain one of it.
"""

import copy
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import adapter_files, calibration, files, inspection, lookup, runfolder, schema, specs, stored
from . import recipe as recipe_
from .errors import UserError
from .schema import Origin
from .specs import ExpertLoRA, LoRA

TARGETS = ("diffusers", "comfyui", "lora", "pairedit", "editinfinity")
PROOF = "proof"
PAIREDIT_NAME = "semantic.pt"
COMFYUI = re.compile(
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|norm1(_context)?\.linear"
    r"|ff(_context)?\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
    r"|x_embedder|context_embedder|proj_out|norm_out\.linear"
    r"|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
)
"""Layers of FLUX that ComfyUI's loader finds by their names in diffusers."""

Lines = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what is known of it."""

    file: Path
    lines: Lines
    """Name and value, as ``pentimento inspect`` prints them."""


def export(what: str | Path, to: str, out: str | Path, overrides: Sequence[str] = ()) -> Exported:
    """Write an adapter for another program, and prove what was written.

    Args:
        what: a run folder; for diffusers and comfyui also an adapter file.
        to: ``diffusers``, ``comfyui``, ``pairedit`` (the ``.pt`` of PairEdit's own scripts), ``lora`` (a plain LoRA of one with
            experts), or ``editinfinity`` (a case of EditInfinity's scripts, of a run or of a picture, see ``handover``).
        out: a ``.safetensors`` file (for pairedit a ``.pt`` file), or a folder for one of the usual name; for editinfinity a folder.
        overrides: changes of the recipe such as ``backbone.weights=...``, for lora the fields of ``Distillation``, and for
            editinfinity those of ``handover.Entries``.

    Raises:
        UserError: nothing there, something there that ``to`` cannot express, a file in the way, or a proof that failed.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to!r}: known are {', '.join(TARGETS)}")
    if to == "editinfinity":
        from . import handover

        return handover.export(Path(what), Path(out), overrides)
    path, file = (
        Path(what),
        target_file(Path(out), PAIREDIT_NAME if to == "pairedit" else inspection.WEIGHTS_NAME),
    )
    if to == "lora":
        from . import distil

        return distil.export(path, file, overrides)
    source = _weights_of(path)
    spec = specs.spec_of(source)
    if isinstance(spec, ExpertLoRA):
        raise UserError(
            f"{source} has experts ({spec.experts} in a layer), which {to} does not know; make it a plain LoRA first:"
            f" pentimento export {what} --to lora --out FILE"
        )
    host = _host(path, source, overrides)
    lines = WRITERS[to](source, file, spec, host)
    return Exported(file=file, lines=[("from", str(source)), *lines])


def target_file(out: Path, name: str = inspection.WEIGHTS_NAME) -> Path:
    """The file to write, called ``name`` where ``out`` is a folder; raises ``UserError`` where there is one already."""
    file = out if out.suffix == Path(name).suffix else out / name
    if file.exists():
        raise UserError(f"--out: {file} is there already; choose another place")
    nearest = files.nearest(file.absolute().parent)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--out: {file} cannot be written, because {nearest} is no folder to write to")
    return file


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Make the folder of a file that is written within; failures become ``UserError``."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another --out") from error


def _weights_of(path: Path) -> Path:
    return inspection.find(lookup.final_weights(path) if (path / runfolder.RECIPE).is_file() else path)


def _host(path: Path, source: Path, overrides: Sequence[str]) -> nn.Module | None:
    """The model that the adapter belongs to, without weights; ``None`` where its configuration is not at hand."""
    if (path / runfolder.RECIPE).is_file():
        recipe = recipe_.load(path, overrides)
        name, backbone, config = recipe.method, recipe.backbone, recipe.config
    elif not adapter_files.read_record(source) and not any(o.startswith("method=") for o in overrides):
        return None
    else:
        raw = lookup.recorded_setup(source, overrides)
        setup = recipe_.build_setup(raw, recipe_.override(raw, Origin(name=str(source)), overrides))
        name, backbone, config = setup.method, setup.backbone, setup.config
    method = recipe_.method_class(name).outline(backbone, config)
    return None if method is None else method.adapters.host


def _diffusers(source: Path, file: Path, spec: LoRA, host: nn.Module | None) -> Lines:
    """Key names and modules trained whole as stock diffusers takes them."""
    wholes = _wholes(source, spec)
    lines = _folded(source, file, spec, host)
    for whole in wholes:
        with writing(file):
            shutil.copyfile(whole, file.with_name(whole.name))
    if wholes:
        named = ", ".join(whole.name for whole in wholes)
        lines.append(("beside it", f"{named}: modules trained whole, which load_lora_weights does not read"))
    return lines


def _comfyui(source: Path, file: Path, spec: LoRA, host: nn.Module | None) -> Lines:
    """Names that ComfyUI maps to its own."""
    if wholes := _wholes(source, spec):
        raise UserError(
            f"{wholes[0]}: ComfyUI takes LoRA layers only, but this adapter has a module that was trained whole"
        )
    tensors = _tensors(source)
    unknown = [key for key in tensors if not _known_to_comfyui(key)]
    if unknown:
        raise UserError(
            f"{source}: ComfyUI's loader for FLUX does not know {len(unknown)} of {len(tensors)} keys, such as {unknown[0]}"
        )
    return [
        ("keys", f"{len(tensors)}, each of a layer that ComfyUI's loader for FLUX maps"),
        *_folded(source, file, spec, host),
    ]


def _folded(source: Path, file: Path, spec: LoRA, host: nn.Module | None) -> Lines:
    """Write factors that are right for readers who take alpha to be the rank, and for those who read metadata."""
    known = calibration.read(source)
    scale = spec.scaled / spec.rank * (1.0 if known is None else known.unit)
    tensors = {
        key: (value.float() * scale).to(value.dtype) if ".lora_B." in key and scale != 1 else value
        for key, value in _tensors(source).items()
    }
    folded = LoRA(targets=spec.targets, rank=spec.rank, full=spec.full)
    record = _with_alpha_of_one(adapter_files.read_record(source), spec.rank)
    if known is not None:
        record[calibration.KEY] = schema.plain(known.folded())
    metadata = stored.read_metadata(source)
    stock = specs.stock_record(folded) if scale != 1 else metadata.get("lora_adapter_metadata")
    with writing(file):
        adapter_files.write(
            file, tensors, record, {"lora_adapter_metadata": stock or specs.stock_record(folded)}
        )
    unit = "" if known is None else f" times {known.unit:.3g}, the calibrated scale 1,"
    lines = [("alpha", f"{spec.scaled:g} / rank {spec.rank}{unit} is in B now: a scale of 1 is right")]
    return [*(lines if scale != 1 else []), ("proof", prove(file, tensors, folded, host))]


def _pairedit(source: Path, file: Path, spec: LoRA, host: nn.Module | None) -> Lines:
    """The ``.pt`` that PairEdit's own scripts load: bfloat16, alpha 1, whatever ours is."""
    prefix = adapter_files.PREFIX
    layers = [
        key.removeprefix(prefix).removesuffix(".lora_A.weight")
        for key in _tensors(source)
        if ".lora_A." in key
    ]
    if unknown := [layer for layer in layers if stored.pairedit_name(layer) is None]:
        raise UserError(f"{source}: PairEdit trains attention layers only, but this adapter has {unknown[0]}")
    tensors = {key: value.float() for key, value in _tensors(source).items()}
    factors = {
        str(stored.pairedit_name(layer)): (
            tensors[f"{prefix}{layer}.lora_A.weight"], tensors[f"{prefix}{layer}.lora_B.weight"] * spec.scaled,
        )
        for layer in layers
    }  # fmt: skip
    with writing(file):
        files.write(file, stored.pairedit_bytes(factors))
    found = stored.in_diffusers_names(stored.read_tensors(file))
    expected = {
        f"{prefix}{layer}.lora_A.weight": factors[str(stored.pairedit_name(layer))][0] for layer in layers
    }
    for key, value in expected.items():
        if not torch.equal(found[key], value.bfloat16()):
            raise UserError(f"{file}: {key} is read back otherwise than it was written; do not use it")
    lines = [("proof", f"read back without running code: {len(found)} tensors of {len(layers)} layers")]
    if known := calibration.read(source):
        lines.append(
            ("scale", f"1 is as trained; the calibrated default is a scale of {known.unit:.3g} there")
        )
    if spec.rank != inspection.PAIREDIT_RANK:
        lines.append(
            (
                "rank",
                f"{spec.rank}; PairEdit's scripts build rank {inspection.PAIREDIT_RANK} and load no other",
            )
        )
    return lines


WRITERS = {"diffusers": _diffusers, "comfyui": _comfyui, "pairedit": _pairedit}


def _known_to_comfyui(key: str) -> bool:
    match = re.fullmatch(r"transformer\.(?P<layer>.+)\.lora_[AB]\.weight", key)
    return match is not None and COMFYUI.fullmatch(match["layer"]) is not None


def _tensors(source: Path) -> dict[str, Tensor]:
    """The factors as they are stored, under diffusers' names; alphas go into the metadata."""
    prefix = adapter_files.PREFIX
    return {
        prefix + key.removeprefix(prefix): value
        for key, value in stored.in_diffusers_names(stored.read_tensors(source)).items()
        if not key.endswith(".alpha")
    }


def _wholes(source: Path, spec: LoRA) -> list[Path]:
    """Files of the modules trained whole, which lie beside the adapter's."""
    recorded = {source.with_name(adapter_files.full_name(module)) for module in spec.full}
    wholes = sorted(recorded | set(source.parent.glob(adapter_files.full_name("*"))))
    if missing := [whole for whole in wholes if not whole.is_file()]:
        raise UserError(f"{missing[0]} is missing; {source.name} was trained together with it")
    return wholes


def _with_alpha_of_one(record: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """A record that says alpha = rank, so that ``pentimento edit`` takes the new file too."""
    changed = copy.deepcopy(dict(record))
    if changed.get("adapter") in changed.get("adapters", {}):
        changed["adapters"][changed["adapter"]]["alpha"] = float(rank)
    lora = changed.get("config", {}).get("lora")
    if lora is not None:
        lora["alpha"] = None
    return changed


def prove(file: Path, tensors: Mapping[str, Tensor], spec: LoRA, host: nn.Module | None) -> str:
    """Read a file back through stock diffusers, into a new transformer of the same shapes, and compare every tensor.

    Raises:
        UserError: anything differs; the file is not to be trusted.
    """
    import diffusers
    from diffusers.loaders import FluxLoraLoaderMixin

    state, metadata = FluxLoraLoaderMixin.lora_state_dict(
        str(file.parent), weight_name=file.name, local_files_only=True, return_lora_metadata=True
    )
    _compare(file, state, tensors)
    read = f"read back by diffusers {diffusers.__version__}: {len(tensors)} tensors, all equal"
    if host is None:
        return f"{read}; not put into the model, whose configuration is not at hand"
    if not hasattr(host, "load_lora_adapter"):
        return f"{read}; not put into a model, since diffusers has no {type(host).__name__}"
    fresh = _weightless(host)
    with _quiet():
        fresh.load_lora_adapter(state, metadata=metadata, adapter_name=PROOF, low_cpu_mem_usage=True)
    loaded = {
        adapter_files.PREFIX + key.replace(f".{PROOF}.", "."): parameter.data
        for key, parameter in fresh.named_parameters()
        if f".{PROOF}." in key
    }
    _compare(file, loaded, tensors)
    scales = {layer.scaling[PROOF] for layer in fresh.modules() if PROOF in getattr(layer, "scaling", {})}
    if scales != {spec.scaled / spec.rank}:
        raise UserError(
            f"{file}: stock diffusers scales it by {scales}, not by {spec.scaled / spec.rank:g}; do not use it"
        )
    return f"{read}, in the file and in the {len(tensors) // 2} layers of a new {type(host).__name__}"


def _compare(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if missing := sorted(found.keys() ^ expected.keys()):
        raise UserError(
            f"{file}: stock diffusers reads other keys than were written, such as {missing[0]}; do not use it"
        )
    for key, value in expected.items():
        if not torch.equal(found[key].to(value.dtype), value.to(found[key].device)):
            raise UserError(f"{file}: stock diffusers reads other values in {key}; do not use it")


def _weightless(host: Any) -> Any:
    """A new model of the same class and shapes whose weights are one zero each, seen through every shape."""
    with torch.device("meta"):
        fresh = type(host).from_config(host.config)
    for module in fresh.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros(()).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(zero, requires_grad=False))
    return fresh


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' advice on keys of text encoders, which these files do not have."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
