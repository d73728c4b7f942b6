"""The least-squares problem of removing a class from TinyNet, and a loader of the paper's scripts for comparison."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif.curvature.products import CURVATURES
from lightning_gif.curvature.streaming import Curvature
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective
from lightning_gif.selection import select
from lightning_gif.solvers.operators import Submatrix

__all__ = ["Problem", "load_reference", "opened", "timed"]


@dataclass
class Problem:
    """``min_x ‖H[:, S] x − g‖``: the system of the method `gif`, see `lightning_gif.curvature`.

    Attributes:
        objective: The open objective.
        net: The network as a plain module, for the paper's scripts.
        retained: The retained examples that the Hessian is taken over.
        positions: The target parameters ``S``, ``(k,)``.
        gradient: The gradient ``g`` of the weighted mean loss of the class to remove, ``(p,)``.
        forget: The images and labels of that class.
        share: The weight of their mean loss.
    """

    objective: Objective
    net: nn.Module
    retained: Examples
    positions: Tensor
    gradient: Tensor
    forget: tuple[Tensor, Tensor]
    share: float

    def curvature(self, kind: str = "hessian", memory: float = float("inf")) -> Curvature:
        return Curvature(CURVATURES[kind](self.objective), self.objective.theta, self.retained, memory=memory)

    def matrix(self, curvature: Curvature) -> Submatrix:
        return Submatrix(curvature, None, self.positions)

    def residual(self, x: Tensor) -> float:
        """The relative normal-equation residual of a solution."""
        matrix = self.matrix(self.curvature())
        return float(matrix.rmatvec(self.gradient - matrix.matvec(x)).norm() / matrix.rmatvec(self.gradient).norm())

    def batch(self) -> tuple[Tensor, Tensor]:
        """The retained examples as one batch."""
        data = [batch.data for batch in self.retained.batches()]
        return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])

    def loss(self) -> Tensor:
        """The mean loss of the retained examples with its graph, as the paper's scripts need it."""
        x, y = self.batch()
        return F.cross_entropy(self.net(x), y)


@contextmanager
def opened(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    train: TensorDataset,
    *,
    examples: int,
    ratio: float = 0.05,
    label: int = 0,
    micro_batch: int = 256,
) -> Iterator[Problem]:
    """The problem for a trained model, with a random sample of retained examples."""
    labels = train.tensors[1]
    members = (labels == label).nonzero().squeeze(1)
    others = (labels != label).nonzero().squeeze(1)
    kept = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:examples]]
    with Objective.open(trainer, model) as objective:

        def of(chosen: Tensor) -> Examples:
            batch = tuple(tensor[chosen] for tensor in train.tensors)
            return Examples.from_batch(batch, objective.prepare, batch_size=micro_batch)

        forget, retained = of(members), of(kept)
        objective.learn_structure(retained)
        neurons, gradients = objective.observe(forget)
        targets = select(
            model,
            "highest_k_gradients",
            ratio,
            allowed=["*"],
            neurons=neurons,
            gradients=gradients,
            classes=None,
            seed=0,
        )
        share = len(members) / len(others)
        yield Problem(
            objective=objective,
            net=model.net,
            retained=retained,
            positions=targets.flat(objective.space),
            gradient=share * objective.gradient(forget),
            forget=(train.tensors[0][members], train.tensors[1][members]),
            share=share,
        )


def load_reference(checkout: Path) -> ModuleType:
    """The Hessian routines of a checkout of the paper's scripts (hslyu/GIF)."""
    spec = importlib.util.spec_from_file_location("reference_hessians", checkout / "src" / "hessians.py")
    if spec is None or spec.loader is None or not (checkout / "src" / "hessians.py").is_file():
        raise SystemExit(f"{checkout} is not a checkout of the paper's scripts (hslyu/GIF): src/hessians.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each function. Functions take turns, so that other work on the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # fills caches and builds graphs
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
