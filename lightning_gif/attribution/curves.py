"""The picture of when training examples acted on a query, in a report through training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..reporting.charts import LOWERS, RAISES, named
from ..reporting.previews import empty_figure
from .ends import measured, owner
from .picture import headline
from .record import InfluenceRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


# Lines at each end by default, inches, and the opacity of the strongest and of the weakest line.
_MOST_LINES, _SIZE, _OPACITY = 3, (8.0, 4.0), (1.0, 0.35)


def draw(record: InfluenceRecord, query: int = 0, k: int | None = None) -> Figure:
    """Draws the parts of scores by epoch; see :meth:`InfluenceReport.plot_by_epoch`.

    Raises:
        ConfigurationError: If the report has no parts or no such query, or ``k`` is not a whole number of at least 1.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if record.by_epoch is None:
        raise ConfigurationError(
            "The report has no parts of scores by epoch. Reports of trainer.influence(batch, through='training') have"
            " them, if the parts take at most 128 MiB (8 bytes × queries × epochs × training examples). Score fewer"
            " queries in one call."
        )
    record.check_query(query)
    count = record.check_k(k, min(record.k, _MOST_LINES))
    figure = empty_figure(*_SIZE)
    axes = figure.add_subplot()
    epochs = range(record.by_epoch.shape[1])
    for largest, colour in ((True, RAISES), (False, LOWERS)):
        columns = record.columns_of_end(count, largest=largest)[query]
        fades = torch.linspace(*_OPACITY, len(columns)).tolist()
        for column, opacity in zip(columns.tolist(), fades, strict=True):
            values = record.by_epoch[query, :, column].tolist()
            axes.plot(epochs, values, color=colour, alpha=opacity, marker="o", label=_name(record, column, query))
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("part of the score")
    axes.legend(fontsize=8)
    figure.suptitle(headline(record, query), fontsize=12, fontweight="bold", parse_math=False)
    axes.set_title(
        f"The parts of a score from the epochs add up to the predicted change of {owner(record)} {measured(record)}",
        fontsize=8,
    )
    return figure


def _name(record: InfluenceRecord, column: int, query: int) -> str:
    """The dataset index of an example, its label if it is known, and its score."""
    score: Tensor = record.scores[query, column]
    label = "" if record.labels is None else f" ({named(int(record.labels[column]), record.context.class_names)})"
    index = record.indices[column] if record.n_kept is None else record.indices[query, column]
    return f"{int(index)}{label}: {float(score):+.2g}"
