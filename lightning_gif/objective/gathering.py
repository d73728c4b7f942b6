"""A block in which a module whose parameters are sharded holds whole ones, and runs as on one device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..distributed import ProcessGroup
from ..errors import ConfigurationError
from ..sharding import has_shards, is_sharded, own_class, reshard
from ..storage.interrupts import uninterrupted
from . import memory
from .isolation import restore_members

__all__ = ["gathered"]

# Hooks of these modules of PyTorch gather and free sharded parameters, and change the inputs and outputs of layers.
_HOOKS_OF = "torch.distributed."

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextlib.contextmanager
def gathered(module: nn.Module, device: torch.device, processes: ProcessGroup, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, a module with sharded parameters holds whole ones, and FSDP2 does not act on it.

    The hooks of FSDP2 are absent inside, because with them there are no derivatives with respect to parameters that are
    passed in: hooks of the forward pass replace these by gathered ones. What is written to the whole parameters is lost
    at the end. A module without sharded parameters is left alone.

    Args:
        module: The module.
        device: The device of the whole parameters.
        processes: The processes that hold the parts. All must enter the block.
        dtype: The dtype of the flat vectors that computations in the block will make of the trainable parameters.

    Raises:
        ConfigurationError: On all processes, before anything is gathered, if one has too little memory for the whole
            parameters and two such vectors.
    """
    if not has_shards(module):
        yield
        return
    reshard(module)
    _check_fits(module, device, processes, dtype)
    whole = {id(parameter): _whole(parameter, device, processes) for parameter in module.parameters()}
    held = [one._parameters for one in module.modules()]
    own = [dict(members) for members in held]
    try:
        with _without_hooks(module), _with_own_classes(module):
            with uninterrupted():
                for members in held:
                    members.update({name: whole[id(one)] for name, one in members.items() if one is not None})
            yield
    finally:
        with uninterrupted():
            for members, before in zip(held, own, strict=True):
                restore_members(members, before)


def _whole(parameter: nn.Parameter, device: torch.device, processes: ProcessGroup) -> nn.Parameter:
    if not is_sharded(parameter):
        return parameter
    return nn.Parameter(processes.whole(parameter).to(device), parameter.requires_grad)


def _check_fits(module: nn.Module, device: torch.device, processes: ProcessGroup, dtype: torch.dtype) -> None:
    parameters = list(module.parameters())
    vectors = 2 * sum(one.numel() for one in parameters if one.requires_grad) * dtype.itemsize
    size = vectors + sum(one.numel() * one.element_size() for one in parameters if is_sharded(one))
    free = memory.free_for_each(device, processes)
    if size > max(free, memory.ALWAYS_IN_MEMORY):
        fewer = (
            "Start fewer processes on each machine, which share its memory. Or save" if device.type == "cpu" else "Save"
        )
        raise ConfigurationError(
            f"The parameters of {type(module).__name__} are sharded, and this call gathers them on each process. This"
            f" takes {size / 2**30:.3g} GiB with two vectors of their size, but {free / 2**30:.3g} GiB are free for"
            f" each process. {fewer} a checkpoint, make a single file of it with `python -m"
            " lightning.fabric.utilities.consolidate_checkpoint`, and use lightning_gif.attach() on a Trainer with"
            " devices=1, on a device with more memory: accelerator='cpu', for example."
        )


@contextlib.contextmanager
def _with_own_classes(module: nn.Module) -> Iterator[None]:
    """Inside the block, modules have the classes that they had before ``fully_shard``, which gave them derived ones."""
    classes = {one: type(one) for one in module.modules() if own_class(one) is not type(one)}
    try:
        with uninterrupted():
            for one in classes:
                one.__class__ = own_class(one)
        yield
    finally:
        with uninterrupted():
            for one, derived in classes.items():
                one.__class__ = derived


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside the block, the hooks of distributed training are absent; at its end all hooks are as before."""
    held: list[tuple[dict[int, Any], dict[int, Any]]] = [
        (hooks, dict(hooks)) for one in module.modules() for kind in _HOOKS if (hooks := getattr(one, kind, None))
    ]
    try:
        with uninterrupted():
            for hooks, before in held:
                for number, hook in before.items():
                    if str(getattr(hook, "__module__", "")).startswith(_HOOKS_OF):
                        del hooks[number]
        yield
    finally:
        with uninterrupted():
            for hooks, before in held:
                hooks.clear()
                hooks.update(before)
