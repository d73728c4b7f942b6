"""Replays of a run without some training examples, to see how well derivatives predict it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attribution.leave_outs import LeaveOuts
from ..data.examples import Examples
from ..objective.objective import Objective
from ..objective.shadow import ModelState
from .replay import Replay, State

__all__ = ["SHARE", "draws", "leave_out", "measured_at", "smoothness_of"]


SHARE = 0.05
"""The share of the training examples that a replay leaves out."""


def leave_out(
    replay: Replay,
    query: Examples,
    scores: Tensor,
    count: int,
    *,
    per_example: bool,
    share: float = SHARE,
    seed: int = 0,
    on_step: Callable[[], Any] = lambda: None,
) -> LeaveOuts:
    """Replays a run without random examples: their losses are left out of all batches, and nothing else changes.

    Each draw takes two replays: with weight 1/2 and with weight 0 of the examples. Processes share the draws.

    Args:
        replay: The run.
        query: The query's examples.
        scores: The scores ``(q, n)`` of all training examples.
        count: The number of draws.
        per_example: Whether each example is a query of its own.
        share: The share of the training examples that is left out.
        seed: The seed of the draws.
        on_step: Called after each optimizer step.
    """
    objective, n = replay.objective, len(replay.train)
    end = replay.end
    base, start = measured_at(objective, query, end, per_example=per_example), end.theta()
    predicted, measured, smoothness = list[Tensor](), list[Tensor](), list[float]()
    processes = replay.train.processes

    own = draws(n, count, share, seed)[processes.rank :: processes.size]
    for _ in range(-(-count // processes.size) - len(own)):  # the others have more draws
        for _ in range(2 * len(replay.segments)):
            processes.meet()
    for chosen in own:
        ends = list[State]()
        for weight in (0.5, 0.0):
            weights = torch.ones(n, dtype=torch.float64)
            weights[chosen] = weight
            ends.append(replay.weighted_end(weights, on_step, processes.meet))
        half, whole = (one.theta() for one in ends)
        predicted.append(scores[:, chosen].sum(1))
        measured.append(measured_at(objective, query, ends[1], per_example=per_example) - base)
        smoothness.append(smoothness_of(start, half, whole))
    rows = processes.interleave(zip(predicted, measured, smoothness, strict=True))
    columns = list(zip(*rows, strict=True))
    return LeaveOuts(share, torch.stack(columns[0], 1), torch.stack(columns[1], 1), list(columns[2]))


def draws(n: int, count: int, share: float = SHARE, seed: int = 0) -> list[Tensor]:
    """The positions of the examples that each draw of :func:`leave_out` leaves out, of ``n`` examples."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator)[: max(round(share * n), 1)] for _ in range(count)]


def measured_at(objective: Objective, query: Examples, state: State, *, per_example: bool) -> Tensor:
    """The query's measurement ``(q,)`` at the end of a run, in float64."""
    with objective.at_state(ModelState(state.theta(), state.others)), torch.no_grad():
        values = torch.cat([objective.measurements(objective.theta, batch) for batch in query.batches()])
    values = values.double().cpu()
    return values if per_example else values.mean()[None]


def smoothness_of(start: Tensor, half: Tensor, whole: Tensor) -> float:
    """The share of the change between three states that goes on, minus the share that turns back; see ``LeaveOuts``."""
    size = (whole - start).abs()
    agree = (half - start).sign() * (whole - half).sign()
    return float((size * agree).sum() / size.sum()) if bool(size.any()) else 1.0
