"""Connections to LMs are kept open for the next call, and each is a descriptor: when these run out, idle ones go.

Without that a burst of calls that reached the limit left nothing for anybody else, for good. No DSPy here.
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

# All LMs with connections of their own; they are made in any thread.
_lms: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()
_RAN_OUT = (errno.EMFILE, errno.ENFILE)
_TEXTS = tuple(os.strerror(number) for number in _RAN_OUT)
# A name is looked up with a few descriptors, and without them "not found".
_FEW = 8


class Use:
    """How many calls an LM has under way; its copies, which share its connections, share this too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._close_after = False
        # Event loops that it was called on: each has connections of its own.
        self._loops: list[asyncio.AbstractEventLoop] = []

    def __reduce__(self) -> Any:
        """A deep copy of an LM opens connections of its own."""
        return Use, ()

    @contextmanager
    def call(self) -> Iterator[None]:
        """For as long as a call runs. Any thread."""
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
        """Those that it was called on."""
        with self._lock:
            return list(self._loops)

    def may_close(self) -> bool:
        """Whether nothing is under way, so that all connections are idle; if not, they are to be closed after that."""
        with self._lock:
            self._close_after = self._count > 0
            return self._count == 0

    def to_close(self) -> bool:
        """Whether the last call is over that kept connections from being closed. True once."""
        with self._lock:
            if self._count > 0 or not self._close_after:
                return False
            self._close_after = False
            return True


def register(lm: Any) -> None:
    """`lm`: with a `use` and an `aclose()`, which closes its connections; it may be called again afterwards."""
    with _lock:
        _lms.add(lm)


async def close_idle() -> None:
    """Close the connections of all LMs that nobody is calling."""
    with _lock:
        lms = list(_lms)
    for lm in lms:
        if lm.use.may_close():
            await close(lm)


async def close(lm: Any) -> None:
    """Close the connections of an LM that nobody is calling, on each event loop that has some."""
    here = asyncio.get_running_loop()
    for loop in lm.use.loops() or [here]:
        with suppress(Exception):  # connections that were broken already
            closing = lm.aclose()
            await (closing if loop is here else asyncio.wrap_future(asyncio.run_coroutine_threadsafe(closing, loop)))


def ran_out(error: BaseException | None) -> bool:
    """Whether it was raised for want of descriptors: what was to be opened was not, and nothing was sent."""
    # User code that raises one exception object again and again makes a ring of what led to it.
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
    """Fewer than that."""
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
