"""The bytes that a computation may keep in memory. Memory affects the speed of a call, never its results."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import psutil
import torch

from ..config import Settings
from ..distributed import ProcessGroup
from ..errors import ConfigurationError

__all__ = ["ALWAYS_IN_MEMORY", "bytes_to_keep", "check_fits", "free_for_each", "free_memory", "is_large"]

# Results of up to this many bytes are always kept in memory, even if less is free.
ALWAYS_IN_MEMORY = 2**26

# The share of the free memory that a call may fill with batches and first passes. The passes themselves need the rest.
_SHARE = 1 / 4


class _Place(Protocol):
    """Where something is computed, such as an objective."""

    @property
    def device(self) -> torch.device: ...

    @property
    def processes(self) -> ProcessGroup: ...


def bytes_to_keep(settings: Settings, objective: _Place) -> float:
    """The bytes of batches, and also the bytes of first passes, that a process may keep between products.

    Each of the two is half of ``memory``. If ``memory`` is ``None``, each is an eighth of the free memory of the
    process with the least free memory.
    """
    return _half(settings, objective.device, objective.processes)


def is_large(settings: Settings, size: float, processes: ProcessGroup) -> bool:
    """Whether results of ``size`` bytes should be written to a file instead of being kept in the CPU's memory."""
    return size > max(_half(settings, torch.device("cpu"), processes), ALWAYS_IN_MEMORY)


def _half(settings: Settings, device: torch.device, processes: ProcessGroup) -> float:
    if settings.memory is not None:
        return settings.memory * 2**30 / 2
    return free_for_each(device, processes) * _SHARE / 2


def check_fits(settings: Settings, objective: _Place, size: float, what: str, advice: str) -> None:
    """Checks that ``size`` bytes fit into ``settings.memory``, or into the free memory if that is ``None``.

    Args:
        settings: The settings.
        objective: An open objective, on the device of the computation.
        size: The bytes that the computation needs at once.
        what: The name of the computation, as the start of a sentence.
        advice: What the user can do if it does not fit, apart from giving more memory.

    Raises:
        ConfigurationError: On all processes, if it does not fit on one of them.
    """
    if settings.memory is None:
        limit = free_for_each(objective.device, objective.processes)
        available, remedy = f"{limit / 2**30:.3g} GiB are free for each process", "free some memory"
    else:
        limit = settings.memory * 2**30
        available, remedy = f"memory={settings.memory:g} allows {settings.memory:g} GiB", "give a larger `memory`"
    if size > max(limit, ALWAYS_IN_MEMORY):
        raise ConfigurationError(f"{what} takes {size / 2**30:.3g} GiB, but {available}. {advice}. Or {remedy}.")


def free_for_each(device: torch.device, processes: ProcessGroup) -> float:
    """The free bytes of the process with the least. The free CPU memory of a machine is divided by its processes."""
    free = free_memory(device)
    return min(processes.gather(free if device.type == "cuda" else free / processes.here))


def free_memory(device: torch.device) -> float:
    """The free bytes of a device. For the CPU: of the machine, or of the container if it has fewer."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    available = float(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return available if limit == "max" else min(available, float(limit) - float(used))
    except (OSError, ValueError):  # not Linux, or not version 2 of control groups
        return available
