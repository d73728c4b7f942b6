"""The callback: it gathers statistics in training, picks target parameters, and adds methods to the trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Literal

from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from ._compat import Callback, LightningModule, Trainer, attach_model, rank_zero_warn, unsupported_strategy
from .attribution.periodic import PeriodicReports
from .attribution.report import InfluenceReport
from .calls import Influence, TrainerCalls, check_path, check_record
from .config import AUTO, RATIO, SELECTOR, Settings, check_count
from .data.names import check_class_names, check_vocabulary
from .defaults import check_names
from .distributed import ProcessGroup
from .errors import ConfigurationError, GIFWarning, RankError
from .mixin import LossOfModule, check_loss_of_module
from .objective.objective import Objective
from .parameters import Targets
from .selection import GradientStatistics, NeuronStatistics
from .selection.tracker import TrainingTracker, target_metrics
from .session import Loaders
from .signatures import check_argument_names, keywords, spell_out
from .trajectory.recording import TrajectoryRecorder
from .unlearning.events import EventList

__all__ = ["GIFCallback", "attach"]

_CHECKPOINT_KEY = "lightning_gif"


class GIFCallback(TrainerCalls, Callback):
    """Adds ``influence``, ``self_influence``, ``validate_influence``, ``store_gradients`` and ``unlearn`` to a trainer.

    During ``fit`` the callback gathers statistics from the forward and backward passes of training: the mean output and
    the mean output gradient of every Linear and Conv neuron, by class, and the mean squared gradient of every
    parameter. At the end of each epoch it uses them to pick the *target parameters*, which are the parameters that an
    edit may change. In a small network, this waits until the target parameters are needed.

    Training is bit for bit the same as without the callback. Layers that run as compiled code give no statistics. If a
    call needs them, they come from one pass over training examples. An error in gathering never ends a fit. It causes a
    warning, and gathering stops.

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
        selector: How target parameters are picked. ``"highest_k_gradients"`` (default), ``"highest_k_outputs"``,
            ``"lowest_k_gradients"``, ``"lowest_k_outputs"``, ``"exclusive_k_gradients"``, ``"exclusive_k_outputs"``,
            ``"random"`` and ``"threshold"`` are the selectors of the GIF paper. ``"largest_gradients"`` picks single
            entries. These rank the neurons of Linear and Conv layers. If these layers have less than half of the
            parameters that ``ratio`` asks for, the units of all other parameters are ranked as well, by their
            gradients. ``"caps"`` and ``"ekfac_caps"`` are newer selectors of the paper's authors. They rank blocks
            (neurons, attention heads, rows) of all layers at once by gradient energy: the squared gradient of the query
            or the forget examples, relative to the curvature. The curvature is the diagonal of the Fisher matrix for
            ``"caps"``, and EK-FAC for ``"ekfac_caps"``. With these two, there are no cached targets: calls that use
            targets need ``targets="batch"`` or ``"class"``. You can register your own in ``lightning_gif.SELECTORS``.
            To pick parameters yourself, pass names or patterns, such as ``["head.*", "*.norm.weight"]``. All entries of
            the parameters that match become targets.
        ratio: The share of each layer's parameters that become targets, in (0, 1]; at most 0.5 for the ``exclusive_k``
            selectors. For ``"caps"`` and ``"ekfac_caps"``, the share of all parameters. With a larger share an edit can
            do more, but changes more of the model.
        method: Which linear system is solved. ``"gif"`` changes the targets to cancel the gradient on all parameters.
            ``"fif"`` ignores all other parameters. ``"if"`` is the full influence function on all parameters, and
            ``"pif"`` is its part on the targets. ``"sif"`` is the second-order influence of a group on all
            parameters; it is for ``unlearn`` only. ``"auto"`` (default) predicted retraining best in the benchmarks:
            ``"if"`` for scores and for edits with ``step="match"``, ``"fif"`` for both if a call restricts them to
            targets, and ``"gif"`` for other edits. The later solves of an edit can be damped Newton steps on the
            targets instead, for every method.
        solver: The algorithm for the linear system. ``"lsmr"``, ``"cgls"``, ``"lissa"``, ``"plain_lissa"``,
            ``"stochastic_lissa"`` and ``"dense"`` (small networks) accept any curvature. ``"cg"`` and ``"nystrom"``
            need a symmetric curvature without negative eigenvalues. ``"cg"`` takes one product per iteration.
            ``"nystrom"`` takes as many products for many queries as for one. ``"ekfac"``, for scores only, takes no
            products: it approximates the Gauss–Newton matrix layer by layer. ``"ekfac_cg"``, for queries only, corrects
            it by products with the exact matrix. ``"ekfac_lsmr"`` and ``"ekfac_lissa"`` solve the same system by these
            solvers, with two products per iteration instead of one. You can register your own solver in
            ``lightning_gif.SOLVERS``. ``"auto"`` (default): for scores, if the module has more than 1024 parameters,
            all in layers that are linear in them, and none of ``max_iter``, ``rtol``, ``discrepancy`` and
            ``eigenvalues`` is given, ``"ekfac_cg"`` for as many queries as take 1.2 trillion operations in its
            products, and ``"ekfac"`` for more queries and for ``self_influence``. Otherwise ``"cg"``, or ``"nystrom"``
            for 13 queries or more. ``"lsmr"`` for edits, for ``"gif"``, and with the Hessian.
        damping: The damping λ, in the unit of the curvature's eigenvalues. Every solver adds it to the eigenvalues of
            the Gauss–Newton matrix. With ``"gif"`` and with the Hessian, ``‖Ax − g‖² + λ²‖x‖²`` is minimised instead,
            where an eigenvalue ``c`` counts as ``√(c² + λ²)``. More damping gives smaller and more cautious results.
            ``None`` (default): for scores a thousandth of the largest eigenvalue (three extra products). With
            ``"ekfac"``, each layer has its own: the mean of those of its eigenvalues that can differ from zero; with
            ``"ekfac_cg"``, ``"ekfac_lsmr"`` and ``"ekfac_lissa"`` ten times that. With ``step="match"`` it follows from
            the learning rates of the training. For ``"gif"`` and other edits 0. The first label-correction solves of a
            classifier use ``‖Aᵀg‖ / (5‖g‖)`` (one extra product), and more after a rejected step. The values used are
            in ``report.solution.damping`` and ``report.solves[i]["damping"]``.
        max_iter: The largest number of iterations of one solve; for ``"nystrom"`` the rank of the sketch. An iteration
            takes two Hessian-vector products, or one for ``"cg"``, ``"ekfac_cg"`` and Newton steps. Fewer iterations
            regularise. ``None`` (default): 200 if ``rtol`` is given. Otherwise 20 for scores by ``"cg"``, 6 by
            ``"ekfac_cg"``, 36 by ``"ekfac_lsmr"`` and ``"ekfac_lissa"``, at most 512 by ``"nystrom"``, 8 for the first
            change of ``step="match"``, and 10 for the influence direction of other edits. Each later solve of an edit
            takes 5, or 8 for label correction.
        rtol: The relative residual of the normal equations at which a solve has converged, between 0 and 1. Directions
            of small curvature contribute little to the residual; a smaller ``rtol`` follows them further. ``None``
            (default): 1e-3 for the scores of ``"gif"``; otherwise a solve ends after ``max_iter`` iterations.
        discrepancy: A solve also ends if ``‖Ax − g‖ ≤ discrepancy · ‖g‖``. Set it to the relative error of ``g``.
            0 (default) never ends a solve.
        curvature: ``"hessian"``, or ``"ggn"`` for the generalised Gauss–Newton matrix. The latter leaves out the
            curvature of the model itself, is positive semi-definite for convex losses, and costs less per product. It
            needs a ``training_step`` that passes predictions to a loss function of PyTorch, a softmax, a sigmoid or a
            difference. ``"auto"`` (default): ``"ggn"`` for scores, for ``step="match"`` and for label correction if
            the predictions are available, otherwise ``"hessian"``.
        curvature_examples: The largest number of training examples over which the curvature is taken, and on which
            neurons are ranked. ``None`` takes all. ``"auto"`` (default): 2048, but for the curvature 1024 if a class is
            forgotten, and 600 for ``step="match"``. More examples make scores more accurate, and cost proportionally
            more.
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
            gathered; 64 by default, but at most one step in twenty if that is more than 2. More steps slow training.
            ``None`` gathers at every step. Every step is also used in epochs of unknown length.
        snapshots: The number of snapshots: weights at the end of earlier epochs, over which :meth:`influence` averages
            scores together with the present weights. They are spread from about a third of the epochs to the last one.
            Up to twice as many copies of the weights are kept in CPU memory, or up to four for one snapshot.
            ``"auto"`` (default): 1, or 0 if four copies would take more than 256 MiB; checkpoints do not have the
            copies. If you give a number, checkpoints have them, too. 0 keeps none. Each snapshot makes a call take as
            long again. Error bars need 2 or more.
        log_reports: Whether to log each report, and the targets of each epoch, to the trainer's loggers; ``True`` by
            default.
        report_every_n_epochs: Compute and log an influence report for ``query`` at the end of every n-th epoch of
            ``fit``. ``None`` (default) for no reports. Loggers also get a table ``gif_influence/history`` with the
            proponents and opponents of all reports, which shows when examples become influential. A report takes about
            as long as an epoch: a solve over ``curvature_examples``, and a pass over the training data that costs about
            three forward passes. With a snapshot it takes twice as long, see ``report_options``. :attr:`last_report` is
            the latest report.
        query: The query of these reports: a batch or a ``DataLoader``, as in :meth:`influence`. If it does not fit the
            model or the training data, a warning says so before training, and there are no reports in that fit.
        report_options: Arguments of :meth:`influence` for these reports, such as ``{"k": 20, "among": indices}``. A
            report is cheaper with fewer examples in ``among``, and with ``"snapshots": False``.
        seed: The seed of all random draws of the computations; 0 by default.
        store: A folder to which a store of gradients is written at the end of each ``fit``, by
            :meth:`store_gradients`. It takes one pass over the training data: the gradients that training computes are
            of earlier weights. The folder must not exist, or be empty, when a fit starts. If the store cannot be
            written, a warning says so. ``None`` (default) writes none.
        record: The audit log: a file, such as ``"deletions.jsonl"``, that gets an entry for each edit that is applied
            or undone, and for each dry run. It is created if it does not exist; see :func:`~lightning_gif.verify`. An
            edit that cannot be recorded is not applied. ``None`` (default) records nothing.
        trajectory: A folder in which each ``fit`` is recorded, so that ``trainer.influence(batch, through="training")``
            can replay it: the state of the training before about √T of its T optimizer steps, and for each step the
            dataset indices of its examples and the settings of the optimizer. A message at the start says how large it
            gets. When a fit starts from the beginning, the folder must be new or empty; a fit from a checkpoint
            continues the record of its run. It needs automatic optimization with ``SGD``, ``Adam`` or ``AdamW``, full
            precision, and parameters that are not sharded (FSDP2). ``None`` (default) records nothing.
        trajectory_size: The most disk space, in GiB, for the stored states. If √T states do not fit, fewer are stored,
            and a replay needs more memory. ``None`` (default) sets no limit.
        influence_loss: A function ``(module, batch) -> (B,)`` that returns the training loss of each example of a
            batch, for modules whose code you cannot change. It replaces the ``influence_loss`` of the module, see
            :class:`~lightning_gif.GIFMixin`. By default, losses come from the module.
        class_names: The name of each class as text, in the order of the labels, for the pictures and texts of reports.
            By default the attribute ``classes`` of the data module or the training dataset, if it is a list of texts,
            as in torchvision. Without names, reports show the labels.
        vocabulary: For models of texts: the tokens by their ids, as a list, a mapping, or a tokenizer with a method
            ``convert_ids_to_tokens`` (as in ``transformers``). Reports then show words in place of ids.

    Raises:
        ConfigurationError: If a value is out of range or a name is unknown. It is a ``MisconfigurationException``.
    """

    # Many arguments instead of one object, because LightningCLI reads a flat list of options from the signature.
    @check_argument_names
    def __init__(
        self,
        selector: str | list[str] = SELECTOR,
        ratio: float = RATIO,
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
        snapshots: int | Literal["auto"] = "auto",
        log_reports: bool = True,
        report_every_n_epochs: int | None = None,
        query: Any = None,
        report_options: Mapping[str, Any] | None = None,
        seed: int = 0,
        store: str | None = None,
        record: str | None = None,
        trajectory: str | None = None,
        trajectory_size: float | None = None,
        influence_loss: LossOfModule | None = None,
        class_names: list[str] | None = None,
        vocabulary: Any = None,
    ) -> None:
        arguments = locals()
        super().__init__()
        self.settings = check_names(Settings(**{field.name: arguments[field.name] for field in fields(Settings)}))
        check_count("cache_steps", cache_steps, optional=True)
        self.cache_neurons, self.cache_gradients, self.cache_steps = cache_neurons, cache_gradients, cache_steps
        self.log_reports = log_reports
        self.report_every_n_epochs = report_every_n_epochs
        self.query = query
        self.report_options = dict(report_options or {})
        self.store, self.record, self.trajectory = store, record, trajectory
        self.influence_loss = influence_loss
        self.class_names, self.vocabulary = class_names, vocabulary
        self.tracker = TrainingTracker(self.settings, snapshots)
        self.recorder = TrajectoryRecorder(trajectory, trajectory_size)
        self.reports = PeriodicReports()
        self.events = EventList()
        self.loaders = Loaders()
        self._state_key: tuple[Settings, str] | None = None  # and the settings that it was made from
        _check_report_arguments(self)
        _check_paths(store, record, trajectory)
        check_loss_of_module(influence_loss)
        check_class_names(class_names)
        check_vocabulary(vocabulary)

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
            Objective.check_module(pl_module, self.influence_loss)
            _check_no_store(self.store)
        self.bind(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares the record of the fit: its loaders do not exist yet, and a checkpoint is known.

        Raises:
            ConfigurationError: If the fit cannot be recorded.
        """
        self.recorder.prepare(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds hooks to the layers, and checks the query of the reports, so that a warning comes before training."""
        self.tracker.start_fit(pl_module, resumed=trainer.global_step > 0)
        self.loaders.train = trainer.train_dataloader
        if self.report_every_n_epochs is not None:
            self.reports.start(self._check_query)
        if self.cache_neurons:
            self.tracker.attach(pl_module)
        self.recorder.start(trainer, pl_module)

    def _check_query(self) -> None:
        with self.open_session(self.settings, "batch") as session:
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
        self.recorder.start_batch(trainer, batch, batch_idx)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Reads the learning rates, and the gradients, which are accumulated and unscaled, and not yet clipped."""
        self.recorder.before_step(optimizer)
        self.tracker.count_step(optimizer)
        if self.cache_gradients:
            self.tracker.add_gradients(pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pauses the hooks, because passes before the next batch, such as validation, are not training."""
        self.recorder.end_batch(trainer, pl_module)
        self.tracker.neurons.pause()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Picks and logs the targets, takes a snapshot, and computes a report if one is due."""
        self.recorder.end_epoch()
        epoch, logs = trainer.current_epoch, self.log_reports and bool(trainer.loggers)
        with self.tracker.guard("picking the target parameters"):
            previous = self.targets if logs else None
            picked = self.tracker.end_epoch(pl_module, epoch, ProcessGroup.of(trainer), may_wait=not logs)
            if picked and self.targets is not None and logs:
                values = target_metrics(self.targets, previous, pl_module)
                # The values are equal on all processes, but Lightning warns about each one without sync_dist.
                several = trainer.world_size > 1
                pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=several, batch_size=1)
        self.tracker.take_snapshot(epoch, pl_module, ProcessGroup.of(trainer))
        every = self.report_every_n_epochs
        if every is not None and (epoch + 1) % every == 0:
            ask = partial(self.influence, self.query, **self.report_options)
            if self.reports.make(epoch, ask) and self.log_reports:
                self.reports.log_history(trainer.loggers if trainer.is_global_zero else [], trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the hooks, and stores the loaders, because ``trainer.test`` removes them from the trainer."""
        self.loaders.remember(trainer)
        self.tracker.end_fit(pl_module)
        self.recorder.end()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the store, with the weights that other callbacks have left at the end of training."""
        if self.store is None or trainer.fast_dev_run:
            return
        try:
            self.store_gradients(self.store)
        except RankError:  # a process is out of step or has ended, and going on would block
            raise
        except Exception as error:
            rank_zero_warn(
                f"The store at {self.store!r} was not written: {type(error).__name__}: {str(error).rstrip('.')}. The"
                " training is complete. Call trainer.store_gradients to write it.",
                category=GIFWarning,
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the hooks, because ``teardown`` does not run after an exception."""
        self.tracker.abandon_epoch(pl_module)
        self.recorder.abandon()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the hooks."""
        self.tracker.detach()
        self.recorder.close()

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
        """The epoch of the current targets, the proponents and opponents of the reports so far, and the events."""
        history = [list(row) for row in self.reports.history]
        return {"targets_epoch": self.targets_epoch, "history": history, "events": self.events.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned. A state of another version may lack values."""
        self.tracker.targets_epoch = state_dict.get("targets_epoch")
        self.reports.history = [list(row) for row in state_dict.get("history", [])]
        if "events" in state_dict:
            self.events.load_state(state_dict["events"])

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds targets, statistics and snapshots to the checkpoint, in a form that ``weights_only=True`` can load.

        All processes must save together, as Lightning requires, because the statistics are summed over them.
        """
        self.recorder.flush()
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


spell_out(
    [
        *(Influence.__call__, Influence.check),
        *(TrainerCalls.self_influence, TrainerCalls.validate_influence, TrainerCalls.unlearn),
        TrainerCalls.store_gradients,
    ],
    GIFCallback.__doc__,
)


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
    known = keywords(callback.influence)
    settings = {name: value for name, value in options.items() if name not in known}
    check_names(callback.settings.override(settings, known))  # type: ignore[arg-type]


def _check_paths(store: str | None, record: str | None, trajectory: str | None) -> None:
    check_path("store", store, "folder")
    check_path("trajectory", trajectory, "folder")
    check_path("record", record, "file")
    check_record(record)


def _check_no_store(folder: str | None) -> None:
    """Checks that a store can be written to a folder at the end of a fit."""
    if folder is not None and os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ConfigurationError(
            f"The end of the fit would write a store of gradients to {folder!r}, which is a file or is not empty. Give"
            " another folder as `store`, or delete this one."
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
            "GIFCallback works on one device, and on several under strategy='ddp' or under ModelParallelStrategy with"
            f" FSDP2. But {reason}"
        )


def attach(
    trainer: Trainer,
    model: LightningModule,
    *,
    train_dataloaders: DataLoader[Any] | None = None,
    datamodule: Any = None,
    callback: GIFCallback | None = None,
    epoch: int | None = None,
) -> GIFCallback:
    """Adds the methods of :class:`GIFCallback` to a trainer for a model that was trained elsewhere.

    There are no statistics from training, unless the callback's state is loaded from a checkpoint. The first call that
    needs them computes them in one pass over ``curvature_examples`` training examples.

    Args:
        trainer: A trainer, which need not have run.
        model: The trained model.
        train_dataloaders: The training data. They can be left out if the last run of ``trainer`` was a ``fit`` of
            ``model``.
        datamodule: A datamodule with the training data, instead of ``train_dataloaders``.
        callback: The callback to use; by default the one of the trainer, or a new one.
        epoch: The number of epochs that the weights were trained for, for a loss that depends on ``current_epoch``: 3
            for a checkpoint named ``epoch=2-step=87.ckpt``. By default the trainer's epoch, which is 0 before any
            ``fit``. In that case, calls warn if the loss depends on the epoch.

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
    if epoch is not None:
        check_count("epoch", epoch, least=0)
    present = [one for one in trainer.callbacks if isinstance(one, GIFCallback)]
    callback = callback or (present[0] if present else GIFCallback())
    _check_trainer(trainer, callback)
    ProcessGroup.of(trainer)  # raises an error if the processes of a distributed trainer are not running
    if callback not in trainer.callbacks:
        trainer.callbacks.append(callback)
    callback.tracker.follow(model)
    callback.loaders.train, callback.loaders.unseen = train_dataloaders, None
    if train_dataloaders is None and datamodule is None and trainer.lightning_module is model:
        callback.loaders.remember(trainer)  # attaching the model removes them from the trainer
    attach_model(trainer, model, train_dataloaders, datamodule)
    callback.loaders.epoch = epoch
    callback.tracker.ranks_on_demand = True
    callback.bind(trainer)
    return callback
