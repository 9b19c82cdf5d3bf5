"""Connects to an LM within its `connect_timeout`, and says which host and port if that fails. Imports DSPy.

DSPy would try again for 7 to 13 s, and say neither. A server that is just being started may refuse at first: attempts
that fail at once are repeated. The timeout is that of all attempts together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import urlsplit

import dspy

from dspy_bridge.lm.lm_call import Target

T = TypeVar("T")

# In seconds. Each further delay is twice as long.
_FIRST_DELAY = 0.1
# A transport may take a timeout of 0 for none.
_SHORTEST = 0.001


class LMUnreachable(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """No connection to the LM's server. DSPy does not try again."""


async def connect(
    attempt: Callable[[float], Awaitable[T]], target: Target, url: str, failures: tuple[type[Exception], ...]
) -> T:
    """What `attempt(seconds)` returns, which may take so long to connect. Raises `LMUnreachable`.

    `failures`: what it raises if there is no connection.
    """
    end, delay = time.monotonic() + target.connect_timeout, _FIRST_DELAY
    while True:
        try:
            return await attempt(max(end - time.monotonic(), _SHORTEST))
        except failures as error:
            if not target.retries or time.monotonic() + delay >= end:
                parts = urlsplit(url)
                port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
                within = f"within {target.connect_timeout:g} s"
                raise LMUnreachable(f"{parts.hostname}:{port} cannot be reached {within}: {error}") from error
        await asyncio.sleep(delay)
        delay *= 2
