"""The tuned numbers of an edit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gif import ConfigurationError, GIFCallback, UnlearnReport
from lightning_gif.unlearning import (
    ClassRemoval,
    LabelCorrection,
    LineSearch,
    Matching,
    Relinearisation,
    SampleSizes,
    TrustRegion,
    Tuning,
)

from ..conftest import blobs, fitted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accept_ratio", 0.0),
        ("accept_ratio", 1.5),
        ("accept_ratio", "0.5"),
        ("accept_ratio", math.nan),
        ("max_halvings", -1),
        ("max_halvings", 2.5),
        ("max_halvings", True),
        ("initial_damping", math.inf),
    ],
)
def test_tuned_numbers_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"`{name}` of TrustRegion must be a .*number .* got {value!r}"):
        TrustRegion(**{name: value})


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(
    ("goal", "options", "expected"),
    [
        ("examples", {"step": "relinearise"}, [("hessian", 10), ("hessian", 5)]),
        ("examples", {}, [("ggn", 8), ("ggn", 20)]),
        ("labels", {}, [("ggn", 8), ("ggn", 40)]),
        ("labels", {"step": "relinearise"}, [("ggn", 8), ("ggn", 8)]),
        ("labels", {"curvature": "hessian", "max_iter": 3}, [("hessian", 3), ("hessian", 3)]),
        ("labels", {"rtol": 0.5}, [("ggn", 200), ("ggn", 40)]),
        ("labels", {"rtol": 0.5, "step": "relinearise"}, [("ggn", 200), ("ggn", 200)]),
        ("labels", {"step": "natural"}, [("hessian", 10)]),
    ],
)
def test_a_report_has_what_each_solve_used(
    goal: str, options: dict[str, Any], expected: list[tuple[str, int]], tmp_path: Path
) -> None:
    trainer, _, _ = fitted(max_epochs=40, callback=GIFCallback(ratio=0.5, unconverged="ignore"))
    tuning = Tuning(
        relinearisation=Relinearisation(max_solves=2, prediction_tolerance=1e-9),
        matching=Matching(prediction_tolerance=0.0),
    )
    relabel = {"relabel": torch.tensor([1, 0, 2])} if goal == "labels" else {}
    log, folder = tmp_path / "log.jsonl", tmp_path / "solves"
    options = {**options, **relabel, "tuning": tuning, "solves_to": folder}
    first = trainer.unlearn([3, 17, 30], dry_run=True, **options)
    resumed = trainer.unlearn([3, 17, 30], record=log, **options)
    for report in (first, resumed):
        assert [(solve["curvature"], solve["max_iter"]) for solve in report.solves] == expected
    (entry,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(solve["curvature"], solve["max_iter"]) for solve in entry["solves"]] == expected
    assert any("Solves recalled" in note for note in resumed.notes)


@pytest.mark.parametrize(("rounding", "steps"), [(1e-6, False), (1e9, True)])
def test_a_change_below_rounding_is_not_searched_for(rounding: float, steps: bool) -> None:
    trainer, _, _ = fitted()
    tuning = Tuning(line_search=LineSearch(rounding=rounding))
    report = trainer.unlearn([0, 3], step="search", tuning=tuning, dry_run=True)
    assert (len(report.trials) == 2) == steps  # the trained model and the natural step
    assert report.settings["tuning"]["line_search"]["rounding"] == rounding


def test_a_step_that_is_rejected_cannot_count_as_a_good_one() -> None:
    with pytest.raises(
        ConfigurationError, match=r"`accept_ratio` .* must not be above `good_ratio`, got 0\.9 and 0\.1"
    ):
        TrustRegion(accept_ratio=0.9, good_ratio=0.1)
    assert TrustRegion(accept_ratio=0.5, good_ratio=0.5).good_ratio == 0.5


def test_the_tolerance_decides_whether_the_influence_direction_is_enough() -> None:
    """Without unseen examples the risk is nearly quadratic in the step, up to a fiftieth or a fifth."""
    trainer, _, _ = fitted(dataset=blobs(120), max_epochs=10)
    solves = []
    for tolerance in (0.002, 0.5):
        tuning = Tuning(relinearisation=Relinearisation(prediction_tolerance=tolerance))
        solves.append(len(trainer.unlearn(list(range(20)), tuning=tuning, dry_run=True, step="relinearise").solves))
    assert solves[0] > solves[1] == 1


@pytest.mark.slow
def test_a_rejected_step_is_followed_by_one_that_is_damped_by_the_factor() -> None:
    """Where the model is sharper than training made it, the first step is too long by far more than is tried."""
    rejected = 0
    for _ in range(4):
        trainer, module, _ = fitted(max_epochs=160)
        with torch.no_grad():
            for parameter in module.net[-1].parameters():
                parameter *= 4
        for factor in (64.0, 128.0):
            tuning = Tuning(trust_region=TrustRegion(rejection_factor=factor))
            options: dict[str, Any] = {"relabel": torch.tensor([1, 0, 2]), "dry_run": True, "step": "relinearise"}
            report = trainer.unlearn([3, 17, 30], tuning=tuning, **options)
            if report.step_sizes[0] == 0:
                assert report.solves[1]["damping"] == pytest.approx(factor * report.solves[0]["damping"])
                rejected += 1
        if rejected:
            break
    assert rejected


def test_what_is_no_tuning_is_refused() -> None:
    trainer, _, _ = fitted()
    with pytest.raises(ConfigurationError, match=r"`tuning` must be a lightning_gif\.unlearning\.Tuning"):
        trainer.unlearn([0], tuning={"max_halvings": 3})
    with pytest.raises(ConfigurationError, match="`trust_region` of Tuning must be a TrustRegion"):
        Tuning(trust_region=SampleSizes())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="two goals of the same class"):
        Tuning(goals=(ClassRemoval(), ClassRemoval(target_memorization=0.1)))
    with pytest.raises(ConfigurationError, match="must be a tuple of goals"):
        Tuning(goals=ClassRemoval())  # type: ignore[arg-type]

    class Unregistered(ClassRemoval):
        pass

    with pytest.raises(ConfigurationError, match=r"Unregistered is not registered.*GOALS\.register"):
        Tuning(goals=(Unregistered(target_memorization=0.1),))


@pytest.mark.slow
def test_tuned_numbers_are_used_and_recorded(tmp_path: Any) -> None:
    trainer, _, _ = fitted(max_epochs=60)
    options: dict[str, Any] = {"relabel": torch.tensor([1, 0, 2]), "dry_run": True, "step": "relinearise"}
    plain = trainer.unlearn([3, 17, 30], **options)
    assert plain.settings["tuning"]["goal"] == {
        "curvature_examples": 2048,
        "descent_iterations": 8,
        "notable_increase": 0.1,
        "target_memorization": 0.2,
        "corrected_weight": 8.0,
        "retain_budget": 0.05,
        "far_memorization": 0.25,
        "first_damping": 0.2,
    }
    tuning = Tuning(goals=(LabelCorrection(corrected_weight=2.0),), relinearisation=Relinearisation(max_solves=3))
    tuned = trainer.unlearn([3, 17, 30], tuning=tuning, **options)
    assert (len(plain.solves), len(tuned.solves)) == (12, 3)
    assert tuned.trials[0].risk == pytest.approx(plain.trials[0].risk / 4)
    tuned.save(tmp_path / "edit")
    loaded = UnlearnReport.load(tmp_path / "edit").settings["tuning"]
    assert loaded["goal"]["corrected_weight"] == 2.0
    assert loaded["relinearisation"]["max_solves"] == 3
    assert trainer.unlearn([3, 17, 30], tuning=Tuning(), **options).edit.digest == plain.edit.digest
