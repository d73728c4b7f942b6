"""Why the loss of a batch differs from the losses of its examples, and example code that defines these losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._compat import brings_own
from ..data.batch import Batch
from ..data.structure import tensors
from .autograd import close
from .shadow import Shadow

__all__ = ["WEIGHTED", "cause_of_difference", "code_of_losses"]


# The losses of two examples must differ by this share of the largest one, to measure a weight by their batch.
_DISTINCT = 1e-2

# A weighted mean with measured weights may differ from the loss of the batch by this share.
_ROUNDING = 1e-3

# How many weights are measured.
_MEASURED = 16

# Loss functions of PyTorch with integer labels, and with a target of the shape of the prediction.
_OF_LABELS: set[Callable[..., Any]] = {F.cross_entropy, F.nll_loss, F.multi_margin_loss}
_OF_VALUES: set[Callable[..., Any]] = {
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss, F.poisson_nll_loss),
    *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits),
}


WEIGHTED = (
    "they are weighted: the loss of the batch is a weighted mean, as with class weights or a mean over words. For a"
    " single example the weight cancels"
)
"""The clause about a weighted mean."""


def cause_of_difference(shadow: Shadow, batch: Batch, losses: Tensor, together: Tensor) -> str:
    """Why the loss of a batch is neither the mean nor the sum of the losses of its examples, as a clause.

    Args:
        shadow: The module.
        batch: The batch.
        losses: The losses of its examples, ``(B,)``.
        together: The loss of the batch, ``()``.
    """
    again = shadow.training_step(shadow.theta, batch.data)
    with shadow.seeded(shadow.seed + 1):
        other = shadow.training_step(shadow.theta, batch.data)
    if not close(together, again):
        return "training_step depends on state outside of the module, and returns a different loss each time"
    if not close(together, other):
        return "they are random: each draw gives a different loss"
    try:
        weighted = _are_weighted(shadow, batch, losses)
    except Exception:  # the batch cannot be divided, or two examples have no loss
        return "they are coupled, or weighted"
    if weighted:
        return WEIGHTED
    return "they are coupled: the loss of an example depends on the others in its batch"


def _are_weighted(shadow: Shadow, batch: Batch, losses: Tensor) -> bool:
    """Whether the loss of a batch is a weighted mean of its examples' losses, with weights independent of the batch.

    In a batch of the examples ``i`` and ``r`` such a loss is ``(wᵢℓᵢ + wᵣℓᵣ) / (wᵢ + wᵣ)``, which gives ``wᵢ / wᵣ``.
    With these weights the loss of a larger batch is predicted.
    """
    scale = float(losses.abs().max())
    reference = int(losses.argmax())
    distinct = ((losses - losses[reference]).abs() > _DISTINCT * scale).nonzero().flatten()[:_MEASURED]
    if len(distinct) < 2:
        return False
    weights = [1.0]
    for position in distinct.tolist():
        pair = shadow.training_step(shadow.theta, batch.take(torch.tensor([position, reference])).data)
        own, others = float(pair - losses[position]), float(losses[reference] - pair)
        if own * others < 0 or not own:  # not between the two
            return False
        weights.append(others / own)
    chosen = torch.cat([torch.tensor([reference]), distinct.cpu()])
    weight = torch.tensor(weights, dtype=torch.float64)
    expected = float((weight * losses[chosen.to(losses.device)].cpu().double()).sum() / weight.sum())
    actual = float(shadow.training_step(shadow.theta, batch.take(chosen).data))
    return abs(expected - actual) <= _ROUNDING * scale


class _FirstLoss(TorchFunctionMode):
    """Records the first loss function of PyTorch that is called inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.function: Callable[..., Any] | None = None
        self.weight: Tensor | None = None
        self.ignored: int | None = None
        self.target_dims = 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.function is None and (func in _OF_LABELS or func in _OF_VALUES):
            self.function = func
            options = kwargs or {}
            self.weight = options.get("weight")
            self.target_dims = getattr(args[1] if len(args) > 1 else options.get("target"), "ndim", 1)
            self.ignored = options.get("ignore_index")
        return func(*args, **(kwargs or {}))


def code_of_losses(shadow: Shadow, batch: Batch) -> str:
    """What to do, with example code of an ``influence_loss`` for batches like this one, which the user adapts.

    Args:
        shadow: The module.
        batch: A few examples.
    """
    first = _FirstLoss()
    try:
        with torch.no_grad(), first:
            shadow.training_step(shadow.theta, batch.data)
    except Exception:
        first.function = first.weight = None  # the step fails, and the lines are an example only
    unpack, x, y = _unpacked(batch.data)
    called = _callable(shadow.module)
    predict = "predictions" if called is None else f"{called}({x})"
    if called is None:
        unpack = [*unpack, f"predictions = ...  # from {x}, as in your training_step"]
    weight = _weight(shadow.module, first.weight)
    name = "cross_entropy" if first.function is None else first.function.__name__
    if first.function in _OF_VALUES:
        losses = f'F.{name}({predict}, {y}, {weight}reduction="none").flatten(1).mean(1)'
        if all(tensor.ndim < 2 for tensor in tensors(batch.data)[1:]):
            losses = f'F.{name}({predict}.squeeze(-1), {y}, {weight}reduction="none")'
    else:
        losses = f'F.{name}({predict}, {y}, {weight}reduction="none")'
        if first.target_dims > 1:  # labels of words or pixels
            unpack, losses = _mean_over_positions(unpack, losses, y, first.ignored)
        losses += "  # or another loss of yours" * (first.function is None)
    lines = [f"        {line}" for line in (*unpack, f"return {losses}  # one loss for each example, (B,)")]
    return (
        "Define the losses on the module, for example:\n\n    def influence_loss(self, batch):\n"
        + "\n".join(lines)
        + "\n\nOr pass such a function, whose first argument is the module, as GIFCallback(influence_loss=...)."
    )


def _weight(module: nn.Module, weight: Tensor | None) -> str:
    """The argument ``weight`` of a loss function in the lines, by the name that the module has for it."""
    if not isinstance(weight, Tensor):
        return ""
    named = {**dict(module.named_buffers()), **dict(module.named_parameters()), **vars(module)}
    names = [f"self.{name}" for name, value in named.items() if _has_values(value, weight)]
    return f"weight={names[0]}, " if names else f"weight=torch.tensor({[round(w, 6) for w in weight.tolist()]}), "


def _has_values(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape and torch.equal(value.to(weight), weight)


def _mean_over_positions(unpack: list[str], losses: str, y: str, ignored: int | None) -> tuple[list[str], str]:
    """The lines for the mean loss of each example over the labels of its words or pixels, except ignored ones."""
    if ignored is None:
        return unpack, f"{losses}.flatten(1).mean(1)"
    losses = losses.replace("reduction=", f"ignore_index={ignored}, reduction=")
    counted = f"({y} != {ignored}).flatten(1).sum(1).clamp(min=1)"
    return [*unpack, f"losses = {losses}.flatten(1)"], f"losses.sum(1) / {counted}"


def _callable(module: nn.Module) -> str | None:
    """What the example code calls for predictions: the module, or its only child if it defines no ``forward``.

    ``None`` if there are several children: which of them predicts is not known.
    """
    if brings_own(module, "forward"):
        return "self"
    names = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
    return f"self.{names[0]}" if len(names) == 1 else None


def _unpacked(data: Any) -> tuple[list[str], str, str]:
    """A line that unpacks a batch, if it needs one, and the names of its input and its target."""
    if isinstance(data, Tensor):
        return [], "batch", "batch"
    if isinstance(data, Mapping):
        names = [name for name, value in data.items() if isinstance(value, Tensor)]
        if len(names) > 1:
            return [f"x, y = batch[{names[0]!r}], batch[{names[1]!r}]"], "x", "y"
    if isinstance(data, (list, tuple)) and len(data) > 1:
        return ["x, y = batch" if len(data) == 2 else "x, y, *_ = batch"], "x", "y"
    return ["x, y = batch.x, batch.y"], "x", "y"
