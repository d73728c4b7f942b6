"""Per-example losses: the loss function is chosen once, and all of them give the same values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gif import GIFMixin, GIFWarning, ObjectiveError, attach
from lightning_gif.data.batch import Batch
from lightning_gif.data.examples import Examples
from lightning_gif.objective.derivatives import forward_mode, from_gradients, reverse_mode
from lightning_gif.objective.losses import LossFunction, OneByOneLoss, OwnLoss, VectorisedLoss
from lightning_gif.objective.objective import Objective
from lightning_gif.objective.outputs import loss_and_logits, loss_sum_at, outputs

from ..conftest import Classifier, blobs, loader, make_trainer

N = 7


class Counted(Classifier):
    """Counts the calls of its step, where no evaluation restores the count."""

    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        Counted.calls += 1
        return super().training_step(batch, batch_idx)


class Summed(Counted):
    """Has a condition on a value, which vmap does not support."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = len(batch[1]) * super().training_step(batch, batch_idx)
        return loss if float(loss.detach()) > -1 else 2 * loss


class Coupled(Summed):
    """The loss of a batch is not the mean of its examples' losses."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * len(batch[1])


class Own(GIFMixin, Counted):
    def influence_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


WAYS: dict[type[Counted], tuple[type[LossFunction], str | None]] = {
    Counted: (VectorisedLoss, "mean"),
    Summed: (OneByOneLoss, "sum"),
    Coupled: (OneByOneLoss, None),
    Own: (OwnLoss, None),
}


@contextmanager
def opened(kind: type[Counted]) -> Iterator[tuple[Objective, Batch]]:
    module, dataset = kind().double(), blobs(N)
    trainer = make_trainer(precision="64-true")
    attach(trainer, module, train_dataloaders=loader(dataset))
    with warnings.catch_warnings(), Objective.open(trainer, module) as objective:
        warnings.simplefilter("ignore", GIFWarning)
        train = Examples.from_loader(loader(dataset), objective.prepare, batch_size=N)
        objective.learn_structure(train)
        Counted.calls = 0
        yield objective, next(train.batches())


def expected(objective: Objective, theta: Tensor, batch: Batch) -> Tensor:
    parameters = objective.space.unflatten(theta)
    logits = torch.func.functional_call(objective.module, parameters, (batch.data[0],))
    return F.cross_entropy(logits, batch.data[1], reduction="none")


@pytest.mark.parametrize("kind", list(WAYS))
def test_the_loss_function_is_chosen_for_the_batch_structure(kind: type[Counted]) -> None:
    way, reduction = WAYS[kind]
    with opened(kind) as (objective, _):
        assert type(objective.loss) is way
        assert getattr(objective.loss, "reduction", None) == reduction


@pytest.mark.parametrize("kind", list(WAYS))
def test_all_loss_functions_give_the_same_losses_and_derivatives(kind: type[Counted]) -> None:
    with opened(kind) as (objective, batch):
        loss, theta = objective.loss, objective.theta
        losses = expected(objective, theta, batch)
        torch.testing.assert_close(loss.losses(theta, batch), losses)
        torch.testing.assert_close(loss.loss_sum(theta, batch), losses.sum())
        rows = torch.autograd.functional.jacobian(lambda at: expected(objective, at, batch), theta)
        torch.testing.assert_close(torch.cat(list(loss.gradients(theta, batch))), rows)
        directions = torch.randn(3, len(theta), dtype=theta.dtype)
        for derivatives in (forward_mode, reverse_mode, from_gradients):
            torch.testing.assert_close(derivatives(loss, batch, directions), directions @ rows.T)
        total, logits = loss_and_logits(loss, theta, batch)
        torch.testing.assert_close(total, losses.sum())
        torch.testing.assert_close(F.cross_entropy(logits, batch.data[1], reduction="none"), losses)


@pytest.mark.parametrize(("kind", "once", "each"), [(Counted, 1, 1), (Summed, 1, N), (Coupled, N, N)])
def test_sums_take_one_pass_if_the_reduction_is_known(kind: type[Counted], once: int, each: int) -> None:
    with opened(kind) as (objective, batch):
        objective.loss_sum(objective.theta, batch)
        assert Counted.calls == once
        objective.losses(objective.theta, batch)
        assert Counted.calls == once + each


def test_a_training_step_is_probed_before_its_losses_are_computed() -> None:
    trainer, module = make_trainer(), Counted()
    Counted.calls = 0
    attach(trainer, module, train_dataloaders=loader(blobs(N)))
    with Objective.open(trainer, module) as objective:
        (batch,) = Examples.from_batch(blobs(N).tensors, objective.prepare, batch_size=N).batches()
        with pytest.raises(ObjectiveError, match=r"Counted\.training_step .* Call learn_structure"):
            objective.losses(objective.theta, batch)
    assert Counted.calls == 0


class Whole(LossFunction):
    """Another loss function, with the required methods only."""

    def evaluate(self, theta: Tensor, batch: Batch, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        logits = self.shadow.call(theta, "forward", batch.data[0], buffers=buffers)
        return F.cross_entropy(logits, batch.data[1], reduction="none")

    def sum_of(self, evaluated: Tensor, batch: Batch) -> Tensor:
        return evaluated.sum()

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        return self.evaluate(theta, batch)


def test_another_loss_function_is_another_class() -> None:
    with opened(Own) as (objective, batch):
        own, further, theta = objective.loss, Whole(objective.shadow), objective.theta
        predicted = outputs(own, theta, batch)
        assert torch.equal(outputs(further, theta, batch), predicted)
        assert torch.equal(
            loss_sum_at(further, theta, batch)(2 * predicted), loss_sum_at(own, theta, batch)(2 * predicted)
        )
        for one, other in zip(loss_and_logits(further, theta, batch), loss_and_logits(own, theta, batch), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(*(torch.cat(list(loss.gradients(theta, batch))) for loss in (own, further)))
        directions = torch.randn(2, len(theta), dtype=theta.dtype)
        assert torch.equal(forward_mode(further, batch, directions), forward_mode(own, batch, directions))
