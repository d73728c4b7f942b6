"""How much of a step to take: as far as the risk falls as its model predicts."""

from __future__ import annotations

import math

from .protocol import Goal, LocalModel, Point, Walk

# A step is kept where the risk falls by this share of what the local model predicts; else half of it is tried.
_TRUSTED, _HALVINGS = 0.25, 10

# Where it falls by more than predicted, twice the step is tried, up to this one.
_LONGEST = 4.0


def is_forgotten(walk: Walk, point: Point) -> bool:
    """Whether a point is as far as the edit should go; true where nothing says how far that is."""
    return walk.enough is None or point.remembered <= walk.enough


def is_affordable(walk: Walk, point: Point) -> bool:
    """Whether the retained loss of a point is finite and within what the edit may cost."""
    return math.isfinite(point.retain_loss) and point.retain_loss <= walk.affordable


def trusted_step(walk: Walk, start: Point, model: LocalModel, solved: int) -> Point | None:
    """How much of the last change to make: as far as the risk falls as predicted, or more if it falls by more.

    Args:
        walk: The walk.
        start: Where the change was solved for.
        model: The risk along it.
        solved: How many changes were solved for before.
    """
    before = start.steps + (0.0,) * (solved - len(start.steps))

    def lower(point: Point) -> bool:  # NaN is not
        return point.risk < start.risk and (is_affordable(walk, point) or point.retain_loss <= start.retain_loss)

    def as_predicted(point: Point, step: float) -> bool:
        return lower(point) and point.risk - start.risk <= _TRUSTED * model.change(step)

    step, there = 1.0, walk.measure(*before, 1.0)
    tried = [there]
    for _ in range(_HALVINGS):
        if as_predicted(there, step):
            break
        step /= 2
        there = walk.measure(*before, step)
        tried.append(there)
    if not as_predicted(there, step):
        if walk.goal is Goal.EXAMPLES:
            return None
        # The risk of a class or of labels has a least value. A model from the curvature of a few examples may promise
        # more than all of it, along a change that lowers it all the same.
        return min(filter(lower, tried), key=lambda point: point.risk, default=None)
    longer = step == 1.0 and there.risk - start.risk <= model.change(1.0)
    while longer and 2 * step <= _LONGEST:
        further = walk.measure(*before, 2 * step)
        longer = further.risk < there.risk and (
            is_affordable(walk, further) or further.retain_loss <= there.retain_loss
        )
        if longer:
            step, there = 2 * step, further
    return there
