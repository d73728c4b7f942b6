"""Conjugate gradients on the normal equations, a step at a time, and what its coefficients tell of the spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from .run import Run, columns, norms, require_finite

__all__ = ["ConjugateGradients"]

# The largest singular value is known long before.
_MOST_COEFFICIENTS = 30


class ConjugateGradients:
    """CGLS (Hestenes and Stiefel 1952; Björck, *Numerical Methods for Least Squares Problems*, algorithm 7.4.1).

    Minimises ``‖B x − b‖² + λ²‖x‖²`` over the Krylov space of ``BᵀB + λ²`` and ``Bᵀb``, which grows by one dimension
    and two products a step. Its coefficients are those of the Lanczos tridiagonalisation of ``BᵀB + λ²`` started at the
    residual (Golub and Van Loan, *Matrix Computations*, section 11.3.5), so that the largest singular value which the
    right-hand side can meet is known after a few steps, at no further cost.

    Attributes:
        x, difference, normal: The iterates and their residuals, as in :class:`~lightning_gif.solvers.run.Run`.
        stuck: Columns ``(a,)`` in which the last step could change nothing.
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
        """One step of each active column."""
        image = self._run.matvec(self._direction)
        length = norms(self._direction).square()
        curvature = norms(image).square() + self._run.damping**2 * length
        self._largest = torch.maximum(self._largest, torch.where(length > 0, curvature / length, 0.0))
        # Rounding cannot tell the direction's curvature from none, or the residual from none: steps along noise grow.
        eps = torch.finfo(image.dtype).eps
        noise = self._largest * norms(self.difference).square() + 1e-6 * self._first
        stuck = (curvature <= (10 * eps) ** 2 * self._largest * length) | (self._gamma <= eps**2 * noise)
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
        """Drops the columns that are done."""
        self.x, self.difference, self.normal, self._direction = columns(
            which, self.x, self.difference, self.normal, self._direction
        )
        self._gamma, self._first, self._largest = columns(which, self._gamma, self._first, self._largest)
        (self.stuck,) = columns(which, self.stuck)
        self._alphas = list(columns(which, *self._alphas))
        self._betas = list(columns(which, *self._betas))

    def sigma(self) -> tuple[Tensor, Tensor]:
        """An estimate of ``σ_max(B)`` from below for each column ``(a,)``, and a safe value above it.

        The estimate is the largest Ritz value, the uncertainty its residual: with one or the other sign there is a
        singular value that close to it.
        """
        alphas = torch.stack(self._alphas).double().cpu()
        betas = torch.stack(self._betas).double().cpu()
        estimates, bounds = [], []
        for alpha, beta in zip(alphas.T, betas.T, strict=True):
            size = int((alpha > 0).long().cumprod(0).sum())  # up to the first step that changed nothing
            if not size:
                estimates.append(0.0)
                bounds.append(0.0)
                continue
            a, b = alpha[:size], beta[:size]
            diagonal = 1 / a
            diagonal[1:] += b[:-1] / a[:-1]
            side = b[:-1].sqrt() / a[:-1]
            values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(side, 1) + torch.diag(side, -1))
            missing = float(b[-1].sqrt() / a[-1] * vectors[-1, -1].abs())
            squared = float(values[-1]) - self._run.damping**2
            estimates.append(max(squared, 0.0) ** 0.5)
            bounds.append(max(squared + missing, 0.0) ** 0.5)
        return torch.tensor(estimates, dtype=torch.float64), torch.tensor(bounds, dtype=torch.float64)
