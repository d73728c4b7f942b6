"""What a report gives to a logger, whatever the logger is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Contents", "Files", "Lineage", "Table", "check_log_name", "numbers_of", "section_of"]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: The names of the columns.
        rows: The rows, with one value for each column. A picture is an array, ``(H, W)`` or ``(H, W, 3)`` uint8.
        bars: The columns with the names and the values of a bar chart, if the table is one.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    bars: tuple[str, str] | None = None


@dataclass(frozen=True)
class Lineage:
    """The weights before and after an edit. They have digests only: no weights are logged.

    Attributes:
        before: SHA-256 of all weights before the edit.
        after: SHA-256 of all weights after it.
    """

    before: str
    after: str


@dataclass(frozen=True)
class Files:
    """The files of a report, for loggers that keep files.

    Attributes:
        kind: What they are: ``"edit"`` or ``"influence-report"``.
        name: The name of the file or the folder.
        size: About how many bytes they have.
        write: Writes them to a path.
        metadata: Plain values that describe them.
        lineage: Computes the weights that the report leads from and to; ``None`` if it changed none.
    """

    kind: str
    name: str
    size: int
    write: Callable[[Path], None]
    metadata: Mapping[str, Any]
    lineage: Callable[[], Lineage] | None = None


@dataclass(frozen=True)
class Contents:
    """What a report gives to a logger. Each logger takes what it can.

    Attributes:
        section: The start of every key, such as ``"gif_influence"``.
        step: The number of the trainer's optimizer steps.
        axis: The name of the number over which the others are drawn. If no point has it, it is ``step``.
        points: The numbers that are drawn, in order of time.
        state: Texts that describe the present state.
        settings: How the numbers were computed: plain values, by name.
        diagnostics: Numbers and texts about one call, by name, which are not worth a chart each.
        text: The printed report; ``None`` for none.
        draw: Draws the figure; ``None`` for none.
        tables: Tables by name.
        histograms: Values by name, of which the distribution is drawn.
        files: The files of the report; ``None`` for none.
        alert: The title and the text of a message to a person who should look; ``None`` for none.
    """

    section: str
    step: int
    axis: str = "step"
    points: Sequence[Mapping[str, float]] = ()
    state: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    draw: Callable[[], Figure] | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    files: Files | None = None
    alert: tuple[str, str] | None = None

    def all_tables(self) -> dict[str, Table]:
        """The tables by name, with one of the diagnostics, if there are any."""
        if not self.diagnostics:
            return dict(self.tables)
        rows = [[name, value] for name, value in self.diagnostics.items()]
        return {**self.tables, "diagnostics": Table(["name", "value"], rows)}


def section_of(prefix: str, name: str | None) -> str:
    """The section of a report: the prefix, and the name of the call if it has one."""
    return prefix if name is None else f"{prefix}/{name}"


def check_log_name(name: Any) -> None:
    """Checks the ``name`` of a call, which becomes a part of logged keys and of the names of files.

    Raises:
        ConfigurationError: If it is not a text of letters, digits, spaces, ``_``, ``-`` and ``.``, or ``None``.
    """
    if name is None:
        return
    plain = isinstance(name, str) and name.strip(" .") and all(sign.isalnum() or sign in " _-." for sign in name)
    if not plain:
        raise ConfigurationError(
            "`name` must be a text of letters, digits, spaces, '_', '-' and '.', because it becomes a part of logged"
            f" keys, such as 'held-out eights'; got {name!r}."
        )


def numbers_of(values: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Values that are drawn, those of ``names``, and all others."""
    drawn = {name: values[name] for name in names if name in values}
    return drawn, {name: value for name, value in values.items() if name not in drawn}
