"""Sharded parameters: tensors of which each process holds a part, as FSDP2 makes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["has_shards", "is_sharded", "local", "own_class", "part_of", "reshard", "sum_of_part"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``. (Its class is not imported, because that takes long.)"""
    return hasattr(tensor, "full_tensor")


def has_shards(module: nn.Module) -> bool:
    """Whether a module has sharded parameters, also while FSDP2 holds some of them whole."""
    return any(map(_is_fsdp, module.modules())) or any(map(is_sharded, module.parameters()))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, with the same memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sum_of_part(tensor: Tensor) -> float:
    """This process's part of the sum of a sharded tensor. Over all processes these add up to the sum.

    A part that several processes have, as with a mesh that replicates groups of shards, counts once in all.
    """
    sharded: Any = tensor
    sizes = zip(sharded.device_mesh.shape, sharded.placements, strict=True)
    copies = math.prod(size for size, placement in sizes if placement.is_replicate())
    return float(local(tensor).sum(dtype=torch.float64)) / copies


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process would hold if it were sharded like ``like``. Nothing is sent.

    Args:
        whole: The same tensor on all processes.
        like: A sharded tensor of the same shape. With any other tensor, the result is ``whole``.
    """
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = like
    mesh = sharded.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    with torch.no_grad():
        return replicated.redistribute(mesh, sharded.placements).to_local()


def reshard(module: nn.Module) -> nn.Module:
    """Makes FSDP2 free whole parameters, such as it keeps after a forward pass without a backward pass.

    Without this, the parameters of the module would not be those that its optimizer updates.

    Returns:
        The same module.
    """
    for submodule in module.modules():
        if _is_fsdp(submodule):
            submodule.reshard()  # type: ignore[operator]
    return module


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before ``fully_shard``, which derives another one from it and from ``FSDPModule``."""
    bases = [base for base in type(module).__bases__ if base.__name__ != "FSDPModule"]
    return bases[0] if _is_fsdp(module) and len(bases) == 1 else type(module)


def _is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
