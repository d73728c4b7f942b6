"""Sections that Ctrl-C does not come into the middle of."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["uninterrupted"]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """An interrupt inside is answered at the end: what tidies up, or is to be tidied up, is short and should be whole.

    Only the main thread is ever interrupted; in others, and where interrupts are ignored, nothing is done.
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
