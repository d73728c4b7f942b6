"""The template of a W&B report, built without a network: each panel shows a key that a run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import WandbLogger

from lightning_gif import ConfigurationError
from lightning_gif.reporting.wandb_template import wandb_report

from ..conftest import batch_of, fitted
from ..reports import image_net, images
from .test_wandb import read

v2: Any = pytest.importorskip("wandb_workspaces.reports.v2", reason="an optional package", exc_type=ImportError)


def panels_of(report: Any) -> list[Any]:
    return [panel for block in report.blocks if isinstance(block, v2.PanelGrid) for panel in block.panels]


def test_each_panel_shows_a_key_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer, _, dataset = fitted(image_net(), images(), logger=logger)
    trainer.influence(batch_of(dataset, [4]), name="one image")
    trainer.unlearn([4, 7], step="natural", name="two")
    keys = read(logger).keys
    panels = panels_of(wandb_report("team", "digits", queries=["one image"], edits=["two"]))
    assert len(panels) == 8
    for panel in panels:
        if isinstance(panel, v2.LinePlot):
            shown = [panel.x, *panel.y]
        elif isinstance(panel, v2.MediaBrowser):
            shown = panel.media_keys
        elif isinstance(panel, v2.ScalarChart):
            shown = [panel.metric]
        else:
            shown = [panel.table_name]
        assert set(shown) <= keys, f"{shown} of {sorted(keys)}"


def test_calls_without_a_name_have_keys_without_one() -> None:
    tables = [p.table_name for p in panels_of(wandb_report("team", "digits")) if hasattr(p, "table_name")]
    assert tables == ["gif_influence/examples", "gif_unlearn/events", "gif_unlearn/forgotten"]


@pytest.mark.parametrize("wrong", [{"entity": ""}, {"project": None}, {"queries": ["a/b"]}, {"edits": [3]}])
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="must be a text"):
        wandb_report(**{"entity": "team", "project": "digits", **wrong})


@pytest.mark.parametrize("argument", ["queries", "edits"])
def test_a_name_in_place_of_a_list_is_no_list_of_letters(argument: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"`{argument}` must be a list of names, got 'two'"):
        wandb_report("team", "digits", **{argument: "two"})
