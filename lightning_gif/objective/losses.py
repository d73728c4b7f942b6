"""Loss functions: the ways to compute the losses of single examples with the user's module."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.structure import map_tensors, tensors
from ..errors import GIFWarning, ObjectiveError
from ..mixin import overrides
from .autograd import close, differs, distance, gradient_of
from .shadow import Shadow

__all__ = ["LossFunction", "OneByOneLoss", "OwnLoss", "VectorisedLoss", "choose_loss"]


# The largest number of bytes of gradients of single examples that are computed at a time.
_GRADIENT_BYTES = 2**28

Reduction = Literal["mean", "sum"]


class LossFunction(ABC):
    """The training losses of the examples of a batch, as a function of the parameters ``(p,)``.

    A subclass defines :meth:`evaluate`, :meth:`losses` and :meth:`sum_of`, and :func:`choose_loss` has to choose it.
    The other methods have slower default implementations.

    Args:
        shadow: The module.

    Attributes:
        any_structure: Whether batches may have another structure than the training batches.
        forward_mode: Whether ``torch.func.jvp`` can differentiate the losses.
        vectorised: Whether :meth:`gradients` computes the gradients of many examples at once.
    """

    any_structure = False
    forward_mode = True
    vectorised = False

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow

    @abstractmethod
    def evaluate(self, theta: Tensor, batch: Batch, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """One pass of the module over a batch: the losses ``(B,)`` of its examples, or its loss ``()`` as a whole.

        Args:
            theta: Parameters ``(p,)``.
            batch: The batch.
            buffers: Buffers by name that the pass may change, see :meth:`~.shadow.Shadow.call`.
        """

    @abstractmethod
    def sum_of(self, evaluated: Tensor, batch: Batch) -> Tensor | None:
        """The sum of the losses ``()``, from the result of :meth:`evaluate`; ``None`` if it cannot be derived."""

    @abstractmethod
    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        """The loss of each example, ``(B,)``; differentiable in ``theta``."""

    def loss_sum(self, theta: Tensor, batch: Batch) -> Tensor:
        """The sum of the losses, ``()``; differentiable in ``theta``."""
        return self.losses(theta, batch).sum()

    def map(self, function: Callable[..., Tensor], theta: Tensor, batch: Batch, *rows: Tensor) -> Tensor:
        """Calls ``function(loss, *rows)`` once for each example if examples are vectorised, else once for the batch.

        Args:
            function: Its first argument is a function without arguments that returns a loss ``()``: the loss of the
                example, or the sum over the batch. Its other arguments are ``rows``.
            theta: Parameters ``(p,)``.
            batch: The batch.
            rows: If examples are vectorised, tensors ``(B, …)``; each call gets the row of its example. Otherwise
                tensors of any shape, passed on as they are.

        Returns:
            The results ``(B, …)`` of all calls, or the result of the one call.

        Raises:
            ObjectiveError: If examples are not vectorised, and the sum of the losses does not come from one pass.
        """
        return function(partial(self.loss_sum, theta, batch), *rows)

    def gradients(self, theta: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yields the gradients of the losses, ``(b, p)`` for the next ``b`` examples, in order."""
        for position in range(batch.size):
            at = theta.detach().requires_grad_()
            yield gradient_of(self.loss_sum(at, batch.slice(position, position + 1)), at)[None]


class OwnLoss(LossFunction):
    """The losses that the module's ``influence_loss`` returns."""

    any_structure = True

    def evaluate(self, theta: Tensor, batch: Batch, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        return self.shadow.per_example(theta, "influence_loss", batch.data, buffers=buffers)

    def sum_of(self, evaluated: Tensor, batch: Batch) -> Tensor:
        return evaluated.sum()

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        return self.evaluate(theta, batch)


class StepLoss(LossFunction):
    """Losses from ``training_step``: the loss of an example is the loss of a batch of that one example.

    Args:
        shadow: The module.
        reduction: Whether ``training_step`` returns the mean or the sum of the losses of a batch; ``None`` if neither.
    """

    def __init__(self, shadow: Shadow, reduction: Reduction | None = None) -> None:
        super().__init__(shadow)
        self.reduction = reduction

    def evaluate(self, theta: Tensor, batch: Batch, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        return self.shadow.training_step(theta, batch.data, buffers=buffers)

    def sum_of(self, evaluated: Tensor, batch: Batch) -> Tensor | None:
        if self.reduction is None:
            return None
        return evaluated * batch.size if self.reduction == "mean" else evaluated


class VectorisedLoss(StepLoss):
    """``training_step`` for all examples of a batch at once, with ``torch.func.vmap``."""

    vectorised = True

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        return self._vmap(partial(self.shadow.training_step, theta), batch)

    def map(self, function: Callable[..., Tensor], theta: Tensor, batch: Batch, *rows: Tensor) -> Tensor:
        step = self.shadow.training_step
        return self._vmap(lambda data, *parts: function(partial(step, theta, data), *parts), batch, *rows)

    def gradients(self, theta: Tensor, batch: Batch) -> Iterator[Tensor]:
        gradient = partial(torch.func.grad(self.shadow.training_step), theta)
        count = max(_GRADIENT_BYTES // theta.nbytes, 1)
        for start in range(0, batch.size, count):
            yield self._vmap(gradient, batch.slice(start, start + count))

    @staticmethod
    def _vmap(function: Callable[..., Tensor], batch: Batch, *rows: Tensor) -> Tensor:
        """``function(data, *rows)`` for all examples of a batch at once, where ``data`` is a batch of one example."""
        batch.require_rows()
        leaves = tensors(batch.data)

        def one(*parts: Tensor) -> Tensor:
            remaining = iter(parts[len(rows) :])

            def put(tensor: Tensor) -> Tensor:
                row = next(remaining)
                return row.unsqueeze(0) if tensor.ndim else row

            return function(map_tensors(batch.data, put), *parts[: len(rows)])

        in_dims = (0,) * len(rows) + tuple(0 if leaf.ndim else None for leaf in leaves)
        return torch.func.vmap(one, in_dims=in_dims, randomness="same")(*rows, *leaves)


class OneByOneLoss(StepLoss):
    """``training_step`` for one example after the other; one pass gives their sum if the reduction is known."""

    forward_mode = False  # code that fails under vmap tends to fail under jvp, too

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        batch.require_rows()
        singles = (batch.slice(position, position + 1) for position in range(batch.size))
        return torch.stack([self.evaluate(theta, single) for single in singles])

    def loss_sum(self, theta: Tensor, batch: Batch) -> Tensor:
        if self.reduction is None:
            return super().loss_sum(theta, batch)
        loss = self.sum_of(self.evaluate(theta, batch), batch)
        assert loss is not None  # the reduction is known
        return loss

    def map(self, function: Callable[..., Tensor], theta: Tensor, batch: Batch, *rows: Tensor) -> Tensor:
        if self.reduction is None:
            raise ObjectiveError(
                f"curvature='ggn' needs the losses of {type(self.shadow.module).__name__} for a whole batch at once."
                " But its training_step cannot be vectorised, and its loss for a batch is neither the mean nor the sum"
                " of the losses of the examples. Define `influence_loss` (see GIFMixin)."
            )
        return super().map(function, theta, batch, *rows)


def choose_loss(shadow: Shadow, few: Batch) -> LossFunction:
    """Chooses the loss function of a module after trying ``training_step`` on a few examples.

    The choice is ``influence_loss`` if the module defines it, else ``training_step`` vectorised, else ``training_step``
    for one example at a time, with a warning.

    Args:
        shadow: The module.
        few: Two or three training examples. A single one does not show whether a loss is a mean or a sum.
    """
    if overrides(shadow.module, "influence_loss"):
        return OwnLoss(shadow)
    singly = OneByOneLoss(shadow)
    with torch.no_grad():
        expected = singly.losses(shadow.theta, few)
        together = singly.evaluate(shadow.theta, few)
    obstacle = _obstacle(VectorisedLoss(shadow), singly, few, expected)
    reduction = _reduction(shadow.module, together, expected)
    if obstacle is None:
        return VectorisedLoss(shadow, reduction)
    warnings.warn(
        f"The losses of single examples are computed one after the other, which is slow: training_step could not be"
        f" vectorised ({obstacle}). Define `influence_loss` (see GIFMixin) to compute them at once.",
        GIFWarning,
        stacklevel=3,
    )
    return OneByOneLoss(shadow, reduction)


def _obstacle(vectorised: VectorisedLoss, singly: OneByOneLoss, few: Batch, expected: Tensor) -> str | None:
    """Why ``training_step`` cannot be vectorised; ``None`` if vectorised losses and gradients are right."""
    shadow = singly.shadow

    def unlike(batch: Batch) -> float:
        """The difference between the gradients of the vectorised losses and of one example at a time."""
        theta = shadow.theta.detach().requires_grad_()
        gradient = gradient_of(vectorised.losses(theta, batch).sum(), theta)
        losses = singly.losses(theta, batch)
        rows = torch.stack([gradient_of(loss, theta, retain_graph=True) for loss in losses])
        return distance((gradient - rows.sum(0)).norm()[None], rows.norm(dim=1).sum()[None])

    try:
        theta = shadow.theta.detach().requires_grad_()
        losses = vectorised.losses(theta, few)
        gradient_of(losses.sum(), theta)  # activation checkpointing fails in the backward pass only
        if not close(losses, expected):
            return "it gave other losses than one example at a time"
        if differs(shadow, unlike, few):  # vmap ignores hooks on tensors
            return "it gave other gradients, as with a hook on a tensor"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _reduction(module: Any, together: Tensor, expected: Tensor) -> Reduction | None:
    """Whether the loss ``()`` of a batch is the mean or the sum of the losses ``(B,)``; warns if it is neither."""
    if close(together, expected.mean()):
        return "mean"
    if close(together, expected.sum()):
        return "sum"
    if torch.isfinite(expected).all() and torch.isfinite(together):
        warnings.warn(
            f"The loss that {type(module).__name__}.training_step gives for a batch is neither the mean nor the sum of"
            " its losses for the single examples (they are coupled, or weighted). Influence and unlearning refer to the"
            " losses of single examples. Define `influence_loss` (see GIFMixin) to set them.",
            GIFWarning,
            stacklevel=4,
        )
    return None
