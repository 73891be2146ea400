"""Two sliders at once on drawn faces: whether both changes are made, and what each costs the other.

python -m benchmarks.slider_composition --out FOLDER [--tasks smile,add-glasses] [--faces 10] [--steps 500]

The sliders are those of ``benchmarks.slider_photos`` with the same FOLDER, trained where they are not there yet. Faces of the test split
that have room for both changes are drawn without an edit, with each slider and with both, all at the calibrated scale 1.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import pentimento
from pentimento import images, runfolder
from pentimento.pocket import faces
from pentimento.pocket.faces import Face

from .cells import intervals, show, words
from .slider_photos import Slider, folder_of, slider
from .sliders import MOST


def pictures(
    sliders: Sequence[Slider], chosen: Sequence[Face], args: argparse.Namespace
) -> dict[str, list[Image.Image]]:
    """Each face without an edit, with each of two sliders, and with both."""
    first, second = sliders
    asked = [(face.prompt, face.seed) for face in chosen]

    def run_of(one: Slider) -> Path:
        return folder_of(one.task, args) / "run"

    def drawn(editor: pentimento.Editor, scale: float) -> list[Image.Image]:
        probe = editor.method.probe()
        return probe.pictures(probe.draw(asked, [scale])[scale])

    both = pentimento.load(run_of(first), also=[(run_of(second), 1.0)])
    return {
        "no edit": drawn(first.editor, 0.0),
        first.task: drawn(first.editor, first.editor.unit),
        second.task: drawn(second.editor, second.editor.unit),
        "both": drawn(both, both.unit),
    }


def read(picture: Image.Image, face: Face, sliders: Sequence[Slider]) -> dict[str, float]:
    """What of both changes is seen, and how much else moved."""
    wanted = {name: value for one in sliders for name, value in one.change.wanted.items()}
    looks = [faces.look(picture, face, dataclasses.replace(one.change, wanted=wanted)) for one in sliders]
    made = {one.task: look.response for one, look in zip(sliders, looks, strict=True)}
    return made | {"others kept": looks[0].kept, "interference": looks[0].interference}


def main() -> None:
    parser = argparse.ArgumentParser(description="Two sliders at once.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=["smile", "add-glasses"], type=words)
    parser.add_argument("--faces", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500, help="of a slider's training")
    parser.add_argument("--calibration-faces", type=int, default=6)
    args = parser.parse_args()
    args.overrides = args.editing = []
    if len(args.tasks) != 2:
        parser.error("--tasks: name two, with a comma")
    torch.set_num_threads(1)
    sliders = [slider(task, args) for task in args.tasks]
    probe = sliders[0].editor.method.probe()
    asked, changes = faces.prompts(args.tasks[0], "test"), [one.change for one in sliders]
    chosen = faces.find(probe, asked, changes, args.faces, MOST * args.faces)
    made = pictures(sliders, chosen, args)
    gathered = {}
    for name, drawn in made.items():
        looks = [read(picture, face, sliders) for picture, face in zip(drawn, chosen, strict=True)]
        columns = {column: [look[column] for look in looks] for column in looks[0]}
        gathered[name, f"drawn with, {len(chosen)} faces"] = columns
    report = intervals(gathered)
    out = args.out / "composition"
    sheet = images.sheet(list(zip(*made.values(), strict=True)), titles=list(made), cell=128)
    images.save_image(sheet, out / "faces.png")
    runfolder.write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
