"""Conjugate gradients, for the normal equations of least squares and for a symmetric matrix itself.

These are two different iterations. :class:`ConjugateGradients` updates the residual ``g − A x`` and multiplies it by
``Aᵀ`` in each iteration. This is more accurate than conjugate gradients on the matrix ``AᵀA`` (Björck, *Numerical
Methods for Least Squares Problems*, section 7.4). It never meets negative curvature. Solvers call it for one iteration
at a time. :class:`SymmetricConjugateGradients` costs half as many products, and its rate depends on the condition
number instead of its square. But it has to handle negative curvature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LinearOperator, SolveOptions
from .lanczos import largest_singular_value
from .recorder import Outcome, SolveRecorder, unit_norm
from .run import Run
from .solution import Solution, Status
from .vectors import columns, norms, require_finite

__all__ = ["ConjugateGradients", "SymmetricConjugateGradients"]

# The number of coefficients that are kept to estimate the largest singular value, which converges in fewer iterations.
_MOST_COEFFICIENTS = 30

# Factors of the limits below which the curvature along a direction, and the squared residual, count as rounding.
_ROUNDING, _RESIDUAL_ROUNDING = 10.0, 1e-6


class ConjugateGradients:
    """CGLS (Hestenes and Stiefel 1952; Björck, *Numerical Methods for Least Squares Problems*, algorithm 7.4.1).

    Minimises ``‖A x − g‖² + λ²‖x‖²`` over the Krylov space of ``AᵀA + λ²`` and ``Aᵀg``, which grows by one dimension in
    each iteration, for two products. After a few iterations its coefficients give the largest singular value of ``A``
    on this space, see :func:`~lightning_gif.solvers.lanczos.largest_singular_value`.

    Attributes:
        x, difference, normal: The iterates and their residuals, as in :class:`~lightning_gif.solvers.run.Run`.
        stuck: Whether the last iteration could not improve each column, because of rounding, ``(a,)``.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.x, self.difference, self.normal = run.x, run.difference, run.normal
        self._direction = self.normal
        self._gamma = norms(self.normal).square()
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []
        self._first = self._gamma
        self._largest = torch.zeros_like(self._gamma)
        self.stuck = torch.zeros(len(run.active), dtype=torch.bool)

    def step(self) -> None:
        """One iteration for each active column."""
        image = self._run.matvec(self._direction)
        length = norms(self._direction).square()
        curvature = norms(image).square() + self._run.damping**2 * length
        self._largest = torch.maximum(self._largest, torch.where(length > 0, curvature / length, 0.0))
        # If the curvature along the direction, or the residual, is zero up to rounding, further iterations would follow
        # noise, and their steps would grow.
        eps = torch.finfo(image.dtype).eps
        noise = self._largest * norms(self.difference).square() + _RESIDUAL_ROUNDING * self._first
        stuck = (curvature <= (_ROUNDING * eps) ** 2 * self._largest * length) | (self._gamma <= eps**2 * noise)
        alpha = torch.where(stuck, 0.0, self._gamma / curvature)
        self.stuck = stuck.cpu()
        self.x = self.x + alpha.to(image.dtype) * self._direction
        self.difference = self.difference - alpha.to(image.dtype) * image
        self.normal = self._run.rmatvec(self.difference) - self._run.damping**2 * self.x
        require_finite(self.normal, "The product of the Hessian with a vector")
        gamma = norms(self.normal).square()
        beta = torch.where(self._gamma > 0, gamma / self._gamma, 0.0)
        self._direction = self.normal + beta.to(image.dtype) * self._direction
        self._gamma = gamma
        if len(self._alphas) < _MOST_COEFFICIENTS:
            self._alphas.append(alpha)
            self._betas.append(beta)
            self._run.saw(self.sigma()[0])

    def keep(self, which: Tensor | None) -> None:
        """Keeps only the columns of a mask ``(a,)``; all for ``None``."""
        self.x, self.difference, self.normal, self._direction = columns(
            which, self.x, self.difference, self.normal, self._direction
        )
        self._gamma, self._first, self._largest = columns(which, self._gamma, self._first, self._largest)
        (self.stuck,) = columns(which, self.stuck)
        self._alphas = list(columns(which, *self._alphas))
        self._betas = list(columns(which, *self._betas))

    def sigma(self) -> tuple[Tensor, Tensor]:
        """A lower estimate of ``σ_max(A)`` for each column, and a safe upper one, ``(a,)`` each."""
        alphas = torch.stack(self._alphas).double().cpu()
        betas = torch.stack(self._betas).double().cpu()
        pairs = [
            largest_singular_value(alpha, beta, self._run.damping)
            for alpha, beta in zip(alphas.T, betas.T, strict=True)
        ]
        estimates, bounds = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
        return estimates, bounds


class SymmetricConjugateGradients:
    """Conjugate gradients on ``(C + λ) x = g`` for several right-hand sides at once.

    A column stops before a direction along which ``C + λ`` has no positive curvature. If this is the first direction,
    the result is one step of steepest descent: ``g`` times ``‖g‖ / ‖(C + λ) g‖``.

    Args:
        solver: The name in the solutions.
        operator: The symmetric matrix ``C``, ``(n, n)``.
        rhs: The right-hand side ``g``, ``(n,)``, or columns ``(n, q)``.
        options: Their damping is a part of ``λ``. A column stops at the larger of ``rtol`` and ``discrepancy``.
        relative: The other part of ``λ``, as a share of ``‖C g‖/‖g‖`` of each column.

    Raises:
        NonFiniteError: If the right-hand side or a product is not finite.
    """

    def __init__(
        self, solver: str, operator: LinearOperator, rhs: Tensor, options: SolveOptions, *, relative: float = 0.0
    ) -> None:
        self._operator, self._tolerance = operator, max(options.rtol, options.discrepancy)
        self._recorder = SolveRecorder(solver, operator, rhs, options, unit_norm)
        self._rhs = self._recorder.rhs
        self._x, self._residual = torch.zeros_like(self._rhs), self._rhs.clone()
        self._shift = torch.full((self._rhs.shape[1],), options.damping, dtype=torch.float64, device=self._rhs.device)
        self._largest = torch.zeros_like(self._shift)
        self._residuals = [[value] for value in norms(self._rhs).tolist()]
        self._status = [Status.MAX_ITER if value else Status.CONVERGED for (value,) in self._residuals]
        self._iterate(relative, options.max_iter)
        self._verify()

    def _iterate(self, relative: float, max_iter: int) -> None:
        active = torch.tensor([column for column, (value,) in enumerate(self._residuals) if value], dtype=torch.long)
        residual = direction = self._rhs[:, active]
        squared = norms(residual).square()
        eps = torch.finfo(self._rhs.dtype).eps
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
            else:
                sizes = norms(image).clamp_min(torch.finfo(image.dtype).tiny)
                alpha = torch.where(wrong, torch.where(norms(image) > 0, 1 / sizes, 1.0), squared / curvature)
            self._x[:, active] += alpha.to(image.dtype) * direction
            residual = residual - alpha.to(image.dtype) * image
            self._residual[:, active] = residual
            now = norms(residual).square()
            direction = residual + (now / squared).to(image.dtype) * direction
            squared = now
            done = self._note(active, wrong, now.sqrt())
            if done.any():
                active, squared = active[~done.cpu()], squared[~done]
                residual, direction = columns(~done, residual, direction)

    def _note(self, active: Tensor, wrong: Tensor, residuals: Tensor) -> Tensor:
        """Records an iteration of the active columns, and returns a mask of those that are done."""
        done = wrong | (residuals <= self._tolerance)
        for column, ends, indefinite, value in zip(
            active.tolist(), done.tolist(), wrong.tolist(), residuals.tolist(), strict=True
        ):
            if indefinite:
                self._status[column] = Status.INDEFINITE
                continue
            self._residuals[column].append(value)
            if ends:
                self._status[column] = Status.CONVERGED
        return done

    def _verify(self) -> None:
        """Recomputes the residuals of converged columns, because residuals that are updated drift by rounding."""
        claimed = [
            column
            for column, (status, residuals) in enumerate(zip(self._status, self._residuals, strict=True))
            if status is Status.CONVERGED and len(residuals) > 1
        ]
        if claimed:
            x = self._x[:, claimed]
            true = self._rhs[:, claimed] - self._operator.matvec(x) - self._shift[claimed].to(x.dtype) * x
            self._residual[:, claimed] = true
            for column, value in zip(claimed, norms(true).tolist(), strict=True):
                if value > 1.01 * self._tolerance:
                    self._status[column] = Status.STALLED

    def curvature_along(self) -> list[float]:
        """``xᵀCx`` for each column, without a further product."""
        along = (self._x.double() * (self._rhs - self._residual).double()).sum(0)
        curvature = along - self._shift * norms(self._x).square()
        return (self._recorder.unit.square() * curvature).tolist()

    def solutions(self) -> Solution | list[Solution]:
        """One solution for a vector, a list for columns."""
        left = norms(self._residual).tolist()
        return self._recorder.solutions(
            [
                Outcome(
                    x=self._x[:, column],
                    status=status,
                    iterations=len(residuals) - 1,
                    residual=left[column],
                    unexplained=left[column],
                    sigma_max=float(self._largest[column]),
                    residuals=residuals,
                    # One product for each iteration, and one that verified the residual or met negative curvature.
                    share=max(len(residuals) - 1 + (status is not Status.MAX_ITER), 1),
                    damping=float(self._shift[column]),
                )
                for column, (residuals, status) in enumerate(zip(self._residuals, self._status, strict=True))
            ]
        )
