"""How far to go along a solved direction, decided on training-side data only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

__all__ = ["Goal", "Point", "forget_class", "minimise_risk", "restore"]

# The share of forgotten examples that must lose their label: all but the odd one that is not what its label says.
_FORGOTTEN_SHARE = 0.99

# How much retained loss a forgotten class may cost, as a share of the loss of guessing (log of the number of classes).
_RETAIN_BUDGET = 0.05

# A repair is worth making while the first step need not grow beyond 1.15^8, about three times.
_LENGTHEN, _LENGTHENED = 1.15, 9

_LARGEST_STEP = 2.0**12
_LARGEST_NEAR_NATURAL = 4.0
_SMALLEST_STEP = 2.0**-6


class Goal(str, Enum):
    """What an edit is for, and so what a search for the step looks at.

    ``CLASS``: the forgotten examples are all that is known of their classes; none of them may be predicted any more.
    Once that is so, a second solve at the new weights takes back what it cost on the retained data.
    ``EXAMPLES``: others like them stay; the risk on the retained data, which retraining would minimise, decides. Only
    steps near the natural one are looked at.
    ``LABELS``: labels are corrected; the risk on retained and corrected data decides.

    No training ends in an exact minimum: the slope that it left in the risk on *all* data is subtracted from the risk,
    so that the search answers the change of the data and does not go on training.
    """

    CLASS = "class"
    EXAMPLES = "examples"
    LABELS = "labels"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Point:
    """What a step of a given size does, measured on training-side data.

    Attributes:
        step: The multiple ``s`` of the solved change.
        repair: The multiple of the second change, solved anew at the new weights to restore the retained loss.
        forget_loss: Mean loss of the examples to be forgotten, with their old labels.
        retain_loss: Mean loss of (a sample of) the retained training data.
        risk: What the goals ``EXAMPLES`` and ``LABELS`` minimise, see :class:`Goal`.
        forgotten: Share of the examples to be forgotten whose loss is above that of guessing among the classes, so
            that their label is no longer predicted; NaN where there are no classes.
    """

    step: float
    repair: float
    forget_loss: float
    retain_loss: float
    risk: float
    forgotten: float


def forget_class(measure: Callable[[float], Point], guessing: float) -> tuple[float, list[Point], bool]:
    """The smallest step, from the natural one up where that is affordable, after which the class is forgotten.

    Steps are doubled until 99 % of the examples have a loss above that of guessing, and then the last doubling is
    halved four times. A larger step forgets nothing more and costs retained loss. The search turns back where retained
    loss has risen by 5 % of the loss of guessing; where the natural step costs more than that, it looks below it.

    Args:
        measure: What a step does.
        guessing: The loss of a guess: ``log`` of the number of classes.

    Returns:
        The step, all measured points in the order of measurement, and whether the class is forgotten there.
    """
    path = [measure(0.0)]
    budget = path[0].retain_loss + _RETAIN_BUDGET * guessing

    def affordable(point: Point) -> bool:
        return math.isfinite(point.retain_loss) and point.retain_loss <= budget

    def forgotten(point: Point) -> bool:
        return point.forgotten >= _FORGOTTEN_SHARE and affordable(point)

    step = 1.0
    path.append(measure(step))
    while not affordable(path[-1]) and step > _SMALLEST_STEP:
        step /= 2
        path.append(measure(step))
    if step == 1.0:
        while not forgotten(path[-1]) and affordable(path[-1]) and step < _LARGEST_STEP:
            step *= 2
            path.append(measure(step))
    # The natural step is enough, or the answer lies between the last step that is affordable and does not forget, and
    # the first that is not or does.
    if not (forgotten(path[-1]) and step == 1.0):
        low = max((p.step for p in path if affordable(p) and not forgotten(p)), default=0.0)
        high = min((p.step for p in path if p.step > low), default=0.0)
        for _ in range(4 if low and high else 0):
            path.append(measure(math.sqrt(low * high)))
            if affordable(path[-1]) and not forgotten(path[-1]):
                low = path[-1].step
            else:
                high = path[-1].step
    enough = [point for point in path if point.step and forgotten(point)]
    if enough:
        return min(point.step for point in enough), path, True
    worth = [point.step for point in path if affordable(point) and point.forget_loss > path[0].forget_loss]
    return max(worth, default=0.0), path, False


def restore(measure: Callable[[float, float], Point], start: Point) -> tuple[Point, list[Point]]:
    """How much of the second change to make, and how much more of the first, so that the class stays forgotten.

    The second change restores the retained loss and brings back some of what was forgotten. For each of a few multiples
    of it, the first step is lengthened until 99 % of the examples have lost their label again.

    Args:
        measure: What a step and a multiple of the second change do together.
        start: What the first change did.

    Returns:
        The point of least retained loss at which the class is forgotten, and all measured points.
    """
    path, best = [], start
    for repair in (1.0, 0.5, 0.25):
        step = start.step
        for _ in range(_LENGTHENED):
            path.append(measure(step, repair))
            if path[-1].forgotten >= _FORGOTTEN_SHARE or not path[-1].retain_loss < best.retain_loss:
                break
            step *= _LENGTHEN
        if path[-1].forgotten >= _FORGOTTEN_SHARE and path[-1].retain_loss < best.retain_loss:
            best = path[-1]
    return best, path


def minimise_risk(measure: Callable[[float], Point], *, near_natural: bool) -> tuple[float, list[Point]]:
    """The step that gives the least risk on the data that retraining would see.

    Steps are doubled or halved from the natural one while the risk falls; the interval around the best is then refined
    by four more measurements. Zero is a possible answer: no step along this direction lowers the risk.

    Args:
        measure: What a step does.
        near_natural: Try no step above 4.

    Returns:
        The step, and all measured points in the order of measurement.
    """
    path = [measure(0.0), measure(1.0)]
    largest = _LARGEST_NEAR_NATURAL if near_natural else _LARGEST_STEP

    def risk(point: Point) -> float:
        return point.risk if math.isfinite(point.risk) else math.inf

    step = 2.0
    while step <= largest:
        path.append(measure(step))
        if risk(path[-1]) >= risk(path[-2]):
            break
        step *= 2
    step = 0.5
    while min(path, key=risk).step <= 2 * step and step >= _SMALLEST_STEP:
        path.append(measure(step))
        if risk(path[-1]) >= min(risk(point) for point in path[:-1]) and min(path, key=risk).step > 0:
            break
        step /= 2
    best = min(path, key=risk)
    factor = math.sqrt(2.0)
    for _ in range(2):
        if best.step == 0.0:
            break
        centre = best.step
        path += [measure(size) for size in (centre * factor, centre / factor) if size <= largest]
        best = min(path, key=risk)
        factor = math.sqrt(factor)
    return best.step, path
