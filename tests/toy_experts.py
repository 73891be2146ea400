"""Methods with experts for tests of the exporter: a small network that learns in milliseconds, and one on the tiny FLUX."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from toy import vector

from pentimento.adapters import Adapters, ExpertLoRA, LoRA
from pentimento.flux import sampling
from pentimento.flux.backbone import Text
from pentimento.method import EditSettings, Example, Method
from pentimento.methods.influxedit import EditLoRA, InFluxEdit
from pentimento.train import Draws

TOKENS, WIDTH, INNER = 8, 12, 20


class Network(nn.Module):
    """Two linear layers on tokens, and a layer that can be trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedder, self.first, self.second = (
            nn.Linear(i, o) for i, o in ((WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.embedder(x))))


class Mute(Method):
    """Learns with one adapter, ``edit``, whose second layer may have experts; cannot be distilled."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        lora: LoRA | ExpertLoRA = field(default_factory=lambda: LoRA(targets=("first", "second")))
        balance_weight: float = 0.0

        def __post_init__(self) -> None:
            if self.balance_weight and not isinstance(self.lora, ExpertLoRA):
                raise ValueError("balance_weight is for experts")

    def __init__(self, config: Config):
        self.host = Network()
        self.adapters = Adapters(self.host)
        self.adapters.add("edit", config.lora)
        self.config = config

    @classmethod
    def load(cls, backbone: Any, config: Config) -> "Mute":
        return cls(config)

    @classmethod
    def names(cls, config: Config) -> tuple[str, ...]:
        return ("edit",)

    def size(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def fingerprint(self) -> str:
        return "toy with experts 1"

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {
            side: torch.stack([vector(getattr(e, side)) for e in examples]) for side in ("source", "target")
        }

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"text": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    def release_encoders(self) -> None:
        pass

    def velocity(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        x = batch["source"][:, None].expand(-1, TOKENS, -1)
        return self.host(x + draws.normal_like(x))

    def losses(self, batch: dict[str, Tensor], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        self.adapters.use(edit=1)
        wanted = batch["target"][:, None].expand(-1, TOKENS, -1)
        loss = F.mse_loss(self.velocity(batch, draws), wanted)
        if self.config.balance_weight:
            loss = loss + self.config.balance_weight * self.adapters.balance("edit")
        yield "flow", loss

    def edit(self, example: Example, settings: EditSettings) -> Image.Image:
        self.adapters.use(edit=settings.scale)
        level = self.host(vector(example.source)[None]).mean().sigmoid()
        return Image.new("RGB", example.source.size, (int(255 * float(level)),) * 3)

    def metadata(self) -> dict[str, Any]:
        return {"tokens": TOKENS}

    def base(self) -> dict[str, Any]:
        return {"family": "toy", "weights": "toy", "digest": "1"}


class Toy(Mute):
    """The same with the prediction that distilling needs."""

    def predict(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        return self.velocity(batch, draws)


class OnFlux(InFluxEdit):
    """InFluxEdit's edit mode, with experts and a prediction of its own."""

    @dataclass(frozen=True, kw_only=True)
    class Config(InFluxEdit.Config):
        lora: EditLoRA | ExpertLoRA = field(default_factory=EditLoRA)

    def predict(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        mean, std = batch["x0_mean"], batch["x0_std"]
        x0 = self.flux.latents(mean, std, draws.normal_like(mean))
        shown = self._condition(batch["condition_mean"], batch["condition_std"], draws.normal_like(mean))
        noise, sigma = sampling.pack(draws.normal_like(mean)), draws.uniform()
        s = sigma.view(-1, 1, 1)
        text = Text(prompt_embeds=batch["prompt_embeds"], pooled=batch["pooled"])
        grid = (mean.shape[-2] // 2, mean.shape[-1] // 2)
        return self.flux.velocity(
            (1 - s) * x0 + s * noise, sigma, text, grid=grid, guidance=1.0, condition=shown
        )
