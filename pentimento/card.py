"""The README of a run folder: a model card that says what was trained, on what, under which licence, and how to use it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .method import Method
from .recipe import Recipe

EDIT = 'pentimento edit RUN picture.png --instruction "..."'
SLIDER = 'pentimento edit RUN --prompt "..." --scale 0,0.5,1'


def write(recipe: Recipe, method: Method) -> str:
    """The README's text; no time, host or path of the machine is in it."""
    base = method.base()
    stages = "\n".join(
        f"| {name} | {', '.join(s.train)} | {s.steps} | {s.batch_size} x {s.accumulate} | {s.optimizer}, lr {s.peak:g},"
        f" {s.schedule} |"
        for name, s in recipe.stages.items()
    )
    settings = "\n".join(f"| {key} | {_cell(value)} |" for key, value in method.metadata().items())
    given = 'instruction="...", scale=0.5' if method.generates else '"picture.png", instruction="..."'
    return f"""\
{_front_matter(recipe)}
# {recipe.about or f"An edit with {recipe.method}"}

An adapter for picture editing, trained with pentimento {__version__} by the method `{recipe.method}`.

**Base model and licence.** {_named(base)}, weights `{base.get("weights", "")}`{_packed(base)}.
{recipe.backbone.about().licence}

## Use

```
{SLIDER if method.generates else EDIT}
```

or in Python

```python
import pentimento

result = pentimento.load("RUN").edit({given})
```

with this folder as `RUN`. {_elsewhere(method)} {method.usage()}

## Training

| stage | trains | steps | batch | optimizer |
|---|---|---|---|---|
{stages}

Data: `{Path(recipe.data.root).name}`, seed {recipe.seed}. The whole recipe is in `recipe.yaml`; `samples/` and `metrics.jsonl` show how it went.

| setting | value |
|---|---|
{settings}
"""


def _front_matter(recipe: Recipe) -> str:
    """What model hubs read."""
    tags = "tags: [image-to-image, image-editing, lora, pentimento]"
    return "\n".join(["---", tags, *recipe.backbone.about().front, "---"])


def _elsewhere(method: Method) -> str:
    """Which other programs load the weights."""
    specs = method.adapters.specs
    spec = specs.get(method.main) or next(iter(specs.values()))
    return spec.elsewhere.format(folder="RUN/weights" + (f"/{method.main}" if len(specs) > 1 else ""))


def _named(base: Mapping[str, Any]) -> str:
    return " ".join(str(base[key]) for key in ("family", "variant") if key in base)


def _packed(base: Mapping[str, Any]) -> str:
    file = base.get("transformer_file")
    return f" with the transformer of `{file}`" if file else ""


def _cell(value: object) -> str:
    return f"`{value}`".replace("|", "\\|").replace("\n", " ")
