"""EditInfinity at the size of the published model, with random weights: seconds and memory from loading to the edit.

python -m benchmarks.true_size [--tiny] [--folder FOLDER] [--repeats 5] [--recipe editinfinity-mask] [key=value ...]

Infinity 2B and its tokenizer of 32 bits as the package loads them, one picture of a million pixels, both stages in the training loop,
then edits. The random weights are written into a folder first (4.5 GB, as bf16; ``--folder`` keeps them for the next time). Nothing is
downloaded: the text encoder is one layer of flan-t5-xl's width, so that where texts are encoded 2.3 GiB of the true one are missing.
``--tiny`` is a model of the same architecture for trying the program on a CPU.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

import pentimento
from pentimento import data, images, recipe, run, train
from pentimento.cache import Samples
from pentimento.infinity import regions
from pentimento.infinity.config import InfinityConfig
from pentimento.infinity.loading import SETTINGS, outline
from pentimento.infinity.sampling import Interventions, Sampling
from pentimento.infinity.tokenizer import Tokenizer, TokenizerConfig
from pentimento.infinity.transformer import InfinityTransformer, TransformerConfig
from pentimento.method import EditSettings, Example
from pentimento.methods.editinfinity import EditInfinity, blending
from pentimento.pocket.weights import folder as shipped
from pentimento.recipe import Recipe

from .cells import machine
from .speed import median

SOURCE, TARGET = "a basket of books and a cup", "a basket of books and a candle"
GIB = 2**30
AIMS = {"both stages and an edit": 40.0, "generation with blending": 0.8, "peak GiB": 24.0}
"""On one NVIDIA H200."""
SPREAD = 0.2
"""Of biases, and of the weights of norms."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """An architecture."""

    size: str = "1M"
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


TINY = Size(
    size="0.06M",
    transformer=TransformerConfig(
        width=64, heads=2, hidden=128, chunks=(2, 2), bits=8, text_width=64, text_length=64, text_heads=1
    ),
    tokenizer=TokenizerConfig(width=8, channels=8, factors=(1, 1, 1, 1, 1), blocks=1, groups=4),
)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a part of the work took."""

    seconds: float
    note: str = ""
    peak: float | None = None
    """GiB of tensors at most; none without a GPU."""
    reserved: float | None = None
    """GiB that torch held at most."""


class Clock:
    """Times the parts of the work, one after the other."""

    def __init__(self) -> None:
        self.taken: dict[str, Taken] = {}
        self.cuda = torch.cuda.is_available()
        self.begin()

    def begin(self) -> None:
        """A part begins."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def end(self, name: str, note: str = "", seconds: float | None = None) -> float:
        """The part that began last ends; ``seconds`` if they were measured otherwise."""
        if self.cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - self.began if seconds is None else seconds
        peaks: dict[str, float] = {}
        if self.cuda:
            memory = {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
            peaks = {key: round(value / GIB, 2) for key, value in memory.items()}
        self.taken[name] = Taken(seconds=round(took, 3), note=note, **peaks)
        self.begin()
        return took

    def repeated(self, name: str, work: Callable[[], object], repeats: int) -> float:
        """The median of several times, after one that warms up."""
        times = median(work, repeats, warm=1)
        return self.end(name, f"median of {repeats}, {times[1]:.3f} to {times[2]:.3f}", times[0])


def write(place: Path, size: Size) -> Path:
    """A folder of random weights as the package loads it."""
    place.mkdir(parents=True, exist_ok=True)
    models = {
        "infinity_reg": outline(InfinityTransformer, size.transformer),
        f"infinity_vae_d{size.tokenizer.width}reg": outline(Tokenizer, size.tokenizer),
    }
    for name, model in models.items():
        save_file(random_state(model), place / f"{name}.safetensors")
    text = place / "t5"
    config = T5Config(
        d_model=size.transformer.text_width, d_kv=64, d_ff=64, num_layers=1, num_heads=4,
        vocab_size=len(AutoTokenizer.from_pretrained(shipped("pocket-fill") / "tokenizer_2")),
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(text / "text_encoder_2")
    shutil.copytree(shipped("pocket-fill") / "tokenizer_2", text / "tokenizer_2", dirs_exist_ok=True)
    settings = {"size": size.size, "groups": size.tokenizer.groups, "text_encoder": str(text.resolve())}
    (place / SETTINGS).write_text(json.dumps(settings))
    return place


def random_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Values for all weights of an outline, in bf16; of such a size that activations neither vanish nor grow."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {}
    for name, value in model.named_parameters():
        spread = SPREAD if value.dim() == 1 else value[0].numel() ** -0.5
        state[name] = (torch.randn(value.shape, device=device) * spread).to("cpu", torch.bfloat16)
    return state


def learn(method: EditInfinity, plan: Recipe, samples: Samples, clock: Clock, out: Path) -> float:
    """Both stages, after one step of each that warms up; the seconds of all."""
    short = {name: replace(stage, steps=1, save_every=1) for name, stage in plan.stages.items()}
    how = train.Run(out=out / "warm", seed=plan.seed, precision=run.precision_of(method))
    clock.begin()
    train.train(method, short, samples, how)
    clock.end("first step of each stage", "kernels are chosen, or compiled")
    method.adapters.reset(plan.seed)
    times: dict[str, list[float]] = {}

    def watch(report: train.Report) -> None:
        if report.step == 0:
            clock.begin()
            return
        times.setdefault(report.stage, []).append(report.seconds)
        if report.step == report.steps:
            each = sorted(times[report.stage])
            note = (
                f"{report.steps} steps; median {each[len(each) // 2]:.3f}, loss {report.losses['bits']:.4f}"
            )
            clock.end(f"stage {report.stage}", note, sum(each))

    began = time.perf_counter()
    train.train(method, plan.stages, samples, replace(how, out=out / "run"), watch)
    return time.perf_counter() - began


def draw(method: EditInfinity, photo: Image.Image, clock: Clock, repeats: int) -> tuple[float, float]:
    """Edits and their parts; the seconds of an edit with a mask, and of its generation."""
    infinity, schedule = method.infinity, method.schedule(*photo.size)
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, photo.width // 2, photo.height // 2))
    masked = Example(source=photo, prompt=TARGET, mask=mask)
    clock.begin()
    method.edit(masked, EditSettings())
    clock.end("first edit", "reads the tokenizer and the text encoder again")
    edit = clock.repeated("edit with blending", lambda: method.edit(masked, EditSettings()), repeats)
    codes = infinity.encode_images([photo], schedule)
    clock.begin()
    clock.repeated("of it: encoding the picture", lambda: infinity.encode_images([photo], schedule), repeats)
    weight = regions.weights(regions.region_of_mask(mask), schedule).to(infinity.device)
    text = infinity.encode_prompts([TARGET])
    config = method.config
    sampling = Sampling(cfg=config.cfg, tau=config.tau, top_p=config.top_p)

    def generate(seams: Interventions) -> torch.Tensor:
        return infinity.generate(text, schedule, sampling, seed=0, interventions=seams).z

    seams = blending(codes, weight)
    blended = clock.repeated("of it: generation with blending", lambda: generate(seams), repeats)
    clock.repeated("generation without", lambda: generate(Interventions()), repeats)
    z = generate(seams)
    clock.begin()
    clock.repeated("of it: decoding", lambda: infinity.decode(z), repeats)
    return edit, blended


def measure(plan: Recipe, photo: Image.Image, out: Path, repeats: int) -> dict[str, Any]:
    """Everything, from loading on."""
    clock = Clock()
    assert isinstance(plan.backbone, InfinityConfig)
    method = EditInfinity.load(plan.backbone, plan.config)
    start = clock.end("start-up", "transformer read and moved to the device")
    samples = Samples(data.open_data(plan.data), method, cache="memory")
    samples.precompute()
    clock.end("encoding picture and caption", "tokenizer and text encoder are read, then freed")
    learning = learn(method, plan, samples, clock, out)
    edit, blended = draw(method, photo, clock, repeats)
    peaks = [part.peak for part in clock.taken.values() if part.peak is not None]
    return {
        "parts": {name: vars(part) for name, part in clock.taken.items()},
        "totals": {
            "start-up": round(start, 2),
            "both stages and an edit": round(learning + edit, 2),
            "generation with blending": round(blended, 3),
            **({"peak GiB": max(peaks)} if peaks else {}),
        },
    }


def show(report: Mapping[str, Any]) -> None:
    """The report as JSON, then as Markdown."""
    print(json.dumps(report))
    print("\n| part | seconds | peak GiB | reserved GiB | |\n|---|---|---|---|---|")
    for name, part in report["parts"].items():
        memory = " | ".join("-" if part[key] is None else f"{part[key]:.1f}" for key in ("peak", "reserved"))
        print(f"| {name} | {part['seconds']:.3f} | {memory} | {part['note']} |")
    print("\n| total | | aim |\n|---|---|---|")
    for name, value in report["totals"].items():
        print(f"| {name} | {value:.2f} | {AIMS.get(name, '-')} |")


def picture(edge: int) -> Image.Image:
    """Noise, coarse and fine."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, edge // 32, edge // 32, generator=generator)
    smooth = nn.functional.interpolate(coarse, (edge, edge), mode="bilinear")
    (made,) = images.from_tensor(smooth * 2 - 1)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of EditInfinity at its true size.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the random weights here, or take them from here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipe", default="editinfinity-mask")
    args, overrides = parser.parse_known_args()
    size = TINY if args.tiny else Size()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        weights = args.folder or out / "weights"
        if not (weights / SETTINGS).is_file():
            write(weights, size)
        photo = picture(256 if args.tiny else 1024)
        file = images.save_image(photo, out / "photo.png")
        settings = [f"backbone.weights={weights}", f"data.root={file}", f"config.source_prompt={SOURCE}"]
        plan = recipe.load(args.recipe, [*settings, *overrides])
        report = measure(plan, photo, out, args.repeats)
    about = {"pentimento": pentimento.__version__, "torch": torch.__version__, "device": machine()}
    show({**about, "recipe": args.recipe, "overrides": overrides, "tiny": args.tiny, **report})


if __name__ == "__main__":
    main()
