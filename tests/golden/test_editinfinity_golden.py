"""EditInfinity against tensors recorded from the public code (float32, CPU): losses, gradients, updates, regions.

The subset beside this file runs always; ``pytest -m golden --golden DIR`` runs every case of an unpacked recording.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pentimento import handover, images
from pentimento.errors import UserError
from pentimento.infinity import loading, pyramids, regions
from pentimento.infinity.backbone import Infinity, quantize
from pentimento.infinity.files import shapes_of
from pentimento.infinity.quantizer import Quantizer, up
from pentimento.infinity.scales import Schedule
from pentimento.infinity.tokenizer import Tokenizer, TokenizerConfig
from pentimento.infinity.transformer import Text
from pentimento.methods.editinfinity import EditInfinity, cross_entropy

from .test_infinity_golden import distance, maps, model, texts

pytestmark = pytest.mark.golden

RECORDING = ("infinity", "vae")
SUBSET = Path(__file__).parent / "infinity"
SMALL, LARGE = Schedule.of(1.0, "0.06M"), Schedule.of(1.0, "1M")
STAGE1, LORA, KL = (
    f"train/{name}"
    for name in ("stage1_language_style_embedding", "stage2_lora_nokl_frozen_base", "stage2_lora_kl_1M")
)
RATE, DECAY = 4.6875e-5, 0.005
ALIGNED = ("disc_small", "disc_large", "rect_edge", "partial_cells_15pct_vs_25pct", "empty_all_white")
"""Masks of whole pixels per cell; of others the reference's cells drift."""


class Wrong:
    """Stands for ``Draws``: the reference's wrong bits, one rate for a batch, from its two generators."""

    def __init__(self, seed: int, batch: int):
        self.rates = np.random.RandomState(seed)
        self.places, self.batch = torch.Generator().manual_seed(seed), batch

    def uniform(self) -> Tensor:
        return torch.full((self.batch,), (int(self.rates.randint(0, 31)) + 0.5) / 31)

    def uniform_like(self, x: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        return torch.rand(batch, height, columns, width, generator=self.places).permute(0, 3, 1, 2)


def method(root: Path, state: str, size: str, **config: Any) -> EditInfinity:
    """The method on a recorded transformer, without encoders."""
    file = root / f"{state}.safetensors"
    net = model(file)
    weights = loading.Weights(
        name="golden", transformer=file, tokenizer=file, text=loading.TextFolder(root, "", ""),
        transformer_config=net.config, tokenizer_config=TokenizerConfig(width=net.config.bits),
    )  # fmt: skip
    infinity = Infinity(weights, net, device=torch.device("cpu"), dtype=torch.float32)
    return EditInfinity(infinity, EditInfinity.Config(size=size, text_dropout=0.0, drop_path=0.0, **config))


def published(name: str) -> str:
    """A LoRA's tensor as the recording calls it."""
    return name.removesuffix(".weight")


def beginning(record: dict[str, Tensor], name: str) -> Tensor:
    """A LoRA's tensor before the first step; where it is not recorded, by undoing AdamW's first update."""
    if f"init.{name}" in record:
        return record[f"init.{name}"]
    if name.endswith("lora_B"):
        return torch.zeros_like(record[f"step0.param_after.{name}"])
    gradient = record[f"step0.grad_after_clip.{name}"]
    update = RATE * gradient / (gradient.abs() + 1e-8)
    return (record[f"step0.param_after.{name}"] + update) / (1 - RATE * DECAY)


def train(edit: EditInfinity, adapter: str, root: Path, case: str, features: Tensor, text: Text) -> int:
    """Every recorded step: losses, gradients after clipping, weights after the update; returns how many there were."""
    record, said = load_file(root / f"{case}.safetensors"), json.loads((root / f"{case}.json").read_text())
    params = edit.adapters.train(adapter)
    state = edit.adapters.state_dict()
    if adapter == "lora":
        for name, value in state["lora"].items():
            value.copy_(beginning(record, published(name)))
        names = [published(name) for name in state["lora"]]
    else:
        names = ["text_embedding_offset"]
    optimizer = torch.optim.AdamW(params, lr=RATE, betas=(0.9, 0.97), eps=1e-8, weight_decay=DECAY)
    batch = {"features": features, "text_features": text.features, "text_mask": text.known()}
    for step, expected in enumerate(said["steps"]):
        seed = said.get("seed0", 2000) + step
        losses = dict(edit.losses(batch, Wrong(seed, len(features))))  # type: ignore[arg-type]
        assert abs(float(losses["bits"].detach()) - expected["loss_total"]) < 1e-5
        if expected["kl_weight"]:
            theirs = expected["kl_weight"] * expected["kl_unweighted_sum_over_tokens_bits_div_batch"]
            assert abs(float(losses["unweighted"]) - theirs) < 1e-5
        optimizer.zero_grad()
        losses["bits"].backward()
        norm = float(torch.nn.utils.clip_grad_norm_(params, 5.0))
        assert norm == pytest.approx(expected["grad_norm_before_clip"], rel=1e-4)
        gradients = [parameter.grad for parameter in params]
        check_recorded(record, f"step{step}.grad_after_clip", dict(zip(names, gradients, strict=True)), 1e-5)
        optimizer.step()
        check_recorded(record, f"step{step}.param_after", dict(zip(names, params, strict=True)), 1e-6)
    return len(said["steps"])


def check_recorded(
    record: dict[str, Tensor], prefix: str, ours: Mapping[str, Tensor | None], tolerance: float
) -> None:
    """All tensors of a step or, of the middle steps of some cases, none."""
    if not any(key.startswith(prefix) for key in record):
        assert prefix.startswith("step1.")
        return
    for name, value in ours.items():
        assert value is not None
        assert distance(value.detach(), record[f"{prefix}.{name}"]) <= tolerance


def encoded(root: Path) -> tuple[Tensor, Text]:
    """Features and texts of the recorded batch of two."""
    record = load_file(root / f"{STAGE1}.safetensors")
    file = root / "vae" / "vae_d16_s16_state.safetensors"
    tokenizer = Tokenizer(loading.check_tokenizer(shapes_of(file), file, None)).eval().requires_grad_(False)
    tokenizer.load_state_dict(load_file(file))
    ends = torch.tensor([0, 9, 23])
    return tokenizer.encode(record["image"]), texts({**record, "cu_seqlens_k": ends})


def weighted_loss(root: Path) -> tuple[float, float]:
    """Ours and the recorded one, for recorded logits; the other sum of the loss is compared."""
    record = load_file(root / f"{STAGE1}.safetensors")
    expected = json.loads((root / f"{STAGE1}.json").read_text())["steps"][0]
    logits, bits = record["step0.logits"].unflatten(2, (-1, 2)), record["step0.gt_bits"].bool()
    loss = cross_entropy(logits, bits, SMALL)
    theirs = expected["kl_unweighted_sum_over_tokens_bits_div_batch"]
    assert float(loss.total) == pytest.approx(theirs, rel=1e-6)
    return float(loss.weighted), expected["ce_reweighted"]


def mask_weights(root: Path, name: str) -> tuple[Tensor, Tensor]:
    """Ours and the recorded ones."""
    mask = Image.open(root / "mask" / "png" / f"{name}.png")
    changes = images.take_mask(mask.convert("L").point(lambda level: 255 - level))
    ours = regions.weights(regions.region_of_mask(changes), LARGE)
    return ours, load_file(root / "mask" / "weighted_tensors.safetensors")[name].float()


def attention_weights(
    root: Path, case: str = "attn_mask_thr0.5", threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """From a map to a region and its weights, on the grid of codes itself instead of through a drawn picture."""
    record = load_file(root / "attn" / f"{case}.safetensors")
    region = regions.region_of_attention(record["final_attention_map"], threshold)
    assert torch.equal(region, record["mask64_float"] == 0)
    return regions.weights(region, LARGE), record["weighted_tensor_if_mask_were_1024px_exact"]


def test_loss_of_the_subset() -> None:
    ours, theirs = weighted_loss(SUBSET)
    assert abs(ours - theirs) < 1e-6


@pytest.mark.parametrize("name", ALIGNED)
def test_masks_of_the_subset(name: str) -> None:
    assert torch.equal(*mask_weights(SUBSET, name))


def test_attention_of_the_subset() -> None:
    assert torch.equal(*attention_weights(SUBSET))


def test_words() -> None:
    """As recorded, but for what goes wrong there: the end token, phrases of repeated words, commas, capitals."""
    ours = {
        ("a glass of red drink on the beach", "beach"): (7, 8),
        ("a cat and a dog", "a dog"): (3, 5),
        ("a cat and a dog", "a cat"): (0, 2),
        ("a cat, a dog", "cat"): (1, 3),
        ("a cat", "Cat"): (1, 2),
    }
    for case in json.loads((SUBSET / "attn" / "word_token_mapping.json").read_text()):
        (word,) = case["target"]
        wanted = ours.get((case["prompt"], word)) or tuple(case["result"][word])
        assert regions.token_span(case["prompt"], word, case["word_ids"]) == wanted
    with pytest.raises(UserError, match="'horse' does not occur"):
        regions.token_span("a cat", "horse", [0, 1, None])


def test_stage_of_the_prompt(golden_dir: Path) -> None:
    ours, theirs = weighted_loss(golden_dir)
    assert abs(ours - theirs) < 1e-6
    features, text = encoded(golden_dir)
    edit = method(golden_dir, "gpt/gpt_d16_state", "0.06M")
    assert train(edit, "prompt", golden_dir, STAGE1, features, text) == 4


def test_stage_of_the_lora(golden_dir: Path) -> None:
    """On top of learnt rows; the frozen base takes no part in clipping."""
    features, text = encoded(golden_dir)
    edit = method(golden_dir, "gpt/gpt_d16_state", "0.06M", kl_weight=0.0)
    rows = load_file(golden_dir / f"{STAGE1}.safetensors")["step3.param_after.text_embedding_offset"]
    edit.adapters.state_dict()["tensors"]["prompt"].copy_(rows)
    assert train(edit, "lora", golden_dir, LORA, features, text) == 3


def test_stage_of_the_lora_with_the_second_term(golden_dir: Path) -> None:
    """10521 tokens of 32 bits."""
    features = load_file(golden_dir / "data" / "each_scale_code_1M_d32.safetensors")["pre_quant_features"]
    text = texts(load_file(golden_dir / f"{KL}.safetensors"))
    edit = method(golden_dir, "train/gpt_d32_depth2_state", "1M", rows=0)
    assert train(edit, "lora", golden_dir, KL, features, text) == 2


@pytest.mark.parametrize("name", [*ALIGNED, "full_all_black", "grey_levels", "size_512_disc"])
def test_masks(golden_dir: Path, name: str) -> None:
    assert torch.equal(*mask_weights(golden_dir, name))


def test_attention(golden_dir: Path) -> None:
    assert torch.equal(*attention_weights(golden_dir))


def test_watching_a_word(golden_dir: Path) -> None:
    """The map of a word, of a drawing that is led through a source's codes."""
    record = load_file(golden_dir / "attn" / "attn_map_infer1_1M.safetensors")
    source = load_file(golden_dir / "blend" / "blend_infer2_greedy_1M.safetensors")
    edit = method(golden_dir, "blend/gpt_d16_depth2_state", "1M")
    quantizer, seen = Quantizer(16), regions.AttentionMap(LARGE, (3, 5))
    codes = [up(quantizer.codes(maps(source[f"source_bits_{k}"])), LARGE.grids[-1]) for k in range(13)]
    edit.look(texts(record), codes, LARGE, seen)
    assert distance(seen.mean(), record["final_attention_map"]) <= 1e-6


def test_a_lora_of_two_gpus(golden_dir: Path) -> None:
    """Their own file, flat, against the same factors as they were in the model."""
    edit = method(golden_dir, "gpt/gpt_d16_state", "0.06M", rows=0)
    theirs = EditInfinity.theirs(golden_dir / "lora", at=10)
    assert theirs is not None and theirs.config == {"rows": 0}
    edit.take(theirs)
    record = load_file(golden_dir / "lora" / "lora_weights.safetensors")
    state = edit.adapters.state_dict()["lora"]
    assert {published(name) for name in state} == record.keys()
    assert all(torch.equal(value, record[published(name)]) for name, value in state.items())


def test_codes_of_scales(golden_dir: Path, tmp_path: Path) -> None:
    """Of their features, written and read: their bits, and their codes as far as these are recorded."""
    record = load_file(golden_dir / "data" / "each_scale_code_1M_d32.safetensors")
    codes = quantize(Quantizer(32), record["pre_quant_features"], LARGE)
    pyramids.write(tmp_path, codes)
    found, schedule = pyramids.read(tmp_path)
    assert schedule == LARGE
    for k, (bits, code) in enumerate(zip(found.bits, found.codes, strict=True)):
        assert torch.equal(bits, maps(record[f"bits_{k}"]))
        assert distance(code[:, :2], record[f"each_scale_code_{k}_channels0to1"][:, :, 0]) <= 1e-6


def test_a_line_of_training_data(golden_dir: Path) -> None:
    record = json.loads((golden_dir / "data" / "jsonl_entry_example.json").read_text())
    ours = json.loads(handover.entry(Path("/dir/image/original_image.jpg"), 1.0, "<caption>"))
    assert ours == {**record, "image_path": "/dir/image/original_image.jpg"}
