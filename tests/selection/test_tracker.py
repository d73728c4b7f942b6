"""The statistics that are gathered while a model trains, and the targets that are picked from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

import lightning_gif.selection.tracker
from lightning_gif import ConfigurationError, GIFCallback

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from ..doubles import Do, TwoOptimizers, differences, quick, statistics_of


def gradient_squares(module: Classifier, data: TensorDataset, size: int) -> Tensor:
    """The sum of squared gradients over batches, from the definition."""
    total = torch.zeros_like(module.net[0].weight)
    for start in range(0, len(data), size):
        x, y = batch_of(data, slice(start, start + size))
        total += torch.autograd.grad(F.cross_entropy(module(x), y), module.net[0].weight)[0].square()
    return total


@pytest.mark.parametrize(
    ("options", "size"), [({}, 16), ({"accumulate_grad_batches": 3}, 48), ({"gradient_clip_val": 1e-4}, 16)]
)
def test_gradients_are_gathered_once_a_step_and_before_clipping(options: dict[str, Any], size: int) -> None:
    callback, module = quick(), Classifier(lr=0.0)
    make_trainer(callback, max_epochs=1, **options).fit(module, loader(blobs(), shuffle=False))
    assert callback.gradients.steps["net.0.weight"] == 48 // size
    assert torch.allclose(
        callback.gradients.squares["net.0.weight"], gradient_squares(module, blobs(), size), rtol=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 1e-4}])
def test_neurons_are_gathered_by_class_as_gradients_of_single_losses(options: dict[str, Any]) -> None:
    callback, module, data = quick(), Classifier(lr=0.0), blobs()
    make_trainer(callback, max_epochs=1, **options).fit(module, loader(data))
    x, y = data.tensors
    hidden = module.net[0](x)
    loss = F.cross_entropy(module.net[1:](hidden), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, hidden)
    for c in range(3):
        assert torch.allclose(callback.neurons.mean("outputs", "net.0", [c]), hidden[y == c].mean(0), atol=1e-5)
        assert torch.allclose(callback.neurons.mean("gradients", "net.0", [c]), gradient[y == c].mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "accumulated", "gathered"),
    [
        (None, 1, range(12)),
        (64, 1, [0, 5]),
        (2, 1, [0, 5]),
        (1, 1, [0]),
        (2, 2, [0, 1, 4, 5, 10, 11]),
    ],
)
def test_some_steps_of_an_epoch_are_gathered_from(steps: int | None, accumulated: int, gathered: Iterable[int]) -> None:
    """About as many as asked for, but at most one in twenty if that is more than 2; of each step all batches."""
    callback, module, data = quick(cache_steps=steps), Classifier(lr=0.0), blobs()
    trainer = make_trainer(callback, max_epochs=1, accumulate_grad_batches=accumulated)
    trainer.fit(module, loader(data, 4, shuffle=False))
    seen = torch.cat([torch.arange(4 * batch, 4 * batch + 4) for batch in gathered])
    assert callback.gradients.steps["net.0.weight"] == len(seen) / 4 / accumulated
    assert callback.neurons.output_counts["net.0"].sum() == len(seen)
    hidden = module.net[0](data.tensors[0][seen])
    assert torch.allclose(callback.neurons.mean("outputs", "net.0"), hidden.mean(0), atol=1e-5)


def gathered_from(module: pl.LightningModule, batches: int, **options: Any) -> GIFCallback:
    callback = quick(cache_steps=16)
    make_trainer(callback, **{"max_epochs": 1, **options}).fit(module, loader(blobs(2 * batches), 2, shuffle=False))
    return callback


def test_what_is_gathered_has_no_period_that_training_may_have() -> None:
    class EveryFourth(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx % 4 == 3:
                super().training_step(batch, batch_idx)

    assert 2 <= gathered_from(EveryFourth(), 256).gradients.steps["net.0.weight"] <= 8
    classes = gathered_from(Classifier(lr=0.0), 256).neurons.output_counts["net.0"][1:]
    assert classes.max() <= 2 * classes.min()


def test_a_fit_of_so_many_steps_is_gathered_from_to_its_end() -> None:
    steps = gathered_from(Classifier(lr=0.0), 400, max_epochs=-1, max_steps=84).gradients.steps["net.0.weight"]
    assert 4 <= steps <= 5  # a twentieth of 84, not of 400


def test_a_short_epoch_is_gathered_from_at_one_step_in_twenty_or_at_two() -> None:
    for batches, least, most in ((2, 2, 2), (6, 2, 3), (30, 1, 3), (105, 5, 7), (400, 15, 17)):
        steps = gathered_from(Classifier(lr=0.0), batches).gradients.steps["net.0.weight"]
        assert least <= steps <= most


def test_sums_are_kept_in_float32_under_mixed_precision() -> None:
    callback, data = quick(cache_steps=None), blobs(2400)
    module = Classifier(lr=0.0)
    make_trainer(callback, max_epochs=1, precision="bf16-mixed").fit(module, loader(data, 8))
    exact = module.net[0](data.tensors[0])
    for c in range(3):
        found = callback.neurons.mean("outputs", "net.0", [c])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact[data.tensors[1] == c].mean(0), rtol=0, atol=0.01)


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, "all"])
def test_cache_steps_are_checked(steps: Any) -> None:
    with pytest.raises(ConfigurationError, match="`cache_steps` must be None or a whole number"):
        GIFCallback(cache_steps=steps)


def test_with_several_optimizers_each_adds_its_own_parameters_once_a_step() -> None:
    callback = quick()
    fitted(TwoOptimizers(), callback=callback, max_epochs=1)
    assert set(callback.gradients.steps) == {name for name, _ in TwoOptimizers().named_parameters()}
    assert set(callback.gradients.steps.values()) == {3}


def test_non_finite_gradients_are_left_out() -> None:
    class Spiky(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 1 else 1)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0, 0, 0)

    callback = quick()
    fitted(Spiky(), callback=callback, max_epochs=1)
    assert set(callback.gradients.steps.values()) == {2}
    assert all(square.isfinite().all() for square in callback.gradients.squares.values())
    assert all(value.isfinite().all() for value in callback.neurons.gradients.values())


def test_validation_and_sanity_checking_do_not_enter_the_statistics() -> None:
    states = []
    for options in ({"limit_val_batches": 0}, {"num_sanity_val_steps": 2, "val_check_interval": 1}):
        torch.manual_seed(0)
        callback = quick()
        train, val = (loader(data, shuffle=False) for data in (blobs(), blobs(16, seed=1)))
        make_trainer(callback, **options).fit(Classifier(), train, val)
        states.append((statistics_of(callback), dict(callback.targets)))
    assert differences(*states) == []


def test_targets_are_picked_although_validation_has_cleared_the_gradients() -> None:
    callback = quick(selector="largest_gradients")
    seen = []
    trainer = make_trainer(callback, max_epochs=1)
    trainer.callbacks.append(Do("on_train_epoch_end", lambda t, m: seen.append(m.net[0].weight.grad)))
    trainer.fit(Classifier(), loader(blobs()), loader(blobs(16, seed=1), shuffle=False))
    assert callback.targets is not None
    assert len(seen) == 1


class ReadsTargets(pl.Callback):
    """Reads the targets in the middle of each epoch, or never."""

    def __init__(self, callback: GIFCallback, read: bool) -> None:
        self.callback, self.read = callback, read
        self.seen: list[tuple[int | None, dict[str, Tensor] | None]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.read and batch_idx == 1:
            targets = self.callback.targets
            self.seen.append((self.callback.targets_epoch, None if targets is None else dict(targets)))


def test_targets_that_are_picked_when_they_are_read_are_those_of_the_end_of_the_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, last = [], []
    for most, read in ((0, True), (2**16, True), (2**16, False)):  # picked at once, and when they are read
        monkeypatch.setattr(lightning_gif.selection.tracker, "_MAY_WAIT", most)
        callback = GIFCallback("largest_gradients", ratio=0.2, cache_steps=None)
        reads = ReadsTargets(callback, read)
        torch.manual_seed(0)
        trainer = make_trainer(callback, max_epochs=3)
        trainer.callbacks.append(reads)
        trainer.fit(Classifier(), loader(blobs()))
        assert callback.targets is not None
        last.append((callback.targets_epoch, dict(callback.targets)))
        seen.append(reads.seen)
    assert [epoch for epoch, _ in seen[0]] == [None, 0, 1]
    assert not all(torch.equal(seen[0][1][1][name], seen[0][2][1][name]) for name in seen[0][1][1])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    assert not seen[2]
    torch.testing.assert_close(last[1:], [last[0]] * 2, rtol=0, atol=0)
    assert last[0][0] == 2
