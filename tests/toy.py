"""A method that learns in milliseconds, for tests of what all methods share. Run as a program it trains: ``toy.py JSON``.

Pictures become vectors, the host is a small network that is to turn a source's vector into its target's; two adapters and
two losses, the second with the first adapter frozen, need what the loop promises of its generator.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pentimento
from pentimento import files
from pentimento.adapters import Adapters, LoRA
from pentimento.cache import Samples
from pentimento.data import Row
from pentimento.method import EditSettings, Example, Method
from pentimento.train import Draws, Run, Stage, train

WIDTH = 12
SPEC = LoRA(targets=("first", "second"), rank=2, alpha=3.0)


class Host(nn.Module):
    """Two linear layers, and an input layer that can be trained whole."""

    def __init__(self, checkpointing: bool = False):
        super().__init__()
        self.embedder = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.checkpointing = checkpointing
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedder(x)
        if self.checkpointing:
            return checkpoint(self._body, x, use_reentrant=False)
        return self._body(x)

    def _body(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Toy(Method):
    """Learns with adapters ``content`` and ``semantic``."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        checkpointing: bool = False
        full: tuple[str, ...] = ()
        global_noise: bool = False
        """Also draw from torch's global generator, as dropout does."""
        break_at: int = 0
        """Give a loss that is not a number at this call of ``losses``."""

    def __init__(self, config: Config | None = None):
        self.config = config or self.Config()
        self.host = Host(self.config.checkpointing)
        self.adapters = Adapters(self.host)
        spec = LoRA(targets=SPEC.targets, rank=SPEC.rank, alpha=SPEC.alpha, full=self.config.full)
        self.adapters.add("content", SPEC)
        self.adapters.add("semantic", spec)
        self.calls: dict[str, int] = {"encode": 0, "encode_text": 0, "release": 0, "losses": 0}

    def size(self, width: int, height: int) -> tuple[int, int]:
        return width // 4 * 4, height // 4 * 4

    def fingerprint(self) -> str:
        return "toy 1"

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        self.calls["encode"] += len(examples)
        assert len({self.size(*example.source.size) for example in examples}) == 1
        return {
            "source": torch.stack([vector(example.source) for example in examples]),
            "target": torch.stack([vector(example.target) for example in examples]),
        }

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.calls["encode_text"] += len(prompts)
        return {"text": torch.tensor([[len(prompt) / 10.0] for prompt in prompts]).bfloat16()}

    def release_encoders(self) -> None:
        self.calls["release"] += 1

    def losses(self, batch: dict[str, Tensor], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        self.calls["losses"] += 1
        source, target = batch["source"], batch["target"]
        noise = draws.normal_like(source)
        x = source + draws.uniform()[:, None] * noise + batch["text"].float()
        if self.config.global_noise:
            x = x + torch.rand(())
        self.adapters.use(content=1)
        yield "content", F.mse_loss(self.host(x), source)
        self.adapters.use(content=1, semantic=1, frozen=("content",))
        broken = self.calls["losses"] == self.config.break_at
        yield "semantic", F.mse_loss(self.host(x), target) * (torch.nan if broken else 1)

    def edit(self, example: Example, settings: EditSettings) -> Image.Image:
        torch.manual_seed(settings.seed)  # a rude method: samples disturb the global generator
        self.adapters.use(semantic=settings.scale)
        noise = torch.rand(())
        value = self.host(vector(example.source)[None]).mean() + 0.01 * noise
        return Image.new("RGB", example.source.size, (int(255 * float(value.sigmoid())),) * 3)

    def metadata(self) -> dict[str, Any]:
        return {"width": WIDTH}


def vector(image: Image.Image) -> Tensor:
    """WIDTH numbers that depend on all of a picture."""
    return torch.from_numpy(np.asarray(image.resize((2, 2)), dtype=np.float32).reshape(-1) / 255)


def rows(folder: Path, sizes: Sequence[tuple[int, int]] = ((8, 8),) * 6) -> list[Row]:
    """Pairs of noise pictures, written to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for index, size in enumerate(sizes):
        rng = np.random.default_rng(index)
        paths = [folder / f"{index}-{side}.png" for side in ("source", "target")]
        for path in paths:
            if not path.exists():
                Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        made.append(
            Row(key=str(index), source=paths[0], target=paths[1], prompt="ab" * (index % 3), size=size)
        )
    return made


STAGE: dict[str, Any] = {"train": ("content", "semantic"), "lr": 1e-2, "steps": 6, "batch_size": 2}


def run(
    folder: Path,
    out: str = "run",
    *,
    watch: Callable[..., None] | None = None,
    toy: Toy | None = None,
    stages: dict[str, Stage] | None = None,
    samples: dict[str, Any] | None = None,
    seed: int = 1,
    **stage: Any,
) -> dict[str, dict[str, Tensor]]:
    """Train into ``folder / out`` on the pairs of ``folder / data``; returns a copy of the weights."""
    toy = toy or Toy()
    data = Samples(rows(folder / "data"), toy, **(samples or {}))
    stages = stages or {"pair": Stage(**{**STAGE, **stage})}
    train(toy, stages, data, Run(out=folder / out, seed=seed, record=toy.metadata()), watch)
    return weights(toy)


def weights(toy: Toy) -> dict[str, dict[str, Tensor]]:
    """A copy of all trained weights."""
    return {name: {k: v.clone() for k, v in part.items()} for name, part in toy.adapters.state_dict().items()}


def difference(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> float:
    """Largest difference of two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name][key] - b[name][key]).abs().max()) for name in a for key in a[name])


def environment() -> dict[str, str]:
    """For programs that import this package, installed or not, and know nothing of accelerate's variables."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    return {**kept, "PYTHONPATH": str(Path(pentimento.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def doomed(folder: Path, out: str, death: str, at: int, settings: dict[str, Any]) -> None:
    """Train in this process until SIGKILL ends it: at a step, or at some point of a save or a clean-up."""
    torch.set_num_threads(1)
    count = 0

    def fate(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(path: Path, data: bytes, *, durable: bool = True) -> None:
        path.with_name(path.name + files.PARTIAL).write_bytes(data[: len(data) // 2])
        fate()
        path.write_bytes(data)

    def rename(source: Path, target: Path) -> None:
        fate()
        move(source, target)
        fate()

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(p for p in path.rglob("*") if p.is_file()).unlink()
            fate()
            remove(path)

    move, remove = os.rename, shutil.rmtree
    if death == "write":
        files.write = write
    elif death == "rename":
        os.rename = rename
    elif death == "delete":
        shutil.rmtree = rmtree
    run(folder, out, watch=(lambda r: r.step and fate()) if death == "step" else None, **settings)


@dataclass
class Note:
    """A watch that remembers."""

    reports: list[Any] = field(default_factory=list)

    def __call__(self, report: Any) -> None:
        self.reports.append(report)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    run(Path(settings.pop("folder")), settings.pop("out"), **settings)
