"""Common code of the iterative least-squares solvers: the start, the stopping rules, and the best iterate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .base import LinearOperator, SolveOptions
from .operators import damped_system
from .recorder import Outcome, SolveRecorder
from .solution import Solution, Status
from .vectors import check_shape, columns, norms, require_finite

__all__ = ["Run", "different_products"]


# A column has stalled after this many iterations, and at least half of all, without a new smallest residual: the
# residual then changes by rounding only.
_PATIENCE = 50

# The largest relative difference between two products with the same vector that is explained by rounding.
_SAME = 1e-3


class _Trace:
    """The course of the solve for one right-hand side, and its best iterate."""

    def __init__(self) -> None:
        self.residuals = [1.0]
        self.smallest = 1.0
        self.unexplained = 1.0
        self.since = 0
        self.products = 0
        self.sigma = 0.0
        self.status: Status | None = None
        self.x: Tensor
        self.difference: Tensor

    @property
    def iterations(self) -> int:
        return len(self.residuals) - 1


class Run:
    """The state of an iterative least-squares solve: where to start, when to stop, the best iterate, diagnostics.

    A solver keeps its vectors as matrices with one column for each active right-hand side. After each iteration it
    calls :meth:`record` and drops the columns that are done. The best iterate is returned, not the last one, because
    residuals can rise.

    Args:
        solver: The registered name of the solver.
        operator: A matrix ``(rows, cols)``.
        rhs: The right-hand side ``g``, ``(rows,)``, or several as columns ``(rows, q)``.
        options: The options of the solve.

    Attributes:
        operator: The matrix ``A``, which may include the damping, see
            :func:`~lightning_gif.solvers.operators.damped_system`.
        damping: The damping ``λ`` if ``A`` does not include it, else 0.
        active: The positions of the right-hand sides that are not done, ``(a,)``.
        rhs: The active right-hand sides, scaled, ``(rows, a)``.
        x: Their first iterates, ``(cols, a)``.
        difference: ``g − A x`` of the first iterates, ``(rows, a)``.
        normal: ``Aᵀ(g − A x) − λ²x`` of the first iterates, ``(cols, a)``.
        iterations: The number of iterations so far.

    Raises:
        NonFiniteError: If the right-hand side or a product is not finite.
    """

    def __init__(self, solver: str, operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> None:
        self._solver, self._options = solver, options
        self.operator, self.damping = damped_system(operator, options.damping)
        self._recorder = SolveRecorder(solver, operator, rhs, options)
        self.rhs = self._recorder.rhs
        self.iterations = 0
        self._traces = [_Trace() for _ in range(self.rhs.shape[1])]
        self.active = torch.arange(self.rhs.shape[1])

        self.x = torch.zeros(operator.shape[1], len(self.active), dtype=operator.dtype, device=operator.device)
        self.difference = self.rhs.clone()
        self.normal = self.rmatvec(self.rhs)
        require_finite(self.normal, "The right-hand side of the solve")
        self._all_rhs, self._lengths = self.rhs, norms(self.rhs)
        self._target, self._target_norms = self.normal, norms(self.normal)
        if options.start is not None:
            self._begin_at(options.start[:, None] if options.start.ndim == 1 else options.start)
        for column, trace in enumerate(self._traces):
            trace.x, trace.difference = self.x[:, column].clone(), self.difference[:, column].clone()
            if self._target_norms[column] == 0:  # g is orthogonal to the range of A
                trace.status, trace.smallest, trace.residuals = Status.CONVERGED, 0.0, [0.0]
                trace.unexplained = 1.0 if self._lengths[column] else 0.0
                continue
            trace.smallest = float(norms(self.normal[:, column]) / self._target_norms[column])
            trace.unexplained = float(norms(self.difference[:, column]) / self._lengths[column])
            trace.residuals = [trace.smallest]
            trace.status = self._reached(trace)
        self._narrow()

    def _begin_at(self, start: Tensor) -> None:
        check_shape("start", start, len(self.x))
        require_finite(start, "The start of the solve")
        start = (start / self._recorder.unit).to(self.x)
        difference = self.rhs - self.matvec(start)
        normal = self.rmatvec(difference) - self.damping**2 * start
        better = norms(normal) < self._target_norms
        self.x = torch.where(better, start, self.x)
        self.difference = torch.where(better, difference, self.difference)
        self.normal = torch.where(better, normal, self.normal)

    def matvec(self, vectors: Tensor) -> Tensor:
        """``A V`` for the active columns. One product is counted for each column."""
        self._count()
        return self.operator.matvec(vectors)

    def rmatvec(self, vectors: Tensor) -> Tensor:
        """``Aᵀ V`` for the active columns. One product is counted for each column."""
        self._count()
        return self.operator.rmatvec(vectors)

    def _count(self) -> None:
        for column in self.active:
            self._traces[column].products += 1

    @property
    def running(self) -> bool:
        """Whether some right-hand side is not done."""
        return len(self.active) > 0

    def saw(self, sigma: Tensor) -> None:
        """Records estimates ``(a,)`` of singular values. The largest one is reported."""
        for column, value in zip(self.active.tolist(), sigma.tolist(), strict=True):
            self._traces[column].sigma = max(self._traces[column].sigma, value)

    def record(self, x: Tensor, difference: Tensor, normal: Tensor, *, stuck: Tensor | None = None) -> Tensor | None:
        """Records an iteration.

        Args:
            x: Iterates ``(cols, a)``.
            difference: ``g − A x``, ``(rows, a)``.
            normal: ``Aᵀ(g − A x) − λ²x``, ``(cols, a)``.
            stuck: Whether further iterations cannot improve each column, because of rounding, ``(a,)`` bool.

        Returns:
            A mask ``(a,)`` of the columns that remain active; ``None`` if all of them do.

        Raises:
            NonFiniteError: If a residual is not finite.
        """
        self.iterations += 1
        require_finite(normal, f"Step {self.iterations} of the solve ({self._solver})")
        active = self.active.to(normal.device)
        residuals = (norms(normal) / self._target_norms[active]).tolist()
        unexplained = (norms(difference) / self._lengths[active]).tolist()
        for position, column in enumerate(self.active.tolist()):
            trace = self._traces[column]
            trace.residuals.append(residuals[position])
            trace.since += 1
            if residuals[position] < trace.smallest:
                trace.smallest, trace.unexplained, trace.since = residuals[position], unexplained[position], 0
                trace.x, trace.difference = x[:, position].clone(), difference[:, position].clone()
            trace.status = self._reached(trace)
            if trace.status is None and unexplained[position] <= self._options.discrepancy:
                trace.smallest, trace.unexplained = residuals[position], unexplained[position]
                trace.x, trace.difference = x[:, position].clone(), difference[:, position].clone()
                trace.status = Status.DISCREPANCY
            if trace.status is None and self.iterations >= self._options.max_iter:
                trace.status = Status.MAX_ITER
            patience = max(_PATIENCE, self.iterations // 2)
            if trace.status is None and (trace.since >= patience or (stuck is not None and bool(stuck[position]))):
                trace.status = Status.STALLED
        return self._narrow()

    def _reached(self, trace: _Trace) -> Status | None:
        if trace.smallest <= self._options.rtol:
            return Status.CONVERGED
        return Status.DISCREPANCY if trace.unexplained <= self._options.discrepancy else None

    def _narrow(self) -> Tensor | None:
        keep = torch.tensor([self._traces[column].status is None for column in self.active.tolist()], dtype=torch.bool)
        if keep.all():
            return None
        self.active = self.active[keep]
        self.rhs, self.x, self.difference, self.normal = columns(keep, self.rhs, self.x, self.difference, self.normal)
        return keep

    def best(self) -> Tensor:
        """The iterates with the smallest residuals so far, ``(cols, a)``."""
        return torch.stack([self._traces[column].x for column in self.active.tolist()], dim=1)

    def growth(self) -> Tensor:
        """The last residual of each active column, divided by its smallest, ``(a,)``."""
        traces = [self._traces[column] for column in self.active.tolist()]
        return torch.tensor([trace.residuals[-1] / trace.smallest for trace in traces], dtype=torch.float64)

    def verify(self, *, carried: float) -> None:
        """Checks the operator with a few more products, and recomputes residuals that may have drifted.

        If products with the same vector differ, the solution is meaningless. Residuals that were updated instead of
        recomputed can drift if they are close to rounding. An example is a network that fits its data so well that its
        products in float32 are mostly rounding errors.

        Args:
            carried: The number of iterations in which the solver updated ``g − A x`` instead of recomputing it.

        Raises:
            ConvergenceError: If two products with the same vector differ.
        """
        self.active = torch.tensor([i for i, trace in enumerate(self._traces) if trace.iterations], dtype=torch.long)
        if not self.running:
            return
        active = self.active.to(self._all_rhs.device)
        x, before = self.best(), torch.stack([self._traces[i].difference for i in self.active.tolist()], dim=1)
        image = self.matvec(x)
        difference = self._all_rhs[:, active] - image
        sigma = torch.tensor([self._traces[i].sigma for i in self.active.tolist()], dtype=torch.float64)
        rounding = 100 * torch.finfo(x.dtype).eps * (sigma.to(x.device) * norms(x) + self._lengths[active])
        off = norms(difference - before) > _SAME * norms(image) + rounding
        changed = torch.zeros_like(off)
        if off.any():  # either the operator changes between products, or rounding makes it nonlinear
            changed |= off & (norms(self.matvec(x) - image) > _SAME * norms(image))
        nothing = norms(x) == 0
        if nothing.any():  # products with a zero iterate are no test, so others are compared
            target = self._target[:, active]
            images = [self.matvec(target), self.matvec(target)]
            changed |= nothing & (norms(images[1] - images[0]) > _SAME * norms(images[0]))
            again = self.rmatvec(self._all_rhs[:, active])
            changed |= nothing & (norms(again - target) > _SAME * self._target_norms[active])
        if changed.any():
            raise different_products(f"after {self.iterations} steps, two products with the same vector differ")
        drifted = torch.tensor([self._traces[i].iterations <= carried for i in self.active.tolist()]) | off.cpu()
        if not drifted.any():
            return
        self.active, active = self.active[drifted], active[drifted.to(active.device)]
        x, difference = columns(drifted, x, difference)
        normal = self.rmatvec(difference) - self.damping**2 * x
        residuals = (norms(normal) / self._target_norms[active]).tolist()
        unexplained = (norms(difference) / self._lengths[active]).tolist()
        for position, column in enumerate(self.active.tolist()):
            trace = self._traces[column]
            trace.smallest, trace.unexplained = residuals[position], unexplained[position]
            if trace.status is Status.CONVERGED and trace.smallest > 1.01 * self._options.rtol:
                trace.status = Status.STALLED

    def solutions(self, *, iterations: int | None = None, max_iter: int | None = None) -> Solution | list[Solution]:
        """One solution for a vector, a list for columns.

        Args:
            iterations: The number of iterations, for a solver that does not record each of them.
            max_iter: Its largest number of iterations.
        """
        shift = self._options.damping - self.damping  # the damping that is a part of A
        return self._recorder.solutions(
            [
                Outcome(
                    x=trace.x,
                    status=Status.MAX_ITER if trace.status is None else trace.status,
                    iterations=trace.iterations if iterations is None or not trace.iterations else iterations,
                    residual=trace.smallest,
                    unexplained=trace.unexplained,
                    sigma_max=max(trace.sigma - shift, 0.0),
                    residuals=trace.residuals,
                    share=trace.products,
                    max_iter=max_iter,
                )
                for trace in self._traces
            ]
        )


def different_products(what: str) -> ConvergenceError:
    """The error that an operator does not act like one fixed matrix."""
    return ConvergenceError(
        f"The solve diverged: {what}. Most often the loss is not the same function at every evaluation (random"
        " augmentation, dropout outside of nn.Dropout, BatchNorm in training mode)."
    )
