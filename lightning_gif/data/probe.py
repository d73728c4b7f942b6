"""A few training examples, together in one batch and each in a batch of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BatchError
from .batch import Batch
from .examples import Examples
from .structure import equal_tensors, equal_values, leaves, same_structure, slice_batch, tensors

__all__ = ["Probe"]


@dataclass(frozen=True)
class Probe:
    """A few training examples, spread over the data, in batches of different sizes.

    Attributes:
        together: A few examples.
        fewer: The first of them, an even number of about half, if there are two.
        singles: Each example in a batch of one: a row of ``together``, or the output of the collate function. Empty if
            that function fails for one example.
        many: More examples, to see what a few may not show.
        divisible: Whether the rows of a batch are its examples.
    """

    together: Batch
    fewer: Batch
    singles: tuple[Batch, ...]
    many: Batch
    divisible: bool

    @property
    def is_ragged(self) -> bool:
        """Whether a batch holds tensors for each of its examples, as a list of images of different sizes does."""
        return any(len(tensors(self.together.data)) != len(tensors(single.data)) for single in self.singles)

    @property
    def counts_rows(self) -> bool:
        """Whether the first dimension of the tensors of a batch is its number of examples."""
        sizes = {tensor.shape[0] for tensor in tensors(self.together.data) if tensor.ndim}
        return sizes == {self.together.size}

    @classmethod
    def of(cls, train: Examples, count: int, most: int) -> Probe:
        """Reads the examples once, and collates them in several ways.

        Args:
            train: The training examples.
            count: How many are few.
            most: How many are many.
        """
        positions, wide = (_spread(len(train), size) for size in (count, most))
        if train.dataset is None:
            together, many = (Batch.join(list(train.subset(chosen).batches())) for chosen in (positions, wide))
            return cls.of_rows(together, many)
        items = {int(index): train.dataset[int(index)] for index in train.ids[torch.cat([positions, wide]).unique()]}

        def batch(chosen: Tensor) -> Batch:
            ids = train.ids[chosen]
            data = train.prepare(train.collate([items[int(index)] for index in ids]))
            return Batch(data, ids, len(ids), divisible=False)

        together = batch(positions)
        try:
            alone = tuple(batch(positions[row : row + 1]) for row in range(len(positions)))
        except Exception:  # a collate function may need several examples
            alone = ()
        # A collate function that draws at random makes other values each time, but rows all the same.
        draws = not equal_tensors(together.data, batch(positions).data)
        if not _rows_are_examples(together, None if draws or not alone else alone):
            return cls(together, batch(positions[: _half(len(positions))]), alone, batch(wide), False)
        return cls.of_rows(replace(together, divisible=True), replace(batch(wide), divisible=True))

    @classmethod
    def of_rows(cls, together: Batch, many: Batch) -> Probe:
        """The probe of batches whose rows are their examples."""
        singles = tuple(together.slice(row, row + 1) for row in range(together.size))
        return cls(together, together.slice(0, _half(together.size)), singles, many, True)


def _half(count: int) -> int:
    """An even number of about half of ``count``, if that is two or more."""
    return min(2 * ((count + 2) // 4), count) or 1


def _spread(size: int, count: int) -> Tensor:
    """Positions from the first to the last of ``size`` examples, at most ``count``."""
    return torch.linspace(0, size - 1, min(count, size)).long().unique()


def _rows_are_examples(together: Batch, singles: tuple[Batch, ...] | None) -> bool:
    """Whether each row of a batch is what the collate function makes of one example, except for padding.

    Without ``singles`` only the structure is looked at.
    """
    if not all(_is_plain(leaf) for leaf in leaves(together.data)):
        return False
    try:
        replace(together, divisible=True).require_rows()
        parts = [slice_batch(together.data, row, row + 1) for row in range(together.size)]
    except BatchError:
        return False
    if singles is None:
        return True
    return all(_is_padded(part, single.data) for part, single in zip(parts, singles, strict=True))


def _is_plain(leaf: Any) -> bool:
    """Whether a part of a batch has rows, or is a value that all examples share."""
    return leaf is None or isinstance(leaf, (Tensor, str, bytes, bool, int, float, complex, np.generic))


def _is_padded(part: Any, single: Any) -> bool:
    """Whether the tensors of one structure begin with those of another."""
    if not same_structure(part, single):
        return False
    pairs = list(zip(tensors(part), tensors(single), strict=True))
    if any(one.shape[i] < size for one, other in pairs for i, size in enumerate(other.shape)):
        return False
    return all(equal_values(one[tuple(slice(size) for size in other.shape)], other) for one, other in pairs)
