"""``make demo``: learn one edit from drawn pairs, apply it to pictures never seen, and read the results exactly."""

import itertools
import os
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import images
from ..errors import UserError

TASK = "add-glasses"
PAIRS, STEPS, CASES = 48, 700, 16
QUICK = ("optimizer=adamw", "lr=0.002", "schedule=cosine", "warmup=20", "batch_size=4", "accumulate=1")
"""Instead of the recipe's Prodigy, which takes its time to find a step size."""
BAR = 0.8
MARKER = ".pentimento-demo"
"""File by which the demo knows a folder of its own."""


def main(out: Path = Path("demo")) -> int:
    """Returns the exit code: 0, or 1 when fewer than 80 % of the edits succeed."""
    # Importing transformers without torchvision prints warnings about picture processors that nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from .. import recipe, run
    from ..flux.backbone import Flux
    from ..flux.config import FluxConfig
    from . import dataset, score
    from .tasks import cases

    console, began = Console(), time.monotonic()
    _clear(out)
    console.print(f"Drawing {PAIRS} pairs of the edit [b]{TASK}[/b] ...")
    dataset.write(TASK, PAIRS + 4, out=out / "pairs")
    settings = recipe.load(
        "influxedit-edit",
        [
            f"data.root={out / 'pairs'}",
            f"stages.edit.steps={STEPS}",
            f"stages.edit.save_every={STEPS}",
            f"watch.every={STEPS}",
            "config.sampling_guidance=1",  # as in training: the background stays closer than at the published 30
            "data.caption_dropout=0.25",  # there is but one edit: wording that was never seen shall ask for it too
            *(f"stages.edit.{change}" for change in QUICK),
        ],
    )
    folder = run.train_run(settings, out / "run")
    trained = time.monotonic()
    chosen = list(itertools.islice(cases(TASK, "test"), CASES))
    editor = run.load(folder)
    console.print(f"Editing {CASES} pictures that training never saw, and reading each result ...")
    result = score.run(lambda picture, words: editor.edit(picture, instruction=words), chosen)
    flux = Flux.load(FluxConfig(), "fill")
    ceiling = score.run(score.round_trip(flux), chosen)
    rows = score.table({"trained": result, "encode and decode only": ceiling})
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    sheet = score.wide_sheet(chosen, result.pictures, [not ok for ok in result.success])
    path = images.save_image(sheet, out / "sheet.png")
    background = sum(result.background) / len(result.background)
    console.print(f"trained in {trained - began:.0f} s, {time.monotonic() - began:.0f} s in all")
    console.print(
        f"success {result.rate:.0%} (at least {BAR:.0%} wanted), background PSNR {background:.1f} dB"
    )
    console.print(str(path), soft_wrap=True)
    return 0 if result.rate >= BAR else 1


def _clear(out: Path) -> None:
    """Make the folder anew; one that no demo has made is nobody's to delete.

    Raises:
        UserError: a folder or file of that name that is not a demo's.
    """
    if out.exists() or out.is_symlink():
        if not (out / MARKER).is_file() or out.is_symlink():
            raise UserError(
                f"{out.absolute()}: is there already, and not from a demo; move it away or rename it"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).write_text("Made by the demo, which deletes this folder when it runs again.\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"pentimento: error: {error}", file=sys.stderr)
        sys.exit(2)
