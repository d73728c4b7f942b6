"""The Gauss–Newton matrix of a batch from the Jacobians of its layers, for products with many vectors at once."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..data.batch import Batch
from ..objective import outputs
from ..objective.jacobians import LayerJacobian, layer_jacobians
from ..objective.objective import Objective
from ..parameters import ParameterSpace
from .output_curvature import output_roots
from .products import CURVATURES, DependenceCheck, Linearise, Product

__all__ = ["layer_products", "saves_time"]

# With more predictions of an example than these, the first pass takes too many backward passes.
_MOST = 64

# The largest number of bytes of the Jacobians over all examples: with more, they may have to be computed again.
_BYTES = 2**32

# Operations of a product through the module as a multiple of those of a pass, and of a backward pass. By how much the
# operations must be fewer: those of a single vector are slower, since memory is read for each. benchmarks/README.md,
# "Products with many vectors".
_PRODUCT, _BACKWARD, _LESS = 4, 2, 2


def layer_products(objective: Objective, otherwise: Linearise) -> Linearise:
    """The matrix of :func:`~lightning_gif.curvature.products.gauss_newton`, at the objective's present parameters.

    The first pass over a batch takes one backward pass for each of the ``d`` predictions of an example. Every product
    after that consists of a few matrix products for each layer, for all vectors at once, and of no passes through the
    module. The product takes columns ``(p, q)``, as its attribute ``takes_columns`` says.

    Args:
        objective: An open objective whose module has layers.
        otherwise: The same matrix, computed in another way, for batches of which the predictions of an example do not
            lie side by side.
    """
    layers = objective.layers
    assert layers is not None
    loss, check = layers.together, DependenceCheck(objective.loss_sum, always=False)

    def linearise(theta: Tensor, batch: Batch) -> tuple[Product, tuple[Tensor, ...]]:
        if check.is_due(batch):
            otherwise(theta, batch)  # raises an error if the loss is no function of the predictions
            check.note(batch)
        parts = list[list[LayerJacobian]]()
        for part, recorded in layers.passes(partial(outputs.outputs, loss), batch):
            at = outputs.loss_sum_at(loss, theta.detach(), part)
            roots = output_roots(at, recorded.value, loss.whole(part).size)
            if roots is None:
                return otherwise(theta, batch)
            vectors = [column.reshape(recorded.value.shape) for column in roots.unbind(2)]
            parts.append(layer_jacobians(recorded, vectors))

        return _Columns(objective.space, parts), tuple(
            tensor for jacobians in parts for one in jacobians for tensor in one.tensors
        )

    linearise.positive_semidefinite = objective.convex_in_outputs  # type: ignore[attr-defined]
    return linearise


class _Columns:
    """The product with columns ``(p, q)``.

    Args:
        space: The parameters.
        parts: The Jacobians of each part of a batch.
    """

    takes_columns = True

    def __init__(self, space: ParameterSpace, parts: list[list[LayerJacobian]]) -> None:
        self._space, self._parts = space, parts

    def __call__(self, columns: Tensor) -> Tensor:
        directions = columns.T.contiguous()
        total = torch.zeros_like(directions)
        for jacobians in self._parts:
            if jacobians:
                pushed = torch.stack([one.push(self._space, directions) for one in jacobians]).sum(0)
                for one in jacobians:
                    one.pull(self._space, pushed, total)
        return total.T

    @property
    def multiplications(self) -> int:
        """The multiplications in one product of the Jacobian with a vector."""
        return sum(one.multiplications for jacobians in self._parts for one in jacobians)


def saves_time(objective: Objective, examples: int, products: int) -> bool:
    """Whether :func:`layer_products` takes fewer operations than products through the module.

    It does where weights are shared by many positions, and for many vectors. It depends on the module alone, not on the
    free memory, because the two ways round differently.

    Args:
        objective: An open objective.
        examples: The number of examples.
        products: The number of products with a vector.
    """
    layers, probed = objective.layers, objective.probed
    if layers is None or probed is None or objective.finds_outputs:
        return False
    single = probed.slice(0, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective.loss_sum(objective.theta, single)
    operations = counter.get_total_flops()
    with torch.no_grad():
        d = objective.outputs(objective.theta, single).numel()
    if d > _MOST or d * _BACKWARD * operations > _PRODUCT / _LESS * products * operations:
        return False
    product, (*tensors,) = layer_products(objective, CURVATURES["ggn"](objective))(objective.theta, single)
    if not isinstance(product, _Columns) or examples * sum(tensor.nbytes for tensor in tensors) > _BYTES:
        return False
    each = _LESS * 4 * product.multiplications  # a multiplication and an addition, for the Jacobian and its transpose
    return d * _BACKWARD * operations * _LESS + products * each < products * _PRODUCT * operations
