"""The package has layers: modules import from lower layers only, and classes and functions are short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lightning_gif
from lightning_gif import GIFMixin

PACKAGE = Path(__file__).parents[1] / "lightning_gif"

# The layers from the bottom up. A module may import from its own layer and from lower ones.
FLOORS = (
    *("_version", "_moved", "_compat", "errors", "mixin", "registry"),
    *("storage", "distributed", "config", "parameters", "solvers", "data", "edit", "selection", "reporting"),
    *("metrics", "objective", "curvature", "defaults", "attribution", "session", "unlearning", "reports"),
    *("callback", "verification", "cli", "__init__", "__main__"),
)

# Only these modules use a Trainer.
TRAINER = {"_compat", "distributed", "objective", "selection", "attribution", "session", "callback", "cli"}

# Lines of code, without docstrings, comments and blank lines.
LONGEST_CLASS, LONGEST_FUNCTION = 300, 60

FILES = sorted(PACKAGE.rglob("*.py"))


def module(file: Path) -> list[str]:
    return list(file.relative_to(PACKAGE).with_suffix("").parts)


def imported(file: Path) -> list[tuple[ast.ImportFrom, list[str]]]:
    """The imports of modules of the package, each with the parts of the module's name."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [*module(file)[: -node.level], *(node.module or "").split(".")]
            found.append((node, [part for part in parts if part] or [alias.name for alias in node.names]))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(module(file)))
def test_modules_import_from_lower_layers_only(file: Path) -> None:
    room = FLOORS.index(module(file)[0])
    for node, target in imported(file):
        assert FLOORS.index(target[0]) <= room, f"line {node.lineno} imports {'.'.join(target)} from above"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    below = {
        ".".join(module(file)): {".".join(target) for _, target in imported(file)} - {".".join(module(file))}
        for file in FILES
    }
    known = {name: {target for target in targets if target in below} for name, targets in below.items()}
    while free := [name for name, targets in known.items() if not targets]:
        for name in free:
            del known[name]
        known = {name: targets.difference(free) for name, targets in known.items()}
    assert not known


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(module(file)))
def test_imports_are_at_the_top_of_modules(file: Path) -> None:
    tree = ast.parse(file.read_text())
    inside = [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not inside


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(module(file)))
def test_classes_and_functions_are_short(file: Path) -> None:
    text = file.read_text()
    lines = text.splitlines()
    tree = ast.parse(text)
    apart = {number for number, line in enumerate(lines, 1) if not line.strip() or line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            apart.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            length = len(set(range(node.lineno, (node.end_lineno or 0) + 1)) - apart)
            longest = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
            assert length <= longest, f"{node.name} has {length} lines of code, more than {longest}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(module(file)))
def test_few_modules_use_a_trainer(file: Path) -> None:
    knows = [node for node, _ in imported(file) if any(alias.name == "Trainer" for alias in node.names)]
    assert not knows or module(file)[0] in TRAINER


def test_only_one_module_knows_the_names_of_lightnings_packages() -> None:
    package = Path(lightning_gif.__file__).parent
    pattern = re.compile(r"^\s*(?:from|import) (?:lightning|pytorch_lightning|lightning_fabric)\b", re.M)
    knowing = {str(path.relative_to(package)) for path in package.rglob("*.py") if pattern.search(path.read_text())}
    assert knowing == {"_compat.py"}
    assert GIFMixin.__mro__ == (GIFMixin, object)
