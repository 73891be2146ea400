"""Inversion: a LoRA that knows one photograph by heart, so that PairEdit's sliders edit it (arXiv:2506.07992).

Plain flow matching on one picture with the empty text. From any noise the base model with this adapter then draws the picture
again; the velocities of it and of a slider are blended to edit it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from PIL.Image import Image
from torch import Tensor

from ..adapters import LoRA
from ..errors import UserError
from ..flux import loading
from ..flux.backbone import Flux
from ..flux.dev import CONTENT, Drawing
from ..flux.sampling import VelocityFn
from ..method import Example
from .pairedit import PairMethod, PairTraining

if TYPE_CHECKING:
    from ..train import Draws


class Inversion(PairMethod):
    """One LoRA, ``content``, of one picture."""

    called = "inversion"
    main = CONTENT
    per_photo = ""

    @dataclass(frozen=True, kw_only=True)
    class Config(PairTraining):
        """How the picture is learnt and drawn again."""

        noising: Literal["preserving", "flow"] = "flow"
        """flow: the picture fades as the noise comes, as FLUX was trained; preserving: it keeps its full strength (PairEdit)."""
        skip: int = -1
        """The adapter acts from the step after this one on, counted from 0; -1: in all."""

    @classmethod
    def base_digest(cls, backbone: Any) -> str:
        """Of the transformer and the autoencoder."""
        return loading.locate(backbone, "dev").digest("transformer", "vae")

    @classmethod
    def loras(cls, config: Any) -> Mapping[str, LoRA]:
        """The adapter that knows the picture."""
        return {CONTENT: config.lora}

    def __init__(self, backbone: Flux, config: Any):
        super().__init__(backbone, config)
        self._photo = True

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Posteriors ``(B, 16, h, w)`` of the pictures."""
        pictures = [self.scaled(self.picture(example)) for example in examples]
        found = self.flux.encode_images(pictures)
        return {"source_mean": found.mean, "source_std": found.std}

    def picture(self, example: Example) -> Image:
        """The picture of an example; ``UserError`` where there is none."""
        if example.source is None:
            raise UserError(f"{example.key or 'the data set'}: there is no picture to learn")
        return example.source

    def losses(self, batch: dict[str, Tensor], draws: "Draws") -> Iterator[tuple[str, Tensor]]:
        """``| v(x_t) - (noise - x_0) |^2`` with the adapter."""
        batch, step = self.drawn(batch, draws)
        self.adapters.use(content=1)
        yield "content", self.error(step.source, step, batch)

    def steered(self, how: Drawing) -> VelocityFn:
        """Of a picture that is given only the size counts: the adapter knows what to draw."""
        return super().steered(replace(how, photo=False))
