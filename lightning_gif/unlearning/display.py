"""How the report of an edit is printed, drawn and logged."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..reporting.loggers import log_eigenvalues, log_figure, log_scalars, log_table, log_text, running
from ..reporting.notes import describe_share, describe_solve
from ..reporting.previews import figure
from .goals import GOALS
from .protocol import Trial
from .record import Change, EditRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "log", "text"]


# Above this step size the quadratic model does not predict the loss, so its prediction is not printed.
_PREDICTABLE = 4.0

_MEASURED = ("forget_loss", "retain_loss", "risk", "memorization")

# The logged names of these columns. They stay the same in all versions, so that old and new runs can be compared.
_LOGGED = ("forget_loss", "retain_loss", "risk", "remembered")


def text(record: EditRecord) -> str:
    """The report as text, one line for each fact."""
    lines = [
        _headline(record),
        *([record.verdict] if record.verdict else []),
        *(_loss_line(record, name, change) for name, change in record.losses.items()),
        *_memorization_line(record),
    ]
    if record.edit.buffers:
        lines.append(f"running statistics recomputed: {len(record.edit.buffers)} buffers")
    if "losses" in record.settings:
        lines.append(f"losses by {record.settings['losses']}")
    lines += [f"note: {note}" for note in record.notes]
    context = record.context
    if context.record is not None:
        lines.append(f"Applying and undoing the edit is recorded in {os.fspath(context.record)}.")
    if context.module is not None and record.edit.digest_before != record.edit.digest_after:
        state = {
            True: "The edit is in the weights.",
            False: "The edit is not in the weights: apply() applies it.",
            None: "The weights have changed since the edit was computed.",
        }
        lines.append(state[record.edit.is_in(context.module)])
    return "\n".join(lines)


def _headline(record: EditRecord) -> str:
    share = 100 * record.edit.count / record.n_parameters
    held = describe_share(record.gradient_share)
    changed = f"{record.edit.count} of {record.n_parameters} parameters ({share:.1f} %{', ' * bool(held)}{held})"
    several = len(record.step_sizes) > 1
    how = f"in {len(record.step_sizes)} changes" if several else f"with step size {record.step:.3g}"
    return (
        f"Edit for {record.n_forget} example{'' if record.n_forget == 1 else 's'} (goal: {record.goal};"
        f" {record.n_retain} retained) by changing {changed if any(record.step_sizes) else 'nothing'} {how};"
        f" {'first solve: ' if len(record.solves) > 1 else ''}{_solve(record)}; {record.seconds:.1f} s"
    )


def _solve(record: EditRecord, *, residual: bool = True) -> str:
    solve = record.solve
    return describe_solve(
        solve["solver"],
        None if record.settings["rtol"] is None else solve["status"],
        solve["iterations"],
        solve["residual"] if residual else None,
    )


def _loss_line(record: EditRecord, name: str, change: Change) -> str:
    labels = " (with the old labels)" if name == "forget" and record.relabelled else ""
    predicted = ""
    if abs(record.step) <= _PREDICTABLE and not math.isnan(change.predicted):
        predicted = f" (predicted {change.predicted:.4g})"
    return f"{name} loss{labels}: {change.before:.4g} -> {change.after:.4g}{predicted}"


def _memorization_line(record: EditRecord) -> list[str]:
    if math.isnan(record.memorization[1]):
        return []
    return [GOALS[record.goal].memorization_text(*record.memorization, record.n_unseen)]


def log(record: EditRecord, loggers: Iterable[Any], prefix: str) -> None:
    """Logs the report, see :meth:`UnlearnReport.log`."""
    loggers, step = running(loggers), record.context.global_step
    log_scalars(loggers, record.summary(), prefix=prefix, step=step)
    count = len(record.solves)
    rows = [
        [*trial.step_sizes, *[0.0] * (count - len(trial.step_sizes)), *(getattr(trial, name) for name in _MEASURED)]
        for trial in record.trials
    ]
    log_table(loggers, f"{prefix}/path", [*(f"step_{i}" for i in range(1, count + 1)), *_LOGGED], rows)
    log_table(loggers, f"{prefix}/solve", ["iteration", "residual"], list(enumerate(record.residuals)))
    log_eigenvalues(loggers, prefix, record.curvature)
    log_text(loggers, f"{prefix}/report", text(record), step=step)
    log_figure(loggers, f"{prefix}/plot", lambda: draw(record), step=step)


def draw(record: EditRecord) -> Figure:
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
    axes.set_title(f"first solve: {_solve(record, residual=False)}", fontsize=10)
    axes.set_xlabel("iteration")
    axes.set_ylabel("relative residual")
