"""docs/differences.md points at code that exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
POINTERS = re.findall(
    r"`(pentimento/[\w/]+\.py):([\w.]+)`", (ROOT / "docs" / "differences.md").read_text("utf-8")
)


def symbols(node: ast.AST, prefix: str = "") -> set[str]:
    """Dotted names of the functions and classes of a module."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            found |= {prefix + child.name} | symbols(child, f"{prefix}{child.name}.")
    return found


@pytest.mark.parametrize(("path", "symbol"), sorted(set(POINTERS)))
def test_pointer(path, symbol):
    assert symbol in symbols(ast.parse((ROOT / path).read_text(encoding="utf-8")))
