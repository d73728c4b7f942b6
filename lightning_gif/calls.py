"""The methods that the callback adds to a trainer: each opens a session, makes one call, and logs its report."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Unpack

from .attribution.from_store import influence_from_store
from .attribution.gradient_store import RANK, GradientStore
from .attribution.groups import Grouping
from .attribution.influence import influence
from .attribution.predictions import labels_at
from .attribution.report import InfluenceReport
from .attribution.retraining import Retrain
from .attribution.self_influence import self_influence
from .attribution.storing import store_gradients
from .attribution.validation import Opened, ValidationReport, check_validation, validate
from .config import AUTO, Overrides, Settings, check_count
from .data.examples import Examples
from .data.names import Vocabulary, find_class_names, warn_of_missing_names
from .data.structure import describe
from .defaults import check_names, for_influence, for_matching, for_store, for_unlearning
from .distributed import ProcessGroup
from .errors import ConfigurationError
from .inspection.check import CheckReport, check, collected
from .mixin import LossOfModule
from .objective.objective import Objective
from .reporting.contents import check_log_name
from .reporting.context import CallContext
from .selection.tracker import TrainingTracker
from .session import Loaders, Session, TargetsChoice, open_session, open_stored
from .signatures import keywords
from .storage.audit_log import check_whole, read
from .storage.interrupts import uninterrupted
from .trajectory.influence import influence_through_training
from .trajectory.record import Trajectory
from .unlearning.events import EventList
from .unlearning.journal import Journal
from .unlearning.record import EditContext
from .unlearning.report import UnlearnReport
from .unlearning.step import Step, check_step
from .unlearning.tuning import Tuning
from .unlearning.unlearn import check_tuning, unlearn

if TYPE_CHECKING:
    from ._compat import Trainer

__all__ = ["CallsOf", "Influence", "TrainerCalls", "check_path", "check_record"]

_SCORES_FOLDER = "lightning_gif_scores"

# The settings that matter to a validation of scores that are given.
_OF_MEASURING = ("batch_size", "double", "memory", "seed")

# The settings that a call through training can choose.
_OF_REPLAYS = ("batch_size", "memory", "double", "seed")

# The settings that a call with a store can choose.
_OF_STORED = ("batch_size", "memory")

_Report = TypeVar("_Report", InfluenceReport, UnlearnReport, ValidationReport)


class Influence:
    """The method ``influence``: a call scores training examples, and ``influence.check()`` estimates what calls cost.

    It is a class because it has this method of its own. Like a function, it is bound when it is taken from an object.

    Args:
        calls: The object that it is a method of; ``None`` for the class.
    """

    __name__ = "influence"

    def __init__(self, calls: TrainerCalls | None = None) -> None:
        self._calls = calls
        # `help` takes an object with `__get__` for a method, and asks it for these.
        self.__doc__ = type(self).__call__.__doc__
        self.__signature__ = inspect.signature(self.__call__)

    def __get__(self, calls: TrainerCalls | None, owner: type | None = None) -> Influence:
        return type(self)(calls)

    def __reduce__(self) -> tuple[type[Influence], tuple[TrainerCalls | None]]:
        return type(self), (self._calls,)

    def __repr__(self) -> str:
        return f"<method influence of {self._calls!r}>"

    def __call__(
        self,
        batch: Any,
        *,
        k: int = 10,
        per_example: bool = False,
        targets: TargetsChoice | None = None,
        among: Sequence[int] | Tensor | Callable[[Any], Tensor] | None = None,
        scores_to: str | os.PathLike[str] | None = None,
        keep: int | None = None,
        snapshots: bool | None = None,
        losses: bool = False,
        tokens: bool = False,
        store: str | os.PathLike[str] | None = None,
        through: Literal["training"] | None = None,
        leave_outs: int = 0,
        name: str | None = None,
        dataloader: DataLoader[Any] | None = None,
        **overrides: Unpack[Overrides],
    ) -> InfluenceReport:
        """Scores every training example by how removing it would change the model's loss on a batch.

        Call it as ``trainer.influence(batch, …)``, or on the callback as ``gif.influence(batch, …)``. A score is the
        predicted change of the loss, in the unit of the loss. It is positive for a proponent: removing the example
        would raise the loss. It is negative for an opponent: removing the example would lower the loss. Scores order
        examples better than they measure them: on deep networks, sizes are often too large.

        Args:
            batch: The query: a batch as the training loader yields them, a ``DataLoader``, or a ``Dataset``, whose
                items are collated as in the training loader. Its mean loss is attributed, or the mean of
                ``influence_measurement`` if the module overrides it.
            k: The number of proponents, and of opponents, that are shown and logged; 10 by default.
            per_example: Whether each example of the batch is a query of its own. By default the query is their mean.
            targets: The parameters that scores are restricted to; by default all parameters are used. ``"cached"``: the
                targets picked at the end of the last epoch. ``"class"``: neurons are ranked by the training statistics
                of the batch's classes. ``"batch"``: neurons are ranked on the batch, as in the GIF paper. The selectors
                ``"caps"`` and ``"ekfac_caps"`` have no cached targets. With ``"batch"`` they use the gradient of the
                batch, and with ``"class"`` that of all training examples of its classes. If ``selector``, ``ratio`` or
                a method with targets is given, the default is ``"cached"``.
            among: The training examples to score: dataset indices, a mask with a truth value for each example of the
                training dataset, or a function from a batch to one truth value for each of its examples. By default
                all. The scores of an example do not depend on this choice.
            scores_to: A folder to which scores are written as they are computed, if they do not fit into memory. After
                an interruption, the same call computes only the missing scores. A call with other weights, queries,
                settings or data raises an error (data are compared by index and by the contents of 64 examples). By
                default, scores are kept in memory. If they take more than half of ``memory``, a folder below the
                trainer's ``default_root_dir`` is used, and a message names it.
            keep: Keep only this many of the highest, and of the lowest, scores of each query; at least ``k``. By
                default all scores are kept. Use it for many queries.
            snapshots: Whether to average the scores over the present weights and the snapshots of training. This
                predicts retraining better, and costs a solve and a scoring pass for each snapshot. With ``None``
                (default), scores are averaged if there are snapshots. ``True`` raises an error if there are none.
            losses: Whether the report also has the loss of each scored training example, at the present weights: the
                cheap score to compare with, and a column of ``to_dataframe()``. It takes one more forward pass over
                these examples. ``False`` by default.
            tokens: Whether the report also has the scores of the tokens of the shown training texts, see
                :meth:`~lightning_gif.reports.InfluenceReport.token_scores`. The loss must be a cross-entropy for each
                token, as in language models. It takes a few passes for each shown text. ``False`` by default.
            store: The folder of a store that :meth:`store_gradients` has written for these weights. Then the training
                data are not needed, and ``among`` is indices or a mask. Scores are those of ``solver="ekfac"`` with the
                settings and snapshots of the store, up to the error of the store's projection. By default there is no
                store.
            through: ``"training"``: the exact derivative through the optimizer steps of the run that
                ``GIFCallback(trajectory=folder)`` has recorded. It tells how examples acted *in this run*: what would
                change if an example were left out, and all else stayed the same, the random numbers included. It
                replays the run. How well a derivative predicts this depends on how smooth the training is. By default,
                scores are about what training *again* without an example would change, whatever the seed.
            leave_outs: With ``through``: how often to replay the run without a random twentieth of the examples. The
                report then says whether the scores predict the run. Each takes about twice as long as the training. By
                default 0.
            name: The name of the query in logs, such as ``"held-out eights"``. Give queries of different kinds their
                own names, because each name has its own keys, ``gif_influence/NAME/…``. By default there is no name.
            dataloader: A loader of the training data; by default the one of ``fit``. With ``store``, it only serves to
                show examples.
            **overrides: Arguments of the constructor to change for this call: those from ``selector`` to
                ``unconverged``, and ``seed``. With ``store``, only ``batch_size`` and ``memory``; with ``through``
                these two, ``double`` and ``seed``.

        Returns:
            Scores ``(n_queries, n_train)`` with the dataset index of each training example.

        Raises:
            ConfigurationError: If an argument is invalid or the trainer is not supported.
            TrainingDataError: If there is no training loader, or its examples have no stable index.
            SelectionError: If no targets can be picked, for example before any ``fit``.
            BatchError: If the batch is empty, or does not have the structure of the training batches.
            ObjectiveError: If the loss of single examples cannot be computed, or does not depend on the targets.
            NonFiniteError: If a loss, a gradient or a product is NaN or infinite.
            ConvergenceError: If a solve diverges, or does not converge and ``unconverged="raise"``.
        """
        calls, trainer = self._of_trainer()
        requested = check_names(calls.settings.override(overrides, keywords(self)))
        check_count("k", k)
        check_log_name(name)
        _check_keep(keep, k, scores_to)
        if store is not None:
            others = {"targets": targets, "scores_to": scores_to, "through": through, **overrides}
            _check_stored(store, others, losses=losses, tokens=tokens, leave_outs=leave_outs)
            chosen: dict[str, Any] = {"per_example": per_example, "keep": keep, "snapshots": snapshots, "k": k}
            return calls._from_store(Path(store), batch, requested, among, name, dataloader, chosen)
        if through is not None or leave_outs:
            others = {"targets": targets, "scores_to": scores_to, "snapshots": snapshots, "tokens": tokens or None}
            _check_through(through, leave_outs, {**others, **overrides})
            chosen = {"per_example": per_example, "keep": keep, "k": k, "leave_outs": leave_outs}
            return self._through_training(batch, requested, among, name, dataloader, losses, chosen)
        states = _snapshot_states(calls.tracker, snapshots)
        choice: TargetsChoice = "cached" if targets is None else targets
        on_targets = _are_on_targets(targets, overrides)
        settings = for_influence(requested, ggn=True, on_targets=on_targets)
        spill_to = _folder_for_scores(trainer)  # inside a session every trainer is in training

        def scores(session: Session, scored: Examples | None) -> InfluenceReport:
            query = session.examples(batch)
            return influence(
                session.objective,
                session.train,
                query,
                session.influence_settings(requested, on_targets=on_targets, queries=len(query) if per_example else 1),
                partial(session.choose_targets, query, choice, measured=True),
                per_example=per_example,
                among=scored,
                scores_to=None if scores_to is None else Path(scores_to),
                spill_to=spill_to,
                keep=keep,
                states=states,
                k=k,
                tokens=tokens,
                context=calls._context(session),
            )

        return calls._scored(calls.open_session(settings, choice, dataloader, overrides), scores, among, name, losses)

    def _through_training(
        self,
        batch: Any,
        settings: Settings,
        among: Any,
        name: str | None,
        dataloader: DataLoader[Any] | None,
        losses: bool,
        options: dict[str, Any],
    ) -> InfluenceReport:
        """The report of a call through training. ``options`` are arguments of the function."""
        calls, _ = self._of_trainer()
        if calls.trajectory is None:
            raise ConfigurationError(
                "through='training' needs the record of a run, but there is none. Fit with"
                " GIFCallback(trajectory='folder'), or pass a GIFCallback with the folder of this model's run to"
                " lightning_gif.attach(…, callback=…)."
            )
        folder = Path(calls.trajectory)

        def scores(session: Session, scored: Examples | None) -> InfluenceReport:
            trajectory = Trajectory.open(folder)  # here, all processes have written their parts of it
            return influence_through_training(
                session.objective,
                session.train,
                session.examples(batch),
                trajectory,
                settings,
                **options,
                among=scored,
                context=calls._context(session),
            )

        return calls._scored(calls.open_session(settings, "batch", dataloader), scores, among, name, losses)

    def check(
        self,
        *,
        n_queries: int = 1,
        n_forget: int = 64,
        dataloader: DataLoader[Any] | None = None,
        **overrides: Unpack[Overrides],
    ) -> CheckReport:
        """Reports how the losses of the model are computed, which layers an edit may change, and what calls will cost.

        Call it as ``trainer.influence.check(…)``. It reads about 64 examples and two batches, and computes
        no scores. Call it before the first long call.

        Args:
            n_queries: The number of queries whose cost is estimated, as for ``per_example=True``; 1 by default.
            n_forget: The number of forget examples for which the cost of an edit is estimated; 64 by default.
            dataloader: As in :meth:`influence`.
            **overrides: As in :meth:`influence`.

        Returns:
            The report. Print it, or read its attributes. Estimates of time assume that the machine does nothing else.

        Raises:
            GIFError: As in :meth:`influence`. If the model cannot be used, the message says why.
        """
        calls, _ = self._of_trainer()
        requested = check_names(calls.settings.override(overrides, keywords(self.check)))
        check_count("n_queries", n_queries)
        check_count("n_forget", n_forget)
        settings, begin = for_influence(requested, ggn=True, on_targets=False), time.perf_counter()
        with contextlib.ExitStack() as stack:
            with collected() as caught:
                opened = calls.open_session(settings, "batch", dataloader, overrides)
                session = stack.enter_context(opened)
                unseen, _ = session.unseen(None)
            return check(
                replace(session, settings=requested),
                time.perf_counter() - begin,
                caught,
                n_queries=n_queries,
                n_forget=n_forget,
                unseen=unseen,
            )

    def _of_trainer(self) -> tuple[TrainerCalls, Trainer]:
        """The object that this is a method of, and its trainer."""
        if self._calls is None:
            raise TypeError("`influence` is a method of a GIFCallback: call it on one, not on the class.")
        return self._calls, self._calls._bound_to


class TrainerCalls:
    """The calls of :class:`~lightning_gif.GIFCallback` on the trainer that it belongs to.

    Attributes:
        influence: The call that scores training examples, see :class:`Influence`.
        settings: The settings, which a call can override.
        tracker: The statistics from training, and the cached targets.
        loaders: The loaders of the last ``fit``.
        influence_loss: A function that gives the losses of single examples; ``None`` to take them from the module.
        log_reports: Whether reports are logged.
        store: The folder to which a fit writes a store of gradients.
        trajectory: The folder in which a fit is recorded.
        record: The audit log.
        class_names: The name of each class, for reports; ``None`` takes those of the data.
        vocabulary: The tokens of texts by their ids, for reports; ``None`` shows ids.
        events: The events of all edits.
    """

    settings: Settings
    tracker: TrainingTracker
    loaders: Loaders
    influence_loss: LossOfModule | None
    log_reports: bool
    store: str | None
    trajectory: str | None
    record: str | None
    class_names: Sequence[str] | None
    vocabulary: Vocabulary | None
    events: EventList
    _trainer: Trainer | None = None

    influence = Influence()

    @property
    def _bound_to(self) -> Trainer:
        """The trainer.

        Raises:
            ConfigurationError: If there is none yet.
        """
        if self._trainer is None:
            raise ConfigurationError(
                "This GIFCallback belongs to no trainer yet. Pass it as Trainer(callbacks=[gif]), and call trainer.fit"
                " first. For a model that was trained elsewhere, call lightning_gif.attach(trainer, model, …,"
                " callback=gif)."
            )
        return self._trainer

    def open_session(
        self,
        settings: Settings,
        choice: TargetsChoice,
        dataloader: DataLoader[Any] | None = None,
        overrides: Overrides | None = None,
    ) -> AbstractContextManager[Session]:
        """The block of one call, see :func:`~lightning_gif.session.open_session`."""
        return open_session(
            self._bound_to, self.tracker, self.loaders, settings, choice, dataloader, overrides, self.influence_loss
        )

    def store_gradients(
        self,
        folder: str | os.PathLike[str],
        *,
        rank: int = RANK,
        among: Sequence[int] | Tensor | Callable[[Any], Tensor] | None = None,
        snapshots: bool | None = None,
        dataloader: DataLoader[Any] | None = None,
        **overrides: Unpack[Overrides],
    ) -> GradientStore:
        """Writes a store of the gradients of all training examples, in one pass over the training data.

        Call it as ``trainer.store_gradients(folder, …)``. Later calls of ``trainer.influence(batch, store=folder)``
        take neither the training data nor a pass over them, and answer in about a second. The store is for the present
        weights. It keeps about ``rank`` bytes for each training example and state of the model, their labels, and up
        to 69 training examples, from which calls learn how the model's loss is computed.

        If the call is interrupted, the same call goes on after the last complete chunk of 4096 examples. If files of
        the store are damaged, the same call computes them again.

        Args:
            folder: The folder. It is created if it does not exist. In a distributed run all processes must see it.
            rank: The number of coordinates that are kept of each gradient. With more, scores are closer to full ones,
                and the store is larger. The printed store has the correlation with full scores.
            among: The training examples to store, as in :meth:`influence`; by default all.
            snapshots: Whether to store the gradients at the snapshots of training, too, so that scores are averages as
                in :meth:`influence`. With ``None`` (default), they are stored if there are any. Each makes the store
                and the call as large again.
            dataloader: As in :meth:`influence`.
            **overrides: As in :meth:`influence`. The curvature is EK-FAC.

        Returns:
            The store. Print it to see its size and its accuracy.

        Raises:
            ConfigurationError: If ``folder`` holds anything else than a store of the same gradients, or if the module
                does not use all its parameters in layers that are linear in them.
            BatchError: If batches have values that cannot be written: others than tensors, numbers and texts, in lists,
                tuples and dictionaries.
            GIFError: As in :meth:`influence`.
        """
        trainer, states = self._bound_to, _snapshot_states(self.tracker, snapshots)
        check_path("folder", folder, "folder", optional=False)
        check_count("rank", rank)
        settings = for_store(check_names(self.settings.override(overrides, keywords(self.store_gradients))))
        with self.open_session(settings, "batch", dataloader, overrides) as session:
            return store_gradients(
                session.objective,
                session.train,
                settings,
                Path(folder),
                rank=rank,
                among=session.among(among),
                states=states,
                epoch=trainer.current_epoch if session.loaders.epoch is None else session.loaders.epoch,
                class_names=self._context(session).class_names,
            )

    def _from_store(
        self,
        folder: Path,
        batch: Any,
        requested: Settings,
        among: Any,
        name: str | None,
        dataloader: DataLoader[Any] | None,
        options: dict[str, Any],
    ) -> InfluenceReport:
        """The report of :meth:`influence` from a store. ``options`` are arguments of :func:`influence_from_store`."""
        trainer, store = self._bound_to, GradientStore.open(folder)
        if options["snapshots"] and not store.manifest.snapshots:
            raise ConfigurationError(
                f"snapshots=True needs a store with snapshots, but the one at {str(folder)!r} has none. Omit"
                " `snapshots`, or write a store after a fit with GIFCallback(snapshots=1)."
            )
        settings = replace(store.settings, batch_size=requested.batch_size, memory=requested.memory)
        opened = open_stored(trainer, self.tracker, self.loaders, settings, store, dataloader, self.influence_loss)
        with opened as session:
            context = self._context(session)
            scored = session.among(among)
            report = influence_from_store(
                session.objective,
                session.examples(batch),
                store,
                **{**options, "snapshots": options["snapshots"] is not False},
                positions=None if scored is None else session.train.positions_of(scored.ids),
                dataset=None if session.train.are_absent else session.train.dataset,
                context=replace(context, class_names=context.class_names or store.manifest.class_names),
            )
            _finish(report, session, name, None)
        return _logged(trainer, report, self.log_reports)

    def validate_influence(
        self,
        batch: Any,
        retrain: Retrain,
        *,
        n_subsets: int = 8,
        n_seeds: int = 1,
        share: float = 0.5,
        groups: Grouping | None = None,
        folder: str | os.PathLike[str] | None = None,
        report: InfluenceReport | None = None,
        targets: TargetsChoice | None = None,
        scores_to: str | os.PathLike[str] | None = None,
        snapshots: bool | None = None,
        name: str | None = None,
        dataloader: DataLoader[Any] | None = None,
        **overrides: Unpack[Overrides],
    ) -> ValidationReport:
        """Tests how well scores predict retraining, by training models on random subsets of the training examples.

        Call it as ``trainer.validate_influence(batch, retrain, …)``. It trains
        ``n_subsets * n_seeds`` models. For each subset, and for each query, it compares two numbers: the sum of the
        scores of the examples that the subset leaves out, and how much the loss of the models trained on the subset
        differs from that of the original model. Their rank correlation over the subsets, averaged over the queries, is
        the linear datamodeling score (LDS).

        Args:
            batch: The query, as in :meth:`influence`. Each example is a query
                of its own. With 20 or more, the result is more precise.
            retrain: A function ``(indices, seed)``. It trains a new model with a new ``Trainer``, only on the training
                examples with these dataset indices, and otherwise just as the original model was trained. It returns
                the new ``LightningModule``. Global random generators are seeded with ``seed`` before each call, and
                restored afterwards.
            n_subsets: The number of random subsets, 3 or more; 8 by default. More subsets make the interval narrower.
            n_seeds: How many models are trained on each subset; 1 by default. With 2 or more the report has a noise
                ceiling.
            share: The share of the training examples that each subset keeps; 0.5 by default. With 0.99 each subset
                leaves out one example in a hundred, but the effect of few examples is hard to tell from that of the
                seed.
            groups: Groups of training examples that are kept or left out together, such as the photos of one person; in
                one of the forms of :meth:`~lightning_gif.InfluenceReport.by_group`. By default each example is drawn on
                its own.
            folder: A folder to which the losses of each retrained model are written. After an interruption, the same
                call trains only the missing models. So does a call for more subsets or seeds. A call with other
                weights, queries, subsets or data raises an error. By default nothing is written.
            report: A report of ``trainer.influence`` for this batch, with all scores. Its scores are tested, and no
                others are computed. If the report was made without ``per_example=True``, the query is the mean over the
                batch.
            targets: As in :meth:`influence`.
            scores_to: As in :meth:`influence`.
            snapshots: As in :meth:`influence`.
            name: As in :meth:`influence`.
            dataloader: As in :meth:`influence`.
            **overrides: As in :meth:`influence`. ``seed`` also decides the subsets.

        Returns:
            The report, with the LDS, its interval, the noise ceiling, and a verdict in one line.

        Raises:
            ConfigurationError: If an argument is invalid; if the trainer has several processes; or if ``retrain``
                returns a model with other parameters, or changes the original model.
            GIFError: As in :meth:`influence`.
        """
        trainer, begin = self._bound_to, time.perf_counter()
        settings = check_names(self.settings.override(overrides, keywords(self.validate_influence)))
        check_validation(retrain, n_subsets, n_seeds, share)
        check_log_name(name)
        check_path("folder", folder, "folder")
        _check_one_process(trainer)
        scoring = {"targets": targets, "scores_to": scores_to, "snapshots": snapshots, **overrides}
        if report is None:
            given: dict[str, Any] = {**scoring, "snapshots": snapshots, "dataloader": dataloader}
            report = CallsOf(self, trainer, log_reports=False).influence(batch, per_example=True, **given)
        else:
            _check_only_measuring(scoring)
        validation = validate(
            partial(self._opened, settings, dataloader, batch),
            report,
            retrain,
            n_subsets=n_subsets,
            n_seeds=n_seeds,
            share=share,
            seed=settings.seed,
            groups=groups,
            folder=None if folder is None else Path(folder),
            context=_context(trainer),
        )
        validation.seconds = time.perf_counter() - begin
        validation.settings = {**validation.settings, "name": name}
        return _logged(trainer, validation, self.log_reports)

    @contextlib.contextmanager
    def _opened(self, settings: Settings, dataloader: DataLoader[Any] | None, batch: Any) -> Iterator[Opened]:
        """The block of a part of a validation: the objective, the training examples and the query."""
        with self.open_session(settings, "batch", dataloader) as session:
            yield Opened(session.objective, session.train, session.examples(batch))

    @contextlib.contextmanager
    def _reopened(self, settings: Settings, dataloader: DataLoader[Any] | None) -> Iterator[tuple[Objective, Examples]]:
        """The block in which a report evaluates its model again: the objective and the training examples."""
        with self.open_session(settings, "batch", dataloader) as session:
            yield session.objective, session.train

    def self_influence(
        self,
        *batch: Any,
        k: int = 10,
        targets: Literal["cached"] | None = None,
        among: Sequence[int] | Tensor | Callable[[Any], Tensor] | None = None,
        snapshots: bool = False,
        losses: bool = False,
        name: str | None = None,
        dataloader: DataLoader[Any] | None = None,
        **overrides: Unpack[Overrides],
    ) -> InfluenceReport:
        """Scores every training example by how removing it would change the model's loss on that example.

        Call it as ``trainer.self_influence(…)``. A high score means that the model had to memorize the
        example. Look there first for wrong labels, for duplicates with other labels, and for data unlike the rest.

        Args:
            *batch: Not accepted. To score some examples only, pass ``among``.
            k: The number of examples with the highest, and with the lowest, scores that are shown and logged; 10 by
                default.
            targets: ``"cached"`` restricts scores to the cached targets; by default all parameters are used, see
                :meth:`influence`.
            among: As in :meth:`influence`.
            snapshots: Whether to average the scores over the present weights and the snapshots, see :meth:`influence`;
                ``False`` by default. Each snapshot makes the call take as long again. With snapshots, wrong labels that
                are fully memorized at the end of training have high scores as well.
            losses: As in :meth:`influence`.
            name: As in :meth:`influence`.
            dataloader: As in :meth:`influence`.
            **overrides: As in :meth:`influence`. With more than 1024 parameters, another ``solver`` than ``"ekfac"``
                means a sketch of the curvature. Its rank is ``max_iter``, 64 by default. A higher rank makes the size
                of scores more accurate; their order hardly changes.

        Returns:
            One row of scores, ``(1, n_train)``; see
            :func:`~lightning_gif.attribution.self_influence.self_influence`.

        Raises:
            GIFError: As in :meth:`influence`.
        """
        if batch:
            raise ConfigurationError(
                "trainer.self_influence takes no batch, because each training example is its own query, got"
                f" {describe(batch[0])}. To score some training examples, pass among=[17, 4031] or a function from a"
                " batch to truth values. To explain the loss on a batch, call trainer.influence(batch)."
            )
        if targets not in (None, "cached"):
            raise ConfigurationError(
                "`targets` of trainer.self_influence must be None (all parameters) or 'cached', because there is no"
                f" batch to rank neurons on, got {targets!r}."
            )
        states = _snapshot_states(self.tracker, snapshots)
        requested = check_names(self.settings.override(overrides, keywords(self.self_influence)))
        check_count("k", k)
        check_log_name(name)
        on_targets = _are_on_targets(targets, overrides)
        settings = for_influence(requested, ggn=True, on_targets=on_targets)
        choice: TargetsChoice = "cached" if targets is None else targets

        def scores(session: Session, scored: Examples | None) -> InfluenceReport:
            return self_influence(
                session.objective,
                session.train,
                session.influence_settings(requested, on_targets=on_targets, queries=len(session.train), itself=True),
                partial(session.choose_targets, session.train, "cached"),
                among=scored,
                states=states,
                k=k,
                context=self._context(session),
            )

        return self._scored(self.open_session(settings, choice, dataloader, overrides), scores, among, name, losses)

    def _scored(
        self,
        opened: AbstractContextManager[Session],
        scores: Callable[[Session, Examples | None], InfluenceReport],
        among: Any,
        name: str | None,
        losses: bool,
    ) -> InfluenceReport:
        """The report of a function of the session and of the examples to score, finished and logged."""
        with opened as session:
            scored = session.among(among)
            report = scores(session, scored)
            _finish(report, session, name, (scored or session.train) if losses else None)
        return _logged(self._bound_to, report, self.log_reports)

    def unlearn(
        self,
        batch: Any,
        *,
        relabel: Tensor | int | Callable[[Any], Tensor] | None = None,
        retain: DataLoader[Any] | Dataset[Any] | None = None,
        unseen: DataLoader[Any] | Dataset[Any] | Literal[False] | None = None,
        step: Step = AUTO,
        targets: TargetsChoice = "batch",
        dataloader: DataLoader[Any] | None = None,
        refresh_statistics: bool = False,
        dry_run: bool = False,
        record: str | os.PathLike[str] | Literal[False] | None = None,
        solves_to: str | os.PathLike[str] | None = None,
        tuning: Tuning | None = None,
        name: str | None = None,
        **overrides: Unpack[Overrides],
    ) -> UnlearnReport:
        """Edits the weights so that the model behaves as if trained without some examples, or with other labels.

        Call it as ``trainer.unlearn(batch, …)``. Only target parameters change, and BatchNorm statistics on request.
        All parameters are targets if single examples are removed or get new labels, unless a selection is given, see
        ``step``. The state of the optimizer (momentum, averages) still depends on the forgotten data: create a new
        optimizer before you train further.

        Args:
            batch: The forget examples, with the labels they were trained with. A list, range or array of integers gives
                their dataset indices. A list or array of truth values is a mask: it has one for each example of the
                training dataset. A function from a batch to one truth value for each of its examples is called on all
                training data, such as ``lambda batch: batch[1] == 3``. The examples of a batch, a ``DataLoader`` or a
                ``Dataset`` are looked up in the training data: by dataset index if the loader is over the training
                dataset or a ``Subset`` of it, otherwise by content. All other training examples are retained.
            relabel: The new labels of the forget examples; ``None`` (default) removes the examples. A tensor, an array
                or a list in the order of the batch or of the indices, one label for all, or a function from a batch to
                its new targets. If ``batch`` is a loader, the order is that of its dataset, which may be a ``Subset``.
                If ``batch`` is a function, the order is that of the training dataset.
            retain: A loader or dataset of all data to keep; by default the rest of the training data. After earlier
                edits, pass the data that they retained.
            unseen: A loader or dataset of examples like the training data that the model was not trained on. An edit
                gives memorized examples losses like those of unseen examples. By default the validation loader of
                ``fit``, if its batches have the structure of training batches, else a note in the report says why not;
                ``False`` for none. Fewer than 20 examples are not used. Never pass test data, because unseen data
                decide how far an edit goes.
            step: How far the edit goes. This is decided on the forget, retained and unseen data. ``"auto"`` (default)
                is ``"match"`` if single examples are removed, or up to 1280 get new labels. It is ``"relinearise"``
                otherwise, and where the loss has no Gauss–Newton matrix. ``"match"``: a change towards the predictions
                that theory expects of a model trained without the examples, or with their new labels. It changes all
                parameters, unless ``targets``, ``selector`` or ``ratio`` is given.
                ``"relinearise"``: up to twelve changes that lower the risk, each solved at the weights after the
                previous one. ``"search"``: one change, with the best step size for the goal. ``"natural"``: one
                change with step size 1, which theory predicts. A number: one change with this step size. A function, or
                a name in ``lightning_gif.STRATEGIES``: a strategy, see :mod:`lightning_gif.unlearning.strategies`.
                :class:`~lightning_gif.unlearning.goals.Goal` describes the goals.
            targets: As in :meth:`influence`; ``"batch"`` by default, because neurons should be ranked on the forget
                examples.
            dataloader: A loader of the training data; by default the one of ``fit``.
            refresh_statistics: Whether to recompute the running means and variances of BatchNorm over the retained and
                corrected data, since the forget examples contributed to them. They become a part of the edit, so that
                undo restores them. ``False`` by default.
            dry_run: Whether to compute and measure the edit without applying it; ``report.apply()`` does that later.
                Logs and the audit log call it a dry run. ``False`` by default.
            record: The audit log; by default the one of the callback. ``False`` records nothing.
            solves_to: A folder to which each solved change is written. After an interruption, the same call solves only
                for the missing changes. A call with other weights, settings or data raises an error. A change of a
                registered function is not noticed if its name stays the same. A dry run leaves the folder for the call
                that applies the edit, which removes it. By default nothing is written.
            tuning: Tuned numbers other than the defaults, see :class:`~lightning_gif.unlearning.Tuning`.
            name: The name of the edit in logs, such as ``"wrong eights"``. Each name has its own keys,
                ``gif_unlearn/NAME/…``. By default there is no name.
            **overrides: As in :meth:`influence`.

        Returns:
            The report, with the edit, the losses before and after it, ``undo()`` and ``save()``. Edits add up: each
            starts from the weights after the previous one. Undo them in reverse order.

        Raises:
            RecordError: If the audit log is damaged or cannot be written.
            GIFError: As in :meth:`influence`. The weights are then unchanged.
        """
        trainer = self._bound_to
        log = self.record if record is None else None if record is False else record
        check_path("record", log, "file")
        check_path("solves_to", solves_to, "folder")
        folder = None if solves_to is None else Path(solves_to)
        requested = check_names(self.settings.override(overrides, keywords(self.unlearn)))
        settings = for_unlearning(requested)
        matching = for_matching(requested, selects=targets != "batch" or _are_on_targets(None, overrides))
        check_step(step)
        check_tuning(tuning)
        check_log_name(name)
        with self.open_session(settings, targets, dataloader, overrides) as session:
            _check_files(trainer, session.objective.processes, log, folder)
            forget = session.forget(batch)
            session.check_curvature(settings.curvature)
            _check_loaders(retain=retain, unseen=unseen or None)
            unseen_examples, why_not_unseen = session.unseen(unseen)
            report = unlearn(
                session.objective,
                session.train,
                forget,
                settings,
                partial(session.choose_targets, forget, targets),
                relabel=relabel,
                retain=None if retain is None else session.examples(retain),
                unseen=unseen_examples,
                why_not_unseen=why_not_unseen,
                step=step,
                matching=matching,
                training=self.tracker.length,
                snapshots=self.tracker.snapshots.chosen(),
                refresh_statistics=refresh_statistics,
                solves_to=folder,
                tuning=tuning,
                context=self._edit_context(session, settings, log, dataloader),
            )
        report.settings.update({} if name is None else {"name": name})
        report.settings.update({"dry_run": True} if dry_run else {})
        of_classes = [(one.labels, one.predicted_before) for one in report.outcomes.values()]
        warn_of_missing_names(report.class_names, *(labels for pair in of_classes for labels in pair))
        _apply(trainer, report, folder, dry_run)  # last, because without its report an edit cannot be undone
        return report

    def _context(self, session: Session) -> CallContext:
        """The context of a report, with the names of the classes: the given ones, or else those of the data."""
        trainer, names = self._bound_to, self.class_names
        if names is None:
            names = find_class_names(getattr(trainer, "datamodule", None), session.train.dataset)
        return replace(_context(trainer, names), vocabulary=self.vocabulary)

    def _edit_context(
        self,
        session: Session,
        settings: Settings,
        record: str | os.PathLike[str] | None,
        dataloader: DataLoader[Any] | None,
    ) -> EditContext:
        """The trainer, the model, the audit log and the events, for the report of an edit."""
        trainer = self._bound_to
        return EditContext(
            **vars(self._context(session)),
            module=trainer.lightning_module,
            record=record,
            has_optimizer=bool(trainer.optimizers),
            reopen=partial(self._reopened, settings, dataloader),
            logs=self.log_reports and not trainer.fast_dev_run,
            events=self.events,
            moment=partial(_moment, trainer),
        )

    def bind(self, trainer: Trainer) -> None:
        """Makes the calls on a trainer, and adds them to it as its methods."""
        self._trainer = trainer
        calls = CallsOf(self, trainer)
        trainer.influence, trainer.self_influence = calls.influence, calls.self_influence
        trainer.validate_influence, trainer.unlearn = calls.validate_influence, calls.unlearn
        trainer.store_gradients = calls.store_gradients


class CallsOf(TrainerCalls):
    """The calls of a callback on one trainer, also after the callback was given to another one.

    Args:
        callback: The callback. Its attributes are those of this object.
        trainer: The trainer.
        **changes: Attributes that differ from those of the callback.
    """

    def __init__(self, callback: TrainerCalls, trainer: Trainer, **changes: Any) -> None:
        vars(self).update(changes, _callback=callback, _trainer=trainer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also where `_callback` is missing yet, when this object is unpickled
            raise AttributeError(name)
        return getattr(self._callback, name)

    def __repr__(self) -> str:
        return f"{type(self._trainer).__name__}"


def _moment(trainer: Trainer) -> tuple[int, int]:
    """The numbers of a trainer's epochs and optimizer steps."""
    return trainer.current_epoch, trainer.global_step


def check_path(name: str, path: Any, kind: str, *, optional: bool = True) -> None:
    """Checks that an argument is a path, or ``None`` if it is optional.

    Raises:
        ConfigurationError: If it is not.
    """
    given = isinstance(path, (str, os.PathLike)) and bool(os.fspath(path))
    if not given and not (optional and path is None):
        raise ConfigurationError(f"`{name}` must be the path of a {kind}{', or None' * optional}, got {path!r}.")


def _check_keep(keep: Any, k: int, scores_to: Any) -> None:
    """Checks the argument ``keep`` of a call that shows ``k`` examples."""
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < k):
        raise ConfigurationError(
            f"`keep` must be None or a whole number of at least k={k}, the number of shown examples, got {keep!r}. To"
            " keep fewer, pass a smaller `k`, too."
        )
    if keep is not None and scores_to is not None:
        raise ConfigurationError(
            "`scores_to` writes all scores, but `keep` keeps only the highest and lowest. Give only one of them."
        )


def _check_stored(store: Any, given: Mapping[str, Any], **of_data: Any) -> None:
    """Checks the arguments of a call that takes its training examples from a store."""
    check_path("store", store, "folder")
    for argument, value in of_data.items():
        if value:
            raise ConfigurationError(
                f"`{argument}={value}` cannot be given with `store`, because it needs the training examples, which the"
                " call does not read. Omit one of the two."
            )
    others = [name for name, value in given.items() if value is not None and name not in _OF_STORED]
    if others:
        raise ConfigurationError(
            f"{', '.join(f'`{name}`' for name in others)} cannot be given with `store`, which has the settings that it"
            " was written with. Omit them, or write another store with them."
        )


def _check_through(through: Any, leave_outs: Any, given: Mapping[str, Any]) -> None:
    """Checks the arguments of a call through training."""
    check_count("leave_outs", leave_outs, least=0)
    if through != "training":
        if through is None:
            raise ConfigurationError(
                "`leave_outs` replays a recorded run, so it needs through='training'. Pass both, or omit `leave_outs`."
            )
        raise ConfigurationError(f"`through` must be 'training' or None, got {through!r}.")
    others = [name for name, value in given.items() if value is not None and name not in _OF_REPLAYS]
    if others:
        raise ConfigurationError(
            f"{', '.join(f'`{name}`' for name in others)} cannot be given with `through`. Of the settings, it"
            f" takes only {', '.join(f'`{name}`' for name in _OF_REPLAYS)}. Omit the others, or omit `through`."
        )


def check_record(path: Any) -> None:
    """Checks that an entry can be added to an audit log, before an edit is computed."""
    if path is None:
        return
    if os.path.isdir(path):
        raise ConfigurationError(f"`record` must be a file, but {os.fspath(path)!r} is a folder.")
    if os.path.exists(path):
        check_whole(read(path), path)


def _check_files(trainer: Trainer, processes: ProcessGroup, record: Any, folder: Path | None) -> None:
    """Checks that all processes are given the same files, and that rank 0 can write them."""
    paths = [None if path is None else os.fspath(path) for path in (record, folder)]
    processes.assert_equal(paths, "record and solves_to", "Make the same call on all of them.")
    if trainer.is_global_zero:
        check_record(record)
        if folder is not None:
            Journal.check(folder)


def _check_loaders(**loaders: Any) -> None:
    for name, given in loaders.items():
        if given is not None and not isinstance(given, (DataLoader, Dataset)):
            raise ConfigurationError(
                f"`{name}` must be a DataLoader or a Dataset, got {type(given).__name__}. By default, `retain` is the"
                " rest of the training data, and `unseen` is the validation data of `fit`."
            )


def _check_one_process(trainer: Trainer) -> None:
    """Checks that a trainer has one process. Models that ``retrain`` trains cannot share a process group with it."""
    if trainer.world_size > 1:
        raise ConfigurationError(
            "trainer.validate_influence trains other models, which it cannot do inside of a distributed run; the"
            f" trainer has {trainer.world_size} processes. Use one: load a checkpoint, and call"
            " lightning_gif.attach(Trainer(devices=1), model, …). `retrain` may start processes of its own, such as a"
            " script under torchrun, and load the checkpoint that they write."
        )


def _check_only_measuring(given: Mapping[str, Any]) -> None:
    """Checks that arguments do not ask for other scores than those of a given report."""
    others = [name for name, value in given.items() if value is not None and name not in _OF_MEASURING]
    if others:
        raise ConfigurationError(
            f"`report` has the scores already, but {', '.join(f'`{name}`' for name in others)} would change how they"
            " are computed. Pass them to trainer.influence, or omit `report`."
        )


def _are_on_targets(targets: TargetsChoice | None, overrides: Overrides) -> bool:
    """Whether the arguments of a call restrict scores to target parameters, apart from ``method``."""
    return targets is not None or not overrides.keys().isdisjoint(("selector", "ratio"))


def _snapshot_states(tracker: TrainingTracker, wanted: bool | None) -> dict[int, dict[str, Tensor]]:
    """The snapshots of training by epoch.

    Args:
        tracker: It has the snapshots.
        wanted: ``False`` for none, and ``None`` for those that there are.

    Raises:
        ConfigurationError: If they are wanted, but there are none, or if ``wanted`` is a number.
    """
    if wanted is not None and not isinstance(wanted, bool):
        raise ConfigurationError(
            f"`snapshots` of a call must be True, False or None, got {wanted!r}. How many snapshots a fit keeps is set"
            " by GIFCallback(snapshots=3)."
        )
    states = {} if wanted is False else tracker.snapshots.chosen()
    if wanted and not states:
        raise ConfigurationError(
            "snapshots=True needs snapshots of the weights, but there are none. Fit with GIFCallback(snapshots=1), or"
            " load a checkpoint of such a fit with that callback. A fit of one epoch has no snapshots, only the final"
            " weights."
        )
    return states


def _folder_for_scores(trainer: Trainer) -> Path | None:
    """The folder for scores that take much memory; ``None`` if they are kept in memory in any case.

    This is so during training, because each report would leave another folder, and if ``default_root_dir`` is not on a
    local disk.
    """
    root = str(trainer.default_root_dir)
    return None if trainer.training or "://" in root else Path(root) / _SCORES_FOLDER


def _apply(trainer: Trainer, report: UnlearnReport, folder: Path | None, dry_run: bool) -> None:
    """Applies, records and logs an edit, and removes the folder of its solves.

    If that fails, the weights are unchanged. A dry run is only recorded and logged.
    """
    if dry_run:
        report.change("dry_run")
        return
    try:
        report.change("unlearn")
        if folder is not None and trainer.is_global_zero:
            with uninterrupted():
                Journal.clear(folder)
    except BaseException:
        if report.processes.size == 1 and report.edit.is_in(trainer.lightning_module):
            report.undo()
        raise


def _context(trainer: Trainer, class_names: Sequence[str] | None = None) -> CallContext:
    """The trainer's loggers, progress and process group, and the names of the classes, for a report."""
    processes = ProcessGroup.of(trainer)
    epoch = trainer.current_epoch
    return CallContext(list(trainer.loggers), trainer.global_step, processes, class_names, epoch=epoch)


def _finish(report: InfluenceReport, session: Session, name: str | None, measured: Examples | None) -> None:
    """Names a report, and reads what it shows while the session is open; also the losses of ``measured`` if given."""
    if measured is not None:
        values, order = session.objective.all_losses(measured).double().cpu(), measured.ids.argsort()
        report.losses = values[order[torch.searchsorted(measured.ids[order], report.indices)]]
    report.settings.update({} if name is None else {"name": name})
    report.read_shown(session.train.ids)
    shown = torch.tensor([query.label for query in report.queries if isinstance(query.label, int)])
    warn_of_missing_names(report.class_names, report.labels, shown)
    if session.train.are_absent:
        return
    if any(report.processes.gather(bool(report.loggers))):  # a trainer may have loggers in one process only
        report.context.predicted = labels_at(session.objective, session.train, report.strongest())


def _logged(trainer: Trainer, report: _Report, log: bool) -> _Report:
    """Logs a report if ``log`` is true, and returns it."""
    if log and trainer.is_global_zero and not trainer.fast_dev_run:
        report.log()
    return report
