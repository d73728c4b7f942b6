"""What a loss is computed from: the predictions that enter it, the logits of a classifier, and features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..data.batch import Batch
from ..data.examples import Examples
from ..data.structure import describe
from ..errors import ConfigurationError, ObjectiveError
from ..storage.interrupts import uninterrupted
from .losses import LossFunction
from .predictions import Predictions

__all__ = ["features", "logits", "loss_and_logits", "loss_sum_at", "n_classes", "outputs", "predictions"]


# How many examples show whether a model predicts classes.
_PREDICTED = 64


def outputs(loss: LossFunction, theta: Tensor, batch: Batch) -> Tensor:
    """The predictions that the losses of a batch are computed from, ``(B, d)`` or flat; differentiable in ``theta``.

    Raises:
        ObjectiveError: If the loss is not computed by a loss function of PyTorch.
    """
    name = type(loss.shadow.module).__name__

    def noted(evaluate: Callable[[], Tensor]) -> Tensor:
        with Predictions() as seen:
            evaluate()
        try:
            flat = seen.flat()
        except RuntimeError as error:
            raise ObjectiveError(
                f"{name} computes its losses inside of a vmap, out of which their predictions cannot be taken for"
                " curvature='ggn' and curvature_sampling='logits'. Use curvature='hessian'."
            ) from error
        if flat is None:
            raise ObjectiveError(
                "curvature='ggn' and curvature_sampling='logits' need the predictions of the loss, but"
                f" {name} calls none of PyTorch's losses (F.cross_entropy, F.mse_loss, nn.BCEWithLogitsLoss, …). Use"
                " curvature='hessian', or one of these."
            )
        return flat

    return loss.map(noted, theta, batch)


def loss_sum_at(loss: LossFunction, theta: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The sum of the losses of a batch as a function of its predictions alone, shaped as by :func:`outputs`."""

    def replaced(evaluate: Callable[[], Tensor], part: Tensor) -> Tensor:
        with Predictions(part):
            return evaluate()

    return lambda predicted: loss.map(replaced, theta, batch, predicted).sum()


def predictions(loss: LossFunction, theta: Tensor, batch: Batch) -> Tensor:
    """The predictions for each example of a batch, ``(B, d)``, on the CPU; of several heads side by side.

    Raises:
        ObjectiveError: If the loss is not computed by a loss function of PyTorch.
        ConfigurationError: If a prediction does not have one row for each example.
    """
    with torch.no_grad():
        predicted = outputs(loss, theta, batch)
        if predicted.ndim == 2:
            return predicted.cpu()
        with Predictions() as seen:
            loss.loss_sum(theta, batch)
    rows = seen.rows(batch.size)
    if rows is None:
        raise ConfigurationError(
            f"curvature_sampling='logits' needs predictions with one row for each example, which"
            f" {type(loss.shadow.module).__name__} does not make. Use 'features' or 'random'."
        )
    return rows.cpu()


def features(loss: LossFunction, theta: Tensor, batch: Batch) -> Tensor:
    """The inputs of the last Linear layer for each example of a batch, ``(B, d)``, on the CPU.

    The positions of a sequence are averaged.

    Raises:
        ConfigurationError: If the module has no Linear layer, or its last one does not see one row for each example.
    """
    module = loss.shadow.module
    inputs: list[Tensor] = []
    hooks: list[RemovableHandle] = []
    try:
        with uninterrupted():
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
                    hooks.append(hook)
        with torch.no_grad():
            loss.evaluate(theta, batch)
    finally:
        with uninterrupted():
            for hook in hooks:
                hook.remove()
    if not inputs or len(inputs[-1]) != batch.size:
        raise ConfigurationError(
            f"curvature_sampling='features' needs a Linear layer that sees one row for each example, which"
            f" {type(module).__name__} does not end in. Use 'logits' or 'random'."
        )
    last = inputs[-1]
    return last.reshape(len(last), -1, last.shape[-1]).mean(1).cpu()


def n_classes(loss: LossFunction, theta: Tensor, examples: Examples, seed: int) -> int | None:
    """``C``, if the loss looks at one softmax over ``C`` classes for each example, in the order of the labels.

    ``None`` if it calls no cross-entropy of PyTorch, or with other targets than the labels in the batch.

    Args:
        loss: The loss.
        theta: ``(p,)``.
        examples: A few of them are looked at.
        seed: Of the draw of these.
    """
    few = next(examples.sample(_PREDICTED, seed).batches())
    with torch.no_grad():
        _, classified = _evaluate(loss, theta, few)
    if classified is None or few.classes is None:
        return None
    predicted, targets = classified
    return predicted.shape[1] if torch.equal(targets.cpu().long(), few.classes.cpu().long()) else None


def logits(loss: LossFunction, theta: Tensor, batch: Batch) -> Tensor:
    """The logits ``(B, C)`` of a batch, if :func:`n_classes` is not ``None``; differentiable in ``theta``.

    Raises:
        ObjectiveError: If the loss of this batch calls no cross-entropy.
    """
    return _require_logits(loss, _evaluate(loss, theta, batch)[1], batch)


def loss_and_logits(loss: LossFunction, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sum of the losses of a batch, ``()``, and :func:`logits`; by one pass where losses are not coupled.

    Raises:
        ObjectiveError: If the loss of this batch calls no cross-entropy.
    """
    evaluated, classified = _evaluate(loss, theta, batch)
    total = loss.sum_of(evaluated, batch)
    if total is None:
        total = loss.loss_sum(theta, batch)
    return total, _require_logits(loss, classified, batch)


def _evaluate(loss: LossFunction, theta: Tensor, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """One pass over a batch, and its logits ``(B, C)`` and targets ``(B,)`` if it is that of a classifier."""
    with Predictions() as seen:
        evaluated = loss.evaluate(theta, batch)
    return evaluated, seen.classified()


def _require_logits(loss: LossFunction, classified: tuple[Tensor, Tensor] | None, batch: Batch) -> Tensor:
    if classified is None:
        raise ObjectiveError(
            f"{type(loss.shadow.module).__name__} predicts classes by a cross-entropy for some batches, but not for"
            f" this one: {describe(batch.data)}."
        )
    return classified[0]
