"""Error bars of scores: standard errors, intervals, and how well states of training or several fits agree."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigurationError

__all__ = ["LEAST_STATES", "LEVEL", "Agreement", "Intervals", "Spread", "agreement_of", "check_level", "t_quantile"]


LEVEL = 0.9
"""The level of the intervals that reports show."""

LEAST_STATES = 3
"""The smallest number of states of one fit that give error bars: the interval of two is 6 standard errors long."""

# Halvings of an angle between 0 and π/2, after which it is exact to rounding.
_HALVINGS = 60

# The number of scores that are read at a time.
_BLOCK = 2**16


class Intervals(NamedTuple):
    """An interval around each score.

    Attributes:
        low: The lower ends, in the shape of the scores.
        high: The upper ends.
    """

    low: Tensor
    high: Tensor

    @property
    def hold_zero(self) -> Tensor:
        """Whether each interval contains 0, so that the sign of the score is not certain."""
        return (self.low <= 0) & (self.high >= 0)


def check_level(level: float) -> None:
    """Checks the level of an interval.

    Raises:
        ConfigurationError: If it is not a number between 0 and 1.
    """
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise ConfigurationError(f"`level` must be a number between 0 and 1, such as 0.9, got {level!r}.")


def t_quantile(level: float, degrees: int) -> float:
    """The ``t`` for which a Student's t variable lies between ``-t`` and ``t`` with probability ``level``.

    Solves the closed form of this probability for a whole number of degrees of freedom by bisection (Abramowitz and
    Stegun, equations 26.7.3 and 26.7.4).

    Args:
        level: The probability, between 0 and 1.
        degrees: The degrees of freedom, at least 1.

    Example:
        >>> round(t_quantile(0.9, 3), 3)
        2.353
    """
    check_level(level)
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central_probability(angle: float, degrees: int) -> float:
    """The probability that a Student's t variable lies within ``±√degrees · tan(angle)``."""
    cosine, first = math.cos(angle), 1 + degrees % 2
    term, total = (cosine if first == 2 else 1.0), 0.0
    for power in range(first, degrees, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return math.sin(angle) * total if first == 1 else (angle + math.sin(angle) * total) * 2 / math.pi


class Spread:
    """The standard error of a mean, from values that are added one after the other (Welford, Technometrics 1962)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Adds values of any shape, each time the same."""
        self._count += 1
        difference = values - self._mean
        self._mean = self._mean + difference / self._count
        self._squares = self._squares + difference * (values - self._mean)

    def standard_errors(self, least: int = LEAST_STATES) -> Tensor | None:
        """The standard deviation over the additions by the root of their number; ``None`` for fewer than ``least``."""
        if self._count < least:
            return None
        return (self._squares / ((self._count - 1) * self._count)).sqrt()


def agreement_of(scores: Tensor, errors: Tensor | None, averaged: int) -> float | None:
    """The :class:`Agreement` of all scores ``(n_queries, n)``, which are read once because they may be in a file.

    Args:
        scores: The mean scores.
        errors: Their standard errors; ``None`` if there are none.
        averaged: The number of states or fits.
    """
    if errors is None:
        return None
    agreement, columns = Agreement(len(scores)), max(_BLOCK // len(scores), 1)
    for block, its_errors in zip(scores.split(columns, 1), errors.split(columns, 1), strict=True):
        agreement.add(block.contiguous(), its_errors.contiguous())  # rounding does not depend on the layout
    return agreement.value(averaged)


class Agreement:
    """How well states or fits agree on the scores of each query: their intraclass correlation, without all scores.

    For one query it is the mean covariance of the scores at two states, over the mean variance of the scores at one
    state; it is 1 if all states give the same scores, and about 0 if their scores have nothing in common. With the
    variance ``v`` of the mean scores over the training examples, the mean square ``e`` of their standard errors and
    ``S`` states, it equals ``(v − e) / (v + (S − 1)·e)`` (McGraw and Wong, Psychological Methods 1996, case 1).

    Args:
        queries: The number of queries.
    """

    def __init__(self, queries: int) -> None:
        self._count = 0
        self._mean, self._squares, self._errors = torch.zeros(3, queries, dtype=torch.float64)

    def add(self, scores: Tensor, errors: Tensor) -> None:
        """Adds the mean scores ``(n_queries, b)`` of some training examples, and their standard errors."""
        count, mean = self._count + scores.shape[1], scores.mean(1)
        between = (mean - self._mean) ** 2 * self._count * scores.shape[1] / count  # Chan, Golub and LeVeque, 1983
        self._squares = self._squares + (scores - mean[:, None]).square().sum(1) + between
        self._mean = self._mean + (mean - self._mean) * scores.shape[1] / count
        self._errors = self._errors + errors.square().sum(1)
        self._count = count

    def value(self, averaged: int) -> float | None:
        """The mean over the queries; ``None`` for fewer than two examples, or if all scores of a query are equal.

        Args:
            averaged: The number of states or fits, ``S``.
        """
        if self._count < 2:
            return None
        variance, error = self._squares / (self._count - 1), self._errors / self._count
        found = float(((variance - error) / (variance + (averaged - 1) * error)).mean())
        return found if math.isfinite(found) else None
