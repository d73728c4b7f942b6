"""Influence reports while a model trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_gif import ConfigurationError, GIFCallback, GIFWarning

from ..conftest import Classifier, batch_of, blobs, loader, make_trainer, same_weights, weights
from ..doubles import TableRecorder


def test_reports_in_training_change_nothing_and_show_when_examples_start_to_matter() -> None:
    dataset, logger = blobs(), TableRecorder()
    query = batch_of(dataset, slice(0, 3))
    reporting = GIFCallback(report_every_n_epochs=2, query=query, report_options={"k": 3, "name": "three"})
    trained = []
    for callback in (GIFCallback(), reporting):
        torch.manual_seed(0)
        module = Classifier()
        make_trainer(callback, max_epochs=5, logger=logger).fit(module, loader(dataset))
        trained.append(weights(module))
    assert same_weights(*trained)
    columns, *rows = logger.tables["gif_influence/three/history"]
    assert columns == ["epoch", "name", "query", "kind", "rank", "index", "score"]
    assert [row[0] for row in rows] == [1] * 6 + [3] * 6
    last = reporting.last_report
    assert last is not None
    assert [row[5] for row in rows[6:9]] == last.proponents().indices[0].tolist()
    assert {row[1] for row in rows} == {"three"}
    assert len(logger.values("gif_influence/three/score_max")) == 2


def test_reports_go_on_with_a_checkpoint(tmp_path: Path) -> None:
    dataset = blobs()
    options: dict[str, Any] = {"report_every_n_epochs": 1, "query": batch_of(dataset, slice(0, 3))}
    trainer = make_trainer(GIFCallback(**options), max_epochs=2)
    trainer.fit(Classifier(), loader(dataset))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    logger = TableRecorder()
    again = make_trainer(GIFCallback(**options), max_epochs=3, logger=logger)
    again.fit(Classifier(), loader(dataset), ckpt_path=tmp_path / "two.ckpt")
    assert sorted({row[0] for row in logger.tables["gif_influence/history"][1:]}) == [0, 1, 2]


class Endless(IterableDataset[Any]):
    """Examples without an index."""

    def __iter__(self) -> Iterator[Any]:
        return iter(blobs())


@pytest.mark.parametrize(
    ("query", "data", "message"),
    [
        (torch.zeros(3, 6), blobs(), "query"),
        ((torch.zeros(2, 5), torch.tensor([0, 1])), blobs(), "query"),
        (17, blobs(), "Expected a batch"),
        (batch_of(blobs(), slice(2)), Endless(), "IterableDataset"),
    ],
)
def test_a_query_or_data_that_give_no_report_do_not_cost_the_run(query: Any, data: Any, message: str) -> None:
    callback = GIFCallback(report_every_n_epochs=1, query=query)
    trainer = make_trainer(callback, max_epochs=2)
    module = Classifier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data, 16))
    warned = [str(one.message) for one in caught if "influence report" in str(one.message)]
    assert len(warned) == 1
    assert message in warned[0]
    assert trainer.current_epoch == 2
    assert callback.last_report is None
    assert callback.targets is not None


def test_reports_come_back_in_the_next_fit_once_the_query_fits() -> None:
    callback = GIFCallback(report_every_n_epochs=1, query=torch.zeros(3, 6))
    with pytest.warns(GIFWarning, match="No influence reports in this fit"):
        make_trainer(callback, max_epochs=1).fit(Classifier(), loader(blobs()))
    callback.query = batch_of(blobs(), slice(3))
    make_trainer(callback, max_epochs=1).fit(Classifier(), loader(blobs()))
    assert callback.last_report is not None


def test_a_state_without_the_epoch_of_the_targets_can_be_loaded() -> None:
    callback = GIFCallback()
    callback.load_state_dict({"history": []})
    assert callback.targets_epoch is None


def test_a_report_that_fails_does_not_cost_the_run() -> None:
    dataset = blobs()
    callback = GIFCallback(
        report_every_n_epochs=1, query=batch_of(dataset, slice(0, 3)), report_options={"method": "sif"}
    )
    trainer = make_trainer(callback, max_epochs=2)
    with pytest.warns(GIFWarning, match="No influence report at the end of epoch 0.*sif"):
        trainer.fit(Classifier(), loader(dataset))
    assert callback.last_report is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"report_every_n_epochs": 0, "query": 1}, "whole number of at least 1, got 0"),
        ({"report_every_n_epochs": 2}, "must be given together"),
        ({"query": [1]}, "must be given together"),
        ({"report_options": {"k": 3}}, "`report_every_n_epochs`"),
        ({"report_every_n_epochs": 1, "query": 1, "report_options": {"top": 3}}, "Unknown argument 'top'"),
    ],
)
def test_bad_arguments_of_reports_in_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GIFCallback(**arguments)
