"""The Jacobians of the predictions for single examples, layer by layer, as maps of many vectors at once.

For a Linear layer with the input ``a`` and the gradient ``δ`` of a prediction at its output, the Jacobian is ``Σ δ aᵀ``
over the positions of an example. Its products with a matrix ``W`` of the layer follow from ``aᵀWᵀδ``, so the Jacobian
need not be formed. But where weights are shared by many positions, as in a convolution, it is smaller than its factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from ..parameters import ParameterSpace
from .layer_gradients import RecordedPass, SinglePass
from .layers import Axis, Layer, Linear, Part
from .losses import GRADIENT_BYTES

__all__ = ["LayerJacobian", "layer_jacobians"]


class LayerJacobian(ABC):
    """The derivatives of ``d`` functions of each of ``B`` examples in the parameters of one layer."""

    @abstractmethod
    def push(self, space: ParameterSpace, directions: Tensor) -> Tensor:
        """The derivatives ``(q, d, B)`` along directions ``(q, p)``."""

    @abstractmethod
    def pull(self, space: ParameterSpace, weights: Tensor, total: Tensor) -> None:
        """Adds the sums of all gradients, with weights ``(q, d, B)``, to ``total`` ``(q, p)``."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it keeps in memory."""

    @property
    def multiplications(self) -> int:
        """The number of multiplications for one direction."""
        return sum(tensor.numel() for tensor in self.tensors)


class _Rows(LayerJacobian):
    """A Jacobian that is formed.

    Args:
        parts: The parts of the layer.
        rows: For each part, ``(d·B, m)``.
    """

    def __init__(self, parts: Sequence[Part], rows: list[Tensor], size: int) -> None:
        self._parts, self._rows, self._size = parts, rows, size

    @override
    def push(self, space: ParameterSpace, directions: Tensor) -> Tensor:
        pairs = zip(self._parts, self._rows, strict=True)
        found = [part.of(space.of(part.name, directions)).flatten(1) @ rows.T for part, rows in pairs]
        return torch.stack(found).sum(0).unflatten(1, (-1, self._size))

    @override
    def pull(self, space: ParameterSpace, weights: Tensor, total: Tensor) -> None:
        for part, rows in zip(self._parts, self._rows, strict=True):
            part.add_to(space.of(part.name, total), weights.flatten(1) @ rows)

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self._rows)


class _Factors(LayerJacobian):
    """The Jacobian of a matrix ``W`` ``(o, i)``, as its inputs and output gradients at the ``T`` positions.

    Args:
        layer: The layer.
        inputs: ``(B, T, i)``, with a column of ones if the layer has a bias.
        outputs: ``(B, d, T·o)``.
    """

    def __init__(self, layer: Linear, inputs: Tensor, outputs: Tensor) -> None:
        self._weight, self._bias = layer.weight, layer.bias
        self._inputs, self._outputs = inputs, outputs

    @override
    def push(self, space: ParameterSpace, directions: Tensor) -> Tensor:
        found = []
        for some in directions.split(self._together):
            matrix = self._weight.of(space.of(self._weight.name, some)).flatten(2)
            if self._bias is not None:
                matrix = torch.cat([matrix, self._bias.of(space.of(self._bias.name, some))[..., None]], 2)
            images = self._inputs @ matrix.flatten(0, 1).T  # (B, T, q·o)
            images = images.unflatten(2, (len(some), -1)).transpose(1, 2).flatten(2)  # (B, q, T·o)
            found.append((images @ self._outputs.mT).permute(1, 2, 0))
        return torch.cat(found)

    @override
    def pull(self, space: ParameterSpace, weights: Tensor, total: Tensor) -> None:
        positions, columns = self._inputs.shape[1:]
        inputs = self._inputs.reshape(-1, columns)
        for some, rows in zip(weights.split(self._together), total.split(self._together), strict=True):
            outputs = some.permute(2, 0, 1) @ self._outputs  # (B, q, T·o)
            outputs = outputs.unflatten(2, (positions, -1)).permute(1, 3, 0, 2).flatten(2)  # (q, o, B·T)
            matrix = (outputs.flatten(0, 1) @ inputs).unflatten(0, (len(some), -1))
            if self._bias is not None:
                self._bias.add_to(space.of(self._bias.name, rows), matrix[..., -1])
                matrix = matrix[..., :-1]
            self._weight.add_to(space.of(self._weight.name, rows), matrix.flatten(1))

    @property
    def _together(self) -> int:
        """The number of directions whose images fit into memory together."""
        size = len(self._outputs) * self._outputs.shape[2] * self._outputs.element_size()
        return max(GRADIENT_BYTES // max(size, 1), 1)

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return self._inputs, self._outputs

    @property
    @override
    def multiplications(self) -> int:
        return self._inputs.numel() * self._weight.shape[0] + self._outputs.numel()


class _Whole(LayerJacobian):
    """The Jacobian of all parameters for one example, ``(d, p)``."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    @override
    def push(self, space: ParameterSpace, directions: Tensor) -> Tensor:
        return (directions @ self._rows.T)[..., None]

    @override
    def pull(self, space: ParameterSpace, weights: Tensor, total: Tensor) -> None:
        total += weights[..., 0] @ self._rows

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return (self._rows,)


def layer_jacobians(recorded: RecordedPass, vectors: Sequence[Tensor]) -> list[LayerJacobian]:
    """The Jacobians of functions of the predictions of single examples.

    Args:
        recorded: A pass whose value is the predictions of ``B`` examples.
        vectors: The derivatives of ``d`` functions of each example in the predictions, each in their shape. A function
            must depend on its own example only.
    """
    deltas = [recorded.output_gradients(vector, keep=True) for vector in vectors]
    if isinstance(recorded, SinglePass):
        return [_Whole(torch.stack([gradient for (gradient,) in deltas]))]
    of_layers = zip(recorded.layers, recorded.axes, zip(*deltas, strict=True), strict=True)
    return [_of_layer(layer, axis, recorded.size, of_layer) for layer, axis, of_layer in of_layers]


def _of_layer(layer: Layer, axis: Axis, size: int, deltas: Sequence[Tensor]) -> LayerJacobian:
    if isinstance(layer, Linear) and layer.groups == 1:
        inputs, outputs = layer.inputs(axis, size), [layer.outputs(delta, axis, size) for delta in deltas]
        if _Sizes.of(inputs.shape[1], len(deltas), outputs[0].shape[2], inputs.shape[2]).keeps_factors:
            if layer.bias is not None:
                inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)
            return _Factors(layer, inputs.contiguous(), torch.stack([side.flatten(1) for side in outputs], 1))
        of_all = torch.cat(outputs, 2)  # (B, T, d·o)
        rows = [of_all.mT @ inputs] if layer.bias is None else [of_all.mT @ inputs, of_all.sum(1)]
        by_function = (one.reshape(size, len(deltas), -1).transpose(0, 1) for one in rows)
        return _Rows(layer.parts, [one.reshape(len(deltas) * size, -1) for one in by_function], size)
    gradients = zip(*(layer.gradients(delta, axis, size) for delta in deltas), strict=True)
    return _Rows(layer.parts, [torch.cat([one.reshape(size, -1) for one in part]) for part in gradients], size)


class _Sizes(NamedTuple):
    """What the Jacobian of a matrix takes for an example, formed or in factors.

    Attributes:
        rows: The number of entries if it is formed, which is also that of the multiplications in one of its products.
        factors: The number of entries of the factors.
        operations: The multiplications in a product with the factors.
    """

    rows: int
    factors: int
    operations: int

    @classmethod
    def of(cls, positions: int, d: int, outputs: int, inputs: int) -> _Sizes:
        return cls(
            rows=d * outputs * inputs,
            factors=positions * (inputs + d * outputs),
            operations=positions * outputs * (inputs + d),
        )

    @property
    def keeps_factors(self) -> bool:
        """Whether factors take less memory and time, in the geometric mean of both."""
        return self.factors * self.operations < self.rows**2
