"""Checks that the loss of a training step is a sum of terms of its examples, so that they can be weighted."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import ObjectiveError
from ..objective.autograd import close
from ..objective.losses import StepLoss
from .replay import Replay

__all__ = ["check_weighting"]


def check_weighting(replay: Replay) -> None:
    """Checks the weights of examples on the first batch of a run, in evaluation mode.

    The derivative of the batch's loss in a weight has to be the loss of the example, divided by the number of examples
    if the loss is their mean. If the loss of a batch is neither the mean nor the sum of those of its examples, the
    derivatives have to follow the examples when these change places.

    Raises:
        ObjectiveError: If this is not so.
    """
    (step,), objective = replay.trajectory.steps(0, 1), replay.objective
    (batch,) = next(replay.read([step]))[:1]
    loss = objective.loss
    reduction = loss.reduction if isinstance(loss, StepLoss) else None
    try:
        found = _derivatives(replay, batch)
        if reduction is not None:
            with torch.no_grad():
                losses = objective.losses(objective.theta, replace(batch, divisible=objective.divisible))
            expected = losses / len(losses) if reduction == "mean" else losses
        else:
            ids = batch.ids.roll(1)
            assert replay.train.reader is not None  # since there is a dataset
            data = replay.train.prepare(next(iter(replay.train.reader.read([ids.tolist()]))))
            expected = _derivatives(replay, replace(batch, data=data, ids=ids)).roll(-1)
        why = None if close(found, expected) else "these terms are not the losses of the examples"
    except ObjectiveError as error:
        why = str(error)
    if why is not None:
        raise ObjectiveError(
            f"The loss of {type(objective.module).__name__}.training_step cannot be weighted by examples: {why}. A step"
            " whose loss is a mean or a sum over the losses of its examples can, such as F.cross_entropy(self(x), y)."
            " Or use the default influence, without `through`."
        )


def _derivatives(replay: Replay, batch: Batch) -> Tensor:
    """The derivatives ``(B,)`` of the loss of a batch in the weights of its examples."""
    objective = replay.objective
    theta = objective.theta.detach().requires_grad_()
    weights = torch.ones(len(batch.ids), dtype=theta.dtype, device=theta.device, requires_grad=True)
    loss = replay.weighted_loss(theta, batch, objective.shadow.buffers(theta.dtype), weights)
    found = torch.autograd.grad(loss, weights, allow_unused=True)[0] if loss.requires_grad else None
    if found is None:
        raise ObjectiveError("it has no mean or sum over all terms, and no loss function of PyTorch that reduces them")
    return found
