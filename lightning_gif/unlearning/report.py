"""What ``trainer.unlearn`` gives back: an edit, what it was for, and what it did."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..edit import Edit
from ..errors import EditError, RecordError
from ..parameters import Weights, weights_digest
from ..reporting.loggers import log_eigenvalues, log_scalars, log_table, running
from ..reporting.previews import figure
from ..storage.atomic import replace_file
from ..storage.audit_log import Event, append
from ..storage.digests import digest
from ..storage.interrupts import uninterrupted
from ..storage.schema import parse, parse_errors_name, restored, restored_fields
from .goals import GOALS
from .protocol import Trial, trial_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Change", "UnlearnReport"]


_FORMAT = "lightning-gif edit 3"

_PARTS = ("indices", "old", "new")

_UNSAVED = ("edit", "module", "loggers", "record", "processes")

# Beyond this multiple of the natural step the local model says nothing about the loss, and is not printed.
_PREDICTABLE = 4.0


class Change(NamedTuple):
    """A mean loss before and after the edit, and what the solve predicted it to become.

    Attributes:
        before: At the weights before.
        after: At the weights after.
        predicted: ``before`` plus what the local model predicts of the one change that answers the removal: first order
            for the forgotten examples, second order for the retained ones. Good for small steps only. NaN where other
            changes were made.
    """

    before: float
    after: float
    predicted: float


@dataclass(eq=False)
class UnlearnReport:
    """A sparse, reversible edit of the weights with the evidence for it.

    Attributes:
        edit: Which entries changed, and their values before and after.
        goal: ``"class"``, ``"examples"`` or ``"labels"``; see :mod:`~lightning_gif.unlearning.goals`.
        steps: The multiple of each solved change that was made; 1 is the natural step. The first change answers the
            removal or relabelling at the trained weights, or lowers the risk that should hold afterwards, as all later
            ones do, each solved at the weights that those before led to.
        forget: Mean loss of (a sample of) the examples to be forgotten, with the labels they were trained with.
        retain: Mean loss of (a sample of) the retained training data.
        relabelled: Mean loss of the examples with their new labels; ``None`` when they were removed.
        unseen: Mean loss of the unseen examples that the forgotten ones were compared with; ``None`` without any.
        remembered: How far the examples are remembered before and after: see
            :class:`~lightning_gif.unlearning.protocol.Trial`.
        n_forget: How many examples were to be forgotten.
        n_found: How many of the training examples are among them, by dataset index or by content.
        n_retain: How many training examples are retained.
        n_unseen: How many unseen examples the forgotten ones were compared with.
        n_parameters: How many trainable parameters the model has.
        path: What was measured on the way, in order.
        solves: Diagnostics of each solve, see :meth:`~lightning_gif.solvers.Solution.summary`; where a method takes
            several for one change, of the one with the largest residual.
        residuals: The first solve's relative residual after each number of steps.
        curvature: How the Hessian products were made, and the ends of the spectrum if ``eigenvalues`` were asked for.
        settings: Method, solver and their parameters.
        notes: What the user should know: data not found, a search that was cut short, stale optimizer state.
        seconds: Wall time of the whole call.
        data: Which data the edit is for: ``indices`` in the training dataset of the examples in question that were
            found there; SHA-256 of their contents as ``examples``, and with their new labels as ``relabelled``
            (``None`` when they were removed); of the training data that was counted on as ``train``, see
            :func:`~lightning_gif.data.identity.data_digest`.
        module: The model that :meth:`undo` and :meth:`apply` act on by default.
        loggers: Where :meth:`log` logs to by default: those of the trainer that was asked.
        global_step: The trainer's optimizer steps when it was asked.
        record: The file that :meth:`apply` and :meth:`undo` add an entry to, see
            :mod:`lightning_gif.storage.audit_log`.
        processes: The processes that hold copies of the model: what one cannot do to its copy, none does. The first one
            writes files.
    """

    edit: Edit = field(repr=False)
    goal: str
    steps: list[float]
    forget: Change
    retain: Change
    relabelled: Change | None
    unseen: Change | None
    remembered: tuple[float, float]
    n_forget: int
    n_found: int
    n_retain: int
    n_unseen: int
    n_parameters: int
    path: list[Trial] = field(repr=False)
    solves: list[dict[str, Any]] = field(repr=False)
    residuals: list[float] = field(repr=False)
    curvature: dict[str, Any] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    notes: list[str]
    seconds: float
    data: dict[str, Any] = field(default_factory=dict, repr=False)
    module: nn.Module | None = field(default=None, repr=False)
    loggers: Sequence[Any] = field(default=(), repr=False)
    global_step: int = field(default=0, repr=False)
    record: str | os.PathLike[str] | None = field(default=None, repr=False)
    processes: ProcessGroup = field(default=SINGLE_PROCESS, repr=False)

    def __post_init__(self) -> None:
        self.goal = GOALS[self.goal].name

    @property
    def step(self) -> float:
        """The multiple of the first change."""
        return self.steps[0]

    @property
    def solve(self) -> dict[str, Any]:
        """Diagnostics of the first solve."""
        return self.solves[0]

    # ----------------------------------------------------------------------------------------------------------------
    # The edit
    # ----------------------------------------------------------------------------------------------------------------

    def apply(self, module: Weights | None = None, *, record: str | os.PathLike[str] | None = None) -> None:
        """Makes the edit: after ``dry_run=True``, after :meth:`undo`, or on another copy of the same weights.

        Args:
            module: The model, or the ``state_dict`` of a checkpoint; by default the model that the edit was made on.
                Where its trainer runs it in several processes, all must call this: the edit is made in all copies, or
                in none.
            record: The file to add an entry to; by default that of the report, if it belongs to one.

        Raises:
            EditError: If the model is another one, or its weights are not those that the edit starts from.
            RecordError: If the entry cannot be written. The weights are then as they were.
        """
        self.change("apply", module, record)

    def undo(self, module: Weights | None = None, *, record: str | os.PathLike[str] | None = None) -> None:
        """Restores the values before the edit, bit by bit.

        Args:
            module: As in :meth:`apply`.
            record: As in :meth:`apply`.

        Raises:
            EditError: If the model is another one, or its weights are not those that the edit left behind.
            RecordError: If the entry cannot be written. The weights are then as they were.
        """
        self.change("undo", module, record)

    def record_metrics(
        self,
        metrics: Mapping[str, float],
        module: Weights | None = None,
        *,
        record: str | os.PathLike[str] | None = None,
    ) -> None:
        """Adds what was measured of the model as it is now to the record.

        Args:
            metrics: Numbers by name.
            module: As in :meth:`apply`.
            record: As in :meth:`apply`.

        Raises:
            RecordError: If there is no record, a value is no number, or the entry cannot be written.
        """
        kept = self.record if record is None else record
        if kept is None:
            raise RecordError("The report belongs to no record: give record='deletions.jsonl', or unlearn with one.")
        if not isinstance(metrics, Mapping) or not metrics or not all(isinstance(name, str) for name in metrics):
            raise RecordError(f"Metrics must be numbers by name, such as {{'test/accuracy': 0.98}}, got {metrics!r}.")
        values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not isinstance(value, numbers.Real)]
        if bad:
            raise RecordError(f"Metrics must be numbers by name; {bad[0]!r} is {metrics[bad[0]]!r}.")
        weights = self._resolve(module)
        here, processes = weights_digest(weights), self._ranks_of(weights)
        with processes.propagate_errors():
            if processes.rank == 0:
                self.write_down("metrics", kept, here, here, values)

    def change(self, event: Event, module: Weights | None = None, record: str | os.PathLike[str] | None = None) -> None:
        """Makes the edit or takes it back, and tells the record if there is one: both, or neither, in all processes."""
        weights = self._resolve(module)
        make, take_back = (self.edit.undo, self.edit.apply) if event == "undo" else (self.edit.apply, self.edit.undo)
        kept, processes = self.record if record is None else record, self._ranks_of(weights)
        kept = kept if processes.rank == 0 else None  # one process writes it
        before, after = "" if kept is None else weights_digest(weights), ""
        made = told = False
        try:
            with processes.propagate_errors():
                with uninterrupted():
                    make(weights)
                    made = True
                if kept is not None:
                    after = weights_digest(weights)
                    self.write_down(event, kept, before, after)
                    told = True
        except BaseException:
            if made:
                take_back(weights)
            if told and kept is not None:  # another process could not make it
                self.write_down("apply" if event == "undo" else "undo", kept, after, before)
            raise

    def write_down(
        self,
        event: Event,
        record: str | os.PathLike[str],
        before: str,
        after: str,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds an entry about the edit to a record, and does nothing else.

        Args:
            event: What happened.
            record: The file.
            before: :func:`~lightning_gif.parameters.weights_digest` before.
            after: The same after.
            metrics: What was measured.
        """
        told = {
            "asked": {
                "goal": str(self.goal),
                "n_forget": self.n_forget,
                **{name: self.data.get(name) for name in ("indices", "examples", "relabelled")},
            },
            "train": {"n_retain": self.n_retain, "digest": self.data.get("train")},
            "weights": {"before": before, "after": after},
            "edit": self.digests(),
            "settings": self.settings,
            "numbers": self.summary(),
            "solves": self.solves,
            "notes": self.notes,
            "metrics": metrics or {},
        }
        append(record, event, told)

    def digests(self) -> dict[str, str]:
        """What the edit and the report are recognised by.

        SHA-256 of the touched tensors ``before`` and ``after`` the edit, of what is changed in them (``values``), and
        of all that :meth:`save` writes (``report``).
        """
        return {
            "before": self.edit.digest_before,
            "after": self.edit.digest_after,
            "values": self.edit.digest,
            "report": digest(*self._contents()),
        }

    def _resolve(self, module: Weights | None) -> Weights:
        found = self.module if module is None else module
        if found is None:
            raise EditError("The report was loaded from a file; say which model: undo(model) or apply(model).")
        return found

    def _ranks_of(self, weights: Weights) -> ProcessGroup:
        """The processes that hold copies of the weights; a report that was loaded knows of none itself."""
        if self.processes.size > 1 or not isinstance(weights, nn.Module):
            return self.processes
        return ProcessGroup.of_module(weights)

    # ----------------------------------------------------------------------------------------------------------------
    # Files
    # ----------------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the edit and the report to a safetensors file; an old file is replaced only by a whole new one.

        Of several processes the first one writes, and the others do not wait for it: ``trainer.strategy.barrier()``
        before they read it.

        Args:
            path: Where to; ``.safetensors`` is a good ending. Folders that are missing are made.
        """
        if self.processes.rank:
            return
        tensors, told = self._contents()
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": _FORMAT, "report": json.dumps(told), "digest": digest(tensors, told)}
        replace_file(target, save(tensors, metadata=metadata))

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file holds: the edit's tensors by name, and all else as JSON can hold it."""
        tensors = {
            f"{part}/{name}": value.contiguous() for part in _PARTS for name, value in getattr(self.edit, part).items()
        }
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _UNSAVED}
        told["path"] = [trial.record() for trial in self.path]
        told["edit"] = {f.name: getattr(self.edit, f.name) for f in fields(self.edit) if f.name not in _PARTS}
        return tensors, told

    @classmethod
    def load(cls, path: str | os.PathLike[str], module: nn.Module | None = None) -> UnlearnReport:
        """Reads what :meth:`save` wrote. Nothing is unpickled, and the model is not changed.

        Args:
            path: The file.
            module: The model that :meth:`undo` and :meth:`apply` will act on.

        Raises:
            EditError: If the file is not an edit, is damaged or was edited, or does not fit ``module``.
            FileNotFoundError: If there is no such file.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise EditError(f"{str(path)!r} is no file, and so no edit file. Give the file of `save`.")
        with parse_errors_name(path, "If it is an edit file, copy it again from where it was saved.", EditError):
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise EditError(f"{str(path)!r} is not an edit file of this package ({_FORMAT!r}).")
                record = parse(metadata["report"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if digest(tensors, record) != metadata["digest"]:
                raise EditError(
                    f"{str(path)!r} is damaged or is an edit file that has been edited: what it holds does not have the"
                    " SHA-256 that it expects. Copy it again from where it was saved."
                )
            report = cls._from_record(record, tensors)
            report.edit.check_complete()
            str(report), report.summary()  # what cannot be told is no report
        if module is not None:
            report.edit.check_fits(module)
            report.module = module
        return report

    @classmethod
    def _from_record(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> UnlearnReport:
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor
        stored = restored(dict[str, Any], record.pop("edit"), "edit")
        indices, old, new = parts.values()
        edit = Edit(indices=indices, old=old, new=new, **restored_fields(Edit, stored, without=_PARTS))
        record["path"] = [trial_fields(trial) for trial in record["path"]]
        report = cls(edit=edit, **restored_fields(cls, record, without=_UNSAVED))
        if not report.steps or not report.solves or not report.path or report.n_parameters < edit.count:
            raise ValueError("the report has no steps, solves or path, or more changes than parameters")
        return report

    # ----------------------------------------------------------------------------------------------------------------
    # Looking at it
    # ----------------------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """The report in plain numbers and strings."""
        changes = {
            "forget": self.forget,
            "retain": self.retain,
            "relabelled": self.relabelled,
            "unseen": self.unseen,
        }
        return {
            "goal": str(self.goal),
            "step": self.step,
            "further_steps": sum(map(bool, self.steps[1:])),
            "remembered_before": self.remembered[0],
            "remembered_after": self.remembered[1],
            "n_forget": self.n_forget,
            "n_found": self.n_found,
            "n_retain": self.n_retain,
            "n_changed": self.edit.count,
            "share_changed": self.edit.count / self.n_parameters,
            "seconds": self.seconds,
            **{
                f"{name}_loss_{when}": value
                for name, change in changes.items()
                if change is not None
                for when, value in change._asdict().items()
            },
            **{f"curvature_{name}": value for name, value in self.curvature.items() if not isinstance(value, list)},
            **{f"solve_{name}": value for name, value in self.solve.items()},
            "solves": len(self.solves),
            "hvps": sum(solve["hvps"] for solve in self.solves),
        }

    def log(self, loggers: Iterable[Any] | None = None, *, prefix: str = "gif/unlearn") -> None:
        """Logs the report: numbers to every logger; to W&B also the search's path and the solve's curve as tables.

        A W&B run that is finished is left alone, with a warning.

        Args:
            loggers: Lightning loggers; by default those of the trainer that was asked.
            prefix: Start of every key.
        """
        loggers = running(self.loggers if loggers is None else loggers)
        log_scalars(loggers, self.summary(), prefix=prefix, step=self.global_step)
        names = ("forget_loss", "retain_loss", "risk", "memorization")
        solves = range(1, len(self.solves) + 1)
        rows = [
            [*(trial.step_sizes[i - 1] if i <= len(trial.step_sizes) else 0.0 for i in solves)]
            + [getattr(trial, name) for name in names]
            for trial in self.path
        ]
        log_table(loggers, f"{prefix}/path", [*(f"step_{i}" for i in solves), *names], rows)
        log_table(loggers, f"{prefix}/solve", ["iteration", "residual"], list(enumerate(self.residuals)))
        log_eigenvalues(loggers, prefix, self.curvature)

    def plot(self) -> Figure:
        """The losses along the change, or after each of several; what is remembered there; the first solve's residual.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        known = not math.isnan(self.remembered[1])
        made, axes = figure(1, 2 + known, width=13.5 if known else 9, height=3.2)
        along, curve = axes[0][0], axes[0][-1]
        several = len(self.steps) > 1
        if several:  # where the way led: no step, the first one, the first two, …
            measured = {trial.step_sizes: trial for trial in self.path}
            ends = [tuple(self.steps[:count]) for count in range(len(self.steps) + 1)]
            path = [measured[end] for end in ends if end in measured]
        else:
            path = sorted(self.path, key=lambda trial: trial.step_sizes)
        where = [float(len(trial.step_sizes)) if several else trial.step_size for trial in path]
        end = len(self.steps) if several else self.step
        lines = {name: [getattr(trial, f"{name}_loss") for trial in path] for name in ("forget", "retain")}
        for name, losses in lines.items():
            (line,) = along.plot(where, losses, "o-", markersize=4, label=name)
            along.plot([end], [getattr(self, name).after], "*", markersize=11, color=line.get_color())
        along.plot([], [], "k*", label="the edit")
        if all(loss > 0 for losses in lines.values() for loss in losses):  # other losses than cross-entropy may not be
            along.set_yscale("log")
        along.set_title(f"losses {'after each' if several else 'along the'} change, goal: {self.goal}", fontsize=10)
        along.set_ylabel("mean loss")
        if known:
            memory = axes[0][1]
            (line,) = memory.plot(where, [trial.memorization for trial in path], "o-", markersize=4)
            memory.plot([end], [self.remembered[1]], "*", markersize=11, color=line.get_color())
            memory.set_ylim(-0.05, 1.05)
            memory.set_title(GOALS[self.goal].memorization_title(self.n_unseen), fontsize=10)
            memory.set_ylabel(GOALS[self.goal].memorization_unit())
        for axis in axes[0][:-1]:
            if several:
                axis.set_xlabel("changes made, each solved where the last one led")
                axis.set_xticks(range(len(self.steps) + 1))
                continue
            axis.axvline(self.step, color="grey", linestyle=":", label=f"step {self.step:.3g}")
            axis.set_xscale("symlog", linthresh=0.1)
            if path[0].step_size >= 0:
                axis.set_xlim(left=0.0, right=path[-1].step_size * 1.5 or None)
            axis.set_xlabel("step (1 = natural)")
        along.legend()
        curve.semilogy(self.residuals)
        status = f"{self.solve['iterations']} steps"
        if self.settings["rtol"] is not None:
            status = self.solve["status"]
            curve.axhline(self.solve["rtol"], color="grey", linestyle=":", label=f"rtol {self.solve['rtol']:g}")
            curve.legend()
        curve.set_title(f"first solve: {self.solve['solver']}, {status}", fontsize=10)
        curve.set_xlabel("step of the solve")
        curve.set_ylabel("relative residual")
        return made

    def __str__(self) -> str:
        share = 100 * self.edit.count / self.n_parameters
        losses = [
            ("forget", self.forget),
            ("retain", self.retain),
            ("relabelled", self.relabelled),
            ("unseen", self.unseen),
        ]
        if len(self.steps) > 1:
            made = f"in {len(self.steps)} changes, each solved where the last one led"
        else:
            made = f"step {self.step:.3g}"
        changed = (
            f"{self.edit.count} of {self.n_parameters} parameters ({share:.1f} %)" if any(self.steps) else "nothing"
        )

        def predicted(change: Change) -> str:
            near = abs(self.step) <= _PREDICTABLE and not math.isnan(change.predicted)
            return f" (predicted {change.predicted:.4g})" if near else ""

        with_old = " (with the old labels)" if self.relabelled else ""
        solved = "" if self.settings["rtol"] is None else f" {self.solve['status']}"
        remembered = []
        if not math.isnan(self.remembered[1]):
            remembered = [GOALS[self.goal].memorization_text(*self.remembered, self.n_unseen)]
        lines = [
            f"Edit for {self.n_forget} example{'' if self.n_forget == 1 else 's'} (goal: {self.goal};"
            f" {self.n_retain} retained) by changing {changed}, {made};"
            f" {'first solve: ' if len(self.solves) > 1 else ''}{self.solve['solver']}{solved} after"
            f" {self.solve['iterations']} steps, residual {self.solve['residual']:.1e}; {self.seconds:.1f} s",
            *(
                f"{name} loss{with_old if name == 'forget' else ''}: {c.before:.4g} -> {c.after:.4g}{predicted(c)}"
                for name, c in losses
                if c
            ),
            *remembered,
            *([f"running statistics computed anew: {len(self.edit.buffers)} buffers"] if self.edit.buffers else []),
            *(f"note: {note}" for note in self.notes),
        ]
        if self.record is not None:
            lines.append(f"Each time it is made or taken back is recorded in {os.fspath(self.record)}.")
        if self.module is not None and self.edit.digest_before != self.edit.digest_after:
            told = {
                True: "The edit is in the weights.",
                False: "The edit is not in the weights: see apply().",
                None: "The weights have changed since the edit was made.",
            }
            lines.append(told[self.edit.is_in(self.module)])
        return "\n".join(lines)
