"""First derivatives of the losses: gradients of means, gradients of single examples, and directional derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .._compat import rank_zero_info
from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import NonFiniteError
from ..parameters import ParameterSpace
from .autograd import differs, distance, gradient_of
from .losses import LossFunction

__all__ = [
    "DirectionalDerivatives",
    "choose_derivatives",
    "forward_mode",
    "from_gradients",
    "mean_gradient",
    "query_gradients",
    "reverse_mode",
]


DirectionalDerivatives = Callable[[LossFunction, Batch, Tensor], Tensor]
"""``(loss, batch, directions (q, p)) → (q, B)``: ``wᵀ∇ℓ(zᵢ)`` for each direction and example."""

# The bytes of the gradients of queries that are formed or checked at a time, which limits the memory for copies.
_COPIED = 2**26

# How many examples, spread evenly over the training data, are used to compare ways to differentiate.
_SPREAD = 8

# Parts of the messages that PyTorch raises for functions without a forward-mode derivative.
_NO_FORWARD_MODE = ("forward", "mutating directly with `.data` inside functorch transform")


def mean_gradient(
    examples: Examples, theta: Tensor, loss_sum: Callable[[Tensor, Batch], Tensor], space: ParameterSpace
) -> Tensor:
    """The gradient ``(p,)`` at ``theta`` of a function's mean over examples.

    Args:
        examples: The examples.
        theta: Parameters ``(p,)``.
        loss_sum: ``(θ, batch) → ()``, the sum of the function over a batch.
        space: The parameters, for error messages.

    Raises:
        NonFiniteError: If the gradient is not finite.
    """
    total = torch.zeros_like(theta)
    for batch in examples.local_batches():
        at = theta.detach().requires_grad_()
        total += gradient_of(loss_sum(at, batch), at)
    return _require_finite(examples.processes.sum(total) / len(examples), space)


def query_gradients(
    examples: Examples,
    theta: Tensor,
    measurements: Callable[[Tensor, Batch], Tensor],
    space: ParameterSpace,
    *,
    per_example: bool,
    rows: Callable[[Batch], Iterable[Tensor]] | None = None,
) -> Tensor:
    """The gradients ``(q, p)`` of a query's measurement at ``theta``.

    Args:
        examples: The ``n`` examples of the query.
        theta: Parameters ``(p,)``.
        measurements: ``(θ, batch) → (B,)``.
        space: The parameters, for error messages.
        per_example: Whether to return one gradient for each example (q = n). Otherwise the gradient of the mean over
            all examples is returned (q = 1).
        rows: Returns the gradients of the examples of a batch, ``(b, p)`` for the next ``b`` ones. By default there is
            a backward pass for each of them.

    Raises:
        NonFiniteError: If a gradient is not finite.
    """
    processes = examples.processes
    # Each process writes the rows of its own examples.
    gradients = theta.new_zeros(len(examples) if per_example else 1, space.size)
    position = examples.shard[0]
    for batch in examples.local_batches():
        if per_example and rows is not None:
            step = _rows_at_a_time(theta) if batch.divisible else batch.size
            for start in range(0, batch.size, step):
                for some in rows(batch.slice(start, start + step)):
                    gradients[position : position + len(some)] = some
                    position += len(some)
            continue
        at = theta.detach().requires_grad_()
        values = measurements(at, batch)
        if not per_example:
            gradients[0] += gradient_of(values.sum(), at)
            continue
        for value in values:
            gradients[position] = gradient_of(value, at, retain_graph=True)
            position += 1
    if not per_example:
        gradients = processes.sum(gradients) / len(examples)
    elif processes.size > 1:
        gradients = processes.sum(gradients)
    return _require_finite(gradients, space)


def _rows_at_a_time(row: Tensor) -> int:
    """How many gradients as long as this vector ``(p,)`` are copied at a time."""
    return max(_COPIED // max(row.nbytes, 1), 1)


def _require_finite(gradients: Tensor, space: ParameterSpace) -> Tensor:
    some_rows = gradients.split(_rows_at_a_time(gradients[0]))  # a mask of all would be as large as they are
    if all(bool(torch.isfinite(some).all()) for some in some_rows):
        return gradients
    parts = space.unflatten(gradients.reshape(-1, space.size).abs().sum(0))
    names = [name for name, part in parts.items() if not torch.isfinite(part).all()]
    raise NonFiniteError(
        f"The gradient has non-finite entries in {', '.join(names[:5])}{' …' if len(names) > 5 else ''}. Nothing"
        " was changed."
    )


def forward_mode(loss: LossFunction, batch: Batch, directions: Tensor) -> Tensor:
    """Directional derivatives by one forward-mode pass (``torch.func.jvp``) for each direction.

    No gradient of a single example is formed. Falls back to :func:`reverse_mode` if an operation has no forward-mode
    rule, or if the module assigns to the ``.data`` of a tensor, which ``torch.func`` refuses.
    """
    theta = loss.shadow.theta
    if loss.forward_mode:
        try:
            return torch.stack(
                [torch.func.jvp(lambda at: loss.losses(at, batch), (theta,), (w,))[1] for w in directions]
            )
        except (NotImplementedError, RuntimeError) as error:
            if not any(reason in str(error).lower() for reason in _NO_FORWARD_MODE):
                raise
    return reverse_mode(loss, batch, directions)


def reverse_mode(loss: LossFunction, batch: Batch, directions: Tensor) -> Tensor:
    """Directional derivatives by two reverse passes: the derivative of ``Σ uᵢ wᵀ∇ℓ(zᵢ)`` with respect to ``u``."""
    theta = loss.shadow.theta.detach().requires_grad_()
    losses = loss.losses(theta, batch)
    if not losses.requires_grad:  # the step skips all of these examples
        return losses.new_zeros(len(directions), len(losses))
    weights = torch.ones_like(losses, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses, theta, weights, create_graph=True, materialize_grads=True)
    return torch.stack(
        [torch.autograd.grad(gradient, weights, w, retain_graph=True, materialize_grads=True)[0] for w in directions]
    )


def from_gradients(loss: LossFunction, batch: Batch, directions: Tensor) -> Tensor:
    """Directional derivatives from the gradients of single examples, which are formed once for all directions."""
    rows = loss.gradients(loss.shadow.theta, batch)
    return torch.cat([directions @ part.T for part in rows], dim=1)


def choose_derivatives(loss: LossFunction, train: Examples) -> DirectionalDerivatives:
    """Chooses how to compute directional derivatives so that they agree with the gradients of single examples.

    Tries :func:`forward_mode`, then :func:`reverse_mode`, and last :func:`from_gradients`, which always agrees.

    Training uses reverse mode. Forward mode can differ from it: it differentiates through ``torch.no_grad()``, ignores
    ``Tensor.register_hook``, and uses the ``jvp`` of a ``torch.autograd.Function``, not its ``backward``.

    Args:
        loss: The loss function.
        train: The training examples; a few of them are used for the comparison.
    """
    shadow = loss.shadow
    some = train.subset(torch.linspace(0, len(train) - 1, min(len(train), _SPREAD)).long().unique())
    batches = list(some.batches())
    for way in (forward_mode, reverse_mode):

        def unlike(batch: Batch, way: DirectionalDerivatives = way) -> float:
            return _distance_from_gradients(way, loss, batch)

        if not any(differs(shadow, unlike, batch) for batch in batches):
            return way
        if loss.forward_mode and way is forward_mode:
            rank_zero_info(
                f"Scores are computed in reverse mode: for {type(shadow.module).__name__}, forward-mode derivatives"
                " differ from the gradients that training uses. Possible causes are the padding_idx of an nn.Embedding,"
                " whose row gets no gradient, torch.no_grad() around a part that depends on the parameters, a gradient"
                " hook, or a custom torch.autograd.Function. Scores follow the gradients."
            )
    return from_gradients


def _distance_from_gradients(way: DirectionalDerivatives, loss: LossFunction, batch: Batch) -> float:
    """The difference between derivatives in a random direction and that direction's products with the gradients.

    See :func:`~.autograd.distance`. Infinite if ``way`` fails.
    """
    shadow = loss.shadow
    generator = torch.Generator().manual_seed(shadow.seed)
    direction = torch.randn(shadow.space.size, generator=generator, dtype=torch.float64).to(shadow.theta)
    theta = shadow.theta.detach().requires_grad_()
    rows = [gradient_of(value, theta, retain_graph=True) for value in loss.losses(theta, batch)]
    expected, lengths = torch.stack([row @ direction for row in rows]), torch.stack([row.norm() for row in rows])
    try:
        derivatives = way(loss, batch, direction[None])[0].detach()
    except (NotImplementedError, RuntimeError):
        return math.inf
    return distance((derivatives - expected).abs(), lengths)
