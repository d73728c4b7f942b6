"""The trust region: it accepts step sizes, and sets the damping of the next solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigurationError
from .checked import CheckedNumbers, number
from .protocol import Limits, QuadraticModel, Trial

__all__ = ["TrustRegion"]


@dataclass(frozen=True)
class TrustRegion(CheckedNumbers):
    """Accepts steps, and adapts the damping, by the ratio of the actual to the predicted change of the risk.

    A step is accepted if this ratio is large enough (Nocedal and Wright, *Numerical Optimization*, 2nd ed., algorithm
    4.1). Otherwise its step size is halved, which costs an evaluation but no solve. There is no explicit radius: the
    damping of the Newton steps controls their length (Levenberg, *Quarterly of Applied Mathematics* 2, 1944; Marquardt,
    *J. SIAM* 11, 1963).

    Attributes:
        accept_ratio: The smallest ratio of actual to predicted change at which a step is accepted (``η`` in Nocedal and
            Wright).
        good_ratio: At this ratio or above, the damping is divided by ``damping_factor`` (3/4 in Nocedal and Wright).
        max_halvings: How often a step size is halved before the step is rejected.
        max_step_size: If the risk falls by more than predicted, the step size is doubled, up to this value.
        initial_damping: The damping of the first Newton step, as a share of ``‖Cg‖/‖g‖``, where ``g`` is the slope and
            ``C`` the curvature of the risk.
        damping_factor: The damping is divided by this factor after a good step, see ``good_ratio``.
        rejection_factor: The damping is multiplied by this factor after a rejected step. After a shortened step it is
            divided by the step size, and so multiplied by up to this factor.

    Raises:
        ConfigurationError: If a number is out of range, or ``accept_ratio`` is above ``good_ratio``.
    """

    accept_ratio: float = number(0.25, high=1.0)
    good_ratio: float = number(0.75, high=1.0)
    max_halvings: int = number(10, open_low=False)
    max_step_size: float = number(4.0, low=1.0, open_low=False)
    initial_damping: float = number(3e-3)
    damping_factor: float = number(3.0, low=1.0, open_low=False)
    rejection_factor: float = number(128.0, low=1.0, open_low=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accept_ratio > self.good_ratio:
            raise ConfigurationError(
                f"`accept_ratio` of TrustRegion must not be above `good_ratio`, got {self.accept_ratio!r} and"
                f" {self.good_ratio!r}: a step that is rejected would count as a good one. The defaults are 0.25 and"
                " 0.75."
            )

    def accepted_step(
        self,
        evaluate: Callable[[float], Trial],
        start: Trial,
        model: QuadraticModel,
        limits: Limits,
        *,
        bounded_risk: bool,
    ) -> Trial | None:
        """The accepted trial along a change; ``None`` if the step is rejected.

        Step size 1 is halved until the risk falls by at least ``accept_ratio`` times the prediction. If it falls by
        more than predicted at step size 1, the step size is doubled while the risk falls further.

        Args:
            evaluate: From a step size along the change to its trial.
            start: The trial at whose weights the change was solved.
            model: The predicted change of the risk.
            limits: A trial above the maximal retained loss is accepted only if its retained loss is not above that of
                ``start``.
            bounded_risk: Whether the risk has a lower bound. If so, the prediction from few examples may be below that
                bound. Then, if no trial falls as predicted, the best trial that lowers the risk is accepted.
        """

        def costs_too_much(trial: Trial, before: Trial) -> bool:
            return not (limits.allow(trial) or trial.retain_loss <= before.retain_loss)

        def is_lower(trial: Trial) -> bool:  # false if the risk is NaN
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
            damping: The relative damping of the last Newton step.
            step_size: The accepted step size; 0 if the step was rejected.
            actual: The actual change of the risk.
            predicted: The change that the quadratic model predicted.
        """
        if step_size < 1:
            return damping / max(step_size, 1 / self.rejection_factor)
        if step_size > 1 or actual <= self.good_ratio * predicted:
            return damping / self.damping_factor
        return damping
