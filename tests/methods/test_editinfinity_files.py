"""EditInfinity's own files: what its scripts save is loaded and edited with, and what is learnt here is written as they read it."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_infinity import BITS, SIZE
from typer.testing import CliRunner

from pentimento import cli, data, editing, files, generation, images, lookup, preview, recipe, run, schema
from pentimento.adapters import ExpertLoRA, LoRA
from pentimento.data import DataConfig
from pentimento.draws import Draws
from pentimento.errors import UserError
from pentimento.export import export
from pentimento.flux.config import FluxConfig
from pentimento.infinity import authored, pyramids
from pentimento.infinity.backbone import Codes, Infinity
from pentimento.infinity.config import OFFICIAL, InfinityConfig
from pentimento.infinity.scales import Schedule
from pentimento.method import EditSettings, Example
from pentimento.methods.editinfinity import EditInfinity, FeedForwardLoRA

CAPTION, WANTED = "a cat on a red mat", "a dog on a red mat"
LORA, ROWS = "lora_weight/lora_weight_2iter.pt", "trained_language_style_embedding/embedding_it0.pth"
METHOD = "method=editinfinity"


@pytest.fixture(scope="module")
def on(tiny_infinity: Path) -> list[str]:
    return [f"backbone.weights={tiny_infinity}", "backbone.device=cpu"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file)
    return file


def settings(on: list[str], photo: Path, *more: str) -> list[str]:
    """A rank other than published and a high rate, so that two steps make a difference."""
    return [
        *on, f"data.root={photo}", f"config.source_prompt={CAPTION}", "config.lora.rank=2", "backbone.attention_bias=false",
        "config.cfg=1", "stages.prompt.accumulate=1", "stages.lora.accumulate=1", "stages.prompt.steps=1", "stages.lora.steps=2",
        "stages.prompt.lr=0.05", "stages.lora.lr=0.05", "stages.lora.save_every=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(on: list[str], photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run; do not write to it."""
    plan = recipe.load("editinfinity", settings(on, photo))
    return run.train_run(plan, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def case(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was trained, as their scripts read it; do not write to it."""
    folder = tmp_path_factory.mktemp("cases") / "case"
    said = dict(export(trained, "editinfinity", folder).lines)
    assert said["rank"].startswith("2; set lora_r=2") and "biases" not in said
    return folder


@pytest.fixture
def own(case: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(case, tmp_path / "own"))


def theirs(place: Path, on: list[str], *more: str) -> run.Editor:
    return run.load(place, overrides=[METHOD, *on, "config.cfg=1", *more])


def rewritten(file: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(file, weights_only=True)
    torch.save(change(content), file)


def flattened(factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.flatten() for key, value in factors.items()}


def test_a_case_holds_what_their_scripts_ask_for(case: Path, trained: Path) -> None:
    rows = torch.load(case / ROWS, weights_only=True)
    assert isinstance(rows, torch.nn.Parameter) and rows.shape == (1, 512, 32) and rows.dtype == torch.float32
    learnt = run.load(trained).method.adapters.tensors["prompt"]
    assert torch.equal(rows[0, :20], learnt) and not rows[0, 20:].any() and learnt.any()
    factors = torch.load(case / LORA, weights_only=True)
    assert len(factors) == 16 and factors["block_chunks.1.module.0.ffn.fc2.lora_B"].shape == (32, 2)


def test_both_files_are_the_same_edit(
    case: Path, own: Path, trained: Path, on: list[str], photo: Path
) -> None:
    """As they are here, and flat, as several GPUs leave them."""
    wanted = run.load(trained).edit(photo, instruction=WANTED)
    assert theirs(case, on).edit(photo, instruction=WANTED) == wanted
    request = generation.Request(
        what=str(case), pictures=(str(photo),), prompts=(WANTED,), options=editing.Options(), out=own / "made.png",
        variants=editing.variants(seed=0, count=1, scales="1", steps=None), overrides=(METHOD, *on, "config.cfg=1"),
    )  # fmt: skip
    made = next(iter(generation.carry_out(request, lambda text: None)))
    assert images.open_image(made) == wanted  # no --source is needed
    rewritten(own / LORA, flattened)
    editor = theirs(own, on, "config.lora.rank=2")
    assert editor.edit(photo, instruction=WANTED) == wanted
    assert "embedding_it0.pth and lora_weight_2iter.pt" in editor.notes[0]
    assert wanted != editor.edit(photo, instruction=WANTED, scale=0)


def test_either_file_alone(case: Path, on: list[str], trained: Path) -> None:
    """A LoRA goes without rows and without what they follow; rows go with a LoRA that does nothing."""
    state = run.load(trained).method.adapters.state_dict()
    lora = theirs(case / LORA, on).method.adapters.state_dict()
    assert not lora["tensors"]
    assert all(torch.equal(value, state["lora"][key]) for key, value in lora["lora"].items())
    editor = theirs(case / ROWS, on)
    rows = editor.method.adapters.state_dict()
    assert torch.equal(rows["tensors"]["prompt"], state["tensors"]["prompt"])
    assert not any(value.any() for key, value in rows["lora"].items() if ".lora_B." in key)
    assert editor.notes[0].startswith("embedding_it0.pth") and "alpha" not in editor.notes[0]


def test_iterations(own: Path, on: list[str]) -> None:
    """The last ones, unless another number is named."""
    earlier = own / "lora_weight" / "lora_weight_1iter.pt"
    shutil.copyfile(own / LORA, earlier)
    rewritten(earlier, lambda factors: {key: torch.ones_like(value) for key, value in factors.items()})
    assert lookup.find(own, overrides=[METHOD, *on]).theirs.files["lora"] == own / LORA  # type: ignore[union-attr]
    found = lookup.find(own, at=1, overrides=[METHOD, *on])
    assert found.theirs is not None and found.theirs.files["lora"] == earlier
    with pytest.raises(UserError, match=r"--at 3: .* saved iterations: 1, 2"):
        lookup.find(own, at=3, overrides=[METHOD, *on])


def test_what_does_not_fit_is_named(own: Path, on: list[str]) -> None:
    with pytest.raises(UserError, match="20 rows are learnt, but config.rows is 3"):
        theirs(own, on, "config.rows=3")
    with pytest.raises(UserError, match="not known: 8 keys"):
        theirs(own, on, "config.lora.targets=.*ffn.fc1")
    with pytest.raises(UserError, match="does not say by which method"):
        run.load(own, overrides=on)
    rewritten(own / LORA, flattened)
    with pytest.raises(UserError, match=r"is of rank 2, the adapter of rank 4; set lora.rank=2"):
        theirs(own, on)
    rewritten(own / ROWS, lambda rows: rows[:, :, :24])
    with pytest.raises(UserError, match="its rows are 24 wide, but the text features of the model are 32"):
        theirs(own, on, "config.lora.rank=2")
    rewritten(own / ROWS, lambda rows: rows[0, 0])
    with pytest.raises(UserError, match=r"a tensor of the shape \(24,\)"):
        theirs(own, on, "config.lora.rank=2")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of a pickle was run",))


def test_code_in_a_file_is_not_run(own: Path, on: list[str]) -> None:
    for name in (LORA, ROWS):
        torch.save(Bomb(), own / name)
        with pytest.raises(UserError, match="could run code"):
            theirs(own, on)


def inspected(place: Path) -> str:
    result = CliRunner().invoke(cli.app, ["inspect", str(place)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_inspect(own: Path) -> None:
    said = inspected(own)
    assert "lora_weight_2iter.pt" in said and "Infinity by the names of its layers" in said
    assert "32 in all of EditInfinity's scripts" in said and "rank        2\n" in said
    rewritten(own / LORA, flattened)
    said = inspected(own / LORA)
    assert (
        "the factors are flat" in said
        and "A of 64 and 128 numbers" in said
        and "4 x transformer.block" in said
    )
    said = inspected(own / ROWS)
    assert "20 learnt, of width 32" in said and "alpha" not in said


def test_training_goes_on_from_their_files(case: Path, on: list[str], photo: Path) -> None:
    plan = recipe.load("editinfinity", settings(on, photo))
    preview.check_start(plan, case)
    method = EditInfinity.load(plan.backbone, plan.config)
    lookup.begin(method, case)
    lora = torch.load(case / LORA, weights_only=True)
    assert all(
        torch.equal(value, lora[key.removesuffix(".weight")])
        for key, value in method.adapters.state_dict()["lora"].items()
    )
    with pytest.raises(UserError, match="of lora only; prompt is missing"):
        preview.check_start(plan, case / LORA)
    preview.check_start(
        recipe.load("editinfinity", settings(on, photo, "config.rows=0", "stages.prompt=null")), case / LORA
    )


def test_another_alpha_is_in_b(trained: Path, tmp_path: Path) -> None:
    plain = (trained / "recipe.yaml").read_text()
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    (copy / "recipe.yaml").write_text(plain.replace("alpha: 32.0", "alpha: 8.0"))
    done = export(copy, "editinfinity", tmp_path / "case")
    assert dict(done.lines)["alpha"] == "8 is in B now: right with lora_alpha=32 there"
    state = run.load(trained).method.adapters.state_dict()["lora"]
    for key, value in torch.load(tmp_path / "case" / LORA, weights_only=True).items():
        own = state[f"{key}.weight"]
        assert torch.equal(value, own / 4 if key.endswith("lora_B") else own)
    with pytest.raises(UserError, match="is there already"):
        export(copy, "editinfinity", tmp_path / "case")


def test_what_cannot_be_handed_over(trained: Path, photo: Path, on: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes a run folder of editinfinity, or a picture"):
        export(trained / "weights", "editinfinity", tmp_path / "out")
    with pytest.raises(UserError, match="say what the picture shows"):
        export(photo, "editinfinity", tmp_path / "out", on)
    with pytest.raises(UserError, match="entries must be at least 1"):
        export(photo, "editinfinity", tmp_path / "out", [*on, "entries=0"])
    assert not (tmp_path / "out").exists()


def test_a_picture_becomes_a_case(photo: Path, on: list[str], infinity: Infinity, tmp_path: Path) -> None:
    out = tmp_path / "case"
    export(photo, "editinfinity", out, [*on, f"config.source_prompt={CAPTION}", "entries=3"])
    assert (out / "prompt" / "original_image_prompt.txt").read_text() == f"{CAPTION}\n"
    lines = (out / "splits" / "1.000_000000003.jsonl").read_text().splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1
    assert json.loads(lines[0]) == {
        "image_path": str(out / "image" / "original_image.jpg"), "h_div_w": 1.0, "long_caption": CAPTION,
        "long_caption_type": "caption-InternVL2.0", "text": CAPTION, "short_caption_type": "blip2_caption",
    }  # fmt: skip
    codes, schedule = pyramids.read(out)
    picture = images.resize(images.open_image(out / "image" / "original_image.jpg"), (256, 256))
    expected = infinity.encode_images([picture], schedule)
    assert schedule == Schedule.of(1.0, SIZE)
    for got, wanted in zip((*codes.bits, *codes.codes), (*expected.bits, *expected.codes), strict=True):
        assert torch.equal(got, wanted)
    (row,) = data.open_data(DataConfig(root=str(out), kind="infinity", held_out=0))
    assert row.prompts == (CAPTION,) and row.load().source is not None
    assert "7 scales" not in inspected(out / "each_scale_code")
    with pytest.raises(UserError, match="is there already"):
        export(photo, "editinfinity", out, [*on, f"config.source_prompt={CAPTION}"])


@pytest.fixture
def pyramid(infinity: Infinity, tmp_path: Path) -> Codes:
    """Of features that are no picture's, in folder ``codes``; tall, so that rows and columns differ."""
    features = torch.randn(1, BITS, 21, 14, generator=torch.Generator().manual_seed(0))
    codes = infinity.quantize(features, Schedule.of(1.5, SIZE))
    pyramids.write(tmp_path / "codes", codes)
    return codes


def test_codes_are_read_back_with_their_bits(pyramid: Codes, tmp_path: Path) -> None:
    assert torch.load(tmp_path / "codes" / "each_scale_code_0.pt", weights_only=True).shape == (
        1,
        BITS,
        1,
        21,
        14,
    )
    codes, schedule = pyramids.read(tmp_path / "codes")
    assert schedule == Schedule.of(1.5, SIZE)
    for got, wanted in zip((*codes.bits, *codes.codes), (*pyramid.bits, *pyramid.codes), strict=True):
        assert torch.equal(got, wanted)
    assert "21x14" in inspected(tmp_path / "codes") and f"{BITS} per token" in inspected(tmp_path / "codes")


def test_broken_codes(pyramid: Codes, tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    fifth = folder / "each_scale_code_5.pt"
    kept = fifth.read_bytes()
    rewritten(fifth, lambda code: code * 2)
    with pytest.raises(UserError, match="is not made of bits on 15 x 10 tokens"):
        pyramids.read(folder)
    rewritten(fifth, lambda code: code[:, :, 0])
    with pytest.raises(UserError, match="holds no codes of one picture"):
        pyramids.read(folder)
    torch.save(Bomb(), fifth)
    with pytest.raises(UserError, match="could run code"):
        pyramids.read(folder)
    fifth.unlink()
    with pytest.raises(UserError, match="each_scale_code_5.pt is missing"):
        pyramids.read(folder)
    files.write(fifth, kept)
    (folder / "each_scale_code_6.pt").unlink()
    with pytest.raises(UserError, match="no schedule of Infinity has 6 scales"):
        pyramids.read(folder)


def test_given_codes_are_blended_in(
    infinity: Infinity, pyramid: Codes, picture: Callable[..., Image.Image]
) -> None:
    """Outside of an empty region nothing but they counts."""
    edit = EditInfinity(infinity, EditInfinity.Config(source_prompt=CAPTION, cfg=1.0))
    nothing = Image.new("L", (14 * 16, 21 * 16))
    example = Example(source=picture(0, *nothing.size), prompt=WANTED, mask=nothing, extra={"codes": pyramid})
    (expected,) = infinity.decode(torch.stack(pyramid.codes).sum(0))
    assert np.abs(np.asarray(edit.edit(example, EditSettings()), float) - expected).max() <= 1
    square = Example(source=picture(0), prompt=WANTED, mask=Image.new("L", (64, 64)), extra=example.extra)
    with pytest.raises(UserError, match=r"codes: they have 7 scales up to \(21, 14\) tokens"):
        edit.edit(square, EditSettings())


def test_splits(tmp_path: Path) -> None:
    """Equal lines are one; a picture with two captions has both, of which one is drawn for each step."""
    for name in ("a", "b"):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.png")
    lines = [
        {
            "image_path": "a.png",
            "h_div_w": 1.0,
            "long_caption": "long",
            "text": "short",
            "long_caption_type": "x",
        },
        {"image_path": "b.png", "long_caption": "one", "text": "one", "source_of_it": "web"},
    ]
    folder = tmp_path / "splits"
    folder.mkdir()
    text = "".join(
        json.dumps({**line, "image_path": str(tmp_path / str(line["image_path"]))}) + "\n" for line in lines
    )
    (folder / "1.000_000001000.jsonl").write_text(text * 3)
    (folder / "0002_parts").mkdir()
    for root in (tmp_path, folder, folder / "1.000_000001000.jsonl"):
        rows = data.open_data(DataConfig(root=str(root), kind="infinity", held_out=0))
        assert [row.key for row in rows] == ["a", "b"]
        assert [row.prompts for row in rows] == [("long", "short"), ("one",)]
        assert [row.extra for row in rows] == [{}, {"source_of_it": "web"}]
    broken = folder / "1.000_000001000.jsonl"
    broken.write_text('{"h_div_w": 1.0}\n[1]\n{"image_path": "c.png"}\n')
    with pytest.raises(UserError, match="3 lines cannot be used") as caught:
        data.open_data(DataConfig(root=str(folder), kind="infinity", held_out=0))
    for said in (
        "line 1: has no image_path",
        "line 2: is not a JSON object",
        "line 3: there is no picture c.png",
    ):
        assert said in str(caught.value)
    broken.write_text(json.dumps({"image_path": str(tmp_path / "a.png")}))
    with pytest.raises(UserError, match="no prompt for 1 of 1 pair.*long_caption and text"):
        data.open_data(DataConfig(root=str(folder), kind="infinity", held_out=0))


def losses(
    edit: EditInfinity, features: torch.Tensor, *rows: int, step: int = 1
) -> tuple[float, torch.Tensor]:
    """Of these rows of a batch as the loop computes them, and the gradient of a factor."""
    draws = Draws([(0, "lora", step, row) for row in rows], torch.device("cpu"))
    encoded = edit.encode_text([""])
    text = {key: value.expand(len(rows), *value.shape[1:]) for key, value in encoded.items()}
    edit.adapters.train("lora")
    edit.adapters.drop(draws.seeds)
    (_, loss), *_ = edit.losses({"features": features[list(rows)], **text}, draws)
    loss.backward()
    edit.adapters.drop(())
    factor = next(p for p in edit.adapters.parameters("lora") if p.grad is not None and p.grad.any())
    gradient, factor.grad = factor.grad, None
    return float(loss.detach()), gradient


def test_what_is_dropped_depends_on_step_and_row_alone(infinity: Infinity) -> None:
    """Not on how a batch is divided, nor on what was drawn before; with activations recomputed it is the same."""
    config = EditInfinity.Config(source_prompt=CAPTION, drop_path=0.5, text_dropout=0.5)
    edit = EditInfinity(infinity, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in edit.adapters.parameters("lora"):
        parameter.data.normal_(0, 0.3, generator=generator)
    features = torch.randn(2, BITS, 16, 16, generator=generator)
    both, first, second = (losses(edit, features, *rows) for rows in ((0, 1), (0,), (1,)))
    assert both[0] == pytest.approx((first[0] + second[0]) / 2, rel=1e-5)
    torch.testing.assert_close(both[1], (first[1] + second[1]) / 2, rtol=1e-4, atol=1e-6)
    infinity.transformer.checkpointing = 1.0
    again = losses(edit, features, 0, 1)
    assert again[0] == pytest.approx(both[0]) and torch.allclose(again[1], both[1], rtol=1e-4, atol=1e-6)
    assert losses(edit, features, 0, 1, step=2)[0] != pytest.approx(both[0])


def test_lora_dropout_is_of_training_alone(infinity: Infinity) -> None:
    """Its share of the inputs, made up for in the others, each by its seed."""
    edit = EditInfinity(infinity, EditInfinity.Config(lora=FeedForwardLoRA(dropout=0.25)))
    layer = infinity.transformer.block_chunks[0].module[0].ffn.fc1.lora_dropout["lora"]  # type: ignore[index, union-attr]
    x = torch.ones(4, 50, 32)
    assert torch.equal(layer(x), x)
    edit.adapters.drop((1, 2))
    dropped = layer(x)
    assert sorted(set(dropped.flatten().tolist())) == [0.0, pytest.approx(4 / 3)]
    assert abs(float(dropped.mean()) - 1) < 0.05
    # A method may predict for several states of a row at once.
    assert torch.equal(dropped[:2], layer(x[:2])) and not torch.equal(dropped[:2], dropped[2:])
    other = infinity.transformer.block_chunks[0].module[1].ffn.fc1.lora_dropout["lora"]  # type: ignore[index, union-attr]
    assert not torch.equal(other(x), dropped)
    edit.adapters.drop(())
    assert torch.equal(layer(x), x)


def test_mistakes_of_dropout() -> None:
    for kind in (LoRA, FeedForwardLoRA):
        with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
            kind(targets="x", dropout=1.0)
    with pytest.raises(ValueError, match="no part in layers with experts"):
        ExpertLoRA(targets="x", dropout=0.1)
    with pytest.raises(ValueError, match="drop_path must be"):
        EditInfinity.Config(drop_path=1.0)


def test_a_stage_can_be_left_out() -> None:
    plan = recipe.load("editinfinity", ["config.rows=0", "stages.prompt=null"])
    assert list(plan.stages) == ["lora"]
    with pytest.raises(UserError, match="there is no stage 'promt'. Did you mean prompt"):
        recipe.load("editinfinity", ["stages.promt=null"])


@pytest.mark.parametrize(
    ("config", "said", "head"),
    [
        (InfinityConfig(weights=OFFICIAL), "published under the MIT License", "license: mit"),
        (InfinityConfig(weights="infinity_2b_reg.pth"), "If they are the published ones", ""),
        (InfinityConfig(), "pocket models (Apache-2.0)", ""),
        (FluxConfig(weights="black-forest-labs/FLUX.1-dev"), "under the same licence", "license: other"),
        (FluxConfig(weights="folder"), "If the weights are FLUX.1 [dev]", "library_name: diffusers"),
        (FluxConfig(), "pocket models (Apache-2.0)", "library_name: diffusers"),
    ],
)
def test_licences(config: Any, said: str, head: str) -> None:
    about = config.about()
    assert said in about.licence and (not head or head in about.front)
    assert "flux" not in about.licence.lower() or config.family == "flux"


def test_the_card_of_a_run(trained: Path) -> None:
    card = (trained / "README.md").read_text()
    assert "FLUX" not in card and "load_lora_weights" not in card and "library_name" not in card
    assert (
        "--to editinfinity" in card and "MIT License" in card and "infinity, weights `tiny-infinity`" in card
    )


def test_keys_of_the_page_exist() -> None:
    """Every setting that docs/editinfinity.md names is one of the recipes'."""
    page = (Path(__file__).parents[2] / "docs" / "editinfinity.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"\b(?:config|backbone|data|stages\.(?:NAME|prompt|lora))\.[a-z_]+(?:\.[a-z_]+)?", page)
    )
    known = _keys(schema.plain(recipe.load("editinfinity")))
    assert len(named) > 30
    assert {name.replace("stages.NAME", "stages.lora") for name in named} <= known


def _keys(value: Any, path: str = "") -> set[str]:
    """Dotted keys of nested mappings, those of sections too."""
    if not isinstance(value, dict):
        return {path}
    return {path}.union(*(_keys(inner, f"{path}.{key}".strip(".")) for key, inner in value.items()))


def test_pickles_hold_nothing_but_tensors() -> None:
    content = torch.load(io.BytesIO(authored.rows_bytes(torch.ones(20, 4))), weights_only=True)
    assert content.shape == (1, 512, 4) and content[0, :20].eq(1).all() and not content[0, 20:].any()
