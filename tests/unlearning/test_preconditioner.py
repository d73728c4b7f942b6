"""The scale of each parameter in a solve of few iterations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective
from lightning_gif.unlearning import Preconditioner
from lightning_gif.unlearning.preconditioner import gradient_second_moment, preconditioner

from ..conftest import fitted


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (3, 1), (11, 5), (19, 8)])
@pytest.mark.parametrize("batch_size", [3, 32])
def test_sizes_of_gradients_are_those_of_groups_whatever_the_batches(count: int, groups: int, batch_size: int) -> None:
    trainer, module, data = fitted(precision="64-true")
    with Objective.open(trainer, module) as objective:
        loader = DataLoader(Subset(data, range(count)), 4)
        examples = Examples.from_loader(loader, objective.prepare, batch_size=batch_size)
        objective.learn_structure(examples)
        each = torch.cat([rows for batch in examples.batches() for rows in objective.gradients(batch)])
        found = gradient_second_moment(objective, examples, objective, objective.theta, 8)
    parts = [each[start::groups] for start in range(groups)]
    torch.testing.assert_close(found, sum(len(part) * part.mean(0).square() for part in parts) / groups)


def test_units_are_shares_of_the_weights_and_for_labels_of_large_gradients_small() -> None:
    trainer, module, _ = fitted(precision="64-true")
    with Objective.open(trainer, module) as objective:
        positions = torch.arange(2, objective.space.size, 3)
        scale = partial(preconditioner, objective, positions, numbers=Preconditioner())
        shares = scale(None)
        sizes = [part.square().mean().sqrt() for part in objective.space.unflatten(objective.theta).values()]
        whole = objective.theta.square().mean().sqrt()
        counts = torch.tensor([part.numel() for part in objective.space.unflatten(objective.theta).values()])
        squares = torch.rand(objective.space.size, dtype=torch.float64)
        units = scale(squares)
        again = scale(1e6 * squares)
        nothing = scale(torch.zeros_like(squares))
    torch.testing.assert_close(shares, (torch.stack(sizes) / whole).clamp_min(1).repeat_interleave(counts))
    expected = (squares / squares[positions].mean() + 0.01) ** -0.25
    ratio = units / shares
    torch.testing.assert_close(ratio / ratio[0], expected / expected[0])
    assert ratio[positions].square().mean() == pytest.approx(1)
    torch.testing.assert_close(again, units)
    assert torch.equal(nothing, shares)
