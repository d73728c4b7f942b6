"""Sums of scores over groups of training examples: classes, sources, annotators or any other column."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..reporting.charts import named
from ..reporting.contents import Table
from ..reporting.page import Page

if TYPE_CHECKING:
    import pandas

__all__ = ["Grouping", "Groups", "group_numbers", "group_scores", "import_pandas", "values_of"]


Grouping: TypeAlias = "Sequence[Any] | Tensor | Mapping[int, Any] | Callable[[Any], Any]"
"""How training examples are grouped: by one value for each item of the dataset, by a mapping from dataset indices to
values, or by a function of an item."""

_MOST_SHOWN = 10  # groups that are printed of each end of the ranking

_WIDEST_NAME = 30

_COLUMNS = ("group", "total", "examples", "mean")


def import_pandas() -> ModuleType:
    """Imports pandas, which is optional.

    Raises:
        ModuleNotFoundError: If pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to_dataframe() needs pandas: pip install pandas.") from error
    return pandas


class Groups(NamedTuple):
    """Groups of training examples with the sums of their scores, in descending order of these sums.

    Attributes:
        names: The names of the ``g`` groups, as the user gave them.
        totals: The sum of the scores of each group, ``(g,)``: to first order, the change of the query's loss if the
            whole group were removed.
        counts: The number of scored examples in each group, ``(g,)``.
        meaning: The meaning of ``totals`` in words, printed above the table.
        class_names: The name of each class, printed in place of labels, if groups are labels; ``None`` prints
            ``names``.
    """

    names: list[Any]
    totals: Tensor
    counts: Tensor
    meaning: str
    class_names: Sequence[str] | None = None

    @property
    def shown_names(self) -> list[str]:
        """The printed names. A label has the name of its class, if it is known."""
        return [str(name) if self.class_names is None else named(name, self.class_names) for name in self.names]

    @property
    def means(self) -> Tensor:
        """The mean score of each group, ``(g,)``. Unlike totals, means do not grow with the size of a group."""
        return self.totals / self.counts

    def to_dataframe(self) -> pandas.DataFrame:
        """The groups as a table with columns ``group``, ``total``, ``count`` and ``mean``.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        pandas = import_pandas()
        columns = {"total": self.totals.numpy(), "count": self.counts.numpy(), "mean": self.means.numpy()}
        return pandas.DataFrame({"group": pandas.Series(self.names, dtype=object), **columns})

    def _repr_html_(self) -> str:
        parts = zip(self.shown_names, self.totals.tolist(), self.counts.tolist(), self.means.tolist(), strict=True)
        rows = [[name, f"{total:+.3g}", count, f"{mean:+.2g}"] for name, total, count, mean in parts]
        return Page("Scores by group", self.meaning, (), {"": Table(_COLUMNS, rows)}).fragment()

    def __str__(self) -> str:
        names = [textwrap.shorten(name, _WIDEST_NAME, placeholder="…") for name in self.shown_names]
        rows = [
            [name, f"{total:+.3g}", str(count), f"{mean:+.2g}"]
            for name, total, count, mean in zip(
                names, self.totals.tolist(), self.counts.tolist(), self.means.tolist(), strict=True
            )
        ]
        left_out = len(rows) - 2 * _MOST_SHOWN
        if left_out > 1:
            rows[_MOST_SHOWN:-_MOST_SHOWN] = [[f"… {left_out} more", "", "", ""]]
        rows.insert(0, list(_COLUMNS))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.meaning]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
        return "\n".join(lines)


def group_scores(
    names: Iterable[Hashable], scores: Tensor, meaning: str, class_names: Sequence[str] | None = None
) -> Groups:
    """Sums scores over each group, and ranks the groups by these sums.

    Args:
        names: The name of the group of each example.
        scores: The scores ``(n,)``.
        meaning: The meaning of the sums in words.
        class_names: The name of each class, if the groups are labels.

    Raises:
        ConfigurationError: If a name cannot be hashed.
    """
    members, groups = group_numbers(names)
    totals = torch.zeros(len(groups), dtype=scores.dtype).index_add_(0, members, scores)
    counts = torch.bincount(members, minlength=len(groups))
    order = totals.sort(descending=True, stable=True).indices
    return Groups([groups[i] for i in order.tolist()], totals[order], counts[order], meaning, class_names)


def group_numbers(names: Iterable[Hashable]) -> tuple[Tensor, list[Any]]:
    """The number of the group of each example, ``(n,)``, and the names of the groups.

    Raises:
        ConfigurationError: If a name cannot be hashed.
    """
    numbers: dict[Any, int] = {}
    try:
        members = torch.tensor([numbers.setdefault(_plain(name), len(numbers)) for name in names])
    except TypeError as error:
        raise ConfigurationError(
            f"`groups` must give one name or number for each example ({error}). Combine several values into a tuple."
        ) from error
    return members, list(numbers)


def values_of(column: Sequence[Any] | Tensor | Mapping[int, Any], indices: Tensor, size: int | None) -> list[Any]:
    """The values of a column at some dataset indices.

    Args:
        column: One value for each item of the dataset, or a mapping from dataset indices to values.
        indices: The dataset indices, ``(n,)``.
        size: The length of the dataset; ``None`` if unknown.

    Raises:
        ConfigurationError: If the column has another length, more than one axis, or no value for some of the indices.
    """
    wanted: list[int] = indices.tolist()
    if isinstance(column, Mapping):
        missing = [index for index in wanted if index not in column]
        if missing:
            raise ConfigurationError(
                f"`groups` has no value for {len(missing)} of the {len(wanted)} training examples: indices"
                f" {missing[:5]}{' …' if len(missing) > 5 else ''}. Give one for each dataset index that was scored."
            )
        return [column[index] for index in wanted]
    axes = getattr(column, "ndim", 1)
    if axes != 1 or isinstance(column, (str, bytes)) or not (hasattr(column, "tolist") or isinstance(column, Sequence)):
        what = f"an array of {axes} axes" if axes != 1 else repr(column)
        raise ConfigurationError(
            "`groups` must be one value for each item of the training dataset (a list, array or tensor), a mapping from"
            f" dataset indices to values, or a function from an item to its group; got {what}."
        )
    values = column.tolist() if hasattr(column, "tolist") else column  # NumPy, pandas and torch have tolist()
    least = max(wanted) + 1
    if len(values) != size if size is not None else len(values) < least:
        expected = f"{size} (one for each item of the training dataset)" if size is not None else f"at least {least}"
        raise ConfigurationError(
            f"`groups` has {len(values)} values, but {expected} were expected: values are looked up by dataset index,"
            f" which goes up to {least - 1} here. To give values for the {len(wanted)} scored examples alone, pass a"
            " mapping: dict(zip(report.indices.tolist(), values))."
        )
    return [values[index] for index in wanted]


def _plain(name: Any) -> Any:
    """The name of a group, converted so that equal names have equal hashes.

    Tensors and arrays of one value become numbers, because tensors are hashed by identity. Every NaN becomes the same
    object, because NaN does not equal itself. Tables hold missing values as NaN.
    """
    if isinstance(name, (Tensor, np.ndarray, np.generic)) and name.ndim == 0:
        name = name.item()
    return math.nan if isinstance(name, float) and math.isnan(name) else name
