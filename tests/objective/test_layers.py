"""Gradients of single examples from the layers of a module equal those of one backward pass for each example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gif.data.batch import Batch
from lightning_gif.data.examples import Examples
from lightning_gif.objective.layer_gradients import LayerGradients
from lightning_gif.objective.objective import Objective

from ..conftest import make_trainer

N = 14


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).flatten(1), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@contextmanager
def opened(net: nn.Module, x: Tensor) -> Iterator[tuple[Objective, Batch]]:
    torch.manual_seed(0)
    y = torch.randint(0, 3, (len(x),))
    with Objective.open(make_trainer(), Classifier(net), double=True) as objective:
        examples = Examples.from_batch((x, y), objective.prepare, batch_size=len(x))
        yield objective, next(iter(objective.learn_structure(examples).batches()))


def one_at_a_time(objective: Objective, batch: Batch) -> Tensor:
    rows = []
    for position in range(batch.size):
        theta = objective.theta.detach().requires_grad_()
        loss = objective.shadow.training_step(theta, batch.slice(position, position + 1).data)
        rows.append(torch.autograd.grad(loss, theta)[0])
    return torch.stack(rows)


class Functional(nn.Module):
    """A module that uses bare parameters of given shapes by a function."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList([torch.randn(shape, generator=generator) / 2 for shape in shapes])
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


class Attention(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(11, 8, padding_idx=0), first
        self.position, self.start = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=first)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([self.start.expand(len(x), -1, -1), self.table(x) + self.position], dim=1)
        hidden = self.layers(hidden if self.first else hidden.transpose(0, 1))
        return self.head(hidden[:, 0] if self.first else hidden[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.table(x).mean(1).tanh(), self.table.weight)[:, :3]


class Positions(nn.Module):
    """A table of positions that is the same for all texts, with an additional dimension or without."""

    def __init__(self, leading: int) -> None:
        super().__init__()
        self.table, self.positions, self.leading = nn.Embedding(11, 8), nn.Embedding(9, 8), leading
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(x.shape[1])
        where = self.positions(numbers[None] if self.leading else numbers)
        return self.head((self.table(x) + where).tanh().mean(1))


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3)
        self.layer.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh().mean((2, 3))


VECTORS, IMAGES = torch.randn(N, 6), torch.randn(N, 2, 7, 8)
SEQUENCES, TOKENS = torch.randn(N, 5, 6), torch.randint(0, 11, (N, 6))

NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), VECTORS),
    "wide": (lambda: nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)), VECTORS),
    "several positions": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)), SEQUENCES),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 3, 3, 2, 1, 2), nn.Flatten(), nn.Linear(6, 3)), SEQUENCES),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, (3, 2), (1, 2), (0, 1)), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        IMAGES,
    ),
    "same": (lambda: nn.Sequential(nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), nn.PReLU(3)), IMAGES),
    "groups": (lambda: nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.GroupNorm(2, 6), nn.PReLU()), IMAGES),
    "conv3d": (
        lambda: nn.Sequential(nn.Unflatten(2, (1, 7)), nn.Conv3d(2, 3, (1, 3, 2), (1, 2, 1), (0, 1, 0), (1, 1, 2))),
        IMAGES,
    ),
    "layernorm": (lambda: nn.Sequential(nn.LayerNorm((5, 6)), nn.Flatten(), nn.Linear(30, 3)), SEQUENCES),
    "rmsnorm": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 3)), VECTORS),
    "batch first": (lambda: Attention(True), TOKENS),
    "time first": (lambda: Attention(False), TOKENS),
    "matmul": (lambda: Functional(lambda x, w, b: x @ w - b, (6, 3), (3,)), VECTORS),
    "addmm": (lambda: Functional(lambda x, w, b: torch.addmm(b, x, w), (6, 3), (3,)), VECTORS),
    "rows of one": (lambda: Functional(lambda x, w: F.linear(F.linear(x, w[:6, :6]), w[:3, 1:7]), (8, 8)), VECTORS),
    "tied": (lambda: Functional(lambda x, w: (torch.tanh(F.linear(x, w)) @ w)[:, :3], (6, 6)), VECTORS),
    "embedding as the head": (lambda: Tied(), TOKENS),
    "rows of positions": (lambda: Positions(1), TOKENS),
    "positions": (lambda: Positions(0), TOKENS),
    "temperature": (lambda: Functional(lambda x, t, w: (x - x * t)[:, :3] * w[2], (), (4,)), VECTORS),
    "bias alone": (lambda: Frozen(), IMAGES),
    "unused": (lambda: Functional(lambda x, w, unused: F.linear(x, w), (3, 6), (2, 2)), VECTORS),
    "scales": (lambda: Functional(lambda x, a, b: (a * x + x.mul(b))[:, :3], (6,), (1, 6)), VECTORS),
    "twice": (lambda: Functional(lambda x, a: (x + a.expand(len(x), 6) + a)[:, :3], (6,)), VECTORS),
}


@pytest.mark.parametrize("name", list(NETS))
def test_gradients_from_layers_equal_those_of_one_example_at_a_time(name: str) -> None:
    make, x = NETS[name]
    torch.manual_seed(0)
    with opened(make().eval(), x) as (objective, batch):
        expected = one_at_a_time(objective, batch)
        directions = torch.randn(40, objective.space.size, dtype=torch.float64)
        assert objective.layers is not None
        recorded = objective.layers.record_losses(batch)
        assert recorded is not None
        rows = recorded.rows(objective.space, recorded.output_gradients())
        torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-12)
        for some in (directions[:1], directions[:2], directions):
            products = objective.layers.products(batch, some)
            torch.testing.assert_close(products, some @ expected.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.cat(list(objective.gradients(batch))), expected, rtol=1e-9, atol=1e-12)
        found = objective.directional_derivatives(batch, directions)
        torch.testing.assert_close(found, directions @ expected.T, rtol=1e-9, atol=1e-12)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Sorted(nn.Module):
    """A module that computes on examples in the order of their first values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.head(self.first(x[order]).tanh()[order.argsort()])


ASCENDING = torch.cat([VECTORS[:5][VECTORS[:5, 0].argsort()], VECTORS[5:]])


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (Recurrent(), SEQUENCES),
        (Sorted(), ASCENDING),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), VECTORS),
        (Functional(lambda x, w: torch.einsum("bi,oi->bo", x, w), (3, 6)), VECTORS),
        (Functional(lambda x, w: F.linear(x, w) * (1 + w.square().sum()), (3, 6)), VECTORS),
    ],
    ids=["recurrent", "sorted", "weight norm", "einsum", "norm of the weights"],
)
def test_a_module_that_uses_parameters_in_another_way_has_no_layers(net: nn.Module, x: Tensor) -> None:
    with opened(net, x) as (objective, batch):
        assert objective.layers is None
        found = torch.cat(list(objective.gradients(batch)))
        torch.testing.assert_close(found, one_at_a_time(objective, batch), rtol=1e-9, atol=1e-12)


class Branching(nn.Module):
    """The result is the same in both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x, self.layer.weight) if len(x) > 9 else self.layer(x)


def test_a_batch_that_takes_another_branch_is_computed_in_another_way() -> None:
    with opened(Branching(), VECTORS) as (objective, batch):
        expected, directions = one_at_a_time(objective, batch), torch.ones(2, 18, dtype=torch.float64)
        layers = LayerGradients.choose(objective.loss, batch.slice(0, 5))
        assert layers is not None
        assert layers.record_losses(batch) is None
        assert layers.record_losses(batch.slice(0, 8)) is not None
        torch.testing.assert_close(torch.cat(list(layers.gradients(batch))), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layers.products(batch, directions), directions @ expected.T)
        parts = [part.size for part, _ in layers.passes(layers.together.loss_sum, batch)]
        assert parts == [7, 7]
        assert objective.layers is None  # which tries more examples
        found = torch.cat(list(objective.gradients(batch)))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Masked(nn.Module):
    """A module that replaces missing values by a parameter, which no layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.where(x > 100, self.token, x) if bool((x > 100).any()) else x)


class Packed(nn.Module):
    """A module that computes on the tokens of all texts at once, without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        present = x[..., 0] != 0
        hidden = x.new_zeros(*x.shape[:2], 4)
        hidden[present] = self.first(x[present]).tanh()
        return self.head(hidden.sum(1))


class Experts(nn.Module):
    """A mixture of two experts; an expert without examples is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        chosen, result = (x[:, 0] > 0).long(), x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if bool(mine.any()):
                result = result + expert(x) * mine[:, None]
        return result


MISSING = torch.cat([VECTORS[:-2], torch.full((2, 6), 101.0)])
SHORT = torch.cat([SEQUENCES[:4], SEQUENCES[4:] * (torch.rand(N - 4, 5, 1) > 0.4)])


@pytest.mark.parametrize(
    ("net", "x"),
    [(Masked(), MISSING), (Packed(), SHORT), (Experts(), VECTORS)],
    ids=["masked", "packed", "experts"],
)
def test_gradients_are_right_where_layers_depend_on_the_data(net: nn.Module, x: Tensor) -> None:
    """The first examples do not show what others do: no value is missing, and they have the same length."""
    with opened(net, x) as (objective, batch):
        layers = LayerGradients.choose(objective.loss, batch.slice(0, 4))
        assert layers is not None
        for size in (1, 2, 4, 7, N):
            for start in range(0, N, size):
                part = batch.slice(start, start + size)
                expected, found = one_at_a_time(objective, part), torch.cat(list(layers.gradients(part)))
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
                rows = []
                for _, one in layers.passes(layers.together.loss_sum, part):
                    rows.append(one.rows(objective.space, one.output_gradients()))
                torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 12])
def test_neighbours_of_different_lengths_are_not_mixed_up(size: int) -> None:
    """All texts have three words, apart from one with four and the next one with two: three on average."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 5, 6, generator=generator)
    with opened(Packed(), torch.randn(N, 5, 6, generator=generator)) as (objective, batch):
        layers = LayerGradients.choose(objective.loss, batch)
        assert layers is not None
        for first in range(size - 1):
            lengths = [3] * size
            lengths[first], lengths[first + 1] = 4, 2
            present = torch.arange(5) < torch.tensor(lengths)[:, None]
            part = Batch.of((x.double() * present[..., None], torch.arange(size) % 3))
            found = torch.cat(list(layers.gradients(part)))
            torch.testing.assert_close(found, one_at_a_time(objective, part), rtol=1e-9, atol=1e-12)


def test_recording_leaves_nothing_behind() -> None:
    with opened(Attention(True), TOKENS) as (objective, batch):
        assert objective.layers is not None
        assert objective.shadow.on_parameters is None
        before = objective.losses(objective.theta, batch)
        list(objective.layers.gradients(batch))
        assert torch.equal(objective.losses(objective.theta, batch), before)
        assert objective.shadow.on_parameters is None
