"""The number of bytes that a computation may keep. Memory affects the speed of a call, never its results."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from ..config import Settings
from ..distributed import ProcessGroup
from ..errors import ConfigurationError
from ..objective.objective import Objective

__all__ = ["bytes_to_keep", "check_fits", "free_memory", "is_large"]

# Less than this many bytes are kept in memory, however little of it is free.
ALWAYS_IN_MEMORY = 2**26

# The share of the free memory that may be kept: the passes of a computation need the rest.
_SHARE = 1 / 4


def bytes_to_keep(settings: Settings, objective: Objective) -> float:
    """How many bytes of batches, and again of first passes, a process may keep between products.

    Each is half of ``memory``. If that is ``None``, it is half of a quarter of the free memory of the process that has
    the least.
    """
    return _half(settings, objective.device, objective.processes)


def is_large(settings: Settings, size: float, processes: ProcessGroup) -> bool:
    """Whether ``size`` bytes of results belong in a file rather than in the CPU's memory."""
    return size > max(_half(settings, torch.device("cpu"), processes), ALWAYS_IN_MEMORY)


def _half(settings: Settings, device: torch.device, processes: ProcessGroup) -> float:
    if settings.memory is not None:
        return settings.memory * 2**30 / 2
    return _free_for_each(device, processes) * _SHARE / 2


def check_fits(settings: Settings, objective: Objective, size: float, what: str, advice: str) -> None:
    """Checks that ``size`` bytes fit into ``memory``, or into the free memory if that is ``None``.

    Args:
        settings: With ``memory``.
        objective: An open objective, on the device in question.
        size: Bytes that a computation needs at once.
        what: The computation, as the start of a sentence.
        advice: What to do otherwise, apart from a larger ``memory``.

    Raises:
        ConfigurationError: If they do not fit, on all processes.
    """
    if settings.memory is None:
        limit = _free_for_each(objective.device, objective.processes)
        available, remedy = f"{limit / 2**30:.3g} GiB are free for each process", "free some memory"
    else:
        limit = settings.memory * 2**30
        available, remedy = f"memory={settings.memory:g} allows no more than that", "give a larger `memory`"
    if size > max(limit, ALWAYS_IN_MEMORY):
        raise ConfigurationError(f"{what} takes {size / 2**30:.3g} GiB, but {available}. {advice}; or {remedy}.")


def _free_for_each(device: torch.device, processes: ProcessGroup) -> float:
    """Free bytes of the process that has the least; the memory of a machine is shared out among its processes."""
    free = free_memory(device)
    return min(processes.gather(free if device.type == "cuda" else free / processes.here))


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; on the CPU those of the machine, or of the container if that has fewer."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    available = float(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return available if limit == "max" else min(available, float(limit) - float(used))
    except (OSError, ValueError):  # another system, or another version of control groups
        return available
