"""Predictions of losses that are written by hand, found where they enter a softmax, a sigmoid or a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ObjectiveError

__all__ = ["Entries", "EntryPredictions", "possible_entries"]


# Functions that a loss written by hand passes its predictions to.
_INTO: set[Callable[..., Any]] = {
    *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softmax, torch.softmax, Tensor.softmax),
    *(F.logsigmoid, torch.sigmoid, Tensor.sigmoid, F.sigmoid, F.softplus, torch.logsumexp, Tensor.logsumexp),
    *(torch.exp, Tensor.exp, Tensor.square, torch.square, Tensor.pow, torch.pow, Tensor.__pow__, Tensor.abs, torch.abs),
    *(F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.kl_div, F.poisson_nll_loss, F.gaussian_nll_loss),
}

# Functions whose result is the difference of a prediction and a target, or its negative.
_DIFFERENCES: set[Callable[..., Any]] = {torch.sub, torch.subtract, torch.rsub, Tensor.sub, Tensor.subtract}
_DIFFERENCES |= {Tensor.__sub__, Tensor.__rsub__}

# How many of the last entries of a step may be its predictions, and how many of them together.
_LAST, _TOGETHER = 8, 3


@dataclass
class Entries:
    """Which tensors of a step are its predictions.

    Attributes:
        chosen: Positions of the entries of the predictions, counted back from the last entry, 1; ``None`` for all.
        calls: At which calls of PyTorch, counted from the first, the latest evaluation made the predictions.
        sizes: The numbers of values of these predictions.
    """

    chosen: tuple[int, ...] | None
    calls: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def possible_entries() -> Iterator[list[Entries]]:
    """All that may be the predictions: one of the last entries, all entries, two of the last, or three."""
    yield [Entries((position,)) for position in range(1, _LAST + 1)]
    yield [Entries(None)]
    for count in range(2, _TOGETHER + 1):
        yield [Entries(chosen) for chosen in combinations(range(1, _LAST // 2 + 1), count)]


class EntryPredictions(TorchFunctionMode):
    """Inside of it, the predictions of a loss written by hand are recorded, or replaced by others.

    A prediction is an argument of a softmax, a sigmoid, a log-sum-exp or a loss function, or the difference of two
    tensors. It is replaced where it is made, so that every use of it sees the replacement.

    Args:
        entries: Which tensors are the predictions. They are located when predictions are recorded, and replaced where
            they were located last.
        others: Flat predictions that replace those of the model, in the order in which they are made.
    """

    def __init__(self, entries: Entries, others: Tensor | None = None) -> None:
        super().__init__()
        self._entries = entries
        self._others = others
        self._used = 0
        self._calls = 0
        self._made: dict[int, tuple[int, Tensor]] = {}  # by id, at which call; the tensors keep their ids while held
        self._seen: list[int] = []
        self._by_call: dict[int, Tensor] = {}

    def _predictions(self) -> list[Tensor]:
        """The predictions, in the order in which they are made.

        Raises:
            ObjectiveError: If the step has fewer entries.
        """
        seen = list(dict.fromkeys(self._seen))
        chosen = self._entries.chosen
        if not seen or (chosen is not None and len(seen) < max(chosen)):
            raise ObjectiveError("The loss of this batch has other predictions than that of the first examples.")
        self._entries.calls = sorted(seen if chosen is None else [seen[-position] for position in chosen])
        predictions = [self._by_call[call] for call in self._entries.calls]
        self._entries.sizes = [prediction.numel() for prediction in predictions]
        return predictions

    def flat(self) -> Tensor | None:
        """All predictions as one vector."""
        return torch.cat([prediction.reshape(-1) for prediction in self._predictions()])

    def classified(self, labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The logits ``(B, C)`` and labels ``(B,)``, if the loss has one prediction with a row for each label."""
        predictions = self._predictions()
        if labels is None or len(predictions) != 1 or predictions[0].ndim != 2 or len(predictions[0]) != len(labels):
            return None
        return (predictions[0], labels) if int(labels.max()) < predictions[0].shape[1] else None

    def rows(self, size: int) -> Tensor | None:
        """The predictions side by side, ``(size, d)``; ``None`` if one does not have ``size`` rows."""
        predictions = self._predictions()
        if not all(prediction.ndim and len(prediction) == size for prediction in predictions):
            return None
        return torch.cat([prediction.reshape(size, -1) for prediction in predictions], dim=1)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._others is None and func in _INTO:
            for given in (*args[:2], *kwargs.values()):
                if isinstance(given, Tensor) and id(given) in self._made:
                    self._seen.append(self._made[id(given)][0])
        result = func(*args, **kwargs)
        call, self._calls = self._calls, self._calls + 1
        if not isinstance(result, Tensor):
            return result
        if self._others is not None:
            if call not in self._entries.calls:
                return result
            start, self._used = self._used, self._used + result.numel()
            return self._others[start : self._used].view(result.shape)
        self._made[id(result)] = call, result
        self._by_call[call] = result
        # A number minus a tensor, as in one minus a cosine, is no prediction: the loss is linear in it.
        if func in _DIFFERENCES and all(isinstance(given, Tensor) for given in args[:2]):
            self._seen.append(call)
        return result
