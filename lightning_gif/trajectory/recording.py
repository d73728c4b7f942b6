"""Records a fit, so that it can be replayed."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._compat import is_a, rank_zero_info, rank_zero_warn, watch_iterators
from ..config import check_number
from ..data.loaders import check_loader
from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..errors import ConfigurationError, GIFError, GIFWarning, RankError, TrainingDataError
from ..parameters import ParameterSpace, tensors_of
from .averaging import Averages
from .marks import Generators, mark_of
from .record import BatchRecord, StepRecord, TrainingState, Trajectory
from .sampling import DrawnIndices
from .updates import UPDATES

if TYPE_CHECKING:
    from .._compat import LightningModule, Trainer

__all__ = ["TrajectoryRecorder", "training_state"]


# The number of steps between two states, if the length of the run is not known. It doubles as the run gets longer.
_FIRST_SPACING = 8

# So many steps are written together. A checkpoint has them written earlier, so that a fit can go on from it.
_STEPS_TOGETHER = 1000

# What a run is compared by, in words.
_FACTS = {
    "module": "class of the module",
    "shapes": "set of trainable parameters",
    "optimizer": "optimizer",
    "clip_algorithm": "clipping of gradients",
    "clip_limit": "clipping of gradients",
    "dataset_size": "size of the dataset",
    "n_processes": "number of processes",
    "dtype": "default dtype of PyTorch",
}

_PRECISIONS = ("32-true", "64-true")


class TrajectoryRecorder:
    """Records the optimizer steps of a fit in a folder, and the state of the training before some of them.

    The states are about as many as the steps between two of them. So both the folder and a replay from one state to the
    next take few copies of the weights. An error in recording does not end the fit, see :meth:`guard`.

    Args:
        folder: The folder; ``None`` records nothing. Each process records its own batches in it.
        gib: The GiB that the states may take (``trajectory_size``); by default as much as about √T states of T steps.

    Attributes:
        active: Whether the current fit is recorded.

    Raises:
        ConfigurationError: If ``gib`` is not a number above 0.
    """

    def __init__(self, folder: str | None, gib: float | None = None) -> None:
        above_0 = "a number above 0 (GiB)"
        check_number("trajectory_size", gib, above_0, lambda value: 0 < value < math.inf, optional=True)
        self.folder = folder
        self._gib = gib
        self.active = False
        self._drawn = DrawnIndices()
        self._processes = SINGLE_PROCESS
        self._most: int | None = None
        self._unwatch: Callable[[], None] | None = None

    # ----------------------------------------------------------------------------------------------------------------
    # Training, in the order of the hooks
    # ----------------------------------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Checks that a fit can be recorded, before it begins, and watches what its loader draws.

        Raises:
            ConfigurationError: If it cannot.
        """
        self.close()
        processes = ProcessGroup.of(trainer)
        with processes.propagate_errors():
            other = "Give the same folder on all processes, on a disk that all of them share."
            processes.assert_equal(self.folder, "folder `trajectory`", other)
            if self.folder is None or trainer.fast_dev_run:
                return
            _check_run(trainer, module)
            _check_folder(Path(self.folder), resumed=trainer.ckpt_path is not None)
        self._processes = processes
        self._unwatch = watch_iterators(trainer, self._drawn.around)

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begins or continues the record, when loaders and optimizers exist.

        Raises:
            ConfigurationError: If the fit cannot be recorded with this loader, optimizer, folder or size.
        """
        if self._unwatch is None:
            return
        try:
            with self._processes.propagate_errors():
                self._start(trainer, module)
        except GIFError as error:
            self.close()
            raise ConfigurationError(
                f"The training cannot be recorded: {str(error).rstrip('.')}. Or omit `trajectory`:"
                " trainer.influence(batch) without `through` needs no record."
            ) from error
        with self.guard("at the start of the fit"):
            if self._processes.rank == 0:  # all have the same state
                self._add_state(self._state())
            self.active = True

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        _check_loader(trainer)
        if any(isinstance(one, nn.SyncBatchNorm) for one in module.modules()):
            raise ConfigurationError(
                "SyncBatchNorm combines the batches of all processes, which a replay cannot do. Use BatchNorm without"
                " Trainer(sync_batchnorm=True)"
            )
        self._trainer, self._module, self._optimizer = trainer, module, _optimizer_of(trainer)
        self._names = {id(value): name for name, value in module.named_parameters()}
        self._averages, self._averaged = Averages(trainer), list[tuple[int, float, float]]()
        self._step, self._steps = trainer.global_step, list[StepRecord]()
        self._batches = list[BatchRecord]()
        self._pending: BatchRecord | None = None
        self._options: list[dict[str, Any]] = []
        self._final: TrainingState | None = None
        self._spacing, self._grows = self._spaced(trainer)
        self._trajectory = self._opened(trainer, module, self._optimizer)

    def _opened(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> Trajectory:
        folder, size = Path(self.folder or ""), len(_loader_of(trainer).dataset)
        shapes = {name: list(slot.shape) for name, slot in ParameterSpace(module).slots.items()}
        limit = trainer.gradient_clip_val
        algorithm = None if not limit else str(getattr(trainer.gradient_clip_algorithm, "value", None) or "norm")
        facts: dict[str, Any] = {
            "module": type(module).__name__,
            "shapes": shapes,
            "optimizer": type(optimizer).__name__,
            "clip_algorithm": algorithm,
            "clip_limit": float(limit or 0.0),
            "dataset_size": size,
            "n_processes": trainer.world_size,
            "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        }
        step, processes = trainer.global_step, self._processes
        if not processes.broadcast(bool(step) or (trainer.ckpt_path is not None and any(folder.iterdir()))):
            begun = Trajectory.create(folder, **facts).run if processes.rank == 0 else None
            mark = processes.broadcast("" if begun is None else begun.mark)
            trajectory = Trajectory.open(folder, processes.rank)
            if trajectory.run.mark != mark:
                raise ConfigurationError(f"the processes have different folders at {self.folder!r}. Use a shared disk")
            return trajectory
        trajectory = Trajectory.open(folder, processes.rank)
        differing = [_FACTS[name] for name, value in facts.items() if getattr(trajectory.run, name) != value]
        if differing:
            raise ConfigurationError(
                f"the run in {self.folder!r} had another {', another '.join(dict.fromkeys(differing))}. Continue it"
                " with the settings of its first fit"
            )
        self._averaged = trajectory.averages()[: self._averages.count]
        trajectory.resume(step)
        if self._most is not None and processes.rank == 0:
            for state in trajectory.states[1:]:
                if state % self._spacing:
                    trajectory.drop_state(state)
        return trajectory

    def _spaced(self, trainer: Trainer) -> tuple[int, bool]:
        """The number of steps between two states, and whether it grows with the run. Says how large the folder gets."""
        total = float(trainer.estimated_stepping_batches)
        known = math.isfinite(total) and total > 0
        spacing = max(round(math.sqrt(total)), 1) if known else _FIRST_SPACING
        size, self._most = self._expected_bytes(), None
        if self._gib is not None:
            # A fit that goes on has one more state, that of its checkpoint, and an average is about one.
            more = bool(trainer.global_step) + self._averages.exists
            self._most = int(self._gib * 2**30 / max(size, 1)) - more
            if self._most < 2:
                least = 1.01 * (2 + more) * size / 2**30  # no less when it is rounded
                raise ConfigurationError(
                    f"a state of the training takes {_in_units(size)}, and the record needs at least {2 + more} of"
                    f" them, but `trajectory_size` is {self._gib:.3g} GiB. Give at least {least:.3g}"
                )
            spacing = max(spacing, math.ceil(total / (self._most - 1))) if known else spacing
        n_states = math.ceil(total / spacing) + 1 if known else 0
        most = "About √T states for T steps" if self._most is None else f"Up to {self._most} states"
        whole = f" That is {_in_units(n_states * size)} in all, and" if known else " Besides, there are"
        rank_zero_info(
            f"The training is recorded in {self.folder!r}. {f'{n_states} states' if known else most} will be stored, of"
            f" {_in_units(size)} each (weights, buffers and the optimizer's state).{whole} 8 bytes for each example of"
            " each step. A batch for which random numbers are drawn takes 10 to 20 KiB more."
        )
        return spacing, not known

    def start_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Notes a batch before its step, and the state of the training if one is due."""
        if not self.active:
            return
        with self.guard("reading a batch"):
            self._generators = Generators.now(trainer.strategy.root_device)
            drawn = self._drawn.next(self._generators)
            if drawn is None:
                raise TrainingDataError("the indices of its batches are not known")
            self._note_averages()
            is_due = self._processes.rank == 0 and not self._batches and self._step % self._spacing == 0
            if is_due and self._step not in self._trajectory.states:
                self._add_state(self._state())
            self._pending = BatchRecord(drawn.ids, batch_idx, mark_of(batch), {}, reading=drawn.generators)

    def before_step(self, optimizer: Optimizer) -> None:
        """Notes the settings of the optimizer for its step."""
        if self.active:
            with self.guard("reading the optimizer"):
                self._options = [_options_of(group) for group in optimizer.param_groups]

    def end_batch(self, trainer: Trainer, module: nn.Module) -> None:
        """Notes whether a batch drew random numbers, and the optimizer step if there was one."""
        if not self.active or self._pending is None:
            return
        with self.guard("reading a batch"):
            batch, self._pending, before = self._pending, None, self._generators
            drew = before.differ(Generators.now(trainer.strategy.root_device))
            self._batches.append(replace(batch, generators=before.tensors()) if drew else batch)
            if trainer.global_step == self._step:
                return
            groups = self._optimizer.param_groups
            step = StepRecord(
                number=self._step,
                epoch=trainer.current_epoch,
                divisor=trainer.accumulate_grad_batches,
                members=[[self._names[id(one)] for one in group["params"]] for group in groups],
                options=self._options,
                evaluating=[name for name, one in module.named_modules() if not one.training],
                batches=tuple(self._batches),
            )
            self._steps.append(step)
            self._batches, self._step, self._final = [], trainer.global_step, None
            if len(self._steps) >= _STEPS_TOGETHER:
                self._write_steps()

    def end_epoch(self) -> None:
        """Keeps the state, which is the last one if no step follows. Later hooks may exchange the weights."""
        if self.active and self._processes.rank == 0:
            with self.guard("reading the weights"):
                self._final = self._state()

    def flush(self) -> None:
        """Writes the steps so far, as when Lightning writes a checkpoint."""
        if self.active:
            with self.guard("writing steps"):
                self._write_steps()

    def end(self) -> None:
        """Ends the record with the state after the last step."""
        if self.active:
            with self.guard("the end"):
                self._write_steps()
                if self._processes.rank == 0:
                    final = self._final if self._final is not None else self._state()
                    self._add_state(final)
                    if self._averages.module is not None:
                        average = training_state(final.step, self._averages.module, self._optimizer)
                        self._trajectory.add_average(average)
                    self._trajectory.set_end(final.step)
        self.close()

    def abandon(self) -> None:
        """Ends the record after an exception: the steps so far are kept, so that a later fit can continue it."""
        self.flush()
        self.close()

    def close(self) -> None:
        """Lets go of the trainer."""
        self.active = False
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        self._drawn.end()

    # ----------------------------------------------------------------------------------------------------------------
    # Files
    # ----------------------------------------------------------------------------------------------------------------

    def _state(self) -> TrainingState:
        state = training_state(self._step, self._module, self._optimizer)
        if state.weights.keys() != self._trajectory.run.shapes.keys():
            raise ConfigurationError("parameters were frozen or unfrozen during the fit, so there is no one derivative")
        return state

    def _expected_bytes(self) -> int:
        """The size of a stored state. The optimizer may have no state yet, as before its first step."""
        tensors = 0
        for group in self._optimizer.param_groups:
            adaptive = 2 + bool(group.get("amsgrad")) if "betas" in group else bool(group.get("momentum"))
            new = [one for one in group["params"] if not self._optimizer.state.get(one)]
            tensors += adaptive * sum(one.numel() * one.element_size() for one in new)
        return training_state(self._step, self._module, self._optimizer).nbytes + tensors

    def _add_state(self, state: TrainingState) -> None:
        self._trajectory.add_state(state)
        states = self._trajectory.states
        most = 2 * self._spacing + 2 if self._most is None else min(2 * self._spacing + 2, self._most - 1)
        if self._grows and len(states) > most:
            self._spacing *= 2
            for step in states[1:-1]:
                if step % self._spacing:
                    self._trajectory.drop_state(step)

    def _note_averages(self) -> None:
        """Notes how the weights after the last step were averaged."""
        done = self._trainer.global_step  # another callback may save a checkpoint before :meth:`end_batch`
        self._averaged += [(done, share, of_buffers) for share, of_buffers in self._averages.new_shares()]

    def _write_steps(self) -> None:
        self._note_averages()
        if self._averaged and self._processes.rank == 0:
            self._trajectory.set_averages(self._averaged)
        self._trajectory.add_steps(self._steps)
        self._steps = []

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A block whose errors end the recording, with one warning, but not the fit.

        Args:
            what: What the block does, for the warning.
        """
        try:
            yield
        except Exception as error:
            self.close()
            text = (
                f"The training is not recorded any further ({what}): {type(error).__name__}: {str(error).rstrip('.')}."
                " Training goes on unchanged. trainer.influence(batch) without `through` needs no record."
            )
            if self._processes.rank == 0:
                rank_zero_warn(text, category=GIFWarning)
            elif not isinstance(error, RankError):  # which the process with the error warns of
                warnings.warn(f"Process {self._processes.rank}: {text}", GIFWarning, stacklevel=2)


def _in_units(size: float) -> str:
    """A number of bytes as text."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def training_state(step: int, module: nn.Module, optimizer: Optimizer) -> TrainingState:
    """A copy of the state of a training on the CPU, before a step."""
    slots, copies = ParameterSpace(module).slots, {}
    for name, value in tensors_of(module).items():
        copies[name] = value.detach().to("cpu", copy=True)
    names = {id(value): name for name, value in module.named_parameters()}
    states = {
        names[id(parameter)]: {
            key: value.detach().to("cpu", copy=True) for key, value in state.items() if isinstance(value, Tensor)
        }
        for parameter, state in optimizer.state.items()
        if id(parameter) in names
    }
    return TrainingState(
        step,
        {name: copies[name] for name in slots},
        {name: value for name, value in copies.items() if name not in slots},
        {name: states[name] for name in slots if name in states},
    )


def _options_of(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group as plain values."""
    options: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, Tensor):
            options[name] = float(value)
        elif value is None or isinstance(value, (bool, int, float)):
            options[name] = value
        elif name == "betas":
            options[name] = [float(beta) for beta in value]
    return options


def _loader_of(trainer: Trainer) -> Any:
    loader: Any = trainer.train_dataloader
    return loader


def _check_loader(trainer: Trainer) -> None:
    loader = check_loader(_loader_of(trainer))
    if loader.batch_sampler is None or not hasattr(loader.dataset, "__len__"):
        raise TrainingDataError(
            "the record needs a DataLoader that draws batches from a map-style dataset by their indices"
        )
    if not getattr(loader, "in_order", True):
        raise TrainingDataError("the record needs a DataLoader with in_order=True")


def _optimizer_of(trainer: Trainer) -> Optimizer:
    """The optimizer, if its steps can be replayed.

    Raises:
        ConfigurationError: If they cannot.
    """
    (optimizer,) = trainer.optimizers
    if type(optimizer) not in UPDATES:
        known = ", ".join(kind.__name__ for kind in UPDATES)
        raise ConfigurationError(
            f"the optimizer {type(optimizer).__name__} cannot be replayed. Use one of torch.optim: {known}"
        )
    return optimizer


def _check_run(trainer: Trainer, module: LightningModule) -> None:
    """Checks what is known of a run before its loaders and optimizers exist."""
    reason = None
    if trainer.world_size > 1 and is_a(trainer.strategy, "ModelParallelStrategy"):
        reason = "its processes hold parts of the weights, and a record has all of them. Use strategy='ddp'"
    elif any(is_a(one, "StochasticWeightAveraging") for one in trainer.callbacks):
        reason = "StochasticWeightAveraging replaces the weights at the end. Use Lightning's WeightAveraging"
    elif not module.automatic_optimization:
        reason = f"{type(module).__name__} optimises manually, and the record is of automatic optimization"
    elif trainer.precision not in _PRECISIONS:
        reason = f"the precision {trainer.precision!r} rounds differently in a replay. Use Trainer(precision='32-true')"
    if reason is not None:
        raise ConfigurationError(
            f"The training cannot be recorded: {reason}. Or omit `trajectory`: trainer.influence(batch) without"
            " `through` needs no record."
        )


def _check_folder(folder: Path, *, resumed: bool) -> None:
    """Checks that a fit can begin or continue a record in a folder."""
    empty = not folder.exists() or (folder.is_dir() and not os.listdir(folder))
    if resumed and not empty:
        Trajectory.open(folder)
    elif not empty:
        raise ConfigurationError(
            f"The fit would be recorded in {str(folder)!r}, which is a file or is not empty. Give another folder as"
            " `trajectory`, or delete this one. To continue a recorded run, call trainer.fit(model, ckpt_path=…)."
        )
    elif resumed:
        raise ConfigurationError(
            f"The fit continues a run from a checkpoint, but the record of its earlier steps is not in"
            f" {str(folder)!r}. Give the folder of the run as `trajectory`, or omit `trajectory`."
        )
