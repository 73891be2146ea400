"""The package as a whole: what a wheel holds, what is imported when, and the sizes that keep it readable."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import apply_configuration
from setuptools.dist import Distribution

import pentimento
from pentimento import recipe
from pentimento.recipes import shipped

ROOT = Path(pentimento.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = sorted((ROOT / "pentimento").rglob("*.py"))


@pytest.fixture(scope="module")
def packed() -> set[str]:
    """The files that a wheel built from this tree would hold, without building one."""
    before = Path.cwd()
    os.chdir(ROOT)  # setuptools knows no other way to say where the project is
    try:
        distribution = apply_configuration(
            Distribution({"script_name": "setup.py"}), str(ROOT / "pyproject.toml")
        )
        command = distribution.get_command_obj("build_py")
        command.build_lib = "wheel"
        command.ensure_finalized()
        outputs = command.get_outputs(include_bytecode=False)
        return {Path(path).relative_to(command.build_lib).as_posix() for path in outputs}
    finally:
        os.chdir(before)


def test_a_wheel_holds_every_module_and_nothing_else(packed: set[str]) -> None:
    assert {path.relative_to(ROOT).as_posix() for path in MODULES} <= packed
    assert all(path.startswith("pentimento/") for path in packed)


def test_a_wheel_holds_recipes_and_pocket_weights(packed: set[str]) -> None:
    recipes = sorted((ROOT / "pentimento" / "recipes").glob("*.yaml"))
    weights = [
        p
        for p in (ROOT / "pentimento" / "pocket" / "models").rglob("*")
        if p.is_file() and p.suffix != ".pyc"
    ]
    assert sorted(p.stem for p in recipes) == list(shipped())
    assert {"pocket-fill", "pocket-infinity"} <= {part for p in weights for part in p.parts}
    assert {p.relative_to(ROOT).as_posix() for p in [*recipes, *weights]} <= packed
    assert "pentimento/py.typed" in packed


def test_help_and_import_do_not_load_torch() -> None:
    code = (
        "import sys, pentimento, pentimento.cli\n"
        "try: pentimento.cli.app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'diffusers', 'peft', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_public_names_are_there() -> None:
    assert {name for name in pentimento.__all__ if getattr(pentimento, name, None) is None} == set()
    with pytest.raises(AttributeError):
        pentimento.no_such_name  # noqa: B018


def test_version_is_said_once_and_in_the_changelog() -> None:
    assert PROJECT["version"] == pentimento.__version__
    assert f"## {pentimento.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(
        line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#")
    )
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (r for group in groups for r in group):
        name, _, bound = requirement.partition(">=")
        assert name.lower().replace("_", "-") in pins, f"{name} is not pinned"
        assert _numbers(pins[name.lower().replace("_", "-")]) >= _numbers(bound)
    assert pins["torch"] == "2.13.0"


def test_only_adapters_and_moe_import_peft() -> None:
    importers = {
        p.name for p in MODULES if re.search(r"^\s*(import|from) peft\b", p.read_text(encoding="utf-8"), re.M)
    }
    assert importers == {"adapters.py", "moe.py"}


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in (*MODULES, *(ROOT / "pretrain").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 500:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long


def test_known_methods_are_classes_and_every_recipe_names_one() -> None:
    for name in recipe.METHODS:
        assert recipe.method_class(name).Config
    assert {recipe.load(name).method for name in shipped()} <= set(recipe.METHODS)


def test_continuous_integration_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")
