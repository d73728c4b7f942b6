"""One batch as the model gets it, with its size and the dataset indices of its examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import BatchError
from .structure import batch_size, describe, join, same_form, slice_batch, take, tensors
from .targets import class_targets

__all__ = ["Batch", "joined"]


@dataclass(frozen=True)
class Batch:
    """One batch as the model gets it, with its size and the dataset indices of its examples.

    A subclass may add fields. Each of them must have one row for each example; it is sliced and joined with the data.

    Attributes:
        data: What the collate function returned, prepared for the model.
        ids: The dataset indices of the examples, ``(B,)``.
        size: The number of examples, ``B``.
        divisible: Whether the data have one row for each example. Graphs in one object, lists of images of different
            sizes and batches with time first have not: such a batch is used as a whole.
    """

    data: Any
    ids: Tensor
    size: int
    divisible: bool = field(default=True, kw_only=True)

    @classmethod
    def of(cls, data: Any) -> Batch:
        """A batch of unknown origin: its ids are the positions of its examples.

        Raises:
            BatchError: If its tensors disagree on the number of examples, or if there is no tensor or no example.
        """
        size = batch_size(data)
        return Batch(data, torch.arange(size), size)

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """The examples of several batches of one form (:meth:`same_form`) as one batch, in order."""
        first = batches[0]
        if len(batches) == 1:
            return first
        sizes = [batch.size for batch in batches]
        columns = {name: join([getattr(batch, name) for batch in batches], sizes) for name in first._columns()}
        return replace(first, ids=torch.cat([batch.ids for batch in batches]), size=sum(sizes), **columns)

    @cached_property
    def classes(self) -> Tensor | None:
        """The label of each example, ``(B,)`` on the batch's device; ``None`` if the targets are not labels."""
        return class_targets(self.data)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the batch."""
        held = tensors(list(self._columns().values()))
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def require_rows(self) -> None:
        """Checks that each tensor of the data has one row for each example.

        A loader's collate function may return other structures. These are accepted only with ``influence_loss``.

        Raises:
            BatchError: If the tensors disagree on the number of examples, or if none has a dimension.
        """
        if not self.divisible or batch_size(self.data) != self.size:
            raise BatchError(
                f"This batch of {self.size} examples cannot be divided into them, because its tensors do not have one"
                f" row for each example: {describe(self.data)}. Give its examples as a DataLoader over a map-style"
                " dataset, with the collate function of the training loader: DataLoader(Subset(dataset, indices),"
                " batch_size, collate_fn=…)."
            )

    def slice(self, start: int, stop: int) -> Self:
        """Examples ``start:stop``; the batch itself if these are all of its examples.

        Raises:
            BatchError: If the batch has more examples and is not divisible.
        """
        if start <= 0 and stop >= self.size:
            return self
        self.require_rows()
        ids = self.ids[start:stop]
        parts = {name: slice_batch(value, start, stop) for name, value in self._columns().items()}
        return replace(self, ids=ids, size=len(ids), **parts)

    def take(self, rows: Tensor) -> Self:
        """The examples at positions ``rows`` ``(m,)``, in that order; the batch itself if these are all, in order.

        Raises:
            BatchError: If they are not, and the batch is not divisible.
        """
        if torch.equal(rows, torch.arange(self.size)):
            return self
        self.require_rows()
        parts = {name: take(value, rows) for name, value in self._columns().items()}
        return replace(self, ids=self.ids[rows], size=len(rows), **parts)

    def same_form(self, other: Batch) -> bool:
        """Whether two batches can be joined. They cannot if, for example, they are padded to different lengths."""
        mine, others = self._columns(), other._columns()
        return (
            self.divisible
            and other.divisible
            and mine.keys() == others.keys()
            and all(same_form(mine[name], self.size, others[name], other.size) for name in mine)
        )

    def _columns(self) -> dict[str, Any]:
        """All fields with one row for each example, except the ids."""
        names = [each.name for each in fields(self) if each.name not in ("ids", "size", "divisible")]
        return {name: getattr(self, name) for name in names}


def joined(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    """Joins consecutive batches into larger ones, because one large pass costs less than many small ones.

    Args:
        batches: Batches of any size and form. Only batches of the same form are joined (:meth:`Batch.same_form`).
        most: The largest number of examples in a joined batch. A batch that is larger already is not changed.
    """
    waiting: list[Batch] = []
    for batch in batches:
        fits = sum(one.size for one in waiting) + batch.size <= most
        if waiting and not (fits and waiting[0].same_form(batch)):
            yield Batch.join(waiting)
            waiting = []
        waiting.append(batch)
    if waiting:
        yield Batch.join(waiting)
