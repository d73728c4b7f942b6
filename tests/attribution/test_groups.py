"""Scores summed over groups of examples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from lightning_gif import ConfigurationError, GIFCallback

from ..conftest import Classifier, batch_of, blobs, loader, make_trainer
from ..reports import report_of


def test_a_group_is_the_sum_of_its_scores_and_groups_are_ranked() -> None:
    report = report_of([[0.1, -0.2, 0.3, 0.05], [1.0, 2.0, 4.0, 8.0]])
    groups = report.by_group({100: "a", 101: "b", 102: "a", 103: "c"}, query=0)
    assert groups.names == ["a", "c", "b"]
    assert groups.totals.tolist() == [pytest.approx(0.4), 0.05, -0.2]
    assert groups.counts.tolist() == [2, 1, 1]
    assert groups.means.tolist() == [pytest.approx(0.2), 0.05, -0.2]
    assert report.by_group({100: "a", 101: "b", 102: "a", 103: "c"}, query=1).totals.tolist() == [8.0, 5.0, 2.0]
    both = report.by_group({100: "a", 101: "b", 102: "a", 103: "c"})
    assert dict(zip(both.names, both.totals.tolist(), strict=True)) == pytest.approx({"a": 2.7, "b": 0.9, "c": 4.025})
    assert "removing the whole group on the mean of 2 queries" in str(both)
    assert "group on query 0" in str(groups)
    assert groups.to_dataframe().values.tolist() == [
        ["a", pytest.approx(0.4), 2, pytest.approx(0.2)],
        ["c", 0.05, 1, 0.05],
        ["b", -0.2, 1, -0.2],
    ]
    assert list(groups.to_dataframe().columns) == ["group", "total", "count", "mean"]


def test_a_column_is_looked_up_by_dataset_index_whatever_it_is_held_in() -> None:
    import pandas

    report = report_of([[0.1, -0.2, 0.3]], dataset=range(104))
    column = [0] * 100 + [7, 8, 7, 9]
    for groups in (column, tuple(column), np.array(column), torch.tensor(column), pandas.Series(column)):
        assert report.by_group(groups).names == [7, 8]
        assert report.by_group(groups).totals.tolist() == [pytest.approx(0.4), -0.2]
    assert report.by_group(lambda index: index % 2).names == [0, 1]
    assert report.by_group([None] * 100 + [math.nan, float("nan"), None, 0]).counts.tolist() == [1, 2]  # missing values


def test_groups_are_by_label_by_default() -> None:
    dataset = blobs()
    kept = [5, 40, 3, 22, 11, 17, 30, 8]
    trainer = make_trainer(GIFCallback(ratio=0.5, unconverged="ignore"))
    trainer.fit(Classifier(), loader(Subset(dataset, kept)))
    report = trainer.influence(batch_of(dataset, [0, 1]), per_example=True)
    labels = [index % 3 for index in kept]
    for query in range(2):
        groups = report.by_group(query=query)
        for name, total, count in zip(groups.names, groups.totals.tolist(), groups.counts.tolist(), strict=True):
            members = [position for position, label in enumerate(labels) if label == name]
            assert total == pytest.approx(float(report.scores[query, members].sum()), abs=1e-15)
            assert count == len(members)
        assert groups.totals.tolist() == sorted(groups.totals.tolist(), reverse=True)
        assert float(groups.totals.sum()) == pytest.approx(float(report.scores[query].sum()))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([1, 2, 3], "has 3 values, but 104 .one for each item of the training dataset. were expected.*a mapping"),
        ([1] * 105, "has 105 values"),
        (np.zeros((104, 2)), "an array of 2 axes"),
        ("label", "one value for each item of the training dataset.*got 'label'"),
        (3, "got 3"),
        ({100: 1}, r"no value for 2 of the 3 training examples: indices \[101, 102\]"),
        ([[1]] * 104, "one name or number for each example .unhashable"),
        (None, "no single label"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        report_of([[0.1, -0.2, 0.3]], dataset=range(104)).by_group(groups)


def test_groups_of_no_query_and_without_a_dataset_are_refused() -> None:
    report = report_of([[0.1, -0.2, 0.3]])
    for query in (-1, 1, True, 0.5):
        with pytest.raises(ConfigurationError, match="whole number from 0 to 0"):
            report.by_group({}, query=query)
    for groups in (None, lambda item: 0):
        with pytest.raises(ConfigurationError, match="loaded without its dataset"):
            report.by_group(groups)
    with pytest.raises(ConfigurationError, match="has 102 values, but at least 103 were expected"):
        report.by_group([0] * 102)


def test_groups_are_printed_with_their_ends() -> None:
    report = report_of(torch.arange(-50.0, 50.0)[None])
    text = str(report.by_group({100 + i: f"source {i}" for i in range(100)}))
    lines = text.splitlines()
    assert lines[1].split() == ["group", "total", "examples", "mean"]
    assert lines[2].split() == ["source", "99", "+49", "1", "+49"]
    assert lines[-1].split() == ["source", "0", "-50", "1", "-50"]
    assert "… 80 more" in text
    assert len(lines) == 2 + 10 + 1 + 10
    assert len(str(report.by_group({100 + i: i % 21 for i in range(100)})).splitlines()) == 2 + 21
