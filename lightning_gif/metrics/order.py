"""The order of two groups of values. It needs PyTorch only."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["twice_in_order"]


def twice_in_order(low: Tensor, high: Tensor) -> Tensor:
    """Twice the number of pairs in which the value of ``high`` is the larger one, where ties count half; exact.

    Divided by twice the number of all pairs, it is an AUROC.

    Args:
        low: Values ``(m,)``.
        high: Values ``(n,)``.
    """
    high = high.sort().values
    above, not_below = (len(high) - torch.searchsorted(high, low, side=side) for side in ("right", "left"))
    return (above + not_below).sum()
