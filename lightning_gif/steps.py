"""How far an edit goes, and when it is solved anew on the way: strategies, which see training-side data only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from .registry import Registry

__all__ = [
    "MOST_SOLVES",
    "STRATEGIES",
    "Goal",
    "LocalModel",
    "Point",
    "Strategy",
    "Walk",
    "natural",
    "relinearise",
    "search",
]

_LARGEST_STEP = 2.0**12
_LARGEST_NEAR_NATURAL = 4.0
_SMALLEST_STEP = 2.0**-6

# The most changes that are solved for, that of the theory included.
MOST_SOLVES = 12

# Smaller changes of a mean loss than this share of it are not told from rounding in float32: there the theory decides.
_ROUNDING = 1e-6

# A step is kept where the risk falls by this share of what the local model predicts; else half of it is tried.
_TRUSTED, _HALVINGS = 0.25, 10

# Where it falls by more than predicted, twice the step is tried, up to this one.
_LONGEST = 4.0

# No further step after one that gained less than this share of the risk that is left: for labels after two such, for a
# class too where the first one was cut short. While too much of these is remembered the walk goes on as long as steps
# lower the risk, and one may lead nowhere if none before it gained so little.
_WORTH = 0.02

# No further step where a class is forgotten and the risk, in nats, is below this: retrained models differ by more.
_NEAR = 0.004

# A further solve is for where the theory fails: not where its step does to 10 % what was predicted.
_HOLDS = 0.1


class Goal(str, Enum):
    """What an edit is for, and so what the risk is that it should lower.

    ``CLASS``: the forgotten examples are all that is known of their classes; none of them may be predicted any more,
    and nothing says what is to be predicted instead. By Bayes' rule a model that knows the probabilities of the classes
    knows them without some: it rules these out and divides by what is left (linear filtration; Baumhauer, Schöttle and
    Zeppelzauer, *Machine Learning* 111, 2022). What the trained model so expects of retained examples is what the
    edited one should predict. The risk is the mean of ``KL(expected ‖ predicted)`` over them, which can become zero
    without any fit to the labels of a sample, and a fifth of the mean of ``−log(1 − p)`` over the forgotten ones, with
    ``p`` the probability of the classes in question (unlikelihood; Welleck et al., ICLR 2020): unlike a loss with its
    sign turned, it has a minimum.
    ``EXAMPLES``: others like them stay, or it is not known what is predicted. The risk is the loss of the retained
    data, which retraining would minimise. No training ends in an exact minimum, and on a sample of the data even that
    has a slope: what there is of it in the loss of *all* data at the trained weights is subtracted, so that an edit
    answers the change of the data, and neither goes on training nor fits the sample. Where there are unseen examples to
    compare with, a forgotten one should have the loss ``t`` of the unseen one of its class and rank: what was learned
    by heart is what retraining without it would get wrong, and it is what a trained model finds hardest. Of those whose
    loss ``ℓ`` was less than that, ``(t − ℓ)²/(2σ)`` is a part of the risk, with ``σ`` the root mean square of what they
    lack, and eight times the weight of a retained loss.
    ``LABELS``: labels are corrected. The risk is ``KL(expected ‖ predicted)`` over the retained examples, with no class
    ruled out, and the cross-entropy of the corrected ones, each of which weighs eight times a retained one. Where it is
    not known what is predicted, it is their losses, each example with the same weight: what retraining would minimise.
    Less a slope it would have no minimum in a model that is not convex.
    """

    CLASS = "class"
    EXAMPLES = "examples"
    LABELS = "labels"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Point:
    """What a model is at a point of the way, measured on training-side data.

    The retained examples are others than those that the solves have seen, where there are enough of them.

    Attributes:
        steps: How much of each solved change is made, in the order of the solves: multiples, 1 is the natural step.
        forget_loss: Mean loss of (a sample of) the examples to be forgotten, with their old labels.
        retain_loss: Mean loss of (a sample of) the retained training data.
        risk: What should become small, see :class:`Goal`.
        remembered: For a class, the share of its examples that are still predicted as it. For labels, the share of the
            corrected examples that are not predicted as they should be. For single examples, how well a threshold on
            the loss tells them from unseen ones of the same class (AUROC, 0.5: not at all).
            NaN where it is not known.
    """

    steps: tuple[float, ...]
    forget_loss: float
    retain_loss: float
    risk: float
    remembered: float

    @property
    def step(self) -> float:
        """The multiple of the first change."""
        return self.steps[0] if self.steps else 0.0

    @property
    def moved(self) -> bool:
        """Whether anything is changed here."""
        return any(self.steps)


class LocalModel(NamedTuple):
    """The risk along a solved change: ``risk(s) − risk(0) ≈ slope·s + bend·s²/2``, bent as what was solved with is."""

    slope: float
    bend: float

    def change(self, step: float) -> float:
        """By how much the risk should change."""
        return self.slope * step + self.bend * step**2 / 2


class Walk(Protocol):
    """The way from the trained weights to the edited ones, as a strategy sees it.

    Attributes:
        goal: What the edit is for.
        enough: The largest :attr:`Point.remembered` that counts as forgotten, or as corrected; ``None`` where nothing
            tells.
        affordable: The largest retained loss that forgetting may cost: for single examples a tenth of the way to that
            of unseen ones; where there are none, a tenth more than before, or ``m/(n−m)`` if that is more.
        path: All points that were measured, in order. The first is the trained model.
    """

    goal: Goal
    enough: float | None
    affordable: float
    path: list[Point]

    def answer(self) -> LocalModel:
        """Solves for the change of the theory: what answers the removal or relabelling at the trained weights.

        Its local model bends as the retained loss does: all other parts of the risk are in its slope alone.
        """

    def descend(self, at: Point) -> LocalModel:
        """Solves, at the weights of a point, for what lowers the risk.

        The first change, and others while most of a class or a quarter of the wrong labels is remembered, is by the
        method of the edit: least squares hold whatever the curvature is so far from where the risk is least. There the
        second and later ones take the curvature of a bound for a class, and all are damped where the labels of a
        classifier are corrected, the more so the more changes behind ``at`` nothing came of. All others are damped
        Newton steps on the targets.
        """

    def measure(self, *steps: float) -> Point:
        """The point that so much of each change leads to that was solved for, in the order of the solves.

        Raises:
            ConfigurationError: If these are more steps than changes were solved for.
        """


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
        if _forgotten(walk, best) and _as_it_should_be(walk, best, expected):
            return best
    stalled = False
    while solved < MOST_SOLVES:
        found = _trusted(walk, best, walk.descend(best), solved)
        solved += 1
        gained, best = (0.0, best) if found is None else (best.risk - found.risk, found)
        forgotten = _forgotten(walk, best)
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


def _forgotten(walk: Walk, point: Point) -> bool:
    return walk.enough is None or point.remembered <= walk.enough


def _affordable(walk: Walk, point: Point) -> bool:
    return math.isfinite(point.retain_loss) and point.retain_loss <= walk.affordable


def _trusted(walk: Walk, start: Point, model: LocalModel, solved: int) -> Point | None:
    """How much of the last change to make: as far as the risk falls as predicted, or more if it falls by more.

    Args:
        walk: The walk.
        start: Where the change was solved for.
        model: The risk along it.
        solved: How many changes were solved for before.
    """
    before = start.steps + (0.0,) * (solved - len(start.steps))

    def lower(point: Point) -> bool:  # NaN is not
        return point.risk < start.risk and (_affordable(walk, point) or point.retain_loss <= start.retain_loss)

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
        longer = further.risk < there.risk and (_affordable(walk, further) or further.retain_loss <= there.retain_loss)
        if longer:
            step, there = 2 * step, further
    return there


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
        return _forgotten(walk, point) and _affordable(walk, point)

    step = 1.0
    while not _affordable(walk, tried[-1]) and step > _SMALLEST_STEP:
        step /= 2
        tried.append(walk.measure(step))
    if step == 1.0:
        while not enough(tried[-1]) and _affordable(walk, tried[-1]) and step < _LARGEST_STEP:
            step *= 2
            tried.append(walk.measure(step))
    # The natural step is enough, or the answer lies between the last step that is affordable and does not forget, and
    # the first that is not or does.
    if not (enough(tried[-1]) and step == 1.0):
        short = [p.steps[0] for p in tried if p.moved and _affordable(walk, p) and not enough(p)]
        low = max(short, default=0.0)
        high = min((p.steps[0] for p in tried if p.moved and p.steps[0] > low), default=0.0)
        for _ in range(4 if low and high else 0):
            tried.append(walk.measure(math.sqrt(low * high)))
            if _affordable(walk, tried[-1]) and not enough(tried[-1]):
                low = tried[-1].steps[0]
            else:
                high = tried[-1].steps[0]
    found = [point for point in tried if point.moved and enough(point)]
    if found:
        return min(found, key=lambda point: point.steps)
    worth = [point for point in tried if _affordable(walk, point) and point.forget_loss > before.forget_loss]
    return max(worth, key=lambda point: point.steps, default=before)


def _least_risk(walk: Walk) -> Point:
    """The affordable step that gives the least risk.

    Steps are doubled or halved from the natural one while the risk falls; the interval around the best is then refined
    by four more measurements. Zero is a possible answer: no step along this change lowers the risk.
    """
    tried = [walk.path[0], walk.measure(1.0)]
    largest = _LARGEST_NEAR_NATURAL if walk.goal is Goal.EXAMPLES else _LARGEST_STEP

    def risk(point: Point) -> float:
        return point.risk if math.isfinite(point.risk) and (_affordable(walk, point) or not point.moved) else math.inf

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
