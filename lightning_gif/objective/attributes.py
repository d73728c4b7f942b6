"""The plain attributes of a module, which an evaluation must find as the one before did."""

from __future__ import annotations

import contextlib
import copy
import random
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Attributes", "attributes_restored"]


_INTERNAL = vars(nn.Module()).keys()

# Objects of these packages hold no counters of a training step; some of them hold the whole run.
_FOREIGN = ("builtins", "lightning", "lightning_fabric", "numpy", "pytorch_lightning", "torch", "torchmetrics", "wandb")
_CONTAINERS = (list, dict, set, bytearray, deque)


class _Content(NamedTuple):
    """A container, tensor or random generator, and what it held.

    Attributes:
        holder: The object.
        value: A copy of its content.
        version: How often PyTorch had written to it, if it is a tensor.
    """

    holder: Any
    value: Any
    version: int

    @classmethod
    def of(cls, holder: Any) -> _Content | None:
        """The content of something that can be written to in place; ``None`` for anything else."""
        if isinstance(holder, Tensor):
            return cls(holder, holder.detach().clone(), 0 if holder.is_inference() else holder._version)
        if isinstance(holder, torch.Generator):
            return cls(holder, holder.get_state(), 0)
        if isinstance(holder, np.ndarray):
            return cls(holder, holder.copy(), 0)
        if isinstance(holder, np.random.Generator):
            return cls(holder, copy.deepcopy(holder.bit_generator.state), 0)
        if isinstance(holder, (np.random.RandomState, random.Random)):
            return cls(holder, _state(holder), 0)
        return cls(holder, copy.copy(holder), 0) if isinstance(holder, _CONTAINERS) else None

    def may_have_changed(self) -> bool:
        """A cheap check, which misses writes through ``.data`` and items that were exchanged."""
        if isinstance(self.holder, Tensor):
            return not self.holder.is_inference() and self.holder._version != self.version
        return isinstance(self.holder, _CONTAINERS) and len(self.holder) != len(self.value)

    def has_changed(self) -> bool:
        """Whether the content is another one."""
        if isinstance(self.holder, Tensor):
            return not torch.equal(self.holder, self.value)
        if isinstance(self.holder, torch.Generator):
            return not torch.equal(self.holder.get_state(), self.value)
        if isinstance(self.holder, np.ndarray):
            return self.holder.tobytes() != self.value.tobytes()
        if isinstance(self.holder, (np.random.Generator, np.random.RandomState, random.Random)):
            return repr(_state(self.holder)) != repr(self.value)
        if isinstance(self.holder, (list, deque)):
            pairs = zip(self.holder, self.value, strict=False)
            return len(self.holder) != len(self.value) or any(one is not other for one, other in pairs)
        if isinstance(self.holder, dict):
            keys = list(self.holder) == list(self.value)
            return not keys or any(self.holder[key] is not value for key, value in self.value.items())
        return bool(self.holder != self.value)

    def put_back(self) -> None:
        """Puts the content back into the same object, which others may refer to."""
        if isinstance(self.holder, Tensor):
            with torch.inference_mode(self.holder.is_inference()), torch.no_grad():
                self.holder.copy_(self.value)
        elif isinstance(self.holder, torch.Generator):
            self.holder.set_state(self.value)
        elif isinstance(self.holder, np.ndarray):
            self.holder[...] = self.value
        elif isinstance(self.holder, np.random.Generator):
            self.holder.bit_generator.state = copy.deepcopy(self.value)
        elif isinstance(self.holder, np.random.RandomState):
            self.holder.set_state(self.value)
        elif isinstance(self.holder, random.Random):
            self.holder.setstate(self.value)
        else:
            self.holder.clear()
            (self.holder.update if isinstance(self.holder, (dict, set)) else self.holder.extend)(self.value)


def _state(generator: Any) -> Any:
    """The state of a random generator of NumPy or Python."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


class Attributes:
    """The plain attributes of a module and of its submodules: counters, collected outputs, random generators.

    This includes what is in containers and in objects of the user's classes, and the tensors of modules that are no
    submodules: a container is how a module hides a second net from its optimizer.

    Args:
        module: The module.
        earlier: Attributes at an earlier time, whose copies of tensors serve again.
    """

    def __init__(self, module: nn.Module, earlier: Attributes | None = None) -> None:
        self._contents: dict[int, _Content] = {} if earlier is None else dict(earlier._contents)
        self._written: set[int] | None = None
        self._own: list[tuple[dict[str, Any], dict[str, Any]]] = []
        seen = set(self._contents)
        for submodule in module.modules():
            attributes = vars(submodule)
            own = {name: value for name, value in attributes.items() if name not in _INTERNAL}
            for value in own.values():
                self._remember(value, seen)
            self._own.append((attributes, own))

    def _remember(self, value: Any, seen: set[int]) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        content = _Content.of(value)
        if content is not None:
            self._contents[id(value)] = content
        if isinstance(value, dict):
            items = list(value.values())
        elif isinstance(value, (list, tuple, deque)):
            items = list(value)
        elif isinstance(value, nn.Module):
            items = [*value.parameters(), *value.buffers()]
        else:
            items = [vars(value)] if _is_own_object(value) else []
        for item in items:
            self._remember(item, seen)

    def reset(self) -> None:
        """Restores what an evaluation has changed.

        The first time everything is compared. Later only what was written to then, or shows that it was since, because
        this runs after every evaluation.
        """
        self._reset_names()
        if self._written is None:
            self._written = {key for key, content in self._contents.items() if content.has_changed()}
        for key, content in self._contents.items():
            if key in self._written or content.may_have_changed():
                self._written.add(key)
                content.put_back()

    def restore(self) -> None:
        """Restores everything."""
        self._reset_names()
        with contextlib.ExitStack() as all_of_them:  # also where one of them fails
            for content in self._contents.values():
                if content.has_changed():
                    all_of_them.callback(content.put_back)

    def _reset_names(self) -> None:
        for attributes, own in self._own:
            if len(attributes) != len(own) + len(_INTERNAL):
                for name in attributes.keys() - own.keys() - _INTERNAL:
                    del attributes[name]
            for name, value in own.items():
                if name not in attributes or attributes[name] is not value:
                    attributes[name] = value


def _is_own_object(value: Any) -> bool:
    """Whether something is an object of a class of the user's, whose attributes a step may write to."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType, *weakref.ProxyTypes)) or callable(value):
        return False
    kinds = [kind.__module__.split(".")[0] for kind in type(value).__mro__[:-1]]
    return isinstance(getattr(value, "__dict__", None), dict) and not any(kind in _FOREIGN for kind in kinds)


@contextlib.contextmanager
def attributes_restored(module: nn.Module) -> Iterator[Attributes]:
    """Afterwards the attributes are as before; inside, attributes that are inference tensors are ordinary tensors.

    Inference tensors are what a module caches in ``trainer.validate``. They cannot be differentiated.
    """
    before = Attributes(module)
    try:
        for attributes, own in before._own:
            attributes.update({name: _ordinary(value) for name, value in own.items() if _is_inference(value)})
        for content in before._contents.values():
            if isinstance(content.holder, dict):
                content.holder.update({key: _ordinary(value) for key, value in content.value.items()})
            elif isinstance(content.holder, list):
                content.holder[:] = [_ordinary(value) for value in content.value]
        yield before
    finally:
        before.restore()


def _is_inference(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_inference()


def _ordinary(value: Any) -> Any:
    return value.clone() if _is_inference(value) else value
