"""What a vision model is asked, and how its answer is read (arXiv 2504.20690, section 3.3, in words of our own)."""

import re
from typing import Literal

from PIL.Image import Image

from .. import images

ROLE = "You are a careful judge of image edits. You compare two attempts at the same edit and name the better one."

ORDER = ("Image 1, candidate 1:", "Image 2, candidate 2:", "Image 3, the original:")
"""Captions of the pictures, in the order in which they are shown."""

QUESTION = """Three images are given: image 1 is candidate 1, image 2 is candidate 2, and image 3 is the original that both \
candidates were made from.

The original was to be edited by this instruction: "{instruction}"

Which candidate carries out the instruction better, at higher quality and with fewer artefacts? Everything that the \
instruction does not ask to change must be exactly as in the original: people, objects, background, layout and colours, and \
the style of the picture too, unless the instruction says otherwise. A candidate that leaves the original unchanged has not \
carried out the instruction.

Begin your answer with the single digit 1 or 2, the number of the better candidate. Then give your reason in one sentence."""

AGAIN = (
    "Your answer must begin with the single digit 1 or 2, the number of the better candidate. Answer again."
)

LONGEST_REASON = 300
LONGEST_EDGE = 1024
"""Pixels to which pictures are scaled down for a vision model: most refuse or shrink larger ones themselves."""

_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.,/-])[12](?![\w%/-]|[.,]\d)")


def question(instruction: str) -> str:
    """The text that goes with the pictures."""
    return QUESTION.format(instruction=" ".join(instruction.split()))


def read(answer: str) -> tuple[Literal[1, 2], str] | None:
    """The first stand-alone 1 or 2 of an answer and the reason beside it; ``None`` where there is no such number.

    What a model thinks aloud between ``<think>`` tags is no part of its answer.
    """
    said = _THOUGHTS.sub(" ", answer).strip()
    found = _NUMBER.search(said)
    if found is None:
        return None
    rest = said[found.end() :].lstrip(" \t\n*.,:;)\"'-") or said
    return (1 if found[0] == "1" else 2), " ".join(rest.split())[:LONGEST_REASON]


def shown(picture: Image) -> Image:
    """A picture as a vision model gets it."""
    picture, scale = picture.convert("RGB"), LONGEST_EDGE / max(picture.size)
    if scale >= 1:
        return picture
    return images.resize(
        picture, (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    )
