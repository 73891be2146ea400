"""What tests of methods learn from."""

from collections.abc import Callable

import pytest
from PIL.Image import Image

from pentimento.method import Example


@pytest.fixture
def pairs(picture: Callable[..., Image]) -> list[Example]:
    return [
        Example(source=picture(i), target=picture(i + 10), prompt=f"edit {i}", key=f"p{i}") for i in range(3)
    ]
