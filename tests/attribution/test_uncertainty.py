"""Error bars of scores: they equal what scores of each state or fit give, however the scores are kept."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_gif import ConfigurationError, GIFCallback, GIFWarning, InfluenceReport, attach, influence_over_fits
from lightning_gif.attribution.display import rows
from lightning_gif.attribution.score_store import ScoreStore
from lightning_gif.attribution.uncertainty import Agreement, Spread, agreement_of, t_quantile
from lightning_gif.data.batch import Batch
from lightning_gif.objective.objective import Objective
from lightning_gif.parameters import Targets
from lightning_gif.storage.artifact import read_folder, write_folder

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from ..reports import drawn, report_of, words

KIND = "lightning-gif influence 2"

STEADY: dict[str, Any] = {"solver": "dense", "damping": 0.1}  # does not amplify rounding, as twenty iterations do


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------

# Two-sided 90, 95 and 99 % points of Student's t from printed tables.
TABLE = {
    1: (6.314, 12.706, 63.657),
    2: (2.920, 4.303, 9.925),
    3: (2.353, 3.182, 5.841),
    4: (2.132, 2.776, 4.604),
    5: (2.015, 2.571, 4.032),
    9: (1.833, 2.262, 3.250),
    10: (1.812, 2.228, 3.169),
    29: (1.699, 2.045, 2.756),
    30: (1.697, 2.042, 2.750),
    120: (1.658, 1.980, 2.617),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_of_students_t_are_those_of_tables(degrees: int) -> None:
    found = [t_quantile(level, degrees) for level in (0.9, 0.95, 0.99)]
    assert found == pytest.approx(TABLE[degrees], abs=6e-4)


def test_quantiles_of_one_and_two_degrees_have_a_closed_form() -> None:
    for level in (0.01, 0.5, 0.9, 0.999):
        assert t_quantile(level, 1) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-10)
        assert t_quantile(level, 2) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-10)


def test_a_spread_is_the_standard_deviation_by_the_root_of_the_count() -> None:
    values = 1e6 + torch.randn(5, 2, 7, dtype=torch.float64)
    spread = Spread()
    for value in values:
        spread.add(value)
    torch.testing.assert_close(spread.standard_errors(), values.std(0) / 5**0.5, rtol=1e-8, atol=0)
    single = Spread()
    single.add(values[0])
    assert single.standard_errors() is None


def test_agreement_is_the_covariance_of_two_states_over_the_variance_of_one() -> None:
    states = torch.randn(2, 60, dtype=torch.float64) + 0.7 * torch.randn(4, 2, 60, dtype=torch.float64)
    states -= states.mean((0, 2), keepdim=True)
    scores, errors = states.mean(0), states.std(0) / 2
    # With all values around one mean: pairs of states over pairs of a state with itself, corrected for this mean.
    between, within = 4 * scores.var(1), states.var(0).mean(1)
    expected = float(((between - within) / (between + 3 * within)).mean())
    assert agreement_of(scores, errors, 4) == pytest.approx(expected, rel=1e-10)
    for sizes in ([60], [1] * 60, [7, 50, 3]):
        agreement = Agreement(2)
        for part, its_errors in zip(scores.split(sizes, 1), errors.split(sizes, 1), strict=True):
            agreement.add(part, its_errors)
        assert agreement.value(4) == pytest.approx(expected, rel=1e-10)
    assert agreement_of(scores, torch.zeros_like(scores), 4) == 1.0
    assert agreement_of(scores[:, :1], errors[:, :1], 4) is None
    assert agreement_of(torch.ones(1, 3), torch.zeros(1, 3), 4) is None
    noise = torch.randn(4, 1, 5000, dtype=torch.float64)
    assert abs(agreement_of(noise.mean(0), noise.std(0) / 2, 4)) < 0.05


# ----------------------------------------------------------------------------------------------------------------------
# States of one fit
# ----------------------------------------------------------------------------------------------------------------------


def fit_with_snapshots() -> tuple[pl.Trainer, Any]:
    trainer, _, dataset = fitted(callback=GIFCallback(snapshots=2, double=True), max_epochs=6)
    return trainer, dataset


def of_each_state(trainer: pl.Trainer, dataset: Any, epochs: list[int], call: Any) -> Tensor:
    """The scores of separate calls at the present state and at each snapshot, ``(S, n_queries, n)``."""
    parts = [call(trainer).scores]
    for epoch in epochs:
        other, earlier = make_trainer(), Classifier()
        earlier.load_state_dict(trainer.callbacks[0].tracker.snapshots.kept[epoch])
        attach(other, earlier, train_dataloaders=loader(dataset), callback=GIFCallback(double=True))
        parts.append(call(other).scores)
    return torch.stack(parts)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_standard_errors_are_those_of_separate_calls_at_each_state(weight_decay: float) -> None:
    trainer, dataset = fit_with_snapshots()
    options: dict[str, Any] = {"per_example": True, "weight_decay": weight_decay, **STEADY}
    query = batch_of(dataset, slice(0, 3))
    report = trainer.influence(query, snapshots=True, **options)
    states = of_each_state(
        trainer, dataset, report.settings["snapshots"], lambda one: one.influence(query, snapshots=False, **options)
    )
    assert len(states) == report.n_states == report.n_averaged == 3
    torch.testing.assert_close(report.standard_errors, states.std(0) / 3**0.5, rtol=1e-6, atol=1e-12)
    assert report.standard_errors.dtype == torch.float64
    low, high = report.intervals()
    half = 2.91998558 * states.std(0) / 3**0.5
    torch.testing.assert_close(high, states.mean(0) + half, rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(low, states.mean(0) - half, rtol=1e-5, atol=1e-10)
    assert bool((report.intervals(0.5).high < high).all())
    for level in (0, 1, -0.5, True, "90"):
        with pytest.raises(ConfigurationError, match="`level` must be a number between 0 and 1"):
            report.intervals(level)


def test_standard_errors_of_self_influence_are_those_of_separate_calls() -> None:
    trainer, dataset = fit_with_snapshots()
    report = trainer.self_influence(snapshots=True)
    states = of_each_state(trainer, dataset, report.settings["snapshots"], lambda one: one.self_influence())
    torch.testing.assert_close(report.standard_errors, states.std(0) / 3**0.5, rtol=1e-6, atol=1e-12)
    assert report.agreement == pytest.approx(agreement_of(states.mean(0), states.std(0) / 3**0.5, 3), rel=1e-6)
    assert "highest: " in str(report)
    assert "± = 90 % interval from 3 states of one fit (too narrow to cover other fits)" in str(report)


@pytest.mark.slow
def test_standard_errors_do_not_depend_on_batch_size_or_on_where_scores_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, dataset = fit_with_snapshots()
    query = batch_of(dataset, slice(0, 3))
    options: dict[str, Any] = {"per_example": True, "snapshots": True, "k": 3, **STEADY}
    whole = trainer.influence(query, **options)
    small = trainer.influence(query, **options, batch_size=7)
    torch.testing.assert_close(small.standard_errors, whole.standard_errors, rtol=1e-8, atol=1e-14)
    assert small.agreement == pytest.approx(whole.agreement, rel=1e-8)

    filed = trainer.influence(query, **options, scores_to=tmp_path / "scores")
    assert torch.equal(filed.scores, whole.scores)
    assert torch.equal(filed.standard_errors, whole.standard_errors)
    assert filed.agreement == whole.agreement

    kept = trainer.influence(query, **options, keep=5)
    assert kept.agreement == pytest.approx(whole.agreement, rel=1e-10)
    column = {index: column for column, index in enumerate(whole.indices.tolist())}
    for number, indices in enumerate(kept.indices.tolist()):
        expected = whole.standard_errors[number, [column[index] for index in indices]]
        assert torch.equal(kept.standard_errors[number], expected)
    sums = [line for line in str(whole).splitlines() if " by class: " in line]  # which need all scores
    assert len(sums) == 3
    assert str(kept).splitlines()[1:] == [line for line in str(whole).splitlines()[1:] if line not in sums]

    seen: list[int] = []
    original = Objective.directional_derivatives

    def fragile(self: Objective, batch: Batch, directions: Tensor) -> Tensor:
        if len(seen) == 3 * 4 + 1:  # in the fifth of seven batches
            raise KeyboardInterrupt
        seen.append(batch.size)
        return original(self, batch, directions)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "directional_derivatives", fragile)
        with pytest.raises(KeyboardInterrupt):
            trainer.influence(query, **options, batch_size=7, scores_to=tmp_path / "broken")
    resumed = trainer.influence(query, **options, batch_size=7, scores_to=tmp_path / "broken")
    assert torch.equal(resumed.scores, small.scores)
    assert torch.equal(resumed.standard_errors, small.standard_errors)
    assert resumed.agreement == small.agreement


def test_damaged_standard_errors_are_computed_again(tmp_path: Path) -> None:
    def opened() -> ScoreStore:
        return ScoreStore.open(tmp_path / "scores", 2, 6, {"weights": "mark"}, with_errors=True)

    values = torch.rand(2, 6, dtype=torch.float64)
    opened().write(0, values, 2 * values)
    assert opened().done.all()
    assert torch.equal(opened().standard_errors, 2 * values)
    path = tmp_path / "scores" / "standard_errors.bin"
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    with pytest.warns(GIFWarning, match="1 of 6 examples in .* are damaged"):
        assert opened().done.tolist() == [False] + [True] * 5


def test_a_store_of_an_earlier_version_gets_standard_errors(tmp_path: Path) -> None:
    values = torch.rand(2, 6, dtype=torch.float64)
    ScoreStore.open(tmp_path / "scores", 2, 6, {"weights": "mark"}).write(0, values)
    store = ScoreStore.open(tmp_path / "scores", 2, 6, {"weights": "mark"}, with_errors=True)
    assert not store.done.any()
    store.write(2, values[:, 2:], values[:, 2:])
    store = ScoreStore.open(tmp_path / "scores", 2, 6, {"weights": "mark"}, with_errors=True)
    assert store.done.tolist() == [False] * 2 + [True] * 4


def test_one_state_has_no_error_bars_and_the_report_says_how_to_get_them() -> None:
    trainer, _, dataset = fitted(callback=GIFCallback(snapshots=0))
    report = trainer.influence(batch_of(dataset, slice(0, 3)))
    assert report.standard_errors is None
    assert report.agreement is None
    *_, advice, last = str(report).splitlines()
    assert (
        advice == "scores of the present weights alone; averaged with a snapshot, which GIFCallback keeps in fit, they"
        " would predict retraining better"
    )
    assert last == "no error bars: they need several fits (influence_over_fits), or one with GIFCallback(snapshots=2)"
    trainer, _, dataset = fitted(max_epochs=4)
    two = trainer.influence(batch_of(dataset, slice(0, 3)))
    assert two.n_states == 2
    assert str(two).splitlines()[-1] == last
    assert "predict retraining better" not in str(two)
    assert "±" not in str(report)
    assert "agreement" not in report.summary()
    with pytest.raises(ConfigurationError, match=r"snapshots=2\), and repeat .* or average .* InfluenceReport\.mean"):
        report.intervals()


# ----------------------------------------------------------------------------------------------------------------------
# What is shown
# ----------------------------------------------------------------------------------------------------------------------


def with_errors(scores: Any, errors: Any, **changes: Any) -> InfluenceReport:
    """A report over two states: an interval is the score ± 6.31 standard errors."""
    errors = torch.as_tensor(errors, dtype=torch.float64)
    return report_of(
        scores, standard_errors=errors, agreement=0.625, settings={"method": "gif", "snapshots": [3]}, **changes
    )


def test_scores_are_printed_with_intervals_and_marked_if_these_hold_zero() -> None:
    report = with_errors([[0.5, -0.2, 0.3]], [[0.01, 0.002, 0.05]], k=2)
    lines = str(report).splitlines()
    assert "proponents: 100 (+0.5 ± 0.063), 102 (+0.3 ± 0.32)?" in lines
    assert "opponents: 101 (-0.2 ± 0.013), 102 (+0.3 ± 0.32)?" in lines
    assert lines[-2:] == [
        "± = 90 % interval from 2 states of one fit (too narrow to cover other fits); ? = interval contains 0, sign"
        " uncertain",
        "agreement of the 2 states: 0.62 (1: the same scores, 0: nothing in common)",
    ]
    assert "strongest proponent 100 (+0.5 ± 0.063), strongest opponent 101 (-0.2 ± 0.013)" in repr(report)
    assert report.summary()["agreement"] == 0.625
    sure = with_errors([[0.5, -0.2, 0.3]], [[0.01, 0.002, 0.01]])
    assert "± = 90 % interval from 2 states of one fit (too narrow to cover other fits)\n" in str(sure)
    assert "?" not in str(sure)


def test_tables_and_figures_have_the_intervals() -> None:
    report = with_errors([[0.5, -0.2, 0.3]], [[0.01, 0.002, 0.05]], k=1)
    low, high = report.intervals()
    table = list(rows(report))
    assert [len(row) for row in table] == [9, 9]
    assert table[0][:7] == [0, "proponent", 1, 100, 0.5, float(low[0, 0]), float(high[0, 0])]
    assert table[1][:7] == [0, "opponent", 1, 101, -0.2, float(low[0, 1]), float(high[0, 1])]
    frame = report.to_dataframe()
    assert list(frame.columns) == ["query", "index", "score", "rank", "kind", "standard_error", "low", "high"]
    assert frame["standard_error"].tolist() == [0.01, 0.002, 0.05]
    assert frame["high"].tolist() == high[0].tolist()
    figure = report.plot(k=2)
    shown = words(figure)
    assert {"#100", "+0.5 ± 0.063", "#102", "+0.3 ± 0.32?", "#101", "-0.2 ± 0.013"} <= set(shown)
    assert any("±: 90 % interval. ?: the interval contains 0." in text for text in shown)


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def test_a_loaded_report_has_the_same_error_bars(tmp_path: Path) -> None:
    trainer, dataset = fit_with_snapshots()
    for keep in (None, 10):
        report = trainer.influence(batch_of(dataset, slice(0, 3)), snapshots=True, keep=keep)
        report.save(tmp_path / "report")
        loaded = InfluenceReport.load(tmp_path / "report", dataset)
        assert torch.equal(loaded.standard_errors, report.standard_errors)
        assert (str(loaded), repr(loaded), loaded.summary()) == (str(report), repr(report), report.summary())
        assert loaded.to_dataframe().equals(report.to_dataframe())
        assert drawn(loaded) == drawn(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record, errors: errors[:, :1], "standard errors .* do not fit the scores"),
        (lambda record, errors: errors.float(), "do not fit the scores"),
        (lambda record, errors: -errors, "at least 0"),
        (lambda record, errors: errors * math.nan, "finite"),
        (lambda record, errors: record["settings"].pop("snapshots") and errors, "only one state of one fit"),
        (lambda record, errors: record.update(agreement="high") or errors, "agreement is 'high'"),
        (lambda record, errors: record["settings"].update(fits=2.5) or errors, "fits is 2.5"),
    ],
)
def test_invalid_standard_errors_in_a_file_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    with_errors([[0.5, -0.2, 0.3]], [[0.01, 0.002, 0.05]]).save(tmp_path / "report")
    record, tensors = read_folder(tmp_path / "report", KIND)
    tensors["standard_errors"] = change(record, tensors["standard_errors"])
    write_folder(tmp_path / "report", KIND, record, tensors)
    with pytest.raises(ConfigurationError, match=message):
        InfluenceReport.load(tmp_path / "report")


def test_a_report_without_standard_errors_is_written_as_before(tmp_path: Path) -> None:
    report_of([[0.1, -0.2]]).save(tmp_path / "report")
    record, tensors = read_folder(tmp_path / "report", KIND)
    assert set(tensors) == {"scores", "indices", "targets/weight"}
    assert "agreement" not in json.dumps(record)
    shutil.rmtree(tmp_path / "report")


# ----------------------------------------------------------------------------------------------------------------------
# Several fits
# ----------------------------------------------------------------------------------------------------------------------


def fit(seed: int) -> pl.Trainer:
    torch.manual_seed(seed)
    trainer, *_ = fitted(Classifier(), blobs(), callback=GIFCallback(snapshots=2), max_epochs=4)
    return trainer


def test_the_mean_of_fits_has_the_spread_of_the_fits_as_standard_errors(tmp_path: Path) -> None:
    query = batch_of(blobs(), slice(0, 2))
    made: list[InfluenceReport] = []

    def fit_and_remember(seed: int) -> Any:
        trainer = fit(seed)
        made.append(trainer.influence(query, per_example=True, k=3, snapshots=False))
        return trainer

    report = influence_over_fits(fit_and_remember, query, seeds=(3, 4, 5, 6), per_example=True, k=3, snapshots=False)
    scores = torch.stack([one.scores for one in made])
    assert torch.equal(report.indices, made[0].indices)
    torch.testing.assert_close(report.scores, scores.mean(0), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(report.standard_errors, scores.std(0) / 2, rtol=1e-8, atol=1e-14)
    assert report.settings == {**made[0].settings, "fits": 4}
    assert report.agreement == pytest.approx(agreement_of(scores.mean(0), scores.std(0) / 2, 4))
    first_line, *_, last_line = str(report).splitlines()
    assert first_line.startswith("Influence of 48 training examples on 2 queries, averaged over 4 fits (")
    assert last_line.startswith("agreement of the 4 fits: ")
    assert "± = 90 % interval from 4 fits" in str(report)
    best = int(scores.mean(0)[1].argmax())
    assert report.proponents(1).indices[1, 0] == report.indices[best]
    report.by_group()
    report.plot().canvas.draw()
    report.log([])
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert (str(loaded), repr(loaded)) == (str(report), repr(report))
    assert loaded.to_dataframe().equals(report.to_dataframe())
    low, high = loaded.intervals(0.95)
    torch.testing.assert_close(high - low, 2 * 3.18244631 * report.standard_errors, rtol=1e-6, atol=0)


def test_reports_with_snapshots_are_averaged_with_the_spread_of_the_fits() -> None:
    query = batch_of(blobs(), slice(0, 2))
    made = [fit(seed).influence(query, snapshots=True) for seed in (0, 1)]
    report = InfluenceReport.mean(made)
    torch.testing.assert_close(
        report.standard_errors, (made[0].scores - made[1].scores).abs() / 2, rtol=1e-8, atol=1e-14
    )
    states = made[0].n_states
    assert f"averaged over 2 fits of {states} states each (" in str(report)
    assert report.n_averaged == 2
    mean = InfluenceReport.mean([fit(seed).self_influence() for seed in (0, 1)])
    assert mean.is_self_influence
    assert "on themselves, averaged over 2 fits (" in str(mean)


def test_training_examples_in_another_order_are_matched() -> None:
    one = report_of([[1.0, 2.0, 3.0]], indices=torch.tensor([7, 5, 9]))
    other = report_of([[10.0, 30.0, 20.0]], indices=torch.tensor([5, 9, 7]))
    report = InfluenceReport.mean([one, other])
    assert report.indices.tolist() == [7, 5, 9]
    assert report.scores.tolist() == [[10.5, 6.0, 16.5]]


def test_reports_of_different_calls_are_not_averaged() -> None:
    one = report_of([[0.1, -0.2], [0.3, 0.4]])

    def other(scores: Any = ((0.2, 0.1), (0.0, 0.4)), settings: Any = None, **changes: Any) -> InfluenceReport:
        return report_of(scores, settings={"method": "gif", **(settings or {})}, **changes)

    mean = InfluenceReport.mean([one, other()])
    for reports, message in (
        ([], "at least two fits, got 0"),
        ([one], "at least two fits, got 1"),
        ([one, 3], "number 1 is 3"),
        ([one, mean], "Report 1 is a mean over 2 fits. Average the reports of all single fits at once"),
        ([one, other([[0.1, 0.2]])], r"different numbers of queries \(2 and 1\). Use the same query"),
        ([one, other(torch.ones(2, 3))], r"different numbers of training examples \(2 and 3\)"),
        ([one, other(indices=torch.tensor([1, 2]))], r"different training examples \(\[100, 101\] and \[1, 2\]\)"),
        ([one, other(settings={"method": "if"})], r"different values of `method` \(gif and if\). Make the same call"),
        ([one, other(settings={"measures": "influence_measurement"})], "different values of `measures`"),
        ([one, other(settings={"snapshots": [1]})], r"averaged states \(1 and 2\). Pass the same `snapshots`"),
        ([one, other(solutions=[])], r"different kinds \(influence and self-influence\)"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            InfluenceReport.mean(reports)  # type: ignore[arg-type]
    kept = dataclasses.replace(one, indices=torch.tensor([[1, 2], [3, 4]]), n_train=9)
    with pytest.raises(ConfigurationError, match=r"Report 1 kept only 1 scores of each end .* without `keep`"):
        InfluenceReport.mean([one, kept])


def test_fits_that_are_the_same_are_warned_about_and_equal_seeds_are_refused() -> None:
    one = report_of([[0.1, -0.2]])
    with pytest.warns(GIFWarning, match="exactly the same scores.*Fit with different seeds"):
        assert InfluenceReport.mean([one, report_of([[0.1, -0.2]])]).standard_errors.tolist() == [[0.0, 0.0]]
    for seeds in ((1,), (), (1, 2, 1)):
        with pytest.raises(ConfigurationError, match="two or more different seeds"):
            influence_over_fits(fit, None, seeds)
    with pytest.raises(ConfigurationError, match="without `keep`"):
        influence_over_fits(fit, None, keep=20)


def test_different_target_parameters_of_the_fits_do_not_matter() -> None:
    one, other = report_of([[0.1, -0.2]]), report_of([[0.3, 0.0]], targets=Targets({"weight": torch.tensor([5])}))
    assert InfluenceReport.mean([one, other]).targets is one.targets


def test_networks_without_chance_agree_fully() -> None:
    reports = [report_of([[0.1, -0.2, 0.4]]), report_of([[0.1 + 1e-9, -0.2, 0.4]])]
    assert InfluenceReport.mean(reports).agreement == pytest.approx(1.0)
