"""The check that reports of several fits can be averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from ..errors import ConfigurationError
from .record import InfluenceRecord

__all__ = ["check_same_call"]


# Settings on which scores do not depend, or that each fit chooses for itself.
_OF_EACH_FIT = {
    "damping",
    "seed",
    "batch_size",
    "memory",
    "unconverged",
    "snapshots",
    "losses",
    "store",
    "store_correlation",
    "replay_difference",
}

_Report = TypeVar("_Report", bound=InfluenceRecord)


def check_same_call(reports: Sequence[_Report]) -> Sequence[_Report]:
    """Checks that reports are results of the same call after different fits, and returns them.

    Raises:
        ConfigurationError: If they cannot be averaged, see :meth:`InfluenceReport.mean`.
    """
    reports = list(reports)
    if len(reports) < 2:
        raise ConfigurationError(
            f"A mean needs the reports of at least two fits, got {len(reports)}. Fit again with another seed, and make"
            " the same call."
        )
    for number, report in enumerate(reports):
        if not isinstance(report, InfluenceRecord):
            raise ConfigurationError(f"`reports` must be influence reports, but number {number} is {report!r:.80}.")
        if report.n_kept is not None:
            raise ConfigurationError(
                f"Report {number} kept only {report.n_kept} scores of each end of the ranking, which are of other"
                " examples in each fit. Repeat the call without `keep`."
            )
        if report.n_fits > 1:
            raise ConfigurationError(
                f"Report {number} is a mean over {report.n_fits} fits. Average the reports of all single fits at once."
            )
    for number, report in enumerate(reports[1:], 1):
        for what, values, remedy in _compared(reports[0], report):
            if values[0] != values[1]:
                shown = "" if max(len(str(value)) for value in values) > 40 else f" ({values[0]} and {values[1]})"
                raise ConfigurationError(f"Reports 0 and {number} have different {what}{shown}. {remedy}")
    return reports


def _compared(one: InfluenceRecord, other: InfluenceRecord) -> list[tuple[str, list[Any], str]]:
    """What must be the same in two reports: its name, the two values, and what to do about a difference."""
    pair = (one, other)
    same_data = "Score the same training examples after each fit."
    same_query = "Use the same query after each fit."
    compared: list[tuple[str, list[Any], str]] = [
        ("numbers of queries", [len(report.scores) for report in pair], same_query),
        ("labels of queries", [[shown.label for shown in report.queries] for report in pair], same_query),
        ("kinds", ["self-influence" if report.is_self_influence else "influence" for report in pair], same_query),
        ("numbers of training examples", [report.n_train for report in pair], same_data),
        ("training examples", [report.indices.sort().values.tolist() for report in pair], same_data),
        (
            "numbers of averaged states",
            [report.n_states for report in pair],
            "Pass the same `snapshots` in each call, after fits with as many snapshots.",
        ),
    ]
    names = (one.settings.keys() | other.settings.keys()) - _OF_EACH_FIT
    for name in sorted(names):
        values = [report.settings.get(name) for report in pair]
        compared.append((f"values of `{name}`", values, "Make the same call after each fit."))
    return compared
