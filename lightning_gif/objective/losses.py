"""Loss functions: the ways to compute the losses of single examples with the user's module."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.probe import Probe
from ..data.structure import map_tensors, tensors
from ..errors import BatchError, GIFWarning, ObjectiveError
from .autograd import close, differs, distance, gradient_of
from .entries import Entries
from .reductions import BranchError, OneExample
from .remedies import WEIGHTED, cause_of_difference, code_of_losses
from .shadow import Shadow

__all__ = ["BatchedLoss", "LossFunction", "OneByOneLoss", "OwnLoss", "VectorisedLoss", "choose_loss"]


# The largest number of bytes of gradients of single examples that are computed at a time.
GRADIENT_BYTES = 2**28

# A gradient with less than this share of the norm of another one consists of rounding errors.
_NOTHING = 1e-5

Reduction = Literal["mean", "sum"]


class LossFunction(ABC):
    """The training losses of the examples of a batch, as a function of the parameters ``(p,)``.

    A subclass defines :meth:`evaluate`, :meth:`losses` and :meth:`sum_of`, and :func:`choose_loss` has to choose it.
    The other methods have slower default implementations.

    Args:
        shadow: The module.

    Attributes:
        origin: Where the losses come from, in words, for reports.
        any_structure: Whether batches may have another structure than the training batches.
        forward_mode: Whether ``torch.func.jvp`` can differentiate the losses.
        vectorised: Whether :meth:`gradients` computes the gradients of many examples at once.
    """

    origin: ClassVar[str] = "a function of its own"
    any_structure = False
    forward_mode = True
    vectorised = False

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self.entries: Entries | None = None

    @abstractmethod
    def evaluate(self, theta: Tensor, batch: Batch, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """One pass of the module over a batch: the losses ``(B,)`` of its examples, or its loss ``()`` as a whole.

        Args:
            theta: Parameters ``(p,)``.
            batch: The batch.
            buffers: Buffers by name that the pass may change, see :meth:`~.shadow.Shadow.call`.
        """

    def whole(self, batch: Batch) -> Batch:
        """The batch, with examples added if :meth:`evaluate` could not give the loss ``()`` of the whole otherwise."""
        return batch

    def together(self) -> LossFunction | None:
        """A loss function whose :meth:`loss_sum` is one pass of the module over a batch; ``None`` if there is none."""
        return self

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
        if not batch.divisible:
            yield from self._gradients_of_whole(theta, batch)
            return
        for position in range(batch.size):
            at = theta.detach().requires_grad_()
            yield gradient_of(self.loss_sum(at, batch.slice(position, position + 1)), at)[None]

    def _gradients_of_whole(self, theta: Tensor, batch: Batch) -> Iterator[Tensor]:
        """The gradients ``(1, p)`` of one loss after the other, from one pass over a batch."""
        at = theta.detach().requires_grad_()
        for loss in self.losses(at, batch):
            yield gradient_of(loss, at, retain_graph=True)[None]


class OwnLoss(LossFunction):
    """The losses that ``influence_loss`` returns: the module's method, or the function that was given."""

    origin = "influence_loss"
    any_structure = True

    def evaluate(self, theta: Tensor, batch: Batch, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        assert self.shadow.influence_loss is not None  # else this class is not chosen
        return self.shadow.per_example(theta, self.shadow.influence_loss, batch.data, buffers=buffers)

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

    origin = "training_step, vectorised over examples"
    vectorised = True

    def together(self) -> LossFunction | None:
        if self.reduction is None:
            return None
        loss = OneByOneLoss(self.shadow, self.reduction)
        loss.entries = self.entries
        return loss

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        return self._vmap(partial(self.shadow.training_step, theta), batch)

    def map(self, function: Callable[..., Tensor], theta: Tensor, batch: Batch, *rows: Tensor) -> Tensor:
        step = self.shadow.training_step
        return self._vmap(lambda data, *parts: function(partial(step, theta, data), *parts), batch, *rows)

    def gradients(self, theta: Tensor, batch: Batch) -> Iterator[Tensor]:
        gradient = partial(torch.func.grad(self.shadow.training_step), theta)
        count = max(GRADIENT_BYTES // theta.nbytes, 1)
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

    origin = "training_step for one example at a time"
    forward_mode = False  # code that fails under vmap tends to fail under jvp, too

    def together(self) -> LossFunction | None:
        return None if self.reduction is None else self

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        singles = (batch.slice(position, position + 1) for position in range(batch.size))
        return torch.stack([self.evaluate(theta, single) for single in singles])

    def loss_sum(self, theta: Tensor, batch: Batch) -> Tensor:
        if batch.size == 1:
            return self.evaluate(theta, batch)
        if self.reduction is None:
            return super().loss_sum(theta, batch)
        loss = self.sum_of(self.evaluate(theta, batch), batch)
        assert loss is not None  # the reduction is known
        return loss

    def map(self, function: Callable[..., Tensor], theta: Tensor, batch: Batch, *rows: Tensor) -> Tensor:
        if self.reduction is None and batch.size > 1:
            raise ObjectiveError(
                f"curvature='ggn' needs the losses of {type(self.shadow.module).__name__} for a whole batch at once."
                " But its training_step cannot be vectorised, and its loss for a batch is neither the mean nor the sum"
                " of the losses of the examples. Define `influence_loss` (see GIFMixin)."
            )
        return super().map(function, theta, batch, *rows)


class BatchedLoss(StepLoss):
    """``training_step`` for a whole batch, with the losses of its examples taken from where it reduces them.

    The module runs once for a batch, as in training, see :class:`~.reductions.OneExample`.

    Args:
        shadow: See the class above.
        reduction: See the class above.
        last: See :class:`~.reductions.OneExample`.
        divided: Whether the step divides a sum by the number of examples itself.
        even: Whether an odd batch is evaluated with its last example twice, because the step fails for a single one.
    """

    origin = "training_step of whole batches"

    def __init__(
        self,
        shadow: Shadow,
        reduction: Reduction | None = None,
        *,
        last: bool = False,
        divided: bool = False,
        even: bool = False,
    ) -> None:
        super().__init__(shadow, reduction)
        self.last = last
        self.divided = divided
        self.even = even

    def whole(self, batch: Batch) -> Batch:
        if self.even and batch.size % 2:
            return Batch.join([batch, batch.slice(batch.size - 1, batch.size)])
        return batch

    def evaluate(self, theta: Tensor, batch: Batch, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        if self.even and batch.size % 2:
            return self.losses(theta, batch)
        return super().evaluate(theta, batch, buffers=buffers)

    def sum_of(self, evaluated: Tensor, batch: Batch) -> Tensor | None:
        return evaluated.sum() if evaluated.ndim else None  # :meth:`losses` takes no more passes

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        losses = self._taken(theta, batch)
        if not batch.divisible and self.reduction is not None:
            self._check(theta, batch, losses)
        return losses

    def loss_sum(self, theta: Tensor, batch: Batch) -> Tensor:
        return self._taken(theta, batch).sum()  # in one pass, so that predictions are recorded once

    def _taken(self, theta: Tensor, batch: Batch) -> Tensor:
        whole = self.whole(batch)

        def of_one(index: Tensor) -> Tensor:
            with OneExample(self.shadow.module, whole.size, index, last=self.last):
                return self.shadow.training_step(theta, whole.data)

        indices = torch.arange(batch.size, device=self.shadow.device)
        losses = torch.func.vmap(of_one, randomness="same")(indices)
        return losses * whole.size if self.divided else losses

    def _check(self, theta: Tensor, batch: Batch, losses: Tensor) -> None:
        """Compares losses ``(B,)`` with the loss of the batch: objects in it may hold tensors of any size."""
        with torch.no_grad():
            together = self.evaluate(theta, batch)
        reduced = losses.detach().mean() if self.reduction == "mean" else losses.detach().sum()
        if not close(together, reduced):
            raise ObjectiveError(
                f"The losses of {batch.size} examples could not be taken from {type(self.shadow.module).__name__}"
                f".training_step: their {self.reduction} is not the loss of the batch."
                f" {code_of_losses(self.shadow, batch)}"
            )

    def gradients(self, theta: Tensor, batch: Batch) -> Iterator[Tensor]:
        return self._gradients_of_whole(theta, batch)


def choose_loss(shadow: Shadow, probe: Probe) -> LossFunction:
    """Chooses the loss function of a module after trying ``training_step`` on a few examples.

    The choice is ``influence_loss`` if it is given or the module defines it. Otherwise ``training_step`` is vectorised
    over examples, or else evaluated for whole batches, if this gives the same losses and gradients as one example at a
    time. If neither does, it is evaluated for one example at a time, with a warning.

    Args:
        shadow: The module.
        probe: A few training examples. A single one does not show whether a loss is a mean or a sum.

    Raises:
        ObjectiveError: If ``training_step`` gives no losses of single examples.
    """
    if shadow.influence_loss is not None:
        return OwnLoss(shadow)
    alone = _losses_alone(shadow, probe)
    expected = None if isinstance(alone, Exception) else alone
    if expected is not None and _compares_examples(shadow, probe):
        raise ObjectiveError(
            f"{type(shadow.module).__name__}.training_step compares the examples of a batch with each other: its loss"
            f" for one example alone does not depend on the parameters, but its loss for {probe.together.size} examples"
            f" does. So single examples have no losses of their own. {code_of_losses(shadow, probe.fewer)}"
        )
    obstacles = []
    if expected is not None and probe.divisible:
        vectorised = VectorisedLoss(shadow)
        obstacles.append(_obstacle(vectorised, probe, expected))
        if obstacles[0] is None:
            return VectorisedLoss(shadow, _reduction(vectorised, probe.many))
    layouts = [] if probe.is_ragged else [False, True]
    for last in layouts:
        for divided in (False, True):
            batched = partial(BatchedLoss, shadow, last=last, divided=divided, even=expected is None)
            obstacles.append(_obstacle(batched(), probe, expected))
            if obstacles[-1] is None:
                try:
                    reduction = _reduction(batched(), probe.many)
                except BranchError as error:  # more examples take more branches
                    obstacles[-1] = str(error)
                    continue
                if probe.divisible or reduction is not None:
                    return batched(reduction)
    if isinstance(alone, Exception):
        _raise_if_all_fail(shadow, probe)
        raise ObjectiveError(
            f"{type(shadow.module).__name__}.training_step gives no losses of single examples. For a batch of one"
            f" example it raises {type(alone).__name__}: {alone}. From a larger batch they could not be taken"
            f" ({obstacles[0] if obstacles else 'its batches have no rows'}). {code_of_losses(shadow, probe.fewer)}"
        ) from alone
    warnings.warn(
        f"The losses of single examples are computed one after the other, which is slow: training_step could not be"
        f" vectorised ({obstacles[0] if probe.divisible else 'its batches have no rows'}). Define `influence_loss` (see"
        " GIFMixin) to compute them at once.",
        GIFWarning,
        stacklevel=3,
    )
    batch = probe.many if probe.divisible else probe.together
    return OneByOneLoss(shadow, _reduction(OneByOneLoss(shadow), batch, alone, probe))


def _raise_if_all_fail(shadow: Shadow, probe: Probe) -> None:
    """Raises the error of ``training_step`` itself if it fails for a larger batch, too."""
    name = type(shadow.module).__name__
    try:
        shadow.training_step(shadow.theta, probe.fewer.data)
    except Exception as error:
        if _OF_A_DTYPE.search(str(error)):
            raise ObjectiveError(
                f"{name}.training_step fails in {str(shadow.theta.dtype).removeprefix('torch.')}, in which losses are"
                f" computed here: {str(error).rstrip('.')}. If it casts its inputs to a fixed dtype, cast them to the"
                " dtype of the weights instead, for example x.to(self.net.weight.dtype). Without double=True, a module"
                " in float32 is evaluated in float32."
            ) from error
        if _works_in_training_mode(shadow, probe.fewer):
            raise ObjectiveError(
                f"{name}.training_step fails in evaluation mode, in which losses are computed here, but not in training"
                f" mode: {type(error).__name__}: {error}. Probably a part of the module returns something else in"
                f" evaluation mode. `influence_loss` can call that part in training mode."
                f" {code_of_losses(shadow, probe.fewer)}"
            ) from error
        raise


def _works_in_training_mode(shadow: Shadow, batch: Batch) -> bool:
    modes = {one: one.training for one in shadow.module.modules()}
    try:
        shadow.module.train()
        shadow.training_step(shadow.theta, batch.data)
    except Exception:  # the step fails in either mode
        return False
    finally:
        for one, mode in modes.items():
            one.training = mode
    return True


# What messages of PyTorch about tensors of two dtypes have in common.
_OF_A_DTYPE = re.compile(r"dtype|input type|(half|float|double)\b.*\b(half|float|double)", re.IGNORECASE)


def _losses_alone(shadow: Shadow, probe: Probe) -> Tensor | Exception:
    """The loss of each example ``(k,)`` in a batch of its own; the error if such a batch has no loss."""
    singly = OneByOneLoss(shadow)
    if not probe.singles:
        return BatchError("the collate function fails for one example")

    def evaluated() -> Tensor:
        return torch.stack([singly.evaluate(shadow.theta, single) for single in probe.singles])

    with torch.no_grad():
        try:
            losses = evaluated()
            if shadow.metrics.all and not torch.isfinite(losses).all():  # a metric may be the loss
                shadow.metrics.give_values = True
                losses = evaluated()
            if not torch.isfinite(losses).any():  # a deviation over the examples of a batch is NaN for one
                together = shadow.training_step(shadow.theta, probe.together.data)
                if torch.isfinite(together):
                    return ObjectiveError("its loss is not finite, but the loss of a larger batch is")
        except Exception as error:
            return error
    return losses


def _compares_examples(shadow: Shadow, probe: Probe) -> bool:
    """Whether the loss of a batch depends on the parameters, but not that of any of its examples alone.

    A contrastive loss is one: an example without others is distinguished from them with certainty.
    """
    step, theta = shadow.training_step, shadow.theta.detach().requires_grad_()
    try:
        size = gradient_of(step(theta, probe.together.data), theta).norm()
        return all(gradient_of(step(theta, one.data), theta).norm() < _NOTHING * size for one in probe.singles)
    except Exception:  # what fails here is reported where it is used
        return False


def _obstacle(loss: LossFunction, probe: Probe, expected: Tensor | None) -> str | None:
    """Why losses cannot be computed in some way; ``None`` if it gives right losses and gradients.

    Args:
        loss: The way.
        probe: A few examples.
        expected: Their losses ``(k,)`` as batches of one; ``None`` if there are none. Then losses are right if they do
            not depend on which other examples are in the batch, and the loss of the batch is their mean or sum.
    """
    shadow = loss.shadow
    singly = OneByOneLoss(shadow)

    def unlike(batch: Batch) -> float:
        """The difference between the gradients of the losses and of one example at a time."""
        theta = shadow.theta.detach().requires_grad_()
        gradient = gradient_of(loss.losses(theta, batch).sum(), theta)
        alone = [shadow.widened(single) for single in probe.singles]
        rows = torch.stack([gradient_of(singly.evaluate(theta, single), theta) for single in alone])
        return distance((gradient - rows.sum(0)).norm()[None], rows.norm(dim=1).sum()[None])

    try:
        theta = shadow.theta.detach().requires_grad_()
        losses = loss.losses(theta, probe.together)
        gradient_of(losses.sum(), theta)  # activation checkpointing fails in the backward pass only
        next(loss.gradients(shadow.theta, probe.together))  # vmap of a gradient allows less than vmap of a loss
        if expected is None:
            with torch.no_grad():
                fewer = loss.losses(theta, probe.fewer)
                whole = shadow.training_step(theta, probe.fewer.data)
            if not close(losses[: len(fewer)], fewer) or _as_reduction(whole, fewer) is None:
                return "the loss of an example depends on the others in its batch"
        elif not close(losses, expected):
            return "it gave other losses than one example at a time"
        elif differs(shadow, unlike, probe.together):  # vmap ignores hooks on tensors
            return "it gave other gradients, as with a hook on a tensor"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _as_reduction(together: Tensor, losses: Tensor) -> Reduction | None:
    """Whether the loss ``()`` of a batch is the mean or the sum of the losses ``(B,)``."""
    if close(together, losses.mean()):
        return "mean"
    return "sum" if close(together, losses.sum()) else None


def _reduction(
    loss: LossFunction, batch: Batch, known: Tensor | None = None, probe: Probe | None = None
) -> Reduction | None:
    """Whether the loss of a batch is the mean or the sum of its losses; warns with the cause if it is neither.

    Args:
        loss: The losses.
        batch: Many examples, since a weight or a mask may change the loss of few batches only.
        known: The losses ``(B,)``, if the batch cannot be divided.
        probe: A few examples, whose gradients are compared, too: losses may be equal up to rounding where weights are
            not, as those of all tokens are at the start of training.
    """
    shadow, batch = loss.shadow, loss.whole(batch)
    with torch.no_grad():
        losses = loss.losses(shadow.theta, batch) if batch.divisible or known is None else known
        together = shadow.training_step(shadow.theta, batch.data)
        reduction = _as_reduction(together, losses)
        if reduction is not None and (probe is None or not _weighs(loss, probe, reduction)):
            return reduction
        if not torch.isfinite(losses).all() or not torch.isfinite(together):
            return None
        if reduction is None:
            found = (
                f"is {float(together):.4g}, but the mean of the losses of the single examples is"
                f" {float(losses.mean()):.4g} ({cause_of_difference(shadow, batch, losses, together)})"
            )
        else:
            found = f"has a different gradient from the {reduction} of the losses of the single examples ({WEIGHTED})"
    warnings.warn(
        f"The loss that {type(shadow.module).__name__}.training_step gives for a batch of {batch.size} {found}."
        f" Influence and unlearning refer to the losses of single examples. {code_of_losses(shadow, batch)}",
        GIFWarning,
        stacklevel=4,
    )
    return None


def _weighs(loss: LossFunction, probe: Probe, reduction: Reduction) -> bool:
    """Whether the gradient of the loss of a few examples is not the mean or the sum of their gradients."""
    shadow = loss.shadow

    def unlike(batch: Batch) -> float:
        theta = shadow.theta.detach().requires_grad_()
        together = gradient_of(shadow.training_step(theta, batch.data), theta)
        alone = [shadow.widened(single).data for single in probe.singles]
        rows = torch.stack([gradient_of(shadow.training_step(theta, data), theta) for data in alone])
        expected = rows.mean(0) if reduction == "mean" else rows.sum(0)
        lengths = rows.norm(dim=1)
        return distance(
            (together - expected).norm()[None], (lengths.mean() if reduction == "mean" else lengths.sum())[None]
        )

    with torch.enable_grad():
        return differs(shadow, unlike, probe.together)
