"""What the report of an edit gives to loggers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor, nn

from ..data.examples import Examples
from ..data.streams import Stream
from ..objective.labels import predicted_labels
from ..objective.objective import Objective
from ..parameters import Weights, weights_digest
from ..reporting.contents import Contents, Files, Lineage, Table
from ..sharding import has_shards
from .display import text
from .events import Happened
from .goals import GOALS
from .picture import draw_summary
from .record import EditRecord

__all__ = ["Forgotten", "contents", "event_row", "prefix_of"]


EVENT_COLUMNS = (
    *("event", "kind", "name", "goal", "epoch", "global_step", "n_forget"),
    *("forget_loss_before", "forget_loss_after", "retain_loss_before", "retain_loss_after"),
    *("memorization_before", "memorization_after", "edits_in_weights"),
)

FORGOTTEN_COLUMNS = ("index", "innermost_index", "target", "predicted_before", "predicted_after")

# The largest number of forgotten examples that a table lists. The file of the edit has all indices.
_LISTED = 256

_MEASURED = ("forget_loss", "retain_loss", "risk", "memorization")

_WORDS = {"dry_run": "a dry run of", "unlearn": "", "apply": "applying", "undo": "undoing"}


def prefix_of(record: EditRecord) -> str:
    """The start of the keys of a report. A dry run says nothing about the weights, so it has keys of its own."""
    return "gif_dry_run" if record.context.happened.is_dry_run else "gif_unlearn"


def contents(record: EditRecord, section: str, save: Callable[[Path], None], weights: Weights | None) -> Contents:
    """The contents of a report for loggers, after its last event.

    Args:
        record: The report.
        section: The start of the keys.
        save: Writes the edit to a file.
        weights: The model as it is; ``None`` if it is not known.
    """
    happened, context = record.context.happened, record.context
    everything = Contents(
        section,
        context.global_step if happened.global_step is None else happened.global_step,
        axis="event",
        points=_points(record, happened),
        state={"state": _state(record, happened)},
        text=text(record),
        tables={"events": Table(EVENT_COLUMNS, list(context.events.rows))} if context.events.rows else {},
    )
    if happened.event == "undo":  # all else is as it was logged with the edit
        return everything
    return replace(
        everything,
        settings=record.settings,
        diagnostics={
            **_diagnostics(record),
            **{f"residual_after_{i}": value for i, value in enumerate(record.residuals)},
        },
        draw=lambda: draw_summary(record, examples=False),  # a log would keep their pictures
        tables={**everything.tables, "trials": _trials(record), "forgotten": _forgotten(record)},
        files=Files(
            "edit",
            "edit.safetensors",
            sum(
                part.nbytes
                for parts in (record.edit.indices, record.edit.old, record.edit.new)
                for part in parts.values()
            ),
            save,
            {"name": record.name, "goal": str(record.goal), "event": happened.event, **record.digests()},
            None if not _is_known(weights) or happened.is_dry_run else lambda: _lineage(record, weights),
        ),
        alert=None if happened.is_dry_run else _alert(record),
    )


def _points(record: EditRecord, happened: Happened) -> list[dict[str, float]]:
    """The measurements of the weights after an event, after those before it for an edit."""
    forgets = happened.event != "undo"
    before = _measured(record, after=False)
    now = _measured(record, after=forgets)
    change = 0 if happened.is_dry_run else 1
    points = [{**now, "event": happened.number, "edits_in_weights": happened.in_weights}]
    if forgets:
        points.insert(
            0, {**before, "event": happened.number - 1, "edits_in_weights": max(0, happened.in_weights - change)}
        )
    return points


def _measured(record: EditRecord, *, after: bool) -> dict[str, float]:
    """The mean losses, and the memorization under the name of its goal, because each goal measures something else."""
    values = {f"{name}_loss": change.after if after else change.before for name, change in record.losses.items()}
    memorization = record.memorization[after]
    return values if math.isnan(memorization) else {**values, f"memorization_{record.goal}": memorization}


def _state(record: EditRecord, happened: Happened) -> str:
    """One line on the weights after an event."""
    name = f" {record.name!r}" if record.name else ""
    what = f"{_WORDS[happened.event]} the edit{name} for {record.n_forget} examples (goal: {record.goal})".strip()
    count = happened.in_weights
    return f"after {what}: {count} edit{'' if count == 1 else 's'} in the weights"


def event_row(record: EditRecord, happened: Happened) -> list[Any]:
    """The row of an event in the table of events. For an undone edit, "before" is with the edit."""
    order = (1, 0) if happened.event == "undo" else (0, 1)
    measured = [record.forget[:2], record.retain[:2], record.memorization]
    numbers = [pair[position] for pair in measured for position in order]
    return [
        *(happened.number, happened.event, record.name, str(record.goal), happened.epoch, happened.global_step),
        *(record.n_forget, *[None if math.isnan(number) else number for number in numbers], happened.in_weights),
    ]


def _diagnostics(record: EditRecord) -> dict[str, Any]:
    drawn = {f"{name}_loss_{when}" for name in record.losses for when in ("before", "after")}
    values = {name: value for name, value in record.summary().items() if name not in drawn}
    return {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}


def _trials(record: EditRecord) -> Table:
    """The trials in order, with the step size of each change."""
    count = len(record.solves)
    rows = [
        [*trial.step_sizes, *[0.0] * (count - len(trial.step_sizes)), *(getattr(trial, name) for name in _MEASURED)]
        for trial in record.trials
    ]
    plain = [[None if math.isnan(value) else value for value in row] for row in rows]
    return Table([*(f"step_{i}" for i in range(1, count + 1)), *_MEASURED], plain)


def _forgotten(record: EditRecord) -> Table:
    """The first forget examples, without their contents, which should not live on in a log."""
    rows = record.context.forgotten
    if not rows:
        below = record.data.get("innermost_indices") or [None] * record.n_found
        pairs = list(zip(record.data.get("indices", []), below, strict=False))[:_LISTED]
        rows = [[index, inner, None, None, None] for index, inner in pairs]
    return Table(FORGOTTEN_COLUMNS, rows)


def _alert(record: EditRecord) -> tuple[str, str] | None:
    """A message if the retained loss rose by more than ``notable_increase`` of the edit's goal."""
    before, after, _ = record.retain
    numbers = record.settings.get("tuning", {}).get("goal", {})
    if after - before <= numbers.get("notable_increase", GOALS[record.goal].notable_increase) * abs(before):
        return None
    name = f" {record.name!r}" if record.name else ""
    return (
        "The retained loss rose",
        f"The edit{name} for {record.n_forget} examples (goal: {record.goal}) raised the mean loss of the retained"
        f" training examples from {before:.4g} to {after:.4g}. Measure the model, and call undo() on the report if it"
        " is not worth the cost.",
    )


def _is_known(weights: Weights | None) -> TypeGuard[Weights]:
    """Whether this process knows the weights: it logs alone, and of sharded weights it holds a part only."""
    return weights is not None and not (isinstance(weights, nn.Module) and has_shards(weights))


def _lineage(record: EditRecord, weights: Weights) -> Lineage:
    """The digests of all weights without and with the edit, whichever of the two the model has."""
    here, inside = weights_digest(weights), record.edit.is_in(weights)
    if inside is None:
        return Lineage(here, here)
    state = copy.deepcopy(dict(weights.state_dict() if isinstance(weights, nn.Module) else weights))
    (record.edit.undo if inside else record.edit.apply)(state)
    other = weights_digest(state)
    return Lineage(other, here) if inside else Lineage(here, other)


# --------------------------------------------------------------------------------------------------------------------
# The forgotten examples
# --------------------------------------------------------------------------------------------------------------------


class Forgotten:
    """The first forget examples, and what the model predicts for them before and after the edit.

    Args:
        objective: The open objective.
        train: The training examples.
        found: The positions of the forget examples among them.
    """

    def __init__(self, objective: Objective, train: Examples, found: Tensor) -> None:
        # To read a few examples of a stream takes a whole pass.
        is_read = len(found) and not isinstance(train.dataset, Stream)
        self._objective, self._examples = objective, train.subset(found[:_LISTED]) if is_read else None
        self._before = self._predicted(objective.theta)

    def rows(self, data: Mapping[str, Any], theta: Tensor) -> list[list[Any]]:
        """The rows of the table.

        Args:
            data: See :attr:`~lightning_gif.unlearning.record.EditRecord.data`.
            theta: The edited weights ``(p,)``.
        """
        if self._examples is None:
            return []
        count, labels = len(self._examples), self._examples.classes
        unknown = [None] * count
        columns = (
            data["indices"][:count],
            (data["innermost_indices"] or unknown)[:count],
            unknown if labels is None else labels.tolist(),
            self._before or unknown,
            self._predicted(theta) or unknown,
        )
        return [list(row) for row in zip(*columns, strict=True)]

    def _predicted(self, theta: Tensor) -> list[Any]:
        found = None if self._examples is None else predicted_labels(self._objective, self._examples, theta)
        return [] if found is None else found.tolist()
