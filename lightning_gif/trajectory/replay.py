"""Replays the optimizer steps of a recorded run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._compat import at_epoch
from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import ConfigurationError, NonFiniteError, TrainingDataError
from ..objective.objective import Objective
from ..objective.reductions import Weighted
from ..objective.shadow import widen
from .marks import Generators, mark_of
from .record import BatchRecord, StepRecord, TrainingState, Trajectory
from .updates import UPDATES, Options, Update, clip

__all__ = ["Replay", "ReplayedStep", "State", "members_of"]


# The largest relative difference of the weights from those of the run, at which a replay counts as one of this run.
_LARGEST_DIFFERENCE = 1e-2

_OTHER_RUN = (
    "Something has changed the weights that the record does not have, such as a hook of the module or another callback,"
    " or a random number that a worker drew. Use the default influence, without `through`."
)


@dataclass(frozen=True)
class State:
    """The state of a training on the device of a replay; see :class:`~.record.TrainingState` for the attributes."""

    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        states = [value for state in self.optimizer.values() for value in state.values() if isinstance(value, Tensor)]
        return sum(value.nbytes for value in (*self.weights.values(), *self.others.values(), *states))

    def theta(self) -> Tensor:
        """The weights as a flat vector ``(p,)``."""
        return torch.cat([value.reshape(-1) for value in self.weights.values()])

    def moved_to(self, other: State, share: float, of_buffers: float) -> State:
        """An average of weights and buffers that moves to another state by a share, and by one for buffers."""

        def between(own: dict[str, Tensor], new: dict[str, Tensor], share: float) -> dict[str, Tensor]:
            return {
                name: own[name].lerp(value, share) if value.is_floating_point() else value
                for name, value in new.items()
            }

        return State(between(self.weights, other.weights, share), between(self.others, other.others, of_buffers), {})


@dataclass(frozen=True)
class ReplayedStep:
    """An optimizer step as a sweep needs it.

    Attributes:
        record: The step.
        before: The state before the step.
        after: The state after it.
        batches: Its batches, prepared for the model.
        others: The buffers before each batch.
        grads: The gradients that the optimizer got, before clipping, of the parameters that had one.
    """

    record: StepRecord
    before: State
    after: State
    batches: list[Batch]
    others: list[dict[str, Tensor]]
    grads: dict[str, Tensor]


class Replay:
    """Replays a recorded run, from one stored state to the next.

    Args:
        objective: The open objective of the module.
        train: The training examples, from which batches are read again.
        trajectory: The record.

    Attributes:
        update: The step of the optimizer.
        end: The last state of the run, or the averaged one if the module has its weights.
        of_average: Whether ``end`` is the average of the weights that the run has kept.
        difference: The largest relative difference ``‖θ − θ'‖ / ‖θ‖`` so far between a replayed state and a stored one;
            0 if all bits are equal.

    Raises:
        ConfigurationError: If the record is incomplete or of another module.
    """

    def __init__(self, objective: Objective, train: Examples, trajectory: Trajectory) -> None:
        trajectory.check_whole()
        run, space = trajectory.run, objective.space
        if run.shapes != {name: list(slot.shape) for name, slot in space.slots.items()}:
            raise ConfigurationError(
                f"The record in {str(trajectory.folder)!r} is of a {run.module} with other trainable parameters than"
                f" this {type(objective.module).__name__}. Give the folder of this model's fit as"
                " GIFCallback(trajectory=…)."
            )
        if len(train.dataset) != run.dataset_size:
            raise TrainingDataError(
                f"The training dataset has {len(train.dataset)} items, but that of the recorded run had"
                f" {run.dataset_size}. Pass the loader of the run as `dataloader=`."
            )
        self.objective, self.train, self.trajectory = objective, train, trajectory
        self._sorted, self._order = train.ids.sort()
        self.update: Update = {kind.__name__: update for kind, update in UPDATES.items()}[run.optimizer]
        self.difference = 0.0
        average = trajectory.average()
        averaged = None if average is None else self._at_hand(average)
        self.of_average = averaged is not None and torch.equal(objective.theta, averaged.theta())
        self.end = averaged if averaged is not None and self.of_average else self.stored(self.n_steps)
        self._averages: dict[int, list[tuple[float, float]]] = {}
        for steps, share, of_buffers in trajectory.averages() if self.of_average else ():
            self._averages.setdefault(steps, []).append((share, of_buffers))

    def averages_after(self, step: StepRecord) -> list[tuple[float, float]]:
        """For each average after a step, the share of weights and that of buffers; empty if ``end`` is no average."""
        return self._averages.get(step.number + 1, [])

    def compare_average(self, replayed: Tensor) -> None:
        """Compares the averaged weights ``(p,)`` of a replay with those of the run.

        Raises:
            ConfigurationError: If they have little in common.
        """
        self._compare_weights(replayed, self.end.theta(), "at the end its averaged weights")

    @property
    def n_steps(self) -> int:
        """The number of optimizer steps of the run."""
        assert self.trajectory.run.end is not None  # since the record is whole
        return self.trajectory.run.end

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The steps of two stored states in a row, from the beginning of the run to its end."""
        states = [step for step in self.trajectory.states if step <= self.n_steps]
        return list(pairwise(states))

    def stored(self, step: int) -> State:
        """The stored state before a step, on the device and in the dtype of the objective."""
        return self._at_hand(self.trajectory.state(step))

    def _at_hand(self, state: TrainingState) -> State:
        device, dtype = self.objective.device, self.objective.theta.dtype

        def moved(values: dict[str, Tensor]) -> dict[str, Any]:
            return {name: widen(value.to(device), dtype) for name, value in values.items()}

        optimizer = {name: moved(of) for name, of in state.optimizer.items()}
        for of in optimizer.values():
            of |= {"step": float(of["step"])} if "step" in of else {}
        order = self.objective.space.slots
        return State({name: moved(state.weights)[name] for name in order}, moved(state.others), optimizer)

    def segment(self, first: int, stop: int) -> Iterator[ReplayedStep]:
        """Replays the steps between two stored states, and compares the last state with the stored one.

        Raises:
            TrainingDataError: If an example differs from that of the run.
            ConfigurationError: If the replayed weights are not those of the run.
        """
        steps, state = self.trajectory.steps(first, stop), self.stored(first)
        for step, batches in zip(steps, self.read(steps), strict=True):
            replayed = self.step(state, step, batches)
            state = replayed.after
            yield replayed
        self._compare(state, self.stored(stop), stop)

    def weighted_end(
        self, weights: Tensor, on_step: Callable[[], Any] = lambda: None, on_segment: Callable[[], Any] = lambda: None
    ) -> State:
        """What :attr:`end` would be if examples had these weights ``(n,)`` by their positions in ``train``.

        Args:
            weights: The weights.
            on_step: Called after each step.
            on_segment: Called after the steps between two stored states.
        """
        state = average = self.stored(0)
        for first, stop in self.segments:
            steps = self.trajectory.steps(first, stop)
            for step, batches in zip(steps, self.read(steps), strict=True):
                state = self.step(state, step, batches, weights).after
                for share, of_buffers in self.averages_after(step):
                    average = average.moved_to(state, share, of_buffers)
                on_step()
            on_segment()
        return average if self.of_average else state

    # ----------------------------------------------------------------------------------------------------------------
    # One step
    # ----------------------------------------------------------------------------------------------------------------

    def step(
        self, state: State, record: StepRecord, batches: list[Batch], weights: Tensor | None = None
    ) -> ReplayedStep:
        """One optimizer step.

        Args:
            state: The state before.
            record: The step.
            batches: Its batches.
            weights: Weights of the training examples, by their positions; ``None`` for the run as it was.
        """
        before, now, grads = list[dict[str, Tensor]](), dict(state.others), dict[str, Tensor]()
        for batch, recorded in zip(batches, record.batches, strict=True):
            after = {name: value.clone() for name, value in now.items()}
            for name, grad in self._gradients(state, record, recorded, batch, after, weights).items():
                grads[name] = grads[name] + grad if name in grads else grad
            before.append(now)
            now = now if recorded.rank else after  # the buffers of the first process are those of all
        with torch.no_grad():
            updated = self._updated(state, record, grads, now)
        return ReplayedStep(record, state, updated, batches, before, grads)

    def _gradients(
        self,
        state: State,
        record: StepRecord,
        recorded: BatchRecord,
        batch: Batch,
        buffers: dict[str, Tensor],
        weights: Tensor | None,
    ) -> dict[str, Tensor]:
        """The gradients of a batch's loss, for the parameters that it depends on. ``buffers`` are changed."""
        theta, shadow = state.theta().requires_grad_(), self.objective.shadow
        used: dict[str, Tensor] = {}
        shadow.on_parameters = used.update
        try:
            with self.during(record, recorded):
                loss = self.loss(theta, batch, buffers, weights)
        finally:
            shadow.on_parameters = None
        if not loss.requires_grad:
            return {}
        found = torch.autograd.grad(loss / record.divisor, list(used.values()), allow_unused=True)
        return {name: grad for name, grad in zip(used, found, strict=True) if grad is not None}

    def loss(self, theta: Tensor, batch: Batch, buffers: dict[str, Tensor], weights: Tensor | None) -> Tensor:
        """The loss ``()`` of a batch in training.

        Args:
            theta: The parameters ``(p,)``.
            batch: The batch.
            buffers: The buffers, which the pass may change.
            weights: Weights of the training examples, by their positions; ``None`` for the run as it was.
        """
        if weights is None:
            return self.objective.shadow.training_step(theta, batch.data, buffers=buffers)
        own = weights[self.positions_of(batch)].to(theta)
        return self.weighted_loss(theta, batch, buffers, own)

    def weighted_loss(self, theta: Tensor, batch: Batch, buffers: dict[str, Tensor], weights: Tensor) -> Tensor:
        """The loss ``()`` of a batch in training with weights ``(B,)`` of its examples; see :meth:`loss`."""
        shadow = self.objective.shadow
        with Weighted(shadow.module, weights, last=self.last):
            return shadow.training_step(theta, batch.data, buffers=buffers)

    def positions_of(self, batch: Batch) -> Tensor:
        """The positions ``(B,)`` of a batch's examples in the training examples.

        Raises:
            TrainingDataError: If one is not among them.
        """
        places = torch.searchsorted(self._sorted, batch.ids).clamp(max=len(self._sorted) - 1)
        if not torch.equal(self._sorted[places], batch.ids):
            raise TrainingDataError(
                "The run has drawn examples that are not among the training examples of this call. Pass a loader over"
                " all of them as `dataloader=`."
            )
        return self._order[places]

    @property
    def last(self) -> bool:
        """Whether the second dimension of terms counts the examples."""
        return bool(getattr(self.objective.loss, "last", False))

    @contextlib.contextmanager
    def during(self, record: StepRecord, batch: BatchRecord) -> Iterator[None]:
        """A block in which the module is as it was when the run came to a batch."""
        shadow, module = self.objective.shadow, self.objective.module
        evaluating = set(record.evaluating)
        modes = [(one, one.training) for one in module.modules()]
        for name, one in module.named_modules():
            one.training = name not in evaluating
        shadow.batch_index = batch.index
        if batch.generators:
            shadow.set_generators = partial(Generators.set_to, batch.generators, self.objective.device)
        try:
            with at_epoch(self.objective.trainer, record.epoch, record.number):
                yield
        finally:
            shadow.batch_index, shadow.set_generators = 0, None
            for one, mode in modes:
                one.training = mode

    def _updated(self, state: State, record: StepRecord, grads: dict[str, Tensor], others: dict[str, Tensor]) -> State:
        """The state after the step of the optimizer."""
        weights, optimizer = dict(state.weights), dict(state.optimizer)
        members = [(name, options) for name, options in members_of(record) if name in grads]
        run = self.trajectory.run
        if run.clip_algorithm is not None:
            clipped = clip([grads[name] for name, _ in members], run.clip_algorithm, run.clip_limit)
            grads = {name: grad for (name, _), grad in zip(members, clipped, strict=True)}
        for name, options in members:
            old = state.optimizer.get(name, {})
            weights[name], new = self.update(state.weights[name], grads[name], old, options)
            optimizer[name] = {**old, **new}
        if not all(math.isfinite(float(value.sum())) for value in weights.values()):
            raise NonFiniteError(
                f"The weights after optimizer step {record.number} of the replay are not finite. If those of the run"
                " are, leave out other examples (another `seed`), or omit `leave_outs`. Else train with a smaller"
                " learning rate."
            )
        return State(weights, others, optimizer)

    # ----------------------------------------------------------------------------------------------------------------
    # Data and comparisons
    # ----------------------------------------------------------------------------------------------------------------

    def read(self, steps: Sequence[StepRecord]) -> Iterator[list[Batch]]:
        """Reads the batches of steps again.

        Raises:
            TrainingDataError: If one differs from that of the run.
        """
        recorded = [batch for step in steps for batch in step.batches if not batch.reading]
        reader = self.train.reader
        assert reader is not None  # since there is a dataset
        found = reader.read([batch.ids.tolist() for batch in recorded])
        for step in steps:
            batches = []
            for batch in step.batches:
                with self._default_dtype():
                    if batch.reading:
                        as_then = partial(Generators.set_to, batch.reading, torch.device("cpu"))
                        given = reader.read_again(batch.ids.tolist(), as_then)
                    else:
                        given = next(found)
                data = self.train.prepare(given)
                if mark_of(data) != batch.mark:
                    raise TrainingDataError(
                        f"The batch of optimizer step {step.number} is not the one of the run, now that its examples"
                        f" are read again (dataset indices {batch.ids[:5].tolist()} …): the data have changed, or"
                        " workers of the loader have drawn random numbers, or a dataset with a random"
                        " generator of its own. A run can be replayed if each item is always the same, or if the loader"
                        " has num_workers=0 and numbers are drawn from the global generators of torch, random and"
                        " numpy.random. Use the default influence, without `through`."
                    )
                batches.append(Batch(data, batch.ids, len(batch.ids), divisible=False))
            yield batches

    @contextlib.contextmanager
    def _default_dtype(self) -> Iterator[None]:
        """A block with the default dtype of the run, in which a dataset creates tensors and draws numbers."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.trajectory.run.dtype))
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def _compare(self, state: State, stored: State, step: int) -> None:
        """Compares a replayed state with the stored one.

        Raises:
            ConfigurationError: If they have little in common.
        """
        self._compare_weights(state.theta(), stored.theta(), f"before optimizer step {step} its weights")

    def _compare_weights(self, one: Tensor, other: Tensor, which: str) -> None:
        if not torch.equal(one, other):
            difference = float((one - other).norm() / other.norm())
            self.difference = max(self.difference, difference)
            if not difference < _LARGEST_DIFFERENCE:
                raise ConfigurationError(
                    f"The replay does not follow the run: {which} differ from the recorded ones by {difference:.2g} of"
                    f" their norm. {_OTHER_RUN}"
                )


def members_of(record: StepRecord) -> list[tuple[str, Options]]:
    """The parameters of the optimizer at a step by name, in its order, each with its settings."""
    pairs = zip(record.members, record.options, strict=True)
    return [(name, options) for names, options in pairs for name in names]
