"""A class is recognised wherever its label is, and forgotten without running away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gif import GIFWarning
from lightning_gif.data.targets import class_targets, replace_targets

from ..conftest import blobs
from .reference import Module, fitted
from .test_batches import Items

X, Y = blobs(60).tensors
ONE_HOT = F.one_hot(Y, 3).float()


class Record:
    """A batch object with attributes."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x = x
        self.y = y

    def to(self, device: Any) -> Record:
        return self


def record(items: Any) -> Record:
    return Record(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))


def named(items: Any) -> list[Any]:
    return [torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]), ["name"] * len(items)]


def parts(batch: Any) -> tuple[Tensor, Tensor]:
    return (batch.x, batch.y) if isinstance(batch, Record) else tuple(batch[:2])


class Classifier(Module):
    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = parts(batch)
        dtype = self.net[0].weight.dtype
        return self.loss(self.net(x.to(dtype)), y.to(dtype) if y.is_floating_point() else y)


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    return (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean()


def by_hand_one_hot(z: Tensor, y: Tensor) -> Tensor:
    return -(y * z.log_softmax(1)).sum(1).mean()


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Any]] = {
    "one-hot": (F.cross_entropy, ONE_HOT, None),
    "attribute": (F.cross_entropy, Y, record),
    "before a name": (F.cross_entropy, Y, named),
    "by hand": (by_hand, Y, None),
    "by hand, one-hot": (by_hand_one_hot, ONE_HOT, None),
    "by hand, attribute": (by_hand, Y, record),
}


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
@pytest.mark.parametrize("name", list(CASES))
def test_a_class_is_removed_wherever_its_label_is(name: str) -> None:
    loss, labels, collate = CASES[name]
    module = Classifier(loss)
    trainer = fitted(module, Items(list(zip(X, labels, strict=True))), collate, epochs=20)
    with torch.no_grad():
        before = (module.net(X).argmax(1) == Y).float()
    report = trainer.unlearn((Y == 1).nonzero().flatten().tolist())
    assert report.goal == "class"
    with torch.no_grad():
        after = (module.net(X).argmax(1) == Y).float()
    assert before[Y == 1].mean() > 0.9
    assert after[Y == 1].mean() < 0.1
    assert after[Y != 1].mean() > 0.9
    assert report.forget.after < 20  # beyond the loss of guessing, log 3, but not without end


def test_rows_that_are_not_one_hot_are_no_labels() -> None:
    assert class_targets((X[:2], torch.tensor([[0.2, 0.8], [1.0, 0.0]]))) is None
    assert class_targets((X[:2], torch.tensor([[1.0, 1.0], [1.0, 0.0]]))) is None
    assert class_targets((X[:2], torch.tensor([[0.0, 0.0], [1.0, 0.0]]))) is None
    assert class_targets((X[:2], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))).tolist() == [1, 0]  # type: ignore[union-attr]


def test_targets_that_are_an_attribute_are_replaced_in_a_copy() -> None:
    batch = record(list(zip(X[:2], Y[:2], strict=True)))
    changed = replace_targets(batch, torch.tensor([2, 2]))
    assert changed.y.tolist() == [2, 2]
    assert batch.y.tolist() == Y[:2].tolist()
    assert changed.x is batch.x


def test_a_whole_class_of_a_loss_over_other_targets_warns() -> None:
    """Labels that the loss does not classify: removal goes by single examples, and says so."""

    class Distances(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.mse_loss(self.net(x)[:, 0], y.to(x.dtype))

    trainer = fitted(Distances(), Items(list(zip(X, Y, strict=True))))
    with pytest.warns(GIFWarning):
        report = trainer.unlearn((Y == 1).nonzero().flatten().tolist(), dry_run=True)
    assert report.goal == "examples"
