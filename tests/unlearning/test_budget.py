"""What an edit keeps in memory between passes stays within `memory`, and changes nothing but its speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Subset

from lightning_gif import GIFCallback
from lightning_gif.curvature import solve
from lightning_gif.curvature.streaming import Curvature
from lightning_gif.data.examples import Examples
from lightning_gif.unlearning import Relinearisation, Tuning
from lightning_gif.unlearning.budget import MemoryBudget

from ..conftest import blobs, fitted, loader

# Each set of examples below has at most 60, of 32 bytes each: an eighth of this memory.
N, EIGHTH = 60, 60 * 32
MEMORY = 8 * EIGHTH / 2**30


class Kept:
    """What was kept: the bytes of batches of the whole call, and of passes that may be kept together in one solve."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches, self.passes = 0, list[float]()
        whole, passes = Examples.cached, self.passes

        def cached(examples: Examples, most: float) -> Examples:
            held = whole(examples, most)
            if held is not examples:
                self.batches += sum(batch.nbytes for batch in held.in_memory or ())
            return held

        class Watched(Curvature):
            def __init__(self, *args: Any, memory: float, **options: Any) -> None:
                passes.append(memory)
                super().__init__(*args, memory=memory, **options)

        monkeypatch.setattr(Examples, "cached", cached)
        monkeypatch.setattr(solve, "Curvature", Watched)


@pytest.mark.slow
@pytest.mark.parametrize("goal", ["class", "examples", "labels"])
def test_what_an_edit_keeps_stays_within_memory(goal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = blobs(200)
    callback = GIFCallback(ratio=0.5, unconverged="ignore", curvature_examples=N)
    trainer, _, _ = fitted(dataset=dataset, callback=callback, max_epochs=30)
    forget: Any = {
        "class": (dataset.tensors[1] == 1).nonzero().squeeze(1).tolist(),
        "examples": list(range(N)),
        "labels": list(range(N)),
    }[goal]
    options: dict[str, Any] = {
        "tuning": Tuning(relinearisation=Relinearisation(max_solves=1 + (goal == "examples"))),
        "dry_run": True,
    }
    if goal == "labels":
        options["relabel"] = (dataset.tensors[1][:N] + 1) % 3
    if goal == "examples":
        options["unseen"] = loader(blobs(N, seed=5), shuffle=False)
    kept = Kept(monkeypatch)
    limited = trainer.unlearn(forget, memory=MEMORY, **options)
    assert 0 < kept.batches <= 4 * EIGHTH
    of_the_last_solve = kept.passes[-2 if goal != "examples" or len(limited.solves) > 1 else -1 :]
    assert 0 < sum(of_the_last_solve) <= 4 * EIGHTH * (1 + 1e-12)
    plain = trainer.unlearn(forget, memory=0.0, **options)
    assert kept.passes[-1] == 0.0
    ample = trainer.unlearn(forget, memory=1.0, **options)
    assert limited.edit.digest == plain.edit.digest == ample.edit.digest


def test_a_budget_counts_what_is_held_and_gives_back_what_a_solve_held() -> None:
    data = blobs(40)
    whole = Examples.from_loader(loader(data), lambda batch: batch, batch_size=8)
    some = Examples.from_loader(loader(Subset(data, range(20))), lambda batch: batch, batch_size=8)
    budget = MemoryBudget(batches=50 * 32.0, passes=0.0)
    held = budget.hold(whole)
    assert held.in_memory is not None
    assert budget.batches == 10 * 32
    assert budget.hold(some) is some  # no room for it
    assert budget.hold(held) is held
    assert budget.batches == 10 * 32
    of_a_solve = budget.of_a_solve()
    assert len(of_a_solve.sample(held, 4, seed=0)) == 4  # a copy
    assert of_a_solve.sample(held, 40, seed=0) is held
    assert of_a_solve.batches == 6 * 32
    assert budget.batches == 10 * 32
    doubled = budget.map(held, lambda batch: batch.take(torch.arange(batch.size).repeat(2)))
    assert doubled.in_memory is not None
    assert budget.batches == (10 - 40) * 32
