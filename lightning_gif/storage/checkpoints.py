"""Checkpoints that are read without executing code in them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

__all__ = ["read_checkpoint"]


_LONGEST = 300


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a Lightning checkpoint, on the CPU. Tensors are mapped from the file.

    Only tensors and plain values are unpickled. The ``state_dict`` is checked: it must map names to dense tensors, each
    no larger than its data in the file.

    Raises:
        CheckpointError: If the file holds other objects, is damaged, or has no such ``state_dict``.
        FileNotFoundError: If the file does not exist.
    """
    name = os.fspath(path)
    if os.path.isdir(path):
        raise CheckpointError(
            f"{name!r} is a folder, such as a checkpoint of a strategy that shards parameters. Give a single file:"
            f" {_consolidation(path)}."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a file from an untrusted source can cause any error
        if not isinstance(error, OSError) and not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{name!r} is not a checkpoint or is damaged: it is not the zip archive that torch.save writes. Give a"
                " file that Trainer.save_checkpoint or ModelCheckpoint wrote."
            ) from error
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} …"
        raise CheckpointError(
            f"The checkpoint {name!r} cannot be read as tensors and plain values: {type(error).__name__}: {reason} It"
            " is damaged, or holds objects of other classes. Save it without these, or allow them with"
            " torch.serialization.add_safe_globals if you trust the file."
        ) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not state:
        raise CheckpointError(
            f"{name!r} is not a Lightning checkpoint: it has no `state_dict`. Give a file that Trainer.save_checkpoint"
            " or ModelCheckpoint wrote."
        )
    _check_state(name, state)
    return checkpoint


def _consolidation(folder: str | os.PathLike[str]) -> str:
    """How to make a single file of a sharded checkpoint."""
    if os.path.exists(os.path.join(folder, "zero_to_fp32.py")):  # DeepSpeed writes this script into its checkpoints
        return (
            "consolidate it first, with `lightning.pytorch.utilities.deepspeed"
            ".convert_zero_checkpoint_to_fp32_state_dict(folder, file)`"
        )
    return (
        "consolidate it first, for ModelParallelStrategy with `python -m lightning.fabric.utilities"
        ".consolidate_checkpoint`, and for FSDPStrategy with `python -m lightning.pytorch.utilities"
        ".consolidate_checkpoint`"
    )


def _check_state(path: str, state: Mapping[Any, Any]) -> None:
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"The checkpoint {path!r} is damaged: {name!r} is not the name of a tensor.")
        if not isinstance(value, Tensor):  # the extra state of a module
            continue
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"The checkpoint {path!r} is damaged or of a kind that cannot be edited: {name!r} of shape"
                f" {list(value.shape)} is not a dense tensor with all its numbers in the file."
            )
