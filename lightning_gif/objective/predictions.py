"""The predictions and targets that a step passes to PyTorch's loss functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

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

# Loss functions that are linear in log-probabilities u, and convex in the logits. Since log_softmax(u) = u, the loss is
# the same convex function of u as well. Both have the same gradient and Gauss–Newton matrix Jᵀ(diag(p) − ppᵀ)J, because
# the Jacobian of u is I − 1pᵀ times that of the logits, and (diag(p) − ppᵀ)1 = 0.
_OF_LOG_PROBABILITIES: set[Callable[..., Any]] = {F.nll_loss, F.kl_div}

_LOG_SOFTMAX: set[Callable[..., Any]] = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}

# Scores are log-probabilities if their exponentials sum to 1 up to this error, or up to so many roundings of the dtype.
_NORMALISED, _ROUNDINGS = 1e-3, 32


class Predictions(TorchFunctionMode):
    """Inside of it, the predictions that are passed to PyTorch's loss functions are recorded, or replaced by others.

    The predictions of a loss of log-probabilities (``F.nll_loss``, ``F.kl_div``) are the logits if it is called with
    the unchanged result of a ``log_softmax``, else the log-probabilities, however they were computed. Replacements of
    log-probabilities are normalised first, so that the loss is convex in them and has the Gauss–Newton matrix of the
    logits.

    Args:
        others: Flat predictions that replace those of the model, in the order of the calls.
    """

    def __init__(self, others: Tensor | None = None) -> None:
        super().__init__()
        self._others = others
        self._used = 0
        self._predictions: list[Tensor] = []
        self._targets: list[Any] = []
        self._logits: dict[int, tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = {}

    def flat(self) -> Tensor | None:
        """All predictions as one vector; ``None`` if no loss function was called."""
        if not self._predictions:
            return None
        return torch.cat([prediction.reshape(-1) for prediction in self._predictions])

    def classified(self) -> tuple[Tensor, Tensor] | None:
        """The logits ``(B, C)`` and targets ``(B,)`` of a cross-entropy with classes.

        ``None`` if there was none, if other logits were passed to another loss function, or inside of a vmap.
        """
        if not self._predictions or not all(isinstance(target, Tensor) for target in self._targets):
            return None
        first, target = self._predictions[0], self._targets[0]
        try:
            same = all(one.data_ptr() == first.data_ptr() and one.shape == first.shape for one in self._predictions)
        except RuntimeError:  # tensors of a vmap have no data outside of it
            return None
        right = first.ndim == 2 and target.shape == first.shape[:1] and not target.is_floating_point()
        return (first, target) if same and right else None

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
            return func(self._record(prediction), *rest, **kwargs)
        if func in _OF_LOG_PROBABILITIES:
            prediction, rest = _first(args, kwargs)
            self._record_target(func, rest, kwargs)
            if id(prediction) in self._logits:
                _, logits, log_softmax = self._logits[id(prediction)]
                return func(log_softmax(self._record(logits)), *rest, **kwargs)
            scores = self._record(prediction)
            if self._others is not None:
                # F.nll_loss has classes in the second dimension, F.kl_div in any.
                second = min(1, scores.ndim - 1)
                scores = _normalised(scores, [second] if func is F.nll_loss else range(scores.ndim))
            return func(scores, *rest, **kwargs)
        return func(*args, **kwargs)

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
    """Inside of it, a label that the model does not predict, or a row that an embedding does not have, raises at once.

    On a CPU PyTorch raises an ``IndexError`` itself. On a GPU an assertion fails inside of a kernel, after which the
    process cannot read from that device any more, not even the weights. The targets of a cross-entropy and the indices
    of an embedding are checked, but not inside of ``vmap``, where code cannot depend on values.

    Raises:
        IndexError: From a call inside.
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
        raise IndexError(f"The {what} {bad[0]} is none of the {size} {of}, 0 to {size - 1}")


def _normalised(scores: Tensor, dims: Iterable[int]) -> Tensor:
    """The log-softmax of log-probabilities, which has the same values; other scores unchanged.

    The choice depends on values. It is made by ``torch.where``, because inside of ``vmap`` code cannot branch on them.

    Args:
        scores: Of any shape.
        dims: Dimensions that can be that of the classes. It is the one along which most scores are normalised, or the
            last of several such.
    """
    values = scores.detach()
    tolerance = max(_NORMALISED, _ROUNDINGS * torch.finfo(scores.dtype).eps)
    # A single class has no curvature, and a very likely one would seem to be normalised along a dimension of size 1.
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
    """The first argument, positional or removed from ``kwargs``, and the other positional arguments."""
    return (args[0], args[1:]) if args else (kwargs.pop("input"), ())
