"""Teach a picture model an edit from before/after pairs, and apply it to new pictures.

``pentimento.load(run).edit(image, instruction="...")`` edits; ``pentimento.train(recipe, out)`` trains.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe import load as load_recipe
    from .run import Editor, load
    from .run import train_run as train

__version__ = "0.1.0"
__all__ = ["Editor", "__version__", "load", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import pentimento`` does not load torch."""
    if name == "load_recipe":
        from .recipe import load as load_recipe

        return load_recipe
    if name in ("Editor", "load", "train"):
        from . import run

        return run.train_run if name == "train" else run.load if name == "load" else run.Editor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
