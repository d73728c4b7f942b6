"""Names of packages that are imported on first use."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gif
from lightning_gif import ConfigurationError, GIFError, metrics

PACKAGES = [lightning_gif, metrics]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_each_name_is_that_of_the_module_in_which_type_checkers_find_it(package: object) -> None:
    name, file = package.__name__, package.__file__  # type: ignore[attr-defined]
    branch = next(node for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.If))
    imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    found = {alias.name: f"{name}.{node.module}" for node in imports for alias in node.names}
    for public in set(package.__all__) - {"__version__"}:  # type: ignore[attr-defined]
        assert getattr(package, public) is getattr(importlib.import_module(found[public]), public)
    assert set(found) == set(package.__all__) - {"__version__"}  # type: ignore[attr-defined]
    assert set(package.__all__) <= set(dir(package))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_modules_are_attributes_without_an_import_of_their_own() -> None:
    code = "import lightning_gif; print(lightning_gif.solvers.Solution.__name__, lightning_gif.metrics.models.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Solution", "lightning_gif.metrics.models"]


def test_an_unknown_name_is_no_attribute() -> None:
    for package in PACKAGES:
        assert not hasattr(package, "nothing")
        assert not hasattr(package, "__nothing__")
    with pytest.raises(ImportError, match="cannot import name 'GifCallback'"):
        exec("from lightning_gif import GifCallback")


ERRORS = """
import pickle, sys
from lightning_gif.errors import ConfigurationError
early = ConfigurationError("early")
assert "lightning" not in sys.modules
from lightning.fabric.utilities.exceptions import MisconfigurationException
late = ConfigurationError("late")
assert not isinstance(early, MisconfigurationException)
assert isinstance(late, MisconfigurationException)
again = pickle.loads(pickle.dumps(late))
assert isinstance(again, MisconfigurationException) and str(again) == "late"
print("done")
"""


@pytest.mark.slow
def test_an_error_is_one_of_lightning_where_lightning_is_imported() -> None:
    assert issubclass(ConfigurationError, GIFError)
    assert type(ConfigurationError("one")).__name__ == "ConfigurationError"
    done = subprocess.run([sys.executable, "-c", ERRORS], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["done"], done.stderr
