"""The callback: it gathers statistics in training, picks target parameters, and adds three methods to the trainer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import Unpack, override

from ._compat import Callback, LightningModule, Trainer, attach_model, rank_zero_warn, unsupported_strategy
from .attribution.influence import influence
from .attribution.periodic import HISTORY_COLUMNS, PeriodicReports
from .attribution.report import InfluenceReport
from .attribution.self_influence import self_influence
from .config import AUTO, Overrides, Settings, check_count
from .data.structure import describe
from .defaults import check_names, for_influence, for_unlearning
from .distributed import ProcessGroup
from .errors import ConfigurationError, GIFWarning
from .objective.objective import Objective
from .parameters import Targets
from .reporting.context import CallContext
from .reporting.loggers import log_table
from .selection import GradientStatistics, NeuronStatistics
from .selection.tracker import TrainingTracker, target_metrics
from .session import Loaders, TargetsChoice, open_session
from .storage.audit_log import check_whole, read
from .storage.interrupts import uninterrupted
from .unlearning.journal import Journal
from .unlearning.record import EditContext
from .unlearning.report import UnlearnReport
from .unlearning.tuning import Tuning
from .unlearning.unlearn import Step, check_step, check_tuning, unlearn

__all__ = ["GIFCallback", "attach"]

_CHECKPOINT_KEY = "lightning_gif"

_SCORES_FOLDER = "lightning_gif_scores"

_Report = TypeVar("_Report", InfluenceReport, UnlearnReport)


class GIFCallback(Callback):
    """Adds ``trainer.influence``, ``trainer.self_influence`` and ``trainer.unlearn`` to a trainer.

    During ``fit`` the callback gathers statistics from the forward and backward passes of training: the mean output and
    the mean output gradient of every Linear and Conv neuron, by class, and the mean squared gradient of every
    parameter. At the end of each epoch it uses them to pick the *target parameters*, which are the parameters that an
    edit may change.

    Training is bit for bit the same as without the callback. The exception is a compiled module: hooks split its graph,
    which changes rounding, unless ``cache_neurons=False``. An error in gathering never ends a fit. It causes a warning,
    and gathering stops.

    The trainer has the methods from ``setup`` on. They work during ``fit`` and after it. They also work after
    ``validate`` or ``test`` with a checkpoint that holds the targets. For a model that was trained elsewhere, see
    :func:`attach`. Apart from the requested edit, they change nothing: weights, buffers, gradients, train and eval
    modes, random generators, metrics, logged values and loaders stay the same.

    Example::

        trainer = Trainer(callbacks=[GIFCallback()], logger=WandbLogger())
        trainer.fit(model, datamodule=data)
        print(trainer.influence(batch))    # which training examples raised or lowered the loss on this batch
        report = trainer.unlearn(batch)    # as if the model had not seen the batch
        report.undo()                      # restores the weights bit for bit

    Args:
        selector: How target parameters are picked in each layer. ``"highest_k_gradients"`` (default),
            ``"highest_k_outputs"``, ``"lowest_k_gradients"``, ``"lowest_k_outputs"``, ``"exclusive_k_gradients"``,
            ``"exclusive_k_outputs"``, ``"random"`` and ``"threshold"`` are the selectors of the GIF paper.
            ``"largest_gradients"`` picks single entries. You can register your own in ``lightning_gif.SELECTORS``.
            Selectors rank the neurons of Linear and Conv layers. If these have less than half of the parameters that
            ``ratio`` asks for, the units of all other parameters are ranked as well, by their gradients. To pick
            parameters yourself, pass names or patterns, such as ``["head.*", "*.norm.weight"]``. All entries of the
            parameters that match become targets.
        ratio: The share of each layer's parameters that become targets, in (0, 1]; at most 0.5 for the ``exclusive_k``
            selectors. With a larger share an edit can do more, but changes more of the model.
        method: Which linear system is solved. ``"gif"`` changes the targets to cancel the gradient on all parameters.
            ``"fif"`` ignores all other parameters. ``"if"`` is the full influence function on all parameters, and
            ``"pif"`` is its part on the targets. ``"sif"`` is the second-order influence of a group on all
            parameters; it is for ``unlearn`` only. ``"auto"`` (default) predicted retraining best in the benchmarks:
            ``"gif"`` for edits, ``"if"`` for scores, and ``"fif"`` for scores if a call restricts them to targets. The
            later solves of an edit can be damped Newton steps on the targets instead, for every method.
        solver: The algorithm for the linear system. ``"lsmr"``, ``"cgls"``, ``"lissa"``, ``"plain_lissa"``,
            ``"stochastic_lissa"`` and ``"dense"`` (small networks) accept any curvature. ``"cg"`` and ``"nystrom"``
            need a symmetric curvature without negative eigenvalues. ``"cg"`` takes one product per iteration.
            ``"nystrom"`` takes as many products for many queries as for one. You can register your own solver in
            ``lightning_gif.SOLVERS``. ``"auto"`` (default): for scores ``"cg"``, or ``"nystrom"`` for 13 queries or
            more. ``"lsmr"`` for edits, for ``"gif"``, and with the Hessian.
        damping: The damping λ, in the unit of the curvature's eigenvalues. Every solver adds it to the eigenvalues of
            the Gauss–Newton matrix. With ``"gif"`` and with the Hessian, ``‖Ax − g‖² + λ²‖x‖²`` is minimised instead,
            where an eigenvalue ``c`` counts as ``√(c² + λ²)``. More damping gives smaller and more cautious results.
            ``None`` (default): for scores a thousandth of the largest eigenvalue (three extra products); for
            ``"gif"`` and edits 0. The first label-correction solves of a classifier use ``‖Aᵀg‖ / (5‖g‖)`` (one extra
            product), and more after a rejected step. The values used are in ``report.solution.damping`` and
            ``report.solves[i]["damping"]``.
        max_iter: The largest number of iterations of one solve; for ``"nystrom"`` the rank of the sketch. An iteration
            takes two Hessian-vector products, or one for ``"cg"`` and Newton steps. Fewer iterations regularise.
            ``None`` (default): 200 if ``rtol`` is given. Otherwise 20 for scores by ``"cg"``, at most 512 by
            ``"nystrom"``, and 10 for the influence direction of an edit. Each later solve of an edit takes 5, or 8
            for label correction.
        rtol: The relative residual of the normal equations at which a solve has converged, between 0 and 1. Directions
            of small curvature contribute little to the residual; a smaller ``rtol`` follows them further. ``None``
            (default): 1e-3 for the scores of ``"gif"``; otherwise a solve ends after ``max_iter`` iterations.
        discrepancy: A solve also ends if ``‖Ax − g‖ ≤ discrepancy · ‖g‖``. Set it to the relative error of ``g``.
            0 (default) never ends a solve.
        curvature: ``"hessian"``, or ``"ggn"`` for the generalised Gauss–Newton matrix. The latter leaves out the
            curvature of the model itself, is positive semi-definite for convex losses, and costs less per product. It
            needs a ``training_step`` that passes predictions to a loss function of PyTorch, a softmax, a sigmoid or a
            difference. ``"auto"`` (default): ``"ggn"`` for scores and for label correction if the predictions are
            available, otherwise ``"hessian"``.
        curvature_examples: The largest number of training examples over which the curvature is taken, and on which
            neurons are ranked. ``None`` takes all. ``"auto"`` (default): 2048, or 1024 for the curvature if a class is
            forgotten. More examples make scores more accurate, and cost proportionally more.
        curvature_sampling: How these examples are drawn. ``"random"`` (default) draws uniformly. ``"balanced"`` draws
            the same number of each class. ``"features"`` and ``"logits"`` draw examples whose features or logits
            are distributed as in each whole class. You can register your own sampler in ``lightning_gif.SAMPLERS``.
        weight_decay: The weight w of the term ``(w/2)‖θ‖²``, if training minimised it together with the loss; 0 by
            default. Set it to the ``weight_decay`` of ``SGD`` or ``Adam``. Leave it at 0 for ``AdamW``, which decays
            outside the loss.
        eigenvalues: The number of eigenvalues to estimate at each end of the curvature's spectrum, together with the
            share of negative eigenvalues. 0 (default) for none. It takes 60 or more products in addition to the solve.
        batch_size: The number of examples in one pass of the computations; 256 by default. A larger value is faster,
            and needs more memory.
        memory: The GiB that may be used to keep intermediate results between the products of a solve, which saves
            time. ``None`` (default): a quarter of the free memory. A sketch (``"nystrom"``) that does not fit into
            ``memory``, or into the free memory for ``None``, raises an error. Results never depend on it.
        double: Whether to compute in float64; ``False`` by default. Use it if a solve ends as ``stalled``.
        unconverged: What happens if a solve ends before it reaches ``rtol``, or if ``"cg"`` meets negative curvature:
            ``"warn"`` (default), ``"raise"`` or ``"ignore"``.
        cache_neurons: Whether to gather the statistics of neurons; ``True`` by default. They take 8 bytes for each
            neuron and class. Without them, pass ``targets="batch"`` to calls.
        cache_gradients: Whether to gather the mean squared gradients; ``True`` by default. They take 4 bytes for each
            parameter. Only ``selector="largest_gradients"`` uses them.
        cache_steps: The approximate number of optimizer steps of an epoch, spread evenly, at which statistics are
            gathered; 64 by default. More steps slow training. ``None`` gathers at every step. Every step is also used
            in epochs with fewer steps or of unknown length.
        snapshots: The number of snapshots for ``trainer.influence(…, snapshots=True)``; 0 by default. They are spread
            over the last two thirds of the epochs. Up to twice as many copies of the weights take CPU memory, and
            space in checkpoints.
        log_reports: Whether to log each report, and the targets of each epoch, to the trainer's loggers; ``True`` by
            default.
        report_every_n_epochs: Compute and log an influence report for ``query`` at the end of every n-th epoch of
            ``fit``. ``None`` (default) for no reports. W&B also gets a table ``gif/influence/history`` with the
            proponents and opponents of all reports, which shows when examples become influential. A report takes about
            as long as an epoch: 20 products over ``curvature_examples``, and a pass over the training data that costs
            about three forward passes. :attr:`last_report` is the latest report.
        query: The query of these reports: a batch or a ``DataLoader``, as in :meth:`influence`. If it does not fit the
            model or the training data, a warning says so before training, and there are no reports in that fit.
        report_options: Arguments of :meth:`influence` for these reports, such as ``{"k": 20, "among": indices}``. With
            fewer examples in ``among``, a report is cheaper.
        seed: The seed of all random draws of the computations; 0 by default.
        record: The audit log: a file, such as ``"deletions.jsonl"``, that gets an entry for each edit that is applied
            or undone. It is created if it does not exist; see :func:`~lightning_gif.verify`. An edit that cannot be
            recorded is not applied. ``None`` (default) records nothing.

    Raises:
        ConfigurationError: If a value is out of range or a name is unknown. It is a ``MisconfigurationException``.
    """

    # Many arguments instead of one object, because LightningCLI reads a flat list of options from the signature.
    def __init__(
        self,
        selector: str | list[str] = "highest_k_gradients",
        ratio: float = 0.1,
        method: str = AUTO,
        solver: str = AUTO,
        damping: float | None = None,
        max_iter: int | None = None,
        rtol: float | None = None,
        discrepancy: float = 0.0,
        curvature: str = AUTO,
        curvature_examples: int | Literal["auto"] | None = "auto",
        curvature_sampling: str = "random",
        weight_decay: float = 0.0,
        eigenvalues: int = 0,
        batch_size: int = 256,
        memory: float | None = None,
        double: bool = False,
        unconverged: Literal["warn", "raise", "ignore"] = "warn",
        cache_neurons: bool = True,
        cache_gradients: bool = True,
        cache_steps: int | None = 64,
        snapshots: int = 0,
        log_reports: bool = True,
        report_every_n_epochs: int | None = None,
        query: Any = None,
        report_options: Mapping[str, Any] | None = None,
        seed: int = 0,
        record: str | None = None,
    ) -> None:
        arguments = locals()
        super().__init__()
        self.settings = check_names(Settings(**{field.name: arguments[field.name] for field in fields(Settings)}))
        check_count("cache_steps", cache_steps, optional=True)
        self.cache_neurons = cache_neurons
        self.cache_gradients = cache_gradients
        self.cache_steps = cache_steps
        self.log_reports = log_reports
        self.report_every_n_epochs = report_every_n_epochs
        self.query = query
        self.report_options = dict(report_options or {})
        self.record = record
        self.tracker = TrainingTracker(self.settings, snapshots)
        self.reports = PeriodicReports()
        self.loaders = Loaders()
        self._state_key: tuple[Settings, str] | None = None  # and the settings that it was made from
        _check_report_arguments(self)
        _check_path("record", record, "file")
        _check_record(record)

    # ----------------------------------------------------------------------------------------------------------------
    # Training, in the order of the hooks
    # ----------------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adds the methods to the trainer.

        Raises:
            ConfigurationError: If the trainer or the module is not supported.
        """
        _check_trainer(trainer, self)
        if stage == "fit":
            Objective.check_module(pl_module)
        self.bind(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds hooks to the layers, and checks the query of the reports, so that a warning comes before training."""
        self.tracker.start_fit(pl_module)
        self.loaders.train = trainer.train_dataloader
        if self.report_every_n_epochs is not None:
            self.reports.start(partial(self._check_query, trainer))
        if self.cache_neurons:
            self.tracker.attach(pl_module)

    def _check_query(self, trainer: Trainer) -> None:
        with open_session(trainer, self.tracker, self.loaders, self.settings, "batch") as session:
            session.objective.check(session.examples(self.query), "query", measured=True)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clears the statistics. Lightning does not call this hook for an epoch that is resumed."""
        self.loaders.remember(trainer)
        self.tracker.start_epoch()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts recording the batch, if statistics are gathered at its optimizer step."""
        self.tracker.start_batch(trainer, batch, batch_idx, neurons=self.cache_neurons, steps=self.cache_steps)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Reads the gradients: accumulated over micro-batches, unscaled, and not yet clipped."""
        if self.cache_gradients:
            self.tracker.add_gradients(pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pauses the hooks, because passes before the next batch, such as validation, are not training."""
        self.tracker.neurons.pause()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Picks and logs the targets, takes a snapshot, and computes a report if one is due."""
        previous, epoch = self.targets, trainer.current_epoch
        with self.tracker.guard("picking the target parameters"):
            picked = self.tracker.end_epoch(pl_module, epoch, ProcessGroup.of(trainer))
            if picked and self.targets is not None and self.log_reports:
                values = target_metrics(self.targets, previous, pl_module)
                # The values are equal on all processes, but Lightning warns about each one without sync_dist.
                several = trainer.world_size > 1
                pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=several, batch_size=1)
        self.tracker.take_snapshot(epoch, pl_module)
        every = self.report_every_n_epochs
        if every is not None and (epoch + 1) % every == 0:
            ask = partial(self.influence, trainer, self.query, **self.report_options)
            if self.reports.make(epoch, ask) and self.log_reports:
                table = "gif/influence/history", HISTORY_COLUMNS, self.reports.history
                _log(trainer, lambda logger: log_table([logger], *table))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the hooks, and stores the loaders, because ``trainer.test`` removes them from the trainer."""
        self.loaders.remember(trainer)
        self.tracker.detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the hooks, because ``teardown`` does not run after an exception."""
        self.tracker.abandon_epoch()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the hooks."""
        self.tracker.detach()

    # ----------------------------------------------------------------------------------------------------------------
    # State
    # ----------------------------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        # Lightning asks for it at each hook of each batch.
        if self._state_key is None or self._state_key[0] is not self.settings:
            of = self.settings
            key = self._generate_state_key(selector=of.selector, ratio=of.ratio, seed=of.seed)
            self._state_key = of, key
        return self._state_key[1]

    @override
    def state_dict(self) -> dict[str, Any]:
        """The epoch of the current targets, and the proponents and opponents of the reports so far."""
        return {"targets_epoch": self.targets_epoch, "history": [list(row) for row in self.reports.history]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned. A state of another version may lack values."""
        self.tracker.targets_epoch = state_dict.get("targets_epoch")
        self.reports.history = [list(row) for row in state_dict.get("history", [])]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds targets, statistics and snapshots to the checkpoint, in a form that ``weights_only=True`` can load.

        All processes must save together, as Lightning requires, because the statistics are summed over them.
        """
        with self.tracker.guard("adding the state of GIFCallback to a checkpoint"):
            checkpoint[_CHECKPOINT_KEY] = self.tracker.state(self.state_key, ProcessGroup.of(trainer))

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores statistics, snapshots and targets. If the selection has changed, targets are picked again."""
        if checkpoint.get(_CHECKPOINT_KEY) is not None:
            self.tracker.load_state(checkpoint[_CHECKPOINT_KEY], pl_module, self.state_key)

    @property
    def neurons(self) -> NeuronStatistics:
        """The statistics of neurons from the current or last epoch of ``fit``."""
        return self.tracker.neurons

    @property
    def gradients(self) -> GradientStatistics:
        """The mean squared gradients from the current or last epoch of ``fit``."""
        return self.tracker.gradients

    @property
    def targets(self) -> Targets | None:
        """The cached target parameters, or ``None`` if none were picked."""
        return self.tracker.targets

    @property
    def targets_epoch(self) -> int | None:
        """The epoch at whose end :attr:`targets` were picked, or ``None``."""
        return self.tracker.targets_epoch

    @property
    def last_report(self) -> InfluenceReport | None:
        """The last report that was computed during ``fit``, or ``None``."""
        return self.reports.last

    # ----------------------------------------------------------------------------------------------------------------
    # The methods of the trainer
    # ----------------------------------------------------------------------------------------------------------------

    def influence(
        self,
        trainer: Trainer,
        batch: Any,
        *,
        k: int = 10,
        per_example: bool = False,
        targets: TargetsChoice | None = None,
        among: Sequence[int] | Callable[[Any], Tensor] | None = None,
        scores_to: str | os.PathLike[str] | None = None,
        keep: int | None = None,
        snapshots: bool = False,
        dataloader: DataLoader[Any] | None = None,
        **overrides: Unpack[Overrides],
    ) -> InfluenceReport:
        """Scores every training example by how removing it would change the model's loss on a batch.

        Bound to the trainer as ``trainer.influence(batch, …)``. A score is the predicted change of the loss, in the
        unit of the loss. It is positive for a proponent: removing the example would raise the loss. It is negative for
        an opponent: removing the example would lower the loss.

        Args:
            trainer: The trainer; ``trainer.influence`` fills it in.
            batch: The query: a batch as the training loader yields them, or a ``DataLoader``. Its mean loss is
                attributed, or the mean of ``influence_measurement`` if the module overrides it.
            k: The number of proponents, and of opponents, that are shown and logged; 10 by default.
            per_example: Whether each example of the batch is a query of its own. By default the query is their mean.
            targets: The parameters that scores are restricted to; by default all parameters are used. ``"cached"``: the
                targets picked at the end of the last epoch. ``"class"``: neurons are ranked by the training statistics
                of the batch's classes. ``"batch"``: neurons are ranked on the batch, as in the GIF paper. If
                ``selector``, ``ratio`` or a method with targets is given, the default is ``"cached"``.
            among: The training examples to score: dataset indices, or a function from a batch to one truth value for
                each of its examples. By default all. The scores of an example do not depend on this choice.
            scores_to: A folder to which scores are written as they are computed, if they do not fit into memory. After
                an interruption, the same call computes only the missing scores. A call with other weights, queries,
                settings or data raises an error (data are compared by index and by the contents of 64 examples). By
                default, scores are kept in memory. If they take more than half of ``memory``, a folder below the
                trainer's ``default_root_dir`` is used, and a message names it.
            keep: Keep only this many of the highest, and of the lowest, scores of each query; at least ``k``. By
                default all scores are kept. Use it for many queries.
            snapshots: Whether to average the scores over the current weights and the snapshots of training. This
                predicts retraining better, and costs a solve and a scoring pass for each snapshot.
            dataloader: A loader of the training data; by default the one of ``fit``.
            **overrides: Arguments of the constructor to change for this call: those from ``selector`` to
                ``unconverged``, and ``seed``.

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
        requested = check_names(self.settings.override(overrides, _keywords(self.influence)))
        check_count("k", k)
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < k):
            raise ConfigurationError(
                f"`keep` must be None or a whole number of at least k={k}, the number of shown examples, got {keep!r}."
            )
        if keep is not None and scores_to is not None:
            raise ConfigurationError(
                "`scores_to` writes all scores, but `keep` keeps only the highest and lowest. Give only one of them."
            )
        states = _snapshot_states(self.tracker, snapshots)
        choice: TargetsChoice = "cached" if targets is None else targets
        on_targets = _are_on_targets(targets, overrides)
        settings = for_influence(requested, ggn=True, on_targets=on_targets)
        spill_to = _folder_for_scores(trainer)  # inside a session every trainer is in training
        with open_session(trainer, self.tracker, self.loaders, settings, choice, dataloader, overrides) as session:
            scored, query = session.among(among), session.examples(batch)
            report = influence(
                session.objective,
                session.train,
                query,
                session.influence_settings(requested, on_targets=on_targets, queries=len(query) if per_example else 1),
                partial(session.choose_targets, query, choice),
                per_example=per_example,
                among=scored,
                scores_to=None if scores_to is None else Path(scores_to),
                spill_to=spill_to,
                keep=keep,
                states=states,
                k=k,
                context=_context(trainer),
            )
        return _logged(trainer, report, self.log_reports)

    def self_influence(
        self,
        trainer: Trainer,
        *batch: Any,
        k: int = 10,
        targets: Literal["cached"] | None = None,
        among: Sequence[int] | Callable[[Any], Tensor] | None = None,
        snapshots: bool = False,
        dataloader: DataLoader[Any] | None = None,
        **overrides: Unpack[Overrides],
    ) -> InfluenceReport:
        """Scores every training example by how removing it would change the model's loss on that example.

        Bound to the trainer as ``trainer.self_influence(…)``. A high score means that the model had to memorize the
        example. Look there first for wrong labels, for duplicates with other labels, and for data unlike the rest.

        Args:
            trainer: The trainer; ``trainer.self_influence`` fills it in.
            *batch: Not accepted. To score some examples only, pass ``among``.
            k: The number of examples with the highest, and with the lowest, scores that are shown and logged; 10 by
                default.
            targets: ``"cached"`` restricts scores to the cached targets; by default all parameters are used, see
                :meth:`influence`.
            among: As in :meth:`influence`.
            snapshots: As in :meth:`influence`, at the cost of a sketch and a pass for each snapshot. With snapshots,
                scores also show wrong labels that are fully memorized at the end of training.
            dataloader: As in :meth:`influence`.
            **overrides: As in :meth:`influence`. With more than 1024 parameters, ``max_iter`` is the rank of a sketch,
                64 by default. A higher rank makes the size of scores more accurate; their order hardly changes.

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
        requested = check_names(self.settings.override(overrides, _keywords(self.self_influence)))
        check_count("k", k)
        on_targets = _are_on_targets(targets, overrides)
        settings = for_influence(requested, ggn=True, on_targets=on_targets)
        choice: TargetsChoice = "cached" if targets is None else targets
        with open_session(trainer, self.tracker, self.loaders, settings, choice, dataloader, overrides) as session:
            report = self_influence(
                session.objective,
                session.train,
                session.influence_settings(requested, on_targets=on_targets, queries=len(session.train), itself=True),
                partial(session.choose_targets, session.train, "cached"),
                among=session.among(among),
                states=states,
                k=k,
                context=_context(trainer),
            )
        return _logged(trainer, report, self.log_reports)

    def unlearn(
        self,
        trainer: Trainer,
        batch: Any,
        *,
        relabel: Tensor | int | Callable[[Any], Tensor] | None = None,
        retain: DataLoader[Any] | None = None,
        unseen: DataLoader[Any] | Literal[False] | None = None,
        step: Step = "relinearise",
        targets: TargetsChoice = "batch",
        dataloader: DataLoader[Any] | None = None,
        refresh_statistics: bool = False,
        dry_run: bool = False,
        record: str | os.PathLike[str] | Literal[False] | None = None,
        solves_to: str | os.PathLike[str] | None = None,
        tuning: Tuning | None = None,
        **overrides: Unpack[Overrides],
    ) -> UnlearnReport:
        """Edits the targets so that the model behaves as if trained without some examples, or with other labels.

        Bound to the trainer as ``trainer.unlearn(batch, …)``. Only target parameters change, and BatchNorm statistics
        on request. The state of the optimizer (momentum, averages) still depends on the forgotten data: create a new
        optimizer before you train further.

        Args:
            trainer: The trainer; ``trainer.unlearn`` fills it in.
            batch: The forget examples, with the labels they were trained with. A list, range or array of integers gives
                their dataset indices. A function from a batch to one truth value for each of its examples is called on
                all training data, such as ``lambda batch: batch[1] == 3``. The examples of a batch or a ``DataLoader``
                are looked up in the training data: by dataset index if the loader is over the training dataset or a
                ``Subset`` of it, otherwise by content. All other training examples are retained.
            relabel: The new labels of the forget examples; ``None`` (default) removes the examples. A tensor, an array
                or a list in the order of the batch or of the indices, one label for all, or a function from a batch to
                its new targets. If ``batch`` is a loader, the order is that of its dataset, which may be a ``Subset``.
                If ``batch`` is a function, the order is that of the training dataset.
            retain: A loader of all data to keep; by default the rest of the training data. After earlier edits, pass
                the data that they retained.
            unseen: A loader of examples like the training data that the model was not trained on. An edit gives
                memorized examples losses like those of unseen examples. By default the validation loader of ``fit``, if
                its batches have the structure of training batches, else a note in the report says why not; ``False``
                for none. Fewer than 20 examples are not used. Never pass test data, because unseen data decide how far
                an edit goes.
            step: How far the edit goes. This is decided on the forget, retained and unseen data.
                ``"relinearise"`` (default): up to twelve changes that lower the risk, each solved at the weights after
                the previous one. ``"search"``: one change, with the best step size for the goal. ``"natural"``: one
                change with step size 1, which theory predicts. A number: one change with this step size. A function, or
                a name in ``lightning_gif.STRATEGIES``: a strategy, see :mod:`lightning_gif.unlearning.strategies`.
                :class:`~lightning_gif.unlearning.goals.Goal` describes the goals.
            targets: As in :meth:`influence`; ``"batch"`` by default, because neurons should be ranked on the forget
                examples.
            dataloader: A loader of the training data; by default the one of ``fit``.
            refresh_statistics: Whether to recompute the running means and variances of BatchNorm over the retained and
                corrected data, since the forget examples contributed to them. They become a part of the edit, so that
                undo restores them. ``False`` by default.
            dry_run: Whether to compute and measure the edit without applying or recording it; ``report.apply()`` does
                both later. ``False`` by default.
            record: The audit log; by default the one of the callback. ``False`` records nothing.
            solves_to: A folder to which each solved change is written. After an interruption, the same call solves only
                for the missing changes. A call with other weights, settings or data raises an error. A change of a
                registered function is not noticed if its name stays the same. A dry run leaves the folder for the call
                that applies the edit, which removes it. By default nothing is written.
            tuning: Tuned numbers other than the defaults, see :class:`~lightning_gif.unlearning.Tuning`.
            **overrides: As in :meth:`influence`.

        Returns:
            The report, with the edit, the losses before and after it, ``undo()`` and ``save()``. Edits add up: each
            starts from the weights after the previous one. Undo them in reverse order.

        Raises:
            RecordError: If the audit log is damaged or cannot be written.
            GIFError: As in :meth:`influence`. The weights are then unchanged.
        """
        log = self.record if record is None else None if record is False else record
        _check_path("record", log, "file")
        _check_path("solves_to", solves_to, "folder")
        folder = None if solves_to is None else Path(solves_to)
        settings = for_unlearning(check_names(self.settings.override(overrides, _keywords(self.unlearn))))
        check_step(step)
        check_tuning(tuning)
        with open_session(trainer, self.tracker, self.loaders, settings, targets, dataloader, overrides) as session:
            _check_files(trainer, session.objective.processes, log, folder)
            forget = session.forget(batch)
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
                refresh_statistics=refresh_statistics,
                solves_to=folder,
                tuning=tuning,
                context=EditContext(
                    **vars(_context(trainer)),
                    module=trainer.lightning_module,
                    record=log,
                    has_optimizer=bool(trainer.optimizers),
                ),
            )
        _logged(trainer, report, self.log_reports)
        if not dry_run:  # after everything that can fail, because without its report an edit cannot be undone
            _apply(trainer, report, folder)
        return report

    def bind(self, trainer: Trainer) -> None:
        """Adds the three methods to the trainer."""
        # Partial objects can be pickled with the trainer; lambdas could not.
        trainer.influence = partial(self.influence, trainer)
        trainer.self_influence = partial(self.self_influence, trainer)
        trainer.unlearn = partial(self.unlearn, trainer)


def _keywords(method: Callable[..., Any]) -> list[str]:
    """The names of a method's keyword-only arguments."""
    parameters = inspect.signature(method).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _check_report_arguments(callback: GIFCallback) -> None:
    every, query, options = callback.report_every_n_epochs, callback.query, callback.report_options
    check_count("report_every_n_epochs", every, optional=True)
    if (every is None) != (query is None):
        raise ConfigurationError(
            "`report_every_n_epochs` and `query` must be given together: how often to report, and on which batch. Got"
            f" report_every_n_epochs={every!r} and {'no query' if query is None else 'a query'}."
        )
    if options and every is None:
        raise ConfigurationError("`report_options` needs `report_every_n_epochs`, which was not given.")
    known = _keywords(callback.influence)
    settings = {name: value for name, value in options.items() if name not in known}
    check_names(callback.settings.override(settings, known))  # type: ignore[arg-type]


def _check_path(name: str, path: Any, kind: str) -> None:
    if path is not None and not (isinstance(path, (str, os.PathLike)) and os.fspath(path)):
        raise ConfigurationError(f"`{name}` must be the path of a {kind}, or None, got {path!r}.")


def _check_record(path: Any) -> None:
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
        _check_record(record)
        if folder is not None:
            Journal.check(folder)


def _check_loaders(**loaders: Any) -> None:
    for name, given in loaders.items():
        if given is not None and not isinstance(given, DataLoader):
            raise ConfigurationError(
                f"`{name}` must be a DataLoader, got {type(given).__name__}. By default, `retain` is the rest of the"
                " training data, and `unseen` is the validation data of `fit`."
            )


def _check_trainer(trainer: Trainer, callback: GIFCallback) -> None:
    if any(isinstance(other, GIFCallback) and other is not callback for other in trainer.callbacks):
        raise ConfigurationError(
            "The trainer has several GIFCallbacks, but only one can provide trainer.influence. Keep one. A call can"
            " override its settings: trainer.unlearn(batch, ratio=0.05)."
        )
    reason = unsupported_strategy(trainer)
    if reason is not None:
        raise ConfigurationError(
            f"GIFCallback works on one device, or on several under strategy='ddp', but {reason}. Use 'ddp', or"
            " train without the callback, gather the weights in a checkpoint, and use lightning_gif.attach() on a"
            " Trainer with devices=1."
        )


def _are_on_targets(targets: TargetsChoice | None, overrides: Overrides) -> bool:
    """Whether the arguments of a call restrict scores to target parameters, apart from ``method``."""
    return targets is not None or not overrides.keys().isdisjoint(("selector", "ratio"))


def _snapshot_states(tracker: TrainingTracker, wanted: bool) -> dict[int, dict[str, Tensor]]:
    """The snapshots of training by epoch; empty unless they are wanted.

    Raises:
        ConfigurationError: If they are wanted, but there are none.
    """
    states = tracker.snapshots.chosen() if wanted else {}
    if wanted and not states:
        raise ConfigurationError(
            "snapshots=True needs snapshots of the weights, but there are none. Fit with GIFCallback(snapshots=4), or"
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


def _apply(trainer: Trainer, report: UnlearnReport, folder: Path | None) -> None:
    """Applies and records an edit, and removes the folder of its solves. If that fails, the weights are unchanged."""
    try:
        report.change("unlearn")
        if folder is not None and trainer.is_global_zero:
            with uninterrupted():
                Journal.clear(folder)
    except BaseException:
        if report.processes.size == 1 and report.edit.is_in(trainer.lightning_module):
            report.undo()
        raise


def _context(trainer: Trainer) -> CallContext:
    """The trainer's loggers, step count and process group, for a report."""
    return CallContext(list(trainer.loggers), trainer.global_step, ProcessGroup.of(trainer))


def _logged(trainer: Trainer, report: _Report, log: bool) -> _Report:
    """Logs a report if ``log`` is true, and returns it."""
    if log:
        _log(trainer, lambda logger: report.log([logger]))
    return report


def _log(trainer: Trainer, log: Callable[[Any], None]) -> None:
    """Calls ``log`` with each of the trainer's loggers. An error is only a warning, so that the result is not lost."""
    if trainer.fast_dev_run or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        try:
            log(logger)
        except Exception as error:
            rank_zero_warn(
                f"{type(logger).__name__} failed to log the report, which is returned nevertheless:"
                f" {type(error).__name__}: {error}. To try again, call `report.log([logger])`.",
                category=GIFWarning,
            )


def attach(
    trainer: Trainer,
    model: LightningModule,
    *,
    train_dataloaders: DataLoader[Any] | None = None,
    datamodule: Any = None,
    callback: GIFCallback | None = None,
) -> GIFCallback:
    """Adds ``influence``, ``self_influence`` and ``unlearn`` to a trainer for a model that was trained elsewhere.

    There are no statistics from training, unless the callback's state is loaded from a checkpoint. The first call that
    needs them computes them in one pass over ``curvature_examples`` training examples.

    Args:
        trainer: A trainer, which need not have run.
        model: The trained model.
        train_dataloaders: The training data.
        datamodule: A datamodule with the training data, instead of ``train_dataloaders``.
        callback: The callback to use; by default the one of the trainer, or a new one.

    Returns:
        The callback, which is now among the trainer's callbacks.

    Raises:
        ConfigurationError: If ``trainer`` is not a supported ``Trainer``, ``model`` is not a ``LightningModule``, or
            both kinds of data are given.

    Example::

        model = Classifier.load_from_checkpoint("last.ckpt")
        trainer = Trainer(logger=WandbLogger())
        attach(trainer, model, datamodule=data)
        trainer.unlearn(batch).save("edit.safetensors")
    """
    for name, given, kind in (("trainer", trainer, "Trainer"), ("model", model, "LightningModule")):
        if kind not in (base.__name__ for base in type(given).__mro__):  # of either of Lightning's packages
            actual = f"{type(given).__module__}.{type(given).__qualname__}"
            raise ConfigurationError(f"`{name}` must be a {kind} of Lightning, got a {actual}.")
    if train_dataloaders is not None and datamodule is not None:
        raise ConfigurationError("Give `train_dataloaders` or `datamodule`, not both.")
    present = [one for one in trainer.callbacks if isinstance(one, GIFCallback)]
    callback = callback or (present[0] if present else GIFCallback())
    _check_trainer(trainer, callback)
    ProcessGroup.of(trainer)  # raises an error if the processes of a distributed trainer are not running
    if callback not in trainer.callbacks:
        trainer.callbacks.append(callback)
    callback.tracker.follow(model)
    attach_model(trainer, model, train_dataloaders, datamodule)
    callback.loaders.train, callback.loaders.unseen = train_dataloaders, None
    callback.tracker.ranks_on_demand = True
    callback.bind(trainer)
    return callback
