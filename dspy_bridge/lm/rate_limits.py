"""Limits of what is sent to an LM's server: requests at once, requests and tokens a minute. No DSPy, no I/O.

Requests to one server with one key, by LMs that name the same limits, wait in one lane, first in, first out. A lane is
used on one event loop, by `transport/outgoing`, which has the timer; lanes are made in any thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from hashlib import sha256
from threading import Lock
from typing import NamedTuple

from dspy_bridge.errors import Overloaded

# Lanes: their counts outlive the LMs, as the next LM of the account goes on with them.
_MOST_LANES = 1000
# The longest pause that a server may ask for, in seconds: a day.
_LONGEST_PAUSE = 86_400.0
INFINITE = float("inf")


class Limits(NamedTuple):
    """What an LM names; None: no limit."""

    max_in_flight: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class Bucket:
    """A token bucket: full at first, refilled evenly with `per_minute`, which is also its size, but at least 1.

    It may go into debt.
    """

    def __init__(self, per_minute: float) -> None:
        self._per_second = per_minute / 60
        self._size = max(per_minute, 1.0)
        # When it is full again. One number does not drift, as a level would that is brought up to date.
        self._full_at = 0.0

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; not positive if it is."""
        return self._full_at - now - (self._size - amount) / self._per_second

    def take(self, amount: float, now: float) -> None:
        self._full_at = max(self._full_at, now) + amount / self._per_second


class Lane:
    """The requests to one server with one key and the same limits. After each change `advance` must be called.

    Each has a future, from its wait to the end of its answer, which is done when it may go, or is refused.
    `watched`: whether requests have to `enter`; else nothing limits them.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.clock = clock
        self.watched = limits != Limits()
        self.running: set[Future[None]] = set()
        # With their deadlines, in seconds of the clock; None for none.
        self._waiting: OrderedDict[Future[None], float | None] = OrderedDict()
        self._paused_until = 0.0
        self._requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute)
        self._tokens = None if limits.tokens_per_minute is None else Bucket(limits.tokens_per_minute)

    def enter(self, request: Future[None], deadline: float | None) -> None:
        """Take a place at the end, unless the wait would go past the deadline."""
        if (refusal := self._refusal(deadline, len(self._waiting))) is not None:
            _settle(request, refusal)
        else:
            self._waiting[request] = deadline

    def leave(self, request: Future[None]) -> None:
        """Give a place back, waiting or in flight. May be called again."""
        self.running.discard(request)
        self._waiting.pop(request, None)

    def pause(self, seconds: float) -> None:
        """Send nothing for `seconds`, as the server asked."""
        self.watched = True
        self._paused_until = max(self._paused_until, self.clock() + min(seconds, _LONGEST_PAUSE))

    def spend(self, tokens: int) -> None:
        """Count the tokens of an answer."""
        if self._tokens is not None:
            self._tokens.take(tokens, self.clock())

    def advance(self) -> float:
        """Let all go that may, and refuse the first if a change has made its deadline too early.

        Returns after how many seconds the next one may go, unless something changes before.
        """
        while self._waiting:
            request, deadline = next(iter(self._waiting.items()))
            refusal = self._refusal(deadline, 0)
            if refusal is None:
                if self.is_full():
                    break
                if (seconds := self.wait(0)[0]) > 0:
                    return seconds
                self.running.add(request)
                if self._requests is not None:
                    self._requests.take(1, self.clock())
            del self._waiting[request]
            _settle(request, refusal)
        return INFINITE

    def is_full(self) -> bool:
        return self.limits.max_in_flight is not None and len(self.running) >= self.limits.max_in_flight

    def wait(self, ahead: int) -> tuple[float, str]:
        """Seconds that a request with so many before it waits at least, and what for.

        For a place in flight no time is known.
        """
        now = self.clock()
        waits = [(self._paused_until - now, "its server, which asked for a pause")]
        if self._requests is not None:
            text = f"requests_per_minute ({self.limits.requests_per_minute:g})"
            waits.append((self._requests.wait(1 + ahead, now), text))
        if self._tokens is not None:
            text = f"tokens_per_minute ({self.limits.tokens_per_minute:g})"
            waits.append((self._tokens.wait(1, now), text))
        return max(waits)

    def _refusal(self, deadline: float | None, ahead: int) -> Overloaded | None:
        if deadline is None:
            return None
        seconds, limit = self.wait(ahead)
        left = max(0.0, deadline - self.clock())
        if seconds <= left:
            return None
        return Overloaded(
            f"the LM's next request would have to wait {seconds:.1f} s for {limit}; {left:.1f} s are left"
        )


def _settle(request: Future[None], refusal: Overloaded | None) -> None:
    if request.set_running_or_notify_cancel():
        request.set_result(None) if refusal is None else request.set_exception(refusal)


_lock = Lock()


def lane(account: str, limits: Limits) -> Lane:
    """The lane for an LM. `account`: what identifies the server and the key; it is not kept."""
    with _lock:
        return _lane(sha256(account.encode(errors="surrogatepass")).digest(), limits)


@lru_cache(_MOST_LANES)
def _lane(_account: bytes, limits: Limits) -> Lane:
    return Lane(limits)
