"""What a step hands to a loss function of PyTorch: the predictions that a loss is a function of, and the targets."""

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

# Linear in log-probabilities u. The convex function is that of the logits, or the same function of log_softmax(u), and
# that is u. Both have one gradient and one Gauss–Newton matrix Jᵀ(diag(p) − ppᵀ)J, because the Jacobian of u is I − 1pᵀ
# times that of the logits, and (diag(p) − ppᵀ)1 = 0.
_OF_LOG_PROBABILITIES: set[Callable[..., Any]] = {F.nll_loss, F.kl_div}

_LOG_SOFTMAX: set[Callable[..., Any]] = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}

# Log-probabilities are those whose probabilities sum to 1 up to this much, or up to some roundings of a narrow dtype.
_NORMALISED, _ROUNDINGS = 1e-3, 32


class Predictions(TorchFunctionMode):
    """Inside of it, the predictions that go into PyTorch's loss functions are noted, or replaced by others.

    The predictions of a loss of log-probabilities (``F.nll_loss``, ``F.kl_div``) are the logits where it is given the
    result of a ``log_softmax`` as it is, and else the log-probabilities, however they were made. Others that replace
    these are normalised first, so that the loss is convex in them and has the logits' Gauss–Newton matrix.

    Args:
        others: Flat predictions that take the place of those computed, in the order of the calls.
    """

    def __init__(self, others: Tensor | None = None) -> None:
        super().__init__()
        self._others = others
        self._used = 0
        self._found: list[Tensor] = []
        self._targets: list[Any] = []
        self._logits: dict[int, tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = {}

    def flat(self) -> Tensor | None:
        """All predictions that were noted, as one vector; ``None`` if no loss function was called."""
        return torch.cat([found.reshape(-1) for found in self._found]) if self._found else None

    def classified(self) -> tuple[Tensor, Tensor] | None:
        """The logits ``(B, C)`` and targets ``(B,)`` of a cross-entropy with classes.

        Where other loss functions were called as well, they must have been given the same logits; else ``None``, and
        where they were called inside of a vmap.
        """
        if not self._found or not all(isinstance(target, Tensor) for target in self._targets):
            return None
        first, target = self._found[0], self._targets[0]
        try:
            same = all(other.data_ptr() == first.data_ptr() and other.shape == first.shape for other in self._found)
        except RuntimeError:  # they were made inside of a vmap, out of which they cannot be had
            return None
        right = first.ndim == 2 and target.shape == first.shape[:1] and not target.is_floating_point()
        return (first, target) if same and right else None

    def rows(self, size: int) -> Tensor | None:
        """The predictions of several calls side by side, ``(size, d)``; ``None`` if one has not ``size`` rows."""
        if not all(found.ndim and len(found) == size for found in self._found):
            return None
        return torch.cat([found.reshape(size, -1) for found in self._found], dim=1)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _LOG_SOFTMAX:
            logits, rest = _first(args, kwargs)
            result = func(logits, *rest, **kwargs)
            # The result is kept with it, so that no other tensor takes its id.
            self._logits[id(result)] = (result, logits, lambda other: func(other, *rest, **kwargs))
            return result
        if func in _LOSSES:
            prediction, rest = _first(args, kwargs)
            self._note_target(func, rest, kwargs)
            return func(self._note(prediction), *rest, **kwargs)
        if func in _OF_LOG_PROBABILITIES:
            prediction, rest = _first(args, kwargs)
            self._note_target(func, rest, kwargs)
            if id(prediction) in self._logits:
                _, logits, log_softmax = self._logits[id(prediction)]
                return func(log_softmax(self._note(logits)), *rest, **kwargs)
            found = self._note(prediction)
            if self._others is not None:
                # Classes are in the second dimension of F.nll_loss. F.kl_div has them in any.
                one = min(1, found.ndim - 1)
                found = _normalised(found, [one] if func is F.nll_loss else range(found.ndim))
            return func(found, *rest, **kwargs)
        return func(*args, **kwargs)

    def _note_target(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        classified = func in (F.cross_entropy, F.nll_loss)
        self._targets.append((rest[0] if rest else kwargs.get("target")) if classified else None)

    def _note(self, prediction: Tensor) -> Tensor:
        self._found.append(prediction)
        if self._others is None:
            return prediction
        start, self._used = self._used, self._used + prediction.numel()
        return self._others[start : self._used].view(prediction.shape)


class IndicesInBounds(TorchFunctionMode):
    """Inside of it, a class that the model does not predict, or a row that an embedding does not have, raises at once.

    On a CPU PyTorch raises an ``IndexError`` itself. On a GPU an assertion fails inside of a kernel, after which the
    process cannot read from that device any more, not even the weights. Checked are the targets of a cross-entropy and
    what is looked up in an embedding, but not inside of ``vmap``, where nothing can be decided by values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss):
            given = inspect.signature(func).bind(*args, **kwargs)
            given.apply_defaults()
            prediction, target, ignored = (given.arguments[name] for name in ("input", "target", "ignore_index"))
            if not target.is_floating_point():  # else probabilities
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
    """The log-softmax of log-probabilities, which does not change their values; other scores as they are.

    Decided by values, but as a tensor, because inside of ``vmap`` a program cannot branch on them.

    Args:
        scores: Of any shape.
        dims: The classes may be in one of these dimensions; they are in the one in which most scores are normalised, or
            in the last of several.
    """
    values = scores.detach()
    tolerance = max(_NORMALISED, _ROUNDINGS * torch.finfo(scores.dtype).eps)
    # One class has no curvature, and a very likely one would seem to be normalised along a dimension of its own.
    normalised = {d: torch.logsumexp(values, d, keepdim=True).abs() < tolerance for d in dims if scores.shape[d] > 1}
    if not normalised:
        return scores
    shares = {dim: found.to(scores.dtype).mean() for dim, found in normalised.items()}
    most = torch.stack(list(shares.values())).amax()
    result = scores
    for dim, found in normalised.items():
        result = torch.where(found & (shares[dim] >= most), torch.log_softmax(scores, dim), result)
    return result


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The first argument, however it is passed, taken from ``kwargs`` if need be; and the other positional ones."""
    return (args[0], args[1:]) if args else (kwargs.pop("input"), ())
