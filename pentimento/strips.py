"""Pictures of one prompt, or of one photograph, at several strengths: as grids, and on a page with sliders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from . import images

if TYPE_CHECKING:
    from .editing import Job
    from .generation import Drawn

COLUMNS = 5
CELL = 256


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One picture at several scales."""

    title: str
    """The prompt; of photographs the instruction, or the picture's name."""
    seed: int
    skip: int | None
    name: str
    """Of its own files, which the scale is no part of."""
    frames: tuple[tuple[float, Path], ...]
    """Scale and file of each picture."""
    source: Path | None = None
    """The picture that was edited."""

    @property
    def note(self) -> str:
        """What tells it from others of its title."""
        return f"seed {self.seed}" + ("" if self.skip is None else f", skip {self.skip}")


def of_drawn(drawn: "Sequence[Drawn]", skip: int | None) -> list[Strip]:
    """Strips of drawn prompts; ``skip`` is what was recorded, for those that name none."""
    rows: dict[tuple[str, int, int | None], list[Drawn]] = {}
    for one in drawn:
        rows.setdefault((one.shot.prompt, one.shot.seed, one.shot.skip), []).append(one)
    return [
        Strip(
            title=prompt,
            seed=seed,
            skip=skip if own is None else own,
            name=row[0].path.stem.replace(f"-scale{row[0].shot.scale:g}", ""),
            frames=tuple((one.shot.scale, one.path) for one in row),
        )
        for (prompt, seed, own), row in rows.items()
    ]


def of_jobs(jobs: "Sequence[Job]", skip: int | None) -> list[Strip]:
    """The same of edited pictures; of several instructions that follow each other the last result."""
    found = []
    for job in jobs:
        titles = job.instructions if job.each else (", then ".join(job.instructions) or job.source.stem,)
        rows: dict[tuple[str, int, int | None], list[tuple[float, Path]]] = {}
        for variant, paths in zip(job.variants, job.results, strict=True):
            for title, path in zip(titles, paths if job.each else paths[-1:], strict=True):
                rows.setdefault((title, variant.seed, variant.skip), []).append((variant.scale, path))
        found += [
            Strip(
                title=title,
                seed=seed,
                skip=skip if own is None else own,
                name=frames[0][1].stem.replace(f"-scale{frames[0][0]:g}", ""),
                frames=tuple(frames),
                source=job.source,
            )
            for (title, seed, own), frames in rows.items()
        ]
    return found


def grids(strips: Sequence[Strip], adapter: str) -> Iterator[tuple[str, Image]]:
    """Names and pictures of grids as PairEdit's scripts draw them: five scales a row, below them what they were drawn with."""
    for strip in strips:
        blocks = []
        for first in range(0, len(strip.frames), COLUMNS):
            part = strip.frames[first : first + COLUMNS]
            titles = [f"scale = {scale:g}" if scale else "default (scale 0)" for scale, _ in part]
            blocks.append(
                images.sheet([[images.open_image(path) for _, path in part]], titles=titles, cell=CELL)
            )
        width = max(block.width for block in blocks)
        said = [f"{strip.note}, {strip.title}", adapter]
        yield f"{strip.name}-grid.png", images.stack([*blocks, images.caption(said, width, CELL)])
