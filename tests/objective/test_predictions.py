"""The predictions passed to PyTorch's loss functions are recorded and can be replaced, however the loss is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gif.objective.predictions import IndicesInBounds, Predictions

LOGITS = torch.randn(4, 3)
LABELS = torch.tensor([0, 2, 1, 1])
VALUES = torch.rand(4, 3)

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda z: F.cross_entropy(z, LABELS),
    "keyword": lambda z: F.cross_entropy(input=z, target=LABELS, label_smoothing=0.1),
    "module": lambda z: nn.CrossEntropyLoss(reduction="sum")(z, LABELS),
    "nll": lambda z: F.nll_loss(F.log_softmax(z, dim=1), LABELS),
    "nll of a method": lambda z: nn.NLLLoss()(z.log_softmax(1), LABELS),
    "kl": lambda z: F.kl_div(torch.log_softmax(z, 1), torch.softmax(VALUES, 1), reduction="batchmean"),
    "mse": lambda z: F.mse_loss(z, VALUES),
    "huber": lambda z: nn.HuberLoss()(z, VALUES),
    "smooth_l1": lambda z: F.smooth_l1_loss(z, VALUES),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, VALUES),
    "bce module": lambda z: nn.BCEWithLogitsLoss()(z, VALUES),
    "poisson": lambda z: F.poisson_nll_loss(z, VALUES),
    "margins": lambda z: F.multi_margin_loss(z, LABELS),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_predictions_are_recorded_and_replaced(name: str) -> None:
    loss, other = LOSSES[name], torch.randn(4, 3)
    with Predictions() as noted:
        value = loss(LOGITS)
    found = noted.flat()
    assert found is not None
    assert torch.equal(found.view(4, 3), LOGITS)
    torch.testing.assert_close(value, loss(LOGITS))
    with Predictions(other.flatten()):
        replaced = loss(LOGITS)
    torch.testing.assert_close(replaced, loss(other))


STEPS = torch.randint(3, (4, 2), generator=torch.Generator().manual_seed(1))
IGNORED = torch.tensor([[0, -100], [2, 1], [-100, -100], [1, 0]])
WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
TEACHER = torch.softmax(torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(2)).double(), -1)
SEEN = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)

# Losses of log-probabilities that are not a direct result of a log-softmax, as functions of logits (4, 2, 3).
OF_LOG_PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda z: F.nll_loss(F.log_softmax(z[:, 0], 1), STEPS[:, 0]),
    "view": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, 3), STEPS.view(-1)),
    "reshape": lambda z: F.nll_loss(F.log_softmax(z, -1).transpose(0, 1).reshape(-1, 3), STEPS.T.reshape(-1)),
    "flatten": lambda z: nn.NLLLoss(reduction="sum")(nn.LogSoftmax(-1)(z).flatten(0, 1), STEPS.flatten()),
    "transpose": lambda z: F.nll_loss(z.log_softmax(-1).transpose(1, 2), STEPS),
    "permute": lambda z: F.nll_loss(z.log_softmax(-1)[:, None].permute(0, 3, 1, 2).contiguous(), STEPS[:, None]),
    "squeeze": lambda z: F.nll_loss(F.log_softmax(z[:, None, 0], -1).squeeze(1), STEPS[:, 0]),
    "index": lambda z: F.nll_loss(F.log_softmax(z, -1)[SEEN.bool()], STEPS[SEEN.bool()]),
    "unbind": lambda z: sum(map(F.nll_loss, F.log_softmax(z, -1).unbind(1), STEPS.unbind(1)), torch.zeros(())),
    "contiguous": lambda z: F.nll_loss(F.log_softmax(z.transpose(1, 2), 1).contiguous().clone(), STEPS),
    "one example": lambda z: F.nll_loss(F.log_softmax(z, -1)[2, 1], STEPS[2, 1]),
    "weight": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, 3), STEPS.view(-1), weight=WEIGHTS),
    "ignored": lambda z: F.nll_loss(F.log_softmax(z, -1).transpose(1, 2), IGNORED, weight=WEIGHTS),
    "masked": lambda z: (F.nll_loss(F.log_softmax(z, -1).transpose(1, 2), STEPS, reduction="none") * SEEN).sum(),
    "masked scores": lambda z: F.nll_loss((F.log_softmax(z, -1) * SEEN[..., None]).view(-1, 3), STEPS.view(-1)),
    "by hand": lambda z: F.nll_loss((z - z.logsumexp(-1, keepdim=True)).view(-1, 3), STEPS.view(-1)),
    "log of softmax": lambda z: F.nll_loss(torch.softmax(z, -1).log().transpose(1, 2), target=STEPS),
    "kl": lambda z: F.kl_div(F.log_softmax(z, -1).view(-1, 3), TEACHER.view(-1, 3), reduction="batchmean"),
    "kl of logs": lambda z: F.kl_div(
        F.log_softmax(z, -1).flatten(0, 1), TEACHER.log().flatten(0, 1), log_target=True, reduction="sum"
    ),
    "kl of columns": lambda z: F.kl_div(z.log_softmax(-1).transpose(1, 2), TEACHER.transpose(1, 2), reduction="sum"),
    "kl, classes first": lambda z: F.kl_div(z.log_softmax(-1).movedim(2, 0), TEACHER.movedim(2, 0), reduction="sum"),
    "kl, masked": lambda z: (
        F.kl_div(z.log_softmax(-1).transpose(1, 2), TEACHER.transpose(1, 2), reduction="none") * SEEN[:, None]
    ).sum(),
    "kl, no teacher": lambda z: F.kl_div(
        z.log_softmax(-1).clone(), TEACHER * SEEN[..., None], reduction="sum"
    ),  # rows of zeros have no curvature
    "kl, a class alone": lambda z: F.kl_div(
        (20 * z).log_softmax(-1)[..., None], TEACHER[..., None], reduction="sum"
    ),  # of which the probability is almost 1
}


@pytest.mark.parametrize("name", list(OF_LOG_PROBABILITIES))
@pytest.mark.parametrize("mapped", [False, True])
def test_log_probabilities_have_the_gauss_newton_matrix_of_the_logits(name: str, mapped: bool) -> None:
    """For the logits it equals the Hessian: the loss is convex in them, and no model precedes them."""
    loss = OF_LOG_PROBABILITIES[name]
    logits = torch.randn(4, 2, 3, dtype=torch.float64)

    def outputs(z: Tensor) -> Tensor:
        with Predictions() as noted:
            loss(z)
        found = noted.flat()
        assert found is not None
        return found

    def through(predictions: Tensor) -> Tensor:
        with Predictions(predictions):
            return loss(logits)

    def hessian(predictions: Tensor) -> Tensor:
        by_columns = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(through)))
        return by_columns(predictions[None])[0] if mapped else torch.autograd.functional.hessian(through, predictions)

    flat = outputs(logits)
    jacobian = torch.autograd.functional.jacobian(outputs, logits).view(len(flat), -1)
    expected = torch.autograd.functional.hessian(loss, logits).view(logits.numel(), -1)
    torch.testing.assert_close(jacobian.T @ hessian(flat) @ jacobian, expected, rtol=1e-10, atol=1e-12)
    assert expected.norm() > 1e-3
    slope = torch.func.grad(through)(flat) @ jacobian
    torch.testing.assert_close(
        slope, torch.autograd.functional.jacobian(loss, logits).reshape(-1), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(through(flat), loss(logits), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_log_probabilities_are_recognised_in_every_dtype(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 1000)

    def loss(z: Tensor) -> Tensor:
        return F.nll_loss(F.log_softmax(z, -1).to(dtype), torch.arange(5))

    with Predictions() as noted:
        loss(logits)
    found = noted.flat()
    assert found is not None
    found = found.detach().float()
    with Predictions(found.to(dtype).requires_grad_()) as others:
        assert others._others is not None
        (slope,) = torch.autograd.grad(loss(logits), others._others)
    expected = (torch.softmax(logits, 1) - F.one_hot(torch.arange(5), 1000)) / 5
    torch.testing.assert_close(slope.view(5, 1000).float(), expected, rtol=0.1, atol=1e-2 / 5)


@pytest.mark.parametrize("loss", [lambda z: F.nll_loss(z, LABELS), lambda z: F.kl_div(z, VALUES, reduction="sum")])
def test_losses_that_are_linear_in_their_inputs_have_no_curvature(loss: Callable[[Tensor], Tensor]) -> None:
    def through(predictions: Tensor) -> Tensor:
        with Predictions(predictions):
            return loss(LOGITS)

    torch.testing.assert_close(torch.func.grad(through)(LOGITS.flatten()).view(4, 3), torch.func.grad(loss)(LOGITS))
    assert not torch.autograd.functional.hessian(through, LOGITS.flatten()).any()


def test_binary_cross_entropy_has_the_probabilities_as_predictions() -> None:
    with Predictions() as noted:
        F.binary_cross_entropy(torch.sigmoid(LOGITS), VALUES)
    found = noted.flat()
    assert found is not None
    assert torch.equal(found.view(4, 3), torch.sigmoid(LOGITS))


def test_several_losses_are_recorded_in_order() -> None:
    """Two heads, as in a model of classes and boxes."""

    def loss(one: Tensor, other: Tensor) -> Tensor:
        return F.cross_entropy(one, LABELS) + 0.5 * F.mse_loss(other, VALUES[:, :2])

    heads = LOGITS, torch.randn(4, 2)
    with Predictions() as noted:
        loss(*heads)
    found = noted.flat()
    assert found is not None
    assert torch.equal(found, torch.cat([head.flatten() for head in heads]))
    others = torch.randn(4, 3), torch.randn(4, 2)
    with Predictions(torch.cat([other.flatten() for other in others])):
        replaced = loss(*heads)
    torch.testing.assert_close(replaced, loss(*others))


def test_a_softmax_inside_of_the_model_is_not_a_prediction() -> None:
    with Predictions() as noted:
        attention = torch.softmax(LOGITS, 1) + torch.log_softmax(LOGITS, 1)
        F.mse_loss(attention, VALUES)
    found = noted.flat()
    assert found is not None
    assert torch.equal(found.view(4, 3), attention)


def test_nothing_is_recorded_if_no_loss_function_is_called() -> None:
    with Predictions() as noted:
        LOGITS.square().mean()
    assert noted.flat() is None


@pytest.mark.parametrize("name", ["cross_entropy", "keyword", "module", "nll", "nll of a method"])
def test_logits_and_targets_of_a_cross_entropy_are_recognised(name: str) -> None:
    with Predictions() as noted:
        LOSSES[name](LOGITS)
    found = noted.classified()
    assert found is not None
    assert torch.equal(found[0], LOGITS)
    assert torch.equal(found[1], LABELS)


def test_a_second_loss_of_the_same_logits_changes_nothing() -> None:
    with Predictions() as noted:
        F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
        F.cross_entropy(LOGITS, LABELS)
    assert noted.classified() is not None


@pytest.mark.parametrize(
    "loss",
    [
        lambda: None,
        lambda: F.mse_loss(LOGITS, VALUES),
        lambda: (F.cross_entropy(LOGITS, LABELS), F.cross_entropy(-LOGITS, LABELS)),
        lambda: (F.cross_entropy(LOGITS, LABELS), F.mse_loss(LOGITS, VALUES)),
        lambda: F.cross_entropy(LOGITS, torch.softmax(VALUES, 1)),
        lambda: F.cross_entropy(torch.randn(2, 3, 5), torch.zeros(2, 5, dtype=torch.long)),
    ],
    ids=["none", "regression", "two heads", "two losses", "soft targets", "sequences"],
)
def test_other_losses_do_not_classify_examples(loss: Callable[[], object]) -> None:
    with Predictions() as noted:
        loss()
    assert noted.classified() is None


OTHER = torch.tensor([0, 2, 3, 1])  # one more class than predicted

OUT_OF_BOUNDS: dict[str, Callable[[], Tensor]] = {
    "cross_entropy": lambda: F.cross_entropy(LOGITS, OTHER),
    "keyword": lambda: F.cross_entropy(target=OTHER, input=LOGITS, label_smoothing=0.1),
    "module": lambda: nn.CrossEntropyLoss(ignore_index=7)(LOGITS, OTHER),
    "negative": lambda: F.cross_entropy(LOGITS, -LABELS),
    "nll": lambda: F.nll_loss(F.log_softmax(LOGITS, 1), OTHER),
    "one": lambda: F.cross_entropy(LOGITS[0], torch.tensor(3)),
    "positions": lambda: F.cross_entropy(torch.randn(4, 3, 5), OTHER[:, None].expand(-1, 5)),
    "embedding": lambda: nn.Embedding(3, 2)(OTHER),
    "bag": lambda: nn.EmbeddingBag(3, 2)(OTHER[None]),
}


@pytest.mark.parametrize("name", list(OUT_OF_BOUNDS))
def test_indices_out_of_bounds_are_reported_before_a_kernel_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("cross_entropy_loss", "nll_loss_nd"):
        monkeypatch.setattr(torch._C._nn, kernel, lambda *_: pytest.fail("the kernel was called"))
    for kernel in ("embedding", "embedding_bag"):
        monkeypatch.setattr(torch, kernel, lambda *_: pytest.fail("the kernel was called"))
    with pytest.raises(IndexError, match="is out of bounds: there are 3"), IndicesInBounds():
        OUT_OF_BOUNDS[name]()


def test_indices_inside_of_vmap_are_not_checked() -> None:
    def loss(logits: Tensor, label: Tensor, word: Tensor) -> Tensor:
        return F.cross_entropy(logits, label) + F.embedding(word, VALUES).sum()

    mapped = torch.func.vmap(loss)
    with IndicesInBounds():
        found = mapped(LOGITS, LABELS, LABELS)
    assert torch.equal(found, mapped(LOGITS, LABELS, LABELS))


def test_indices_in_bounds_or_ignored_are_accepted() -> None:
    def losses() -> list[Tensor]:
        ignored = torch.tensor([0, -100, 2, -100])
        return [
            *(loss(LOGITS) for loss in LOSSES.values()),
            F.cross_entropy(LOGITS, ignored),
            F.cross_entropy(LOGITS, OTHER, ignore_index=3),
            F.cross_entropy(LOGITS, torch.softmax(VALUES, 1)),
            F.embedding(LABELS, VALUES),
        ]

    expected = losses()
    with IndicesInBounds():
        found = losses()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
