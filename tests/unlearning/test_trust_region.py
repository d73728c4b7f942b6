"""The trust region: how much of a step is kept, by how far the risk falls as the local model predicts."""

from __future__ import annotations

from lightning_gif.unlearning import QuadraticModel
from lightning_gif.unlearning.strategies import relinearise

from .doubles import FLAT, Fake, labels


def test_a_model_that_promises_more_than_there_is_does_not_hide_a_step_that_helps() -> None:
    """It promises 400, of a risk that is 1 and falls to 0.3 in the middle of the step."""
    valley = lambda s=0.0, *later: 1.0 - 1.4 * (s if s < 0.5 else 1.0 - s)  # noqa: E731
    assert relinearise(labels(valley, QuadraticModel(-800.0, 800.0), QuadraticModel(-1.0, 1.0))).step_sizes == (0.5,)


def test_no_further_step_costs_more_than_forgetting_may() -> None:
    problem = Fake(
        lambda first=0.0, *later: 1.0 - sum(later) / 3,
        lambda first=0.0, *later: 0.1 + first + sum(later),
        risk=lambda first=0.0, *later: 9.0 - 0.5 * sum(later),
        max_retain_loss=0.4,
        models=[FLAT, *[QuadraticModel(-1.0, 1.0)] * 9],
    )
    assert relinearise(problem).retain_loss <= 0.4


def test_a_step_is_kept_as_far_as_the_risk_falls_as_predicted() -> None:
    """The model promises a fall of 0.5 for the whole step, and the risk rises beyond 0.6 of it."""
    valley = lambda r=0.0, *later: 1.0 - (r if r < 0.6 else 0.7 - r)  # noqa: E731
    assert relinearise(labels(valley, QuadraticModel(-1.0, 1.0))).step_sizes == (0.5,)


def test_a_step_is_made_longer_where_the_risk_falls_by_more_than_predicted() -> None:
    bowl = lambda r=0.0, *later: (r - 3.5) ** 2  # noqa: E731
    assert relinearise(labels(bowl, QuadraticModel(-1.0, 1.0))).step_sizes == (4.0,)
    assert relinearise(labels(bowl, QuadraticModel(-20.0, 20.0))).step_sizes == (1.0,)


def test_no_step_is_made_where_none_helps() -> None:
    assert not relinearise(labels(lambda *steps: 0.1 + sum(steps), QuadraticModel(-1.0, 1.0))).is_edit
    problem = labels(lambda *steps: 1.0 - 0.015 * sum(steps), *[QuadraticModel(-0.06, 0.06)] * 9)
    assert relinearise(problem).step_sizes == (1.0, 1.0)  # two in a row are enough of what is not worth it


def test_a_model_that_bends_up_too_early_does_not_hide_a_shorter_step() -> None:
    bowl = lambda s=0.0, *later: 1.0 - s + 1.5 * s**2  # noqa: E731
    assert relinearise(labels(bowl, QuadraticModel(-1.0, 10.5))).step_sizes == (0.5,)
