"""Attribution by other libraries has our shape and sign, and does not change the model or random generators."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import peers
from peers import PEERS

EXAMPLES, QUERIES = 60, 7

Problem = tuple[nn.Module, TensorDataset, TensorDataset]


def points(n: int, seed: int) -> TensorDataset:
    """Three overlapping clouds in six dimensions."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return TensorDataset(1.5 * torch.eye(6)[y] + torch.randn(n, 6, generator=generator), y)


def trained(*layers: nn.Module) -> Problem:
    """A net, its training data and queries."""
    train, queries = points(EXAMPLES, 1), points(QUERIES, 2)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(train.tensors[0]), train.tensors[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), train, queries


def make(net: str) -> Problem:
    torch.manual_seed(1)
    if net == "mlp":
        return trained(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    convolution = (nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU())
    return trained(nn.Unflatten(1, (1, 2, 3)), *convolution, nn.Flatten(), nn.Linear(8, 3))


def call(name: str, *args: Any, **kwargs: Any) -> Tensor:
    """Skips the test if the library, the first word of the name, is missing."""
    library = name.partition(" ")[0]
    if library != "gradient":
        pytest.importorskip(library)
    return PEERS[name](*args, **kwargs)


def loss_gradients(model: nn.Module, data: TensorDataset) -> Tensor:
    rows = []
    for x, y in zip(*data.tensors, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def exact(model: nn.Module, train: TensorDataset, queries: TensorDataset, damping: float = 0.1) -> Tensor:
    """``g_qᵀ (G + damping I)⁻¹ g_t`` with the dense generalised Gauss–Newton matrix, in float64."""
    model = copy.deepcopy(model).double()
    train, queries = (TensorDataset(data.tensors[0].double(), data.tensors[1]) for data in (train, queries))
    weights = {name: value.detach() for name, value in model.named_parameters()}
    jacobians = jacrev(lambda weights: functional_call(model, weights, (train.tensors[0],)))(weights)
    jacobian = torch.cat([part.flatten(2) for part in jacobians.values()], dim=2)
    p = model(train.tensors[0]).softmax(1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("nci,ncd,ndj->ij", jacobian, inner, jacobian) / len(train)
    solved = torch.linalg.solve(
        ggn + damping * torch.eye(len(ggn), dtype=torch.float64), loss_gradients(model, queries).mT
    )
    return (loss_gradients(model, train) @ solved).mT


def agreement(scores: Tensor, truth: Tensor) -> float:
    """Spearman's correlation over the training examples, averaged over the queries."""
    rows = zip(scores.double(), truth, strict=True)
    return sum(float(spearmanr(*row).statistic) for row in rows) / len(truth)


@pytest.mark.parametrize("name", PEERS)
def test_scores_have_the_shape_and_sign_of_exact_influence(name: str) -> None:
    model, train, unseen = make("mlp")
    both = zip(unseen.tensors, train.tensors, strict=True)
    queries = TensorDataset(*(torch.cat([query, example[:8]]) for query, example in both))
    scores = call(name, model, train, queries, batch_size=25)
    assert scores.shape == (QUERIES + 8, EXAMPLES)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert agreement(scores[:QUERIES], exact(model, train, unseen)) > 0.3
    assert scores[QUERIES:].diagonal().mean() > 0  # without an example its own loss is higher


@pytest.mark.parametrize("name", PEERS)
def test_model_and_generator_are_unchanged(name: str) -> None:
    model, train, queries = make("normed")
    kinds, state, random = list(map(type, model)), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scores = call(name, model, train, queries, checkpoints=[copy.deepcopy(state)], batch_size=25)
    assert scores.shape == (QUERIES, EXAMPLES)
    assert scores.isfinite().all()

    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert list(map(type, model)) == kinds
    assert not model.training

    torch.manual_seed(5)
    assert torch.equal(scores, call(name, model, train, queries, batch_size=25))


@pytest.mark.parametrize("name", ["gradient dot product", "captum TracInCP"])
@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_inner_products_of_gradients_equal_those_of_a_loop(name: str, net: str) -> None:
    model, train, queries = make(net)
    loop = loss_gradients(model, queries) @ loss_gradients(model, train).mT
    torch.testing.assert_close(call(name, model, train, queries, batch_size=25), loop, rtol=1e-4, atol=1e-5)


def test_the_calls_to_dattri_give_the_result_of_its_attribute() -> None:
    pytest.importorskip("dattri")
    from dattri.algorithm.influence_function import IFAttributorCG

    model, train, queries = make("normed")
    attributor = IFAttributorCG(peers.dattri_task(model), max_iter=5, regularization=1.0)
    scores = peers.dattri_scores(attributor, train, queries, batch_size=25)
    with torch.no_grad():
        theirs = attributor.attribute(DataLoader(train, EXAMPLES), DataLoader(queries, QUERIES))
    torch.testing.assert_close(scores, theirs.mT, rtol=1e-4, atol=1e-5)


def test_captum_gives_the_same_scores_for_small_batches_of_networks_with_batchnorm() -> None:
    model, train, queries = make("normed")
    one, two = (call("captum TracInCP", model, train, queries, batch_size=size) for size in (5, 100))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_scores_that_are_not_finite_raise() -> None:
    model, train, queries = make("mlp")
    with torch.no_grad():
        model[2].bias[0] = torch.inf
    with pytest.raises(RuntimeError, match="not finite for 7 of 7 queries"):
        PEERS["gradient dot product"](model, train, queries)


def test_tracincp_sums_over_checkpoints() -> None:
    model, train, queries = make("mlp")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.5)
    both = call("captum TracInCP", model, train, queries, checkpoints=[other.state_dict(), model.state_dict()])
    one, two = (PEERS["gradient dot product"](net, train, queries) for net in (other, model))
    torch.testing.assert_close(both, one + two, rtol=1e-4, atol=1e-5)
