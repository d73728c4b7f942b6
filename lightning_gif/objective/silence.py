"""What an evaluation must not do: log, count examples in metrics, and wait for other processes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import ProcessGroup
from ..errors import ObjectiveError

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

    from .._compat import LightningModule

__all__ = ["Metrics", "silenced"]


class Metrics:
    """The metrics of a module during evaluations: none of them counts an example.

    Args:
        module: The module.

    Attributes:
        give_values: Whether a metric that is called returns its value for the batch. Else it returns NaN, which costs
            nothing: metrics are rarely part of a loss, and a loss that one is part of is then NaN, rather than wrong.
    """

    def __init__(self, module: nn.Module) -> None:
        self.give_values = False
        self.all = _metrics_of(module)

    def forward_of(self, metric: Metric | MetricCollection) -> Callable[..., Any]:
        """What takes the place of the metric's ``forward``: its value for the batch alone, from a copy; or NaN."""
        copies: list[Metric | MetricCollection] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.give_values:
                return _nan_of(metric)()
            if not copies:
                copies.append(_plain_copy(metric))
            copies[0].set_dtype(torch.get_default_dtype())  # its sums are in float32 otherwise
            copies[0].reset()
            return copies[0](*args, **kwargs)

        return forward


@contextlib.contextmanager
def silenced(module: LightningModule, loggers: Sequence[Any], processes: ProcessGroup) -> Iterator[Metrics]:
    """Shadows ``log``, ``log_dict``, the loggers' ``log_metrics``, and all metrics of the module.

    Outside of the training loop ``log`` raises. In a distributed run each process reads its own examples, so a step
    must not wait for the others.
    """
    shadowed: list[tuple[Any, str, Any]] = []

    def shadow(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        shadowed.append((owner, name, vars(owner).get(name)))
        object.__setattr__(owner, name, replacement)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def no_others(*args: Any, **kwargs: Any) -> None:
        raise ObjectiveError(
            f"{type(module).__name__} calls self.all_gather for its loss, which couples the examples of all processes."
            " Define `influence_loss(self, batch) -> (B,)` without it (see GIFMixin)."
        )

    metrics = Metrics(module)
    try:
        if processes.size > 1:
            shadow(module, "all_gather", no_others)
        for name in ("log", "log_dict"):
            shadow(module, name, nothing)
        for logger in loggers:
            shadow(logger, "log_metrics", nothing)
        for metric in metrics.all:
            shadow(metric, "forward", metrics.forward_of(metric))
            shadow(metric, "compute", _nan_of(metric))
            for name in ("update", "reset"):
                shadow(metric, name, nothing)
        yield metrics
    finally:
        for owner, name, original in reversed(shadowed):
            if original is None:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, original)


def _metrics_of(module: nn.Module) -> list[Metric | MetricCollection]:
    """The metrics that are submodules, and those in plain lists and dictionaries of the modules."""
    from torchmetrics import Metric, MetricCollection  # its import takes a second

    metrics: dict[int, Metric | MetricCollection] = {}
    for submodule in module.modules():
        held = [submodule]
        for value in vars(submodule).values():
            if isinstance(value, (list, tuple)):
                held += value
            elif isinstance(value, dict):
                held += value.values()
        for value in held:
            if isinstance(value, (Metric, MetricCollection)):
                metrics[id(value)] = value
    return list(metrics.values())


def _nan_of(metric: Metric | MetricCollection) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        nan = torch.tensor(torch.nan)
        return dict.fromkeys(metric.keys(), nan) if isinstance(metric, nn.ModuleDict) else nan  # a collection is one

    return answer


def _plain_copy(metric: Metric | MetricCollection) -> Metric | MetricCollection:
    """A copy without the methods that :func:`silenced` has put in place, which never waits for other processes."""
    from torchmetrics import Metric

    values = [value for one in metric.modules() for value in vars(one).values()]
    held = [item for value in values for item in (value if isinstance(value, list) else [value])]
    # What a metric has computed in training is part of a graph, which cannot be copied.
    memo = {id(tensor): tensor.detach().clone() for tensor in held if isinstance(tensor, Tensor)}
    copied = copy.deepcopy(metric, memo)
    for one in copied.modules():
        # A metric that is copied wraps its own `update` and `compute` anew; a collection copies what it has.
        names = ("forward", "reset") if isinstance(one, Metric) else ("forward", "reset", "update", "compute")
        for name in names:
            if name in vars(one):
                object.__delattr__(one, name)
        if isinstance(one, Metric):
            one.dist_sync_on_step = False
    return copied
