"""Influence: a score of every training example for a query."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._compat import rank_zero_info, rank_zero_warn
from ..config import Settings
from ..curvature.by_solver import inverse_for_queries
from ..curvature.energy import gradient_share
from ..curvature.inverse import InverseCurvature
from ..curvature.methods import METHODS
from ..curvature.sampling import sample_size
from ..data.batch import Batch
from ..data.examples import Examples
from ..data.identity import data_digest, fingerprints
from ..errors import ConfigurationError, GIFWarning, NonFiniteError
from ..objective.memory import is_large
from ..objective.objective import Objective
from ..objective.shadow import ModelState
from ..parameters import Targets, state_digest
from ..reporting.context import CallContext
from ..solvers import SOLVERS, Solution
from ..storage.digests import Fingerprint, digest
from .predictions import first_predictions, first_tokens
from .ranking import Strongest
from .record import TokenScores
from .report import InfluenceReport, first_shown
from .score_store import InMemory, ScoreStore
from .token_scores import token_scores
from .uncertainty import LEAST_STATES, Spread, agreement_of

__all__ = ["PRODUCTS", "SCORES", "SolveStage", "influence"]


# The stages of a call, as its progress names them.
PRODUCTS, SCORES = "Curvature", "Scoring training examples"

# The work of a product with the curvature of one example, if that of a directional derivative of its loss is 1.
_PRODUCT = 2.0

# The work of scores for one more query, which shares passes with the others, if that of scores for one query is 1.
_FURTHER = 1 / 3

# The bytes of one score, and the number of characters of a digest in the name of a folder.
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
    tokens: bool = False,
    context: CallContext | None = None,
) -> InfluenceReport:
    """Scores training examples for a query.

    The score of example ``i`` is ``(1/(n−1)) · qᵀ x(∇ℓ(zᵢ))``. To first order, this is the change of the query's mean
    measurement if example ``i`` were removed. Here ``q`` is the gradient of the query's measurement with respect to the
    target parameters. ``x(g)`` is the change of these parameters that the method computes for a gradient ``g`` (GIF,
    arXiv 2312.05586, equation 6). Because ``x`` is linear, one solve with its adjoint gives the query's iHVP ``w``:
    ``wᵀ∇ℓ(zᵢ) = qᵀ x(∇ℓ(zᵢ))``. One pass over the training examples then gives all scores.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        query: The query's examples.
        settings: Method, solver and their parameters.
        choose_targets: Returns the target parameters. It is not called if the method uses all parameters.
        per_example: Whether each example is a query of its own. Otherwise the query is the mean over all examples.
        among: The training examples to score; by default all.
        scores_to: A folder for the scores, see :class:`~lightning_gif.attribution.score_store.ScoreStore`; by default
            they are kept in memory. In a distributed run the first process writes the folder, and all must see it.
        spill_to: If the scores would take much of the free memory, they are written to a new folder inside this one.
        keep: Keep only the ``keep`` highest and the ``keep`` lowest scores of each query.
        states: Snapshots by epoch. Scores are the mean over the snapshots and the present weights. Each state has its
            own solve.
        k: How many proponents and opponents the report shows.
        tokens: Whether the report has the scores of the tokens of these.
        context: The trainer's loggers, step count and process group, for the report.

    Raises:
        BatchError: If the query does not have the structure of the training batches.
        NonFiniteError: If a loss, gradient or product is not finite.
        ObjectiveError: If the query does not depend on the target parameters.
        ConfigurationError: If ``method="sif"``, which has no scores for single examples; or if ``scores_to`` holds
            other files, or scores of another call.
        ConvergenceError: If a solve diverged, or did not converge and ``unconverged="raise"``.
    """
    begin = time.perf_counter()
    context = context or CallContext()
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
    found = _all_scores(call, solved, store, keep if partial else None)
    report = _report_of(call, solved, found, None if partial else call.scored.classes, k, list(states or {}), context)
    report.train_tokens = _token_scores(call, solved, report) if tokens else {}
    report.seconds = time.perf_counter() - begin
    return report


def _report_of(
    call: _Call,
    solved: list[SolvedQueries],
    found: _Scores,
    labels: Tensor | None,
    k: int,
    epochs: list[int],
    context: CallContext,
) -> InfluenceReport:
    """The report of scores, without the time that they took.

    Args:
        call: The call.
        solved: The iHVPs at each state.
        found: The scores.
        labels: The label of each scored example, ``(n,)``; ``None`` if they are not known.
        k: How many proponents and opponents the report shows.
        epochs: The epochs of the snapshots.
        context: The trainer's loggers, step count and process group.
    """
    objective, query, train = call.objective, call.query, call.train
    return InfluenceReport(
        scores=found.scores,
        indices=found.indices,
        n_train=len(call.scored),
        solutions=solved[0].solutions,
        curvature=solved[0].curvature,
        targets=call.targets,
        gradient_share=solved[0].gradient_share,
        k=k,
        dataset=train.dataset,
        queries=first_shown(query, vocabulary=context.vocabulary),
        labels=labels,
        predictions=first_predictions(objective, query),
        tokens=first_tokens(objective, query, context.vocabulary),
        settings={
            **asdict(replace(call.settings, damping=solved[0].damping)),
            "snapshots": epochs,
            "measures": objective.measures,
            "query_size": len(query),
            "losses": objective.loss.origin,
            "dataset_size": len(train.dataset) if hasattr(train.dataset, "__len__") else None,
        },
        seconds=0.0,
        standard_errors=found.standard_errors,
        agreement=found.agreement,
        context=context,
    )


def _token_scores(call: _Call, solved: list[SolvedQueries], report: InfluenceReport) -> dict[int, TokenScores]:
    """The scores of the tokens of the texts that a report shows."""
    if not all(len(one.ihvps) for one in solved):  # all scores were computed by an earlier call
        raise ConfigurationError(
            "tokens=True needs the solves of the call, but all scores were read from the folder `scores_to` of an"
            " earlier call, which has the scores only. Give another folder, delete this one, or omit `tokens`."
        )
    directions = [(state, one.ihvps) for state, one in zip(call.states, solved, strict=True)]
    shown = sorted(report.strongest())
    vocabulary = report.context.vocabulary
    return token_scores(call.objective, call.scored, len(call.train), shown, directions, vocabulary)


class SolveStage(NamedTuple):
    """The stage of a call in which the curvature is prepared and the iHVPs are computed.

    Attributes:
        total: The number of updates of its progress, at most; ``None`` if it is not known.
        work: Its work, if that of a score is 1; ``None`` if it is not known.
    """

    total: int | None
    work: float | None

    def with_scores(self, work: float) -> list[tuple[str, float | None]]:
        """This stage and that of the scores with their work, as for :meth:`Progress.expect`."""
        return [(PRODUCTS, self.work), (SCORES, work)]

    @classmethod
    def of(cls, inverse: type[InverseCurvature], settings: Settings, train: Examples, n_queries: int) -> SolveStage:
        """The stage for an inverse of the curvature."""
        count = sample_size(settings)
        n = len(train) if count is None else min(count, len(train))
        n_batches = -(-n // (train.batch_size * train.processes.size))
        total = inverse.n_updates(settings, n_batches, n_queries)
        by_batches = settings.solver not in SOLVERS  # else each update is a product with the curvature of all examples
        return cls(total, None if total is None else _PRODUCT * total * (n / n_batches if by_batches else n))


class _Scores(NamedTuple):
    """Scores, and their spread over the states; the fields are those of the report."""

    scores: Tensor
    indices: Tensor
    standard_errors: Tensor | None
    agreement: float | None


def _all_scores(call: _Call, solved: list[SolvedQueries], store: ScoreStore | None, keep: int | None) -> _Scores:
    """Scores the training examples; only the ``keep`` highest and lowest scores of each query are kept, if given."""
    averaged = len(call.states)
    if keep is not None:
        ends = Strongest(call.n_queries, call.scored.ids, keep, with_errors=call.with_errors)
        _score(call, solved, ends, store)
        return _Scores(*ends.both(), ends.standard_errors, ends.agreement.value(averaged))
    kept = store or InMemory(call.n_queries, len(call.scored), with_errors=call.with_errors)
    _score(call, solved, kept, store)
    errors = kept.standard_errors
    return _Scores(kept.scores, call.scored.ids, errors, agreement_of(kept.scores, errors, averaged))


@dataclass(frozen=True)
class _Call:
    """One call of :func:`influence`.

    Attributes:
        objective, train, query, settings, per_example: See :func:`influence`.
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
    def with_errors(self) -> bool:
        """Whether scores have standard errors, from several states."""
        return len(self.states) >= LEAST_STATES

    @property
    def solving(self) -> SolveStage:
        """The stage of the solve at each state."""
        return SolveStage.of(inverse_for_queries(self.settings), self.settings, self.train, self.n_queries)

    def __post_init__(self) -> None:
        """Announces the stages of the call."""
        scores = len(self.scored) * len(self.states) * (1 + _FURTHER * (self.n_queries - 1))
        self.objective.progress.expect(*[(PRODUCTS, self.solving.work)] * len(self.states), (SCORES, scores))

    @property
    def n_bytes(self) -> int:
        """The size of all scores and their standard errors in bytes."""
        return (1 + self.with_errors) * _BYTES * self.n_queries * len(self.scored)

    def fingerprint(self) -> Fingerprint:
        """Digests and values of everything that the scores depend on.

        The training data are represented by all dataset indices and the contents of a few examples.
        """
        states = [digest({"theta": state.theta, **state.statistics}) for state in self.states]
        return {
            "weights": digest({}, [state_digest(self.objective.module), states[0]]),  # including frozen parameters
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
    store = _open_everywhere(call, folder, mark)
    if scores_to is None:
        rank_zero_info(
            f"The scores take {call.n_bytes / 2**30:.1f} GiB and are written to {folder}. If this call is interrupted,"
            " the same call resumes from there. Delete the folder when you no longer need the report."
        )
    return store


def _open_everywhere(call: _Call, folder: Path, mark: Fingerprint) -> ScoreStore:
    """Opens the store on all processes. The first one creates and writes it, the others only read it."""
    processes, n = call.objective.processes, len(call.scored)
    if processes.rank == 0:
        store = ScoreStore.open(folder, call.n_queries, n, mark, with_errors=call.with_errors)
    processes.gather(None)  # the other processes wait until the store exists
    if processes.rank > 0:
        if not folder.exists():
            raise ConfigurationError(
                f"Rank {processes.rank} does not see the folder {folder}, which rank 0 has created for the scores."
                " Give a folder that all processes see, on a file system that the machines share."
            )
        store = ScoreStore.open(folder, call.n_queries, n, mark, with_errors=call.with_errors)
    return store


# ----------------------------------------------------------------------------------------------------------------------
# Solving for the queries
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class SolvedQueries:
    """The iHVPs of all queries at one state of the model.

    Attributes:
        ihvps: The iHVPs ``(n_queries, p)``; ``(0, p)`` if an earlier call has computed all scores with them.
        solutions: The diagnostics of each query's solve.
        curvature: How the curvature was computed, in plain values.
        damping: The damping ``λ``.
        gradient_share: The share of the queries' gradients that the target parameters hold; ``None`` if an earlier
            version has stored the iHVPs.
    """

    ihvps: Tensor
    solutions: list[Solution]
    curvature: dict[str, Any]
    damping: float
    gradient_share: float | None

    def record(self) -> dict[str, Any]:
        """All fields except the iHVPs, as plain values."""
        return {
            "solutions": [solution.record() for solution in self.solutions],
            "curvature": self.curvature,
            "damping": self.damping,
            "gradient_share": self.gradient_share,
        }

    @classmethod
    def load(cls, store: ScoreStore, state: int, objective: Objective) -> SolvedQueries | None:
        """The iHVPs that an earlier call has stored for a state; ``None`` if a process does not see any."""
        stored = store.load_directions(state, objective.space.size)
        # Every process follows the first one, because a shared file system may show it a file earlier than others.
        if objective.processes.broadcast(stored is None) or stored is None:
            return None
        ihvps, record = stored
        with store.parse_errors_name(state):
            solutions = [Solution.of_record(one) for one in record["solutions"]]
            known = record["curvature"], record["damping"], record.get("gradient_share")
            # The last bits of products depend on the alignment in memory, which a tensor in a file does not have.
            return cls(ihvps.to(objective.device, copy=True), solutions, *known)

    def save(self, store: ScoreStore, state: int) -> None:
        """Stores the iHVPs and the record for a state."""
        store.save_directions(state, self.ihvps, self.record())

    def save_record(self, store: ScoreStore, state: int) -> None:
        """Stores the record without the iHVPs, which are not needed when all scores are written."""
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
    with objective.progress.stage(PRODUCTS, call.solving.total) as update:
        inverse_class = inverse_for_queries(settings)
        inverse = inverse_class.fit(objective, call.train, settings, method, positions, on_product=update)
        gradients = objective.query_gradients(call.query, per_example=call.per_example)
        share, solutions = gradient_share(gradients, positions), list[Solution]()
        for rows in gradients.split(inverse.block_size or len(gradients)):
            ihvps, found = inverse.ihvp(rows)
            if ihvps.shape != rows.shape or len(found) != len(rows):
                raise ConfigurationError(
                    f"{inverse_class.__name__}.ihvp must return one iHVP and one Solution for each gradient. For"
                    f" gradients of shape {list(rows.shape)} it returned iHVPs of shape {list(ihvps.shape)} and"
                    f" {len(found)} solutions."
                )
            rows.copy_(ihvps)  # many queries need the memory for one such matrix only
            solutions += [_sharing(one, row) for one, row in zip(found, rows, strict=True)]
        return SolvedQueries(
            ihvps=gradients,
            solutions=solutions,
            curvature=inverse.summary(),
            damping=inverse.damping,
            gradient_share=share,
        )


def _sharing(solution: Solution, ihvp: Tensor) -> Solution:
    """The solution with an iHVP ``(p,)`` as its vector, if both are the same, so that it is in memory once."""
    same = solution.x.shape == ihvp.shape and torch.equal(solution.x, ihvp)
    return replace(solution, x=ihvp) if same else solution


# ----------------------------------------------------------------------------------------------------------------------
# Scoring the training examples
# ----------------------------------------------------------------------------------------------------------------------


def _score(
    call: _Call, solved: list[SolvedQueries], kept: Strongest | ScoreStore | InMemory, store: ScoreStore | None
) -> None:
    """Computes and writes all scores that are not stored yet, in one pass over the training examples."""
    objective, processes = call.objective, call.objective.processes
    objective.learn_derivatives(call.train)
    scoring = _ScoringPass(call, solved, None if store is None else store.done.clone())
    with objective.progress.stage(SCORES, len(call.scored)) as update:
        for start, stop, block in processes.interleave(scoring.blocks()):
            if block is not None and (store is None or processes.rank == 0):  # only the first process writes files
                kept.write(start, *block)
            update(stop - start)
    call.scored.learn_classes(scoring.labels)
    warn_without_gradients(processes.total(scoring.any_gradient))
    if store is not None and processes.rank == 0:
        for number, one in enumerate(solved):
            one.save_record(store, number)


class _ScoringPass:
    """The scores of this process's examples, batch by batch.

    Args:
        call: The call.
        solved: The iHVPs at each state.
        done: Whether the scores of each example are stored already, ``(n,)``; ``None`` if there are none.

    Attributes:
        any_gradient: Positive if the gradient of some training example had a non-zero product with an iHVP.
        labels: The labels of the batches so far, ``(B,)`` each; ``None`` for a batch without labels.
    """

    def __init__(self, call: _Call, solved: list[SolvedQueries], done: Tensor | None) -> None:
        self._call, self._solved, self._done = call, solved, done
        self.any_gradient = 0.0 if done is None else float(done.any())
        self.labels: list[Tensor | None] = []
        # Removing an example does not reduce weight decay. So each example's gradient includes the decay's gradient.
        self._decays = [
            call.settings.weight_decay * (one.ihvps @ state.theta).double().cpu()[:, None]
            for state, one in zip(call.states, solved, strict=True)
        ]

    def blocks(self) -> Iterator[tuple[int, int, tuple[Tensor, Tensor | None] | None]]:
        """Yields the start, the stop, and the result of :meth:`_scores` of each batch; ``None`` if it is stored."""
        start, _ = self._call.scored.shard
        for batch in self._call.scored.local_batches():
            stop = start + batch.size
            self.labels.append(batch.classes)
            done = self._done is not None and bool(self._done[start:stop].all())
            yield start, stop, None if done else self._scores(batch)
            start = stop

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The scores of a batch and their standard errors, ``(n_queries, b)`` in float64."""
        call, spread = self._call, Spread()
        block = torch.zeros(call.n_queries, batch.size, dtype=torch.float64)
        for state, one, decay in zip(call.states, self._solved, self._decays, strict=True):
            with call.objective.at_state(state):
                part = call.objective.directional_derivatives(batch, one.ihvps).cpu().double()
            self.any_gradient += float(part.any())
            block += (part + decay) / len(call.states)
            spread.add((part + decay) / max(len(call.train) - 1, 1))
        block /= max(len(call.train) - 1, 1)
        require_finite_scores(block, batch.ids)
        return block, spread.standard_errors()


def require_finite_scores(scores: Tensor, ids: Tensor) -> None:
    """Checks that scores are finite.

    Args:
        scores: The scores ``(q, b)``.
        ids: The dataset indices ``(b,)`` of the examples, which the error names.

    Raises:
        NonFiniteError: If a score is not finite.
    """
    bad = ids[~torch.isfinite(scores).all(0).cpu()]
    if len(bad):
        raise NonFiniteError(
            f"The scores of {len(bad)} training examples are not finite, at dataset indices"
            f" {', '.join(map(str, bad[:5].tolist()))}{' …' if len(bad) > 5 else ''}: their losses have no finite"
            " derivative. The data may have NaN, or the computation may overflow (try double=True). To score only the"
            " other examples, pass them as `among`."
        )


def warn_without_gradients(nonzero: float) -> None:
    """Warns if all training examples have gradients that are exactly zero.

    Args:
        nonzero: Positive if some training example has a non-zero gradient, or product with an iHVP.
    """
    if not nonzero:
        rank_zero_warn(
            "All scored training examples have a gradient of exactly zero in the directions that matter to the query."
            " So all scores are zero, or come from weight decay alone. Possible causes are dead units (a ReLU that no"
            " example activates), or a loss that is constant or detached.",
            category=GIFWarning,
        )
