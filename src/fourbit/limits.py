"""Limits for what comes from a stranger: JSON of any depth, and code or patterns that never end.

Chat templates and the patterns in adapters are small programs. Python runs them, so a signal can end
them, and the operating system can refuse them memory; `limited` arranges both.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Levels of lists and objects in JSON: what walks through it afterwards needs a few frames for each.
DEEPEST_JSON = 100
#: Seconds of its own processor time, and bytes of memory, that a program of a stranger may take; those of
#: real models need milliseconds and kilobytes.
SECONDS, MEMORY = 10.0, 1 << 30

_LOOK_EVERY = 0.25  # seconds of the process's time


class LimitError(Exception):
    """A limit was reached; the message says which."""


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with one class of error for whatever is wrong: ValueError.

    Malformed text raises its subclass JSONDecodeError; too deep nesting, a number of thousands of digits
    and text that is not UTF-8 raise others.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise ValueError for parsed JSON deeper than `DEEPEST_JSON`."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list) and item]:
        depth += 1
        if depth > DEEPEST_JSON:
            raise ValueError("nested too deeply")
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]


@contextmanager
def limited() -> Iterator[None]:
    """Raise LimitError in a block that takes more than `SECONDS` of this thread's time or `MEMORY` more.

    Only the main thread can be limited: signals go to it, and the memory limit is the whole process's.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield
        return
    end = time.thread_time() + SECONDS

    def look(_: int, __: FrameType | None) -> None:
        if time.thread_time() > end:
            raise LimitError(f"it ran for more than {SECONDS:g} s")

    before = signal.signal(signal.SIGVTALRM, look)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _LOOK_EVERY, _LOOK_EVERY)
        with limited_memory():
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Raise LimitError in a block in which the process takes more than `MEMORY` more."""
    try:
        with _limited_addresses():
            yield
    except MemoryError:
        raise LimitError(f"it took more than {MEMORY >> 20:,} MiB of memory") from None


@contextmanager
def _limited_addresses() -> Iterator[None]:
    """Addresses, not touched pages, are what a system can limit; Linux alone tells how many there are."""
    pages = _address_pages()
    if pages is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + MEMORY
    limits = [limit for limit in (soft, hard, wanted) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_pages() -> int | None:
    """Asked for every conversation that a template renders, so without pathlib's detours."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as status:
            return int(status.read().split()[0])
    except OSError:
        return None
