"""From a recipe to a run folder (``train_run``), and from a run folder or an adapter file to an ``Editor`` (``load``)."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from PIL.Image import Image

from . import (
    __version__,
    adapters,
    card,
    checkpoint,
    data,
    images,
    inspection,
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
from .errors import UserError
from .judges import Judge
from .method import EditSettings, Example, Method
from .monitor import Monitor
from .recipe import Recipe, Setup
from .recipes import shipped
from .schema import Origin

OUT_OF_MEMORY = (
    "the device's memory does not suffice; to train: a smaller stages.NAME.batch_size, a smaller picture,"
    " backbone.gradient_checkpointing=true, or backbone.precision=bf16; to edit: backbone.offload=model, or a GGUF file as"
    " backbone.transformer_file"
)

CACHE = "cache"
RECORDED = {"weights", "attention_bias"}
"""Of what an adapter's file records of its base model, the keys that are settings of its backbone."""
START = "init"
"""Copy of the adapter that a run started from, for a run that is continued before it saved its first step."""
PRECISIONS: Mapping[torch.dtype, train.Precision] = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
}  # fmt: skip
HIGHEST_PSNR = 100.0
NO_INSTRUCTION = (
    "say what to change with --instruction: the training pairs had no prompt in common that could stand for it"
    ' (--instruction "" asks for nothing in particular)'
)


def train_run(
    recipe: Recipe, out: str | Path, *, resume: bool = False, init: str | Path | None = None
) -> Path:
    """Train all stages of a recipe into a run folder; returns the folder.

    Args:
        resume: continue the run that the folder holds; only steps may differ, upwards.
        init: an adapter (file, folder of several, or run folder) to start from; not together with ``resume``.

    Raises:
        UserError: a used folder without ``resume``, changed settings with it, bad data, weights or adapters, or Weights &
            Biases asked for without being logged in.
        Interrupted: Ctrl-C or SIGTERM, after the step under way was saved.
    """
    out = Path(out)
    check_init(init, resume=resume)
    train.check(recipe.stages, recipe.backbone.precision, recipe.backbone.device)
    state = train.processes(cpu=recipe.backbone.device == "cpu")
    rows, held_out = data.held_out(data.open_data(recipe.data), recipe.data)
    with contextlib.ExitStack() as held:
        if state.is_main_process:
            held.enter_context(runfolder.locked(out))
            check_folder(out, recipe, resume=resume)
            if recipe.watch.wandb is not None:
                tracking.check()
            with progress.bar("decoding pictures") as advance:
                data.verify([*rows, *held_out], advance)
        state.wait_for_everyone()
        try:
            _train(recipe, out, rows, held_out, init)
        except torch.OutOfMemoryError as error:
            raise UserError(OUT_OF_MEMORY) from error
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


def _train(
    recipe: Recipe, out: Path, rows: list[data.Pair], held_out: list[data.Pair], init: str | Path | None
) -> None:
    method = recipe_.method_class(recipe.method).load(recipe.backbone, recipe.config)
    train.check_loaded(method, recipe.stages, precision_of(method))
    method.adapters.reset(recipe.seed)
    if init is not None or (out / START).exists():
        method.adapters.load(out / START if init is None else init)
    dropout, workers = recipe.data.caption_dropout, recipe.data.workers
    cache: dict[str, Any] = {"cache": recipe.data.cache, "folder": out / CACHE}
    samples = Samples(rows, method, caption_dropout=dropout, workers=workers, **cache)
    watched = Samples(held_out, method, **cache) if held_out and _watches(recipe) else None
    record = record_of(recipe, method, shared_prompt(rows))
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
    """Of the frozen model: the dtype of its largest weight that is not packed; adapters are float32 always."""
    own = {id(p) for p in method.adapters.parameters(*method.adapters.specs)}
    frozen = [p for p in method.adapters.host.parameters() if id(p) not in own and p.is_floating_point()]
    return PRECISIONS[max(frozen, key=torch.Tensor.numel).dtype]


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
        "prompt": prompt,
    }


@dataclass(frozen=True, kw_only=True)
class Editor:
    """A trained edit, ready for pictures."""

    method: Method
    default_instruction: str | None = None
    """What is asked for where no instruction is given: the one that all training pairs shared. None: they shared none."""
    notes: tuple[str, ...] = ()
    """What a person should know, such as another base model than the trained one."""

    def edit(
        self,
        image: Image | str | Path,
        *,
        instruction: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        scale: float = 1.0,
        mask: Image | str | Path | None = None,
    ) -> Image:
        """Edit one picture (of any mode, or a path); the result has its size, upright.

        ``None`` stands for what the run recorded. ``mask`` is white where the picture may change; ``scale`` 0 is the base
        model and 1 what was trained.

        Raises:
            UserError: no instruction where there is no default, a picture that cannot be read, or memory that does not
                suffice.
        """
        key = "" if isinstance(image, PIL.Image.Image) else Path(image).stem
        source = _taken(image)
        if mask is not None:
            if not self.method.takes_mask:
                raise UserError(
                    f"mask: {type(self.method).__name__} may change the whole picture and takes no mask"
                )
            mask = images.take_mask(mask) if isinstance(mask, PIL.Image.Image) else images.open_mask(mask)
        prompt = self.asked(instruction)
        settings = EditSettings(seed=seed, steps=steps, guidance=guidance, scale=scale)
        try:
            return self.method.edit(Example(source=source, prompt=prompt, mask=mask, key=key), settings)
        except torch.OutOfMemoryError as error:
            raise UserError(OUT_OF_MEMORY) from error

    def asked(self, instruction: str | None) -> str:
        """The instruction, or the default where none is given; ``UserError`` where there is no default."""
        prompt = self.default_instruction if instruction is None else instruction
        if prompt is None:
            raise UserError(NO_INSTRUCTION)
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
) -> Editor:
    """An editor from a run folder, or from an adapter file or a folder that holds one.

    Args:
        at: take the weights that the run saved at this step.
        weights: another place of the base model (``backbone.weights``); ``device`` likewise.
        overrides: ``key=value`` changes of ``backbone`` and ``config``. A file of others needs ``method=NAME``.

    Raises:
        UserError: nothing there, no weights yet, an absent step, a file that is damaged or fits another model.
    """
    path = Path(what)
    changes = [f"backbone.weights={weights}"] * (weights is not None) + [f"backbone.device={device}"] * (
        device is not None
    )
    changes += overrides
    place = _place(path, at)
    if (path / runfolder.RECIPE).is_file():
        recipe = recipe_.load(path)
        notes = unfinished(path, recipe) if at is None else ()
        plain = schema.plain(Setup(method=recipe.method, backbone=recipe.backbone, config=recipe.config))
        editor = _editor(plain, path / runfolder.RECIPE, place, changes, default=recipe.data.prompt)
        return replace(editor, notes=(*notes, *editor.notes))
    return _editor(recorded_setup(place, changes), place, place, changes)


def check_instruction(what: str | Path, at: int | None = None) -> None:
    """Check, without loading any weights, that an edit may go without an instruction; arguments as for ``load``.

    Raises:
        UserError: it may not, or what ``load`` raises for what is no run and no adapter.
    """
    path = Path(what)
    place = _place(path, at)
    run_prompt = recipe_.load(path).data.prompt if (path / runfolder.RECIPE).is_file() else None
    # Of files of others nothing is known, and `load` says first what else is missing.
    if _record(place) and trained_prompt(place, run_prompt) is None:
        raise UserError(f"{path}: {NO_INSTRUCTION}")


def trained_prompt(place: Path, default: str | None = None) -> str | None:
    """The prompt that all training pairs shared as the weights record it; the default for weights that do not say."""
    prompt = _record(place).get("prompt", default)
    return None if prompt is None else str(prompt)


def _place(path: Path, at: int | None) -> Path:
    """Where the weights lie: a folder of a run, or an adapter file."""
    if (path / runfolder.RECIPE).is_file():
        return checkpoint.at(path, at).folder if at is not None else final_weights(path)
    if at is not None:
        raise UserError(
            f"--at takes a step of a run, but {path} is no run folder (it has no {runfolder.RECIPE})"
        )
    if not path.exists() and str(path) in shipped():
        raise UserError(f"{path} is a recipe; train it first: pentimento train {path} data.root=FOLDER")
    return inspection.find(path)


def final_weights(run: Path) -> Path:
    if next((run / runfolder.WEIGHTS).rglob(inspection.WEIGHTS_NAME), None) is not None:
        return run / runfolder.WEIGHTS
    saved = [str(s.step) for s in checkpoint.saved_steps(run)]
    hint = f"; saved steps, to be used with --at: {', '.join(saved)}" if saved else ""
    raise UserError(f"{run} has no weights yet: its training has not ended; continue it with --resume{hint}")


def unfinished(run: Path, recipe: Recipe) -> tuple[str, ...]:
    """A note where a run's weights are of fewer steps than its recipe has: it is being continued, or that was interrupted."""
    record = _record(run / runfolder.WEIGHTS)
    last, stage = list(recipe.stages.items())[-1]
    if "step" not in record or (record["stage"], record["step"]) == (last, stage.steps):
        return ()
    return (
        f"{run}: its weights are of step {record['step']} of {record['stage']}, but its recipe ends at step {stage.steps} of {last};"
        f" to finish: pentimento train {run} --resume; saved steps, to be used with --at:"
        f" {', '.join(str(s.step) for s in checkpoint.saved_steps(run))}",
    )


def _editor(
    plain: Mapping[str, Any], origin: Path, place: Path, overrides: Sequence[str], default: str | None = None
) -> Editor:
    record = _record(place)
    raw = dict(plain)
    if other := [name for name in _named_methods(overrides) if name != raw["method"]]:
        raise UserError(f"method={other[0]}: {origin} is of {raw['method']}; leave method out")
    # null stood for the base model's own value; the record knows what that was when the adapter was trained.
    settings = record.get("settings", {})
    raw["config"] = {k: settings.get(k) if v is None else v for k, v in raw["config"].items()}
    setup = recipe_.build_setup(raw, recipe_.override(raw, Origin(name=str(origin)), overrides))
    try:
        method = recipe_.method_class(setup.method).load(setup.backbone, setup.config)
    except UserError as error:
        # Where the layers were read off the file, it is the file that does not fit.
        raise UserError(str(error) if record else f"{place}: {error}") from error
    method.adapters.load(place)
    prompt = trained_prompt(place, default)
    return Editor(method=method, default_instruction=prompt, notes=tuple(_notes(record, method)))


def _record(place: Path) -> dict[str, Any]:
    """This package's own record in an adapter file, or in the first one of a folder; empty in files of others."""
    file = place if place.is_file() else min(place.rglob(inspection.WEIGHTS_NAME))
    return inspection.own_record(file, inspection.read_metadata(file))


def _named_methods(overrides: Sequence[str]) -> list[str]:
    return [o.partition("=")[2].strip() for o in overrides if o.partition("=")[0].strip() == "method"]


def recorded_setup(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Method, base model and settings as a file records them; of a file of others as far as its weights tell."""
    record = _record(file)
    if record:
        backbone = {key: record["backbone"][key] for key in RECORDED & set(record["backbone"])}
        return {"method": record["method"], "backbone": backbone, "config": dict(record["config"])}
    named = _named_methods(overrides)
    if not named:
        raise UserError(
            f"{file} does not say by which method it was trained; add method=NAME ({', '.join(recipe_.METHODS)}), and"
            " backbone.weights=... for its base model"
        )
    config: dict[str, Any] = {}
    kind = schema.hints(recipe_.method_class(named[-1]).Config).get("lora")
    if kind is not None:
        spec = adapters.spec_of(file)
        config["lora"] = schema.plain(spec)
        if isinstance(spec, adapters.ExpertLoRA) and not schema.knows(kind, "experts"):
            raise UserError(
                f"{file} has experts ({spec.experts} in a layer), but {named[-1]} edits with a plain LoRA; name the method that"
                " it was trained by"
            )
    return {"method": named[-1], "backbone": {}, "config": config}


def _notes(record: Mapping[str, Any], method: Method) -> list[str]:
    trained, here = record.get("backbone", {}), method.base()
    if trained.get("digest") == here.get("digest") or not trained:
        return []
    return [
        f"this adapter was trained on {_base_name(trained)}, whose weights differ from those of {_base_name(here)}"
    ]


def _base_name(base: Mapping[str, Any]) -> str:
    """A base model as its record names it."""
    file = base.get("transformer_file")
    return f"{base.get('weights')}{f' with {file}' if file else ''}"
