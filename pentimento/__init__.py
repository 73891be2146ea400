"""Teach a picture model an edit from before/after pairs, and apply it to new pictures.

``train_run(load_recipe("influxedit-edit", ["data.root=pairs"]), "runs/mine")`` trains, and
``load("runs/mine").edit("cat.jpg", instruction="...")`` edits.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .learning import learn
    from .recipe import load as load_recipe
    from .run import Editor, load, train_run
    from .scaling import Search

__version__ = "0.3.0"
__all__ = ["Editor", "Search", "__version__", "learn", "load", "load_recipe", "train_run"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import pentimento`` does not load torch."""
    if name == "load_recipe":
        from .recipe import load

        return load
    if name == "learn":
        from .learning import learn

        return learn
    if name in ("Editor", "load", "train_run"):
        from . import run

        return {"Editor": run.Editor, "load": run.load, "train_run": run.train_run}[name]
    if name == "Search":
        from .scaling import Search

        return Search
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
