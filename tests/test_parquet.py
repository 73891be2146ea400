"""Rows of Parquet shards are pairs like any others; wrong and damaged shards are named with what is wrong."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shards
import torch
import toy
from PIL import Image, ImageChops

from pentimento import parquet
from pentimento.cache import Samples
from pentimento.data import DataConfig, held_out, open_data, verify
from pentimento.errors import UserError
from pentimento.train import Draws


def config(root: Path, kind: str, **options) -> DataConfig:
    return DataConfig(root=str(root), kind=kind, **options)


def problem(root: Path, kind: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_data(config(root, kind, **options))
    return str(caught.value)


def unsound(root: Path, kind: str) -> str:
    with pytest.raises(UserError) as caught:
        verify(open_data(config(root, kind)))
    return str(caught.value)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and ImageChops.difference(a, b).getbbox() is None


def draws(count: int, step: int = 1) -> Draws:
    return Draws([(0, "edit", step, position) for position in range(count)], torch.device("cpu"))


@pytest.fixture
def magic(tmp_path: Path) -> Path:
    return shards.magicbrush(tmp_path / "magicbrush")


@pytest.fixture
def omni(tmp_path: Path) -> Path:
    return shards.omniedit(tmp_path / "omniedit")


def test_magicbrush_is_train_then_dev(magic):
    rows = open_data(config(magic, "magicbrush"))
    assert [row.prompts for row in rows] == [(f"magic {n}",) for n in range(5)]
    assert [row.key for row in rows][2:4] == [
        "magicbrush-train-00000-of-00002-5a1c-00002",
        "magicbrush-train-00001-of-00002-77fe-00000",
    ]
    assert rows[0].size == (24, 16) and rows[0].extra == {}
    example = rows[3].load()
    assert example.prompt == "magic 3" and example.key == rows[3].key and example.mask is None
    assert same(example.source, shards.noise(3)) and same(example.target, shards.noise(1003))


def test_omniedit_is_in_the_order_of_its_files_with_all_instructions(omni):
    rows = open_data(config(omni, "omniedit"))
    assert [row.prompts[0] for row in rows] == [f"omni {n}" for n in range(5)]
    assert rows[1].prompts == ("omni 1", "omni 1 in other words")
    assert rows[4].load().extra == {"task": "swap"}
    assert same(rows[4].load().target, shards.noise(3004))


def test_the_mix_is_magicbrush_then_omniedit(tmp_path):
    rows = open_data(config(shards.mix(tmp_path), "icedit"))
    words = [row.prompts[0].split()[0] for row in rows]
    assert words == ["magic"] * 5 + ["omni"] * 5
    assert len({row.key for row in rows}) == 10
    assert len(open_data(config(tmp_path, "icedit", limit=7))) == 7


def test_shards_may_lie_in_the_folder_itself(omni):
    assert len(open_data(config(omni / "data", "omniedit"))) == 5


def test_the_noise_is_cut_off_magicbrush_only(tmp_path):
    tall = shards.cell(shards.noise(7, (5, 66)))
    folder = shards.mix(tmp_path)
    shards.write(
        folder / "magicbrush" / "data" / "train-00001-of-00002-77fe.parquet",
        [shards.magic(3, source_img=tall)],
    )
    shards.write(
        folder / "omniedit" / "data" / "train-00100-of-00571.parquet", [shards.omni(3, src_img=tall)]
    )
    rows = open_data(config(folder, "icedit"))
    cut, whole = rows[3], rows[8]
    assert cut.size == cut.load().source.size == (5, 64) and cut.load().target.size == (24, 16)
    assert same(cut.load().source, shards.noise(7, (5, 66)).crop((0, 0, 5, 64)))
    assert whole.size == whole.load().source.size == (5, 66)
    kept = open_data(config(folder, "icedit", crop_noise=False))[3]
    assert kept.size == kept.load().source.size == (5, 66) and kept.digest() != cut.digest()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"tasks": ("removal",)}, [0, 3]),
        ({"tasks": ("style", "swap")}, [1, 2, 4]),
        ({"min_score": 8.2}, [2, 3, 4]),
        ({"tasks": ("removal",), "min_score": 8.1, "limit": 1}, [3]),
    ],
)
def test_rows_are_chosen_by_task_and_score(omni, options, left):
    rows = open_data(config(omni, "omniedit", **options))
    assert [row.prompts[0] for row in rows] == [f"omni {n}" for n in left]
    assert same(rows[-1].load().source, shards.noise(2000 + left[-1]))


def test_partial_scores_stand_in_for_an_absent_one(tmp_path):
    nan = float("nan")
    shards.write(
        tmp_path / "train-0.parquet",
        [
            shards.omni(0, o_score=None, sc_score_1=6, sc_score_2=9, pq_score=9),
            shards.omni(1, o_score=nan, sc_score_1=None, sc_score_2=7, pq_score=10),
            shards.omni(2, o_score=1.0),
        ],
    )
    names = [name for name in shards.OMNIEDIT.names if name != "o_score"]
    schema = pa.schema([shards.OMNIEDIT.field(name) for name in names])
    shards.write(tmp_path / "train-1.parquet", [shards.omni(4, pq_score=2)], schema)
    for least, left in ((8.0, [0, 1]), (8.5, [1]), (7, [0, 1, 4]), (1.0, [0, 1, 2, 4])):
        rows = open_data(config(tmp_path, "omniedit", min_score=least))
        assert [row.prompts[0] for row in rows] == [f"omni {n}" for n in left]


def test_rows_without_scores_are_refused_only_where_they_are_needed(tmp_path):
    bare = dict.fromkeys(("o_score", "sc_score_1", "sc_score_2", "pq_score"))
    shards.write(tmp_path / "train-0.parquet", [shards.omni(0), shards.omni(1, **bare), shards.omni(3)])
    assert len(open_data(config(tmp_path, "omniedit"))) == 3
    assert len(open_data(config(tmp_path, "omniedit", tasks=("removal",), min_score=1))) == 2
    message = problem(tmp_path, "omniedit", min_score=1)
    assert (
        "no score (in o_score, sc_score_1, sc_score_2, pq_score) in 1 of 3 rows" in message
        and message.endswith("\n  row 1")
    )
    assert "o_score, sc_score_1, sc_score_2, pq_score" in message and "data.min_score" in message


def test_a_choice_that_leaves_nothing_and_unknown_tasks(omni):
    assert "holds no rows with a score of at least 11" in problem(omni, "omniedit", min_score=11)
    message = problem(omni, "omniedit", tasks=("swap", "remove"))
    assert "has the task 'remove'; the nearest is removal; there are: removal, style, swap" in message


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (
            "pairs",
            {"tasks": ("swap",)},
            "data.tasks has no meaning with data.kind=pairs, only with omniedit, icedit",
        ),
        ("magicbrush", {"tasks": ("swap",)}, "data.tasks"),
        ("jsonl", {"min_score": 1.0}, "data.min_score"),
        ("omniedit", {"crop_noise": False}, "data.crop_noise"),
        ("side_by_side", {"crop_noise": False}, "data.crop_noise"),
        ("icedit", {"prompt": ""}, "data.prompt has no meaning with data.kind=icedit"),
        ("omniedit", {"mask_white": "keep"}, "data.mask_white"),
        ("omniedit", {"min_score": float("nan")}, "data.min_score is the lowest score"),
    ],
)
def test_options_that_a_kind_has_no_use_for(kind, options, words):
    with pytest.raises(UserError, match=words):
        DataConfig(root="x", kind=kind, **options)


def test_pictures_keep_their_mode_and_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = shards.cell(shards.noise(0, (6, 4)), exif=exif)
    palette = shards.noise(1).quantize(16)
    deep = Image.fromarray(np.full((2, 2), 257 * 99, dtype=np.uint16))
    rows = [
        shards.omni(0, src_img=turned, edited_img=shards.cell(palette)),
        shards.omni(1, src_img=shards.cell(Image.new("LA", (3, 2), (9, 128))), edited_img=shards.cell(deep)),
    ]
    shards.write(tmp_path / "train-0.parquet", rows)
    first, second = open_data(config(tmp_path, "omniedit"))
    assert first.size == (4, 6) == first.load().source.size
    assert same(first.load().source, shards.noise(0, (6, 4)).transpose(Image.Transpose.ROTATE_270))
    assert first.load().target.mode == "P" and same(first.load().target, palette)
    assert second.load().source.getpixel((0, 0)) == (9, 128)
    assert second.load().target.getpixel((0, 0)) == 99 and second.load().target.mode == "L"


def test_cmyk_pictures_and_single_pixels(tmp_path):
    red = shards.cell(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    dot = shards.cell(Image.new("RGB", (1, 1), (1, 2, 3)))
    shards.write(tmp_path / "train-0.parquet", [shards.magic(0, source_img=red, target_img=dot)])
    (row,) = open_data(config(tmp_path, "magicbrush"))
    verify([row])
    example = row.load()
    assert example.source.mode == "CMYK"
    r, g, b = example.source.convert("RGB").getpixel((4, 4))
    assert r > 250 and g < 5 and b < 5
    assert example.target.size == (1, 1) and example.target.getpixel((0, 0)) == (1, 2, 3)


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def damage(path: Path) -> None:
    """The pages are overwritten, the footer stays."""
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: cut(path, 0.5), "the file is damaged or cut off .*; download it again"),
        (damage, "the file is damaged or cut off .*; download it again"),
        (lambda path: path.write_text("PARQUET, honestly"), "is not a Parquet file, whatever its name says"),
        (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda path: (path.unlink(), path.mkdir()), r"cannot be read \(Is a directory\)"),
    ],
)
def test_files_that_are_damaged_or_something_else(magic, spoil, words):
    path = magic / "data" / "train-00000-of-00002-5a1c.parquet"
    spoil(path)
    with pytest.raises(UserError, match=f"train-00000-of-00002-5a1c.parquet: .*{words}"):
        open_data(config(magic, "magicbrush"))


def renamed(schema: pa.Schema, old: str, new: str) -> pa.Schema:
    return schema.set(schema.get_field_index(old), schema.field(old).with_name(new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "instruction",
            "instructions",
            "has no column instruction; the nearest is instructions; its columns: img_id",
        ),
        ("source_img", "Source_img", "has no column source_img; the nearest is Source_img"),
        ("target_img", "after", "has no column target_img"),
    ],
)
def test_wrong_columns_are_named_with_the_nearest(tmp_path, old, new, words):
    row = shards.magic(0)
    row[new] = row.pop(old)
    shards.write(tmp_path / "train-0.parquet", [row], renamed(shards.MAGICBRUSH, old, new))
    assert f"train-0.parquet: {words}" in problem(tmp_path, "magicbrush")


def test_columns_of_another_kind_of_data_set(tmp_path, omni):
    shards.write(tmp_path / "a" / "train-0.parquet", [shards.magic(0)])
    message = problem(tmp_path / "a", "omniedit")
    assert (
        "has no column src_img; its columns are those of magicbrush, so set data.kind=magicbrush" in message
    )
    assert "set data.kind=omniedit" in problem(omni, "magicbrush")


@pytest.mark.parametrize(
    ("column", "kind", "value", "words"),
    [
        ("source_img", pa.string(), "a.png", "source_img holds string, not pictures"),
        ("target_img", pa.binary(), b"", "target_img holds (large_)?binary, not pictures"),
        (
            "target_img",
            pa.struct([("path", pa.string())]),
            {"path": "a"},
            "target_img holds struct<path: string>, not pictures",
        ),
        ("instruction", pa.int64(), 3, "instruction holds int64, not texts"),
    ],
)
def test_columns_of_another_type(tmp_path, column, kind, value, words):
    schema = shards.MAGICBRUSH
    schema = schema.set(schema.get_field_index(column), pa.field(column, kind))
    shards.write(tmp_path / "train-0.parquet", [shards.magic(0, **{column: value})], schema)
    with pytest.raises(UserError, match=f"train-0.parquet: the column {words}"):
        open_data(config(tmp_path, "magicbrush"))


def test_tasks_need_a_column_of_tasks(tmp_path):
    row = shards.omni(0)
    row["tasks"] = row.pop("task")
    shards.write(tmp_path / "train-0.parquet", [row], renamed(shards.OMNIEDIT, "task", "tasks"))
    assert open_data(config(tmp_path, "omniedit"))[0].extra == {}
    assert "has no column task; the nearest is tasks" in problem(tmp_path, "omniedit", tasks=("swap",))


def test_a_folder_with_shards_of_two_schemas(omni):
    shards.write(omni / "data" / "train-00566-of-00571.parquet", [shards.magic(0)])
    message = problem(omni, "omniedit")
    assert "train-00566-of-00571.parquet: has no column src_img" in message
    assert "train-00000-of-00105.parquet beside it has other columns" in message


def test_folders_without_the_right_shards(tmp_path, magic):
    assert "there is no such folder" in problem(tmp_path / "absent", "omniedit")
    (tmp_path / "empty").mkdir()
    assert "the folder is empty; expected the Parquet shards of omniedit" in problem(
        tmp_path / "empty", "omniedit"
    )
    shards.write(tmp_path / "other" / "validation-0.parquet", [shards.magic(0)])
    message = problem(tmp_path / "other", "magicbrush")
    assert (
        "holds no shard train-*.parquet and dev-*.parquet" in message
        and "found:\n  validation-0.parquet" in message
    )
    shards.write(magic / "data" / "validation-0.parquet", [shards.magic(0)])
    assert "move them elsewhere:\n  validation-0.parquet" in problem(magic, "magicbrush")
    (magic / "data" / "validation-0.parquet").unlink()
    assert "omniedit: there is no such folder" in problem(tmp_path, "icedit")
    assert f"set data.root={tmp_path}/magicbrush, or data.kind=icedit" in problem(tmp_path, "magicbrush")
    assert "is a file, not a folder" in problem(tmp_path / "other" / "validation-0.parquet", "magicbrush")


@pytest.mark.parametrize("value", ["", " \n", None])
def test_an_empty_instruction_names_the_row(magic, value):
    path = shards.write(
        magic / "data" / "train-00001-of-00002-77fe.parquet",
        [shards.magic(0), shards.magic(1, instruction=value)],
    )
    message = problem(magic, "magicbrush")
    assert "an empty instruction in 1 of 6 rows" in message and f"{path}, row 1, instruction" in message


def test_of_several_instructions_the_empty_ones_are_left_out(tmp_path):
    rows = [shards.omni(0, edited_prompt_list=["", " kept as it is. ", None, "b"])]
    shards.write(tmp_path / "train-0.parquet", rows)
    assert open_data(config(tmp_path, "omniedit"))[0].prompts == (" kept as it is. ", "b")
    for value in (None, [], ["", None, "\t"]):
        shards.write(tmp_path / "train-0.parquet", [*rows, shards.omni(1, edited_prompt_list=value)])
        assert "train-0.parquet, row 1, edited_prompt_list" in problem(tmp_path, "omniedit")


def test_pictures_that_cannot_be_decoded_are_found_before_training(tmp_path):
    whole = shards.cell(shards.noise(0, (64, 64)))
    frames = {"save_all": True, "append_images": [shards.noise(2)]}
    bad = [
        {"bytes": whole["bytes"][:-200], "path": None},
        {"bytes": b"hello", "path": None},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": "elsewhere.png"},
        None,
        shards.cell(shards.noise(1), "GIF", **frames),
        shards.cell(Image.new("1", (12_000, 12_000))),
    ]
    shards.write(tmp_path / "train-0.parquet", [shards.magic(n, target_img=one) for n, one in enumerate(bad)])
    message = unsound(tmp_path, "magicbrush")
    assert "7 of 14 pictures cannot be used" in message
    lines = message.splitlines()[1:]
    words = [
        "damaged or cut off",
        "is not a picture",
        "0 bytes",
        "holds no picture",
        "holds no picture",
        "2 frames",
        "12000x12000 is over 100 megapixels",
    ]
    for number, (line, said) in enumerate(zip(lines, words, strict=True)):
        assert line.startswith(f"  {tmp_path}/train-0.parquet, row {number}, target_img: ") and said in line


def test_a_shard_that_changes_while_it_is_used(magic):
    path = magic / "data" / "train-00000-of-00002-5a1c.parquet"
    rows = open_data(config(magic, "magicbrush"))
    shards.write(path, [shards.magic(0)], group=1)
    rows[0].load()
    for row in rows[1:3]:
        with pytest.raises(UserError, match="has fewer rows than before"):
            row.load()
    (magic / "data" / "dev-00000-of-00001-c0de.parquet").unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)"):
        rows[4].load()


def test_without_pyarrow_the_extra_is_named(magic, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'pentimento[data]'" in problem(magic, "magicbrush")


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int]]:
    """The row groups that are read from here on."""
    seen: list[tuple[str, int]] = []
    read = parquet.Shard._read

    def noted(shard, number):
        seen.append((shard.path.name, number))
        return read(shard, number)

    monkeypatch.setattr(parquet.Shard, "_read", noted)
    return seen


def test_opening_reads_no_pictures_and_checking_reads_each_row_group_once(tmp_path, reads):
    rows = open_data(config(shards.mix(tmp_path), "icedit"))
    train, held = held_out(rows, config(tmp_path, "icedit", held_out=3))
    assert not reads and (len(train), len(held)) == (7, 3)
    verify(rows)
    assert len(reads) == len(set(reads)) == 7
    assert [row.size for row in rows] == [(24, 16)] * 10
    assert len({row.digest() for row in rows}) == 10
    assert len(reads) == 7


def test_few_row_groups_are_kept(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(parquet, "KEPT_BYTES", 0)
    rows = open_data(config(shards.mix(tmp_path), "icedit"))
    kept = rows[0].shard._groups._kept
    most = 0
    for index in (0, 1, 9, 0, 5, 1):
        rows[index].load()
        most = max(most, len(kept))
    assert most == parquet.KEPT_GROUPS == 2
    # 0, 1 and 9 read two groups, 0 finds the first of them, 5 takes the place of 9's, and 1 still finds 0's.
    assert len(reads) == 3


def test_sizes_are_known_from_the_header_before_anything_is_decoded(magic, monkeypatch):
    rows = open_data(config(magic, "magicbrush"))
    monkeypatch.setattr(parquet.images, "decode", None)
    assert rows[4].size == (24, 16)


def test_rows_travel_to_other_processes_without_pictures(tmp_path):
    rows = open_data(config(shards.mix(tmp_path), "icedit"))
    verify(rows)
    packed = pickle.dumps(rows)
    assert len(packed) < 5000
    there = pickle.loads(packed)
    assert there[0].shard._groups is there[9].shard._groups and not there[0].shard._groups._kept
    assert same(there[7].load().source, rows[7].load().source) and there[7].digest() == rows[7].digest()


def test_the_digest_follows_the_pictures_only(tmp_path):
    (tmp_path / "b").mkdir()
    first = open_data(config(shards.magicbrush(tmp_path / "a"), "magicbrush"))
    rows = [
        shards.magic(1, instruction="another"),
        shards.magic(0),
        shards.magic(2, target_img=shards.magic(0)["target_img"]),
    ]
    shards.write(tmp_path / "b" / "train-7.parquet", rows)
    second = open_data(config(tmp_path / "b", "magicbrush"))
    assert second[0].digest() == first[1].digest() and second[1].digest() == first[0].digest()
    assert second[2].digest() not in {row.digest() for row in first}
    swapped = shards.magic(0)
    swapped["source_img"], swapped["target_img"] = swapped["target_img"], swapped["source_img"]
    shards.write(tmp_path / "b" / "train-7.parquet", [swapped])
    assert open_data(config(tmp_path / "b", "magicbrush"))[0].digest() != first[0].digest()


def test_the_stamp_tells_rows_and_shards_apart_without_reading_pictures(tmp_path, magic, reads):
    rows = open_data(config(magic, "magicbrush"))
    stamps = [row.stamp() for row in rows]
    assert len(set(stamps)) == len(rows) and not reads
    assert [row.stamp() for row in open_data(config(magic, "magicbrush"))] == stamps
    assert [row.stamp() for row in open_data(config(magic, "magicbrush", crop_noise=False))] != stamps
    shards.write(rows[0].shard.path, [shards.magic(index) for index in (5, 6, 7, 8)])
    assert open_data(config(magic, "magicbrush"))[0].stamp() != stamps[0]


def test_held_out_rows_and_another_data_set_for_them(tmp_path, magic, omni):
    options = config(magic, "magicbrush", held_out=2)
    train, held = held_out(open_data(options), options)
    again = held_out(list(reversed(open_data(options))), options)[1]
    assert len(train) == 3 and {row.key for row in held} == {row.key for row in again}
    shards.write(tmp_path / "other" / "dev-0.parquet", [shards.magic(8)])
    options = config(magic, "magicbrush", held_out_root=str(tmp_path / "other"), limit=2)
    train, held = held_out(open_data(options), options)
    assert len(train) == 2 and [row.prompts for row in held] == [("magic 8",)]


def test_one_of_several_instructions_is_drawn_for_each_step(tmp_path):
    rows = open_data(config(shards.mix(tmp_path), "icedit"))
    method = toy.Toy()
    samples = Samples(rows, method)
    samples.precompute()
    assert method.calls["encode_text"] == 5 + 2 * 5
    lengths = {0: {7}, 9: {6, 21}}
    seen: dict[int, list[int]] = {0: [], 9: []}
    for step in range(60):
        text = samples.batch([0, 9], draws(2, step))["text"].float()
        assert torch.equal(text, samples.batch([0, 9], draws(2, step))["text"].float())
        for index, value in zip((0, 9), text[:, 0].tolist(), strict=True):
            seen[index].append(round(10 * value))
    assert {index: set(found) for index, found in seen.items()} == lengths
    assert 15 < seen[9].count(6) < 45
    # The choice belongs to a position in the batch, whoever its neighbours are.
    alone = Samples(rows, method, cache="off").batch([9], draws(1, 3))["text"]
    assert torch.equal(alone[0], samples.batch([9, 0], draws(2, 3))["text"][0])


def test_without_alternatives_nothing_is_drawn(tmp_path, magic, omni):
    for folder, kind, drawn in ((magic, "magicbrush", False), (omni, "omniedit", True)):
        numbers = draws(2)
        Samples(open_data(config(folder, kind)), toy.Toy()).batch([0, 1], numbers)
        assert torch.equal(numbers.uniform(), draws(2).uniform()) is not drawn


def test_training_is_the_same_with_every_cache_and_with_workers(tmp_path):
    rows = open_data(config(shards.mix(tmp_path), "icedit"))
    batches = [[0, 9], [5, 4], [7, 7], [9, 0]]
    plain = Samples(rows, toy.Toy(), caption_dropout=0.3)
    for options in (
        {"cache": "off"},
        {"cache": "off", "workers": 2},
        {"cache": "disk", "folder": tmp_path / "cache"},
    ):
        samples = Samples(rows, toy.Toy(), caption_dropout=0.3, **options)
        loaded = list(samples.stream(batches))
        for step, (one, other) in enumerate(zip(loaded, plain.stream(batches), strict=True)):
            a, b = samples.batch(one, draws(2, step)), plain.batch(other, draws(2, step))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
