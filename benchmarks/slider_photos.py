"""Sliders on pictures that are given: drawn faces, of which all is known, and photographs.

python -m benchmarks.slider_photos --out FOLDER [--tasks smile,add-glasses] [--faces 10] [--photographs FOLDER] [--steps 500]
  [--scales 0.5,1,1.5] [--name NAME] [--captions] [--prompt TEXT] [--workers 1]
  [config.KEY=VALUE backbone.KEY=VALUE inversion.KEY=VALUE ...]

Each slider is trained from three pairs of the train split and calibrated, as in ``benchmarks.sliders``. The faces are of the test
split; each is learnt by heart by the recipe ``inversion``, drawn again, and edited at calibrated scales. Every attribute is read off the
results exactly, against the true scene. ``config.`` settings are of the edit, ``inversion.`` ones of the learning; what was
trained is kept, so that another ``--name`` with other settings only draws. Photographs have no truth: how well they are
drawn again is measured, and a sheet shows the rest.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

import pentimento
from pentimento import images, metrics, photos, runfolder
from pentimento.editing import scale_values
from pentimento.pocket import readout, score
from pentimento.pocket.faces import Change
from pentimento.pocket.tasks import Case, cases
from pentimento.run import Editor

from .cells import Gathered, intervals, pool, show, words
from .sliders import Cell, calibrated, change_of, learn

HAPPENED = 0.5
"""Of a shown change: from here on it counts as made."""
SIDE = 128


@dataclass(frozen=True, kw_only=True)
class Slider:
    """A trained slider, and what it was shown."""

    task: str
    editor: Editor
    change: Change


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One picture that is edited."""

    name: str
    picture: Image.Image
    prompt: str | None
    inversion: Path


def folder_of(task: str, args: argparse.Namespace) -> Path:
    """Where a slider is trained: its pairs, and its run."""
    out: Path = args.out
    return out / "sliders" / task


def slider(task: str, args: argparse.Namespace) -> Slider:
    """Train and calibrate a slider, unless that was done."""
    cell = Cell(method="pairedit", task=task, pairs=3, draw=0)
    learn(cell, folder_of(task, args), args)
    editor = calibrated(folder_of(task, args), args, args.editing)
    return Slider(task=task, editor=editor, change=change_of(cell.exemplars()))


def drawn_faces(sliders: Sequence[Slider], count: int) -> list[Case]:
    """Faces of the test split that can show every change."""
    fitting = (
        case for case in cases("smile", "test", 0) if all(one.change.fits(case.source) for one in sliders)
    )
    return [case for case, _ in zip(fitting, range(count), strict=False)]


def learnt(
    named: Sequence[tuple[str, Image.Image, str]], editor: Editor, args: argparse.Namespace
) -> list[Subject]:
    """Pictures, each with its caption, learnt by heart: several at a time with ``--workers``."""
    pictures = [picture for _, picture, _ in named]
    with pool(args.workers) as workers:
        places = workers.map(
            photos.learnt, pictures, itertools.repeat(editor.setup), itertools.repeat(args.inversion)
        )
        found: list[Subject] = []
        for (name, picture, caption), place in zip(named, places, strict=True):
            print(f"{len(found) + 1} of {len(named)} learnt: {name}", flush=True)
            prompt = caption if args.captions else args.prompt
            found.append(Subject(name=name, picture=picture, prompt=prompt, inversion=place))
    return found


def drawn(subject: Subject, one: Slider, scale: float) -> Image.Image:
    """A picture at a calibrated scale."""
    return one.editor.edit(
        subject.picture, instruction=subject.prompt, inversion=subject.inversion, scale=scale
    )


def read(case: Case, one: Slider, picture: Image.Image) -> dict[str, float]:
    """What a picture of a face shows, compared with the truth."""
    change, source = one.change, case.source
    found = readout.judge(images.to_unit([picture])[0], source, source | change.wanted, change.wanted)
    reached = change.response(float(source[change.attribute]), float(found.scene[change.attribute]))
    return {
        "happened": float(reached >= HAPPENED),
        "reached": reached,
        "kept": found.kept,
        "explained": found.explained,
        "background": found.background,
    }


def similarity(picture: Image.Image, again: Image.Image) -> float:
    """PSNR in dB."""
    return float(metrics.psnr(picture, again))


def round_trip(editor: Editor) -> Callable[[Image.Image], Image.Image]:
    """Encoding and decoding, the most that can be drawn again."""
    autoencoder = score.round_trip(editor.method.flux)  # type: ignore[attr-defined]  # sliders are of FLUX
    return lambda picture: autoencoder(picture, "")


def measure(
    subjects: Sequence[Subject], sliders: Sequence[Slider], known: Sequence[Case], args: argparse.Namespace
) -> dict[str, Any]:
    """All sliders on all pictures; ``known`` holds the truth of each, or nothing. Writes a sheet."""
    codec = round_trip(sliders[0].editor)
    psnr: dict[str, list[float]] = {"drawn again": [], "encode and decode": []}
    looks: dict[str, list[dict[str, float]]] = {}
    rows: list[list[Image.Image]] = []
    for number, subject in enumerate(subjects):
        again = drawn(subject, sliders[0], 0.0)
        rows.append([subject.picture, again])
        psnr["drawn again"].append(similarity(subject.picture, again))
        psnr["encode and decode"].append(similarity(subject.picture, codec(subject.picture)))
        for one in sliders:
            made = {0.0: again} | {scale: drawn(subject, one, scale) for scale in args.scales}
            rows[-1] += [made[scale] for scale in args.scales]
            for scale, picture in made.items() if known else ():
                looks.setdefault(f"{one.task}, scale {scale:g}", []).append(read(known[number], one, picture))
    titles = ["picture", "scale 0", *(f"{one.task} {scale:g}" for one in sliders for scale in args.scales)]
    kind = "faces" if known else "photographs"
    file = args.out / args.name / f"{kind}.png"
    images.save_image(images.sheet(rows, titles=titles, cell=SIDE), file)
    return {"psnr": psnr, "looks": looks, "names": [subject.name for subject in subjects]}


def photographs(folder: Path) -> list[tuple[str, Image.Image, str]]:
    """The pictures of a folder, their middle squares at the model's size; a file's name is its caption."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in images.READABLE)
    return [
        (file.stem, ImageOps.fit(images.open_image(file), (SIDE, SIDE), Image.Resampling.LANCZOS), file.stem)
        for file in files
    ]


def table(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means with intervals: of how well pictures are drawn, and where they are faces, of what sliders do to them."""
    gathered: Gathered = {}
    for kind, found in measured.items():
        for name, values in found["psnr"].items():
            gathered[name, f"{kind}, how they are drawn"] = {"PSNR in dB": values}
        for row, looks in found["looks"].items():
            gathered[row, kind] = {column: [look[column] for look in looks] for column in looks[0]}
    return intervals(gathered)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Sliders on faces and photographs that are given.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=["smile", "add-glasses"], type=words)
    parser.add_argument("--faces", type=int, default=10)
    parser.add_argument("--photographs", type=Path, help="a folder of pictures")
    parser.add_argument("--steps", type=int, default=500, help="of a slider's training")
    parser.add_argument("--calibration-faces", type=int, default=6)
    parser.add_argument("--scales", default="0.5,1,1.5", help="calibrated ones", type=scale_values)
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that learn pictures, each of one thread"
    )
    parser.add_argument("--name", default="as-published", help="of the folder with the results")
    parser.add_argument("--prompt", help="for all pictures; default: the slider's own")
    parser.add_argument("--captions", action="store_true", help="each face's caption as its prompt")
    args, overrides = parser.parse_known_args()
    args.overrides = [o for o in overrides if o.startswith("backbone.")]
    args.inversion = [o.removeprefix("inversion.") for o in overrides if o.startswith("inversion.")]
    args.editing = [o for o in overrides if not o.startswith("inversion.")]
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    sliders = [slider(task, args) for task in args.tasks]
    measured: dict[str, Any] = {}
    if args.faces:
        chosen = drawn_faces(sliders, args.faces)
        pictures = score.pictures(chosen, "source", SIDE)
        named = [
            (case.key, picture, case.source_prompt) for case, picture in zip(chosen, pictures, strict=True)
        ]
        subjects = learnt(named, sliders[0].editor, args)
        measured["faces"] = measure(subjects, sliders, chosen, args)
    if args.photographs:
        subjects = learnt(photographs(args.photographs), sliders[0].editor, args)
        measured["photographs"] = measure(subjects, sliders, [], args)
    result = {
        "pentimento": pentimento.__version__, "editing": args.editing, "inversion": args.inversion, "captions": args.captions,
        "prompt": args.prompt, "units": {one.task: one.editor.unit for one in sliders}, "measured": measured,
    }  # fmt: skip
    runfolder.write_text(args.out / args.name / "result.json", json.dumps(result, indent=1) + "\n")
    show(table(measured))
    if args.photographs:
        found = measured["photographs"]
        for name, value in zip(found["names"], found["psnr"]["drawn again"], strict=True):
            print(f"{name}: drawn again with {value:.1f} dB")


if __name__ == "__main__":
    main()
