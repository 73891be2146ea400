"""Adapters for other programs: what is written, how it is proven, and what is lost where experts are made plain."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pentimento
from pentimento import adapter_files, cli, distil, export, inspection, recipe, run
from pentimento.adapters import Adapters, ExpertLoRA, LoRA, spec_of
from pentimento.errors import UserError

NAME = "pytorch_lora_weights.safetensors"
METHOD = "toy_experts:Toy"


def record(file: Path) -> dict:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["pentimento"])


def said(result) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in result.stdout.splitlines()[:-1]}


@pytest.fixture(scope="module")
def scaled(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain run with alpha 3 at rank 2."""
    folder = tmp_path_factory.mktemp("runs") / "scaled"
    more = ["config.lora.alpha=3", "stages.edit.steps=1", "--out", str(folder)]
    result = CliRunner().invoke(
        cli.app, ["train", "influxedit-edit", *settings, *more], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return folder


def test_to_diffusers(call, trained: Path, tmp_path: Path) -> None:
    result = call("export", trained, "--to", "diffusers", "--out", "there")
    assert result.stdout.splitlines()[-1] == str(Path("there") / NAME)
    assert (
        "all equal, in the file and in the 30 layers of a new FluxTransformer2DModel" in said(result)["proof"]
    )
    ours, theirs = load_file(trained / "weights" / NAME), load_file(tmp_path / "there" / NAME)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(theirs[key], value) for key, value in ours.items()
    )
    assert inspection.inspect_file("there").alphas == {2.0: 30}


def test_a_scale_is_in_b_for_diffusers_too(call, scaled: Path, tmp_path: Path) -> None:
    """Loaders that read no metadata, as diffusers before 0.35, take alpha to be the rank."""
    call("export", scaled, "--to", "diffusers", "--out", "a")
    call("export", scaled, "--to", "comfyui", "--out", "b")
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_a_file_of_ours_without_its_run(call, refuse, scaled: Path, tmp_path: Path) -> None:
    """It knows its base model by name only; where that is no place, the proof has to be told one, as an edit has."""
    shutil.copyfile(scaled / "weights" / NAME, "mine.safetensors")
    message = refuse("export", "mine.safetensors", "--to", "diffusers", "--out", "a")
    assert "backbone.weights: there is no folder 'tiny-fill'" in message
    weights = recipe.load(scaled).backbone.weights
    result = call(
        "export", "mine.safetensors", f"backbone.weights={weights}", "--to", "diffusers", "--out", "b"
    )
    assert "in the file and in the 30 layers" in said(result)["proof"]


def test_to_comfyui(call, scaled: Path, tmp_path: Path) -> None:
    """Alpha 3 at rank 2 is in B, so that a reader without alpha is right; and an edit with the file is the same."""
    result = call("export", scaled, "--to", "comfyui", "--out", "comfy.safetensors")
    assert "60, each of a layer that ComfyUI's loader for FLUX maps" in said(result)["keys"]
    assert said(result)["alpha"] == "3 / rank 2 is in B now: a scale of 1 is right"
    theirs, ours = load_file("comfy.safetensors"), load_file(scaled / "weights" / NAME)
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        assert torch.equal(theirs[key], value * 1.5 if "lora_B" in key else value)
    assert inspection.inspect_file("comfy.safetensors").alphas == {2.0: 30}
    weights = recipe.load(scaled).backbone.weights
    again = pentimento.load("comfy.safetensors", weights=weights, device="cpu")
    first = pentimento.load(scaled)
    for a, b in zip(
        again.method.adapters.parameters("edit"), first.method.adapters.parameters("edit"), strict=True
    ):
        assert a.shape == b.shape
    layer = "transformer_blocks.0.attn.to_q"
    x = torch.randn(3, 32)
    for editor in (again, first):
        editor.method.adapters.use(edit=0.7)
    found = [editor.method.adapters.host.get_submodule(layer)(x) for editor in (again, first)]
    assert torch.allclose(*found, atol=1e-6)


def test_stock_diffusers_gives_the_same_with_and_without_alpha(
    call, scaled: Path, tiny_fill: Path, tmp_path: Path
) -> None:
    for to in ("diffusers", "comfyui"):
        call("export", scaled, "--to", to, "--out", to)
    save_file(
        load_file(tmp_path / "comfyui" / NAME), tmp_path / "bare.safetensors"
    )  # no metadata: alpha = rank
    x, found = torch.randn(3, 32), []
    for folder, name in (("diffusers", NAME), ("comfyui", NAME), (".", "bare.safetensors")):
        pipeline = FluxFillPipeline.from_pretrained(tiny_fill)
        pipeline.load_lora_weights(str(tmp_path / folder), weight_name=name)
        found.append(pipeline.transformer.transformer_blocks[0].attn.to_q(x))
    assert torch.allclose(found[0], found[1], atol=1e-6) and torch.equal(found[1], found[2])


def test_a_file_of_others(call, scaled: Path, tmp_path: Path) -> None:
    """Half precision, no prefix, alpha beside the factors, no word of the method."""
    tensors = load_file(scaled / "weights" / NAME)
    bare = {key.removeprefix("transformer."): value.bfloat16() for key, value in tensors.items()}
    layers = {key.removesuffix(".lora_A.weight") for key in bare if key.endswith("lora_A.weight")}
    save_file(
        {**bare, **{f"{layer}.alpha": torch.tensor(4.0) for layer in layers}}, tmp_path / "theirs.safetensors"
    )
    result = call("export", "theirs.safetensors", "--to", "diffusers", "--out", "a")
    assert "not put into the model, whose configuration is not at hand" in said(result)["proof"]
    written = load_file(tmp_path / "a" / NAME)
    assert written.keys() == tensors.keys() and {v.dtype for v in written.values()} == {torch.bfloat16}
    assert adapter_files.recorded_alpha(tmp_path / "a" / NAME, 0) == 2, "alpha 4 at rank 2 is in B now"
    given = {key: tensors[key].bfloat16() for key in written}
    assert all(torch.equal(written[k], v * 2 if "lora_B" in k else v) for k, v in given.items())
    call("export", "theirs.safetensors", "--to", "comfyui", "--out", "b")
    again = load_file(tmp_path / "b" / NAME)
    assert all(torch.equal(again[k], v) for k, v in written.items())


def test_modules_trained_whole(call, refuse, settings: list[str], tmp_path: Path) -> None:
    call(
        "train",
        "influxedit-edit",
        *settings,
        "stages.edit.steps=1",
        "config.train_embedder=true",
        "--out",
        "run",
    )
    result = call("export", "run", "--to", "diffusers", "--out", "a")
    assert "flux_x_embedder.safetensors" in said(result)["beside it"]
    whole = Path("weights") / "flux_x_embedder.safetensors"
    assert (tmp_path / "a" / whole.name).read_bytes() == (tmp_path / "run" / whole).read_bytes()
    assert "a module that was trained whole" in refuse("export", "run", "--to", "comfyui", "--out", "b")
    (tmp_path / "run" / whole).unlink()
    assert "flux_x_embedder.safetensors is missing" in refuse(
        "export", "run", "--to", "diffusers", "--out", "c"
    )
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


def test_mistakes(call, refuse, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "taken.safetensors").write_text("x")
    assert "is there already" in refuse("export", trained, "--to", "diffusers", "--out", "taken.safetensors")
    assert "known are diffusers, comfyui, lora" in refuse("export", trained, "--to", "kohya", "--out", "x")
    assert "no such file" in refuse("export", "nowhere", "--to", "diffusers", "--out", "x")
    assert "is a plain LoRA already" in refuse("export", trained, "--to", "lora", "--out", "x")
    file = trained / "weights" / NAME
    assert "needs the run folder" in refuse("export", file, "--to", "lora", "--out", "x")
    assert "cannot be written" in refuse("export", trained, "--to", "comfyui", "--out", "taken.safetensors/x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken.safetensors"]


def test_keys_that_comfyui_does_not_know(refuse, tmp_path: Path) -> None:
    factors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    tensors = {f"transformer.blocks.0.q.lora_{f}.weight": value for f, value in factors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    message = refuse("export", "a.safetensors", "--to", "comfyui", "--out", "x")
    assert "does not know 2 of 2 keys, such as transformer.blocks.0.q" in message


def test_a_proof_that_fails(trained: Path, tmp_path: Path) -> None:
    """A file that is not what was meant is found out."""
    source = trained / "weights" / NAME
    tensors, spec = load_file(source), spec_of(source)
    key = next(iter(tensors))
    with pytest.raises(UserError, match="reads other values"):
        export.prove(source, {**tensors, key: tensors[key] + 1}, spec, None)
    with pytest.raises(UserError, match="reads other keys"):
        export.prove(source, {**tensors, "more": tensors[key]}, spec, None)
    host = recipe.method_class("influxedit").outline(*_setup(trained)).adapters.host
    with pytest.raises(UserError, match="scales it by"):
        export.prove(source, tensors, LoRA(targets="x", rank=spec.rank, alpha=9.0), host)


def _setup(folder: Path) -> tuple:
    loaded = recipe.load(folder)
    return loaded.backbone, loaded.config


def toy(pairs: Path, *overrides: str, **lora: object) -> recipe.Recipe:
    """A recipe of the toy with experts."""
    plain = {
        "targets": ["first", "second"],
        "rank": 3,
        "expert_targets": "second",
        "experts": 3,
        "expert_rank": 4,
    }
    raw = {
        "method": METHOD,
        "data": {"root": str(pairs), "held_out": 2},
        "config": {"lora": {**plain, "gate": "softmax-topk", **lora}, "balance_weight": 0.01},
        "stages": {"edit": {"train": ["edit"], "steps": 80, "lr": 0.05, "batch_size": 2}},
        "backbone": {"device": "cpu"},
    }
    origin = recipe.override(raw, recipe.Origin(name="toy"), overrides)
    return recipe.build(raw, origin)


@pytest.fixture(scope="module")
def learnt(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the toy with experts; do not write to it."""
    return run.train_run(toy(pairs), tmp_path_factory.mktemp("runs") / "experts")


def test_experts_are_refused_elsewhere(refuse, learnt: Path) -> None:
    for to in ("diffusers", "comfyui"):
        message = refuse("export", learnt, "--to", to, "--out", "x")
        assert f"has experts (3 in a layer), which {to} does not know" in message
        assert f"pentimento export {learnt} --to lora --out FILE" in message


def test_experts_made_plain(call, learnt: Path, tmp_path: Path) -> None:
    """Distilling brings the prediction nearer to the original's than merging, and merging nearer than nothing."""
    result = call("export", learnt, "--to", "lora", "--out", "plain", "steps=150", "lr=0.02")
    file = tmp_path / "plain" / NAME
    about = record(file)["export"]
    error = about["error"]
    assert error["distilled"] < 0.9 * error["merged"] < 0.9 * error["base"]
    assert about["kept"] == "distilled"
    assert about["measured_on"] == "2 held-out pairs"
    lines = said(result)
    assert lines["base model"].startswith(f"{error['base']:.4f}")
    assert (
        lines["distilled"]
        == f"{error['distilled']:.4f}, {error['distilled'] / error['base']:.1%} of the base model's"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["plain"], "the work folder is gone"

    spec = spec_of(file)
    assert not isinstance(spec, ExpertLoRA) and (spec.rank, spec.scaled) == (4, 4.0)
    assert not inspection.inspect_file(file).experts and str(tmp_path) not in json.dumps(record(file))
    editor = pentimento.load(file)
    assert not isinstance(editor.method.adapters.specs["edit"], ExpertLoRA)
    row = toy_samples(learnt)
    original = pentimento.load(learnt)
    assert distance(editor, original, row) == pytest.approx(error["distilled"], rel=0.5)


def test_distilling_that_makes_it_worse_is_not_kept(call, learnt: Path, tmp_path: Path) -> None:
    merged = call("export", learnt, "--to", "lora", "--out", "merged", "steps=0")
    worse = call("export", learnt, "--to", "lora", "--out", "worse", "steps=3", "lr=0.1")
    about = record(tmp_path / "worse" / NAME)["export"]
    assert about["error"]["distilled"] > about["error"]["merged"] and about["kept"] == "merged"
    assert "distilling made it worse" in said(worse)["kept"] and "kept" not in said(merged)
    ours, theirs = (load_file(tmp_path / name / NAME) for name in ("merged", "worse"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def toy_samples(folder: Path):
    from pentimento.cache import Samples
    from pentimento.data import held_out, open_data

    loaded = recipe.load(folder)
    _, held = held_out(open_data(loaded.data), loaded.data)
    return Samples(held, recipe.method_class(METHOD).load(None, loaded.config))


def distance(one: run.Editor, other: run.Editor, samples) -> float:
    """Relative distance of two editors' predictions."""
    from pentimento.train import Draws

    keys = [(9, i) for i in range(2)]
    found = []
    for editor in (one, other):
        draws = Draws(keys, torch.device("cpu"))
        editor.method.adapters.use(edit=1.0)
        found.append(editor.method.predict(samples.batch([0, 1], draws), draws))
    return float((found[0] - found[1]).norm() / found[1].norm())


def test_only_merged(call, learnt: Path, tmp_path: Path) -> None:
    """With steps=0: by hand, the experts weighted by their mean gates; plain layers bit for bit; equal calls, equal files."""
    for name in ("a", "b"):
        call("export", learnt, "--to", "lora", "--out", name, "steps=0", "rank=12")
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()
    original = pentimento.load(learnt).method
    samples = toy_training(learnt)
    gates = distil.mean_gates(original, "edit", samples, 16, 0)["second"]
    assert float(gates.sum()) < 1, "softmax over all: the chosen one has a part of it"
    state, plain = original.adapters.state_dict()["edit"], load_file(tmp_path / "a" / NAME)
    a, b = state["second.lora_A.weight"].split(4, 0), state["second.lora_B.weight"].split(4, 1)
    wanted = sum(g * y @ x for g, x, y in zip(gates, a, b, strict=True))
    made = plain["transformer.second.lora_B.weight"] @ plain["transformer.second.lora_A.weight"]
    assert torch.allclose(made, wanted, atol=1e-5)
    for factor in "AB":
        own, kept = state[f"first.lora_{factor}.weight"], plain[f"transformer.first.lora_{factor}.weight"]
        same, more = (kept[:3], kept[3:]) if factor == "A" else (kept[:, :3], kept[:, 3:])
        assert torch.equal(same, own) and bool(more.any()) == (factor == "A")
    assert record(tmp_path / "a" / NAME)["export"]["steps"] == 0


def toy_training(folder: Path):
    from pentimento.cache import Samples
    from pentimento.data import held_out, open_data

    loaded = recipe.load(folder)
    rows, _ = held_out(open_data(loaded.data), loaded.data)
    return Samples(rows, recipe.method_class(METHOD).load(None, loaded.config))


def test_top_2_with_alphas_and_a_whole_module(pairs: Path, tmp_path: Path) -> None:
    """What else an adapter can have arrives as well: alphas in the factors, the module trained whole beside them."""
    lora = {"top_k": 2, "gate": "topk-softmax", "alpha": 6.0, "expert_alpha": 2.0, "full": ["embedder"]}
    folder = run.train_run(toy(pairs, "stages.edit.steps=20", "data.held_out=0", **lora), tmp_path / "run")
    done = export.export(folder, "lora", tmp_path / "out", ["steps=0", "rank=12"])
    assert dict(done.lines)["measured on"].startswith("6 training pairs")
    original, plain = pentimento.load(folder), pentimento.load(tmp_path / "out" / NAME)
    old, new = (e.method.adapters.state_dict()["edit"] for e in (original, plain))
    assert torch.equal(old["embedder.weight"], new["embedder.weight"])
    first = [s["first.lora_B.weight"] @ s["first.lora_A.weight"] for s in (old, new)]
    assert torch.allclose(first[1], 6.0 / 3 * first[0], atol=1e-6)
    assert distance(plain, original, toy_training(folder)) < 0.5


def test_the_smaller_rank_is_the_nearest(learnt: Path, tmp_path: Path) -> None:
    """As the singular value decomposition of the whole matrix says."""
    torch.manual_seed(0)
    a, b = torch.randn(12, 20), torch.randn(9, 12)
    for rank in (1, 4, 9):
        x, y = distil.reduced(a, b, rank)
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        assert (x.shape[0], y.shape[1]) == (rank, rank)
        assert torch.allclose(y @ x, (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-4)


def test_mistakes_with_experts(refuse, learnt: Path, tmp_path: Path) -> None:
    order = ("export", learnt, "--to", "lora", "--out", "x")
    assert "steps must be at least 0" in refuse(*order, "steps=-1")
    assert "rank should be a whole number" in refuse(*order, "rank=two")
    assert "stepz is not a known key" in refuse(*order, "stepz=2")
    assert "no such" in refuse(*order, "data.root=nowhere", "steps=0")
    copied = Path(shutil.copytree(learnt, tmp_path / "mute"))
    text = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(text.replace("toy_experts:Toy", "toy_experts:Mute"))
    message = refuse("export", copied, "--to", "lora", "--out", "x", "steps=0")
    assert [p.name for p in tmp_path.iterdir()] == ["mute"]
    assert "a function predict(batch, draws); toy_experts:Mute is no such method" in message


def test_an_interrupted_distillation_leaves_nothing(
    learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call
) -> None:
    losses = distil.Student.losses

    def impatient(self, batch, draws):
        os.kill(os.getpid(), signal.SIGINT)
        return losses(self, batch, draws)

    monkeypatch.setattr(distil.Student, "losses", impatient)
    result = call("export", learnt, "--to", "lora", "--out", "x", "steps=5", code=130)
    assert "stopped; nothing was written" in result.stderr
    assert not list(tmp_path.iterdir())


def test_on_flux(call, refuse, settings: list[str], tmp_path: Path) -> None:
    """The whole way on the tiny FLUX: train with experts, make it plain, put it into stock diffusers, edit with it."""
    changes = [s for s in settings if not s.startswith("config.lora")]
    lora = "{targets: [attn.to_q, ff.net.2], rank: 2, experts: 2, expert_rank: 2, top_k: 1}"
    changes += ["method=toy_experts:OnFlux", f"config.lora={lora}"]
    call("train", "influxedit-edit", *changes, "--out", "run")
    readme = (tmp_path / "run" / "README.md").read_text()
    assert "--to lora" in readme and "load_lora_weights" not in readme
    result = call("export", "run", "--to", "lora", "--out", "plain.safetensors", "steps=2")
    assert "in the file and in the 6 layers of a new FluxTransformer2DModel" in said(result)["proof"]
    weights = recipe.load(tmp_path / "run").backbone.weights
    Path("photo.png").write_bytes(
        next(Path(recipe.load(tmp_path / "run").data.root).rglob("*.png")).read_bytes()
    )
    call(
        "edit",
        "plain.safetensors",
        "photo.png",
        f"backbone.weights={weights}",
        "backbone.device=cpu",
        "--instruction",
        "x",
    )
    stripped = load_file(tmp_path / "run" / "weights" / NAME)
    save_file(stripped, "published.safetensors")
    more = (f"backbone.weights={weights}", "backbone.device=cpu", "--instruction", "x", "--steps", 1)
    call("edit", "published.safetensors", "photo.png", "method=toy_experts:OnFlux", *more)
    message = refuse("edit", "published.safetensors", "photo.png", "method=influxedit", *more)
    assert "has experts (2 in a layer), but influxedit edits with a plain LoRA" in message


def test_adding_beside_experts_does_not_disturb_them(learnt: Path) -> None:
    """What distilling relies on."""
    method = pentimento.load(learnt).method
    adapters: Adapters = method.adapters
    x = torch.randn(4, 12)
    adapters.use(edit=1.0)
    before = method.host(x)
    adapters.add(distil.PLAIN, LoRA(targets=("first", "second"), rank=4))
    adapters.use(edit=1.0)
    assert torch.equal(method.host(x), before)
