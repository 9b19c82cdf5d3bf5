"""Limits of what is sent to an LM's server: requests at once, requests and tokens a minute. No DSPy, no I/O.

An account is a server and a key; it has one gate. LMs of an account may name different limits: requests with equal
ones wait in one lane, first in, first out, and all requests of the account count in each lane. Everything here is
called on one event loop, by `transport/outgoing`, which has the timer; lanes are made in any thread.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple
from weakref import WeakValueDictionary

from dspy_bridge.errors import Overloaded

# Accounts: their counts outlive the LMs, as the next LM of the account goes on with them.
_MOST_GATES = 1000
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

    def take(self, amount: float, now: float, *, into_debt: bool) -> None:
        """Take `amount`; without `into_debt` at most what is there."""
        before = max(self._full_at, now)
        after = before + amount / self._per_second
        if not into_debt:
            after = max(before, min(after, now + self._size / self._per_second))
        self._full_at = after


class Ticket:
    """A request, from its wait to the end of its answer. `gone`: done when it may go, or is refused."""

    def __init__(self, lane: Lane, deadline: float | None) -> None:
        """`deadline`: in seconds of the gate's clock; None for none."""
        self.lane = lane
        self.deadline = deadline
        self.gone: Future[None] = Future()
        self.running = False

    def settle(self, refusal: Overloaded | None = None) -> None:
        if self.gone.set_running_or_notify_cancel():
            self.gone.set_result(None) if refusal is None else self.gone.set_exception(refusal)


class Lane:
    """The requests of an account whose LMs name the same limits."""

    def __init__(self, gate: Gate, limits: Limits) -> None:
        self.gate = gate
        self.limits = limits
        self.waiting: OrderedDict[Ticket, None] = OrderedDict()
        self.requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute)
        self.tokens = None if limits.tokens_per_minute is None else Bucket(limits.tokens_per_minute)

    def wait(self, ahead: int) -> tuple[float, str]:
        """Seconds that a request with so many before it waits at least, and what for.

        For a place in flight no time is known.
        """
        now = self.gate.clock()
        waits = [(self.gate.paused_until - now, "its server, which asked for a pause")]
        if self.requests is not None:
            text = f"requests_per_minute ({self.limits.requests_per_minute:g})"
            waits.append((self.requests.wait(1 + ahead, now), text))
        if self.tokens is not None:
            text = f"tokens_per_minute ({self.limits.tokens_per_minute:g})"
            waits.append((self.tokens.wait(1, now), text))
        return max(waits)

    def is_full(self) -> bool:
        most = self.limits.max_in_flight
        return most is not None and self.gate.in_flight >= most


class Gate:
    """The requests to one server with one key. After each change `advance` must be called.

    `watched`: whether requests need a ticket; else nothing limits them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.watched = False
        self.in_flight = 0
        self.paused_until = 0.0
        # Those of LMs that are there, and of their requests.
        self._lanes: WeakValueDictionary[Limits, Lane] = WeakValueDictionary()

    def lanes(self) -> list[Lane]:
        """A copy: LMs are made in other threads, too."""
        return list(self._lanes.values())

    def lane(self, limits: Limits) -> Lane:
        """The lane of the LMs with these limits. From any thread, one at a time."""
        found = self._lanes.get(limits)
        if found is None:
            found = self._lanes[limits] = Lane(self, limits)
            self.watched = self.watched or limits != Limits()
        return found

    def enter(self, ticket: Ticket) -> None:
        """Take a place at the end of its lane, unless the wait would go past the deadline."""
        if (refusal := self._refusal(ticket, len(ticket.lane.waiting))) is not None:
            ticket.settle(refusal)
        else:
            ticket.lane.waiting[ticket] = None

    def leave(self, ticket: Ticket) -> None:
        """Give a place back, waiting or in flight. May be called again."""
        if ticket.running:
            ticket.running = False
            self.in_flight -= 1
        else:
            ticket.lane.waiting.pop(ticket, None)

    def pause(self, seconds: float) -> None:
        """Send nothing for `seconds`, as the server asked."""
        self.watched = True
        self.paused_until = max(self.paused_until, self.clock() + min(seconds, _LONGEST_PAUSE))

    def spend(self, tokens: int, own: Lane) -> None:
        """Count the tokens of an answer to a request of the lane `own`."""
        for lane in self.lanes():
            if lane.tokens is not None:
                # Others may send more than this lane ever would, which must not become a debt of hours.
                lane.tokens.take(tokens, self.clock(), into_debt=lane is own)

    def advance(self) -> float:
        """Let all go that may, and refuse the first of a lane if a change has made its deadline too early.

        Returns after how many seconds the next one may go, unless something changes before.
        """
        soonest = INFINITE
        for lane in self.lanes():
            while lane.waiting:
                ticket = next(iter(lane.waiting))
                if (refusal := self._refusal(ticket, 0)) is not None:
                    del lane.waiting[ticket]
                    ticket.settle(refusal)
                    continue
                if lane.is_full():
                    break
                if (seconds := lane.wait(0)[0]) > 0:
                    soonest = min(soonest, seconds)
                    break
                del lane.waiting[ticket]
                ticket.running = True
                self.in_flight += 1
                for each in self.lanes():
                    if each.requests is not None:
                        each.requests.take(1, self.clock(), into_debt=each is lane)
                ticket.settle()
        return soonest

    def _refusal(self, ticket: Ticket, ahead: int) -> Overloaded | None:
        if ticket.deadline is None:
            return None
        seconds, limit = ticket.lane.wait(ahead)
        left = max(0.0, ticket.deadline - self.clock())
        if seconds <= 0 or seconds <= left:
            return None
        return Overloaded(
            f"the LM's next request would have to wait {seconds:.1f} s for {limit}; {left:.1f} s are left"
        )


_lock = threading.Lock()


@lru_cache(_MOST_GATES)
def _gate(_account: bytes) -> Gate:
    return Gate()


def lane(account: str, limits: Limits) -> Lane:
    """The lane for an LM. `account`: what identifies the server and the key; it is not kept."""
    with _lock:
        return _gate(sha256(account.encode(errors="surrogatepass")).digest()).lane(limits)
