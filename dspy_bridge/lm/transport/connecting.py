"""Connects to an LM within its `connect_timeout`, and says which host and port if that fails. Imports DSPy.

DSPy would try again for 7 to 13 s, and say neither. A server that is just being started may refuse at first: attempts
that fail at once are repeated within the timeout.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import dspy

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.transport import asking, connections

_FIRST_DELAY = 0.1


class LMUnreachable(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """No connection to the LM's server. DSPy does not try again."""


def timeout() -> float | None:
    """Seconds that connecting may take, in the LM call under way; None for an LM that is not ours."""
    asked = asking.current.get()
    return None if asked is None else asked.connect_timeout


def failures() -> tuple[type[Exception], ...]:
    """What DSPy's own transports raise if there is no connection."""
    return tuple(name.value for name in dspy_internals.CONNECT_FAILURES if name.there)


def connect(attempt: Callable[[], Any], url: str, failures: tuple[type[Exception], ...]) -> Any:
    """What `attempt()` returns, on a thread. `failures`: what it raises if there is no connection.

    Raises `LMUnreachable`.
    """
    delays = _delays()
    while True:
        try:
            return attempt()
        except failures as error:
            if connections.ran_out(error):
                raise
            if (delay := next(delays, None)) is None:
                raise _unreachable(url, error) from error
            time.sleep(delay)


async def aconnect(attempt: Callable[[], Awaitable[Any]], url: str, failures: tuple[type[Exception], ...]) -> Any:
    """As `connect`, on an event loop."""
    delays = _delays()
    while True:
        try:
            return await attempt()
        except failures as error:
            if connections.ran_out(error):
                raise
            if (delay := next(delays, None)) is None:
                raise _unreachable(url, error) from error
            await asyncio.sleep(delay)


def _delays() -> Iterator[float]:
    """Seconds to wait before each further attempt."""
    asked = asking.current.get()
    if asked is None or not asked.retries:
        return
    end = time.monotonic() + asked.connect_timeout
    delay = _FIRST_DELAY
    while time.monotonic() + delay < end:
        yield delay
        delay *= 2


def _unreachable(url: str, error: Exception) -> LMUnreachable:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    within = "" if (seconds := timeout()) is None else f" within {seconds:g} s"
    return LMUnreachable(f"{parts.hostname}:{port} cannot be reached{within}: {error}")
