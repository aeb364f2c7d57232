"""Ctrl-C and SIGTERM as a question that the loop asks where it can stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM sets a flag that the loop reads; the same once more stops at once.

    Not another one: torchrun sends SIGTERM to processes that a terminal has sent SIGINT.
    """
    raised: set[int] = set()

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum in raised:
            raise KeyboardInterrupt
        raised.add(signum)

    if threading.current_thread() is not threading.main_thread():  # signals are not ours to catch
        yield lambda: False
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(raised)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
