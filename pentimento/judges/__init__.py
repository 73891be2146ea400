"""Judges: which of two edits of a picture is the better one.

``open_judge`` makes one of the three that are named in settings; a judge of one's own is any object with ``name`` and
``compare``.
"""

import random
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL.Image import Image

from ..errors import UserError

Kind = Literal["http", "local", "exact"]
ABOUT: dict[Kind, str] = {
    "http": "a vision model behind an OpenAI-compatible endpoint (OPENAI_BASE_URL, OPENAI_API_KEY)",
    "local": "a vision model on this machine (judge_model=FOLDER)",
    "exact": "the read-out of the drawn world, for its pictures and instructions only",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge said of a pair."""

    choice: Literal[1, 2] | None
    """The better candidate; ``None``: there was no usable answer, and ``reason`` says why."""
    reason: str
    raw: str = ""
    """The answer in full, where it was text."""


class Judge(Protocol):
    """Compares two edits of one picture."""

    @property
    def name(self) -> str:
        """For traces, such as ``http Qwen/Qwen2.5-VL-72B-Instruct``."""

    def compare(self, source: Image, first: Image, second: Image, instruction: str) -> Verdict:
        """Which of two results follows the instruction better; a judge that fails says so in the verdict."""


@dataclass(kw_only=True)
class Unreliable:
    """A judge that says the opposite of another one with some probability: how much does a search suffer?"""

    judge: Judge
    probability: float
    seed: int = 0
    name: str = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"a probability lies between 0 and 1, not at {self.probability}")
        self.name = f"{self.judge.name}, wrong in {self.probability:.0%}"
        self._random = random.Random(self.seed)

    def compare(self, source: Image, first: Image, second: Image, instruction: str) -> Verdict:
        """The other's verdict, or its opposite; every call draws once, so that equal seeds lie in the same places."""
        verdict = self.judge.compare(source, first, second, instruction)
        if self._random.random() >= self.probability or verdict.choice is None:
            return verdict
        return Verdict(
            choice=2 if verdict.choice == 1 else 1,
            reason=f"a lie; in truth: {verdict.reason}",
            raw=verdict.raw,
        )


def open_judge(
    kind: Kind,
    *,
    model: str | None = None,
    timeout: float = 60.0,
    device: str = "auto",
    precision: str = "auto",
) -> Judge:
    """A judge that is ready: its endpoint answers, its weights are loaded.

    Raises:
        UserError: the endpoint cannot be reached or refuses the key, or the weights cannot be loaded.
    """
    if kind == "http":
        from .http import Http

        return Http.open(model=model, timeout=timeout)
    if kind == "local":
        from .local import Local

        if model is None:
            raise UserError(
                "judge=local needs judge_model: a folder or a hub id, such as Qwen/Qwen2.5-VL-7B-Instruct"
            )
        return Local.load(model, device=device, precision=precision)
    from .exact import Exact

    return Exact()
