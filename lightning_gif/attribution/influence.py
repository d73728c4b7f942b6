"""From a query batch to a score for every training example."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._compat import rank_zero_info, rank_zero_warn
from ..config import Settings
from ..curvature.by_solver import inverse_for_queries
from ..curvature.memory import is_large
from ..curvature.methods import METHODS
from ..data.batch import Batch
from ..data.examples import Examples
from ..data.identity import data_digest, fingerprints
from ..distributed import ProcessGroup
from ..errors import ConfigurationError, GIFWarning, NonFiniteError
from ..objective.objective import Objective
from ..objective.shadow import ModelState
from ..parameters import Targets, state_digest
from ..reporting.context import CallContext
from ..solvers import Solution
from ..storage.digests import Fingerprint, digest
from .ranking import Strongest
from .report import InfluenceReport, first_shown
from .score_store import InMemory, ScoreStore

__all__ = ["influence"]


# Bytes of one score, and characters of a fingerprint's digest that name a folder.
_BYTES, _NAMED = 8, 16


def influence(
    objective: Objective,
    train: Examples,
    query: Examples,
    settings: Settings,
    choose_targets: Callable[[], Targets],
    *,
    per_example: bool = False,
    among: Examples | None = None,
    scores_to: Path | None = None,
    spill_to: Path | None = None,
    keep: int | None = None,
    states: Mapping[int, Mapping[str, Tensor]] | None = None,
    k: int = 10,
    context: CallContext | None = None,
) -> InfluenceReport:
    """Scores training examples for a query.

    The score of example ``i`` is ``(1/(n−1)) · qᵀ x(∇ℓ(zᵢ))``: what removing ``i`` would do to the query's mean
    measurement, to first order. Here ``q`` is the query's gradient on the target parameters, and ``x(g)`` the change of
    these that a method gives for a gradient ``g`` (GIF, arXiv 2312.05586, equation 6). ``x`` is linear in ``g``, so
    that one solve with its adjoint gives the query's iHVP ``w``, with ``wᵀ∇ℓ(zᵢ) = qᵀ x(∇ℓ(zᵢ))``; one pass over the
    training set then gives all of these inner products.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        query: The query's examples.
        settings: Method, solver and their parameters.
        choose_targets: Called for the target parameters, unless the method changes all parameters.
        per_example: One query for each example, instead of one for their mean.
        among: The training examples to score; by default all.
        scores_to: A folder for the scores, see :class:`~lightning_gif.attribution.score_store.ScoreStore`; by default
            they are in memory. Of several processes the first one writes it, and all must see it.
        spill_to: The folder below which the scores get one of their own if they would take much of the free memory.
        keep: Keep only so many of either end of each query's ranking.
        states: Earlier states of the module by epoch. Scores are the mean over these and the present weights; each
            state has its own solve.
        k: How many proponents and opponents the report shows.
        context: What the report knows of the trainer.

    Raises:
        BatchError: If the query is not structured as training batches are.
        NonFiniteError: If a loss, gradient or product is not finite.
        ObjectiveError: If the query does not depend on the target parameters.
        ConfigurationError: For ``method="sif"``, which has no scores for single examples; or if ``scores_to`` holds
            something else.
        ConvergenceError: If a solve diverged, or did not converge and ``unconverged="raise"``.
    """
    begin = time.perf_counter()
    objective.check(query, "query", measured=True)
    call = _Call(
        objective,
        train,
        query,
        settings,
        METHODS[settings.method].targets(objective.space, choose_targets),
        per_example,
        scored=train if among is None else among,
        states=[objective.model_state(), *map(objective.model_state, (states or {}).values())],
    )
    partial = keep is not None and 2 * keep < len(call.scored)
    store = _open_store(call, scores_to, None if partial else spill_to)
    solved = [_solved_at(call, number, store) for number in range(len(call.states))]
    if keep is not None and partial:
        strongest = Strongest(call.n_queries, call.scored.ids, keep)
        _score(call, solved, strongest, store)
        scores, indices = strongest.both()
    else:
        kept = store or InMemory(call.n_queries, len(call.scored))
        _score(call, solved, kept, store)
        scores, indices = kept.scores, call.scored.ids
    present = solved[0]
    return InfluenceReport(
        scores=scores,
        indices=indices,
        n_train=len(call.scored),
        solutions=present.solutions,
        curvature=present.curvature,
        targets=call.targets,
        k=k,
        dataset=train.dataset,
        queries=first_shown(query),
        settings={
            **asdict(replace(settings, damping=present.damping)),
            "snapshots": list(states or {}),
            "measures": objective.measures,
        },
        seconds=time.perf_counter() - begin,
        context=context or CallContext(),
    )


@dataclass(frozen=True)
class _Call:
    """One call of :func:`influence`.

    Attributes:
        objective, train, query, settings, per_example: See there.
        targets: The target parameters.
        scored: The training examples to score.
        states: The states of the module over which scores are averaged, the present one first.
    """

    objective: Objective
    train: Examples
    query: Examples
    settings: Settings
    targets: Targets
    per_example: bool
    scored: Examples
    states: list[ModelState]

    @property
    def n_queries(self) -> int:
        return len(self.query) if self.per_example else 1

    @property
    def n_bytes(self) -> int:
        """The size of all scores."""
        return _BYTES * self.n_queries * len(self.scored)

    def fingerprint(self) -> Fingerprint:
        """What the scores depend on. Of the training data, the indices and a sample of the examples count."""
        states = [digest({"theta": state.theta, **state.statistics}) for state in self.states]
        return {
            "weights": digest({}, [state_digest(self.objective.module), states[0]]),  # with frozen parameters
            "snapshots": digest({}, states[1:]),
            "training data": data_digest(self.train),
            "the examples that are scored": digest({"ids": self.scored.ids}),
            "queries": digest({}, [mark.hex() for mark in fingerprints(self.query)]),
            "per_example": str(self.per_example),
            "target parameters": digest(dict(self.targets)),
            **self.settings.fingerprint(),
        }


def _open_store(call: _Call, scores_to: Path | None, spill_to: Path | None) -> ScoreStore | None:
    """The store for the scores; ``None`` if they are kept in memory."""
    processes = call.objective.processes
    spills = spill_to is not None and is_large(call.settings, call.n_bytes, processes)
    if scores_to is None and not spills:
        return None
    mark = processes.broadcast(call.fingerprint())
    folder = scores_to or spill_to / digest({}, mark)[:_NAMED]  # type: ignore[operator]
    store = _open_everywhere(processes, folder, call.n_queries, len(call.scored), mark)
    if scores_to is None:
        rank_zero_info(
            f"The scores take {call.n_bytes / 2**30:.1f} GiB, and are in {folder}. If this call is interrupted, the"
            " same call continues there. Delete the folder once the report is no longer needed."
        )
    return store


def _open_everywhere(
    processes: ProcessGroup, folder: Path, queries: int, examples: int, mark: Fingerprint
) -> ScoreStore:
    """The store, which the first process opens and writes, and the others read."""
    if processes.rank == 0:
        store = ScoreStore.open(folder, queries, examples, mark)
    processes.gather(None)  # it is there now
    if processes.rank > 0:
        if not folder.exists():
            raise ConfigurationError(
                f"Rank {processes.rank} does not see the folder {folder}, which rank 0 has opened for the scores."
                " Give one that all processes see, on a file system that the machines share."
            )
        store = ScoreStore.open(folder, queries, examples, mark)
    return store


# ----------------------------------------------------------------------------------------------------------------------
# Solving for the queries
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class SolvedQueries:
    """The iHVPs of all queries at one state of the model.

    Attributes:
        ihvps: ``(n_queries, p)``; ``(0, p)`` if an earlier call has used them for all scores.
        solutions: How the solve for each query went.
        curvature: How the curvature was computed.
        damping: ``λ``.
    """

    ihvps: Tensor
    solutions: list[Solution]
    curvature: dict[str, Any]
    damping: float

    def record(self) -> dict[str, Any]:
        """All but the iHVPs, in plain values."""
        return {
            "solutions": [solution.record() for solution in self.solutions],
            "curvature": self.curvature,
            "damping": self.damping,
        }

    @classmethod
    def load(cls, store: ScoreStore, state: int, objective: Objective) -> SolvedQueries | None:
        """Those that an earlier call has stored for a state; ``None`` if there are none, or not on all processes."""
        stored = store.load_directions(state, objective.space.size)
        # The first process decides: on a shared file system another one may see a file later.
        if objective.processes.broadcast(stored is None) or stored is None:
            return None
        ihvps, record = stored
        with store.parse_errors_name(state):
            solutions = [Solution.of_record(one) for one in record["solutions"]]
            return cls(ihvps.to(objective.device), solutions, record["curvature"], record["damping"])

    def save(self, store: ScoreStore, state: int) -> None:
        """Stores them for a state."""
        store.save_directions(state, self.ihvps, self.record())

    def save_record(self, store: ScoreStore, state: int) -> None:
        """Stores all but the iHVPs for a state, which are no longer needed once all scores are there."""
        if len(self.ihvps):
            store.save_directions(state, self.ihvps[:0], self.record())


def _solved_at(call: _Call, number: int, store: ScoreStore | None) -> SolvedQueries:
    """The iHVPs at one of the states: loaded from the store, or else computed and stored."""
    stored = None if store is None else SolvedQueries.load(store, number, call.objective)
    if stored is not None:
        return stored
    with call.objective.at_state(call.states[number]):
        solved = _solve(call)
    if store is not None and call.objective.processes.rank == 0:
        solved.save(store, number)
    return solved


def _solve(call: _Call) -> SolvedQueries:
    """The iHVPs at the objective's present state."""
    objective, settings = call.objective, call.settings
    method, positions = METHODS[settings.method], call.targets.flat(objective.space).to(objective.device)
    with objective.progress("Hessian products") as bar:
        inverse_class = inverse_for_queries(settings)
        inverse = inverse_class.fit(objective, call.train, settings, method, positions, on_product=bar.update)
        gradients = objective.query_gradients(call.query, per_example=call.per_example)
        blocks = [inverse.ihvp(block) for block in gradients.split(inverse.block_size or len(gradients))]
        solutions = [solution for _, of_block in blocks for solution in of_block]
        if len(solutions) != len(gradients):
            raise ConfigurationError(
                f"{inverse_class.__name__}.ihvp must give one Solution for each gradient, got {len(solutions)} for"
                f" {len(gradients)} gradients."
            )
        return SolvedQueries(
            ihvps=torch.cat([ihvps for ihvps, _ in blocks]),
            solutions=solutions,
            curvature=inverse.summary(),
            damping=inverse.damping,
        )


# ----------------------------------------------------------------------------------------------------------------------
# Scoring the training examples
# ----------------------------------------------------------------------------------------------------------------------


def _score(
    call: _Call, solved: list[SolvedQueries], kept: Strongest | ScoreStore | InMemory, store: ScoreStore | None
) -> None:
    """One pass over the training examples, which writes all scores that are not stored yet."""
    objective, processes = call.objective, call.objective.processes
    objective.learn_derivatives(call.train)
    scoring = _ScoringPass(call, solved, None if store is None else store.done.clone())
    with objective.progress("Scoring training examples", len(call.scored)) as bar:
        for start, stop, block in processes.interleave(scoring.blocks()):
            if block is not None and (store is None or processes.rank == 0):  # one process writes a file
                kept.write(start, block)
            bar.update(stop - start)
    warn_without_gradients(processes.total(scoring.any_gradient))
    if store is not None and processes.rank == 0:
        for number, one in enumerate(solved):
            one.save_record(store, number)


class _ScoringPass:
    """The scores of this process's examples, batch by batch.

    Args:
        call: The call.
        solved: The iHVPs at each state.
        done: ``(n,)``, which scores are stored already; ``None`` for none.

    Attributes:
        any_gradient: Above 0 once some training example has shown an inner product that is not zero.
    """

    def __init__(self, call: _Call, solved: list[SolvedQueries], done: Tensor | None) -> None:
        self._call, self._solved, self._done = call, solved, done
        self.any_gradient = 0.0 if done is None else float(done.any())
        # Weight decay does not become less if one example is removed, so that each example's loss carries its share.
        self._decays = [
            call.settings.weight_decay * (one.ihvps @ state.theta).double().cpu()[:, None]
            for state, one in zip(call.states, solved, strict=True)
        ]

    def blocks(self) -> Iterator[tuple[int, int, Tensor | None]]:
        """For each batch its first position, the position after its last, and the scores; ``None`` if all are done."""
        start, _ = self._call.scored.shard
        for batch in self._call.scored.local_batches():
            stop = start + batch.size
            done = self._done is not None and bool(self._done[start:stop].all())
            yield start, stop, None if done else self._scores(batch)
            start = stop

    def _scores(self, batch: Batch) -> Tensor:
        """``(n_queries, b)``, float64."""
        call = self._call
        block = torch.zeros(call.n_queries, batch.size, dtype=torch.float64)
        for state, one, decay in zip(call.states, self._solved, self._decays, strict=True):
            with call.objective.at_state(state):
                part = call.objective.directional_derivatives(batch, one.ihvps).cpu().double()
            self.any_gradient += float(part.any())
            block += (part + decay) / len(call.states)
        block /= max(len(call.train) - 1, 1)
        require_finite_scores(block, batch.ids)
        return block


def require_finite_scores(scores: Tensor, ids: Tensor) -> None:
    """Raises a :class:`~lightning_gif.errors.NonFiniteError` that names examples whose scores ``(q, b)`` are NaN."""
    bad = ids[~torch.isfinite(scores).all(0).cpu()]
    if len(bad):
        raise NonFiniteError(
            f"The scores of {len(bad)} training examples are not finite, at dataset indices"
            f" {', '.join(map(str, bad[:5].tolist()))}{' …' if len(bad) > 5 else ''}: their losses have no finite"
            " derivative (NaN in the data, or an overflow: try double=True). Score the others with `among`."
        )


def warn_without_gradients(nonzero: float) -> None:
    """Warns unless some of the training examples had an effect that is not exactly zero."""
    if not nonzero:
        rank_zero_warn(
            "The gradient of each scored training example is exactly zero in the directions that matter to the query:"
            " all scores are zero, or the weight decay's alone. The losses of these examples do not depend on the"
            " parameters there: units may be dead (a ReLU that no example activates), or the loss may be constant or"
            " detached.",
            category=GIFWarning,
        )
