"""A plain LoRA of one with experts, for programs that know no routers: merged, then distilled.

Merging replaces the gates by their means over the run's own pairs: the weighted sum of a layer's experts is one matrix, of which
the best approximation of the wanted rank is kept (Eckart-Young). Distilling trains that LoRA to predict what the original does
from the same noise. What is lost is measured before and after.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from . import data, files, lookup, progress, run, runfolder, schema, train
from . import export as export_
from . import recipe as recipe_
from .adapters import Adapters
from .cache import Samples
from .checkpoint import Interrupted
from .devices import explained_memory
from .errors import UserError
from .method import EditSettings, Example, Method
from .recipe import Recipe
from .schema import Origin
from .specs import ExpertLoRA, LoRA
from .train import HIGHEST_RATE, Draws, Stage

T = TypeVar("T")
PLAIN = "plain"
"""Name of the new adapter beside the original one."""
Scales = dict[str, Any]
"""Adapters to switch on, and how strongly."""


class Predicting(Protocol):
    """What a method must offer beside ``Method``.

    Its ``Config`` holds its one adapter as ``lora``; a ``balance_weight`` there is for experts alone.
    """

    adapters: Adapters

    def predict(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        """The model's prediction for a batch, at noise and time from ``draws``, with the adapters as they are set."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How the plain LoRA is made."""

    rank: int | None = None
    """Rank of the plain LoRA. null: that of the experts, or of the other layers where it is higher."""
    steps: int = 300
    """Updates of distilling; 0: only merge."""
    lr: float = 5e-4
    """Learning rate at its peak (AdamW, falling as a cosine)."""
    batch_size: int = 1
    """Pairs of a step."""
    measured: int = 16
    """Pairs on which the gates and the errors are measured, at most."""

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("steps", 0), ("batch_size", 1), ("measured", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, but it is {value}")
        if not 0 < self.lr <= HIGHEST_RATE:
            raise ValueError(f"lr must be above 0 and at most {HIGHEST_RATE}, but it is {self.lr}")


class Student(Method):
    """A method whose loss is the distance of its plain adapter's prediction to the original's."""

    def __init__(self, method: Method, teacher: str):
        self.method, self.teacher, self.adapters = method, teacher, method.adapters

    def losses(self, batch: dict[str, Tensor], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """One loss, the mean square of the difference."""
        wanted = predict(self.method, batch, draws.twin(), {self.teacher: 1.0})
        self.adapters.use(plain=1.0)
        given = cast(Predicting, self.method).predict(batch, draws)
        yield "distil", F.mse_loss(given.float(), wanted)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """As the method's."""
        return self.method.size(width, height)

    def fingerprint(self) -> str:
        """As the method's."""
        return self.method.fingerprint()

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """As the method's."""
        return self.method.encode(examples)

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As the method's."""
        return self.method.encode_text(prompts)

    def release_encoders(self) -> None:
        """As the method's."""
        self.method.release_encoders()

    def edit(self, example: Example, settings: EditSettings) -> Image:
        """As the method's."""
        return self.method.edit(example, settings)

    def metadata(self) -> dict[str, Any]:
        """As the method's."""
        return self.method.metadata()


def export(folder: Path, file: Path, overrides: Sequence[str]) -> export_.Exported:
    """Write a plain LoRA of a run with experts; see ``export.export``."""
    settings, recipe = _settings(folder, overrides)
    _check(folder, recipe)
    with explained_memory():
        method = recipe_.method_class(recipe.method).load(recipe.backbone, recipe.config)
        method.adapters.load(lookup.final_weights(folder))
        return _make(method, settings, recipe, folder, file)


def _settings(folder: Path, overrides: Sequence[str]) -> tuple[Distillation, Recipe]:
    """Overrides without a dot are ours, the others change the recipe."""
    if not (folder / runfolder.RECIPE).is_file():
        raise UserError(
            f"{folder}: --to lora learns from the run's own data, so it needs the run folder (with {runfolder.RECIPE})"
        )
    known = {field.name for field in dataclasses.fields(Distillation)}
    own = {text.partition("=")[0]: text for text in overrides if text.partition("=")[0] in known}
    origin = Origin(name="export", overrides={(key,): text for key, text in own.items()})
    values = {key: schema.parse_value(text.partition("=")[2]) for key, text in own.items()}
    settings = schema.parse(Distillation, values, origin)
    return settings, recipe_.load(folder, [text for text in overrides if text not in own.values()])


def _check(folder: Path, recipe: Recipe) -> None:
    """Refuse a run of which no plain LoRA is to be made, or can be."""
    method, spec = recipe_.method_class(recipe.method), getattr(recipe.config, "lora", None)
    if isinstance(spec, LoRA) and not isinstance(spec, ExpertLoRA):
        raise UserError(f"{folder} is a plain LoRA already; use --to diffusers or --to comfyui")
    if spec is None or len(method.names(recipe.config)) != 1 or not hasattr(method, "predict"):
        raise UserError(
            f"{folder}: --to lora works for methods with one adapter, config.lora, and a function predict(batch, draws);"
            f" {recipe.method} is no such method"
        )


def _make(
    method: Method, settings: Distillation, recipe: Recipe, folder: Path, file: Path
) -> export_.Exported:
    [(name, spec)], seed = method.adapters.specs.items(), recipe.seed
    assert isinstance(spec, ExpertLoRA)
    training, watched, held = _samples(method, recipe, settings, folder)
    rank = settings.rank or max(spec.rank, spec.expert_rank)
    plain = LoRA(targets=spec.targets, rank=rank, init=spec.init, full=spec.full)
    method.adapters.add(PLAIN, plain, seed=seed)
    merge(method.adapters, name, spec, mean_gates(method, name, training, settings.measured, seed))
    error = {
        key: deviation(method, name, scales, watched, settings.measured, seed)
        for key, scales in (("base", {}), ("merged", {PLAIN: 1.0}))
    }
    kept = "merged"
    if settings.steps:
        merged = {key: value.clone() for key, value in method.adapters.state_dict()[PLAIN].items()}
        _distil(method, name, training, settings, seed, files.nearest(file.absolute().parent))
        error["distilled"] = deviation(method, name, {PLAIN: 1.0}, watched, settings.measured, seed)
        if error["distilled"] < error["merged"]:
            kept = "distilled"
        else:  # too few steps, or too bold ones: what was there before is nearer
            for key, value in method.adapters.state_dict()[PLAIN].items():
                value.copy_(merged[key])
    about = {
        "kept": kept,
        "from": {"experts": spec.experts, "top_k": spec.top_k, "gate": spec.gate},
        "steps": settings.steps,
        "error": {key: round(value, 6) for key, value in error.items()},
        "measured_on": f"{min(len(watched), settings.measured)} {'held-out' if held else 'training'} pairs",
    }
    prompt = lookup.trained_prompt(lookup.final_weights(folder), recipe.data.prompt)
    plain_recipe = dataclasses.replace(recipe, config=_plain_config(recipe.config, plain))
    record = run.record_of(plain_recipe, method, prompt)
    with export_.writing(file):
        method.adapters.save_one(file, PLAIN, {**record, "export": about}, called=name)
    return export_.Exported(file=file, lines=_report(file, method, plain, about))


def _plain_config(config: Any, plain: LoRA) -> Any:
    """The method's settings for the plain LoRA, so that an edit with its file takes them."""
    changes: dict[str, Any] = {"lora": plain}
    if any(field.name == "balance_weight" for field in dataclasses.fields(config)):
        changes["balance_weight"] = 0.0
    return dataclasses.replace(config, **changes)


def _samples(
    method: Method, recipe: Recipe, settings: Distillation, folder: Path
) -> tuple[Samples, Samples, bool]:
    """Encoded pairs to learn from and to measure on, and whether the latter were held out of the run."""
    rows, held = data.held_out(data.open_data(recipe.data), recipe.data)
    cache: dict[str, Any] = {"cache": recipe.data.cache, "folder": folder / run.CACHE}
    wanted = max(settings.steps * settings.batch_size, settings.measured)
    training = Samples(
        _spread(rows, wanted),
        method,
        caption_dropout=recipe.data.caption_dropout,
        workers=recipe.data.workers,
        **cache,
    )
    watched = Samples(_spread(held, settings.measured), method, **cache) if held else training
    with progress.bar("encoding") as advance:
        if watched is not training:
            watched.precompute(advance, release=False)
        training.precompute(advance)
    return training, watched, bool(held)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most so many items, from all over: data sets are often sorted."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


@torch.no_grad()
def predict(method: Method, batch: dict[str, Tensor], draws: Draws, scales: Scales) -> Tensor:
    """A prediction with these adapters, in float32 and without a graph."""
    method.adapters.use(**scales)
    return cast(Predicting, method).predict(batch, draws).float()


def _batches(
    method: Method, samples: Samples, count: int, *key: int | str
) -> Iterator[tuple[dict[str, Tensor], Draws]]:
    """So many pairs one by one, from all over, each with noise of its own that is the same every time."""
    device = next(method.adapters.host.parameters()).device
    for index in _spread(range(len(samples)), count):
        draws = Draws([(*key, index)], device)
        with torch.no_grad():
            batch = samples.batch([index], draws)
        yield batch, draws


def mean_gates(method: Method, name: str, samples: Samples, count: int, seed: int) -> dict[str, Tensor]:
    """Mean gate of each expert ``(E,)`` by layer. With the published top-1 gate that is the expert's share of the tokens."""
    found: list[dict[str, Tensor]] = []
    for batch, draws in _batches(method, samples, count, seed, "gates"):
        predict(method, batch, draws, {name: 1.0})
        found.append({layer: routing.weight for layer, routing in method.adapters.routing(name).items()})
    return {layer: torch.stack([gates[layer] for gates in found]).mean(0) for layer in found[0]}


def deviation(method: Method, name: str, scales: Scales, samples: Samples, count: int, seed: int) -> float:
    """How far predictions with these adapters are from the original's: root mean square, as a part of the original's own."""
    difference = total = 0.0
    for batch, draws in _batches(method, samples, count, seed, "error"):
        wanted = predict(method, batch, draws.twin(), {name: 1.0})
        given = predict(method, batch, draws, scales)
        difference += float((given - wanted).square().sum())
        total += float(wanted.square().sum())
    return (difference / total) ** 0.5 if total else 0.0


def merge(adapters: Adapters, name: str, spec: ExpertLoRA, gates: dict[str, Tensor]) -> None:
    """Fill the plain adapter: layers of experts by their mean, the others by what they are."""
    state = adapters.state_dict()
    old, new = state[name], state[PLAIN]
    for key, value in new.items():
        layer, _, factor = key.removesuffix(".weight").rpartition(".")
        if factor == "lora_A":
            a, b = old[key], old[f"{layer}.lora_B.weight"]
            if layer in gates:
                scale = spec.expert_scaled / spec.expert_rank
                b = b * (scale * gates[layer].to(b.device).repeat_interleave(spec.expert_rank))
            else:
                b = b * (spec.scaled / spec.rank)
            _fill(value, new[f"{layer}.lora_B.weight"], a, b)
        elif factor != "lora_B":
            value.copy_(old[key])  # of a module trained whole


def _fill(new_a: Tensor, new_b: Tensor, a: Tensor, b: Tensor) -> None:
    """Write ``b @ a`` into factors that may have another rank; what they have more keeps its start, where B is zero."""
    if len(a) > len(new_a):
        a, b = reduced(a, b, len(new_a))
    new_b.zero_()
    new_a[: len(a)].copy_(a)
    new_b[:, : len(a)].copy_(b)


def reduced(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the matrix of a given rank that is nearest to ``b (out, n) @ a (n, in)``, without forming that product."""
    left, r_left = torch.linalg.qr(b)
    right, r_right = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]) @ right.T, left @ (u[:, :rank] * root)


def _distil(
    method: Method, name: str, samples: Samples, settings: Distillation, seed: int, folder: Path
) -> None:
    stage = Stage(
        train=(PLAIN,),
        steps=settings.steps,
        lr=settings.lr,
        batch_size=settings.batch_size,
        schedule="cosine",
        weight_decay=0.0,
        save_every=settings.steps,
        keep_last=1,
    )
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".distil-") as work,
        progress.bar("distilling") as bar,
    ):
        settings_of_run = train.Run(out=Path(work), seed=seed, precision=run.precision_of(method))
        try:
            train.train(
                Student(method, name),
                {"distil": stage},
                samples,
                settings_of_run,
                lambda report: bar(report.step, report.steps),
            )
        except Interrupted as stopped:
            raise KeyboardInterrupt("stopped; nothing was written") from stopped


def _report(file: Path, method: Method, plain: LoRA, about: dict[str, Any]) -> export_.Lines:
    error = about["error"]
    base = error["base"]
    tensors = method.adapters.file_tensors(PLAIN)
    lines = [
        ("rank", str(plain.rank)),
        ("measured on", f"{about['measured_on']}: distance to the original's prediction, as a part of it"),
        ("base model", f"{base:.4f}, with no adapter at all"),
    ]
    for key in ("merged", "distilled"):
        if key in error:
            left = f", {error[key] / base:.1%} of the base model's" if base else ""
            lines.append((key, f"{error[key]:.4f}{left}"))
    if "distilled" in error and about["kept"] == "merged":
        lines.append(("kept", "what was merged: distilling made it worse; try more steps or a lower lr"))
    return [*lines, ("proof", export_.prove(file, tensors, plain, method.adapters.host))]
