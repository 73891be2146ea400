"""``export --to editinfinity``: a case folder for EditInfinity's own scripts, of what was trained here, or of a picture to train on.

Both may go into one folder, which then holds all that their scripts for inference ask for, but the prompts of the edit.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import adapter_files, editing, files, images, lookup, runfolder, schema, stored
from . import recipe as recipe_
from .errors import UserError
from .export import Exported, Lines, writing
from .infinity import authored, loading, pyramids
from .infinity.backbone import Codes, quantize
from .infinity.config import InfinityConfig
from .infinity.quantizer import Quantizer
from .infinity.scales import Schedule, nearest_ratio
from .inspection import WEIGHTS_NAME
from .methods.editinfinity import LORA, PROMPT
from .pretrained import choose_device
from .schema import Origin

PICTURE, CAPTION, SPLITS = "image/original_image.jpg", "prompt/original_image_prompt.txt", "splits"
SQUARE = (64, 64)
"""The only last grid that their blending knows."""
METHOD = "editinfinity"


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Settings of the export of a picture."""

    entries: int = 1000
    """Lines of the JSONL file, all equal: their loader goes through it once."""

    def __post_init__(self) -> None:
        if self.entries < 1:
            raise ValueError(f"entries must be at least 1, but it is {self.entries}")


def export(what: Path, out: Path, overrides: Sequence[str] = ()) -> Exported:
    """Write a case, or the part of it that ``what`` gives.

    Args:
        what: a run folder of editinfinity, for the learnt rows and the LoRA; or a picture file, for what their training and their
            blending read: the picture, its caption, the JSONL file and the codes of every scale.
        overrides: for a picture, changes of the recipe ``editinfinity`` (config.source_prompt and backbone.weights) and fields
            of ``Entries``.

    Raises:
        UserError: nothing there, something that their scripts cannot take, files in the way, or no caption.
    """
    editing.check_folder(out)
    if (what / runfolder.RECIPE).is_file():
        lines = _weights(what, out)
    elif what.suffix.lower() in images.READABLE:
        lines = _picture(what, out, overrides)
    else:
        raise UserError(
            f"{what}: --to editinfinity takes a run folder of editinfinity, or a picture ({', '.join(sorted(images.READABLE))})"
        )
    return Exported(file=out, lines=[("from", str(what)), *lines])


def _weights(run: Path, out: Path) -> Lines:
    recipe = recipe_.load(run)
    if recipe.method != METHOD:
        raise UserError(f"{run} is of {recipe.method}; --to editinfinity takes runs of editinfinity only")
    folder = lookup.final_weights(run)
    file = folder / WEIGHTS_NAME
    record = adapter_files.read_record(file)
    iterations = {name: stage.steps for stage in recipe.stages.values() for name in stage.train}
    factors, lines = _factors(file, recipe.config.lora.scaled, recipe.config.lora.rank)
    lora = _free(out, authored.file_name(authored.LORA, iterations.get(LORA, 50)))
    places = {lora: stored.pickled(factors)}
    if recipe.config.rows:
        if recipe.config.rows != authored.COUNT:
            raise UserError(
                f"{run}: has {recipe.config.rows} learnt rows, but EditInfinity's scripts take {authored.COUNT}"
            )
        rows = adapter_files.read_tensors(folder / adapter_files.TENSORS_NAME)[PROMPT]
        path = _free(out, authored.file_name(authored.ROWS, iterations.get(PROMPT, 10)))
        places[path] = authored.rows_bytes(rows)
    for path, data in places.items():
        with writing(path):
            files.write(path, data)
    found = stored.read_tensors(lora)
    if found.keys() != factors.keys() or not all(torch.equal(found[key], factors[key]) for key in found):
        raise UserError(f"{lora}: holds other factors than the run; do not use it")
    lines += [("file", str(path)) for path in places]
    if record.get("backbone", {}).get("attention_bias", True):
        lines.append(
            (
                "biases",
                "trained with the base model's attention biases, which their code leaves out, so that results differ there; for"
                " the same ones train with backbone.attention_bias=false",
            )
        )
    return [*lines, ("proof", f"read back without running code: {len(factors)} factors, all equal")]


def _factors(file: Path, alpha: float, rank: int) -> tuple[dict[str, Tensor], Lines]:
    """The LoRA under their names, B scaled so that their alpha is right."""
    own = {
        key.removeprefix(adapter_files.PREFIX).removesuffix(".weight"): value.float()
        for key, value in stored.read_tensors(file).items()
    }
    if unknown := [key for key in own if not stored.EDITINFINITY.fullmatch(key)]:
        raise UserError(
            f"{file}: EditInfinity's scripts have a LoRA on feed-forward layers only, but this one has {unknown[0]}"
        )
    scale = alpha / authored.ALPHA
    factors = {key: value * scale if key.endswith("lora_B") else value for key, value in own.items()}
    lines: Lines = []
    if scale != 1:
        lines.append(("alpha", f"{alpha:g} is in B now: right with lora_alpha={authored.ALPHA:g} there"))
    if rank != 4:
        lines.append(("rank", f"{rank}; set lora_r={rank} in their scripts, which have 4"))
    return factors, lines


def _picture(what: Path, out: Path, overrides: Sequence[str]) -> Lines:
    own = set(schema.hints(Entries))
    mine = [text for text in overrides if text.partition("=")[0].strip() in own]
    given: dict[str, Any] = {}
    for text in mine:
        given[text.partition("=")[0].strip()] = schema.parse_value(text.partition("=")[2])
    entries = schema.parse(Entries, given, Origin(name="export")).entries
    recipe = recipe_.load(METHOD, [text for text in overrides if text not in mine])
    caption = recipe.config.source_prompt.strip()
    if not caption:
        raise UserError('say what the picture shows: config.source_prompt="..."')
    assert isinstance(recipe.backbone, InfinityConfig)
    weights = loading.locate(recipe.backbone)
    picture = images.open_image(what)
    ratio = nearest_ratio(picture.height, picture.width)
    schedule = Schedule.of(ratio, recipe.config.size or weights.settings.size)
    split = f"{SPLITS}/{ratio:.3f}_{entries:09d}.jsonl"
    paths = {name: _free(out, name) for name in (PICTURE, CAPTION, split)}
    if pyramids.found(out):
        raise UserError(f"--out: {pyramids.found(out)[0]} is there already; choose another place")
    images.save_image(picture, paths[PICTURE])
    codes = encoded(weights, recipe.backbone.device, paths[PICTURE], schedule)
    with writing(out / pyramids.FOLDER / "any"):
        pyramids.write(out / pyramids.FOLDER, codes)
    runfolder.write_text(paths[CAPTION], caption + "\n")
    runfolder.write_text(paths[split], entry(paths[PICTURE], ratio, caption) * entries)
    height, width = schedule.pixels
    grids = f"{len(codes.codes)} scales of {width} x {height} pixels, read back: every one is made of bits"
    pyramids.read(out)
    lines = [("picture", str(paths[PICTURE])), ("caption", str(paths[CAPTION])), ("lines", str(paths[split]))]
    lines.append(("codes", f"{out / pyramids.FOLDER}: {grids}"))
    if schedule.grids[-1] != SQUARE:
        lines.append(
            (
                "size",
                "their scripts blend squares of 1024 pixels only; these codes are for this package's reader",
            )
        )
    return lines


def encoded(weights: loading.Weights, device: str, file: Path, schedule: Schedule) -> Codes:
    """Codes of a picture file, squeezed into the size of the schedule, on the CPU; only the visual tokenizer is loaded."""
    height, width = schedule.pixels
    tokenizer = loading.load_tokenizer(weights).to(choose_device(device))
    pixels = images.to_tensor([images.resize(images.open_image(file), (width, height))])
    with torch.no_grad():
        features = tokenizer.encode(pixels.to(choose_device(device), torch.float32)).cpu()
    return quantize(Quantizer(weights.tokenizer_config.width), features, schedule)


def entry(picture: Path, ratio: float, caption: str) -> str:
    """One line of the JSONL file that their loader reads."""
    fields = {
        "image_path": str(picture.absolute()),
        "h_div_w": ratio,
        "long_caption": caption,
        "long_caption_type": "caption-InternVL2.0",
        "text": caption,
        "short_caption_type": "blip2_caption",
    }
    return json.dumps(fields) + "\n"


def _free(out: Path, name: str) -> Path:
    """A file of the case that is to be written."""
    if (out / name).exists():
        raise UserError(f"--out: {out / name} is there already; choose another place")
    return out / name
