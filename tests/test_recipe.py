"""Recipes: what is written is read back, and every mistake is answered with where, what and how."""

import dataclasses
from pathlib import Path

import pytest
import torch
from toy import Toy

from pentimento import recipe, schema
from pentimento.adapters import ExpertLoRA, LoRA
from pentimento.errors import UserError
from pentimento.flux.config import FluxConfig
from pentimento.flux.dev import ATTENTION
from pentimento.flux.dev import LARGEST_NATIVE as LARGEST_SLIDER
from pentimento.infinity.config import InfinityConfig
from pentimento.method import LARGEST_SEED, EditSettings
from pentimento.methods.influxedit import LARGEST_NATIVE
from pentimento.recipe import Recipe
from pentimento.recipes import shipped

OTHER = """\
method: test_recipe:Bits
data:
  root: pairs
config: {}
stages:
  edit:
    train: [content]
    steps: 10
"""


class Bits(Toy):
    """A method of one's own on another base model."""

    family = "infinity"


PLAIN = """\
method: influxedit
data:
  root: pairs
stages:
  edit:
    train: [edit]
    steps: 10
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN)
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe.load(path, overrides)
    return str(caught.value)


def mistake_in(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return mistake(path, *overrides)


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_recipe_loads_and_says_what_it_is_for(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.about == shipped()[name] != ""
    assert loaded.backbone.weights == "pocket"


@pytest.mark.parametrize("name", ["influxedit-edit", "influxedit-split"])
def test_published_values_of_influxedit(name: str) -> None:
    loaded = recipe.load(name, ["backbone.weights=black-forest-labs/FLUX.1-Fill-dev"])
    config, stage = loaded.config, loaded.stages["edit"]
    assert config.mode == name.removeprefix("influxedit-")
    assert (config.lora.rank, config.lora.alpha, config.lora.init) == (
        16,
        None,
        "gaussian",
    )  # null: alpha = rank
    assert (config.guidance, config.sampling_guidance) == (1.0, 30.0)
    # null: what the model was made for, at most this. FLUX.1 was made for 1024.
    assert (config.resolution, LARGEST_NATIVE) == (None, 256)
    assert (config.weighting_scheme, config.mask, config.train_embedder) == ("none", "white", False)
    assert (stage.optimizer, stage.lr, stage.schedule, stage.warmup) == ("prodigy", 1.0, "constant", 0)
    assert (stage.batch_size, stage.accumulate, stage.max_grad_norm) == (1, 4, 1.0)
    assert (stage.betas, stage.eps, stage.weight_decay) == ((0.9, 0.999), 1e-8, 1e-4)


PAIREDIT = {
    "pairedit": (True, "direction", "preserving"),
    "pairedit-no-content": (False, "direction", "preserving"),
    "pairedit-no-direction": (True, "reconstruction", "preserving"),
    "pairedit-no-direction-target": (True, "target", "preserving"),
    "pairedit-flow": (True, "direction", "flow"),
}


def check_published_slider(name: str, trained: tuple[str, ...], steps: int, grid: int) -> recipe.Recipe:
    """What PairEdit, its ablations, its baselines and inversion have in common."""
    loaded = recipe.load(name, ["backbone.weights=black-forest-labs/FLUX.1-dev"])
    config, (stage,) = loaded.config, loaded.stages.values()
    assert (config.lora.rank, config.lora.alpha, config.lora.scaled / config.lora.rank) == (16, 1.0, 1 / 16)
    assert config.lora.targets == ATTENTION
    assert (config.guidance, config.steps, config.prompt) == (3.5, grid, "image of a person")
    # null: what the model was made for, at most this. FLUX.1 was made for 1024. Texts of 512 tokens likewise.
    assert (config.resolution, LARGEST_SLIDER, config.shape) == (None, 512, "square")
    assert (config.training_prompt, config.max_sequence_length) == ("", None)
    assert (config.weight, config.combine, config.until) == (0.75, "velocity", None)
    assert (stage.train, stage.steps, stage.optimizer, stage.lr) == (trained, steps, "adamw", 0.002)
    assert (stage.batch_size, stage.accumulate, stage.max_grad_norm, stage.schedule, stage.warmup) == (
        1, 1, 0.0, "constant", 0,
    )  # fmt: skip
    assert (stage.betas, stage.eps, stage.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert loaded.data.held_out == 0
    return loaded


@pytest.mark.parametrize("name", PAIREDIT)
def test_published_values_of_pairedit(name: str) -> None:
    content, semantic, noising = PAIREDIT[name]
    trained = ("content", "semantic") if content else ("semantic",)
    config = check_published_slider(name, trained, 500, 28).config
    assert (config.content, config.semantic, config.noising) == (content, semantic, noising)
    assert (config.eta, config.noise_scale, config.posterior, config.skip) == (4.0, 1.0, "sample", 14)
    assert (config.start_step, config.last_step, config.lora.init) == (0, 27, "kaiming")


def test_published_values_of_the_baselines_and_of_inversion() -> None:
    image = check_published_slider("image-slider", ("semantic",), 500, 28).config
    assert (image.noising, image.start_step, image.last_step, image.skip) == ("flow", 0, 27, 14)
    inversion = check_published_slider("inversion", ("content",), 1500, 28)
    assert (inversion.config.noising, inversion.config.last_step, inversion.data.kind) == (
        "flow",
        27,
        "picture",
    )
    assert inversion.config.skip == -1, "in all steps"
    words = check_published_slider("text-slider", ("semantic",), 1000, 30)
    assert (words.config.eta, words.config.renormalise, words.config.lora.init) == (2.0, True, "orthogonal")
    texts = (words.config.target, words.config.positive, words.config.negative)
    assert texts == (
        "picture of a person", "photo of a person, smiling, happy", "photo of a person, frowning",
    )  # fmt: skip
    assert words.data.kind == "none"


@pytest.mark.parametrize("write", [recipe.dump, recipe.explain])
@pytest.mark.parametrize("name", list(shipped()))
def test_a_written_recipe_loads_back_equal(name: str, write, tmp_path: Path) -> None:
    stage = next(iter(recipe.load(name).stages))
    changes = [
        f"stages.{stage}.keep_steps=[3, 5]",
        "data.kind=pairs",
        'data.prompt=no: #1 "ü"',
        f"stages.{stage}.weight_decay=1e-7",
        "seed=7",
    ]
    loaded = recipe.load(name, changes)
    (tmp_path / "again.yaml").write_text(write(loaded), encoding="utf-8")
    assert recipe.load(tmp_path / "again.yaml") == loaded


def test_every_field_is_documented_once_at_the_field() -> None:
    loaded = recipe.load("influxedit-edit")
    sections = [
        loaded,
        loaded.backbone,
        loaded.data,
        loaded.config,
        loaded.config.lora,
        loaded.stages["edit"],
        loaded.watch,
    ]
    for section in sections:
        meanings = schema.docs(type(section))
        bare = [f.name for f in dataclasses.fields(section) if not meanings.get(f.name)]
        assert not bare, f"{type(section).__name__}: {bare}"
        explained = " ".join(line.strip(" #") for line in recipe.explain(loaded).splitlines())
        assert all(meaning in explained for meaning in meanings.values())


def test_overrides_are_typed_as_yaml_and_the_last_one_wins(plain: Path) -> None:
    loaded = recipe.load(
        plain,
        ["stages.edit.steps=20", "stages.edit.steps=30", "stages.edit.lr=2e-3", "data.prompt=add a hat", "data.limit=null",
         "config.lora.rank=4", "backbone.compile=true", "stages.edit.train=[edit]", "watch={every: 5, count: 2}"],
    )  # fmt: skip
    stage = loaded.stages["edit"]
    assert (stage.steps, stage.lr, stage.train) == (30, 0.002, ("edit",))
    assert (loaded.data.prompt, loaded.data.limit, loaded.data.root) == ("add a hat", None, "pairs")
    assert loaded.config.lora.rank == 4
    assert loaded.backbone.compile is True
    assert (loaded.watch.every, loaded.watch.count) == (5, 2)


def test_text_is_taken_as_it_stands(plain: Path, tmp_path: Path) -> None:
    prompt = "Before: {a}, after: [b] #1 - yes!"
    loaded = recipe.load(
        plain, [f"data.prompt={prompt}", "data.root=2026-01-01", "data.cache=off", "about='quoted'"]
    )
    assert (loaded.data.prompt, loaded.data.root, loaded.data.cache) == (prompt, "2026-01-01", "off")
    assert loaded.about == "quoted"
    (tmp_path / "mine.yaml").write_text(PLAIN.replace("root: pairs", "root: no\n  cache: off"))
    assert recipe.load(tmp_path / "mine.yaml").data == dataclasses.replace(
        loaded.data, root="no", prompt=None
    )
    (tmp_path / "again.yaml").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "again.yaml") == loaded


def test_an_override_makes_the_sections_it_needs(plain: Path) -> None:
    assert recipe.load(plain, ["backbone.device=cpu"]).backbone == FluxConfig(device="cpu")


def test_a_run_folder_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(PLAIN)
    assert recipe.load(tmp_path) == recipe.load(tmp_path / "recipe.yaml")


def test_a_method_of_ones_own_is_named_by_its_dotted_path(plain: Path) -> None:
    named = recipe.load(plain, ["method=pentimento.methods.influxedit:InFluxEdit"])
    assert dataclasses.replace(named, method="influxedit") == recipe.load(plain)


def test_an_unknown_key_names_the_nearest_one_and_its_meaning(plain: Path) -> None:
    said = mistake(plain, "stages.edit.stps=3")
    assert "override stages.edit.stps=3" in said
    assert "stages.edit.stps is not a known key" in said
    assert "Did you mean steps?" in said
    assert schema.docs(type(recipe.load(plain).stages["edit"]))["steps"] in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sed=1", ["sed is not a known key", "seed"]),
        ("data.rot=x", ["data.rot is not a known key", "Did you mean root?"]),
        ("config.mod=edit", ["config.mod is not a known key", "Did you mean mode?"]),
        ("config.lora.rnak=4", ["config.lora.rnak", "Did you mean rank?"]),
        ("stages.edti.steps=3", ["no stage 'edti'", "Did you mean edit?"]),
        ("stages.edit.steps=many", ["whole number", "'many'"]),
        ("stages.edit.steps=2.5", ["whole number", "2.5"]),
        ("stages.edit.steps=true", ["whole number", "true"]),
        ("stages.edit.steps=", ["whole number", "nothing"]),
        ("stages.edit.lr=[1]", ["a number", "the list"]),
        ("stages.edit.train=edit", ["a list", "'edit'"]),
        ("stages.edit.optimizer=adam", ["adamw", "'adam'", "Did you mean adamw?"]),
        ("backbone.precision=half", ["fp16", "'half'"]),
        ("data.kind=pair", ["pairs, side_by_side, jsonl", "Did you mean pairs?"]),
        ("config.mode=edti", ["edit, split", "Did you mean edit?"]),
        ("data.root.x=1", ["data.root is the text 'pairs', not a section"]),
        ("stages=3", ["a section", "3"]),
        ("stages={}", ["stages is empty"]),
        ("config=3", ["config should be a section"]),
        ("stages.edit.steps=0", ["steps", "0"]),
        ("stages.edit.steps=-5", ["steps", "-5"]),
        ("stages.edit.warmup=11", ["warmup", "11"]),
        ("stages.edit.batch_size=0", ["batch_size", "0"]),
        ("stages.edit.train=[]", ["train"]),
        ("stages.edit.train=[semantic]", ["semantic", "edit"]),
        ("config.lora.rank=0", ["rank", "0"]),
        ("config.prompt_template=hello", ["prompt_template", "{prompt}"]),
        ("data.caption_dropout=2", ["caption_dropout", "2"]),
        ("watch.every=-1", ["every", "-1"]),
        ("watch.wandb=team/edits", ["wandb", "'team/edits'", "without any of /"]),
        ("watch.wandb=''", ["wandb", "1 to 128 characters"]),
        ("backbone.offload=cpu", ["none, model", "'cpu'"]),
        ("seed=-1", ["seed", "-1"]),
        ("seed=99999999999999999999999", ["seed must lie between 0 and", "99999999999999999999999"]),
        ("method=:X", ["':X' cannot be imported"]),
        ("method=.x:Y", ["'.x:Y' cannot be imported"]),
        ("stages=&s {edit: *s}", ["override value", "alias stands inside of itself"]),
        pytest.param("stages=" + "[" * 5000, ["override value", "nested too deeply"], id="nested"),
        ("stages={1: {train: [edit], steps: 1}}", ["stages has the key 1", "in quotes: '1'"]),
        ("method=influxedti", ["influxedti", "Did you mean influxedit?"]),
        ("method=no.such:Thing", ["no.such:Thing", "cannot be imported"]),
        ("method=pathlib:Path", ["not a Method"]),
        ("steps", ["key=value"]),
        ("a..b=1", ["key=value"]),
        ("data={root: [", ["override value", "not valid YAML"]),
    ],
)  # fmt: skip
def test_a_wrong_override_says_why(plain: Path, override: str, words: list[str]) -> None:
    said = mistake(plain, override)
    for word in words:
        assert word in said


def test_a_polynomial_schedule_begins_above_its_end(plain: Path) -> None:
    said = mistake(plain, "stages.edit.schedule=polynomial", "stages.edit.lr=1e-8")
    assert "override stages.edit.lr=1e-8: stages.edit.lr must be above 1e-07" in said
    assert recipe.load(plain, ["stages.edit.lr=1e-8"]).stages["edit"].lr == 1e-8


def test_the_largest_seed_can_be_counted_up_from(plain: Path) -> None:
    largest = recipe.load(plain, [f"seed={LARGEST_SEED}"]).seed
    torch.Generator().manual_seed(EditSettings(seed=largest + 1000).seed)
    with pytest.raises(UserError, match="seed must lie between"):
        EditSettings(seed=10**23)


def test_the_line_of_a_mistake_in_a_file_is_named(tmp_path: Path) -> None:
    said = mistake_in(tmp_path, PLAIN.replace("steps: 10", "steps: ten"))
    assert (
        "mine.yaml, line 7: stages.edit.steps should be a whole number, but the text 'ten' was given" in said
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: [influxedit\n", ["line 2, column 1", "not valid YAML"]),
        ("method: influxedit\n\tdata: x\n", ["line 2", "not valid YAML"]),
        (PLAIN + "seed: 1\nseed: 2\n", ["'seed' stands twice", "line 8"]),
        ("- a\n- b\n", ["mapping"]),
        ("", ["it is empty"]),
        ("# only a comment\n", ["it is empty"]),
        ("just words", ["mapping", "'just words'"]),
        (PLAIN.replace("method: influxedit\n", ""), ["method is missing"]),
        (PLAIN.replace("    steps: 10\n", ""), ["stages.edit.steps is missing"]),
        (PLAIN.split("stages")[0], ["stages is missing"]),
        ("stages: &s {edit: *s}\n", ["mine.yaml, line 1", "alias stands inside of itself"]),
        pytest.param(
            "a: " + "{a: " * 5000, ["mine.yaml: not valid YAML: it is nested too deeply"], id="nested"
        ),
        (PLAIN.replace("  edit:\n", "  1:\n"), ["mine.yaml, line 5: stages has the key 1", "in quotes: '1'"]),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, text: str, words: list[str]) -> None:
    said = mistake_in(tmp_path, text)
    for word in words:
        assert word in said


def test_a_wrong_name_lists_the_nearest_and_all() -> None:
    said = mistake(Path("influxedit-edti"))
    assert "Did you mean influxedit-edit?" in said
    assert all(name in said for name in shipped())


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in mistake(tmp_path / "binary.yaml")
    assert "without recipe.yaml" in mistake(tmp_path)


def test_merge_keys_and_numbers_without_a_point(tmp_path: Path) -> None:
    text = PLAIN.replace(
        "    steps: 10\n", "    steps: 10\n    lr: 2e-3\n    <<: {steps: 5, accumulate: 2}\n"
    )
    (tmp_path / "merged.yaml").write_text(text)
    stage = recipe.load(tmp_path / "merged.yaml").stages["edit"]
    assert (stage.steps, stage.lr, stage.accumulate) == (10, 0.002, 2)


def test_a_recipe_is_frozen(plain: Path) -> None:
    loaded: Recipe = recipe.load(plain)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.seed = 1  # type: ignore[misc]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """One of two sections."""

    lora: LoRA | ExpertLoRA = LoRA(targets="x")


def section(**lora: object) -> LoRA:
    return schema.parse(Layers, {"lora": lora}, schema.Origin(name="mine.yaml"), ("config",)).lora


def test_a_section_of_two_kinds_is_the_one_whose_keys_it_has() -> None:
    assert section(targets="x", rank=3) == LoRA(targets="x", rank=3)
    assert section(targets="x", experts=3) == ExpertLoRA(targets="x", experts=3)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"experts": "many"}, "config.lora.experts should be a whole number, but the text 'many' was given"),
        ({"experts": 4, "top_k": 5}, "top_k must be at most the number of experts"),
        ({"experts": 4, "gate": "softmax"}, "config.lora.gate should be one of topk-softmax, softmax-topk"),
        ({"expertz": 4}, "config.lora.expertz is not a known key"),
    ],
)
def test_a_mistake_in_a_section_of_two_kinds_does_not_make_it_the_other(lora, said) -> None:
    with pytest.raises(UserError, match=said):
        section(targets="x", **lora)


@pytest.mark.parametrize("name", ["a/b", "..", "-edit", "a.b", "two words", "'a\\\\b'", '""'])
def test_a_stage_is_named_so_that_its_checkpoints_are_found_again(tmp_path: Path, name: str) -> None:
    said = mistake_in(tmp_path, PLAIN.replace("edit:\n", f"{name}:\n"))
    assert "line 5" in said and "cannot be the name of a stage" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer=adamw"], "lr is 1, which adamw does not learn with; set lr=1e-4"),
        (["optimizer=adamw8bit"], "lr is 1, which adamw8bit"),
        (["lr=0.002"], "lr is 0.002, but prodigy multiplies its own estimate with it; set lr=1"),
        (["train=[edit, edit]"], "train names an adapter twice"),
        (["keep_steps=[700]"], "from 1 to 600, but it names 700"),
    ],
)
def test_a_rate_of_another_optimizer_and_settings_without_effect(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe.load("influxedit-edit", [f"stages.edit.{text}" for text in overrides])
    assert words in str(caught.value)


def test_a_rate_that_is_not_given_is_that_of_the_optimizer(tmp_path: Path) -> None:
    stage = recipe.load("influxedit-edit", ["stages.edit.optimizer=adamw", "stages.edit.lr=null"]).stages[
        "edit"
    ]
    assert (stage.lr, stage.peak) == (None, 1e-4)
    (tmp_path / "mine.yaml").write_text(PLAIN)
    assert recipe.load(tmp_path / "mine.yaml").stages["edit"].peak == 1e-4
    prodigy = recipe.load(tmp_path / "mine.yaml", ["stages.edit.optimizer=prodigy"])
    assert prodigy.stages["edit"].peak == 1


@pytest.mark.parametrize("name", ["edit_2", "2nd-part", "\u00e4ndern"])
def test_names_of_stages(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.yaml").write_text(PLAIN.replace("edit:\n", f"{name}:\n"), encoding="utf-8")
    assert list(recipe.load(tmp_path / "mine.yaml").stages) == [name]


def test_a_method_says_which_base_model_it_works_on(plain: Path, tmp_path: Path) -> None:
    assert recipe.load(plain).backbone.family == "flux"
    other = tmp_path / "other.yaml"
    other.write_text(OTHER)
    assert recipe.load(other).backbone == InfinityConfig()
    changed = ["backbone.tokenizer=a: b.pth", "backbone.attention_bias=false", "backbone.family=infinity"]
    loaded = recipe.load(other, changed)
    assert loaded.backbone == InfinityConfig(tokenizer="a: b.pth", attention_bias=False)
    for write in (recipe.dump, recipe.explain):
        other.write_text(write(loaded))
        assert recipe.load(other) == loaded
    assert list(loaded.backbone.notes()) == [
        "visual tokenizer from a: b.pth",
        "attention without the base model's biases, as in EditInfinity's code",
    ]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("backbone.family=infinity", ["backbone.family is infinity, but influxedit works on flux"]),
        ("backbone.family=infinty", ["one of flux, infinity", "'infinty'", "Did you mean infinity?"]),
        ("backbone.family=3", ["one of flux, infinity", "3 was given"]),
        ("backbone.tokenizer=x", ["backbone.tokenizer is not a known key", "transformer_file"]),
    ],
)
def test_mistakes_with_families(plain: Path, override: str, parts: list[str]) -> None:
    message = mistake(plain, override)
    assert all(part in message for part in [f"override {override}", *parts]), message
