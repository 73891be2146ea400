"""The recipes that ship, as YAML files beside this one; listing them loads no deep-learning library."""

from importlib import resources

from .. import schema


def shipped() -> dict[str, str]:
    """Names of the recipes that come with the package, each with what it is for; nothing else is checked."""
    return {name: str(schema.read(text(name), name)[0].get("about", "")) for name in names()}


def names() -> list[str]:
    """Only the names, without reading the recipes."""
    files = (file.name for file in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def text(name: str) -> str:
    """The YAML of a shipped recipe."""
    return (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
