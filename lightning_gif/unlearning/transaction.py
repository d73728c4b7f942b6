"""Applying and undoing an edit in the weights of all processes and in the audit log, or in none of them."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping
from typing import Any

from ..distributed import ProcessGroup
from ..errors import RecordError
from ..parameters import Weights, weights_digest
from ..storage.audit_log import Event, append
from ..storage.interrupts import uninterrupted
from .record import EditRecord

__all__ = ["change", "log_metrics", "write_entry"]


def change(
    record: EditRecord,
    event: Event,
    weights: Weights,
    audit_log: str | os.PathLike[str] | None,
    processes: ProcessGroup,
) -> None:
    """Applies or undoes an edit, and adds an entry to the audit log. If either fails on any process, neither is done.

    Args:
        record: The record of the edit.
        event: ``"undo"`` undoes the edit, ``"dry_run"`` changes nothing, any other event applies it.
        weights: The weights to change.
        audit_log: The audit log, which the first process writes; ``None`` to add no entry.
        processes: The processes that hold copies or parts of the weights. If one of them fails, all restore theirs.

    Raises:
        EditError: If the weights differ from those before the edit or, for ``"undo"``, from those after it.
        RecordError: If the entry cannot be written.
    """
    if event == "dry_run":
        if audit_log is not None:
            _write_without_change(record, event, weights, audit_log, processes)
        return
    edit = record.edit
    make, revert = (edit.undo, edit.apply) if event == "undo" else (edit.apply, edit.undo)
    log = audit_log if processes.rank == 0 else None
    before, after = "" if audit_log is None else weights_digest(weights), ""
    changed = logged = False
    try:
        with processes.propagate_errors():
            with uninterrupted():
                make(weights)
                changed = True
            if audit_log is not None:  # on all processes, because the weights may be sharded
                after = weights_digest(weights)
            if log is not None:
                write_entry(record, event, log, before, after)
                logged = True
    except BaseException:
        if changed:
            revert(weights)
        if logged and log is not None:  # another process failed after this one had written the entry
            write_entry(record, "apply" if event == "undo" else "undo", log, after, before)
        raise


def log_metrics(
    record: EditRecord,
    metrics: Mapping[str, float],
    weights: Weights,
    audit_log: str | os.PathLike[str] | None,
    processes: ProcessGroup,
) -> None:
    """Adds measurements of the current model to the audit log. See :meth:`UnlearnReport.record_metrics`.

    Args:
        record: The record of the edit.
        metrics: Numbers by name.
        weights: The weights that were measured.
        audit_log: The audit log, which the first process writes.
        processes: The processes that hold copies or parts of the weights.

    Raises:
        RecordError: If there is no audit log, a value is not a number, or the entry cannot be written.
    """
    if audit_log is None:
        raise RecordError(
            "The report has no audit log. Pass one, such as record='deletions.jsonl', to this call or to unlearn."
        )
    if not isinstance(metrics, Mapping) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise RecordError(f"Metrics must be numbers by name, such as {{'test/accuracy': 0.98}}, got {metrics!r}.")
    values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
    bad = [name for name, value in values.items() if not isinstance(value, numbers.Real)]
    if bad:
        raise RecordError(f"Metrics must be numbers by name; {bad[0]!r} is {metrics[bad[0]]!r}.")
    _write_without_change(record, "metrics", weights, audit_log, processes, values)


def _write_without_change(
    record: EditRecord,
    event: Event,
    weights: Weights,
    audit_log: str | os.PathLike[str],
    processes: ProcessGroup,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Adds an entry about weights that stay as they are."""
    here = weights_digest(weights)
    with processes.propagate_errors():
        if processes.rank == 0:
            write_entry(record, event, audit_log, here, here, metrics)


def write_entry(
    record: EditRecord,
    event: Event,
    audit_log: str | os.PathLike[str],
    before: str,
    after: str,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Adds an entry about an edit to an audit log, and does nothing else.

    Args:
        record: The record of the edit.
        event: The event.
        audit_log: The audit log.
        before: The :func:`~lightning_gif.parameters.weights_digest` before the event.
        after: The :func:`~lightning_gif.parameters.weights_digest` after the event.
        metrics: Measurements: numbers by name.

    Raises:
        RecordError: If the audit log is damaged, or cannot be written. It is then unchanged.
    """
    data = record.data
    entry = {
        "asked": {
            "goal": str(record.goal),
            "n_forget": record.n_forget,
            **{name: data.get(name) for name in ("indices", "innermost_indices", "examples", "relabelled")},
        },
        "train": {"n_retain": record.n_retain, "digest": data.get("train")},
        "weights": {"before": before, "after": after},
        "edit": record.digests(),
        "settings": record.settings,
        "numbers": record.summary(),
        "solves": record.solves,
        "notes": record.notes,
        "metrics": metrics or {},
    }
    append(audit_log, event, entry)
