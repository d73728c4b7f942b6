"""Products of the curvature of one batch with vectors: the Hessian and the generalised Gauss–Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .._compat import rank_zero_warn
from ..data.batch import Batch
from ..data.structure import map_tensors, same_structure
from ..errors import GIFWarning, ObjectiveError
from ..objective.equivalents import FastSecondDerivatives
from ..registry import Registry, declares

__all__ = [
    "CURVATURES",
    "DependenceCheck",
    "Linearise",
    "Losses",
    "gauss_newton",
    "has_gauss_newton",
    "hessian",
    "jacobian_products",
    "output_derivative",
    "require_gauss_newton",
    "warn_if_asymmetric",
]


Product = Callable[[Tensor], Tensor]
"""``v ↦ C v``, ``(p,) → (p,)``, where ``C`` is the *sum* of the curvatures of a micro-batch's examples."""

# Both sides of an adjoint identity are compared for so many pairs of random vectors, and may differ by this share. With
# bfloat16 under autocast they differ by up to 0.02 from rounding. If PyTorch leaves out a part of a derivative, the
# largest difference of three pairs is 0.1 or more.
_PAIRS, _ROUNDING = 3, 0.05

# The limit at smaller parameters. If rounding was the cause, the difference is much smaller there.
_LESS_ROUNDING = 0.01

Linearise = Callable[[Tensor, Batch], tuple[Product, tuple[Tensor, ...]]]
"""``(θ, batch) ↦`` the product at ``θ``, and tensors whose autograd graphs hold all memory that the product keeps."""


def hessian(loss_sum: Callable[[Tensor, Batch], Tensor]) -> Linearise:
    """The Hessian. Its product with ``v`` is the reverse-mode derivative of ``∇L(θ)·v`` (Pearlmutter 1994).

    Args:
        loss_sum: ``(θ, batch) → ()``, the sum of the losses of a batch's examples; twice differentiable in ``θ``.
    """

    def linearise(theta: Tensor, batch: Batch) -> tuple[Product, tuple[Tensor, ...]]:
        theta = theta.detach().requires_grad_()
        with FastSecondDerivatives():
            loss = loss_sum(theta, batch)
        if not loss.requires_grad:
            return torch.zeros_like, ()
        gradient = _derivative(loss, theta, create_graph=True)
        if not gradient.requires_grad:  # the loss is linear in θ here, so the second derivative is zero
            return torch.zeros_like, ()

        def product(vector: Tensor) -> Tensor:
            return _derivative(gradient, theta, vector)

        return product, (gradient,)

    return linearise


_NOT_DIFFERENTIABLE = (
    "Possible causes are a torch.autograd.Function whose backward is marked once_differentiable (write it with"
    " operations of PyTorch, without the mark), a hook on a tensor that changes gradients, or a part of the loss that"
    " depends on the parameters under torch.no_grad()."
)


def _derivative(value: Tensor, at: Tensor, weights: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
    """The derivative of ``value`` with respect to ``at``, whose graph is kept.

    Raises:
        ObjectiveError: If PyTorch cannot compute it, as the second derivative of some ``torch.autograd.Function``.
    """
    try:
        return torch.autograd.grad(
            value, at, weights, create_graph=create_graph, retain_graph=True, materialize_grads=True
        )[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ObjectiveError(
            "The curvature needs a derivative that PyTorch cannot compute for this module:"
            f" {str(error).splitlines()[0].rstrip('.')}. Most often a torch.autograd.Function has no second derivative:"
            " write it with operations of PyTorch, or use another layer. There is no method without curvature."
        ) from error


def _are_adjoint(products: Callable[[Tensor], tuple[Product, Product]], theta: Tensor) -> bool:
    """Whether a matrix and its transpose give ``uᵀ(A v) = vᵀ(Aᵀ u)`` for random vectors, up to rounding.

    PyTorch does not raise where it passes a function without a second derivative, but leaves its part out. Where a
    classifier is certain of all examples, terms cancel, and products consist of rounding errors. So if the sides
    differ, they are compared again at ``θ/2`` and ``θ/4``, where a classifier is less certain.

    Args:
        products: From parameters ``(p,)`` to the products with the matrix at these parameters and with its transpose.
        theta: The parameters ``(p,)``.
    """
    limits = {1.0: _ROUNDING, 0.5: _LESS_ROUNDING, 0.25: _LESS_ROUNDING}
    return any(_max_asymmetry(*products(scale * theta.detach()), theta) <= limit for scale, limit in limits.items())


def _max_asymmetry(push: Product, pull: Product, theta: Tensor) -> float:
    """The largest ``|uᵀ(A v) − vᵀ(Aᵀ u)| / ‖A v‖`` for a few random vectors; 0 if it is not a number."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for _ in range(_PAIRS):
        v = torch.randn(theta.shape, generator=generator).to(theta)
        pushed = push(v)
        u = torch.randn(pushed.shape, generator=generator).to(pushed)
        difference = (u * pushed).sum() - (v * pull(u)).sum()
        largest = max(largest, float(difference.abs() / pushed.norm()))
    return largest


def gauss_newton(
    outputs: Callable[[Tensor, Batch], Tensor],
    loss_sum_at: Callable[[Tensor, Batch], Callable[[Tensor], Tensor]],
    loss_sum: Callable[[Tensor, Batch], Tensor],
    *,
    convex: bool = False,
    always: bool = False,
) -> Linearise:
    """The generalised Gauss–Newton matrix ``Σ JᵢᵀHᵢJᵢ`` (Schraudolph 2002; Martens, JMLR 21, 2020, section 8).

    ``Jᵢ`` is the Jacobian of the model's outputs, and ``Hᵢ`` the second derivative of the loss with respect to these
    outputs. The matrix is the Hessian without the curvature of the model itself. It is positive semi-definite if the
    loss is convex in the outputs.

    Args:
        outputs: ``(θ, batch) → (…)``, the model's outputs, of which the loss is a function.
        loss_sum_at: ``(θ, batch) →`` the sum of the batch's losses as a function of the outputs alone.
        loss_sum: ``(θ, batch) → ()``, the same sum as a function of ``θ``. It is evaluated for the first batch of each
            structure, to check that the loss depends on ``θ`` through the outputs only.
        always: Whether to check this for every batch.
        convex: Whether the losses are convex in the outputs. The result then has a true attribute
            ``positive_semidefinite``.

    Raises:
        ObjectiveError: From the result, if the loss does not depend on ``θ`` through the outputs only.
    """
    check = DependenceCheck(loss_sum, always)

    def linearise(theta: Tensor, batch: Batch) -> tuple[Product, tuple[Tensor, ...]]:
        theta = theta.detach().requires_grad_()
        with FastSecondDerivatives():
            out = outputs(theta, batch)
        at = out.detach().requires_grad_()
        loss = loss_sum_at(theta.detach(), batch)(at)
        slope = torch.zeros_like(at)
        if loss.requires_grad:
            slope = _derivative(loss, at, create_graph=True)
        if check.is_due(batch):
            through = torch.zeros_like(theta)
            if out.requires_grad:
                through = _derivative(out, theta, slope.detach())
            check(theta, batch, through)
        if not (out.requires_grad and slope.requires_grad):  # no prediction depends on θ, or the loss is linear in them
            return torch.zeros_like, ()
        push, pull, pulled = _products_with_jacobian(out, theta)

        def product(vector: Tensor) -> Tensor:
            curved = _derivative(slope, at, push(vector))
            return pull(curved)

        return product, (pulled, slope)

    linearise.positive_semidefinite = convex  # type: ignore[attr-defined]
    return linearise


def _products_with_jacobian(out: Tensor, theta: Tensor) -> tuple[Product, Product, Tensor]:
    """``v ↦ J v`` and ``u ↦ Jᵀ u`` for the Jacobian ``J`` of ``out`` with respect to ``theta``.

    Returns:
        Both, and a tensor whose autograd graph holds all memory that they keep.
    """
    # Jᵀu is linear in u, so the reverse-mode derivative of vᵀJᵀu with respect to u is J v.
    dummy = torch.zeros_like(out, requires_grad=True)
    pulled = _derivative(out, theta, dummy, create_graph=True)

    def push(vector: Tensor) -> Tensor:
        return _derivative(pulled, dummy, vector)

    def pull(vector: Tensor) -> Tensor:
        return _derivative(out, theta, vector)

    return push, pull, pulled


def output_derivative(
    outputs: Callable[[Tensor, Batch], Tensor], theta: Tensor, batch: Batch, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """The predictions for a batch, and their derivative ``J v`` in a direction ``v`` ``(p,)``.

    Args:
        outputs: ``(θ, batch) → (…)``, the predictions.
        theta: The parameters ``(p,)``.
        batch: The batch.
        direction: The direction ``v``.
    """
    theta = theta.detach().requires_grad_()
    with torch.enable_grad(), FastSecondDerivatives():
        out = outputs(theta, batch)
        if not out.requires_grad:
            return out, torch.zeros_like(out)
        push, _, _ = _products_with_jacobian(out, theta)
        return out.detach(), push(direction).detach()


class DependenceCheck:
    """Checks that losses depend on the parameters through the predictions only.

    Args:
        loss_sum: See :func:`gauss_newton`.
        always: Whether to check every batch, and not only the first of each structure.
    """

    def __init__(self, loss_sum: Callable[[Tensor, Batch], Tensor], always: bool) -> None:
        self._loss_sum = loss_sum
        self._always = always
        self._checked: list[Any] = []  # batch structures that have been checked

    def is_due(self, batch: Batch) -> bool:
        """Whether this batch has to be checked."""
        return self._always or not any(same_structure(batch.data, one) for one in self._checked)

    def __call__(self, theta: Tensor, batch: Batch, through: Tensor) -> None:
        """Compares the gradient through the predictions ``(p,)`` with that of the loss.

        Raises:
            ObjectiveError: If they differ.
        """
        whole = self._loss_sum(theta, batch)
        expected = torch.zeros_like(theta)
        if whole.requires_grad:
            expected = _derivative(whole, theta)
        if float((through - expected).norm()) > 1e-3 * float(expected.norm()):
            raise ObjectiveError(
                "curvature='ggn' needs a loss that is a function of the model's predictions alone, passed to a loss"
                " function of PyTorch as its first argument. But the gradient through the predictions is not the"
                " gradient of the loss. Most often a penalty is added to the loss (give it as `weight_decay`), or the"
                " arguments are swapped. Otherwise use curvature='hessian'."
            )
        self.note(batch)

    def note(self, batch: Batch) -> None:
        """Notes that batches of this structure have been checked."""
        # Empty tensors keep the structure of the batch without its memory.
        self._checked.append(map_tensors(batch.data, lambda tensor: tensor.new_empty([0] * tensor.ndim)))


def jacobian_products(losses: Losses) -> Linearise:
    """The matrix of :func:`gauss_newton`, computed from the Jacobians of single examples.

    The first pass over an example takes one backward pass for each of its ``d`` outputs, all at once, and memory for
    ``d`` vectors ``(p,)``. Every product after that is two matrix products. So this suits many products with few
    outputs and few examples. The product takes columns ``(p, q)``, too, as its attribute ``takes_columns`` says.

    Args:
        losses: The losses; batches must be divisible into examples.

    Raises:
        ObjectiveError: From the result, as for :func:`gauss_newton`.
    """
    check = DependenceCheck(losses.loss_sum, bool(getattr(losses, "finds_outputs", False)))

    def linearise(theta: Tensor, batch: Batch) -> tuple[Product, tuple[Tensor, ...]]:
        theta = theta.detach().requires_grad_()
        through = torch.zeros_like(theta)
        jacobians, curvatures = [], []
        for position in range(batch.size):
            single = batch.slice(position, position + 1)
            out = losses.outputs(theta, single)
            at = out.detach().requires_grad_()
            loss = losses.loss_sum_at(theta.detach(), single)(at)
            slope = torch.zeros_like(at)
            if loss.requires_grad:
                slope = _derivative(loss, at, create_graph=True)
            jacobians.append(_jacobian(out, theta))
            curvatures.append(_jacobian(slope, at).reshape(slope.numel(), at.numel()))
            through += slope.detach().reshape(-1) @ jacobians[-1]
        if check.is_due(batch):
            check(theta, batch, through)
        jacobian, counts = torch.cat(jacobians), [len(part) for part in curvatures]

        def product(vectors: Tensor) -> Tensor:
            parts = zip(curvatures, (jacobian @ vectors).split(counts), strict=True)
            return jacobian.T @ torch.cat([curvature @ pushed for curvature, pushed in parts])

        product.takes_columns = True  # type: ignore[attr-defined]
        return product, (jacobian, *curvatures)

    linearise.positive_semidefinite = bool(getattr(losses, "convex_in_outputs", False))  # type: ignore[attr-defined]
    return linearise


def _jacobian(out: Tensor, at: Tensor) -> Tensor:
    """The derivatives ``(d, …)`` of all ``d`` entries of ``out`` with respect to ``at``."""
    size = out.numel()
    if not (size and out.requires_grad):
        return at.new_zeros(size, *at.shape)
    rows = torch.eye(size, dtype=out.dtype, device=out.device).view(size, *out.shape)
    derivative = partial(torch.autograd.grad, out, at, retain_graph=True, materialize_grads=True)
    try:
        return derivative(rows, is_grads_batched=True)[0]
    except RuntimeError:  # vmap allows less in a backward pass
        return torch.stack([derivative(row)[0] for row in rows])


class Losses(Protocol):
    """The methods of a loss that curvature needs, as in :class:`~lightning_gif.objective.objective.Objective`.

    If its losses are convex in the outputs, it has a true attribute ``convex_in_outputs``. If the outputs were found by
    trying, so that another batch may have others, it has a true attribute ``finds_outputs``.
    """

    def loss_sum(self, theta: Tensor, batch: Batch) -> Tensor: ...
    def outputs(self, theta: Tensor, batch: Batch) -> Tensor: ...
    def loss_sum_at(self, theta: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]: ...


CURVATURES: Registry[Callable[[Losses], Linearise]] = Registry("curvature", positive_semidefinite=False)
"""All kinds of curvature by name.

A kind can declare by :func:`~lightning_gif.registry.declares` that it is ``positive_semidefinite`` for losses that are
convex in the outputs (by default it is not). It is then the matrix of solvers that need this.
"""


CURVATURES.register("hessian")(lambda objective: hessian(objective.loss_sum))


@CURVATURES.register("ggn")
@declares(positive_semidefinite=True)
def gauss_newton_of(losses: Losses) -> Linearise:
    """The generalised Gauss–Newton matrix of losses."""
    convex = bool(getattr(losses, "convex_in_outputs", False))
    always = bool(getattr(losses, "finds_outputs", False))
    return gauss_newton(losses.outputs, losses.loss_sum_at, losses.loss_sum, convex=convex, always=always)


def has_gauss_newton(losses: Losses, theta: Tensor, batch: Batch) -> bool:
    """Whether losses have a generalised Gauss–Newton matrix, see :func:`require_gauss_newton`."""
    try:
        require_gauss_newton(losses, theta, batch)
    except ObjectiveError:
        return False
    return True


def require_gauss_newton(losses: Losses, theta: Tensor, batch: Batch) -> None:
    """Checks that losses have a generalised Gauss–Newton matrix, and that its products are right.

    Args:
        losses: The losses.
        theta: The parameters ``(p,)``.
        batch: A few examples.

    Raises:
        ObjectiveError: If the losses are not a function of the predictions alone, or if PyTorch computes derivatives of
            the predictions wrongly.
    """
    CURVATURES["ggn"](losses)(theta, batch)

    def products(point: Tensor) -> tuple[Product, Product]:
        point = point.requires_grad_()
        with FastSecondDerivatives():
            out = losses.outputs(point, batch)
        if not out.requires_grad:  # no prediction depends on the parameters
            return lambda vector: torch.zeros_like(out), lambda vector: torch.zeros_like(point)
        return _products_with_jacobian(out, point)[:2]

    if not _are_adjoint(products, theta):
        raise ObjectiveError(
            "curvature='ggn' needs directional derivatives of the predictions, which PyTorch computes wrongly for"
            f" this module. {_NOT_DIFFERENTIABLE}"
        )


def warn_if_asymmetric(losses: Losses, theta: Tensor, batch: Batch) -> None:
    """Warns if the Hessian of losses is not symmetric.

    Args:
        losses: The losses.
        theta: The parameters ``(p,)``.
        batch: A few examples.
    """
    linearise = CURVATURES["hessian"](losses)

    def products(point: Tensor) -> tuple[Product, Product]:
        product, _ = linearise(point, batch)
        return product, product

    if not _are_adjoint(products, theta):
        rank_zero_warn(
            "The second derivative of the loss is not symmetric, so the gradients are not the derivatives of one"
            f" function, and solves with curvature='hessian' are inexact. {_NOT_DIFFERENTIABLE}",
            category=GIFWarning,
        )
