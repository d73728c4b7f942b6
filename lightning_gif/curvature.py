"""The Hessian of the training loss as an operator on vectors, streamed over data, and its rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import Examples
from .errors import ObjectiveError
from .parameters import ParameterSpace, Targets
from .registry import Registry
from .solvers import LinearOperator, Solution

__all__ = ["METHODS", "Hessian", "Method", "Submatrix"]


class Hessian:
    """``H = ∇²L(θ)`` of the mean loss ``L`` over examples, acting on flat vectors ``(p,)``.

    A product is the reverse-mode derivative of ``∇L(θ)·v`` (Pearlmutter 1994), summed over micro-batches with the
    weight of their true sizes, so a ragged last batch counts as what it is. Memory is that of one micro-batch, however
    many examples there are.

    Args:
        loss_sum: ``(θ, batch) → ()``, the sum of the losses of a batch's examples; twice differentiable in ``θ``.
        theta: Where the Hessian is taken, ``(p,)``.
        examples: Over which data, iterated once for each product.
        on_product: Called at each product, to show progress.
    """

    def __init__(
        self,
        loss_sum: Callable[[Tensor, Any], Tensor],
        theta: Tensor,
        examples: Examples,
        *,
        on_product: Callable[[], Any] = lambda: None,
    ) -> None:
        self._loss_sum = loss_sum
        self._theta = theta
        self._examples = examples
        self._on_product = on_product
        self.products = 0
        self.shape = (theta.numel(), theta.numel())
        self.dtype, self.device = theta.dtype, theta.device

    def matvec(self, vector: Tensor) -> Tensor:
        """``H v``: ``(p,) → (p,)``."""
        self.products += 1
        self._on_product()
        total = torch.zeros_like(self._theta)
        for batch in self._examples.batches():
            theta = self._theta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                self._loss_sum(theta, batch.data), theta, create_graph=True, materialize_grads=True
            )
            if gradient.requires_grad:  # otherwise the loss is linear in θ here and the second derivative is zero
                (product,) = torch.autograd.grad(gradient, theta, vector, materialize_grads=True)
                total += product
        return total / len(self._examples)

    rmatvec = matvec
    """``Hᵀ v = H v``."""


class Submatrix:
    """``H[rows, cols]`` of a symmetric operator ``H``, without forming it.

    Args:
        hessian: ``H``, ``(p, p)``, symmetric.
        rows: Sorted positions ``(r,)`` of the kept rows, or ``None`` for all.
        cols: Sorted positions ``(c,)`` of the kept columns, or ``None`` for all.
    """

    def __init__(self, hessian: LinearOperator, rows: Tensor | None, cols: Tensor | None) -> None:
        self._hessian = hessian
        self._rows, self._cols = rows, cols
        size = hessian.shape[0]
        self.shape = (size if rows is None else rows.numel(), size if cols is None else cols.numel())
        self.dtype, self.device = hessian.dtype, hessian.device

    @property
    def products(self) -> int:
        """Products of the underlying Hessian spent so far."""
        return self._hessian.products

    @property
    def T(self) -> Submatrix:
        """The transpose ``H[cols, rows]``."""
        return Submatrix(self._hessian, self._cols, self._rows)

    def matvec(self, vector: Tensor) -> Tensor:
        """``(c,) → (r,)``."""
        image = self._hessian.matvec(_scatter(vector, self._cols, self._hessian.shape[0]))
        return image if self._rows is None else image[self._rows]

    def rmatvec(self, vector: Tensor) -> Tensor:
        """``(r,) → (c,)``."""
        return self.T.matvec(vector)


def _scatter(vector: Tensor, positions: Tensor | None, size: int) -> Tensor:
    """The vector ``(size,)`` that has ``vector`` at ``positions`` and zeros elsewhere."""
    if positions is None:
        return vector
    return torch.zeros(size, dtype=vector.dtype, device=vector.device).index_copy(0, positions, vector)


@dataclass(frozen=True)
class Method:
    """Which rows and columns of the Hessian an influence method inverts, in the least-squares sense.

    With ``M = H[rows, cols]``, the change of the targets for a weighted gradient ``g`` is ``x = (M⁺ g[rows])[S]``. All
    methods of the GIF paper (arXiv 2312.05586, section 4) are of this form.

    Attributes:
        rows: ``"all"`` or ``"targets"``.
        cols: ``"all"`` or ``"targets"``.
        selects: ``False`` if the method changes every parameter, whatever was selected.
    """

    rows: str
    cols: str
    selects: bool = True

    def edit(
        self, hessian: LinearOperator, targets: Tensor, gradient: Tensor, solve: Callable[..., Solution]
    ) -> tuple[Tensor, Solution]:
        """The change ``x`` ``(k,)`` of the targets that answers the weighted gradient ``g`` ``(p,)``, and the solve."""
        matrix = self._matrix(hessian, targets)
        solution = solve(matrix, gradient if self.rows == "all" else gradient[targets])
        return (solution.x if self.cols == "targets" else solution.x[targets]), solution

    def query(
        self, hessian: LinearOperator, targets: Tensor, gradient: Tensor, solve: Callable[..., Solution]
    ) -> tuple[Tensor, Solution]:
        """The vector ``w`` ``(p,)`` for which ``wᵀg = q[S]ᵀx(g)`` for every ``g``, and the solve.

        The map ``g → x`` is linear, so its adjoint takes the query's gradient ``q`` to ``w`` once, and then each
        training example costs one inner product with its gradient. The adjoint of a pseudo-inverse is the
        pseudo-inverse of the transpose: the same solver on ``Mᵀ``, right-hand side ``q[S]``.

        Raises:
            ObjectiveError: If the query's gradient vanishes on all targets.
        """
        size = hessian.shape[0]
        on_targets = gradient[targets]
        if not on_targets.any():
            raise ObjectiveError(
                "The query does not depend on the target parameters: its gradient on all of them is exactly zero, so"
                " no training example could have moved it through them. Use targets='batch', a larger ratio, or"
                " method='if'."
            )
        rhs = on_targets if self.cols == "targets" else _scatter(on_targets, targets, size)
        solution = solve(self._matrix(hessian, targets).T, rhs)
        return (solution.x if self.rows == "all" else _scatter(solution.x, targets, size)), solution

    def _matrix(self, hessian: LinearOperator, targets: Tensor) -> Submatrix:
        return Submatrix(
            hessian,
            targets if self.rows == "targets" else None,
            targets if self.cols == "targets" else None,
        )

    def targets(self, space: ParameterSpace, selected: Callable[[], Targets]) -> Targets:
        """What the method changes: the selection, or everything."""
        return selected() if self.selects else Targets.whole(space)


METHODS: Registry[Method] = Registry("method")
"""The influence methods by the paper's names."""

METHODS.register("gif")(Method(rows="all", cols="targets"))
METHODS.register("fif")(Method(rows="targets", cols="targets"))
METHODS.register("pif")(Method(rows="all", cols="all"))
METHODS.register("if")(Method(rows="all", cols="all", selects=False))
