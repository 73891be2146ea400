"""From a recipe to a run folder (``train_run``), and from a run folder or an adapter file to an ``Editor`` (``load``)."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from PIL.Image import Image

from . import (
    __version__,
    calibration,
    card,
    data,
    images,
    inspection,
    lookup,
    metrics,
    progress,
    runfolder,
    scaling,
    schema,
    tracking,
    train,
)
from . import recipe as recipe_
from .cache import Samples
from .calibration import Calibration
from .devices import explained_memory
from .errors import UserError
from .judges import Judge
from .method import EditSettings, Example, Method, Region
from .monitor import Monitor
from .recipe import Recipe, Setup

CACHE = "cache"
START = "init"
"""Copy of the adapter that a run started from, for a run that is continued before it saved its first step."""
PRECISIONS: Mapping[torch.dtype, train.Precision] = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
}  # fmt: skip
HIGHEST_PSNR = 100.0
TOO_STRONG = 0.2
"""Change of the layers, as a part of their weights, at which a scale is doubted: trained adapters were at 0.03."""


def train_run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    init: str | Path | None = None,
    method: Method | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Train all stages of a recipe into a run folder; returns the folder.

    Args:
        resume: continue the run that the folder holds; only steps may differ, upwards.
        init: an adapter (file, folder of several, or run folder) to start from; not together with ``resume``.
        method: the recipe's, where it is in memory already.
        say: is told what a person should know.

    Raises:
        UserError: a used folder without ``resume``, changed settings with it, bad data, weights or adapters, or Weights &
            Biases asked for without being logged in.
        Interrupted: Ctrl-C or SIGTERM, after the step under way was saved.
    """
    out = Path(out)
    check_init(init, resume=resume)
    if recipe.sweep is not None:
        raise UserError("sweep: this recipe is of several runs; pentimento.sweep.train_all trains them")
    train.check(recipe.stages, recipe.backbone.precision, recipe.backbone.device)
    state = train.processes(cpu=recipe.backbone.device == "cpu")
    opened_rows = data.open_data(recipe.data)
    recipe_.method_class(recipe.method).check_data(recipe.backbone, recipe.config, opened_rows)
    rows, held_out = data.held_out(opened_rows, recipe.data)
    with contextlib.ExitStack() as held:
        if state.is_main_process:
            held.enter_context(runfolder.locked(out))
            check_folder(out, recipe, resume=resume)
            if recipe.watch.wandb is not None:
                tracking.check()
            with progress.bar("decoding pictures") as advance:
                data.verify([*rows, *held_out], advance)
            held.enter_context(_calibrated(out, recipe, say))
        state.wait_for_everyone()
        with explained_memory():
            _train(recipe, out, rows, held_out, init, method)
    return out


def check_init(init: str | Path | None, *, resume: bool) -> None:
    """Raises ``UserError`` for an adapter to start from that is not there, or where a run is continued."""
    if resume and init is not None:
        raise UserError("--init starts a new run from an adapter; it cannot be given with --resume")
    if init is not None and not Path(init).exists():
        raise UserError(f"--init {init}: there is no such file or folder")


def check_folder(out: Path, recipe: Recipe, *, resume: bool) -> None:
    """Raises ``UserError`` for a folder in which this recipe can neither begin nor, to ``resume``, go on."""
    runfolder.check_resumed(out, recipe) if resume else runfolder.check_new(out)


def _calibrated(
    out: Path, recipe: Recipe, say: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """Within, the weights of a run are written: a calibration of them outlives that if they stay what they were."""
    kind, weights = recipe_.method_class(recipe.method), out / runfolder.WEIGHTS
    if not kind.generates or not any(weights.rglob(inspection.WEIGHTS_NAME)):
        return contextlib.nullcontext()
    return calibration.kept(calibration.file_of(weights, kind.main), say)


def _train(
    recipe: Recipe,
    out: Path,
    rows: list[data.Pair],
    held_out: list[data.Pair],
    init: str | Path | None,
    method: Method | None,
) -> None:
    if method is None:
        method = recipe_.method_class(recipe.method).load(recipe.backbone, recipe.config)
    train.check_loaded(method, recipe.stages, precision_of(method))
    method.adapters.reset(recipe.seed)
    if init is not None or (out / START).exists():
        lookup.begin(method, out / START if init is None else Path(init))
    dropout, workers = recipe.data.caption_dropout, recipe.data.workers
    cache: dict[str, Any] = {"cache": recipe.data.cache, "folder": out / CACHE}
    samples = Samples(rows, method, caption_dropout=dropout, workers=workers, **cache)
    watched = Samples(held_out, method, **cache) if held_out and _watches(recipe) else None
    record = record_of(recipe, method, shared_prompt(rows))
    if method.learns_picture:
        record |= learnt_picture(rows)
    main = train.processes().is_main_process
    if main:
        inputs = {"data": data.inventory(rows), "base": method.base()}
        runfolder.check_inputs(out, inputs)
        _begin(recipe, out, method, record, inputs, copy_start=init is not None)
    with progress.bar("encoding") as advance:
        # Last those that are drawn: the backbone remembers only so many prompts.
        samples.precompute(advance, release=watched is None)
        if watched:
            watched.precompute(advance)
    settings = train.Run(out=out, seed=recipe.seed, precision=precision_of(method), record=record)
    with contextlib.ExitStack() as open_files:
        monitor = None
        if main:
            project = recipe.watch.wandb
            monitor = Monitor(
                method,
                out,
                watch=recipe.watch,
                held_out=watched,
                measure=measure,
                seed=recipe.seed,
                board=None if project is None else tracking.Board(project, out, schema.plain(recipe)),
            )
            open_files.enter_context(monitor)
        train.train(method, recipe.stages, samples, settings, monitor)


def _begin(
    recipe: Recipe,
    out: Path,
    method: Method,
    record: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    copy_start: bool,
) -> None:
    if copy_start:
        try:
            method.adapters.save(out / START, record)
        except OSError as error:
            raise UserError(f"{out / START}: cannot be written ({error.strerror})") from error
    runfolder.write_text(out / runfolder.README, card.write(recipe, method))
    runfolder.record(out, recipe, inputs)


def _watches(recipe: Recipe) -> bool:
    return recipe.watch.every > 0 or recipe.watch.loss_every > 0


def precision_of(method: Method) -> train.Precision:
    """Of the frozen model: the dtype of most of its weights that are not packed; adapters are float32 always."""
    own = {id(p) for p in method.adapters.parameters(*method.adapters.specs)}
    counts: Counter[torch.dtype] = Counter()
    for parameter in method.adapters.host.parameters():
        if id(parameter) not in own and parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return PRECISIONS[counts.most_common(1)[0][0]]


def measure(example: Example, result: Image) -> dict[str, float]:
    """How near a result came to a held-out target: PSNR (dB, at most 100), SSIM, and the share of the edit that was made."""
    if example.source is None or example.target is None:
        return {}
    source, target = images.to_rgb(example.source), images.resize(images.to_rgb(example.target), result.size)
    gain = float(metrics.edit_gain(source, result, target))
    return {
        "psnr": min(float(metrics.psnr(result, target)), HIGHEST_PSNR),
        "ssim": float(metrics.ssim(result, target)),
        # Undefined where source and target are equal: there is nothing to gain.
        "edit_gain": gain if math.isfinite(gain) else 0.0,
    }


def shared_prompt(rows: Sequence[data.Pair]) -> str | None:
    """The one prompt that all pairs have; ``None`` where they have several."""
    prompts = {prompt for row in rows for prompt in row.prompts}
    return prompts.pop() if len(prompts) == 1 else None


def learnt_picture(rows: Sequence[data.Pair]) -> dict[str, str]:
    """A digest of the one picture of all rows, by which edits of others are noticed; nothing where there are several."""
    source = rows[0].load().source if len({row.stamp() for row in rows}) == 1 else None
    return {} if source is None else {"picture": images.digest(source)}


def record_of(recipe: Recipe, method: Method, prompt: str | None) -> dict[str, Any]:
    """What every adapter file of a run says of itself, JSON-able; no time, host or path.

    ``prompt`` is the one that all training pairs shared.
    """
    return {
        "version": __version__,
        "method": recipe.method,
        "backbone": method.base(),
        "config": schema.plain(recipe.config),
        "settings": method.metadata(),
        "prompt": method.default_prompt(recipe.config, prompt),
    }


@dataclass(frozen=True, kw_only=True)
class Editor:
    """A trained edit, ready for pictures."""

    method: Method
    default_instruction: str | None = None
    """What is asked for where no instruction is given: the one that all training pairs shared. None: they shared none."""
    notes: tuple[str, ...] = ()
    """What a person should know, such as another base model than the trained one."""
    setup: Setup | None = None
    """What it was loaded with; needed to learn photographs by heart."""
    calibration: Calibration | None = None
    """What scale 1 stands for. None: the strength that was trained."""

    @property
    def unit(self) -> float:
        """Trained strength that scale 1 stands for."""
        return 1.0 if self.calibration is None else self.calibration.unit

    def edit(
        self,
        image: Image | str | Path | None = None,
        *,
        instruction: str | None = None,
        mask: Image | str | Path | None = None,
        inversion: str | Path | None = None,
        **how: Any,
    ) -> Image:
        """Edit one picture (of any mode, or a path); the result has its size, upright. Without one, draw the instruction.

        Args:
            mask: white where the picture may change.
            inversion: what knows the picture by heart (see ``Method.per_photo``): a run folder or an adapter file. ``None``:
                it is trained, once per picture; under ``backbone.offload`` with a second copy of the model in memory.
            how: fields of ``EditSettings``; ``None`` stands for what the run recorded. Scale 0 is the base model and 1 what
                was trained or, of a slider that was calibrated, the change that it was shown.

        Raises:
            UserError: no instruction where there is no default, a picture that cannot be read, or memory that does not
                suffice.
        """
        key = "" if image is None or isinstance(image, PIL.Image.Image) else Path(image).stem
        source = None if image is None else _taken(image)
        if source is None and not self.method.generates:
            raise UserError(f"{type(self.method).__name__} edits pictures: name at least one picture to edit")
        if how.get("skip") is not None and not self.method.generates:
            raise UserError(f"skip: {type(self.method).__name__} edits in all steps")
        taken = None if mask is None else self._mask(mask)
        prompt = self.asked(instruction)
        settings = EditSettings(**how)
        settings = replace(settings, scale=settings.scale * self.unit)
        if source is not None and (inversion is not None or self.method.per_photo):
            self.method.show_photo(self._inversion(source) if inversion is None else Path(inversion))
        with explained_memory():
            return self.method.edit(Example(source=source, prompt=prompt, mask=taken, key=key), settings)

    def _inversion(self, picture: Image) -> Path:
        from . import photos

        if self.setup is None:
            raise UserError(
                "inversion: name what knows the picture by heart, for nothing is known of the base model"
            )
        return photos.learnt(picture, self.setup, on=self.method)

    def region(self, image: Image | str | Path, *, mask: Image | str | Path | None = None) -> Region | None:
        """Where an edit may change a picture: the mask, or what the method finds; ``None``: everywhere.

        Its mask can be given to edits of the picture, so that it is found only once.

        Raises:
            UserError: as in ``edit``.
        """
        source = _taken(image)
        taken = None if mask is None else self._mask(mask)
        with explained_memory():
            return self.method.region(Example(source=source, mask=taken))

    def _mask(self, mask: Image | str | Path) -> Image:
        if not self.method.takes_mask:
            raise UserError(
                f"mask: {type(self.method).__name__} may change the whole picture and takes no mask"
            )
        return images.take_mask(mask) if isinstance(mask, PIL.Image.Image) else images.open_mask(mask)

    def asked(self, instruction: str | None) -> str:
        """The instruction, or the default where none is given; ``UserError`` where there is no default."""
        prompt = self.default_instruction if instruction is None else instruction
        if prompt is None:
            raise UserError(lookup.NO_INSTRUCTION)
        return prompt

    def search(
        self,
        image: Image | str | Path,
        *,
        instruction: str | None = None,
        search: scaling.Search,
        judge: Judge | None = None,
        seed: int = 0,
        steps: int | None = None,
        **options: Any,
    ) -> scaling.Found:
        """Edit with several seeds in few steps, let a judge choose, and make the winner in all steps (``scaling``).

        Args:
            judge: instead of the one that ``search`` names.
            seed: of the first candidate; the others count up from it.
            options: as in ``edit``.

        Raises:
            UserError: as in ``edit``; no judge, or one that cannot be reached; fewer than two candidates.
        """
        source, prompt = _taken(image), self.asked(instruction)
        return scaling.search(
            lambda number, count: self.edit(source, instruction=prompt, seed=number, steps=count, **options),
            scaling.Question(source=source, instruction=prompt),
            judge or search.open_judge(),
            search,
            seed=seed,
            steps=steps,
            final=self.method.metadata().get("steps") if steps is None else steps,
        )


def _taken(image: Image | str | Path) -> Image:
    """A picture from Python or from a file, upright and RGB."""
    return images.take_image(image) if isinstance(image, PIL.Image.Image) else images.open_image(image)


def load(
    what: str | Path,
    *,
    at: int | None = None,
    weights: str | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    also: Sequence[tuple[str | Path, float]] = (),
    raw: bool = False,
) -> Editor:
    """An editor from a run folder, or from an adapter file or a folder that holds one.

    Args:
        at: take the weights that the run saved at this step.
        weights: another place of the base model (``backbone.weights``); ``device`` likewise.
        overrides: ``key=value`` changes of ``backbone`` and ``config``. A file of others needs ``method=NAME``.
        also: further sliders (run folders or files) that act beside it, each with its scale.
        raw: scale 1 is what was trained, also of sliders that were calibrated.

    Raises:
        UserError: nothing there, no weights yet, an absent step, a file that is damaged or fits another model.
    """
    changes = [f"backbone.weights={weights}"] * (weights is not None) + [f"backbone.device={device}"] * (
        device is not None
    )
    return opened(lookup.find(what, at=at, overrides=[*changes, *overrides]), also=also, raw=raw)


def opened(
    found: lookup.Found, *, also: Sequence[tuple[str | Path, float]] = (), raw: bool = False
) -> Editor:
    """An editor of what ``lookup.find`` found; arguments and errors are those of ``load``."""
    setup = found.setup
    try:
        method = recipe_.method_class(setup.method).load(setup.backbone, setup.config)
    except UserError as error:
        # Where the layers were read off the file, it is the file that does not fit.
        raise UserError(str(error) if found.record else f"{found.place}: {error}") from error
    _fill(method, found)
    if also:
        method.compose([_further(lookup.place_of(Path(other), None), scale, raw) for other, scale in also])
    sliding = method.generates and not raw
    known = calibration.read(calibration.file_of(found.place, method.main)) if sliding else None
    notes = (*found.notes, *_notes(found, method), *([str(known)] if known else []))
    return Editor(
        method=method, default_instruction=found.prompt, notes=notes, setup=setup, calibration=known
    )


def _further(place: Path, scale: float, raw: bool) -> tuple[Path, float]:
    """Another slider and the trained strength that its scale stands for."""
    known = None if raw else calibration.read(inspection.find(place))
    return place, scale if known is None else scale * known.unit


def _fill(method: Method, found: lookup.Found) -> None:
    """Load the weights; a lone file is the main adapter, the only one that an edit needs."""
    if found.theirs is not None:
        method.take(found.theirs)
        return
    lone = found.place.is_file() and len(method.adapters.specs) > 1
    method.adapters.load(found.place, method.main if lone else None)


def _notes(found: lookup.Found, method: Method) -> Iterator[str]:
    trained, here = found.record.get("backbone", {}), method.base()
    if trained and trained.get("digest") != here.get("digest"):
        yield (
            f"this adapter was trained on {_base_name(trained)}, whose weights differ from those of {_base_name(here)}"
        )
    if not found.record and method.generates and inspection.silent_on_alpha(found.place):
        strength = method.adapters.strength(method.main)
        if strength is not None and strength > TOO_STRONG:
            yield (
                f"{found.place} says nothing of alpha, so that its scale is 1, at which it changes its layers by {strength:.0%} of"
                " their own weights; adapters that work change them by a few percent. PairEdit's scale is alpha / rank = 1/16:"
                " a file that was made of its weights without this factor is 16 times too strong, and right at --scale 0.0625"
            )


def _base_name(base: Mapping[str, Any]) -> str:
    """A base model as its record names it."""
    file = base.get("transformer_file")
    return f"{base.get('weights')}{f' with {file}' if file else ''}"
