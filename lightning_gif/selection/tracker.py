"""Gathers statistics during ``fit`` and picks the target parameters from them."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from .._compat import rank_zero_warn
from ..data.structure import batch_size
from ..data.targets import class_targets
from ..distributed import ProcessGroup
from ..errors import BatchError, GIFWarning, RankError, SelectionError
from ..parameters import Targets
from ..sharding import has_shards, reshard
from .selectors import energy_of, ranks_neurons, select
from .snapshots import Snapshots
from .statistics import GradientStatistics, NeuronStatistics
from .training_length import TrainingLength

if TYPE_CHECKING:
    from .._compat import Trainer

__all__ = ["Selection", "TrainingTracker", "share_of_steps", "target_metrics"]

# The fractional parts of its multiples are spread evenly over the unit interval (a Weyl sequence).
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

# Statistics are gathered at no more than this share of the steps of an epoch, but at so many in any case. A step that
# gathers takes up to half as long again, see benchmarks/README.md, "Small networks and few examples".
_LARGEST_SHARE, _LEAST = 1 / 20, 2

# With no more parameters than this, the selection of an epoch may wait until somebody reads the targets. It takes as
# long as a training step of such a network. The statistics that it needs are kept for an epoch longer.
_MAY_WAIT = 2**16


class Selection(Protocol):
    """How targets are picked: the arguments of :func:`~lightning_gif.selection.select`."""

    @property
    def selector(self) -> str | Sequence[str]: ...

    @property
    def ratio(self) -> float: ...

    @property
    def seed(self) -> int: ...


class _Waiting(NamedTuple):
    """A selection that is made when it is needed.

    Attributes:
        module: The module.
        epoch: The epoch at whose end the targets are picked.
        neurons: The statistics of that epoch; ``None`` while they are still those of the tracker.
        gradients: The same for gradients.
    """

    module: nn.Module
    epoch: int
    neurons: NeuronStatistics | None = None
    gradients: GradientStatistics | None = None


class TrainingTracker:
    """Gathers statistics during ``fit``, and picks the target parameters from them at the end of each epoch.

    The statistics come from the forward and backward passes of training. The targets of small modules are picked when
    they are read, from the statistics at the end of the epoch. An error in gathering does not end the fit, see
    :meth:`guard`.

    Args:
        selection: How targets are picked.
        snapshots: How many snapshots to keep, see :class:`~lightning_gif.selection.snapshots.Snapshots`.

    Attributes:
        neurons: Mean outputs and output gradients of neurons, by class.
        gradients: Mean squares of the gradients of parameters.
        snapshots: Weights at the end of earlier epochs.
        length: How far the optimizers could move each parameter.
        module: The module that the statistics and the targets belong to; ``None`` before the first ``fit``.
        ranks_on_demand: Whether a call may compute missing statistics by a pass over the training data.
        active: Whether the current fit gathers statistics; false after an error in gathering.
    """

    def __init__(self, selection: Selection, snapshots: int | Literal["auto"]) -> None:
        self.selection = selection
        self.snapshots = Snapshots(snapshots)
        self.neurons = NeuronStatistics()
        self.gradients = GradientStatistics()
        self.length = TrainingLength()
        self._targets: Targets | None = None
        self._targets_epoch: int | None = None
        self._waiting: _Waiting | None = None
        self.module: nn.Module | None = None
        self.ranks_on_demand = False
        self.active = True
        self._has_warned = False  # that no targets can be picked
        # The names of an optimizer's parameters by id, with the parameters, since another one could get the id of one
        # that is gone.
        self._names: dict[int, tuple[str | None, nn.Parameter]] = {}
        self._share: float | None = None  # of the optimizer steps of this epoch, at which statistics are gathered
        self._due = False  # whether statistics are gathered at the current optimizer step
        self._within_epoch = False  # whether an epoch has begun and not ended
        self._local = False  # whether the sums over neurons are of this process alone, not of all

    # ----------------------------------------------------------------------------------------------------------------
    # Training, in the order of the hooks
    # ----------------------------------------------------------------------------------------------------------------

    def start_fit(self, module: nn.Module, *, resumed: bool = False) -> None:
        """Begins a fit. Statistics and targets of another module are dropped.

        Args:
            module: The module.
            resumed: Whether there were optimizer steps before.
        """
        self.follow(module)
        self.module = module
        self.ranks_on_demand = False
        self.active = True
        self._has_warned = False
        self._names = {}
        self._within_epoch = False
        self._share = None
        self.length.start(resumed=resumed)

    def attach(self, module: nn.Module) -> None:
        """Adds the hooks that read outputs and output gradients."""
        with self.guard("hooking into the layers"):
            self.neurons.attach(module, partial(self.guard, "reading what passes through a layer"))

    def start_epoch(self) -> None:
        """Clears the statistics of the previous epoch."""
        if self._waiting is not None:
            self._waiting = self._waiting._replace(neurons=self.neurons.copy(), gradients=self.gradients)
        self.neurons.reset()
        self.gradients = GradientStatistics()
        self._local = True
        self._share = None

    def start_batch(self, trainer: Trainer, batch: Any, batch_idx: int, *, neurons: bool, steps: int | None) -> None:
        """Starts recording a training batch, if statistics are gathered at its optimizer step.

        Args:
            trainer: The trainer in ``fit``.
            batch: The next batch that passes through the model.
            batch_idx: Its number in the epoch.
            neurons: Whether to gather statistics of neurons.
            steps: The approximate number of optimizer steps of an epoch at which to gather, see :func:`share_of_steps`.
        """
        self._within_epoch = True
        if self._share is None:
            self._share = share_of_steps(trainer, batch_idx, steps)
        # Taking every n-th step would be biased if the training data had the same period.
        self._due = batch_idx // trainer.accumulate_grad_batches * _GOLDEN_RATIO % 1 < self._share
        if not (neurons and self._due):
            return
        with self.guard("reading the batch"):
            if not self._local and not trainer.is_global_zero:
                self.neurons.reset()  # the sums so far are over all processes already, and rank 0 keeps them
            self._local = True  # also where gathering has ended: all processes have to agree on whether to sum
            if not self.active:
                return
            try:
                size = batch_size(batch)
            except BatchError:
                size = None
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            self.neurons.record(class_targets(batch), size, trainer.accumulate_grad_batches / scale)

    def add_gradients(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Adds the gradients of an optimizer's parameters, if statistics are gathered at this optimizer step."""
        if not (self._due and self.active):
            return
        with self.guard("reading the gradients"):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if any(id(parameter) not in self._names for parameter in parameters):
                named = {id(parameter): name for name, parameter in reshard(module).named_parameters()}
                self._names |= {id(parameter): (named.get(id(parameter)), parameter) for parameter in parameters}
            names = [self._names[id(parameter)][0] for parameter in parameters]
            pairs = zip(names, parameters, strict=True)
            self.gradients.add((name, parameter.grad) for name, parameter in pairs if name is not None)

    def count_step(self, optimizer: Optimizer) -> None:
        """Adds the learning rates of an optimizer step to :attr:`length`."""
        if not self.active:
            return
        try:
            self.length.add(optimizer)
        except Exception:  # each step counts, and entering the guard takes longer than this
            with self.guard("reading the learning rates"):
                raise

    def end_epoch(self, module: nn.Module, epoch: int, processes: ProcessGroup, *, may_wait: bool = False) -> bool:
        """Picks the targets from the statistics of the epoch.

        Args:
            module: The module.
            epoch: The number of the epoch.
            processes: The processes to sum the statistics over.
            may_wait: Whether the selection may wait until somebody reads the targets.

        Returns:
            Whether there are new targets now; the same on all processes.
        """
        self._within_epoch = False
        self._waiting = None
        waits = may_wait and processes.size == 1 and self.active and self.neurons.has_read and _is_small(module)
        if not waits:
            self.sum_over(processes)
        with self.guard("reading the state of the optimizer"):
            self.length.close(module)
        if waits:
            self._waiting = _Waiting(module, epoch)
            return False
        if not self._all_active(processes):
            return False
        # All layers that have hooks ran as compiled code.
        self.ranks_on_demand = self.neurons.is_attached and not self.neurons
        if self.ranks_on_demand and ranks_neurons(self.selection.selector):
            self.targets = self.targets_epoch = None
            return False
        with self.guard("picking the target parameters"), processes.propagate_errors():
            self.pick(module, f"at the end of epoch {epoch}")
        if not self._all_active(processes) or self.targets is None:
            return False
        self.targets_epoch = epoch
        return True

    def take_snapshot(self, epoch: int, module: nn.Module, processes: ProcessGroup) -> None:
        """Passes the weights at the end of an epoch to :attr:`snapshots`, which keep them or not."""
        if not self._all_active(processes):
            return
        before = dict(self.snapshots.kept), self.snapshots.last
        with self.guard("taking a snapshot of the weights"):
            try:
                with processes.propagate_errors():
                    self.snapshots.add(epoch, module, processes)
            except BaseException:  # all processes keep the same snapshots
                self.snapshots.kept, self.snapshots.last = before
                raise

    def end_fit(self, module: nn.Module) -> None:
        """Ends a fit."""
        self._pick_what_waits()
        with self.guard("reading the state of the optimizer"):
            self.length.end(module)
        self.detach()

    def detach(self) -> None:
        """Removes the hooks."""
        self.neurons.detach()
        self._names = {}

    def abandon_epoch(self, module: nn.Module) -> None:
        """Removes the hooks after an exception. Nothing is summed over the processes, because some may have ended."""
        self._pick_what_waits()
        self._local = False
        with self.guard("reading the state of the optimizer"):
            self.length.end(module)
        self.neurons.detach()

    # ----------------------------------------------------------------------------------------------------------------
    # Statistics and targets
    # ----------------------------------------------------------------------------------------------------------------

    def follow(self, module: nn.Module) -> None:
        """Drops everything that was gathered, if it belongs to another module."""
        if self.module is not None and self.module is not module:
            self.forget()

    def forget(self) -> None:
        """Drops everything that was gathered."""
        self.neurons, self.gradients = NeuronStatistics(), GradientStatistics()
        self.targets = self.targets_epoch = None
        self.snapshots = Snapshots(self.snapshots.argument)
        self.length = TrainingLength()
        self._local = False

    @property
    def targets(self) -> Targets | None:
        """The targets of the last selection, or ``None``."""
        self._pick_what_waits()
        return self._targets

    @targets.setter
    def targets(self, targets: Targets | None) -> None:
        self._waiting = None
        self._targets = targets

    @property
    def targets_epoch(self) -> int | None:
        """The epoch at whose end :attr:`targets` were picked, or ``None``."""
        self._pick_what_waits()
        return self._targets_epoch

    @targets_epoch.setter
    def targets_epoch(self, epoch: int | None) -> None:
        self._targets_epoch = epoch

    def _pick_what_waits(self) -> None:
        """Makes the selection of the last epoch, if it has waited."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        summed = False
        with self.guard("summing the statistics of batches"):
            (self.neurons if waiting.neurons is None else waiting.neurons).sum_batches()
            summed = True
        if not summed:
            return
        with self.guard("picking the target parameters"):
            when = f"at the end of epoch {waiting.epoch}"
            self.pick(waiting.module, when, neurons=waiting.neurons, gradients=waiting.gradients)
            if self._targets is not None:
                self._targets_epoch = waiting.epoch

    @property
    def has_seen_nothing(self) -> bool:
        """Whether there are neither targets nor statistics to pick them from."""
        return self.targets is None and not self.neurons and not self.gradients

    def sum_over(self, processes: ProcessGroup) -> None:
        """Replaces the statistics of neurons by their sums over all processes, unless this has been done.

        The statistics of gradients are the same on all processes already, since DDP averages gradients. Those of
        sharded parameters stay in parts, see :meth:`~.statistics.GradientStatistics.whole`.
        """
        if self._local:
            with self.guard("summing the statistics of batches"):
                self.neurons.sum_batches()
            self._all_active(processes)
            self.neurons.sum_over(processes)
            self._local = False
        if self.module is not None and has_shards(self.module):
            with self.guard("reading the state of the optimizer"):
                self.length.read(self.module)
            self.length.sum_over(processes)

    def select(
        self,
        module: nn.Module,
        selection: Selection,
        *,
        classes: Sequence[int] | None = None,
        neurons: NeuronStatistics | None = None,
        gradients: GradientStatistics | None = None,
        energies: Tensor | None = None,
    ) -> Targets:
        """Picks targets without keeping them.

        Args:
            module: The module, which may restrict the targets by ``influence_parameters``.
            selection: How targets are picked.
            classes: Rank neurons by the examples of these classes only; by all if ``None``.
            neurons: Statistics of neurons; by default those gathered in training.
            gradients: Statistics of gradients; by default those gathered in training.
            energies: The gradient energy of each parameter, ``(p,)``, if the selector ranks by it.

        Raises:
            SelectionError: See :func:`~lightning_gif.selection.select`.
        """
        allowed = getattr(module, "influence_parameters", lambda: ["*"])()
        return select(
            module,
            selection.selector,
            selection.ratio,
            allowed=list(allowed),
            neurons=self.neurons if neurons is None else neurons,
            gradients=self.gradients.whole(ProcessGroup.of_weights(module)) if gradients is None else gradients,
            classes=classes,
            seed=selection.seed,
            energies=energies,
        )

    def pick(
        self,
        module: nn.Module,
        when: str,
        *,
        neurons: NeuronStatistics | None = None,
        gradients: GradientStatistics | None = None,
    ) -> None:
        """Sets :attr:`targets`. If none can be picked, it warns and sets ``None``.

        A selector that ranks by the gradient of the examples in question has no targets until there are such examples.

        Args:
            module: The module.
            when: When this happens, for the warning.
            neurons: Statistics of neurons; by default those of the current epoch.
            gradients: Statistics of gradients; by default those of the current epoch.
        """
        if energy_of(self.selection.selector) is not None:
            self.targets = None
            return
        try:
            self.targets = self.select(module, self.selection, neurons=neurons, gradients=gradients)
        except SelectionError as error:
            self.targets = None
            if not self._has_warned:
                rank_zero_warn(
                    f"No targets were picked {when}: {error} Scores need no targets. This warning comes once in a fit.",
                    category=GIFWarning,
                )
            self._has_warned = True

    # ----------------------------------------------------------------------------------------------------------------
    # Errors
    # ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A block whose errors end gathering for this fit, with one warning, but not the fit.

        Args:
            what: What the block does, for the warning.

        Raises:
            RankError: If a process is out of step or has ended, and going on would block.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, RankError) and error.raised_elsewhere is None:
                raise
            first = self.active
            self._stop()
            if not first:
                return
            consequence = "will be picked by a pass over the training data when a call needs them"
            if self.targets is not None:
                consequence = "stay as they were picked before"
            warnings.warn(
                f"GIFCallback gathers no more statistics in this fit: {what} failed with {type(error).__name__}:"
                f" {str(error).rstrip('.')}. Training goes on unchanged. Target parameters {consequence}.",
                GIFWarning,
                stacklevel=2,
            )

    def _stop(self) -> None:
        """Ends gathering until the next fit, and drops the statistics of an epoch that is not complete."""
        self.active = False
        self.ranks_on_demand = True
        self.neurons.detach()
        if self._within_epoch:
            self.neurons.reset()
            self.gradients.reset()

    def _all_active(self, processes: ProcessGroup) -> bool:
        """Whether all processes gather. If gathering has ended on one process, this ends it on all of them."""
        everywhere = all(processes.gather(self.active))
        if self.active and not everywhere:
            self._stop()
        return everywhere

    # ----------------------------------------------------------------------------------------------------------------
    # Checkpoints
    # ----------------------------------------------------------------------------------------------------------------

    def state(self, key: str, processes: ProcessGroup) -> dict[str, Any]:
        """Targets, statistics and snapshots as tensors and plain values. All processes must call it.

        Args:
            key: Identifies the selection: callbacks with the same key pick the same targets.
            processes: The processes to sum the statistics over.
        """
        self.sum_over(processes)
        if self.module is not None:
            self.length.close(self.module)
        return {
            "state_key": key,
            "targets": None if self.targets is None else dict(self.targets),
            "neurons": self.neurons.state(),
            "gradients": self.gradients.whole(processes).state(),
            "snapshots": self.snapshots.state(),
            "length": self.length.state(),
        }

    def load_state(self, state: Mapping[str, Any], module: nn.Module, key: str) -> None:
        """Restores what :meth:`state` returned. If its key differs, the targets are picked again from its statistics.

        A state that is damaged or belongs to another module is dropped with a warning, since the run does not need it.
        """
        self._local = False
        try:
            targets = None if state["targets"] is None else Targets(state["targets"])
            if targets is not None:
                targets.check_fit(module)
            self.neurons.load_state(state["neurons"], module)
            self.gradients.load_state(state["gradients"], module)
            if state.get("snapshots"):
                self.snapshots.load_state(**state["snapshots"], module=module)
            if state.get("length"):  # files of earlier versions have none
                self.length = TrainingLength.of_state(**state["length"])
            same = state["state_key"] == key
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self.forget()
            rank_zero_warn(
                "The checkpoint's state of GIFCallback is damaged or does not fit the model, and is ignored:"
                f" {type(error).__name__}: {error}. Targets will be picked again: after the next epoch of training, or"
                " by a pass over the training data if the model is attached with attach().",
                category=GIFWarning,
            )
            return
        self.ranks_on_demand |= targets is None and not self.neurons
        if same:
            self.targets = targets
        elif targets is not None:
            rank_zero_warn(
                f"The checkpoint's targets were picked by {state['state_key']}, but this callback is {key}. They are"
                " picked again, from the checkpoint's statistics.",
                category=GIFWarning,
            )
            with self.guard("picking the target parameters"):
                self.pick(module, "from the checkpoint")


def _is_small(module: nn.Module) -> bool:
    """Whether the selection for a module may wait."""
    return sum(parameter.numel() for parameter in module.parameters()) <= _MAY_WAIT


def share_of_steps(trainer: Trainer, batch_idx: int, wanted: int | None) -> float:
    """The share of the optimizer steps of an epoch at which statistics are gathered.

    Args:
        trainer: The trainer in ``fit``.
        batch_idx: The number of the next batch in the epoch.
        wanted: The approximate number of optimizer steps of an epoch at which to gather; ``None`` for all. In a short
            epoch there are fewer: one in twenty, but at least 2.
    """
    if wanted is None:
        return 1.0
    steps = math.inf
    if math.isfinite(trainer.num_training_batches):
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
    if trainer.max_steps > 0:
        steps = min(steps, trainer.max_steps - trainer.global_step + batch_idx // trainer.accumulate_grad_batches)
    return 1.0 if math.isinf(steps) else min(wanted, max(steps * _LARGEST_SHARE, _LEAST)) / max(steps, 1)


def target_metrics(targets: Targets, previous: Targets | None, module: nn.Module) -> dict[str, float]:
    """The logged values of a selection: number and share of the targets, and their overlap with ``previous``."""
    values = {
        "gif_targets/count": float(targets.count),
        "gif_targets/share": targets.count / sum(parameter.numel() for parameter in module.parameters()),
        "gif_targets/layers": float(len(targets)),
    }
    if previous is not None:
        values["gif_targets/jaccard"] = targets.jaccard(previous)
    return values
