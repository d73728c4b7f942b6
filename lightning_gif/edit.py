"""A change of the weights that can be applied and undone bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .distributed import ProcessGroup
from .errors import EditError, NonFiniteError
from .parameters import ParameterSpace, Targets, Weights, tensors_of
from .sharding import is_sharded, local, part_of
from .storage.digests import digest

__all__ = ["Edit"]


@dataclass
class Edit:
    """A change of some weights, or all, of a module or a ``state_dict``, which can be applied and undone bit for bit.

    Attributes:
        indices: The sorted flat indices of the changed entries, ``(k_name,)``, by parameter name.
        old: The values of these entries before the edit, ``(k_name,)`` in the parameter's dtype, by parameter name.
        new: The values of these entries after the edit, ``(k_name,)`` in the parameter's dtype, by parameter name.
        shapes: The shapes of the changed parameters by name, to recognise the model.
        digest_before: SHA-256 of the changed parameters, with all their entries, before the edit.
        digest_after: SHA-256 of the changed parameters, with all their entries, after the edit.
        buffers: The names that are buffers, not parameters.
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
        """Computes the edit ``θ[S] ← θ[S] + change`` without applying it.

        The sum is computed in the precision of ``change`` and rounded once to each parameter's dtype.

        Args:
            module: The module that will be edited.
            targets: The entries to change.
            space: The parameters as a flat vector.
            change: The change ``(k,)`` of the targets, in the order of ``targets.flat(space)``.
            buffers: New values of whole buffers, by name.

        Raises:
            NonFiniteError: If a new value is NaN or infinite.
        """
        parameters = tensors_of(module)
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
        """SHA-256 of the indices, the old values and the new values."""
        parts = {"indices": self.indices, "old": self.old, "new": self.new}
        return digest({f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()})

    def flat_new(self, space: ParameterSpace) -> Tensor:
        """The new values ``(k,)`` of parameters in the order of the flat vector, in float64."""
        return torch.cat([self.new[name].double() for name in space.slots if name in self.new])

    @property
    def count(self) -> int:
        """The number of changed entries of parameters, not counting buffers."""
        return sum(entries.numel() for name, entries in self.indices.items() if name not in self.buffers)

    def check_fits(self, module: Weights) -> None:
        """Checks that a module or ``state_dict`` has the edited parameters with the same names, shapes and dtypes.

        Raises:
            EditError: If it does not.
        """
        parameters = tensors_of(module)
        what = type(module).__name__ if isinstance(module, nn.Module) else "the checkpoint"
        for name, shape in self.shapes.items():
            if name not in parameters:
                raise EditError(
                    f"The edit changes {name!r}, which {what} does not have. It was computed for another model."
                )
            parameter = parameters[name]
            if tuple(parameter.shape) != shape or parameter.dtype != self.old[name].dtype:
                raise EditError(
                    f"The edit changes {name!r} of shape {shape} and {self.old[name].dtype}, but here it has shape"
                    f" {tuple(parameter.shape)} and {parameter.dtype}. It was computed for another model."
                )

    def check_complete(self) -> None:
        """Checks that the parts of the edit belong together, because a file may be damaged.

        Raises:
            EditError: If they do not.
        """
        if not self.shapes or not set(self.buffers) <= self.shapes.keys():
            raise EditError("The edit is incomplete: it has no parameters, or buffers without a shape.")
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
                raise EditError(f"The indices of {name!r} are out of bounds for its shape {shape}.")
            if self.old[name].dtype != self.new[name].dtype or not self.new[name].is_floating_point():
                raise EditError(f"The old and new values of {name!r} differ in dtype, or are not floating-point.")
            if not torch.isfinite(self.new[name]).all():
                raise EditError(f"The edit would make {name!r} non-finite.")
        for part in (self.indices, self.old, self.new):
            if part.keys() != self.shapes.keys():
                raise EditError("The edit is incomplete: it has parameters without a shape.")

    def is_in(self, module: Weights) -> bool | None:
        """Whether the edit is in a module's weights, bit for bit.

        Returns:
            ``True`` for the weights after the edit, ``False`` for the weights before it, ``None`` for any others.
        """
        tensors = tensors_of(module)
        if not self.shapes.keys() <= tensors.keys():
            return None
        present = digest(self._present(module))
        return present == self.digest_after if present in (self.digest_before, self.digest_after) else None

    def tensors(self, module: Weights, *, edited: bool) -> dict[str, Tensor]:
        """The edited tensors of a module as they are with or without the edit, by name. The module is not changed.

        Args:
            module: The module or ``state_dict``.
            edited: Whether to take the new values, else the old ones.

        Raises:
            EditError: If the module does not have the edited parameters.
        """
        self.check_fits(module)
        return self._with_values(self._present(module), self.new if edited else self.old)

    def _present(self, module: Weights) -> dict[str, Tensor]:
        """The tensors that the edit changes, by name; with all their entries, if they are sharded."""
        tensors, processes = tensors_of(module), ProcessGroup.of_weights(module)
        return {name: processes.whole(tensors[name].detach()) for name in self.indices}

    def _with_values(self, tensors: Mapping[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = {}
        for name in self.indices:
            value = tensors[name].detach()
            here = self.indices[name].to(value.device)
            wanted[name] = value.reshape(-1).index_copy(0, here, values[name].to(value.device)).view(value.shape)
        return wanted

    def apply(self, module: Weights) -> None:
        """Writes the new values.

        Raises:
            EditError: If the changed parameters differ from those before the edit, or the result would differ from the
                recorded digest.
        """
        self._swap(module, self.new, self.digest_before, self.digest_after, "apply")

    def undo(self, module: Weights) -> None:
        """Writes the old values back, bit for bit.

        Raises:
            EditError: If the changed parameters differ from those after the edit, or the result would differ from the
                recorded digest.
        """
        self._swap(module, self.old, self.digest_after, self.digest_before, "undo")

    def _swap(self, module: Weights, values: dict[str, Tensor], expected: str, result: str, verb: str) -> None:
        self.check_fits(module)
        present = self._present(module)
        actual = digest(present)
        if actual == result != expected:
            state = "the edit is in the weights already" if verb == "apply" else "the edit is not in the weights"
            raise EditError(f"Cannot {verb} the edit: {state}.")
        if actual != expected:
            raise EditError(
                f"Cannot {verb} the edit: its parameters have changed since (by training, a checkpoint, or another"
                " edit). Undo later edits first, or load the weights for which the edit was computed."
            )
        wanted = self._with_values(present, values)
        if digest(wanted) != result:
            raise EditError(
                f"Cannot {verb} the edit: its indices or values were changed, so they do not give the weights whose"
                " digest it recorded. Nothing was changed. Load the edit again from its file."
            )
        held = {name: tensor.detach() for name, tensor in tensors_of(module).items() if name in wanted}
        if any(map(is_sharded, held.values())):  # no process writes its part before all have passed the checks
            ProcessGroup.of_weights(module).gather(None)
        parts = [part_of(wanted[name], like) for name, like in held.items()]
        # One call, which Ctrl-C cannot interrupt: so either all of the edit is in the weights, or nothing.
        torch._foreach_copy_([local(tensor) for tensor in held.values()], parts)
