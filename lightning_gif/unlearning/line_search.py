"""The line search for the smallest step size that reaches the target, or for the step size with the least risk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .checked import CheckedNumbers, number
from .protocol import Limits, Trial

__all__ = ["LineSearch"]


@dataclass(frozen=True)
class LineSearch(CheckedNumbers):
    """Searches for a step size along one change by doubling, halving and refinement.

    Attributes:
        max_doublings: How often a step size of 1 is doubled or halved at most. Example removal has a smaller limit.
        bisections: How often the interval of the last doubling or halving is bisected, on a log scale.
        refinements: How often the interval around the step size with the least risk is narrowed.
        rounding: The relative rounding error of a mean loss in float32. Losses cannot confirm a predicted change of the
            risk that is a smaller share of it, so there is no search for it.
    """

    max_doublings: int = number(12, low=1, high=100, open_low=False)
    bisections: int = number(4, open_low=False)
    refinements: int = number(2, open_low=False)
    rounding: float = number(1e-6, open_low=False)

    def smallest_that_forgets(self, evaluate: Callable[[float], Trial], before: Trial, limits: Limits) -> Trial:
        """The trial at the smallest step size that reaches the target memorization, starting at step size 1.

        The step size is doubled until the target is reached or the retained loss exceeds its limit. Then the last
        doubling is bisected, because a smaller step costs less retained loss. If the retained loss exceeds its limit at
        step size 1, the step size is halved instead. If no trial reaches the target, the result is the trial at the
        largest allowed step size that raises the forget loss, or ``before`` if there is none.

        Args:
            evaluate: From a step size to its trial.
            before: The trial of the trained model.
            limits: The target memorization and the maximal retained loss.
        """
        tried = [before, evaluate(1.0)]

        def is_enough(trial: Trial) -> bool:
            return limits.are_reached(trial) and limits.allow(trial)

        step_size = 1.0
        while not limits.allow(tried[-1]) and step_size > 2.0**-self.max_doublings:
            step_size /= 2
            tried.append(evaluate(step_size))
        if step_size == 1.0:
            while not is_enough(tried[-1]) and limits.allow(tried[-1]) and step_size < 2.0**self.max_doublings:
                step_size *= 2
                tried.append(evaluate(step_size))
        # Unless step size 1 is enough, the result is between the largest tried step size that is allowed but does not
        # reach the target, and the next larger one, which reaches it or is not allowed.
        if not (is_enough(tried[-1]) and step_size == 1.0):
            short = [t.step_sizes[0] for t in tried if t.is_edit and limits.allow(t) and not is_enough(t)]
            low = max(short, default=0.0)
            high = min((t.step_sizes[0] for t in tried if t.is_edit and t.step_sizes[0] > low), default=0.0)
            for _ in range(self.bisections if low and high else 0):
                tried.append(evaluate(math.sqrt(low * high)))
                if limits.allow(tried[-1]) and not is_enough(tried[-1]):
                    low = tried[-1].step_sizes[0]
                else:
                    high = tried[-1].step_sizes[0]
        enough = [trial for trial in tried if trial.is_edit and is_enough(trial)]
        if enough:
            return min(enough, key=lambda trial: trial.step_sizes)
        helpful = [trial for trial in tried if limits.allow(trial) and trial.forget_loss > before.forget_loss]
        return max(helpful, key=lambda trial: trial.step_sizes, default=before)

    def least_risk(
        self, evaluate: Callable[[float], Trial], before: Trial, limits: Limits, max_step_size: float
    ) -> Trial:
        """The allowed trial with the least risk, which may be ``before``.

        Step sizes are doubled or halved from 1 while the risk falls. Then the interval around the best one is refined.

        Args:
            evaluate: From a step size to its trial.
            before: The trial of the trained model.
            limits: The maximal retained loss.
            max_step_size: The largest step size of the goal.
        """
        tried = [before, evaluate(1.0)]

        def risk(trial: Trial) -> float:
            counts = math.isfinite(trial.risk) and (limits.allow(trial) or not trial.is_edit)
            return trial.risk if counts else math.inf

        step_size = 2.0
        largest = min(max_step_size, 2.0**self.max_doublings)
        while step_size <= largest:
            tried.append(evaluate(step_size))
            if risk(tried[-1]) >= risk(tried[-2]):
                break
            step_size *= 2
        step_size = 0.5
        while min(tried, key=risk).step_size <= 2 * step_size and step_size >= 2.0**-self.max_doublings:
            tried.append(evaluate(step_size))
            if risk(tried[-1]) >= min(risk(trial) for trial in tried[:-1]) and min(tried, key=risk).is_edit:
                break
            step_size /= 2
        best = min(tried, key=risk)
        factor = math.sqrt(2.0)
        for _ in range(self.refinements):
            if not best.is_edit:
                break
            centre = best.step_sizes[0]
            tried += [evaluate(size) for size in (centre * factor, centre / factor) if size <= largest]
            best = min(tried, key=risk)
            factor = math.sqrt(factor)
        return best
