"""The edits of the drawn world: a task turns a scene into another one and says so in words.

A task is a function ``(scene, rng) -> Edit | None``; ``None`` means that the scene does not offer the edit.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import numpy as np

from ..errors import UserError
from . import captions
from . import scene as world
from .captions import a
from .scene import Scene


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A scene after an edit, and what was asked for."""

    target: Scene
    wanted: dict[str, Any]
    """The attributes that the edit sets, with their values: what the read-out looks for."""
    instructions: tuple[str, ...]
    """Three phrasings for training, then one that only tests use."""


Task = Callable[[Scene, np.random.Generator], Edit | None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pair of a task: two scenes, the wanted change, and all the words for it."""

    key: str
    task: str
    seed: int
    source: Scene
    target: Scene
    wanted: dict[str, Any]
    instruction: str
    source_prompt: str
    target_prompt: str


PHRASINGS: dict[str, tuple[str, str, str, str]] = {
    "identity": ("change nothing", "keep the picture as it is", "leave everything unchanged", "do not edit the picture"),
    "glasses": (
        "add glasses", "put glasses on the person", "make the person wear glasses", "give the person a pair of glasses",
    ),
    "hat": ("add {hat}", "put {hat} on the head", "make the person wear {hat}", "give the person {hat}"),
    "add": ("add {one} {place}", "put {one} {place}", "draw {one} {place}", "place {one} {place}"),
    "remove": ("remove the {old}", "take the {old} away", "delete the {old}", "get rid of the {old}"),
    "recolour": (
        "make the {old} {colour}", "change the colour of the {old} to {colour}", "turn the {old} {colour}",
        "the {old} should be {colour}",
    ),
    "replace": (
        "replace the {old} with {new}", "swap the {old} for {new}", "change the {old} into {new}",
        "turn the {old} into {new}",
    ),
    "smile": (
        "make the person smile", "add a smile", "the person should smile", "turn the frown into a smile",
    ),
    "age": (
        "make the person old", "make the person look older", "the person should be old", "age the person",
    ),
    "chubby": (
        "make the face chubby", "make the face wider", "the face should be chubby", "give the person a chubby face",
    ),
    "eye-size": (
        "make the eyes bigger", "make the eyes big", "the eyes should be big", "give the person big eyes",
    ),
    "hair-length": (
        "make the hair long", "make the hair longer", "the hair should be long", "give the person long hair",
    ),
    "style": ("turn it into {style}", "make it {style}", "change it into {style}", "show it as {style}"),
    "move": ("move the {old} {to}", "shift the {old} {to}", "put the {old} {to}", "bring the {old} {to}"),
    "more": (
        "add {number} more {several}", "draw {number} more {several}", "put {number} more {several}",
        "{number} more {several} please",
    ),
}  # fmt: skip
"""All that is asked for, besides the captions of ``fill-circles``; the last of each only by tests.

``instructions.goals`` reads them the other way round."""


@dataclass(frozen=True, kw_only=True)
class Slider:
    """A change of one continuous attribute."""

    attribute: str
    start: tuple[float, float]
    """Where it lies before."""
    end: float


SLIDERS = {
    "smile": Slider(attribute="smile", start=(-0.9, -0.3), end=0.9),
    "age": Slider(attribute="age", start=(0.0, 0.15), end=0.95),
    "chubby": Slider(attribute="chubby", start=(0.0, 0.2), end=0.95),
    "eye-size": Slider(attribute="eye_size", start=(0.0, 0.2), end=0.95),
    "hair-length": Slider(attribute="hair_length", start=(0.0, 0.15), end=0.95),
}


def _edit(scene: Scene, wanted: dict[str, Any], phrasing: str, **words: str) -> Edit:
    instructions = tuple(form.format(**words) for form in PHRASINGS[phrasing])
    return Edit(target=scene | wanted, wanted=wanted, instructions=instructions)


def _pick(rng: np.random.Generator, options: list[Any]) -> Any:
    return options[int(rng.integers(len(options)))] if options else None


def _other_colour(scene: Scene, rng: np.random.Generator, *taken: str) -> int:
    """A colour that none of the named attributes has."""
    used = {scene[name] for name in taken}
    return int(_pick(rng, [c for c in range(len(world.COLOURS)) if c not in used]))


def identity(scene: Scene, rng: np.random.Generator) -> Edit | None:
    return _edit(scene, {}, "identity")


def add_glasses(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if scene["kind"] != "portrait" or scene["glasses"]:
        return None
    return _edit(scene, {"glasses": 1}, "glasses")


def hat_of(colour: int) -> str:
    """``a red hat``."""
    return a(f"{world.COLOUR_NAMES[colour]} hat")


def add_hat(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if scene["kind"] != "portrait" or scene["hat"]:
        return None
    colour = _other_colour(scene, rng, "bg", "hair")
    return _edit(scene, {"hat": 1, "hat_colour": colour}, "hat", hat=hat_of(colour))


def add(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if scene["kind"] == "portrait":
        return _pick(rng, [e for e in (add_glasses(scene, rng), add_hat(scene, rng)) if e])
    if scene["kind"] != "shapes":
        return None
    slots = captions.present(scene)
    if len(slots) > 3:
        return None
    k = len(slots)
    free = [c for c in range(9) if c not in {scene[f"cell{j}"] for j in slots}]
    changes = {
        f"present{k}": 1,
        f"cell{k}": int(_pick(rng, free)),
        f"colour{k}": _other_colour(scene, rng, "bg"),
    }
    after = scene | changes
    wanted = changes | {f"shape{k}": scene[f"shape{k}"], f"fill{k}": scene[f"fill{k}"]}
    return _edit(scene, wanted, "add", one=a(captions.thing(after, k)), place=captions.place(after, k))


WORN = {"glasses": "glasses", "hat": "hat", "beard": "beard", "earring": "earrings"}
"""What can be taken off a portrait, and its word."""


def remove(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if scene["kind"] == "portrait":
        name = _pick(rng, [n for n in WORN if scene[n]])
        return _edit(scene, {name: 0}, "remove", old=WORN[name]) if name else None
    k = _named_object(scene, rng)
    if k is None or len(captions.present(scene)) < 2:
        return None
    return _edit(scene, {f"present{k}": 0}, "remove", old=captions.thing(scene, k))


def _named_object(scene: Scene, rng: np.random.Generator) -> int | None:
    """An object whose words name it alone."""
    if scene["kind"] != "shapes":
        return None
    names = {k: captions.thing(scene, k) for k in captions.present(scene)}
    return _pick(rng, [k for k, name in names.items() if list(names.values()).count(name) == 1])


def _recolour(scene: Scene, attribute: str, word: str, colour: int) -> Edit:
    return _edit(scene, {attribute: colour}, "recolour", old=word, colour=world.COLOUR_NAMES[colour])


def recolour_hair(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if (
        scene["kind"] != "portrait"
        or scene["hair_style"] == world.HAIR_STYLES.index("bald")
        or scene["age"] > 0.6
    ):
        return None
    taken = ("bg", "hair", "hat_colour") if scene["hat"] else ("bg", "hair")
    return _recolour(scene, "hair", "hair", _other_colour(scene, rng, *taken))


def recolour(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if scene["kind"] == "portrait":
        part = _pick(rng, ["hair", "shirt", *(["hat"] if scene["hat"] else [])])
        if part == "hair":
            return recolour_hair(scene, rng)
        attribute = "shirt" if part == "shirt" else "hat_colour"
        return _recolour(scene, attribute, part, _other_colour(scene, rng, "bg", attribute, "hair"))
    k = _named_object(scene, rng)
    if k is None:
        return None
    return _recolour(
        scene, f"colour{k}", captions.thing(scene, k), _other_colour(scene, rng, "bg", f"colour{k}")
    )


def replace(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if scene["kind"] == "portrait":
        if scene["glasses"] == scene["hat"]:
            return None
        if scene["glasses"]:
            hat = add_hat(scene, rng)
            assert hat is not None
            old, new, wanted = (
                "glasses",
                hat_of(hat.wanted["hat_colour"]),
                hat.wanted | {"glasses": 0},
            )
        else:
            old, new, wanted = "hat", "glasses", {"hat": 0, "glasses": 1}
    else:
        k = _named_object(scene, rng)
        if k is None:
            return None
        shape = int(_pick(rng, [s for s in range(len(world.SHAPES)) if s != scene[f"shape{k}"]]))
        old, new, wanted = captions.thing(scene, k), a(world.SHAPES[shape]), {f"shape{k}": shape}
    return _edit(scene, wanted, "replace", old=old, new=new)


def background(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if scene["kind"] == "disc":
        return None
    if scene["kind"] == "portrait":
        taken = ["bg", "hair", "shirt", *(["hat_colour"] if scene["hat"] else [])]
    else:
        taken = ["bg", *(f"colour{k}" for k in captions.present(scene))]
    edit = _recolour(scene, "bg", "background", _other_colour(scene, rng, *taken))
    return edit


def _continuous(name: str) -> Task:
    """The shown change of a slider."""
    slider = SLIDERS[name]

    def task(scene: Scene, rng: np.random.Generator) -> Edit | None:
        if scene["kind"] != "portrait":
            return None
        before = scene | {slider.attribute: float(rng.uniform(*slider.start))}
        if slider.attribute == "hair_length":
            before |= {"hair_style": int(rng.integers(2))}  # only straight and curly hair has a length
        edit = _edit(before, {slider.attribute: slider.end}, name)
        return dataclasses.replace(edit, wanted=edit.wanted | {"": before})

    return task


def style_name(index: int) -> str:
    """``an outline drawing``."""
    return captions.STYLE_PREFIX[index].removesuffix(" of ")


def style(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if scene["kind"] == "disc" or scene["style"]:
        return None
    index = int(rng.integers(1, len(world.STYLES)))
    return _edit(scene, {"style": index}, "style", style=style_name(index))


def count(scene: Scene, rng: np.random.Generator) -> Edit | None:
    """One or two more of the same object, or an object moved to another place."""
    k = _named_object(scene, rng)
    if k is None:
        return None
    slots, name = captions.present(scene), captions.thing(scene, k)
    free = [c for c in range(9) if c not in {scene[f"cell{j}"] for j in slots}]
    if rng.random() < 0.5:
        cell = int(_pick(rng, free))
        wanted: dict[str, Any] = {f"cell{k}": cell}
        return _edit(scene, wanted, "move", old=name, to=towards(cell))
    more = min(int(rng.integers(1, 3)), world.SLOTS - len(slots))
    cells = rng.permutation(free)[:more]
    wanted = {}
    for j, cell in zip(range(len(slots), len(slots) + more), cells, strict=True):
        same = {f"{f}{j}": scene[f"{f}{k}"] for f in ("shape", "colour", "fill", "size", "rotation")}
        wanted |= same | {f"present{j}": 1, f"cell{j}": int(cell)}
    return _edit(scene, wanted, "more", number=NUMBERS[more - 1], several=several(name, more))


NUMBERS = ("one", "two")


def several(name: str, number: int) -> str:
    """The plural of an object's name, for more than one."""
    return name + ("es" if name.endswith("s") else "s") * (number > 1)


def towards(cell: int) -> str:
    """Where something is moved: ``to the top left``."""
    return "to " + captions.place({"cell0": cell}, 0).partition(" ")[2]


def fill_circles(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if scene["kind"] != "disc":
        return None
    prompt = captions.caption(scene)
    return Edit(target=scene, wanted={"outline": 0, "": scene | {"outline": 1}}, instructions=(prompt,) * 4)


TASKS: dict[str, Task] = {
    "identity": identity,
    "add": add,
    "add-glasses": add_glasses,
    "add-hat": add_hat,
    "remove": remove,
    "recolour": recolour,
    "recolour-hair": recolour_hair,
    "replace": replace,
    "background": background,
    **{name: _continuous(name) for name in SLIDERS},
    "style": style,
    "count": count,
    "fill-circles": fill_circles,
}  # fmt: skip


def cases(task: str, split: str = "train", seed: int = 0, phrasing: int | None = None) -> Iterator[Case]:
    """The pairs of a task, without end: scenes of the split's own seeds, in an order that ``seed`` chooses.

    In the train split no scene, before or after, holds a held-out combination, and only training phrasings occur.
    Elsewhere half of the instructions and captions use the phrasing that training never saw. ``phrasing`` fixes one for all
    (0 to 2, or 3, the unseen one): the same edits in other words.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r} is unknown; the tasks are {', '.join(TASKS)}")
    if split not in ("train", "dev", "test", "hidden"):
        raise UserError(f"split {split!r} is unknown; the splits are train, dev, test and hidden")
    kind = "disc" if task == "fill-circles" else None
    for number in world.seeds(split, start=1_000_000 * seed):
        rng = np.random.default_rng([int(world.WORLD_VERSION), number, *task.encode()])
        scene = world.draw(number, kind)
        if task not in ("style", "identity", "fill-circles"):
            scene |= {"style": 0}
        edit = TASKS[task](scene, rng)
        if edit is None:
            continue
        wanted = dict(edit.wanted)
        source = wanted.pop("", scene)
        if split == "train" and (world.held_out(source) or world.held_out(edit.target)):
            continue
        phrasings = captions.TRAIN_PHRASINGS if split == "train" else captions.TEST_PHRASING + 1
        which = (
            int(rng.integers(phrasings))
            if split == "train"
            else int(rng.choice([0, 1, 2, 3], p=[1 / 6, 1 / 6, 1 / 6, 1 / 2]))
        )
        which = which if phrasing is None else phrasing
        yield Case(
            key=f"{number:06d}", task=task, seed=number, source=source, target=edit.target, wanted=wanted,
            instruction=edit.instructions[which], source_prompt=captions.caption(source, which),
            target_prompt=captions.caption(edit.target, which),
        )  # fmt: skip


def mixture(names: str, split: str = "train", seed: int = 0) -> Iterator[Case]:
    """The pairs of one task, or of several with commas between them: in turn, each key with its task in front."""
    tasks = [name.strip() for name in names.split(",")]
    if len(tasks) == 1:
        yield from cases(names, split, seed)
        return
    if twice := {name for name in tasks if tasks.count(name) > 1}:
        raise UserError(f"task {min(twice)!r} is named twice in {names!r}")
    for together in zip(*(cases(name, split, seed) for name in tasks), strict=True):
        for case in together:
            yield changed(case, key=f"{case.task}-{case.key}")
