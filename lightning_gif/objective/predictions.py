"""The predictions and targets that a step passes to PyTorch's loss functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..data.targets import one_hot_labels

__all__ = ["IndicesInBounds", "Predictions"]


# Loss functions that are convex in their first argument, the prediction.
_LOSSES: set[Callable[..., Any]] = {
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.huber_loss,
    F.mse_loss,
    F.multi_margin_loss,
    F.multilabel_soft_margin_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
    F.soft_margin_loss,
}

# Loss functions that are linear in log-probabilities u and convex in the logits z. Since log_softmax(u) = u, the loss
# is the same convex function of u as of z. Both give the same gradient and Gauss–Newton matrix Jᵀ(diag(p) − ppᵀ)J: the
# Jacobian of u is I − 1pᵀ times the Jacobian of z, and (diag(p) − ppᵀ)1 = 0.
_OF_LOG_PROBABILITIES: set[Callable[..., Any]] = {F.nll_loss, F.kl_div}

_LOG_SOFTMAX: set[Callable[..., Any]] = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}

# A prediction counts as log-probabilities if its logsumexp is within the first number of 0, or within the second number
# of machine epsilons, if that is more.
_NORMALISED, _ROUNDINGS = 1e-3, 32


class Predictions(TorchFunctionMode):
    """A block that records the predictions passed to PyTorch's loss functions, or replaces them by others.

    ``F.nll_loss`` and ``F.kl_div`` take log-probabilities. If these are the unchanged result of a ``log_softmax``, the
    logits are recorded as the predictions, else the log-probabilities. Replacements of log-probabilities are normalised
    first, so that the loss is convex in them and has the Gauss–Newton matrix of the logits.

    Args:
        others: Flat predictions that replace those of the model, in the order of the calls.
        factor: A factor for the results of all loss functions.
    """

    def __init__(self, others: Tensor | None = None, *, factor: float = 1.0) -> None:
        super().__init__()
        self._factor = factor
        self._others = others
        self._used = 0
        self._predictions: list[Tensor] = []
        self._targets: list[Any] = []
        self._logits: dict[int, tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = {}

    def flat(self) -> Tensor | None:
        """All predictions as one vector; ``None`` if no loss function was called."""
        if not self._predictions:
            return None
        parts = [prediction.reshape(-1) for prediction in self._predictions]
        # A concatenation may move values, so places of examples would be looked for in each batch.
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def classified(self) -> tuple[Tensor, Tensor] | None:
        """The logits ``(B, C)`` and targets ``(B,)`` of a cross-entropy over classes.

        ``None`` if there was none, if any loss function got other predictions, or if the call was inside a vmap.
        """
        if not self._predictions or not all(isinstance(target, Tensor) for target in self._targets):
            return None
        first, target = self._predictions[0], self._targets[0]
        try:
            same = all(one.data_ptr() == first.data_ptr() and one.shape == first.shape for one in self._predictions)
        except RuntimeError:  # tensors of a vmap have no data outside it
            return None
        if not same or first.ndim != 2:
            return None
        if target.shape == first.shape and target.is_floating_point():
            labels = one_hot_labels(target)
            return None if labels is None else (first, labels)
        return (first, target) if target.shape == first.shape[:1] and not target.is_floating_point() else None

    def rows(self, size: int) -> Tensor | None:
        """The predictions of all calls side by side, ``(size, d)``; ``None`` if one does not have ``size`` rows."""
        if not all(prediction.ndim and len(prediction) == size for prediction in self._predictions):
            return None
        return torch.cat([prediction.reshape(size, -1) for prediction in self._predictions], dim=1)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _LOG_SOFTMAX:
            logits, rest = _first(args, kwargs)
            result = func(logits, *rest, **kwargs)
            # The result is kept, so that no other tensor can get its id.
            self._logits[id(result)] = (result, logits, lambda other: func(other, *rest, **kwargs))
            return result
        if func in _LOSSES:
            prediction, rest = _first(args, kwargs)
            self._record_target(func, rest, kwargs)
            return self._scaled(func(self._record(prediction), *rest, **kwargs))
        if func in _OF_LOG_PROBABILITIES:
            prediction, rest = _first(args, kwargs)
            self._record_target(func, rest, kwargs)
            if id(prediction) in self._logits:
                _, logits, log_softmax = self._logits[id(prediction)]
                return self._scaled(func(log_softmax(self._record(logits)), *rest, **kwargs))
            scores = self._record(prediction)
            if self._others is not None:
                # F.nll_loss has the classes in the second dimension, F.kl_div in any.
                second = min(1, scores.ndim - 1)
                scores = _normalised(scores, [second] if func is F.nll_loss else range(scores.ndim))
            return self._scaled(func(scores, *rest, **kwargs))
        return func(*args, **kwargs)

    def _scaled(self, result: Tensor) -> Tensor:
        return result if self._factor == 1.0 else self._factor * result

    def _record_target(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        classified = func in (F.cross_entropy, F.nll_loss)
        self._targets.append((rest[0] if rest else kwargs.get("target")) if classified else None)

    def _record(self, prediction: Tensor) -> Tensor:
        self._predictions.append(prediction)
        if self._others is None:
            return prediction
        start, self._used = self._used, self._used + prediction.numel()
        return self._others[start : self._used].view(prediction.shape)


class IndicesInBounds(TorchFunctionMode):
    """A block in which the labels of a cross-entropy and the indices of an embedding are checked before use.

    On a CPU, PyTorch raises an ``IndexError`` itself. On a GPU, an assertion fails inside a kernel. After that the
    process cannot read anything from the device, not even the weights. Calls inside ``vmap`` are not checked, because
    code cannot depend on values there.

    Raises:
        IndexError: From a call inside the block, if a label or index is out of bounds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss):
            given = inspect.signature(func).bind(*args, **kwargs)
            given.apply_defaults()
            prediction, target, ignored = (given.arguments[name] for name in ("input", "target", "ignore_index"))
            if not target.is_floating_point():  # else they are probabilities
                classes = prediction.shape[1 if prediction.ndim > 1 else 0]
                _check_bounds(target, classes, ignored, "target", "classes that the model predicts")
        elif func in (F.embedding, F.embedding_bag):
            given = inspect.signature(func).bind(*args, **kwargs)
            _check_bounds(
                given.arguments["input"], len(given.arguments["weight"]), None, "index", "rows of an embedding"
            )
        return func(*args, **kwargs)


def _check_bounds(indices: Tensor, size: int, ignored: int | None, what: str, of: str) -> None:
    try:
        bad = indices[(indices < 0) | (indices >= size)].flatten().tolist()
        bad = [index for index in bad if index != ignored]
    except RuntimeError:  # inside of vmap
        return
    if bad:
        raise IndexError(f"The {what} {bad[0]} is out of bounds: there are {size} {of}, numbered 0 to {size - 1}")


def _normalised(scores: Tensor, dims: Iterable[int]) -> Tensor:
    """Applies ``log_softmax`` to log-probabilities, which keeps their values; returns other scores unchanged.

    The choice depends on values. It uses ``torch.where``, because code inside ``vmap`` cannot branch on values.

    Args:
        scores: Predictions of any shape.
        dims: The dimensions that may hold the classes. The one along which most scores are normalised is taken, or the
            last of them in case of a tie.
    """
    values = scores.detach()
    tolerance = max(_NORMALISED, _ROUNDINGS * torch.finfo(scores.dtype).eps)
    # A dimension of size 1 is skipped: a single class has no curvature, and a log-probability near 0 would seem to be
    # normalised along it.
    normalised = {d: torch.logsumexp(values, d, keepdim=True).abs() < tolerance for d in dims if scores.shape[d] > 1}
    if not normalised:
        return scores
    shares = {dim: mask.to(scores.dtype).mean() for dim, mask in normalised.items()}
    most = torch.stack(list(shares.values())).amax()
    result = scores
    for dim, mask in normalised.items():
        result = torch.where(mask & (shares[dim] >= most), torch.log_softmax(scores, dim), result)
    return result


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The first argument and the other positional ones. If it was given by keyword, it is removed from ``kwargs``."""
    return (args[0], args[1:]) if args else (kwargs.pop("input"), ())
