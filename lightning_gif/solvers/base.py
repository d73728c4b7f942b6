"""What a solver gets: an operator and right-hand sides; and the registry of solvers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .._moved import forward
from ..registry import Registry
from .solution import Solution

__all__ = ["SOLVERS", "LinearOperator", "Solver"]


class LinearOperator(Protocol):
    """A real matrix ``B`` of shape ``(rows, cols)`` that is only known by its products with vectors.

    Attributes:
        shape: ``(rows, cols)``.
        dtype: The dtype of the vectors that go in and out.
        device: Their device.
        products: How many Hessian-vector products were spent since the operator was made.
        examples: How many examples they went through.
    """

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def products(self) -> int: ...
    @property
    def examples(self) -> int: ...

    def matvec(self, vectors: Tensor) -> Tensor:
        """``B V``: ``(cols,) → (rows,)``, or ``(cols, q) → (rows, q)`` for several at once."""

    def rmatvec(self, vectors: Tensor) -> Tensor:
        """``Bᵀ V``: ``(rows,) → (cols,)``, or ``(rows, q) → (cols, q)`` for several at once."""


class Solver(Protocol):
    """What :data:`SOLVERS` holds; :func:`~lightning_gif.solvers.lissa` says what the arguments mean."""

    def __call__(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        *,
        damping: float,
        rtol: float,
        max_iter: int,
        seed: int,
        start: Tensor | None = None,
        discrepancy: float = 0.0,
    ) -> Solution | list[Solution]:
        """One solution for a right-hand side ``(rows,)``; a list of ``q`` for several as columns ``(rows, q)``."""


SOLVERS: Registry[Solver] = Registry("solver")
"""All solvers by name; :meth:`Registry.register` adds one."""

__getattr__ = forward(__name__)  # of names that went elsewhere
