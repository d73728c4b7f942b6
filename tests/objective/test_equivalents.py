"""Operations without a second derivative get one, and keep their values and first derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gif.objective.equivalents import FastSecondDerivatives, TwiceDifferentiable

BAGS, OFFSETS = torch.tensor([0, 1, 2, 2, 3, 3]), torch.tensor([0, 2, 2, 5])
LABELS = torch.tensor([1, 0, 3, 5])
SETS = torch.tensor([[1, 3, -1, 2, 0, 0], [0, -1, 1, 1, 1, 1], [-1, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]])
MEAN = torch.linspace(-2, 3, 6, dtype=torch.float64)
SPOKEN = torch.tensor([[1, 2], [3, 3], [4, 1], [2, 0]])


def _ctc(x: Tensor, reduction: str = "mean", zero_infinity: bool = False) -> Tensor:
    frames = x.reshape(-1)[:80].reshape(4, 4, 5).log_softmax(-1)  # the labels 3, 3 need three frames
    lengths, labels = torch.tensor([4, 4, 3, 2]), torch.tensor([2, 2, 2, 1])
    return F.ctc_loss(frames, SPOKEN, lengths, labels, reduction=reduction, zero_infinity=zero_infinity)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "bags": lambda x: F.embedding_bag(BAGS.reshape(2, 3), x),
    "bags, offsets": lambda x: F.embedding_bag(BAGS, x, OFFSETS),
    "bags, sum": lambda x: F.embedding_bag(BAGS, x, OFFSETS, mode="sum"),
    "bags, max": lambda x: F.embedding_bag(BAGS, x, OFFSETS, mode="max"),
    "bags, last offset": lambda x: F.embedding_bag(BAGS, x, torch.tensor([0, 2, 6]), include_last_offset=True),
    "bags, weights": lambda x: F.embedding_bag(BAGS.reshape(2, 3), x, mode="sum", per_sample_weights=x[:2, :3]),
    "bags, padding": lambda x: F.embedding_bag(BAGS.reshape(2, 3), x, padding_idx=2),
    "cdist": lambda x: torch.cdist(x, x[:2]),
    "cdist, p=1": lambda x: torch.cdist(x, 2 * x[:2] + 1, p=1.0),
    "pdist": lambda x: F.pdist(x),
    "multi_margin": lambda x: F.multi_margin_loss(x[:4], LABELS),
    "multi_margin, squared": lambda x: F.multi_margin_loss(x[:4], LABELS, p=2, margin=0.5, reduction="none"),
    "multi_margin, weights": lambda x: F.multi_margin_loss(x[:4], LABELS, weight=torch.arange(6.0).double()),
    "multilabel_margin": lambda x: F.multilabel_margin_loss(x[:4], SETS),
    "multilabel_margin, none": lambda x: F.multilabel_margin_loss(x[:4], SETS, reduction="none"),
    "weight_norm": lambda x: torch._weight_norm(x, x.sum(1, keepdim=True), 0),
    "weight_norm, second": lambda x: torch._weight_norm(x, x[:1] + 1, 1),
    "weight_norm, whole": lambda x: torch._weight_norm(x, x[0, 0], -1),
    "batch_norm": lambda x: F.batch_norm(x, MEAN, MEAN.square() + 0.1, x[0], x[1]),
    "batch_norm, images": lambda x: F.batch_norm(x.reshape(4, 6, 2, 2), MEAN, MEAN.exp()),
    "batch_norm, in training": lambda x: F.batch_norm(x, MEAN.clone(), MEAN.exp(), x[0], training=True),
    "batch_norm, no statistics": lambda x: F.batch_norm(x, None, None, x[0], training=True),
    "layer_norm": lambda x: F.layer_norm(x, (6,), x[0], x[1]),
    "layer_norm, two dimensions": lambda x: F.layer_norm(x.reshape(4, 4, 6), (4, 6), eps=0.1),
    "ctc": _ctc,
    "ctc, none": lambda x: _ctc(x, "none"),
    "ctc, sum": lambda x: _ctc(x, "sum", zero_infinity=True),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_values_and_derivatives_are_those_of_the_operation(name: str) -> None:
    operation = OPERATIONS[name]
    x = torch.randn(16, 6, dtype=torch.float64)
    expected = operation(x.requires_grad_())
    weights = torch.randn_like(expected)
    (slope,) = torch.autograd.grad((expected * weights).sum(), x)
    with TwiceDifferentiable(), FastSecondDerivatives():
        value = operation(x)
        torch.testing.assert_close(value, expected)
        (same,) = torch.autograd.grad((value * weights).sum(), x, create_graph=True)
    torch.testing.assert_close(same, slope)


@pytest.mark.mostly_slow(12)
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_second_derivatives_are_slopes_of_the_first(name: str) -> None:
    operation = OPERATIONS[name]

    def scalar(x: Tensor) -> Tensor:
        with TwiceDifferentiable(), FastSecondDerivatives():
            return operation(x.reshape(16, 6)).square().sum().sin()

    x = torch.randn(96, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(scalar, (x.requires_grad_(),), atol=1e-4)
    torch.func.jvp(scalar, (x.detach(),), (torch.ones_like(x),))


@pytest.mark.parametrize("statistics", [torch.float32, torch.bfloat16])
def test_normalisation_in_half_precision_is_that_of_pytorch(statistics: torch.dtype) -> None:
    x, half = torch.randn(8, 6).bfloat16(), torch.rand(6).bfloat16()
    mean, variance, weight = (part.to(statistics) for part in (torch.randn(6), torch.rand(6) + 0.1, torch.rand(6)))

    def normalised() -> list[Tensor]:
        return [F.layer_norm(x, (6,), half), F.layer_norm(x, (6,)), F.batch_norm(x, mean, variance, weight)]

    expected = normalised()
    with FastSecondDerivatives():
        found = normalised()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_shapes_that_do_not_fit_are_errors_as_in_pytorch() -> None:
    x = torch.randn(4, 6)
    with FastSecondDerivatives():
        for shape in ((5,), (3, 6, 2)):
            with pytest.raises(RuntimeError):
                F.layer_norm(x, shape)
        with pytest.raises(RuntimeError):
            F.batch_norm(x, torch.zeros(1), torch.ones(1))


def test_labels_that_no_alignment_has_are_impossible() -> None:
    """Three labels in two frames: infinite, or zero where that is asked for."""
    frames = torch.randn(2, 1, 5, dtype=torch.float64).log_softmax(-1)
    given = (frames, torch.tensor([[1, 2, 3]]), torch.tensor([2]), torch.tensor([3]))
    with TwiceDifferentiable():
        assert F.ctc_loss(*given).isinf()
        assert F.ctc_loss(*given, zero_infinity=True) == 0


def test_labels_one_after_the_other_are_those_of_a_matrix() -> None:
    frames = torch.randn(4, 2, 5, dtype=torch.float64).log_softmax(-1)
    lengths = torch.tensor([4, 3]), torch.tensor([2, 1])
    with TwiceDifferentiable():
        matrix = F.ctc_loss(frames, torch.tensor([[1, 2], [3, 0]]), *lengths)
        row = F.ctc_loss(frames, torch.tensor([1, 2, 3]), *lengths)
    torch.testing.assert_close(row, matrix)


def test_a_sparse_embedding_has_a_dense_gradient() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    with TwiceDifferentiable():
        F.embedding(torch.tensor([1, 1]), weight, sparse=True).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.is_sparse
