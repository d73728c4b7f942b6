"""The memory that an edit may keep between passes: one budget, which all that it keeps is taken from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import Settings
from ..data.batch import Batch
from ..data.examples import Examples
from ..objective.memory import bytes_to_keep
from ..objective.objective import Objective

__all__ = ["MemoryBudget"]


@dataclass
class MemoryBudget:
    """The bytes that one call may keep on each process. It affects speed only, never results.

    Attributes:
        batches: The bytes that are left for batches. What is held takes its size from them.
        passes: The bytes for the first passes of the curvatures of one solve, which end with it.
    """

    batches: float
    passes: float

    @classmethod
    def of(cls, settings: Settings, objective: Objective) -> MemoryBudget:
        """The budget that ``memory`` allows: half of it for batches, and half for passes."""
        half = bytes_to_keep(settings, objective)
        return cls(half, half)

    def of_a_solve(self) -> MemoryBudget:
        """What is left, as a budget of its own for a solve whose batches are dropped at its end."""
        return replace(self)

    def hold(self, examples: Examples) -> Examples:
        """The same examples, held in memory if their batches fit into what is left."""
        held = examples.cached(self.batches)
        if held is not examples:
            self.batches -= _size(held)
        return held

    def sample(self, examples: Examples, count: int, seed: int) -> Examples:
        """A sample of examples, held in memory if it fits. A sample of held examples is a copy, and always held."""
        part = examples.sample(count, seed)
        if part is not examples and part.in_memory is not None:
            self.batches -= _size(part)
        return self.hold(part)

    def map(self, examples: Examples, function: Callable[[Batch], Batch]) -> Examples:
        """The examples with each batch passed through a function, whose results for held batches are held, too."""
        mapped = examples.map(function)
        self.batches -= _size(mapped) - _size(examples)
        return mapped

    def for_curvatures(self, settings: Settings, count: int) -> Settings:
        """The settings with which each of ``count`` curvatures of a solve is opened: their passes fit together."""
        return replace(settings, memory=2 * self.passes / count / 2**30)  # of which a curvature takes half


def _size(examples: Examples) -> int:
    """The bytes of the batches that are held in memory."""
    return sum(batch.nbytes for batch in examples.in_memory or ())
