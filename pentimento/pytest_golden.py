"""The option ``--golden DIR`` of this project's tests.

A plugin of the installed package and not of ``tests/conftest.py``: pytest takes the value of an option that it does not know yet
for a path to test, looks for its settings there, and would never come to load that conftest.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: "pytest.Parser") -> None:
    """Register the option."""
    parser.getgroup("pentimento").addoption(
        "--golden",
        metavar="DIR",
        type=Path,
        help="unpacked tensors recorded from a reference implementation: runs the full golden tests",
    )
