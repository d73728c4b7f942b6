"""The process group of a distributed run: dividing work, combining results, and passing on errors."""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import errors
from ._compat import trainer_of
from .errors import ConfigurationError, GIFError, RankError
from .sharding import is_sharded

if TYPE_CHECKING:
    from ._compat import Trainer

__all__ = ["SINGLE_PROCESS", "ProcessGroup"]


T = TypeVar("T")

# The attribute of an error that the other processes have heard of, or cannot hear of.
_IS_KNOWN = "_gif_is_known_to_all_processes"


class ProcessGroup:
    """The processes of a trainer, seen from one of them. With one process, collectives do nothing.

    All processes make the same calls in the same order, each on its shard of the examples. Each collective begins by
    exchanging three numbers. They show whether any process has failed and whether all are at the same call. If a
    process fails inside :meth:`propagate_errors`, it joins the next collective with its error. So the others stop
    instead of waiting for it.

    Args:
        rank: The number of this process.
        size: The number of processes.
        here: The number of processes on this machine.
        device: The device of exchanged tensors; by default the CPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, here: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.here = rank, size, here
        self._device = torch.device("cpu") if device is None else device
        self._failed = False  # whether the other processes know of an error, or have ended

    @classmethod
    def of(cls, trainer: Trainer) -> ProcessGroup:
        """The process group of a trainer.

        Raises:
            ConfigurationError: If the trainer has several processes, and they are not running.
        """
        if trainer.world_size == 1:
            return SINGLE_PROCESS
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigurationError(
                f"The trainer has {trainer.world_size} processes, which start with its first run. Call trainer.fit or"
                " trainer.validate first, with a GIFCallback among its callbacks. For attach() without a run, use a"
                " Trainer with devices=1."
            )
        return cls(dist.get_rank(), dist.get_world_size(), trainer.num_devices, trainer.strategy.root_device)

    @classmethod
    def of_weights(cls, weights: nn.Module | Mapping[str, Tensor]) -> ProcessGroup:
        """The processes that hold copies or parts of the weights of a module.

        It is one process for a ``state_dict``, and if the module has no trainer, or its processes are not running.
        """
        trainer = trainer_of(weights)
        if trainer is None or trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return SINGLE_PROCESS
        return cls.of(trainer)

    def shard(self, count: int) -> tuple[int, int]:
        """This process's shard of ``count`` items, as ``start, stop``.

        The shards of all processes partition the items, and their sizes differ by at most one.
        """
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    # ----------------------------------------------------------------------------------------------------------------
    # Collectives
    # ----------------------------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes. Shape and dtype must be equal. The tensor may be overwritten."""
        if self.size == 1:
            return tensor
        self._synchronise(f"{_caller()}: sum of {tensor.dtype} {list(tensor.shape)}")
        total = tensor.detach().to(self._device).contiguous()
        self._call(dist.all_reduce, total)
        return total.to(tensor.device)

    def meet(self) -> None:
        """Waits for all processes, so that none waits longer for a later collective than a process group allows."""
        if self.size > 1:
            self._synchronise("meet")

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return value if self.size == 1 else float(self.sum(torch.tensor(value, dtype=torch.float64)))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. A value is any structure of plain values and CPU tensors."""
        if self.size == 1:
            return [value]
        self._synchronise(f"{_caller()}: gather")
        values: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on all processes. It may have the same types as for :meth:`gather`."""
        if self.size == 1:
            return value
        self._synchronise(f"{_caller()}: broadcast")
        values: list[Any] = [value]
        self._call(dist.broadcast_object_list, values, src=0, device=self._device)
        return values[0]

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor with all its entries, if it is sharded; any other tensor as it is. All processes must call it."""
        if not is_sharded(tensor):
            return tensor
        if self.size > 1:
            self._synchronise(f"{_caller()}: all parts of {tensor.dtype} {list(tensor.shape)}")
        return self._call(tensor.detach().full_tensor)  # type: ignore[attr-defined]

    def interleave(self, values: Iterable[T]) -> Iterator[T]:
        """One value of each process in turn, until all are exhausted. No value may be ``None``."""
        if self.size == 1:
            yield from values
            return
        own = iter(values)
        while turn := [value for value in self.gather(next(own, None)) if value is not None]:
            yield from turn

    def assert_equal(self, value: Any, what: str, remedy: str) -> None:
        """Checks that a plain value is the same on all processes.

        Args:
            value: The value of this process.
            what: The name of the value in the message.
            remedy: What the user can do about a difference, for the message.

        Raises:
            ConfigurationError: On all processes, if a value differs from that of rank 0.
        """
        values = self.gather(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise ConfigurationError(
                f"All processes must have the same {what}, but rank {', '.join(map(str, others))} differs from rank 0."
                f" {remedy}"
            )

    # ----------------------------------------------------------------------------------------------------------------
    # Errors
    # ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """If any process raises inside the block, every process raises. Ends with a barrier.

        Raises:
            GIFError: If another process raised one. It has the same class, and a message that names the process.
            RankError: If another process raised any other error, or has ended.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
            self._synchronise("end")
        except BaseException as error:
            # Another object for the same processes may have sent it to them, inside the block.
            if not self._failed and not getattr(error, _IS_KNOWN, False):
                with contextlib.suppress(RankError):
                    self._synchronise("error", error)
            setattr(error, _IS_KNOWN, True)
            raise

    def _synchronise(self, what: str, error: BaseException | None = None) -> None:
        """Checks that no process has failed, and that all are at the same collective.

        Args:
            what: The next operation of this process.
            error: The error of this process, if it has failed.

        Raises:
            GIFError: If another process has failed.
            RankError: If another process is at another operation.
        """
        mark = zlib.crc32(what.encode())
        status = torch.tensor([error is not None, mark, -mark], dtype=torch.int64, device=self._device)
        self._call(dist.all_reduce, status, op=dist.ReduceOp.MAX)
        failed, most, least = status.tolist()
        if failed:
            self._failed = True
            raised: list[Any] = [None] * self.size
            own = None if error is None else (type(error).__name__, str(error), _base_of(error))
            self._call(dist.all_gather_object, raised, own)
            if error is None:
                rank = next(rank for rank, other in enumerate(raised) if other is not None)
                raise _known(_error_of_rank(rank, *raised[rank]))
        elif most != -least:  # the maximum and the minimum of the marks
            self._failed = True
            raise _known(
                RankError(
                    f"The processes are out of step: rank {self.rank} is at {what!r}, and another one is not. Make the"
                    " same calls with the same arguments on all processes. Functions that you pass in (a strategy, a"
                    " selector, a predicate) must not depend on the rank, on time or on chance."
                )
            )

    def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls a collective of ``torch.distributed``.

        Raises:
            RankError: If it fails. (All backends then raise a ``RuntimeError``.)
        """
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            self._failed = True
            lines = str(error).splitlines() or [type(error).__name__]
            raise _known(
                RankError(
                    f"Rank {self.rank} cannot reach the other processes: one has ended, or did not answer within the"
                    f" time limit of the process group ({lines[0][:200]}). No weight was changed. See the last output"
                    " of the other processes, and start again."
                )
            ) from error


def _known(error: GIFError) -> GIFError:
    """Marks an error that the other processes have heard of, or cannot hear of."""
    setattr(error, _IS_KNOWN, True)
    return error


def _caller() -> str:
    """The name of the function that called a collective, which tells different collectives apart."""
    return sys._getframe(2).f_code.co_name


def _base_of(error: BaseException) -> type[Exception] | None:
    """A built-in base class of an error, which other processes have, too; ``None`` for an interrupt or an exit."""
    return next((base for base in (OSError, Exception) if isinstance(error, base)), None)


def _error_of_rank(rank: int, kind: str, text: str, base: type[Exception] | None) -> GIFError:
    """The error to raise on this process for an error of another process.

    Args:
        rank: The rank of the other process.
        kind: The name of the class of its error.
        text: The message of its error.
        base: See :func:`_base_of`.
    """
    if kind in errors.__all__ and issubclass(error := getattr(errors, kind), GIFError):
        return error(f"Rank {rank}: {text}")
    reason = f"{kind}: {text}" if text else kind
    failure = RankError(f"Rank {rank} failed, so all processes stop. No weight was changed. Its error: {reason}")
    failure.raised_elsewhere = base
    return failure


SINGLE_PROCESS = ProcessGroup()
"""The process group of one process."""
