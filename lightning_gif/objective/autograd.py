"""Gradients by reverse mode, and whether two ways to the same gradient agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batch import Batch
from .shadow import Shadow

__all__ = ["close", "differs", "distance", "gradient_of"]


# Two ways to the same derivative differ by less than this share of it, by dtype.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}


def gradient_of(value: Tensor, theta: Tensor, *, retain_graph: bool = False) -> Tensor:
    """The gradient ``(p,)`` of a value ``()`` with respect to ``theta``; zero where it does not depend on that."""
    if not value.requires_grad:
        return torch.zeros_like(theta)
    (gradient,) = torch.autograd.grad(value, theta, retain_graph=retain_graph, materialize_grads=True)
    return gradient


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of losses are equal up to rounding; NaN equals NaN."""
    tolerance = 1e-4 if one.dtype == torch.float32 else 1e-9
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)


def distance(differences: Tensor, lengths: Tensor) -> float:
    """The largest of several differences between gradients that exceeds rounding; 0 if none does.

    A difference that is not finite does not count: it is reported where the gradient is used.

    Args:
        differences: ``(m,)``.
        lengths: Norms ``(m,)`` of the gradients that each of them is between.
    """
    rounding = _ROUNDING.get(lengths.dtype, _ROUNDING[torch.float32])
    return float(torch.where(differences > rounding * lengths, differences, 0.0).max())


def differs(shadow: Shadow, measure: Callable[[Batch], float], batch: Batch) -> bool:
    """Whether two ways to differentiate differ on a batch by more than rounding.

    The gradient of an example that is fitted exactly is rounding alone in float32. So ways that seem to differ are
    compared again in float64, where rounding is smaller and a real difference is not.

    Args:
        shadow: The module.
        measure: The distance between the two on a batch, see :func:`distance`, at the shadow's parameters and in their
            dtype. Infinite if one of them fails.
        batch: The batch.
    """
    narrow = measure(batch)
    if not narrow or math.isinf(narrow):
        return bool(narrow)
    if shadow.theta.dtype == torch.float64 or shadow.device.type == "mps":  # which has no float64
        return True
    try:
        with shadow.in_double():
            return measure(shadow.widened(batch)) > 0.1 * narrow
    except Exception:  # the step itself asks for float32
        return True
