"""The package has layers: modules import from lower layers only, and classes and functions are short."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import lightning_gif
from lightning_gif import GIFMixin
from lightning_gif.curvature.inverse import InverseCurvature
from lightning_gif.registry import Registry

PACKAGE = Path(__file__).parents[1] / "lightning_gif"

# The layers from the bottom up. A module may import from its own layer and from lower ones.
FLOORS = (
    *("_version", "_moved", "_lazy", "_compat", "errors", "mixin", "registry", "sharding"),
    *("storage", "distributed", "config", "signatures", "parameters", "solvers", "data", "edit", "selection"),
    *(
        "reporting",
        "metrics",
        "objective",
        "curvature",
        "defaults",
        "attribution",
        "trajectory",
        "fits",
        "session",
        "unlearning",
    ),
    *("inspection", "reports", "calls", "callback", "verification", "cli", "__init__", "__main__"),
)

# Only these know that a Trainer exists, besides `_compat`.
TRAINER = {"distributed", "objective", "selection", "trajectory", "session", "calls", "callback"}

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


def test_few_modules_know_a_trainer() -> None:
    knowing = {
        module(file)[0]
        for file in FILES
        for node, _ in imported(file)
        if any(alias.name == "Trainer" for alias in node.names)
    }
    assert knowing == TRAINER


# --------------------------------------------------------------------------------------------------------------------
# The page about the architecture
# --------------------------------------------------------------------------------------------------------------------

PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text()


def names_in(text: str) -> list[str]:
    """The modules and folders that a text has in backticks."""
    return [name.removesuffix(".py").removesuffix("/") for name in re.findall(r"`(\w+(?:\.py|/))`", text)]


def rows_below(heading: str) -> list[list[str]]:
    section = PAGE.partition(heading)[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_the_page_lists_the_layers_from_the_top_down() -> None:
    listed = [name for row in rows_below("## The modules, from the top layer down") for name in names_in(row[0])]
    assert tuple(reversed(listed)) == FLOORS
    assert set(FLOORS) == {module(file)[0] for file in FILES}


def test_the_page_names_those_that_know_a_trainer() -> None:
    sentence = PAGE.partition("These know that a `Trainer` exists, besides `_compat.py`:")[2].partition("\n\n")[0]
    assert set(names_in(sentence)) == TRAINER


def test_the_page_lists_all_registries_and_first_the_public_ones() -> None:
    defined: dict[str, str] = {}
    for file in FILES:
        name = ".".join(["lightning_gif", *module(file)]).removesuffix(".__init__")
        if name != "lightning_gif.__main__":
            found = importlib.import_module(name)
            defined |= {key: name for key, value in vars(found).items() if isinstance(value, Registry)}
    listed = [re.match(r"`(\w+)\.register", row[2]) for row in rows_below("## Where to add what")]
    names = [match[1] for match in listed if match]
    assert set(names) == set(defined)
    assert len(names) == len(set(names))
    public = {name for name in lightning_gif.__all__ if isinstance(getattr(lightning_gif, name), Registry)}
    assert set(names[: len(public)]) == public
    assert len(public) == 5  # as the page says
    assert names[len(public)] in lightning_gif.unlearning.__all__


def test_the_page_says_what_an_inverse_needs() -> None:
    (row,) = [row for row in rows_below("## Where to add what") if "INVERSES" in row[2]]
    needed = {*InverseCurvature.__abstractmethods__, *InverseCurvature.__annotations__}
    assert set(re.findall(r"`(\w+)`", row[1])) - {"InverseCurvature"} == needed


def test_only_one_module_knows_the_names_of_lightnings_packages() -> None:
    package = Path(lightning_gif.__file__).parent
    pattern = re.compile(r"^\s*(?:from|import) (?:lightning|pytorch_lightning|lightning_fabric)\b", re.M)
    knowing = {str(path.relative_to(package)) for path in package.rglob("*.py") if pattern.search(path.read_text())}
    assert knowing == {"_compat.py"}
    assert GIFMixin.__mro__ == (GIFMixin, object)
