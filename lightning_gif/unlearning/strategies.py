"""Strategies: how far an edit goes, and whether to solve anew on the way."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..registry import Registry
from .protocol import Goal, LocalModel, Point, Walk
from .trust_region import is_affordable, is_forgotten, trusted_step

__all__ = ["MOST_SOLVES", "STRATEGIES", "Strategy", "natural", "relinearise", "search"]


_LARGEST_STEP = 2.0**12

_LARGEST_NEAR_NATURAL = 4.0

_SMALLEST_STEP = 2.0**-6

# The most changes that are solved for, that of the theory included.
MOST_SOLVES = 12

# Smaller changes of a mean loss than this share of it are not told from rounding in float32: there the theory decides.
_ROUNDING = 1e-6

# No further step after one that gained less than this share of the risk that is left: for labels after two such, for a
# class too where the first one was cut short. While too much of these is remembered the walk goes on as long as steps
# lower the risk, and one may lead nowhere if none before it gained so little.
_WORTH = 0.02

# No further step where a class is forgotten and the risk, in nats, is below this: retrained models differ by more.
_NEAR = 0.004

# A further solve is for where the theory fails: not where its step does to 10 % what was predicted.
_HOLDS = 0.1

Strategy = Callable[[Walk], Point]
"""``walk →`` the point to go to, one of those measured."""

STRATEGIES: Registry[Strategy] = Registry("step")
"""All strategies by name; :meth:`Registry.register` adds one."""


@STRATEGIES.register("natural")
def natural(walk: Walk) -> Point:
    """The step of the theory, 1, whatever it does."""
    walk.answer()
    return walk.measure(1.0)


@STRATEGIES.register("search")
def search(walk: Walk) -> Point:
    """The best step along the change of the theory: the smallest that forgets, or the one of least risk."""
    return _best_along_answer(walk, walk.answer())


@STRATEGIES.register("relinearise")
def relinearise(walk: Walk) -> Point:
    """Steps that lower the risk, each solved where the last one led; single examples first get that of the theory.

    At most twelve changes are solved for, kept as far as the risk falls as predicted.
    Single examples get the best step along the change of the theory, and no other where that did to the risk what the
    local model predicted and nothing tells them from unseen ones. For a class the theory is too far from what it should
    answer, and is not asked.
    """
    best, solved = walk.path[0], 0
    if walk.goal is Goal.EXAMPLES:
        expected, solved = walk.answer(), 1
        best = _best_along_answer(walk, expected)
        if is_forgotten(walk, best) and _as_it_should_be(walk, best, expected):
            return best
    stalled = False
    while solved < MOST_SOLVES:
        found = trusted_step(walk, best, walk.descend(best), solved)
        solved += 1
        gained, best = (0.0, best) if found is None else (best.risk - found.risk, found)
        forgotten = is_forgotten(walk, best)
        if walk.goal is Goal.CLASS and forgotten and best.risk < _NEAR:
            break
        if found is not None and gained >= _WORTH * abs(best.risk):
            stalled = False
        elif walk.goal is Goal.EXAMPLES or (walk.goal is Goal.LABELS and found is None and forgotten):
            break
        else:
            # The curvature of a class that is predicted for certain can point anywhere, which the next solve bounds;
            # and a Newton step that had to be cut short, and so gained next to nothing, had too little damping, of
            # which the next one has more.
            # The first change for labels is another kind of step than those after it.
            another = walk.goal is Goal.LABELS or found is None or found.steps[-1] < 1
            if (forgotten or found is None) and (stalled or not another):
                break
            stalled = another
    return best


def _as_it_should_be(walk: Walk, point: Point, expected: LocalModel) -> bool:
    """Whether a step along the change of the theory leaves nothing to do."""
    first = walk.path[0]
    predicted = expected.change(point.step)
    off = abs(point.risk - first.risk - predicted)
    return not point.moved or off <= max(_HOLDS * abs(predicted), _ROUNDING * abs(first.risk))


def _best_along_answer(walk: Walk, model: LocalModel) -> Point:
    if walk.goal is Goal.CLASS:
        return _smallest_that_forgets(walk)
    if walk.goal is Goal.EXAMPLES and abs(model.change(1.0)) <= _ROUNDING * abs(walk.path[0].risk):
        return walk.measure(1.0)
    return _least_risk(walk)


def _smallest_that_forgets(walk: Walk) -> Point:
    """The smallest step, from the natural one up where that is affordable, after which the examples are forgotten.

    Steps are doubled until they are, and then the last doubling is halved four times. A larger step forgets nothing
    more and costs retained loss. The search turns back where that is no longer affordable; where it is not at the
    natural step, smaller ones are looked at. If no step forgets, the longest affordable one that does forget something.
    """
    before = walk.path[0]
    tried = [before, walk.measure(1.0)]

    def enough(point: Point) -> bool:
        return is_forgotten(walk, point) and is_affordable(walk, point)

    step = 1.0
    while not is_affordable(walk, tried[-1]) and step > _SMALLEST_STEP:
        step /= 2
        tried.append(walk.measure(step))
    if step == 1.0:
        while not enough(tried[-1]) and is_affordable(walk, tried[-1]) and step < _LARGEST_STEP:
            step *= 2
            tried.append(walk.measure(step))
    # The natural step is enough, or the answer lies between the last step that is affordable and does not forget, and
    # the first that is not or does.
    if not (enough(tried[-1]) and step == 1.0):
        short = [p.steps[0] for p in tried if p.moved and is_affordable(walk, p) and not enough(p)]
        low = max(short, default=0.0)
        high = min((p.steps[0] for p in tried if p.moved and p.steps[0] > low), default=0.0)
        for _ in range(4 if low and high else 0):
            tried.append(walk.measure(math.sqrt(low * high)))
            if is_affordable(walk, tried[-1]) and not enough(tried[-1]):
                low = tried[-1].steps[0]
            else:
                high = tried[-1].steps[0]
    found = [point for point in tried if point.moved and enough(point)]
    if found:
        return min(found, key=lambda point: point.steps)
    worth = [point for point in tried if is_affordable(walk, point) and point.forget_loss > before.forget_loss]
    return max(worth, key=lambda point: point.steps, default=before)


def _least_risk(walk: Walk) -> Point:
    """The affordable step that gives the least risk.

    Steps are doubled or halved from the natural one while the risk falls; the interval around the best is then refined
    by four more measurements. Zero is a possible answer: no step along this change lowers the risk.
    """
    tried = [walk.path[0], walk.measure(1.0)]
    largest = _LARGEST_NEAR_NATURAL if walk.goal is Goal.EXAMPLES else _LARGEST_STEP

    def risk(point: Point) -> float:
        return point.risk if math.isfinite(point.risk) and (is_affordable(walk, point) or not point.moved) else math.inf

    step = 2.0
    while step <= largest:
        tried.append(walk.measure(step))
        if risk(tried[-1]) >= risk(tried[-2]):
            break
        step *= 2
    step = 0.5
    while min(tried, key=risk).step <= 2 * step and step >= _SMALLEST_STEP:
        tried.append(walk.measure(step))
        if risk(tried[-1]) >= min(risk(point) for point in tried[:-1]) and min(tried, key=risk).moved:
            break
        step /= 2
    best = min(tried, key=risk)
    factor = math.sqrt(2.0)
    for _ in range(2):
        if not best.moved:
            break
        centre = best.steps[0]
        tried += [walk.measure(size) for size in (centre * factor, centre / factor) if size <= largest]
        best = min(tried, key=risk)
        factor = math.sqrt(factor)
    return best
