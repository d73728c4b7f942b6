"""Snapshots: the weights at the end of earlier epochs of training."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..config import AUTO, check_count
from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..sharding import reshard

__all__ = ["Snapshots"]

# The least number of copies to keep: with fewer, there would not always be one from about a third of the epochs.
_LEAST_KEPT = 4

# The largest size of the copies that are kept without being asked for.
_AUTOMATIC_BYTES = 2**28


class Snapshots:
    """States of a module at the end of earlier epochs, from about a third of the epochs so far to the last one.

    The number of epochs need not be known: each state that is kept is from an epoch that is a constant factor later
    than the one before. The earliest is the last one that is not after a third of the epochs.

    Args:
        count: The largest number of states that :meth:`chosen` returns; 0 for none. ``"auto"`` is 1, unless the
            module is so large that all copies of its values would take more than 256 MiB.

    Attributes:
        count: The largest number of states that :meth:`chosen` returns.
        is_automatic: Whether the argument was ``"auto"``.
        kept: Copies of the parameters and buffers on the CPU, by epoch. At most ``2·count``, or 4 if that is more.
        last: The last epoch that has ended; -1 before the first.

    Raises:
        ConfigurationError: If ``count`` is neither ``"auto"`` nor a whole number of at least 0.
    """

    def __init__(self, count: int | Literal["auto"]) -> None:
        self.is_automatic = count == AUTO
        if count != AUTO:
            check_count("snapshots", count, least=0, others="'auto' or ")
        self.count = 1 if isinstance(count, str) else count
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.last = -1

    @property
    def argument(self) -> int | Literal["auto"]:
        """The argument of the constructor."""
        return "auto" if self.is_automatic else self.count

    def add(self, epoch: int, module: nn.Module, processes: ProcessGroup = SINGLE_PROCESS) -> None:
        """Adds the state at the end of an epoch, if it is far enough from the one before.

        Args:
            epoch: The epoch.
            module: The module.
            processes: The processes that hold parts of its parameters, if these are sharded. All must call it.
        """
        values, most = _values(module), max(2 * self.count, _LEAST_KEPT)
        if not self.count or (self.is_automatic and most * sum(map(_nbytes, values.values())) > _AUTOMATIC_BYTES):
            return
        self.last = epoch
        # Epochs from ``epoch`` on are dropped: they are from an earlier fit, because each fit begins at epoch 0.
        epochs = sorted(past for past in self.kept if past < epoch)
        while len(epochs) > 1 and 3 * (epochs[1] + 1) <= epoch + 1:
            del epochs[0]
        self.kept = {past: self.kept[past] for past in epochs}
        # With this factor, the states from a third of the epochs on are no more than may be kept.
        if not epochs or epoch + 1 >= 3 ** (1 / (most - 1.5)) * (epochs[-1] + 1):
            wholes = ((name, processes.whole(value)) for name, value in values.items())
            self.kept[epoch] = {name: value.detach().to("cpu", copy=True) for name, value in wholes}

    def chosen(self) -> dict[int, dict[str, Tensor]]:
        """At most ``count`` states by epoch, evenly spread. Not the last epoch: its weights are the current ones."""
        late = [epoch for epoch in sorted(self.kept) if epoch < self.last]
        places = torch.linspace(0, len(late) - 1, min(self.count, len(late))).round().long().unique().tolist()
        return {late[place]: self.kept[late[place]] for place in places}

    def state(self) -> dict[str, object]:
        """The state, for a checkpoint. It is empty if nobody asked for snapshots, since they may be large."""
        return {} if self.is_automatic else {"last": self.last, "kept": self.kept}

    def load_state(self, last: int, kept: dict[int, dict[str, Tensor]], module: nn.Module) -> None:
        """Restores what :meth:`state` returned.

        Raises:
            ValueError: If it belongs to another module. Damaged states can raise other errors, such as ``TypeError``.
        """
        shapes = {name: value.shape for name, value in _values(module).items()}
        for epoch, state in kept.items():
            if epoch > last or {name: value.shape for name, value in state.items()} != shapes:
                raise ValueError(f"the snapshot of epoch {epoch} is of another module")
        self.last, self.kept = last, dict(kept)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(reshard(module).named_parameters()), **dict(module.named_buffers())}
