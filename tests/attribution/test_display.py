"""How an influence report is printed and drawn."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_gif import ConfigurationError, GIFCallback, GIFMixin, GIFWarning, InfluenceReport
from lightning_gif.data.names import find_class_names
from lightning_gif.reporting.notes import describe_solve
from lightning_gif.reporting.previews import Shown, image_of, text_of
from lightning_gif.solvers import Status

from ..conftest import Classifier, batch_of, blobs, fitted, make_trainer
from ..nets import Regressor
from ..reports import axes_of, bars_of, csv_values, drawn, image_net, images, report_of, titles, words


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


def test_print_names_the_strongest_and_how_the_solve_went() -> None:
    text = str(report_of([[0.1, -0.2, 0.3]], k=2))
    assert "3 training examples on 1 query (" in text
    solved = "by the method 'gif' and the solver 'lissa' (converged after 2 iterations, residual "
    assert f"\ncomputed over 2 target parameters {solved}" in text
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
        " method 'gif', solver 'lissa' (converged))"
    )
    several = repr(report_of(torch.arange(20.0).view(10, 2)))
    assert "10 queries × 2 training examples, strongest proponent of query 9 101 (+19)" in several


def test_a_plot_says_what_was_asked_how_it_is_read_and_which_examples_moved_it() -> None:
    trainer, module, dataset = fitted(image_net(), images())
    report = trainer.influence(batch_of(dataset, [4]), k=3)
    figure = report.plot()
    probabilities = module(dataset.tensors[0][4:5])[0].softmax(0).tolist()
    best = max(range(3), key=probabilities.__getitem__)
    read = f"Label 1, read as {best} ({100 * probabilities[best]:.1f} %)"
    assert figure.get_suptitle() == read
    assert f"query: {read[0].lower()}{read[1:]}" in str(report)
    bars = bars_of(figure, "How the model reads it")
    assert bars == {
        f"{label}{' (label)' if label == 1 else ''}": pytest.approx(probabilities[label], rel=1e-4)
        for label in sorted(range(3), key=lambda label: -probabilities[label])
    }
    strongest = int(report.proponents().indices[0, 0])
    score = float(report.proponents().scores[0, 0])
    assert f"#{strongest} label {strongest % 3}\n{score:+.2g}" in titles(figure)
    assert sum(len(axes.images) for axes in figure.axes) == 7
    headings = [text for text in words(figure) if "without one of them" in text]
    assert headings == [
        "Proponents: without one of them, the query's loss would be higher",
        "Opponents: without one of them, the query's loss would be lower",
    ]
    shown = next(axes for axes in figure.axes if axes.get_title().startswith(f"#{strongest} "))
    np.testing.assert_array_equal(shown.images[0].get_array(), image_of(dataset[strongest]))


def test_a_plot_adds_up_the_scores_by_class_and_marks_the_label_and_the_prediction() -> None:
    trainer, module, dataset = fitted(image_net(), images())
    report = trainer.influence(batch_of(dataset, [4]))
    groups = report.by_group()
    predicted = int(module(dataset.tensors[0][4:5]).argmax())

    def name(label: int) -> str:
        marks = ", ".join(["label"] * (label == 1) + ["read as"] * (label == predicted))
        return f"{label} ({marks})" if marks else str(label)

    expected = dict(zip(map(name, groups.names), groups.totals.tolist(), strict=True))
    bars = bars_of(report.plot(), "Scores added up by class")
    assert list(bars) == list(expected)
    assert list(bars.values()) == pytest.approx(list(expected.values()))
    assert f"by class: {groups.names[0]} {groups.totals[0]:+.2g}, " in str(report)


def test_classes_have_their_names(tmp_path: Path) -> None:
    class Named(TensorDataset):
        classes = ("ant", "bee", "$cat_")

    given = GIFCallback(class_names=["one", "two", "three"])
    for callback, names in ((None, Named.classes), (given, given.class_names)):
        trainer, *_ = fitted(image_net(), Named(*images().tensors), callback)
        report = trainer.influence(batch_of(images(), [4]), k=2)
        assert list(report.class_names) == list(names)
        report.save(tmp_path / names[0])
        for one in (report, InfluenceReport.load(tmp_path / names[0])):
            figure = one.plot()
            assert figure.get_suptitle().startswith(f"Label {names[1]}, read as ")
            bars = bars_of(figure, "Scores added up by class")
            assert {name.partition(" (")[0] for name in bars} == set(names)
            strongest = int(report.proponents().indices[0, 0])
            assert f"#{strongest} {names[strongest % 3]}" in titles(figure)[3]
            groups = one.by_group()
            assert set(groups.names) == {0, 1, 2}
            assert {line.split()[0] for line in str(groups).splitlines()[2:]} == set(names)
            assert all(name in groups._repr_html_() for name in names)
            assert str(one.by_group(list(range(len(images()))))).splitlines()[2].split()[0].isdigit()
    report.class_names = None
    assert report.plot().get_suptitle().startswith("Label 1, read as ")
    with pytest.raises(ConfigurationError, match=r"`class_names` must be a list .* got \[1, 2\]"):
        GIFCallback(class_names=[1, 2])  # type: ignore[list-item]


def test_labels_without_a_name_cause_a_warning_whose_remedy_works() -> None:
    trainer, *_ = fitted(image_net(), images(), GIFCallback(class_names=["ant", "bee"], ratio=0.5))
    with pytest.warns(GIFWarning, match="names of 2 classes, but the data have the label 2.* list of 3 names"):
        report = trainer.influence(batch_of(images(), [4]))
    assert "by class: " in str(report)
    with pytest.warns(GIFWarning, match="names of 2 classes, but the data have the label 2"):
        trainer.unlearn(batch_of(images(), [4]), dry_run=True)
    trainer.callbacks[0].class_names = ["ant", "bee", "cat"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.influence(batch_of(images(), [4]))
    assert not any("names of" in str(warning.message) for warning in caught)


def test_a_datamodule_may_have_the_names_and_a_subset_those_of_its_dataset() -> None:
    class Data(pl.LightningDataModule):
        classes = ("a", "b", "c")

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(images(), 8)

    trainer = make_trainer(GIFCallback())
    trainer.fit(image_net(), datamodule=Data())
    assert trainer.influence(batch_of(images(), [4])).class_names == ["a", "b", "c"]
    assert find_class_names(object(), Subset(Subset(Data(), [0]), [0])) == ["a", "b", "c"]  # type: ignore[arg-type]
    for nothing in ([1, 2], "abc", [], None, {"a": 1}, 3):
        assert find_class_names(SimpleNamespace(classes=nothing)) is None


def test_of_many_classes_those_with_the_largest_and_the_smallest_sums_are_drawn() -> None:
    x, y = blobs(300, classes=100).tensors
    net = Classifier(torch.nn.Linear(6, 100))
    trainer, *_ = fitted(net, TensorDataset(x, y))
    report = trainer.influence((x[:1], y[:1]))
    figure = report.plot()
    names = [label.get_text() for label in axes_of(figure, "Scores added up by class").get_yticklabels()]
    groups = report.by_group()
    assert names[6] == "… 88 more"
    shown = [int(name.partition(" ")[0]) for name in names[:6] + names[7:]]
    assert shown == groups.names[:6] + groups.names[-6:]
    assert len(axes_of(figure, "How the model reads it").patches) == 5
    assert any("(label" in name for name in bars_of(figure, "How the model reads it"))
    assert "by class" not in str(report)


def test_a_plot_of_a_regression_has_target_and_output_and_no_classes() -> None:
    trainer, module, dataset = fitted(Regressor(), TensorDataset(blobs().tensors[0], torch.rand(48)))
    x, y = batch_of(dataset, [4])
    report = trainer.influence((x, y), k=2)
    output = float(module(x)[0, 0])
    figure = report.plot()
    assert figure.get_suptitle() == f"Target {float(y):.4g}, model output {output:.4g}"
    assert titles(figure) == ["The query"]
    strongest = int(report.proponents().indices[0, 0])
    assert f"#{strongest} target {float(dataset[strongest][1]):.4g}" in words(figure)
    assert trainer.self_influence().plot().get_suptitle() == "Self-influence: what the model had to memorize"


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
    shown = next(axes for axes in figure.axes if axes.get_title().startswith(f"#{strongest} label {strongest % 3}\n"))
    np.testing.assert_array_equal(shown.images[0].get_array(), image_of(images()[strongest]))


def test_a_plot_of_other_data_lists_their_values() -> None:
    trainer, _, dataset = fitted()
    report = trainer.influence(batch_of(dataset, [4, 5]), per_example=True, k=2)
    figure = report.plot(query=1)
    assert figure.get_suptitle().startswith("Query 1 of 2: Label 2, read as ")
    shown = [text.replace("\n", " ") for text in words(figure)]
    assert text_of(dataset[5]) in shown
    for end in (report.proponents(), report.opponents()):
        for index, score in zip(end.indices[1].tolist(), end.scores[1].tolist(), strict=True):
            assert {text_of(dataset[index]), f"#{index} label {index % 3}", f"{score:+.2g}"} <= set(shown)


def test_a_mean_is_told_from_one_example_also_if_batches_have_one() -> None:
    trainer, _, dataset = fitted(image_net(), images())
    mean = trainer.influence(DataLoader(dataset, 1), k=3, batch_size=1)
    one = trainer.influence(batch_of(dataset, [0]), k=3)
    assert mean.plot().get_suptitle() == "Query: the mean loss of several examples"
    assert one.plot().get_suptitle().startswith("Label 0, read as ")
    assert "query, its first example: label 0, read as" in str(mean)
    assert "\nquery: label 0, read as" in str(one)
    assert "How the model reads it" not in titles(mean.plot())


def test_a_query_of_several_is_shown_by_its_first_ones_and_a_missing_query_is_refused() -> None:
    trainer, _, dataset = fitted(image_net(), images())
    report = trainer.influence(batch_of(dataset, list(range(6))), k=2)
    figure = report.plot()
    assert figure.get_suptitle() == "Query: the mean loss of several examples"
    read = [title.replace("\n", " ") for title in titles(figure) if "read as" in title]
    assert [title[:16] for title in read] == [f"Label {label}, read as" for label in (0, 1, 2, 0)]
    assert "query, its first example: label 0, read as" in str(report)
    for query in (-1, 1, 0.5):
        with pytest.raises(ConfigurationError, match="whole number from 0 to 0"):
            report.plot(query=query)  # type: ignore[arg-type]


def test_queries_beyond_the_kept_ones_are_drawn_without_a_picture() -> None:
    trainer, _, dataset = fitted(image_net(), images())
    report = trainer.influence(batch_of(dataset, list(range(10))), per_example=True, k=1)
    assert len(report.queries) == 8
    figure = report.plot(query=9)
    assert figure.get_suptitle() == "Query 9 of 10"
    assert sum(len(axes.images) for axes in figure.axes) == 2
    assert len(bars_of(figure, "Scores added up by class")) == 3


def test_a_report_with_few_scores_kept_is_drawn_without_sums() -> None:
    trainer, _, dataset = fitted(image_net(), images())
    report = trainer.influence(batch_of(dataset, [4]), k=2, keep=2)
    assert "Scores added up by class" not in titles(report.plot())
    assert "The 2 strongest scores of each end" in titles(report.plot(distribution=True))


def test_a_module_whose_measurement_takes_other_batches_has_no_prediction() -> None:
    class Measured(GIFMixin, Classifier):
        def influence_measurement(self, batch: Any) -> Tensor:
            return self(batch).square().sum(1)

    trainer, _, dataset = fitted(Measured())
    report = trainer.influence(dataset.tensors[0][:1])
    assert report.predictions is None
    assert report.plot().get_suptitle() == "Query"
    assert any("the query's measurement would be higher" in text for text in words(report.plot()))


def test_a_plot_shows_how_few_examples_carry_half_of_all_influence() -> None:
    scores = torch.zeros(1, 200)
    scores[0, [50, 60, 70]] = torch.tensor([4.0, -3.0, 3.0])  # 4 and 3 of 10: two are needed for half
    shares = report_of(scores).plot(k=1, distribution=True).axes[-1]
    assert shares.get_title() == "2 of 200 examples (1 %) carry half"
    curve, half, _ = shares.lines
    assert half.get_xydata().tolist() == [[2, pytest.approx(0.7)]]
    assert dict(zip(*(data.tolist() for data in curve.get_data()), strict=True))[3] == pytest.approx(1.0)
    assert curve.get_xdata()[0] == 1
    assert curve.get_xdata()[-1] == 200
    *_, histogram, second = (
        report_of(torch.cat([scores, torch.ones(1, 200)])).plot(query=1, k=1, distribution=True).axes
    )
    assert second.get_title() == "100 of 200 examples (50 %) carry half"
    assert max(patch.get_height() for patch in histogram.patches) == 200


@pytest.mark.parametrize(
    ("scores", "title"),
    [([[0.0, 0.0]], ""), ([[2.0]], "1 of 1 examples (100 %) carries half"), ([[5.0, 1.0]], "1 of 2 examples")],
)
def test_a_plot_of_few_or_no_influence_is_drawn(scores: Any, title: str) -> None:
    figure = report_of(scores).plot(distribution=True)
    figure.canvas.draw()
    assert figure.axes[-1].get_title().startswith(title)
    assert title or figure.axes[-1].texts[0].get_text() == "all scores are 0"


def test_texts_that_look_like_formulas_are_drawn_as_they_are() -> None:
    strange = Shown("$\\bad{$", None, "costs $5 or $\\frac{$ " * 30)
    report = report_of([[0.1, 0.2]], queries=[strange], examples={100: strange, 101: strange})
    report.plot().canvas.draw()


def test_a_solve_that_took_its_number_of_steps_is_not_said_to_have_failed() -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, [0, 1])
    assert "computed over all 83 parameters by the method 'if' and the solver 'cg' (20 iterations, residual" in str(
        trainer.influence(query)
    )
    assert "'cg' (not converged after 2 iterations, residual" in str(trainer.influence(query, rtol=1e-9, max_iter=2))


def test_a_solver_without_iterations_does_not_look_as_if_it_had_failed() -> None:
    trainer, _, dataset = fitted()
    text = str(trainer.influence(batch_of(dataset, [0, 1]), solver="ekfac"))
    assert "by the method 'if' and the solver 'ekfac' (needs no iterations)\n" in text


@pytest.mark.parametrize("status", list(Status))
def test_every_way_in_which_a_solve_ends_has_words(status: Status) -> None:
    text = describe_solve("cg", status, 1, None)
    assert re.fullmatch(r"'cg' \(.* after 1 iteration\b.*\)", text)


def test_scores_of_each_example_for_itself_are_reported_without_a_query(tmp_path: Path) -> None:
    trainer, *_ = fitted(image_net(), images(), logger=CSVLogger(tmp_path))
    report = trainer.self_influence(k=2)
    assert report.solution is None
    best = int(report.scores.argmax())
    assert f"24 training examples for themselves, strongest proponent {best} (" in repr(report)
    assert "24 training examples on themselves (" in str(report)
    assert "computed over all 195 parameters by the method 'if'; inverse of the curvature: exact\n" in str(report)
    assert "change of an example's own loss if it were removed" in str(report.by_group())
    assert "\nhighest: " in str(report)
    assert "opponents" not in str(report)
    assert "change of its own loss if the example were removed" in str(report)
    assert csv_values(trainer.logger)["gif_self_influence/score_max"] == float(report.scores.max())  # type: ignore[arg-type]
    assert report.by_group().means.sum() * 8 == pytest.approx(float(report.scores.sum()))
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert (str(loaded), repr(loaded), loaded.summary()) == (str(report), repr(report), report.summary())
    assert drawn(loaded) == drawn(report)


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
    shown = words(report.plot())
    assert f"#{strongest} label {strongest % 3}" in shown
    assert f"number {strongest}" in shown
