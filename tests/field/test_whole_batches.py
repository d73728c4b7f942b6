"""Steps that look at reduced values, add in place or pick rows by a mask: their batches are evaluated as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_gif import BatchError, ObjectiveError, attach

from ..conftest import blobs, make_trainer
from .reference import CONVERGED, Module, cross_entropy, dense_scores, error, fitted
from .test_batches import (
    CLOUD_COLLATES,
    CLOUDS,
    QUERY,
    Bag,
    Clouds,
    Items,
    Tagger,
    exact_of_clouds,
    padded,
    query,
    texts,
)
from .test_batches import tagged as exact_of_texts

WHOLE = "training_step of whole batches"
DATA = blobs(40)


# --------------------------------------------------------------------------------------------------------------------
# Branches on reduced values
# --------------------------------------------------------------------------------------------------------------------


class MasksBySum(Tagger):
    """Sees from the sum of a mask whether texts are padded, as models of transformers do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mask, labels = batch["mask"], batch["labels"]
        hidden = self.embedding(batch["words"])
        full = mask.sum() == mask.numel()
        logits = self.net(hidden if full else hidden * mask[..., None])
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.mark.filterwarnings("ignore:The loss that:lightning_gif.GIFWarning")
def test_a_branch_on_the_sum_of_a_mask_is_that_of_the_batch() -> None:
    """The warning is that training weighs texts by their length."""
    module, data = MasksBySum("flattened"), Items(texts())
    report = fitted(module, data, padded).influence(query(data, padded), **CONVERGED)
    assert report.settings["losses"] == WHOLE
    assert error(report.scores[0], exact_of_texts(module)) < 1e-5


class Checked(Clouds):
    """Looks whether its loss is finite, and adds it to a counter in place, as loss metrics do."""

    limit = 1e9

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        bag, y = batch
        losses = (self.net(bag.means(self.net[0].weight.dtype))[:, 0] - y.to(self.net[0].weight.dtype)) ** 2
        total = torch.zeros((), dtype=losses.dtype)
        count = torch.zeros((), dtype=torch.long)
        total += losses.sum()
        count += torch.ones_like(losses, dtype=torch.long).sum()
        if not torch.isfinite(total):
            return total * 0
        mean = total / count
        return mean if mean < self.limit else 2 * mean


def test_a_branch_that_all_examples_take_and_a_sum_in_place() -> None:
    module, data, collate = Checked(), Items(CLOUDS), CLOUD_COLLATES["list"]
    report = fitted(module, data, collate).influence(query(data, collate), **CONVERGED)
    assert report.settings["losses"] == WHOLE
    assert error(report.scores[0], exact_of_clouds(module)) < 1e-5


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_examples_that_take_different_branches_are_evaluated_one_by_one() -> None:
    module, data, collate = Checked(), Items(CLOUDS), CLOUD_COLLATES["list"]
    trainer = fitted(module, data, collate)
    module.limit = 0.05
    assert trainer.influence(query(data, collate, 1)).settings["losses"] == "training_step for one example at a time"


def test_a_rare_branch_is_refused_where_it_is_met() -> None:
    """The examples that are tried first do not show it."""
    module, collate = Checked(), CLOUD_COLLATES["list"]
    many = 4 * CLOUDS
    data = Items([*many[:118], (CLOUDS[1][0], 9.0), *many[118:]])
    module.limit = 20.0
    trainer = fitted(module, data, collate, epochs=1)
    with pytest.raises(ObjectiveError, match=r"not all examples .* same branch. Define\s+`influence_loss`"):
        trainer.influence(query(data, collate))


class AddsInPlace(Clouds):
    """Adds to a tensor that is used under its old name."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        bag, y = batch
        total = torch.zeros((), dtype=self.net[0].weight.dtype)
        total.add_(F.mse_loss(self.net(bag.means(total.dtype))[:, 0], y.to(total.dtype)))
        return 1 * total


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_a_sum_in_place_under_another_name_is_not_lost() -> None:
    module, data, collate = AddsInPlace(), Items(CLOUDS), CLOUD_COLLATES["list"]
    report = fitted(module, data, collate).influence(query(data, collate), **CONVERGED)
    assert error(report.scores[0], exact_of_clouds(module)) < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# Rows that a mask picks
# --------------------------------------------------------------------------------------------------------------------


class Scattered(Clouds):
    """Picks points by a mask that all pass, and adds them up by their owner: the sums have one row for each cloud."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        bag, y = batch
        points = bag.points.to(self.net[0].weight.dtype)
        seen = points.isfinite().all(1)
        points, owner = points[seen], bag.owner[seen]
        total = points.new_zeros(bag.count, 6).index_add(0, owner, points)
        total = total / total.new_zeros(bag.count).index_add(0, owner, points.new_ones(len(owner)))[:, None]
        return F.mse_loss(self.net(total)[:, 0], y.to(points.dtype))


def test_rows_that_a_mask_picked_belong_to_examples_again_once_they_are_added_up() -> None:
    module, data, collate = Scattered(), Items(CLOUDS), CLOUD_COLLATES["list"]
    report = fitted(module, data, collate).influence(query(data, collate), **CONVERGED)
    assert report.settings["losses"] == WHOLE
    assert error(report.scores[0], exact_of_clouds(module)) < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# Queries in batches whose rows are no examples
# --------------------------------------------------------------------------------------------------------------------


def test_the_shown_queries_are_the_items_of_their_dataset() -> None:
    """Here the rows of a batch are time steps, of which there are fewer than examples."""
    x = torch.randn(20, 2, 6, generator=torch.Generator().manual_seed(0))
    data = Items([(one, number % 3) for number, one in enumerate(x)])

    def collate(items: Any) -> list[Tensor]:
        return [torch.stack([x for x, _ in items], 1), torch.tensor([[y for _, y in items]])]

    class TimeFirst(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x).mean(0), y[0])

    module = TimeFirst()
    trainer = fitted(module, data, collate)
    report = trainer.influence(DataLoader(Subset(data, [4, 5, 7]), 3, collate_fn=collate), **CONVERGED)
    assert [shown.label for shown in report.queries] == [1, 2, 1]
    examples = [(one.double(), y) for one, y in data.items]
    exact = dense_scores(module.net, lambda net, x: net(x).mean(0), cross_entropy, examples, [4, 5, 7])
    assert error(report.scores[0], exact) < 1e-5


def test_an_object_as_a_query_is_refused_with_the_way_out() -> None:
    data, collate = Items(CLOUDS), CLOUD_COLLATES["list"]
    trainer = fitted(Clouds(), data, collate)
    with pytest.raises(BatchError, match=r"got Bag\. .* DataLoader\(Subset\(dataset, indices\)"):
        trainer.influence(collate([data[index] for index in QUERY])[0])


class OwnLosses(Clouds):
    """A module with losses of its own for batches that cannot be divided."""

    def influence_loss(self, batch: Any) -> Tensor:
        bag, y = batch
        dtype = self.net[0].weight.dtype
        return (self.net(bag.means(dtype))[:, 0] - y.to(dtype)) ** 2


def test_self_influence_with_losses_of_its_own_needs_no_rows() -> None:
    data, collate = Items(CLOUDS), CLOUD_COLLATES["list"]
    own, derived = OwnLosses(), Clouds()
    derived.load_state_dict(own.state_dict())
    options = {"double": True, "damping": 0.1}
    torch.manual_seed(0)
    one = fitted(own, data, collate).self_influence(**options)
    torch.manual_seed(0)
    other = fitted(derived, data, collate).self_influence(**options)
    assert one.settings["losses"] == "influence_loss"
    assert error(one.scores[0], other.scores[0]) < 1e-8


# --------------------------------------------------------------------------------------------------------------------
# Float64 in objects
# --------------------------------------------------------------------------------------------------------------------


class AsGiven(Clouds):
    """Takes the points of an object in their own dtype."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        bag, y = batch
        return F.mse_loss(self.net(bag.means(bag.points.dtype))[:, 0], y.to(bag.points.dtype))


class Closed(Bag):
    """An object that cannot be pickled."""

    def __init__(self, points: list[Tensor]) -> None:
        super().__init__(points)
        self.call = lambda: None


def test_tensors_inside_of_objects_are_in_float64_too() -> None:
    module, data, collate = AsGiven(), Items(CLOUDS), CLOUD_COLLATES["list"]
    trainer = fitted(module, data, collate)
    batch = collate([data[index] for index in QUERY])
    assert error(trainer.influence(batch, **CONVERGED).scores[0], exact_of_clouds(module)) < 1e-6
    assert batch[0].points.dtype == torch.float32


def test_an_object_that_cannot_be_copied_is_passed_as_it_is() -> None:
    data = Items(CLOUDS)

    def collate(items: Any) -> list[Any]:
        return [Closed([x for x, _ in items]), torch.tensor([y for _, y in items])]

    module = AsGiven()
    trainer = fitted(module, data, collate)
    scores = trainer.influence(query(data, collate), **{**CONVERGED, "double": False, "rtol": 1e-6}).scores[0]
    assert error(scores, exact_of_clouds(module)) < 1e-3
    with pytest.raises(ObjectiveError, match=r"fails in float64.*x\.to\(self\.net\.weight\.dtype\)"):
        trainer.influence(query(data, collate), **CONVERGED)


# --------------------------------------------------------------------------------------------------------------------
# Batches that check what they hold
# --------------------------------------------------------------------------------------------------------------------


class Rows:
    """A field that accepts a tensor of whole rows only."""

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else instance.__dict__[self.name]

    def __set__(self, instance: Any, value: Tensor) -> None:
        if value.ndim != self.dims or (self.dims == 2 and value.shape[1] != 6):
            raise ValueError(f"got shape {list(value.shape)}")
        instance.__dict__[self.name] = value


@dataclass(init=False)
class CheckedBatch:
    x: Rows = Rows(2)
    y: Rows = Rows(1)

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class OfChecked(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch.x), batch.y)


def test_a_batch_that_checks_its_fields_is_taken_apart_all_the_same() -> None:
    def collate(items: Any) -> CheckedBatch:
        return CheckedBatch(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))

    module = OfChecked()
    trainer = fitted(module, DATA, collate)
    report = trainer.influence(collate([DATA[index] for index in QUERY]), **CONVERGED)
    examples = [(x.double(), y) for x, y in zip(*DATA.tensors, strict=True)]
    assert (
        error(report.scores[0], dense_scores(module.net, lambda net, x: net(x), cross_entropy, examples, QUERY)) < 1e-5
    )
    trainer.self_influence()
    trainer.unlearn([1, 2], dry_run=True)


# --------------------------------------------------------------------------------------------------------------------
# Steps and collate functions that need several examples
# --------------------------------------------------------------------------------------------------------------------


class NormalisedClouds(Module):
    """Normalises over the examples of a batch, which fails for a single one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        means = torch.stack([cloud.mean(0) for cloud, _ in batch])
        return F.cross_entropy(
            self.net(F.batch_norm(means, None, None, training=True)), torch.stack([y for _, y in batch])
        )


def test_ragged_batches_of_which_a_single_example_has_no_loss_are_refused_with_the_remedy() -> None:
    data = Items([(torch.randn(4 + index % 3, 6), torch.tensor(index % 3)) for index in range(24)])
    trainer = fitted(NormalisedClouds(), data, list)
    with pytest.raises(ObjectiveError, match=r"(?s)gives no losses.*its batches have no rows.*influence_loss"):
        trainer.influence(query(data, list))


def _collated(items: list[Any]) -> list[Tensor]:
    if len(items) < 2:
        raise ValueError("needs two examples")
    return [torch.stack(column) for column in zip(*items, strict=True)]


class Averaged(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_collate_function_that_needs_several_examples() -> None:
    module = Averaged()
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=DataLoader(DATA, 8, collate_fn=_collated))  # the trainer knows no epoch
    scores = trainer.self_influence().scores
    plain = make_trainer()
    attach(plain, module, train_dataloaders=DataLoader(DATA, 8))
    assert torch.allclose(scores, plain.self_influence().scores, rtol=1e-4)
    unseen = DataLoader(blobs(30, seed=5), 8, collate_fn=_collated)
    report = trainer.unlearn(list(range(8)), ratio=0.5, unseen=unseen, dry_run=True, step="natural")
    assert report.losses
