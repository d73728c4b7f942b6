"""The base class of the metrics, and the checks of their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "UnlearningMetric",
    "described",
    "joined",
    "labels_of",
    "log_odds",
    "log_probabilities",
    "mask_of",
    "same_length",
    "targets_of",
]

# The largest distance of a sum of probabilities from 1. A softmax over many classes in half precision needs so much.
_SUM_TOLERANCE = 1e-2


class UnlearningMetric(Metric):
    """The base class of the metrics.

    Values are computed in float32 or higher, even if half precision is the default dtype. ``update`` replaces states
    instead of changing them in place, because a tensor created in inference mode cannot be changed outside it.
    """

    is_differentiable = False
    full_state_update = False

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure | None, Axes]:
        """Draws one value, or a series of values.

        Args:
            val: A result of ``compute`` or ``forward``, or a list of results; by default the result of ``compute``.
            ax: The axes to draw on; by default a new figure is created.

        Returns:
            The figure (``None`` if ``ax`` is given) and the axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return self._plot(val, ax)  # type: ignore[return-value] # torchmetrics' type says arrays of axes too


def described(given: Any) -> str:
    """An input in the words of an error."""
    return f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def labels_of(name: str, given: Tensor) -> Tensor:
    """The predicted labels ``(N,)``, from logits or probabilities ``(N, C)`` or from labels ``(N,)``."""
    if isinstance(given, Tensor):
        if given.ndim == 2 and given.is_floating_point() and given.shape[1] > 1:
            if given.isnan().any():
                raise ConfigurationError(f"`{name}` has NaN, so there is no predicted label; check the model.")
            return given.argmax(1)
        if given.ndim == 1 and not given.is_floating_point() and not given.is_complex():
            return given
    raise ConfigurationError(
        f"`{name}` is {described(given)}; expected logits or probabilities, floating-point (N, C) with a column for"
        " each of two or more classes, or predicted labels, integers (N,). If there is one score for each example, pass"
        " (scores > threshold).long()."
    )


def targets_of(target: Tensor, preds: Tensor) -> Tensor:
    """Checks that true labels ``(N,)`` fit the predictions, and returns them."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex() or target.ndim != 1:
        raise ConfigurationError(
            f"`target` is {described(target)}; expected labels, integers (N,). For one-hot or soft targets, pass"
            " target.argmax(1)."
        )
    if len(target) != len(preds):
        raise ConfigurationError(
            f"`target` has {len(target)} labels for {len(preds)} predictions; expected one label for each prediction."
        )
    below = preds.shape[1] if preds.ndim == 2 else math.inf
    extremes = (int(target.min()), int(target.max())) if len(target) else ()
    if wrong := [label for label in extremes if not 0 <= label < below]:
        raise ConfigurationError(
            f"`target` has the label {wrong[0]}; expected labels from 0 up"
            f"{f', below {below}' if preds.ndim == 2 else ''}. Leave out examples without a label, such as those with"
            " -100."
        )
    return target


def mask_of(name: str, mask: Tensor, size: int) -> Tensor:
    """Checks a mask of the examples ``(N,)``, and returns it."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (size,):
        raise ConfigurationError(
            f"`{name}` is {described(mask)}; expected a mask, torch.bool of shape ({size},), one entry for each"
            " prediction. If it holds 0 and 1, pass it with .bool()."
        )
    return mask


def same_length(preds: Tensor, reference: Tensor) -> None:
    """Checks that two models have predictions for as many examples."""
    if len(preds) != len(reference):
        raise ConfigurationError(
            f"`preds` has {len(preds)} predictions and `reference` {len(reference)}; expected predictions of both"
            " models for the same examples."
        )


def log_probabilities(name: str, given: Tensor, from_logits: bool) -> Tensor:
    """Log-probabilities ``(N, C)`` in float64. In float32, that of a well-fitted example would be rounding error."""
    if not isinstance(given, Tensor) or given.ndim != 2 or not given.is_floating_point() or given.shape[1] < 2:
        raise ConfigurationError(
            f"`{name}` is {described(given)}; expected {'logits' if from_logits else 'probabilities'}, floating-point"
            " (N, C) with a column for each of two or more classes. If there is one logit z for each example, pass"
            " torch.stack([-z / 2, z / 2], 1); for one probability p, pass torch.stack([1 - p, p], 1)."
        )
    given = given.double()
    if from_logits:
        logs = given.log_softmax(1)
        if logs.isnan().any():
            raise ConfigurationError(
                f"`{name}` has logits without a softmax: NaN, +inf, or -inf for all classes; check the model."
            )
        return logs
    total = given.sum(1, keepdim=True)
    if not ((given >= 0).all() and ((total - 1).abs() <= _SUM_TOLERANCE).all()):
        raise ConfigurationError(
            f"`{name}` should be probabilities, but has rows with negative values or NaN, or rows that do not sum to 1;"
            " pass the softmax, or pass logits with from_logits=True."
        )
    return given.log() - total.log()


def log_odds(logs: Tensor, classes: Tensor) -> Tensor:
    """``log(p / (1 − p))`` of one class of each row of log-probabilities, ``(N,)``.

    It ranks examples as ``p`` does, and distinguishes probabilities that are rounded to 1.
    """
    others = logs.scatter(1, classes[:, None], -torch.inf)
    return logs.gather(1, classes[:, None])[:, 0] - others.logsumexp(1)


def joined(scores: list[Tensor] | Tensor) -> Tensor:
    """A list state as one tensor; empty if the list is."""
    return dim_zero_cat(scores) if len(scores) else torch.empty(0)
