"""The running statistics of BatchNorm, recomputed for other weights or other data."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import ConfigurationError
from .losses import LossFunction

__all__ = ["RunningStatistics", "refreshed_statistics"]

# The buffers of a BatchNorm layer that a pass in training mode changes, apart from the count of batches.
_RUNNING = ("running_mean", "running_var")

_Layers = Mapping[str, nn.modules.batchnorm._BatchNorm]


def refreshed_statistics(loss: LossFunction, theta: Tensor, *examples: Examples) -> dict[str, Tensor]:
    """The running means and variances of all BatchNorm layers at ``theta``, computed over examples.

    Like :func:`torch.optim.swa_utils.update_bn`, this averages the statistics of forward passes. Unlike there, each
    example has the same weight, and only BatchNorm is in training mode: dropout, for example, stays off.

    Args:
        loss: The loss function; its forward pass is used.
        theta: Parameters ``(p,)``.
        examples: Sets of examples; each set is read in random order.

    Returns:
        ``running_mean`` and ``running_var`` of each layer, by the names of the buffers.

    Raises:
        ConfigurationError: If no BatchNorm layer keeps running statistics, if the layers are synchronised over
            processes, or if no batch has two or more examples.
    """
    module = loss.shadow.module
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    }
    if not layers:
        raise ConfigurationError(
            f"refresh_statistics=True recomputes the running statistics of BatchNorm, but {type(module).__name__} has"
            " no layer with running statistics. Omit refresh_statistics."
        )
    processes = examples[0].processes
    if processes.size > 1 and any(isinstance(layer, nn.SyncBatchNorm) for layer in layers.values()):
        raise ConfigurationError(
            "refresh_statistics=True does not work while BatchNorm is synchronised over processes (sync_batchnorm)."
            " Call it after `fit`: Lightning then has converted the layers back."
        )
    buffers, seen = loss.shadow.buffers(theta.dtype), 0
    with _in_training_mode(layers), torch.no_grad():
        for batch in _shuffled(examples, loss.shadow.seed):
            if batch.size == 1:  # a single example has no variance
                continue
            seen += batch.size
            for layer in layers.values():
                layer.momentum = batch.size / seen  # the mean over all batches, each example with the same weight
            loss.evaluate(theta, batch, buffers=buffers)
    total = processes.total(seen)
    if not total:
        raise ConfigurationError(
            "refresh_statistics=True needs batches of two or more examples, but only one example is retained, or"
            " batch_size is 1."
        )
    names = [f"{name}.{kind}" for name in layers for kind in _RUNNING]
    if processes.size == 1:
        return {name: buffers[name] for name in names}
    return {name: processes.sum(buffers[name] * seen) / total for name in names}


class RunningStatistics(TorchFunctionMode):
    """Inside of it, the running statistics of BatchNorm are differentiable.

    In training mode PyTorch writes them into the buffers, without a graph. Here the new values are kept apart, and the
    buffers stay as they are. In evaluation mode PyTorch has no derivative in them. Here the outputs depend on those
    that require one. Instance normalisation with running statistics is not covered.

    Args:
        buffers: The running means and variances of the module by name, as it holds them inside in training mode.

    Attributes:
        updated: Their new values by name. Those of layers that did not run in training mode are missing.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(buffer): name for name, buffer in buffers.items()}
        self.updated: dict[str, Tensor] = {}

    @staticmethod
    def names_of(module: nn.Module) -> list[str]:
        """The names of the running means and variances of all BatchNorm layers of a module."""
        return [
            f"{name}.{kind}" if name else kind
            for name, layer in module.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
            for kind in _RUNNING
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        bound = _SIGNATURE.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = bound.arguments
        input, share = given["input"], given["momentum"]
        if given["training"] and id(given["running_mean"]) in self._names:
            over = [dim for dim in range(input.ndim) if dim != 1]
            for kind, new in (("running_mean", input.mean(over)), ("running_var", input.var(over))):
                name = self._names[id(given[kind])]
                self.updated[name] = (1 - share) * self.updated.get(name, given[kind]) + share * new
                given[kind] = None
        elif not given["training"] and given["running_mean"] is not None and given["running_mean"].requires_grad:
            return _normalised(*(given[name] for name in ("input", *_RUNNING, "weight", "bias", "eps")))
        return F.batch_norm(*bound.args, **bound.kwargs)


_SIGNATURE = inspect.signature(F.batch_norm)


def _normalised(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The output of BatchNorm in evaluation mode."""
    shape = [-1 if dim == 1 else 1 for dim in range(input.ndim)]
    output = (input - mean.reshape(shape)) * torch.rsqrt(variance + eps).reshape(shape)
    output = output if weight is None else output * weight.reshape(shape)
    return output if bias is None else output + bias.reshape(shape)


@contextlib.contextmanager
def _in_training_mode(layers: _Layers) -> Iterator[None]:
    """Inside the block the layers are in training mode; at its end evaluation mode and their momentum are restored."""
    momenta = {name: layer.momentum for name, layer in layers.items()}
    for layer in layers.values():
        layer.train()
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.momentum = momenta[name]
            layer.eval()


def _shuffled(examples: tuple[Examples, ...], seed: int) -> Iterator[Batch]:
    """This process's batches of each set, drawn in random order."""
    generator = torch.Generator().manual_seed(seed)
    for part in examples:
        yield from part.subset(torch.randperm(len(part), generator=generator)).strided_batches()
