"""The adjoint of a recorded run: the derivative of a query in the weight of each training example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import NonFiniteError
from ..objective.batchnorm import RunningStatistics
from ..objective.objective import Objective
from ..objective.shadow import ModelState
from .record import BatchRecord
from .replay import Replay, ReplayedStep, State, members_of
from .updates import OptimizerState, Options, clip

__all__ = ["Adjoint", "Parts", "query_adjoint", "sweep"]


@dataclass
class Adjoint:
    """The derivatives of ``q`` queries in the state of the training before an optimizer step.

    Attributes:
        theta: Those in the parameters, ``(q, p)``.
        optimizer: Those in the optimizer's state, ``(q, p)`` each, by its names in PyTorch.
        statistics: Those in the running statistics of BatchNorm, ``(q, …)`` each, by name.
        average: Those in the average of weights and statistics that the run keeps; ``None`` if they are zero.
    """

    theta: Tensor
    optimizer: dict[str, Tensor]
    statistics: dict[str, Tensor]
    average: Adjoint | None = None

    def of_average(self) -> Adjoint:
        """That of a state whose average is the state of this one."""
        zeros = {name: torch.zeros_like(value) for name, value in self.statistics.items()}
        return Adjoint(torch.zeros_like(self.theta), {}, zeros, self)

    def of_queries(self, rows: slice) -> Adjoint:
        """A copy for some of the queries, before the first step of a sweep."""
        statistics = {name: value[rows].clone() for name, value in self.statistics.items()}
        average = None if self.average is None else self.average.of_queries(rows)
        return Adjoint(self.theta[rows].clone(), {}, statistics, average)

    def through_averages(self, averaged: list[tuple[float, float]]) -> None:
        """Goes back through the averages after a step: ``average ← average + share · (state − average)``."""
        if self.average is None:
            return
        for share, of_buffers in reversed(averaged):
            self.theta += share * self.average.theta
            self.average.theta *= 1 - share
            for name, value in self.average.statistics.items():
                self.statistics[name] = self.statistics[name] + of_buffers * value
                value *= 1 - of_buffers


class Parts:
    """The derivatives in the weights of the training examples, and their parts from each epoch.

    Args:
        n_queries: The number of queries.
        n_epochs: The number of epochs; ``None`` keeps no parts.
        n_train: The number of training examples.

    Attributes:
        total: The derivatives ``(q, n)`` in float64.
        by_epoch: Their parts ``(q, n_epochs, n)``; ``None`` if they are not kept.
    """

    def __init__(self, n_queries: int, n_epochs: int | None, n_train: int) -> None:
        self.total = torch.zeros(n_queries, n_train, dtype=torch.float64)
        self.by_epoch = None if n_epochs is None else torch.zeros(n_queries, n_epochs, n_train, dtype=torch.float64)

    def add(self, epoch: int, positions: Tensor, rows: Tensor) -> None:
        """Adds the derivatives ``(q, B)`` of a batch with examples at these positions ``(B,)``."""
        values = rows.detach().double().cpu()
        self.total.index_add_(1, positions, values)
        if self.by_epoch is not None:
            self.by_epoch[:, epoch].index_add_(1, positions, values)


def query_adjoint(objective: Objective, query: Examples, end: State, *, per_example: bool) -> Adjoint:
    """The gradients of the query's measurement at the end of a run.

    Args:
        objective: The objective.
        query: The ``n`` examples of the query.
        end: The last state of the run.
        per_example: Whether each example is a query of its own, as in :meth:`Objective.query_gradients`.

    Raises:
        NonFiniteError: If a gradient is not finite.
    """
    names = [name for name in RunningStatistics.names_of(objective.module) if name in end.others]
    statistics = {name: end.others[name].detach().clone().requires_grad_() for name in names}
    theta = end.theta().requires_grad_()
    inputs, rows = [theta, *statistics.values()], list[list[Tensor]]()
    with objective.at_state(ModelState(theta, {**end.others, **statistics})), RunningStatistics({}):
        for batch in query.batches():
            values = objective.measurements(theta, batch)
            if per_example:
                for value in values:
                    rows.append(_gradients([value], inputs, None))
                continue
            part = _gradients([values.sum() / len(query)], inputs, None)
            rows = [part if not rows else [one + other for one, other in zip(rows[0], part, strict=True)]]
    found = [torch.stack(column) for column in zip(*rows, strict=True)]
    if not all(bool(torch.isfinite(one).all()) for one in found):
        raise NonFiniteError(
            "The gradient of the query at the end of the run is not finite. Look for inf or NaN in the query's examples"
            " and in their losses: trainer.validate(model, loader) shows them."
        )
    return Adjoint(found[0], {}, dict(zip(names, found[1:], strict=True)))


def sweep(
    replay: Replay,
    adjoint: Adjoint,
    parts: Parts,
    *,
    most: Callable[[int], int],
    on_step: Callable[[], Any] = lambda: None,
    on_segment: Callable[[], Any] = lambda: None,
) -> None:
    """Goes back through all optimizer steps of a run, and adds the derivatives of queries in the examples' weights.

    The loss of a batch is a function of the weights of its examples (``Weighted``). With the state ``s`` before a step
    and the gradient ``g(s, w)`` of the batch's loss, the state after it is ``u(s, g)``. An adjoint ``λ`` of that state
    gives ``μ = λ ∂u/∂g``, the derivative ``μ ∂g/∂w`` in the weights, and the adjoint ``λ ∂u/∂s + μ ∂g/∂s`` of the state
    before. These are exact; nothing is approximated but by rounding.

    Args:
        replay: The run.
        adjoint: That of the last state. It becomes the one of the first state.
        parts: What the derivatives are added to.
        most: From the bytes of the graph of one batch to the number of queries that may share a backward pass.
        on_step: Called after each step.
        on_segment: Called after the steps between two stored states.
    """
    backward, average, rest = _Backward(replay, most), torch.zeros_like(replay.end.theta()), 1.0
    for first, stop in reversed(replay.segments):
        for step in reversed(list(replay.segment(first, stop))):
            averaged = replay.averages_after(step.record)
            adjoint.through_averages(averaged)
            for share, _ in reversed(averaged):
                average, rest = average + rest * share * step.after.theta(), rest * (1 - share)
            mu = through_update(replay, step, adjoint)
            for number in reversed(range(len(step.batches))):
                rows = backward.through_batch(step, number, mu, adjoint)
                parts.add(step.record.epoch, replay.positions_of(step.batches[number]), rows)
            on_step()
        on_segment()
    if replay.of_average:
        replay.compare_average(average)
    if not all(bool(torch.isfinite(one).all()) for one in (parts.total, adjoint.theta)):
        raise NonFiniteError(
            "The derivative through the training is not finite: it has grown beyond all limits on its way back through"
            f" {replay.n_steps} optimizer steps, so no score can predict this run. Use the default influence, without"
            " `through`, or train with a smaller learning rate."
        )


# ----------------------------------------------------------------------------------------------------------------------
# The step of the optimizer
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """Parameters that an optimizer step updates with the same settings, as one flat vector.

    Attributes:
        positions: Their positions ``(k,)`` in the flat vector of all parameters.
        options: The settings.
        theta: Their values ``(k,)``.
        grad: Their gradients ``(k,)``, before clipping.
        state: Their state.
    """

    positions: Tensor
    options: Options
    theta: Tensor
    grad: Tensor
    state: OptimizerState

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state."""
        return {name: value for name, value in self.state.items() if isinstance(value, Tensor)}


def through_update(replay: Replay, step: ReplayedStep, adjoint: Adjoint) -> Tensor:
    """Takes an adjoint back through the step of the optimizer.

    Args:
        replay: The run.
        step: The step.
        adjoint: That of the state after the step. It becomes the part of the one before it that does not go through the
            gradients.

    Returns:
        The adjoint ``(q, p)`` of the gradients before clipping.
    """
    blocks, run, mu = list(_blocks(replay, step)), replay.trajectory.run, torch.zeros_like(adjoint.theta)
    if not blocks:
        return mu
    for block in blocks:
        for value in (block.theta, block.grad, *block.tensors.values()):
            value.requires_grad_()
    grads = [block.grad for block in blocks]
    if run.clip_algorithm is not None:
        grads = clip(grads, run.clip_algorithm, run.clip_limit)
    outputs, given, inputs, places = list[Tensor](), list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor]]()
    for block, grad in zip(blocks, grads, strict=True):
        theta, new = replay.update(block.theta, grad, block.state, block.options)
        after = {**block.tensors, **{name: value for name, value in new.items() if isinstance(value, Tensor)}}
        for name in after:
            if name not in adjoint.optimizer:
                adjoint.optimizer[name] = torch.zeros_like(adjoint.theta)
        outputs += [theta, *after.values()]
        given += [adjoint.theta[:, block.positions], *(adjoint.optimizer[name][:, block.positions] for name in after)]
        inputs += [block.theta, block.grad, *block.tensors.values()]
        places += [(adjoint.theta, block.positions), (mu, block.positions)]
        places += [(adjoint.optimizer[name], block.positions) for name in block.tensors]
        for name in after.keys() - block.tensors.keys():  # the state does not exist before this step
            adjoint.optimizer[name][:, block.positions] = 0
    found = torch.autograd.grad(outputs, inputs, given, is_grads_batched=True, allow_unused=True)
    for (into, positions), value in zip(places, found, strict=True):
        into[:, positions] = 0 if value is None else value
    return mu


def _blocks(replay: Replay, step: ReplayedStep) -> Iterator[_Block]:
    """The updated parameters in blocks, in the order of the optimizer."""
    groups: dict[str, tuple[Options, list[str]]] = {}
    for name, options in members_of(step.record):
        if name in step.grads:
            state = step.before.optimizer.get(name, {})
            key = repr((options, state.get("step"), sorted(state)))
            groups.setdefault(key, (options, []))[1].append(name)
    slots, before = replay.objective.space.slots, step.before
    for options, names in groups.values():
        ranges = [torch.arange(slots[name].offset, slots[name].offset + slots[name].size) for name in names]
        first = before.optimizer.get(names[0], {})
        state = {
            key: torch.cat([before.optimizer[name][key].reshape(-1) for name in names])
            if isinstance(value, Tensor)
            else value
            for key, value in first.items()
        }
        yield _Block(
            torch.cat(ranges).to(replay.objective.device),
            options,
            torch.cat([before.weights[name].reshape(-1) for name in names]),
            torch.cat([step.grads[name].detach().reshape(-1) for name in names]),
            state,
        )


# ----------------------------------------------------------------------------------------------------------------------
# The gradients of a batch
# ----------------------------------------------------------------------------------------------------------------------


class _Backward:
    """Takes adjoints back through the gradients of batches.

    Args:
        replay: The run.
        most: See :func:`sweep`.
    """

    def __init__(self, replay: Replay, most: Callable[[int], int]) -> None:
        self._replay = replay
        self._most = most
        self._together: int | None = None  # the number of queries that share a backward pass

    def through_batch(self, step: ReplayedStep, number: int, mu: Tensor, adjoint: Adjoint) -> Tensor:
        """Adds to an adjoint what goes through the gradients and the running statistics of one batch of a step.

        Args:
            step: The step.
            number: The number of the batch in it.
            mu: The adjoint ``(q, p)`` of the gradients.
            adjoint: That of the state after the batch. It becomes the one of the state before the batch.

        Returns:
            The derivatives ``(q, B)`` in the weights of its examples.
        """
        batch, recorded = step.batches[number], step.record.batches[number]
        buffers = {name: value.clone() for name, value in step.others[number].items()}
        statistics = {name: buffers[name].requires_grad_() for name in adjoint.statistics}
        theta = step.before.theta().requires_grad_()
        weights = torch.ones(len(batch.ids), dtype=theta.dtype, device=theta.device, requires_grad=True)
        count, known = _Bytes(), self._together is not None
        with nullcontext() if known else torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
            gradient, updated = self._forward(step, recorded, batch, theta, weights, buffers, statistics)
        if recorded.rank:  # only the buffers of the first process go on
            updated = {}
        if gradient is None:  # the step skipped the batch, or its loss is constant
            return mu.new_zeros(len(mu), len(batch.ids))
        if self._together is None:
            self._together = max(self._most(count.total), 1)
        outputs = [gradient, *updated.values()]
        inputs = [theta, weights, *statistics.values()]
        given = [mu, *(adjoint.statistics[name] for name in updated)]
        in_theta, in_weights, *in_statistics = self._rows(outputs, inputs, given)
        adjoint.theta += in_theta
        for name, value in zip(statistics, in_statistics, strict=True):
            adjoint.statistics[name] = value if name in updated else adjoint.statistics[name] + value
        return in_weights

    def _forward(
        self,
        step: ReplayedStep,
        recorded: BatchRecord,
        batch: Batch,
        theta: Tensor,
        weights: Tensor,
        buffers: dict[str, Tensor],
        statistics: dict[str, Tensor],
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The gradient ``(p,)`` of the weighted loss with its graph, and the new running statistics."""
        replay, running = self._replay, RunningStatistics(statistics)
        with replay.during(step.record, recorded), running:
            loss = replay.weighted_loss(theta, batch, buffers, weights) / step.record.divisor
        if not loss.requires_grad:
            return None, running.updated
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        return gradient, running.updated

    def _rows(self, outputs: list[Tensor], inputs: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        """The vector-Jacobian products of all queries, ``(q, …)`` for each input."""
        assert self._together is not None
        n_queries, parts, start = len(given[0]), list[list[Tensor]](), 0
        while start < n_queries:
            stop = min(start + self._together, n_queries)
            rows, more = [one[start:stop] for one in given], stop < n_queries
            if stop - start == 1:
                found = _gradients(outputs, inputs, [row[0] for row in rows], retain_graph=more)
                parts.append([one[None] for one in found])
            else:
                try:
                    parts.append(_gradients(outputs, inputs, rows, retain_graph=True, is_grads_batched=True))
                except RuntimeError:  # an operation that vmap does not know
                    self._together = 1
                    continue
            start = stop
        return [torch.cat(column) for column in zip(*parts, strict=True)]


def _gradients(outputs: list[Tensor], inputs: list[Tensor], given: list[Tensor] | None, **options: Any) -> list[Tensor]:
    """Vector-Jacobian products; zeros for inputs that the outputs do not depend on."""
    kept = [place for place, one in enumerate(outputs) if one.requires_grad]
    options = {"retain_graph": True, **options}
    found = torch.autograd.grad(
        [outputs[place] for place in kept],
        inputs,
        None if given is None else [given[place] for place in kept],
        allow_unused=True,
        **options,
    )
    size = (len(given[0]),) if options.get("is_grads_batched") and given is not None else ()
    return [
        one.new_zeros((*size, *one.shape)) if value is None else value.detach()
        for one, value in zip(inputs, found, strict=True)
    ]


class _Bytes:
    """Counts the bytes that a graph keeps."""

    def __init__(self) -> None:
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.total += tensor.numel() * tensor.element_size()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor
