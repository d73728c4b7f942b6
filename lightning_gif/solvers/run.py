"""The bookkeeping that iterative solvers share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .base import LinearOperator, SolveOptions
from .recorder import Outcome, SolveRecorder
from .solution import Solution, Status
from .vectors import check_shape, columns, norms, require_finite

__all__ = ["Run", "different_products"]


# Steps without a new smallest residual (and at least half of all steps), after which rounding, not the iteration,
# decides what the residual does.
_PATIENCE = 50

# How far a share of the right-hand side may be from what it was computed to be, beyond rounding.
_SAME = 1e-3


class _Trace:
    """What became of one right-hand side so far, and its best iterate."""

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
    """The bookkeeping that the iterative solvers share: where to start, when to stop, what was best, what happened.

    A solver keeps its vectors as matrices of one column for each right-hand side that is not done, calls
    :meth:`record` after each step, and drops the columns that this says are done. The best iterate is returned, not the
    last: residuals are not monotone.

    Args:
        solver: The solver's registered name.
        operator: ``B``, ``(rows, cols)``.
        rhs: ``b``, ``(rows,)``, or several as columns ``(rows, q)``.
        damping: ``λ ≥ 0``.
        rtol: Relative normal-equation residual at which to stop.
        max_iter: Most steps.
        start: First iterate, ``(cols,)`` or ``(cols, q)``; where its residual is larger than that of zero, zero is.
        discrepancy: Stop where ``‖B x − b‖ ≤ discrepancy·‖b‖`` (Morozov's principle).

    Attributes:
        active: The columns of ``rhs`` that are not done, ``(a,)``.
        b: The right-hand sides of these, ``(rows, a)``.
        x: The first iterates, ``(cols, a)``.
        difference: ``b − B x`` of these, ``(rows, a)``.
        normal: ``Bᵀ(b − B x) − λ²x`` of these, ``(cols, a)``.

    Raises:
        NonFiniteError: If the right-hand side or a product is not finite.
    """

    def __init__(self, solver: str, operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> None:
        self._solver, self._operator, self._options = solver, operator, options
        self._recorder = SolveRecorder(solver, operator, rhs, options)
        self.b = self._recorder.rhs
        self.damping = options.damping
        self.iterations = 0
        self._traces = [_Trace() for _ in range(self.b.shape[1])]
        self.active = torch.arange(self.b.shape[1])

        self.x = torch.zeros(operator.shape[1], len(self.active), dtype=operator.dtype, device=operator.device)
        self.difference = self.b.clone()
        self.normal = self.rmatvec(self.b)
        require_finite(self.normal, "The right-hand side of the solve")
        self._rhs, self._rhs_norms = self.b, norms(self.b)
        self._target, self._norms = self.normal, norms(self.normal)
        if options.start is not None:
            self._begin_at(options.start[:, None] if options.start.ndim == 1 else options.start)
        for column, trace in enumerate(self._traces):
            trace.x, trace.difference = self.x[:, column].clone(), self.difference[:, column].clone()
            if self._norms[column] == 0:  # b is orthogonal to the range of A: x = 0 is the minimiser
                trace.status, trace.smallest, trace.residuals = Status.CONVERGED, 0.0, [0.0]
                trace.unexplained = 1.0 if self._rhs_norms[column] else 0.0
                continue
            trace.smallest = float(norms(self.normal[:, column]) / self._norms[column])
            trace.unexplained = float(norms(self.difference[:, column]) / self._rhs_norms[column])
            trace.residuals = [trace.smallest]
            trace.status = self._reached(trace)
        self._narrow()

    def _begin_at(self, start: Tensor) -> None:
        check_shape("start", start, len(self.x))
        require_finite(start, "The start of the solve")
        start = (start / self._recorder.unit).to(self.x)
        difference = self.b - self.matvec(start)
        normal = self.rmatvec(difference) - self.damping**2 * start
        better = norms(normal) < self._norms
        self.x = torch.where(better, start, self.x)
        self.difference = torch.where(better, difference, self.difference)
        self.normal = torch.where(better, normal, self.normal)

    def matvec(self, vectors: Tensor) -> Tensor:
        """``B V`` for the active columns, counted for each of them."""
        self._count()
        return self._operator.matvec(vectors)

    def rmatvec(self, vectors: Tensor) -> Tensor:
        """``Bᵀ V`` for the active columns, counted for each of them."""
        self._count()
        return self._operator.rmatvec(vectors)

    def _count(self) -> None:
        for column in self.active:
            self._traces[column].products += 1

    @property
    def running(self) -> bool:
        """Whether a right-hand side is not done."""
        return len(self.active) > 0

    def saw(self, sigma: Tensor) -> None:
        """Notes singular values ``(a,)`` that the steps have shown; the largest is reported."""
        for column, value in zip(self.active.tolist(), sigma.tolist(), strict=True):
            self._traces[column].sigma = max(self._traces[column].sigma, value)

    def record(self, x: Tensor, difference: Tensor, normal: Tensor, *, stuck: Tensor | None = None) -> Tensor | None:
        """Takes note of a step.

        Args:
            x: Iterates ``(cols, a)``.
            difference: ``b − B x``, ``(rows, a)``.
            normal: ``Bᵀ(b − B x) − λ²x``, ``(cols, a)``.
            stuck: Columns ``(a,)`` that cannot go on: nothing that a step could change is left in this precision.

        Returns:
            Which columns ``(a,)`` go on; ``None`` if all do.

        Raises:
            NonFiniteError: If a residual is not finite.
        """
        self.iterations += 1
        require_finite(normal, f"Step {self.iterations} of the solve ({self._solver})")
        active = self.active.to(normal.device)
        residuals = (norms(normal) / self._norms[active]).tolist()
        unexplained = (norms(difference) / self._rhs_norms[active]).tolist()
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
        self.b, self.x, self.difference, self.normal = columns(keep, self.b, self.x, self.difference, self.normal)
        return keep

    def best(self) -> Tensor:
        """The iterates of smallest residual so far, ``(cols, a)``."""
        return torch.stack([self._traces[column].x for column in self.active.tolist()], dim=1)

    def growth(self) -> Tensor:
        """By what factor the last residual of each active column is above its smallest, ``(a,)``."""
        traces = [self._traces[column] for column in self.active.tolist()]
        return torch.tensor([trace.residuals[-1] / trace.smallest for trace in traces], dtype=torch.float64)

    def verify(self, *, carried: float) -> None:
        """Makes sure, by one or two more products, that what is known of the solutions is true of them.

        An operator that is not the same at every product would be solved for nothing; and residuals that a recurrence
        carries along drift away from those of its iterate: where rounding is all that is left, and in a net that fits
        its data so well that its products in float32 are mostly rounding.

        Args:
            carried: For how many steps the solver updated ``b − B x`` instead of computing it anew.

        Raises:
            ConvergenceError: If the operator has changed.
        """
        self.active = torch.tensor([i for i, trace in enumerate(self._traces) if trace.iterations], dtype=torch.long)
        if not self.running:
            return
        active = self.active.to(self._rhs.device)
        x, before = self.best(), torch.stack([self._traces[i].difference for i in self.active.tolist()], dim=1)
        image = self.matvec(x)
        difference = self._rhs[:, active] - image
        sigma = torch.tensor([self._traces[i].sigma for i in self.active.tolist()], dtype=torch.float64)
        rounding = 100 * torch.finfo(x.dtype).eps * (sigma.to(x.device) * norms(x) + self._rhs_norms[active])
        off = norms(difference - before) > _SAME * norms(image) + rounding
        changed = torch.zeros_like(off)
        if (
            off.any()
        ):  # a product that differs from itself, or one that is not linear by more than rounding should make it
            changed |= off & (norms(self.matvec(x) - image) > _SAME * norms(image))
        nothing = norms(x) == 0
        if nothing.any():  # there is no product of the solution to compare
            target = self._target[:, active]
            images = [self.matvec(target), self.matvec(target)]
            changed |= nothing & (norms(images[1] - images[0]) > _SAME * norms(images[0]))
            again = self.rmatvec(self._rhs[:, active])
            changed |= nothing & (norms(again - target) > _SAME * self._norms[active])
        if changed.any():
            raise different_products(
                f"after {self.iterations} steps a product is not what it was before, for the same vector"
            )
        drifted = torch.tensor([self._traces[i].iterations <= carried for i in self.active.tolist()]) | off.cpu()
        if not drifted.any():
            return
        self.active, active = self.active[drifted], active[drifted.to(active.device)]
        x, difference = columns(drifted, x, difference)
        normal = self.rmatvec(difference) - self.damping**2 * x
        residuals = (norms(normal) / self._norms[active]).tolist()
        unexplained = (norms(difference) / self._rhs_norms[active]).tolist()
        for position, column in enumerate(self.active.tolist()):
            trace = self._traces[column]
            trace.smallest, trace.unexplained = residuals[position], unexplained[position]
            if trace.status is Status.CONVERGED and trace.smallest > 1.01 * self._options.rtol:
                trace.status = Status.STALLED

    def solutions(self, *, iterations: int | None = None) -> Solution | list[Solution]:
        """One solution for a vector, a list for columns.

        Args:
            iterations: The number of iterations, for a solver that does not record each of them.
        """
        return self._recorder.solutions(
            [
                Outcome(
                    x=trace.x,
                    status=Status.MAX_ITER if trace.status is None else trace.status,
                    iterations=trace.iterations if iterations is None or not trace.iterations else iterations,
                    residual=trace.smallest,
                    unexplained=trace.unexplained,
                    sigma_max=trace.sigma,
                    residuals=trace.residuals,
                    share=trace.products,
                )
                for trace in self._traces
            ]
        )


def different_products(what: str) -> ConvergenceError:
    """The error for an operator that does not act like one fixed matrix."""
    return ConvergenceError(
        f"The solve diverged: {what}. Most often the loss is not the same function at every evaluation (random"
        " augmentation, dropout outside of nn.Dropout, BatchNorm in training mode)."
    )
