"""Any user's module, data and training keep their tensors, values and bits."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gif.selection.tracker
from lightning_gif import ConfigurationError, ConvergenceError, GIFCallback, GIFWarning, attach
from lightning_gif.curvature.solve import newton, solve
from lightning_gif.data.examples import Examples
from lightning_gif.data.structure import batch_size, map_tensors, slice_batch, tensors
from lightning_gif.errors import BatchError, ConvergenceWarning
from lightning_gif.objective.objective import Objective
from lightning_gif.selection import GradientStatistics, NeuronStatistics
from lightning_gif.selection.snapshots import Snapshots
from lightning_gif.solvers import cg, truncated_newton
from lightning_gif.solvers.solution import Status

from .conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights
from .solvers.test_solvers import INDEFINITE, Matrix


def state_of(module: nn.Module, trainer: pl.Trainer) -> list[Any]:
    """The tensors of a module in all their places, and the expected effect of a call on them."""
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
# One tensor in several places of a module
# ----------------------------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


class OneLayerTwice(Classifier):
    def __init__(self) -> None:
        super().__init__(net())
        self.backbone = self.net[0]


class AliasFirst(pl.LightningModule):
    """A layer is called by another name than in ``named_parameters``."""

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


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("name", list(SHARING))
def test_a_module_with_tensors_in_several_places_keeps_each_of_them(name: str) -> None:
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


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("name", ["OneLayerTwice", "AliasFirst", "Nested", "Listed", "Thrice"])
def test_a_second_name_for_a_layer_does_not_change_scores_or_edits(name: str) -> None:
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


def test_changes_that_a_training_step_makes_to_the_module_are_undone_after_a_call() -> None:
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
# Training steps that write to parameters
# ----------------------------------------------------------------------------------------------------------------------


class Writes(Classifier):
    """The loss compares with a second network, to which each step writes."""

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
    """The second network is in a plain list, so `parameters()` does not include it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.teacher]
        del self.teacher

    def second(self) -> nn.Module:
        return self.hidden[0]


class Referred(Writes):
    """Writes to parameters in a list of its own, not to those of its layers."""

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


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("name", list(WRITING))
@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_a_training_step_that_writes_to_parameters_does_not_change_the_users(name: str) -> None:
    trainer, module, data = fitted(WRITING[name]())
    with torch.no_grad():
        module.net[0].weight.mul_(3.0)  # so that weights are clipped
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
def test_each_evaluation_of_a_writing_training_step_starts_from_the_same_parameters(name: str) -> None:
    trainer, module, data = fitted(WRITING[name]())
    with torch.no_grad():
        module.net[0].weight.mul_(3.0)
    with Objective.open(trainer, module) as objective:
        theta = objective.theta.clone()
        examples = Examples.from_batch(list(batch_of(data, slice(8))), objective.prepare, batch_size=8)
        objective.learn_structure(examples)
        (batch,) = examples.batches()
        first = objective.losses(objective.theta, batch)
        objective.directional_derivatives(batch, torch.ones_like(theta)[None])
        for _ in range(3):
            again = objective.losses(objective.theta, batch)
        assert torch.equal(again, first)
        assert torch.equal(objective.theta, theta)


# ----------------------------------------------------------------------------------------------------------------------
# Training continues
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Graphs:
    """A batch whose constructor has an argument that it does not store."""

    items: InitVar[list[tuple[Tensor, Tensor]]]
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)

    def __post_init__(self, items: list[tuple[Tensor, Tensor]]) -> None:
        self.x, self.y = (torch.stack(list(part)) for part in zip(*items, strict=True))


class OfGraphs(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch.x), batch.y)


def trained(
    module: Callable[[], pl.LightningModule], data: Callable[[], DataLoader[Any]], callback: GIFCallback | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The weights after a fit, and the next random numbers."""
    torch.manual_seed(0)
    fit = module()
    make_trainer(callback, max_epochs=3).fit(fit, data())
    assert not any(one._forward_hooks for one in fit.modules())
    return weights(fit), torch.rand(3)


def check_trained_alike(
    callback: GIFCallback,
    message: str | None,
    module: Callable[[], pl.LightningModule] = Classifier,
    data: Callable[[], DataLoader[Any]] = lambda: loader(blobs()),
) -> None:
    """Training with the callback equals training without it bit for bit, with one warning or none."""
    expected = trained(module, data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trained(module, data, callback)
    assert same_weights(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    told = [str(warning.message) for warning in caught if issubclass(warning.category, GIFWarning)]
    assert len(told) == (message is not None), told
    assert all(message in text for text in told)


def graphs() -> DataLoader[Any]:
    return DataLoader(blobs(), 16, shuffle=True, collate_fn=Graphs)


def test_a_batch_that_cannot_be_rebuilt_causes_no_warning_in_training() -> None:
    callback = GIFCallback()
    check_trained_alike(callback, None, OfGraphs, graphs)
    assert callback.targets is not None
    assert all(int(counts.sum()) == 48 for counts in callback.neurons.output_counts.values())


def test_a_batch_that_cannot_be_rebuilt_can_be_read_sliced_and_mapped() -> None:
    batch = Graphs(list(blobs(6)))
    x, y = batch.x.clone(), batch.y
    assert batch_size(batch) == 6
    assert [tensor.shape for tensor in tensors(batch)] == [(6, 6), (6,)]
    piece = slice_batch(batch, 1, 3)
    assert type(piece) is Graphs
    assert torch.equal(piece.x, x[1:3])
    assert torch.equal(piece.y, y[1:3])
    assert torch.equal(map_tensors(batch, lambda tensor: tensor + 1).x, x + 1)
    assert torch.equal(batch.x, x)
    batch.y = y[:4]
    with pytest.raises(BatchError, match="disagree"):
        batch_size(batch)


def test_reading_a_batch_does_not_rebuild_it() -> None:
    class Rows(list[Tensor]):
        def __init__(self, *args: Any) -> None:
            raise AssertionError("made anew")

    rows = Rows.__new__(Rows)
    rows.extend([torch.zeros(3, 2), torch.zeros(3)])
    assert batch_size({"rows": rows}) == 3

    @dataclass(frozen=True)
    class Checked:
        x: Tensor
        names: list[str]

        def __post_init__(self) -> None:
            made.append(self)

    made: list[Any] = []
    batch = Checked(torch.zeros(3, 2), ["a", "b", "c"])
    assert batch_size(batch) == 3
    assert len(made) == 1
    assert slice_batch(batch, 1, 3).names == ["b", "c"]
    assert len(made) == 1  # the pieces are copies, as where Lightning moves a batch to a device


def failing(*args: Any, **kwargs: Any) -> Any:
    raise LookupError("on purpose")


PLACES: dict[str, tuple[Any, str, str]] = {
    "the batch's size": (lightning_gif.selection.tracker, "batch_size", "reading the batch failed with"),
    "the batch's classes": (lightning_gif.selection.tracker, "class_targets", "reading the batch failed with"),
    "a forward pass": (NeuronStatistics, "_keep", "reading what passes through a layer failed with"),
    "sums": (NeuronStatistics, "_add", "summing the statistics of batches failed with"),
    "gradients": (GradientStatistics, "add", "reading the gradients failed with"),
    "the targets": (lightning_gif.selection.tracker, "select", "picking the target parameters failed with"),
    "a snapshot": (Snapshots, "add", "taking a snapshot of the weights failed with"),
    "the hooks": (NeuronStatistics, "attach", "hooking into the layers failed with"),
}


@pytest.mark.parametrize("name", list(PLACES))
def test_an_error_in_gathering_statistics_stops_the_gathering_and_not_the_fit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, words = PLACES[name]
    monkeypatch.setattr(owner, attribute, failing)
    callback = GIFCallback(snapshots=1)
    check_trained_alike(callback, f"no more statistics in this fit: {words} LookupError: on purpose. Training goes on")


def test_an_error_in_a_backward_hook_stops_the_gathering_and_not_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = NeuronStatistics._keep

    def once_in_backward(self: NeuronStatistics, kind: str, *args: Any) -> None:
        failing() if kind == "gradient" else keep(self, kind, *args)

    monkeypatch.setattr(NeuronStatistics, "_keep", once_in_backward)
    callback = GIFCallback()
    check_trained_alike(callback, "in this fit: reading what passes through a layer failed with LookupError")
    assert not callback.neurons
    assert not callback.gradients


def test_targets_stay_or_are_picked_on_demand_after_gathering_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    data = blobs()
    callback = GIFCallback(ratio=0.5, unconverged="ignore")
    trainer = make_trainer(callback, max_epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(lightning_gif.selection.tracker, "class_targets", failing)
        with pytest.warns(GIFWarning, match="will be picked by a pass over the training data"):
            trainer.fit(Classifier(), loader(data))
    assert callback.targets is None
    assert trainer.influence(batch_of(data, slice(4)), targets="cached").scores.shape == (1, 48)
    assert callback.targets is not None

    callback = GIFCallback(ratio=0.5, unconverged="ignore")
    trainer = make_trainer(callback, max_epochs=2)

    def break_in_second(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            monkeypatch.setattr(lightning_gif.selection.tracker, "class_targets", failing)

    trainer.callbacks.insert(0, LambdaCallback(on_train_epoch_start=break_in_second))
    with pytest.warns(GIFWarning, match="stay as they were picked before"):
        trainer.fit(Classifier(), loader(data))
    assert callback.targets_epoch == 0
    monkeypatch.undo()
    assert trainer.influence(batch_of(data, slice(4)), targets="cached").scores.shape == (1, 48)
    trainer.fit_loop.max_epochs = 3  # a new fit gathers statistics again
    trainer.fit(trainer.lightning_module, loader(data))
    assert callback.targets_epoch == 2


def test_an_interrupt_in_a_hook_still_ends_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lightning_gif.selection.tracker, "class_targets", interrupt)
    trainer = make_trainer(GIFCallback())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(Classifier(), loader(blobs()))
    assert trainer.global_step == 0


@pytest.mark.parametrize("late", [False, True])
def test_an_unexpected_error_in_a_report_stops_the_reports_and_not_the_fit(late: bool) -> None:
    class Choosy(Classifier):
        """Fails in every evaluation by the callback, whose weights are no parameters; or after the first epoch."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            in_training = isinstance(next(self.parameters()), nn.Parameter)
            if not in_training and (self.current_epoch or not late):
                raise LookupError("on purpose")
            return super().training_step(batch, batch_idx)

    callback = GIFCallback(
        report_every_n_epochs=1, query=batch_of(blobs(), slice(4)), unconverged="ignore", log_reports=False
    )
    when = "at the end of epoch 1" if late else "before training"
    check_trained_alike(callback, f"No influence report {when}, and none later in this fit: LookupError", Choosy)
    assert (callback.last_report is not None) == late


def test_a_checkpoint_is_written_without_state_that_cannot_be_saved(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, module, _ = fitted()
    monkeypatch.setattr(NeuronStatistics, "state", failing)
    with pytest.warns(GIFWarning, match="adding the state of GIFCallback to a checkpoint failed"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same_weights(found["state_dict"], weights(module))


# ----------------------------------------------------------------------------------------------------------------------
# Complex parameters
# ----------------------------------------------------------------------------------------------------------------------


class Fourier(Classifier):
    """A layer with complex weights, before or after layers with real weights."""

    def __init__(self, first: bool = False) -> None:
        super().__init__(nn.Identity())
        spectral = nn.Linear(4, 8).to(torch.complex64)
        if first:
            self.spectral = spectral
        self.net = nn.Linear(8, 3)
        if not first:
            self.spectral = spectral

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.spectral(torch.fft.rfft(x)).abs())


@pytest.mark.parametrize("first", [False, True])
def test_complex_parameters_are_refused_by_name_with_a_remedy(first: bool) -> None:
    trainer = make_trainer(GIFCallback())
    module, data = Fourier(first), blobs()
    trainer.fit(module, loader(data))
    values = weights(module)
    message = r"Fourier has complex ones: spectral\.weight, spectral\.bias\. .*view_as_real.*requires_grad_\(False\)"
    for ask in (trainer.influence, trainer.unlearn):
        with pytest.raises(ConfigurationError, match=message):
            ask(batch_of(data, slice(4)))
    with pytest.raises(ConfigurationError, match=message):
        trainer.self_influence()
    assert same_weights(weights(module), values)


def test_training_with_complex_parameters_is_unchanged_bit_for_bit_with_one_warning() -> None:
    check_trained_alike(
        GIFCallback(), "has complex ones: spectral.weight, spectral.bias. Store each as a real parameter", Fourier
    )


def test_frozen_complex_parameters_are_supported() -> None:
    module = Fourier()
    module.spectral.requires_grad_(False)
    trainer, _, data = fitted(module)
    with torch.no_grad():
        features = module.spectral(torch.fft.rfft(data.tensors[0])).abs()
    plain = TensorDataset(features, data.tensors[1])
    other = make_trainer()
    attach(other, Classifier(module.net), train_dataloaders=loader(plain))
    options: dict[str, Any] = {"double": True, "solver": "dense", "damping": 0.1, "snapshots": False}
    found = trainer.influence(batch_of(data, slice(4)), **options).scores
    expected = other.influence(batch_of(plain, slice(4)), **options).scores
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# Solves that end at negative curvature
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtol", [None, 1e-6])
def test_a_solve_that_met_negative_curvature_is_not_converged(rtol: float | None) -> None:
    rhs = torch.ones(INDEFINITE.shape[0], dtype=torch.float64)
    settings = GIFCallback(solver="cg", rtol=rtol, max_iter=50, unconverged="raise").settings
    assert cg(Matrix(INDEFINITE), rhs, rtol=1e-6, max_iter=50).status is Status.INDEFINITE
    words = r"'indefinite'.*without positive curvature.*solver='lsmr'.*unconverged='ignore'"
    with pytest.raises(ConvergenceError, match=words):
        solve(settings, Matrix(INDEFINITE), rhs)
    with pytest.warns(ConvergenceWarning, match=words):
        solve(dataclasses.replace(settings, unconverged="warn"), Matrix(INDEFINITE), rhs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(dataclasses.replace(settings, unconverged="ignore"), Matrix(INDEFINITE), rhs)


def test_a_newton_step_may_end_at_negative_curvature() -> None:
    rhs = torch.ones(INDEFINITE.shape[0], dtype=torch.float64)
    settings = GIFCallback(rtol=1e-6, max_iter=50, unconverged="raise").settings
    solution, _ = newton(settings, Matrix(INDEFINITE), rhs, 0.0)
    assert solution.status is Status.INDEFINITE
    expected, _ = truncated_newton(Matrix(INDEFINITE), rhs, damping=0.0, relative=0.0, rtol=1e-6, max_iter=50)
    assert torch.equal(solution.x, expected.x)


def test_influence_by_conjugate_gradients_on_an_indefinite_hessian_raises_on_request() -> None:
    trainer, _, data = fitted(Classifier(net()), TensorDataset(*blobs().tensors), max_epochs=1)
    asked: dict[str, Any] = {"curvature": "hessian", "solver": "cg", "damping": 0.0, "rtol": 1e-6}
    with pytest.raises(ConvergenceError, match="'indefinite'"):
        trainer.influence(batch_of(data, slice(4)), unconverged="raise", **asked)
    with pytest.warns(ConvergenceWarning, match="'indefinite'"):
        trainer.influence(batch_of(data, slice(4)), unconverged="warn", **asked)
