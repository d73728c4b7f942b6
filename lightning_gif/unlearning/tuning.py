"""The tuned numbers of an edit as one argument. They are checked and recorded in the report and the journal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import ConfigurationError
from ..storage.digests import Fingerprint
from .checked import CheckedNumbers, number
from .goals import GOALS, Goal
from .line_search import LineSearch
from .matching import Matching
from .preconditioner import Preconditioner
from .task import SampleSizes
from .trust_region import TrustRegion

__all__ = ["Relinearisation", "Tuning"]


@dataclass(frozen=True)
class Relinearisation(CheckedNumbers):
    """When ``"relinearise"`` stops.

    Attributes:
        max_solves: The largest number of changes to solve for.
        min_gain: A step gains little if it lowers the risk by less than this share of the remaining risk.
        prediction_tolerance: In example removal, the influence direction is enough if it changed the risk as predicted,
            up to this share of the predicted change.
    """

    max_solves: int = number(12, low=1, open_low=False)
    min_gain: float = number(0.02, open_low=False)
    prediction_tolerance: float = number(0.1, open_low=False)


@dataclass(frozen=True)
class Tuning:
    """The tuned numbers of an edit. All have defaults. The report has them in ``settings["tuning"]``.

    Attributes:
        goals: Goals with changed numbers, at most one of each kind, such as
            ``(ClassRemoval(target_memorization=0.01),)``.
        trust_region: Which steps are accepted, and the damping of Newton steps.
        relinearisation: When ``"relinearise"`` stops.
        line_search: The step size along the influence direction.
        sample_sizes: The numbers of examples that an edit uses.
        preconditioner: The scale of entries in a solve.
        matching: The numbers of the strategy ``"match"``.

    Raises:
        ConfigurationError: If a part has a wrong type, a goal is not registered, or two goals are of the same class.

    Example:
        >>> Tuning(trust_region=TrustRegion(max_halvings=4)).trust_region.max_halvings
        4
        >>> TrustRegion(accept_ratio=2.0)
        Traceback (most recent call last):
        ...
        lightning_gif.errors.ConfigurationError: `accept_ratio` of TrustRegion must be a number above 0 and at most 1, \
got 2.0. The default is 0.25.
    """

    goals: tuple[Goal, ...] = ()
    trust_region: TrustRegion = field(default_factory=TrustRegion)
    relinearisation: Relinearisation = field(default_factory=Relinearisation)
    line_search: LineSearch = field(default_factory=LineSearch)
    sample_sizes: SampleSizes = field(default_factory=SampleSizes)
    preconditioner: Preconditioner = field(default_factory=Preconditioner)
    matching: Matching = field(default_factory=Matching)

    def __post_init__(self) -> None:
        kinds = [type(goal) for goal in self.goals] if isinstance(self.goals, tuple) else []
        if not isinstance(self.goals, tuple) or not all(isinstance(goal, Goal) for goal in self.goals):
            raise ConfigurationError(
                "`goals` of Tuning must be a tuple of goals, such as (ClassRemoval(target_memorization=0.01),), got"
                f" {self.goals!r}."
            )
        for goal in self.goals:
            if type(goal) not in GOALS.values():
                raise ConfigurationError(
                    f"`goals` of Tuning has {goal!r}, but {type(goal).__name__} is not registered, so no edit would"
                    f" have this goal. Register it: GOALS.register('name')({type(goal).__name__})."
                )
        if len(set(kinds)) < len(kinds):
            raise ConfigurationError(
                f"`goals` of Tuning has two goals of the same class: {self.goals!r}. Give one of each."
            )
        for entry in fields(self)[1:]:
            expected, value = entry.default_factory, getattr(self, entry.name)
            if not isinstance(value, expected):  # type: ignore[arg-type]
                name = expected.__name__  # type: ignore[union-attr]
                raise ConfigurationError(f"`{entry.name}` of Tuning must be a {name}, got {value!r}.")

    def record(self, goal: Goal) -> dict[str, dict[str, Any]]:
        """All tuned numbers of an edit as plain values, by part and by name.

        Args:
            goal: The goal of the edit, with its numbers.
        """
        parts = {entry.name: asdict(getattr(self, entry.name)) for entry in fields(self)[1:]}
        return {"goal": asdict(goal), **parts}

    def fingerprint(self, goal: Goal) -> Fingerprint:
        """The parts of :meth:`record` that the changes in a journal depend on."""
        return {
            f"tuning ({name.replace('_', ' ')})": json.dumps(numbers, sort_keys=True)
            for name, numbers in self.record(goal).items()
        }
