"""The ``edit`` command's bookkeeping: which picture, which instruction, which variant, and where the results go.

Everything that can be wrong with the files is found before any weights are loaded.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from . import images
from .errors import UserError, counted
from .method import LARGEST_SEED
from .run import Editor


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of sampling; ``tag`` names it in files and sheets, "" where there is only one."""

    seed: int
    scale: float
    steps: int | None
    tag: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture and all that is made of it."""

    source: Path
    mask: Path | None
    instructions: tuple[str, ...]
    """Empty: the one that all pairs of the training shared."""
    variants: tuple[Variant, ...]
    results: tuple[Path, ...]
    """One per instruction and variant, instructions outermost."""
    sheet: Path


def variants(*, seed: int, count: int, scales: str, steps: int | None) -> tuple[Variant, ...]:
    """All combinations of ``count`` seeds from ``seed`` on and the comma-separated ``scales``."""
    if seed > LARGEST_SEED:
        raise UserError(f"--seed {seed}: seeds lie between 0 and {LARGEST_SEED}")
    try:
        values = [float(text) for text in scales.split(",")]
    except ValueError as error:
        raise UserError(
            f"--scale {scales!r}: give a number, or several with commas, such as 0.5,1"
        ) from error
    if not all(abs(v) < 100 for v in values):
        raise UserError(f"--scale {scales!r}: strengths lie between -100 and 100; 1 is what was trained")
    made = []
    for value in values:
        for number in range(seed, seed + count):
            tags = [f"scale{value:g}"] * (len(values) > 1) + [f"seed{number}"] * (count > 1)
            made.append(Variant(seed=number, scale=value, steps=steps, tag="-".join(tags)))
    return tuple(made)


def plan(
    pictures: Sequence[str],
    *,
    instructions: Sequence[str],
    variants: Sequence[Variant],
    out: Path,
    mask: Path | None = None,
) -> list[Job]:
    """Open every picture and settle every name.

    One instruction is for all pictures; as many as there are pictures belong to them in order; several for one picture
    give a result each.

    Raises:
        UserError: no picture, one that cannot be read, instructions that do not match, a result that would replace an
            input or another result, a file for several results, or a folder that cannot be made.
    """
    if not pictures:
        raise UserError("name at least one picture to edit")
    given = _per_picture(instructions, len(pictures))
    total = sum(max(1, len(texts)) for texts in given) * len(variants)
    suffix = out.suffix.lower()
    single = suffix in images.WRITABLE
    if suffix in images.READABLE and not single and not out.is_dir():
        raise UserError(
            f"--out {out}: no picture is written as {suffix}; known: {', '.join(images.WRITABLE)}"
        )
    if single and total > 1:
        raise UserError(f"--out {out} is one file, but there are {total} results; name a folder")
    _check_folder(out.parent if single else out)
    stems = _stems([Path(p) for p in pictures])
    jobs = []
    for name, stem, texts in zip(pictures, stems, given, strict=True):
        source = Path(name)
        _check_pictures(source, mask)
        results = (out,) if single else tuple(out / f"{n}.png" for n in _names(stem, texts, variants))
        jobs.append(
            Job(
                source=source,
                mask=mask,
                instructions=texts,
                variants=tuple(variants),
                results=results,
                sheet=out.with_name(f"{out.stem}-sheet.png") if single else out / f"{stem}-sheet.png",
            )
        )
    _spare_inputs(jobs, mask)
    _keep_apart(jobs)
    return jobs


def execute(jobs: Sequence[Job], editor: Editor) -> Iterator[Path]:
    """Make the results one by one; yields each path when it is written, the sheet of a picture after its results."""
    for job in jobs:
        texts: tuple[str | None, ...] = job.instructions or (editor.default_instruction,)
        picture = images.open_image(job.source)
        mask = images.open_mask(job.mask) if job.mask else None
        cells: list[tuple[str, Image]] = [("source", picture)]
        paths = iter(job.results)
        for text in texts:
            for variant in job.variants:
                result = editor.edit(
                    picture,
                    instruction=text,
                    mask=mask,
                    seed=variant.seed,
                    scale=variant.scale,
                    steps=variant.steps,
                )
                yield images.save_image(result, next(paths))
                cells.append(
                    (" ".join(t for t in (text, variant.tag.replace("-", " ")) if t) or "result", result)
                )
        yield images.save_image(_sheet(cells), job.sheet)


def _sheet(cells: Sequence[tuple[str, Image]]) -> Image:
    cell = min(512, max(128, *(max(picture.size) for _, picture in cells)))
    return images.sheet([[p for _, p in cells]], titles=[t for t, _ in cells], cell=cell)


def _per_picture(instructions: Sequence[str], count: int) -> list[tuple[str, ...]]:
    texts = tuple(instructions)
    if count == 1 or len(texts) <= 1:
        return [texts] * count
    if len(texts) != count:
        raise UserError(
            f"{counted(len(texts), 'instruction')} for {counted(count, 'picture')}: give one for all, one for each, or several for one picture"
        )
    return [(text,) for text in texts]


def _names(stem: str, texts: Sequence[str], variants: Sequence[Variant]) -> list[str]:
    names = []
    for number in range(max(1, len(texts))):
        for variant in variants:
            tags = [str(number + 1)] * (len(texts) > 1) + [variant.tag] * bool(variant.tag)
            names.append("-".join([stem, *tags]))
    return names


def _stems(paths: Sequence[Path]) -> list[str]:
    """Names of the results: the pictures' stems, with their folder's name where stems are equal."""
    stems = [p.stem for p in paths]
    if len(set(stems)) < len(stems):
        stems = [
            f"{p.parent.name}-{p.stem}" if p.parent.name and stems.count(p.stem) > 1 else p.stem
            for p in paths
        ]
    twice = sorted({s for s in stems if stems.count(s) > 1})
    if twice:
        raise UserError(
            f"several pictures would be written as {twice[0]}.png; edit them one at a time, or rename them"
        )
    return stems


def _check_folder(folder: Path) -> None:
    """It is made when there is something to write; but nothing may stand in its way."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out: {folder} cannot be made a folder, because {nearest} is a file")


def _check_pictures(source: Path, mask: Path | None) -> None:
    """Decode them once, and let go: many large pictures need not fit into memory together."""
    size = images.open_image(source).size
    if mask is not None and (other := images.open_mask(mask).size) != size:
        sizes = " and ".join(f"{w}x{h}" for w, h in (other, size))
        raise UserError(f"--mask {mask}: the mask and {source} must be of one size, but they are {sizes}")


def _spare_inputs(jobs: Sequence[Job], mask: Path | None) -> None:
    """No result may replace a picture that was given."""
    inputs = {job.source.resolve() for job in jobs} | ({mask.resolve()} if mask else set())
    for job in jobs:
        for path in (*job.results, job.sheet):
            if path.resolve() in inputs:
                raise UserError(f"{path}: the result would replace an input; choose another --out")


def _keep_apart(jobs: Sequence[Job]) -> None:
    """No result or sheet may replace another, as where the sheets of earlier edits are edited beside their pictures."""
    written: dict[Path, Path] = {}
    for job in jobs:
        for path in (*job.results, job.sheet):
            if path in written:
                pair = {str(written[path]): None, str(job.source): None}
                raise UserError(
                    f"{path} would be written twice, for {' and '.join(pair)}; rename a picture, leave out sheets of earlier"
                    " results, or give strengths that differ"
                )
            written[path] = job.source


OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=")


def tell_apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Pictures and ``key=value`` overrides, which one command line mixes; an existing file is a picture."""
    overrides = [a for a in arguments if OVERRIDE.match(a) and not Path(a).exists()]
    return [a for a in arguments if a not in overrides], overrides
