"""The pictures of an edit: what was forgotten, what changed by class, how it was found, and where the model looks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reporting.charts import LOWERS, NEUTRAL, RAISES, draw_groups, named, percent
from ..reporting.notes import describe_solve
from ..reporting.previews import empty_figure, figure, show
from .goals import GOALS
from .outcomes import Outcome
from .protocol import Trial
from .record import EditRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["draw_predictions", "draw_summary", "draw_trials", "has_predictions", "solve_text", "title_of"]


# Classes in one chart, and examples in one row.
_MOST_CLASSES, _MOST_SHOWN = 12, 8

_PARTS = {
    "forget": "forget examples",
    "retain": "retained examples",
    "relabelled": "with the new labels",
    "unseen": "unseen examples",
}


def draw_summary(record: EditRecord, *, examples: bool = True) -> Figure:
    """Draws what was forgotten, and what the edit changed by class and in the mean losses.

    Args:
        record: The report.
        examples: Whether to draw forget examples.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    shown = record.context.shown[:_MOST_SHOWN] if examples else []
    has_pictures = any(one.image is not None for one in shown)
    by_class = _by_class(record)
    bars = max(len(by_class[0]) * len(by_class[1]) if by_class else 0, 4 * len(record.losses))
    heights = [1.85] * has_pictures + [max(0.14 * bars, 2.2) + 0.7]
    drawn = empty_figure(10.0, sum(heights) + 1.0)
    drawn.suptitle(title_of(record), fontsize=13, fontweight="bold", parse_math=False)
    drawn.supxlabel(textwrap.fill(record.verdict or _losses_text(record), 150), fontsize=8, parse_math=False)
    parts = iter(drawn.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if has_pictures:
        _draw_examples(next(parts), record, len(shown))
    axes = next(parts).subplots(1, 1 + bool(by_class), squeeze=False)[0]
    if by_class:
        names, series = by_class
        draw_groups(axes[0], names, series, percent)
        axes[0].set_title("Predicted as their label, by class", fontsize=10)
        axes[0].set_xlim(0.0, 1.3)
        axes[0].set_xticks([0.0, 0.5, 1.0], ["0 %", "50 %", "100 %"])
    _draw_means(axes[-1], record)
    return drawn


def title_of(record: EditRecord) -> str:
    """What the edit did, and whether it worked, in a few words."""
    count = f"{record.n_forget} example{'' if record.n_forget == 1 else 's'}"
    what = f"Correct the labels of {count}" if record.relabelled is not None else f"Forget {count}"
    forget = record.outcomes.get("forget")
    if record.goal == "class" and forget is not None and forget.labels is not None:
        names = [named(label, record.context.class_names) for label in forget.labels.unique().tolist()]
        what += f", all of class {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
    grade = record.verdict.partition(".")[0].lower()
    return f"{what}: {grade}" if grade else what


def _losses_text(record: EditRecord) -> str:
    change = record.forget
    return f"The loss of the forget examples went from {change.before:.4g} to {change.after:.4g}."


def _draw_examples(part: SubFigure, record: EditRecord, count: int) -> None:
    some = "Some of the" if record.n_forget > count else "The"
    part.suptitle(f"{some} forget examples, with their labels in training", fontsize=10, x=0.01, ha="left")
    axes = part.subplots(1, max(count, 6), squeeze=False)[0]
    indices = record.data.get("indices", []) if record.n_found == record.n_forget else []
    for position, axis in enumerate(axes):
        if position >= count:
            axis.set_axis_off()
            continue
        shown = record.context.shown[position]
        index = f"#{indices[position]} " if position < len(indices) else ""
        label = "" if shown.label is None else named(shown.label, record.context.class_names)
        show(axis, shown, f"{index}{f'label {label}' if label == str(shown.label) else label}")


def _by_class(record: EditRecord) -> tuple[list[str], dict[str, tuple[list[float | None], str]]] | None:
    """The share of examples that are predicted as their label before and after, by class; ``None`` if not known."""
    known = {name: part for name, part in record.outcomes.items() if part.predicted_after is not None}
    known = {name: part for name, part in known.items() if part.labels is not None}
    first = "relabelled" if record.relabelled is not None else "forget"
    own = [part for name, part in known.items() if name in (first, "retain")]
    if len(own) < 2:
        return None
    forgotten = set(known["forget"].labels.tolist()) if record.goal == "class" else set()  # type: ignore[union-attr]
    before, after = (_rates(own, when) for when in ("before", "after"))
    order = sorted(before, key=lambda label: (label not in forgotten, -abs(after[label] - before[label]), label))
    shown = sorted(order[:_MOST_CLASSES])
    names = [named(c, record.context.class_names) + (" (forgotten)" if c in forgotten else "") for c in shown]
    series: dict[str, tuple[list[float | None], str]] = {
        "before": ([before[label] for label in shown], NEUTRAL),
        "after": ([after[label] for label in shown], RAISES),
    }
    if "unseen" in known:
        unseen = _rates([known["unseen"]], "after")
        series["unseen examples, after"] = ([unseen.get(label) for label in shown], LOWERS)
    if len(order) > len(shown):
        names.append(f"… {len(order) - len(shown)} more")
        for values, _ in series.values():
            values.append(None)
    return names, series


def _rates(parts: Sequence[Outcome], when: str) -> dict[int, float]:
    """The share of examples of each label that are predicted as it."""
    labels = torch.cat([part.labels for part in parts])  # type: ignore[misc]
    right = torch.cat([getattr(part, f"predicted_{when}") for part in parts]) == labels
    return {label: float(right[labels == label].double().mean()) for label in labels.unique().tolist()}


def _draw_means(axes: Axes, record: EditRecord) -> None:
    """Draws the mean losses before and after the edit, and as predicted."""
    losses = record.losses
    series: dict[str, tuple[list[float | None], str]] = {
        "before": ([change.before for change in losses.values()], NEUTRAL),
        "after": ([change.after for change in losses.values()], RAISES),
    }
    predicted = [None if math.isnan(change.predicted) else change.predicted for change in losses.values()]
    if any(value is not None for value in predicted) and record.step_sizes != [0.0]:
        series["predicted by theory"] = (predicted, "#e0b050")
    draw_groups(axes, [_PARTS[name] for name in losses], series, lambda value: f"{value:.3g}")
    axes.set_title("Mean loss", fontsize=10)


# --------------------------------------------------------------------------------------------------------------------
# What the forget examples are predicted as
# --------------------------------------------------------------------------------------------------------------------


def has_predictions(record: EditRecord) -> bool:
    """Whether :func:`draw_predictions` can draw something: predicted classes are known."""
    forget = _asked(record)
    return forget is not None and forget.predicted_before is not None and forget.predicted_after is not None


def _asked(record: EditRecord) -> Outcome | None:
    """The outcome of the forget examples, with their new labels if they have any."""
    return record.outcomes.get("relabelled", record.outcomes.get("forget"))


def draw_predictions(record: EditRecord, reference: Tensor | None = None) -> Figure | None:
    """Draws as which classes the forget examples are predicted, before and after the edit, and by a reference.

    Args:
        record: The report.
        reference: The predicted classes ``(m,)`` of a model that was trained without the examples. Without it, the
            reference are the unseen examples of the same labels, if there are any, after the edit.

    Returns:
        The figure; ``None`` if predicted classes are not known.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    forget, unseen = _asked(record), record.outcomes.get("unseen")
    if forget is None or forget.predicted_before is None or forget.predicted_after is None:
        return None
    found = {"before the edit": forget.predicted_before, "after the edit": forget.predicted_after}
    if reference is not None:
        found["a model trained without them"] = reference
    elif unseen is not None and unseen.predicted_after is not None and unseen.labels is not None:
        same = torch.ones_like(unseen.labels) > 0 if forget.labels is None else torch.isin(unseen.labels, forget.labels)
        if bool(same.any()):
            found["unseen examples of the same labels"] = unseen.predicted_after[same]
    size = 1 + max(int(values.max()) for values in found.values())
    shares = {when: (torch.bincount(values, minlength=size).double() / len(values)) for when, values in found.items()}
    order = torch.stack(list(shares.values())).amax(0).argsort(descending=True, stable=True)
    predicted = torch.stack(list(shares.values())).any(0)
    order = order[predicted[order]]
    shown, left_out = sorted(order[:_MOST_CLASSES].tolist()), max(len(order) - _MOST_CLASSES, 0)
    whole = record.goal == "class" and forget.labels is not None
    forgotten = set(forget.labels.tolist()) if whole else set()  # type: ignore[union-attr]
    names = [named(c, record.context.class_names) + (" (forgotten)" if c in forgotten else "") for c in shown]
    names += [f"… {left_out} more"] * bool(left_out)
    colors = dict(zip(shares, (NEUTRAL, RAISES, LOWERS), strict=False))
    series: dict[str, tuple[list[float | None], str]] = {}
    for when, of in shares.items():
        values: list[float | None] = [float(of[label]) for label in shown]
        series[f"{when} ({len(found[when])})"] = (values + [None] * bool(left_out), colors[when])
    drawn = empty_figure(8.0, 0.2 * len(series) * len(names) + 1.8)
    axes = drawn.subplots()
    draw_groups(axes, names, series, percent)
    what = "corrected" if "relabelled" in record.outcomes else "forget"
    axes.set_title(f"Predicted classes of the {what} examples", fontsize=12, fontweight="bold")
    axes.set_xticks([0.0, 0.5, 1.0], ["0 %", "50 %", "100 %"])
    hidden = "" if len(order) == size else " Classes that are never predicted are left out."
    drawn.supxlabel(f"Share of the examples that are predicted as each class.{hidden}", fontsize=8)
    return drawn


# --------------------------------------------------------------------------------------------------------------------
# How the edit was found
# --------------------------------------------------------------------------------------------------------------------


def draw_trials(record: EditRecord) -> Figure:
    """Draws the losses and the memorization of the trials, and the residual of the first solve.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    known = not math.isnan(record.memorization[1])
    drawn, axes = figure(1, 2 + known, width=13.5 if known else 9, height=3.2)
    trials = _drawn_trials(record)
    _draw_losses(axes[0][0], record, trials)
    if known:
        _draw_memorization(axes[0][1], record, trials)
    for axis in axes[0][:-1]:
        _label_trials(axis, record, trials)
    axes[0][0].legend()
    _draw_solve(axes[0][-1], record)
    return drawn


def _drawn_trials(record: EditRecord) -> list[Trial]:
    """The trials to draw.

    If the edit makes one change, these are all trials, by step size. If it makes several changes, these are the trained
    model and the trials after each change.
    """
    if len(record.step_sizes) == 1:
        return sorted(record.trials, key=lambda trial: trial.step_sizes)
    measured = {trial.step_sizes: trial for trial in record.trials}
    ends = [tuple(record.step_sizes[:count]) for count in range(len(record.step_sizes) + 1)]
    return [measured[end] for end in ends if end in measured]


def _draw_losses(axes: Axes, record: EditRecord, trials: list[Trial]) -> None:
    where, end = _positions(record, trials)
    lines = {"forget": [trial.forget_loss for trial in trials], "retain": [trial.retain_loss for trial in trials]}
    for name, losses in lines.items():
        (line,) = axes.plot(where, losses, "o-", markersize=4, label=name)
        axes.plot([end], [record.losses[name].after], "*", markersize=11, color=line.get_color())
    axes.plot([], [], "k*", label="the edit")
    if all(loss > 0 for losses in lines.values() for loss in losses):  # some losses can be zero or negative
        axes.set_yscale("log")
    along = "after each change" if len(record.step_sizes) > 1 else "along the change"
    axes.set_title(f"losses {along}, goal: {record.goal}", fontsize=10)
    axes.set_ylabel("mean loss")


def _draw_memorization(axes: Axes, record: EditRecord, trials: list[Trial]) -> None:
    where, end = _positions(record, trials)
    (line,) = axes.plot(where, [trial.memorization for trial in trials], "o-", markersize=4)
    axes.plot([end], [record.memorization[1]], "*", markersize=11, color=line.get_color())
    axes.set_ylim(-0.05, 1.05)
    axes.set_title(GOALS[record.goal].memorization_title(record.n_unseen), fontsize=10)
    axes.set_ylabel(GOALS[record.goal].memorization_unit())


def _positions(record: EditRecord, trials: list[Trial]) -> tuple[list[float], float]:
    """The positions of the trials and of the edit on the x axis."""
    if len(record.step_sizes) > 1:
        return [float(len(trial.step_sizes)) for trial in trials], float(len(record.step_sizes))
    return [trial.step_size for trial in trials], record.step


def _label_trials(axes: Axes, record: EditRecord, trials: list[Trial]) -> None:
    if len(record.step_sizes) > 1:
        axes.set_xlabel("number of changes")
        axes.set_xticks(range(len(record.step_sizes) + 1))
        return
    axes.axvline(record.step, color="grey", linestyle=":", label=f"step size {record.step:.3g}")
    axes.set_xscale("symlog", linthresh=0.1)
    if trials[0].step_size >= 0:
        axes.set_xlim(left=0.0, right=trials[-1].step_size * 1.5 or None)
    axes.set_xlabel("step size (1 = natural step)")


def _draw_solve(axes: Axes, record: EditRecord) -> None:
    axes.semilogy(record.residuals)
    if record.settings["rtol"] is not None:
        rtol = record.solve["rtol"]
        axes.axhline(rtol, color="grey", linestyle=":", label=f"rtol {rtol:g}")
        axes.legend()
    axes.set_title(f"first solve: {solve_text(record, residual=False)}", fontsize=10)
    axes.set_xlabel("iteration")
    axes.set_ylabel("relative residual")


def solve_text(record: EditRecord, *, residual: bool = True) -> str:
    """How the first solve went, in one phrase."""
    solve = record.solve
    return describe_solve(
        solve["solver"],
        None if record.settings["rtol"] is None else solve["status"],
        solve["iterations"],
        solve["residual"] if residual else None,
    )
