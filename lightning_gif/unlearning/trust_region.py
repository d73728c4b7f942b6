"""Which step size of a change to accept, and how the damping of the next solve follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .checked import CheckedNumbers, number
from .protocol import Limits, QuadraticModel, Trial

__all__ = ["TrustRegion"]


@dataclass(frozen=True)
class TrustRegion(CheckedNumbers):
    """Accepts steps, and adapts the damping, by the ratio of the actual to the predicted change of the risk.

    A step is accepted if that ratio is large enough (Nocedal and Wright, *Numerical Optimization*, 2nd ed., algorithm
    4.1); otherwise its size is halved, which costs a measurement but no solve. The radius of the region is controlled
    by the damping of the Newton steps (Levenberg, *Quarterly of Applied Mathematics* 2, 1944; Marquardt, *J. SIAM* 11,
    1963).

    Attributes:
        accept_ratio: A step is accepted at this ratio of actual to predicted change (``η`` in Nocedal and Wright).
        good_ratio: From this ratio on the damping is divided by ``damping_factor`` (their 3/4).
        max_halvings: How often a step size is halved before the step is rejected.
        max_step_size: Where the risk falls by more than predicted, the step size is doubled up to this.
        initial_damping: Of the first Newton step, as a share of ``‖Cg‖/‖g‖``, with ``g`` the slope of the risk and
            ``C`` its curvature.
        damping_factor: See ``good_ratio``.
        rejection_factor: A halved step multiplies the damping by the inverse of its size, a rejected one by this, which
            is also the most.
    """

    accept_ratio: float = number(0.25, high=1.0)
    good_ratio: float = number(0.75, high=1.0)
    max_halvings: int = number(10, open_low=False)
    max_step_size: float = number(4.0, low=1.0, open_low=False)
    initial_damping: float = number(3e-3)
    damping_factor: float = number(3.0, low=1.0, open_low=False)
    rejection_factor: float = number(128.0, low=1.0, open_low=False)

    def accepted_step(
        self,
        evaluate: Callable[[float], Trial],
        start: Trial,
        model: QuadraticModel,
        limits: Limits,
        *,
        bounded_risk: bool,
    ) -> Trial | None:
        """The trial at the largest step size at which the risk falls as predicted; ``None`` if the step is rejected.

        Args:
            evaluate: The trial at a step size along the change.
            start: The trial at which the change was solved for.
            model: The predicted change of the risk.
            limits: A trial beyond the largest retained loss is accepted only if that loss is not above that of
                ``start``.
            bounded_risk: Whether the risk has a lower bound. Then a model from the curvature of few examples may
                predict a larger fall than there is room for, and the best trial that lowers the risk is accepted.
        """

        def costs_too_much(trial: Trial, before: Trial) -> bool:
            return not (limits.allow(trial) or trial.retain_loss <= before.retain_loss)

        def is_lower(trial: Trial) -> bool:  # NaN is not
            return trial.risk < start.risk and not costs_too_much(trial, start)

        def is_accepted(trial: Trial, step_size: float) -> bool:
            return is_lower(trial) and trial.risk - start.risk <= self.accept_ratio * model.change(step_size)

        step_size, trial = 1.0, evaluate(1.0)
        tried = [trial]
        for _ in range(self.max_halvings):
            if is_accepted(trial, step_size):
                break
            step_size /= 2
            trial = evaluate(step_size)
            tried.append(trial)
        if not is_accepted(trial, step_size):
            return min(filter(is_lower, tried), key=lambda trial: trial.risk, default=None) if bounded_risk else None
        longer = step_size == 1.0 and trial.risk - start.risk <= model.change(1.0)
        while longer and 2 * step_size <= self.max_step_size:
            further = evaluate(2 * step_size)
            longer = further.risk < trial.risk and not costs_too_much(further, trial)
            if longer:
                step_size, trial = 2 * step_size, further
        return trial

    def next_damping(self, damping: float, step_size: float, actual: float, predicted: float) -> float:
        """The relative damping of the next Newton step.

        Args:
            damping: That of the last one.
            step_size: The step size that was accepted of it; 0 if it was rejected.
            actual: The change of the risk.
            predicted: What the quadratic model predicted of it.
        """
        if step_size < 1:
            return damping / max(step_size, 1 / self.rejection_factor)
        if step_size > 1 or actual <= self.good_ratio * predicted:
            return damping / self.damping_factor
        return damping
