"""The parts of the loss of a text that belong to its tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..data.batch import Batch
from ..errors import ObjectiveError
from .objective import Objective
from .reductions import terms_of

__all__ = ["TokenDerivatives", "token_derivatives"]


_LOSSES = {F.cross_entropy, F.nll_loss}
_LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}
_GATHER = {torch.gather, Tensor.gather, torch.take_along_dim, Tensor.take_along_dim}


class TokenDerivatives(NamedTuple):
    """The derivatives of the parts of a loss.

    Attributes:
        ids: The id of the token that each part predicts, ``(T,)``; -1 where it is not known.
        values: ``wᵀ∇ℓₜ`` for each direction ``w`` and each part ``ℓₜ`` of the loss, ``(q, T)`` in float64.
    """

    ids: Tensor
    values: Tensor


def token_derivatives(objective: Objective, batch: Batch, directions: Tensor) -> TokenDerivatives:
    """``wᵀ∇ℓₜ`` for the part ``ℓₜ`` of the loss of an example that is about its token ``t``.

    The loss is a sum or a mean of cross-entropies, one for each token: it is computed by ``cross_entropy`` or
    ``nll_loss``, or from the result of ``log_softmax``. What else is added to it belongs to no token.

    Args:
        objective: An open objective.
        batch: A batch of one example.
        directions: ``(q, p)``.

    Raises:
        ObjectiveError: If the loss is not computed from the predictions of several tokens.
    """
    theta = objective.theta.detach().requires_grad_()
    with _Weighted() as weighted:
        loss = objective.loss.evaluate(theta, batch).sum()
    weights = weighted.weights
    if weights is None or not loss.requires_grad:
        raise ObjectiveError(
            f"The loss of {type(objective.module).__name__} for one example has no parts for several tokens: it is not"
            " computed by one call of F.cross_entropy or F.nll_loss, or from one log-softmax, with a prediction for"
            " each token. Omit `tokens`, or compute the loss by one call of F.cross_entropy for all tokens of a text."
        )
    (slope,) = torch.autograd.grad(loss, theta, create_graph=True, materialize_grads=True)
    values = []
    for direction in directions:
        along = slope @ direction
        if not along.requires_grad:
            values.append(torch.zeros_like(weights))
            continue
        (part,) = torch.autograd.grad(along, weights, retain_graph=True, materialize_grads=True)
        values.append(part)
    counted = weighted.counted
    ids = torch.full_like(counted, -1, dtype=torch.long) if weighted.ids is None else weighted.ids
    stacked = torch.stack(values).detach().double()
    return TokenDerivatives(ids[counted].cpu(), stacked[:, counted].cpu())


class _Weighted(TorchFunctionMode):
    """Inside of it, the cross-entropy of each token is multiplied by a weight of 1, which can be differentiated.

    Attributes:
        weights: The weights ``(T,)``; ``None`` before the first loss of several tokens.
        ids: The ids of the tokens that are predicted, ``(T,)``; ``None`` if they are not known.
        counted: Whether the loss counts each token, ``(T,)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: Tensor | None = None
        self.ids: Tensor | None = None
        self.counted = torch.ones(0, dtype=torch.bool)
        self._done = WeakIdKeyDictionary()  # log-probabilities that have their weights

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = None
        if func in _LOSSES:
            result = self._loss(func, args, kwargs)
        elif func in _LOG_SOFTMAX:
            result = self._log_softmax(func, args, kwargs)
        elif func in _GATHER and args and args[0] in self._done:
            self._learn(args[2] if len(args) > 2 else kwargs.get("index", kwargs.get("indices")))
        return func(*args, **kwargs) if result is None else result

    def _loss(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The loss with weights; ``None`` if it is left as it is."""
        target = args[1] if len(args) > 1 else kwargs["target"]
        predicted = args[0] if args else kwargs["input"]
        if target.is_floating_point():
            return None
        done = predicted in self._done
        weights = self.weights if done else self._weights_for(target.numel(), target)
        if weights is None:
            return None
        terms = terms_of(func, args, kwargs)
        self._learn(target, terms.arguments["ignore_index"])
        values = terms.values if done else terms.values * weights.view_as(terms.values).to(terms.values.dtype)
        return terms.reduced(func, values)

    def _log_softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Log-probabilities with weights; ``None`` if they are left as they are."""
        given = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(dim, int) or given.ndim < 2:
            return None
        weights = self._weights_for(given.numel() // given.shape[dim], given)
        if weights is None:
            return None
        found = func(*args, **kwargs)
        shape = list(found.shape)
        shape[dim] = 1
        found = found * weights.view(shape).to(found.dtype)
        self._done[found] = True
        return found

    def _weights_for(self, count: int, like: Tensor) -> Tensor | None:
        """The weights of ``count`` tokens; ``None`` if these are not the tokens that have weights."""
        if self.weights is None and count > 1:
            self.weights = torch.ones(count, device=like.device, requires_grad=True)
            self.counted = torch.ones(count, dtype=torch.bool, device=like.device)
        return self.weights if self.weights is not None and len(self.weights) == count else None

    def _learn(self, ids: Any, ignored: int | None = None) -> None:
        """Notes the ids of the tokens, and which of them the loss ignores."""
        assert self.weights is not None
        if isinstance(ids, Tensor) and ids.numel() == len(self.weights):
            self.ids = ids.detach().flatten().long()
            self.counted = self.ids != ignored if ignored is not None else self.counted
