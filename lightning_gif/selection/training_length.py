"""How far the optimizers of a fit could move each parameter, and the damping that this is equivalent to."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from ..distributed import ProcessGroup
from ..parameters import ParameterSpace
from ..sharding import is_sharded, reshard, sum_of_part

__all__ = ["TrainingLength"]

# The state of an optimizer that holds the mean of squared gradients, and the option that is the weight of earlier ones.
_SECOND_MOMENTS = {"exp_avg_sq": "betas", "square_avg": "alpha"}

# What an optimizer without a second moment may have in its state.
_PLAIN_STATE = {"step", "momentum_buffer"}

# A length of 0 counts as this share of the longest one.
_SHORTEST = 1e-6

# Optimizers whose weight decay does not pass through the division by the root of the second moment.
_DECOUPLED = ("AdamW",)


class TrainingLength:
    """The sum of learning rates over the optimizer steps of ``fit``, for each parameter.

    Gradient descent with learning rates ``η_t`` and momentum ``μ`` moves a direction of curvature ``c`` by about the
    share ``c / (c + 1/s)`` of the way to its minimum, where ``s = Σ_t η_t / (1 − μ)``. So training that ends early acts
    like a quadratic penalty with the factor ``1/s``, in addition to weight decay (Goodfellow, Bengio and Courville,
    *Deep Learning*, section 7.8). An optimizer such as Adam divides the gradient of each entry by a root of its second
    moment ``d``. Its ``s`` is ``Σ_t η_t / d_t``, with the root mean square over a parameter's entries as ``d_t``, read
    at the end of each epoch. Clipping of gradients is not taken into account.

    Attributes:
        lengths: ``s`` of each parameter by name; NaN if its optimizer is of a kind that this does not know.
        decays: The weight decay of each parameter by name, as the factor of a quadratic penalty on the loss.
        seconds: The wall time of all fits in seconds; NaN if the first one had begun before it was recorded.
        unknown: The names of optimizers of a kind that this does not know.
    """

    def __init__(self) -> None:
        self.lengths: dict[str, float] = {}
        self.decays: dict[str, float] = {}
        self.seconds = 0.0
        self.unknown: set[str] = set()
        self._rates: dict[int, tuple[Optimizer, list[float]]] = {}  # sums of learning rates since the last `close`
        self._started: float | None = None
        self._sums: dict[str, float] = {}  # of the sharded second moments by parameter name, over all processes

    def __bool__(self) -> bool:
        return bool(self.lengths)

    def start(self, *, resumed: bool = False) -> None:
        """Begins a fit.

        Args:
            resumed: Whether there were optimizer steps before.
        """
        self._rates, self._started = {}, time.perf_counter()
        if resumed and not self:
            self.seconds = math.nan

    def add(self, optimizer: Optimizer) -> None:
        """Adds an optimizer step."""
        groups = optimizer.param_groups
        known = self._rates.get(id(optimizer))
        if known is None:
            known = self._rates[id(optimizer)] = optimizer, []
        rates = known[1]
        rates += [0.0] * (len(groups) - len(rates))
        for number, group in enumerate(groups):
            rates[number] += float(group.get("lr", 0.0))

    def read(self, module: nn.Module) -> None:
        """Sums the sharded second moments of this process. :meth:`sum_over` adds those of the other processes."""
        self._sums = {}
        for optimizer, group, _, named in self._groups(module):
            for name, parameter in named:
                moment, _ = _second_moment(optimizer.state.get(parameter, {}), group)
                if moment is not None and is_sharded(moment):
                    self._sums[name] = sum_of_part(moment)

    def sum_over(self, processes: ProcessGroup) -> None:
        """Adds the sums of the other processes, if moments are sharded. All processes must call it."""
        totals: dict[str, float] = {}
        for sums in processes.gather(self._sums):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        self._sums = totals

    def _groups(
        self, module: nn.Module
    ) -> Iterator[tuple[Optimizer, dict[str, Any], float, list[tuple[str, nn.Parameter]]]]:
        """Each optimizer with its groups, the sum of the rates of each, and the parameters of the module in it."""
        names = {id(one): name for name, one in reshard(module).named_parameters()} if self._rates else {}
        for optimizer, rates in self._rates.values():
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                yield optimizer, group, rate, [(names[id(one)], one) for one in group["params"] if id(one) in names]

    def close(self, module: nn.Module) -> None:
        """Adds the steps since the last call to :attr:`lengths`, as at the end of an epoch.

        Sharded second moments must have been summed before. Without this, the lengths of their parameters are unknown.
        """
        now = time.perf_counter()
        self.seconds += 0.0 if self._started is None else now - self._started
        self._started = None if self._started is None else now
        for optimizer, group, rate, named in self._groups(module):
            for name, parameter in named:
                divisor = _divisor(optimizer.state.get(parameter, {}), group, self._sums.get(name))
                self.lengths[name] = self.lengths.get(name, 0.0) + rate / divisor
                self.unknown |= {type(optimizer).__name__} if math.isnan(divisor) else set()
                decay = float(group.get("weight_decay", 0.0) or 0.0)
                self.decays[name] = decay * divisor if _is_decoupled(optimizer, group) else decay
        self._rates, self._sums = {}, {}

    def end(self, module: nn.Module) -> None:
        """Ends a fit."""
        self.close(module)
        self._started = None

    def damping(self, space: ParameterSpace, like: Tensor, *, decay: bool = True) -> Tensor | None:
        """The factor of the equivalent penalty for each entry, ``(p,)``; ``None`` if it is not known.

        Parameters that training did not change get a factor that keeps them where they are.

        Args:
            space: The parameters.
            like: A tensor of the dtype and the device of the result.
            decay: Whether the weight decay of the optimizers is a part of it.
        """
        lengths = {name: self.lengths.get(name, 0.0) for name in space.slots}
        longest = max(lengths.values(), default=0.0)
        if not all(map(math.isfinite, [*lengths.values(), self.seconds])) or not longest > 0:
            return None
        found = like.new_zeros(space.size)
        for name, length in lengths.items():
            length = max(length, longest * _SHORTEST)
            space.of(name, found).fill_(1 / length + (self.decays.get(name, 0.0) if decay else 0.0))
        return found

    @property
    def gap(self) -> str:
        """Why :meth:`damping` is ``None``, as a clause."""
        if self.unknown:
            return f"the effect of the learning rates of {', '.join(sorted(self.unknown))} is not known"
        return f"the {'beginning of the ' if math.isnan(self.seconds) else ''}training was not recorded"

    def state(self) -> dict[str, Any]:
        """The sums as plain values, for a checkpoint."""
        return {
            "lengths": dict(self.lengths),
            "decays": dict(self.decays),
            "seconds": self.seconds,
            "unknown": sorted(self.unknown),
        }

    @classmethod
    def of_state(
        cls, lengths: Mapping[str, float], decays: Mapping[str, float], seconds: float, unknown: Iterable[str]
    ) -> Self:
        """The object whose :meth:`state` this is.

        Raises:
            ValueError: If a value is no number.
            TypeError: If a value is no number.
        """
        made = cls()
        made.lengths = {str(name): float(value) for name, value in lengths.items()}
        made.decays = {str(name): float(value) for name, value in decays.items()}
        made.seconds = float(seconds)
        made.unknown = set(map(str, unknown))
        return made


def _second_moment(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Tensor | None, float]:
    """The mean of squared gradients in the state of a parameter, and the share of it that is there by now."""
    for key, option in _SECOND_MOMENTS.items():
        moment = state.get(key)
        if not isinstance(moment, Tensor) or not moment.numel():
            continue
        weight = group.get(option, 0.0)
        weight = float(weight[1]) if isinstance(weight, (tuple, list)) else float(weight)
        step = float(state.get("step", math.inf))
        return moment, 1 - weight**step if key == "exp_avg_sq" and step > 0 else 1.0
    return None, 1.0


def _divisor(state: Mapping[str, Any], group: Mapping[str, Any], total: float | None) -> float:
    """What an optimizer divides the gradient of a parameter by, in the long run; NaN if this is not known.

    Args:
        state: The optimizer's state of the parameter.
        group: The options of its group.
        total: The sum of the second moment, if it is sharded; ``None`` if it was not read.
    """
    moment, share = _second_moment(state, group)
    if moment is not None:
        if is_sharded(moment):
            mean = math.nan if total is None else total / moment.numel()
        else:
            mean = float(moment.mean(dtype=torch.float32))
        corrected = mean / share
        root = max(math.sqrt(max(corrected, 0.0)) + float(group.get("eps", 0.0)), 1e-12)
        return root * (1 - float(group.get("momentum", 0.0) or 0.0))  # which RMSprop may have
    if not _PLAIN_STATE.issuperset(state):
        return math.nan
    momentum = float(group.get("momentum", 0.0) or 0.0)
    return (1 - momentum) / (1 - float(group.get("dampening", 0.0) or 0.0)) if 0 <= momentum < 1 else 1.0


def _is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay is scaled by the learning rate alone, as in AdamW."""
    by_option = bool(group.get("decoupled_weight_decay"))
    return by_option or any(base.__name__ in _DECOUPLED for base in type(optimizer).__mro__)
