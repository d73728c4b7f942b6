"""How the report of an edit is printed and logged."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from ..reporting.loggers import log_eigenvalues, log_figure, log_scalars, log_table, log_text, running
from ..reporting.notes import describe_share
from .goals import GOALS
from .picture import draw_summary, solve_text
from .record import Change, EditRecord

__all__ = ["log", "text"]


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
        f" {'first solve: ' if len(record.solves) > 1 else ''}{solve_text(record)}; {record.seconds:.1f} s"
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
    log_figure(loggers, f"{prefix}/plot", lambda: draw_summary(record), step=step)
