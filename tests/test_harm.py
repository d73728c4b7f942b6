"""What a user's module, data and training keep, whatever these are: the very same tensors, values and bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gif import GIFCallback
from lightning_gif.objective import Objective

from .conftest import Classifier, batch_of, blobs, fitted, loader, same_weights, weights


def state_of(module: nn.Module, trainer: pl.Trainer) -> list[Any]:
    """Which tensors a module has, in which places, and what is to happen to them."""
    places = [
        (id(one), kind, name, id(member))
        for one in module.modules()
        for kind in ("_parameters", "_buffers", "_modules")
        for name, member in getattr(one, kind).items()
    ]
    flags = [(name, parameter.requires_grad) for name, parameter in module.named_parameters()]
    optimized = [id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    return [places, flags, optimized, {id(p) for p in module.parameters() if p.requires_grad} <= set(optimized)]


# ----------------------------------------------------------------------------------------------------------------------
# One tensor in several places
# ----------------------------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


class OneLayerTwice(Classifier):
    def __init__(self) -> None:
        super().__init__(net())
        self.backbone = self.net[0]


class AliasFirst(pl.LightningModule):
    """The name that ``named_parameters`` has for a layer is not that which it is called by."""

    def __init__(self) -> None:
        super().__init__()
        layers = net()
        self.backbone = layers[0]
        self.net = layers

    forward = Classifier.forward
    training_step = Classifier.training_step
    configure_optimizers = Classifier.configure_optimizers
    lr = 0.1


class Nested(Classifier):
    """A group of layers, and one of its layers, beside the whole of them."""

    def __init__(self) -> None:
        super().__init__(net())
        self.groups = nn.ModuleDict({"all": nn.ModuleList([nn.Sequential(*self.net[:4]), self.net[3]])})


class Listed(Classifier):
    def __init__(self) -> None:
        super().__init__(net())
        self.layers = nn.ModuleList(self.net)
        self.head = self.net[5]


class Thrice(Classifier):
    def __init__(self) -> None:
        super().__init__(net())
        self.first, self.second = self.net, self.net


class TiedWeights(Classifier):
    """One weight in layers of different kinds, each of which is registered twice."""

    def __init__(self) -> None:
        super().__init__(net())
        self.outer = nn.Bilinear(1, 1, 1)
        self.outer.weight, self.outer.bias = self.net[3].weight, None
        self.again = self.outer

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[:5](x)
        return self.net[5](hidden + 0.1 * hidden @ self.outer.weight)


class SharedBuffers(Classifier):
    """The buffers of BatchNorm under another name, and a buffer in two modules."""

    def __init__(self) -> None:
        super().__init__(net())
        self.register_buffer("mean", self.net[1].running_mean)
        self.register_buffer("scale", torch.tensor(1.5))
        self.net[2].register_buffer("scale", self.scale)
        self.norm = self.net[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.net[2].scale + 0 * self.mean.sum()


class RecurrentTwice(Classifier):
    """A recurrent layer has a list of its own of its parameters."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
        self.cell = nn.GRU(6, 6, batch_first=True)
        self.encoder = self.cell

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.encoder(x[:, None])[0][:, -1])


SHARING: dict[str, Callable[[], pl.LightningModule]] = {
    kind.__name__: kind
    for kind in (OneLayerTwice, AliasFirst, Nested, Listed, Thrice, TiedWeights, SharedBuffers, RecurrentTwice)
}


@pytest.mark.parametrize("name", list(SHARING))
def test_a_module_that_holds_tensors_in_several_places_keeps_each_of_them(name: str) -> None:
    trainer, module, data = fitted(SHARING[name](), callback=GIFCallback(ratio=0.5, unconverged="ignore"))
    values, state = weights(module), state_of(module, trainer)
    assert state[-1]
    batch = batch_of(data, slice(4))
    first = trainer.influence(batch)
    trainer.self_influence()
    planned = trainer.unlearn(batch, dry_run=True)
    assert state_of(module, trainer) == state
    assert same_weights(weights(module), values)
    assert torch.equal(trainer.influence(batch).scores, first.scores)

    report = trainer.unlearn(batch)
    assert report.edit.digest == planned.edit.digest
    assert not same_weights(weights(module), values)
    assert state_of(module, trainer) == state
    report.undo()
    assert same_weights(weights(module), values)

    twin = copy.deepcopy(module)
    assert same_weights(weights(twin), values)
    assert len(list(twin.parameters())) == len(list(module.parameters()))
    trainer.fit_loop.max_epochs += 1
    trainer.fit(module, loader(data))
    assert not same_weights(weights(module), values)


@pytest.mark.parametrize("name", ["OneLayerTwice", "AliasFirst", "Nested", "Listed", "Thrice"])
def test_a_second_name_for_a_layer_changes_no_score_and_no_edit(name: str) -> None:
    found = []
    for kind in (lambda: Classifier(net()), SHARING[name]):
        torch.manual_seed(0)
        trainer, _, data = fitted(kind(), callback=GIFCallback(ratio=0.5, unconverged="ignore"))
        batch = batch_of(data, slice(4))
        report = trainer.unlearn(batch, dry_run=True)
        changes = [report.edit.new[key] for key in report.edit.new]
        found.append((trainer.influence(batch).scores, trainer.self_influence().scores, *changes))
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_reports_in_training_leave_a_layer_under_two_names_trainable() -> None:
    data = blobs()
    trained = []
    for options in ({}, {"report_every_n_epochs": 1, "query": batch_of(data, slice(4))}):
        torch.manual_seed(0)
        callback = GIFCallback(unconverged="ignore", **options)
        _, module, _ = fitted(OneLayerTwice(), data, callback, max_epochs=3)
        trained.append(weights(module))
    assert callback.last_report is not None
    assert same_weights(*trained)


def test_what_a_step_registers_and_replaces_is_gone_after_a_call() -> None:
    class Restless(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.register_buffer("seen", torch.ones(2))
            self.net[2].register_buffer("seen", torch.ones(2))
            if self.trainer.training:
                return loss
            self.net[0].bias = nn.Parameter(torch.zeros(8))
            self.extra = nn.Linear(2, 2)
            return loss

    trainer, module, data = fitted(Restless(), max_epochs=1)
    values, state = weights(module), state_of(module, trainer)
    trainer.influence(batch_of(data, slice(4)))
    assert state_of(module, trainer) == state
    assert same_weights(weights(module), values)


# ----------------------------------------------------------------------------------------------------------------------
# Steps that write
# ----------------------------------------------------------------------------------------------------------------------


class Writes(Classifier):
    """Its loss compares with a second net, to which each step writes."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def second(self) -> nn.Module:
        return self.teacher

    def write(self) -> None:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.write()
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits, y) + 0.1 * F.mse_loss(logits, self.second()(x))


class MomentumByData(Writes):
    def write(self) -> None:
        for q, p in zip(self.second().parameters(), self.net.parameters(), strict=True):
            q.data.mul_(0.9).add_(0.1 * p.data)


class MomentumInPlace(Writes):
    @torch.no_grad()
    def write(self) -> None:
        for q, p in zip(self.second().parameters(), self.net.parameters(), strict=True):
            q.lerp_(p, 0.1)


class Reassigned(Writes):
    def write(self) -> None:
        for q, p in zip(self.second().parameters(), self.net.parameters(), strict=True):
            q.data = 0.9 * q.data + 0.1 * p.data


class Hidden(MomentumByData):
    """The second net is in a plain list, so that nothing finds its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.teacher]
        del self.teacher

    def second(self) -> nn.Module:
        return self.hidden[0]


class Referred(Writes):
    """Writes to parameters that it keeps in a list of its own, not to those that its layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = list(zip(self.teacher.parameters(), self.net.parameters(), strict=True))

    def write(self) -> None:
        for q, p in self.pairs:
            q.data.mul_(0.9).add_(0.1 * p.data)


class ClippedByData(Writes):
    def write(self) -> None:
        for p in self.net.parameters():
            p.data.clamp_(-0.3, 0.3)


class ClippedInPlace(Writes):
    @torch.no_grad()
    def write(self) -> None:
        for p in self.net.parameters():
            p.clamp_(-0.3, 0.3)


class CountsInPlace(Writes):
    """A buffer that is shared by two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.net[1].register_buffer("count", self.count)

    def write(self) -> None:
        self.net[1].count.data += 1


WRITING: dict[str, type[Writes]] = {
    kind.__name__: kind
    for kind in (
        MomentumByData,
        MomentumInPlace,
        Reassigned,
        Hidden,
        Referred,
        ClippedByData,
        ClippedInPlace,
        CountsInPlace,
    )
}


def values_of(module: nn.Module) -> dict[str, Tensor]:
    hidden = {f"hidden.{name}": value for one in getattr(module, "hidden", []) for name, value in weights(one).items()}
    return {**weights(module), **hidden}


@pytest.mark.parametrize("name", list(WRITING))
@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_a_step_that_writes_to_parameters_writes_to_none_of_the_users(name: str) -> None:
    trainer, module, data = fitted(WRITING[name]())
    with torch.no_grad():
        module.net[0].weight.mul_(3.0)  # so that clipping has something to do
    values, state = values_of(module), state_of(module, trainer)
    batch = batch_of(data, slice(4))
    scores = trainer.influence(batch).scores
    trainer.unlearn(batch, dry_run=True)
    assert same_weights(values_of(module), values)
    assert state_of(module, trainer) == state
    assert torch.equal(trainer.influence(batch).scores, scores)
    trainer.unlearn(batch).undo()
    assert same_weights(values_of(module), values)
    assert state_of(module, trainer) == state


@pytest.mark.parametrize("name", ["MomentumByData", "MomentumInPlace", "ClippedByData", "ClippedInPlace"])
@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_each_evaluation_of_a_step_that_writes_starts_from_the_same_parameters(name: str) -> None:
    trainer, module, data = fitted(WRITING[name]())
    with torch.no_grad():
        module.net[0].weight.mul_(3.0)
    with Objective.open(trainer, module) as objective:
        theta = objective.theta.clone()
        batch = objective.prepare(list(batch_of(data, slice(8))))
        first = objective.losses(objective.theta, batch)
        objective.directional_derivatives(batch, torch.ones_like(theta)[None])
        for _ in range(3):
            again = objective.losses(objective.theta, batch)
        assert torch.equal(again, first)
        assert torch.equal(objective.theta, theta)
