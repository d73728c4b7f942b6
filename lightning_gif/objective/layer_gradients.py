"""Gradients of single examples by one backward pass over a batch, for modules that use all parameters linearly."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..data.batch import Batch
from ..errors import ObjectiveError
from ..parameters import ParameterSpace
from .autograd import differs, distance
from .layers import Axis, Layer, LayerRecorder, Use
from .losses import GRADIENT_BYTES, LossFunction
from .shadow import Shadow

__all__ = ["LayerGradients", "RecordedPass", "SinglePass", "gradients_of"]

# The number of examples whose gradients are compared with those that are computed in another way.
_COMPARED = 5

# Gradients of examples that are smaller than this share of the mean need not be equal up to their own rounding.
_SMALL = 0.1


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
        return list(torch.autograd.grad(self.value, edges, weights, retain_graph=keep, materialize_grads=True))

    def of_parameter(self, name: str, size: int, deltas: Sequence[Tensor]) -> Tensor:
        """The gradients of single examples for one parameter with ``size`` entries, ``(B, size)``."""
        total = self.value.new_zeros(self.size, size)
        for layer, delta, axis in zip(self.layers, deltas, self.axes, strict=True):
            if any(part.name == name for part in layer.parts):
                for part, gradient in zip(layer.parts, layer.gradients(delta, axis, self.size), strict=True):
                    if part.name == name:
                        part.add_to(total, gradient.reshape(self.size, -1))
        return total

    def rows(self, space: ParameterSpace, deltas: Sequence[Tensor]) -> Tensor:
        """The gradients of single examples for all parameters, ``(B, p)``."""
        rows = self.value.new_zeros(self.size, space.size)
        for layer, delta, axis in zip(self.layers, deltas, self.axes, strict=True):
            for part, gradient in zip(layer.parts, layer.gradients(delta, axis, self.size), strict=True):
                part.add_to(space.of(part.name, rows), gradient.reshape(self.size, -1))
        return rows

    def products(self, space: ParameterSpace, directions: Tensor, deltas: Sequence[Tensor]) -> Tensor:
        """The inner products of the gradients of single examples with directions ``(q, p)``, ``(q, B)``."""
        total = directions.new_zeros(len(directions), self.size)
        for layer, delta, axis in zip(self.layers, deltas, self.axes, strict=True):
            along = [part.of(space.of(part.name, directions)) for part in layer.parts]
            total += layer.products(delta, axis, self.size, along)
        return total


class SinglePass(RecordedPass):
    """A pass over one example, whose whole gradient is computed.

    Args:
        value: What was evaluated.
        theta: The parameters ``(p,)`` at which it was.
        space: The parameters.
    """

    def __init__(self, value: Tensor, theta: Tensor, space: ParameterSpace) -> None:
        super().__init__(value, [], [], 1)
        self._theta, self._space = theta, space

    @override
    def output_gradients(self, weights: Tensor | None = None, *, keep: bool = False) -> list[Tensor]:
        if not self.value.requires_grad:
            return [torch.zeros_like(self._theta)]
        return list(torch.autograd.grad(self.value, self._theta, weights, retain_graph=keep, materialize_grads=True))

    @override
    def of_parameter(self, name: str, size: int, deltas: Sequence[Tensor]) -> Tensor:
        return self._space.of(name, deltas[0][None])

    @override
    def rows(self, space: ParameterSpace, deltas: Sequence[Tensor]) -> Tensor:
        return deltas[0][None]

    @override
    def products(self, space: ParameterSpace, directions: Tensor, deltas: Sequence[Tensor]) -> Tensor:
        return (directions @ deltas[0])[:, None]


class LayerGradients:
    """Gradients of single examples from what enters the layers of a module, and from the gradients at their results.

    One backward pass over a batch gives them all. Create it with :meth:`choose`, which compares them with gradients
    that are computed in another way.

    Args:
        loss: The losses.
        together: The same losses; one pass gives their sum over a batch.

    Attributes:
        together: See above.
        uses: The uses of parameters that examples have shown, by signature.
    """

    def __init__(self, loss: LossFunction, together: LossFunction) -> None:
        self.shadow, self.together = loss.shadow, together
        self.uses: dict[Any, Use] = {}
        self._loss = loss
        self._axes: dict[Any, list[Axis]] = {}  # by the layers of a pass and their shapes
        self._bytes = 0  # that the layer with the most needs for an example

    @classmethod
    def choose(cls, loss: LossFunction, examples: Batch) -> LayerGradients | None:
        """The gradients for a loss; ``None`` if :meth:`record` gives no pass, or if gradients are not right.

        Args:
            loss: The loss function.
            examples: Some examples. The gradients of the first ones are compared.
        """
        together = loss.together()
        if together is None or not examples.divisible or examples.size < 2:
            return None
        chosen = cls(loss, together)
        few = examples.slice(0, max(min(_COMPARED, GRADIENT_BYTES // loss.shadow.theta.nbytes), 2))
        try:
            if differs(loss.shadow, chosen._distance, few):
                return None
            parts = chosen.parts(examples)
            return chosen if all(chosen.record_losses(part) is not None for part in parts) else None
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what fails here is computed in another way
            return None

    def _distance(self, few: Batch) -> float:
        """The difference from gradients that are computed in another way, see :func:`~.autograd.distance`.

        It is infinite if the layers do not give gradients.
        """
        recorded = self.record_losses(few)
        if recorded is None:
            return math.inf
        deltas, position = recorded.output_gradients(), 0
        rows, worst = recorded.rows(self.shadow.space, deltas), 0.0
        for expected in self._loss.gradients(self.shadow.theta, few):
            found = rows[position : position + len(expected)]
            worst = max(worst, distance((found - expected).norm(dim=1), expected.norm(dim=1)))
            position += len(expected)
        return worst

    def record(self, evaluate: Callable[[Tensor, Batch], Tensor], batch: Batch) -> RecordedPass | None:
        """A pass over a batch; ``None`` if a parameter is used in another way, or if the results of layers
        do not show which example they belong to.

        Args:
            evaluate: A differentiable function of parameters ``(p,)`` and the batch.
            batch: The batch that is evaluated.
        """
        theta = self.shadow.theta.detach().requires_grad_()
        with recording(self.shadow) as recorder:
            value = evaluate(theta, batch)
        size = self.together.whole(batch).size
        if not value.requires_grad:  # a constant
            return RecordedPass(value, [], [], size)
        trace = recorder.trace(value, theta)
        axes = self._axes_of(recorder.layers, batch, trace.moves) if trace.is_complete else None
        if axes is None:
            return None
        for layer in recorder.layers:
            self.uses.setdefault(layer.signature, layer.use)
            self._bytes = max(self._bytes, layer.bytes_per_example(size))
        return RecordedPass(value, recorder.layers, axes, size)

    def _axes_of(self, layers: list[Layer], batch: Batch, moves: bool) -> list[Axis] | None:
        """Where the examples are in the results of layers; ``None`` if they are in no place.

        It is found out for each new shape of the results, or for each batch if operations may move examples.

        Args:
            layers: The layers of a pass over the batch.
            batch: The batch.
            moves: Whether operations may move values in a way that depends on data.
        """
        key = _key(layers)
        if not moves and key in self._axes:
            return self._axes[key]
        found = self._find_axes(key, batch)
        if found is None and self.shadow.theta.dtype == torch.float32 and self.shadow.device.type != "mps":
            with self.shadow.in_double():  # in float32, the gradient of a fitted example consists of rounding errors
                found = self._find_axes(key, self.shadow.widened(batch))
        if found is None:
            return None
        axes, is_certain = found
        if is_certain and not moves:
            self._axes[key] = axes
        return axes

    def _find_axes(self, key: Any, batch: Batch) -> tuple[list[Axis], bool] | None:
        """The axes of examples, and whether all are certain; ``None`` if examples are in no place.

        Examples in another order must have the same gradients at the results of layers, in that order.

        Args:
            key: The layers of a pass over the batch, and their shapes.
            batch: The batch.
        """
        whole = self.together.whole(batch)
        size = whole.size
        if size > 1 and not whole.divisible:
            return None
        order = _other_order(size)
        passes = [self._loss_pass(one) for one in (whole, whole.take(order))]
        layers, before = passes[0]
        after = passes[1][1]
        if _key(layers) != key or _key(passes[1][0]) != key:
            return None
        axes, is_certain = list[Axis](), True
        for layer, old, new in zip(layers, before, after, strict=True):
            possible = [axis for axis in layer.axes(size) if size == 1 or _is_axis(axis, old, new, order)]
            if not possible:
                return None
            axes.append(possible[0])
            is_certain = is_certain and (size == 1 or len(possible) == 1 or bool(old.any()))
        return axes, is_certain

    def _loss_pass(self, batch: Batch) -> tuple[list[Layer], list[Tensor]]:
        """The layers of a pass, and the gradients of the sum of the losses at their results."""
        theta = self.shadow.theta.detach().requires_grad_()
        with recording(self.shadow) as recorder:
            value = self.together.loss_sum(theta, batch)
        recorded = RecordedPass(value, recorder.layers, [], batch.size)
        return recorder.layers, recorded.output_gradients()

    def gradients(self, batch: Batch) -> Iterator[Tensor]:
        """Yields the gradients of the losses, ``(b, p)`` for the next ``b`` examples."""
        for part in self.parts(batch, rows=True):
            recorded = self.record_losses(part)
            if recorded is None:
                yield from self.without_layers(part)
            else:
                yield recorded.rows(self.shadow.space, recorded.output_gradients())[: part.size]

    def products(self, batch: Batch, directions: Tensor) -> Tensor:
        """``wᵀ∇ℓ(zᵢ)`` for each direction ``w`` and each example.

        Args:
            batch: A batch of B examples.
            directions: ``(q, p)``.

        Returns:
            ``(q, B)``.
        """
        columns, space = list[Tensor](), self.shadow.space
        for part in self.parts(batch):
            recorded = self.record_losses(part)
            if recorded is None:
                columns += [directions @ rows.T for rows in self.without_layers(part)]
            else:
                deltas = recorded.output_gradients()
                columns.append(recorded.products(space, directions, deltas)[:, : part.size])
        return torch.cat(columns, dim=1)

    def without_layers(self, batch: Batch) -> Iterator[Tensor]:
        """Yields the gradients of the losses, ``(b, p)`` for the next ``b`` examples, computed in another way."""
        return gradients_of(self._loss, batch)

    def record_losses(self, batch: Batch) -> RecordedPass | None:
        """A pass that gives the sum of the losses, see :meth:`record`."""
        return self.record(self.together.loss_sum, batch)

    def passes(self, evaluate: Callable[[Tensor, Batch], Tensor], batch: Batch) -> Iterator[tuple[Batch, RecordedPass]]:
        """Yields parts of a batch, each with a pass. Where layers are not enough, a part is a single example.

        Args:
            evaluate: See :meth:`record`.
            batch: The batch.

        Raises:
            ObjectiveError: If layers are not enough, and an example cannot be evaluated alone.
        """
        for part in self.parts(batch):
            recorded = self.record(evaluate, part)
            if recorded is not None:
                yield part, recorded
            elif part.size > 1 and part.divisible:
                half = part.size // 2
                for some in (part.slice(0, half), part.slice(half, part.size)):
                    yield from self.passes(evaluate, some)
            elif self.together.whole(part).size == 1:
                theta = self.shadow.theta.detach().requires_grad_()
                yield part, SinglePass(evaluate(theta, part), theta, self.shadow.space)
            else:
                raise ObjectiveError(
                    "The gradients of some examples cannot be computed layer by layer:"
                    f" {type(self.shadow.module).__name__} uses parameters for them by other operations, or mixes"
                    " examples. Use solver='cg'."
                )

    def parts(self, batch: Batch, *, rows: bool = False) -> list[Batch]:
        """Parts of a batch whose gradients fit into memory together.

        Args:
            batch: The batch.
            rows: Whether the gradients of all parameters are needed at the same time, or those of one parameter.
        """
        theta, slots = self.shadow.theta, self.shadow.space.slots
        size = theta.numel() if rows else max(slot.size for slot in slots.values())
        count = max(GRADIENT_BYTES // max(size * theta.element_size(), self._bytes), 1)
        if count >= batch.size or not batch.divisible:
            return [batch]
        return [batch.slice(start, start + count) for start in range(0, batch.size, count)]


def _key(layers: list[Layer]) -> Any:
    """Equal for passes through the same layers with results of the same shapes."""
    return tuple((layer.signature, tuple(layer.shape)) for layer in layers)


def _other_order(size: int) -> Tensor:
    """A random order ``(B,)`` in which no example comes right after the one that it follows in a batch.

    Otherwise two neighbours of different lengths could stay together, and the rows of one count as those of the other.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(size)
    while (order.diff() == 1).any():
        order = torch.randperm(size, generator=generator)
    return order


def _is_axis(axis: Axis, before: Tensor, after: Tensor, order: Tensor) -> bool:
    """Whether examples are along an axis: those in another order have the same gradients, in that order.

    Args:
        axis: The axis.
        before: The gradients at a result.
        after: Those of the examples in another order.
        order: The number ``(B,)`` of each example in this order.
    """
    size = len(order)
    expected = axis.first(before, size).reshape(size, -1)[order.to(before.device)]
    lengths = expected.norm(dim=1)
    differences = (axis.first(after, size).reshape(size, -1) - expected).norm(dim=1)
    return not distance(differences, lengths.clamp_min(_SMALL * float(lengths.mean())))


def gradients_of(loss: LossFunction, batch: Batch) -> Iterator[Tensor]:
    """Yields the gradients of losses at the present parameters, ``(b, p)`` for the next ``b`` examples."""
    # They need no graph, but a parameter that the module holds in a list, out of sight, would keep one.
    return (rows.detach() for rows in loss.gradients(loss.shadow.theta, batch))


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
