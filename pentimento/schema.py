"""YAML into frozen dataclasses, with errors that explain: where, what was given, what is expected, what the key means.

A field is documented once, by the string beneath it in its class; that text is read from the source and is what errors,
``pentimento recipes NAME`` and the comments of a written recipe show.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from .errors import UserError

T = TypeVar("T")
Keys = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once, ``2e-3`` is a number, and ``off``, ``no`` and ``2026-01-01`` are text.

    Nothing holds itself, and nesting ends somewhere.
    """

    def get_single_node(self) -> yaml.Node | None:
        try:
            node = super().get_single_node()
        except RecursionError as error:
            raise yaml.YAMLError("it is nested too deeply") from error
        if node is not None:
            _refuse_loops(node, ())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                first = seen[key.value]
                mark = key.start_mark
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice (first in line {first}): keep one",
                    problem_mark=mark,
                )
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 2e-3 (no point) is text, off is false and 2026-01-01 a date; YAML 1.2 reads what
# authors of recipes mean.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if not tag.endswith((":bool", ":timestamp"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _refuse_loops(node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
    """An alias inside of what it stands for (``&s {edit: *s}``) would never end."""
    if any(node is one for one in above):
        raise yaml.MarkedYAMLError(problem="an alias stands inside of itself", problem_mark=node.start_mark)
    if isinstance(node, yaml.CollectionNode):
        for inner in node.value:
            for member in inner if isinstance(inner, tuple) else (inner,):
                _refuse_loops(member, (*above, node))


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where values come from, for messages: a file with the line of each key, and overrides."""

    name: str
    lines: Mapping[Keys, int] = field(default_factory=dict)
    overrides: Mapping[Keys, str] = field(default_factory=dict)

    def at(self, path: Keys) -> str:
        """What wrote this key: ``FILE, line 7`` or the override."""
        for keys, text in reversed(list(self.overrides.items())):
            if keys[: len(path)] == path or path[: len(keys)] == keys:
                return f"override {text}"
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.name}, line {self.lines[path[:end]]}"
        return self.name


def read(text: str, name: str) -> tuple[dict[str, Any], Origin]:
    """The mapping that a YAML text holds. ``name`` stands for the file in messages.

    Raises:
        UserError: broken YAML (with line and column), a key that stands twice, or no mapping at the top.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number such as 0b2
        raise UserError(_broken(error, name)) from error
    if node is None or not isinstance(value, dict):
        got = "it is empty" if value is None else f"it holds {describe_value(value)}"
        raise UserError(
            f"{name}: a recipe is a mapping of keys to values, such as `method: influxedit`, but {got}"
        )
    return value, Origin(name=name, lines=dict(_lines(node, ())))


def _broken(error: Exception, name: str) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = (error.problem or error.context) if isinstance(error, yaml.MarkedYAMLError) else str(error)
    return f"{name}{place}: not valid YAML: {problem}"


def _lines(node: yaml.Node, path: Keys) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield (*path, key.value), key.start_mark.line + 1
                yield from _lines(value, (*path, key.value))


def parse_value(text: str) -> Any:
    """The value of an override, typed as in YAML: ``10``, ``2e-3``, ``true``, ``[edit]``, ``{rank: 4}``, text."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(_broken(error, f"override value {text!r}")) from error


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def section(kind: Any, value: Any = None) -> type | None:
    """The dataclass among a type's alternatives; of several the one that is named, or that knows most of the value's keys."""
    classes = [m for m in _members(kind) if isinstance(m, type) and dataclasses.is_dataclass(m)]
    if len(classes) > 1 and isinstance(value, Mapping):
        classes.sort(
            key=lambda c: (_denies(c, value), -len(set(value) & {f.name for f in dataclasses.fields(c)}))
        )
    return classes[0] if classes else None


def _denies(cls: type, value: Mapping[str, Any]) -> bool:
    """Whether a field that may only say one thing, such as the family of a base model, says another."""
    only = {name: get_args(kind) for name, kind in hints(cls).items() if get_origin(kind) is Literal}
    return any(len(said) == 1 and value.get(name, said[0]) != said[0] for name, said in only.items())


def knows(kind: Any, key: str) -> bool:
    """Whether a section of this type may hold a key."""
    cls = section(kind, {key: None})
    return cls is not None and key in hints(cls)


def hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, in their order."""
    known = typing.get_type_hints(cls)
    return {f.name: known[f.name] for f in dataclasses.fields(cls) if f.init}


def is_text(kind: Any) -> bool:
    """Whether a type takes text and, besides null, nothing else."""
    return set(_members(kind)) - {types.NoneType} == {str}


def describe(kind: Any) -> str:
    """A type in words."""
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
    }
    parts = []
    for member in _members(kind):
        origin, args = get_origin(member), get_args(member)
        if origin is Literal:
            parts.append(("one of " if len(args) > 1 else "") + ", ".join(str(a) for a in args))
        elif origin in (tuple, list, Sequence):
            inner = [a for a in args if a is not Ellipsis]
            several = "; ".join(describe(a) for a in inner) if len(set(inner)) > 1 else describe(inner[0])
            parts.append(f"a list ({several})")
        elif origin in (dict, Mapping) or (isinstance(member, type) and dataclasses.is_dataclass(member)):
            parts.append("a section of `key: value` lines")
        else:
            parts.append(names.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(parts)


def describe_value(value: Any) -> str:
    """A value that was given, with its type where that is not obvious."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"{str(value).lower()} (true or false; quote it if you mean the word)"
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, Mapping):
        return f"a section ({', '.join(map(str, value)) or 'empty'})"
    return f"the list {value}" if isinstance(value, (list, tuple)) else repr(value)


def docs(cls: type) -> dict[str, str]:
    """What each field of a dataclass means: the string beneath it in the source, on one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body: list[ast.stmt] = ast.parse(Path(inspect.getfile(base)).read_text(encoding="utf-8")).body
        for name in base.__qualname__.split("."):
            body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == name)
        for above, below in zip(body, body[1:], strict=False):
            if (
                isinstance(above, ast.AnnAssign)
                and isinstance(above.target, ast.Name)
                and isinstance(below, ast.Expr)
            ):
                if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                    found[above.target.id] = " ".join(below.value.value.split())
    return found


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that a person most likely meant."""
    low = {k.lower().replace("-", "_"): k for k in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), low, n=1, cutoff=0.5)
    return low[close[0]] if close else None


def parse(cls: type[T], value: Any, origin: Origin, path: Keys = ()) -> T:
    """A dataclass from plain values, every key known and of its type.

    Raises:
        UserError: the first key that is unknown, missing or of another type, with its meaning and where it stands.
    """
    _check(cls, value, origin, path)
    value = _chosen(cls, value, origin, path)
    try:
        return TypeAdapter(cls).validate_python(value)
    except ValidationError as error:
        raise UserError(_mistake(cls, value, error, origin, path)) from error
    except UserError as error:
        # A section that checks itself says data.limit where it means its own key.
        named = re.match(r"[a-z_]+(?:\.\w+)+", str(error))
        raise UserError(f"{origin.at(tuple(named[0].split('.')) if named else path)}: {error}") from error


def _check(kind: Any, value: Any, origin: Origin, path: Keys) -> None:
    cls = section(kind, value)
    if cls is not None and isinstance(value, Mapping):
        known = hints(cls)
        for key in value:
            if key not in known:
                raise UserError(unknown_key(cls, str(key), origin, path))
        for f in dataclasses.fields(cls):
            if f.name in value:
                _check(known[f.name], value[f.name], origin, (*path, f.name))
            elif f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                stands = origin.at(path)
                raise UserError(f"{stands}: {'.'.join((*path, f.name))} is missing.{_meaning(cls, f.name)}")
    for member in _members(kind):
        origin_type, args = get_origin(member), get_args(member)
        if origin_type is dict and isinstance(value, Mapping):
            for key, inner in value.items():
                if args[0] is str and not isinstance(key, str):
                    raise UserError(
                        f"{origin.at((*path, str(key)))}: {'.'.join(path)} has the key {key!r}, which should be text;"
                        f" write it in quotes: '{key}'"
                    )
                _check(args[1], inner, origin, (*path, str(key)))
        elif origin_type in (tuple, list) and isinstance(value, (list, tuple)) and args:
            for number, inner in enumerate(value):
                _check(args[0], inner, origin, (*path, str(number)))
    # Pydantic takes true for 1, which nobody means.
    if isinstance(value, bool) and bool not in _members(kind) and Any not in _members(kind):
        raise UserError(_wrong(kind, value, "", origin, path))


def _chosen(cls: type, value: Any, origin: Origin, path: Keys) -> Any:
    """Sections that may be one of several dataclasses, parsed as the one that ``section`` names.

    Left to pydantic, a mistake in one of them would make it the other without a word, whose keys it all has.
    """
    if not isinstance(value, Mapping):
        return value
    known, parsed = hints(cls), dict(value)
    for name in known.keys() & value.keys():
        inner, chosen = value[name], section(known[name], value[name])
        if chosen is None or not isinstance(inner, Mapping):
            continue
        several = sum(map(dataclasses.is_dataclass, _members(known[name]))) > 1
        parsed[name] = (parse if several else _chosen)(chosen, inner, origin, (*path, name))
    return parsed


def _meaning(cls: type, name: str) -> str:
    text = docs(cls).get(name)
    return f" Its meaning: {text}" if text else ""


def unknown_key(cls: type, key: str, origin: Origin, path: Keys) -> str:
    """The message for a key that a section does not have."""
    known = list(hints(cls))
    near = nearest(key, known)
    meant = f" Did you mean {near}?{_meaning(cls, near)}" if near else ""
    inside = f"in {'.'.join(path)}" if path else "at the top of a recipe"
    return (
        f"{origin.at((*path, key))}: {'.'.join((*path, key))} is not a known key.{meant}"
        f" Known {inside}: {', '.join(known)}"
    )


def _mistake(cls: type, value: Any, error: ValidationError, origin: Origin, path: Keys) -> str:
    """The first of pydantic's findings in this package's words."""
    first = error.errors()[0]
    kind: Any = cls
    doc, inside, given = "", path, value
    for step in first["loc"]:
        owner = section(kind, given)
        if owner is not None and step in hints(owner):
            kind, doc = hints(owner)[str(step)], _meaning(owner, str(step))
            given = given.get(step) if isinstance(given, Mapping) else getattr(given, str(step))
        elif isinstance(given, Mapping) and step in given:
            kind, given = next(get_args(m)[1] for m in _members(kind) if get_origin(m) is dict), given[step]
        elif isinstance(given, (list, tuple)) and isinstance(step, int):
            kind, given = (
                next(get_args(m)[0] for m in _members(kind) if get_origin(m) in (tuple, list)),
                given[step],
            )
        else:
            continue  # the name of a union's member, which is no key
        inside = (*inside, str(step))
    if first["type"] in ("value_error", "assertion_error"):
        said = str(first["ctx"]["error"])
        return f"{origin.at(inside)}: {'.'.join(inside) + ': ' if inside else ''}{said}"
    return _wrong(kind, given, doc, origin, inside)


def _wrong(kind: Any, given: Any, doc: str, origin: Origin, path: Keys) -> str:
    choices = [str(a) for m in _members(kind) if get_origin(m) is Literal for a in get_args(m)]
    near = nearest(given, choices) if isinstance(given, str) else None
    meant = f" Did you mean {near}?" if near else ""
    return (
        f"{origin.at(path)}: {'.'.join(path) or 'the recipe'} should be {describe(kind)}, "
        f"but {describe_value(given)} was given.{meant}{doc}"
    )


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as the mappings, lists and text that YAML and JSON write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
