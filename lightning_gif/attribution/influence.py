"""From a query batch to a score for every training example."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._compat import rank_zero_info, rank_zero_warn
from ..config import Settings
from ..curvature.inverse import damped_curvature
from ..curvature.methods import METHODS, Method
from ..data.examples import Examples
from ..data.identity import data_digest, fingerprints
from ..distributed import ProcessGroup
from ..errors import ConfigurationError, GIFWarning, NonFiniteError
from ..objective.objective import ModelState, Objective
from ..parameters import Targets, state_digest
from ..reporting.context import CallContext
from ..solvers import Solution
from ..storage.digests import Fingerprint, digest
from .ranking import Strongest
from .report import InfluenceReport, first_shown
from .score_store import InMemory, ScoreStore

__all__ = ["influence"]


# Queries that are solved together share the passes that are not kept, but each takes some vectors of the model's size.
_MOST_TOGETHER, _VECTORS = 16, 12

# Of one score, and how much of the digest of a fingerprint names a folder.
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
    measurement, to first order, where ``q`` is the query's gradient on the targets and ``x(g)`` the change of the
    targets that a method gives for a gradient ``g`` (GIF, arXiv 2312.05586, equation 6). ``x`` is linear in ``g``, so
    one solve for its adjoint gives ``w`` with ``wᵀ∇ℓ(zᵢ) = qᵀ x(∇ℓ(zᵢ))``, and one pass over the training set gives all
    of these inner products.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        query: The query's examples.
        settings: Method, solver and their parameters.
        choose_targets: Called for the target parameters, unless the method changes all of them.
        per_example: One query for each example instead of one for their mean.
        among: Those of the training examples that are scored; by default all.
        scores_to: A folder for the scores, see :class:`~lightning_gif.attribution.score_store.ScoreStore`; by default
            they are in memory. Of several processes the first writes it, and all must see it.
        spill_to: A folder in which there will be one for the scores if they take much of the memory that is free.
        keep: Keep only so many of either end of each query's ranking.
        states: Earlier states of the module by epoch: scores are the mean of those with the present weights and with
            each of these, of which each has its own solve.
        k: How many proponents and opponents the report shows.
        context: What the report knows of the trainer.

    Raises:
        BatchError: If the query is not structured as training batches are.
        NonFiniteError: If a loss, gradient or product is not finite.
        ObjectiveError: If the query does not depend on the targets.
        ConfigurationError: For ``method="sif"``, which has no scores for single examples; or if ``scores_to`` holds
            something else.
        ConvergenceError: See :meth:`~lightning_gif.config.Settings.solve`.
    """
    begin = time.perf_counter()
    objective.check(query, "query", measured=True)
    method = METHODS[settings.method]
    targets = method.targets(objective.space, choose_targets)
    scored = train if among is None else among
    queries = len(query) if per_example else 1
    moments = [objective.model_state(), *map(objective.model_state, (states or {}).values())]
    store, processes = None, objective.processes
    partial = keep is not None and 2 * keep < len(scored)
    spills = not partial and spill_to is not None and settings.is_large(_BYTES * queries * len(scored), processes)
    if scores_to is not None or spills:
        mark = processes.broadcast(
            _fingerprint(objective, moments, train, scored, query, per_example, settings, targets)
        )
        folder = scores_to or spill_to / digest({}, mark)[:_NAMED]  # type: ignore[operator]
        store = _open_store(processes, folder, queries, len(scored), mark)
        if scores_to is None:
            rank_zero_info(
                f"The scores take {_BYTES * queries * len(scored) / 2**30:.1f} GiB, and are in {folder}: the same call"
                " goes on there if it is interrupted. Delete the folder once the report is no longer needed."
            )
    solved = []
    for state, moment in enumerate(moments):
        one = None if store is None else _Solved.load(store, state, objective)
        if one is None:
            with objective.at_state(moment):
                one = _solve(objective, train, query, settings, method, targets, per_example)
            if store is not None and processes.rank == 0:
                store.save_directions(state, one.directions, one.told())
        solved.append(one)

    # Weight decay does not become less where one example is removed, so each example's loss carries its share.
    decays = [
        settings.weight_decay * (one.directions @ moment.theta).double().cpu()[:, None]
        for moment, one in zip(moments, solved, strict=True)
    ]
    kept: Strongest | ScoreStore | InMemory
    if keep is not None and partial:
        kept = Strongest(queries, scored.ids, keep)
    else:
        kept = store or InMemory(queries, len(scored))
    done = None if store is None else store.done.clone()
    nonzero = 0.0 if done is None else float(done.any())  # whether some training example has a gradient
    objective.learn_derivatives(train)

    def blocks() -> Iterator[tuple[int, int, Tensor | None]]:
        """For this process's batches: from and to which position, and the scores; those that are there are left out."""
        nonlocal nonzero
        start, _ = scored.shard
        for batch in scored.local_batches():
            stop, block = start + batch.size, None
            if done is None or not done[start:stop].all():
                block = torch.zeros(queries, batch.size, dtype=torch.float64)
                for moment, one, decay in zip(moments, solved, decays, strict=True):
                    with objective.at_state(moment):
                        part = objective.directional_derivatives(batch.data, one.directions).cpu().double()
                    nonzero += float(part.any())
                    block += (part + decay) / len(moments)
                block /= max(len(train) - 1, 1)
                require_finite_scores(block, batch.ids)
            yield start, stop, block
            start = stop

    with objective.progress("Scoring training examples", len(scored)) as bar:
        for start, stop, block in processes.interleave(blocks()):
            if block is not None and (store is None or processes.rank == 0):  # one process writes a file
                kept.write(start, block)
            bar.update(stop - start)
    warn_without_gradients(processes.total(nonzero))
    if store is not None and processes.rank == 0:
        for state, one in enumerate(solved):
            if len(one.directions):
                store.save_directions(state, one.directions[:0], one.told())
    scores, indices = kept.both() if isinstance(kept, Strongest) else (kept.scores, scored.ids)
    return InfluenceReport(
        scores=scores,
        indices=indices,
        n_train=len(scored),
        solutions=solved[0].solutions,
        curvature=solved[0].curvature,
        targets=targets,
        k=k,
        dataset=train.dataset,
        queries=first_shown(query),
        settings={**asdict(replace(settings, damping=solved[0].damping)), "snapshots": list(states or {})},
        seconds=time.perf_counter() - begin,
        context=context or CallContext(),
    )


def _open_store(processes: ProcessGroup, folder: Path, queries: int, examples: int, mark: Fingerprint) -> ScoreStore:
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


@dataclass
class _Solved:
    """What the solves for queries gave.

    Attributes:
        directions: ``w`` of each, ``(n_queries, p)``.
        solutions: How each went.
        curvature: How products were made.
        damping: ``λ``.
    """

    directions: Tensor
    solutions: list[Solution]
    curvature: dict[str, Any]
    damping: float

    def told(self) -> dict[str, Any]:
        """All but the directions, in plain values."""
        return {
            "solutions": [solution.record() for solution in self.solutions],
            "curvature": self.curvature,
            "damping": self.damping,
        }

    @classmethod
    def load(cls, store: ScoreStore, state: int, objective: Objective) -> _Solved | None:
        """What an earlier call has kept of the solves at a state; without directions, if it has ended."""
        found = store.load_directions(state, objective.space.size)
        # Others may only seem to see what the first does not.
        if objective.processes.broadcast(found is None) or found is None:
            return None
        directions, told = found
        with store.parse_errors_name(state):
            solutions = [Solution.of_record(record) for record in told["solutions"]]
            return cls(directions.to(objective.device), solutions, told["curvature"], told["damping"])


def _solve(
    objective: Objective,
    train: Examples,
    query: Examples,
    settings: Settings,
    method: Method,
    targets: Targets,
    per_example: bool,
) -> _Solved:
    positions = targets.flat(objective.space).to(objective.device)
    with objective.progress("Hessian products") as bar:
        # A sketch misses most directions in which weight decay is all the curvature there is, so that is damping.
        decay = settings.weight_decay if settings.solver == "nystrom" else 0.0
        curvature, damping = damped_curvature(objective, train, settings, settings.weight_decay - decay, bar.update)
        solve = replace(settings, damping=damping + decay).solve
        gradients = objective.query_gradients(query, per_example=per_example)
        together = int(settings.bytes_to_keep(objective) // (_VECTORS * gradients[0].nbytes))
        together = min(max(together, 1), _MOST_TOGETHER)
        if settings.solver == "nystrom":  # whose sketch costs the same for all
            together = len(gradients)
        blocks = [method.query(curvature, positions, block, solve) for block in gradients.split(together)]
        curvature.warn_if_zero()
        return _Solved(
            directions=torch.cat([found for found, _ in blocks]),
            solutions=[solution for _, found in blocks for solution in found],
            curvature=settings.describe(curvature),
            damping=damping,
        )


def _fingerprint(
    objective: Objective,
    moments: Sequence[ModelState],
    train: Examples,
    scored: Examples,
    query: Examples,
    per_example: bool,
    settings: Settings,
    targets: Targets,
) -> Fingerprint:
    """What scores depend on. Of the training data some are looked at."""
    states = [digest({"theta": moment.theta, **moment.statistics}) for moment in moments]
    return {
        "weights": digest({}, [state_digest(objective.module), states[0]]),  # what is frozen as well
        "snapshots": digest({}, states[1:]),
        "training data": data_digest(train),
        "the examples that are scored": digest({"ids": scored.ids}),
        "queries": digest({}, [mark.hex() for mark in fingerprints(query)]),
        "per_example": str(per_example),
        "target parameters": digest(dict(targets)),
        **settings.fingerprint(),
    }


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
