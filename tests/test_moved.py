"""Old import paths work for one more version, and warn with the new path."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import lightning_gif
from lightning_gif._moved import MOVED

# What was public before the modules were sorted into packages.
PUBLIC: dict[str, str] = json.loads(Path(__file__).with_name("public_names.json").read_text())


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in PUBLIC for name in PUBLIC[module].split()])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_public_name_is_at_its_old_path(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("old", sorted(MOVED))
def test_the_warning_about_an_old_name_has_the_new_name(old: str) -> None:
    module = importlib.import_module(f"lightning_gif.{old}")
    for new, names in MOVED[old].items():
        for entry in names.split():
            before, _, after = entry.partition("=")
            with pytest.warns(DeprecationWarning, match=f"lightning_gif.{new}.{after or before}") as caught:
                getattr(module, before)
            assert caught[0].filename == __file__


def test_an_unknown_name_is_not_an_attribute() -> None:
    with pytest.raises(AttributeError, match=r"lightning_gif\.settings.*nothing"):
        importlib.import_module("lightning_gif.settings").nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lightning_gif.nothing")


def test_the_package_itself_causes_no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    assert all(getattr(lightning_gif, name) is not None for name in lightning_gif.__all__)
    assert not [warning for warning in recwarn if "lightning_gif" in str(warning.message)]
