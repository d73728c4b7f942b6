"""Modules with state: every evaluation finds the module and its trainer as a training step would."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from lightning_gif import ConfigurationError, GIFCallback, GIFWarning, attach

from ..conftest import batch_of, blobs, make_trainer
from .reference import CONVERGED, Module, cross_entropy, dense_scores, error, fitted, squared_error

DATA = blobs(40)
EXAMPLES = [(x.double(), y) for x, y in zip(*DATA.tensors, strict=True)]


def scores_of_the_first(trainer: Any) -> Tensor:
    return trainer.influence(batch_of(DATA, slice(1)), **CONVERGED).scores[0]


def exact(module: Module, factor: float = 1.0) -> Tensor:
    """Scores where the loss is the cross-entropy times a factor."""
    return dense_scores(
        module.net, lambda net, x: net(x), lambda z, y: factor * cross_entropy(z, y), EXAMPLES, query=[0]
    )


class Schedule:
    """An object of the user's own that counts the steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.seen: deque[int] = deque(maxlen=3)

    def weight(self) -> float:
        self.steps += 1
        self.seen.append(self.steps)
        return self.steps / 100


class Annealed(Module):
    """The weight of the loss grows with each step; where it is counted differs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.steps = 0
        self.counts = {"steps": 0}
        self.losses: list[Tensor] = []
        self.counter = torch.zeros(())
        self.by_data = [torch.zeros(())]
        self.schedule = Schedule()
        self.hidden = [torch.nn.Linear(1, 1)]

    def weight(self) -> Any:
        if self.kind == "attribute":
            self.steps += 1
            return self.steps / 100
        if self.kind == "dictionary":
            self.counts["steps"] += 1
            return self.counts["steps"] / 100
        if self.kind == "list":
            self.losses.append(torch.zeros(()))
            return len(self.losses) / 100
        if self.kind == "tensor":
            self.counter += 1
            return self.counter / 100
        if self.kind == "data":
            self.by_data[0].data.add_(1)
            return self.by_data[0] / 100
        if self.kind == "hidden module":
            self.hidden[0].weight.data.add_(1)
            return (self.hidden[0].weight.detach() / 100).sum()
        return self.schedule.weight()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.weight() * F.cross_entropy(self.net(x), y)


KINDS = ["attribute", "dictionary", "list", "tensor", "data", "hidden module", "object"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_counts_steps_is_that_of_the_next_step(kind: str) -> None:
    module = Annealed(kind)
    trainer = fitted(module, DATA)
    factor = float(copy.deepcopy(module).weight())
    state = copy.deepcopy((module.steps, module.counts, len(module.losses), module.counter, module.by_data))
    steps = module.schedule.steps, list(module.schedule.seen)
    assert error(scores_of_the_first(trainer), exact(module, factor)) < 1e-6
    trainer.unlearn([1, 2], dry_run=True)
    assert (module.steps, module.counts, len(module.losses), module.counter, module.by_data) == state
    assert (module.schedule.steps, list(module.schedule.seen)) == steps
    assert float(copy.deepcopy(module).weight()) == pytest.approx(factor)


class Flagged(Module):
    """Its step looks at the stage of the trainer."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x, y = batch
        return F.cross_entropy(self.net(x), y) if self.trainer.training else None


def test_the_trainer_is_in_training_for_the_step_and_as_it_was_for_the_user() -> None:
    module = Flagged()
    trainer = fitted(module, DATA)
    before = trainer.state.fn, trainer.state.stage, trainer.training
    assert error(scores_of_the_first(trainer), exact(module)) < 1e-6
    assert (trainer.state.fn, trainer.state.stage, trainer.training) == before


class Cached(Module):
    """Keeps what it computes first: in an attribute, a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Tensor | None = None
        self.caches: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.cache is None:
            self.cache, self.caches, self.by_name = torch.ones(1), [torch.ones(1)], {"a": torch.ones(1)}
        scale = self.cache + self.caches[0] + self.by_name["a"]
        return F.cross_entropy(self.net(x) * scale.to(x.dtype), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.cache = None
        self.training_step(batch, batch_idx)


def test_a_cache_that_validation_left_is_used_and_stays_the_same_tensor() -> None:
    module = Cached()
    trainer = fitted(module, DATA)
    trainer.validate(module, DataLoader(DATA, 8), verbose=False)
    left = module.cache, module.caches[0], module.by_name["a"]
    assert all(tensor is not None and tensor.is_inference() for tensor in left)
    scores = scores_of_the_first(trainer)
    scaled = dense_scores(module.net, lambda net, x: 3 * net(x), cross_entropy, EXAMPLES, query=[0])
    assert error(scores, scaled) < 1e-6
    assert all(
        one is other for one, other in zip((module.cache, module.caches[0], module.by_name["a"]), left, strict=True)
    )


class Plain(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def test_influence_loss_can_be_set_on_the_instance() -> None:
    module = Plain()
    module.influence_loss = lambda batch: 2 * F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")
    trainer = fitted(module, DATA)
    assert error(scores_of_the_first(trainer), exact(module, 2.0)) < 1e-6


def test_a_step_that_writes_to_a_parameter_behind_the_modules_back_is_reported() -> None:
    class Behind(Plain):
        """Holds its bias where no evaluation can replace it."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                held[0].add_(1e-3)
            return super().training_step(batch, batch_idx)

    module = Behind()
    held = [module.net[0].bias]
    trainer = fitted(module, DATA)
    with pytest.warns(GIFWarning, match=r"An evaluation has changed Behind: net\.0\.bias"):
        trainer.influence(batch_of(DATA, slice(1)), unconverged="ignore")


class Metered(Module):
    """Its loss is a metric that is called."""

    def __init__(self) -> None:
        super().__init__(6, 1)
        self.error = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.error(self.net(x)[:, 0], y.to(x.dtype))


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_a_metric_that_is_the_loss_has_its_value_and_keeps_its_count() -> None:
    module = Metered()
    trainer = fitted(module, DATA)
    module.error.update(torch.zeros(3), torch.ones(3))
    count = module.error.total.clone()
    exact = dense_scores(module.net, lambda net, x: net(x), squared_error, EXAMPLES, query=[0])
    report = trainer.influence(batch_of(DATA, slice(1)), **CONVERGED)
    assert error(report.scores[0], exact) < 1e-5
    assert report.curvature["kind"] == "ggn"
    assert torch.equal(module.error.total, count)


class ByEpoch(Module):
    """Its loss grows with the epoch."""

    def training_step(self, batch: Any) -> Tensor:
        return (1 + min(1.0, self.current_epoch / 5)) * F.cross_entropy(self.net(batch[0]), batch[1])


def attached(epoch: int | None) -> Any:
    torch.manual_seed(0)
    trainer = make_trainer(GIFCallback())
    attach(trainer, ByEpoch(), train_dataloaders=DataLoader(DATA, 8), epoch=epoch)
    return trainer


def test_the_loss_of_an_attached_model_is_that_of_its_epoch() -> None:
    trainer = attached(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        assert error(scores_of_the_first(trainer), exact(trainer.lightning_module, 2.0)) < 1e-5
    assert trainer.current_epoch == 0


def test_an_unknown_epoch_is_warned_of_and_the_remedy_works() -> None:
    with pytest.warns(GIFWarning, match=r"depends on the epoch.*attach\(trainer, model, epoch=10\)"):
        scores_of_the_first(attached(None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        scores_of_the_first(attached(10))


def test_a_fitted_trainer_knows_its_epoch() -> None:
    trainer = fitted(ByEpoch(), DATA, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        scores_of_the_first(trainer)


def test_an_epoch_must_be_a_whole_number() -> None:
    with pytest.raises(ConfigurationError, match=r"`epoch` must be .*whole number"):
        attached(-1)
