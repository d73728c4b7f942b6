"""Blocks that Ctrl-C does not interrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["uninterrupted"]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays an interrupt (SIGINT) within the block to its end. For short blocks that must run as a whole.

    Only the main thread is ever interrupted. In other threads, and where interrupts are ignored, this does nothing.
    """
    answer = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(answer):
        yield
        return
    missed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: missed.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, answer)
        if missed:
            answer(*missed[-1])
