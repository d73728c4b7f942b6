"""Replacements for operations whose second derivatives are slow, wrong or missing in PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

__all__ = ["FastSecondDerivatives", "TwiceDifferentiable", "without_checkpoints"]


# Log-probability of what cannot happen: finite, so that no derivative is inf − inf.
_IMPOSSIBLE = -1e30


class _Equivalents(TorchFunctionMode):
    """Inside of it, some operations are computed by equivalent ones, with the same values up to rounding."""

    _functions: ClassVar[dict[Callable[..., Any], Callable[..., Any]]]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._functions.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_checkpoints() -> Iterator[None]:
    """Inside the block, ``torch.utils.checkpoint`` calls its function once and keeps the activations.

    Otherwise it runs the function again in the backward pass, with the parameters that the module has by then. These
    are not the ones that the loss was evaluated at.
    """
    replacements = {"CheckpointFunction": _Kept, "_checkpoint_without_reentrant_generator": _kept}
    before = {name: getattr(checkpoint, name) for name in replacements if hasattr(checkpoint, name)}
    try:
        for name in before:
            setattr(checkpoint, name, replacements[name])
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)


class _Kept:
    """Takes the place of ``CheckpointFunction``, for ``use_reentrant=True``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _kept(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What ``torch.utils.checkpoint`` does around its function, for ``use_reentrant=False``: nothing."""
    yield


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3) / 6


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    if dim == -1:  # the norm of the whole tensor
        return v * (g / torch.linalg.vector_norm(v))
    norms = torch.linalg.vector_norm(v.transpose(0, dim).reshape(v.shape[dim], -1), dim=1)
    return v * (g / norms.reshape([-1 if each == dim else 1 for each in range(v.ndim)]))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """With running statistics, a scale and a shift of each channel, as PyTorch computes it on a CPU."""
    others = (running_mean, running_var, weight, bias)
    if training or running_mean is None or running_var is None or not _fits(input, input.shape[1:2], *others):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    channels = [-1] + [1] * (input.ndim - 2)
    return input * scale.view(channels) + shift.view(channels)


def _fits(input: Tensor, shape: Sequence[int], *others: Tensor | None) -> bool:
    """Whether tensors have a shape, and the dtype of an input that is not in half precision.

    In half precision PyTorch computes in float32. For a wrong shape it raises an error.
    """
    same = (one.shape == torch.Size(shape) and one.dtype == input.dtype for one in others if one is not None)
    return input.dtype.itemsize >= 4 and all(same)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    shape = tuple(normalized_shape)
    if input.shape[-len(shape) :] != shape or not _fits(input, shape, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    last = list(range(-len(shape), 0))
    centred = input - input.mean(last, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(last, keepdim=True) + eps)
    scaled = normalised if weight is None else normalised * weight
    return scaled if bias is None else scaled + bias


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Each bag as a row of a padded matrix; the rows of the embedding are then reduced under a mask."""
    if input.ndim == 1:
        assert offsets is not None
        ends = torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        bags = len(offsets) - include_last_offset
        starts, lengths = offsets[:bags], (ends - offsets)[:bags]
        columns = torch.arange(int(lengths.max()) if bags else 0, device=input.device)
        kept = columns < lengths[:, None]
        positions = (starts[:, None] + columns).clamp(max=max(len(input) - 1, 0))
        input = input[positions]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[positions]
    else:
        kept = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        kept = kept & (input != padding_idx % len(weight))
    rows = F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    counts = kept.sum(1, keepdim=True)
    if mode == "max":
        largest = rows.masked_fill(~kept[..., None], -torch.inf).amax(1) if rows.shape[1] else rows.sum(1)
        return torch.where(counts > 0, largest, 0.0)
    total = (rows * kept[..., None]).sum(1)
    return total if mode == "sum" else total / counts.clamp(min=1)


def _norm(difference: Tensor, p: float) -> Tensor:
    """The p-norm over the last dimension; its derivatives are 0 where it is 0."""
    size = difference.abs()
    zero = (size == 0).all(-1, keepdim=True)
    return torch.linalg.vector_norm(torch.where(zero, 1.0, difference), p, dim=-1) * ~zero[..., 0]


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _norm(input[first] - input[second], p)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    scores, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1, 1)
    violations = (margin - scores.gather(1, labels) + scores).clamp(min=0) ** p
    if weight is not None:
        violations = violations * weight[labels]
    others = torch.arange(scores.shape[1], device=scores.device) != labels
    losses = (violations * others).sum(1) / scores.shape[1]
    return _reduced(losses.reshape(target.shape), reduction)


def _multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    scores, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1, input.shape[-1])
    given = (labels < 0).cumsum(1) == 0  # labels end at the first −1
    of_label = scores.gather(1, labels.clamp(min=0))
    is_label = torch.zeros_like(scores).scatter_add(1, labels.clamp(min=0), given.to(scores.dtype)) > 0
    violations = (1 - of_label[:, :, None] + scores[:, None, :]).clamp(min=0)
    losses = (violations * given[:, :, None] * ~is_label[:, None, :]).sum((1, 2)) / scores.shape[1]
    return _reduced(losses.reshape(input.shape[:-1]), reduction)


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """The forward recursion over the labels with blanks between them (Graves et al. 2006, equation 6)."""
    single = log_probs.ndim == 2
    if single:
        log_probs = log_probs[:, None]
    steps, size = log_probs.shape[:2]
    device = log_probs.device
    inputs, lengths = (torch.as_tensor(given, device=device).reshape(-1) for given in (input_lengths, target_lengths))
    if targets.ndim == 1 and not single:  # the labels of all examples one after the other
        starts = lengths.cumsum(0) - lengths
        columns = torch.arange(int(lengths.max()), device=device)
        targets = targets[(starts[:, None] + columns).clamp(max=max(len(targets) - 1, 0))]
    labels = targets.reshape(size, -1).to(device).long()
    width = 2 * labels.shape[1] + 1
    states = torch.full((size, width), blank, device=device)
    states[:, 1::2] = labels
    # A state can be reached from two before, past a blank, if that has another label.
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    emitted = log_probs.gather(2, states.clamp(min=0).expand(steps, size, width))
    never = torch.full_like(emitted[0], _IMPOSSIBLE)
    alpha = torch.where(torch.arange(width, device=device) < 2, emitted[0], never)
    for step in range(1, steps):
        one, two = (torch.cat([never[:, :by], alpha[:, : width - by]], 1) for by in (1, 2))
        ways = torch.stack([alpha, one, torch.where(skips, two, never)])
        after = torch.logsumexp(ways, 0) + emitted[step]
        alpha = torch.where((step < inputs)[:, None], after, alpha)
    last = 2 * lengths[:, None]
    ends = torch.cat([alpha.gather(1, last), alpha.gather(1, (last - 1).clamp(min=0))], 1)
    ends = torch.where(torch.cat([last >= 0, last > 0], 1), ends, _IMPOSSIBLE)
    losses = -torch.logsumexp(ends, 1)
    impossible = losses > -_IMPOSSIBLE / 2
    losses = torch.where(impossible, 0.0 if zero_infinity else torch.inf, losses)
    if reduction == "mean":
        losses = losses / lengths.clamp(min=1)
    return _reduced(losses[0] if single and reduction == "none" else losses, reduction)


class TwiceDifferentiable(_Equivalents):
    """Inside of it, some operations are computed by equivalent ones that have second derivatives.

    As of PyTorch 2.13 these operations have a first derivative only: ``F.hardsigmoid``, ``F.embedding_bag``,
    ``torch.cdist``, ``F.pdist``, ``F.ctc_loss``, ``F.multi_margin_loss`` and ``F.multilabel_margin_loss``.
    ``torch._weight_norm``, which layers with weight normalisation call, has a wrong second derivative on a CPU: it is
    not symmetric. An embedding with ``sparse=True`` has a dense gradient inside.
    """

    _functions: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {
        F.hardsigmoid: _hardsigmoid,
        torch._weight_norm: _weight_norm,
        F.embedding: _embedding,
        F.embedding_bag: _embedding_bag,
        torch.cdist: _cdist,
        F.pdist: _pdist,
        torch.pdist: _pdist,
        F.ctc_loss: _ctc_loss,
        torch.ctc_loss: _ctc_loss,
        F.multi_margin_loss: _multi_margin_loss,
        F.multilabel_margin_loss: _multilabel_margin_loss,
    }


class FastSecondDerivatives(_Equivalents):
    """Inside of it, LayerNorm, and BatchNorm with running statistics, are computed by simple operations.

    Their second derivatives take less time, and their first derivatives more.
    """

    _functions: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {
        F.batch_norm: _batch_norm,
        F.layer_norm: _layer_norm,
    }
