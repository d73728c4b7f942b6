"""The processes that share out the work of a pass over examples, and how their parts come together."""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import errors
from ._compat import trainer_of
from .errors import ConfigurationError, GIFError, RankError

if TYPE_CHECKING:
    from ._compat import Trainer

__all__ = ["SINGLE_PROCESS", "ProcessGroup"]


T = TypeVar("T")


class ProcessGroup:
    """The processes of a trainer, of which this is one; with one process everything here gives back what it gets.

    All processes do the same things in the same order, each on its part of the examples, and meet where parts are put
    together. Each meeting begins with a few numbers that tell whether all are well and about to do the same. Inside of
    :meth:`propagate_errors` a process that fails anywhere joins the next meeting of the others with its error, so that
    they stop too instead of waiting.

    Args:
        rank: Which of the processes this is.
        size: How many there are.
        here: How many of them are on this machine.
        device: Where tensors are put for the others.
    """

    def __init__(self, rank: int = 0, size: int = 1, here: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.here = rank, size, here
        self._device = torch.device("cpu") if device is None else device
        self._failed = False  # the others know of an error, or are gone

    @classmethod
    def of(cls, trainer: Trainer) -> ProcessGroup:
        """Those of a trainer.

        Raises:
            ConfigurationError: If it has several that are not running yet.
        """
        if trainer.world_size == 1:
            return SINGLE_PROCESS
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigurationError(
                f"The trainer has {trainer.world_size} processes, which its first run starts. Call trainer.fit or"
                " trainer.validate before, with a GIFCallback among its callbacks; for attach() without a run, use a"
                " Trainer with devices=1."
            )
        return cls(dist.get_rank(), dist.get_world_size(), trainer.num_devices, trainer.strategy.root_device)

    @classmethod
    def of_module(cls, module: nn.Module) -> ProcessGroup:
        """Those that hold copies of a module; this one alone if it has no trainer, or one that runs in no others."""
        trainer = trainer_of(module)
        if trainer is None or trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return SINGLE_PROCESS
        return cls.of(trainer)

    def shard(self, count: int) -> tuple[int, int]:
        """Where the part of this process in ``count`` things starts and stops; parts differ by one at most."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    # ----------------------------------------------------------------------------------------------------------------
    # Collectives
    # ----------------------------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a tensor of one shape and dtype, whose memory may be used for it."""
        if self.size == 1:
            return tensor
        self._synchronise(f"{_caller()}: sum of {tensor.dtype} {list(tensor.shape)}")
        total = tensor.detach().to(self._device).contiguous()
        self._call(dist.all_reduce, total)
        return total.to(tensor.device)

    def total(self, value: float) -> float:
        """The sum over all processes of a number."""
        return value if self.size == 1 else float(self.sum(torch.tensor(value, dtype=torch.float64)))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order: plain ones, or tensors on the CPU, in any structure."""
        if self.size == 1:
            return [value]
        self._synchronise(f"{_caller()}: gather")
        found: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, found, value)
        return found

    def broadcast(self, value: T) -> T:
        """The value of the first process, see :meth:`gather`."""
        if self.size == 1:
            return value
        self._synchronise(f"{_caller()}: first")
        found: list[Any] = [value]
        self._call(dist.broadcast_object_list, found, src=0, device=self._device)
        return found[0]

    def interleave(self, values: Iterable[T]) -> Iterator[T]:
        """One value of each process after the other, until there are none; of ``None`` there must not be any."""
        if self.size == 1:
            yield from values
            return
        own = iter(values)
        while found := [value for value in self.gather(next(own, None)) if value is not None]:
            yield from found

    def assert_equal(self, value: Any, what: str, remedy: str) -> None:
        """Makes sure that all processes have the same plain value.

        Raises:
            ConfigurationError: If not, on all of them.
        """
        values = self.gather(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise ConfigurationError(
                f"All processes must be given the same {what}, but rank {', '.join(map(str, others))} has another than"
                f" rank 0. {remedy}"
            )

    # ----------------------------------------------------------------------------------------------------------------
    # Errors
    # ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """Inside of it an error of one process is one of all; at its end all have come through.

        Raises:
            GIFError: Of the kind that another process raised, if it was one; else a
                :class:`~lightning_gif.errors.RankError`. Both name that process.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
            self._synchronise("end")
        except BaseException as error:
            if not self._failed:
                with contextlib.suppress(RankError):
                    self._synchronise("error", error)
            raise

    def _synchronise(self, what: str, error: BaseException | None = None) -> None:
        """What each exchange begins with.

        Args:
            what: What is to come.
            error: Why it is not.
        """
        mark = zlib.crc32(what.encode())
        told = torch.tensor([error is not None, mark, -mark], dtype=torch.int64, device=self._device)
        self._call(dist.all_reduce, told, op=dist.ReduceOp.MAX)
        failed, most, least = told.tolist()
        if failed:
            self._failed = True
            found: list[Any] = [None] * self.size
            own = None if error is None else (type(error).__name__, str(error))
            self._call(dist.all_gather_object, found, own)
            if error is None:
                rank = next(rank for rank, other in enumerate(found) if other is not None)
                raise _of_another(rank, *found[rank])
        elif most != -least:
            self._failed = True
            raise RankError(
                f"The processes are out of step: this one, rank {self.rank}, was about to do {what!r}, another one"
                " something else. Do the same calls with the same arguments on all of them; functions that are passed"
                " in (a strategy, a selector, a predicate) must not decide by the rank, by time or by chance."
            )

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except RuntimeError as error:  # that of any backend is one
            self._failed = True
            lines = str(error).splitlines() or [type(error).__name__]
            raise RankError(
                f"Rank {self.rank} cannot reach the other processes: one has ended, or did not answer within the time"
                f" limit of the process group ({lines[0][:200]}). No weight was changed. Look at what the others wrote"
                " last, and start anew."
            ) from error


def _caller() -> str:
    """The function that calls the one that calls this: what is put together there is of one kind on all processes."""
    return sys._getframe(2).f_code.co_name


def _of_another(rank: int, kind: str, text: str) -> GIFError:
    """The error of another process as one of this."""
    if kind in errors.__all__ and issubclass(found := getattr(errors, kind), GIFError):
        return found(f"Rank {rank}: {text}")
    reason = f"{kind}: {text}" if text else kind
    return RankError(f"Rank {rank} failed, and so all stop; no weight was changed. Its error: {reason}")


SINGLE_PROCESS = ProcessGroup()
"""One process."""
