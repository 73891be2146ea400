"""Better edits for more computing: the early filter of ICEdit (arXiv 2504.20690, section 3.3 and appendix B.3).

``M`` seeds are each edited in ``m`` steps, which is quick and rough. A judge lets the champion meet the next candidate, in
order, ``M - 1`` times. The winner's noise is then edited again, in all ``n`` steps. A candidate is a whole edit of its own
short schedule, not the first ``m`` of ``n`` steps: only so it can be looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL.Image import Image

from . import images, judges
from .errors import UserError
from .judges import Judge, Kind, Verdict

Edit = Callable[[int, int | None], Image]
"""The picture that a seed and a number of steps give; ``None`` steps are the method's own."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How an edit is searched for; the published setting is 6 candidates of 10 steps for 50."""

    candidates: int = 1
    """Seeds that are tried, counting up from the edit's own; 1: no search. More need a judge."""
    early_steps: int = 10
    """Sampling steps of each candidate; the winner is then made anew in all steps."""
    judge: Kind | None = None
    """Who compares the candidates. http: a vision model behind an OpenAI-compatible endpoint (OPENAI_BASE_URL and
    OPENAI_API_KEY in the environment); local: a vision model on this machine (judge_model); exact: the read-out of
    the drawn world, for its own pictures and instructions."""
    judge_model: str | None = None
    """http: the endpoint's name of the model, default Qwen/Qwen2.5-VL-72B-Instruct; local: a folder or hub id."""
    judge_order: Literal["fixed", "both"] = "fixed"
    """fixed: the champion is shown first, as published; both: every pair is asked again the other way round, and
    where the two answers differ the champion stays."""
    judge_timeout: float = 60.0
    """http: seconds that one request may take."""
    judge_device: str = "auto"
    """local: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` or `mps`."""
    judge_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """local: arithmetic of the judge's model. `auto`: bf16 on CUDA, else fp32."""

    def __post_init__(self) -> None:
        for name in ("candidates", "early_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        if self.judge is not None and self.candidates == 1:
            raise ValueError(
                f"judge={self.judge} compares candidates; ask for two or more, such as candidates=6"
            )
        if not 0 < self.judge_timeout <= 3600:
            raise ValueError(
                f"judge_timeout must lie between 0 and 3600 seconds, but it is {self.judge_timeout}"
            )

    def open_judge(self) -> Judge:
        """The judge that is named, ready.

        Raises:
            UserError: none is named, or it cannot be reached or loaded.
        """
        if self.judge is None:
            known = "; ".join(f"judge={name}: {judges.ABOUT[name]}" for name in get_args(Kind))
            raise UserError(f"candidates={self.candidates} needs a judge to choose among them. {known}")
        return judges.open_judge(
            self.judge,
            model=self.judge_model,
            timeout=self.judge_timeout,
            device=self.judge_device,
            precision=self.judge_precision,
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question to a judge."""

    shown: tuple[int, int]
    """Seeds of candidates 1 and 2 as they were shown."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A challenger against the champion of the moment."""

    champion: int
    """Seed."""
    challenger: int
    """Seed."""
    winner: int
    answers: tuple[Answer, ...]

    @property
    def failure(self) -> str | None:
        """Why there was no usable answer; ``None``: there was one."""
        return next((a.verdict.reason for a in self.answers if a.verdict.choice is None), None)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of a search."""

    picture: Image
    seed: int
    """Of the winner, with which the same edit can be made again without a search."""
    previews: dict[int, Image]
    """The candidates by seed."""
    comparisons: tuple[Comparison, ...]
    judge: str
    early_steps: int
    steps: int | None
    """Of the final picture; ``None``: the method does not say how many it takes by itself."""
    reused: bool
    """The winner's candidate is the final picture, since it was made in as many steps."""

    @property
    def failures(self) -> int:
        """Comparisons without a usable answer, in which the champion stayed."""
        return sum(c.failure is not None for c in self.comparisons)

    @property
    def function_evaluations(self) -> int | None:
        """Sampling steps that were made in all: ``n + M m``, or ``M m`` where a candidate was taken as it was."""
        early = len(self.previews) * self.early_steps
        return early if self.reused else None if self.steps is None else self.steps + early

    def warning(self) -> str | None:
        """What a person should know of a judge that failed; ``None`` if it never did."""
        if not self.failures:
            return None
        last = next(c.failure for c in reversed(self.comparisons) if c.failure is not None)
        return (
            f"the judge ({self.judge}) gave no usable answer in {self.failures} of {len(self.comparisons)} comparisons,"
            f" where the champion stayed: {last}"
        )

    def trace(self) -> dict[str, Any]:
        """Everything but the pictures, JSON-able; without times, so that equal searches leave equal traces."""
        return {
            "seeds": list(self.previews),
            "early_steps": self.early_steps,
            "steps": self.steps,
            "function_evaluations": self.function_evaluations,
            "judge": self.judge,
            "winner": self.seed,
            "failures": self.failures,
            "comparisons": [
                {
                    "champion": c.champion,
                    "challenger": c.challenger,
                    "winner": c.winner,
                    "answers": [
                        {
                            "shown": list(a.shown),
                            "choice": a.verdict.choice,
                            "reason": a.verdict.reason,
                            "raw": a.verdict.raw,
                        }
                        for a in c.answers
                    ],
                }
                for c in self.comparisons
            ],
        }

    def sheet(self, source: Image) -> Image:
        """Source and candidates side by side, each with its seed, the winner marked."""
        titles = [f"seed {seed}" + (": chosen" if seed == self.seed else "") for seed in self.previews]
        cell = min(512, max(128, *source.size))
        return images.sheet([[source, *self.previews.values()]], titles=["source", *titles], cell=cell)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is edited, and how: what a judge is told of it."""

    source: Image
    instruction: str


def search(
    edit: Edit,
    question: Question,
    judge: Judge,
    settings: Search,
    *,
    seed: int,
    steps: int | None,
    final: int | None,
) -> Found:
    """Edit with ``settings.candidates`` seeds from ``seed`` on, and return the winner's full edit.

    Args:
        steps: of the final edit, ``None`` for the method's own; ``final`` is their number as far as it is known.

    Raises:
        UserError: a single candidate, or more early steps than final ones.
    """
    early = settings.early_steps
    if settings.candidates < 2:
        raise UserError("a search needs candidates to choose among: two or more, such as candidates=6")
    if final is not None and early > final:
        raise UserError(
            f"early_steps={early} is more than the {final} steps of the final edit; give at most as many"
        )
    previews = {number: edit(number, early) for number in range(seed, seed + settings.candidates)}
    comparisons = _tournament(question, judge, previews, both=settings.judge_order == "both")
    winner = comparisons[-1].winner
    reused = early == final
    return Found(
        picture=previews[winner] if reused else edit(winner, steps),
        seed=winner,
        previews=previews,
        comparisons=tuple(comparisons),
        judge=judge.name,
        early_steps=early,
        steps=final,
        reused=reused,
    )


def _tournament(
    question: Question, judge: Judge, previews: dict[int, Image], *, both: bool
) -> list[Comparison]:
    champion, *challengers = previews
    made: list[Comparison] = []
    for challenger in challengers:
        orders: Sequence[tuple[int, int]] = [(champion, challenger), (challenger, champion)]
        answers = []
        for shown in orders if both else orders[:1]:
            first, second = (previews[number] for number in shown)
            verdict = judge.compare(question.source, first, second, question.instruction)
            answers.append(Answer(shown=shown, verdict=verdict))
        named = {a.shown[a.verdict.choice - 1] if a.verdict.choice else None for a in answers}
        # Asked both ways and answered differently, the judge follows the order and not the pictures.
        winner = challenger if named == {challenger} else champion
        made.append(
            Comparison(champion=champion, challenger=challenger, winner=winner, answers=tuple(answers))
        )
        champion = winner
    return made
