"""How an influence report is printed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..curvature.methods import METHODS
from ..data.streams import Stream
from ..reporting.charts import named
from ..reporting.notes import describe_share, describe_solve
from ..solvers import Status
from .ends import End, ends_of, measured, owner
from .picture import is_mean, reading, strongest_tokens, sums_by_class
from .record import MOST_QUERIES, InfluenceRecord
from .uncertainty import LEVEL

__all__ = ["rows", "short_text", "text"]


# With more classes, the text of a report has no sums by class.
_MOST_CLASSES = 20


def text(record: InfluenceRecord) -> str:
    """The report as text, with the proponents and opponents of up to eight queries."""
    queries = record.scores.shape[0]
    on = "themselves" if record.is_self_influence else _counted(queries)
    if record.n_fits > 1:
        each = f" of {record.n_states} states each" if record.n_states > 1 else ""
        averaged = f", averaged over {record.n_fits} fits{each}"
    else:
        averaged = f", averaged over {record.n_states} states of training" if record.n_states > 1 else ""
    removed = "left out of this run" if record.is_through_training else "removed"
    lines = [
        f"Influence of {record.n_train} training examples on {on}{averaged} ({record.seconds:.1f} s)",
        _through(record)
        or f"computed over {_parameters(record)} by the method {record.settings['method']!r}{_solve(record)}",
        f"score = predicted change of {owner(record)} {measured(record)} if the example were {removed}; each example is"
        f" given by {_numbering(record)}",
    ]
    if "store" in record.settings:
        correlation = record.settings["store_correlation"]
        known = "" if correlation is None else f"; their correlation with full scores is about {correlation:.3f}"
        lines.append(f"from the store of gradients at {record.settings['store']!r}{known}")
    if "losses" in record.settings:
        lines.append(f"losses of single examples: {record.settings['losses']}")
    ends, uncertain = ends_of(record), False
    for query in range(min(queries, MOST_QUERIES)):
        lines += _reading(record, query)
        for name, end in ends.items():
            amounts = end.amounts(query, brackets=True)
            uncertain |= any(amount.endswith("?") for amount in amounts)
            pairs = zip(_names(record, end.indices[query]), amounts, strict=True)
            start = name if queries == 1 else f"query {query} {name}"
            lines.append(f"{start}: " + ", ".join(f"{index} {amount}" for index, amount in pairs))
        lines += _by_class(record, query)
    if queries > MOST_QUERIES:
        lines.append(f"and {queries - MOST_QUERIES} more queries, see proponents() and opponents()")
    return "\n".join([*lines, *_error_notes(record, uncertain)])


def _through(record: InfluenceRecord) -> str | None:
    """How the scores of a recorded run were computed; ``None`` for other scores."""
    if not record.is_through_training:
        return None
    steps, difference = record.settings["steps"], record.settings["replay_difference"]
    same = "bit for bit" if not difference else f"with weights that differ by {difference:.1g} of their norm"
    return f"the exact derivative through the {steps} optimizer steps of this run, which were replayed {same}"


def _reading(record: InfluenceRecord, query: int) -> Iterator[str]:
    """The line on the label of a query and how the model reads it, if either is known."""
    if query < len(record.queries) and (read := reading(record, query)):
        queries = len(record.scores)
        start = f"query {query}" if queries > 1 else "query, its first example" if is_mean(record) else "query"
        yield f"{start}: {read[:1].lower()}{read[1:]}"
    tokens = strongest_tokens(record, query)
    if tokens and not is_mean(record):
        shown = ", ".join(f"{token} {effect:+.2g}" for token, effect in tokens)
        yield f"predicted change of its loss without one of its tokens: {shown}"


def _by_class(record: InfluenceRecord, query: int) -> Iterator[str]:
    """The line with the sums of the scores of a query by class, if there are few classes."""
    sums = None if record.is_self_influence else sums_by_class(record, query)
    if sums is not None and 1 < len(sums.names) <= _MOST_CLASSES:
        names = record.context.class_names
        parts = zip(sums.names, sums.totals.tolist(), strict=True)
        start = "sum of scores by class" if len(record.scores) == 1 else f"query {query}, sum of scores by class"
        yield f"{start}: " + ", ".join(f"{named(label, names)} {total:+.2g}" for label, total in parts)


def _error_notes(record: InfluenceRecord, uncertain: bool) -> Iterator[str]:
    """The lines on the error bars, or on how to get them.

    Args:
        record: The report.
        uncertain: Whether a shown score has an interval that contains 0.
    """
    if record.is_through_training and record.standard_errors is None:
        yield (
            "about this run: the same seed and order of batches. Without `through`, trainer.influence is about training"
            " again"
        )
        if record.leave_outs is None:
            yield (
                "not tested: leave_outs=4 replays the run without some random examples, and says whether the scores"
                " predict it"
            )
        else:
            yield f"{record.leave_outs}"
        return
    if record.standard_errors is None:
        if record.n_states == 1 and not record.is_self_influence:
            yield (
                "scores of the present weights alone; averaged with a snapshot, which GIFCallback keeps in fit, they"
                " would predict retraining better"
            )
        if record.is_self_influence:
            yield (
                "no error bars: they need several fits (InfluenceReport.mean), or GIFCallback(snapshots=2) and then"
                " trainer.self_influence(snapshots=True)"
            )
        else:
            yield "no error bars: they need several fits (influence_over_fits), or one with GIFCallback(snapshots=2)"
        return
    averaged = f"{record.n_averaged} {'fits' if record.n_fits > 1 else 'states'}"
    source = averaged if record.n_fits > 1 else f"{averaged} of one fit (too narrow to cover other fits)"
    mark = "; ? = interval contains 0, sign uncertain" if uncertain else ""
    yield f"± = {LEVEL * 100:.0f} % interval from {source}{mark}"
    if record.agreement is not None:
        yield f"agreement of the {averaged}: {record.agreement:.2f} (1: the same scores, 0: nothing in common)"


def _parameters(record: InfluenceRecord) -> str:
    """The number of target parameters, and the share of the gradient that they hold, if it is known.

    If the method has no targets, the number is that of all parameters.
    """
    method = METHODS.get(record.settings["method"])
    if method is not None and not method.selects:
        return f"all {record.targets.count} parameters"
    held = describe_share(record.gradient_share)
    mean = " on average" if held and (record.is_self_influence or record.scores.shape[0] > 1) else ""
    return f"{record.targets.count} target parameters" + (f" ({held}{mean})" if held else "")


def _numbering(record: InfluenceRecord) -> str:
    """What the indices of a report are."""
    if isinstance(record.dataset, Stream):
        return "the id of its row"
    below = record.innermost_indices()
    return "its dataset index" if below is None else "its index in the training Subset [and in the dataset below it]"


def _names(record: InfluenceRecord, indices: Tensor) -> list[str]:
    """Indices ``(k,)`` as text, each with the index in the dataset below a ``Subset`` in brackets."""
    below = record.innermost_indices(indices)
    if below is None:
        return [str(index) for index in indices.tolist()]
    return [f"{index} [{inner}]" for index, inner in zip(indices.tolist(), below.tolist(), strict=True)]


def _solve(record: InfluenceRecord) -> str:
    """How the linear system was solved, or how the curvature was inverted."""
    solution = record.solution
    if solution is None:
        return f"; inverse of the curvature: {record.curvature['inverse']}" if "inverse" in record.curvature else ""
    # Without `rtol` a solve takes a fixed number of iterations, so reaching `max_iter` is not a failure to converge.
    fixed = solution.status is Status.MAX_ITER and record.settings.get("rtol") is None
    status = None if fixed else solution.status
    return f" and the solver {describe_solve(solution.solver, status, solution.iterations, solution.residual)}"


def short_text(record: InfluenceRecord) -> str:
    """The size of the report, the strongest proponent and the strongest opponent, in one line."""
    queries = record.scores.shape[0]
    size = f"{_counted(queries)} × {record.n_train} training examples"
    ends = []
    for name, end, best in (
        ("proponent", End.of(record, 1, largest=True), torch.argmax),
        ("opponent", End.of(record, 1, largest=False), torch.argmin),
    ):
        query = int(best(end.scores))
        of = "" if queries == 1 else f" of query {query}"
        (amount,) = end.amounts(query, brackets=True)
        ends.append(f"strongest {name}{of} {int(end.indices[query, 0])} {amount}")
    solved = f", solver {record.solution.solver!r} ({record.solution.status})" if record.solution else ""
    size = f"{record.n_train} training examples for themselves" if record.is_self_influence else size
    return f"InfluenceReport({size}, {', '.join(ends)}, method {record.settings['method']!r}{solved})"


def _counted(queries: int) -> str:
    return f"{queries} quer{'y' if queries == 1 else 'ies'}"


def rows(record: InfluenceRecord) -> Iterator[list[Any]]:
    """The rows of the table of examples: query, kind, rank, dataset index, score, target, and picture or text.

    With standard errors, the ends of the interval follow the score.
    """
    several = record.scores.shape[0] > 1
    none = [] if record.standard_errors is None else [None, None]
    for position, shown in enumerate(record.queries):
        yield [position if several else 0, "query", position + 1, None, None, *none, shown.label, shown.look]
    for kind, largest in (("proponent", True), ("opponent", False)):
        end = End.of(record, largest=largest)
        values = torch.stack([end.scores, *(end.intervals or ())], dim=2)
        for query, (indices, of_query) in enumerate(zip(end.indices, values, strict=True)):
            if query == MOST_QUERIES:
                break
            for rank, (index, numbers) in enumerate(zip(indices.tolist(), of_query.tolist(), strict=True), 1):
                shown = record.shown(index)
                yield [query, kind, rank, index, *numbers, shown.label, shown.look]
