"""Losses without a loss function of PyTorch have the Gauss–Newton matrix of the same loss with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gif import GIFWarning

from ..conftest import batch_of, blobs
from .reference import CONVERGED, LossOf, Module, cross_entropy, dense_scores, error, fitted

DATA = blobs(40)
EXAMPLES = [(x.double(), y) for x, y in zip(*DATA.tensors, strict=True)]

Step = Callable[[Module, Tensor, Tensor], Tensor]


def one_hot(y: Tensor, like: Tensor) -> Tensor:
    return (y[:, None] == torch.arange(3)).to(like.dtype)


def squares(prediction: Tensor, y: Any) -> Tensor:
    return ((prediction - one_hot(y.reshape(1), prediction)[0]) ** 2).sum()


def of_pairs(of_one: Callable[[Tensor, Tensor], Tensor]) -> LossOf:
    return lambda z, y: of_one(z.reshape(1, 3), y.reshape(1)).sum()


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    logs = z.log_softmax(1)
    return -0.9 * logs.gather(1, y[:, None]).mean() - 0.1 * logs.mean()


def binary(z: Tensor, y: Tensor) -> Tensor:
    t = one_hot(y, z)
    return -(t * F.logsigmoid(z) + (1 - t) * F.logsigmoid(-z)).sum(1).mean()


def by_sigmoid(z: Tensor, y: Tensor) -> Tensor:
    t, p = one_hot(y, z), z.sigmoid()
    return -(t * p.log() + (1 - t) * (1 - p).log()).sum(1).mean()


def huber(z: Tensor, y: Tensor) -> Tensor:
    size = (z - one_hot(y, z)).abs()
    return torch.where(size < 1, size**2 / 2, size - 0.5).sum(1).mean()


STEPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], LossOf]] = {
    "one-hot": (lambda z, y: -(one_hot(y, z) * z.log_softmax(1)).sum(1).mean(), cross_entropy),
    "gather": (lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(), cross_entropy),
    "log-sum-exp": (lambda z, y: (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean(), cross_entropy),
    "gather first": (lambda z, y: (-z.gather(1, y[:, None])[:, 0] + torch.logsumexp(z, 1)).mean(), cross_entropy),
    "log of softmax": (lambda z, y: -z.softmax(1).gather(1, y[:, None]).log().mean(), cross_entropy),
    "transposed": (lambda z, y: -(one_hot(y, z).T * z.T.log_softmax(0)).sum(0).mean(), cross_entropy),
    "viewed": (lambda z, y: -(one_hot(y, z) * z.view(-1, 1, 3).log_softmax(-1)[:, 0]).sum(1).mean(), cross_entropy),
    "temperature": (
        lambda z, y: -(one_hot(y, z) * (z / 2).log_softmax(1)).sum(1).mean(),
        lambda z, y: cross_entropy(z / 2, y),
    ),
    "smoothed": (smoothed, of_pairs(lambda z, y: smoothed(z, y)[None])),
    "binary": (binary, of_pairs(lambda z, y: binary(z, y)[None])),
    "softplus": (
        lambda z, y: (F.softplus(z) - z * one_hot(y, z)).sum(1).mean(),
        of_pairs(lambda z, y: binary(z, y)[None]),
    ),
    "sigmoid": (by_sigmoid, of_pairs(lambda z, y: binary(z, y)[None])),
    "squares": (lambda z, y: ((z - one_hot(y, z)) ** 2).sum(1).mean(), squares),
    "squares, target first": (lambda z, y: (one_hot(y, z) - z).square().sum(1).mean(), squares),
    "norm": (lambda z, y: torch.linalg.vector_norm(z - one_hot(y, z), dim=1).square().mean(), squares),
    "mse, target first": (lambda z, y: 3 * F.mse_loss(one_hot(y, z), z), squares),
    "Huber": (huber, of_pairs(lambda z, y: huber(z, y)[None])),
    "two parts": (
        lambda z, y: -(one_hot(y, z) * z.log_softmax(1)).sum(1).mean() + 0.1 * z.square().sum(1).mean(),
        lambda z, y: cross_entropy(z, y) + 0.1 * z.square().sum(),
    ),
    "penalty": (
        lambda z, y: F.cross_entropy(z, y) + 0.1 * (z - 1).square().sum(1).mean(),
        lambda z, y: cross_entropy(z, y) + 0.1 * (z - 1).square().sum(),
    ),
}


class ByHand(Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.loss = STEPS[name][0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)


@pytest.mark.mostly_slow(8)
@pytest.mark.parametrize("name", list(STEPS))
def test_scores_are_those_of_the_gauss_newton_matrix_in_the_predictions(name: str) -> None:
    module = ByHand(name)
    trainer = fitted(module, DATA)
    exact = dense_scores(module.net, lambda net, x: net(x), STEPS[name][1], EXAMPLES, [0, 1])
    report = trainer.influence(batch_of(DATA, slice(2)), **CONVERGED)
    assert report.curvature["kind"] == "ggn"
    assert error(report.scores[0], exact) < 1e-5


class Attentive(Module):
    """A softmax and a sigmoid inside of the net, whose inputs are no predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.query(x).softmax(-1)
        return self.net(x * weights) * self.net(x).sigmoid()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        return -(one_hot(y, logits) * logits.log_softmax(1)).sum(1).mean()


class Heads(Module):
    """Two predictions that enter two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), self.other(x)], -1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        classes = -(one_hot(y, x) * self.net(x).log_softmax(1)).sum(1).mean()
        return classes + (self.other(x) - one_hot(y, x)).square().sum(1).mean()


def test_what_enters_a_softmax_inside_of_the_net_is_no_prediction() -> None:
    module = Attentive()
    trainer = fitted(module, DATA)
    exact = dense_scores(module, lambda wide, x: wide(x[None]), cross_entropy, EXAMPLES, [0])
    report = trainer.influence(batch_of(DATA, slice(1)), **CONVERGED)
    assert report.curvature["kind"] == "ggn"
    assert error(report.scores[0], exact) < 1e-5


def test_two_heads_have_the_matrix_of_both() -> None:
    module = Heads()
    trainer = fitted(module, DATA)
    exact = dense_scores(
        module, lambda wide, x: wide(x[None]), lambda z, y: cross_entropy(z[:3], y) + squares(z[3:], y), EXAMPLES, [0]
    )
    report = trainer.influence(batch_of(DATA, slice(1)), **CONVERGED)
    assert report.curvature["kind"] == "ggn"
    assert error(report.scores[0], exact) < 1e-5


class Concave(Module):
    """A loss that is convex in none of its predictions, so that a Gauss–Newton matrix would be indefinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return torch.sin(3 * (self.net(x) - one_hot(y, x))).sum(1).mean()


def test_a_loss_that_is_not_convex_is_said_to_take_the_hessian() -> None:
    trainer = fitted(Concave(), DATA)
    with pytest.warns(GIFWarning, match="has no Gauss–Newton matrix.*Hessian"):
        report = trainer.influence(batch_of(DATA, slice(1)), unconverged="ignore")
    assert report.curvature["kind"] == "hessian"


class Likelihood(Module):
    """A density whose logarithm ends in a difference that is no prediction, and a second loss beside it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        z = self.net(x)
        density = torch.distributions.Normal(z, 1.5).log_prob(x[:, :3])
        return -density.mean() + 0.1 * ((z - 2 * x[:, 3:6]) ** 2).sum(1).mean()


def test_a_difference_in_which_the_loss_is_linear_is_no_prediction() -> None:
    trainer = fitted(Likelihood(), DATA)
    module: Any = trainer.lightning_module

    def loss(z: Tensor, x: Tensor) -> Tensor:
        density = torch.distributions.Normal(z, 1.5).log_prob(x[:3])
        return -density.mean() + 0.1 * ((z - 2 * x[3:6]) ** 2).sum()

    examples = [(x.double(), x.double()) for x, _ in DATA]
    exact = dense_scores(module.net, lambda net, x: net(x), loss, examples, range(2))
    scores = trainer.influence([tensor[:2] for tensor in DATA.tensors], **CONVERGED).scores[0]
    assert error(scores, exact) < 1e-5


class Rooted(Module):
    """The root of a mean squared error: for one example and one output it is the absolute error."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        super().__init__(6, 1)
        self.convert = convert

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        return self.convert(F.mse_loss(self.net(x)[:, 0], x[:, 0]))


@pytest.mark.parametrize("convert", [torch.sqrt, torch.log1p])
def test_a_nonlinear_function_of_a_loss_has_no_gauss_newton_matrix(convert: Any) -> None:
    trainer = fitted(Rooted(convert), DATA, epochs=1)
    with pytest.warns(GIFWarning, match="has no Gauss–Newton matrix"):
        report = trainer.influence([tensor[:2] for tensor in DATA.tensors])
    assert report.curvature["kind"] == "hessian"


def test_a_linear_function_of_a_loss_has_its_gauss_newton_matrix() -> None:
    trainer = fitted(Rooted(lambda loss: 3 * loss + 1), DATA)
    assert trainer.influence([tensor[:2] for tensor in DATA.tensors]).curvature["kind"] == "ggn"
