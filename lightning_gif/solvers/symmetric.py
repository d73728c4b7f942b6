"""Conjugate gradients on a symmetric operator itself: one product a step, and its condition number, not the square."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import SOLVERS, LinearOperator
from .run import check_shape, columns, norms, require_finite
from .solution import Solution, Status, peak_memory

__all__ = ["cg", "truncated_newton"]


@SOLVERS.register("cg")
def cg(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    rtol: float = 1e-3,
    max_iter: int = 100,
    seed: int = 0,
    start: Tensor | None = None,
    discrepancy: float = 0.0,
) -> Solution | list[Solution]:
    """Solves ``(C + λ) x = b`` for a symmetric positive semi-definite ``C`` by conjugate gradients.

    Half of what a least-squares solver costs a step, but only where there is no row more than there are columns
    (methods ``"if"``, ``"fif"``, ``"pif"``) and no negative curvature (``curvature="ggn"``): where it meets a direction
    of negative curvature it ends before that, as ``INDEFINITE``. Stopped after a few steps it regularises like damping.

    Args:
        operator: ``C``, ``(n, n)``, symmetric.
        rhs: ``b``, ``(n,)``, or several as columns ``(n, q)``.
        damping: ``λ ≥ 0``, in the unit of ``C``'s eigenvalues; it is added to these, not squared.
        rtol: Relative residual ``‖b − (C + λ)x‖/‖b‖`` at which to stop.
        max_iter: Most steps of one product each.
        seed: Unused: nothing is drawn.
        start: Not supported: a first iterate would hide the curvature that the first step shows.
        discrepancy: Stop where the relative residual is no more than this.

    Returns:
        A :class:`~lightning_gif.solvers.Solution`, whose ``unexplained`` and ``residual`` are both the relative
        residual; a list for columns.

    Raises:
        ConfigurationError: If the operator is not square, or for a ``start``.
        NonFiniteError: If a product is not finite.
    """
    if operator.shape[0] != operator.shape[1] or start is not None:
        raise ConfigurationError(
            f"solver='cg' takes a square operator and no start, got one of shape {operator.shape}. For method='gif',"
            " whose matrix has more rows than columns, use solver='lsmr'."
        )
    run = _Conjugation(operator, rhs, damping, 0.0, max(rtol, discrepancy), max_iter)
    found = run.solutions("cg", rtol)
    return found[0] if rhs.ndim == 1 else found


def truncated_newton(
    operator: LinearOperator, rhs: Tensor, *, damping: float, relative: float, rtol: float, max_iter: int
) -> tuple[Solution, float]:
    """Lowers ``½ xᵀ(C + λ)x − bᵀx`` by conjugate gradients, up to where ``C + λ`` curves the wrong way.

    With ``−b`` the slope of a function and ``C`` its second derivative, ``x`` is a step of a damped Newton method that
    stops early (Nocedal and Wright, *Numerical Optimization*, 2nd ed., algorithm 7.1; Martens, ICML 2010): a direction
    along which the function falls, whatever the signs of ``C``'s eigenvalues. A step costs one product, half of what
    one of the least-squares solvers costs, and the iteration sees the condition number of ``C``, not its square.

    Args:
        operator: ``C``, ``(n, n)``, symmetric.
        rhs: ``b``, ``(n,)``.
        damping: A part of ``λ``, in the unit of ``C``'s eigenvalues.
        relative: The other part, as a share of ``‖C b‖/‖b‖``, which the first step finds at no further cost.
        rtol: Relative residual ``‖b − (C + λ)x‖/‖b‖`` at which to stop.
        max_iter: Most steps.

    Returns:
        A :class:`~lightning_gif.solvers.Solution`, whose ``unexplained`` and ``residual`` are both the relative
        residual, and ``xᵀCx``, which no further product is needed for.

    Raises:
        NonFiniteError: If the right-hand side or a product is not finite.
    """
    run = _Conjugation(operator, rhs, damping, relative, rtol, max_iter)
    (solution,) = run.solutions("truncated_newton", rtol)
    return solution, run.bends()[0]


class _Conjugation:
    """Conjugate gradients for several right-hand sides at once, each until it is done.

    Args:
        operator: ``C``, ``(n, n)``.
        rhs: ``b``, ``(n,)``, or columns ``(n, q)``.
        damping: A part of ``λ``.
        relative: The other part, as a share of ``‖C b‖/‖b‖`` of each column.
        rtol: Where to stop.
        max_iter: Most steps.
    """

    def __init__(
        self, operator: LinearOperator, rhs: Tensor, damping: float, relative: float, rtol: float, max_iter: int
    ) -> None:
        self._begin, self._operator = time.perf_counter(), operator
        self._before = operator.products, operator.examples
        b = rhs[:, None] if rhs.ndim == 1 else rhs
        check_shape("right-hand side", b, operator.shape[0])
        require_finite(rhs, "The right-hand side of the solve")
        # To unit length: squares of tiny gradients vanish in float32.
        self._unit = norms(b)
        self._unit[self._unit == 0] = 1.0
        self._b = (b / self._unit).to(rhs.dtype)
        size = self._b.shape[1]
        self.x, self._residual = torch.zeros_like(self._b), self._b.clone()
        self._shift = torch.full((size,), damping, dtype=torch.float64, device=b.device)
        self._largest = torch.zeros_like(self._shift)
        self._curves = [[value] for value in norms(self._b).tolist()]
        self._status = [Status.MAX_ITER if value else Status.CONVERGED for (value,) in self._curves]
        self._iterate(relative, rtol, max_iter)
        self._check(rtol)

    def _iterate(self, relative: float, rtol: float, max_iter: int) -> None:
        active = torch.tensor([column for column, (value,) in enumerate(self._curves) if value], dtype=torch.long)
        residual = direction = self._b[:, active]
        squared = norms(residual).square()
        eps = torch.finfo(self._b.dtype).eps
        for step in range(max_iter):
            if not len(active):
                return
            image = self._operator.matvec(direction)
            require_finite(image, f"Step {step + 1} of the solve (conjugate gradients)")
            if not step:
                self._shift[active] += relative * norms(image)
            shift = self._shift[active]
            image = image + shift.to(image.dtype) * direction
            length = norms(direction).square()
            curvature = (direction.double() * image.double()).sum(0)
            self._largest[active] = torch.maximum(self._largest[active], (curvature / length - shift).abs())
            wrong = curvature <= eps * self._largest[active] * length
            if step:
                alpha = torch.where(wrong, 0.0, squared / curvature)
            else:  # steepest descent, by what a curvature of the other sign would allow at least
                sizes = norms(image).clamp_min(torch.finfo(image.dtype).tiny)
                alpha = torch.where(wrong, torch.where(norms(image) > 0, 1 / sizes, 1.0), squared / curvature)
            self.x[:, active] += alpha.to(image.dtype) * direction
            residual = residual - alpha.to(image.dtype) * image
            self._residual[:, active] = residual
            now = norms(residual).square()
            direction = residual + (now / squared).to(image.dtype) * direction
            squared = now
            done = wrong | (now.sqrt() <= rtol)
            for column, stops, bad, value in zip(
                active.tolist(), done.tolist(), wrong.tolist(), now.sqrt().tolist(), strict=True
            ):
                if bad:
                    self._status[column] = Status.INDEFINITE
                    continue
                self._curves[column].append(value)
                if stops:
                    self._status[column] = Status.CONVERGED
            if done.any():
                active, squared = active[~done.cpu()], squared[~done]
                residual, direction = columns(~done, residual, direction)

    def _check(self, rtol: float) -> None:
        """What a recurrence carries along drifts away from what is true, so what it claims is computed anew."""
        claimed = [
            column
            for column, status in enumerate(self._status)
            if status is Status.CONVERGED and len(self._curves[column]) > 1
        ]
        if claimed:
            x = self.x[:, claimed]
            true = self._b[:, claimed] - self._operator.matvec(x) - self._shift[claimed].to(x.dtype) * x
            self._residual[:, claimed] = true
            for column, value in zip(claimed, norms(true).tolist(), strict=True):
                if value > 1.01 * rtol:
                    self._status[column] = Status.STALLED

    def bends(self) -> list[float]:
        """``xᵀCx`` of each column."""
        along = (self.x.double() * (self._b - self._residual).double()).sum(0)
        return (self._unit.square() * (along - self._shift * norms(self.x).square())).tolist()

    def solutions(self, solver: str, rtol: float) -> list[Solution]:
        """One for each column."""
        seconds, memory = time.perf_counter() - self._begin, peak_memory(self._operator.device)
        spent = self._operator.products - self._before[0], self._operator.examples - self._before[1]
        # Products of columns: a step of each, and those that a claim was checked by.
        steps = [max(len(curve) - 1 + (status is not Status.MAX_ITER), 1) for curve, status in self._told()]
        left, x = norms(self._residual).tolist(), (self._unit * self.x).to(self.x.dtype)
        return [
            Solution(
                x=x[:, column],
                status=status,
                solver=solver,
                iterations=len(curve) - 1,
                hvps=round(spent[0] * steps[column] / sum(steps)),
                examples=round(spent[1] * steps[column] / sum(steps)),
                residual=left[column],
                unexplained=left[column],
                sigma_max=float(self._largest[column]),
                rtol=rtol,
                damping=float(self._shift[column]),
                seconds=seconds,
                peak_memory=memory,
                residuals=curve,
            )
            for column, (curve, status) in enumerate(self._told())
        ]

    def _told(self) -> list[tuple[list[float], Status]]:
        return list(zip(self._curves, self._status, strict=True))
