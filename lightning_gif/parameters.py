"""Parameters as one flat vector, the target parameters within it, and the sparse edit of them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .digests import digest
from .errors import ConfigurationError, EditError, NonFiniteError, SelectionError
from .registry import nearest

__all__ = ["Edit", "ParameterSpace", "Targets", "Weights", "match_names", "state_digest", "weights_digest"]

Weights = nn.Module | Mapping[str, Tensor]
"""A module, or the ``state_dict`` of one, which is all that a checkpoint has."""


class _Slot(NamedTuple):
    """Where one parameter lies in the flat vector."""

    offset: int
    size: int
    shape: torch.Size


class ParameterSpace:
    """The trainable parameters of a module, in the order of ``named_parameters()``, laid out as one flat vector.

    Parameters with ``requires_grad=False`` were not trained, so the loss need not be stationary in them: they are no
    part of the space. Tied parameters appear once.

    Args:
        module: The module whose parameters are laid out.

    Raises:
        SelectionError: If no parameter is trainable.
        ConfigurationError: If a trainable parameter is complex.
    """

    def __init__(self, module: nn.Module) -> None:
        self.slots: dict[str, _Slot] = {}
        offset = 0
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.slots[name] = _Slot(offset, parameter.numel(), parameter.shape)
                offset += parameter.numel()
        self.size = offset
        if not self.size:
            raise SelectionError(
                f"{type(module).__name__} has no trainable parameter: all of them have requires_grad=False. Unfreeze"
                " the parameters that training moved."
            )
        parameters = dict(module.named_parameters())
        given = [name for name in self.slots if parameters[name].is_complex()]
        if given:
            raise ConfigurationError(
                f"Influence and unlearning need real parameters, but of {type(module).__name__} these are complex:"
                f" {', '.join(given[:5])}{' …' if len(given) > 5 else ''}. Keep each as a real parameter of shape"
                " (…, 2), torch.view_as_real(parameter), and use torch.view_as_complex(parameter) in the forward pass;"
                " or freeze it by requires_grad_(False), and it is computed with as it is."
            )

    def flatten(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """A new vector ``(p,)`` of the present values, which shares no memory with the module."""
        parameters = dict(module.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1).to(dtype) for name in self.slots])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector ``(p,)`` by parameter name and in the parameters' shapes; differentiable."""
        pieces = vector.split([slot.size for slot in self.slots.values()])
        return {name: piece.view(slot.shape) for (name, slot), piece in zip(self.slots.items(), pieces, strict=True)}


class Targets(Mapping[str, Tensor]):
    """The target parameters ``S``: for each parameter's name, which of its entries, as sorted flat indices.

    Args:
        indices: Flat indices ``(k_name,)`` into each parameter; names without an entry are dropped.

    Raises:
        SelectionError: If nothing is left, or an index is no whole number.
    """

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        for name, entries in indices.items():
            if entries.numel() and (entries.is_floating_point() or entries.dtype == torch.bool):
                raise SelectionError(
                    f"The targets of {name!r} must be flat indices, whole numbers; got {entries.dtype}. For a mask,"
                    " mask.flatten().nonzero().squeeze(1)."
                )
        self._indices = {
            name: entries.detach().cpu().long().unique() for name, entries in indices.items() if entries.numel()
        }
        self.count = sum(entries.numel() for entries in self._indices.values())
        if not self.count:
            raise SelectionError(
                "The selection is empty: no layer has room for one parameter at this ratio. Raise `ratio`, or name"
                " parameters explicitly."
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
        """All entries of the named parameters of the space; of all of them by default."""
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
                    f"The targets of {name!r} reach index {reached}, but the parameter has {slot.size} entries: the"
                    " selection belongs to a model of another shape."
                )
            positions.append(entries + slot.offset)
        return torch.cat(positions).sort().values

    def check_fit(self, module: nn.Module) -> None:
        """Raises a :class:`~lightning_gif.errors.SelectionError` if a name or an index is none of the module's."""
        sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        for name, entries in self._indices.items():
            if int(entries[0]) < 0 or int(entries[-1]) >= sizes.get(name, 0):
                raise SelectionError(
                    f"The targets reach index {int(entries[-1])} of {name!r}, which has {sizes.get(name, 0)} entries:"
                    " the selection belongs to another model."
                )

    def jaccard(self, other: Targets) -> float:
        """Share of common entries among all entries of both: 1 for equal selections, 0 for disjoint ones."""
        common = sum(
            int(torch.isin(entries, other[name], assume_unique=True).sum())
            for name, entries in self._indices.items()
            if name in other
        )
        return common / (self.count + other.count - common)


def match_names(names: Iterable[str], patterns: Sequence[str], *, what: str = "trainable parameter") -> list[str]:
    """Those of ``names`` that equal or match (``*``, ``?``, ``[…]``) one of ``patterns``, in the order of ``names``.

    Raises:
        SelectionError: If a pattern matches nothing.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise SelectionError(f"{pattern!r} matches no {what} of the model. {nearest(pattern, names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def weights_digest(weights: Weights) -> str:
    """SHA-256 over all that a checkpoint keeps of a module: its parameters, and its buffers but non-persistent ones."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return digest({name: value for name, value in state.items() if isinstance(value, Tensor)})


def state_digest(module: nn.Module) -> str:
    """SHA-256 over all parameters and buffers, also those that no checkpoint keeps."""
    return digest(_tensors(module))


def _tensors(weights: Weights) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    if isinstance(weights, nn.Module):
        return {**dict(weights.named_parameters()), **dict(weights.named_buffers())}
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


@dataclass
class Edit:
    """A sparse change of parameters that can be applied and taken back bit by bit, in a module or a ``state_dict``.

    Attributes:
        indices: For each parameter's name the changed flat indices ``(k_name,)``, sorted.
        old: The values before, ``(k_name,)``, in the parameter's own dtype.
        new: The values after, likewise.
        shapes: The shapes of the parameters, to recognise the model.
        digest_before: SHA-256 of the touched parameters before the edit.
        digest_after: The same after the edit.
        buffers: Names of those among them that are no parameters but buffers.
    """

    indices: dict[str, Tensor]
    old: dict[str, Tensor]
    new: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    digest_before: str
    digest_after: str
    buffers: tuple[str, ...] = ()

    @classmethod
    def plan(
        cls,
        module: nn.Module,
        targets: Targets,
        space: ParameterSpace,
        change: Tensor,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Edit:
        """The edit ``θ[S] ← θ[S] + change``, without making it.

        The sum is taken in the precision of ``change`` and rounded once to each parameter's dtype.

        Args:
            module: The module that will be edited.
            targets: The entries to change.
            space: The layout that ``change`` refers to.
            change: ``(k,)`` in the order of ``targets.flat(space)``.
            buffers: New values of whole buffers, by name.

        Raises:
            NonFiniteError: If a new value is NaN or infinite.
        """
        parameters = _tensors(module)
        full = torch.zeros(space.size, dtype=change.dtype, device=change.device)
        full[targets.flat(space).to(change.device)] = change
        changes = space.unflatten(full)
        indices, old, new, edited = {}, {}, {}, {}
        for name, entries in targets.items():
            value = parameters[name].detach()
            here = entries.to(value.device)
            before = value.reshape(-1)[here]
            step = changes[name].reshape(-1)[entries.to(change.device)].to(value.device)
            after = (before.to(step.dtype) + step).to(value.dtype)
            if not torch.isfinite(after).all():
                raise NonFiniteError(f"The edit would make {name!r} non-finite in {value.dtype}; nothing was changed.")
            indices[name], old[name], new[name] = entries, before.cpu(), after.cpu()
            edited[name] = value.reshape(-1).index_copy(0, here, after).view(value.shape)
        for name, value in (buffers or {}).items():
            before, after = parameters[name].detach(), value.to(parameters[name])
            if not torch.isfinite(after).all():
                raise NonFiniteError(f"The edit would make {name!r} non-finite in {after.dtype}; nothing was changed.")
            indices[name], edited[name] = torch.arange(before.numel()), after
            old[name], new[name] = before.reshape(-1).cpu().clone(), after.reshape(-1).cpu()
        return cls(
            indices=indices,
            old=old,
            new=new,
            shapes={name: tuple(value.shape) for name, value in edited.items()},
            digest_before=digest({name: parameters[name] for name in indices}),
            digest_after=digest(edited),
            buffers=tuple(buffers or ()),
        )

    @property
    def digest(self) -> str:
        """SHA-256 of what is changed: the indices, the old and the new values."""
        parts = {"indices": self.indices, "old": self.old, "new": self.new}
        return digest({f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()})

    def flat_new(self, space: ParameterSpace) -> Tensor:
        """The new values ``(k,)`` in the order of the flat vector, in float64."""
        return torch.cat([self.new[name].double() for name in space.slots if name in self.new])

    @property
    def count(self) -> int:
        """How many entries of parameters the edit changes."""
        return sum(entries.numel() for name, entries in self.indices.items() if name not in self.buffers)

    def check_fits(self, module: Weights) -> None:
        """Raises an :class:`~lightning_gif.errors.EditError` if the module is not of the edited shape."""
        parameters = _tensors(module)
        what = type(module).__name__ if isinstance(module, nn.Module) else "the checkpoint"
        for name, shape in self.shapes.items():
            if name not in parameters:
                raise EditError(f"The edit changes {name!r}, which {what} does not have. It was made on another model.")
            parameter = parameters[name]
            if tuple(parameter.shape) != shape or parameter.dtype != self.old[name].dtype:
                raise EditError(
                    f"The edit changes {name!r} of shape {shape} and {self.old[name].dtype}, but here it has shape"
                    f" {tuple(parameter.shape)} and {parameter.dtype}. It was made on another model."
                )

    def check_complete(self) -> None:
        """Raises an :class:`~lightning_gif.errors.EditError` if the parts do not belong together, as in a bad file."""
        if not self.shapes or not set(self.buffers) <= self.shapes.keys():
            raise EditError("The edit is incomplete: it names no parameters, or buffers that it has no shapes for.")
        for name, shape in self.shapes.items():
            if any(side < 0 for side in shape):
                raise EditError(f"The edit changes {name!r} of shape {shape}, which no tensor has.")
            parts = [part.get(name) for part in (self.indices, self.old, self.new)]
            if any(part is None or part.ndim != 1 for part in parts) or len({len(part) for part in parts}) > 1:  # type: ignore[arg-type]
                raise EditError(f"The edit of {name!r} is incomplete: indices, old and new values do not match.")
            entries = self.indices[name]
            if entries.dtype != torch.int64 or not len(entries) or bool((entries.diff() <= 0).any()):
                raise EditError(f"The indices of {name!r} are not sorted whole numbers, each once.")
            if int(entries[0]) < 0 or int(entries[-1]) >= math.prod(shape):
                raise EditError(f"The indices of {name!r} lie outside of its shape {shape}.")
            if self.old[name].dtype != self.new[name].dtype or not self.new[name].is_floating_point():
                raise EditError(f"The old and new values of {name!r} differ in dtype, or are no real numbers.")
            if not torch.isfinite(self.new[name]).all():
                raise EditError(f"The edit would make {name!r} non-finite.")
        for part in (self.indices, self.old, self.new):
            if part.keys() != self.shapes.keys():
                raise EditError("The edit is incomplete: it names parameters that it has no shapes for.")

    def is_in(self, module: Weights) -> bool | None:
        """Whether a module's weights are, bit by bit, those that the edit leaves behind; ``None``: neither these nor
        those that it starts from."""
        tensors = _tensors(module)
        if not self.shapes.keys() <= tensors.keys():
            return None
        found = digest({name: tensors[name] for name in self.indices})
        return found == self.digest_after if found in (self.digest_before, self.digest_after) else None

    def apply(self, module: Weights) -> None:
        """Writes the new values.

        Raises:
            EditError: If the touched parameters are not bit-equal to what they were when the edit was made, or would
                not become what it recorded.
        """
        self._swap(module, self.new, self.digest_before, self.digest_after, "apply")

    def undo(self, module: Weights) -> None:
        """Writes the old values back, bit by bit.

        Raises:
            EditError: If the touched parameters are not bit-equal to what the edit left behind, or would not become
                what they were.
        """
        self._swap(module, self.old, self.digest_after, self.digest_before, "undo")

    def _swap(self, module: Weights, values: dict[str, Tensor], expected: str, result: str, verb: str) -> None:
        self.check_fits(module)
        tensors = _tensors(module)
        present = {name: tensors[name].detach() for name in self.indices}
        found = digest(present)
        if found == result != expected:
            state = "the edit is in the weights already" if verb == "apply" else "the edit is not in the weights"
            raise EditError(f"Cannot {verb} the edit: {state}.")
        if found != expected:
            raise EditError(
                f"Cannot {verb} the edit: the parameters it touches have changed since (training, a checkpoint, or"
                " another edit). Undo later edits first, or load the weights that the edit was made on."
            )
        wanted = {}
        for name, value in present.items():
            here = self.indices[name].to(value.device)
            wanted[name] = value.reshape(-1).index_copy(0, here, values[name].to(value.device)).view(value.shape)
        if digest(wanted) != result:
            raise EditError(
                f"Cannot {verb} the edit: its indices or values are not those that it was made with, since they do not"
                " lead to the weights that it recorded. Nothing was changed. Load it anew from where it was saved."
            )
        # In one call, which no interrupt comes into the middle of: all of the edit is in the weights, or nothing.
        torch._foreach_copy_(list(present.values()), list(wanted.values()))
