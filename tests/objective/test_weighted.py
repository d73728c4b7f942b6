"""Weights of examples at the reductions of a training step: its loss is linear in them, and 1 leaves it as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gif import ObjectiveError, attach
from lightning_gif.objective.objective import Objective
from lightning_gif.objective.reductions import Weighted

from ..conftest import Classifier, batch_of, blobs, loader, make_trainer

B = 6

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def each(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y, reduction="none")


def masked(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = (y != 1).float()
    return (each(module, x, y) * mask).sum() / mask.sum()


def ignored(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y.masked_fill(y == 1, -100))


def penalised(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y) + 0.1 * sum(p.square().sum() for p in module.parameters())  # type: ignore[misc]


def added_up(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    total = x.new_zeros(())
    total += F.cross_entropy(module(x), y)
    total += F.mse_loss(module(x), F.one_hot(y, 3).to(x))
    return total


def logged(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    outputs = module(x)
    accuracy = (outputs.argmax(1) == y).float().mean()
    loss = F.cross_entropy(outputs, y)
    return loss * 1.0 if float(accuracy) >= 0 else loss


def squares(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((module(x) - F.one_hot(y, 3)) ** 2).sum(1).mean(0, keepdim=True).squeeze()


def divergence(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(module(x).log_softmax(1), F.one_hot(y, 3).to(x), reduction="batchmean")


def kept(of: Step, divisor: Callable[[Tensor], float]) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The derivatives of a step in the weights: its terms, divided."""
    return lambda module, x, y: of(module, x, y) / divisor(y)


CASES: dict[str, tuple[Step, Step]] = {
    "mean": (lambda m, x, y: F.cross_entropy(m(x), y), kept(each, len)),
    "sum": (lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum"), each),
    "mean of terms": (lambda m, x, y: each(m, x, y).mean(), kept(each, len)),
    "stacked": (lambda m, x, y: torch.stack(list(each(m, x, y))).mean(), kept(each, len)),
    "masked": (masked, lambda m, x, y: each(m, x, y) * (y != 1) / (y != 1).sum()),
    "ignored": (ignored, lambda m, x, y: each(m, x, y) * (y != 1) / (y != 1).sum()),
    "penalised": (penalised, kept(each, len)),
    "logged": (logged, kept(each, len)),
    "squares": (squares, lambda m, x, y: ((m(x) - F.one_hot(y, 3)) ** 2).sum(1) / len(y)),
    "batchmean": (divergence, kept(each, len)),
    "added up": (
        added_up,
        lambda m, x, y: each(m, x, y) / len(y) + ((m(x) - F.one_hot(y, 3)) ** 2).mean(1) / len(y),
    ),
}


class Stepping(Classifier):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(self, *batch)


def evaluated(step: Step, weights: Tensor) -> tuple[Tensor, Tensor, Objective]:
    """The weighted loss and its derivatives in the weights, in float64."""
    torch.manual_seed(0)
    trainer, module, batch = make_trainer(), Stepping(step), batch_of(blobs(), slice(B))
    attach(trainer, module, train_dataloaders=loader(blobs()))
    with Objective.open(trainer, module, double=True) as objective:
        data = objective.prepare(batch)
        theta = objective.theta.detach().requires_grad_()
        with Weighted(module, weights):
            loss = objective.shadow.training_step(theta, data)
        plain = objective.shadow.training_step(theta, data)
        (found,) = torch.autograd.grad(loss, weights)
    return torch.stack([loss, plain]).detach(), found, objective


@pytest.mark.parametrize("name", CASES)
def test_the_derivative_in_a_weight_is_the_term_of_the_example(name: str) -> None:
    step, terms = CASES[name]
    weights = torch.ones(B, dtype=torch.float64, requires_grad=True)
    losses, found, objective = evaluated(step, weights)
    assert torch.allclose(losses[0], losses[1], rtol=1e-12)
    module = objective.module.double()
    x, y = batch_of(blobs(), slice(B))
    with torch.no_grad():
        expected = terms(module, x.double(), y)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_linear_in_the_weights(name: str) -> None:
    step, _ = CASES[name]
    weights = torch.rand(B, dtype=torch.float64, requires_grad=True)
    losses, found, _ = evaluated(step, weights)
    ones, at_one, _ = evaluated(step, torch.ones(B, dtype=torch.float64, requires_grad=True))
    assert torch.allclose(found, at_one, rtol=1e-10, atol=1e-14)
    assert torch.allclose(losses[0], ones[0] + ((weights - 1) * found).sum(), rtol=1e-12)


def test_terms_that_are_not_equally_many_for_each_example_are_refused() -> None:
    def picked(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return each(module, x, y)[y != 1].mean()

    with pytest.raises(ObjectiveError, match="picked by a mask"):
        evaluated(picked, torch.ones(B, dtype=torch.float64, requires_grad=True))
