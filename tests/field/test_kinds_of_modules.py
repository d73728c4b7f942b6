"""Layers and steps that modules composed at random have shown to matter."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_gif import GIFCallback, GIFWarning, ObjectiveError
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective

from ..conftest import batch_of, blobs, make_trainer, same_weights, weights
from ..nets import Sine
from .reference import CONVERGED, Module, cross_entropy, dense_scores, error, fitted

DATA = blobs(40)
EXAMPLES = [(x.double(), y) for x, y in zip(*DATA.tensors, strict=True)]


class Plain(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("selector", ["highest_k_gradients", "largest_gradients"])
def test_a_weight_that_changes_buffers_when_it_is_read_is_not_read_in_training(selector: str) -> None:
    """Spectral normalisation takes a step of its power iteration at each reading of the weight."""
    trained = []
    for callback in (None, GIFCallback(selector, ratio=0.5)):
        torch.manual_seed(0)
        module = Plain()
        module.net[0] = parametrizations.spectral_norm(module.net[0])
        module.net[2] = nn.utils.spectral_norm(module.net[2])
        make_trainer(callback, max_epochs=2).fit(module, DataLoader(DATA, 8))
        trained.append(weights(module))
    assert same_weights(*trained)


class Checkpointed(Module):
    """Recomputes its activations in the backward pass."""

    def __init__(self, reentrant: bool, slow: bool) -> None:
        super().__init__()
        self.reentrant, self.slow = reentrant, slow

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda given: self.net[:2](given), x.requires_grad_(), use_reentrant=self.reentrant)
        return self.net[2](hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x.clone()), y)
        return loss * (2.0 if self.slow and float(loss) < 0 else 1.0)


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("slow", [False, True])
def test_checkpointed_activations_belong_to_the_parameters_of_their_evaluation(slow: bool, reentrant: bool) -> None:
    module = Checkpointed(reentrant, slow)
    trainer = fitted(module, DATA)
    exact = dense_scores(module.net, lambda net, x: net(x), cross_entropy, EXAMPLES, query=[0])
    assert error(trainer.influence(batch_of(DATA, slice(1)), **CONVERGED).scores[0], exact) < 1e-6


class Casting(Module):
    """Casts its input to the dtype of the module, as Lightning reports it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x.to(self.dtype)), y)


def test_the_dtype_of_a_module_is_that_of_the_evaluation() -> None:
    module, (x, y) = Casting(), DATA.tensors
    trainer = fitted(module, TensorDataset(x.double(), y))
    exact = dense_scores(module.net, lambda net, x: net(x), cross_entropy, EXAMPLES, query=[0])
    assert error(trainer.influence([x[:1].double(), y[:1]], **CONVERGED).scores[0], exact) < 1e-6
    assert module.dtype == torch.float32


class Convolving(Module):
    """Casts the input of a layer whose error message does not speak of a dtype."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(2, 3)
        self.layer = layer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.layer(x.float().view(-1, 3, 2) if isinstance(self.layer, nn.GRU) else x.float().view(-1, 2, 3))
        h = h[0][:, -1] if isinstance(h, tuple) else h.mean(2)
        return F.cross_entropy(self.net(h), y)


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 2, 2), nn.GRU(2, 2, batch_first=True), nn.ConvTranspose1d(2, 2, 2)])
def test_a_fixed_dtype_is_named_as_the_cause_for_any_layer(layer: nn.Module) -> None:
    trainer = fitted(Convolving(layer), DATA)
    with pytest.raises(ObjectiveError, match=r"fails in float64.*cast them to the dtype of the weights"):
        trainer.influence(batch_of(DATA, slice(1)), double=True)


class Metered(Module):
    """Its loss is a metric, in a step that can only be evaluated for one example after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        z = self.net(x)
        loss = self.error(z, F.one_hot(y, 3).to(x.dtype)) + 0.1 * z.square().mean()
        return loss * (2.0 if float(loss) < 0 else 1.0)


def test_a_metric_sums_in_the_precision_of_the_evaluation() -> None:
    trainer = fitted(Metered(), DATA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.influence(batch_of(DATA, slice(1)), **CONVERGED)
    assert not any("losses of the single examples" in str(one.message) for one in caught)


class Spread(Module):
    """Its loss has a deviation over the examples of a batch, which one example has not."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        z = self.net(x)
        return F.cross_entropy(z, y) + F.relu(1 - z.std(0)).mean()


def test_a_loss_that_one_example_has_not_is_refused_with_what_to_do() -> None:
    trainer = fitted(Spread(), DATA)
    with pytest.raises(ObjectiveError, match=r"(?s)not finite, but the loss of a larger batch is.*def influence_loss"):
        trainer.influence(batch_of(DATA, slice(1)))


class WithoutSecond(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net[2](Sine.apply(self.net[:2](x))), y)


@pytest.mark.filterwarnings("ignore:The losses of single examples are computed one after the other")
def test_a_function_that_cannot_be_differentiated_twice_is_named() -> None:
    """PyTorch leaves its part of second derivatives out, without an error."""
    trainer = fitted(WithoutSecond(), DATA)
    query = batch_of(DATA, slice(1))
    with pytest.raises(ObjectiveError, match=r"computes wrongly.*once_differentiable"):
        trainer.influence(query, curvature="ggn")
    with (
        pytest.warns(GIFWarning, match=r"not symmetric.*once_differentiable"),
        pytest.warns(GIFWarning, match=r"has no Gauss–Newton matrix"),
    ):
        trainer.influence(query, unconverged="ignore")


class Couples(Module):
    """For one example its cross-entropy is over one class, which happens to be the label of the first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.net(batch[0])
        similar = z @ z.T
        return F.cross_entropy(similar, torch.arange(len(z))) + 0.1 * z.square().sum(1).mean()


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_a_loss_of_couples_is_no_classifier() -> None:
    x, y = DATA.tensors
    data, module = TensorDataset(x, y.sort().values), Couples()
    trainer = fitted(module, data)
    with Objective.open(trainer, module) as objective:
        train = objective.learn_structure(Examples.from_loader(DataLoader(data, 8), objective.prepare, batch_size=8))
        assert objective.n_classes(train) is None


class Hiding(Module):
    """Uses a layer that it holds in a list, which no optimizer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(6, 6)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(self.hidden[0](x)), y)


def test_scores_keep_no_graph_of_a_hidden_layer() -> None:
    module = Hiding()
    trainer = fitted(module, DATA)
    query = batch_of(DATA, slice(1))
    assert not trainer.influence(query, unconverged="ignore").scores.requires_grad
    assert not trainer.self_influence().scores.requires_grad


class Scripted(Module):
    """Has a layer that TorchScript has compiled, whose parameters are in no plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(self.first(x)), y)


def test_a_scripted_layer_can_be_edited() -> None:
    trainer = fitted(Scripted(), DATA)
    assert trainer.unlearn([1, 2], max_iter=3, dry_run=True).edit.indices


class Correlated(Module):
    """Its loss has no second derivative for one example."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        z, t = self.net(x), F.one_hot(y, 3).to(x.dtype)
        loss = 1 - F.cosine_similarity(z - z.mean(0), t - t.mean(0), dim=0).mean()
        return loss * (2.0 if float(loss.detach()) < -1 else 1.0)


def test_a_loss_without_a_second_derivative_for_one_example_is_refused() -> None:
    trainer = fitted(Correlated(), DATA)
    with pytest.raises(ObjectiveError, match="compares the examples"):
        trainer.influence(batch_of(DATA, slice(3)), **CONVERGED)


class InPlaceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        scaled = result * 1.0
        product = scaled * slope
        scaled.zero_()  # a second derivative would need it
        return product


class WithoutSecondDerivative(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net[2](InPlaceBackward.apply(self.net[:2](x))), y)

    def influence_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net[2](InPlaceBackward.apply(self.net[:2](x))), y, reduction="none")


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
@pytest.mark.parametrize("call", ["influence", "self_influence", "unlearn"])
def test_a_second_derivative_that_cannot_be_computed_is_named(call: str) -> None:
    trainer = fitted(WithoutSecondDerivative(), DATA)
    arguments = {"influence": (batch_of(DATA, slice(2)),), "self_influence": (), "unlearn": ([1, 2],)}[call]
    with pytest.raises(ObjectiveError, match=r"a derivative that PyTorch cannot compute.*inplace operation"):
        getattr(trainer, call)(*arguments)
