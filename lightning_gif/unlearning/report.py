"""The report of ``trainer.unlearn``: the edit, its goal, and the measurements."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .._moved import renamed
from ..distributed import ProcessGroup
from ..parameters import Weights
from ..reporting.context import ContextAttribute
from ..reporting.previews import saved
from ..storage.artifact import read_file, write_file
from ..storage.audit_log import Event
from ..storage.schema import parse_errors_name
from . import display, transaction
from .record import FORMAT, Change, EditRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Change", "UnlearnReport"]


class UnlearnReport(EditRecord):
    """A reversible edit of the weights with the evidence for it.

    The fields of :class:`~lightning_gif.unlearning.record.EditRecord` are the evidence.

    Attributes:
        module: The model that :meth:`undo` and :meth:`apply` act on by default.
        loggers: The loggers that :meth:`log` uses by default: those of the trainer.
        global_step: The number of the trainer's optimizer steps at the time of the call.
        record: The audit log to which :meth:`apply` and :meth:`undo` add an entry, see
            :mod:`lightning_gif.storage.audit_log`.
        processes: The process group, whose processes hold copies of the model. The edit changes all copies, or none.
            The first process writes files.
        class_names: The name of each class in pictures, in the order of the labels; ``None`` shows the labels.
    """

    module = ContextAttribute[nn.Module | None]()
    loggers = ContextAttribute[Sequence[Any]]()
    global_step = ContextAttribute[int]()
    record = ContextAttribute[str | os.PathLike[str] | None]()
    processes = ContextAttribute[ProcessGroup]()
    class_names = ContextAttribute[Sequence[str] | None]()

    path = renamed("UnlearnReport.path", "trials")
    steps = renamed("UnlearnReport.steps", "step_sizes")
    remembered = renamed("UnlearnReport.remembered", "memorization")
    ranks = renamed("UnlearnReport.ranks", "processes")

    # ----------------------------------------------------------------------------------------------------------------
    # The edit
    # ----------------------------------------------------------------------------------------------------------------

    def apply(self, module: Weights | None = None, *, record: str | os.PathLike[str] | None = None) -> None:
        """Applies the edit: after ``dry_run=True``, after :meth:`undo`, or to another copy of the same weights.

        Args:
            module: The model, or the ``state_dict`` of a checkpoint; by default the model that was edited. If its
                trainer runs several processes, all of them must make this call. The edit then changes all copies, or
                none.
            record: The audit log to add an entry to; by default that of the report, if it has one.

        Raises:
            EditError: If the model is a different one, or its weights differ from those before the edit.
            RecordError: If the entry cannot be written. The weights are then unchanged.
        """
        self.change("apply", module, record)

    def undo(self, module: Weights | None = None, *, record: str | os.PathLike[str] | None = None) -> None:
        """Restores the weights before the edit, bit for bit.

        Args:
            module: As in :meth:`apply`.
            record: As in :meth:`apply`.

        Raises:
            EditError: If the model is a different one, or its weights differ from those after the edit.
            RecordError: If the entry cannot be written. The weights are then unchanged.
        """
        self.change("undo", module, record)

    def record_metrics(
        self,
        metrics: Mapping[str, float],
        module: Weights | None = None,
        *,
        record: str | os.PathLike[str] | None = None,
    ) -> None:
        """Adds measurements of the current model to the audit log.

        Args:
            metrics: Numbers by name.
            module: As in :meth:`apply`.
            record: As in :meth:`apply`.

        Raises:
            RecordError: If there is no audit log, a value is not a number, or the entry cannot be written.
        """
        weights = self.context.model(module)
        log = self.record if record is None else record
        transaction.log_metrics(self, metrics, weights, log, self.context.processes_of(weights))

    def change(self, event: Event, module: Weights | None = None, record: str | os.PathLike[str] | None = None) -> None:
        """Applies or undoes the edit, and adds an entry about ``event`` to the audit log if there is one.

        If either fails on any process, neither is done; see :func:`lightning_gif.unlearning.transaction.change`.

        Args:
            event: ``"undo"`` undoes the edit, any other event applies it.
            module: As in :meth:`apply`.
            record: As in :meth:`apply`.
        """
        weights = self.context.model(module)
        log = self.record if record is None else record
        transaction.change(self, event, weights, log, self.context.processes_of(weights))

    def write_down(self, event: Event, record: str | os.PathLike[str], before: str, after: str) -> None:
        """Adds an entry about the edit to an audit log, and does nothing else.

        Args:
            event: The event.
            record: The audit log.
            before: The :func:`~lightning_gif.parameters.weights_digest` before the event.
            after: The :func:`~lightning_gif.parameters.weights_digest` after the event.
        """
        transaction.write_entry(self, event, record, before, after)

    # ----------------------------------------------------------------------------------------------------------------
    # Files
    # ----------------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the edit and the report to a safetensors file. An existing file is replaced atomically.

        In a distributed run the first process writes, and the others do not wait for it. Call
        ``trainer.strategy.barrier()`` before another process reads the file.

        Args:
            path: The file, preferably with the suffix ``.safetensors``. Missing folders are created.
        """
        if self.processes.rank:
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, FORMAT, *self.to_record(), version=self.version)

    @classmethod
    def load(cls, path: str | os.PathLike[str], module: nn.Module | None = None) -> UnlearnReport:
        """Reads a report that :meth:`save` wrote, in this version or an earlier one.

        Nothing is unpickled, and the model is not changed.

        Args:
            path: The file.
            module: The model that :meth:`undo` and :meth:`apply` will act on.

        Raises:
            EditError: If the file is not an edit file, is damaged or was edited, or does not fit ``module``.
            FileNotFoundError: If the file does not exist.
        """
        artifact = read_file(Path(path), FORMAT)
        with parse_errors_name(path, FORMAT.remedy, FORMAT.error):
            report = cls.from_record(*artifact)
            str(report), report.summary()  # a report that cannot be printed is damaged
        if module is not None:
            report.edit.check_fits(module)
            report.module = module
        return report

    # ----------------------------------------------------------------------------------------------------------------
    # Logs, figures and text
    # ----------------------------------------------------------------------------------------------------------------

    def log(self, loggers: Iterable[Any] | None = None, *, prefix: str = "gif/unlearn") -> None:
        """Logs the report. Each logger gets the parts that it supports.

        - Every logger: the numbers of :meth:`summary` as ``gif/unlearn/NAME``.
        - With tables (W&B): ``…/path``, the trials in order, with the step size of each change (``step_1``, …), the
          mean losses, the risk and the memorization; ``…/solve``, the relative residual after each iteration of the
          first solve; ``…/eigenvalues``, if they were computed.
        - With text and figures (TensorBoard): ``…/report``, the report as text; ``…/plot``, the figure of :meth:`plot`.

        A finished W&B run is skipped with a warning.

        Args:
            loggers: Lightning loggers; by default those of the trainer.
            prefix: The start of every key.
        """
        display.log(self, self.loggers if loggers is None else loggers, prefix)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws the losses and the memorization of the trials, and the residual of the first solve.

        The x axis is the step size of a single change, or the number of changes.

        Args:
            path: A file to save the plot to, such as ``"unlearning.png"``; the ending decides its format.

        Raises:
            ConfigurationError: If the ending of ``path`` is not known.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return saved(display.draw(self), path)

    def __str__(self) -> str:
        return display.text(self)
