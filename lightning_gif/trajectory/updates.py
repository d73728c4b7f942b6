"""The steps of optimizers as differentiable functions.

Each function makes the same operations in the same order as PyTorch's own loop over tensors, so that a replay has the
same bits. They act on entries one by one: on single parameters, or on several in one flat vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["CLIPPINGS", "UPDATES", "OptimizerState", "Options", "Update", "clip"]


Options = Mapping[str, Any]
"""The settings of a parameter group, by their names in PyTorch: plain numbers, truth values, and ``betas``."""

OptimizerState = Mapping[str, Any]
"""The state of an optimizer for some entries, by its names in PyTorch: tensors in the shape of the entries, and
``step``, the number of earlier steps. Empty before the first step."""

Update = Callable[[Tensor, Tensor, OptimizerState, Options], tuple[Tensor, dict[str, Any]]]
"""A function ``(parameters, gradients, state, options)`` that returns the new parameters and the new state."""

# What `clip_grad_norm_` adds to a norm.
_CLIP_EPS = 1e-6

CLIPPINGS = ("norm", "value")
"""The ways to clip gradients, by the names that ``Trainer(gradient_clip_algorithm=…)`` takes."""


def sgd(theta: Tensor, grad: Tensor, state: OptimizerState, options: Options) -> tuple[Tensor, dict[str, Any]]:
    """A step of :class:`torch.optim.SGD`: momentum with dampening, Nesterov's momentum, weight decay, ``maximize``."""
    grad = -grad if options["maximize"] else grad
    if options["weight_decay"]:
        grad = grad.add(theta, alpha=options["weight_decay"])
    new: dict[str, Any] = {}
    if options["momentum"]:
        before = state.get("momentum_buffer")
        if before is None:
            buffer = grad.clone()
        else:
            buffer = before.mul(options["momentum"]).add(grad, alpha=1 - options["dampening"])
        new["momentum_buffer"] = buffer
        grad = grad.add(buffer, alpha=options["momentum"]) if options["nesterov"] else buffer
    return theta.add(grad, alpha=-options["lr"]), new


def adam(theta: Tensor, grad: Tensor, state: OptimizerState, options: Options) -> tuple[Tensor, dict[str, Any]]:
    """A step of :class:`torch.optim.Adam`, also with ``amsgrad``, ``maximize`` and decoupled weight decay."""
    lr, (beta1, beta2), step = options["lr"], options["betas"], state.get("step", 0.0) + 1.0
    grad = -grad if options["maximize"] else grad
    if options["weight_decay"]:
        if options.get("decoupled_weight_decay"):
            theta = theta.mul(1 - lr * options["weight_decay"])
        else:
            grad = grad.add(theta, alpha=options["weight_decay"])
    first, second = (_or_zeros(state, name, theta) for name in ("exp_avg", "exp_avg_sq"))
    first = first.lerp(grad, 1 - beta1)
    second = second.mul(beta2).addcmul(grad, grad, value=1 - beta2)
    new = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    moment = second
    if options["amsgrad"]:
        moment = new["max_exp_avg_sq"] = torch.maximum(_or_zeros(state, "max_exp_avg_sq", theta), second)
    step_size, correction = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return theta.addcdiv(first, (_root(moment) / correction).add(options["eps"]), value=-step_size), new


def adamw(theta: Tensor, grad: Tensor, state: OptimizerState, options: Options) -> tuple[Tensor, dict[str, Any]]:
    """A step of :class:`torch.optim.AdamW`."""
    return adam(theta, grad, state, {**options, "decoupled_weight_decay": True})


UPDATES: dict[type[Optimizer], Update] = {SGD: sgd, Adam: adam, AdamW: adamw}
"""The functions by the class of the optimizer."""


def clip(grads: Sequence[Tensor], algorithm: str, limit: float) -> list[Tensor]:
    """Clips gradients as :func:`torch.nn.utils.clip_grad_norm_` or ``clip_grad_value_`` does.

    Args:
        grads: The gradients of all parameters of the optimizer, in its order, or one flat vector of them.
        algorithm: One of :data:`CLIPPINGS`.
        limit: The largest norm of all gradients together, or the largest absolute value of an entry.
    """
    if algorithm == "value":
        return [grad.clamp(-limit, limit) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    factor = torch.clamp(limit / (norm + _CLIP_EPS), max=1.0)
    return [grad * factor for grad in grads]


def _or_zeros(state: OptimizerState, name: str, like: Tensor) -> Tensor:
    """A part of the state, which is zero before the first step."""
    return state[name] if name in state else torch.zeros_like(like)


def _root(moment: Tensor) -> Tensor:
    """The square root. Its derivative at 0 counts as 0: there the gradients of all steps were 0."""
    positive = moment > 0
    return torch.where(positive, torch.where(positive, moment, 1.0).sqrt(), 0.0)
