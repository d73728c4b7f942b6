"""The user's module as a function of its parameters and buffers; evaluating it does not change the module."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.structure import describe, map_object, map_tensors, tensors
from ..distributed import ProcessGroup
from ..errors import ObjectiveError
from ..mixin import LossOfModule, overrides
from ..parameters import ParameterSpace
from ..storage.digests import digest
from ..storage.interrupts import uninterrupted
from . import gathering, isolation
from .equivalents import TwiceDifferentiable
from .isolation import Isolation

if TYPE_CHECKING:
    from .._compat import LightningModule, Trainer

__all__ = ["ModelState", "Shadow", "widen", "widen_all"]


class ModelState(NamedTuple):
    """Weights and buffers at one moment.

    Attributes:
        theta: The parameters ``(p,)``.
        statistics: Buffers, and possibly frozen parameters, by name that replace the module's own.
    """

    theta: Tensor
    statistics: dict[str, Tensor]


class Shadow:
    """The user's module as a function of its parameters and buffers.

    All calls into the module go through :meth:`call`. Create a shadow with :meth:`open`: inside that block the module
    is in evaluation mode on ``device``, and at its end the module is as before, see :func:`~.isolation.isolated`.

    Args:
        module: The module, unwrapped.
        space: Its parameters.
        theta: Their present values, ``(p,)``, in float32 or wider.
        inside: The block that isolates calls from the user's run.
        device: Where everything is computed.
        seed: Of random numbers that a loss may draw. It is set before every call, so that the loss is one function.
        common: The first process's buffers, where they are not this one's.
        influence_loss: A function that gives the losses, see :meth:`open`.

    Attributes:
        state: The parameters and buffers to compute with, by default the module's own.
        influence_loss: What gives the losses of single examples: a function of the module and the batch, or
            ``"influence_loss"`` if the module defines that method. ``None`` if neither exists.
        metrics: The module's metrics.
        batch_index: What ``training_step`` gets as the index of its batch.
        set_generators: Called before each call to set the random generators, if it is not ``None``. By default they are
            seeded.
        on_parameters: Called with the parameters of each call by name, if it is not ``None``.
    """

    def __init__(
        self,
        module: LightningModule,
        space: ParameterSpace,
        theta: Tensor,
        inside: Isolation,
        *,
        device: torch.device,
        seed: int = 0,
        common: Mapping[str, Tensor] | None = None,
        influence_loss: LossOfModule | None = None,
    ) -> None:
        self.module = module
        self.space = space
        self.device = device
        self.seed = seed
        self.batch_index = 0
        self.set_generators: Callable[[], None] | None = None
        self.state = ModelState(theta, {})
        self.metrics = inside.metrics
        self._attributes = inside.attributes
        self._common = common or {}
        defined = "influence_loss" if overrides(module, "influence_loss") else None
        self.influence_loss: LossOfModule | str | None = influence_loss or defined
        self.on_parameters: Callable[[dict[str, Tensor]], None] | None = None
        self._members = _Members(module)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        trainer: Trainer,
        module: LightningModule,
        device: torch.device,
        processes: ProcessGroup,
        *,
        seed: int = 0,
        double: bool = False,
        influence_loss: LossOfModule | None = None,
    ) -> Iterator[Shadow]:
        """A block that yields the shadow of a module and restores the module at its end.

        Args:
            trainer: The module's trainer.
            module: See the class.
            device: See the class.
            processes: The process group.
            seed: See the class.
            double: Compute in float64 instead of float32.
            influence_loss: A function from the module and a batch to the losses of its examples, which replaces the
                module's own.

        Raises:
            ConfigurationError: If the processes do not have the same parameters.
        """
        space = ParameterSpace(module)
        first = next(parameter for parameter in module.parameters() if parameter.requires_grad)
        dtype = torch.promote_types(first.dtype, torch.float64 if double else torch.float32)
        opened = isolation.isolated(trainer, module, device, dtype, processes)
        with gathering.gathered(module, device, processes, dtype), opened as inside:
            theta = space.flatten(module, dtype)
            common = _common_buffers(module, processes)
            yield cls(
                module, space, theta, inside, device=device, seed=seed, common=common, influence_loss=influence_loss
            )

    @property
    def theta(self) -> Tensor:
        """The present parameters, ``(p,)``."""
        return self.state.theta

    @property
    def fails_for_good(self) -> bool:
        """Whether an index out of bounds in a kernel makes every later operation on the device fail."""
        return isolation.fails_for_good(self.device)

    @contextlib.contextmanager
    def at(self, state: ModelState) -> Iterator[None]:
        """Inside the block, calls use the parameters and buffers of another state."""
        own = self.state
        self.state = state
        try:
            yield
        finally:
            self.state = own

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Inside of it, calls draw other random numbers."""
        own = self.seed
        self.seed = seed
        try:
            yield
        finally:
            self.seed = own

    @contextlib.contextmanager
    def in_double(self) -> Iterator[None]:
        """Inside the block, everything is computed in float64; see :meth:`widened` for batches."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with self.at(self.state._replace(theta=self.theta.double())):
                yield
        finally:
            torch.set_default_dtype(default)

    def widened(self, batch: Batch) -> Batch:
        """A batch in the dtype of the present parameters."""
        return replace(batch, data=widen_all(batch.data, self.theta.dtype))

    def buffers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies of all buffers by name, which a call may write to."""
        values = {**self._members.buffers, **self._common, **self.state.statistics}
        return {
            name: widen(buffer.clone() if buffer.requires_grad else buffer.detach().clone(), dtype)
            for name, buffer in values.items()
        }

    def call(
        self, theta: Tensor, method: str | LossOfModule, *args: Any, buffers: dict[str, Tensor] | None = None
    ) -> Any:
        """Calls a method of the module, or a function of it, with the parameters ``theta``.

        The result is differentiable in ``theta``.

        The module gets copies of all parameters, trainable and frozen, and of its buffers. A step may write to them, as
        momentum encoders and weight clipping do. Detecting such writes instead would not be cheaper: version counters
        miss a write through ``.data``, and comparing values reads as much memory as a copy. The copies are made inside
        the call, because ``torch.func`` refuses in-place operations on tensors from outside a transform.

        Args:
            theta: Parameters ``(p,)``.
            method: The name of the method, or a function whose first argument is the module.
            args: The other arguments.
            buffers: Buffers, and possibly frozen parameters, by name that the method may change. Afterwards these are
                the tensors that it left. By default it gets copies.
        """
        with torch._C.DisableTorchFunction():  # modes count the operations of the module alone
            values = self.buffers(theta.dtype) if buffers is None else buffers
            frozen = self.frozen(theta.dtype, without={*values, *self.state.statistics})
            trainable = {name: value.clone() for name, value in self.space.unflatten(theta).items()}
            if self.on_parameters is not None:
                self.on_parameters(trainable)
        self._draw_anew()
        with self._members.replaced({**values, **frozen, **trainable}), TwiceDifferentiable():
            try:
                return getattr(self.module, method)(*args) if isinstance(method, str) else method(self.module, *args)
            finally:
                if buffers is not None:  # a step may put another tensor in the place of one
                    buffers.update(self._members.held(buffers))
                self._attributes.reset()

    def frozen(self, dtype: torch.dtype, *, without: Container[str] = ()) -> dict[str, Tensor]:
        """Copies of the parameters that are not trainable, by name."""
        return {
            name: widen(parameter.detach().clone(), dtype)
            for name, parameter in self._members.parameters.items()
            if not parameter.requires_grad and name not in without
        }

    def _draw_anew(self) -> None:
        """Sets the random generators, before a call."""
        if self.set_generators is not None:
            self.set_generators()
            return
        # torch.manual_seed would format a stack trace for every kind of accelerator that is not in use.
        torch.default_generator.manual_seed(self.seed)
        if self.device.type != "cpu":
            torch.manual_seed(self.seed)

    def training_step(self, theta: Tensor, data: Any, *, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """The loss ``()`` that ``training_step`` returns for a prepared batch.

        Raises:
            ObjectiveError: If it returns anything else.
        """
        index = [self.batch_index] if self._takes_index else []
        output = self.call(theta, "training_step", data, *index, buffers=buffers)
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None:  # Lightning skips such a step, so the model was not trained on these examples
            return theta.new_zeros(())
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ObjectiveError(
                f"{type(self.module).__name__}.training_step must return a scalar loss, a dict with one under 'loss',"
                f" or None; it returned {describe(output)}."
            )
        return loss.reshape(())

    def per_example(
        self, theta: Tensor, method: str | LossOfModule, data: Any, *, buffers: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The values ``(B,)`` that ``influence_loss`` or ``influence_measurement`` returns for a prepared batch.

        Raises:
            ObjectiveError: If it does not return one value for each example.
        """
        values = self.call(theta, method, data, buffers=buffers)
        sizes = {tensor.shape[0] for tensor in tensors(data) if tensor.ndim}
        if not isinstance(values, Tensor) or values.ndim != 1 or (sizes and len(values) not in sizes):
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            name = f"{type(self.module).__name__}.{method}" if isinstance(method, str) else "`influence_loss`"
            raise ObjectiveError(
                f"{name} must return one value for each example, shape (B,), not"
                f" {shape} for a batch {describe(data)}. With a loss of PyTorch, pass reduction='none'."
            )
        return values

    @cached_property
    def _takes_index(self) -> bool:
        """Whether ``training_step`` takes the batch index as a second argument."""
        parameters = inspect.signature(self.module.training_step).parameters.values()
        return len(parameters) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a floating-point or complex tensor to at least the precision of ``dtype``; returns others unchanged."""
    if tensor.is_complex():
        return tensor.to(torch.promote_types(tensor.dtype, dtype))
    narrow = tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < torch.finfo(dtype).bits
    return tensor.to(dtype) if narrow else tensor


def widen_all(data: Any, dtype: torch.dtype) -> Any:
    """A batch with all its tensors widened. In float64, tensors inside objects, such as graphs, are widened, too."""

    def one(tensor: Tensor) -> Tensor:
        return widen(tensor, dtype)

    inside = partial(map_object, function=one) if dtype == torch.float64 else None
    return map_tensors(data, one, other=inside)


def _common_buffers(module: nn.Module, processes: ProcessGroup) -> dict[str, Tensor]:
    """The buffers of the first process, if the buffers of the processes differ, as those of BatchNorm may; else none.

    Raises:
        ConfigurationError: If the processes do not have the same parameters.
    """
    if processes.size == 1:
        return {}
    processes.assert_equal(
        digest(dict(module.named_parameters())),
        "weights",
        "Load the same checkpoint on all processes, and apply and undo edits on all of them.",
    )
    buffers = {name: buffer.detach().cpu() for name, buffer in module.named_buffers()}
    marks = processes.gather(digest(buffers))
    if all(mark == marks[0] for mark in marks):
        return {}
    common = processes.broadcast(buffers)
    return {name: common[name].to(buffer.device) for name, buffer in module.named_buffers()}


class _Members:
    """The parameters, buffers and submodules of a module, which are read once: a deep module takes long to traverse.

    A tensor that the module holds under several names is replaced everywhere. This happens if a layer is registered
    twice or weights are tied. ``torch.func.functional_call`` handles a layer that is registered twice wrongly: it
    leaves the replacement in the module (as of PyTorch 2.13).

    Args:
        module: The module, whose members stay the same objects outside of :meth:`replaced`.

    Attributes:
        parameters: The parameters by name.
        buffers: The buffers by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = dict(module.named_parameters())
        self.buffers = dict(module.named_buffers())
        self._held: list[dict[str, Any]] = [
            members for one in module.modules() for members in (one._parameters, one._buffers, one._modules)
        ]
        self._own = [dict(members) for members in self._held]
        named = {**self.buffers, **self.parameters}
        names = {id(tensor): name for name, tensor in named.items()}
        self._places = [
            (members, key, names[id(member)])
            for members, own in zip(self._held, self._own, strict=True)
            for key, member in own.items()
            if id(member) in names
        ]

    def held(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors that the module holds now, by name."""
        wanted = set(names)
        return {name: members[key] for members, key, name in self._places if name in wanted}

    @contextlib.contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the module holds other tensors; at its end it holds its own again, in the same order.

        Args:
            values: Replacements by the names of ``named_parameters()`` and ``named_buffers()``.
        """
        try:
            with uninterrupted():
                for members, key, name in self._places:
                    if name in values:
                        members[key] = values[name]
            yield
        finally:
            with uninterrupted():
                for members, own in zip(self._held, self._own, strict=True):
                    isolation.restore_members(members, own)
