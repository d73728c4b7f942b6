"""The differentiable steps of optimizers, compared with those of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_gif.trajectory.updates import UPDATES, clip

SETTINGS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.Adam, {"lr": 0.1, "betas": (0.7, 0.8), "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.1, "eps": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_a_step_has_the_bits_of_the_optimizer(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.randn(7, 5))
    optimizer = kind([parameter], **settings)
    theta, state = parameter.detach().clone(), dict[str, Any]()
    options = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    for _ in range(5):
        parameter.grad = torch.randn(7, 5)
        parameter.grad[0] = 0
        theta, state = UPDATES[kind](theta, parameter.grad.clone(), state, options)
        optimizer.step()
        assert torch.equal(theta, parameter)
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value))


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 0.5), ("norm", 100.0), ("value", 0.5)])
def test_clipping_has_the_bits_of_pytorch(algorithm: str, limit: float) -> None:
    parameters = [nn.Parameter(torch.zeros(7, 5)), nn.Parameter(torch.zeros(3))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    found = clip([parameter.grad.clone() for parameter in parameters if parameter.grad is not None], algorithm, limit)
    own = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    own(parameters, limit)
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(found, parameters, strict=True))


def test_a_parameter_whose_gradients_were_all_zero_has_finite_derivatives() -> None:
    theta, grad = torch.randn(3).requires_grad_(), torch.zeros(3).requires_grad_()
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
    new, _ = UPDATES[torch.optim.Adam](theta, grad, {}, options)
    for found in torch.autograd.grad(new.sum(), (theta, grad)):
        assert torch.isfinite(found).all()
