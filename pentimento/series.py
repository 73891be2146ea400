"""Series of pictures of prompts: every combination of prompts, seeds, strengths and skips, one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL.Image import Image

from .run import Editor


@dataclass(frozen=True, kw_only=True)
class Shot:
    """What one picture is drawn with."""

    prompt: str
    seed: int
    scale: float = 1.0
    skip: int | None = None
    """Steps before the edit sets in; ``None``: what the adapter recorded."""
    steps: int | None = None
    guidance: float | None = None


def shots(
    prompts: Sequence[str],
    seeds: Sequence[int],
    scales: Sequence[float],
    *,
    skips: Sequence[int | None] = (None,),
    steps: int | None = None,
) -> list[Shot]:
    """All combinations; scales change fastest, then skips, then seeds: pictures of one seed follow each other."""
    return [
        Shot(prompt=prompt, seed=seed, scale=scale, skip=skip, steps=steps)
        for prompt in prompts
        for seed in seeds
        for skip in skips
        for scale in scales
    ]


def generate(editor: Editor, wanted: Sequence[Shot]) -> Iterator[tuple[Shot, Image]]:
    """Draw each of them, when it is asked for; a picture depends on its shot alone. Raises ``UserError`` as ``Editor.edit`` does."""
    for shot in wanted:
        yield shot, draw(editor, shot)


def draw(editor: Editor, shot: Shot) -> Image:
    """One of them."""
    return editor.edit(
        instruction=shot.prompt,
        seed=shot.seed,
        scale=shot.scale,
        skip=shot.skip,
        steps=shot.steps,
        guidance=shot.guidance,
    )
