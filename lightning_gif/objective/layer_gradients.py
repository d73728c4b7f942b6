"""Gradients of single examples by one backward pass over a batch, for modules that use all parameters linearly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.structure import map_tensors, same_structure
from .autograd import distance
from .layers import Axis, Layer, LayerRecorder
from .losses import GRADIENT_BYTES, LossFunction
from .shadow import Shadow

__all__ = ["LayerGradients", "RecordedPass"]


@dataclass
class RecordedPass:
    """A pass over a batch, with the layers that it went through.

    Attributes:
        value: What was evaluated; differentiable.
        layers: The layers, in order.
        axes: Where the examples are in the result of each layer.
        size: The number of examples, ``B``.
    """

    value: Tensor
    layers: list[Layer]
    axes: list[Axis]
    size: int

    def output_gradients(self, weights: Tensor | None = None, *, keep: bool = False) -> list[Tensor]:
        """The gradients of the value at the results of all layers, by a backward pass.

        Args:
            weights: The weight of each entry of the value, in its shape; 1 by default.
            keep: Whether another backward pass follows.
        """
        if not self.value.requires_grad:
            return [self.value.new_zeros(layer.shape) for layer in self.layers]
        edges = [layer.edge for layer in self.layers]
        return list(
            torch.autograd.grad(
                self.value, edges, weights, retain_graph=keep, materialize_grads=True, is_grads_batched=False
            )
        )

    def gradients(self, deltas: Sequence[Tensor]) -> Iterator[tuple[Layer, list[Tensor]]]:
        """Yields each layer with the gradients of single examples for its parts, ``(B, *part.shape)``."""
        for layer, delta, axis in zip(self.layers, deltas, self.axes, strict=True):
            yield layer, layer.gradients(delta, axis, self.size)

    def of_parameter(self, name: str, size: int, deltas: Sequence[Tensor]) -> Tensor:
        """The gradients of single examples for one parameter with ``size`` entries, ``(B, size)``."""
        total = self.value.new_zeros(self.size, size)
        for layer, delta, axis in zip(self.layers, deltas, self.axes, strict=True):
            if any(part.name == name for part in layer.parts):
                for part, gradient in zip(layer.parts, layer.gradients(delta, axis, self.size), strict=True):
                    if part.name == name:
                        part.add_to(total, gradient.reshape(self.size, -1))
        return total


class LayerGradients:
    """Gradients of single examples from what enters the layers of a module, and from the gradients at their results.

    One backward pass over a batch gives them all. Create it with :meth:`choose`, which compares them with gradients
    that are computed in another way.

    Args:
        shadow: The module.
        together: Its losses; one pass gives the loss of a batch.
        signatures: The layers that a pass goes through.
        axes: Where the examples are in the result of each layer.
    """

    def __init__(self, shadow: Shadow, together: LossFunction, signatures: list[Any], axes: list[Axis]) -> None:
        self.shadow, self.together = shadow, together
        self._signatures, self._axes = signatures, axes
        self._checked: list[Any] = []  # structures of batches

    @classmethod
    def choose(cls, loss: LossFunction, few: Batch) -> LayerGradients | None:
        """The gradients for a loss; ``None`` if a parameter is used in another way, or examples cannot be told apart.

        Args:
            loss: The loss function.
            few: A few examples.
        """
        shadow, together = loss.shadow, loss.together()
        if together is None or not few.divisible or few.size < 2:
            return None
        try:
            theta = shadow.theta.detach().requires_grad_()
            with recording(shadow) as recorder:
                value = together.loss_sum(theta, few)
            expected = torch.cat([rows.detach() for rows in loss.gradients(shadow.theta, few)])
            size = together.whole(few).size
            candidates = [layer.axes(size) for layer in recorder.layers]
            signatures = [layer.signature for layer in recorder.layers]
            while all(candidates):
                chosen = cls(shadow, together, signatures, [possible[0] for possible in candidates])
                recorded = RecordedPass(value, recorder.layers, chosen._axes, size)
                wrong = chosen._wrong(recorded, expected)
                if not wrong:
                    return chosen
                concerned = [
                    possible
                    for layer, possible in zip(recorder.layers, candidates, strict=True)
                    if wrong.intersection(part.name for part in layer.parts)
                ]
                if not concerned:
                    return None
                for possible in concerned:
                    del possible[0]
        except Exception:  # what fails here is computed in another way
            return None
        return None

    def _wrong(self, recorded: RecordedPass, expected: Tensor) -> set[str]:
        """The names of the parameters whose gradients differ from those expected, ``(B, p)``."""
        rows = self._rows(recorded, recorded.output_gradients(keep=True))[: len(expected)]
        lengths, wrong = expected.norm(dim=1), set()
        for name in self.shadow.space.slots:
            if distance(self.shadow.space.of(name, rows - expected).norm(dim=1), lengths):
                wrong.add(name)
        return wrong

    def record(self, evaluate: Callable[[Tensor, Batch], Tensor], batch: Batch) -> RecordedPass | None:
        """A pass over a batch; ``None`` if it goes through other layers than the first examples did.

        Args:
            evaluate: A differentiable function of parameters ``(p,)`` and the batch.
            batch: The batch that is evaluated.
        """
        theta = self.shadow.theta.detach().requires_grad_()
        with recording(self.shadow) as recorder:
            value = evaluate(theta, batch)
        size = self.together.whole(batch).size
        recorded = RecordedPass(value, recorder.layers, self._axes, size)
        if [layer.signature for layer in recorder.layers] != self._signatures:
            return None
        if not all(axis in layer.axes(size) for layer, axis in zip(recorder.layers, self._axes, strict=True)):
            return None
        return recorded if self._is_complete(recorded, theta, batch) else None

    def _is_complete(self, recorded: RecordedPass, theta: Tensor, batch: Batch) -> bool:
        """Whether parameters are used by these layers alone. It is checked for each new structure of batches."""
        if any(same_structure(batch.data, one) for one in self._checked):
            return True
        if not recorded.value.requires_grad:
            return True
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(recorded.value.shape, generator=generator, dtype=theta.dtype).to(theta.device)
        deltas = recorded.output_gradients(weights, keep=True)
        (expected,) = torch.autograd.grad(recorded.value, theta, weights, retain_graph=True, materialize_grads=True)
        found = self._rows(recorded, deltas).sum(0)
        if distance((found - expected).norm()[None], expected.norm()[None]):
            return False
        self._checked.append(map_tensors(batch.data, lambda tensor: tensor.new_empty([0] * tensor.ndim)))
        return True

    def gradients(self, batch: Batch) -> Iterator[Tensor] | None:
        """The gradients of the losses, ``(b, p)`` for the next ``b`` examples; ``None`` if they cannot be computed."""
        parts = self.parts(batch, rows=True)
        recorded = [self.record_losses(part) for part in parts[:1]]
        if recorded[0] is None:
            return None

        def rows() -> Iterator[Tensor]:
            for number, part in enumerate(parts):
                one = recorded.pop() if number == 0 else self.record_losses(part)
                assert one is not None  # parts of one batch have the same layers
                yield self._rows(one, one.output_gradients())[: part.size]

        return rows()

    def products(self, batch: Batch, directions: Tensor) -> Tensor | None:
        """``wᵀ∇ℓ(zᵢ)`` for each direction ``w`` and each example; ``None`` if they cannot be computed.

        Args:
            batch: A batch of B examples.
            directions: ``(q, p)``.

        Returns:
            ``(q, B)``.
        """
        columns, space = [], self.shadow.space
        for part in self.parts(batch):
            recorded = self.record_losses(part)
            if recorded is None:
                return None
            total = directions.new_zeros(len(directions), recorded.size)
            deltas = recorded.output_gradients()
            for layer, delta, axis in zip(recorded.layers, deltas, recorded.axes, strict=True):
                along = [one.of(space.of(one.name, directions)) for one in layer.parts]
                total += layer.products(delta, axis, recorded.size, along)
            columns.append(total[:, : part.size])
        return torch.cat(columns, dim=1)

    def record_losses(self, batch: Batch) -> RecordedPass | None:
        """A pass that gives the sum of the losses, see :meth:`record`."""
        return self.record(self.together.loss_sum, batch)

    def parts(self, batch: Batch, *, rows: bool = False) -> list[Batch]:
        """Parts of a batch whose gradients fit into memory together.

        Args:
            batch: The batch.
            rows: Whether the gradients of all parameters are needed at the same time, or those of one parameter.
        """
        theta, slots = self.shadow.theta, self.shadow.space.slots
        size = theta.numel() if rows else max(slot.size for slot in slots.values())
        count = max(GRADIENT_BYTES // (size * theta.element_size()), 1)
        if count >= batch.size or not batch.divisible:
            return [batch]
        return [batch.slice(start, start + count) for start in range(0, batch.size, count)]

    def _rows(self, recorded: RecordedPass, deltas: Sequence[Tensor]) -> Tensor:
        """The gradients ``(B, p)`` of all parameters."""
        space = self.shadow.space
        rows = self.shadow.theta.new_zeros(recorded.size, space.size)
        for layer, gradients in recorded.gradients(deltas):
            for part, gradient in zip(layer.parts, gradients, strict=True):
                part.add_to(space.of(part.name, rows), gradient.reshape(recorded.size, -1))
        return rows


@contextlib.contextmanager
def recording(shadow: Shadow) -> Iterator[LayerRecorder]:
    """A block in which the layers that calls into a module go through are recorded."""
    recorder = LayerRecorder()
    before, shadow.on_parameters = shadow.on_parameters, recorder.note_parameters
    try:
        with recorder:
            yield recorder
    finally:
        shadow.on_parameters = before
