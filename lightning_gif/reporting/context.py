"""The context of a report: what it needs from the trainer after the call has returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, overload

from ..data.names import Vocabulary
from ..distributed import SINGLE_PROCESS, ProcessGroup

__all__ = ["CallContext", "ContextAttribute"]


T = TypeVar("T")


@dataclass
class CallContext:
    """What a report needs from the trainer. A report loaded from a file has only ``global_step`` and ``class_names``.

    Attributes:
        loggers: The loggers that ``report.log()`` uses by default.
        global_step: The number of the trainer's optimizer steps at the time of the call.
        processes: The process group. Each process has the report, and the first one writes files.
        class_names: The name of each class, in the order of the labels; ``None`` if they are not known.
        vocabulary: The tokens of texts by their ids; ``None`` shows ids.
        epoch: The number of the trainer's epochs at the time of the call; ``None`` if it is not known.
        predicted: The predicted labels of the shown training examples by dataset index, for loggers.
    """

    loggers: Sequence[Any] = ()
    global_step: int = 0
    processes: ProcessGroup = SINGLE_PROCESS
    class_names: Sequence[str] | None = None
    vocabulary: Vocabulary | None = None
    epoch: int | None = None
    predicted: dict[int, int] = field(default_factory=dict)


class _HasContext(Protocol):
    @property
    def context(self) -> Any: ...


class ContextAttribute(Generic[T]):
    """An attribute of a report that is stored in its ``context``. It can be set even if the report is frozen."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, report: None, owner: type) -> ContextAttribute[T]: ...
    @overload
    def __get__(self, report: _HasContext, owner: type) -> T: ...
    def __get__(self, report: _HasContext | None, owner: type) -> ContextAttribute[T] | T:
        return self if report is None else getattr(report.context, self._name)

    def __set__(self, report: _HasContext, value: T) -> None:
        setattr(report.context, self._name, value)
