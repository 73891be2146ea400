"""Recipes: what is trained, on which model, from which data, in which stages. YAML in, frozen dataclasses out."""

import dataclasses
import importlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from . import recipes, schema
from .data import DataConfig
from .errors import UserError
from .flux.config import FluxConfig
from .infinity.config import InfinityConfig
from .method import LARGEST_SEED, Method
from .schema import Keys, Origin
from .train import Stage

METHODS = {
    "editinfinity": "pentimento.methods.editinfinity:EditInfinity",
    "icedit": "pentimento.methods.icedit:ICEdit",
    "image-slider": "pentimento.methods.sliders:ImageSlider",
    "influxedit": "pentimento.methods.influxedit:InFluxEdit",
    "inversion": "pentimento.methods.inversion:Inversion",
    "pairedit": "pentimento.methods.pairedit:PairEdit",
    "text-slider": "pentimento.methods.sliders:TextSlider",
}
"""Names of methods and where their classes are; a recipe may also give such a dotted path itself."""
BACKBONES: dict[str, type] = {"flux": FluxConfig, "infinity": InfinityConfig}
"""Settings of each family of base models, by the name of ``backbone.family``."""
STAGE_NAME = re.compile(r"\w[\w-]*")
"""What a stage may be called: its checkpoints are folders of that name, and overrides part their keys at dots."""
POLYNOMIAL_END = 1e-7
"""Learning rate at which diffusers' polynomial schedule ends, whatever it begins with."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is looked at while it trains."""

    every: int = 0
    """Draw samples and measure the held-out pictures every so many steps, at step 0 too; 0: never."""
    count: int = 4
    """Held-out pictures that are drawn; more than there are means all."""
    steps: int | None = None
    """Sampling steps of these pictures; null: the method's own number."""
    loss_every: int = 0
    """Measure the held-out loss every so many steps; 0: whenever samples are drawn."""
    wandb: str | None = None
    """Project of Weights & Biases that numbers and samples are sent to as well, as a run of the run folder's name; null:
    none. Needs the extra wandb, and `wandb login` or the variable WANDB_MODE=offline."""

    def __post_init__(self) -> None:
        for name in ("every", "count", "loss_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but it is {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1 or null, but it is {self.steps}")
        if self.wandb is not None and not re.fullmatch(r"[^/\\#?%:]{1,128}", self.wandb):
            raise ValueError(
                f"wandb names a project in 1 to 128 characters without any of / \\ # ? % :, but it is {self.wandb!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Several runs of one recipe: every combination of what is listed here."""

    data: tuple[str, ...] | None = None
    """Data sets: one run for each data.root."""
    noise_scales: tuple[float, ...] | None = None
    """Values of config.noise_scale."""
    seeds: tuple[int, ...] | None = None
    """Versions: values of seed."""

    def __post_init__(self) -> None:
        lists = {name: getattr(self, name) for name in ("data", "noise_scales", "seeds")}
        if all(values is None for values in lists.values()):
            raise ValueError("sweep is empty; list data, noise_scales or seeds, or leave it out")
        for name, values in lists.items():
            if values is not None and not values:
                raise ValueError(f"{name} is empty; name at least one, or leave it out")
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice: {', '.join(map(str, values))}")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The part of a recipe that an edit needs too."""

    method: str
    """Which editing method: a known name, or package.module:Class of one's own."""
    backbone: FluxConfig | InfinityConfig = field(default_factory=FluxConfig)
    """The frozen base model."""
    config: Any = field(default_factory=dict)
    """The method's own settings."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training, complete."""

    method: str
    """Which editing method: a known name, or package.module:Class of one's own."""
    about: str = ""
    """What this recipe is for, in a line or two."""
    backbone: FluxConfig | InfinityConfig = field(default_factory=FluxConfig)
    """The frozen base model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The pictures to learn from."""
    config: Any = field(default_factory=dict)
    """The method's own settings."""
    stages: dict[str, Stage]
    """What is trained, one stage after the other: the adapters and the optimizer of each."""
    watch: Watch = field(default_factory=Watch)
    """What is looked at while it trains."""
    seed: int = 0
    """Seed of everything random: initial adapters, order of the pictures, noise, samples."""
    sweep: Sweep | None = None
    """Train several runs instead of one, each in a folder of its own inside --out: every combination of the lists that it
    holds, data (values of data.root), noise_scales (of config.noise_scale) and seeds (of seed). null: one."""


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by the name of a shipped one, or from a YAML file or a run folder, with ``a.b.c=value`` overrides.

    ``stages.NAME=null`` leaves a stage out.

    Raises:
        UserError: no such recipe, broken YAML, an unknown key, a value of another type, an impossible combination.
    """
    text, name = _find(name_or_path)
    raw, origin = schema.read(text, name)
    return build(raw, override(raw, origin, overrides))


def build(raw: Mapping[str, Any], origin: Origin) -> Recipe:
    """A recipe from plain values; the method's own settings are parsed with its ``Config``. A stage of ``null`` is left out."""
    stages = raw.get("stages")
    if isinstance(stages, Mapping):
        raw = {**raw, "stages": {name: stage for name, stage in stages.items() if stage is not None}}
    recipe = schema.parse(Recipe, _with_family(raw, origin), origin)
    recipe = dataclasses.replace(recipe, config=_config(recipe.method, recipe.config, origin))
    _check(recipe, origin)
    return recipe


def build_setup(raw: Mapping[str, Any], origin: Origin) -> Setup:
    """The same for what an edit needs."""
    setup = schema.parse(Setup, _with_family(raw, origin), origin)
    return dataclasses.replace(setup, config=_config(setup.method, setup.config, origin))


def _with_family(raw: Mapping[str, Any], origin: Origin) -> Mapping[str, Any]:
    """Plain values whose backbone section says which family it is of: the method's own, if nothing was said."""
    method, given = raw.get("method"), raw.get("backbone", {})
    if not isinstance(method, str) or not isinstance(given, Mapping):
        return raw  # the parser explains it
    where = origin.at(("method",)), origin.at(("backbone", "family"))
    wanted = method_class(method, where[0]).family
    family = given.get("family", wanted)
    if family not in BACKBONES:
        near = schema.nearest(str(family), list(BACKBONES))
        raise UserError(
            f"{where[1]}: backbone.family should be one of {', '.join(BACKBONES)}, but {schema.describe_value(family)} was given."
            f"{f' Did you mean {near}?' if near else ''}"
        )
    if family != wanted:
        raise UserError(f"{where[1]}: backbone.family is {family}, but {method} works on {wanted}")
    return {**raw, "backbone": {**given, "family": family}}


def _config(method: str, given: Any, origin: Origin) -> Any:
    config_class = method_class(method, origin.at(("method",))).Config
    if given is not None and not isinstance(given, Mapping):
        where, value = origin.at(("config",)), schema.describe_value(given)
        raise UserError(f"{where}: config should be a section of `key: value` lines, but {value} was given")
    return schema.parse(config_class, given or {}, origin, ("config",))


def dump(recipe: Recipe) -> str:
    """A recipe with every value resolved, as YAML; :func:`load` gives an equal recipe back."""
    return yaml.safe_dump(schema.plain(recipe), sort_keys=False, allow_unicode=True, width=120)


def explain(recipe: Recipe) -> str:
    """A recipe as YAML with each field's meaning above it: a starting point for one's own file."""
    return "\n".join(_commented(recipe, 0)) + "\n"


def method_class(name: str, where: str = "method") -> type[Method]:
    """The class of a method, by its known name or as ``package.module:Class``."""
    if name not in METHODS and ":" not in name:
        near = schema.nearest(name, list(METHODS))
        raise UserError(
            f"{where}: method {name!r} is unknown.{f' Did you mean {near}?' if near else ''}"
            f" Known: {', '.join(METHODS)}; one of your own is named as package.module:Class"
        )
    module, _, attribute = METHODS.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (
        ImportError,
        AttributeError,
        ValueError,
        TypeError,
    ) as error:  # the last two: no module, a relative one
        raise UserError(f"{where}: method {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"{where}: {name!r} is not a Method class")
    return found


def _find(name_or_path: str | Path) -> tuple[str, str]:
    """The text of a recipe and what to call it in messages."""
    names = recipes.names()
    if str(name_or_path) in names:
        return recipes.text(str(name_or_path)), f"recipe {name_or_path}"
    path = Path(name_or_path)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError:
        near = schema.nearest(path.name.removesuffix(".yaml"), names)
        meant = f" Did you mean {near}?" if near else ""
        raise UserError(
            f"no recipe named {str(name_or_path)!r}, and no such file.{meant} Recipes that ship: {', '.join(names)}"
        ) from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder without recipe.yaml; name a recipe, a YAML file or a run folder"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file (byte {error.start} is not UTF-8)") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def override(raw: dict[str, Any], origin: Origin, overrides: Sequence[str]) -> Origin:
    """Write ``a.b.c=value`` into plain values, in place; returns the origin that knows of them."""
    written: dict[Keys, str] = {}
    for text in overrides:
        dotted, equals, value = text.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            raise UserError(f"override {text!r}: write it as key=value, such as stages.edit.steps=200")
        inner = _descend(raw, keys, text)
        if keys[:-1] == ("stages",) and value == "null":
            _known_stage(inner, keys[-1], text)
            del inner[keys[-1]]
            continue
        plain_text = value not in ("", "null") and value[:1] not in ("'", '"') and _wants_text(raw, keys)
        inner[keys[-1]] = value if plain_text else schema.parse_value(value)
        written[keys] = text
    return dataclasses.replace(origin, overrides=written)


def _descend(raw: dict[str, Any], keys: Keys, text: str) -> dict[str, Any]:
    """The section that holds the last of the keys; sections that are not there are made, stages are not."""
    inner: Any = raw
    for depth, key in enumerate(keys[:-1], 1):
        if inner.get(key) is None:
            if keys[: depth - 1] == ("stages",):
                _known_stage(inner, key, text)
            inner[key] = {}
        if not isinstance(inner[key], dict):
            section = ".".join(keys[:depth])
            raise UserError(
                f"override {text}: {section} is {schema.describe_value(inner[key])}, not a section"
            )
        inner = inner[key]
    return inner


def _known_stage(stages: Mapping[str, Any], name: str, text: str) -> None:
    if stages.get(name) is None:
        near = schema.nearest(name, list(stages))
        meant = f" Did you mean {near}?" if near else ""
        if not stages:
            raise UserError(
                f"override {text}: stages are of recipes; what was trained already is edited with as it is"
            )
        raise UserError(f"override {text}: there is no stage {name!r}.{meant} Stages: {', '.join(stages)}")


def _wants_text(raw: Mapping[str, Any], keys: Keys) -> bool:
    """Whether the field is one for text, which is then taken as it stands: a prompt may hold colons, dates and braces."""
    kind: Any = Recipe
    for depth, key in enumerate(keys):
        owner = schema.section(kind, {key: None})
        if depth == 0 and key == "config":
            kind = method_class(str(raw.get("method"))).Config
        elif owner is not None:
            kind = schema.hints(owner).get(key)
        else:
            members = get_args(kind)
            kind = members[1] if get_origin(kind) is dict else None
    return kind is not None and schema.is_text(kind)


def _check(recipe: Recipe, origin: Origin) -> None:
    """Combinations that cannot work and that no section sees for itself."""
    if not recipe.stages:
        raise UserError(
            f"{origin.at(('stages',))}: stages is empty; name at least one, with `train` and `steps`"
        )
    if not 0 <= recipe.seed <= LARGEST_SEED:
        raise UserError(
            f"{origin.at(('seed',))}: seed must lie between 0 and {LARGEST_SEED}, but it is {recipe.seed}"
        )
    _check_schedules(recipe, origin)
    known = method_class(recipe.method).names(recipe.config)
    for name, stage in recipe.stages.items():
        if not STAGE_NAME.fullmatch(name):
            raise UserError(
                f"{origin.at(('stages', name))}: {name!r} cannot be the name of a stage; use letters, digits, _ and, from the"
                " second on, -"
            )
        unknown = [adapter for adapter in stage.train if known and adapter not in known]
        if unknown:
            key = ("stages", name, "train")
            raise UserError(
                f"{origin.at(key)}: {'.'.join(key)} names {unknown[0]!r}, but {recipe.method} has no such adapter; "
                f"it has {', '.join(known)}"
            )


def _check_schedules(recipe: Recipe, origin: Origin) -> None:
    for name, stage in recipe.stages.items():
        # No rate: the optimizer's own, which is larger.
        if stage.schedule == "polynomial" and stage.lr is not None and stage.lr <= POLYNOMIAL_END:
            key = ("stages", name, "lr")
            raise UserError(
                f"{origin.at(key)}: {'.'.join(key)} must be above {POLYNOMIAL_END:g}, where the schedule polynomial ends,"
                f" but it is {stage.lr:g}"
            )


def _commented(value: Any, indent: int) -> Iterator[str]:
    pad = " " * indent
    known = schema.hints(type(value))
    meaning = schema.docs(type(value))
    for name, kind in known.items():
        inner = getattr(value, name)
        about = meaning.get(name, "")
        if not (dataclasses.is_dataclass(inner) or isinstance(inner, dict)):
            about = f"{about} [{schema.describe(kind)}]".strip()
        yield from _wrapped(about, f"{pad}# ")
        yield from _entry(name, inner, indent)


def _wrapped(text: str, margin: str) -> list[str]:
    # Not at hyphens: names of files and options would break in two.
    return textwrap.wrap(text, 110, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def _entry(name: str, inner: Any, indent: int) -> Iterator[str]:
    pad = " " * indent
    if dataclasses.is_dataclass(inner):
        yield f"{pad}{name}:"
        yield from _commented(inner, indent + 2)
    elif isinstance(inner, dict) and inner:
        yield f"{pad}{name}:"
        for key, member in inner.items():
            yield from _entry(key, member, indent + 2)
    else:
        # As the one member of a flow list, so that everything stays on the line and text is quoted where it must be.
        text = yaml.safe_dump(
            [schema.plain(inner)], default_flow_style=True, allow_unicode=True, width=1_000_000
        )
        yield f"{pad}{name}: {text.strip()[1:-1]}"
