"""Connects to an LM within its `connect_timeout`, and says which host and port if that fails. Imports DSPy.

DSPy would try again for 7 to 13 s, and say neither. A server that is just being started may refuse at first: attempts
that fail at once are repeated. The timeout is that of all attempts together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import dspy

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.transport import asking

# In seconds. Each further delay is twice as long.
_FIRST_DELAY = 0.1
# A transport may take a timeout of 0 for none.
_SHORTEST = 0.001


class LMUnreachable(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """No connection to the LM's server. DSPy does not try again."""


def failures() -> tuple[type[Exception], ...]:
    """What DSPy's own transports raise if there is no connection."""
    return tuple(name.value for name in dspy_internals.CONNECT_FAILURES if name.there)


def connect(attempt: Callable[[float | None], Any], url: str, failures: tuple[type[Exception], ...]) -> Any:
    """What `attempt(seconds)` returns, on a thread. `failures`: what it raises if there is no connection.

    `seconds` is how long it may take to connect; None for an LM that is not ours. Raises `LMUnreachable`.
    """
    attempts = _Attempts()
    while True:
        try:
            return attempt(attempts.left())
        except failures as error:
            if (delay := attempts.next_delay()) is None:
                raise attempts.unreachable(url, error) from error
            time.sleep(delay)


async def aconnect(
    attempt: Callable[[float | None], Awaitable[Any]], url: str, failures: tuple[type[Exception], ...]
) -> Any:
    """As `connect`, on an event loop."""
    attempts = _Attempts()
    while True:
        try:
            return await attempt(attempts.left())
        except failures as error:
            if (delay := attempts.next_delay()) is None:
                raise attempts.unreachable(url, error) from error
            await asyncio.sleep(delay)


class _Attempts:
    """The attempts to connect for one request, which share the `connect_timeout`."""

    def __init__(self) -> None:
        self._asked = asking.current.get()
        self._begun = time.monotonic()
        self._delay = _FIRST_DELAY

    def left(self) -> float | None:
        """How long the next attempt may take, in seconds."""
        if self._asked is None:
            return None
        return max(self._begun + self._asked.connect_timeout - time.monotonic(), _SHORTEST)

    def next_delay(self) -> float | None:
        """Seconds to wait before the next attempt; None if there is none."""
        asked, delay = self._asked, self._delay
        if asked is None or not asked.retries or time.monotonic() + delay >= self._begun + asked.connect_timeout:
            return None
        self._delay *= 2
        return delay

    def unreachable(self, url: str, error: Exception) -> LMUnreachable:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        within = "" if self._asked is None else f" within {self._asked.connect_timeout:g} s"
        return LMUnreachable(f"{parts.hostname}:{port} cannot be reached{within}: {error}")
