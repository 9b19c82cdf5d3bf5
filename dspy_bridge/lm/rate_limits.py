"""Limits of what is sent to an LM's server: requests at once, requests and tokens a minute. No DSPy, no I/O.

An account is a server and a key. Each LM keeps the limits that it names, and all requests of the account count toward
them. LMs of an account with equal limits share a `Gate`, where requests wait in their order.

aiolimiter and its like live on one event loop, while LMs are called on two and in threads; they know no debt, and
cannot say how long a wait will be.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from typing import Any, NamedTuple

from dspy_bridge.errors import Overloaded
from dspy_bridge.lm.token_bucket import Bucket

# How many gates are remembered for LMs that are gone: the next LM of that account goes on with their counts.
_REMEMBERED = 1000
# The longest pause that a server may ask for, in seconds: a day.
_LONGEST_PAUSE = 86_400.0
INFINITE = float("inf")


class Limits(NamedTuple):
    """What an LM names; None: no limit."""

    max_in_flight: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class Ticket:
    """A request to the server, from its wait to the end of its answer.

    `deadline`: in seconds of the account's clock; None for none. `wake`: called, on any thread, when `Gate.poll` may
    have news; it must not block.
    """

    __slots__ = ("_refused", "_running", "deadline", "wake")

    def __init__(self, deadline: float | None, wake: Callable[[], object]) -> None:
        self.deadline = deadline
        self.wake = wake
        self._running = False
        self._refused: str | None = None


class Account:
    """The requests to one server with one key. Its lock is also that of its gates.

    `watched`: whether requests need a ticket; else nothing limits them. `counts_tokens`: whether `Gate.spend` does.
    """

    def __init__(self, key: bytes = b"", clock: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        self.watched = False
        self.counts_tokens = False
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight = 0
        self._paused_until = 0.0
        self._gates: weakref.WeakValueDictionary[Limits, Gate] = weakref.WeakValueDictionary()

    def gate(self, limits: Limits) -> Gate:
        """The gate of the LMs with these limits."""
        with self._lock:
            gate = self._gates.get(limits)
            if gate is None:
                gate = self._gates[limits] = Gate(self, limits)
                self.watched = self.watched or limits != _NO_LIMITS
                self.counts_tokens = self.counts_tokens or limits.tokens_per_minute is not None
        return gate

    def pause(self, seconds: float) -> None:
        """Send nothing for `seconds`, as the server asked."""
        with self._lock:
            self.watched = True
            self._paused_until = max(self._paused_until, self._clock() + min(seconds, _LONGEST_PAUSE))
            for gate in list(self._gates.values()):
                gate._refuse_the_late()


class Gate:
    """Where requests of an account wait for the same limits, first in, first out. From any thread."""

    def __init__(self, account: Account, limits: Limits) -> None:
        self.account = account
        self.limits = limits
        self._requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute)
        self._tokens = None if limits.tokens_per_minute is None else Bucket(limits.tokens_per_minute)
        self._waiting: OrderedDict[Ticket, None] = OrderedDict()

    def __reduce__(self) -> Any:
        """Copies of an LM have the same one."""
        return _find, (self.account.key, self.limits)

    def enter(self, ticket: Ticket) -> None:
        """Take a place at the end of the queue. Raises `Overloaded` if the wait would go past the deadline."""
        with self.account._lock:
            if (refusal := self._refusal(ticket, len(self._waiting))) is not None:
                raise Overloaded(refusal)
            self._waiting[ticket] = None

    def poll(self, ticket: Ticket) -> float:
        """0.0 once the request may be sent; else for how many seconds there is no news, unless it is woken.

        Raises `Overloaded` if the wait would go past the deadline.
        """
        account = self.account
        with account._lock:
            if ticket._refused is not None:
                raise Overloaded(ticket._refused)
            if next(iter(self._waiting)) is not ticket:
                return INFINITE
            now = account._clock()
            if (refusal := self._refusal(ticket, 0)) is not None:
                self._remove(ticket)
                raise Overloaded(refusal)
            if (seconds := self._wait(0, now)[0]) > 0:
                return seconds
            if self._full:
                return INFINITE
            ticket._running = True
            account._in_flight += 1
            for gate in list(account._gates.values()):
                gate._count(gate._requests, 1, now, gate is self)
            self._remove(ticket)
        return 0.0

    def leave(self, ticket: Ticket) -> None:
        """Give a place back, in the queue or in flight. May be called again."""
        account = self.account
        with account._lock:
            if ticket in self._waiting:
                self._remove(ticket)
            elif ticket._running:
                ticket._running = False
                account._in_flight -= 1
                for gate in list(account._gates.values()):
                    if gate.limits.max_in_flight is not None:
                        gate._wake_first()

    def spend(self, tokens: int) -> None:
        """Count the tokens of an answer to a request of this gate."""
        with self.account._lock:
            now = self.account._clock()
            for gate in list(self.account._gates.values()):
                gate._count(gate._tokens, tokens, now, gate is self)

    # With the lock.

    def _count(self, bucket: Bucket | None, amount: float, now: float, own: bool) -> None:
        if bucket is None:
            return
        if own:
            bucket.take(amount, now)
        else:
            # Others may send more than this gate ever would, which must not become a debt of hours.
            bucket.take_some(amount, now)
        if not own or bucket is self._tokens:
            self._refuse_the_late()

    @property
    def _full(self) -> bool:
        most = self.limits.max_in_flight
        return most is not None and self.account._in_flight >= most

    def _remove(self, ticket: Ticket) -> None:
        del self._waiting[ticket]
        self._wake_first()

    def _wake_first(self) -> None:
        if self._waiting:
            next(iter(self._waiting)).wake()

    def _wait(self, ahead: int, now: float) -> tuple[float, str]:
        """Seconds that a request with so many before it waits at least, and what for.

        For a place in flight no time is known.
        """
        waits = [(self.account._paused_until - now, "its server, which asked for a pause")]
        if self._requests is not None:
            text = f"requests_per_minute ({self.limits.requests_per_minute:g})"
            waits.append((self._requests.wait(1 + ahead, now), text))
        if self._tokens is not None:
            text = f"tokens_per_minute ({self.limits.tokens_per_minute:g})"
            waits.append((self._tokens.wait(1, now), text))
        return max(waits)

    def _refusal(self, ticket: Ticket, ahead: int) -> str | None:
        if ticket.deadline is None:
            return None
        now = self.account._clock()
        seconds, limit = self._wait(ahead, now)
        if seconds <= 0 or now + seconds <= ticket.deadline:
            return None
        left = max(0.0, ticket.deadline - now)
        return f"the LM's next request would have to wait {seconds:.1f} s for {limit}; {left:.1f} s are left"

    def _refuse_the_late(self) -> None:
        """After a change for the worse: requests whose wait now goes past their deadlines."""
        ahead = 0
        for ticket in list(self._waiting):
            if (refusal := self._refusal(ticket, ahead)) is None:
                ahead += 1
                continue
            ticket._refused = refusal
            del self._waiting[ticket]
            ticket.wake()
        self._wake_first()


_NO_LIMITS = Limits()
_lock = threading.Lock()
_accounts: weakref.WeakValueDictionary[bytes, Account] = weakref.WeakValueDictionary()
_remembered: OrderedDict[Gate, None] = OrderedDict()


def gate(account: str, limits: Limits) -> Gate:
    """The gate for an LM. `account`: what identifies the server and the key; it is not kept."""
    return _find(sha256(account.encode(errors="surrogatepass")).digest(), limits)


def _find(key: bytes, limits: Limits) -> Gate:
    with _lock:
        account = _accounts.get(key)
        if account is None:
            account = _accounts[key] = Account(key)
        gate = account.gate(limits)
        _remembered[gate] = None
        _remembered.move_to_end(gate)
        if len(_remembered) > _REMEMBERED:
            _remembered.popitem(last=False)
    return gate
