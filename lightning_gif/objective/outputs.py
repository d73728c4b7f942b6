"""The predictions that a loss is computed from, the logits of a classifier, and its features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..data.batch import Batch
from ..data.examples import Examples
from ..data.structure import describe
from ..errors import ConfigurationError, NonFiniteError, ObjectiveError
from ..solvers.lanczos import quadrature
from ..storage.interrupts import uninterrupted
from .autograd import close, gradient_of
from .entries import Entries, EntryPredictions, possible_entries
from .losses import LossFunction
from .predictions import Predictions

__all__ = [
    "choose_predictions",
    "features",
    "logits",
    "loss_and_logits",
    "loss_sum_at",
    "n_classes",
    "outputs",
    "predictions",
]


# How many examples are evaluated to learn whether a model predicts classes.
_PREDICTED = 64


# Predictions with up to so many values have their whole second derivative computed, others products with it.
_WHOLE, _PRODUCTS = 512, 16

# Gradients, and eigenvalues, that differ by less than this share of them are the same.
_ROUNDING = 1e-3


def choose_predictions(loss: LossFunction, *batches: Batch) -> bool:
    """Finds the predictions of a loss that is written by hand, and notes them as ``loss.entries``.

    The predictions are tensors that enter a softmax, a sigmoid or a difference, such that the loss depends on the
    parameters through them alone and is convex in them. Of several such tensors it is the one with most values, since
    the others summarise it, as the norm of a difference does. Nothing is noted if the arguments of PyTorch's loss
    functions are the predictions, or if there are none: then only the Hessian is a curvature of this loss.

    Args:
        loss: The loss.
        batches: A few examples; several batches if the loss has to be evaluated for one example at a time.

    Returns:
        Whether there are predictions in which the loss is convex.
    """
    if all(_determine_the_loss(loss, batch) and _is_linear_in_results(loss, batch) for batch in batches):
        return True
    for together in possible_entries():
        valid: dict[int, Entries] = {}
        for loss.entries in together:
            if all(_determine_the_loss(loss, batch) for batch in batches):
                size = outputs(loss, loss.shadow.theta, batches[0]).numel()
                valid.setdefault(size, loss.entries)  # of several of one size, the last one
        loss.entries = valid[max(valid)] if valid else None
        if valid:
            return True
    return False


def _is_linear_in_results(loss: LossFunction, batch: Batch) -> bool:
    """Whether the loss is a linear function of what PyTorch's loss functions return, up to a constant.

    Then it is convex in their predictions. The root of a mean squared error, for example, is not: for one example it is
    the absolute error, which has no curvature.
    """

    def scaled(factor: float, evaluate: Callable[[], Tensor]) -> Tensor:
        with Predictions(factor=factor):
            return evaluate()

    with torch.no_grad():
        first, middle, last = (
            loss.map(partial(scaled, factor), loss.shadow.theta, batch) for factor in (1.0, 1.5, 2.0)
        )
        bend = (first - 2 * middle + last).abs()
        return bool((bend <= _ROUNDING * torch.stack([first, middle, last]).abs().amax(0)).all())


def _determine_the_loss(loss: LossFunction, batch: Batch) -> bool:
    """Whether the loss depends on the parameters through the predictions alone.

    If the loss is written by hand, its second derivative in the predictions must also be positive semi-definite, and
    not zero for any of them. A loss may be linear in a difference that is no prediction, such as a logarithm minus a
    constant. Then the curvature of that difference would be lost. PyTorch's loss functions are known to be convex.
    """
    theta = loss.shadow.theta.detach().requires_grad_()
    try:
        out = outputs(loss, theta, batch)
        at = out.detach().requires_grad_()
        total = loss_sum_at(loss, theta.detach(), batch)(at)
        if not (out.requires_grad and total.requires_grad):
            return False
        (slope,) = torch.autograd.grad(total, at, create_graph=True, materialize_grads=True)
        (through,) = torch.autograd.grad(out, theta, slope.detach(), materialize_grads=True)
        expected = gradient_of(loss.loss_sum(theta, batch), theta)
    except Exception:  # what cannot be computed in this way, is not
        return False
    if float((through - expected).norm()) > _ROUNDING * float(expected.norm()):
        return False
    return loss.entries is None or (slope.requires_grad and _is_convex(slope, at, loss.entries.sizes))


def _is_convex(slope: Tensor, at: Tensor, sizes: Sequence[int]) -> bool:
    """Whether the derivative of a slope ``(…, d)`` at predictions ``(…, d)`` is positive semi-definite, and not zero.

    Args:
        slope: The slope.
        at: The predictions, side by side.
        sizes: How many of the ``d`` values belong to each of them. The derivative must not be zero for any of them.
    """

    def product(vector: Tensor) -> Tensor:
        (curved,) = torch.autograd.grad(slope, at, vector.view_as(at), retain_graph=True, materialize_grads=True)
        return curved.reshape(-1)

    start = torch.randn(at.shape, generator=torch.Generator().manual_seed(0)).to(at)
    for part in torch.arange(at.shape[-1]).split(list(sizes)) if sum(sizes) == at.shape[-1] else ():
        alone = torch.zeros_like(at)
        alone[..., part] = start[..., part]
        if not product(alone).any():
            return False
    size = at.numel()
    if size <= _WHOLE:
        matrix = torch.stack([product(row) for row in torch.eye(size, dtype=at.dtype, device=at.device)])
        if not torch.isfinite(matrix).all():
            return False
        values = torch.linalg.eigvalsh((matrix + matrix.T).double().cpu() / 2)
    else:
        try:
            values, _ = quadrature(product, start.reshape(-1) / start.norm(), _PRODUCTS)
        except NonFiniteError:
            return False
    return bool(values.max() > 0 and values.min() > -_ROUNDING * values.max())


def _recorder(loss: LossFunction, others: Tensor | None = None) -> Predictions | EntryPredictions:
    return Predictions(others) if loss.entries is None else EntryPredictions(loss.entries, others)


def outputs(loss: LossFunction, theta: Tensor, batch: Batch) -> Tensor:
    """The predictions that the losses of a batch are computed from; differentiable in ``theta``.

    These are the first arguments of all calls of PyTorch's loss functions, see :class:`~.predictions.Predictions`, or
    what :func:`choose_predictions` has found.

    Returns:
        ``(B, d)`` if examples are vectorised, else one flat vector for the whole batch.

    Raises:
        ObjectiveError: If the loss is not computed by a loss function of PyTorch.
    """
    name = type(loss.shadow.module).__name__

    def recorded(evaluate: Callable[[], Tensor]) -> Tensor:
        with _recorder(loss) as seen:
            value = evaluate()
        try:
            flat = seen.flat()
        except RuntimeError as error:
            raise ObjectiveError(
                f"{name} computes its losses inside a vmap of its own. Their predictions, which curvature='ggn' and"
                " curvature_sampling='logits' need, cannot be read from there. Use curvature='hessian'."
            ) from error
        if flat is None and theta.requires_grad and not value.requires_grad:
            return theta.new_zeros(0)  # a step that skips these examples
        if flat is None:
            raise ObjectiveError(
                "curvature='ggn' and curvature_sampling='logits' need the predictions of the loss, but"
                f" {name} calls none of PyTorch's losses (F.cross_entropy, F.mse_loss, nn.BCEWithLogitsLoss, …). Use"
                " curvature='hessian', or compute the loss with one of these functions."
            )
        return flat

    return loss.map(recorded, theta, batch)


def loss_sum_at(loss: LossFunction, theta: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The sum of the losses of a batch as a function of its predictions, which have the shape of :func:`outputs`."""

    def replaced(evaluate: Callable[[], Tensor], part: Tensor) -> Tensor:
        with _recorder(loss, part):
            return evaluate()

    return lambda predicted: loss.map(replaced, theta, batch, predicted).sum()


def predictions(loss: LossFunction, theta: Tensor, batch: Batch) -> Tensor:
    """The predictions for each example of a batch, ``(B, d)``, on the CPU. Those of several heads are concatenated.

    Raises:
        ObjectiveError: If the loss is not computed by a loss function of PyTorch.
        ConfigurationError: If a prediction does not have one row for each example.
    """
    with torch.no_grad():
        predicted = outputs(loss, theta, batch)
        if predicted.ndim == 2:
            return predicted.cpu()
        with _recorder(loss) as seen:
            loss.loss_sum(theta, batch)
    rows = seen.rows(batch.size)
    if rows is None:
        raise ConfigurationError(
            f"curvature_sampling='logits' needs predictions with one row for each example, but those of"
            f" {type(loss.shadow.module).__name__} have another shape. Use 'features' or 'random'."
        )
    return rows.cpu()


def features(loss: LossFunction, theta: Tensor, batch: Batch) -> Tensor:
    """The inputs of the last Linear layer for each example of a batch, ``(B, d)``, on the CPU.

    The positions of a sequence are averaged.

    Raises:
        ConfigurationError: If the module has no Linear layer, or the last one's input does not have one row for each
            example.
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
            loss.evaluate(theta, loss.whole(batch))
    finally:
        with uninterrupted():
            for hook in hooks:
                hook.remove()
    if not inputs or len(inputs[-1]) != loss.whole(batch).size:
        raise ConfigurationError(
            f"curvature_sampling='features' needs a last Linear layer whose input has one row for each example, but"
            f" {type(module).__name__} has none. Use 'logits' or 'random'."
        )
    last = inputs[-1][: batch.size]
    return last.reshape(len(last), -1, last.shape[-1]).mean(1).cpu()


def n_classes(loss: LossFunction, theta: Tensor, examples: Examples, seed: int) -> int | None:
    """The number of classes ``C``, if the model is a classifier.

    A classifier computes one cross-entropy over ``C`` classes for each example, with the labels in the batch as
    targets. For any other loss, the result is ``None``.

    Args:
        loss: The loss function.
        theta: Parameters ``(p,)``.
        examples: The examples; a random sample of them is evaluated.
        seed: Seed of the sample.
    """
    sizes: set[int] = set()
    with torch.no_grad():
        for few in examples.sample(_PREDICTED, seed).batches():
            _, classified = _evaluate(loss, theta, few)
            if classified is None or few.classes is None:
                return None
            predicted, targets = classified
            if not torch.equal(targets.cpu().long(), few.classes.cpu().long()):
                return None
            if loss.entries is not None:  # a loss written by hand need not be a cross-entropy
                as_classifier = F.cross_entropy(predicted, targets, reduction="none")
                if not close(loss.losses(theta, few), as_classifier):
                    return None
            sizes.add(predicted.shape[1])
    # A loss over pairs of examples has as many classes as the batch has examples.
    return sizes.pop() if len(sizes) == 1 and min(sizes) > 1 else None


def logits(loss: LossFunction, theta: Tensor, batch: Batch) -> Tensor:
    """The logits ``(B, C)`` of a batch, if :func:`n_classes` is not ``None``; differentiable in ``theta``.

    Raises:
        ObjectiveError: If the loss of this batch calls no cross-entropy.
    """
    return _require_logits(loss, _evaluate(loss, theta, batch)[1], batch)


def loss_and_logits(loss: LossFunction, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sum of the losses of a batch, ``()``, and :func:`logits`. One pass gives both, unless losses are coupled.

    Raises:
        ObjectiveError: If the loss of this batch calls no cross-entropy.
    """
    evaluated, classified = _evaluate(loss, theta, batch)
    total = loss.sum_of(evaluated, batch)
    if total is None:
        total = loss.loss_sum(theta, batch)
    return total, _require_logits(loss, classified, batch)


def _evaluate(loss: LossFunction, theta: Tensor, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The result of one pass over a batch, and its logits ``(B, C)`` and targets ``(B,)`` if there are any."""
    if loss.entries is not None:
        with EntryPredictions(loss.entries) as entered:
            evaluated = loss.evaluate(theta, batch)
        return evaluated, entered.classified(batch.classes)
    with Predictions() as seen:
        evaluated = loss.evaluate(theta, batch)
    return evaluated, seen.classified()


def _require_logits(loss: LossFunction, classified: tuple[Tensor, Tensor] | None, batch: Batch) -> Tensor:
    if classified is None:
        raise ObjectiveError(
            f"{type(loss.shadow.module).__name__} computes a cross-entropy over classes for some batches, but not for"
            f" this one: {describe(batch.data)}."
        )
    return classified[0]
