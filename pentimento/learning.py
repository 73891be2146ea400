"""The ``edit`` and ``mask`` commands for methods that learn the picture itself: learn it once, then edit it (``cases``)."""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
from PIL.Image import Image

from . import cases, editing, heatmaps, images, lookup, photos, recipes, run, runfolder, schema, train
from . import recipe as recipe_
from .cases import Case
from .editing import Job
from .errors import UserError, counted, named
from .layouts import listed
from .lookup import Found
from .method import EditSettings, Example, Method
from .recipe import Recipe, Setup
from .run import Editor

if TYPE_CHECKING:
    from .captioner import Captioner
    from .generation import Request

Say = Callable[[str], None]
SHOWN = 20
"""Failed cases that are listed at the end."""


@dataclass(frozen=True, kw_only=True)
class What:
    """What edits: a recipe that learns each picture first, or a run that has learnt one."""

    setup: Setup
    recipe: Recipe | None = None
    found: Found | None = None

    @property
    def method(self) -> type[Method]:
        """The class of its method."""
        return recipe_.method_class(self.setup.method)

    def told(self, case: Case) -> Any:
        """The method's settings for a case: what it says of itself goes before what the recipe or the run says."""
        config = self.setup.config
        given = {"source_prompt": case.source, "word": case.word}
        if case.word:
            given["region"] = "word"
        return replace(config, **{key: value for key, value in given.items() if value})

    def learnt(self, photo: Image, config: Any) -> Found:
        """What knows a picture by heart, with the settings of this edit; trained if it is a recipe and there is none yet."""
        found = self.found or lookup.find(photos.learn(photo, replace(_recipe(self), config=config)))
        return replace(found, setup=replace(self.setup, config=config))


def _recipe(what: What) -> Recipe:
    assert what.recipe is not None, "a run has learnt its picture"
    return what.recipe


def what_of(name: str | Path, *, at: int | None = None, overrides: Sequence[str] = ()) -> What | None:
    """A recipe or a run of a method that learns the picture itself; ``None`` for all others.

    Raises:
        UserError: as ``recipe.load`` and ``lookup.find`` do.
    """
    if not _is_recipe(str(name)):
        if not Path(name).exists():
            return None  # explained where all that is edited with is looked for
        found = lookup.find(name, at=at, overrides=overrides)
        return What(setup=found.setup, found=found) if found.method.learns_picture else None
    recipe = recipe_.load(name, overrides)
    if not recipe_.method_class(recipe.method).learns_picture:
        return None
    if at is not None:
        last = list(recipe.stages)[-1]
        raise UserError(f"--at takes a step of a run, but {name} is a recipe; set stages.{last}.steps={at}")
    setup = Setup(method=recipe.method, backbone=recipe.backbone, config=recipe.config)
    return What(setup=setup, recipe=recipe)


def _is_recipe(name: str) -> bool:
    # A run may be called as its recipe; what else is called so, such as a folder of results, does not count.
    known = name in recipes.names() and not (Path(name) / runfolder.RECIPE).is_file()
    return known or (Path(name).is_file() and Path(name).suffix in (".yaml", ".yml"))


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A case that was found to be in order."""

    case: Case
    config: Any
    job: Job


def carry_out(what: What, request: "Request", say: Say) -> Generator[Path, None, list[Job]]:
    """Learn and edit all pictures of a request; yields each path when it is written, and returns what was made.

    Of a file of cases (``request.cases``) none that fails stops the others, and what is there with the same settings is not made
    again; failures are raised together at the end.
    """
    _check_options(request)
    if what.recipe is not None:
        train.check(what.recipe.stages, what.setup.backbone.precision, what.setup.backbone.device)
    batch = request.cases is not None
    ready, failed = _prepared(what, request, say)
    there, begun = 0, time.monotonic()
    for number, one in enumerate(ready):
        record = _record(what, one, request)
        file = request.out / f"{one.case.name}.json"
        if batch and _is_there(record, file, one.job):
            there += 1
            continue
        if batch:
            left = _left(number - there, len(ready) - number, begun)
            say(f"case {number + 1} of {len(ready)}, {one.case.name}{left}")
            file.unlink(missing_ok=True)
        try:
            yield from _edited(what, one, request, say)
            if batch:
                runfolder.write_text(file, json.dumps(record, indent=1, sort_keys=True) + "\n")
        except (UserError, OSError) as error:
            if not batch:
                raise
            failed[one.case.name] = str(error)
            say(f"{one.case.name}: failed: {error}")
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on from here") from None
    if batch:
        _summarise(ready, there, failed, say)
    return [one.job for one in ready]


def _summarise(ready: Sequence[Ready], there: int, failed: Mapping[str, str], say: Say) -> None:
    made = len([one for one in ready if one.case.name not in failed]) - there
    say(f"{counted(made, 'case')} made, {there} there already, {len(failed)} failed")
    if failed:
        lines = [f"{name}: {error}" for name, error in failed.items()]
        raise UserError(
            f"{counted(len(failed), 'case')} failed; the same command tries only these again:{listed(lines, SHOWN)}"
        )


def _left(done: int, left: int, begun: float) -> str:
    """How long it will take, once that can be told."""
    if not done:
        return ""
    seconds = (time.monotonic() - begun) / done * left
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def _edited(what: What, one: Ready, request: "Request", say: Say) -> Iterator[Path]:
    photo = images.open_image(one.case.picture)
    if what.recipe is not None:
        say(f"{one.case.picture}: learnt by heart before it is edited, unless it has been")
    editor = run.opened(what.learnt(photo, one.config))
    for note in editor.notes:
        say(note)
    yield from editing.execute([one.job], editor, request.options, None, say)


def masks(what: What, request: "Request", say: Say) -> Iterator[Path]:
    """Write where edits may change the pictures of a request, without learning or editing them; yields each path.

    Raises:
        UserError: as ``carry_out`` does, or nothing says where.
    """
    ready, _ = _prepared(what, request, say)
    for one in ready:
        if one.config.region == "whole" and one.case.mask is None:
            raise UserError("say what may change: --target-word, a word of --source, or --mask")
        _check_inputs_stay(one.case, request.out / one.case.name)
    for one in ready:
        editor = Editor(method=what.method.load(what.setup.backbone, one.config))
        photo = images.open_image(one.case.picture)
        region = editor.region(photo, mask=_mask(one.case))
        if region is not None:
            yield from heatmaps.save(region, photo, request.out / one.case.name)


def _check_inputs_stay(case: Case, stem: Path) -> None:
    """No mask that is shown may replace the one that was given, which need not be as sharp."""
    inputs = [path.resolve() for path in (case.picture, case.mask) if path]
    for path in heatmaps.paths(stem).values():
        if path.resolve() in inputs:
            raise UserError(f"{path}: the result would replace an input; choose another --out")


def learn(
    recipe: str | Path,
    picture: Image | str | Path,
    *,
    source: str = "",
    word: str = "",
    weights: str | None = None,
    overrides: Sequence[str] = (),
) -> Editor:
    """An editor of one picture, which is learnt by heart once: ``learn("editinfinity", "cat.jpg", source="a cat").edit(...)``.

    Args:
        recipe: the name or file of a recipe of a method that learns the picture itself.
        source: what the picture shows (``config.source_prompt``).
        word: a word of it; edits change only what it names.
        weights: place of the base model (``backbone.weights``).
        overrides: ``key=value`` changes of the recipe.

    Raises:
        UserError: another recipe, no caption, a word that it does not have, or what ``run.train_run`` raises.
    """
    places = [] if weights is None else [f"backbone.weights={weights}"]
    what = what_of(recipe, overrides=[*places, *overrides])
    if what is None or what.recipe is None:
        raise UserError(f"{recipe} is no recipe of a method that learns the picture itself")
    photo = images.take_image(picture) if isinstance(picture, PIL.Image.Image) else images.open_image(picture)
    config = what.told(Case(name="picture", picture=Path(), source=source, word=word))
    _check_source(config, "source=...")
    # A mask is given only to its edits.
    region = "word" if config.region == "word" else "whole"
    what.method.check_edit(replace(config, region=region), Example(source=photo), EditSettings())
    _check_texts(what.method.outline(what.setup.backbone, config), ("source", config.source_prompt))
    return run.opened(what.learnt(photo, config))


def _check_options(request: "Request") -> None:
    """Settings that methods have which draw in steps, or sliders."""
    options = request.options
    if options.candidates > 1:
        raise UserError(
            "candidates: there are no quick previews in fewer steps here; --count draws several results"
        )
    for name, given in (("inversion", options.inversion or request.of_inversion), ("also", options.also)):
        if given:
            raise UserError(f"{name} is for sliders; leave it out")


def _prepared(what: What, request: "Request", say: Say) -> tuple[list[Ready], dict[str, str]]:
    """The cases that are in order, and what is wrong with the others of a file of cases."""
    found, failed = _gathered(what, request, say)
    captioner = None if request.caption is None else _captioner(request.caption)
    outline = what.method.outline(what.setup.backbone, what.setup.config)
    ready = []
    for case in found:
        try:
            if captioner is not None and not case.source:
                case = replace(case, source=captioner.caption(images.open_image(case.picture)))
                say(f"{case.name}: captioned as {case.source!r}")
            ready.append(_checked(what, case, request, outline))
            _say_other(what, case, say)
        except UserError as error:
            if request.cases is None:
                raise
            failed[case.name] = str(error)
            say(f"{case.name}: left out: {error}")
    editing.check_outputs([one.job for one in ready], 1)
    return ready, failed


def _say_other(what: What, case: Case, say: Say) -> None:
    """A note where a run has learnt another picture; no error, for the same one may have been scaled or compressed anew."""
    learnt = what.found.record.get("picture") if what.found else None
    if learnt is not None and learnt != images.digest(images.open_image(case.picture)):
        say(
            f"{case.picture}: differs from the picture that was learnt; if it is not the same one in another size or file format, learn"
            " it too: name the recipe instead of the run"
        )


def _captioner(name: str) -> "Captioner":
    from .captioner import Captioner  # slow, and seldom needed

    return Captioner(name)


def _gathered(what: What, request: "Request", say: Say) -> tuple[list[Case], dict[str, str]]:
    failed = {}
    if request.cases is None:
        found = [_completed(case, request) for case in _named(what, request)]
    else:
        if (
            request.pictures
            or request.case
            or request.prompts
            or request.sources
            or request.word
            or request.mask
        ):
            raise UserError(
                "--cases: a file of cases says all of its pictures itself; leave the other options out"
            )
        if request.out.suffix.lower() in images.WRITABLE:
            raise UserError(f"--out {request.out}: the results of a file of cases go into a folder")
        found = []
        for name, case in cases.from_lines(request.cases):
            if isinstance(case, UserError):
                failed[name] = str(case)
                say(f"{name}: left out: {case}")
            else:
                found.append(case.only(what.setup.config.region))
    return found, failed


def _named(what: What, request: "Request") -> list[Case]:
    """The pictures of the command line, or the one of a folder in the authors' layout."""
    if request.case is not None:
        if request.pictures:
            raise UserError("--case names the picture; leave the other one out")
        return [cases.from_folder(request.case).only(what.setup.config.region)]
    if not request.pictures:
        raise UserError("name at least one picture to edit")
    paths = [Path(name) for name in request.pictures]
    sources = editing.per_picture(request.sources, len(paths), "--source")
    prompts = editing.per_picture(request.prompts, len(paths), "--prompt")
    if any(len(texts) > 1 for texts in sources):
        raise UserError("--source: one picture has one caption; several --prompt are drawn one each")
    return [
        Case(name=name, picture=path, source="".join(texts), prompts=wanted)
        for name, path, texts, wanted in zip(editing.stems(paths), paths, sources, prompts, strict=True)
    ]


def _completed(case: Case, request: "Request") -> Case:
    """What the command line says goes before what a folder says."""
    if request.mask is not None and request.word:
        raise UserError("--mask and --target-word both say what may change; leave one out")
    changes: dict[str, Any] = {"word": request.word}
    if request.case is not None:
        changes |= {"source": "".join(request.sources[:1]), "prompts": request.prompts}
    case = replace(case, **{key: value for key, value in changes.items() if value})
    if request.mask is not None:
        case = replace(case, mask=request.mask, mask_white="change", mask_scales=False, word="")
    return replace(case, mask_white="keep") if request.mask_keeps else case


def _checked(what: What, case: Case, request: "Request", outline: Method | None) -> Ready:
    """Everything about a case that can be known before weights are read."""
    config = what.told(case)
    drawn = bool(request.variants)
    source, wanted = _fields(request)
    if (drawn and what.found is None) or config.region == "word":
        _check_source(config, f'{source} "..."')
    prompts = case.prompts or ((config.target_prompt,) if config.target_prompt else ())
    if drawn and not (prompts and all(text.strip() for text in prompts)):
        raise UserError(f'say what the edited picture shows: {wanted} "..."')
    case = replace(case, prompts=prompts, source=config.source_prompt)
    (job,) = editing.jobs_of([case.asked()], variants=request.variants, out=request.out)
    example = Example(source=images.open_image(case.picture), mask=_mask(case), key=str(case.picture))
    for steps, skip in {(v.steps, v.skip) for v in request.variants} or {(None, None)}:
        what.method.check_edit(config, example, EditSettings(steps=steps, skip=skip))
    _check_texts(outline, (source, config.source_prompt), *((wanted, text) for text in prompts))
    return Ready(case=case, config=config, job=job)


def _fields(request: "Request") -> tuple[str, str]:
    """Where the captions of the picture and of its edits can be said."""
    if request.cases is not None:
        return "the field source_prompt", "the field target_prompt"
    if request.case is not None:
        return f"prompt/{cases.CAPTION} or --source", f"prompt/{cases.TARGET} or --prompt"
    return "--source", "--prompt"


def _check_texts(outline: Method | None, *texts: tuple[str, str]) -> None:
    """What says each and the text, as far as the model's tokenizer is on this machine; else they are checked when it is there."""
    if outline is None:
        return
    for where, text in texts:
        with named(where):
            outline.check_text(text)


def _check_source(config: Any, how: str) -> None:
    if not config.source_prompt.strip():
        raise UserError(f"say what the picture shows: {how} (or let a model say it: --caption auto)")


def _mask(case: Case) -> Image | None:
    """A case's mask, white where the picture may change; ``UserError`` for one that changes nothing or everything."""
    if case.mask is None:
        return None
    mask = images.open_mask(case.mask, white=case.mask_white)
    low, high = mask.point(lambda level: 255 * (level >= images.WHITE)).getextrema()
    if low == high:
        what = "everything" if high else "nothing"
        raise UserError(
            f"{case.mask}: by this mask {what} may change; paint what may change white and the rest black"
            " (with --mask-keeps the other way round), or leave it out to change the whole picture"
        )
    return mask


def _record(what: What, one: Ready, request: "Request") -> dict[str, Any]:
    """All that the results of a case depend on, JSON-able."""
    mask = one.case.mask
    base = what.method.base_digest(what.setup.backbone)
    return {
        "picture": images.digest(images.open_image(one.case.picture)),
        "mask": None if mask is None else [images.digest(images.open_mask(mask)), one.case.mask_white],
        "prompts": list(one.case.prompts),
        "base": base,
        "config": schema.plain(one.config),
        "training": _training(what),
        "variants": [schema.plain(variant) for variant in request.variants],
        "paste_back": request.options.paste_back,
        "results": [path.name for paths in one.job.results for path in paths],
    }


def _training(what: What) -> Any:
    """What is learnt with, or what has been."""
    if what.found is not None:
        return {key: what.found.record[key] for key in ("stage", "step") if key in what.found.record}
    return {"stages": schema.plain(_recipe(what).stages), "seed": _recipe(what).seed}


def _is_there(record: Mapping[str, Any], file: Path, job: Job) -> bool:
    """Whether the results of a case were made with these settings, and all are there."""
    if not file.is_file() or not all(path.is_file() for paths in job.results for path in paths):
        return False
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")) == record)
    except ValueError:
        return False
