"""The losses of single examples, taken from where a step reduces the losses of a batch to one number."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn._reduction import legacy_get_string
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ObjectiveError

__all__ = ["BranchError", "OneExample", "Weighted", "terms_of"]


_REDUCTIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.mean: torch.mean,
    Tensor.mean: torch.mean,
    torch.sum: torch.sum,
    Tensor.sum: torch.sum,
}


# Functions whose result has as many rows as a mask has true values.
_PICKING = {torch.masked_select, Tensor.masked_select, torch.nonzero, Tensor.nonzero, torch.argwhere}

# Functions whose result has the rows of their first argument, whatever is added to these rows.
_SCATTERING = {
    getattr(owner, name + suffix)
    for owner in (torch, Tensor)
    for name in ("index_add", "index_copy", "index_put", "index_reduce", "scatter", "scatter_add", "scatter_reduce")
    for suffix in ("", "_")
    if hasattr(owner, name + suffix)
}

# Functions whose result has the shape that they are called with.
_CREATING = {Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor}

# `total += loss` calls one of these, and binds the name to the result, which may be another tensor.
_ASSIGNING = {
    Tensor.add_: Tensor.add,
    Tensor.sub_: Tensor.sub,
    Tensor.mul_: Tensor.mul,
    Tensor.div_: Tensor.div,
}


class BranchError(ObjectiveError):
    """The examples of a batch take different branches of a step."""


class Reductions(TorchFunctionMode):
    """Inside of it, every reduction over the examples of a batch is another one, which a subclass defines.

    Reductions are ``mean`` and ``sum`` over all dimensions, and the loss functions of PyTorch with
    ``reduction="mean"`` or ``"sum"``. Those of parameters alone, such as a penalty on weights, are left as they are. So
    are those of what was reduced before, and those over some dimensions: the dimension of the examples could only be
    recognised by its size, which others may have.

    Args:
        module: The module; what is computed from its parameters and buffers alone does not depend on examples.
        size: The number of examples of the batch, ``B``.
        last: Whether the second dimension of terms counts the examples, as in batches with time first, and not the
            first. Terms ``(n,)`` are flattened from such.

    Raises:
        ObjectiveError: From a reduction inside, if its terms are not equally many for each example.
    """

    def __init__(self, module: nn.Module, size: int, *, last: bool = False) -> None:
        super().__init__()
        self._module = module
        self._size = size
        self._last = last
        self._constant: WeakIdKeyDictionary | None = None
        self._unowned = WeakIdKeyDictionary()

    def is_reduced(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed from a reduction over examples."""
        raise NotImplementedError

    def concerns(self, given: list[Tensor]) -> bool:
        """Whether a reduction of these tensors, none of which is reduced yet, is to be another one."""
        return True

    def reduce(self, func: Any, terms: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``mean`` or ``sum`` over all terms, as a tensor ``()``. ``args`` and ``kwargs`` are those of the call."""
        raise NotImplementedError

    def reduce_loss(self, terms: Tensor, reduction: str, counts: Tensor | None) -> Tensor:
        """The terms of a loss function of PyTorch, reduced to ``()``.

        Args:
            terms: The terms.
            reduction: ``"mean"``, ``"sum"`` or ``"batchmean"``.
            counts: What each term adds to the number by which a mean divides, in the shape of the terms.
        """
        raise NotImplementedError

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors([args, kwargs])
        constant = self._are_constant(given)
        reduced = [tensor for tensor in given if self.is_reduced(tensor)]
        if not constant and not reduced and self.concerns(given):
            if func in _REDUCTIONS:
                return self._reduce(func, args, kwargs)
            if func is F.ctc_loss or _has_reduction(func):
                return self._loss(func, args, kwargs)
        func = self.before(func, args, given, reduced)
        # Rows that a mask has picked may be any number for each example.
        rows = given[:1] if func in _SCATTERING else [] if func in _CREATING else given
        unowned = func in _PICKING or _picks_by_mask(func, args) or any(tensor in self._unowned for tensor in rows)
        result = func(*args, **kwargs)
        self.after(func, args, kwargs, reduced, result)
        if constant:
            assert self._constant is not None
            for tensor in _tensors([result]):
                self._constant[tensor] = True
        elif unowned:
            for tensor in _tensors([result]):
                self._unowned[tensor] = True
        return result

    def before(self, func: Any, args: tuple[Any, ...], given: list[Tensor], reduced: list[Tensor]) -> Any:
        """Called before a function that is no reduction over examples; returns the function to call.

        Args:
            func: The function.
            args: Its arguments.
            given: The tensors among its arguments.
            reduced: Those of them that are reduced.
        """
        return func

    def after(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reduced: list[Tensor], result: Any
    ) -> None:
        """Called with the result of a function that is no reduction over examples."""

    def _are_constant(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors are computed from parameters, buffers and numbers alone."""
        if self._constant is None:  # the module has its replacements by now
            self._constant = WeakIdKeyDictionary()
            for tensor in (*self._module.parameters(), *self._module.buffers()):
                self._constant[tensor] = True
        return all(tensor in self._constant for tensor in tensors)

    def rows(self, terms: Tensor) -> Tensor:
        """Terms ``(n,)`` or ``(…)`` of all examples as ``(B, …)``, one row for each example."""
        count = terms.numel() // self._size
        if terms in self._unowned:
            raise ObjectiveError(f"{list(terms.shape)} terms of a loss were picked by a mask")
        if not terms.numel() or count * self._size != terms.numel():
            raise ObjectiveError(f"{list(terms.shape)} terms of a loss do not belong to {self._size} examples")
        if not self._last:
            return terms.reshape(self._size, count)
        if terms.ndim < 2:
            return terms.reshape(count, self._size).T
        return terms.transpose(0, 1).reshape(self._size, count)

    def _reduce(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A ``mean`` or ``sum``, if it is one over all terms."""
        terms = args[0] if args else kwargs["input"]
        dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        if not terms.ndim or not _are_all(dims, terms.ndim):
            return func(*args, **kwargs)
        keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
        one = self.reduce(func, terms, args, kwargs)
        return one.reshape([1] * terms.ndim) if keepdim else one

    def _loss(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A loss function of PyTorch."""
        terms = terms_of(func, args, kwargs)
        if terms.reduction == "none":
            return terms.values
        if any(tensor in self._unowned for tensor in _tensors([list(terms.arguments.values())])):
            self._unowned[terms.values] = True
        counts = _weights(func, terms.arguments, terms.values) if terms.reduction == "mean" else None
        return self.reduce_loss(terms.values, terms.reduction, counts)


class OneExample(Reductions):
    """Inside of it, every reduction over the examples of a batch is that over one of them.

    A step computes the outputs of the whole batch, and then means or sums of losses over its examples. Here each of
    these means and sums is taken over the terms of one example alone, so that the step returns this example's loss. Run
    under ``torch.func.vmap`` over ``index``, it returns the losses of all examples, and the module runs once.

    Where a step branches on a reduced value (``if not torch.isfinite(loss)``), all examples must take the same branch.
    A value that was reduced from a mask or from integers may differ (``if mask.sum() == mask.numel()``): then the
    batch takes the same branch as in training.

    Args:
        module: See :class:`Reductions`.
        size: See :class:`Reductions`.
        index: The position of the example, ``()``.
        last: See :class:`Reductions`.

    Raises:
        BranchError: From a branch inside, if the examples take different ones.
    """

    def __init__(self, module: nn.Module, size: int, index: Tensor, *, last: bool = False) -> None:
        super().__init__(module, size, last=last)
        self._index = index
        self._replaced = WeakIdKeyDictionary()
        self._of_batch = WeakIdKeyDictionary()  # by a value for one example: that of the whole batch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__ and self.is_reduced(args[0]):
            return self._branch(args[0])
        return super().__torch_function__(func, types, args, kwargs)

    def is_reduced(self, tensor: Tensor) -> bool:
        return torch._C._functorch.is_batchedtensor(tensor)

    def reduce(self, func: Any, terms: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        one = _REDUCTIONS[func](self._pick(self.rows(terms)), dtype=kwargs.get("dtype"))
        if not terms.is_floating_point():
            self._of_batch[one] = func(*args, **kwargs)
        return one

    def reduce_loss(self, terms: Tensor, reduction: str, counts: Tensor | None) -> Tensor:
        total = self._pick(self.rows(terms)).sum()
        return total if counts is None else total / self._pick(self.rows(counts)).sum()

    def before(self, func: Any, args: tuple[Any, ...], given: list[Tensor], reduced: list[Tensor]) -> Any:
        if any(tensor in self._replaced for tensor in given):
            raise ObjectiveError("a tensor is used after the terms of examples were added to it in place")
        if func in _ASSIGNING and reduced and not self.is_reduced(args[0]):
            self._replaced[args[0]] = True
            return _ASSIGNING[func]
        return func

    def after(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reduced: list[Tensor], result: Any
    ) -> None:
        if reduced and isinstance(result, Tensor) and all(tensor in self._of_batch for tensor in reduced):
            self._of_batch[result] = func(
                *map(self._in_batch, args), **{k: self._in_batch(v) for k, v in kwargs.items()}
            )

    def _pick(self, rows: Tensor) -> Tensor:
        """The row of this example."""
        return rows.index_select(0, self._index.reshape(1)).squeeze(0)

    def _in_batch(self, value: Any) -> Any:
        """The value for the whole batch in place of that for one example."""
        return self._of_batch.get(value, value) if isinstance(value, Tensor) else value

    def _branch(self, condition: Tensor) -> bool:
        """The truth of a condition on one example, if it is the same for all, or can be that of the batch."""
        each = torch._C._functorch.get_unwrapped(condition)
        if bool(each.all()) or not bool(each.any()):
            return bool(each.all())
        if condition in self._of_batch:
            return bool(self._of_batch[condition])
        raise BranchError(
            f"{type(self._module).__name__}.training_step branches on a value of its loss (`if loss > limit`), and not"
            " all examples of a batch take the same branch. Define `influence_loss` (see GIFMixin), which returns the"
            " loss of each example."
        )


class Weighted(Reductions):
    """Inside of it, every reduction over the examples of a batch has a weight for each example.

    The loss of a step becomes a linear function of the weights. With all weights 1 it is the loss of training. With
    weight 0 an example's loss is left out of the sum, and nothing else changes: a mean is divided by the same number,
    and BatchNorm sees the whole batch. Only terms that depend on parameters are weighted. So a mean that is written as
    a quotient, ``(loss * mask).sum() / mask.sum()``, keeps its denominator, too.

    Args:
        module: See :class:`Reductions`.
        weights: The weights ``(B,)``.
        last: See :class:`Reductions`.
    """

    def __init__(self, module: nn.Module, weights: Tensor, *, last: bool = False) -> None:
        super().__init__(module, len(weights), last=last)
        self._weights = weights
        self._reduced = WeakIdKeyDictionary()

    def is_reduced(self, tensor: Tensor) -> bool:
        return tensor in self._reduced

    def concerns(self, given: list[Tensor]) -> bool:
        return any(tensor.requires_grad for tensor in given)

    def reduce(self, func: Any, terms: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self._noted(_REDUCTIONS[func](self._times_weights(terms), dtype=kwargs.get("dtype")))

    def reduce_loss(self, terms: Tensor, reduction: str, counts: Tensor | None) -> Tensor:
        total = self._times_weights(terms).sum()
        if reduction == "batchmean":
            total = total / len(terms)
        return self._noted(total if counts is None else total / counts.sum())

    def _times_weights(self, terms: Tensor) -> Tensor:
        return self.rows(terms) * self._weights[:, None]

    def _noted(self, total: Tensor) -> Tensor:
        self._reduced[total] = True
        return total

    def after(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reduced: list[Tensor], result: Any
    ) -> None:
        for tensor in _tensors([result]) if reduced else ():
            self._reduced[tensor] = True


class Terms(NamedTuple):
    """The terms of a loss function of PyTorch.

    Attributes:
        values: The result without reduction.
        reduction: The reduction that the function was called with.
        arguments: The arguments by name.
    """

    values: Tensor
    reduction: str
    arguments: dict[str, Any]

    def reduced(self, func: Any, values: Tensor) -> Tensor:
        """The result of the function, if its terms were ``values``, in the shape of the terms."""
        if self.reduction == "none":
            return values
        if self.reduction in ("sum", "batchmean"):
            return values.sum()
        return values.sum() / _weights(func, self.arguments, self.values).sum()


def terms_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Terms:
    """The terms of a call of a loss function of PyTorch."""
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    reduction = given["reduction"]
    if given.get("size_average") is not None or given.get("reduce") is not None:
        reduction = legacy_get_string(given["size_average"], given["reduce"])
        given["size_average"] = given["reduce"] = None
    given["reduction"] = "none"
    return Terms(func(*bound.args, **bound.kwargs), reduction, dict(given))


def _weights(func: Any, given: dict[str, Any], terms: Tensor) -> Tensor:
    """By what a mean divides: the weight of each term, in the shape of the terms."""
    if func is F.ctc_loss:
        lengths = torch.as_tensor(given["target_lengths"], device=terms.device).reshape(terms.shape)
        return lengths.clamp(min=1).to(terms)
    if func not in (F.cross_entropy, F.nll_loss) or given["target"].is_floating_point():
        return torch.ones_like(terms)
    target = given["target"]
    counted = target != given["ignore_index"]
    if given["weight"] is None:
        return counted.to(terms)
    return given["weight"][torch.where(counted, target, 0)] * counted


def _are_all(dims: Any, ndim: int) -> bool:
    """Whether the dimensions that a reduction is called with are all ``ndim`` of a tensor."""
    if dims is None or isinstance(dims, torch.dtype) or (isinstance(dims, (list, tuple)) and not dims):
        return True
    each = [dims] if isinstance(dims, int) else dims
    return isinstance(each, (list, tuple)) and len({dim % ndim for dim in each}) == ndim


def _picks_by_mask(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call is ``tensor[mask]``, with a mask alone or among other indices."""
    if func is not Tensor.__getitem__ or len(args) < 2:
        return False
    return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors([args[1]]))


@cache
def _signature(func: Any) -> inspect.Signature:
    return inspect.signature(func)


@cache
def _has_reduction(func: Any) -> bool:
    """Whether a function is a loss function of ``torch.nn.functional``."""
    if getattr(F, getattr(func, "__name__", ""), None) is not func:
        return False
    try:
        return "reduction" in _signature(func).parameters
    except (TypeError, ValueError):
        return False


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, dict):
        given = list(given.values())
    return [tensor for item in given for tensor in _tensors(item)] if isinstance(given, (list, tuple)) else []
