"""What a method must provide. Nothing here knows how it does it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from .errors import UserError
from .images import resize, to_rgb

if TYPE_CHECKING:
    from .adapters import Adapters
    from .data import Pair
    from .train import Draws


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where an edit may change a picture; the pictures have the resolution that the method thinks in."""

    mask: Image
    """L, white where it may change."""
    weights: Image
    """L, white where it stays wholly as it is."""
    attention: Tensor | None = None
    """Map (H, W) of what the mask was made of, where it was not given."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a data set; also the input of an edit. ``mask`` is L and white where the picture may change.

    Pictures are RGB, but those of parquet shards are in the mode they were stored in: methods use ``images.to_rgb``, or
    ``images.panel`` where it matters that they are scaled first.
    """

    source: Image | None = None
    target: Image | None = None
    prompt: str = ""
    """Instruction or caption, as the method expects it."""
    mask: Image | None = None
    key: str = ""
    """Name of the sample (the stem of its files), for messages and results."""
    extra: dict[str, Any] = field(default_factory=dict)


LARGEST_SEED = 2**62 - 1
"""Below what torch's generators take, so that seeds can count up from it."""


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """How one edit is sampled; ``None`` stands for the value that the adapter was trained with or recommends."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    scale: float = 1.0
    """Strength of the adapter: 0 is the base model, 1 what was trained."""
    skip: int | None = None
    """Steps before the edit sets in, for methods that make pictures of prompts."""

    def __post_init__(self) -> None:
        # Twice: seeds that count up from the largest one are meant too.
        if not 0 <= self.seed <= 2 * LARGEST_SEED:
            raise UserError(f"seed must lie between 0 and {LARGEST_SEED}, but it is {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Theirs:
    """Weights of an edit as the scripts of a method's authors save them, and what these settle of a recipe."""

    files: Mapping[str, Path]
    """By the adapters and tensors that they go into."""
    backbone: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    """What a person should know of them."""


class Probe(Protocol):
    """How a slider is measured; latents are ``(B, ...)`` of any shape."""

    device: torch.device
    """Where it draws, and where its pictures are read."""

    def draw(self, asked: Sequence[tuple[str, int]], scales: Sequence[float]) -> Mapping[float, Tensor]:
        """Latents of pairs of prompt and seed, by raw scale."""

    def pictures(self, latents: Tensor) -> list[Image]:
        """Latents decoded."""

    def shown(self, pairs: Sequence[Example]) -> Tensor:
        """The mean change of pairs from source to target, as one row of latents."""


class Method(ABC):
    """A published editing method: how it trains and how it edits. One file each in ``methods/``."""

    Config: ClassVar[type]
    """Frozen dataclass of the recipe's ``config`` section, documented at its fields."""
    adapters: "Adapters"
    family: ClassVar[str] = "flux"
    """Base models that the method works on, by the name in ``backbone.family``."""
    takes_mask: ClassVar[bool] = False
    """Whether an edit can be confined to a mask; where it cannot, being given one is an error."""
    generates: ClassVar[bool] = False
    """Whether it makes pictures of a prompt alone (``edit`` of an example without source), and knows ``EditSettings.skip``."""
    per_photo: ClassVar[str] = ""
    """Recipe that is trained on each picture before it can be edited, for ``show_photo``; empty: none is needed."""
    learns_picture: ClassVar[bool] = False
    """Whether it is trained on the one picture that it edits, so that its recipe can be given to ``edit``. Its ``Config`` then has
    source_prompt, target_prompt, region and word."""
    only_edits: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``Config`` that what is learnt does not depend on."""
    main: ClassVar[str] = ""
    """The adapter that carries the edit, where there are several: what a lone file of weights is."""

    load: ClassVar[Callable[..., "Method"]]
    """Class method ``load(backbone, config)``: the method on the weights that a recipe's ``backbone`` section names."""

    @classmethod
    def names(cls, config: Any) -> tuple[str, ...]:
        """Names of the adapters that stages may train; empty: known only once the method is built."""
        return ()

    @classmethod
    def outline(cls, backbone: Any, config: Any) -> "Method | None":
        """The same without weights, to count and to preview; ``None`` where the model's configuration is not at hand."""
        return None

    @classmethod
    def theirs(cls, place: Path, at: int | None = None) -> Theirs | None:
        """What the scripts of the method's authors saved at a place, for those that do not save one LoRA; ``None``: nothing.

        ``at``: after so many of their iterations. Raises ``UserError`` where they saved none then.
        """
        return None

    def take(self, theirs: Theirs) -> None:
        """Load what ``theirs`` found into the adapters; raises ``UserError`` where it does not fit."""
        raise UserError(
            f"{', '.join(map(str, theirs.files.values()))}: {type(self).__name__} takes LoRA files only"
        )

    @classmethod
    def base_digest(cls, backbone: Any) -> str:
        """Changes with the weights of the base model that training reads; ``UserError`` where no single pictures are learnt."""
        raise UserError(f"method: {cls.__name__} learns no single pictures; take inversion or editinfinity")

    @classmethod  # noqa: B027 (most take whatever the data section does)
    def check_data(cls, backbone: Any, config: Any, rows: Sequence["Pair"]) -> None:
        """Raise ``UserError`` for samples that cannot be trained on, as far as that is known without the base model."""

    @classmethod  # noqa: B027 (for most, everything can)
    def check_edit(cls, config: Any, example: Example, settings: EditSettings) -> None:
        """Raise ``UserError`` for an edit that cannot work, as far as that is known without the base model."""

    def check_text(self, prompt: str) -> None:  # noqa: B027 (FLUX cuts them)
        """Raise ``UserError`` for a text that the base model cannot read whole; no weights are needed for it."""

    @abstractmethod
    def size(self, width: int, height: int) -> tuple[int, int]:
        """Pixels ``(width, height)`` at which a picture of this size is trained and edited."""

    @abstractmethod
    def fingerprint(self) -> str:
        """All that ``encode`` and ``encode_text`` depend on besides the example: part of the cache's keys."""

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Frozen picture encoders, without gradients and without randomness; one row per example, all of one size."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Frozen text encoders; one row per prompt, other keys than ``encode``'s."""

    @abstractmethod
    def release_encoders(self) -> None:
        """Free the memory of what only ``encode`` and ``encode_text`` need; a later call loads it again.

        Called before training begins: what is trained must be on its device from then on.
        """

    @abstractmethod
    def losses(self, batch: dict[str, Tensor], draws: "Draws") -> Iterator[tuple[str, Tensor]]:
        """Yield named scalar losses; each is back-propagated before the next is computed."""

    @abstractmethod
    def edit(self, example: Example, settings: EditSettings) -> Image:
        """Edit one picture with the current adapters; the result has the picture's size."""

    def region(self, example: Example) -> Region | None:
        """Where an edit may change the picture of an example; ``None``: everywhere."""
        return None

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """What an edit must know later, JSON-able: geometry, prompt template, guidance, steps."""

    def views(self, example: Example) -> dict[str, Image]:
        """The pictures of a pair as the model is given them, by name; that of a mask says what white means."""
        pictures = {"source": example.source, "target": example.target}
        views = {name: to_rgb(picture) for name, picture in pictures.items() if picture is not None}
        if example.mask is not None:
            views["mask-white-changes"] = example.mask
        return {name: resize(picture, self.size(*picture.size)) for name, picture in views.items()}

    def preview(self, example: Example, settings: EditSettings) -> dict[str, Image]:
        """What is shown while training, by title: of a held-out pair its edit, which is called ``result`` and measured."""
        shown = {"source": example.source, "result": self.edit(example, settings), "target": example.target}
        return {title: picture for title, picture in shown.items() if picture is not None}

    def text(self, prompt: str) -> str:
        """The text that the model is given for a prompt."""
        return prompt

    @classmethod
    def default_prompt(cls, config: Any, shared: str | None) -> str | None:
        """What an edit asks for where nothing is said; ``shared`` is the one prompt that all training pairs had."""
        return shared

    @classmethod
    def check(cls, config: Any, settings: EditSettings, *, photo: bool) -> None:
        """Raise ``UserError`` for settings with which an edit, of a picture or a prompt, would be none: before weights are loaded."""
        return

    def learner(self, kind: Callable[..., "Method"], config: Any) -> "Method | None":
        """What runs the recipe ``per_photo``, a method of another kind, on this one's weights in memory.

        ``None``: it must be loaded for itself.
        """
        return None

    def show_photo(self, place: Path) -> None:
        """Take what the recipe ``per_photo`` learnt of a picture: the next edits are of this picture."""
        raise UserError(f"inversion: {type(self).__name__} is shown the picture itself")

    def compose(self, others: Sequence[tuple[Path, float]]) -> None:
        """Let further adapters act beside the main one, each at a scale of its own."""
        raise UserError(f"also: {type(self).__name__} edits with one adapter")

    def probe(self) -> Probe:
        """What measures the edit over scales, for sliders."""
        raise UserError(
            f"calibrate: {type(self).__name__} is no slider: it edits pictures, whatever the scale"
        )

    def base(self) -> dict[str, Any]:
        """What adapter files record of the base model, JSON-able: family, variant, weights by name, digest."""
        return {}

    def usage(self) -> str:
        """How stock diffusers uses the saved weights, as Markdown for the run folder's README."""
        return ""
