"""Reads the rows of an iterable dataset by their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import TrainingDataError

__all__ = ["Stream"]

# The fields of a row that are taken for its id, in this order.
_ID_FIELDS = ("id", "idx", "index", "uid", "row_id")


class Stream:
    """Reads the rows of an iterable dataset by their ids.

    Reading rows in their order takes one pass over the data. Reading a row before the last one starts a new pass. So
    rows should be read in order, and kept if they are needed again.

    Args:
        dataset: The iterable dataset. It is read once here, to learn the ids and their order.

    Attributes:
        ids: The ids ``(n,)`` in the order of the rows.

    Raises:
        TrainingDataError: If a row has no id, or if two rows have the same id.
    """

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self._dataset = dataset
        self._rows: Iterator[Any] = iter(())
        self._positions: dict[int, int] = {}
        for position, row in enumerate(dataset):
            index = self._id_of(row)
            if index in self._positions:
                raise TrainingDataError(
                    f"Two rows of {self._name} have the id {index}. Each id must belong to one row, and a pass over"
                    " the data must end."
                )
            self._positions[index] = position
        self.ids: Tensor = torch.tensor(list(self._positions), dtype=torch.long)
        self._next = len(self.ids)  # the position of the row that the open pass yields next

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Any:
        """The row with an id.

        Raises:
            TrainingDataError: If the rows come in a different order from before.
        """
        position = self._positions[index]
        if position < self._next:
            self._rows, self._next = iter(self._dataset), 0
        row = None
        while self._next <= position:
            row = next(self._rows, None)
            self._next += 1
        if row is None or self._id_of(row) != index:
            raise TrainingDataError(
                f"{self._name} yields its rows in a different order in each pass. Yield them in the same order, or pass"
                " a DataLoader over a map-style dataset as `dataloader=`."
            )
        return row

    @property
    def _name(self) -> str:
        return type(self._dataset).__name__

    def _id_of(self, row: Any) -> int:
        fields = row if isinstance(row, Mapping) else getattr(row, "__dict__", {})
        for name in _ID_FIELDS:
            value = fields.get(name)
            if isinstance(value, (Tensor, np.ndarray, np.generic)):
                value = value.item() if np.prod(value.shape) == 1 else None
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        given = {name: type(fields[name]).__name__ for name in _ID_FIELDS if name in fields}
        raise TrainingDataError(
            f"{self._name} is an IterableDataset, and its rows have no whole number as id"
            f"{f' (got {given})' if given else ''}, so its examples have no stable index. To score them, yield"
            f" mappings with a whole number as one of {', '.join(map(repr, _ID_FIELDS))}. Or pass a"
            " DataLoader over a map-style dataset as `dataloader=`."
        )
