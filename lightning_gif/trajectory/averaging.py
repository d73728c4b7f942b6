"""The average of weights that Lightning's ``WeightAveraging`` keeps during a training (EMA, SWA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
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
    """

    def __init__(self, trainer: Trainer) -> None:
        callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        found = (getattr(one, "_average_model", None) for one in callbacks)
        self._model = next((model for model in found if isinstance(model, AveragedModel)), None)
        self._count = self._now()

    @property
    def module(self) -> nn.Module | None:
        """The module with the averaged weights; ``None`` if there is no average, or not yet."""
        return None if self._model is None or not self._now() else self._model.module

    def _now(self) -> int:
        """How often the weights were averaged."""
        return 0 if self._model is None else int(self._model.n_averaged)

    def new_shares(self) -> list[list[float]]:
        """The share of the weights and that of the buffers, for each average since the last call.

        Raises:
            ConfigurationError: If the average is no weighted mean of the weights.
        """
        first, self._count = self._count, self._now()
        if self._model is None:
            return []
        shares = [_share(self._model, count) for count in range(first, self._count)]
        return [[share, share if self._model.use_buffers else 1.0] for share in shares]


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
            "the averaging function of WeightAveraging is no weighted mean of the average and the weights"
        )
    return share
