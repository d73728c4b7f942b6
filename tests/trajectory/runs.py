"""Recorded fits in float64, and the same runs as one differentiable function of the examples' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback

from ..conftest import Classifier, blobs, loader, make_trainer

__all__ = ["N", "Run", "derivatives", "numbered", "recorded"]

N = 22


class Run(Classifier):
    """A classifier whose optimizer is given, and whose examples have weights."""

    def __init__(self, net: nn.Module, optimizer: Callable[[nn.Module], Any], weights: Tensor | None = None) -> None:
        super().__init__(net.double())
        self.optimizer = optimizer
        self.example_weights = weights

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, numbers = batch
        if self.example_weights is None:
            return F.cross_entropy(self(x), y)
        losses = F.cross_entropy(self(x), y, reduction="none")
        return (losses * self.example_weights[numbers]).sum() / len(y)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


def numbered() -> TensorDataset:
    """Examples in float64, each with its number."""
    x, y = blobs(N).tensors
    return TensorDataset(x.double(), y, torch.arange(N))


def recorded(
    folder: Path | None,
    net: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], Any],
    weights: Tensor | None = None,
    more: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> tuple[pl.Trainer, Run]:
    """A trainer after a fit in float64, and its module; recorded if a folder is given."""
    torch.manual_seed(1)
    module = Run(net(), optimizer, weights)
    callback = GIFCallback(trajectory=None if folder is None else str(folder), snapshots=0, cache_neurons=False)
    trainer = make_trainer(callback, precision="64-true", **{"max_epochs": 3, **options})
    trainer.callbacks += more
    trainer.fit(module, loader(numbered(), batch_size=5))
    return trainer, module


def derivatives(
    net: nn.Module, steps: list[list[Tensor]], options: Mapping[str, Any], clip: tuple[str, float] | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The final weights of a run, computed from the textbook, and derivatives of a function of them by autograd.

    Args:
        net: The initial network, without buffers.
        steps: The numbers of the examples of each batch of each optimizer step.
        options: The settings of the optimizer, with its name as ``kind``; ``lr`` is a number or one for each step.
        clip: How gradients are clipped.

    Returns:
        The final weights ``(p,)`` and a function from a query's number to the derivatives ``(N,)`` of its loss.
    """
    x, y, _ = numbered().tensors
    names = list(dict(net.named_parameters()))
    shapes = [parameter.shape for parameter in net.parameters()]
    weights = torch.ones(N, dtype=torch.float64, requires_grad=True)

    def losses(theta: Tensor, numbers: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, values, x[numbers]), y[numbers], reduction="none")

    theta = torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()]).requires_grad_()
    state: dict[str, Any] = {}
    for number, batches in enumerate(steps):
        total = sum((weights[one] * losses(theta, one)).sum() / len(one) / len(batches) for one in batches)
        (grad,) = torch.autograd.grad(total, theta, create_graph=True)
        if clip is not None and clip[0] == "norm":
            grad = grad * torch.clamp(clip[1] / (grad.norm() + 1e-6), max=1.0)
        elif clip is not None:
            grad = torch.clamp(grad, -clip[1], clip[1])
        theta = textbook(theta, grad, state, options, number)

    def of(query: int) -> Tensor:
        (found,) = torch.autograd.grad(losses(theta, torch.tensor([query])).sum(), weights, retain_graph=True)
        return found

    return theta.detach(), of


def textbook(theta: Tensor, grad: Tensor, state: dict[str, Any], options: Mapping[str, Any], number: int) -> Tensor:
    """A step of SGD, Adam or AdamW, written with plain arithmetic."""
    kind, lr = options["kind"], options["lr"]
    lr = lr[number] if isinstance(lr, list) else lr
    decay, sign = options.get("weight_decay", 0.01 if kind == "AdamW" else 0.0), -1 if options.get("maximize") else 1
    grad = sign * grad
    if kind == "SGD":
        grad = grad + decay * theta
        momentum = options.get("momentum", 0.0)
        if momentum:
            before = state.get("buffer")
            new = grad if before is None else momentum * before + (1 - options.get("dampening", 0.0)) * grad
            state["buffer"] = new
            grad = grad + momentum * new if options.get("nesterov") else new
        return theta - lr * grad
    if kind == "AdamW":
        theta = theta - lr * decay * theta
    else:
        grad = grad + decay * theta
    first, second = options.get("betas", (0.9, 0.999))
    state["m"] = first * state.get("m", 0.0) + (1 - first) * grad
    state["v"] = second * state.get("v", 0.0) + (1 - second) * grad**2
    moment = state["v"]
    if options.get("amsgrad"):
        moment = state["max"] = torch.maximum(moment, state["max"]) if "max" in state else moment
    corrected = state["m"] / (1 - first ** (number + 1))
    return theta - lr * corrected / ((moment / (1 - second ** (number + 1))).sqrt() + options.get("eps", 1e-8))
