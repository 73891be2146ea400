"""The ways in which before/after pairs lie on disk: which files belong together, and with which prompt.

Names are compared after Unicode composition (macOS stores "é" as two characters), and else exactly: upper and lower case
and near misses are reported. Hidden files and those that file managers leave behind are passed over.
"""

import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import UserError, counted
from .images import READABLE

SIDES = (("source", "target"), ("train_A", "train_B"), ("control", "target"))
PASSED_OVER = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir"})
SHOWN = 5

# Our names first; then those of musubi-tuner, DiffSynth-Studio, diffusers' Kontext script, MagicBrush and InstructPix2Pix.
SOURCE_FIELDS = (
    "source",
    "control_path",
    "control_path_0",
    "edit_image",
    "file_name",
    "source_img",
    "input_image",
    "original_image",
)
TARGET_FIELDS = ("target", "image_path", "image", "output", "target_img", "edited_image")
PROMPT_FIELDS = ("prompt", "instruction", "caption", "edit_prompt")
MASK_FIELDS = ("mask", "mask_path", "mask_image")
KEY_FIELDS = ("key", "id")
# Infinity's training data, as EditInfinity writes them: captions are drawn from in turn, and the ratio is told by the picture.
CAPTION_FIELDS = ("long_caption", "text")
TOLD_FIELDS = ("h_div_w", "long_caption_type", "short_caption_type")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A pair by its files; ``prompt`` is "" where the data set has none."""

    key: str
    source: Path
    target: Path
    prompt: str = ""
    more_prompts: tuple[str, ...] = ()
    """Further ones of the same pair."""
    mask: Path | None = None
    side_by_side: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def listed(lines: Sequence[str], most: int = SHOWN) -> str:
    """The first few lines, indented, below a message."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in [*lines[:most], *more])


def nearest(name: str, names: Collection[str]) -> str:
    """The most similar of ``names``, upper and lower case aside, or ""; also one that only adds to the name."""
    folded = {other.casefold(): other for other in names}
    name = name.casefold()
    close = difflib.get_close_matches(name, folded, n=1, cutoff=0.6)
    longer = sorted((other for other in folded if name in other or other in name), key=len)
    return folded[(close or longer)[0]] if close or longer else ""


def scan_pairs(root: Path, by_position: bool = False) -> tuple[list[Found], str]:
    """Pairs of two folders, in the order of their stems, and where their prompts are looked for.

    ``by_position``: the first of one folder belongs to the first of the other in the order of their names, and so on.
    """
    entries = {path.name for path in entries_of(root, "a data set: the folders source/ and target/")}
    layouts = [pair for pair in SIDES if set(pair) <= entries]
    if len(layouts) != 1:
        raise UserError(f"{root}: {_no_sides(entries, layouts)}")
    before, after = layouts[0]
    sources = pictures_by_stem(root / before)
    targets = pictures_by_stem(root / after, texts=True)
    if by_position:
        targets = _in_order(sources, targets, root)
    _check_partners(sources, targets, before, after, root)
    masks = _masks(root, entries, sources)
    prompts = _prompts(root, entries, sources, beside=root / after)
    found = [
        Found(key=stem, source=path, target=targets[stem], prompt=prompts.get(stem, ""), mask=masks.get(stem))
        for stem, path in sources.items()
    ]
    return found, f"{root}/prompts/STEM.txt, {root}/train_prompts.json and {root / after}/STEM.txt"


def scan_picture(root: Path) -> tuple[list[Found], str]:
    """One picture file, which is its own target."""
    if root.is_dir():
        raise UserError(f"{root}: is a folder; data.kind=picture takes one picture file")
    if not root.exists():
        raise UserError(f"{root}: there is no such picture{_near_file(root)}")
    return [Found(key=_stem(root.name), source=root, target=root)], "nowhere"


def scan_side_by_side(root: Path) -> tuple[list[Found], str]:
    """Double-wide pictures of one folder, in the order of their stems, and where their prompts are looked for."""
    entries = {path.name for path in entries_of(root, "double-wide pictures, left before and right after")}
    for pair in SIDES:
        if set(pair) <= entries:
            raise UserError(
                f"{root}: holds {pair[0]}/ and {pair[1]}/, not side-by-side pictures; set data.kind=pairs"
            )
    for folder in ("prompts", "masks"):
        _present(root, entries, folder)
    pictures = pictures_by_stem(root, texts=True, beside=("prompts", "masks", "train_prompts.json"))
    masks = _masks(root, entries, pictures)
    prompts = _prompts(root, entries, pictures, beside=root)
    found = [
        Found(
            key=stem,
            source=path,
            target=path,
            prompt=prompts.get(stem, ""),
            mask=masks.get(stem),
            side_by_side=True,
        )
        for stem, path in pictures.items()
    ]
    return found, f"{root}/prompts/STEM.txt, {root}/train_prompts.json and {root}/STEM.txt"


def entries_of(folder: Path, expected: str) -> list[Path]:
    """What lies in a folder, sorted, less what is passed over; ``UserError`` if it is missing, unreadable or empty."""
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: there is no such folder; expected {expected}{_near_file(folder)}"
        ) from error
    except NotADirectoryError as error:
        hint = "; for a JSONL file set data.kind=jsonl" if folder.suffix == ".jsonl" else ""
        raise UserError(f"{folder}: is a file, not a folder; expected {expected}{hint}") from error
    except OSError as error:
        raise UserError(
            f"{folder}: the folder cannot be read ({error.strerror}); expected {expected}"
        ) from error
    paths = [p for p in paths if not p.name.startswith(".") and p.name.lower() not in PASSED_OVER]
    if not paths:
        raise UserError(f"{folder}: the folder is empty; expected {expected}")
    return paths


def pictures_by_stem(folder: Path, *, texts: bool = False, beside: Collection[str] = ()) -> dict[str, Path]:
    """The pictures of a folder by stem, sorted; ``texts``: .txt files may lie there too, ``beside``: these names as well.

    Raises ``UserError`` for two pictures of one stem and for anything else that lies there.
    """
    found: dict[str, Path] = {}
    stray, twins = [], []
    for path in entries_of(folder, "pictures"):
        if path.name in beside or (texts and path.suffix.lower() == ".txt"):
            continue
        if path.suffix.lower() not in READABLE or path.is_dir():
            stray.append(path.name + ("/" if path.is_dir() else ""))
        elif (stem := _stem(path.name)) in found:
            twins.append(f"{found[stem].name} and {path.name}")
        else:
            found[stem] = path
    if stray:
        raise UserError(f"{folder}: holds other things than pictures; move them elsewhere:{listed(stray)}")
    if twins:
        raise UserError(
            f"{folder}: pictures of one stem cannot be told apart; rename one of each:{listed(twins)}"
        )
    if not found:
        raise UserError(f"{folder}: holds no pictures; known are {', '.join(sorted(READABLE))}")
    return dict(sorted(found.items()))


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", PurePosixPath(name).stem)


def _no_sides(entries: Collection[str], layouts: Sequence[tuple[str, str]]) -> str:
    if layouts:
        names = " and ".join("/, ".join(pair) + "/" for pair in layouts)
        return f"holds several layouts ({names}); leave the folders of one"
    message = "pairs are looked for in source/ and target/, train_A/ and train_B/, or control/ and target/; "
    if any(Path(name).suffix.lower() in READABLE for name in entries):
        return message + "pictures lie in the folder itself: side by side? Then set data.kind=side_by_side"
    if any(name.endswith(".jsonl") for name in entries):
        return message + "for the JSONL file there set data.kind=jsonl"
    return message + f"found:{listed(sorted(entries))}"


def _in_order(sources: Mapping[str, Path], targets: Mapping[str, Path], root: Path) -> dict[str, Path]:
    """Targets under the stems of the sources that stand at their place in the order of names."""
    if len(sources) != len(targets):
        raise UserError(
            f"{root}: {counted(len(sources), 'source')} and {counted(len(targets), 'target')} cannot be paired by position"
        )
    ordered = [sorted(side.items(), key=lambda item: item[1].name) for side in (sources, targets)]
    return {mine: path for (mine, _), (_, path) in zip(*ordered, strict=True)}


def _check_partners(
    sources: Mapping[str, Path], targets: Mapping[str, Path], before: str, after: str, root: Path
) -> None:
    lonely = [
        _unmatched(f"{folder}/{mine[stem].name}", stem, theirs, set(theirs) - set(mine), other)
        for folder, mine, other, theirs in (
            (before, sources, after, targets),
            (after, targets, before, sources),
        )
        for stem in mine
        if stem not in theirs
    ]
    if lonely:
        raise UserError(
            f"{root}: no partner for {counted(len(lonely), 'picture')}; both sides must have the same stem:{listed(lonely)}"
        )


def _unmatched(name: str, stem: str, others: Mapping[str, Path], free: Collection[str], folder: str) -> str:
    """One line about a file without its counterpart, with the nearest name among those that are free."""
    near = nearest(stem, free)
    if not near:
        return f"{name} has no counterpart in {folder}/"
    why = ", which differs in upper and lower case" if near.casefold() == stem.casefold() else ""
    return f"{name} has no counterpart in {folder}/; the nearest is {others[near].name}{why}"


def _masks(root: Path, entries: Collection[str], pictures: Mapping[str, Path]) -> dict[str, Path]:
    if not _present(root, entries, "masks"):
        return {}
    masks = pictures_by_stem(root / "masks")
    bare = [
        _unmatched(path.name, stem, masks, set(masks) - set(pictures), "masks")
        for stem, path in pictures.items()
        if stem not in masks
    ]
    if bare:
        raise UserError(
            f"{root}: no mask in masks/ for {counted(len(bare), 'pair')}, but for others:{listed(bare)}"
        )
    return masks


def _prompts(
    root: Path, entries: Collection[str], pictures: Mapping[str, Path], *, beside: Path
) -> dict[str, str]:
    """Prompts by stem: of prompts/, else train_prompts.json, else beside the picture; empty ones count as none."""
    neighbours = _texts(beside)
    table = _prompt_table(root / "train_prompts.json") if "train_prompts.json" in entries else {}
    folder = _texts(root / "prompts", only=True) if _present(root, entries, "prompts") else {}
    names = {stem: path for place in (neighbours, table, folder) for stem, (path, _) in place.items()}
    # Prompts of pictures that are not there do no harm, unless a picture that is there lacks its own.
    # Of texts beside the pictures only those of a near name count: a README.txt may well lie there.
    lacking = [stem for stem in pictures if stem not in names]
    free = (set(table) | set(folder)) - set(pictures)
    free |= {stem for stem in neighbours if stem not in pictures and nearest(stem, lacking)}
    if free and lacking:
        bare = [_unmatched(pictures[stem].name, stem, names, free, "prompts") for stem in lacking]
        raise UserError(
            f"{root}: no prompt for {counted(len(bare), 'pair')}, and no pair for {counted(len(free), 'prompt')}:{listed(bare)}"
        )
    found: dict[str, str] = {}
    for place in (neighbours, table, folder):
        found |= {stem: text.strip() for stem, (_, text) in place.items() if text.strip()}
    return found


def _texts(folder: Path, *, only: bool = False) -> dict[str, tuple[Path, str]]:
    texts: dict[str, tuple[Path, str]] = {}
    for path in entries_of(folder, "a text file STEM.txt for each pair"):
        if path.suffix.lower() == ".txt" and not path.is_dir():
            texts[_stem(path.name)] = (path, read_text(path))
        elif only:
            raise UserError(f"{path}: prompts are files STEM.txt; move everything else out of {folder.name}/")
    return texts


def _prompt_table(path: Path) -> dict[str, tuple[Path, str]]:
    expected = 'expected {"name.png": "prompt", ...}'
    try:
        table = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: {error.msg}; {expected}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: {expected}")
    for name, text in table.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: the prompt of {name!r} is not a text; {expected}")
    names = {name: PurePosixPath(name.replace("\\", "/")).name for name in table}
    return {_stem(names[name]): (Path(names[name]), text) for name, text in table.items()}


def _present(root: Path, entries: Collection[str], folder: str) -> bool:
    """Whether an optional folder is there; ``UserError`` if one of nearly its name is there instead."""
    if folder in entries:
        return True
    near = nearest(folder, [name for name in entries if (root / name).is_dir()])
    if near and difflib.SequenceMatcher(None, near.casefold(), folder).ratio() > 0.85:
        raise UserError(
            f"{root}: holds a folder {near}/; is it meant as {folder}/? Rename it, or move it elsewhere"
        )
    return False


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without byte-order mark, any line ends."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def scan_splits(root: Path) -> tuple[list[Found], str]:
    """Captioned pictures of a JSONL file of Infinity's training data, each its own target; equal lines are one.

    ``root`` is the file, its folder, or the folder of an EditInfinity case.
    """
    folder = root / "splits"
    path = _jsonl_file(folder if folder.is_dir() else root)
    rows: dict[str, int] = {}
    for number, line in _lines(path):
        rows.setdefault(line, number)
    found = _rows(path, ((number, line) for line, number in rows.items()), _splits_row)
    return found, f"the fields {' and '.join(CAPTION_FIELDS)} of {path}"


def scan_jsonl(root: Path) -> tuple[list[Found], str]:
    """The pairs of a JSONL file, in the order of its lines, and where their prompts are looked for."""
    path = _jsonl_file(root)
    return _rows(path, _lines(path), _jsonl_row), f"the fields {', '.join(PROMPT_FIELDS)} of {path}"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a JSONL file that hold something, and their numbers."""
    # Not splitlines(): JSON texts may hold U+2028, which is no end of a line.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def _rows(
    path: Path, lines: Iterable[tuple[int, str]], read: Callable[[dict[str, Any], Path], Found]
) -> list[Found]:
    found, problems = [], []
    for number, line in lines:
        try:
            found.append((number, read(fields_of(line), path.parent)))
        except UserError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise UserError(f"{path}: {counted(len(problems), 'line')} cannot be used:{listed(problems)}")
    if not found:
        raise UserError(
            f'{path}: holds no pairs; expected lines like {{"source": "...", "target": "...", "prompt": "..."}}'
        )
    return _with_unique_keys(found, path)


def _jsonl_file(root: Path) -> Path:
    if not root.is_dir():
        if not root.exists():
            raise UserError(
                f"{root}: there is no such file; expected a JSONL file or a folder that holds one"
            )
        return root
    files = [p for p in entries_of(root, "one JSONL file") if p.suffix == ".jsonl"]
    if len(files) != 1:
        names = listed([p.name for p in files])
        raise UserError(
            f"{root}: holds {len(files)} JSONL files; name the one that is meant as data.root{names}"
        )
    return files[0]


def fields_of(line: str) -> dict[str, Any]:
    """The fields of a line of JSONL, without those that are null; raises ``UserError`` where it is no object."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(values, dict):
        raise UserError("is not a JSON object; one object per line is expected, not an array")
    return {name: value for name, value in values.items() if value is not None}


def _splits_row(values: dict[str, Any], folder: Path) -> Found:
    name = _take(values, ("image_path",))
    if not name:
        raise UserError("has no image_path, which must name the picture")
    prompts = [text.strip() for field in CAPTION_FIELDS if (text := _take(values, (field,))).strip()]
    prompt, *more = dict.fromkeys(prompts) or [""]
    picture = _existing(folder, name)
    kept = {name: value for name, value in values.items() if name not in TOLD_FIELDS}
    return Found(key="", source=picture, target=picture, prompt=prompt, more_prompts=tuple(more), extra=kept)


def _jsonl_row(values: dict[str, Any], folder: Path) -> Found:
    source, target = _take(values, SOURCE_FIELDS), _take(values, TARGET_FIELDS)
    prompt, mask = _take(values, PROMPT_FIELDS), _take(values, MASK_FIELDS)
    key = _take(values, KEY_FIELDS)
    _check_further_fields(values)
    for name, text, fields in (("source", source, SOURCE_FIELDS), ("target", target, TARGET_FIELDS)):
        if not text:
            raise UserError(f"has no {name}; one of the fields {', '.join(fields)} must name the picture")
    return Found(
        key=re.sub(r"[^\w.-]+", "_", key),
        source=_existing(folder, source),
        target=_existing(folder, target),
        prompt=prompt.strip(),
        mask=_existing(folder, mask) if mask else None,
        extra=values,
    )


def _take(values: dict[str, Any], fields: Iterable[str]) -> str:
    """Remove the one of ``fields`` that is there, and return it; "" without one."""
    names = [name for name in fields if name in values]
    if len(names) > 1:
        raise UserError(f"the fields {' and '.join(names)} mean the same; leave one")
    if not names:
        return ""
    value = values.pop(names[0])
    if names[0] in KEY_FIELDS and isinstance(value, int):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"the field {names[0]} must be one text, not {json.dumps(value)[:40]}")
    return value


def _check_further_fields(values: Mapping[str, Any]) -> None:
    """Further fields are kept, but a misspelt one would be lost without a word."""
    known = [*SOURCE_FIELDS, *TARGET_FIELDS, *PROMPT_FIELDS, *MASK_FIELDS]
    for name in values:
        if re.fullmatch(r"control_path_[1-9]\d*", name):
            raise UserError(f"the field {name}: a pair has one source; more than one is not supported")
        close = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.85)
        if close:
            raise UserError(f"unknown field {name}; is {close[0]} meant?")


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        raise UserError(f"{name[:60]!r} cannot be used as a path ({error})") from error
    hint = "; write / instead of \\" if "\\" in name else _near_file(path)
    raise UserError(f"there is no picture {name}{hint}")


def _near_file(path: Path) -> str:
    """A hint at the nearest name beside a path that does not exist, or ""."""
    try:
        near = nearest(path.name, [sibling.name for sibling in path.parent.iterdir()])
    except OSError:  # the folder itself is missing or unreadable: no hint is to be had
        return ""
    return f"; the nearest name there is {near}" if near else ""


def _with_unique_keys(found: Sequence[tuple[int, Found]], path: Path) -> list[Found]:
    """Give rows without key the stem of their target, with the number of their line where that is not unique."""
    given = Counter(one.key for _, one in found if one.key)
    twice = [key for key, count in given.items() if count > 1]
    if twice:
        raise UserError(f"{path}: keys must be unique:{listed(twice)}")
    stems = Counter(_stem(one.target.name) for _, one in found if not one.key)
    taken = {*given, *stems}
    keyed = []
    for number, one in found:
        key = one.key or _stem(one.target.name)
        if not one.key and (stems[key] > 1 or key in given):
            key = f"{key}-{number}"
            while key in taken:
                key += "_"
            taken.add(key)
        keyed.append(replace(one, key=key))
    return keyed
