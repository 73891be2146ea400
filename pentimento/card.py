"""The README of a run folder: a model card that says what was trained, on what, under which licence, and how to use it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .adapters import ExpertLoRA
from .method import Method
from .recipe import Recipe

FLUX_LICENCE = (
    "The base model's weights are under the FLUX.1 [dev] Non-Commercial License; this adapter is a derivative of them and"
    " under the same licence (https://huggingface.co/{weights}/blob/main/LICENSE.md)."
)
POCKET_LICENCE = "The base model is one of pentimento's pocket models (Apache-2.0); the adapter works with that model only."
EDIT = 'pentimento edit RUN picture.png --instruction "..."'
SLIDER = 'pentimento edit RUN --prompt "..." --scale 0,0.5,1'
STOCK = 'In stock diffusers, `pipe.load_lora_weights("{folder}")` loads it.'
STOCK_EXPERTS = (
    "It has experts, which stock diffusers and ComfyUI do not know;"
    " `pentimento export RUN --to lora --out FILE` makes a plain LoRA of it for them."
)
UNKNOWN_LICENCE = (
    "The base model's licence holds for this adapter too. If the weights are FLUX.1 [dev] or FLUX.1 Fill [dev], that is the"
    " FLUX.1 [dev] Non-Commercial License."
)


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

**Base model and licence.** {base.get("family", "")} {base.get("variant", "")}, weights `{base.get("weights", "")}`{_packed(base)}.
{_licence(recipe.backbone.weights)}

## Use

```
{SLIDER if method.generates else EDIT}
```

or in Python

```python
import pentimento

result = pentimento.load("RUN").edit({given})
```

with this folder as `RUN`. {_stock(method)} {method.usage()}

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
    lines = ["library_name: diffusers", "tags: [image-to-image, image-editing, lora, pentimento]"]
    if recipe.backbone.weights.startswith("black-forest-labs/"):
        lines += [
            f"base_model: {recipe.backbone.weights}",
            "license: other",
            "license_name: flux-1-dev-non-commercial-license",
            f"license_link: https://huggingface.co/{recipe.backbone.weights}/blob/main/LICENSE.md",
        ]
    return "\n".join(["---", *lines, "---"])


def _stock(method: Method) -> str:
    specs = method.adapters.specs
    if any(isinstance(spec, ExpertLoRA) for spec in specs.values()):
        return STOCK_EXPERTS
    return STOCK.format(folder="RUN/weights" + (f"/{method.main}" if len(specs) > 1 else ""))


def _licence(weights: str) -> str:
    if weights == "pocket":
        return POCKET_LICENCE
    return (
        FLUX_LICENCE.format(weights=weights) if weights.startswith("black-forest-labs/") else UNKNOWN_LICENCE
    )


def _packed(base: Mapping[str, Any]) -> str:
    file = base.get("transformer_file")
    return f" with the transformer of `{file}`" if file else ""


def _cell(value: object) -> str:
    return f"`{value}`".replace("|", "\\|").replace("\n", " ")
