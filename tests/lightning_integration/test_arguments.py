"""The callback's arguments, as Python, the documentation and LightningCLI list them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_gif import GIFCallback
from lightning_gif.config import Overrides, Settings

from ..conftest import Classifier, batch_of, blobs
from ..doubles import quick
from ..line import Blobs


def test_names_that_lightning_overwrites_on_callbacks_are_not_used() -> None:
    assert not {"log", "log_dict"} & set(dir(GIFCallback))


class Small(Classifier):
    """A module with arguments that a command line can give."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)))


CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_gif.GIFCallback
      init_args:
        selector: {selector}
        ratio: 0.25
        damping: 0.01
        curvature_examples: null
        unconverged: ignore
"""


def run_cli(tmp_path: Path, *args: str, selector: str = "lowest_k_outputs") -> LightningCLI:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(selector=selector))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LightningCLI(Small, Blobs, save_config_callback=None, args=["fit", "--config", str(config), *args])


@pytest.mark.parametrize(("written", "read"), [("lowest_k_outputs", "lowest_k_outputs"), ('["net.2.*"]', ["net.2.*"])])
def test_the_command_line_builds_the_callback_and_fits(tmp_path: Path, written: str, read: Any) -> None:
    cli = run_cli(tmp_path, selector=written)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, GIFCallback)]
    assert (callback.settings.selector, callback.settings.ratio) == (read, 0.25)
    assert callback.settings.curvature_examples is None
    assert cli.trainer.influence(batch_of(blobs(), slice(4))).scores.shape == (1, 48)


def test_print_config_serialises_every_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_cli(tmp_path, "--print_config")
    printed = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert "Unable to serialize" not in printed
    for name in list(inspect.signature(GIFCallback.__init__).parameters)[1:]:
        assert re.search(rf"\b{name}: ", printed), name


def test_the_command_line_refuses_a_bad_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as end:
        run_cli(tmp_path, selector="lowest_k_output")
    assert "lowest_k_outputs" in str(end.value) + capsys.readouterr().err


def test_the_options_have_the_same_names_types_and_defaults_wherever_they_are_listed() -> None:
    arguments = inspect.signature(GIFCallback).parameters
    settings = {field.name: field for field in dataclasses.fields(Settings)}
    assert set(settings) <= arguments.keys()
    assert list(settings) == list(Overrides.__annotations__)
    types, changes = typing.get_type_hints(GIFCallback.__init__), typing.get_type_hints(Overrides)
    for name, field in settings.items():
        if name != "selector":  # the command line needs list[str], where a call may take any sequence
            assert types[name] == changes[name], name
        assert field.default in (dataclasses.MISSING, arguments[name].default), name
        assert getattr(GIFCallback().settings, name) == arguments[name].default
    args = (inspect.getdoc(GIFCallback) or "").partition("Args:")[2].partition("Raises:")[0]
    assert re.findall(r"^    (\w+): ", args, re.M) == list(arguments)
    page = (Path(__file__).parents[2] / "docs" / "choosing-a-method.md").read_text().partition("## All arguments")[2]
    listed = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `(.+?)` \|", page, re.M)
    defaults = {name: ast.literal_eval(default) for names, default in listed for name in re.findall(r"\w+", names)}
    assert defaults == {name: argument.default for name, argument in arguments.items()}


def test_the_state_key_distinguishes_callbacks() -> None:
    assert quick().state_key != quick(selector="random").state_key
    assert quick().state_key == quick(max_iter=7).state_key


def test_errors_are_misconfigurations_to_lightning() -> None:
    with pytest.raises(MisconfigurationException):
        GIFCallback(ratio=2.0)
