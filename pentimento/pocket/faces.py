"""What a slider does to drawn faces, read off exactly: the changed attribute, and whether everything else stayed.

Pictures of prompts have no truth of their own: a face's scene is recognised in its picture at scale 0, and the pictures at other
scales are read as edits of that.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ..images import to_unit
from ..method import Probe
from . import captions
from . import scene as world
from .readout import STEPS, attributes, edited_region, read, read_all, same, visible
from .recognise import recognise
from .render import render
from .scene import Scene
from .tasks import Case, cases

CLEAR = 25.0
"""dB to which a face must be explained to be measured: in poorer pictures attributes are mistaken for each other."""
HIDDEN_BY = {"smile": "beard", "hair": "hat"}
"""What leaves too little of an attribute to be read: the models draw mouths on beards as the world never does, and hair under hats
only where the caption names its colour."""
ROOM = 0.35
"""Of a shown change: how far from where it began a face's attribute may lie to be measured."""
WORN = 6.0
"""dB by which a picture may be explained worse than the face at scale 0, outside of what the change covers; more, and it is a
face no more."""
KEPT = 0.75
"""Share of the other attributes that stay while a face is the same."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What the pairs of a slider have in common."""

    attribute: str
    before: float
    """Mean over the pairs."""
    after: float
    wanted: dict[str, Any]
    """All that was set, of the first pair."""

    @property
    def continuous(self) -> bool:
        """Whether there is anything between before and after."""
        return self.attribute in STEPS

    def response(self, start: float, value: float) -> float:
        """How much of the change a face has made: 0 where it began, 1 where the pairs end."""
        if self.continuous:
            return (value - start) / (self.after - start)
        return float(value == self.after)

    def fits(self, scene: Scene) -> bool:
        """Whether a face can show the change: it begins about where the pairs did, and nothing hides it."""
        start = float(scene[self.attribute])
        if hidden(scene, self.attribute) or not visible(scene | self.wanted, self.attribute):
            return False
        if self.continuous:
            return abs(start - self.before) <= ROOM * abs(self.after - self.before)
        return start != self.after


def change_of(pairs: Sequence[Case]) -> Change | None:
    """The one change of all pairs; ``None`` where they have none that could be read off other faces."""
    if not pairs or any(pair.source["kind"] != "portrait" or not pair.wanted for pair in pairs):
        return None
    attribute = next(iter(pairs[0].wanted))
    if any(attribute not in pair.wanted for pair in pairs):
        return None
    starts, ends = ([float(getattr(p, side)[attribute]) for p in pairs] for side in ("source", "target"))
    if attribute not in STEPS and len(set(ends)) > 1:
        return None
    count = len(pairs)
    return Change(
        attribute=attribute, before=sum(starts) / count, after=sum(ends) / count, wanted=pairs[0].wanted
    )


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face without the edit: what it was drawn from, and what is seen."""

    prompt: str
    seed: int
    scene: Scene
    explained: float
    """dB by which the scene explains the picture outside of what the change covers."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One picture of a face, seen as an edit of it."""

    response: float
    value: float
    kept: float
    """Share of the other attributes that are as without the edit."""
    interference: float
    """Mean change of the other attributes, each as a part of its range; of a discrete one 0 or 1."""
    intact: bool
    """Still the same face: nearly all is kept, and what the change does not cover is explained nearly as well."""


def prompts(task: str, split: str, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Captions of a split's portraits, without a word of what the task changes, each with a seed; without end."""
    for case in cases(task, split, seed, phrasing=0):
        if case.source["kind"] == "portrait" and not hidden(case.source, next(iter(case.wanted))):
            yield unsaid(case), case.seed


def hidden(scene: Scene, attribute: str) -> bool:
    """Whether something in front of it keeps an attribute from being read."""
    return attribute in HIDDEN_BY and bool(scene[HIDDEN_BY[attribute]])


def unsaid(case: Case) -> str:
    """The caption of a case's source, without what its task changes."""
    scene, attribute = case.source, next(iter(case.wanted), "")
    said = {
        "smile": lambda: (f"{captions.expression(scene)} ", ""),
        "age": lambda: (f"{captions.age(scene)} ", ""),
        "hair": lambda: (f"{world.COLOUR_NAMES[scene['hair']]} hair", "hair"),
        "hair_length": lambda: (captions.hair(scene), re.sub("^(short|long) ", "", captions.hair(scene))),
    }
    text = captions.caption(scene)
    if attribute in said:
        text = text.replace(*said[attribute](), 1)
    return re.sub(r"\ban? (?=\w)(\w+)", lambda match: captions.a(match[1]), text)


def find(
    probe: Probe,
    asked: Iterator[tuple[str, int]],
    changes: Sequence[Change],
    count: int,
    most: int,
) -> list[Face]:
    """The first ``count`` faces that the probe draws without the edit, that are recognised and have room for each change.

    Of ``most`` pictures at most.
    """
    found: list[Face] = []
    for _ in range(0, most, count):
        tried = [next(asked) for _ in range(count)]
        drawn = probe.pictures(probe.draw(tried, [0.0])[0.0])
        for (prompt, seed), picture in zip(tried, to_unit(drawn), strict=True):
            sight = recognise(picture)
            if sight is None or sight.scene["kind"] != "portrait" or len(found) == count:
                continue
            # Read as the others will be, so that nothing seems to have moved at scale 0.
            target = sight.scene | changes[0].wanted
            scene, explained = read(picture.to(probe.device), sight.scene, target)
            if explained >= CLEAR and all(change.fits(scene) for change in changes):
                outside = elsewhere(picture, scene, scene, scene | changes[0].wanted)
                found.append(Face(prompt=prompt, seed=seed, scene=scene, explained=outside))
        if len(found) == count:
            break
    return found


def look(picture: Image, face: Face, change: Change) -> Look:
    """Read one picture."""
    return looks([picture], [face], change, torch.device("cpu"))[0]


def looks(
    pictures: Sequence[Image], faces: Sequence[Face], change: Change, device: torch.device
) -> list[Look]:
    """Read pictures of one size, each of a face, on a device: a GPU compares all of them at once."""
    every = to_unit(pictures)
    sources, targets = [face.scene for face in faces], [face.scene | change.wanted for face in faces]
    read = read_all(every.to(device), sources, targets)
    return [
        _look(scene, elsewhere(picture, scene, face.scene, target), face, change)
        for picture, (scene, _), face, target in zip(every, read, faces, targets, strict=True)
    ]


def elsewhere(picture: Tensor, scene: Scene, source: Scene, target: Scene) -> float:
    """How well a scene explains ``picture`` (3, H, W in [0, 1]) where ``target`` is as ``source``, in dB."""
    height, width = picture.shape[1:]
    made, before, after = render([scene, source, target], width, height)
    stays = ~edited_region(before, after)
    error = (made - picture).pow(2).mean(0)
    return float(-10 * torch.log10((error[stays] if stays.any() else error).mean().clamp(min=1e-6)))


def _look(scene: Scene, explained: float, face: Face, change: Change) -> Look:
    source, target = face.scene, face.scene | change.wanted
    others = [
        name
        for name in attributes(source, target)
        if name not in change.wanted and visible(source, name) and visible(scene, name)
    ]
    kept = sum(same(name, scene[name], source[name]) for name in others) / max(1, len(others))
    value = float(scene[change.attribute])
    return Look(
        response=change.response(float(source[change.attribute]), value),
        value=value,
        kept=kept,
        interference=sum(_moved(name, scene[name], source[name]) for name in others) / max(1, len(others)),
        intact=kept >= KEPT and explained >= face.explained - WORN,
    )


def _moved(name: str, a: Any, b: Any) -> float:
    if name in STEPS:
        low, high = world.PORTRAIT_RANGES[name]
        return float(abs(a - b) / (high - low))
    return float(a != b)
