"""The parameters of a module as one flat vector, and the target parameters in it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._moved import forward
from .distributed import ProcessGroup
from .errors import ConfigurationError, SelectionError
from .registry import nearest
from .sharding import reshard
from .storage.digests import digest

__all__ = ["ParameterSpace", "Targets", "Weights", "match_names", "state_digest", "tensors_of", "weights_digest"]


Weights = nn.Module | Mapping[str, Tensor]
"""A module, or a ``state_dict`` such as that of a checkpoint."""


class _Slot(NamedTuple):
    """The place of one parameter in the flat vector."""

    offset: int
    size: int
    shape: torch.Size


class ParameterSpace:
    """The trainable parameters of a module as one flat vector, in the order of ``named_parameters()``.

    Parameters with ``requires_grad=False`` are left out, because they were not trained. Tied parameters appear once.

    Args:
        module: The module.

    Raises:
        SelectionError: If no parameter is trainable.
        ConfigurationError: If a trainable parameter is complex.
    """

    def __init__(self, module: nn.Module) -> None:
        self.slots: dict[str, _Slot] = {}
        complex_names = []
        offset = 0
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.slots[name] = _Slot(offset, parameter.numel(), parameter.shape)
                offset += parameter.numel()
                complex_names += [name] * parameter.is_complex()
        self.size = offset
        if not self.size:
            raise SelectionError(
                f"{type(module).__name__} has no trainable parameter: all of them have requires_grad=False. Unfreeze"
                " the parameters that were trained."
            )
        if complex_names:
            raise ConfigurationError(
                f"Influence and unlearning need real parameters, but {type(module).__name__} has complex ones:"
                f" {', '.join(complex_names[:5])}{' …' if len(complex_names) > 5 else ''}. Store each as a real"
                " parameter of shape (…, 2), torch.view_as_real(parameter), and use torch.view_as_complex(parameter) in"
                " the forward pass. Or freeze it with requires_grad_(False), so that it counts as a constant."
            )

    def flatten(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """A copy of the current values as a vector ``(p,)``."""
        parameters = dict(module.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1).to(dtype) for name in self.slots])

    def of(self, name: str, vectors: Tensor) -> Tensor:
        """The entries of one parameter as a view ``(…, size)`` of flat vectors ``(…, p)``."""
        slot = self.slots[name]
        return vectors[..., slot.offset : slot.offset + slot.size]

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector ``(p,)`` in the shapes of the parameters, by name; differentiable."""
        pieces = vector.split([slot.size for slot in self.slots.values()])
        return {name: piece.view(slot.shape) for (name, slot), piece in zip(self.slots.items(), pieces, strict=True)}


class Targets(Mapping[str, Tensor]):
    """The target parameters: a mapping from parameter names to the sorted flat indices of their target entries.

    Args:
        indices: Flat indices ``(k_name,)`` into each parameter. Names without indices are dropped.

    Raises:
        SelectionError: If no index is left, or indices are not integers.
    """

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        for name, entries in indices.items():
            if entries.numel() and (entries.is_floating_point() or entries.dtype == torch.bool):
                raise SelectionError(
                    f"The targets of {name!r} must be flat indices, whole numbers; got {entries.dtype}. For a mask,"
                    " pass mask.flatten().nonzero().squeeze(1)."
                )
        self._indices = {
            name: entries.detach().cpu().long().unique() for name, entries in indices.items() if entries.numel()
        }
        self.count = sum(entries.numel() for entries in self._indices.values())
        if not self.count:
            raise SelectionError(
                "The selection is empty: at this ratio, the share of each layer is less than one parameter. Raise"
                " `ratio`, or name parameters explicitly."
            )

    def __getitem__(self, name: str) -> Tensor:
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {entries.numel()}" for name, entries in self._indices.items())
        return f"Targets({self.count} parameters; {parts})"

    @classmethod
    def whole(cls, space: ParameterSpace, names: Iterable[str] | None = None) -> Targets:
        """All entries of the named parameters; by default all entries of all parameters."""
        return cls({name: torch.arange(space.slots[name].size) for name in (space.slots if names is None else names)})

    def flat(self, space: ParameterSpace) -> Tensor:
        """Sorted positions ``(k,)`` of the targets in the flat vector of ``space``.

        Raises:
            SelectionError: If a name is missing from the space, or an index lies outside its parameter.
        """
        positions = []
        for name, entries in self._indices.items():
            slot = space.slots.get(name)
            if slot is None:
                raise SelectionError(
                    f"The target parameter {name!r} is not a trainable parameter of this model (missing, renamed or"
                    f" frozen). {nearest(name, space.slots)}"
                )
            if int(entries[-1]) >= slot.size or int(entries[0]) < 0:
                reached = int(entries[0] if entries[0] < 0 else entries[-1])
                raise SelectionError(
                    f"The targets of {name!r} include index {reached}, but the parameter has {slot.size} entries: the"
                    " selection belongs to a model of another shape."
                )
            positions.append(entries + slot.offset)
        return torch.cat(positions).sort().values

    def check_fit(self, module: nn.Module) -> None:
        """Checks that all names and indices exist in a module.

        Raises:
            SelectionError: If one does not.
        """
        sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        for name, entries in self._indices.items():
            if int(entries[0]) < 0 or int(entries[-1]) >= sizes.get(name, 0):
                raise SelectionError(
                    f"The targets include index {int(entries[-1])} of {name!r}, which has {sizes.get(name, 0)} entries:"
                    " the selection belongs to another model."
                )

    def jaccard(self, other: Targets) -> float:
        """The Jaccard index of two selections: 1 if they are equal, 0 if they have no entry in common."""
        common = sum(
            int(torch.isin(entries, other[name], assume_unique=True).sum())
            for name, entries in self._indices.items()
            if name in other
        )
        return common / (self.count + other.count - common)


def match_names(names: Iterable[str], patterns: Sequence[str], *, what: str = "trainable parameter") -> list[str]:
    """The names that match at least one pattern, in the order of ``names``.

    Args:
        names: All names.
        patterns: Names, or patterns with ``*``, ``?`` or ``[…]``.
        what: What the names denote, for the error message.

    Raises:
        SelectionError: If a pattern matches nothing.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise SelectionError(f"{pattern!r} matches no {what} of the model. {nearest(pattern, names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def weights_digest(weights: Weights) -> str:
    """SHA-256 of the parameters and persistent buffers of a module, which are the tensors of its ``state_dict``.

    If parameters are sharded, all processes must call it. They are gathered one after the other.
    """
    state = reshard(weights).state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return digest(tensors, whole=ProcessGroup.of_weights(weights).whole)


def state_digest(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, including non-persistent buffers, which are not in the ``state_dict``."""
    return digest(tensors_of(module), whole=ProcessGroup.of_weights(module).whole)


def tensors_of(weights: Weights) -> dict[str, Tensor]:
    """All parameters and buffers of a module, or all tensors of a ``state_dict``, by name. They may be sharded."""
    if isinstance(weights, nn.Module):
        return {**dict(reshard(weights).named_parameters()), **dict(weights.named_buffers())}
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


__getattr__ = forward(__name__)  # for names that are in other modules now
