"""The curvature of one batch as a product with vectors: the Hessian and the generalised Gauss–Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.structure import map_tensors, same_structure
from ..errors import ObjectiveError
from ..registry import Registry

__all__ = ["CURVATURES", "Linearise", "Losses", "gauss_newton", "has_gauss_newton", "hessian"]


Product = Callable[[Tensor], Tensor]
"""``v ↦ C v``, ``(p,) → (p,)``, where ``C`` is the *sum* of the curvatures of a micro-batch's examples."""

Linearise = Callable[[Tensor, Batch], tuple[Product, tuple[Tensor, ...]]]
"""``(θ, batch) ↦`` the product at ``θ``, and the tensors whose autograd graphs are all that it keeps in memory."""


def hessian(loss_sum: Callable[[Tensor, Batch], Tensor]) -> Linearise:
    """The second derivative: the product is the reverse-mode derivative of ``∇L(θ)·v`` (Pearlmutter 1994).

    Args:
        loss_sum: ``(θ, batch) → ()``, the sum of the losses of a batch's examples; twice differentiable in ``θ``.
    """

    def linearise(theta: Tensor, batch: Batch) -> tuple[Product, tuple[Tensor, ...]]:
        theta = theta.detach().requires_grad_()
        loss = loss_sum(theta, batch)
        if not loss.requires_grad:
            return torch.zeros_like, ()
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True, materialize_grads=True)
        if not gradient.requires_grad:  # the loss is linear in θ here and the second derivative is zero
            return torch.zeros_like, ()

        def product(vector: Tensor) -> Tensor:
            return torch.autograd.grad(gradient, theta, vector, retain_graph=True, materialize_grads=True)[0]

        return product, (gradient,)

    return linearise


def gauss_newton(
    outputs: Callable[[Tensor, Batch], Tensor],
    loss_sum_at: Callable[[Tensor, Batch], Callable[[Tensor], Tensor]],
    loss_sum: Callable[[Tensor, Batch], Tensor],
    *,
    convex: bool = False,
) -> Linearise:
    """The generalised Gauss–Newton matrix ``Σ JᵢᵀHᵢJᵢ`` (Schraudolph 2002; Martens, JMLR 21, 2020, section 8).

    ``J`` is the Jacobian of the model's outputs and ``Hᵢ`` the second derivative of the loss in these outputs: the
    matrix is the Hessian without the curvature of the model itself. If the loss is convex in the outputs, it is
    positive semi-definite.

    Args:
        outputs: ``(θ, batch) → (…)``, the model's outputs, which the loss is a function of.
        loss_sum_at: ``(θ, batch) →`` the sum of the batch's losses as a function of the outputs alone.
        loss_sum: ``(θ, batch) → ()``, the same sum as a function of ``θ``. At the first batch of each structure it
            serves to check that the whole loss goes through the outputs.
        convex: Whether the losses are convex in the outputs. The result then declares that it is positive
            semi-definite, by an attribute ``positive_semidefinite``.

    Raises:
        ObjectiveError: From the product, if the loss does not go through the outputs alone.
    """
    checked: list[Any] = []  # structures

    def check(theta: Tensor, batch: Batch, out: Tensor, slope: Tensor) -> None:
        if any(same_structure(batch.data, one) for one in checked):
            return
        whole = loss_sum(theta, batch)
        expected = through = torch.zeros_like(theta)
        if whole.requires_grad:
            (expected,) = torch.autograd.grad(whole, theta, materialize_grads=True)
        if out.requires_grad:
            (through,) = torch.autograd.grad(out, theta, slope.detach(), retain_graph=True, materialize_grads=True)
        if float((through - expected).norm()) > 1e-3 * float(expected.norm()):
            raise ObjectiveError(
                "curvature='ggn' needs a loss that is a function of the model's predictions alone, given to a loss"
                " function of PyTorch as its first argument, but the gradient through them is not the loss's."
                " Most often a penalty is added to the loss (give it as `weight_decay`), or arguments are swapped."
                " Otherwise use curvature='hessian'."
            )
        # Its structure, without its memory.
        checked.append(map_tensors(batch.data, lambda tensor: tensor.new_empty([0] * tensor.ndim)))

    def linearise(theta: Tensor, batch: Batch) -> tuple[Product, tuple[Tensor, ...]]:
        theta = theta.detach().requires_grad_()
        out = outputs(theta, batch)
        at = out.detach().requires_grad_()
        loss = loss_sum_at(theta.detach(), batch)(at)
        slope = torch.zeros_like(at)
        if loss.requires_grad:
            (slope,) = torch.autograd.grad(loss, at, create_graph=True, materialize_grads=True)
        check(theta, batch, out, slope)
        if not slope.requires_grad:  # the loss is linear in its predictions here
            return torch.zeros_like, ()
        # Jᵀu is linear in u, so that its derivative by u in the direction v is J v: forward mode from two reverse ones.
        dummy = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, theta, dummy, create_graph=True, materialize_grads=True)

        def product(vector: Tensor) -> Tensor:
            (pushed,) = torch.autograd.grad(pulled, dummy, vector, retain_graph=True, materialize_grads=True)
            (curved,) = torch.autograd.grad(slope, at, pushed, retain_graph=True, materialize_grads=True)
            return torch.autograd.grad(out, theta, curved, retain_graph=True, materialize_grads=True)[0]

        return product, (pulled, slope)

    linearise.positive_semidefinite = convex  # type: ignore[attr-defined]
    return linearise


class Losses(Protocol):
    """What curvature needs of an objective, see :class:`~lightning_gif.objective.objective.Objective`.

    An objective whose losses are convex in the outputs declares it by an attribute ``convex_in_outputs`` that is true.
    """

    def loss_sum(self, theta: Tensor, batch: Batch) -> Tensor: ...
    def outputs(self, theta: Tensor, batch: Batch) -> Tensor: ...
    def loss_sum_at(self, theta: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]: ...


CURVATURES: Registry[Callable[[Losses], Linearise]] = Registry("curvature")
"""The curvatures of an objective by name."""


CURVATURES.register("hessian")(lambda objective: hessian(objective.loss_sum))


@CURVATURES.register("ggn")
def gauss_newton_of(losses: Losses) -> Linearise:
    """The Gauss–Newton matrix of an objective."""
    convex = bool(getattr(losses, "convex_in_outputs", False))
    return gauss_newton(losses.outputs, losses.loss_sum_at, losses.loss_sum, convex=convex)


def has_gauss_newton(losses: Losses, theta: Tensor, batch: Batch) -> bool:
    """Whether the losses of a batch are a function of the predictions alone, and so have a Gauss–Newton matrix."""
    try:
        CURVATURES["ggn"](losses)(theta, batch)
    except ObjectiveError:
        return False
    return True
