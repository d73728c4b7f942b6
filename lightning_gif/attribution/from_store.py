"""Influence from a store of gradients, without the training data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..parameters import Targets
from ..reporting.context import CallContext
from ..solvers import Solution, require_finite
from .gradient_store import Chunk, GradientStore, StoredState
from .influence import require_finite_scores, warn_without_gradients
from .predictions import first_predictions, first_tokens
from .ranking import Strongest
from .report import InfluenceReport, first_shown
from .score_store import InMemory
from .storing import weights_mark
from .uncertainty import LEAST_STATES, Spread, agreement_of

__all__ = ["influence_from_store"]


# The most scores that are computed at a time, for one state of the model.
_TOGETHER = 2**23


def influence_from_store(
    objective: Objective,
    query: Examples,
    store: GradientStore,
    *,
    per_example: bool = False,
    positions: Tensor | None = None,
    keep: int | None = None,
    snapshots: bool = True,
    k: int = 10,
    dataset: object = None,
    context: CallContext | None = None,
) -> InfluenceReport:
    """Scores the training examples of a store for a query.

    The score of example ``i`` is ``(1/(n−1)) · (P q)ᵀ(P gᵢ)``, where ``P`` is the projection of the store, see
    :class:`~lightning_gif.curvature.projection.Projection`. Apart from what ``P`` leaves out, and from rounding, it is
    the score of :func:`~lightning_gif.attribution.influence.influence` with ``solver="ekfac"``.

    Args:
        objective: An open objective, which has learned from the probe of the store.
        query: The query's examples.
        store: The store.
        per_example: Whether each example is a query of its own. Otherwise the query is the mean over all examples.
        positions: The positions ``(m,)`` in the store of the examples to score; by default all.
        keep: Keep only the ``keep`` highest and the ``keep`` lowest scores of each query.
        snapshots: Whether to average over all states in the store, or take the present weights only.
        k: How many proponents and opponents the report shows.
        dataset: The training dataset, if it is at hand, to show examples.
        context: The trainer's loggers, step count and process group, for the report.

    Raises:
        BatchError: If the query does not have the structure of the training batches.
        NonFiniteError: If a loss or gradient is not finite.
        ConfigurationError: If the store is of other weights, or a part of it is damaged.
    """
    begin, context, manifest = time.perf_counter(), context or CallContext(), store.manifest
    _check_weights(objective, store)
    objective.check(query, "query", measured=True)
    count = manifest.n_states if snapshots else 1
    states = [_Asked.at(objective, query, store, number, per_example) for number in range(count)]
    found = _scores(objective, store, states, positions, keep)
    facts = states[0].stored.facts
    seconds = time.perf_counter() - begin
    solved = Solution.direct(torch.empty(0), facts["damping"], seconds, solver="ekfac")
    return InfluenceReport(
        scores=found.scores,
        indices=found.indices,
        n_train=manifest.n_stored if positions is None else len(positions),
        solutions=[solved] * len(states[0].coordinates),
        curvature=facts["curvature"],
        targets=Targets.whole(objective.space),
        gradient_share=1.0,
        k=k,
        dataset=dataset,
        queries=first_shown(query, vocabulary=context.vocabulary),
        labels=found.labels,
        predictions=first_predictions(objective, query),
        tokens=first_tokens(objective, query, context.vocabulary),
        settings={
            **asdict(replace(store.settings, damping=facts["damping"])),
            "snapshots": manifest.snapshots if snapshots else [],
            "measures": objective.measures,
            "query_size": len(query),
            "losses": objective.loss.origin,
            "dataset_size": manifest.dataset_size,
            "store": str(store.folder),
            "store_correlation": facts["correlation"],
        },
        seconds=seconds,
        standard_errors=found.standard_errors,
        agreement=found.agreement,
        context=context,
    )


def _check_weights(objective: Objective, store: GradientStore) -> None:
    stored, present = store.manifest.fingerprint["weights"], weights_mark(objective)["weights"]
    if stored != present:
        raise ConfigurationError(
            f"The store at {str(store.folder)!r} belongs to other weights: those of the model have the SHA-256"
            f" {present[:12]}…, the store was written for {stored[:12]}…. Load the checkpoint that it was written for,"
            " undo later edits, or write another store: trainer.store_gradients(…)."
        )


class _Asked(NamedTuple):
    """A query at one state of the model.

    Attributes:
        stored: What the store knows about the state.
        coordinates: The coordinates ``(q, r)`` of the gradient of each query.
        decay: What weight decay adds to each score of a query, ``(q, 1)`` in float64.
    """

    stored: StoredState
    coordinates: Tensor
    decay: Tensor

    @classmethod
    def at(cls, objective: Objective, query: Examples, store: GradientStore, number: int, per_example: bool) -> _Asked:
        stored = store.read_state(number, objective)
        with objective.at_state(stored.state or objective.model_state()):
            found = list(_of_query(objective, query, stored, per_example))
        coordinates, decay = (torch.cat(parts) for parts in zip(*found, strict=True))
        if not per_example:
            coordinates, decay = coordinates.mean(0, keepdim=True), decay.mean(0, keepdim=True)
        require_finite(coordinates, "The gradient of the query")
        weight = store.settings.weight_decay
        return cls(stored, coordinates.cpu(), weight * decay.double().cpu()[:, None])


def _of_query(
    objective: Objective, query: Examples, stored: StoredState, per_example: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields coordinates ``(b, r)`` of the gradients of queries, and their products ``(b,)`` with the decay's iHVP.

    Few gradients are in memory at the same time.
    """
    projection = stored.projection
    if objective.measures == "loss" and stored.decay is None:
        for batch in query.batches():
            rows = projection.of_losses(objective, batch)
            yield rows, rows.new_zeros(len(rows))
        return
    parts = [query]
    if per_example and query.dataset is not None:
        parts = [query.subset(some) for some in torch.arange(len(query)).split(query.batch_size)]
    for part in parts:
        gradients = objective.query_gradients(part, per_example=per_example)
        zero = gradients.new_zeros(len(gradients))
        yield projection.of_gradients(gradients), zero if stored.decay is None else gradients @ stored.decay


class _Found(NamedTuple):
    """Scores, and what belongs to them; the fields are those of the report."""

    scores: Tensor
    indices: Tensor
    labels: Tensor | None
    standard_errors: Tensor | None
    agreement: float | None


def _scores(
    objective: Objective, store: GradientStore, states: list[_Asked], positions: Tensor | None, keep: int | None
) -> _Found:
    """The scores of the examples at some positions of a store, in their order; by default of all."""
    wanted, order = (None, None) if positions is None else positions.sort(stable=True)
    ids, processes = store.ids if wanted is None else store.ids[wanted], objective.processes
    queries, n, with_errors = len(states[0].coordinates), len(ids), len(states) >= LEAST_STATES
    partial = keep is not None and 2 * keep < n
    kept: Strongest | InMemory = InMemory(queries, 0 if partial else n, with_errors=with_errors)
    if keep is not None and partial:
        kept = Strongest(queries, ids, keep, with_errors=with_errors)
    labels, has_labels, nonzero = torch.zeros(n, dtype=torch.long), True, 0.0
    mine = range(store.manifest.n_chunks)[processes.rank :: processes.size]
    blocks = (block for chunk in store.chunks(mine) for block in _blocks(chunk, states, store.manifest.n_train, wanted))
    for block in processes.interleave(blocks):
        stop = block.start + block.scores.shape[1]
        require_finite_scores(block.scores, ids[block.start : stop])
        kept.write(block.start, block.scores, block.errors)
        nonzero += float(block.scores.any())
        has_labels = has_labels and block.labels is not None
        if block.labels is not None:
            labels[block.start : stop] = block.labels
    warn_without_gradients(nonzero)
    if isinstance(kept, Strongest):
        return _Found(*kept.both(), None, kept.standard_errors, kept.agreement.value(len(states)))
    back = torch.arange(n) if order is None else order.argsort()
    scores, errors = kept.scores, kept.standard_errors
    if order is not None:
        scores, errors = scores[:, back], None if errors is None else errors[:, back]
    agreement = agreement_of(scores, errors, len(states))
    return _Found(scores, ids[back], labels[back] if has_labels else None, errors, agreement)


class _Block(NamedTuple):
    """The scores of some examples of a chunk.

    Attributes:
        start: The position of the first one among the examples that are scored.
        scores: ``(n_queries, b)`` in float64.
        errors: Their standard errors; ``None`` for fewer than three states.
        labels: The labels ``(b,)``; ``None`` if the targets are not labels.
    """

    start: int
    scores: Tensor
    errors: Tensor | None
    labels: Tensor | None


def _blocks(chunk: Chunk, states: list[_Asked], n_train: int, wanted: Tensor | None) -> Iterator[_Block]:
    """Yields the scores of the examples of a chunk, of as many at a time as fit into memory.

    Args:
        chunk: The chunk.
        states: The queries at each state.
        n_train: The number of training examples.
        wanted: The sorted positions of the examples to score; ``None`` for all.
    """
    size, first = chunk.values.shape[1], chunk.start
    rows = torch.arange(size)
    if wanted is not None:
        first, stop = torch.searchsorted(wanted, torch.tensor([chunk.start, chunk.start + size])).tolist()
        rows = wanted[first:stop] - chunk.start
    if not len(rows):
        return
    for some in rows.split(max(_TOGETHER // len(states[0].coordinates), 1)):
        spread, total = Spread(), torch.zeros((), dtype=torch.float64)
        for number, one in enumerate(states):
            values = chunk.values[number, some, : one.coordinates.shape[1]].to(one.coordinates)
            part = ((one.coordinates @ values.T).double() + one.decay) / max(n_train - 1, 1)
            spread.add(part)
            total = total + part / len(states)
        yield _Block(first, total, spread.standard_errors(), None if chunk.labels is None else chunk.labels[some])
        first += len(some)
