"""The command line. Every command is one grammar for all methods; the work is done elsewhere.

Exit codes: 0 done; 1 the work ran and its result is negative; 2 a mistake that the user can mend, in one message.
"""

import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .errors import UserError

INTERRUPTED = 130
MENDABLE = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EROFS: "choose another folder",
    errno.EACCES: "check who may read and write it",
    errno.EPERM: "check who may read and write it",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""Failures of reading and writing that are the user's to mend, and how."""


class Commands(TyperGroup):
    """The commands, with the one place where errors become messages and exit codes."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; a user's mistake ends with one message on stderr and exit code 2."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except UserError as error:
            code = _complain(str(error))
        except typer.Abort:
            code = INTERRUPTED
        except typer.TyperException as error:
            code = _complain(error.format_message().rstrip(".") or "no command; see pentimento --help")
        except OSError as error:
            if error.errno not in MENDABLE:
                raise
            code = _complain(f"{error.filename or 'output'}: {error.strerror}; {MENDABLE[error.errno]}")
        sys.exit(code or 0)


def _complain(message: str) -> int:
    print(f"pentimento: error: {message}", file=sys.stderr)
    return 2


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach a picture model an edit from before/after pairs, and apply it to new pictures.",
)


def main() -> None:
    """The ``pentimento`` command."""
    # Importing transformers without torchvision prints warnings about picture processors that nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="pentimento")


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe's name, a YAML file or a run folder.")] = None,
) -> None:
    """List the recipes, or explain one.

    One recipe is printed as YAML with every field explained: a file to start one's own from.
    """
    if name is None:
        from .recipes import shipped

        known = shipped()
        width = max(map(len, known)) + 2
        for title, about in known.items():
            print(f"{title:<{width}}{about}")
        return
    from . import recipe

    print(recipe.explain(recipe.load(name)), end="")


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name, a YAML file or a run folder.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/RECIPE-DATE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue this run; steps may be raised.")] = False,
    init: Annotated[Path | None, typer.Option(help="Start from this adapter.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data and folders; load no weights.")
    ] = False,
) -> None:
    """Train all stages of a recipe.

    With a section sweep (sweep.data=[A,B] sweep.noise_scales=[1,2] sweep.seeds=[1,2]) each combination is a run of its own
    in the folder --out; --resume leaves out those that are done.
    """
    from . import preview, run, runfolder
    from . import recipe as recipe_
    from .train import processes

    parsed = recipe_.load(recipe, overrides or ())
    folder = out or runfolder.default_folder(recipe, resume=resume)
    if parsed.sweep is not None:
        if init is not None:
            raise UserError("--init: the runs of a sweep begin afresh; leave it out")
        _sweep(parsed, folder, resume=resume, dry_run=dry_run)
        return
    if dry_run:
        run.check_init(init, resume=resume)
        run.check_folder(folder, parsed, resume=resume)
        if init is not None:
            preview.check_start(parsed, init)
        for line in preview.plan(parsed).lines():
            print(line)
        return
    try:
        run.train_run(parsed, folder, resume=resume, init=init, say=_note)
    except KeyboardInterrupt as stopped:
        begun = (folder / runfolder.RECIPE).is_file()
        how = f"continue with: pentimento train {folder} --resume" if begun else "nothing had begun yet"
        print(str(stopped) or f"stopped; {how}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if processes().is_main_process:
        print(folder)


def _sweep(recipe: Any, folder: Path, *, resume: bool, dry_run: bool) -> None:
    """Several runs of one recipe."""
    from . import sweep
    from .train import processes

    if dry_run:
        for line in sweep.lines(recipe, folder, resume=resume):
            print(line)
        return
    try:
        for done in sweep.train_all(recipe, folder, resume=resume, say=_note):
            if processes().is_main_process:
                print(done, flush=True)
    except KeyboardInterrupt:
        how = f"continue the sweep with: pentimento train {folder / sweep.FILE} --out {folder} --resume"
        print(f"stopped; {how}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


Sources = Annotated[list[str] | None, typer.Option(help="What the picture shows; one each.")]
Word = Annotated[str, typer.Option(help="Word of --source for what may change.")]
Mask = Annotated[Path | None, typer.Option(help="White where the picture may change.")]
Keeps = Annotated[bool, typer.Option("--mask-keeps", help="White in it must stay.")]
CaseFolder = Annotated[Path | None, typer.Option(help="A folder in EditInfinity's layout.")]


@app.command()
def edit(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="A run folder, an adapter file, or a recipe of editinfinity."),
    ],
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE|KEY=VALUE", help="Pictures to edit, and settings.")
    ] = None,
    instruction: Annotated[
        list[str] | None,
        typer.Option(
            "--instruction",
            "--prompt",
            help="What to change. Several: one per picture, or for one picture one after the other.",
        ),
    ] = None,
    source: Sources = None,
    target_word: Word = "",
    mask: Mask = None,
    mask_keeps: Keeps = False,
    caption: Annotated[
        str | None, typer.Option(help="Without --source: auto, or a captioning model.", metavar="MODEL")
    ] = None,
    case: CaseFolder = None,
    cases: Annotated[Path | None, typer.Option(help="A JSONL file of pictures and prompts.")] = None,
    at: Annotated[int | None, typer.Option(help="Take the weights saved at this step.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first result.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="Results per picture, with seeds counting up.", min=1)] = 1,
    scale: Annotated[str, typer.Option(help="Strength of the edit; several with commas.")] = "1",
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; default: what the run recorded.", min=1)
    ] = None,
    out: Annotated[Path, typer.Option(help="A picture file for one result, else a folder.")] = Path("edited"),
) -> None:
    """Edit pictures, or draw prompts with a slider.

    Results have the size of their picture; a sheet shows picture and results side by side. Without a picture, a slider draws
    each --prompt with all seeds and scales.

    Settings: candidates=6 judge=http|local|exact tries that many seeds in a few steps (early_steps) and makes the
    judge's choice in all steps; with --count each result has candidates of its own. paste_back=true keeps the picture's
    own pixels where the edit changed nothing. backbone.KEY and config.KEY change what the run recorded. Sliders:
    skips=10,14, prompts=FILE, random_seeds=true, also=RUN@0.8, raw=true, grids=true, inversion=RUN, inversion.KEY=VALUE. Where
    several strengths are drawn, slider.html moves through them in a browser (page=false: not).

    editinfinity, editinfinity-mask, editinfinity-auto: each picture is learnt by heart first, once; stages.KEY changes how.
    Several --prompt are drawn one each. --cases: lines such as {"id": ..., "image": ..., "source_prompt": ..., "target_prompt": ...,
    "target_word": ..., "mask": ...}; what was made before is not made again, and a failure does not stop the others.
    """
    from . import editing, generation

    pictures, settings = editing.tell_apart(images or [])
    options, overrides, of_inversion = editing.options(settings)
    request = generation.Request(
        what=what, at=at, pictures=tuple(pictures), prompts=tuple(instruction or ()), options=options,
        variants=editing.variants(seed=seed, count=count, scales=scale, steps=steps, options=options),
        mask=mask, mask_keeps=mask_keeps, sources=tuple(source or ()), word=target_word, caption=caption,
        case=case, cases=cases, out=out, overrides=tuple(overrides), of_inversion=tuple(of_inversion),
    )  # fmt: skip
    _print_all(generation.carry_out(request, _note))


@app.command()
def mask(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A run folder or a recipe of editinfinity.")],
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE|KEY=VALUE", help="Pictures, and settings.")
    ] = None,
    source: Sources = None,
    target_word: Word = "",
    mask: Mask = None,
    mask_keeps: Keeps = False,
    case: CaseFolder = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("masks"),
) -> None:
    """Show where an edit may change a picture.

    Without learning it: attention to a word over the picture, the mask that this makes, and how much of the picture is kept
    where. config.threshold=0.4 makes the mask larger.
    """
    from . import editing, generation

    pictures, settings = editing.tell_apart(images or [])
    options, overrides, of_inversion = editing.options(settings)
    request = generation.Request(
        what=what, pictures=tuple(pictures), options=options, mask=mask, mask_keeps=mask_keeps,
        sources=tuple(source or ()), word=target_word, case=case, out=out, overrides=tuple(overrides),
        of_inversion=tuple(of_inversion),
    )  # fmt: skip
    _print_all(generation.regions(request, _note))


def _print_all(paths: Iterable[Path]) -> None:
    """Paths as they are written."""
    try:
        for path in paths:
            print(path, flush=True)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _note(text: str) -> None:
    print(f"pentimento: note: {text}", file=sys.stderr)


@app.command()
def show(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name, a YAML file or a run folder.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it.")] = None,
    index: Annotated[int, typer.Option(help="Which sample, counted from 0.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("shown"),
) -> None:
    """Write what the model will see.

    Of one sample: pictures and masks at training size, the prompt after the template, the sizes.
    """
    from . import preview
    from . import recipe as recipe_

    for path in preview.show(recipe_.load(recipe, overrides or ()), index, out):
        print(path)


@app.command()
def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An adapter file, or a folder that holds one.")
    ],
) -> None:
    """Say what an adapter file is.

    Method, base model, rank, alpha, keys, metadata, and whether it loads (if not, exit code 1). Of a folder of
    each_scale_code_*.pt: what codes it holds.
    """
    from . import calibration, inspection
    from .infinity import authored, pyramids

    if file.is_dir() and pyramids.found(file) and not authored.files_of(file):
        for name, value in pyramids.report(file):
            print(f"{name:<12}{value}")
        return
    adapter = inspection.inspect_file(file)
    for name, value in [*inspection.report(adapter), *calibration.report(adapter)]:
        print(f"{name:<12}{value}")
    if adapter.problems:
        raise typer.Exit(1)


@app.command()
def calibrate(
    what: Annotated[str, typer.Argument(metavar="RUN", help="A slider's run folder or adapter file.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="data.root=PAIRS, measure=latents, ...")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; several are taken in turn.")] = None,
    scale: Annotated[
        str, typer.Option(help="Strengths to measure, as trained.")
    ] = "-1,-0.5,0,0.25,0.5,0.75,1,1.25,1.5,2",
    seed: Annotated[int, typer.Option(help="Seed of the first face.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="Faces to measure.", min=1)] = 8,
    out: Annotated[Path | None, typer.Option(help="Folder for the curve; default: RUN/calibration.")] = None,
    measure_only: Annotated[bool, typer.Option("--measure-only", help="Leave the file as it is.")] = False,
) -> None:
    """Find a slider's right strength.

    Draws unseen faces at several strengths, measures how much of the change that the pairs show is made and whether the
    pictures stay themselves, and records in the adapter's file what scale 1 means from then on. The weights stay as they
    are. Exit code 1: the slider does not do what it was shown.
    """
    from . import calibrate as calibrating
    from . import editing

    request = calibrating.Request(
        what=what,
        prompts=tuple(prompt or ()),
        scales=tuple(editing.scale_values(scale)),
        seed=seed,
        count=count,
        settings=tuple(settings or ()),
        out=out,
        record=not measure_only,
    )
    done = calibrating.calibrate(request, _note)
    for line in (*done.measured.lines(), *map(str, done.written)):
        print(line)
    if done.calibration is None:
        print("no strength makes the change that was shown; the file is as it was", file=sys.stderr)
        raise typer.Exit(1)
    print(f"Spearman {done.calibration.monotone:.2f}; {done.calibration}")


@app.command()
def export(
    what: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run folder; an adapter file; for editinfinity also a picture."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="For lora: rank, steps, lr, batch_size. Of the recipe: backbone.weights, ...",
        ),
    ] = None,
    *,
    to: Annotated[str, typer.Option(help="diffusers, comfyui, pairedit, editinfinity, or lora.")],
    out: Annotated[Path, typer.Option(help="The file, or a folder for it.")],
) -> None:
    """Write an adapter for other programs.

    The file is read back by stock diffusers and compared. An adapter with experts is made a plain LoRA by --to lora,
    which says what is lost. pairedit and editinfinity are the files of these methods' own scripts; of a picture
    editinfinity writes what they train on (config.source_prompt="...").
    """
    from . import export as exporting

    try:
        done = exporting.export(what, to, out, overrides or ())
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped; nothing was written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    for name, value in done.lines:
        print(f"{name:<12}{value}")
    print(done.file)


@app.command()
def world(
    task: Annotated[str, typer.Option(help="Which edit; several with commas are drawn in turn.")],
    count: Annotated[int, typer.Option(help="Pairs to draw.", min=1)],
    out: Annotated[Path, typer.Option(help="Folder for source/, target/, prompts/ and scenes.jsonl.")],
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Another seed draws other pairs.", min=0)] = 0,
    size: Annotated[int, typer.Option(help="Width and height in pixels.", min=16)] = 128,
) -> None:
    """Draw a data set of known truth."""
    from . import progress
    from .pocket import dataset

    with progress.bar("drawing") as advance:
        dataset.write(
            task,
            count,
            split=split,
            seed=seed,
            size=size,
            out=out,
            progress=lambda done: advance(done, count),
        )
    print(out)


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help="magicbrush, omniedit or icedit (both).")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Fetch a public data set.

    First says from where, how much, under which licence, and asks. Only what is missing is fetched.
    """
    from . import download as public

    plan = public.plan(name, out)
    for line in plan.lines():
        print(line)
    if plan.missing() and not yes and not _agreed():
        print("nothing was fetched", file=sys.stderr)
        raise typer.Exit(1)
    public.fetch(plan)
    print(f"data.kind={name} data.root={out}")


def _agreed() -> bool:
    """Ask a person whether to go on."""
    try:
        return input("fetch it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError as error:
        raise UserError("nobody is there to be asked; add --yes to fetch it") from error


@app.command()
def doctor() -> None:
    """Say what this machine offers.

    Versions, devices, memory, missing extras, where weights are looked for, tokens present or not.
    """
    from . import doctor as examination

    findings = examination.examine()
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            print(topic)
        print(f"  {'' if finding.ok else '! '}{finding.name}: {finding.value}")
    if examination.negative(findings):
        raise typer.Exit(1)
