"""The user's module as a function of its parameters and buffers, evaluated so that the module stays as it is."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import Metric, MetricCollection

from .._compat import LightningModule, isolate_rng, rank_zero_warn
from ..data.batch import Batch
from ..data.structure import describe, map_tensors, tensors
from ..distributed import ProcessGroup
from ..errors import GIFWarning, ObjectiveError
from ..parameters import ParameterSpace
from ..storage.digests import digest
from ..storage.interrupts import uninterrupted

__all__ = ["ModelState", "Shadow", "fails_for_good", "isolated", "replaced", "widen"]


class ModelState(NamedTuple):
    """Weights and buffers at one moment.

    Attributes:
        theta: The parameters ``(p,)``.
        statistics: Buffers in place of the module's own, by name.
    """

    theta: Tensor
    statistics: dict[str, Tensor]


class Shadow:
    """The user's module as a function of its parameters and buffers.

    All calls into the module go through :meth:`call`. Use :meth:`open`: inside of it the module is in evaluation mode
    on ``device``, and nothing that a call does to it lasts, see :func:`isolated`.

    Args:
        module: The module, unwrapped.
        space: Its parameters.
        theta: Their present values, ``(p,)``, in float32 or wider.
        device: Where everything is computed.
        seed: Of random numbers that a loss may draw. It is set before every call, so that the loss is one function.
        common: The first process's buffers, where they are not this one's.

    Attributes:
        state: The parameters and buffers to compute with, by default the module's own.
    """

    def __init__(
        self,
        module: LightningModule,
        space: ParameterSpace,
        theta: Tensor,
        *,
        device: torch.device,
        seed: int = 0,
        common: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module = module
        self.space = space
        self.device = device
        self.seed = seed
        self.state = ModelState(theta, {})
        self._common = common or {}

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        module: LightningModule,
        device: torch.device,
        processes: ProcessGroup,
        *,
        seed: int = 0,
        double: bool = False,
        loggers: Sequence[Any] = (),
    ) -> Iterator[Shadow]:
        """The shadow of a module, inside of everything that isolates its evaluation from the user's run.

        Args:
            module: See the class.
            device: See the class.
            processes: The process group.
            seed: See the class.
            double: Compute in float64 instead of float32.
            loggers: Loggers that calls must not log to.

        Raises:
            ConfigurationError: If the processes do not have the same parameters.
        """
        space = ParameterSpace(module)
        first = next(parameter for parameter in module.parameters() if parameter.requires_grad)
        dtype = torch.promote_types(first.dtype, torch.float64 if double else torch.float32)
        with isolated(module, device, dtype, loggers, processes):
            theta = space.flatten(module, dtype)
            yield cls(module, space, theta, device=device, seed=seed, common=_common_buffers(module, processes))

    @property
    def theta(self) -> Tensor:
        """The present parameters, ``(p,)``."""
        return self.state.theta

    @property
    def fails_for_good(self) -> bool:
        """See :func:`fails_for_good`, of the device."""
        return fails_for_good(self.device)

    @contextlib.contextmanager
    def at(self, state: ModelState) -> Iterator[None]:
        """Inside of it, calls take parameters and buffers from another state."""
        own = self.state
        self.state = state
        try:
            yield
        finally:
            self.state = own

    @contextlib.contextmanager
    def in_double(self) -> Iterator[None]:
        """Inside of it, everything is computed in float64; see :meth:`widened` for batches."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with self.at(self.state._replace(theta=self.theta.double())):
                yield
        finally:
            torch.set_default_dtype(default)

    def widened(self, batch: Batch) -> Batch:
        """A batch in the dtype of the present parameters."""
        return replace(batch, data=map_tensors(batch.data, lambda tensor: widen(tensor, self.theta.dtype)))

    def buffers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies of all buffers by name, which a call may write to."""
        values = {**dict(self.module.named_buffers()), **self._common, **self.state.statistics}
        return {name: widen(buffer.detach().clone(), dtype) for name, buffer in values.items()}

    def call(self, theta: Tensor, method: str, *args: Any, buffers: dict[str, Tensor] | None = None) -> Any:
        """The result of a method of the module with its parameters from ``theta``; differentiable in ``theta``.

        The module sees copies of all parameters, trainable and frozen, and of its buffers: a step may write to them,
        through ``.data`` or in place, as momentum encoders and weight clipping do. Version counters do not see a write
        through ``.data``, and comparing values afterwards reads as much memory as a copy. The copies are made here,
        inside of the call, because a transform of ``torch.func`` refuses in-place operations on tensors from outside.

        Args:
            theta: ``(p,)``.
            method: The name of the method.
            args: What it is called with.
            buffers: Buffers by name that it may change, instead of copies.
        """
        values = self.buffers(theta.dtype) if buffers is None else buffers
        frozen = {
            name: widen(parameter.detach().clone(), theta.dtype)
            for name, parameter in self.module.named_parameters()
            if not parameter.requires_grad
        }
        trainable = {name: value.clone() for name, value in self.space.unflatten(theta).items()}
        # torch.manual_seed would format a stack trace for every kind of accelerator that is not in use.
        torch.default_generator.manual_seed(self.seed)
        if self.device.type != "cpu":
            torch.manual_seed(self.seed)
        with replaced(self.module, {**values, **frozen, **trainable}):
            return getattr(self.module, method)(*args)

    def training_step(self, theta: Tensor, data: Any, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """The loss ``()`` that ``training_step`` returns for a prepared batch.

        Raises:
            ObjectiveError: If it returns anything else.
        """
        output = self.call(theta, "training_step", data, *self._batch_index, buffers=buffers)
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None:  # the step was skipped: these examples were not trained on
            return theta.new_zeros(())
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ObjectiveError(
                f"{type(self.module).__name__}.training_step must return a scalar loss, a dict with one under 'loss',"
                f" or None; it returned {describe(output)}."
            )
        return loss.reshape(())

    def per_example(self, theta: Tensor, method: str, data: Any, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """The values ``(B,)`` that ``influence_loss`` or ``influence_measurement`` returns for a prepared batch.

        Raises:
            ObjectiveError: If it does not return one value for each example.
        """
        values = self.call(theta, method, data, buffers=buffers)
        sizes = {tensor.shape[0] for tensor in tensors(data) if tensor.ndim}
        if not isinstance(values, Tensor) or values.ndim != 1 or (sizes and len(values) not in sizes):
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ObjectiveError(
                f"{type(self.module).__name__}.{method} must return one value for each example, shape (B,), not"
                f" {shape} for a batch {describe(data)}. With a loss of PyTorch, pass reduction='none'."
            )
        return values

    @property
    def _batch_index(self) -> list[int]:
        """What ``training_step`` takes after the batch: as in the training loop, a second parameter is its index."""
        parameters = inspect.signature(self.module.training_step).parameters.values()
        takes_index = len(parameters) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return [0] if takes_index else []


def widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in at least the precision of ``dtype``; integers stay as they are."""
    if tensor.is_complex():
        return tensor.to(torch.promote_types(tensor.dtype, dtype))
    narrow = tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < torch.finfo(dtype).bits
    return tensor.to(dtype) if narrow else tensor


def _common_buffers(module: nn.Module, processes: ProcessGroup) -> dict[str, Tensor]:
    """The first process's buffers, where those of the processes differ, as BatchNorm lets them; else none.

    Raises:
        ConfigurationError: If the processes do not have the same parameters.
    """
    if processes.size == 1:
        return {}
    processes.assert_equal(
        digest(dict(module.named_parameters())),
        "weights",
        "Load the same checkpoint on all of them; apply and undo an edit on all of them, not on the first alone.",
    )
    buffers = {name: buffer.detach().cpu() for name, buffer in module.named_buffers()}
    marks = processes.gather(digest(buffers))
    if all(mark == marks[0] for mark in marks):
        return {}
    common = processes.broadcast(buffers)
    return {name: common[name].to(buffer.device) for name, buffer in module.named_buffers()}


@contextlib.contextmanager
def replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside of it the module has other tensors; afterwards it has its own again, in the same order.

    A tensor that the module holds under several names, because a layer is registered twice or weights are tied, is
    replaced everywhere. ``torch.func.functional_call`` would swap the tensor of a layer that is registered twice once
    for each name, and put back the replacement (as of PyTorch 2.13).

    Args:
        module: The module.
        values: Replacements by the names of ``named_parameters()`` and ``named_buffers()``.
    """
    named = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    replacements = {id(named[name]): value for name, value in values.items()}
    held: list[dict[str, Any]] = [
        members for one in module.modules() for members in (one._parameters, one._buffers, one._modules)
    ]
    before = [dict(members) for members in held]
    try:
        for members in held:
            for name, member in list(members.items()):
                if id(member) in replacements:
                    members[name] = replacements[id(member)]
        yield
    finally:
        for members, own in zip(held, before, strict=True):
            _restore_members(members, own)


def _restore_members(members: dict[str, Any], own: dict[str, Any]) -> None:
    """Puts a module's parameters, buffers or submodules back, and drops those that were registered since."""
    if list(members.keys()) != list(own):  # a scripted module has no dictionary, but something with its methods
        members.clear()
    for name, member in own.items():
        if name not in members or members[name] is not member:
            members[name] = member


def fails_for_good(device: torch.device) -> bool:
    """Whether a kernel that meets an index out of bounds makes every later operation on the device fail."""
    return device.type != "cpu"


@contextlib.contextmanager
def isolated(
    module: LightningModule, device: torch.device, dtype: torch.dtype, loggers: Sequence[Any], processes: ProcessGroup
) -> Iterator[None]:
    """Inside of it the module can be evaluated and differentiated twice; everything it changes is undone at the end.

    Args:
        module: The module.
        device: Where it is evaluated.
        dtype: The default dtype inside.
        loggers: Loggers that must not log inside.
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
            # Nor have cuDNN's recurrent layers, which in evaluation mode have no first derivatives either. And float32
            # has to be float32, whatever precision the trainer allows for speed.
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
            # Tensors that a step creates should be of the dtype that everything is computed in.
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
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
                    # A failed device has no random state to restore, for example. The first error is the one to raise.
                    rank_zero_warn(f"Not all could be restored on {device}: {error}", category=GIFWarning)
            raise
        with uninterrupted():
            stack.close()


@contextlib.contextmanager
def _moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside of it the module is on another device; afterwards it has its own tensors again.

    Nothing is copied back, because the device may have failed: after an index out of bounds nothing can be read from a
    GPU any more. Nothing writes to the module's own tensors inside. The states of metrics and the ``device`` of a
    module are plain attributes, see :func:`_attributes_restored`.
    """
    own: list[Tensor] = list(module.parameters())
    own += [tensor.grad for tensor in own if tensor.grad is not None]
    values = [(tensor, tensor.data) for tensor in own]
    names: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, dict(held)) for one in module.modules() for held in (one._parameters, one._buffers, one._modules)
    ]
    try:
        module.to(device)
        yield
    finally:
        for tensor, value in values:
            tensor.data = value
        for held, before in names:
            _restore_members(held, before)


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

    This includes parameters and modules in containers, which are how a module hides a second net from its optimizer.
    State inside of other objects that a module holds is not restored.
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
        with torch.no_grad(), contextlib.ExitStack() as all_of_them:  # also where one of them fails
            for container, content in contents.values():
                all_of_them.callback(_refill, container, content)


def _remember(value: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Copies the content of a container, a tensor, or a module outside of the tree, and of those within it."""
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
    """Puts the content back into the same container, which other objects may refer to."""
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
    """Shadows ``log``, ``log_dict``, the loggers' ``log_metrics``, and all metrics of the module.

    Outside of the training loop ``log`` raises, and a metric would count the examples again. The value of a metric is
    NaN inside: if it enters the loss, the loss is NaN and is reported, rather than wrong. In a distributed run each
    process reads its own examples, so a step must not wait for the others.
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
    """The metrics that are submodules, and those in plain lists and dictionaries of the modules."""
    found: dict[int, Metric | MetricCollection] = {}
    for submodule in module.modules():
        held = [submodule]
        for value in vars(submodule).values():
            if isinstance(value, (list, tuple)):
                held += value
            elif isinstance(value, dict):
                held += value.values()
        for value in held:
            if isinstance(value, (Metric, MetricCollection)):
                found[id(value)] = value
    return list(found.values())


def _nan_for(metric: Metric | MetricCollection) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        nan = torch.tensor(torch.nan)
        return dict.fromkeys(metric.keys(), nan) if isinstance(metric, MetricCollection) else nan

    return answer
