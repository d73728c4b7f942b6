"""The report of ``trainer.unlearn``: the edit, its goal, and the measurements."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from .._moved import renamed
from ..config import check_count
from ..distributed import ProcessGroup
from ..errors import ConfigurationError
from ..parameters import Weights
from ..reporting.contents import Table, section_of
from ..reporting.context import ContextAttribute
from ..reporting.loggers import log_to_each
from ..reporting.page import HtmlReport, Page
from ..reporting.previews import saved
from ..storage.artifact import read_file, write_file
from ..storage.audit_log import Event
from ..storage.schema import parse_errors_name
from . import attention, display, picture, transaction
from .logged import contents, event_row, prefix_of
from .record import FORMAT, Change, EditRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Change", "UnlearnReport"]


class UnlearnReport(EditRecord, HtmlReport):
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

        If either fails on any process, neither is done; see :func:`lightning_gif.unlearning.transaction.change`. Then
        the event is counted and logged, see :meth:`note`, unless other weights than those of :attr:`module` were given.
        A logger that fails is only a warning.

        Args:
            event: ``"undo"`` undoes the edit, ``"dry_run"`` changes nothing, any other event applies it.
            module: As in :meth:`apply`.
            record: As in :meth:`apply`.
        """
        context = self.context
        weights = context.model(module)
        log = self.record if record is None else record
        with self.applied() if event in ("unlearn", "apply") else contextlib.nullcontext():
            transaction.change(self, event, weights, log, context.processes_of(weights))
        if (
            context.module is None or context.module is weights
        ):  # logs are about the trained model, not about copies of it
            self.note(event)

    def note(self, event: Event) -> None:
        """Counts an event of the edit, and logs it if the call that made the report logs.

        Args:
            event: What happened.
        """
        context = self.context
        context.happened = context.events.add(event, *context.moment())
        context.events.rows.append(event_row(self, context.happened))
        if context.logs and self.processes.rank == 0:
            self.log()

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

    def log(self, loggers: Iterable[Any] | None = None, *, prefix: str | None = None) -> None:
        """Logs the report after its last event. Each logger gets the parts that it supports.

        The numbers are the mean losses and the memorization of the weights as they are after the event, and before it.
        There are also the report as text, its figure, the tables of events, trials and forgotten examples, the
        diagnostics, the settings, and the edit as a file. The page on logging lists the keys.

        A logger that fails is named in a warning, and so is one whose W&B run is finished. The others get the report.

        Args:
            loggers: Lightning loggers; by default those of the trainer.
            prefix: The start of every key; by default ``gif_unlearn``, or ``gif_dry_run`` after a dry run, and the name
                of the call if it has one.
        """
        section = section_of(prefix_of(self), self.name) if prefix is None else prefix
        log_to_each(
            self.loggers if loggers is None else loggers, lambda: contents(self, section, self.save, self.module)
        )

    def plot(
        self,
        kind: Literal["summary", "predictions", "attention", "trials"] | str | os.PathLike[str] = "summary",
        *,
        reference: nn.Module | None = None,
        layer: str | None = None,
        count: int = 4,
        path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Draws the edit.

        - ``"summary"`` (default): some forget examples, the share of examples that are predicted as their label before
          and after the edit, by class, and the mean losses before, after, and as predicted. Of more than 12 classes,
          the forgotten ones and those that changed most are drawn.
        - ``"predictions"``: as which classes the forget examples are predicted before and after the edit, and by a
          reference: ``reference``, or else the unseen examples of the same labels after the edit, if there are any.
          Figure 4 of the GIF paper (arXiv 2312.05586) is of this kind.
        - ``"attention"``: where the model looks, before and after the edit, in some forget and some retained images:
          Grad-CAM for the label of each, or for a model that is no classifier the mean size of the feature maps. The
          model is evaluated with both weights, and stays as it is. Figure 5 of the paper is of this kind.
        - ``"trials"``: the losses and the memorization of the trials, by the step size of a single change or by the
          number of changes, and the residual of the first solve.

        ``"attention"`` and ``reference`` evaluate the model. In a distributed run, all processes must make such a call.

        Args:
            kind: What to draw. A file name stands for ``path``.
            reference: For ``"predictions"``: a model of the same architecture that was trained without the examples.
            layer: For ``"attention"``: the name of the layer whose output is drawn, as in ``named_modules()``; by
                default the last two-dimensional convolution.
            count: For ``"attention"``: the number of forget and of retained examples.
            path: A file to save the plot to, such as ``"unlearning.png"``; the ending decides its format.

        Raises:
            ConfigurationError: If there is no such kind or layer, or the ending of ``path`` is not known; if an
                argument is of another kind; or if predicted classes are not known, or examples are no images.
            EditError: If the model must be evaluated, but the report was loaded from a file, or the weights have
                changed since the edit was computed.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        if isinstance(kind, os.PathLike) or (isinstance(kind, str) and Path(kind).suffix):
            path, kind = kind, "summary"
        return saved(self._drawn(kind, reference, layer, count), path)

    def _drawn(self, kind: str, reference: nn.Module | None, layer: str | None, count: int) -> Figure:
        _check_plot(kind, reference=reference, layer=layer)
        if kind == "attention":
            check_count("count", count)
            return attention.draw_attention(self, layer, count)
        if kind == "predictions":
            found = None if reference is None else attention.predictions_of(self, reference)
            drawn = picture.draw_predictions(self, found)
            if drawn is None:
                raise ConfigurationError(
                    "plot('predictions') needs the predicted classes of the forget examples, which are not known: the"
                    " model is no classifier that the package recognises, or the file is of an earlier version. Use"
                    " plot()."
                )
            return drawn
        return picture.draw_trials(self) if kind == "trials" else picture.draw_summary(self)

    def page(self, *, whole: bool) -> Page:
        """The report as HTML with the picture of :meth:`plot`; with ``whole``, all kinds that need no model."""
        pictures: list[tuple[str, Callable[[], Figure]]] = [(picture.title_of(self), self.plot)]
        if whole:
            known = picture.has_predictions(self)
            pictures += [("Predicted classes", partial(self.plot, "predictions"))] * known
            pictures.append(("How the edit was found", partial(self.plot, "trials")))
        losses = [
            [name, *("" if math.isnan(value) else f"{value:.4g}" for value in change)]
            for name, change in self.losses.items()
        ]
        tables = {"Mean losses": Table(["examples", "before", "after", "predicted"], losses)}
        return Page("Unlearning report", self.verdict, pictures, tables, self.notes, details=str(self))

    def __str__(self) -> str:
        return display.text(self)


_KINDS = ("summary", "predictions", "attention", "trials")


def _check_plot(kind: Any, *, reference: Any, layer: Any) -> None:
    """Checks the arguments of :meth:`UnlearnReport.plot`."""
    if kind not in _KINDS:
        raise ConfigurationError(
            f"The kind of a plot must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}. To save a plot, give"
            " the name of a file: plot('edit.png')."
        )
    for name, given, of in (("reference", reference, "predictions"), ("layer", layer, "attention")):
        if given is not None and kind != of:
            raise ConfigurationError(f"`{name}` is for plot({of!r}), but this is plot({kind!r}). Omit it.")
