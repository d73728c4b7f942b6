"""What a few examples do not show: rare weights, masks and terms of a loss, and steps of different lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import ObjectiveError

from ..conftest import blobs
from .reference import CONVERGED, Module, cross_entropy, dense_scores, error, fitted
from .test_batches import Items

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")

X, Y = blobs(40).tensors
QUERY = [0, 5, 27]


def scores(trainer: Any, data: Any, collate: Any = None, **options: Any) -> Tensor:
    query = DataLoader(Subset(data, QUERY), 3, collate_fn=collate)
    return trainer.influence(query, **{**CONVERGED, **options}).scores[0]


class TwoTasks(Module):
    """The second task has labels in the second half of the data only, and a loss that is written by hand."""

    def __init__(self) -> None:
        super().__init__(6, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, r, known, y = batch
        z = self.net(x)
        return F.cross_entropy(z[:, :3], y) + 3 * (known * (z[:, 3:] - r) ** 2).mean()


@pytest.mark.parametrize("batch_size", [8, 256])
def test_a_term_that_the_first_examples_lack_is_part_of_the_curvature(batch_size: int) -> None:
    r, known = X[:, :1].sin(), (torch.arange(40) >= 20).float()[:, None]
    data, module = TensorDataset(X, r, known, Y), TwoTasks()
    trainer = fitted(module, data)
    examples = [(x.double(), (u.double(), k, y)) for x, u, k, y in zip(X, r, known, Y, strict=True)]
    exact = dense_scores(
        module.net,
        lambda net, x: net(x),
        lambda z, t: cross_entropy(z[:3], t[2]) + 3 * (t[1] * (z[3:] - t[0]) ** 2).sum(),
        examples,
        QUERY,
    )
    assert error(scores(trainer, data, batch_size=batch_size), exact) < 1e-5


class Steps(Module):
    """Sums a loss over as many steps as the longest sequence of the batch has."""

    def __init__(self) -> None:
        super().__init__(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, mask, y = batch
        losses = [mask[:, t] * (self.net(x[:, t])[:, 0] - y[:, t]) ** 2 for t in range(x.shape[1])]
        return sum(losses).mean()  # type: ignore[union-attr,return-value]


@pytest.mark.parametrize("batch_size", [8, 256])
def test_sequences_of_different_lengths_have_the_curvature_of_all_their_steps(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [2 if i < 25 else 5 for i in range(40)]
    items = [(torch.randn(n, 6, generator=generator), torch.randn(n, generator=generator)) for n in lengths]

    def collate(parts: Any) -> tuple[Tensor, ...]:
        longest = max(len(x) for x, _ in parts)
        x = torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x, _ in parts])
        y = torch.stack([F.pad(y, (0, longest - len(y))) for _, y in parts])
        return x, torch.stack([(torch.arange(longest) < len(x)).float() for x, _ in parts]), y

    data, module = Items(items), Steps()
    trainer = fitted(module, data, collate)
    exact = dense_scores(
        module.net,
        lambda net, x: net(x)[:, 0],
        lambda z, y: ((z - y) ** 2).sum(),
        [(x.double(), y.double()) for x, y in items],
        QUERY,
    )
    assert error(scores(trainer, data, collate, batch_size=batch_size), exact) < 1e-5


class Rare(Module):
    """Weighs a rare class, in a step that picks rows by a mask."""

    def __init__(self, slow: bool) -> None:
        super().__init__(6, 2)
        self.slow = slow

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        known = y >= 0
        z = self.net(x)
        loss = F.cross_entropy(z[known], y[known], weight=torch.tensor([1.0, 10.0], dtype=z.dtype))
        return loss * (1.0 if not self.slow or float(loss) > -1 else 2.0)


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("slow", [False, True])
def test_the_weight_of_a_rare_class_does_not_enter_the_losses(slow: bool) -> None:
    """For one example the weight cancels; only the mean over a batch has it."""
    y = torch.zeros(40, dtype=torch.long)
    y[[3, 5, 12, 22, 33]] = 1
    data, module = TensorDataset(X, y), Rare(slow)
    trainer = fitted(module, data)
    examples = [(x.double(), label) for x, label in zip(X, y, strict=True)]
    predict = lambda net, x: net(x)  # noqa: E731
    hessian = trainer.influence(DataLoader(Subset(data, QUERY), 3), **CONVERGED, curvature="hessian")
    report = trainer.influence(DataLoader(Subset(data, QUERY), 3), **CONVERGED)
    if report.curvature["kind"] == "ggn":
        assert error(report.scores[0], dense_scores(module.net, predict, cross_entropy, examples, QUERY)) < 1e-5
    else:
        torch.testing.assert_close(report.scores, hessian.scores, rtol=1e-4, atol=1e-8)


class Masked(Module):
    """A mean over the tokens that a mask picks, which can be different tokens of each example."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, mask, y = batch
        z = self.net(x)
        return F.cross_entropy(z[mask], y[mask])


def test_tokens_that_a_mask_picks_belong_to_their_examples() -> None:
    x = torch.randn(40, 4, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(160).view(40, 4) % 3
    mask = torch.zeros(40, 4, dtype=torch.bool)
    mask[:, :2] = True
    mask[6], mask[7] = torch.tensor([1, 0, 0, 0]).bool(), torch.tensor([1, 1, 1, 0]).bool()
    data, module = TensorDataset(x, mask, y), Masked()
    trainer = fitted(module, data)
    examples = [(x[i].double()[mask[i]], y[i][mask[i]]) for i in range(40)]
    exact = dense_scores(
        module.net, lambda net, x: net(x), lambda z, y: F.cross_entropy(z.view(-1, 3), y), examples, QUERY
    )
    report = trainer.influence(DataLoader(Subset(data, QUERY), 3), **CONVERGED, batch_size=1)
    assert error(report.scores[0], exact) < 1e-5


def test_examples_without_labels_do_not_end_a_call() -> None:
    y = Y.clone()
    y[[7, 14]] = -1

    class Partly(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            x, y = batch
            known = y >= 0
            return F.cross_entropy(self.net(x)[known], y[known]) if bool(known.any()) else None

    data = TensorDataset(X, y)
    trainer = fitted(Partly(), data)
    found = scores(trainer, data, unconverged="ignore")
    assert found[[7, 14]].tolist() == [0, 0]
    assert found.isfinite().all()


class Counting(Module):
    """Counts in an array, and draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = np.ones(3)
        self.generator = np.random.default_rng(0)
        self.empty = nn.Parameter(torch.empty(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.counts += np.array([1, 2, 9.0])
        self.generator.random()
        return F.cross_entropy(self.net(x), y) * float(self.counts[0])


def test_arrays_and_generators_of_numpy_are_as_before() -> None:
    module, data = Counting(), TensorDataset(X, Y)
    trainer = fitted(module, data)
    counts, state = module.counts.copy(), module.generator.bit_generator.state
    factor = counts[0] + 1
    exact = dense_scores(
        module.net,
        lambda net, x: net(x),
        lambda z, y: factor * cross_entropy(z, y),
        [(x.double(), y) for x, y in zip(X, Y, strict=True)],
        QUERY,
    )
    assert error(scores(trainer, data), exact) < 1e-5
    trainer.unlearn([1, 2], dry_run=True)
    assert np.array_equal(module.counts, counts)
    assert module.generator.bit_generator.state == state


def test_a_collate_function_that_draws_keeps_its_rows() -> None:
    def noisy(items: Any) -> list[Tensor]:
        x, y = (torch.stack(part) for part in zip(*items, strict=True))
        return [x + 1e-3 * torch.randn(x.shape), y]

    class Plain(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    data = TensorDataset(X, Y)
    trainer = fitted(Plain(), data, noisy)
    report = trainer.influence([X[:3], Y[:3]], unconverged="ignore")
    assert report.settings["losses"] == "training_step, vectorised over examples"


class Casting(Module):
    """Casts its input to a dtype of its own choice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        cast = x.float() if self.kind == "fixed" else x.to(self.net[0].weight.dtype)
        return F.cross_entropy(self.net(cast), y)


def test_a_step_that_casts_its_input_is_refused_in_another_dtype_with_what_to_do() -> None:
    data = TensorDataset(X, Y)
    query = [X[:2], Y[:2]]
    fixed = fitted(Casting("fixed"), data)
    with pytest.raises(ObjectiveError, match=r"fails in float64.*cast them to the dtype of the weights.*double=True"):
        fixed.influence(query, double=True)
    assert fixed.influence(query, unconverged="ignore").scores.isfinite().all()
    assert fitted(Casting("of the weights"), data).influence(query, double=True).scores.isfinite().all()


def test_a_collate_function_for_pairs_serves_a_module_with_its_own_losses() -> None:
    def pairs(items: Any) -> dict[str, Any]:
        if len(items) < 2:
            raise ValueError("pairs of examples are needed")
        x, y = (torch.stack(part) for part in zip(*items, strict=True))
        return {"x": x, "y": y}

    class Own(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.influence_loss(batch).mean()

        def influence_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")

    data, module = TensorDataset(X, Y), Own()
    trainer = fitted(module, data, pairs)
    examples = [(x.double(), y) for x, y in zip(X, Y, strict=True)]
    exact = dense_scores(module.net, lambda net, x: net(x), cross_entropy, examples, QUERY)
    assert error(scores(trainer, data, pairs), exact) < 1e-5
