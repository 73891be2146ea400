"""What all methods on FLUX.1 share: their weights, their adapters, and how a pair is refused."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from PIL.Image import Image

from ..adapters import Adapters, LoRA
from ..errors import UserError
from ..method import Example, Method
from .backbone import Flux
from .config import FluxConfig
from .loading import CALLED, Variant


class FluxMethod(Method):
    """A method with plain adapters on one variant of FLUX.1."""

    variant: ClassVar[Variant]
    called: ClassVar[str]
    """The method's name in messages."""
    largest_native: ClassVar[int]
    """Pixels at which a model is trained unless ``config.resolution`` says otherwise, if it was made for more."""

    def __init__(self, backbone: Flux, config: Any):
        if backbone.variant != self.variant:
            raise UserError(
                f"{self.called} needs {CALLED[self.variant]}; {backbone.weights.name} is {CALLED[backbone.variant]}"
            )
        self.flux, self.config = backbone, config
        self.resolution = config.resolution or min(backbone.native_resolution, self.largest_native)
        self.text_length = config.max_sequence_length or backbone.native_text_length
        self.adapters = Adapters(backbone.transformer)
        for name, lora in self.loras(config).items():
            self.adapters.add(name, lora)

    @classmethod
    @abstractmethod
    def loras(cls, config: Any) -> Mapping[str, LoRA]:
        """The adapters by name."""

    @classmethod
    def load(cls, backbone: FluxConfig, config: Any) -> Self:
        """The method on the weights that a recipe names; raises ``UserError`` as ``Flux.load`` does."""
        return cls(Flux.load(backbone, cls.variant), config)

    @classmethod
    def outline(cls, backbone: FluxConfig, config: Any) -> Self | None:
        """The method without weights; ``None`` where the model's configuration is not on this machine."""
        flux = Flux.outline(backbone, cls.variant)
        return None if flux is None else cls(flux, config)

    @classmethod
    def names(cls, config: Any) -> tuple[str, ...]:
        """The adapters."""
        return tuple(cls.loras(config))

    def release_encoders(self) -> None:
        """Free the text encoders and the autoencoder."""
        self.flux.release_encoders()

    def base(self) -> dict[str, Any]:
        """Family, variant, name and digest of the FLUX weights."""
        return self.flux.describe()

    def both(self, example: Example) -> tuple[Image, Image]:
        """Source and target of a pair; ``UserError`` names the one that is missing."""
        source, target = example.source, example.target
        if source is None or target is None:
            missing = "source" if source is None else "target"
            name = example.key or "a pair"
            raise UserError(f"{name}: {self.called} learns from pairs, but there is no {missing} picture")
        return source, target
