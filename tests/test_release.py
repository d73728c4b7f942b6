"""What is published: one version, and requirements that agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_gif

ROOT = Path(__file__).parent.parent

# The names of packages that conda-forge calls otherwise.
CONDA_NAMES = {"torch": "pytorch"}


@pytest.fixture
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def recipe() -> dict[str, Any]:
    jinja2 = pytest.importorskip("jinja2")

    def load_file_regex(load_file: str, from_recipe_dir: bool, regex_pattern: str) -> Any:
        assert from_recipe_dir
        return re.search(regex_pattern, (ROOT / "conda" / load_file).read_text())

    text = (ROOT / "conda" / "meta.yaml").read_text()
    return yaml.safe_load(jinja2.Template(text).render(load_file_regex=load_file_regex, PYTHON="python"))


def test_the_version_is_in_one_place(project: dict[str, Any]) -> None:
    assert "version" in project["dynamic"]
    assert recipe()["package"]["version"] == lightning_gif.__version__
    assert re.search(rf'"{re.escape(lightning_gif.__version__)}"', (ROOT / "lightning_gif" / "_version.py").read_text())


def test_the_conda_package_needs_what_the_wheel_with_its_command_line_needs(project: dict[str, Any]) -> None:
    def named(requirement: str) -> str:
        name, bounds = re.match(r"([\w-]+)(?:\[\w+\])?(.*)", requirement.replace(" ", "")).groups()  # type: ignore[union-attr]
        return f"{CONDA_NAMES.get(name, name)} {bounds}".strip()

    wheel = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    run = [str(requirement) for requirement in recipe()["requirements"]["run"]]
    of_extra = {"docstring_parser", "typeshed-client"}  # jsonargparse[signatures]
    assert set(run) - {f"python {project['requires-python']}"} - of_extra == {named(one) for one in wheel}


def test_the_extra_all_has_what_users_need(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    assert {"all", "cli", "dev", "examples", "test", "wandb"} <= set(extras)
    assert extras["all"] == ["lightning-gif[cli,examples,wandb]"]


def test_the_classifiers_name_the_versions_of_python_that_are_supported(project: dict[str, Any]) -> None:
    stated = {line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d+$", line)}
    assert min(stated, key=lambda version: int(version.partition(".")[2])) == project["requires-python"].strip(">=")
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert ours in stated
