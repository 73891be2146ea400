"""What a model card says of a base model: whose licence holds for an adapter of it, and the lines that model hubs read."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Of one family or model."""

    licence: str
    """Sentences on the licence."""
    front: tuple[str, ...] = ()
    """Lines of the card's head, in YAML."""


POCKET = "The base model is one of pentimento's pocket models (Apache-2.0); the adapter works with that model only."
