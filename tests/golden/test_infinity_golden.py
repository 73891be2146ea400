"""Infinity against tensors recorded from the public code (float32, CPU), EditInfinity's variant and the base model's.

The subset beside this file runs always; ``pytest -m golden --golden DIR`` runs every case of an unpacked recording.
"""

import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pentimento.adapters import Adapters, LoRA
from pentimento.errors import UserError
from pentimento.infinity import loading, sampling, transformer
from pentimento.infinity.backbone import extend, ragged
from pentimento.infinity.files import shapes_of
from pentimento.infinity.quantizer import Quantizer, to_maps, to_tokens, up
from pentimento.infinity.sampling import Drawn, Interventions, Sampling, Texts, draw
from pentimento.infinity.scales import TABLES, Schedule
from pentimento.infinity.tokenizer import Tokenizer, TokenizerConfig
from pentimento.infinity.transformer import InfinityTransformer, Text, TransformerConfig, rotate, rotations

pytestmark = pytest.mark.golden

RECORDING = ("infinity", "vae")
SUBSET = Path(__file__).parent / "infinity"
FIRST = 9
"""Scales that the subset holds of drawings at 1M."""
SMALL, LARGE = Schedule.of(1.0, "0.06M"), Schedule.of(1.0, "1M")
LEARNT = 20
"""Rows of the learnt prompt."""


def model(file: Path, **changes: Any) -> InfinityTransformer:
    """A recorded transformer as EditInfinity runs it, which leaves out the biases of attention."""
    config = replace(
        loading.check_transformer(shapes_of(file), file), **({"attention_bias": False} | changes)
    )
    net = InfinityTransformer(config)
    net.load_state_dict(load_file(file))
    return net.eval().requires_grad_(False)


def texts(record: dict[str, Tensor]) -> Text:
    """The recorded features, packed one after the other, as a batch."""
    ends = record.get("cu_seqlens_k", torch.tensor([0, len(record["text_features"])])).tolist()
    return ragged([record["text_features"][a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)])


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Equal up to ``tolerance``, absolute."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max())


def maps(bits: Tensor) -> Tensor:
    """Recorded bits (B, 1, h, w, d) as maps."""
    return bits[:, 0].permute(0, 3, 1, 2).bool()


class Enough(Exception):
    """Enough scales were drawn."""


class Drawing:
    """Draws, and keeps the logits that bits are drawn from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int = 99):
        self.logits: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.stop = stop
        real = sampling.probabilities

        def probabilities(logits: Tensor, settings: Sampling) -> Tensor:
            self.logits.append(logits)
            return real(logits, settings)

        monkeypatch.setattr(sampling, "probabilities", probabilities)

    def __call__(
        self,
        net: InfinityTransformer,
        text: Text,
        schedule: Schedule,
        settings: Sampling,
        edit: Callable[[int, Tensor], Tensor] = lambda k, code: code,
        watch: sampling.WatchAll | None = None,
    ) -> Drawn | None:
        def edit_code(scale: int, code: Tensor) -> Tensor:
            self.codes.append(code)
            if scale + 1 == self.stop:
                raise Enough
            return edit(scale, code)

        generator = torch.Generator().manual_seed(42)
        quantizer, seams = Quantizer(net.config.bits), Interventions(edit_code=edit_code, watch=watch)
        try:
            return draw(net, quantizer, Texts(text), schedule, settings, generator, seams)
        except Enough:
            return None

    def check_bits(self, record: dict[str, Tensor], schedule: Schedule) -> None:
        """Every bit is the recorded one."""
        bits = [record[f"bits_{k}"] for k in range(len(self.codes))]
        for each, ours, grid in zip(bits, self.codes, schedule.grids, strict=False):
            theirs = Quantizer(each.shape[-1]).codes(to_maps(each, grid))
            assert distance(ours, up(theirs, schedule.grids[-1])) <= 1e-6

    def check_logits(self, record: dict[str, Tensor], tolerance: float, every: int = 1) -> None:
        """Recorded logits are near; ``every``: of scales with more than 256 tokens only each so many are recorded."""
        assert self.logits
        for k, ours in enumerate(self.logits):
            step = every if ours.shape[1] > 256 else 1
            assert distance(ours[:, ::step].flatten(2), record[f"logits_{k}"]) <= tolerance


def check_blend(root: Path, drawing: Drawing) -> Drawn | None:
    """A blend with a source's codes at 1M: logits, bits."""
    record = load_file(root / "blend" / "blend_infer2_greedy_1M.safetensors")
    weight, quantizer = record["weighted_tensor"], Quantizer(16)

    def edit(scale: int, code: Tensor) -> Tensor:
        source = up(quantizer.codes(maps(record[f"source_bits_{scale}"])), LARGE.grids[-1])
        return torch.lerp(code, source, weight)

    net = model(root / "blend" / "gpt_d16_depth2_state.safetensors")
    settings = Sampling(cfg=4.0, tau=0.5, top_k=1, top_p=0)
    drawn = drawing(net, texts(record), LARGE, settings, edit)
    drawing.check_logits(record, 1e-4, every=16)
    drawing.check_bits(record, LARGE)
    return drawn


def check_sampling(root: Path, drawing: Drawing) -> None:
    """Bits drawn at 1M with the published filter."""
    record = load_file(root / "blend" / "gen_sample_1M_bits.safetensors")
    text = texts(load_file(root / "blend" / "blend_infer2_greedy_1M.safetensors"))
    net = model(root / "blend" / "gpt_d16_depth2_state.safetensors")
    drawing(net, text, LARGE, Sampling(cfg=4.0, tau=0.5, top_k=900, top_p=0.97))
    drawing.check_bits(record, LARGE)


def check_quantizer(root: Path) -> dict[str, Tensor]:
    """Bits of all scales of recorded features and the sum of their codes."""
    record = load_file(root / "vae" / "vae_d16_s16_square256.safetensors")
    levels = list(Quantizer(16).levels(record["pre_quant_features"], SMALL))
    for k, level in enumerate(levels):
        assert torch.equal(level.bits, maps(record[f"bits_{k}"]))
    assert distance(levels[-1].total, record["z"]) <= 1e-6
    return record


def check_correction(root: Path, case: str) -> int:
    """Bitwise self-correction: inputs and labels with the recorded wrong bits; returns how many scales there were."""
    record = load_file(root / "bsc" / f"bsc_{case}.safetensors")
    requantized = "flip_mask_0" in record and not case.endswith("norequant")
    flips = (lambda k, bits: maps(record[f"flip_mask_{k}"])) if requantized else None
    quantizer = Quantizer(16)
    levels = list(quantizer.levels(record["raw_features"], SMALL, flips))
    for k, level in enumerate(levels):
        assert torch.equal(to_tokens(level.bits), record[f"gt_bits_{k}"].bool())
    assert (
        distance(quantizer.inputs([level.total for level in levels], SMALL), record["x_BLC_wo_prefix"])
        <= 1e-6
    )
    return len(levels)


def check_positions(root: Path, ratio: float) -> dict[str, Tensor]:
    record = load_file(root / "rope" / "rope2d.safetensors")
    positions = Schedule.of(ratio, "1M").positions()
    assert torch.equal(positions, record[f"coords_{ratio:.3g}" if ratio != 1 else "coords_1.0"].float())
    name = f"{ratio:.3g}" if ratio != 1 else "1.0"
    assert distance(rotations(positions, 16)[:, ::101], record[f"cos_sin_{name}_every_101st"]) <= 1e-6
    return record


def test_blend_of_the_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = Drawing(monkeypatch, FIRST)
    check_blend(SUBSET, drawing)
    assert len(drawing.codes) == FIRST


def test_sampling_of_the_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = Drawing(monkeypatch, FIRST)
    check_sampling(SUBSET, drawing)
    assert len(drawing.codes) == FIRST


def test_quantizer_of_the_subset() -> None:
    record = check_quantizer(SUBSET)
    assert sum(key.startswith("bits_") for key in record) == len(SMALL.grids)


def test_correction_of_the_subset() -> None:
    assert check_correction(SUBSET, "noise_0p3") == len(SMALL.grids)


def test_positions_of_the_subset() -> None:
    record = check_positions(SUBSET, 1.5)
    assert len(record["coords_1.5"]) == Schedule.of(1.5, "1M").tokens


def test_schedules_are_the_published_ones() -> None:
    recorded = json.loads((SUBSET / "schedules.json").read_text())
    assert {float(ratio) for ratio in recorded} == set(TABLES)
    for ratio, sizes in recorded.items():
        for size, theirs in sizes.items():
            ours = Schedule.of(float(ratio), size)
            assert list(ours.grids) == [(h, w) for _, h, w in theirs["scales"]]
            assert ours.tokens == theirs["tokens"] and list(ours.pixels) == theirs["pixel"]


def test_published_files_fit() -> None:
    """Names and shapes of the published files, as the public code makes them: ours, to the last; those of 8B are refused."""
    recorded = json.loads(lzma.decompress((SUBSET / "state_dict_keys.json.xz").read_bytes()))
    shapes = {file: {k: tuple(v[0]) for k, v in keys.items()} for file, keys in recorded.items()}
    path = Path("model.pth")
    config = loading.check_transformer(shapes["infinity_2b_reg"], path)
    assert config == TransformerConfig()
    assert set(loading.outline(InfinityTransformer, config).state_dict()) == set(shapes["infinity_2b_reg"])
    autoencoder = loading.check_tokenizer(shapes["infinity_vae_d32reg"], path, None)
    assert autoencoder == TokenizerConfig()
    assert set(loading.outline(Tokenizer, autoencoder).state_dict()) == set(shapes["infinity_vae_d32reg"])
    with pytest.raises(UserError, match="holds Infinity 8B"):
        loading.check_transformer(shapes["infinity_8b"], path)
    with pytest.raises(UserError, match="holds Infinity 8B"):
        loading.check_tokenizer(shapes["infinity_vae_d56_f8_14_patchify"], path, None)


def test_tokenizer(golden_dir: Path) -> None:
    """From a picture to bits and back."""
    record = check_quantizer(golden_dir)
    file = golden_dir / "vae" / "vae_d16_s16_state.safetensors"
    tokenizer = Tokenizer(loading.check_tokenizer(shapes_of(file), file, None)).eval().requires_grad_(False)
    tokenizer.load_state_dict(load_file(file))
    assert distance(tokenizer.encode(record["image"]), record["pre_quant_features"]) <= 1e-5
    assert distance(tokenizer.decode(record["z"]), record["decoded"]) <= 1e-4
    quantizer, last = tokenizer.quantizer, SMALL.grids[-1]
    codes = [quantizer.codes(maps(record[f"bits_{k}"])) for k in range(7)]
    for k, code in enumerate(codes):
        assert distance(code, record[f"codes_{k}"][:, :, 0]) <= 1e-6
    sums = list(np.cumsum([up(code, last).numpy() for code in codes], 0))
    for k, total in enumerate(sums):
        assert distance(torch.from_numpy(total), record[f"cumulative_{k}"][:, :, 0]) <= 1e-6


@pytest.mark.parametrize("case", ["noise_off", "noise_0p3", "noise_0p3_norequant"])
def test_correction(golden_dir: Path, case: str) -> None:
    """Wrong bits that are not quantised again change nothing in the reference either."""
    assert check_correction(golden_dir, case) == len(SMALL.grids)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 0.666])
def test_positions(golden_dir: Path, ratio: float) -> None:
    record = check_positions(golden_dir, ratio)
    wide = rotations(LARGE.positions(), 128)[:, ::101]
    assert distance(wide, record["headdim128_cos_sin_1.0_every_101st"]) <= 1e-6


def test_rotation(golden_dir: Path) -> None:
    record = load_file(golden_dir / "rope" / "apply_rotary_scale2.safetensors")
    start, end = SMALL.spans[2]
    table = rotations(SMALL.positions(), 16)[:, start:end]
    for name in ("q", "k"):
        assert distance(rotate(record[name], table), record[f"{name}_out"]) <= 1e-6


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference's kernel does to cross attention of float32: inputs and output in bfloat16."""
    attend = F.scaled_dot_product_attention

    def rounding(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if "attn_mask" not in options:  # self-attention
            return attend(q, k, v, **options)
        q, k, v = (x.bfloat16().float() for x in (q, k, v))
        return attend(q, k, v, **options).bfloat16().float()

    monkeypatch.setattr(transformer.F, "scaled_dot_product_attention", rounding)


@pytest.mark.parametrize(
    ("case", "biased", "tolerance"),
    [
        ("tf_square_B2", False, 1e-5),
        ("tf_square_B2__base_fp32", True, 1e-5),
        ("tf_learnable_prompt", False, 1e-5),
    ],
)
def test_teacher_forcing(golden_dir: Path, case: str, biased: bool, tolerance: float) -> None:
    assert teacher_forced(golden_dir, case, biased) <= tolerance


def teacher_forced(golden_dir: Path, case: str, biased: bool) -> float:
    """Distance of the logits."""
    record = load_file(golden_dir / "gpt" / f"{case}.safetensors")
    net = model(golden_dir / "gpt" / "gpt_d16_state.safetensors", attention_bias=biased)
    logits = net(record["x_BLC_wo_prefix"], texts(record), SMALL)
    return distance(logits.flatten(2), record["logits"])


@pytest.mark.parametrize(("case", "biased"), [("edit", False), ("base", True)])
def test_teacher_forcing_with_the_rounding_of_the_kernel(
    golden_dir: Path, case: str, biased: bool, rounded: None
) -> None:
    """The reference as it runs on a GPU in float32 differs from ours by this rounding alone."""
    assert teacher_forced(golden_dir, f"tf_square_B2__{case}_bf16", biased) <= 5e-3


def test_inside_of_teacher_forcing(golden_dir: Path) -> None:
    record = load_file(golden_dir / "gpt" / "tf_square_B2.safetensors")
    net, text = model(golden_dir / "gpt" / "gpt_d16_state.safetensors"), texts(record)
    condition = net.condition(text)
    assert distance(condition.pooled, record["sos_cond"]) <= 1e-5
    assert distance(condition.modulation, record["shared_ada"]) <= 1e-5
    assert distance(condition.context.features[text.known()], record["text_kv_projected"]) <= 1e-5
    outputs: list[Tensor] = []
    for block in net.blocks:
        block.register_forward_hook(lambda m, a, out: outputs.append(out))
    net(record["x_BLC_wo_prefix"], text, SMALL)
    for k, ours in enumerate(outputs):
        assert distance(ours, record[f"block_out_{k}"]) <= 1e-4


def test_teacher_forcing_without_text(golden_dir: Path) -> None:
    record = load_file(golden_dir / "gpt" / "tf_square_B2_all_uncond.safetensors")
    net = model(golden_dir / "gpt" / "gpt_d16_state.safetensors")
    logits = net(record["x_BLC_wo_prefix"], net.without_text(texts(record)), SMALL)
    assert distance(logits.flatten(2), record["logits"]) <= 1e-5


def with_lora(net: InfinityTransformer, file: Path) -> InfinityTransformer:
    """The recorded LoRA on the feed-forward layers, switched on."""
    adapters = Adapters(net)
    adapters.add("lora", LoRA(targets=r".*ffn\.fc[12]", rank=4, alpha=32))
    state = {
        k.replace("lora_A", "lora_A.weight").replace("lora_B", "lora_B.weight"): v
        for k, v in load_file(file).items()
    }
    adapters.load_state_dict({"lora": state, "tensors": {}})
    adapters.use(lora=1)
    return net


def test_teacher_forcing_with_lora(golden_dir: Path) -> None:
    record = load_file(golden_dir / "lora" / "tf_lora.safetensors")
    net = model(golden_dir / "gpt" / "gpt_d16_state.safetensors")
    with_lora(net, golden_dir / "lora" / "lora_weights.safetensors")
    logits = net(record["x_BLC_wo_prefix"], texts(record), SMALL)
    assert distance(logits.flatten(2), record["logits"]) <= 1e-5


GREEDY = {"cfg": 4.0, "tau": 0.5, "top_k": 1, "top_p": 0.0}
DRAWN: dict[str, dict[str, Any]] = {
    "infer/gen_greedy_square": GREEDY,
    "infer/gen_greedy_square__base_fp32": GREEDY,
    "infer/gen_greedy_nocfg": GREEDY | {"cfg": 1.0, "tau": 1.0},
    "infer/gen_greedy_B2": GREEDY,
    "infer/gen_cfg_layer_minus2": GREEDY | {"cfg_blocks": (-2,)},
    "infer/gen_cfglist_taulist": GREEDY | {
        "cfg": (1.0, 2.0, 3.0, 4.0, 1.0, 5.0, 6.0), "tau": (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    },
    "infer/gen_greedy_learnable_prompt": GREEDY,
    "infer/gen_sample_plain": {"cfg": 4.0, "tau": 1.0, "top_k": 0, "top_p": 0.0},
    "lora/gen_greedy_lora": GREEDY,
}  # fmt: skip


def check_drawing(
    golden_dir: Path, case: str, monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bits and logits of every scale; returns the sum of the codes and the recording."""
    record = load_file(golden_dir / f"{case}.safetensors")
    net = model(golden_dir / "gpt" / "gpt_d16_state.safetensors", attention_bias="__base" in case)
    if "lora" in case:
        with_lora(net, golden_dir / "lora" / "lora_weights.safetensors")
    text = texts(record)
    if "learnable_embedding" in record:
        before = ragged([record["text_features_before"]])
        text = extend(before, record["learnable_embedding"][0, :LEARNT])
        assert torch.equal(text.features[0], record["text_features"])
    drawing = Drawing(monkeypatch)
    drawn = drawing(net, text, SMALL, Sampling(**DRAWN.get(case, GREEDY)))
    assert drawn is not None
    if "logits_0" in record:
        drawing.check_logits(record, tolerance)
    drawing.check_bits(record, SMALL)
    return drawn.z, record


@pytest.mark.parametrize("case", DRAWN)
def test_drawing(golden_dir: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of every scale, logits, the sum of the codes, and the picture but for rounding instead of truncation."""
    z, record = check_drawing(golden_dir, case, monkeypatch, 1e-4)
    assert distance(z, record["summed_codes"]) <= 1e-5
    if "image_bgr_uint8" in record:
        assert steps_apart(golden_dir, z, record["image_bgr_uint8"]) <= 1


def steps_apart(golden_dir: Path, z: Tensor, theirs: Tensor) -> int:
    """Levels of 8 bits between the picture of a sum of codes and a recorded one in BGR."""
    file = golden_dir / "vae" / "vae_d16_s16_state.safetensors"
    tokenizer = Tokenizer(loading.check_tokenizer(shapes_of(file), file, None)).requires_grad_(False)
    tokenizer.load_state_dict(load_file(file))
    pixels = ((tokenizer.decode(z) + 1) / 2 * 255).to(torch.uint8)
    return int((pixels.int() - theirs.flip(-1).permute(0, 3, 1, 2).int()).abs().max())


@pytest.mark.parametrize("variant", ["edit", "base"])
def test_drawing_with_the_rounding_of_the_kernel(
    golden_dir: Path, variant: str, monkeypatch: pytest.MonkeyPatch, rounded: None
) -> None:
    z, record = check_drawing(golden_dir, f"infer/gen_greedy_square__{variant}_bf16", monkeypatch, 2e-2)
    assert distance(z, record["summed_codes"]) <= 1e-5
    if "image_bgr_uint8" in record:
        assert steps_apart(golden_dir, z, record["image_bgr_uint8"]) <= 1


def test_blend(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 13 scales."""
    drawn = check_blend(golden_dir, Drawing(monkeypatch))
    record = load_file(golden_dir / "blend" / "blend_infer2_greedy_1M.safetensors")
    assert drawn is not None
    assert distance(drawn.z, record["summed_codes"]) <= 1e-5


def test_sampling(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = Drawing(monkeypatch)
    check_sampling(golden_dir, drawing)
    assert len(drawing.codes) == len(LARGE.grids)


def test_watching_attention(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of a word: the mean of cross attention to its tokens over heads, blocks and scales."""
    record = load_file(golden_dir / "attn" / "attn_map_infer1_1M.safetensors")
    source = load_file(golden_dir / "blend" / "blend_infer2_greedy_1M.safetensors")
    quantizer, seen = Quantizer(16), []

    def watch(scale: int, block: int, attention: Tensor) -> None:
        grid = attention[0, :, :, 3:5].mean(-1).mean(0).view(1, 1, *LARGE.grids[scale])
        seen.append(F.interpolate(grid, (64, 64), mode="bilinear", align_corners=False)[0, 0])

    def edit(scale: int, code: Tensor) -> Tensor:
        return up(quantizer.codes(maps(source[f"source_bits_{scale}"])), LARGE.grids[-1])

    net = model(golden_dir / "blend" / "gpt_d16_depth2_state.safetensors")
    drawing = Drawing(monkeypatch)
    drawn = drawing(net, texts(record), LARGE, Sampling(**GREEDY), edit, watch=watch)
    assert drawn is not None and len(seen) == 26
    assert distance(torch.stack(seen).mean(0), record["final_attention_map"]) <= 1e-6
    assert distance(drawn.z, record["summed_codes"]) <= 1e-5
