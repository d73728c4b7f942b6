"""How the report of an edit is printed."""

from __future__ import annotations

import math
import os

from ..reporting.notes import describe_share
from ..sharding import has_shards
from .goals import GOALS
from .picture import solve_text
from .record import Change, EditRecord

__all__ = ["text"]


# Above this step size the quadratic model does not predict the loss, so its prediction is not printed.
_PREDICTABLE = 4.0


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
        lines.append(f"losses of single examples: {record.settings['losses']}")
    lines += [f"note: {note}" for note in record.notes]
    context = record.context
    if context.record is not None:
        lines.append(f"Applying and undoing the edit is recorded in {os.fspath(context.record)}.")
    # One process may print a report, but it cannot compare weights of which it holds a part only.
    module = None if context.module is None or has_shards(context.module) else context.module
    if module is not None and record.edit.digest_before != record.edit.digest_after:
        state = {
            True: "The edit is in the weights.",
            False: "The edit is not in the weights: apply() applies it.",
            None: "The weights have changed since the edit was computed.",
        }
        lines.append(state[record.edit.is_in(module)])
    return "\n".join(lines)


def _headline(record: EditRecord) -> str:
    share = 100 * record.edit.count / record.n_parameters
    held = describe_share(record.gradient_share)
    changed = f"{record.edit.count} of {record.n_parameters} parameters ({share:.1f} %{', ' * bool(held)}{held})"
    if record.edit.count == record.n_parameters:
        changed = f"all {record.n_parameters} parameters"
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
