"""The callback: watches training, picks targets at each epoch's end, and gives the trainer its two methods."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import Unpack, override

from ._compat import (
    Callback,
    LightningModule,
    Trainer,
    attach_model,
    brings_own,
    isolate_rng,
    rank_zero_info,
    rank_zero_warn,
    unsupported_strategy,
)
from .attribution.influence import influence
from .attribution.report import InfluenceReport
from .attribution.self_influence import self_influence
from .config import AUTO, Overrides, Settings
from .curvature.products import has_gauss_newton
from .data.examples import Examples
from .data.identity import check_same_everywhere, shares_examples
from .data.structure import batch_size, describe, tensors
from .data.targets import class_targets
from .distributed import ProcessGroup
from .errors import BatchError, ConfigurationError, GIFError, GIFWarning, RankError, SelectionError, TrainingDataError
from .objective.objective import Objective
from .parameters import Targets
from .reporting.loggers import log_table
from .selection import GradientStatistics, NeuronStatistics, select
from .selection.snapshots import Snapshots
from .storage.audit_log import check_whole, read
from .storage.interrupts import uninterrupted
from .unlearning.journal import Journal
from .unlearning.report import UnlearnReport
from .unlearning.unlearn import Step, check_step, unlearn

__all__ = ["GIFCallback", "attach"]

_CHECKPOINT_KEY = "lightning_gif"

_SCORES_FOLDER = "lightning_gif_scores"

# How many times its own size a sketch of the curvature takes while it is made.
_SKETCHES = 4

# Multiples of it are spread over the unit interval as evenly as can be.
_GOLDEN = (math.sqrt(5) - 1) / 2

TargetsChoice = Literal["cached", "class", "batch"]

_Report = TypeVar("_Report", InfluenceReport, UnlearnReport)


class GIFCallback(Callback):
    """Adds ``trainer.influence(batch)`` and ``trainer.unlearn(batch)`` to a trainer.

    During ``fit`` the callback gathers, from the passes that training makes anyway, the mean output and output gradient
    of every Linear and Conv neuron by class, and the mean square of every parameter's gradient. At the end of each
    training epoch it picks the target parameters: those that influence is measured on and that unlearning may change.
    Training itself stays bit for bit what it is without the callback (in compiled modules up to rounding, since hooks
    split the compiled graph; ``cache_neurons=False`` hooks into nothing). From ``setup`` on the trainer has the two
    methods; they work during ``fit``, after it, and after ``validate`` or ``test`` with a checkpoint that holds the
    targets. For a model that was loaded and not fitted, see :func:`attach`.

    Both methods leave everything but the requested edit as it was: weights, buffers, gradients, train/eval flags,
    random generators, metrics, logged values, loaders.

    Example::

        trainer = Trainer(callbacks=[GIFCallback()], logger=WandbLogger())
        trainer.fit(model, datamodule=data)
        print(trainer.influence(batch))    # which training examples moved this batch's loss
        report = trainer.unlearn(batch)    # as if the model had not seen it
        report.undo()                      # bit for bit

    Args:
        selector: How targets are picked in each Linear and Conv layer: ``"highest_k_gradients"``,
            ``"highest_k_outputs"``, ``"lowest_k_gradients"``, ``"lowest_k_outputs"``, ``"exclusive_k_gradients"``,
            ``"exclusive_k_outputs"``, ``"random"``, ``"threshold"`` (of the GIF paper), ``"largest_gradients"``, or one
            that was registered in ``lightning_gif.SELECTORS``. What embeddings, normalisation and
            ``nn.MultiheadAttention`` have for weights belongs to no neuron of these layers, and stays (but the output
            projections of the latter, with ``"random"`` and ``"largest_gradients"``). Or names or patterns of
            parameters of any layer, such as ``["head.*", "*.norm.weight"]``, all of whose entries become targets.
        ratio: Share of each layer's parameters that become targets, in (0, 1]; up to 0.5 for ``exclusive_k``.
        method: ``"gif"`` (cancels the gradient change on all parameters by changing the targets), ``"fif"`` (ignores
            the parameters that are not targets), ``"pif"`` (full influence function, cut to the targets), ``"if"``
            (full influence function on all parameters) or ``"sif"`` (second-order influence of a group on all
            parameters; for ``unlearn`` only, in the change of the theory: the steps that lower a risk are those of
            ``"if"``). Once most of a class or three quarters of the wrong labels are forgotten, the steps of
            ``unlearn`` are damped Newton steps on the targets, whatever the method and the solver: see
            :meth:`~lightning_gif.unlearning.protocol.Walk.descend`.
            ``"auto"``: what was measured to predict retraining best: for scores ``"if"``, or ``"fif"`` where a call
            asks for targets; for edits ``"gif"``.
        solver: ``"lsmr"``, ``"cgls"``, ``"lissa"``, ``"plain_lissa"``, ``"stochastic_lissa"``, ``"dense"`` (small
            nets); for a symmetric curvature without negative eigenvalues ``"cg"``, at one product a step, and
            ``"nystrom"``, at as many products for many queries as for one; or one that was registered in
            ``lightning_gif.SOLVERS``. ``"auto"``: for scores ``"cg"``, or ``"nystrom"`` where there are many queries
            and room for its sketch; ``"lsmr"`` for edits, for ``"gif"``, and where the curvature is the Hessian.
        damping: ``λ``, what is added to the eigenvalues of the curvature, in their unit and for every solver; with
            ``"gif"`` and with the Hessian that of ``min ‖Ax − g‖² + λ²‖x‖²``, where an eigenvalue ``c`` counts as
            ``√(c² + λ²)``. ``None``: for scores a thousandth of the largest
            eigenvalue, found by three more products; 0 for ``"gif"`` and for edits, but a fifth of
            ``‖Aᵀg‖/‖g‖``, found by one, for the solves that start to correct the labels of a classifier, and more after
            one that nothing came of. What a solve had is in its diagnostics.
        max_iter: Most steps of the solve, each of two Hessian-vector products (of ``"cg"`` and of a Newton step one; of
            ``"nystrom"`` the rank); ``None``: 200 where there is an ``rtol`` to reach; else 20 for scores, up to 512
            for those by ``"nystrom"``, 10 for the change of the theory, and for each of those that are solved anew 5
            (8 where labels are corrected). Fewer steps regularise.
        rtol: Relative normal-equation residual at which the solve counts as converged. Directions of small curvature
            hardly show in it: smaller values follow them further. ``None``: 1e-3 for the scores of ``"gif"``; none
            elsewhere: a number of steps is all that a solve is asked for.
        discrepancy: Stop the solve as well where ``‖Ax − g‖ ≤ discrepancy·‖g‖``: as closely as ``g`` is known.
        curvature: ``"hessian"``, or ``"ggn"``: the generalised Gauss–Newton matrix, which leaves out the curvature of
            the model itself, is positive semi-definite for convex losses, and costs less a product. It is taken at the
            predictions that ``training_step`` gives to a loss function of PyTorch. ``"auto"``: ``"ggn"`` for scores
            where there are such predictions and for the steps that correct labels where the model predicts classes
            (least squares on the Hessian can lead up where it is far from them), ``"hessian"`` else.
        curvature_examples: How many training examples the curvature is taken over, and neurons are ranked on at most;
            ``None`` for all. ``"auto"``: 2048; 1024 for the curvature where a class is forgotten.
        curvature_sampling: How they are drawn: ``"random"``, ``"balanced"`` (as many of each class), ``"features"`` or
            ``"logits"`` (representative of how each class spreads there), or one that was registered in
            ``lightning_gif.SAMPLERS``.
        weight_decay: ``w``, if training minimised ``(w/2)‖θ‖²`` besides the losses: the ``weight_decay`` of ``SGD`` or
            ``Adam`` (not of ``AdamW``, which decays outside of the loss).
        eigenvalues: How many extreme eigenvalues of the curvature to estimate at either end, and the share of negative
            ones; 0 for none. Takes some 60 products or more on top of the solve.
        batch_size: Examples in one pass of the computations; more is faster and needs more memory.
        memory: GiB that may be kept between the products of a solve, so that part of each need not be done anew;
            ``None``: a quarter of what is free.
        double: Compute in float64.
        unconverged: What to do about a solve that stops before ``rtol``, or where ``"cg"`` meets negative curvature:
            ``"warn"``, ``"raise"`` or ``"ignore"``.
        cache_neurons: Gather the statistics of neurons: 8 bytes for each neuron and class.
        cache_gradients: Gather the mean squares of gradients: 4 bytes for each parameter.
        cache_steps: At about how many optimizer steps of an epoch, spread evenly, both are gathered: the more, the
            slower training is. ``None``: at all, as in epochs of fewer steps or of unknown length.
        snapshots: How many states of the weights to keep from the epochs of ``fit``, spread over the last two thirds
            of them, for ``influence(…, snapshots=True)``: up to twice so many copies in the CPU's memory and in
            checkpoints.
        log_reports: Log each report to the trainer's loggers, and each epoch's choice of targets.
        report_every_n_epochs: Make a report of ``query`` at the end of every so many epochs of ``fit``, and log it: to
            W&B also the strongest examples of all reports so far (``gif/influence/history``), a chart of which shows
            when which of them start to matter. A report takes about as long as an epoch (a scoring pass costs some
            three forward passes over the training data) and 20 products over ``curvature_examples``; its ``seconds``
            are logged. The last one is :attr:`last_report`.
        query: A batch, or a ``DataLoader``, as for :meth:`influence`: what to ask about in training.
        report_options: Arguments of :meth:`influence` for these reports, such as ``{"k": 20, "among": indices}``, which
            makes each as cheap as the examples are few.
        seed: Of all random draws of the computations.
        record: A file, such as ``"deletions.jsonl"``, that gets an entry for each edit that is made or taken back, and
            is made where there is none: see :func:`~lightning_gif.verify`. An edit that cannot be recorded is not made.

    Raises:
        ConfigurationError: For a value out of range or an unknown name (a ``MisconfigurationException``).
    """

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
        super().__init__()
        self.settings = Settings(
            selector=selector,
            ratio=ratio,
            method=method,
            solver=solver,
            damping=damping,
            max_iter=max_iter,
            rtol=rtol,
            discrepancy=discrepancy,
            curvature=curvature,
            curvature_examples=curvature_examples,
            curvature_sampling=curvature_sampling,
            weight_decay=weight_decay,
            eigenvalues=eigenvalues,
            batch_size=batch_size,
            memory=memory,
            double=double,
            unconverged=unconverged,
            seed=seed,
        )
        self.cache_neurons = cache_neurons
        self.cache_gradients = cache_gradients
        if cache_steps is not None and (
            isinstance(cache_steps, bool) or not isinstance(cache_steps, int) or cache_steps < 1
        ):
            raise ConfigurationError(
                f"`cache_steps` must be None or a whole number of at least 1, got {cache_steps!r}."
            )
        self.cache_steps = cache_steps
        self._gathers = False  # at the present step
        self._gathering = True  # in the present fit, unless an error has ended it
        self._reporting = True  # likewise
        self._within_epoch = False  # some of its batches are seen, and not yet all
        self.log_reports = log_reports
        self._snapshots = Snapshots(snapshots)
        self.report_every_n_epochs = report_every_n_epochs
        self.query = query
        self.report_options = dict(report_options or {})
        self.record = record
        self._check_reports()
        self._check_path("record", record, "file")
        self._check_record(record)

        self.neurons = NeuronStatistics()
        self.gradients = GradientStatistics()
        self.targets: Targets | None = None
        self.targets_epoch: int | None = None
        self._train_loader: Any = None
        self._unseen_loader: Any = None
        self._rank_on_demand = False
        self._observed: LightningModule | None = None  # whose statistics and targets these are
        self.last_report: InfluenceReport | None = None
        self._history: list[list[Any]] = []  # of the reports made in training
        self._apart = False  # the statistics of neurons hold what this process alone has seen

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            selector=self.settings.selector, ratio=self.settings.ratio, seed=self.settings.seed
        )

    # ----------------------------------------------------------------------------------------------------------------
    # The two methods
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
        """Scores every training example by what removing it would do to the model's loss on a batch.

        Bound to the trainer as ``trainer.influence(batch, …)``.

        Args:
            trainer: The trainer; filled in by the binding.
            batch: A batch as the training loader gives them, or a ``DataLoader`` over several. Its mean loss is the
                query, or what ``influence_measurement`` of the module returns.
            k: How many proponents and opponents are shown and logged.
            per_example: One query for each example of the batch instead of one for their mean.
            targets: Which parameters to look at. ``"cached"``: the choice made at the last epoch's end. ``"class"``:
                neurons ranked by what training saw of the batch's classes. ``"batch"``: neurons ranked on the batch, as
                in the paper. By default all parameters, or the cached choice where ``selector``, ``ratio`` or a method
                that has targets is given.
            among: Score only these training examples: their dataset indices, or a function from a batch to the truth
                value of each of its examples. The scores stay those of a model trained on all.
            scores_to: A folder to write the scores to as they are found, for more than fit into memory, and to go on
                where a call was interrupted: the same call again does only what is missing. It is refused if weights,
                queries, settings or data have changed (of the data, the indices and 64 examples are compared). By
                default they are in memory, or, if they take more than half of ``memory``, in a folder of that kind
                below the trainer's ``default_root_dir``, which is told.
            keep: Keep only the scores of so many proponents and opponents of each query, which is all that a ranking
                needs: for more queries than there is room for the scores of.
            snapshots: Average the scores over the present weights and the snapshots of training, where the callback
                keeps some: nearer to what retraining does, at the cost of a solve and a pass for each.
            dataloader: The training data, where it is not that of ``fit``.
            **overrides: Arguments of the constructor to change for this call: those of the computations,
                from ``selector`` to ``unconverged``, and ``seed``.

        Returns:
            Scores ``(n_queries, n_train)`` with the dataset index of each training example.

        Raises:
            ConfigurationError: For a bad argument or an unsupported trainer.
            TrainingDataError: If there is no training loader, or its examples have no stable index.
            SelectionError: If there are no targets, as before any ``fit``.
            BatchError: If the batch is empty or not structured as training batches are.
            ObjectiveError: If the loss cannot be had, or does not depend on the targets.
            NonFiniteError: If a loss, gradient or product is not finite.
            ConvergenceError: If the solve diverges, or does not converge and ``unconverged="raise"``.
        """
        named = ("k", "per_example", "targets", "among", "scores_to", "keep", "snapshots", "dataloader")
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < k):
            raise ConfigurationError(
                f"`keep` must be None or a whole number of at least k={k}, how many are shown, got {keep!r}."
            )
        if keep is not None and scores_to is not None:
            raise ConfigurationError("`scores_to` is for all scores, `keep` for the strongest alone: give one of them.")
        states = self._earlier_states(snapshots)
        with self._attributing(trainer, targets, among, dataloader, k, overrides, named) as asked:
            objective, train, some, settle = asked
            query = self._examples(batch, objective, self.settings.override(overrides, named))
            settings = settle(len(query) if per_example else 1)
            report = influence(
                objective,
                train,
                query,
                settings,
                partial(self._choose_targets, objective, train, query, targets or "cached", settings, overrides),
                per_example=per_example,
                among=some,
                scores_to=None if scores_to is None else Path(scores_to),
                spill_to=self._folder_for_scores(trainer),
                keep=keep,
                states=states,
                k=k,
            )
        return self._deliver(trainer, report)

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
        """Scores every training example by what removing it would do to the model's loss on itself.

        Bound to the trainer as ``trainer.self_influence(…)``. High scores are what the model knows by heart: look there
        first for wrong labels, duplicates with other labels, and data that is not like the rest.

        Args:
            trainer: The trainer; filled in by the binding.
            *batch: None is taken: to look at some examples only, say which by ``among``.
            k: How many are shown and logged.
            targets: Look at the cached targets only; by default at all parameters, see :meth:`influence`.
            among: As in :meth:`influence`.
            snapshots: As in :meth:`influence`, at the cost of a sketch and a pass for each. Wrong labels that are known
                by heart at the end stood out earlier.
            dataloader: As in :meth:`influence`.
            **overrides: As in :meth:`influence`. With more than 1024 parameters ``max_iter`` is the rank of a sketch
                (64 by default); a larger one gives the size of scores more closely, and ranks as well.

        Returns:
            One row of scores, of each example for itself: see
            :func:`~lightning_gif.attribution.self_influence.self_influence`.

        Raises:
            GIFError: As in :meth:`influence`.
        """
        if batch:
            raise ConfigurationError(
                f"trainer.self_influence scores every training example for itself and takes no batch, got"
                f" {describe(batch[0])}. For some of them, among=[17, 4031] or a function from a batch to truth values;"
                " for what moved the loss on a batch, trainer.influence(batch)."
            )
        named = ("k", "targets", "among", "snapshots", "dataloader")
        states = self._earlier_states(snapshots)
        with self._attributing(trainer, targets, among, dataloader, k, overrides, named) as asked:
            objective, train, some, settle = asked
            settings = settle(len(train), itself=True)
            choose = partial(self._choose_targets, objective, train, train, "cached", settings, overrides)
            report = self_influence(objective, train, settings, choose, among=some, states=states, k=k)
        return self._deliver(trainer, report)

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
        **overrides: Unpack[Overrides],
    ) -> UnlearnReport:
        """Changes the targets so that the model behaves as if it had not seen a batch, or had seen other labels.

        Bound to the trainer as ``trainer.unlearn(batch, …)``. Only the targets change, and statistics where asked; the
        state of an optimizer (momentum, Adam's averages) still remembers the data, so start a new optimizer to train
        on.

        Args:
            trainer: The trainer; filled in by the binding.
            batch: The examples to forget, with the labels they were trained with: a batch as the training loader gives
                them, or a ``DataLoader``, which are found in the training data by dataset index where the loader is
                over the same dataset or a ``Subset`` of it, else by content. Or their indices in the training dataset,
                whole numbers in a list, range or array; or a function from a batch to the truth value of each of its
                examples, which is asked about all training data: ``lambda batch: batch[1] == 3``. All others are
                retained.
            relabel: The labels they should have had: a tensor, an array or a list in the order of the batch, of the
                indices, of the dataset of the loader (a ``Subset`` has an order of its own), or of the training dataset
                for a function; one class for all; or a function from a batch to its new targets. ``None`` removes them.
                A batch has the labels that it was trained with.
            retain: A loader of all the data to keep, where it is not the rest of the training data: after earlier
                edits, what these left. The more there is of it, the less weight has what is forgotten.
            unseen: A loader of examples like the training data that the model was not trained on: single examples that
                were learned by heart get losses like theirs. Never test data, since it decides how far to go. By
                default the validation loader of ``fit``, where there is one and its batches look like those of
                training; ``False`` for none. Fewer than twenty examples are too few to compare.
            step: How far to go, decided on the forget, retained and unseen data (see
                :class:`~lightning_gif.unlearning.protocol.Goal`). ``"search"``: as far along the one solved change as
                the goal needs. ``"relinearise"``: up to twelve changes, each solved at the weights that the last one
                led to, which lower the risk that should hold afterwards; for single examples that of ``"search"``, and
                others where it leaves something to do. ``"natural"``: 1, what the theory predicts. Or a number; or a
                strategy of your own (see :mod:`lightning_gif.unlearning.strategies`), also by a name it was registered
                under in ``lightning_gif.STRATEGIES``.
            targets: As in :meth:`influence`. What is to be forgotten decides which neurons matter, so the default here
                is ``"batch"``.
            dataloader: The training data, where it is not that of ``fit``.
            refresh_statistics: Compute the running means and variances of BatchNorm anew, over what is retained or
                corrected: they were gathered from the forgotten examples too. They are then a part of the edit, which
                takes them back. By default they stay as they are.
            dry_run: Plan and measure the edit but do not make it, nor record it; ``report.apply()`` does both.
            record: The file to record the edit in, where it is not that of the callback; ``False`` for none.
            solves_to: A folder to write each change to as it is solved for, and to go on where a call was interrupted:
                the same call again solves only for what is missing. It is refused if weights, settings or data have
                changed; that a registered function is another one under its name is not noticed. After a dry run it
                stays, so that the same call can make the edit at once; once a call has made it, the folder is removed.
            **overrides: As in :meth:`influence`.

        Returns:
            The edit, with ``undo()``, ``save()`` and the change of the loss on both sides. Edits add up: each starts
            from the weights that the last one left, and they are undone in reverse order.

        Raises:
            RecordError: If the record is damaged or cannot be written.
            GIFError: As in :meth:`influence`. The weights are then as they were.
        """
        named = (
            "relabel",
            "retain",
            "unseen",
            "step",
            "targets",
            "dataloader",
            "refresh_statistics",
            "dry_run",
            "record",
            "solves_to",
        )
        kept = self.record if record is None else None if record is False else record
        self._check_path("record", kept, "file")
        self._check_path("solves_to", solves_to, "folder")
        folder = None if solves_to is None else Path(solves_to)
        settings = self.settings.override(overrides, named).for_unlearning()
        check_step(step)
        with self._opened(trainer, targets, settings, dataloader) as (objective, train):
            paths = [None if path is None else os.fspath(path) for path in (kept, folder)]
            objective.processes.assert_equal(paths, "record and solves_to", "Make the same call on all of them.")
            if trainer.is_global_zero:  # which writes it
                self._check_record(kept)
                if folder is not None:
                    Journal.check(folder)
            forget = self._forget_examples(batch, train, objective, settings)
            for name, given in (("retain", retain), ("unseen", unseen or None)):
                if given is not None and not isinstance(given, DataLoader):
                    raise ConfigurationError(
                        f"`{name}` must be a DataLoader, got {type(given).__name__}. Leave it out to keep the rest of"
                        " the training data, and to compare with the validation data of `fit`."
                    )
            choose = partial(self._choose_targets, objective, train, forget, targets, settings, overrides)
            report = unlearn(
                objective,
                train,
                forget,
                settings,
                choose,
                relabel=relabel,
                retain=None if retain is None else self._examples(retain, objective, settings),
                unseen=self._unseen_examples(unseen, train, objective, settings),
                step=step,
                refresh_statistics=refresh_statistics,
                solves_to=folder,
            )
        report.module = trainer.lightning_module
        if trainer.optimizers and any(report.steps):
            report.notes.append(
                "The optimizer's state (momentum, averages) is no part of the edit and still remembers the forgotten"
                " data: start a new optimizer before training on."
            )
        report.global_step = trainer.global_step  # a part of what is recorded
        report.record = kept
        self._deliver(trainer, report)
        if not dry_run:  # the last thing that happens, since nobody could take back an edit whose report is lost
            try:
                report.change("unlearn")
                if folder is not None and trainer.is_global_zero:
                    with uninterrupted():
                        Journal.clear(folder)
                return report
            except BaseException:
                if report.processes.size == 1 and report.edit.is_in(trainer.lightning_module):
                    report.undo()
                raise
        return report

    # ----------------------------------------------------------------------------------------------------------------
    # Training, in the order of the hooks
    # ----------------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Binds the two methods and refuses what cannot work, before any work is done."""
        self._check_trainer(trainer)
        if stage == "fit":
            Objective.check_module(pl_module)
        self._bind(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks into the layers, which exist from here on."""
        if self._observed is not None and self._observed is not pl_module:
            self._forget_statistics()
        self._observed = pl_module
        self._rank_on_demand = False
        self._gathering = self._reporting = True
        self._within_epoch = False
        self._train_loader = trainer.train_dataloader
        if self.report_every_n_epochs is not None:  # a bad query should not be found out hours later
            with (
                self._reports_spare_training("before training"),
                self._opened(trainer, "batch", self.settings, None) as (objective, _),
            ):
                objective.check(self._examples(self.query, objective, self.settings), "query", measured=True)
        if self.cache_neurons:
            with self._gathering_spares_training("hooking into the layers"):
                self.neurons.attach(
                    pl_module, partial(self._gathering_spares_training, "reading what passes through a layer")
                )
                torch.compiler.reset()  # code compiled in an earlier fit knows nothing of hooks that were added since

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the epoch's statistics; not called for an epoch that was interrupted and goes on."""
        self._train_loader = trainer.train_dataloader
        self._unseen_loader = _single(trainer.val_dataloaders)
        self.neurons.reset()
        self.gradients.reset()
        self._apart = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tells the hooks which classes are about to pass, if this is a step to gather from."""
        self._within_epoch = True
        with self._gathering_spares_training("reading the batch"):
            self._gathers = self._is_due(trainer, batch_idx)
            if not (self.cache_neurons and self._gathers):
                return
            if not self._apart and not trainer.is_global_zero:
                self.neurons.reset()  # what all have seen so far is in the first process's sums
            self._apart = True  # on all processes alike, also on one that gathers no more
            if not self._gathering:
                return
            try:
                size = batch_size(batch)
            except BatchError:
                size = None
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            self.neurons.record(class_targets(batch), size, trainer.accumulate_grad_batches / scale)

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        """Whether the step that a batch belongs to is one of those to gather from."""
        step, steps = batch_idx // trainer.accumulate_grad_batches, math.inf
        if math.isfinite(trainer.num_training_batches):
            steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        if trainer.max_steps > 0:
            steps = min(steps, trainer.max_steps - trainer.global_step + step)
        share = 1.0 if self.cache_steps is None or math.isinf(steps) else self.cache_steps / max(steps, 1)
        # Spread evenly, and without a period that training might have as well (Weyl's sequence).
        return step * _GOLDEN % 1 < share

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds the gradients of this optimizer's parameters: summed over micro-batches, unscaled, not yet clipped."""
        if not (self.cache_gradients and self._gathers and self._gathering):
            return
        with self._gathering_spares_training("reading the gradients"):
            names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
            self.gradients.add(
                (names[id(parameter)], parameter.grad)
                for group in optimizer.param_groups
                for parameter in group["params"]
                if id(parameter) in names
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Passes until the next batch are not training's."""
        self.neurons.pause()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Picks the targets from what the epoch has shown, and makes a report where one is due."""
        self._within_epoch = False
        with self._gathering_spares_training("picking the target parameters"):
            processes = ProcessGroup.of(trainer)
            self._put_together(processes)
            if self._all_still_gather(processes):
                self._pick_targets(trainer, pl_module)
        with self._gathering_spares_training("taking a snapshot of the weights"):
            if self._gathering:
                self._snapshots.add(trainer.current_epoch, pl_module)
        every = self.report_every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0 and self._reporting:
            self._report(trainer)

    def _put_together(self, processes: ProcessGroup) -> None:
        """The statistics of neurons become those of all processes; those of gradients are the same on all."""
        if self._apart:
            self._all_still_gather(processes)
            self.neurons.sum_over(processes)
            self._apart = False

    def _all_still_gather(self, processes: ProcessGroup) -> bool:
        """Whether all processes gather. Where an error has ended it on one it ends on all, which have to be in step."""
        everywhere = all(processes.gather(self._gathering))
        if self._gathering and not everywhere:
            self._end_gathering()
        return everywhere

    def _pick_targets(self, trainer: Trainer, pl_module: LightningModule) -> None:
        previous = self.targets
        with self._gathering_spares_training("picking the target parameters"):
            self._pick(pl_module, f"at the end of epoch {trainer.current_epoch}")
        # What follows is logged by all processes or by none.
        if not self._all_still_gather(ProcessGroup.of(trainer)) or self.targets is None:
            return
        self.targets_epoch = trainer.current_epoch
        if self.log_reports:
            values = {
                "gif/targets/count": float(self.targets.count),
                "gif/targets/share": self.targets.count / sum(p.numel() for p in pl_module.parameters()),
                "gif/targets/layers": float(len(self.targets)),
            }
            values |= {f"gif/targets/{name}": float(len(entries)) for name, entries in self.targets.items()}
            if previous is not None:
                values["gif/targets/jaccard"] = self.targets.jaccard(previous)
            # The same on all processes; without their mean Lightning would warn of each.
            several = trainer.world_size > 1
            pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=several, batch_size=1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the layers; the loaders are kept, since ``trainer.test`` makes the trainer forget them."""
        self._train_loader = trainer.train_dataloader
        self._unseen_loader = _single(trainer.val_dataloaders)
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go of the layers: ``teardown`` does not run after an exception."""
        self._apart = False  # other processes may be gone, and what they have seen with them
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the layers."""
        self._release()

    # ----------------------------------------------------------------------------------------------------------------
    # State
    # ----------------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """The epoch of the present targets, and the strongest examples of the reports so far."""
        return {"targets_epoch": self.targets_epoch, "history": [list(row) for row in self._history]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.targets_epoch = state_dict["targets_epoch"]
        self._history = [list(row) for row in state_dict.get("history", [])]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the targets and the statistics: tensors and primitives, so that ``weights_only=True`` can load them.

        Statistics are of all processes, so that all have to save, as Lightning asks for anyway.
        """
        with self._gathering_spares_training("adding the state of GIFCallback to a checkpoint"):
            self._put_together(ProcessGroup.of(trainer))
            checkpoint[_CHECKPOINT_KEY] = {
                "state_key": self.state_key,
                "targets": None if self.targets is None else dict(self.targets),
                "neurons": self.neurons.state(),
                "gradients": self.gradients.state(),
                "snapshots": self._snapshots.state(),
            }

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes over targets and statistics; targets only from a callback that would have picked the same."""
        state = checkpoint.get(_CHECKPOINT_KEY)
        if state is None:
            return
        self._apart = False
        try:
            targets = None if state["targets"] is None else Targets(state["targets"])
            if targets is not None:
                targets.check_fit(pl_module)
            self.neurons.load_state(state["neurons"], pl_module)
            self.gradients.load_state(state["gradients"], pl_module)
            if "snapshots" in state:
                self._snapshots.load_state(**state["snapshots"], module=pl_module)
            same = state["state_key"] == self.state_key
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self._forget_statistics()  # which are not worth the run that goes on from the checkpoint
            rank_zero_warn(
                f"The checkpoint's state of GIFCallback does not fit its model, or is damaged, and is left out:"
                f" {type(error).__name__}: {error}. Targets are picked anew: after the next epoch of training, or"
                " after a pass over the data where the model was attached.",
                category=GIFWarning,
            )
            return
        if same:
            self.targets = targets
        elif targets is not None:
            rank_zero_warn(
                f"The checkpoint's targets were picked by {state['state_key']}, this callback is {self.state_key}: they"
                " are picked anew from the checkpoint's statistics.",
                category=GIFWarning,
            )
            with self._gathering_spares_training("picking the target parameters"):
                self._pick(pl_module, "from the checkpoint")

    # ----------------------------------------------------------------------------------------------------------------
    # Private
    # ----------------------------------------------------------------------------------------------------------------

    def _check_trainer(self, trainer: Trainer) -> None:
        if any(isinstance(callback, GIFCallback) and callback is not self for callback in trainer.callbacks):
            raise ConfigurationError(
                "The trainer has several GIFCallbacks, but only one can be behind trainer.influence. Keep one; every"
                " setting can be changed for a call: trainer.unlearn(batch, ratio=0.05)."
            )
        reason = unsupported_strategy(trainer)
        if reason is not None:
            raise ConfigurationError(
                f"GIFCallback works on one device, or on several under strategy='ddp', but {reason}. Use 'ddp', or"
                " train without the callback, gather the weights in a checkpoint, and use lightning_gif.attach() on a"
                " Trainer with devices=1."
            )

    def _check_reports(self) -> None:
        every, query = self.report_every_n_epochs, self.query
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ConfigurationError(
                f"`report_every_n_epochs` must be None or a whole number of at least 1, got {every!r}."
            )
        if (every is None) != (query is None):
            raise ConfigurationError(
                "`report_every_n_epochs` and `query` go together: how often to report, and on which batch. Got"
                f" report_every_n_epochs={every!r} and {'no query' if query is None else 'a query'}."
            )
        if self.report_options and every is None:
            raise ConfigurationError("`report_options` are for `report_every_n_epochs`, which was not given.")
        known = inspect.signature(self.influence).parameters.keys() - {"trainer", "batch", "overrides"}
        settings = {name: value for name, value in self.report_options.items() if name not in known}
        self.settings.override(settings, known)  # type: ignore[arg-type]

    @staticmethod
    def _check_path(name: str, path: Any, kind: str) -> None:
        if path is not None and not (isinstance(path, (str, os.PathLike)) and os.fspath(path)):
            raise ConfigurationError(f"`{name}` must be the path of a {kind}, or None, got {path!r}.")

    def _check_record(self, path: Any) -> None:
        """Whether an entry could be added: better known before an edit is solved for than after."""
        if path is None:
            return
        if os.path.isdir(path):
            raise ConfigurationError(f"`record` must be a file, but {os.fspath(path)!r} is a folder.")
        if os.path.exists(path):
            check_whole(read(path), path)

    @staticmethod
    def _folder_for_scores(trainer: Trainer) -> Path | None:
        """Where scores go that take much memory: nowhere in training, whose reports would leave one file after another,
        nor where the trainer's folder is not on a disk."""
        root = str(trainer.default_root_dir)
        return None if trainer.training or "://" in root else Path(root) / _SCORES_FOLDER

    def _report(self, trainer: Trainer) -> None:
        """Makes the report of an epoch. No report is worth a run."""
        when = f"at the end of epoch {trainer.current_epoch}"
        try:
            with self._reports_spare_training(when):
                self._add_report(trainer)
        except RankError:  # the processes are not at the same place any more, or not there
            raise
        except (GIFError, OSError) as error:
            rank_zero_warn(f"No influence report {when}: {error}", category=GIFWarning)

    def _add_report(self, trainer: Trainer) -> None:
        report = self.influence(trainer, self.query, **self.report_options)
        self.last_report = report
        for kind, ranking in (("proponent", report.proponents()), ("opponent", report.opponents())):
            for query, (indices, scores) in enumerate(zip(*ranking, strict=True)):
                ranked = enumerate(zip(indices.tolist(), scores.tolist(), strict=True), 1)
                self._history += [
                    [trainer.current_epoch, query, kind, rank, index, score] for rank, (index, score) in ranked
                ]
        columns = ["epoch", "query", "kind", "rank", "index", "score"]
        self._log(trainer, lambda logger: log_table([logger], "gif/influence/history", columns, self._history))

    @contextlib.contextmanager
    def _gathering_spares_training(self, what: str) -> Iterator[None]:
        """Inside of it an error ends the gathering of this fit, with a warning, and not the fit.

        Args:
            what: What is done there, for the warning.

        Raises:
            RankError: The processes are not at the same place any more, or not there: waiting for them would not end.
        """
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            first = self._gathering
            self._end_gathering()
            if not first:
                return
            kept = "are picked by a pass over the training data, once a call asks for them"
            if self.targets is not None:
                kept = "stay as they were picked before"
            warnings.warn(
                f"GIFCallback gathers nothing more in this fit, since {what} failed: {type(error).__name__}: {error}."
                f" Training goes on and is not affected. Targets {kept}.",
                GIFWarning,
                stacklevel=2,
            )

    def _end_gathering(self) -> None:
        """Lets go of the layers until the next fit, and of what a part of an epoch has shown."""
        self._gathering = False
        self._rank_on_demand = True
        self.neurons.detach()
        if self._within_epoch:
            self.neurons.reset()
            self.gradients.reset()

    @contextlib.contextmanager
    def _reports_spare_training(self, when: str) -> Iterator[None]:
        """Inside of it an error that is none of this package's ends the reports of this fit, and not the fit."""
        try:
            yield
        except (GIFError, OSError):
            raise
        except Exception as error:
            self._reporting = False
            rank_zero_warn(
                f"No influence report {when}, nor later in this fit: {type(error).__name__}: {error}. Training goes on"
                " and is not affected. `trainer.influence(query)` shows where the error comes from.",
                category=GIFWarning,
            )

    def _bind(self, trainer: Trainer) -> None:
        # partial objects can be pickled; a lambda could not
        trainer.influence = partial(self.influence, trainer)
        trainer.self_influence = partial(self.self_influence, trainer)
        trainer.unlearn = partial(self.unlearn, trainer)

    def _forget_statistics(self) -> None:
        """Drops what was gathered on another model."""
        self.neurons, self.gradients = NeuronStatistics(), GradientStatistics()
        self.targets = self.targets_epoch = None
        self._apart = False
        self._snapshots = Snapshots(self._snapshots.count)

    def _release(self) -> None:
        self.neurons.detach()

    def _pick(self, module: LightningModule, when: str) -> None:
        """Picks the targets from the statistics. It is never worth a run that no targets can be picked."""
        try:
            self.targets = self._select(module, self.settings)
        except SelectionError as error:
            self.targets = None
            rank_zero_warn(f"No targets were picked {when}: {error}", category=GIFWarning)

    def _select(
        self, module: LightningModule, settings: Settings, classes: Sequence[int] | None = None, **statistics: Any
    ) -> Targets:
        allowed = getattr(module, "influence_parameters", lambda: ["*"])()
        return select(
            module,
            settings.selector,
            settings.ratio,
            allowed=list(allowed),
            neurons=statistics.get("neurons", self.neurons),
            gradients=statistics.get("gradients", self.gradients),
            classes=classes,
            seed=settings.seed,
        )

    def _earlier_states(self, wanted: bool) -> dict[int, dict[str, Tensor]]:
        """The snapshots of training by epoch, if they are wanted."""
        states = self._snapshots.chosen() if wanted else {}
        if wanted and not states:
            raise ConfigurationError(
                "snapshots=True needs snapshots of the weights, but there are none: fit with GIFCallback(snapshots=4),"
                " or load a checkpoint of such a fit with that callback. After a fit of one epoch there is none beside"
                " the final weights."
            )
        return states

    def _choose_targets(
        self,
        objective: Objective,
        train: Examples,
        examples: Examples,
        choice: TargetsChoice,
        settings: Settings,
        overrides: Overrides,
    ) -> Targets:
        module = objective.module
        if choice == "batch":
            if settings.needs_no_cache:
                return self._select(module, settings)
            neurons, gradients = objective.observe(examples.sample(settings.sample_size(), settings.seed))
            return self._select(module, settings, neurons=neurons, gradients=gradients)
        if self._rank_on_demand and self.targets is None and not self.neurons:
            sample = train.sample(settings.sample_size(), settings.seed)
            rank_zero_info(f"No statistics from training: neurons are ranked by one pass over {len(sample)} examples.")
            self.neurons, self.gradients = objective.observe(sample)
            self._observed = module
        if choice == "class":
            return self._select(module, settings, classes=_known_classes(examples))
        repick = any(name in overrides for name in ("selector", "ratio", "seed"))
        if repick:
            return self._select(module, settings)
        if self.targets is None:
            self.targets = self._select(module, self.settings)
        return self.targets

    @contextlib.contextmanager
    def _attributing(
        self,
        trainer: Trainer,
        targets: TargetsChoice | None,
        among: Any,
        dataloader: DataLoader[Any] | None,
        k: int,
        overrides: Overrides,
        named: Sequence[str],
    ) -> Iterator[tuple[Objective, Examples, Examples | None, Callable[..., Settings]]]:
        """What scores are made from: objective, training data, those to be scored, and settings for many queries."""
        asked = self.settings.override(overrides, named)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigurationError(f"`k` must be a whole number of at least 1, got {k!r}.")
        on_targets = targets is not None or not overrides.keys().isdisjoint(("selector", "ratio"))
        choice: TargetsChoice = "cached" if targets is None else targets
        first = asked.for_influence(ggn=True, on_targets=on_targets)
        with self._opened(trainer, choice, first, dataloader) as (objective, train):
            rank = int(asked.bytes_to_keep(objective) / (_SKETCHES * objective.theta.nbytes))
            # A power of two: the same call should not be another one because a little more memory is free.
            rank = 1 << (rank.bit_length() - 1) if rank else 0

            def settle(queries: int, *, itself: bool = False) -> Settings:
                few = next(train.subset(torch.arange(1)).batches()).data
                return asked.for_influence(
                    ggn=has_gauss_newton(objective, objective.theta, few),
                    on_targets=on_targets,
                    queries=queries,
                    rank=rank,
                    itself=itself,
                )

            some = None if among is None else self._chosen_examples(among, train)
            if among is not None and some is None:
                raise ConfigurationError(
                    "`among` must be indices of the training dataset, or a function from a batch to truth values, got"
                    f" {describe(among)}."
                )
            yield objective, train, some, settle

    @contextlib.contextmanager
    def _opened(
        self, trainer: Trainer, choice: TargetsChoice, settings: Settings, dataloader: DataLoader[Any] | None
    ) -> Iterator[tuple[Objective, Examples]]:
        if choice not in ("cached", "class", "batch"):
            raise ConfigurationError(f"`targets` must be 'cached', 'class' or 'batch', got {choice!r}.")
        module = trainer.lightning_module
        if module is None:
            raise ConfigurationError("The trainer has no model yet: fit, validate or test first, or use attach().")
        processes = ProcessGroup.of(trainer)
        with processes.propagate_errors(), self.neurons.paused():
            processes.assert_equal([choice, asdict(settings)], "arguments", "Make the same call on all of them.")
            self._put_together(processes)
            with isolate_rng():
                loader = self._loader(trainer, processes) if dataloader is None else dataloader
            nothing_seen = self.targets is None and not self.neurons and not self.gradients
            if choice == "cached" and nothing_seen and not self._rank_on_demand and not settings.needs_no_cache:
                raise SelectionError(
                    "There are no cached targets: the model was not fitted with this callback, and no checkpoint with"
                    " its state was loaded. Fit, pass targets='batch' to rank neurons on the batch at hand, or use"
                    " lightning_gif.attach(trainer, model, …) for a model that was trained before."
                )
            opened = Objective.open(trainer, module, seed=settings.seed, double=settings.double, processes=processes)
            with opened as objective:
                most = trainer.fast_dev_run * settings.batch_size if trainer.fast_dev_run else None
                if not trainer.fast_dev_run and (trainer.overfit_batches or trainer.limit_train_batches != 1.0):
                    rank_zero_warn(
                        "The trainer limits its training batches (overfit_batches or limit_train_batches), but all"
                        " examples of the training loader are counted as trained on. Pass `dataloader=` with those that"
                        " were.",
                        category=GIFWarning,
                    )
                train = Examples.from_loader(
                    loader,
                    objective.prepare,
                    batch_size=settings.batch_size,
                    most=most,
                    seed=settings.seed,
                    processes=processes,
                )
                check_same_everywhere(train, "training data")
                train.warn_if_random()
                objective.learn_structure(train)
                yield objective, train

    def _loader(self, trainer: Trainer, processes: ProcessGroup) -> Any:
        """The training loader: that of the last ``fit``, or the one that a datamodule or the module would give."""
        found = self._train_loader if self._train_loader is not None else trainer.train_dataloader
        if found is None and trainer.datamodule is not None:
            each = getattr(trainer.datamodule, "prepare_data_per_node", True)
            if trainer.local_rank == 0 if each else trainer.is_global_zero:  # others would write the same files
                trainer.datamodule.prepare_data()
            processes.gather(None)  # until it is done
            trainer.datamodule.setup("fit")
            found = trainer.datamodule.train_dataloader()
        if found is None and brings_own(trainer.lightning_module, "train_dataloader"):
            found = trainer.lightning_module.train_dataloader()
        if found is None:
            raise TrainingDataError(
                "There is no training data: the trainer has not fitted, and has no datamodule. Pass `dataloader=` with"
                " a DataLoader over the training set, or `train_dataloaders=` to lightning_gif.attach()."
            )
        self._train_loader = found
        return found

    def _examples(self, given: Any, objective: Objective, settings: Settings) -> Examples:
        size, processes = settings.batch_size, objective.processes
        if isinstance(given, numbers.Number) or (isinstance(given, (list, tuple, range)) and _are_indices(given)):
            raise BatchError(
                f"Expected a batch as the training loader gives them, or a DataLoader, got {describe(given)}. For"
                " examples of a dataset by their indices, give a loader over them:"
                " DataLoader(Subset(dataset, [17, 4]), 64)."
            )
        if isinstance(given, DataLoader):
            found = Examples.from_loader(
                given, objective.prepare, batch_size=size, seed=settings.seed, processes=processes
            )
        else:
            found = Examples.from_batch(given, objective.prepare, batch_size=size, processes=processes)
        return check_same_everywhere(found, "batch or loader")

    @staticmethod
    def _chosen_examples(given: Any, train: Examples) -> Examples | None:
        """The training examples that indices or a function name; ``None`` if it is neither."""
        if callable(given) and not isinstance(given, Tensor):
            return train.where(given)
        return check_same_everywhere(train.with_ids(list(given)), "indices") if _are_indices(given) else None

    def _forget_examples(self, given: Any, train: Examples, objective: Objective, settings: Settings) -> Examples:
        chosen = self._chosen_examples(given, train)
        if chosen is not None:
            return chosen
        mask = isinstance(given, Tensor) and given.dtype is torch.bool and given.ndim == 1
        if mask or (not isinstance(given, DataLoader) and not any(tensor.ndim for tensor in tensors(given))):
            raise BatchError(
                "Expected the examples as a batch of the training loader, a DataLoader, a list of indices of the"
                f" training dataset, or a function from a batch to truth values, got {describe(given)}. For one"
                " example, [17]; for a mask, mask.nonzero().flatten(); for a Dataset or Subset, a DataLoader over it."
            )
        return self._examples(given, objective, settings)

    def _unseen_examples(
        self, given: DataLoader[Any] | Literal[False] | None, train: Examples, objective: Objective, settings: Settings
    ) -> Examples | None:
        """Examples that were not trained on: those given, or of the validation loader of ``fit``."""
        loader = self._unseen_loader if given is None else given
        if not isinstance(loader, DataLoader):
            return None
        found, size = None, settings.batch_size
        try:
            found = Examples.from_loader(loader, objective.prepare, batch_size=size, seed=settings.seed)
            objective.check(found.subset(torch.arange(1)), "unseen")
        except Exception:
            if given is not None:
                raise
            found = None  # validation may look at something else altogether
        if any(objective.processes.gather(found is None)) or found is None:
            return None
        found = check_same_everywhere(replace(found, processes=objective.processes), "unseen data")
        if shares_examples(found, train):
            if given is not None:
                raise ConfigurationError("`unseen` has examples of the training data; give those not trained on.")
            return None
        return found

    def _deliver(self, trainer: Trainer, report: _Report) -> _Report:
        report.loggers, report.processes = list(trainer.loggers), ProcessGroup.of(trainer)
        report.global_step = trainer.global_step
        self._log(trainer, lambda logger: report.log([logger]))
        return report

    def _log(self, trainer: Trainer, log: Callable[[Any], None]) -> None:
        if self.log_reports and not trainer.fast_dev_run and trainer.is_global_zero:
            for logger in trainer.loggers:
                try:
                    log(logger)
                except Exception as error:  # the report is done and the edit made: no logger may cost the user both
                    rank_zero_warn(
                        f"{type(logger).__name__} did not take the report, which is returned nevertheless:"
                        f" {type(error).__name__}: {error}. `report.log([logger])` tries again.",
                        category=GIFWarning,
                    )


def _single(loaders: Any) -> Any:
    """The loader in a list of one."""
    return loaders[0] if isinstance(loaders, (list, tuple)) and len(loaders) == 1 else loaders


def _are_indices(given: Any) -> bool:
    """Whether something is a list, range or array of whole numbers, if of any: a batch has tensors, of more axes."""
    if getattr(given, "ndim", None) == 1:
        return "int" in str(getattr(given, "dtype", ""))
    return isinstance(given, (list, tuple, range)) and all(
        isinstance(index, numbers.Integral) and not isinstance(index, bool) for index in given
    )


def _known_classes(examples: Examples) -> list[int]:
    classes = examples.classes
    if classes is None:
        raise SelectionError(
            "targets='class' needs a batch whose targets are classes (whole numbers, one for each example). Use"
            " targets='cached' or 'batch'."
        )
    return classes.unique().tolist()


def attach(
    trainer: Trainer,
    model: LightningModule,
    *,
    train_dataloaders: DataLoader[Any] | None = None,
    datamodule: Any = None,
    callback: GIFCallback | None = None,
) -> GIFCallback:
    """Gives a trainer ``influence`` and ``unlearn`` for a model that was trained elsewhere.

    There are no statistics from training then: unless the callback's state is loaded with a checkpoint, the first call
    ranks the neurons by one pass over ``curvature_examples`` training examples.

    Args:
        trainer: A trainer; it need not have run.
        model: The loaded model.
        train_dataloaders: The training data.
        datamodule: Or a datamodule that has it.
        callback: The callback to use; by default that of the trainer, or else a new one.

    Returns:
        The callback, which is among the trainer's from now on.

    Raises:
        ConfigurationError: If the trainer is not supported or none, the model is no LightningModule, or both kinds of
            data are given.

    Example::

        model = Classifier.load_from_checkpoint("last.ckpt")
        trainer = Trainer(logger=WandbLogger())
        attach(trainer, model, datamodule=data)
        trainer.unlearn(batch).save("edit.safetensors")
    """
    for name, given, kind in (("trainer", trainer, "Trainer"), ("model", model, "LightningModule")):
        if kind not in (base.__name__ for base in type(given).__mro__):  # of either of Lightning's packages
            found = f"{type(given).__module__}.{type(given).__qualname__}"
            raise ConfigurationError(f"`{name}` must be a {kind} of Lightning, got a {found}.")
    if train_dataloaders is not None and datamodule is not None:
        raise ConfigurationError("Give `train_dataloaders` or `datamodule`, not both.")
    present = [found for found in trainer.callbacks if isinstance(found, GIFCallback)]
    callback = callback or (present[0] if present else GIFCallback())
    callback._check_trainer(trainer)
    ProcessGroup.of(trainer)  # which are running
    if callback not in trainer.callbacks:
        trainer.callbacks.append(callback)
    if callback._observed is not None and callback._observed is not model:
        callback._forget_statistics()
    attach_model(trainer, model, train_dataloaders, datamodule)
    callback._train_loader, callback._unseen_loader = train_dataloaders, None
    callback._rank_on_demand = True
    callback._bind(trainer)
    return callback
