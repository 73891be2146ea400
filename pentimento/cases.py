"""Pictures that are learnt by heart and then edited: what is known of each, from the command line, the authors' folders or JSONL.

Whatever can be wrong with a picture, a caption, a word or a mask is found before anything is trained and before weights are read.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import images
from .editing import Asked, White
from .errors import UserError
from .layouts import json_object, lines_of, read_text

PICTURE, MASK = "original_image", "mask.png"
CAPTION, TARGET, WORD = "original_image_prompt.txt", "edit_image_prompt.txt", "target_word.txt"
"""Files of EditInfinity's own layout, in the folders image/ and prompt/; in its masks black may change."""
FIELDS = {
    "name": ("id", "key", "name"),
    "picture": ("image", "picture"),
    "source": ("source_prompt", "source", "caption"),
    "prompts": ("target_prompt", "prompt", "prompts"),
    "word": ("target_word", "word"),
    "mask": ("mask", "mask_path"),
    "mask_white": ("mask_white",),
    "folder": ("case",),
}
"""What a line of a JSONL file may say, under these names."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture and what is known and wanted of it."""

    name: str
    """Of its results."""
    picture: Path
    source: str = ""
    """What the picture shows."""
    prompts: tuple[str, ...] = ()
    """What edits of it show, each in a result of its own."""
    word: str = ""
    """Word of ``source`` for what may change."""
    mask: Path | None = None
    mask_white: White = "change"
    mask_scales: bool = False
    """See ``editing.Asked``."""

    def asked(self) -> Asked:
        """What is to be made of it."""
        how: dict[str, Any] = {
            key: getattr(self, key) for key in ("name", "mask", "mask_white", "mask_scales")
        }
        how["caption"] = self.source
        return Asked(source=self.picture, instructions=self.prompts, each=True, **how)

    def only(self, region: str) -> "Case":
        """Without what an edit of this ``config.region`` does not use: a case may know more than that."""
        return replace(
            self, mask=self.mask if region == "mask" else None, word=self.word if region == "word" else ""
        )


def from_folder(folder: Path) -> Case:
    """A case in the authors' layout.

    Raises:
        UserError: no folder, no picture or several, texts that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"--case {folder}: there is no such folder")
    found = sorted(p for p in (folder / "image").glob(f"{PICTURE}.*") if p.suffix.lower() in images.READABLE)
    if len(found) != 1:
        what = (
            f"holds {', '.join(p.name for p in found)}"
            if found
            else f"has no image/{PICTURE}.jpg (or .png ...)"
        )
        raise UserError(f"--case {folder}: {what}; one picture is edited at a time")
    caption, target, word = (_text_of(folder / "prompt" / name) for name in (CAPTION, TARGET, WORD))
    mask = folder / "image" / MASK
    return Case(
        name=folder.resolve().name,
        picture=found[0],
        source=caption,
        prompts=(target,) if target else (),
        word=word,
        mask=mask if mask.is_file() else None,
        mask_white="keep",
        # Masks that the authors' scripts make are drawn pictures of 616 x 616.
        mask_scales=True,
    )


def _text_of(path: Path) -> str:
    """A text on one line; "" where there is no such file."""
    return " ".join(read_text(path).split()) if path.is_file() else ""


def from_lines(file: Path) -> Iterator[tuple[str, Case | UserError]]:
    """The cases of a JSONL file by their names, or what is wrong with a line; paths are relative to the file.

    Raises:
        UserError: the file cannot be read, holds nothing, or two cases of one name.
    """
    found: list[tuple[str, Case | UserError]] = []
    for number, line in lines_of(file):
        try:
            case = _case_of(line, file.parent)
            found.append((case.name, case))
        except UserError as error:
            found.append((f"line {number}", error))
    if not found:
        raise UserError(
            f'{file}: holds no cases; expected lines like {{"id": "cat", "image": "cat.jpg", "source_prompt": "a cat",'
            ' "target_prompt": "a dog"}'
        )
    twice = sorted(name for name, count in Counter(name for name, _ in found).items() if count > 1)
    if twice:
        raise UserError(f"{file}: several cases are called {twice[0]!r}; give each an id of its own")
    yield from found


def _case_of(line: str, folder: Path) -> Case:
    values = json_object(line)
    said = {what: _one_of(values, names) for what, names in FIELDS.items()}
    _check_misspelt(values)
    white = said["mask_white"] or "change"
    if white not in ("change", "keep"):
        raise UserError(f"mask_white should be change or keep, not {white!r}")
    texts = {
        what: _one_text(said[what], FIELDS[what][0])
        for what in ("name", "picture", "source", "word", "mask", "folder")
    }
    start = from_folder(folder / texts["folder"]) if texts["folder"] else None
    if start is None and not texts["picture"]:
        raise UserError("names no image (and no case, a folder in EditInfinity's layout)")
    picture = folder / texts["picture"] if texts["picture"] else start.picture if start else Path()
    case = start or Case(name=picture.stem, picture=picture)
    prompts = said["prompts"]
    changes: dict[str, Any] = {
        "name": re.sub(r"[^\w.-]+", "_", texts["name"]),
        "picture": picture,
        "source": texts["source"],
        "word": texts["word"],
        "prompts": tuple(
            _one_text(each, "target_prompt")
            for each in (prompts if isinstance(prompts, list) else [prompts])
            if each
        ),
    }
    if texts["mask"]:
        changes |= {"mask": folder / texts["mask"], "mask_white": white, "mask_scales": False}
    return replace(case, **{key: value for key, value in changes.items() if value})


def _one_of(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    given = [name for name in names if values.get(name) is not None]
    if len(given) > 1:
        raise UserError(f"the fields {' and '.join(given)} mean the same; leave one")
    return values[given[0]] if given else None


def _one_text(value: Any, name: str) -> str:
    if value is None or isinstance(value, str):
        return " ".join((value or "").split()) if name not in ("image", "mask", "case") else value or ""
    if name == "id" and isinstance(value, int):
        return str(value)
    raise UserError(f"the field {name} must be one text, not {json.dumps(value)[:40]}")


def _check_misspelt(values: Mapping[str, Any]) -> None:
    """Further fields are passed over, but a misspelt one would be lost without a word."""
    known = [name for names in FIELDS.values() for name in names]
    for name in values:
        close = [] if name in known else difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.85)
        if close:
            raise UserError(f"unknown field {name}; is {close[0]} meant?")
