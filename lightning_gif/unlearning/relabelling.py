"""The minimum that training with new labels would have reached, if predictions were linear in the parameters.

A Newton step does not find it: where a label was learned by heart, the loss has almost no curvature, so the step is
much too long. The minimum takes into account that this curvature returns as soon as the prediction changes. So new
labels that contradict the rest of the data are only learned as far as the rest of the data allows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..curvature.products import output_derivative
from ..data.batch import Batch
from ..data.examples import Examples
from ..objective.objective import Objective
from ..solvers import LinearOperator, Solution, Status, require_finite

__all__ = ["NONLINEAR_CG", "LinearisedLoss", "minimise"]

# The name of the solver in reports.
NONLINEAR_CG = "nonlinear_cg"

# A line search makes Newton steps. If the slope is then more than this share of the first one, it goes on by bisection.
_NEWTON_STEPS, _SMALL_SLOPE, _BISECTIONS = 4, 0.1, 20


class LinearisedLoss:
    """The mean loss of examples as a function of predictions ``f + J v`` that are linear in a change ``v``.

    Predictions are lists of tensors, one for each batch of this process.

    Args:
        objective: An open objective.
        examples: The examples.

    Attributes:
        outputs: The predictions ``f`` of the trained model.
    """

    def __init__(self, objective: Objective, examples: Examples) -> None:
        self._objective, self._examples = objective, examples
        with torch.no_grad():
            self.outputs = [objective.outputs(objective.theta, batch) for batch in examples.local_batches()]

    def derivative(self, direction: Tensor) -> list[Tensor]:
        """The derivative ``J v`` of the predictions in a direction ``v`` ``(p,)``."""
        objective = self._objective
        batches = self._examples.local_batches()
        return [output_derivative(objective.outputs, objective.theta, batch, direction)[1] for batch in batches]

    def gradient(self, at: list[Tensor]) -> Tensor:
        """The gradient ``Jᵀℓ′`` ``(p,)`` at predictions ``at``."""
        objective, total = self._objective, torch.zeros_like(self._objective.theta)
        for batch, predictions in zip(self._examples.local_batches(), at, strict=True):
            slope = self._slope(batch, predictions)[1].detach()
            theta = objective.theta.detach().requires_grad_()
            with torch.enable_grad():
                out = objective.outputs(theta, batch)
                if out.requires_grad:
                    total += torch.autograd.grad(out, theta, slope, materialize_grads=True)[0]
        total = objective.processes.sum(total) / len(self._examples)
        require_finite(total, "The gradient of the loss with new labels")
        return total

    def along(self, at: list[Tensor], by: list[Tensor], size: float) -> tuple[float, float]:
        """The first and second derivative along ``at + s·by`` with respect to ``s``, at ``s = size``."""
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, start, step in zip(self._examples.local_batches(), at, by, strict=True):
            point, slope = self._slope(batch, start + size * step)
            sums[0] += float((slope.detach() * step).sum())
            if slope.requires_grad:
                (curved,) = torch.autograd.grad(slope, point, step, materialize_grads=True)
                sums[1] += float((curved * step).sum())
        slope, curvature = (self._objective.processes.sum(sums) / len(self._examples)).tolist()
        return slope, curvature

    def _slope(self, batch: Batch, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions as a leaf of a graph, and the derivative of the sum of a batch's losses in them."""
        with torch.enable_grad():
            point = predictions.detach().requires_grad_()
            loss = self._objective.loss_sum_at(self._objective.theta, batch)(point)
            if not loss.requires_grad:  # a batch whose examples are all skipped
                return point, torch.zeros_like(point)
            return point, torch.autograd.grad(loss, point, create_graph=True, materialize_grads=True)[0]


def minimise(
    matrix: LinearOperator,
    old: Tensor,
    new: LinearisedLoss,
    weight: float,
    transform: Callable[[Tensor], Tensor],
    pull: Callable[[Tensor], Tensor],
    *,
    rtol: float,
    max_iter: int,
) -> Solution:
    """Minimises ``w ℓ(f + J W y) − w gᵀW y + yᵀA y/2`` over ``y`` by nonlinear conjugate gradients.

    Directions are those of Polak and Ribière, with a restart where they would not descend (Nocedal and Wright,
    *Numerical Optimization*, 2nd ed., section 5.2). For a squared error these are conjugate gradients.

    Args:
        matrix: ``A = W (G + D) W``, ``(k, k)``.
        old: The gradient ``g`` of the mean loss with the old labels at the trained weights, ``(p,)``.
        new: The mean loss ``ℓ`` with the new labels.
        weight: ``w``, the weight of the relabelled examples relative to the retained ones.
        transform: ``W``, from ``(k,)`` to a change of all parameters, ``(p,)``.
        pull: Its transpose, from ``(p,)`` to ``(k,)``.
        rtol: The norm of the gradient, relative to that at the start, at which it ends.
        max_iter: The largest number of iterations.

    Raises:
        NonFiniteError: If a product or a gradient is not finite.
    """
    started, done, products, examples = time.perf_counter(), 0, matrix.products, matrix.examples
    linear = weight * pull(old)
    at, y = new.outputs, torch.zeros_like(linear)
    along_y = torch.zeros_like(linear)  # A y
    gradient = weight * pull(new.gradient(at)) - linear
    direction, norms = -gradient, [float(gradient.norm())]
    while done < max_iter and norms[-1] > rtol * norms[0]:
        along = matrix.matvec(direction)
        require_finite(along, "A product with the curvature")
        by = new.derivative(transform(direction))
        slope, bend = float((along_y - linear) @ direction), float(direction @ along)
        size = _line_minimum(partial(_along, new, weight, at, by, slope, bend))
        y, along_y = y + size * direction, along_y + size * along
        at = [start + size * step for start, step in zip(at, by, strict=True)]
        before, gradient = gradient, weight * pull(new.gradient(at)) + along_y - linear
        factor = max(0.0, float((gradient - before) @ gradient) / norms[-1] ** 2)
        direction = factor * direction - gradient
        if float(direction @ gradient) >= 0:
            direction = -gradient
        norms.append(float(gradient.norm()))
        done += 1
    residuals = [norm / (norms[0] or 1.0) for norm in norms]
    return Solution(
        x=y,
        status=Status.CONVERGED if residuals[-1] <= rtol else Status.MAX_ITER,
        solver=NONLINEAR_CG,
        iterations=done,
        hvps=matrix.products - products,
        examples=matrix.examples - examples,
        residual=residuals[-1],
        unexplained=residuals[-1],
        sigma_max=0.0,
        rtol=rtol,
        damping=0.0,
        seconds=time.perf_counter() - started,
        peak_memory=None,
        residuals=residuals,
        max_iter=max_iter,
    )


def _along(
    new: LinearisedLoss, weight: float, at: list[Tensor], by: list[Tensor], slope: float, bend: float, size: float
) -> tuple[float, float]:
    """The first and second derivative of ``w ℓ(at + s·by) + slope·s + bend·s²/2`` at ``s = size``."""
    first, second = new.along(at, by, size)
    return slope + size * bend + weight * first, bend + weight * second


def _line_minimum(derivatives: Callable[[float], tuple[float, float]]) -> float:
    """About the minimum of a convex function of one number above 0: Newton steps, and bisection where they fail.

    Along a label that was learned by heart, the function has hardly any curvature on either side of its minimum. There
    Newton steps go to and fro between two points for ever.

    Args:
        derivatives: From the number to the first and second derivative. The first one is negative at 0.
    """
    low, high, size, first = 0.0, math.inf, 0.0, 0.0
    for step in range(_NEWTON_STEPS + _BISECTIONS):
        slope, bend = derivatives(size)
        first = first or slope
        if step >= _NEWTON_STEPS and abs(slope) <= _SMALL_SLOPE * abs(first):
            break
        newton = size - slope / bend if bend > 0 else math.inf
        if slope < 0:
            low, is_between = size, newton < high
        else:
            high, is_between = size, newton > low
        size = newton if is_between and step < _NEWTON_STEPS else (low + high) / 2
    return size if math.isfinite(size) else low
