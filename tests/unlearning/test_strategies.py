"""The strategies: how many changes an edit is made of, when it ends, and strategies of one's own."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from lightning_gif import STRATEGIES, ConfigurationError
from lightning_gif.registry import declares
from lightning_gif.unlearning import EditProblem, ExampleRemoval, QuadraticModel, Trial
from lightning_gif.unlearning.protocol import GoalName
from lightning_gif.unlearning.strategies import natural, relinearise

from ..conftest import batch_of, fitted
from .doubles import Fake, beyond, labels


def test_the_natural_step_is_natural_whatever_it_does() -> None:
    assert natural(Fake(lambda s=0.0: 1.0, lambda s=0.0: math.inf)).step_sizes == (1.0,)


@pytest.mark.parametrize(("left", "solves"), [(0.25, 12), (0.15, 2)])
def test_small_gains_end_the_correction_of_labels_once_few_are_left(left: float, solves: int) -> None:
    models = [QuadraticModel(-0.01, 0.01)] * 12
    problem = labels(lambda *steps: 9.0 - 0.005 * sum(steps), *models, memorization=lambda *steps: left)
    relinearise(problem)
    assert len(problem.solved) == solves


@pytest.mark.parametrize(("left", "solves"), [(0.25, 2), (0.15, 1)])
def test_labels_get_a_second_solve_where_the_first_one_failed_and_many_are_left(left: float, solves: int) -> None:
    models = [QuadraticModel(-1.0, 1.0)] * 12
    problem = labels(lambda *steps: 9.0 + sum(steps), *models, memorization=lambda *steps: left)
    assert not relinearise(problem).is_edit
    assert len(problem.solved) == solves


def test_a_class_is_forgotten_by_steps_that_lower_the_risk() -> None:
    """Each step promises a fall of 0.5, and the risk falls so."""
    problem = Fake(
        lambda *steps: 1.0 - sum(steps) / 3,
        risk=lambda *steps: 9.0 - 0.5 * sum(steps),
        models=[QuadraticModel(-1.0, 1.0)] * 9,
    )
    trial = relinearise(problem)
    assert trial.memorization <= 0.01
    assert problem.solved[0] is problem.trials[0]  # not the change of the theory
    assert len(problem.solved) <= 12


def test_a_class_that_is_forgotten_is_left_alone_where_the_risk_is_next_to_nothing() -> None:
    problem = Fake(beyond(0.5), risk=lambda *steps: 4.0 * 0.02 ** sum(steps), models=[QuadraticModel(-1.0, 1.0)] * 12)
    assert relinearise(problem).risk < 0.003
    assert len(problem.solved) == 1  # whose step was doubled
    problem = Fake(lambda *steps: 1.0, risk=lambda *steps: 9.0 - sum(steps), models=[QuadraticModel(-1.0, 1.0)] * 12)
    relinearise(problem)
    assert len(problem.solved) == 12


def test_a_class_gets_a_second_solve_where_the_first_one_failed() -> None:
    problem = Fake(
        lambda first=0.0, *later: 1.0 - sum(later),
        risk=lambda first=0.0, *later: 9.0 + first - sum(later),
        models=[QuadraticModel(-1.0, 1.0)] * 9,
    )
    trial = relinearise(problem)
    assert trial.step_sizes[0] == 0.0
    assert trial.is_edit
    problem = Fake(risk=lambda *steps: 9.0 + sum(steps), models=[QuadraticModel(-1.0, 1.0)] * 9)
    assert not relinearise(problem).is_edit
    assert len(problem.solved) == 2


@pytest.mark.parametrize("gain", [0.0, 1e-3])
def test_a_class_is_not_left_half_way_where_a_step_is_cut_short_to_almost_nothing(gain: float) -> None:
    """The second change leads up, but for its very beginning; those after it lead down."""

    def risk(first: float = 0.0, second: float = 0.0, *later: float) -> float:
        rise = second if second > 2**-9 else -gain * second * 2**9
        return 9.0 - first + rise - sum(later)

    problem = Fake(
        lambda *steps: 1.0 - sum(steps),
        risk=risk,
        models=[QuadraticModel(-1.0, 1.0), *[QuadraticModel(-1e-3, 1e-3)] * 9],
    )
    trial = relinearise(problem)
    assert len(trial.step_sizes) > 2
    assert sum(trial.step_sizes[2:]) > 1
    hopeless = Fake(
        lambda *steps: 1.0 - sum(steps),
        risk=lambda first=0.0, *later: 9.0 - first + sum(later),
        models=[QuadraticModel(-1.0, 1.0)] * 9,
    )
    assert relinearise(hopeless).step_sizes == (4.0,)
    assert len(hopeless.solved) == 3


def test_labels_get_another_step_after_one_that_was_cut_short_but_not_after_two() -> None:
    """The second change leads up beyond its half, where it has gained next to nothing; the third leads down."""

    def risk(first: float = 0.0, second: float = 0.0, third: float = 0.0, *later: float) -> float:
        return 9.0 - first + (second if second > 0.5 else -0.02 * second) - third * then

    then = 1.0
    models = [QuadraticModel(-1.0, 1.0), QuadraticModel(-0.02, 0.02), *[QuadraticModel(-1.0, 1.0)] * 9]
    assert relinearise(labels(risk, *models)).step_sizes[1:3] == (0.5, 4.0)
    then = -1.0
    problem = labels(risk, *models)
    assert relinearise(problem).step_sizes == (4.0, 0.5)
    assert len(problem.solved) == 3
    hopeless = labels(lambda *steps: 9.0 + sum(steps), *models)
    assert not relinearise(hopeless).is_edit
    assert len(hopeless.solved) == 1


def test_the_influence_step_is_taken_where_only_rounding_would_decide() -> None:
    problem = Fake(
        risk=lambda s=0.0: 0.1 - 1e-9 * s, goal=ExampleRemoval(), target=None, models=[QuadraticModel(-2e-9, 2e-9)]
    )
    assert relinearise(problem).step_sizes == (1.0,)
    assert problem.solved == [None]


def test_single_examples_get_further_steps_while_they_differ_from_unseen_ones() -> None:
    def problem(remembered: float) -> Fake:
        return Fake(
            lambda *steps: remembered,
            risk=lambda *steps: 9.0 - 0.5 * sum(steps),
            goal=ExampleRemoval(),
            target=0.5,
            models=[QuadraticModel(-0.5, 0.0), *[QuadraticModel(-1.0, 1.0)] * 11],
        )

    unlike, like = problem(0.7), problem(0.5)
    assert len(relinearise(unlike).step_sizes) > 1
    assert unlike.solved[0] is None  # the theory is asked first
    assert len(relinearise(like).step_sizes) == 1


def test_nothing_is_solved_anew_while_the_local_model_holds() -> None:
    risk = lambda s=0.0: -0.2 * s + 0.1 * s**2  # noqa: E731
    problem = Fake(risk=risk, goal=ExampleRemoval(), target=None, models=[QuadraticModel(-0.2, 0.2)])
    assert relinearise(problem).step_sizes == (1.0,)
    assert len(problem.solved) == 1


def later_only(problem: EditProblem) -> Trial:
    problem.influence_direction()
    problem.descent_direction(problem.trials[0])
    return problem.evaluate(0.0, 0.5)


def test_a_strategy_of_ones_own_is_taken_by_name_or_as_it_is() -> None:
    def half(problem: EditProblem) -> Trial:
        problem.influence_direction()
        problem.descent_direction(problem.evaluate(0.5))
        return problem.evaluate(0.5, 0.25)

    trainer, _, dataset = fitted()
    forget = batch_of(dataset, slice(0, 4))
    report = trainer.unlearn(forget, step=half, dry_run=True)
    assert report.step_sizes == [0.5, 0.25]
    assert len(report.solves) == 2
    assert "by changing nothing" not in str(
        trainer.unlearn(forget, step=lambda problem: later_only(problem), dry_run=True)
    )
    for bad, match in (
        (lambda problem: problem.trials[0], "after 0 solves"),
        (lambda problem: 1.0, "got 1.0"),
        (
            lambda problem: (problem.influence_direction(), Trial((3.0,), 0.0, 0.0, 0.0, 0.0))[1],
            "must solve for a change",
        ),
        (lambda problem: problem.evaluate(2.0), "1 step sizes were given, but there are only 0 changes"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            trainer.unlearn(forget, step=bad)
    STRATEGIES.register("half")(half)
    try:
        assert trainer.unlearn(forget, step="half", dry_run=True).step_sizes == report.step_sizes
    finally:
        del STRATEGIES._items["half"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("path", "trials"),
        ("enough", "target_memorization"),
        ("affordable", "max_retain_loss"),
        ("answer", "influence_direction"),
        ("descend", "descent_direction"),
        ("measure", "evaluate"),
    ],
)
def test_a_strategy_with_old_names_works_with_a_warning(old: str, new: str) -> None:
    def strategy(walk: Any) -> Any:
        with pytest.warns(DeprecationWarning, match=f"`walk.{old}` is now `{new}`") as caught:
            assert getattr(walk, old) == getattr(walk, new)
        assert caught[0].filename == __file__
        assert walk.goal.name is GoalName.EXAMPLES
        assert walk.goal.name == "examples"
        return natural(walk)

    trainer, _, _ = fitted()
    assert trainer.unlearn([0, 1], step=strategy, dry_run=True).step_sizes == [1.0]


@pytest.mark.parametrize(
    ("old", "new"),
    [("steps", "step_sizes"), ("step", "step_size"), ("remembered", "memorization"), ("moved", "is_edit")],
)
def test_old_names_of_a_trial_work_with_a_warning(old: str, new: str) -> None:
    trial = Trial((0.5, 1.0), 1.0, 2.0, 3.0, 0.25)
    with pytest.warns(DeprecationWarning, match=f"`Trial.{old}` is now `{new}`"):
        assert getattr(trial, old) == getattr(trial, new)
    with pytest.warns(DeprecationWarning, match=r"`QuadraticModel.bend` is now `curvature`"):
        assert QuadraticModel(-1.0, 3.0).bend == 3.0


@pytest.mark.parametrize("called", ["influence_direction", "descent_direction"])
def test_a_change_that_lowers_the_risk_needs_a_strategy_that_uses_it(called: str) -> None:
    trainer, module, _ = fitted()
    before = copy.deepcopy(module.state_dict())

    @declares(uses_risk=False)
    def without_risk(problem: EditProblem) -> Trial:
        assert math.isnan(problem.trials[0].risk)
        getattr(problem, called)(*([problem.trials[0]] if called == "descent_direction" else []))
        return problem.trials[0]

    with pytest.raises(ConfigurationError, match=f"problem.{called} needs the risk, .*uses_risk=False"):
        trainer.unlearn([2, 5], step=without_risk)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
