"""What people's data sets look like, right and wrong: pairing, prompts, masks, sizes, JSONL, splits."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydantic
import pytest
from PIL import Image

from pentimento import images
from pentimento.data import DataConfig, held_out, open_data, verify
from pentimento.errors import UserError


def picture(path: Path, size: tuple[int, int] = (8, 6), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six sound pairs with prompts."""
    root = tmp_path / "set"
    for number in range(6):
        picture(root / "source" / f"{number:03}.png", seed=number)
        picture(root / "target" / f"{number:03}.png", seed=100 + number)
        text(root / "prompts" / f"{number:03}.txt", f"edit {number}\n")
    return root


def problem(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        open_data(config)
    return str(caught.value)


def config(root: Path, **options) -> DataConfig:
    return DataConfig(root=str(root), **options)


def test_pairs_are_found_in_order_with_prompts_and_sizes(pairs):
    rows = open_data(config(pairs))
    assert [row.key for row in rows] == [f"{n:03}" for n in range(6)]
    assert [row.prompt for row in rows] == [f"edit {n}" for n in range(6)]
    assert rows[0].size == (8, 6)
    example = rows[1].load()
    assert example.key == "001" and example.prompt == "edit 1" and example.mask is None
    assert np.array_equal(np.asarray(example.target), np.asarray(Image.open(pairs / "target" / "001.png")))


@pytest.mark.parametrize("before, after", [("train_A", "train_B"), ("control", "target")])
def test_other_names_of_the_two_folders(tmp_path, before, after):
    picture(tmp_path / before / "a.png")
    picture(tmp_path / after / "a.jpg")  # extensions may differ
    row = open_data(config(tmp_path, prompt="fill it"))[0]
    assert row.source.parent.name == before and row.target.name == "a.jpg" and row.prompt == "fill it"


def test_two_layouts_in_one_folder_are_refused(pairs):
    picture(pairs / "train_A" / "a.png")
    picture(pairs / "train_B" / "a.png")
    assert "source/, target/ and train_A/, train_B/" in problem(config(pairs))


def test_what_file_managers_leave_behind_is_passed_over(pairs):
    for folder in ("source", "target", "prompts"):
        for name in (".DS_Store", "Thumbs.db", "._000.png", "desktop.ini"):
            (pairs / folder / name).write_bytes(b"\0")
        (pairs / folder / ".ipynb_checkpoints").mkdir()
    assert len(open_data(config(pairs))) == 6


def test_stray_files_are_reported(pairs):
    text(pairs / "source" / "notes.md", "hello")
    (pairs / "source" / "sub").mkdir()
    message = problem(config(pairs))
    assert "source: holds other things" in message and "notes.md" in message and "sub/" in message


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("target/003.png", "target/003_after.png", ["source/003.png", "nearest is 003_after.png"]),
        ("source/003.png", "source/003 .png", ["target/003.png", "source/003 .png"]),
        (
            "target/003.png",
            None,
            ["no partner for 1 picture;", "source/003.png has no counterpart in target/"],
        ),
    ],
)
def test_a_picture_without_partner_is_named_with_the_nearest_name(pairs, old, new, words):
    if new:
        (pairs / old).rename(pairs / new)
    else:
        (pairs / old).unlink()
    message = problem(config(pairs))
    assert all(word in message for word in words), message


def test_upper_and_lower_case_is_not_guessed(tmp_path):
    picture(tmp_path / "source" / "Cat.png")
    picture(tmp_path / "target" / "cat.png")
    message = problem(config(tmp_path, prompt=""))
    assert (
        "source/Cat.png" in message
        and "the nearest is cat.png, which differs in upper and lower case" in message
    )


def test_only_the_first_few_problems_are_listed(tmp_path):
    for number in range(30):
        picture(tmp_path / "source" / f"{number}.png")
    picture(tmp_path / "target" / "x.png")
    message = problem(config(tmp_path, prompt=""))
    assert "no partner for 31 pictures;" in message and "and 26 more" in message and message.count("\n") == 6


def test_two_pictures_of_one_stem(pairs):
    picture(pairs / "target" / "002.jpg")
    message = problem(config(pairs))
    assert "002.jpg and 002.png" in message and "one stem" in message


def test_composed_and_decomposed_names_are_the_same(tmp_path):
    picture(tmp_path / "source" / "caf\u00e9.png")
    picture(tmp_path / "target" / "cafe\u0301.png")
    text(tmp_path / "prompts" / "cafe\u0301.txt", "x")
    assert [row.key for row in open_data(config(tmp_path))] == ["caf\u00e9"]


def test_pairs_of_different_aspect(pairs):
    picture(pairs / "target" / "004.png", (8, 8))
    picture(pairs / "target" / "005.png", (16, 12))  # another size of the same aspect is fine
    message = problem(config(pairs))
    assert "1 of 6 pairs" in message and "004.png" in message and "8x6 and 8x8" in message
    picture(pairs / "target" / "004.png", (800, 590))  # 1.7 %
    assert len(open_data(config(pairs))) == 6


def test_the_aspect_is_that_of_the_upright_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "source").mkdir()
    Image.new("RGB", (8, 4), "red").save(tmp_path / "source" / "a.png", exif=exif)
    picture(tmp_path / "target" / "a.png", (4, 8))
    row = open_data(config(tmp_path, prompt=""))[0]
    assert row.size == (4, 8) == row.load().source.size


def test_prompts_come_from_a_folder_a_table_or_beside_the_target(pairs):
    for file in (pairs / "prompts").iterdir():
        file.unlink()
    text(pairs / "prompts" / "000.txt", "\ufefffrom the folder \r\n")
    table = {"000.png": "no", "train_A/001.png": "from the table", "002.png": "no", "003.png": "c"}
    text(pairs / "train_prompts.json", json.dumps({**table, "004.png": "d", "005.png": "e"}))
    text(pairs / "prompts" / "002.txt", "")
    text(pairs / "target" / "001.txt", "no")
    assert [row.prompt for row in open_data(config(pairs))] == [
        "from the folder",
        "from the table",
        "no",
        "c",
        "d",
        "e",
    ]
    (pairs / "train_prompts.json").unlink()
    (pairs / "prompts" / "002.txt").unlink()
    text(pairs / "target" / "002.txt", "beside")
    rows = open_data(config(pairs, prompt="fixed"))
    assert [row.prompt for row in rows] == ["from the folder", "no", "beside", "fixed", "fixed", "fixed"]


def test_without_any_prompt_the_places_are_named(pairs):
    (pairs / "prompts" / "001.txt").write_text(" \n")
    message = problem(config(pairs))
    for words in (
        "no prompt for 1 of 6 pairs",
        "prompts/STEM.txt",
        "train_prompts.json",
        "data.prompt",
        "001",
    ):
        assert words in message
    assert open_data(config(pairs, prompt=""))[1].prompt == ""  # on purpose


def test_a_misspelt_prompt_is_not_replaced_by_the_fixed_one(pairs):
    (pairs / "prompts" / "001.txt").rename(pairs / "prompts" / "01.txt")
    message = problem(config(pairs, prompt="fixed"))
    assert "001.png has no counterpart in prompts/; the nearest is 01.txt" in message
    (pairs / "prompts" / "01.txt").rename(pairs / "target" / "O01.txt")
    assert "the nearest is O01.txt" in problem(config(pairs, prompt="fixed"))


def test_prompts_of_absent_pictures_do_no_harm(pairs):
    text(pairs / "prompts" / "100.txt", "more prompts than pictures")
    text(pairs / "target" / "README.txt", "hello")
    assert len(open_data(config(pairs))) == 6


@pytest.mark.parametrize("name, meant", [("prompt", "prompts"), ("Prompts", "prompts"), ("mask", "masks")])
def test_folders_of_nearly_the_right_name(pairs, name, meant):
    (pairs / "prompts").rename(pairs / name)
    assert f"holds a folder {name}/; is it meant as {meant}/" in problem(config(pairs, prompt="fixed"))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xfeh\0i\0", "000.txt: is not UTF-8"),
        (None, "prompts/sub: prompts are files STEM.txt"),
    ],
)
def test_broken_prompts(pairs, content, words):
    if content is None:
        (pairs / "prompts" / "sub").mkdir()
    else:
        (pairs / "prompts" / "000.txt").write_bytes(content)
    assert words in problem(config(pairs))


@pytest.mark.parametrize("content", ['{"a.png": ', '["a.png"]', '{"a.png": 3}'])
def test_a_broken_table_of_prompts(pairs, content):
    text(pairs / "train_prompts.json", content)
    assert (
        "train_prompts.json: " in (message := problem(config(pairs)))
        and '{"name.png": "prompt", ...}' in message
    )


def test_masks_belong_to_every_pair_or_to_none(pairs):
    for number in range(6):
        mask = Image.new("L", (8, 6))
        mask.paste(255, (0, 0, 4, 6))
        (pairs / "masks").mkdir(exist_ok=True)
        mask.save(pairs / "masks" / f"{number:03}.png")
    row = open_data(config(pairs))[2]
    assert row.load().mask.getpixel((0, 0)) == 255
    kept = open_data(config(pairs, mask_white="keep"))[2]
    assert kept.load().mask.getpixel((0, 0)) == 0 and kept.digest() != row.digest()
    (pairs / "masks" / "002.png").rename(pairs / "masks" / "02.png")
    message = problem(config(pairs))
    assert (
        "no mask in masks/ for 1 pair," in message
        and "002.png has no counterpart in masks/; the nearest is 02.png" in message
    )
    picture(pairs / "masks" / "002.png", (6, 6))
    assert "002.png: their aspects differ (8x6 and 6x6)" in problem(config(pairs))


def test_folders_that_are_missing_empty_or_files(tmp_path, pairs, monkeypatch):
    assert "data.root is empty" in problem(DataConfig())
    message = problem(config(tmp_path / "sett"))
    assert "sett: there is no such folder" in message and "the nearest name there is set" in message
    assert "there is no such folder" in problem(config(tmp_path / "a" / "b" / "c"))
    (tmp_path / "empty").mkdir()
    assert "the folder is empty; expected a data set: the folders source/ and target/" in problem(
        config(tmp_path / "empty")
    )
    assert "is a file, not a folder" in problem(config(pairs / "prompts" / "000.txt"))
    for file in (pairs / "target").iterdir():
        file.unlink()
    assert "target: the folder is empty; expected pictures" in problem(config(pairs))
    text(pairs / "target" / "000.txt", "only a text")
    assert "target: holds no pictures" in problem(config(pairs))

    def denied(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    assert "cannot be read (Permission denied)" in problem(config(pairs))


def test_the_wrong_kind_is_recognised(tmp_path, pairs):
    picture(tmp_path / "wide" / "a.png", (16, 6))
    assert "set data.kind=side_by_side" in problem(config(tmp_path / "wide"))
    assert "set data.kind=pairs" in problem(config(pairs, kind="side_by_side"))
    path = text(tmp_path / "lines" / "a.jsonl", "{}")
    assert "set data.kind=jsonl" in problem(config(path.parent))
    assert "set data.kind=jsonl" in problem(config(path))
    (tmp_path / "odd" / "before").mkdir(parents=True)
    assert "found:\n  before" in problem(config(tmp_path / "odd"))


def test_side_by_side_pictures(tmp_path):
    left, right = Image.new("RGB", (5, 4), "red"), Image.new("RGB", (5, 4), "blue")
    images.save_image(images.join(left, right), tmp_path / "a.png")
    text(tmp_path / "prompts" / "a.txt", "turn blue")
    (tmp_path / "masks").mkdir()
    Image.new("L", (5, 4), 255).save(tmp_path / "masks" / "a.png")
    row = open_data(config(tmp_path, kind="side_by_side"))[0]
    example = row.load()
    assert row.size == (5, 4) and row.prompt == "turn blue" and example.mask is not None
    assert example.source.getcolors() == [(20, (255, 0, 0))] and example.target.getcolors() == [
        (20, (0, 0, 255))
    ]
    picture(tmp_path / "b.png", (7, 4))
    Image.new("L", (3, 4), 255).save(tmp_path / "masks" / "b.png")
    message = problem(config(tmp_path, kind="side_by_side", prompt=""))
    assert "1 of 2 pairs" in message and "b.png: 7x4 has no two halves" in message


ALIASES = [
    {"source": "s.png", "target": "t.png", "prompt": "p"},
    {"control_path": "s.png", "image_path": "t.png", "caption": "p"},
    {"control_path_0": "s.png", "image_path": "t.png", "caption": "p"},
    {"edit_image": "s.png", "image": "t.png", "prompt": "p"},
    {"file_name": "s.png", "output": "t.png", "instruction": "p"},
    {"source_img": "s.png", "target_img": "t.png", "instruction": "p"},
    {"input_image": "s.png", "edited_image": "t.png", "edit_prompt": "p"},
]


def jsonl(folder: Path, *rows: dict | str, name: str = "data.jsonl") -> Path:
    picture(folder / "s.png")
    picture(folder / "t.png", seed=1)
    return text(
        folder / name, "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    )


@pytest.mark.parametrize("fields", ALIASES)
def test_jsonl_understands_the_names_of_other_trainers(tmp_path, fields):
    row = open_data(config(jsonl(tmp_path, fields), kind="jsonl"))[0]
    assert (row.key, row.source.name, row.target.name, row.prompt) == ("t", "s.png", "t.png", "p")


def test_jsonl_with_bom_crlf_blank_lines_line_separators_and_absolute_paths(tmp_path):
    path = jsonl(tmp_path / "here")
    first = {"source": "s.png", "target": "t.png", "prompt": "with\u2028a separator", "seed": 3, "mask": None}
    second = {"source": str(tmp_path / "here" / "s.png"), "target": "../here/t.png", "prompt": "q"}
    lines = [json.dumps(first, ensure_ascii=False), "", json.dumps(second)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    rows = open_data(config(path.parent, kind="jsonl"))  # the folder of a single file will do
    assert [row.key for row in rows] == ["t-1", "t-3"]
    assert rows[0].prompt == "with\u2028a separator" and rows[0].load().extra == {"seed": 3}
    assert hash(rows[0]) != hash(rows[1])


def test_jsonl_keys(tmp_path):
    base = {"source": "s.png", "target": "t.png", "prompt": "p"}
    path = jsonl(tmp_path, {**base, "key": "a/b"}, {**base, "id": 7}, base, base, {**base, "key": "t-3"})
    assert [row.key for row in open_data(config(path, kind="jsonl"))] == ["a_b", "7", "t-3_", "t-4", "t-3"]
    path = jsonl(tmp_path, {**base, "key": "a"}, {**base, "key": "a"})
    assert "keys must be unique" in problem(config(path, kind="jsonl"))


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"source": "s.png",', "line 2: is not JSON"),
        ("[1, 2]", "line 2: is not a JSON object"),
        ('"text"', "line 2: is not a JSON object"),
        ({"target": "t.png"}, "line 2: has no source; one of the fields source, control_path"),
        ({"source": "s.png"}, "line 2: has no target"),
        ({"source": "", "target": "t.png"}, "line 2: has no source"),
        (
            {"source": "S.png", "target": "t.png"},
            "line 2: there is no picture S.png; the nearest name there is s.png",
        ),
        ({"source": "no/s.png", "target": "t.png"}, "line 2: there is no picture no/s.png"),
        ({"source": "a\\s.png", "target": "t.png"}, "write / instead of \\"),
        ({"source": "s.png", "target": "t.png", "mask": "m.png"}, "line 2: there is no picture m.png"),
        (
            {"source": "s.png", "edit_image": "s.png", "target": "t.png"},
            "source and edit_image mean the same",
        ),
        ({"source": ["s.png"], "target": "t.png"}, "the field source must be one text"),
        ({"source": "s.png", "target": "t.png", "prompt": 3}, "the field prompt must be one text"),
        ({"source": "s.png", "target": "t.png", "promt": "p"}, "unknown field promt; is prompt meant?"),
        ({"Source": "s.png", "target": "t.png"}, "unknown field Source; is source meant?"),
        (
            {"control_path_0": "s.png", "control_path_1": "s.png", "image": "t.png"},
            "more than one is not supported",
        ),
        ({"source": "s" * 5000, "target": "t.png"}, "line 2"),
        ({"source": "s\0.png", "target": "t.png"}, "line 2"),
    ],
)
def test_broken_jsonl_names_the_line(tmp_path, row, words):
    path = jsonl(tmp_path, {"source": "s.png", "target": "t.png", "prompt": "p"}, row)
    message = problem(config(path, kind="jsonl", prompt=""))
    assert words in message and "data.jsonl: 1 line cannot be used" in message


def test_jsonl_files_that_are_missing_empty_or_many(tmp_path):
    assert "there is no such file" in problem(config(tmp_path / "a.jsonl", kind="jsonl"))
    assert "holds no pairs" in problem(config(text(tmp_path / "b.jsonl", "\n\n"), kind="jsonl"))
    text(tmp_path / "c.jsonl", "")
    assert "holds 2 JSONL files" in problem(config(tmp_path, kind="jsonl"))
    (tmp_path / "d.jsonl").write_bytes(b"\xff\xfe{")
    assert "is not UTF-8" in problem(config(tmp_path / "d.jsonl", kind="jsonl"))
    path = jsonl(tmp_path / "e", {"source": "s.png", "target": "t.png"})
    assert "the fields prompt, instruction, caption" in problem(config(path, kind="jsonl"))


def test_bad_headers_are_found_at_once_and_listed_together(pairs):
    (pairs / "source" / "001.png").write_text("hello")
    (pairs / "target" / "003.png").write_bytes(b"")
    message = problem(config(pairs))
    assert (
        "2 of 6 pairs cannot be used" in message and "is not a picture" in message and "is empty" in message
    )


def test_verify_finds_every_picture_that_cannot_be_decoded(pairs):
    for name in ("source/001.png", "target/004.png"):
        picture(pairs / name, (80, 60))
        data = (pairs / name).read_bytes()
        (pairs / name).write_bytes(data[: len(data) // 2])
    picture(pairs / "target" / "001.png", (80, 60))
    picture(pairs / "source" / "004.png", (80, 60))
    rows = open_data(config(pairs))
    seen: list[tuple[int, int]] = []
    with pytest.raises(UserError, match="2 of 12 pictures cannot be used") as caught:
        verify(rows, lambda done, total: seen.append((done, total)))
    assert "source/001.png" in str(caught.value) and "target/004.png" in str(caught.value)
    assert seen == [(n, 12) for n in range(1, 13)]
    verify([row for row in rows if row.key not in ("001", "004")])


def test_verify_decodes_a_repeated_picture_once_and_masks_as_masks(tmp_path):
    path = jsonl(
        tmp_path, *[{"source": "s.png", "target": "t.png", "prompt": p, "mask": "m.png"} for p in "ab"]
    )
    Image.new("L", (8, 6), 1).save(tmp_path / "m.png")
    Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(tmp_path / "m.png")
    totals: set[int] = set()
    with pytest.raises(UserError, match="m.png: the mask holds the values 0 and 1"):
        verify(open_data(config(path, kind="jsonl")), lambda _, total: totals.add(total))
    assert totals == {3}


def test_the_digest_follows_the_pictures_only(pairs, tmp_path):
    def digests() -> list[str]:
        return [row.digest() for row in open_data(config(pairs))]

    first = digests()
    assert len(set(first)) == 6
    text(pairs / "prompts" / "000.txt", "another prompt")
    for folder in ("source", "target", "prompts"):
        for file in (pairs / folder).glob("001.*"):
            file.rename(file.with_stem("zzz"))
    assert sorted(digests()) == sorted(first)
    picture(pairs / "target" / "000.png", seed=7)
    assert digests()[0] != first[0] and digests()[1:] == first[2:] + first[1:2]


def test_the_digest_tells_source_from_target(tmp_path):
    for folder, seeds in (("source", (0, 1)), ("target", (1, 0))):
        for name, seed in zip("ab", seeds, strict=True):
            picture(tmp_path / folder / f"{name}.png", seed=seed)
    a, b = open_data(config(tmp_path, prompt=""))
    assert a.digest() != b.digest()


def test_the_digest_is_computed_once(pairs):
    row = open_data(config(pairs))[0]
    before = row.digest()
    row.source.unlink()
    assert row.digest() == before
    with pytest.raises(UserError, match="did the data set change"):
        replace(row).digest()


def test_limit_and_held_out(pairs):
    rows = open_data(config(pairs))
    assert [row.key for row in open_data(config(pairs, limit=2))] == ["000", "001"]
    train, held = held_out(rows, config(pairs, held_out=2))
    assert len(held) == 2 and [r.key for r in sorted(train + held, key=lambda r: r.key)] == [
        r.key for r in rows
    ]
    again = held_out(list(reversed(rows)), config(pairs, held_out=2))
    assert {row.key for row in again[1]} == {row.key for row in held}
    assert {row.key for row in held} < {row.key for row in held_out(rows, config(pairs, held_out=3))[1]}
    assert held_out(rows, config(pairs, held_out=0)) == (rows, [])
    with pytest.raises(UserError, match="data.held_out=4 would keep more than half of 6 pairs"):
        held_out(rows, config(pairs))


def test_the_choice_of_held_out_pairs_never_changes(pairs):
    # Recorded: a run that is continued by a later version must not train on what it held out.
    assert [row.key for row in held_out(open_data(config(pairs)), config(pairs, held_out=3))[1]] == RECORDED


RECORDED = ["000", "001", "005"]


def test_another_data_set_may_be_held_out(pairs, tmp_path):
    picture(tmp_path / "test" / "source" / "x.png")
    picture(tmp_path / "test" / "target" / "x.png")
    options = config(pairs, limit=3, prompt="p", held_out_root=str(tmp_path / "test"))
    train, held = held_out(open_data(options), options)
    assert len(train) == 3 and [row.key for row in held] == ["x"] and held[0].prompt == "p"
    with pytest.raises(UserError, match="held_out_root is data.root itself"):
        held_out(train, config(pairs, held_out_root=f"{pairs}/../{pairs.name}"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"limit": 0}, "data.limit"),
        ({"held_out": -1}, "data.held_out"),
        ({"caption_dropout": 1.5}, "data.caption_dropout"),
        ({"workers": -1}, "data.workers"),
    ],
)
def test_impossible_values_name_their_field(options, words):
    with pytest.raises(UserError, match=words):
        DataConfig(**options)


def test_the_config_is_read_strictly_by_pydantic():
    read: Callable[[object], DataConfig] = pydantic.TypeAdapter(DataConfig).validate_python
    assert read({"root": "x", "kind": "jsonl", "prompt": ""}) == DataConfig(root="x", kind="jsonl", prompt="")
    with pytest.raises(pydantic.ValidationError, match="kind"):
        read({"kind": "folders"})


def test_one_picture_is_its_own_target(tmp_path):
    """For methods that learn a photograph by heart."""
    file = picture(tmp_path / "photo.png")
    (row,) = open_data(config(file, kind="picture", prompt=""))
    assert (row.key, row.source, row.target, row.size) == ("photo", file, file, (8, 6))
    picture(tmp_path / "other.png", seed=1)
    assert row.digest() != open_data(config(tmp_path / "other.png", kind="picture", prompt=""))[0].digest()
    assert "takes one picture file" in problem(config(tmp_path, kind="picture", prompt=""))
    said = problem(config(tmp_path / "foto.png", kind="picture", prompt=""))
    assert "no such picture; the nearest name there is photo.png" in said


def test_no_pictures_at_all():
    """For methods that learn from words."""
    (row,) = open_data(DataConfig(kind="none"))
    assert row.load().source is None and row.pictures() == () and row.prompts == ("",)
    verify([row])
    assert "has no pictures; leave it out" in problem(DataConfig(kind="none", root="somewhere"))


def test_pairs_by_their_place(pairs):
    """In the order of the names, which need not be alike; prompts go with the sources."""
    for number, path in enumerate(sorted((pairs / "target").iterdir())):
        path.rename(path.with_name(f"after-{9 - number}.png"))
    rows = open_data(config(pairs, match="position"))
    assert [(row.key, row.target.stem) for row in rows] == [(f"{n:03}", f"after-{4 + n}") for n in range(6)]
    assert rows[2].prompt == "edit 2"
    (pairs / "target" / "after-9.png").unlink()
    assert "6 sources and 5 targets cannot be paired by position" in problem(config(pairs, match="position"))
    with pytest.raises(UserError, match="data.match has no meaning with data.kind=jsonl"):
        DataConfig(kind="jsonl", match="position")
