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
    """Delays an interrupt (SIGINT, Ctrl-C) until the block has finished. For short blocks that must run as a whole.

    In other threads than the main thread, which is the only one to be interrupted, and if interrupts are ignored, this
    does nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    missed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: missed.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if missed:
            handler(*missed[-1])
