"""Weights & Biases: the numbers and sample sheets of a run, sent to a project while they are written to the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import files
from .errors import UserError, first_line
from .train import Report

RUN_ID = "wandb-run-id.txt"
"""The run's name on the other side, by which a resumed training goes on with it."""
LOCAL = ("offline", "dryrun", "disabled")
"""Modes in which nothing is sent."""
INSTEAD = "or set the variable WANDB_MODE=offline, which keeps all on this machine until `wandb sync`"


def check() -> None:
    """Find out before any model is loaded whether a run can be reported; nobody is asked for a key.

    Raises:
        UserError: the extra is missing, nobody is logged in, the server does not answer or refuses the key, or a variable
            WANDB_... holds what it cannot.
    """
    wandb = _imported()
    try:
        mode = wandb.setup().settings.mode
    except ValueError as error:
        raise UserError(
            f"watch.wandb: a setting of W&B is not valid: {' '.join(str(error).split())}"
        ) from error
    if mode in LOCAL:
        return
    try:
        ready = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        raise UserError(
            f"watch.wandb: {first_line(error)}; check the connection, run `wandb login` again, {INSTEAD}"
        ) from error
    if not ready:
        raise UserError(f"watch.wandb: not logged in to Weights & Biases; run `wandb login`, {INSTEAD}")


def _imported() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("watch.wandb needs the extra wandb: pip install 'pentimento[wandb]'") from error
    return wandb


class Board:
    """One run of a project, named as the run folder.

    Steps are counted by stage, as everywhere here. What is done twice after a crash is reported twice, at equal steps.
    """

    def __init__(self, project: str, out: Path, config: Mapping[str, Any]):
        """``config`` is shown beside the run. Raises ``UserError`` where the run cannot be begun or its id not kept."""
        wandb = _imported()
        place = out / RUN_ID
        try:
            known = place.read_text(encoding="utf-8").strip() if place.exists() else None
            self._run = wandb.init(
                project=project,
                name=out.resolve().name,
                id=known,
                resume="allow",
                dir=str(out),
                config=dict(config),
                settings=wandb.Settings(console="off"),  # else it takes over the terminal, bar and all
            )
            files.write(place, f"{self._run.id}\n".encode())
        except wandb.errors.Error as error:
            raise UserError(
                f"watch.wandb: the run cannot be begun ({first_line(error)}); {INSTEAD[3:]}"
            ) from error
        except OSError as error:
            raise UserError(f"{place}: cannot be written ({error.strerror})") from error
        self._picture = wandb.Image

    def begin(self, report: Report) -> None:
        """A stage starts or continues: its numbers are drawn over its own steps."""
        self._run.define_metric(f"{report.stage}/step")
        self._run.define_metric(f"{report.stage}/*", step_metric=f"{report.stage}/step")

    def add(self, report: Report, values: Mapping[str, float], sheet: Path | None) -> None:
        """Send what is known of a step, and the samples that were drawn."""
        sent: dict[str, Any] = dict(values)
        if sheet is not None:
            sent["samples"] = self._picture(str(sheet))
        if sent:
            self._run.log(
                {f"{report.stage}/{key}": value for key, value in {**sent, "step": report.step}.items()}
            )

    def close(self, *, failed: bool) -> None:
        """Send the rest and end."""
        self._run.finish(exit_code=int(failed))
