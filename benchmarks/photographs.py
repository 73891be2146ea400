"""An edit of real photographs: pairs made from any folder of pictures, learnt from some and measured on the others.

python -m benchmarks.photographs FOLDER --out OUT [--held-out 10] [--steps 600] [key=value ...]

The edit is tonal: a warm duotone, dark blue in the shadows and cream in the lights, with a little more contrast. It is
an exact function of the picture, so a held-out target is known, and no text or mask helps to find it. Beside the adapter
stand its untrained base, doing nothing (a gain of 0 by definition) and the autoencoder alone.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

import pentimento
from pentimento import images, metrics, recipe, run
from pentimento.flux.backbone import Flux
from pentimento.flux.config import FluxConfig
from pentimento.method import Method
from pentimento.pocket import score

SHADOW, LIGHT = np.array([20.0, 24.0, 72.0]), np.array([255.0, 240.0, 205.0])
INSTRUCTION = "turn it into a blue and cream print"


def duotone(picture: Image.Image) -> Image.Image:
    """The edit that is to be learnt."""
    luma = np.asarray(picture.convert("L"), dtype=np.float64) / 255
    curve = luma * luma * (3 - 2 * luma)
    out = SHADOW + (LIGHT - SHADOW) * (0.5 * luma + 0.5 * curve)[..., None]
    return Image.fromarray(out.round().astype(np.uint8))


def write_pairs(files: list[Path], out: Path, long_edge: int = 256) -> None:
    for file in files:
        picture = images.open_image(file)
        picture.thumbnail((long_edge, long_edge), Image.Resampling.LANCZOS)
        images.save_image(picture, out / "source" / f"{file.stem}.png")
        images.save_image(duotone(picture), out / "target" / f"{file.stem}.png")


def settings_of(args: argparse.Namespace, overrides: list[str]) -> recipe.Recipe:
    """The training of the edit."""
    return recipe.load(
        "influxedit-edit",
        [
            f"data.root={args.out / 'pairs'}",
            f"data.prompt={INSTRUCTION}",
            "data.held_out=0",
            "watch.every=0",
            f"stages.edit.steps={args.steps}",
            f"stages.edit.save_every={args.steps}",
            *overrides,
        ],
    )


def round_trip(method: Method, flux: Flux) -> score.Editor:
    """The editor that only encodes and decodes, at the size at which the method edits."""
    autoencoder = score.round_trip(flux)

    def editor(source: Image.Image, instruction: str) -> Image.Image:
        seen = images.resize(source, method.size(*source.size))
        return images.resize_result(autoencoder(seen, instruction), source.size)

    return editor


def measure(
    pairs: list[tuple[Image.Image, Image.Image]], editors: Mapping[str, score.Editor]
) -> tuple[dict[str, list[float]], dict[str, list[Image.Image]]]:
    """Each editor's edit gain on every pair of source and target, and its pictures."""
    made = {name: [editor(source, INSTRUCTION) for source, _ in pairs] for name, editor in editors.items()}
    gains = {
        name: [
            float(metrics.edit_gain(source, result, target))
            for (source, target), result in zip(pairs, results, strict=True)
        ]
        for name, results in made.items()
    }
    return gains, made


def main() -> None:
    parser = argparse.ArgumentParser(description="A tonal edit of real photographs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=10)
    parser.add_argument("--steps", type=int, default=600)
    args, overrides = parser.parse_known_args()
    files = [p for p in args.folder.rglob("*") if p.suffix.lower() in images.READABLE]
    files = sorted(files, key=lambda p: hashlib.sha256(p.stem.encode()).hexdigest())
    held, learnt = files[: args.held_out], files[args.held_out :]
    write_pairs(learnt, args.out / "pairs")
    write_pairs(held, args.out / "held-out")
    settings = settings_of(args, overrides)
    assert isinstance(settings.backbone, FluxConfig)
    editor = run.load(run.train_run(settings, args.out / "run"))
    sides = (
        [images.open_image(args.out / "held-out" / side / f"{file.stem}.png") for file in held]
        for side in ("source", "target")
    )
    pairs = list(zip(*sides, strict=True))
    gains, made = measure(
        pairs,
        {
            "edit_gain": lambda image, words: editor.edit(image, instruction=words),
            "untrained_base": lambda image, words: editor.edit(image, instruction=words, scale=0.0),
            "nothing_done": lambda image, words: image,
            "encode_and_decode": round_trip(editor.method, Flux.load(settings.backbone, "fill")),
        },
    )
    labels = [f"{file.stem}: gain {gain:.2f}" for file, gain in zip(held, gains["edit_gain"], strict=True)]
    rows = [
        [source, result, target] for (source, target), result in zip(pairs, made["edit_gain"], strict=True)
    ]
    images.save_image(
        images.sheet(rows, titles=["photograph", "edited", "truth"], labels=labels, cell=192),
        args.out / "sheet.png",
    )
    result = {
        "pentimento": pentimento.__version__,
        "pairs": len(learnt),
        "held_out": len(held),
        "steps": args.steps,
        **{name: metrics.interval(values) for name, values in gains.items()},
        "each": dict(zip([f.stem for f in held], gains["edit_gain"], strict=True)),
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
