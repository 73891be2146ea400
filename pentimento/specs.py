"""What an adapter is made of: which layers, of which rank, with how many experts; from a recipe, or read off a file."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from . import adapter_files, inspection
from .errors import UserError
from .infinity import authored

Gate = Literal["topk-softmax", "softmax-topk"]


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank layers, and modules trained whole."""

    # Which other programs load the file, for the model card; ``folder`` is where it lies.
    elsewhere: ClassVar[str] = 'In stock diffusers, `pipe.load_lora_weights("{folder}")` loads it.'
    targets: str | tuple[str, ...]
    """Which linear layers get one: names or ends of names, or one regular expression over whole names."""
    rank: int = 16
    """Rank of the update of a layer."""
    alpha: float | None = None
    """The update is scaled by alpha / rank. null: alpha = rank, a scale of 1."""
    init: Literal["gaussian", "default", "kaiming", "orthogonal"] = "gaussian"
    """How A starts (B is zero): gaussian, N(0, 1/rank^2), as in diffusers' scripts; default, peft's Kaiming uniform; kaiming,
    uniform between -sqrt(3/inputs) and +sqrt(3/inputs), as in PairEdit. orthogonal: A as kaiming, B random orthonormal columns
    that are never trained, as Concept Sliders does for all but its method "full"."""
    dropout: float = 0.0
    """Share of a layer's inputs that the low-rank update does not see in a step of training, drawn anew for each."""
    full: tuple[str, ...] = ()
    """Small modules trained whole beside the low-rank ones, such as x_embedder; saved in a file of their own."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, but it is {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0 or null, but it is {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, but it is {self.dropout}")
        if not self.targets:
            raise ValueError("targets is empty; name the layers that get a LoRA")

    @property
    def scaled(self) -> float:
        """Alpha as a number."""
        return float(self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True, kw_only=True)
class ExpertLoRA(LoRA):
    """A LoRA that has several experts and a router on some of its layers, as ICEdit's (arXiv:2504.20690)."""

    elsewhere: ClassVar[str] = (
        "It has experts, which stock diffusers and ComfyUI do not know;"
        " `pentimento export RUN --to lora --out FILE` makes a plain LoRA of it for them."
    )
    expert_targets: str = r".*(ff\.net|proj_out).*"
    """Which of the targets get experts instead of one LoRA: a regular expression over whole names."""
    experts: int = 4
    """Experts of such a layer."""
    expert_rank: int = 32
    """Rank of each expert's update."""
    expert_alpha: float | None = None
    """An expert's update is scaled by expert_alpha / expert_rank. null: expert_alpha = expert_rank, a scale of 1."""
    top_k: int = 1
    """Experts that act on a token: those that its router rates highest."""
    gate: Gate = "topk-softmax"
    """Weights of the chosen experts. topk-softmax: softmax over their logits, as published; with top_k 1 that is always 1, so
    that the router keeps its random start. softmax-topk: what the softmax over all gives them, which trains it then too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError("dropout has no part in layers with experts; leave it out")
        for name, least in (("experts", 2), ("expert_rank", 1), ("top_k", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but it is {getattr(self, name)}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k must be at most the number of experts, {self.experts}, not {self.top_k}")
        if self.expert_alpha is not None and not 0 < self.expert_alpha < math.inf:
            raise ValueError(f"expert_alpha must be above 0 or null, but it is {self.expert_alpha}")

    @property
    def expert_scaled(self) -> float:
        """Alpha of the experts as a number."""
        return float(self.expert_rank if self.expert_alpha is None else self.expert_alpha)


def spec_of(path: Path | str) -> LoRA:
    """What an adapter file needs to be loaded into: its layers, rank, alpha, experts and modules trained whole.

    A file of others with experts does not say how many of them act on a token: it is read with one, as published.

    Raises:
        UserError: no LoRA that can be read here, or one of mixed ranks.
    """
    file = Path(path)
    tensors, alpha, editinfinity = adapter_files.read_lora(file)
    ranks = {key: value.shape[1] for key, value in tensors.items() if ".lora_B." in key and value.dim() > 1}
    experts = inspection.experts_of(tensors)
    inner = {key: rank for key, rank in ranks.items() if inspection.EXPERT.match(key)}
    plain = {key: rank for key, rank in ranks.items() if key.endswith(".lora_B.weight")}
    if editinfinity and not plain:
        raise UserError(
            f"{file}: its factors are flat, as EditInfinity's scripts leave them on several GPUs; only the model tells their rank,"
            " so that it is loaded with method=editinfinity only"
        )
    rank = _only(file, "ranks", plain or inner)
    if alpha is None:
        alpha = adapter_files.recorded_alpha(file, default=authored.ALPHA if editinfinity else float(rank))
    recorded = adapter_files.recorded_adapter(file)
    layers = [key.removesuffix(".lora_B.weight") for key in plain] + list(experts)
    full = tuple(recorded.get("full", []))
    if not experts:
        return LoRA(targets=_names(layers), rank=rank, alpha=alpha, full=full)
    known = {key: recorded[key] for key in ("expert_alpha", "top_k", "gate") if key in recorded}
    number, expert_rank = _only(file, "numbers of experts", experts), _only(file, "ranks of experts", inner)
    try:
        return ExpertLoRA(
            targets=_names(layers),
            rank=rank,
            alpha=alpha,
            full=full,
            expert_targets=_names(experts),
            experts=number,
            expert_rank=expert_rank,
            **known,
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file}: its experts cannot be used ({error}). {adapter_files.seems(file)}"
        ) from error


def _names(layers: Iterable[str]) -> str:
    return "|".join(re.escape(layer) for layer in layers)


def _only(file: Path, what: str, values: dict[str, int]) -> int:
    """The one value that all layers have."""
    found = sorted(set(values.values()))
    if len(found) != 1:
        said = f"mixed {what} {found}" if found else "no LoRA factors"
        raise UserError(f"{file}: {said}. {adapter_files.seems(file)}")
    return found[0]


def targets(spec: LoRA) -> str | list[str]:
    """The targets as peft and JSON take them."""
    return spec.targets if isinstance(spec.targets, str) else sorted(spec.targets)


def matches(pattern: str | tuple[str, ...], target: str, path: str, field: str = "targets") -> bool:
    """As peft decides: a lone string is a regular expression, those of a list are ends of names."""
    if not isinstance(pattern, str):
        return path == target or path.endswith(f".{target}")
    try:
        return re.fullmatch(target, path) is not None
    except re.error as error:
        raise UserError(f"lora.{field}: {target!r} is not a regular expression: {error}") from error


def hit(spec: LoRA, path: str) -> bool:
    """Whether a layer is a target."""
    every = [spec.targets] if isinstance(spec.targets, str) else spec.targets
    return any(matches(spec.targets, target, path) for target in every)


def hit_by_experts(spec: LoRA, path: str) -> bool:
    """Whether a layer is a target that gets experts."""
    if not isinstance(spec, ExpertLoRA):
        return False
    return hit(spec, path) and matches(spec.expert_targets, spec.expert_targets, path, "expert_targets")


def described(spec: LoRA) -> dict[str, Any]:
    """What an adapter's file records of it, JSON-able."""
    about = {"rank": spec.rank, "alpha": spec.scaled, "targets": targets(spec), "full": list(spec.full)}
    if isinstance(spec, ExpertLoRA):
        names = ("expert_targets", "experts", "expert_rank", "top_k", "gate")
        about |= {name: getattr(spec, name) for name in names} | {"expert_alpha": spec.expert_scaled}
    return about


def stock_record(spec: LoRA) -> str:
    """What diffusers makes peft's config of; without it alpha would be taken to be the rank.

    Of experts diffusers knows nothing: it would load such a file without an error, as plain layers of random numbers. The keys
    that it cannot know make it refuse.
    """
    record: dict[str, Any] = {
        "r": spec.rank, "lora_alpha": spec.scaled, "target_modules": targets(spec), "bias": "none",
    }  # fmt: skip
    if isinstance(spec, ExpertLoRA):
        record |= {"experts": spec.experts, "expert_targets": spec.expert_targets, "top_k": spec.top_k}
    return json.dumps(
        {adapter_files.PREFIX + key: value for key, value in record.items()}, indent=2, sort_keys=True
    )


def check_experts(
    file: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, Any], spec: LoRA, name: str
) -> None:
    """Refuse a file with experts for a plain adapter, the reverse, and other experts, before a list of keys would say so."""
    found = inspection.experts_of(tensors)
    if not isinstance(spec, ExpertLoRA):
        if found:
            raise UserError(
                f"{file} has experts ({max(found.values())} in {len(found)} layers), but adapter {name!r} is a plain LoRA; set"
                f" lora.experts={max(found.values())} to use it as it is. pentimento export RUN --to lora makes it plain"
            )
        return
    if not found:
        raise UserError(
            f"{file} is a plain LoRA, but adapter {name!r} has {spec.experts} experts; leave lora.experts and the settings"
            " that go with it out to use it"
        )
    ranks = [value.shape[0] for key, value in tensors.items() if ".lora_A.expert_" in key]
    rank = max(ranks, default=spec.expert_rank)
    # Files of others say nothing of the rest; for alpha they mean the rank.
    guessed = {"experts": max(found.values()), "expert_rank": rank, "expert_alpha": float(rank)}
    here, there = described(spec), {**guessed, **stored}
    for key in ("experts", "expert_rank", "expert_alpha", "top_k", "gate"):
        own = here[key]
        if there.get(key, own) != own:
            raise UserError(
                f"{file} was trained with {key} {there[key]}, adapter {name!r} has {own}; set lora.{key}={there[key]}"
            )
