"""Gradients by reverse mode, and the comparison of two ways to compute the same gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batch import Batch
from .shadow import Shadow

__all__ = ["close", "differs", "distance", "gradient_of"]


# By dtype: the largest relative difference between two derivatives that counts as rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}


def gradient_of(value: Tensor, theta: Tensor, *, retain_graph: bool = False) -> Tensor:
    """The gradient ``(p,)`` of a scalar with respect to ``theta``; zero where the scalar does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(theta)
    (gradient,) = torch.autograd.grad(value, theta, retain_graph=retain_graph, materialize_grads=True)
    return gradient


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of losses are equal up to rounding; NaN equals NaN."""
    tolerance = 1e-4 if one.dtype == torch.float32 else 1e-9
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)


def distance(differences: Tensor, lengths: Tensor) -> float:
    """The largest difference that exceeds rounding; 0 if none does.

    Non-finite gradients do not count: they are reported where they are used.

    Args:
        differences: Differences between two gradients of the same function, ``(m,)``.
        lengths: The norms of these gradients, ``(m,)``. Rounding is relative to them.
    """
    rounding = _ROUNDING.get(lengths.dtype, _ROUNDING[torch.float32])
    return float(torch.where(differences > rounding * lengths, differences, 0.0).max())


def differs(shadow: Shadow, measure: Callable[[Batch], float], batch: Batch) -> bool:
    """Whether two ways to differentiate give different results on a batch, beyond rounding.

    If an example is fitted exactly, its float32 gradient consists of rounding errors only. So a difference in float32
    is measured again in float64. There rounding errors are smaller, but a real difference is as large as before.

    Args:
        shadow: The module.
        measure: From a batch to the difference between the two results, see :func:`distance`. It is computed at the
            shadow's parameters and in their dtype. Infinite if one of the two ways fails.
        batch: The batch.
    """
    narrow = measure(batch)
    if not narrow or math.isinf(narrow):
        return bool(narrow)
    if shadow.theta.dtype == torch.float64 or shadow.device.type == "mps":  # MPS has no float64
        return True
    try:
        with shadow.in_double():
            return measure(shadow.widened(batch)) > 0.1 * narrow
    except Exception:  # the user's step accepts float32 only
        return True
