"""Influence through training: scores of training examples in a recorded run."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .._compat import rank_zero_warn
from ..attribution.influence import require_finite_scores, warn_without_gradients
from ..attribution.predictions import first_predictions, first_tokens
from ..attribution.ranking import Strongest
from ..attribution.report import InfluenceReport, first_shown
from ..config import Settings
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.batchnorm import RunningStatistics
from ..objective.memory import bytes_to_keep, check_fits
from ..objective.objective import Objective
from ..parameters import Targets
from ..reporting.context import CallContext
from .leaving_out import leave_out
from .record import Trajectory
from .replay import Replay, State
from .sweep import Adjoint, Parts, query_adjoint, sweep
from .weighting import check_weighting

__all__ = ["influence_through_training"]


# The stages of a call, as its progress names them.
_SWEEP, _REPLAYS = "Going back through training", "Replaying without examples"

# The copies of a flat vector of weights that the adjoint of a query takes: parameters, optimizer state, and gradients.
_COPIES = 6

# A backward pass for a query takes about as many times the bytes of the graph.
_OF_GRAPH = 2

# Parts of scores by epoch are kept if they take no more bytes.
_MOST_BYTES_OF_PARTS = 2**27


def influence_through_training(
    objective: Objective,
    train: Examples,
    query: Examples,
    trajectory: Trajectory,
    settings: Settings,
    *,
    per_example: bool = False,
    among: Examples | None = None,
    keep: int | None = None,
    leave_outs: int = 0,
    k: int = 10,
    context: CallContext | None = None,
) -> InfluenceReport:
    """Scores training examples by the exact derivative of the query in their weights in a recorded run.

    The score of an example is ``−∂q/∂w``, where ``q`` is the query's measurement at the end of the run, and ``w`` the
    weight of the example's loss in all batches that it was in. So it is the change of ``q`` to first order if the
    weight were 0 instead of 1, with the same random numbers. One sweep back through the optimizer steps gives all
    scores (:func:`~lightning_gif.trajectory.sweep.sweep`), as in the method MAGIC (arXiv 2503.13751) and, for SGD, in
    Hara et al. (2019, arXiv 1906.08473).

    Args:
        objective: An open objective.
        train: The training examples.
        query: The query's examples.
        trajectory: The record of the run.
        settings: ``batch_size``, ``memory`` and ``seed`` matter.
        per_example: Whether each example is a query of its own.
        among: The training examples to score; by default all.
        keep: Keep only the ``keep`` highest and the ``keep`` lowest scores of each query.
        leave_outs: How often the run is replayed without a random share of the training examples, to see how well the
            scores predict it; each takes two replays.
        k: How many proponents and opponents the report shows.
        context: The trainer's loggers, step count and process group, for the report.

    Raises:
        ConfigurationError: If the record is incomplete, damaged or of another run, or if the weights of the module are
            not those at the end of the run.
        TrainingDataError: If examples differ from those of the run.
        ObjectiveError: If the loss of a batch cannot be weighted by examples.
        NonFiniteError: If the derivative is not finite.
    """
    begin, context = time.perf_counter(), context or CallContext()
    objective.check(query, "query", measured=True)
    replay = Replay(objective, train, trajectory)
    end = replay.end
    _check_end(objective, end)
    _check_memory(replay, replay.stored(replay.n_steps), settings)
    _warn_about_buffers(replay, end)
    check_weighting(replay)
    adjoint = query_adjoint(objective, query, end, per_example=per_example)
    parts = _swept(replay, adjoint.of_average() if replay.of_average else adjoint, settings)
    tested = None
    if leave_outs:
        with objective.progress.stage(_REPLAYS, 2 * leave_outs * replay.n_steps) as update:
            given: dict[str, Any] = {"per_example": per_example, "seed": settings.seed, "on_step": update}
            tested = leave_out(replay, query, -parts.total, leave_outs, **given)
    scored = train if among is None else among
    columns = train.positions_of(scored.ids)
    scores, by_epoch = -parts.total[:, columns], None if parts.by_epoch is None else -parts.by_epoch[:, :, columns]
    require_finite_scores(scores, scored.ids)
    warn_without_gradients(float(scores.abs().sum()))
    indices, whole = scored.ids, keep is None or 2 * keep >= len(scored)
    if not whole:
        ends = Strongest(len(scores), scored.ids, keep or 0)
        ends.write(0, scores)
        scores, indices = ends.both()
        by_epoch = None if by_epoch is None else _parts_of(by_epoch, scored.positions_of(indices.flatten()))
    return InfluenceReport(
        scores=scores,
        indices=indices,
        n_train=len(scored),
        solutions=[],
        curvature={},
        targets=Targets.whole(objective.space),
        gradient_share=1.0,
        k=k,
        dataset=train.dataset,
        queries=first_shown(query, vocabulary=context.vocabulary),
        labels=scored.classes if whole else None,
        predictions=first_predictions(objective, query),
        tokens=first_tokens(objective, query, context.vocabulary),
        by_epoch=by_epoch,
        leave_outs=tested,
        settings=_recorded(settings, replay, query),
        seconds=time.perf_counter() - begin,
        context=context,
    )


def _recorded(settings: Settings, replay: Replay, query: Examples) -> dict[str, Any]:
    """The settings of the report."""
    return {
        **{
            name: value
            for name, value in asdict(settings).items()
            if name in ("batch_size", "double", "memory", "seed")
        },
        "method": "through training",
        "through": "training",
        "steps": replay.n_steps,
        "replay_difference": replay.difference,
        "measures": replay.objective.measures,
        "query_size": len(query),
        "losses": "training_step as in training",
        "dataset_size": len(replay.train.dataset),
    }


def _parts_of(by_epoch: Tensor, positions: Tensor) -> Tensor:
    """The parts of scores ``(q, n_epochs, n)`` for some examples of each query, at positions ``(q * m,)``."""
    kept = positions.view(len(by_epoch), 1, -1)
    return by_epoch.gather(2, kept.expand(-1, by_epoch.shape[1], -1))


def _swept(replay: Replay, adjoint: Adjoint, settings: Settings) -> Parts:
    """The derivatives of all queries, of as many at a time as fit into memory. Processes share the queries."""
    objective, n_train, n_queries = replay.objective, len(replay.train), len(adjoint.theta)
    budget, processes = bytes_to_keep(settings, objective), replay.train.processes
    n_epochs = 1 + max(step.epoch for step in replay.trajectory.steps(replay.n_steps - 1, replay.n_steps))
    keeps = 8 * n_queries * n_epochs * n_train <= _MOST_BYTES_OF_PARTS
    whole = Parts(n_queries, n_epochs if keeps else None, n_train)
    together = max(int(budget // (_COPIES * adjoint.theta[0].nbytes)), 1)
    first, last = processes.shard(n_queries)
    starts = list(range(first, last, together))
    rounds = max(processes.gather(len(starts)))

    with objective.progress.stage(_SWEEP, rounds * replay.n_steps) as update:
        for number in range(rounds):
            if number >= len(starts):  # the other processes have more queries
                for _ in replay.segments:
                    processes.meet()
                continue
            rows = slice(starts[number], min(starts[number] + together, last))
            one = adjoint.of_queries(rows)
            part = Parts(len(one.theta), n_epochs if keeps else None, n_train)
            options: dict[str, Any] = {"on_step": update, "on_segment": processes.meet}
            sweep(replay, one, part, most=lambda size: int(budget // max(_OF_GRAPH * size, 1)), **options)
            whole.total[rows] = part.total
            if whole.by_epoch is not None and part.by_epoch is not None:
                whole.by_epoch[rows] = part.by_epoch
    whole.total = processes.sum(whole.total)  # each process has zeros for the queries of the others
    if whole.by_epoch is not None:
        whole.by_epoch = processes.sum(whole.by_epoch)
    replay.difference = max(processes.gather(replay.difference))
    return whole


def _check_end(objective: Objective, end: State) -> None:
    """Checks that the module is as it was at the end of the run."""
    own = objective.shadow.buffers(objective.theta.dtype)
    running = [name for name in RunningStatistics.names_of(objective.module) if name in end.others]
    differing = [] if torch.equal(objective.theta, end.theta()) else ["the weights"]
    differing += ["the running statistics of BatchNorm"] * any(
        not _same(own[name], end.others[name]) for name in running
    )
    if differing:
        raise ConfigurationError(
            f"Of {type(objective.module).__name__}, {' and '.join(differing)} are not those at the end of"
            " the recorded run. They may be an average of weights (a callback for EMA or SWA), a checkpoint of an"
            " earlier step, or the result of an edit or of another training. Load the weights of the end of the run"
            " (its last checkpoint), undo the edit, or use the default influence, without `through`."
        )


def _check_memory(replay: Replay, end: State, settings: Settings) -> None:
    """Checks that the states from one stored state to the next fit into memory."""
    longest = max(stop - first for first, stop in replay.segments)
    check_fits(
        settings,
        replay.objective,
        longest * (end.nbytes + end.theta().nbytes),  # and the gradients
        f"A replay of the {longest} optimizer steps between two stored states",
        "Use the default influence, without `through`",
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other.to(one))


def _warn_about_buffers(replay: Replay, end: State) -> None:
    """Warns if the run has changed buffers whose derivative is left out."""
    covered, start = set(RunningStatistics.names_of(replay.objective.module)), replay.stored(0)
    changed = [
        name
        for name, value in end.others.items()
        if value.is_floating_point() and name not in covered and not torch.equal(value, start.others[name])
    ]
    if changed:
        rank_zero_warn(
            f"Training has changed the buffers or frozen parameters {', '.join(changed[:5])}"
            f"{' …' if len(changed) > 5 else ''}. How training examples act on the query through them is left out of"
            " the scores. The default influence, without `through`, takes them as constants, too."
        )
