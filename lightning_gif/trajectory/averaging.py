"""The average of weights that Lightning's ``WeightAveraging`` keeps during a training (EMA, SWA)."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from .._compat import Trainer

__all__ = ["Averages"]


class Averages:
    """Notes when a fit averages its weights, and by which share the average moves towards the weights.

    An average moves by ``average ← average + share · (weights − average)``. For an exponential moving average, the
    share is one minus its decay. For an equal one (SWA), it is ``1 / (n + 1)`` after ``n`` averages. The first one is a
    copy.

    Args:
        trainer: The trainer of the fit.

    Attributes:
        count: How often the weights were averaged, up to the last call of :meth:`new_shares`.

    Raises:
        ConfigurationError: If the average is no weighted mean of the weights, or if calling the averaging function once
            more might change the fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        found = (getattr(one, "_average_model", None) for one in callbacks)
        self._model = next((model for model in found if isinstance(model, AveragedModel)), None)
        self.count = self._now()
        if self._model is not None:
            for function in (self._model.avg_fn, self._model.multi_avg_fn):
                _check_plain(function)
            _share(self._model, 1)

    @property
    def exists(self) -> bool:
        """Whether the fit keeps an average."""
        return self._model is not None

    @property
    def module(self) -> nn.Module | None:
        """The module with the averaged weights; ``None`` if there is no average, or not yet."""
        return None if self._model is None or not self._now() else self._model.module

    def _now(self) -> int:
        """How often the weights were averaged."""
        return 0 if self._model is None else int(self._model.n_averaged)

    def new_shares(self) -> list[list[float]]:
        """The share of the weights and that of the buffers, for each average since the last call."""
        first, self.count = self.count, self._now()
        if self._model is None:
            return []
        shares = [_share(self._model, count) for count in range(first, self.count)]
        return [[share, share if self._model.use_buffers else 1.0] for share in shares]


def _check_plain(function: Any) -> None:
    """Checks that an averaging function has no memory of its own, since its shares are found by calling it."""
    if function is None or getattr(function, "__module__", None) == swa_utils.__name__:
        return
    code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", ())
    names = () if code is None else code.co_names
    given = [function.__globals__[name] for name in names if name in function.__globals__] if code is not None else []
    if code is None or closure or not all(isinstance(one, ModuleType) for one in given):
        raise ConfigurationError(
            "the averaging function of WeightAveraging may keep a state of its own, so it cannot be called once more to"
            " see what it does. Use get_ema_avg_fn of torch.optim.swa_utils, or a plain function of its arguments"
        )


class _Number(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value], dtype=torch.float64), requires_grad=False)


def _share(model: AveragedModel, count: int) -> float:
    """By which share an average moves towards the weights after ``count`` averages, from those of two numbers."""
    moved = list[float]()
    for average in (0.0, 1.0):
        own = AveragedModel(_Number(average), avg_fn=model.avg_fn, multi_avg_fn=model.multi_avg_fn)
        own.n_averaged.fill_(count)
        own.update_parameters(_Number(1.0 - average))
        moved.extend(float(value) for value in own.module.parameters())
    share = moved[0]
    if abs(moved[1] - (1.0 - share)) > 1e-9:
        raise ConfigurationError(
            "the averaging function of WeightAveraging does not return a weighted mean of the average and the weights."
            " Use get_ema_avg_fn of torch.optim.swa_utils"
        )
    return share
