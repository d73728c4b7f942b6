"""The record of an edit: its changes, its goal, and the measurements."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import Self

from ..data.examples import Examples
from ..distributed import ProcessGroup
from ..edit import Edit
from ..errors import EditError
from ..objective.objective import Objective
from ..parameters import Weights
from ..reporting.context import CallContext
from ..reporting.previews import Shown
from ..storage.artifact import Format
from ..storage.digests import digest
from ..storage.schema import restored, restored_fields
from .events import FIRST_DRY_RUN, FIRST_EDIT, EventList, Happened
from .goals import GOALS
from .outcomes import Outcome
from .protocol import Trial

__all__ = ["FORMAT", "Change", "EditContext", "EditRecord"]


FORMAT = Format(
    "lightning-gif edit",
    versions=(3, 4),
    what="an edit file",
    remedy="If it is an edit file, copy it again from where it was saved.",
    error=EditError,
)

_PARTS = ("indices", "old", "new")

_DRY_RUN = "dry_run"  # the setting that marks a report as one of an edit that was never applied

# Fields that a file stores in another form, or does not store.
_OWN_FORM = ("edit", "trials", "outcomes", "context", "version")

# The names that version 3 of the format used for fields of a report and of its trials.
_NAMES_OF_3 = {"step_sizes": "steps", "memorization": "remembered", "trials": "path"}


class Change(NamedTuple):
    """A mean loss before and after the edit, and the prediction of the first solve.

    Attributes:
        before: The loss at the weights before the edit.
        after: The loss at the weights after the edit.
        predicted: With ``step="match"`` the loss for predictions that are linear in the parameters, after the first
            change. Otherwise ``before`` plus the predicted effect of the influence direction: to first order for the
            forget examples, to second order for the retained ones. It is accurate for small step sizes only. NaN if the
            edit makes other changes, too, or if nothing is predicted.
    """

    before: float
    after: float
    predicted: float


def _unknown() -> tuple[None, None]:
    return None, None


@dataclass
class EditContext(CallContext):
    """The trainer, the model and the audit log of an edit. A report loaded from a file has only ``global_step``.

    Attributes:
        module: The model that :meth:`UnlearnReport.undo` and :meth:`UnlearnReport.apply` act on by default.
        record: The audit log to which both methods add an entry, see :mod:`lightning_gif.storage.audit_log`.
        has_optimizer: Whether the trainer has an optimizer. An edit does not change its state.
        shown: Labels and pictures or texts of some forget examples. They are never saved, since the examples are to be
            forgotten.
        reopen: Opens the objective and the training data of the call again, to evaluate the model for a picture.
        logs: Whether each event is logged to the loggers.
        events: The events of all edits of the callback.
        happened: The last event of this edit.
        forgotten: The rows of the logged table of forget examples; empty if there were no loggers.
        moment: Returns the numbers of the trainer's epochs and optimizer steps as they are now, ``None`` if not known.
    """

    module: nn.Module | None = None
    record: str | os.PathLike[str] | None = None
    has_optimizer: bool = False
    shown: list[Shown] = field(default_factory=list)
    reopen: Callable[[], AbstractContextManager[tuple[Objective, Examples]]] | None = None
    logs: bool = False
    events: EventList = field(default_factory=EventList)
    happened: Happened = FIRST_EDIT
    forgotten: list[list[Any]] = field(default_factory=list)
    moment: Callable[[], tuple[int | None, int | None]] = _unknown

    def model(self, given: Weights | None) -> Weights:
        """The given model, or the default one.

        Raises:
            EditError: If there is none.
        """
        model = self.module if given is None else given
        if model is None:
            raise EditError("The report was loaded from a file; pass the model: undo(model) or apply(model).")
        return model

    def processes_of(self, weights: Weights) -> ProcessGroup:
        """The processes that hold copies or parts of the weights.

        Also for a report that each of them has loaded from a file.
        """
        if self.processes.size > 1 or not isinstance(weights, nn.Module):
            return self.processes
        return ProcessGroup.of_weights(weights)


@dataclass(frozen=True, eq=False)
class EditRecord:
    """An edit, its goal, and the measurements. Its fields are read-only.

    Raises:
        EditError: If the goal is not registered.

    Attributes:
        edit: The changed entries, and their values before and after.
        goal: The name of the goal: ``"class"``, ``"examples"`` or ``"labels"``; see
            :class:`~lightning_gif.unlearning.goals.Goal`.
        step_sizes: The step size of each change; 1 is the natural step. The first change is the influence direction
            or a descent direction; all later ones are descent directions. Each is solved at the weights after the
            earlier ones.
        forget: The mean loss of (a sample of) the forget examples, with their labels in training.
        retain: The mean loss of (a sample of) the retained training data.
        relabelled: The mean loss of the examples with their new labels; ``None`` for a removal.
        unseen: The mean loss of the unseen examples that the forget examples were compared with; ``None`` if there was
            no comparison.
        memorization: How much of the forget data is remembered, before and after the edit; see
            :attr:`~lightning_gif.unlearning.protocol.Trial.memorization`.
        n_forget: The number of forget examples.
        n_found: The number of training examples that match the forget examples, by dataset index or by content.
        n_retain: The number of retained training examples.
        n_unseen: The number of unseen examples that the forget examples were compared with.
        n_parameters: The number of trainable parameters of the model.
        gradient_share: The share of the squared norm of the gradient of the forget examples that the target parameters
            hold; 1 if they are all parameters. For label correction it is the gradient of the difference between the
            losses with the old and the new labels. ``None`` in files of earlier versions.
        verdict: Whether the edit worked, in one line: by which measure, and how certain that is. Empty in files of
            earlier versions, and if the goal has no measure of it.
        outcomes: The losses and predicted classes of single examples before and after the edit, by the name of the
            examples as in :attr:`losses`. Empty in files of earlier versions.
        trials: All trials, in order. The first one is the trained model.
        solves: The diagnostics of the solve of each change, see :meth:`~lightning_gif.solvers.Solution.summary`, with
            the ``curvature`` and the ``max_iter`` that it used (files of earlier versions do not have these). If a
            method needs several solves for one change, they are of the solve with the largest residual.
        residuals: The relative residual of the first solve after each number of iterations.
        curvature: How the products with the curvature were computed, and its extreme eigenvalues if ``eigenvalues`` was
            set.
        settings: The method, the solver and their parameters as the call gave them, and all tuned numbers. ``solves``
            has what ``"auto"`` and ``None`` meant in each solve.
        notes: Warnings for the user, for example that forget examples are not in the training data, that a target was
            missed, or that the optimizer's state is stale.
        seconds: The wall time of the whole call in seconds.
        data: Identifies the data of the edit. ``indices`` has the dataset indices of the forget examples. If the
            training loader draws from a ``Subset``, these are positions in it, and ``innermost_indices`` has the
            indices in the dataset below it, else ``None``. ``examples`` is the SHA-256 of the contents of the forget
            examples, and ``relabelled`` the SHA-256 of their contents with the new labels (``None`` for a removal).
            ``train`` is the SHA-256 of the training data, see :func:`~lightning_gif.data.identity.data_digest`.
        context: The trainer, the model, the audit log, and the names of the classes. Only ``global_step`` and
            ``class_names`` are saved.
        version: The version of the file format that :meth:`to_record` uses. A loaded report keeps the version of its
            file, so that its digest still matches the audit log.
    """

    edit: Edit = field(repr=False)
    goal: str
    step_sizes: list[float]
    forget: Change
    retain: Change
    relabelled: Change | None
    unseen: Change | None
    memorization: tuple[float, float]
    n_forget: int
    n_found: int
    n_retain: int
    n_unseen: int
    n_parameters: int
    trials: list[Trial] = field(repr=False)
    solves: list[dict[str, Any]] = field(repr=False)
    residuals: list[float] = field(repr=False)
    curvature: dict[str, Any] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    notes: list[str]
    seconds: float
    data: dict[str, Any] = field(default_factory=dict, repr=False)
    gradient_share: float | None = None
    verdict: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict, repr=False)
    context: EditContext = field(default_factory=EditContext, repr=False)
    version: int = field(default=FORMAT.versions[-1], repr=False)

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise EditError(
                f"The edit has the goal {self.goal!r}, which is not registered here. Import the module that registers"
                f" it, as GOALS.register({self.goal!r}) of lightning_gif.unlearning does, and load the edit again."
            )
        object.__setattr__(self, "goal", GOALS[self.goal].name)

    @property
    def name(self) -> str | None:
        """The name that the call gave to the edit, see :meth:`~lightning_gif.GIFCallback.unlearn`."""
        return self.settings.get("name")

    @property
    def is_dry_run(self) -> bool:
        """Whether the call was a dry run, and the edit has not been applied since."""
        return bool(self.settings.get(_DRY_RUN))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A block that applies the edit, after which it is no dry run. If the block fails, it stays one."""
        mark = self.settings.pop(_DRY_RUN, None)
        try:
            yield
        except BaseException:
            self.settings.update({} if mark is None else {_DRY_RUN: mark})
            raise

    @property
    def step(self) -> float:
        """The step size of the first change."""
        return self.step_sizes[0]

    @property
    def solve(self) -> dict[str, Any]:
        """The diagnostics of the first solve."""
        return self.solves[0]

    @property
    def losses(self) -> dict[str, Change]:
        """The mean losses by the name of their examples; only those that exist for the goal."""
        named = {"forget": self.forget, "retain": self.retain, "relabelled": self.relabelled, "unseen": self.unseen}
        return {name: change for name, change in named.items() if change is not None}

    def digests(self) -> dict[str, str]:
        """The SHA-256 digests of the edit and the report.

        ``before`` and ``after`` are of the edited tensors before and after the edit, ``values`` is of the changed
        values, and ``report`` is of everything that :meth:`UnlearnReport.save` writes, except for the mark of a dry
        run: so a dry run has the same digests as the edit when it is applied.
        """
        record, tensors = self.to_record()
        record["settings"] = {name: value for name, value in self.settings.items() if name != _DRY_RUN}
        return {
            "before": self.edit.digest_before,
            "after": self.edit.digest_after,
            "values": self.edit.digest,
            "report": digest(tensors, record),
        }

    def summary(self) -> dict[str, Any]:
        """The report in plain numbers and strings."""
        return {
            "goal": str(self.goal),
            "step": self.step,
            "further_steps": sum(map(bool, self.step_sizes[1:])),
            "remembered_before": self.memorization[0],
            "remembered_after": self.memorization[1],
            "n_forget": self.n_forget,
            "n_found": self.n_found,
            "n_retain": self.n_retain,
            "n_changed": self.edit.count,
            "share_changed": self.edit.count / self.n_parameters,
            **({} if self.gradient_share is None else {"gradient_share": self.gradient_share}),
            "seconds": self.seconds,
            **{
                f"{name}_loss_{when}": value
                for name, change in self.losses.items()
                for when, value in change._asdict().items()
            },
            **{f"curvature_{name}": value for name, value in self.curvature.items() if not isinstance(value, list)},
            **{f"solve_{name}": value for name, value in self.solve.items()},
            "solves": len(self.solves),
            "hvps": sum(solve["hvps"] for solve in self.solves),
        }

    def to_record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The contents of an edit file: plain values that JSON can hold, and the tensors of the edit by name."""
        tensors = {f"{part}/{name}": value for part in _PARTS for name, value in getattr(self.edit, part).items()}
        for part, outcome in self.outcomes.items():
            tensors |= {f"outcomes/{part}/{name}": value for name, value in outcome.tensors().items()}
        record: dict[str, Any] = {}
        for name in (entry.name for entry in fields(self)):
            if name == "trials":
                record[name] = [asdict(trial) for trial in self.trials]
            elif name not in _OWN_FORM:
                record[name] = getattr(self, name)
        # What an earlier version did not write is left out, because the digest of its files must stay the same.
        if self.gradient_share is None:
            del record["gradient_share"]
        if not self.verdict:
            del record["verdict"]
        if self.context.class_names is not None:
            record["class_names"] = list(self.context.class_names)
        record["global_step"] = self.context.global_step
        record["edit"] = {e.name: getattr(self.edit, e.name) for e in fields(self.edit) if e.name not in _PARTS}
        return (_renamed(record, _NAMES_OF_3) if self.version == 3 else record), tensors

    @classmethod
    def from_record(cls, version: int, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Restores a report from the untrusted result of :meth:`to_record`.

        Args:
            version: The version of the file format.
            record: Plain values.
            tensors: The tensors of the edit.

        Raises:
            EditError: If the parts of the edit do not belong together.
            LookupError, TypeError, ValueError: If values are missing, or have another type or range.
        """
        if version == 3:
            record = _renamed(record, {old: new for new, old in _NAMES_OF_3.items()})
        values = dict(record)
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*_PARTS, "outcomes")}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor
        stored = restored(dict[str, Any], values.pop("edit"), "edit")
        indices, old, new, measured = parts.values()
        edit = Edit(indices=indices, old=old, new=new, **restored_fields(Edit, stored, without=_PARTS))
        edit.check_complete()
        trials = [
            _trial(stored, i) for i, stored in enumerate(restored(list[dict[str, Any]], values.pop("trials"), "trials"))
        ]
        context = EditContext(
            global_step=restored(int, values.pop("global_step"), "global_step"),
            class_names=restored(list[str] | None, values.pop("class_names", None), "class_names"),
        )
        values = {"gradient_share": None, "verdict": "", **values}
        plain = restored_fields(EditRecord, values, without=_OWN_FORM)
        outcomes = _outcomes(measured)
        report = cls(edit=edit, trials=trials, outcomes=outcomes, context=context, version=version, **plain)
        if not report.step_sizes or not report.solves or not report.trials or report.n_parameters < edit.count:
            raise ValueError("the report has no step sizes, solves or trials, or more changed entries than parameters")
        context.happened = FIRST_DRY_RUN if report.is_dry_run else FIRST_EDIT
        return report


def _outcomes(tensors: Mapping[str, Tensor]) -> dict[str, Outcome]:
    """The outcomes from tensors by the name of the examples and of the tensor, such as ``"forget/before"``."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        grouped.setdefault(part, {})[name] = tensor
    return {part: Outcome.of(named) for part, named in grouped.items()}


def _trial(stored: dict[str, Any], position: int) -> Trial:
    if stored.keys() != {entry.name for entry in fields(Trial)}:
        raise TypeError(
            f"trials[{position}] must have the fields {', '.join(entry.name for entry in fields(Trial))}; got"
            f" {', '.join(stored)!r:.200}"
        )
    return Trial(**restored_fields(Trial, stored))


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A record whose fields, and those of its trials, are renamed; their order stays the same."""
    trials = {"trials", "path"}
    return {
        names.get(name, name): [{names.get(n, n): v for n, v in trial.items()} for trial in entry]
        if name in trials
        else entry
        for name, entry in value.items()
    }
