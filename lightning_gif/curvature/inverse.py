"""The damped inverse of the curvature, applied to gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import Settings
from ..data.examples import Examples
from ..objective.objective import Objective
from ..solvers import LinearOperator, require_finite
from ..solvers.vectors import norms
from .sampling import curvature_sample
from .streaming import Curvature

# Damping as a share of the largest eigenvalue, see benchmarks/README.md, and products that estimate that.
_DAMPING, _POWER_STEPS = 1e-3, 3


def damped_curvature(
    objective: Objective, train: Examples, settings: Settings, weight_decay: float, on_product: Callable[[], Any]
) -> tuple[Curvature, float]:
    """The curvature over a sample of the training examples, and the damping: as it is given, or measured."""
    examples = curvature_sample(objective, train, settings.sample_size(), settings.curvature_sampling, settings.seed)
    examples = examples.cached(settings.bytes_to_keep(objective))
    curvature = settings.open_curvature(objective, examples, weight_decay=weight_decay, on_product=on_product)
    return curvature, _damping(curvature, settings.seed) if settings.damping is None else settings.damping


def _damping(curvature: LinearOperator, seed: int) -> float:
    """A share of the curvature's largest eigenvalue, in its unit, as a few power iterations show it from below."""
    vector = torch.randn(curvature.shape[0], generator=torch.Generator().manual_seed(seed), dtype=curvature.dtype)
    vector, size = vector.to(curvature.device), 0.0
    for _ in range(_POWER_STEPS):
        length = float(norms(vector))
        if not length:
            return 0.0
        vector = curvature.matvec(vector / length)
        require_finite(vector, "The product of the curvature with a vector")
        size = float(norms(vector))
    return _DAMPING * size
