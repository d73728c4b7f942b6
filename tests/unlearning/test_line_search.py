"""The line search along one change."""

from __future__ import annotations

import math

import pytest

from lightning_gif.unlearning import ExampleRemoval, LabelCorrection, QuadraticModel
from lightning_gif.unlearning.protocol import GoalName
from lightning_gif.unlearning.strategies import relinearise, search

from .doubles import Fake, beyond, labels, quadratic


def test_the_search_finds_the_natural_step_where_theory_is_exact() -> None:
    trainer, _, x, y = quadratic()
    report = trainer.unlearn((x[:7], y[:7]), step="search")
    assert report.goal is GoalName.EXAMPLES
    assert report.step == 1.0


@pytest.mark.parametrize("needed", [0.3, 1.0, 5.0, 700.0])
def test_a_class_is_forgotten_by_about_the_smallest_step_that_does_it(needed: float) -> None:
    problem = Fake(beyond(needed))
    trial = search(problem)
    assert trial.memorization == 0.0
    assert max(needed, 1.0) <= trial.step_sizes[0] <= 1.05 * max(needed, 1.0)
    assert trial in problem.trials


def test_the_search_stops_at_what_forgetting_may_cost() -> None:
    problem = Fake(lambda s=0.0: 1.0 - s / 100, lambda s=0.0: 0.01 * s, max_retain_loss=0.115)
    trial = search(problem)
    assert trial.memorization > 0.5
    assert 0.08 < trial.retain_loss <= 0.115


def test_no_step_is_made_that_does_not_even_raise_the_loss_of_the_class() -> None:
    problem = Fake(
        lambda s=0.0: 1.0, lambda s=0.0: 1.0 + 0.01 * s, forget=lambda s=0.0: 1.2 - 0.1 * s, max_retain_loss=1.1
    )
    assert not search(problem).is_edit


@pytest.mark.parametrize("explodes", [math.nan, math.inf])
def test_a_step_that_breaks_the_model_is_never_chosen(explodes: float) -> None:
    problem = Fake(beyond(8), lambda s=0.0: 0.1 if s < 5 else explodes)
    assert search(problem).step_sizes[0] < 5
    problem = Fake(
        risk=lambda s=0.0: -s if s < 1.5 else explodes,
        goal=ExampleRemoval(),
        target=None,
        models=[QuadraticModel(-1, 1)],
    )
    assert 1.0 <= search(problem).step_sizes[0] < 1.5
    problem = labels(lambda *steps: explodes if steps else 1.0, QuadraticModel(-2.0, 2.0))
    assert relinearise(problem) == problem.trials[0]


@pytest.mark.parametrize("best", [0.1, 0.3, 1.0, 2.5, 90.0])
def test_the_risk_is_minimised_along_the_change(best: float) -> None:
    problem = Fake(risk=lambda s=0.0: (s / best - 1) ** 2, goal=LabelCorrection(), target=None)
    trial = search(problem)
    assert trial.step_sizes[0] == pytest.approx(best, rel=0.2)
    assert min(other.risk for other in problem.trials) == trial.risk


def test_no_step_is_a_possible_answer() -> None:
    assert not search(
        Fake(risk=lambda s=0.0: s, goal=ExampleRemoval(), target=None, models=[QuadraticModel(-1, 1)])
    ).is_edit


def test_single_examples_are_not_chased_far_beyond_the_natural_step() -> None:
    problem = Fake(risk=lambda s=0.0: -s, goal=ExampleRemoval(), target=None, models=[QuadraticModel(-1, 1)])
    assert search(problem).step_sizes == (4.0,)
    assert max(trial.step_size for trial in problem.trials) == 4.0


def test_the_step_of_least_risk_is_one_that_can_be_afforded() -> None:
    problem = Fake(
        lambda s=0.0: 0.8,
        lambda s=0.0: 0.1 + 0.1 * s,
        risk=lambda s=0.0: -s,
        goal=ExampleRemoval(),
        target=0.5,
        max_retain_loss=0.25,
        models=[QuadraticModel(-1.0, 0.0)],
    )
    assert 1.0 <= search(problem).step_size <= 1.5


def test_a_natural_step_that_costs_too_much_is_shortened() -> None:
    trial = search(Fake(beyond(0.2), lambda s=0.0: s * 0.5, max_retain_loss=0.115))
    assert 0.2 <= trial.step_sizes[0] < 0.23
