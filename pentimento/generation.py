"""The ``edit`` command: pictures are edited by ``editing.py``, and where none is given, prompts are drawn.

What is drawn is every combination of prompts, seeds, strengths and skips.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL.Image import Image

from . import editing, images, learning, lookup, page, photos, run, runfolder, schema, series, strips
from .calibration import Calibration
from .editing import Job, Options, Variant
from .errors import UserError
from .layouts import read_text
from .method import EditSettings
from .run import Editor
from .series import Shot
from .strips import Strip

ROWS = 20
"""Rows of one sheet; more go on further sheets."""
LONGEST = 60
"""Characters of a prompt in the name of a file."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture and where it goes."""

    shot: Shot
    path: Path


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the command."""

    what: str
    at: int | None = None
    pictures: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    options: Options
    mask: Path | None = None
    out: Path
    overrides: tuple[str, ...] = ()
    """Changes of the run's backbone and method."""
    of_inversion: tuple[str, ...] = ()
    """Changes of the recipe that learns photographs by heart."""
    mask_keeps: bool = False
    """White in the mask is what must stay."""
    sources: tuple[str, ...] = ()
    """What the pictures show."""
    word: str = ""
    """Word of that for what may change."""
    caption: str | None = None
    """Model that says what pictures show of which nothing else does."""
    case: Path | None = None
    """Folder in EditInfinity's own layout."""
    cases: Path | None = None
    """File of cases."""

    def __post_init__(self) -> None:
        if self.mask_keeps and self.mask is None and self.case is None:
            raise UserError(
                "--mask-keeps says how a mask is read; give it with --mask (in a file of cases: mask_white)"
            )


def carry_out(request: Request, say: Callable[[str], None]) -> Iterator[Path]:
    """Edit the pictures, or draw the prompts where there are none; yields each path when it is written.

    Whatever can be wrong with files and settings is found before any weights are loaded; ``say`` is told what a person should
    know.
    """
    options = request.options
    what = learning.what_of(request.what, at=request.at, overrides=request.overrides)
    if what is not None:
        learnt = yield from learning.carry_out(what, request, say)
        if request.cases is None:
            yield from _beside(strips.of_jobs(learnt, None), request, None)
        return
    if request.sources or request.word or request.caption or request.case or request.cases:
        _found(request)  # what is not there at all is said first
        raise UserError(
            "--source, --target-word, --caption, --case and --cases are for methods that learn the picture itself (editinfinity)"
        )
    if request.pictures or not _found(request).method.generates:
        several = options.candidates
        jobs = editing.plan(
            request.pictures,
            instructions=request.prompts,
            variants=request.variants,
            out=request.out,
            mask=(request.mask, "keep" if request.mask_keeps else "change"),
            candidates=several,
        )
        if not all(text.strip() for text in request.prompts) and not _found(request).method.generates:
            raise UserError("--instruction is empty; say what is to change")
        if not request.prompts:
            lookup.check_instruction(request.what, request.at, request.overrides)
        judge = options.open_judge() if several > 1 else None
        check_edits(request)
        jobs = learn(jobs, request, say)
        editor = _load(request, say)
        yield from editing.execute(jobs, editor, options, judge, say)
        yield from _beside(strips.of_jobs(jobs, _skip(editor)), request, editor.calibration)
        return
    if request.mask is not None:
        raise UserError("--mask is for edits of pictures: name at least one picture to edit")
    prompts = request.prompts or (str(_found(request).prompt),)
    drawn = plan(
        prompts if options.prompts is None else request.prompts, request.variants, options, request.out
    )
    editor = _load(request, say)
    yield from execute(drawn, editor)
    yield from _beside(strips.of_drawn(drawn, _skip(editor)), request, editor.calibration)


def regions(request: Request, say: Callable[[str], None]) -> Iterator[Path]:
    """Write only where edits may change the pictures; yields each path when it is written."""
    what = learning.what_of(request.what, overrides=request.overrides)
    if what is None:
        _found(request)
        raise UserError(f"{request.what}: only editinfinity finds where a picture may change")
    yield from learning.masks(what, request, say)


def _beside(made: Sequence[Strip], request: Request, known: Calibration | None) -> Iterator[Path]:
    """Grids where they are asked for, and a page with sliders where there are several strengths."""
    folder = made[0].frames[0][1].parent
    if request.options.grids:
        for name, picture in strips.grids(made, str(request.what)):
            yield images.save_image(picture, folder / name)
    if request.options.page and len(made[0].frames) > 1:
        runfolder.write_text(folder / page.NAME, page.page(made, known))
        yield folder / page.NAME


def _skip(editor: Editor) -> int | None:
    """Steps before the edit sets in, as they were recorded; ``None`` for methods that edit in all steps."""
    return editor.method.metadata().get("skip")


def _found(request: Request) -> lookup.Found:
    return lookup.find(request.what, at=request.at, overrides=request.overrides)


def _load(request: Request, say: Callable[[str], None]) -> Editor:
    editor = run.load(
        request.what,
        at=request.at,
        overrides=request.overrides,
        also=request.options.further(),
        raw=request.options.raw,
    )
    for note in editor.notes:
        say(note)
    known = editor.calibration
    if known and (outside := [f"{v.scale:g}" for v in request.variants if not known.covers(v.scale)]):
        say(f"scale {', '.join(dict.fromkeys(outside))}: outside of what was measured to hold")
    return editor


def check_edits(request: Request) -> None:
    """Raise ``UserError`` for edits of pictures that would be none; among them the candidates of a search, which have fewer steps."""
    found, options = _found(request), request.options
    for variant in request.variants:
        how = EditSettings(seed=variant.seed, scale=variant.scale, skip=variant.skip, steps=variant.steps)
        found.method.check(found.setup.config, how, photo=True)
        if options.candidates > 1:
            early = replace(how, steps=options.early_steps)
            found.method.check(found.setup.config, early, photo=True)


def learn(jobs: Sequence[Job], request: Request, say: Callable[[str], None]) -> list[Job]:
    """The jobs with what knows their pictures by heart, for methods that need it: trained now, one model in memory at a time."""
    found = _found(request)
    if not found.method.per_photo:
        if request.options.inversion is not None or request.of_inversion:
            raise UserError(f"inversion: {found.setup.method} edits pictures as they are")
        return list(jobs)
    if request.options.inversion is not None:
        if len(jobs) > 1:
            raise UserError("inversion names what knows one picture by heart, but there are several pictures")
        return [replace(job, inversion=Path(request.options.inversion)) for job in jobs]
    photos.recipe_for(found.setup, request.of_inversion)
    learnt = []
    for job in jobs:
        say(f"{job.source}: learnt by heart before it is edited, unless it has been")
        place = photos.learnt(job.source, found.setup, request.of_inversion)
        learnt.append(replace(job, inversion=place))
    return learnt


def plan(prompts: Sequence[str], variants: Sequence[Variant], options: Options, out: Path) -> list[Drawn]:
    """Settle every picture and every name.

    Each prompt is drawn in all variants; of a file of prompts (``options.prompts``) each seed draws one. Where ``out`` is a
    file, it is the only picture.

    Raises:
        UserError: settings that only edits of pictures have, a file of prompts that cannot be read, or a file for several results.
    """
    check(options)
    if options.prompts is not None:
        if prompts:
            raise UserError("prompts and --prompt both say what to draw; leave one out")
        known = read_prompts(Path(options.prompts))
        # By the seed, so that equal commands draw equal pictures.
        pairs = [(random.Random(v.seed).choice(known), v) for v in variants]
    else:
        pairs = [(prompt, v) for prompt in prompts for v in variants]
    single = out.suffix.lower() in images.WRITABLE
    if single and len(pairs) > 1:
        raise UserError(f"--out {out} is one file, but there are {len(pairs)} results; name a folder")
    drawn = [
        Drawn(
            shot=Shot(prompt=prompt, seed=v.seed, scale=v.scale, skip=v.skip, steps=v.steps),
            path=out if single else out / f"{'-'.join(filter(None, [slug(prompt), v.tag]))}.png",
        )
        for prompt, v in pairs
    ]
    editing.check_folder(out.parent if single else out)
    names = [one.path for one in drawn]
    if twice := sorted({str(path) for path in names if names.count(path) > 1}):
        raise UserError(f"{twice[0]} would be written twice; give prompts, strengths or skips that differ")
    return drawn


def check(options: Options) -> None:
    """Raise ``UserError`` for settings of edits of pictures."""
    plain = Options()
    for name in ("candidates", "paste_back", "inversion"):
        if getattr(options, name) != getattr(plain, name):
            raise UserError(f"{name} is for edits of pictures: name at least one picture to edit")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a YAML list, or of a text file with one per line.

    Raises:
        UserError: unreadable, empty, or a list of other things than texts.
    """
    text = read_text(path)
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() in (".yaml", ".yml"):
        listed = schema.parse_value(text)
        if not isinstance(listed, list) or not all(isinstance(prompt, str) for prompt in listed):
            raise UserError(f"{path}: a file of prompts is a YAML list of texts")
        prompts = listed
    if not prompts:
        raise UserError(f"{path}: there is no prompt in it")
    return prompts


def slug(prompt: str) -> str:
    """A prompt as a part of a file's name."""
    return re.sub(r"\W+", "-", prompt).strip("-").lower()[:LONGEST].strip("-") or "no-prompt"


def execute(drawn: Sequence[Drawn], editor: Editor) -> Iterator[Path]:
    """Draw the pictures one by one; yields each path when it is written, and last the sheets: scales side by side."""
    rows: dict[tuple[str, int, int | None], list[Image]] = {}
    for one in drawn:
        picture = series.draw(editor, one.shot)
        yield images.save_image(picture, one.path)
        rows.setdefault((one.shot.prompt, one.shot.seed, one.shot.skip), []).append(picture)
    if len(drawn) < 2:
        return
    titles = [f"scale {scale:g}" for scale in dict.fromkeys(one.shot.scale for one in drawn)]
    labels = [
        f"seed {seed}" + (f", skip {skip}" if skip is not None else "") + f": {prompt}"
        for prompt, seed, skip in rows
    ]
    pictures = list(rows.values())
    cell = min(512, max(128, *pictures[0][0].size))
    for number, first in enumerate(range(0, len(pictures), ROWS), 1):
        part = slice(first, first + ROWS)
        name = "sheet.png" if len(pictures) <= ROWS else f"sheet-{number}.png"
        sheet = images.sheet(pictures[part], titles=titles, labels=labels[part], cell=cell)
        yield images.save_image(sheet, drawn[0].path.parent / name)
