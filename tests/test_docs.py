"""The pages say what is true of the code: their code can be run, and the names and messages in them exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers.logger import DummyLogger

import lightning_gif
from lightning_gif import SELECTORS, SOLVERS, GIFCallback
from lightning_gif.unlearning import GOALS

from .conftest import batch_of, fitted

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"])
METHODS = ("influence", "self_influence", "validate_influence", "unlearn", "store_gradients")
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), re.M | re.S)
    return [textwrap.dedent(code) for _, code in found]


def of_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --------------------------------------------------------------------------------------------------------------------
# CONTRIBUTING
# --------------------------------------------------------------------------------------------------------------------


def parsed(diff: str) -> tuple[str, str, str]:
    """The module that a diff changes, and its lines before and after."""
    head, *lines = diff.splitlines()
    name = head.removeprefix("+++ b/").removesuffix(".py").replace("/", ".")
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
    after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
    return name, before, after


@pytest.fixture
def added() -> Iterator[None]:
    """Removes the entries that a test has added to the registries."""
    registries: list[Any] = [SELECTORS, SOLVERS, GOALS]
    before = [dict(registry._items) for registry in registries]
    yield
    for registry, items in zip(registries, before, strict=True):
        registry._items.clear()
        registry._items.update(items)


def apply_diff(of: str) -> ModuleType:
    """A module after the diff of the page that changes it. Additions alone run in the namespace of the module."""
    diffs = [parsed(diff) for diff in blocks(ROOT / "CONTRIBUTING.md", "diff")]
    ((name, before, after),) = [diff for diff in diffs if diff[0] == of]
    original = importlib.import_module(name)
    changed = ModuleType(name)
    if before:
        source = inspect.getsource(original)
        assert source.count(before) == 1
        vars(changed).update(__package__=original.__package__)
        exec(source.replace(before, after), vars(changed))
    else:
        vars(changed).update(vars(original))
        exec(after, vars(changed))
    return changed


def run_block(containing: str, **names: Any) -> dict[str, Any]:
    """The names after a Python block of CONTRIBUTING."""
    (code,) = [code for code in blocks(ROOT / "CONTRIBUTING.md", "python") if containing in code]
    exec(code, names)
    return names


def test_a_selector_can_be_added_as_the_page_says(added: None) -> None:
    apply_diff("lightning_gif.selection.selectors")
    trainer, module, dataset = fitted(callback=GIFCallback(cache_neurons=False, cache_gradients=False))
    before = module.net[0].weight.detach().clone()
    edit = run_block("first_neurons", trainer=trainer, batch=batch_of(dataset, [0, 3]))["edit"]
    changed = (module.net[0].weight != before).any(1)
    assert edit.settings["selector"] == "first_neurons"
    assert changed[:1].all()
    assert not changed[2:].any()  # a fifth of eight neurons: the first, and a part of the second


def test_a_solver_can_be_added_as_the_page_says(added: None) -> None:
    apply_diff("lightning_gif.solvers.lsmr")
    trainer, _, dataset = fitted()
    batch = batch_of(dataset, [0, 3])
    report = run_block("restarted_lsmr", trainer=trainer, batch=batch)["report"]
    once = trainer.influence(batch, solver="lsmr")
    assert report.solution.solver == "restarted_lsmr"
    assert report.solution.residual < once.solution.residual
    assert report.solution.hvps > once.solution.hvps


def test_a_goal_can_be_added_as_the_page_says(added: None, capsys: pytest.CaptureFixture[str]) -> None:
    apply_diff("lightning_gif.unlearning.goals")
    trainer, _, _ = fitted(max_epochs=20)
    edit = run_block("even labels", trainer=trainer)["edit"]
    assert capsys.readouterr().out == "even labels\n"
    assert edit.settings["tuning"]["goal"]["corrected_weight"] == 1.0


def test_a_logger_needs_no_entry_or_one_more_case(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _, dataset = fitted()
    report = trainer.influence(batch_of(dataset, [0]))
    run_block("log_table", report=report, DummyLogger=DummyLogger)
    assert re.search(r"^gif_influence/examples \d+$", capsys.readouterr().out, re.M)
    texts: list[tuple[str, int, dict[str, str]]] = []
    experiment = SimpleNamespace(log_text=lambda text, step, metadata: texts.append((text, step, metadata)))
    comet = SimpleNamespace(experiment=experiment)
    apply_diff("lightning_gif.reporting.loggers").log_text([comet], "gif_influence/report", "a\nb", step=3)
    assert texts == [("a\nb", 3, {"key": "gif_influence/report"})]


# --------------------------------------------------------------------------------------------------------------------
# All pages
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_the_python_on_a_page_names_what_exists(page: Path) -> None:
    """Code can be parsed, imports of the package work, and its calls have the arguments that are named."""
    callback = {name: inspect.signature(getattr(GIFCallback, name)).parameters for name in METHODS}
    options = set(inspect.signature(GIFCallback).parameters)
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_gif"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, one.name) for one in node.names), ast.unparse(node)
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                if called == "GIFCallback":
                    assert given <= options, ast.unparse(node)
                elif called.removeprefix("trainer.") in METHODS and called.startswith("trainer."):
                    known = {*callback[called.removeprefix("trainer.")], *options}
                    assert given <= known, ast.unparse(node)


def names_of_how_to() -> dict[str, Any]:
    """What a reader of the how-to pages has: a trainer after a fit, data, and the imports that the pages leave out."""
    trainer, model, dataset = fitted(callback=GIFCallback(snapshots=1), max_epochs=6)
    x, y = dataset.tensors
    people = [f"p-{1090 + i % 12}" for i in range(len(dataset))]
    return {
        **{name: getattr(torch.utils.data, name) for name in ("DataLoader", "Subset")},
        **{"torch": torch, "F": F, "LightningModule": LightningModule, "GIFCallback": GIFCallback},
        **{"trainer": trainer, "model": model, "train_set": dataset, "x": x, "y": y},
        **{"batch": (x[:4], y[:4]), "data": Data(dataset), "sources": [i % 4 for i in range(len(dataset))]},
        **{"people": people, "still_allowed": [i for i, one in enumerate(people) if one != "p-1093"]},
        "test_set": [(x[i % len(x)], int(y[i % len(x)])) for i in range(400)],
        **{"triggered_images": x[:5] + 1, "correct_labels": y[:5]},
        "correct_labels_of_suspects": y[:20],
    }


class Data(LightningDataModule):
    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.dataset = dataset

    def test_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.dataset, 16)


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("*.md")), ids=of_page)
def test_the_code_of_a_how_to_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, names_of_how_to())


def test_a_deletion_request_is_answered_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of_how_to()
    run_page(DOCS / "how-to" / "deletion-request.md", names)
    assert names["indices"] == [3, 15, 27, 39]
    assert {file.name for file in tmp_path.iterdir()} >= {"deletions.jsonl", "edit.safetensors", "edited.ckpt"}
    entries = [json.loads(entry) for entry in (tmp_path / "deletions.jsonl").read_text().splitlines()]
    assert [entry["event"] for entry in entries] == ["dry_run", "apply"]
    assert all(entry["asked"]["indices"] == names["indices"] for entry in entries)
    assert lightning_gif.verify("deletions.jsonl", edits=["edit.safetensors"], checkpoint="edited.ckpt").ok


def run_page(page: Path, names: dict[str, Any]) -> None:
    """Runs the Python of a page, on the small data: 48 examples of 3 labels."""
    smaller = (("4031", "31"), ("tensor([3, 8])", "tensor([1, 2])"), ("[1] == 3", "[1] == 2"), ("(60)", "(20)"))
    for code in blocks(page, "python"):
        for given, here in smaller:
            code = code.replace(given, here)
        exec(code, names)


def test_all_public_names_are_in_the_reference() -> None:
    """Each public package has a page with the members of ``__all__``; those of the package itself are listed."""
    listed = re.findall(r"^\.\. (?:data|auto(?!module)\w+):: (\w+)$", (DOCS / "api" / "index.md").read_text(), re.M)
    assert sorted(listed) == sorted({*lightning_gif.__all__} - {"__version__"})
    pages = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    packages = [f"lightning_gif.{file.parent.name}" for file in (ROOT / "lightning_gif").glob("*/__init__.py")]
    public = {name for name in packages if hasattr(importlib.import_module(name), "__all__")}
    public.remove("lightning_gif.cli")  # its commands have a page of their own
    assert set(re.findall(r"automodule:: (\S+)", pages)) == {*public, "lightning_gif.registry"}
    for module, names in re.findall(r"automodule:: (\S+)\n.*\n.*exclude-members: (.*)", pages):
        for name in names.split(", "):
            assert getattr(importlib.import_module(module), name) is getattr(lightning_gif, name)


def test_every_example_is_in_the_gallery() -> None:
    examples = {file.stem for file in (ROOT / "examples").glob("*.py") if '"__main__"' in file.read_text()}
    pages = (DOCS / "gallery").glob("*.md")
    shown = {name for page in pages for name in re.findall(r"^```\{example\} (\w+)$", page.read_text(), re.M)}
    assert shown == examples
    assert all(f":link: {name}\n" in (DOCS / "gallery" / "index.md").read_text() for name in examples)


def test_notebooks_are_stored_without_results() -> None:
    assert len(NOTEBOOKS) == 2
    for file in NOTEBOOKS:
        for cell in json.loads(file.read_text())["cells"]:
            assert not cell.get("outputs"), file.name
            assert cell.get("execution_count") is None, file.name


# --------------------------------------------------------------------------------------------------------------------
# Messages
# --------------------------------------------------------------------------------------------------------------------


def text_of(node: ast.AST) -> str | None:
    """The text of a string or an f-string in code, with ``…`` for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def test_each_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    texts = [
        text
        for file in sorted((ROOT / "lightning_gif").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if (text := text_of(node)) is not None and len(text) > 20
    ]
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.M)
    of_others = {
        "'Trainer' object has no attribute '…'",
        "Found more than one stateful callback of type `GIFCallback`.",
    }
    missing = []
    for heading in headings:
        parts = [part.strip() for part in heading.split("…")]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
        if heading not in of_others and not any(max(parts, key=len) in text and pattern.search(text) for text in texts):
            missing.append(heading)
    assert len(headings) > 40
    assert not missing
