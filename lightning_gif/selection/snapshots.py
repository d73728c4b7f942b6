"""Snapshots: the weights at the end of earlier epochs of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import check_count

__all__ = ["Snapshots"]


class Snapshots:
    """Up to ``2·count`` states of a module, spread evenly over the last two thirds of the epochs so far.

    The number of epochs need not be known. When there are more than ``2·count`` states, every other one is dropped, and
    from then on half as many epochs are kept.

    Args:
        count: The largest number of states that :meth:`chosen` returns; 0 for none.

    Attributes:
        count: The argument.
        kept: Copies of the parameters and buffers on the CPU, by epoch.
        last: The last epoch that has ended; -1 before the first.

    Raises:
        ConfigurationError: If ``count`` is not a whole number of at least 0.
    """

    def __init__(self, count: int) -> None:
        check_count("snapshots", count, least=0)
        self.count = count
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.last = -1

    def add(self, epoch: int, module: nn.Module) -> None:
        """Adds the state at the end of an epoch, if the spacing requires this epoch."""
        if not self.count:
            return
        self.last = epoch
        # Epochs from ``epoch`` on are dropped too: they are from an earlier fit, because each fit begins at epoch 0.
        early = (epoch + 1) / 3
        self.kept = {past: state for past, state in self.kept.items() if early <= past + 1 and past < epoch}
        epochs = sorted(self.kept)
        stride = epochs[-1] - epochs[-2] if len(epochs) > 1 else 1
        if epochs and (epoch - epochs[-1]) % stride:
            return
        self.kept[epoch] = {name: value.detach().to("cpu", copy=True) for name, value in _values(module).items()}
        if len(self.kept) > 2 * self.count:  # keep the latest epoch and every other one before it
            self.kept = {past: state for past, state in self.kept.items() if (epoch - past) % (2 * stride) == 0}

    def chosen(self) -> dict[int, dict[str, Tensor]]:
        """At most ``count`` states by epoch, evenly spread. Not the last epoch: its weights are the current ones."""
        late = [epoch for epoch in sorted(self.kept) if epoch < self.last]
        places = torch.linspace(0, len(late) - 1, min(self.count, len(late))).round().long().unique().tolist()
        return {late[place]: self.kept[late[place]] for place in places}

    def state(self) -> dict[str, object]:
        """The state, for a checkpoint."""
        return {"last": self.last, "kept": self.kept}

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


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
