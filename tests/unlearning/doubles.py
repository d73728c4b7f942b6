"""Problems with a known solution, and an edit problem that needs no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, GIFMixin, attach
from lightning_gif.unlearning import ClassRemoval, LabelCorrection, QuadraticModel, Trial, Tuning
from lightning_gif.unlearning.goals import Goal
from lightning_gif.unlearning.protocol import Limits
from lightning_gif.unlearning.task import Scales

from ..conftest import Classifier, fitted, loader, make_trainer


class Quadratic(GIFMixin, Classifier):
    """Least squares: its risk is quadratic, so one natural step must land exactly on the retrained weights."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.influence_loss(batch).mean()

    def influence_loss(self, batch: Any) -> Tensor:
        return (self(batch[0]).squeeze(1) - batch[1]).square()

    def solve(self, x: Tensor, y: Tensor, weight_decay: float = 0.0) -> Tensor:
        """Sets the weights to the exact optimum and returns them, ``(5,)``."""
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        normal = 2 * design.T @ design / len(x) + weight_decay * torch.eye(5, dtype=x.dtype)
        found = torch.linalg.solve(normal, 2 * design.T @ y / len(x))
        with torch.no_grad():
            self.net.weight.copy_(found[None, :4])
            self.net.bias.copy_(found[4:])
        return found

    def flat(self) -> Tensor:
        return torch.cat([self.net.weight.detach().flatten(), self.net.bias.detach()])


def quadratic(n: int = 50, weight_decay: float = 0.0) -> tuple[Any, Quadratic, Tensor, Tensor]:
    x = torch.randn(n, 4, dtype=torch.float64)
    y = x @ torch.randn(4, dtype=torch.float64) + torch.randn(n, dtype=torch.float64)
    module = Quadratic().double()
    module.solve(x, y, weight_decay)
    trainer = make_trainer(precision="64-true")
    callback = GIFCallback(ratio=1.0, solver="dense", curvature_examples=None, weight_decay=weight_decay)
    attach(trainer, module, train_dataloaders=loader(TensorDataset(x, y)), callback=callback)
    return trainer, module, x, y


def memorised(**options: Any) -> tuple[Any, Classifier, TensorDataset, TensorDataset]:
    """A net that has memorised random labels, and unseen examples of the same kind."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(120, 6, generator=generator), torch.randint(3, (120,), generator=generator)
    trained, unseen = TensorDataset(x[:60], y[:60]), TensorDataset(x[60:], y[60:])
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
    trainer, module, _ = fitted(Classifier(net), trained, GIFCallback(ratio=0.5, **options), max_epochs=60)
    return trainer, module, trained, unseen


FLAT = QuadraticModel(0.0, 0.0)


A_CLASS = ClassRemoval()


class Fake:
    """A problem whose trials are given by functions of the step sizes."""

    def __init__(
        self,
        memorization: Callable[..., float] = lambda *steps: 0.0,
        retain: Callable[..., float] = lambda *steps: 0.1,
        *,
        risk: Callable[..., float] | None = None,
        forget: Callable[..., float] = lambda first=0.0, *later: first,
        goal: Goal = A_CLASS,
        target: float | None = 0.01,
        max_retain_loss: float = math.inf,
        models: Sequence[QuadraticModel] = (),
    ) -> None:
        self.goal, self.limits, self.tuning = goal, Limits(target, max_retain_loss), Tuning()
        self._functions = forget, retain, risk or retain, memorization
        self._models = list(models)
        self.solved: list[Trial | None] = []
        self.trials: list[Trial] = []
        self.evaluate()

    def evaluate(self, *step_sizes: float) -> Trial:
        assert len(step_sizes) <= len(self.solved)
        self.trials.append(Trial(step_sizes, *(function(*step_sizes) for function in self._functions)))
        return self.trials[-1]

    def influence_direction(self) -> QuadraticModel:
        assert not self.solved
        return self._solve(None)

    def descent_direction(self, at: Trial) -> QuadraticModel:
        assert at in self.trials
        assert len(at.step_sizes) <= len(self.solved)
        return self._solve(at)

    def _solve(self, at: Trial | None) -> QuadraticModel:
        self.solved.append(at)
        return self._models.pop(0) if self._models else FLAT


def beyond(needed: float) -> Callable[..., float]:
    """All are remembered before a step, and none after it."""
    return lambda first=0.0, *later: float(first < needed)


def labels(
    risk: Callable[..., float], *models: QuadraticModel, memorization: Callable[..., float] = lambda *steps: 0.0
) -> Fake:
    """A label correction in which every change lowers the risk, or should."""
    return Fake(memorization, risk=risk, goal=LabelCorrection(), target=0.2, models=models)


def scales(share: float, *, classes: int | None = None, nat: float = 1.0) -> Scales:
    return Scales(forget_weight=share, n_classes=classes, loss_per_nat=lambda: nat, unseen_loss=None)
