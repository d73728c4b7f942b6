"""Curvature examples: class shares, probabilities, and the variance of the draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_gif import SAMPLERS, ConfigurationError, GIFCallback, attach
from lightning_gif.curvature.sampling import curvature_sample, sample_size
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective
from lightning_gif.unlearning.goals import ClassRemoval, ExampleRemoval, LabelCorrection

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from ..nets import Regressor


@contextmanager
def opened(dataset: TensorDataset, module: Classifier | None = None) -> Iterator[tuple[Objective, Examples]]:
    trainer = make_trainer()
    module = Classifier() if module is None else module
    attach(trainer, module, train_dataloaders=loader(dataset))
    with Objective.open(trainer, module) as objective:
        train = Examples.from_loader(loader(dataset), objective.prepare, batch_size=16)
        objective.learn_structure(train)
        yield objective, train


def drawn(objective: Objective, train: Examples, how: str, count: int, seed: int = 0) -> Tensor:
    found = curvature_sample(objective, train, count, how, seed)
    assert len(found) == count
    assert torch.equal(found.ids, found.ids.unique())  # each once, in order
    return found.ids


@pytest.mark.parametrize("how", list(SAMPLERS))
def test_a_sample_has_the_requested_size_and_is_reproduced_by_its_seed(how: str) -> None:
    with opened(blobs(60)) as (objective, train):
        for count in (1, 7, 59):
            assert torch.equal(drawn(objective, train, how, count), drawn(objective, train, how, count))
        assert not torch.equal(drawn(objective, train, how, 20, seed=1), drawn(objective, train, how, 20, seed=2))
        assert curvature_sample(objective, train, None, how, 0) is train
        assert curvature_sample(objective, train, 60, how, 0) is train


def rare() -> TensorDataset:
    """90 examples of class 0, 9 of class 1 and one of class 2, in mixed order."""
    x, y = torch.randn(100, 6), torch.tensor([0] * 90 + [1] * 9 + [2])
    order = torch.randperm(100)
    return TensorDataset(x[order], y[order])


def test_a_balanced_sample_has_as_many_of_each_class_and_all_of_small_ones() -> None:
    dataset = rare()
    with opened(dataset) as (objective, train):
        for count, expected in ((3, [1, 1, 1]), (9, [4, 4, 1]), (30, [20, 9, 1])):
            for seed in range(5):
                classes = dataset.tensors[1][drawn(objective, train, "balanced", count, seed)]
                assert torch.bincount(classes, minlength=3).tolist() == expected


@pytest.mark.parametrize("how", ["features", "logits"])
def test_a_representative_sample_has_the_true_class_shares(how: str) -> None:
    dataset = rare()
    with opened(dataset) as (objective, train):
        for seed in range(10):
            classes = dataset.tensors[1][drawn(objective, train, how, 20, seed)]
            counts = torch.bincount(classes, minlength=3)
            assert abs(int(counts[0]) - 18) <= 1
            assert abs(int(counts[1]) - 2) <= 1


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("how", ["random", "features", "logits"])
def test_each_example_is_drawn_with_the_same_probability(how: str) -> None:
    with opened(blobs(40)) as (objective, train):
        times = torch.zeros(40)
        for seed in range(300):
            times[drawn(objective, train, how, 10, seed)] += 1
    # 300 draws of a quarter: 75 expected, with a standard deviation of 7.5.
    assert (times - 75).abs().max() < 4.5 * 7.5


def test_representative_samples_have_less_variance_than_random_ones() -> None:
    """The variance is that of the Hessian, in the Frobenius norm, as a share of that of random draws."""
    dataset = blobs(400)
    _, module, _ = fitted(Classifier(), dataset, max_epochs=8)
    parameters = dict(module.net.named_parameters())

    def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        rows = flat.split([parameter.numel() for parameter in parameters.values()])
        values = {name: row.view_as(parameters[name]) for name, row in zip(parameters, rows, strict=True)}
        return F.cross_entropy(functional_call(module.net, values, (x[None],)), y[None])

    flat = nn.utils.parameters_to_vector(parameters.values()).detach()
    hessians = torch.func.vmap(torch.func.hessian(loss), (None, 0, 0))(flat, *dataset.tensors)
    # The variance of the mean of 40 of 400, drawn at random without replacement.
    random = float(hessians.var(0).sum()) * (1 / 40 - 1 / 400)
    with opened(dataset, module) as (objective, train):
        error = {}
        for how in ("random", "features", "logits"):
            means = torch.stack([hessians[drawn(objective, train, how, 40, seed)].mean(0) for seed in range(60)])
            error[how] = float((means - hessians.mean(0)).square().sum((1, 2)).mean()) / random
    assert 0.7 < error["random"] < 1.3
    assert error["features"] < 1.1
    assert error["logits"] < 0.95


def test_without_labels_all_examples_form_one_class() -> None:
    dataset = TensorDataset(torch.randn(30, 6), torch.randn(30))
    with opened(dataset, Regressor(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)))) as (objective, train):
        for how in ("features", "logits"):
            assert len(drawn(objective, train, how, 10)) == 10
        with pytest.raises(ConfigurationError, match="'balanced' needs targets that are labels"):
            drawn(objective, train, "balanced", 10)


def test_features_need_a_linear_layer_at_the_end() -> None:
    net = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 6), nn.Flatten())
    with (
        opened(blobs(20), Classifier(net)) as (objective, train),
        pytest.raises(ConfigurationError, match="'logits' or 'random'"),
    ):
        drawn(objective, train, "features", 5)


def test_forget_examples_are_not_curvature_examples() -> None:
    """Forget examples are looked up in the training data and excluded from every sample."""
    trainer, _, dataset = fitted()
    seen: list[Tensor] = []

    @SAMPLERS.register("spy")
    def spy(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
        seen.append(examples.ids)
        return torch.arange(count)

    try:
        trainer.unlearn(batch_of(dataset, slice(3, 9)), curvature_sampling="spy", curvature_examples=10, step="natural")
    finally:
        SAMPLERS._items.pop("spy")
    (ids,) = seen
    assert set(ids.tolist()) == set(range(len(dataset))) - set(range(3, 9))


def test_class_removal_uses_fewer_curvature_examples_unless_a_number_is_given() -> None:
    settings = GIFCallback().settings
    assert sample_size(settings) == 2048
    sizes = {goal: goal().sample_size(settings) for goal in (ExampleRemoval, LabelCorrection, ClassRemoval)}
    assert sizes == {ExampleRemoval: 2048, LabelCorrection: 2048, ClassRemoval: 1024}
    for given in (3000, None):
        settings = GIFCallback(curvature_examples=given).settings
        assert sample_size(settings) == ClassRemoval().sample_size(settings) == given
