"""From an instruction back to what is wanted of a scene: the tasks' own phrasings, read the other way round."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from . import captions, tasks
from . import scene as world
from .captions import a
from .scene import Scene

MIDDLING = {name: (low + high) / 2 for name, (low, high) in world.OBJECT_RANGES.items()}
"""Of an object whose place and size the words leave open."""

PARTS = {"hair": "hair", "shirt": "shirt", "hat": "hat_colour", "background": "bg"}
"""What has a colour besides objects, and its attribute."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A scene that fulfils an instruction."""

    target: Scene
    wanted: dict[str, Any]
    """The attributes that the instruction sets, with their values."""
    free: tuple[str, ...] = ()
    """Continuous attributes that it leaves open; those of ``target`` are only likely."""


Words = Mapping[str, str]


def goals(instruction: str, scene: Scene) -> list[Goal]:
    """All that an instruction can mean for a scene: several where the words leave a choice, none if not understood."""
    text = " ".join(instruction.split()).rstrip(".!").lower()
    found: list[Goal] = []
    for name, words in _matches(text):
        if scene["kind"] in READERS[name][0]:
            found += READERS[name][1](scene, words)
    return found


def is_identity(instruction: str) -> bool:
    """Whether nothing is to change, which can be judged on any picture."""
    text = " ".join(instruction.split()).rstrip(".!").lower()
    return any(name == "identity" for name, _ in _matches(text))


def _matches(text: str) -> Iterator[tuple[str, Words]]:
    for name, form in _forms():
        match = form.fullmatch(text)
        if match:
            yield name, match.groupdict()


@cache
def _forms() -> list[tuple[str, re.Pattern[str]]]:
    """Every phrasing as a pattern whose groups are its open words."""
    # Longest first, so that `top left` is not taken for `top`.
    slots = {
        slot: "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        for slot, words in _vocabulary().items()
    }
    return [
        (name, re.compile(re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{slots[m[1]]})", re.escape(form))))
        for name, forms in tasks.PHRASINGS.items()
        for form in forms
    ]


@cache
def _vocabulary() -> dict[str, list[str]]:
    """All that can stand in each open place of a phrasing."""
    things, cells = list(_things()), range(len(world.CELLS))
    hats = [tasks.hat_of(colour) for colour in range(len(world.COLOURS))]
    return {
        "hat": hats,
        "one": [a(name) for name in things],
        "place": [captions.place({"cell0": cell}, 0) for cell in cells],
        "to": [tasks.towards(cell) for cell in cells],
        "old": [*PARTS, *tasks.WORN.values(), *things],
        "new": [*hats, "glasses", *(a(shape) for shape in world.SHAPES)],
        "colour": list(world.COLOUR_NAMES),
        "style": [tasks.style_name(index) for index in range(1, len(world.STYLES))],
        "number": list(tasks.NUMBERS),
        "several": [tasks.several(name, n + 1) for name in things for n in range(len(tasks.NUMBERS))],
    }


@cache
def _things() -> dict[str, dict[str, int]]:
    """Shape, colour and fill of every name that an object can have."""
    found = {}
    tables = (world.SHAPES, world.COLOURS, world.FILLS)
    for values in itertools.product(*(range(len(table)) for table in tables)):
        look = dict(zip(("shape", "colour", "fill"), values, strict=True))
        found[captions.thing({f"{name}0": value for name, value in look.items()}, 0)] = look
    return found


def _index(words: Sequence[str], word: str) -> list[int]:
    return [list(words).index(word)] if word in words else []


def _named(scene: Scene, word: str) -> list[int]:
    return [k for k in captions.present(scene) if captions.thing(scene, k) == word]


def _free_cells(scene: Scene) -> list[int]:
    taken = {scene[f"cell{k}"] for k in captions.present(scene)}
    return [cell for cell in range(len(world.CELLS)) if cell not in taken]


def _set(scene: Scene, wanted: dict[str, Any]) -> Goal:
    return Goal(target=scene | wanted, wanted=wanted)


def _identity(scene: Scene, words: Words) -> list[Goal]:
    return [_set(scene, {})]


def _glasses(scene: Scene, words: Words) -> list[Goal]:
    return [_set(scene, {"glasses": 1})]


def _hat_colours(word: str) -> list[int]:
    return _index([tasks.hat_of(c) for c in range(len(world.COLOURS))], word)


def _hat(scene: Scene, words: Words) -> list[Goal]:
    return [_set(scene, {"hat": 1, "hat_colour": colour}) for colour in _hat_colours(words["hat"])]


def _add(scene: Scene, words: Words) -> list[Goal]:
    looks = [look for name, look in _things().items() if a(name) == words["one"]]
    cells = [c for c in _free_cells(scene) if captions.place({"cell0": c}, 0) == words["place"]]
    return [_added(scene, [cell], look | MIDDLING, tuple(MIDDLING)) for look in looks for cell in cells]


def _added(scene: Scene, cells: Sequence[int], thing: Mapping[str, Any], free: tuple[str, ...]) -> Goal:
    """One more object in each of the cells; the scene must have room for them."""
    first = len(captions.present(scene))
    wanted: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for k, cell in enumerate(cells, first):
        wanted |= {f"present{k}": 1, f"cell{k}": cell}
        wanted |= {f"{name}{k}": value for name, value in thing.items() if name not in MIDDLING}
        extra |= {f"{name}{k}": thing[name] for name in MIDDLING}
    names = tuple(f"{name}{k}" for k in range(first, first + len(cells)) for name in free)
    return Goal(target=scene | extra | wanted, wanted=wanted, free=names)


def _remove(scene: Scene, words: Words) -> list[Goal]:
    if scene["kind"] == "portrait":
        return [_set(scene, {name: 0}) for name, word in tasks.WORN.items() if word == words["old"]]
    return [_set(scene, {f"present{k}": 0}) for k in _named(scene, words["old"])]


def _recolour(scene: Scene, words: Words) -> list[Goal]:
    if scene["kind"] == "portrait" or words["old"] == "background":
        names = [PARTS[words["old"]]] if words["old"] in PARTS else []
    else:
        names = [f"colour{k}" for k in _named(scene, words["old"])]
    colours = _index(world.COLOUR_NAMES, words["colour"])
    return [_set(scene, {name: colour}) for name in names for colour in colours]


def _replace(scene: Scene, words: Words) -> list[Goal]:
    old, new = words["old"], words["new"]
    if scene["kind"] == "portrait":
        if (old, new) == ("hat", "glasses"):
            return [_set(scene, {"hat": 0, "glasses": 1})]
        colours = _hat_colours(new) if old == "glasses" else []
        return [_set(scene, {"hat": 1, "hat_colour": colour, "glasses": 0}) for colour in colours]
    shapes = _index([a(shape) for shape in world.SHAPES], new)
    return [_set(scene, {f"shape{k}": shape}) for k in _named(scene, old) for shape in shapes]


def _slid(name: str) -> Callable[[Scene, Words], list[Goal]]:
    slider = tasks.SLIDERS[name]
    return lambda scene, words: [_set(scene, {slider.attribute: slider.end})]


def _style(scene: Scene, words: Words) -> list[Goal]:
    names = ["", *(tasks.style_name(index) for index in range(1, len(world.STYLES)))]
    return [_set(scene, {"style": index}) for index in _index(names, words["style"])]


def _move(scene: Scene, words: Words) -> list[Goal]:
    cells = [cell for cell in _free_cells(scene) if tasks.towards(cell) == words["to"]]
    return [_set(scene, {f"cell{k}": cell}) for k in _named(scene, words["old"]) for cell in cells]


def _more(scene: Scene, words: Words) -> list[Goal]:
    """Wherever there is room: the words do not say where."""
    found = []
    for number in (n + 1 for n in _index(tasks.NUMBERS, words["number"])):
        likes = [
            k
            for k in captions.present(scene)
            if tasks.several(captions.thing(scene, k), number) == words["several"]
        ]
        room = world.SLOTS - len(captions.present(scene))
        for k in likes if number <= room else []:
            thing = {name: scene[f"{name}{k}"] for name in ("shape", "colour", "fill", *MIDDLING)}
            thing |= {"jx": 0.0, "jy": 0.0}
            for cells in itertools.combinations(_free_cells(scene), number):
                found.append(_added(scene, cells, thing, ("jx", "jy")))
    return found


BOTH = ("shapes", "portrait")
READERS: dict[str, tuple[tuple[str, ...], Callable[[Scene, Words], list[Goal]]]] = {
    "identity": (BOTH, _identity),
    "glasses": (("portrait",), _glasses),
    "hat": (("portrait",), _hat),
    "add": (("shapes",), _add),
    "remove": (BOTH, _remove),
    "recolour": (BOTH, _recolour),
    "replace": (BOTH, _replace),
    **{name: (("portrait",), _slid(name)) for name in tasks.SLIDERS},
    "style": (BOTH, _style),
    "move": (("shapes",), _move),
    "more": (("shapes",), _more),
}
"""For which kinds of scenes each of ``tasks.PHRASINGS`` means something, and what."""
