"""A block in which the user's module can be evaluated; at its end the module is restored."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import Metric, MetricCollection

from .._compat import LightningModule, isolate_rng, rank_zero_warn
from ..distributed import ProcessGroup
from ..errors import GIFWarning, ObjectiveError
from ..storage.interrupts import uninterrupted

__all__ = ["fails_for_good", "isolated", "restore_members"]


def fails_for_good(device: torch.device) -> bool:
    """Whether an index out of bounds in a kernel makes every later operation on the device fail."""
    return device.type != "cpu"


@contextlib.contextmanager
def isolated(
    module: LightningModule, device: torch.device, dtype: torch.dtype, loggers: Sequence[Any], processes: ProcessGroup
) -> Iterator[None]:
    """Inside the block the module can be evaluated and differentiated twice; its end undoes every change to the module.

    Args:
        module: The module.
        device: The device that evaluates it.
        dtype: The default dtype inside the block.
        loggers: Loggers that must not log inside the block.
        processes: The process group.
    """
    home = next(module.parameters()).device
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        with uninterrupted():
            stack.enter_context(isolate_rng())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            # Neither compiled code nor fused attention has second derivatives.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # cuDNN's recurrent layers have no second derivatives, and in evaluation mode no first ones. TF32 is off,
            # because float32 has to have its full precision here, whatever the trainer allows.
            recurrent = any(isinstance(submodule, nn.RNNBase) for submodule in module.modules())
            cudnn = torch.backends.cudnn
            stack.enter_context(
                cudnn.flags(
                    enabled=cudnn.enabled and not recurrent,
                    benchmark=cudnn.benchmark,
                    deterministic=cudnn.deterministic,
                    allow_tf32=False,
                )
            )
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
            torch.backends.mha.set_fastpath_enabled(False)
            # Tensors that a step creates should have the dtype of the computation.
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            stack.enter_context(_members_restored(module))
            stack.enter_context(_attributes_restored(module))
            stack.enter_context(_evaluation_mode(module))
            stack.enter_context(_silenced(module, loggers, processes))
            if home != device:  # the strategy's teardown after fit moves the module to the CPU
                stack.enter_context(_moved(module, device))
        try:
            yield
        except BaseException:
            with uninterrupted():
                try:
                    stack.close()
                except RuntimeError as error:
                    if not fails_for_good(device):
                        raise
                    # On a failed device nothing can be restored, for example its random state. The first error is more
                    # useful to the user than this one.
                    rank_zero_warn(
                        f"The state of the module could not be restored completely on {device}: {error}",
                        category=GIFWarning,
                    )
            raise
        with uninterrupted():
            stack.close()


@contextlib.contextmanager
def _members_restored(module: nn.Module) -> Iterator[None]:
    """At the end of the block all modules hold the same parameter, buffer and submodule objects, in the same order.

    Every evaluation replaces some of them and puts them back. This block covers evaluations that were interrupted.
    """
    names: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, dict(held)) for one in module.modules() for held in (one._parameters, one._buffers, one._modules)
    ]
    try:
        yield
    finally:
        for held, before in names:
            restore_members(held, before)


@contextlib.contextmanager
def _moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the module is on another device; at its end it has its original tensors again.

    Nothing is copied back, because a GPU cannot be read after an index out of bounds. Nothing has to be: inside the
    block nothing writes to the module's own tensors. The states of metrics and the ``device`` of a module are plain
    attributes, see :func:`_attributes_restored`.
    """
    own: list[Tensor] = list(module.parameters())
    own += [tensor.grad for tensor in own if tensor.grad is not None]
    values = [(tensor, tensor.data) for tensor in own]
    with _members_restored(module):
        try:
            module.to(device)
            yield
        finally:
            for tensor, value in values:
                tensor.data = value


@contextlib.contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    flags = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in flags.items():
            submodule.training = training


@contextlib.contextmanager
def _attributes_restored(module: nn.Module) -> Iterator[None]:
    """Restores the plain attributes of the modules: counters, collected outputs, random generators.

    This includes parameters and modules in plain lists and dictionaries, where a user may hide a second network from
    the optimizer. State inside other objects is not restored.
    """
    internal = vars(nn.Module()).keys()
    saved = []
    contents: dict[int, tuple[Any, Any]] = {}
    for submodule in module.modules():
        own = {name: value for name, value in vars(submodule).items() if name not in internal}
        for value in own.values():
            _remember(value, contents)
        saved.append((submodule, own))
    try:
        yield
    finally:
        for submodule, own in saved:
            attributes = vars(submodule)
            for name in attributes.keys() - own.keys() - internal:
                del attributes[name]
            attributes.update(own)
        with torch.no_grad(), contextlib.ExitStack() as stack:  # if one fails, the others are refilled still
            for container, content in contents.values():
                stack.callback(_refill, container, content)


def _remember(value: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Saves a copy of a tensor, generator or container, of everything inside it, and of the tensors of a module."""
    if id(value) in contents:
        return
    if isinstance(value, Tensor):
        contents[id(value)] = (value, value.detach().clone())
    elif isinstance(value, torch.Generator):
        contents[id(value)] = (value, value.get_state())
    elif isinstance(value, (list, dict, set, bytearray, deque)):
        contents[id(value)] = (value, copy.copy(value))
    if isinstance(value, (list, tuple, dict, deque)):
        for item in value.values() if isinstance(value, dict) else value:
            _remember(item, contents)
    elif isinstance(value, nn.Module):
        for tensor in (*value.parameters(), *value.buffers()):
            _remember(tensor, contents)


def _refill(container: Any, content: Any) -> None:
    """Puts the saved content back into the same object, because other objects may refer to it."""
    if isinstance(container, torch.Generator):
        container.set_state(content)
        return
    if isinstance(container, Tensor):
        if not torch.equal(container, content):
            container.copy_(content)
        return
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(content)


@contextlib.contextmanager
def _silenced(module: LightningModule, loggers: Sequence[Any], processes: ProcessGroup) -> Iterator[None]:
    """Inside the block, logging does nothing, metrics return NaN, and ``all_gather`` raises in a distributed run.

    Outside the training loop ``log`` raises, and a metric would count the examples again. Metrics return NaN so that a
    loss that uses one is reported as non-finite instead of being wrong. In a distributed run each process reads its
    own examples, so a step must not wait for the other processes.
    """
    shadowed: list[tuple[Any, str, Any]] = []

    def shadow(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        shadowed.append((owner, name, vars(owner).get(name)))
        object.__setattr__(owner, name, replacement)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def no_others(*args: Any, **kwargs: Any) -> None:
        raise ObjectiveError(
            f"The loss of {type(module).__name__} calls self.all_gather, which couples the examples of all processes."
            " Define `influence_loss(self, batch) -> (B,)` without it (see GIFMixin)."
        )

    try:
        if processes.size > 1:
            shadow(module, "all_gather", no_others)
        for name in ("log", "log_dict"):
            shadow(module, name, nothing)
        for logger in loggers:
            shadow(logger, "log_metrics", nothing)
        for metric in _metrics(module):
            answer = _nan_for(metric)
            for name in ("forward", "compute"):
                shadow(metric, name, answer)
            for name in ("update", "reset"):
                shadow(metric, name, nothing)
        yield
    finally:
        for owner, name, original in reversed(shadowed):
            if original is None:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, original)


def _metrics(module: nn.Module) -> list[Metric | MetricCollection]:
    """All metrics of a module: its submodules, and the items of lists and dictionaries that submodules hold."""
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


def _nan_for(metric: Metric | MetricCollection) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        nan = torch.tensor(torch.nan)
        return dict.fromkeys(metric.keys(), nan) if isinstance(metric, MetricCollection) else nan

    return answer


def restore_members(members: dict[str, Any], own: dict[str, Any]) -> None:
    """Puts a module's parameters, buffers or submodules back, and drops those registered since then.

    Args:
        members: The ``_parameters``, ``_buffers`` or ``_modules`` of the module.
        own: A copy of ``members`` from before.
    """
    if list(members.keys()) != list(own):  # ``.keys()``, because a scripted module has a dictionary-like object here
        members.clear()
    for name, member in own.items():
        if name not in members or members[name] is not member:
            members[name] = member
