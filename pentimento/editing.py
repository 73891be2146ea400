"""The ``edit`` command's bookkeeping: which picture, which instruction, which variant, and where the results go.

Everything that can be wrong with the files is found before any weights are loaded.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from . import files, heatmaps, images, paste, schema
from .errors import UserError, counted
from .judges import Judge
from .method import LARGEST_SEED
from .run import Editor
from .scaling import Search
from .schema import Origin

White = Literal["change", "keep"]
"""What white means in a mask."""
SAME_ASPECT = 0.02
"""Relative difference of aspects that are taken for equal."""
SAME_WORDS = 3
"""So many words at the beginning of a title stay, though they are the caption's."""
RANDOM_SEEDS = 2**15 + 1
"""Seeds that ``random_seeds`` draws from, as published: 0 to 32768."""


@dataclass(frozen=True, kw_only=True)
class Options(Search):
    """What an edit takes as ``key=value``, besides changes of the run's backbone and method."""

    paste_back: bool = False
    """Keep the source's own pixels wherever the edit did not change the picture, with a soft seam in between."""
    skips: str | None = None
    """Sliders: steps before the edit sets in; several with commas. null: what the run recorded."""
    prompts: str | None = None
    """Sliders without a picture: file of prompts, a YAML list or one per line; each seed draws one of them."""
    random_seeds: bool = False
    """Seeds from 0 to 32768 at random instead of counting up from --seed."""
    inversion: str | None = None
    """Sliders: what knows the photograph by heart, a run folder or an adapter file. none named: it is trained, once per
    photograph; inversion.KEY=VALUE changes the recipe inversion for that."""
    raw: bool = False
    """Sliders that were calibrated: take strengths as they were trained, and not so that 1 is the shown change."""
    page: bool = True
    """Where several strengths are drawn: write slider.html too, one file to move through them in a browser."""
    grids: bool = False
    """Sliders without a picture: write a grid of all strengths per prompt and seed too, as PairEdit's scripts do."""
    also: str | None = None
    """Sliders: further ones that act too, with commas, each with its scale: RUN@0.8,FILE@-1."""

    def skip_values(self) -> list[int | None]:
        """``skips`` as numbers."""
        try:
            return [int(part) for part in self.skips.split(",")] if self.skips is not None else [None]
        except ValueError as error:
            raise UserError(
                f"skips: {self.skips!r}: give a step, or several with commas, such as 10,14"
            ) from error

    def further(self) -> list[tuple[str, float]]:
        """``also`` as places and scales."""
        found = []
        for part in filter(None, (self.also or "").split(",")):
            place, _, scale = part.rpartition("@") if "@" in part else (part, "", "1")
            try:
                found.append((place.strip(), float(scale)))
            except ValueError as error:
                raise UserError(
                    f"also: {part!r}: write a run folder or file, and its scale after @"
                ) from error
        return found


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of sampling; ``tag`` names it in files and sheets, "" where there is only one."""

    seed: int
    scale: float
    steps: int | None
    tag: str
    skip: int | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One picture and what is wanted of it."""

    source: Path
    name: str
    """Of its results."""
    instructions: tuple[str, ...]
    """Applied one after the other. Empty: the one that all pairs of the training shared."""
    each: bool = False
    """Each instruction is applied to the picture itself instead."""
    mask: Path | None = None
    mask_white: White = "change"
    mask_scales: bool = False
    """The mask may be of another size than the picture, as long as it has its aspect."""
    caption: str = ""
    """What the picture shows; sheets leave out what an instruction says just like it."""


@dataclass(frozen=True, kw_only=True)
class Job(Asked):
    """One picture and all that is made of it."""

    variants: tuple[Variant, ...]
    results: tuple[tuple[Path, ...], ...]
    """Of each variant the picture after each instruction."""
    every: bool
    """Write the pictures after each instruction; else only the last of each variant."""
    sheet: Path
    inversion: Path | None = None
    """What knows the picture by heart, for methods that need it."""


def variants(
    *,
    seed: int,
    count: int,
    scales: str,
    steps: int | None,
    options: Options | None = None,
) -> tuple[Variant, ...]:
    """All combinations of ``count`` seeds from ``seed`` on, the skips of ``options``, and the comma-separated ``scales``.

    Each seed is the first of as many as there are candidates; no two searches share one.
    """
    options = options or Options()
    if seed > LARGEST_SEED:
        raise UserError(f"--seed {seed}: seeds lie between 0 and {LARGEST_SEED}")
    values = scale_values(scales)
    made = []
    skips, seeds = options.skip_values(), _seeds(seed, count, options)
    for value in values:
        for number in seeds:
            for skip in skips:
                tags = [f"scale{value:g}"] * (len(values) > 1)
                tags += [f"seed{number}"] * (count > 1 or options.random_seeds)
                tags += [f"skip{skip}"] * (len(skips) > 1)
                made.append(Variant(seed=number, scale=value, steps=steps, skip=skip, tag="-".join(tags)))
    return tuple(made)


def scale_values(scales: str) -> list[float]:
    """The numbers of ``--scale``."""
    try:
        values = [float(text) for text in scales.split(",")]
    except ValueError as error:
        raise UserError(
            f"--scale {scales!r}: give a number, or several with commas, such as 0.5,1"
        ) from error
    if not all(abs(v) < 100 for v in values):
        raise UserError(f"--scale {scales!r}: strengths lie between -100 and 100; 1 is what was trained")
    return values


def _seeds(seed: int, count: int, options: Options) -> Sequence[int]:
    if not options.random_seeds:
        return range(seed, seed + count * options.candidates, options.candidates)
    if count > RANDOM_SEEDS:
        raise UserError(f"--count {count}: there are {RANDOM_SEEDS} random seeds")
    return random.SystemRandom().sample(range(RANDOM_SEEDS), count)


def plan(
    pictures: Sequence[str],
    *,
    instructions: Sequence[str],
    variants: Sequence[Variant],
    out: Path,
    mask: tuple[Path | None, White] = (None, "change"),
    candidates: int = 1,
) -> list[Job]:
    """Open every picture and settle every name.

    One instruction is for all pictures; as many as there are pictures belong to them in order; several for one picture
    are applied one after the other. Where ``out`` is a file, it is the last picture.

    Raises:
        UserError: no picture, one that cannot be read, instructions that do not match, a result that would replace an
            input or another result, a file for several results, or a folder that cannot be made.
    """
    if not pictures:
        raise UserError("name at least one picture to edit")
    given = per_picture(instructions, len(pictures), "instruction")
    sources = [Path(p) for p in pictures]
    asked = [
        Asked(source=source, name=stem, instructions=texts, mask=mask[0], mask_white=mask[1])
        for source, stem, texts in zip(sources, stems(sources), given, strict=True)
    ]
    return jobs_of(asked, variants=variants, out=out, candidates=candidates)


def jobs_of(
    asked: Sequence[Asked], *, variants: Sequence[Variant], out: Path, candidates: int = 1
) -> list[Job]:
    """Open every picture and settle every name, for ``plan`` and as there."""
    total = sum(len(one.instructions) if one.each else 1 for one in asked) * len(variants)
    suffix = out.suffix.lower()
    single = suffix in images.WRITABLE
    if suffix in images.READABLE and not single and not out.is_dir():
        raise UserError(
            f"--out {out}: no picture is written as {suffix}; known: {', '.join(images.WRITABLE)}"
        )
    if single and total > 1:
        raise UserError(f"--out {out} is one file, but there are {total} results; name a folder")
    check_folder(out.parent if single else out)
    jobs = []
    for one in asked:
        _check_pictures(one)
        texts = one.instructions
        results = (
            (_steps_to(out, len(texts)),)
            if single
            else tuple(tuple(out / f"{name}.png" for name in _names(one.name, texts, v)) for v in variants)
        )
        jobs.append(
            Job(
                **vars(one),
                variants=tuple(variants),
                results=results,
                every=not single,
                sheet=out.with_name(f"{out.stem}-sheet.png") if single else out / f"{one.name}-sheet.png",
            )
        )
    check_outputs(jobs, candidates)
    return jobs


def execute(
    jobs: Sequence[Job],
    editor: Editor,
    options: Options | None = None,
    judge: Judge | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Path]:
    """Make the results one by one; yields each path when it is written, the sheet of a picture after its results.

    Args:
        judge: of the search, where ``options`` ask for candidates.
        say: is told what a person should know of a result.
    """
    for job in jobs:
        texts = job.instructions or (editor.asked(None),)
        source = images.open_image(job.source)
        mask = images.open_mask(job.mask, white=job.mask_white) if job.mask else None
        region = editor.region(source) if mask is None else None
        if region is not None and region.attention is not None:
            mask = region.mask
            stem = job.sheet.with_name(job.sheet.stem.removesuffix("-sheet"))
            yield from heatmaps.save(region, source, stem)
        rows: list[list[Image]] = []
        for variant, paths in zip(job.variants, job.results, strict=True):
            work = _Work(
                editor=editor,
                variant=variant,
                given={"mask": mask, "inversion": job.inversion} if job.inversion else {"mask": mask},
                options=options or Options(),
                judge=judge,
                say=say,
            )
            rows.append([])
            for text, path in zip(texts, paths, strict=True):
                before = rows[-1][-1] if rows[-1] and not job.each else source
                result, written = work.make(before, text, path)
                yield from written
                if job.every or path == paths[-1]:
                    yield images.save_image(result, path)
                rows[-1].append(result)
        yield images.save_image(_sheet(job, source, texts, rows), job.sheet)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """All that is the same for the steps of a sequence."""

    editor: Editor
    variant: Variant
    given: dict[str, Any]
    """What an edit is given besides the picture."""
    options: Options
    judge: Judge | None
    say: Callable[[str], None]

    def make(self, source: Image, text: str, path: Path) -> tuple[Image, list[Path]]:
        """The picture after one instruction, and the files that were written besides it."""
        how: dict[str, Any] = {"instruction": text, **self.given, "seed": self.variant.seed}
        how |= {"scale": self.variant.scale, "steps": self.variant.steps, "skip": self.variant.skip}
        found = None
        if self.options.candidates > 1:
            found = self.editor.search(source, search=self.options, judge=self.judge, **how)
        result = found.picture if found else self.editor.edit(source, **how)
        pasted = paste.paste_back(source, result) if self.options.paste_back else None
        if pasted:
            self.say(f"{path.name}: {pasted}")
        written = []
        if found:
            if warning := found.warning():
                self.say(f"{path.name}: {warning}")
            trace = {"instruction": text, **found.trace(), "paste_back": pasted.trace() if pasted else None}
            picture, record = _beside(path)
            written = [images.save_image(found.sheet(source), picture), _write_json(trace, record)]
        return pasted.picture if pasted else result, written


def _beside(path: Path) -> tuple[Path, Path]:
    """Where the candidates of a result go: their sheet, and what the judge said."""
    return path.with_name(f"{path.stem}-candidates.png"), path.with_name(f"{path.stem}-candidates.json")


def _write_json(content: Any, path: Path) -> Path:
    files.write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return path


def _sheet(job: Job, source: Image, texts: Sequence[str], rows: Sequence[Sequence[Image]]) -> Image:
    """Variants of one instruction side by side; of a sequence below each other, its steps side by side."""
    texts = told_apart(texts, job.caption)
    tags = [variant.tag.replace("-", " ") for variant in job.variants]
    cell = min(512, max(128, *source.size))
    if len(texts) > 1:
        titles = [f"{number}. {text}" for number, text in enumerate(texts, 1)]
        labels = tags if any(tags) else None
        return images.sheet(
            [[source, *row] for row in rows], titles=["source", *titles], labels=labels, cell=cell
        )
    titles = [": ".join(part for part in (tag, texts[0]) if part) or "result" for tag in tags]
    return images.sheet([[source, *(row[0] for row in rows)]], titles=["source", *titles], cell=cell)


def told_apart(texts: Sequence[str], caption: str) -> list[str]:
    """Texts without the words with which all of them and the caption begin; a title has room for few."""
    words = [text.split() for text in (*texts, caption)]
    same = len(os.path.commonprefix(words)) if caption else 0
    return [
        f"... {' '.join(each[same:])}" if same > SAME_WORDS and each[same:] else text
        for each, text in zip(words, texts, strict=False)
    ]


def per_picture(given: Sequence[str], count: int, what: str) -> list[tuple[str, ...]]:
    """Texts that belong to each of ``count`` pictures; ``UserError`` where their number does not tell."""
    texts = tuple(given)
    if count == 1 or len(texts) <= 1:
        return [texts] * count
    if len(texts) != count:
        raise UserError(
            f"{counted(len(texts), what)} for {counted(count, 'picture')}: give one for all, one for each, or several for one picture"
        )
    return [(text,) for text in texts]


def _names(stem: str, texts: Sequence[str], variant: Variant) -> list[str]:
    tag = [variant.tag] * bool(variant.tag)
    if len(texts) < 2:
        return ["-".join([stem, *tag])]
    return ["-".join([stem, str(number), *tag]) for number in range(1, len(texts) + 1)]


def _steps_to(out: Path, count: int) -> tuple[Path, ...]:
    """Names of the steps that lead to a file: only what belongs to them is written, not they themselves."""
    return (*(out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(1, count)), out)


def stems(paths: Sequence[Path]) -> list[str]:
    """Names of the results: the pictures' stems, with their folder's name where stems are equal."""
    names = [p.stem for p in paths]
    if len(set(names)) < len(names):
        names = [
            f"{p.parent.name}-{p.stem}" if p.parent.name and names.count(p.stem) > 1 else p.stem
            for p in paths
        ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"several pictures would be written as {twice[0]}.png; edit them one at a time, or rename them"
        )
    return names


def check_folder(folder: Path) -> None:
    """A folder of results is made when there is something to write; ``UserError`` where something stands in its way."""
    nearest = files.nearest(folder)
    if not nearest.is_dir():
        raise UserError(f"--out: {folder} cannot be made a folder, because {nearest} is a file")


def _check_pictures(asked: Asked) -> None:
    """Decode them once, and let go: many large pictures need not fit into memory together."""
    size = images.open_image(asked.source).size
    if asked.mask is None:
        return
    other = images.open_mask(asked.mask).size
    same = (
        abs(other[0] * size[1] / (other[1] * size[0]) - 1) < SAME_ASPECT
        if asked.mask_scales
        else other == size
    )
    if not same:
        sizes = " and ".join(f"{w}x{h}" for w, h in (other, size))
        raise UserError(
            f"--mask {asked.mask}: the mask and {asked.source} must be of one size, but they are {sizes}"
        )


def check_outputs(jobs: Sequence[Job], candidates: int) -> None:
    """No result may replace a picture that was given, nor another result, as where sheets of earlier edits are edited too."""
    inputs = {path.resolve() for job in jobs for path in (job.source, job.mask) if path}
    outputs: dict[Path, Path] = {}
    for job in jobs:
        steps = [path for paths in job.results for path in paths]
        written = steps if job.every else [paths[-1] for paths in job.results]
        beside = [file for path in steps for file in _beside(path)] if candidates > 1 else []
        for path in (*written, *beside, job.sheet):
            if path.resolve() in inputs:
                raise UserError(f"{path}: the result would replace an input; choose another --out")
            if path in outputs:
                pair = {str(outputs[path]): None, str(job.source): None}
                raise UserError(
                    f"{path} would be written twice, for {' and '.join(pair)}; rename a picture, leave out sheets of earlier"
                    " results, or give strengths that differ"
                )
            outputs[path] = job.source


OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=")


def tell_apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Pictures and ``key=value`` settings, which one command line mixes; an existing file is a picture."""
    settings = [a for a in arguments if OVERRIDE.match(a) and not Path(a).exists()]
    return [a for a in arguments if a not in settings], settings


def options(settings: Sequence[str]) -> tuple[Options, list[str], list[str]]:
    """The edit's own settings; changes of ``backbone`` and ``config``, and the ``method`` of a file of others; and what follows
    ``inversion.`` in changes of the recipe inversion.

    Raises:
        UserError: a key that none knows, or a value of another type.
    """
    known = schema.hints(Options)
    raw: dict[str, Any] = {}
    written: dict[tuple[str, ...], str] = {}
    rest, of_inversion = [], []
    for text in settings:
        key, _, value = text.partition("=")
        if key.startswith("inversion."):
            of_inversion.append(text.removeprefix("inversion."))
            continue
        if "." in key or key == "method":
            rest.append(text)
            continue
        if key not in known:
            near = schema.nearest(key, list(known))
            raise UserError(
                f"{text}: an edit has no setting {key!r}.{f' Did you mean {near}?' if near else ''} Its settings:"
                f" {', '.join(known)}; those of the run are written backbone.KEY and config.KEY"
            )
        raw[key] = value if schema.is_text(known[key]) and value != "null" else schema.parse_value(value)
        written[(key,)] = text
    return schema.parse(Options, raw, Origin(name="edit", overrides=written)), rest, of_inversion
