"""One batch as the model gets it, parsed once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from .structure import batch_size, slice_batch, take
from .targets import class_targets

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """One batch as the model gets it, with what is known of its examples.

    Attributes:
        data: What the collate function returned, prepared for the model.
        ids: The dataset indices of the examples, ``(B,)``.
        size: How many examples there are, ``B``.
    """

    data: Any
    ids: Tensor
    size: int

    @classmethod
    def of(cls, data: Any) -> Self:
        """A batch of unknown origin, whose ids are the positions of its examples.

        Raises:
            BatchError: If it cannot be told how many examples it has, or there are none.
        """
        size = batch_size(data)
        return cls(data, torch.arange(size), size)

    @cached_property
    def classes(self) -> Tensor | None:
        """The label of each example, ``(B,)`` on the batch's device; ``None`` where the targets are no labels."""
        return class_targets(self.data)

    def slice(self, start: int, stop: int) -> Self:
        """Examples ``start:stop``; the batch itself if these are all."""
        if start <= 0 and stop >= self.size:
            return self
        ids = self.ids[start:stop]
        return replace(self, data=slice_batch(self.data, start, stop), ids=ids, size=len(ids))

    def take(self, rows: Tensor) -> Self:
        """The examples at positions ``rows`` ``(m,)``, in that order."""
        return replace(self, data=take(self.data, rows), ids=self.ids[rows], size=len(rows))
