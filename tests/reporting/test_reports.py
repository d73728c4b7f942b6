"""Reports as people use them: printed, drawn, sorted, logged to real loggers, saved, loaded and taken back."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from decimal import Decimal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_gif import ConfigurationError, EditError, GIFCallback, GIFWarning, InfluenceReport, UnlearnReport
from lightning_gif.attribution.display import rows
from lightning_gif.parameters import Targets
from lightning_gif.reporting.context import CallContext
from lightning_gif.reporting.loggers import log_figure, log_histogram, log_scalars, log_table, log_text
from lightning_gif.reporting.previews import Shown, image_of, label_of, text_of
from lightning_gif.solvers.solution import Solution, Status
from lightning_gif.storage.artifact import read_folder, write_folder

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights


def images(n: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n) % 3)


def image_net() -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


def report_of(scores: Any, **changes: Any) -> InfluenceReport:
    """A report with given scores on a data set whose indices are not their positions."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    n = scores.shape[1]
    solution = Solution(
        x=torch.zeros(2),
        status=Status.CONVERGED,
        solver="lissa",
        iterations=2,
        hvps=6,
        examples=60,
        residual=1e-3,
        unexplained=0.1,
        sigma_max=1.0,
        rtol=1e-2,
        damping=0.0,
        seconds=0.1,
        peak_memory=None,
        residuals=[1.0, 0.1, 1e-3],
    )
    values: dict[str, Any] = {
        "scores": scores,
        "indices": 100 + torch.arange(n),
        "n_train": n,
        "solutions": [solution] * len(scores),
        "curvature": {"kind": "hessian"},
        "targets": Targets({"weight": torch.tensor([0, 1])}),
        "k": 10,
        "dataset": None,
        "queries": [],
        "settings": {"method": "gif"},
        "seconds": 1.0,
    }
    return InfluenceReport(**{**values, **changes})


# --------------------------------------------------------------------------------------------------------------------
# The ranking
# --------------------------------------------------------------------------------------------------------------------


def test_the_ranking_is_that_of_a_direct_sort_by_dataset_index() -> None:
    dataset = blobs()
    kept = [5, 40, 3, 22, 11, 17, 30, 8]
    trainer = make_trainer(GIFCallback(ratio=0.5, unconverged="ignore"))
    trainer.fit(Classifier(), loader(Subset(dataset, kept)))
    report = trainer.influence(batch_of(dataset, [0, 1]), per_example=True)
    ids = report.indices.tolist()
    for query, scores in enumerate(report.scores.tolist()):
        ranked = sorted(zip(scores, ids, strict=True), reverse=True)
        assert report.proponents(3).indices[query].tolist() == [index for _, index in ranked[:3]]
        assert report.proponents(3).scores[query].tolist() == [score for score, _ in ranked[:3]]
        assert report.opponents(3).indices[query].tolist() == [index for _, index in ranked[::-1][:3]]
        assert report.opponents(3).scores[query].tolist() == [score for score, _ in ranked[::-1][:3]]
    assert report.scores.shape == (2, 8)


def test_equal_scores_are_ranked_in_order() -> None:
    scores = torch.zeros(1, 500)
    scores[0, 7] = 1.0
    report = report_of(scores)
    assert report.proponents(4).indices[0].tolist() == [107, 100, 101, 102]
    assert report.opponents(3).indices[0].tolist() == [100, 101, 102]


def test_more_than_all_are_all() -> None:
    report = report_of([[0.1, -0.2, 0.3]])
    assert report.proponents().indices.tolist() == [[102, 100, 101]]
    assert report.opponents(50).indices.tolist() == [[101, 100, 102]]


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_a_bad_k_is_refused(k: Any) -> None:
    report = report_of([[0.1, -0.2, 0.3]])
    for ask in (report.proponents, report.opponents, lambda value: report.plot(k=value)):
        with pytest.raises(ConfigurationError, match="`k` must be a whole number of at least 1"):
            ask(k)


def test_a_table_of_all_scores() -> None:
    frame = report_of([[0.1, -0.2], [0.3, 0.4]]).to_dataframe()
    assert frame.values.tolist() == [[0, 100, 0.1], [0, 101, -0.2], [1, 100, 0.3], [1, 101, 0.4]]
    assert list(frame.columns) == ["query", "index", "score"]


# --------------------------------------------------------------------------------------------------------------------
# Groups
# --------------------------------------------------------------------------------------------------------------------


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


def test_groups_are_by_label_unless_told_otherwise() -> None:
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


def test_reading_examples_leaves_the_random_generators_alone_and_shows_one_draw() -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 103

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.rand(8, 8), index % 2

    report = report_of([[0.1, -0.2, 0.3]], dataset=Noisy(), k=1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = report.plot()
    report.by_group()
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(99)
    for axes, again in zip(first.axes, report.plot().axes, strict=True):
        for one, other in zip(axes.images, again.images, strict=True):
            np.testing.assert_array_equal(one.get_array(), other.get_array())


# --------------------------------------------------------------------------------------------------------------------
# Printed
# --------------------------------------------------------------------------------------------------------------------


def test_print_names_the_strongest_and_how_the_solve_went() -> None:
    text = str(report_of([[0.1, -0.2, 0.3]], k=2))
    assert "3 training examples on 1 query (gif, 2 target parameters; lissa, converged, 2 iterations" in text
    assert "proponents: 102 (+0.3), 100 (+0.1)" in text
    assert "opponents: 101 (-0.2), 100 (+0.1)" in text


def test_print_shows_each_of_several_queries_up_to_eight() -> None:
    text = str(report_of(torch.arange(20.0).view(10, 2), k=1))
    assert "on 10 queries" in text
    assert "query 0 proponents: 101 (+1)" in text
    assert "query 7 opponents: 100 (+14)" in text
    assert "query 8" not in text
    assert "2 more queries" in text


def test_the_short_form_has_the_size_and_the_ends_of_the_ranking() -> None:
    assert repr(report_of([[0.1, -0.2, 0.3]])) == (
        "InfluenceReport(1 query × 3 training examples, strongest proponent 102 (+0.3), strongest opponent 101 (-0.2),"
        " gif, lissa converged)"
    )
    several = repr(report_of(torch.arange(20.0).view(10, 2)))
    assert "10 queries × 2 training examples, strongest proponent of query 9 101 (+19)" in several


def test_print_of_an_edit_has_both_sides_and_the_notes() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]), step="natural")
    text = str(report)
    assert f"Edit for 2 examples (goal: examples; 46 retained) by changing {report.edit.count} of 83" in text
    assert f"forget loss: {report.forget.before:.4g} -> {report.forget.after:.4g}" in text
    assert f"retain loss: {report.retain.before:.4g} -> {report.retain.after:.4g}" in text
    assert "note: The optimizer's state" in text
    corrected = trainer.unlearn(batch_of(dataset, [2, 3]), relabel=0, step="natural")
    assert corrected.relabelled is not None
    assert f"relabelled loss: {corrected.relabelled.before:.4g}" in str(corrected)


# --------------------------------------------------------------------------------------------------------------------
# Drawn
# --------------------------------------------------------------------------------------------------------------------


def titles(figure: Any) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_a_plot_of_images_shows_query_proponents_opponents_and_histogram() -> None:
    trainer, _, dataset = fitted(image_net(), images())
    report = trainer.influence(batch_of(dataset, [4]), k=3)
    figure = report.plot()
    strongest = int(report.proponents().indices[0, 0])
    score = float(report.proponents().scores[0, 0])
    assert titles(figure)[0] == "query\ntarget 1"
    assert f"#{strongest}: {strongest % 3}\n{score:+.2g}" in titles(figure)
    assert len(titles(figure)) == 1 + 3 + 3 + 2
    assert sum(len(axes.images) for axes in figure.axes) == 7
    assert {"proponents", "opponents"} <= {axes.get_ylabel() for axes in figure.axes}
    histogram = next(axes for axes in figure.axes if axes.get_title().startswith("scores"))
    assert sum(int(patch.get_height()) for patch in histogram.patches) == len(dataset)
    shown = next(axes for axes in figure.axes if axes.get_title().startswith(f"#{strongest}:"))
    np.testing.assert_array_equal(shown.images[0].get_array(), image_of(dataset[strongest]))


class Arrays(Dataset[Any]):
    """Images and labels of NumPy, which only collating makes tensors."""

    def __init__(self) -> None:
        self.images, self.labels = (tensor.numpy() for tensor in images().tensors)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


def test_images_that_a_dataset_has_as_arrays_are_shown_as_those_of_the_query_are() -> None:
    trainer, _, dataset = fitted(image_net(), Arrays())  # type: ignore[arg-type]
    report = trainer.influence(next(iter(DataLoader(dataset, 1))), k=2)
    figure = report.plot()
    assert sum(len(axes.images) for axes in figure.axes) == 1 + 2 + 2
    strongest = int(report.proponents().indices[0, 0])
    shown = next(axes for axes in figure.axes if axes.get_title().startswith(f"#{strongest}: {strongest % 3}\n"))
    np.testing.assert_array_equal(shown.images[0].get_array(), image_of(images()[strongest]))


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ((np.array([0.5, 2.0])[::-1], 1), "2, 0.5"),
        ({"x": np.arange(2, dtype=np.uint16), "label": 2}, "x: 0, 1"),
        ((np.array([1.5], dtype=">f4"), 1), "[1.5]"),
        ((np.array(["2020-01-02"], dtype="datetime64"), 1), "['2020-01-02']"),
        ((np.array("word"), 1), "word"),
    ],
)
def test_arrays_of_any_kind_in_words(item: Any, text: str) -> None:
    assert Shown.of(item).text == text


def test_a_plot_of_other_data_shows_their_values() -> None:
    trainer, _, dataset = fitted()
    report = trainer.influence(batch_of(dataset, [4, 5]), per_example=True, k=2)
    figure = report.plot(query=1)
    assert titles(figure)[0] == "query 1\ntarget 2"
    words = " ".join(text.get_text() for axes in figure.axes for text in axes.texts).replace("\n", " ")
    assert text_of(dataset[5]) in words
    assert text_of(dataset[int(report.opponents().indices[1, 0])]) in words
    figure.canvas.draw()


def test_a_plot_of_a_query_of_several_says_so_and_a_missing_query_is_refused() -> None:
    trainer, _, dataset = fitted()
    report = trainer.influence(batch_of(dataset, [4, 5]))
    assert titles(report.plot())[0] == "query, first of several\ntarget 1"
    for query in (-1, 1, 0.5):
        with pytest.raises(ConfigurationError, match="whole number from 0 to 0"):
            report.plot(query=query)  # type: ignore[arg-type]


def test_queries_beyond_the_kept_ones_are_drawn_without_a_picture() -> None:
    trainer, _, dataset = fitted(image_net(), images())
    report = trainer.influence(batch_of(dataset, list(range(10))), per_example=True, k=1)
    assert len(report.queries) == 8
    assert len(titles(report.plot(query=9))) == 2 + 2


def test_a_plot_tells_how_few_examples_carry_half_of_all_influence() -> None:
    scores = torch.zeros(1, 200)
    scores[0, [50, 60, 70]] = torch.tensor([4.0, -3.0, 3.0])  # 4 and 3 of 10: two are needed for half
    shares = report_of(scores).plot(k=1).axes[-1]
    assert shares.get_title() == "2 of 200 examples (1 %) carry half"
    curve, half, _ = shares.lines
    assert half.get_xydata().tolist() == [[2, pytest.approx(0.7)]]
    assert dict(zip(*(data.tolist() for data in curve.get_data()), strict=True))[3] == pytest.approx(1.0)
    assert curve.get_xdata()[0] == 1
    assert curve.get_xdata()[-1] == 200
    *_, histogram, second = report_of(torch.cat([scores, torch.ones(1, 200)])).plot(query=1, k=1).axes
    assert second.get_title() == "100 of 200 examples (50 %) carry half"
    assert max(patch.get_height() for patch in histogram.patches) == 200


@pytest.mark.parametrize(
    ("scores", "told"),
    [([[0.0, 0.0]], ""), ([[2.0]], "1 of 1 examples (100 %) carries half"), ([[5.0, 1.0]], "1 of 2 examples")],
)
def test_a_plot_of_few_or_no_influence_is_drawn(scores: Any, told: str) -> None:
    figure = report_of(scores).plot()
    figure.canvas.draw()
    assert figure.axes[-1].get_title().startswith(told)
    assert told or figure.axes[-1].texts[0].get_text() == "all scores are 0"


def test_texts_that_look_like_formulas_are_drawn_as_they_are() -> None:
    strange = Shown("$\\bad{$", None, "costs $5 or $\\frac{$ " * 30)
    report = report_of([[0.1, 0.2]], queries=[strange], examples={100: strange, 101: strange})
    report.plot().canvas.draw()


def test_a_solve_that_took_its_number_of_steps_is_not_said_to_have_failed() -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, [0, 1])
    assert "; cg, 20 iterations, residual" in str(trainer.influence(query))
    assert "; cg, max_iter, 2 iterations, residual" in str(trainer.influence(query, rtol=1e-9, max_iter=2))


def test_a_plot_of_an_edit_shows_the_search_and_the_solve() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]))
    search, solve = report.plot().axes
    assert search.get_title() == "losses along the change, goal: examples"
    assert solve.get_title() == f"first solve: lsmr, {report.solve['iterations']} iterations"
    forget, forget_after, retain, retain_after, _, chosen = search.lines
    assert forget_after.get_ydata()[0] == report.forget.after
    assert retain_after.get_ydata()[0] == report.retain.after
    assert forget.get_label() == "forget"
    steps = sorted(trial.step_size for trial in report.trials)
    assert forget.get_xdata().tolist() == steps == retain.get_xdata().tolist()
    assert chosen.get_xdata()[0] == report.step
    assert solve.lines[0].get_ydata().tolist() == report.residuals
    assert search.get_yscale() == "log"


def test_a_plot_of_several_changes_shows_the_losses_after_each() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, dataset.tensors[1] == 1))
    assert len(report.step_sizes) > 1
    losses, memory, _ = report.plot().axes
    assert memory.get_title() == "still predicted as the class"
    path, end = memory.lines
    assert path.get_ydata()[0] == report.memorization[0] == report.trials[0].memorization
    assert path.get_xdata().tolist() == list(range(len(report.step_sizes) + 1))
    assert end.get_ydata()[0] == report.memorization[1]
    forget, forget_after, *_ = losses.lines
    assert forget.get_xdata().tolist() == list(range(len(report.step_sizes) + 1))
    assert forget.get_ydata()[0] == pytest.approx(report.forget.before, rel=1e-6)
    assert forget.get_ydata()[-1] == pytest.approx(report.forget.after, rel=1e-3)
    assert forget_after.get_xdata()[0] == len(report.step_sizes)


def test_losses_that_are_not_positive_are_drawn_on_a_plain_scale() -> None:
    class Shifted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) - 5.0

    trainer, _, dataset = fitted(Shifted())
    search = trainer.unlearn(batch_of(dataset, [0, 1]), step=0.5).plot().axes[0]
    assert search.get_yscale() == "linear"
    low, high = search.get_ylim()
    assert low < high < 0


@pytest.mark.parametrize(
    ("item", "shape"),
    [
        ((torch.rand(1, 8, 9), 3), (8, 9)),
        (torch.rand(8, 9), (8, 9)),
        ({"x": torch.rand(3, 8, 9), "y": 1}, (8, 9, 3)),
        ((torch.rand(8, 9, 3), 1), (8, 9, 3)),
        ((torch.zeros(1, 8, 8), 3), (8, 8)),
        ((torch.full((1, 8, 8), math.nan), 3), (8, 8)),
        ((torch.rand(12), 3), None),
        ((torch.rand(4, 4), 3), None),
        ((torch.rand(2, 8, 8), 3), None),
        ("words", None),
    ],
)
def test_what_counts_as_an_image(item: Any, shape: tuple[int, ...] | None) -> None:
    found = image_of(item)
    assert (None if found is None else found.shape) == shape
    assert found is None or found.dtype == np.uint8


def test_a_large_image_is_shown_smaller_with_its_own_colours() -> None:
    image = torch.zeros(3, 1030, 700)
    image[0, :515], image[2, 515:] = 1.0, 1.0
    found = image_of(image)
    assert found is not None
    assert found.shape == (343, 233, 3)
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[-1, -1].tolist() == [0, 0, 255]
    assert image_of(torch.rand(900, 8)).shape == (450, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("item", "label", "text"),
    [
        ((torch.tensor([0.12345, 2.0]), torch.tensor(3)), 3, "0.123, 2"),
        ((torch.tensor([1, 2]), 3), 3, "1, 2"),
        ((torch.tensor([1, 2]), np.int64(4)), 4, "1, 2"),
        (("a good film", "positive"), "positive", "a good film"),
        ({"text": "a film", "label": 2}, 2, "a film"),
        ({"ids": torch.tensor([101, 7]), "text": "a film", "label": 2}, 2, "a film"),
        ({"ids": torch.tensor([101, 7]), "label": 2}, 2, "ids: 101, 7"),
        ({"premise": "rain", "hypothesis": "wet", "label": 0}, 0, "premise: rain; hypothesis: wet"),
        (("rain", "wet", 0), 0, "rain; wet"),
        ({"a": torch.tensor([1]), "b": torch.tensor([2.5]), "target": torch.tensor([0.5])}, 0.5, "a: 1; b: 2.5"),
        ((torch.tensor([1.0]), torch.tensor([2.0, 3.0])), None, "1, 2, 3"),
        (torch.tensor([7.0]), None, "7"),
        ((torch.arange(99), 1), 1, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … [99]"),
    ],
)
def test_labels_and_values_in_words(item: Any, label: Any, text: str) -> None:
    assert label_of(item) == label
    assert text_of(item) == text


def test_a_long_text_is_cut() -> None:
    assert len(text_of(("word " * 1000, 1))) <= 200


# --------------------------------------------------------------------------------------------------------------------
# Logged
# --------------------------------------------------------------------------------------------------------------------


def csv_values(logger: CSVLogger) -> dict[str, float]:
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


def event_values(folder: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_csv_has_the_values_as_soon_as_the_call_returns(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, _, dataset = fitted(logger=logger)
    answer = trainer.influence(batch_of(dataset, [0]))
    values = csv_values(logger)
    assert values["gif/influence/score_max"] == float(answer.scores.max())
    assert values["gif/influence/solve_iterations"] == answer.solution.iterations
    edit = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    values = csv_values(logger)
    assert values["gif/unlearn/forget_loss_after"] == edit.forget.after
    assert values["gif/unlearn/n_changed"] == edit.edit.count
    assert values["gif/influence/score_min"] == float(answer.scores.min())  # rewritten with more columns, not lost
    assert values["gif/targets/count"] > 0
    assert "gif/unlearn/goal" not in values  # words are not metrics


def test_tensorboard_has_the_values_at_the_step_of_training(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer, _, dataset = fitted(logger=logger)
    answer = trainer.influence(batch_of(dataset, [0]))
    edit = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    found = event_values(logger.log_dir)
    assert found["gif/influence/score_max"] == [(6, pytest.approx(float(answer.scores.max())))]
    assert found["gif/unlearn/retain_loss_before"] == [(6, pytest.approx(edit.retain.before))]
    assert trainer.global_step == 6


def test_tensorboard_has_the_figure_the_histogram_and_the_text(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer, _, dataset = fitted(image_net(), images(), logger=logger)
    answer = trainer.influence(batch_of(dataset, [4]), k=3)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0, "tensors": 0}).Reload()
    (histogram,) = events.Histograms("gif/influence/scores")
    assert histogram.step == trainer.global_step
    assert histogram.histogram_value.num == len(dataset)
    assert histogram.histogram_value.sum == pytest.approx(float(answer.scores.sum()))
    (picture,) = events.Images("gif/influence/plot")
    figure = answer.plot()
    assert (picture.width, picture.height) == tuple((figure.get_size_inches() * figure.dpi).astype(int))
    (text,) = events.Tensors("gif/influence/report/text_summary")
    told = text.tensor_proto.string_val[0].decode()
    assert [line.removeprefix("    ") for line in told.splitlines()] == str(answer).splitlines()
    assert all(line.startswith("    ") for line in told.splitlines())


def test_tensorboard_without_matplotlib_has_all_but_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    report = report_of([[0.1, -0.2, 0.3]])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.log([logger])
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert tags["images"] == []
    assert tags["histograms"] == ["gif/influence/scores"]
    assert "gif/influence/report/text_summary" in tags["tensors"]


@pytest.fixture
def wandb_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbLogger]:
    """An offline run. The logger sets WANDB_MODE for the whole process; it is put back."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    yield logger
    logger.experiment.finish()


def wandb_tables(logger: WandbLogger, key: str) -> list[dict[str, Any]]:
    found = sorted(Path(logger.experiment.dir, "media", "table").glob(f"{key}_*.table.json"), key=os.path.getmtime)
    return [json.loads(path.read_text()) for path in found]


def test_wandb_has_values_tables_and_pictures_beside_other_loggers(tmp_path: Path, wandb_logger: WandbLogger) -> None:
    others = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer, _, dataset = fitted(image_net(), images(), logger=[wandb_logger, *others])
    answer = trainer.influence(batch_of(dataset, [4, 7]), k=3, eigenvalues=2)
    trainer.unlearn(batch_of(dataset, [4]), step="natural")
    run = wandb_logger.experiment

    summary = dict(run.summary)
    assert summary["gif/influence/score_max"] == float(answer.scores.max())
    assert summary["gif/unlearn/step"] == 1.0
    assert summary["trainer/global_step"] == trainer.global_step

    (examples,) = wandb_tables(wandb_logger, "gif/influence/examples")
    assert examples["columns"] == ["query", "kind", "rank", "index", "score", "target", "example"]
    rows = [dict(zip(examples["columns"], row, strict=True)) for row in examples["data"]]
    assert [row["kind"] for row in rows] == ["query"] * 2 + ["proponent"] * 3 + ["opponent"] * 3
    assert [row["target"] for row in rows[:2]] == [1, 1]
    assert [row["index"] for row in rows[2:5]] == answer.proponents().indices[0].tolist()
    assert [row["score"] for row in rows[5:]] == answer.opponents().scores[0].tolist()
    assert all(row["target"] == row["index"] % 3 for row in rows[2:])
    assert all(row["example"] == "Image" for row in rows)  # the pictures themselves are in the table's artifact

    scores = summary["gif/influence/scores"]
    assert scores["_type"] == "histogram"
    assert sum(scores["values"]) == len(dataset)
    assert scores["bins"][-1] == pytest.approx(float(answer.scores.max()))
    (solve,) = wandb_tables(wandb_logger, "gif/influence/solve")
    assert [row[1] for row in solve["data"]] == answer.solution.residuals
    (ends,) = wandb_tables(wandb_logger, "gif/influence/eigenvalues")
    assert [row[2] for row in ends["data"]] == answer.curvature["largest"] + answer.curvature["smallest"]
    (path,) = wandb_tables(wandb_logger, "gif/unlearn/path")
    assert [row[0] for row in path["data"]] == [0.0, 1.0]

    assert csv_values(others[0])["gif/unlearn/step"] == 1.0
    assert event_values(others[1].log_dir)["gif/unlearn/step"] == [(trainer.global_step, 1.0)]
    run.log({"mine": 1})  # the run goes on
    assert run.summary["mine"] == 1


def test_wandb_tables_of_other_data_hold_their_values_for_each_query(wandb_logger: WandbLogger) -> None:
    trainer, _, dataset = fitted(logger=wandb_logger)
    trainer.influence(batch_of(dataset, list(range(10))), per_example=True, k=2)
    (examples,) = wandb_tables(wandb_logger, "gif/influence/examples")
    rows = [dict(zip(examples["columns"], row, strict=True)) for row in examples["data"]]
    queries = [row for row in rows if row["kind"] == "query"]
    assert [row["example"] for row in queries] == [text_of(dataset[index]) for index in range(8)]
    assert [row["query"] for row in queries] == list(range(8))
    assert len(rows) == 8 + 8 * 4
    assert all(row["example"] == text_of(dataset[row["index"]]) for row in rows if row["kind"] != "query")
    assert sum(wandb_logger.experiment.summary["gif/influence/scores"]["values"]) == 10 * len(dataset)


def test_a_finished_wandb_run_costs_neither_report_nor_edit(wandb_logger: WandbLogger, tmp_path: Path) -> None:
    import wandb

    after = CSVLogger(tmp_path)
    trainer, module, dataset = fitted(logger=[wandb_logger, after])
    before = weights(module)
    wandb.finish()
    with pytest.warns(GIFWarning, match="WandbLogger did not log the report.*is finished, and no new one is started"):
        answer = trainer.influence(batch_of(dataset, [0]))
    with pytest.warns(GIFWarning, match="is finished, and no new one is started"):
        answer.log()
    assert csv_values(after)["gif/influence/score_max"] == float(answer.scores.max())
    assert wandb.run is None
    assert len(list(tmp_path.rglob("*.wandb"))) == 1
    with pytest.warns(GIFWarning, match="WandbLogger did not log the report.*finished"):
        report = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    assert csv_values(after)["gif/unlearn/step"] == 1.0
    with pytest.warns(GIFWarning, match="is finished, and no new one is started"):
        report.log()
    assert not same_weights(weights(module), before)
    report.undo()
    assert same_weights(weights(module), before)


def test_a_disabled_wandb_run_takes_everything_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    trainer, _, dataset = fitted(image_net(), images(), logger=logger)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        answer = trainer.influence(batch_of(dataset, [4]), k=3)
        assert dict(logger.experiment.summary)["gif/influence/score_max"] == float(answer.scores.max())
        wandb.finish()
        answer.log()  # a run that was never one takes no harm from its end
    assert not list(tmp_path.rglob("*.wandb"))


class Broken(CSVLogger):
    """Takes what training logs, and fails at a report."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith(("gif/influence", "gif/unlearn")) for name in metrics):
            raise OSError("disk full")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_is_named_and_the_others_are_served(tmp_path: Path) -> None:
    loggers = [Broken(tmp_path, name="broken"), CSVLogger(tmp_path, name="whole")]
    trainer, module, dataset = fitted(logger=loggers)
    with pytest.warns(GIFWarning, match="Broken failed to log the report.*OSError: disk full"):
        answer = trainer.influence(batch_of(dataset, [0]))
    assert csv_values(loggers[1])["gif/influence/n_train"] == 48
    before = weights(module)
    with pytest.warns(GIFWarning, match="Broken failed to log the report"):
        edit = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    edit.undo()
    assert same_weights(weights(module), before)
    with pytest.raises(OSError, match="disk full"):
        answer.log()


def test_logging_can_be_left_out_and_made_up_for(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, _, dataset = fitted(
        callback=GIFCallback(ratio=0.5, unconverged="ignore", log_reports=False), logger=logger
    )
    answer = trainer.influence(batch_of(dataset, [0]))
    assert not any(name.startswith("gif") for name in csv_values(logger))
    answer.log(prefix="mine")
    assert csv_values(logger)["mine/n_train"] == 48
    elsewhere = CSVLogger(tmp_path, name="elsewhere")
    answer.log([elsewhere])
    assert csv_values(elsewhere)["gif/influence/n_train"] == 48


def test_no_logger_and_a_dry_run_of_the_trainer_log_nothing(tmp_path: Path) -> None:
    trainer, _, dataset = fitted(logger=False)
    report = trainer.influence(batch_of(dataset, [0]))
    assert report.loggers == []
    report.log()
    trainer, _, dataset = fitted(logger=CSVLogger(tmp_path), fast_dev_run=True)
    trainer.influence(batch_of(dataset, [0]), targets="batch").log()
    trainer.unlearn(batch_of(dataset, [0]), step=0.1)
    assert not list(tmp_path.rglob("*.csv"))


class Recorder:
    """The least that a logger can be."""

    def __init__(self) -> None:
        self.metrics: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((metrics, step))


def test_only_finite_numbers_reach_a_logger_and_tables_only_those_that_take_them() -> None:
    logger = Recorder()
    values = {"a": 1, "b": 2.5, "words": "no", "nan": math.nan, "inf": math.inf, "none": None}
    log_scalars([logger], values, prefix="x", step=3)
    assert logger.metrics == [({"x/a": 1.0, "x/b": 2.5}, 3)]
    unread = iter([[1]])
    log_table([logger], "t", ["a"], unread)
    assert next(unread) == [1]
    log_histogram([logger], "h", torch.ones(3), step=3)
    log_text([logger], "x", "words", step=3)
    log_figure([logger], "f", pytest.fail, step=3)  # type: ignore[arg-type]
    assert len(logger.metrics) == 1


def test_a_writer_of_another_make_gets_what_it_can_take() -> None:
    class Writer:
        def __init__(self) -> None:
            self.taken: dict[str, Any] = {}
            self.flushed = 0

        def add_text(self, key: str, text: str, step: int) -> None:
            self.taken[key] = (text, step)

        def flush(self) -> None:
            self.flushed += 1

    class Writing(Recorder):
        experiment = Writer()

    logger = Writing()
    report_of([[0.1, -0.2]], context=CallContext(global_step=5)).log([logger], prefix="mine")
    ((numbers, step),) = logger.metrics
    assert numbers["mine/n_train"] == 2
    assert step == 5
    assert list(logger.experiment.taken) == ["mine/report"]
    assert logger.experiment.taken["mine/report"][0].lstrip().startswith("Influence of 2 training examples")
    assert logger.experiment.flushed == 2


def test_pictures_in_tables_are_enlarged_and_show_the_example() -> None:
    import wandb

    class Tables(Recorder):
        def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
            self.cells = data[0]

    logger = Tables()
    small = image_of(images()[0])
    log_table([logger], "t", ["image", "number"], [[small, 3]])
    picture, number = logger.cells
    assert number == 3
    assert isinstance(picture, wandb.Image)
    shown = np.asarray(picture.image)
    assert shown.shape == (64, 64)
    np.testing.assert_array_equal(shown[::8, ::8], small)


def test_neither_the_package_nor_other_loggers_load_wandb(tmp_path: Path) -> None:
    """The package does not load matplotlib or pandas either. One fresh process answers both questions."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import lightning.pytorch, torchmetrics, torch.func
before = set(sys.modules)
import lightning_gif
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
from lightning.pytorch.loggers import CSVLogger
from tests.conftest import fitted, batch_of
trainer, module, data = fitted(logger=CSVLogger({str(tmp_path)!r}))
trainer.influence(batch_of(data, [0]))
trainer.unlearn(batch_of(data, [0]), step="natural")
print("wandb" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    imported = out.splitlines()[0]
    assert "lightning_gif" in imported
    for name in ("wandb", "matplotlib", "pandas"):
        assert name not in imported
    assert out.split()[-1] == "False"


# --------------------------------------------------------------------------------------------------------------------
# Saved and loaded
# --------------------------------------------------------------------------------------------------------------------


def assert_same_report(one: UnlearnReport, other: UnlearnReport) -> None:
    for name in ("indices", "old", "new"):
        first, second = getattr(one.edit, name), getattr(other.edit, name)
        assert first.keys() == second.keys()
        for key in first:
            assert first[key].dtype == second[key].dtype
            assert torch.equal(first[key], second[key])
    assert one.edit.shapes == other.edit.shapes
    assert (one.edit.digest_before, one.edit.digest_after) == (other.edit.digest_before, other.edit.digest_after)
    for name in ("goal", "step", "forget", "retain", "relabelled", "n_forget", "n_found", "n_retain", "n_parameters"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("trials", "solve", "residuals", "settings", "notes", "seconds", "global_step"):
        assert repr(getattr(one, name)) == repr(getattr(other, name))  # NaN equals itself in words only


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_report_comes_back_from_its_file_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    class Cast(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.net[0].weight.dtype)).float()

    module = Cast().to(dtype)
    trainer, _, dataset = fitted(module)
    before = weights(module)
    report = trainer.unlearn(batch_of(dataset, [0, 1]), relabel=2, step="natural")
    after = weights(module)
    assert {value.dtype for value in report.edit.new.values()} == {dtype}
    assert not same_weights(before, after)

    report.save(tmp_path / "edit.safetensors")
    loaded = UnlearnReport.load(tmp_path / "edit.safetensors")
    assert_same_report(report, loaded)
    with pytest.raises(EditError, match="pass the model"):
        loaded.undo()
    loaded.undo(module)
    assert same_weights(weights(module), before)
    bound = UnlearnReport.load(str(tmp_path / "edit.safetensors"), module)
    bound.apply()
    assert same_weights(weights(module), after)
    assert str(bound) == str(report)
    bound.plot()
    bound.log()


@pytest.mark.parametrize(("old", "new"), [("path", "trials"), ("steps", "step_sizes"), ("remembered", "memorization")])
def test_old_names_of_attributes_work_and_name_the_new_ones(old: str, new: str) -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]), step="natural", dry_run=True)
    with pytest.warns(DeprecationWarning, match=rf"`UnlearnReport\.{old}` is now `{new}`") as caught:
        assert getattr(report, old) is getattr(report, new)
    assert caught[0].filename == __file__


def test_the_old_name_of_the_processes_of_a_report_works() -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, [0, 1])
    for report in (trainer.unlearn(query, step="natural", dry_run=True), trainer.influence(query)):
        with pytest.warns(DeprecationWarning, match=rf"`{type(report).__name__}\.ranks` is now `processes`"):
            assert report.ranks is report.processes


def test_what_was_recorded_of_an_edit_cannot_be_assigned_to_and_what_is_known_of_the_trainer_can() -> None:
    trainer, module, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]), step="natural", dry_run=True)
    with pytest.raises(FrozenInstanceError, match="'retain'"):
        report.retain = report.forget
    assert report.module is module
    assert (report.loggers, report.record) == (trainer.loggers, None)
    for name, value in (("module", None), ("loggers", [1]), ("record", "log.jsonl"), ("global_step", 9)):
        setattr(report, name, value)
        assert getattr(report, name) == getattr(report.context, name) == value


def test_a_search_with_its_path_comes_back(tmp_path: Path) -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1, 2]))
    report.save(tmp_path / "edit")
    loaded = UnlearnReport.load(tmp_path / "edit")
    assert len(loaded.trials) > 2
    assert_same_report(report, loaded)


def some_edit() -> tuple[pl.LightningModule, UnlearnReport]:
    trainer, module, dataset = fitted()
    return module, trainer.unlearn(batch_of(dataset, [0]), step="natural")


def test_saving_replaces_a_file_whole_and_makes_folders(tmp_path: Path) -> None:
    _, report = some_edit()
    path = tmp_path / "new" / "folder" / "edit.safetensors"
    report.save(path)
    path.write_bytes(b"old")
    report.save(path)
    assert_same_report(report, UnlearnReport.load(path))
    assert os.listdir(path.parent) == [path.name]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # others may read it as they may any new file


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, report = some_edit()
    path = tmp_path / "edit.safetensors"
    path.write_bytes(b"old")

    def fail(*args: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        report.save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    module, report = some_edit()
    path = tmp_path / "edit.safetensors"
    report.save(path)
    content = path.read_bytes()
    for bad in (b"", b"no edit", content[:-8], content.replace(b"lightning-gif edit 4", b"lightning-gif edit 9")):
        path.write_bytes(bad)
        with pytest.raises(EditError, match=r"damaged|not an edit"):
            UnlearnReport.load(path)
    path.write_bytes(content)
    with pytest.raises(EditError, match="another model"):
        UnlearnReport.load(path, image_net())
    with pytest.raises(FileNotFoundError):
        UnlearnReport.load(tmp_path / "missing")
    UnlearnReport.load(path, module).undo()


# --------------------------------------------------------------------------------------------------------------------
# Scores saved and loaded
# --------------------------------------------------------------------------------------------------------------------


def answer_on_images(**options: Any) -> tuple[InfluenceReport, TensorDataset]:
    trainer, _, dataset = fitted(image_net(), images())
    return trainer.influence(batch_of(dataset, [4, 7, 9]), k=3, eigenvalues=2, **options), dataset


def drawn(report: InfluenceReport, query: int = 0) -> list[Any]:
    """All that a plot shows."""
    axes = report.plot(query).axes
    pictures = [image.get_array().tolist() for axis in axes for image in axis.images]
    lines = [line.get_xydata().tolist() for axis in axes for line in axis.lines]
    bars = [patch.get_height() for axis in axes for patch in axis.patches]
    return [[axis.get_title() for axis in axes], [t.get_text() for a in axes for t in a.texts], pictures, lines, bars]


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("method", ["if", "gif"])
def test_a_loaded_report_says_and_shows_the_same_without_the_dataset(
    tmp_path: Path, per_example: bool, method: str
) -> None:
    report, dataset = answer_on_images(per_example=per_example, method=method)
    report.global_step = 6
    report.save(tmp_path / "new" / "report")
    assert sorted(os.listdir(tmp_path / "new" / "report")) == ["report.json", "scores.safetensors"]
    loaded = InfluenceReport.load(tmp_path / "new" / "report")
    assert loaded.dataset is None
    assert torch.equal(loaded.scores, report.scores)
    assert torch.equal(loaded.indices, report.indices)
    assert loaded.scores.dtype == torch.float64
    for one, other in ((report.proponents(), loaded.proponents()), (report.opponents(5), loaded.opponents(5))):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.scores, other.scores)
    assert (str(loaded), repr(loaded), loaded.summary()) == (str(report), repr(report), report.summary())
    for name in ("curvature", "settings", "k", "seconds", "global_step"):
        assert getattr(loaded, name) == getattr(report, name)
    assert [s.residuals for s in loaded.solutions] == [s.residuals for s in report.solutions]
    assert loaded.solution.status is report.solution.status
    assert dict(loaded.targets).keys() == dict(report.targets).keys()
    assert all(torch.equal(loaded.targets[name], entries) for name, entries in report.targets.items())
    assert loaded.to_dataframe().equals(report.to_dataframe())
    for query in range(len(report.scores)):
        assert drawn(loaded, query) == drawn(report, query)
    assert list(map(repr, rows(loaded))) == list(map(repr, rows(report)))
    labels = loaded.by_group(dataset.tensors[1])
    assert torch.equal(labels.totals, report.by_group().totals)
    logger = CSVLogger(tmp_path)
    loaded.log([logger])
    assert csv_values(logger)["gif/influence/score_max"] == float(report.scores.max())
    loaded.save(tmp_path / "again")  # and what was loaded can be saved
    assert drawn(InfluenceReport.load(tmp_path / "again")) == drawn(report)


def test_a_loaded_report_says_which_pictures_it_has_not_and_reads_them_from_the_dataset(tmp_path: Path) -> None:
    report, dataset = answer_on_images()
    report.save(tmp_path / "report")
    assert len(drawn(InfluenceReport.load(tmp_path / "report"))[2]) == 1 + 3 + 3
    more = InfluenceReport.load(tmp_path / "report")
    more.k = 5
    assert sum("not kept" in text.replace("\n", " ") for text in drawn(more)[1]) == 4
    more = InfluenceReport.load(str(tmp_path / "report"), dataset)
    more.k = report.k = 5
    assert drawn(more) == drawn(report)
    assert torch.equal(more.by_group().totals, report.by_group().totals)
    with pytest.raises(ConfigurationError, match="10 items, but the report scores dataset indices up to 23"):
        InfluenceReport.load(tmp_path / "report", Subset(dataset, range(10)))


def test_scores_of_each_example_for_itself_are_reported_without_a_query(tmp_path: Path) -> None:
    trainer, *_ = fitted(image_net(), images(), logger=CSVLogger(tmp_path))
    report = trainer.self_influence(k=2)
    assert report.solution is None
    best = int(report.scores.argmax())
    assert f"24 training examples for themselves, strongest proponent {best} (" in repr(report)
    assert "24 training examples on themselves (if, 195 target parameters; exact; " in str(report)
    assert "change of an example's own loss if it were removed" in str(report.by_group())
    assert "\nhighest: " in str(report)
    assert "opponents" not in str(report)
    assert "change of its own loss if the example were removed" in str(report)
    assert csv_values(trainer.logger)["gif/influence/score_max"] == float(report.scores.max())  # type: ignore[arg-type]
    assert report.by_group().means.sum() * 8 == pytest.approx(float(report.scores.sum()))
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert (str(loaded), repr(loaded), loaded.summary()) == (str(report), repr(report), report.summary())
    assert drawn(loaded) == drawn(report)


def test_texts_and_labels_of_any_kind_come_back(tmp_path: Path) -> None:
    looks = [Shown(label, None, text) for label, text in (("a “b”", "schön\n$"), (None, ""), (2.5, "x"), (True, "y"))]
    strange = (math.nan, 1 + 2j, Decimal("1.5"), np.datetime64("2020-01-02"), np.bytes_(b"z"), torch.tensor(math.inf))
    looks += [Shown.of((torch.ones(2), label)) for label in strange]
    assert [shown.label for shown in looks[4:]] == ["nan", "(1+2j)", "1.5", "2020-01-02", "b'z'", "inf"]
    report = report_of([[0.1, -0.2, 0.3]], queries=looks, examples={100: looks[0]})
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert [(shown.label, shown.text) for shown in loaded.queries] == [(shown.label, shown.text) for shown in looks]
    assert list(loaded.examples) == [100]
    json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=pytest.fail)  # for other readers too


def test_all_targets_of_a_large_model_take_little_room(tmp_path: Path) -> None:
    targets = Targets({"weight": torch.arange(1_000_000), "bias": torch.tensor([0, 3, 17])})
    report_of([[0.1, -0.2]], targets=targets).save(tmp_path / "report")
    assert (tmp_path / "report" / "scores.safetensors").stat().st_size < 150_000
    loaded = InfluenceReport.load(tmp_path / "report").targets
    assert torch.equal(loaded["weight"], targets["weight"])
    assert loaded["bias"].tolist() == [0, 3, 17]


def test_a_report_is_replaced_whole_and_nothing_else_ever(tmp_path: Path) -> None:
    first, second = report_of([[0.1, -0.2]]), report_of([[0.5, -0.2, 1.0]])
    empty = tmp_path / "report"
    empty.mkdir()
    first.save(empty)
    (tmp_path / "link").symlink_to(empty)
    second.save(tmp_path / "link")
    assert InfluenceReport.load(empty).scores.tolist() == [[0.5, -0.2, 1.0]]
    assert sorted(os.listdir(tmp_path)) == ["link", "report"]
    plain = tmp_path / "file"
    plain.touch()
    assert {path.stat().st_mode for path in empty.iterdir()} == {plain.stat().st_mode}  # readable as any new file
    assert (tmp_path / "link").is_symlink()

    (empty / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for other in ("work", "foreign", "broken"):
        (tmp_path / other).mkdir()
    (tmp_path / "work" / "model.py").write_text("mine")
    (tmp_path / "foreign" / "report.json").write_text('{"format": "another 1"}')
    (tmp_path / "broken" / "report.json").write_text("mine")
    for name, what in (
        ("report", "holds notes.txt"),
        ("file", "is a file"),
        ("work", "holds model.py"),
        ("foreign", "is no report"),
        ("broken", "is no report"),
    ):
        content = sorted(str(path) for path in tmp_path.rglob("*"))
        with pytest.raises(ConfigurationError, match=f"{what}.*left alone"):
            first.save(tmp_path / name)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == content
    assert InfluenceReport.load(empty).scores.shape == (1, 3)


@pytest.mark.parametrize("failing", [1, 2], ids=["taking the old away", "putting the new in its place"])
def test_scores_that_cannot_be_saved_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    report_of([[0.1, -0.2]]).save(tmp_path / "report")
    rename = Path.rename
    calls: list[Any] = []

    def fail(self: Path, target: Any) -> Any:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        report_of([[0.5, -0.2, 1.0]]).save(tmp_path / "report")
    assert os.listdir(tmp_path) == ["report"]
    assert InfluenceReport.load(tmp_path / "report").scores.tolist() == [[0.1, -0.2]]


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report"
    report, _ = answer_on_images()
    report.save(path)
    record, scores = path / "report.json", path / "scores.safetensors"
    text, content = record.read_text(), scores.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            InfluenceReport.load(path)
        record.write_text(text)
        scores.write_bytes(content)
        InfluenceReport.load(path)

    flipped = bytearray(content)
    flipped[-1] ^= 1
    for bad in (b"", b"no scores", content[:-8], content + b"more"):
        scores.write_bytes(bad)
        refused("scores.safetensors' is damaged")
    scores.write_bytes(bytes(flipped))
    refused("is damaged or has been edited, or its two files are of different reports: the SHA-256")
    for bad_text in ("", "{", "[]", "{}", text[: len(text) // 2], text.replace('"digest": "', '"digest": 3, "x": "')):
        record.write_text(bad_text)
        refused("report.json' is damaged")
    record.write_text(text.replace("lightning-gif influence 2", "lightning-gif influence 9"))
    refused("holds 'lightning-gif influence 9', but 'lightning-gif influence 2' was expected. Load it with the version")
    for old, new in (
        ('"k": 3', '"k": 2'),
        ('"text": "', '"text": "not '),
        ('"seconds": ', '"seconds": 1'),
        ("cg", "cgls"),
    ):
        assert old in text
        record.write_text(text.replace(old, new, 1))
        refused("is damaged or has been edited")
    record.write_text(json.dumps(json.loads(text)))
    assert str(InfluenceReport.load(path)) == str(report)  # how it is laid out is not what it says

    other = report_of([[0.1, -0.2]])
    other.save(tmp_path / "other")
    scores.write_bytes((tmp_path / "other" / "scores.safetensors").read_bytes())
    refused("of different reports.*Copy both files")
    scores.unlink()
    with pytest.raises(ConfigurationError, match=r"scores\.safetensors is missing"):
        InfluenceReport.load(path)
    with pytest.raises(ConfigurationError, match=r"is a file\. A report is a folder"):
        InfluenceReport.load(record)
    with pytest.raises(FileNotFoundError, match="no report"):
        InfluenceReport.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("indices", lambda value: value[:-1], r"scores \[1, 24\].*indices \[23\].*1 solves. Expected"),
        ("indices", lambda value: -value, "do not fit together"),
        ("indices", lambda value: value.double(), "do not fit together"),
        ("scores", lambda value: value.float(), "do not fit together.*float32"),
        ("scores", lambda value: value[0], "do not fit together"),
        ("scores", lambda value: value.repeat(2, 1), "do not fit together"),
        ("scores", lambda value: value[:0], "do not fit together"),
        ("queries/0", lambda value: value.float(), "the picture 'queries/0' is torch.float32"),
        ("queries/0", lambda value: value[None, None], "expected uint8 .H, W. or .H, W, 3."),
        ("targets/net.1.weight", lambda value: value[:0], "damaged"),
    ],
)
def test_parts_that_disagree_are_refused_although_their_sum_is_right(
    tmp_path: Path, name: str, change: Any, message: str
) -> None:
    report, _ = answer_on_images(method="fif", selector=["net.1.weight"])
    report.save(tmp_path / "report")
    record, tensors = read_folder(tmp_path / "report", "lightning-gif influence 2")
    write_folder(tmp_path / "report", "lightning-gif influence 2", record, {**tensors, name: change(tensors[name])})
    with pytest.raises(ConfigurationError, match=message):
        InfluenceReport.load(tmp_path / "report")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda record, key=key: record.pop(key), "damaged: KeyError") for key in ("solutions", "looks", "settings")),
        (lambda record: record["solutions"][0].update(status="lost"), "damaged: ValueError"),
        (lambda record: record["solutions"][0].update(more=1), "damaged: TypeError"),
        (
            lambda record: record["looks"].update({"queries/../../secret": record["looks"].pop("queries/0")}),
            "ValueError",
        ),
        (lambda record: record["looks"].pop("queries/0"), "damaged: KeyError"),
    ],
)
def test_a_record_of_another_make_is_refused_although_its_sum_is_right(
    tmp_path: Path, change: Any, message: str
) -> None:
    report, _ = answer_on_images()
    report.save(tmp_path / "report")
    record, tensors = read_folder(tmp_path / "report", "lightning-gif influence 2")
    change(record)
    write_folder(tmp_path / "report", "lightning-gif influence 2", record, tensors)
    with pytest.raises(ConfigurationError, match=message):
        InfluenceReport.load(tmp_path / "report")


def test_all_of_a_report_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync, rename = os.fsync, Path.rename

    def note(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    def check(self: Path, target: Any) -> Any:
        assert {path.stat().st_ino for path in (self, *self.iterdir())} <= set(synced)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    report_of([[0.1, -0.2]]).save(tmp_path / "report")
    assert synced[-1] == tmp_path.stat().st_ino  # and so is its name


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    report, _ = answer_on_images()
    report.save(tmp_path / "report")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, pytest.fail)
    InfluenceReport.load(tmp_path / "report").plot()


class Words(Dataset[Any]):
    """Items of a mapping with a text and a plain number as label."""

    def __init__(self) -> None:
        self.data = blobs()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.data[index]
        return {"x": x, "text": f"number {index}", "label": int(y)}


def test_mappings_with_texts_are_shown_by_text_and_label() -> None:
    class OfMappings(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["label"]), batch_idx)

    trainer, _, _ = fitted(OfMappings(), Words())  # type: ignore[arg-type]
    report = trainer.influence(DataLoader(Subset(Words(), [7]), 1), k=1)
    strongest = int(report.proponents().indices[0, 0])
    figure = report.plot()
    assert f"#{strongest}: {strongest % 3}" in titles(figure)[1]
    words = [text.get_text().replace("\n", " ") for axes in figure.axes for text in axes.texts]
    assert any(f"number {strongest}" in text for text in words)
