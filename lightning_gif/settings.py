"""What can be chosen, checked once: the arguments that the callback and each call share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypedDict

from torch import Tensor

from ._compat import rank_zero_warn
from .curvature import METHODS
from .errors import ConfigurationError, ConvergenceError, ConvergenceWarning
from .registry import nearest
from .selection import check_selector, is_name
from .solvers import SOLVERS, LinearOperator, Solution

__all__ = ["Overrides", "Settings"]


class Overrides(TypedDict, total=False):
    """Settings that one call may change; see :class:`~lightning_gif.GIFCallback` for their meaning."""

    selector: str | Sequence[str]
    ratio: float
    method: str
    solver: str
    damping: float
    max_iter: int
    rtol: float
    curvature_examples: int | None
    batch_size: int
    unconverged: Literal["warn", "raise", "ignore"]
    seed: int


@dataclass(frozen=True)
class Settings:
    """The checked arguments of :class:`~lightning_gif.GIFCallback`, which documents each.

    Raises:
        ConfigurationError: For a value out of range or an unknown name.
    """

    selector: str | Sequence[str]
    ratio: float
    method: str
    solver: str
    damping: float
    max_iter: int
    rtol: float
    curvature_examples: int | None
    batch_size: int
    unconverged: str
    seed: int

    def __post_init__(self) -> None:
        check_selector(self.selector, self.ratio)
        METHODS[self.method]
        SOLVERS[self.solver]
        number = (int, float)
        _require("damping", self.damping, number, lambda value: 0 <= value < math.inf, "a number of at least 0")
        _require("max_iter", self.max_iter, int, lambda value: value >= 1, "a whole number of at least 1")
        _require("rtol", self.rtol, number, lambda value: 0 < value < 1, "a number between 0 and 1")
        _require("batch_size", self.batch_size, int, lambda value: value >= 1, "a whole number of at least 1")
        _require("seed", self.seed, int, lambda value: value >= 0, "a whole number of at least 0")
        if self.curvature_examples is not None:
            expected = "None (all) or a whole number of at least 1"
            _require("curvature_examples", self.curvature_examples, int, lambda value: value >= 1, expected)
        if self.unconverged not in ("warn", "raise", "ignore"):
            raise ConfigurationError(f"`unconverged` must be 'warn', 'raise' or 'ignore', got {self.unconverged!r}.")

    @property
    def needs_no_cache(self) -> bool:
        """Whether the targets are the same whatever training has shown."""
        return not is_name(self.selector) or self.selector == "random" or not METHODS[self.method].selects

    def override(self, changes: Overrides) -> Settings:
        """The same settings with some changed for one call.

        Raises:
            ConfigurationError: For an unknown name or a bad value.
        """
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigurationError(f"Unknown argument {name!r}. {nearest(name, known)}")
        return replace(self, **changes)

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        """Runs the chosen solver.

        Raises:
            ConvergenceError: If it did not converge and ``unconverged="raise"``, or if it diverged.
            NonFiniteError: If it met a non-finite number.
        """
        solver: Callable[..., Solution] = partial(
            SOLVERS[self.solver],
            damping=float(self.damping),
            rtol=self.rtol,
            max_iter=self.max_iter,
            seed=self.seed,
        )
        solution = solver(operator, rhs)
        if not solution.converged and self.unconverged != "ignore":
            message = (
                f"The {self.solver} solve ended as {str(solution.status)!r} with a relative residual of"
                f" {solution.residual:.2g} after {solution.iterations} steps ({solution.hvps} Hessian products); rtol"
                f" is {self.rtol:g}. The result is a regularised one: directions of small curvature are not followed to"
                " their end. Raise `max_iter` or `damping`, or accept it by a larger `rtol` or unconverged='ignore'."
            )
            if self.unconverged == "raise":
                raise ConvergenceError(message)
            rank_zero_warn(message, category=ConvergenceWarning)
        return solution


def _require(name: str, value: Any, kind: Any, fits: Callable[[Any], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
        raise ConfigurationError(f"`{name}` must be {expected}, got {value!r}.")
