"""Closes idle connections to LMs, which are kept open for the next call, when file descriptors run out.

Else a burst of calls that reached the limit would leave no descriptor for anything else, for good. No DSPy here.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# All LMs with connections of their own, created in any thread.
_lms: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()
_RAN_OUT = (errno.EMFILE, errno.ENFILE)
_TEXTS = tuple(os.strerror(number) for number in _RAN_OUT)
# Looking up a host name takes a few descriptors; without them the name is "not found".
_FEW = 8


class Use:
    """Counts the calls of an LM in flight. Its copies share its connections, and this."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._close_after = False
        # Each event loop that it was called on has connections of its own.
        self._loops: list[asyncio.AbstractEventLoop] = []

    def __reduce__(self) -> Any:
        """A deep copy of an LM opens connections of its own."""
        return Use, ()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call, on any thread."""
        with self._lock:
            self._count += 1
            with suppress(RuntimeError):  # a call without a loop
                if (loop := asyncio.get_running_loop()) not in self._loops:
                    self._loops.append(loop)
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1

    def loops(self) -> list[asyncio.AbstractEventLoop]:
        """The event loops that it was called on."""
        with self._lock:
            return list(self._loops)

    def may_close(self) -> bool:
        """Whether no call is in flight; if one is, `to_close` is true once after the last."""
        with self._lock:
            self._close_after = self._count > 0
            return self._count == 0

    def to_close(self) -> bool:
        """Whether connections are to be closed that a call kept open. True once."""
        with self._lock:
            if self._count > 0 or not self._close_after:
                return False
            self._close_after = False
            return True


def register(lm: Any) -> None:
    """Add an LM with a `use` and an `aclose()`, which closes its connections and leaves it usable."""
    with _lock:
        _lms.add(lm)


async def close_idle() -> None:
    """Close the connections of all LMs without a call in flight."""
    with _lock:
        lms = list(_lms)
    for lm in lms:
        if lm.use.may_close():
            await close(lm)


async def close(lm: Any) -> None:
    """Close the connections of an LM without a call in flight, on each event loop that has some."""
    here = asyncio.get_running_loop()
    for loop in lm.use.loops() or [here]:
        with suppress(Exception):  # connections that were broken already
            closing = lm.aclose()
            await (closing if loop is here else asyncio.wrap_future(asyncio.run_coroutine_threadsafe(closing, loop)))


def ran_out(error: BaseException | None) -> bool:
    """Whether an error came of missing descriptors: then no connection was opened and nothing was sent."""
    # User code that raises one exception object again and again makes a ring of causes.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError):
            if error.errno in _RAN_OUT or any(text in str(error) for text in _TEXTS):
                return True
            if isinstance(error, socket.gaierror) and _few_are_left():
                return True
        error = error.__cause__ or error.__context__
    return False


def _few_are_left() -> bool:
    """Whether fewer than `_FEW` descriptors are free."""
    taken: list[int] = []
    try:
        for _ in range(_FEW):
            taken.append(os.dup(2))
    except OSError:
        return True
    finally:
        for fd in taken:
            os.close(fd)
    return False
